"""The expert kernel against its twin, in Triton's interpreter in a process of its own, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = {
    "T1-K2-E8": (1, 2, 8, 128, 64),
    "T5-K2-E4": (5, 2, 4, 128, 64),
    "T40-K2-E4-several-tiles": (40, 2, 4, 256, 192),
    "T70-K1-E2-reloads": (70, 1, 2, 128, 64),
}  # fmt: skip
"""T, K, E, H, I"""

if not INSIDE:

    @pytest.mark.interpreter
    def test_in_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-q", __file__]
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        env.pop("PYTEST_ADDOPTS", None)
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


if INSIDE or torch.cuda.is_available():
    from kvq_kernels import moe, reference

    DEVICE = "cpu" if INSIDE else "cuda"

    @pytest.mark.parametrize("padding", [False, True], ids=["all-valid", "padding"])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_equals_the_twin(shape: tuple[int, int, int, int, int], padding: bool) -> None:
        tokens, top_k, count, width, inner = shape
        generator = torch.Generator().manual_seed(tokens)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(DEVICE, torch.float16)

        x, gate_up, down = normal(tokens, width), normal(count, 2 * inner, width), normal(count, width, inner)
        gate_up, down = gate_up * width**-0.5, down * inner**-0.5
        weights, index = normal(tokens, count).float().softmax(-1).topk(top_k, -1)
        valid = torch.arange(tokens, device=DEVICE) % 3 != 1 if padding else None
        out = moe.experts(x, index, weights.half(), gate_up, down, valid)
        expected = reference.experts(x.double(), index, weights.half().double(), gate_up, down)
        rows = slice(None) if valid is None else valid
        error = (out.double() - expected)[rows].norm() / expected[rows].norm()
        assert error < 2e-3

    @pytest.mark.parametrize(
        "tokens,top_k,count,inner", [(1, 2, 8, 64), (37, 2, 5, 128), (300, 4, 300, 64), (430, 1, 3, 192)]
    )
    def test_large_steps_equal_the_twin(tokens: int, top_k: int, count: int, inner: int) -> None:
        """Whole tiles, rests of 1 to 16, to 64 and more pairs, experts without any."""
        generator = torch.Generator().manual_seed(tokens)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(DEVICE, torch.float16)

        x = normal(tokens, 128)
        gate_up, down = normal(count, 2 * inner, 128) / 11, normal(count, 128, inner) / inner**0.5
        weights, index = normal(tokens, count).float().softmax(-1).topk(top_k, -1)
        index[-1, 0] = count - 1
        if top_k == 1:
            index[:] = torch.tensor([0] * 275 + [1] * 140 + [2] * 15, device=DEVICE)[:, None]
        out = moe.sorted_experts(x, index, weights.half(), gate_up, down)
        expected = reference.experts(x.double(), index, weights.half().double(), gate_up, down)
        assert (out.double() - expected).norm() / expected.norm() < 2e-3
        assert moe.sorted_experts(x, index, weights.half(), gate_up, down).equal(out)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
    @pytest.mark.parametrize("count,top_k", [(128, 8), (60, 4), (8, 2), (5, 1)])
    def test_route_equals_the_twin(count: int, top_k: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(count)
        logits = (3 * torch.randn(9, count, generator=generator)).to(DEVICE, dtype)
        logits[1] = 0  # all equal: the first experts
        logits[2] = -logits[2].abs()
        logits[3, ::2] = float("-inf")
        for normalize in (True, False):
            weights, index = moe.route(logits, top_k, normalize, torch.float32)
            expected, chosen = reference.route(logits, top_k, normalize, torch.float32)
            assert index.equal(chosen) and index.dtype == torch.int64
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
            assert moe.route(logits, top_k, normalize, dtype)[0].dtype == dtype

    def test_padding_costs_no_expert() -> None:
        """Tokens that are not valid are in no expert's list: NaN in them reaches nobody."""
        x = torch.randn(6, 128).to(DEVICE, torch.float16)
        gate_up = torch.randn(2, 128, 128).to(DEVICE, torch.float16) * 0.1
        down = torch.randn(2, 128, 64).to(DEVICE, torch.float16) * 0.1
        index = torch.tensor([[0], [1], [0], [1], [0], [1]], device=DEVICE)
        weights = torch.ones(6, 1, dtype=torch.float16, device=DEVICE)
        valid = torch.tensor([True, True, True, True, False, False], device=DEVICE)
        clean = moe.experts(x[:4], index[:4], weights[:4], gate_up, down)
        x[4:] = float("nan")
        assert moe.experts(x, index, weights, gate_up, down, valid)[:4].equal(clean)

    def test_shapes_and_dtypes_that_the_kernel_takes() -> None:
        def weights(width: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.empty(1, 2 * inner, width, dtype=dtype), torch.empty(1, width, inner, dtype=dtype)

        assert moe.takes(*weights(128, 64, torch.bfloat16))
        assert not moe.takes(*weights(128, 64, torch.float32))
        assert not moe.takes(*weights(96, 64, torch.bfloat16))
        assert not moe.takes(*weights(128, 32, torch.bfloat16))
