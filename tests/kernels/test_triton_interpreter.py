"""The plain Triton kernels in Triton's interpreter, on a CPU, in a process of their own.

A process with TRITON_INTERPRET set can compile nothing, so this file runs itself: without the variable it
holds one test for each half of the cases, which starts pytest on this file again with the variable set.
The interpreter knows no bf16 products: bf16 is tested on a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kernels import machine
from tests.kernels.naive import Case, build, check, decode, key_bias, prefill
from tests.kernels.pairwise import pairwise

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
PARTS = ("store", "decode", "prefill")

pytest.importorskip("triton")

if not INSIDE:

    @pytest.mark.interpreter
    @pytest.mark.parametrize("part", PARTS)
    def test_in_interpreter(part: str) -> None:
        root = Path(__file__).parents[2]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-q", __file__, "-k", part]
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        env.pop("PYTEST_ADDOPTS", None)
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

else:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    from kvq_core.codecs import get_codec
    from kvq_core.policies import CODEC_NAMES
    from kvq_kernels import (
        history_gluon,
        paged_decode,
        paged_prefill,
        quantize_store,
        reference,
    )
    from kvq_kernels.layout import EncoderOptions, PageLayout, RawWindow

    CODECS = (
        "none:none", "int8:int8", "int4:int4", "fp8:fp8", "turbo:lm2", "lm4:lm2", "lm3:lm4", "int8:lm3",
        "qjl:lm2-plain", "turbo-rms:qjl", "fp8:turbo",
    )  # fmt: skip
    WINDOWS = ({}, {"window": 1}, {"window": 50}, {"window": 64, "softcap": 3.0})
    RAW = ({}, {}, {"sink": 4}, {"recent": 9}, {"sink": 2, "recent": 70})

    def label(axes: dict) -> str:
        return str(case_of(axes))

    def case_of(axes: dict) -> Case:
        key, value = axes["codecs"].split(":")
        return Case(
            key, value, key_dim=axes["head_dim"], value_dim=axes["head_dim"], group=axes["group"], kv_heads=1,
            dtype=axes["dtype"], sinks=axes["sinks"], page_size=axes["page_size"],
            contexts=axes.get("contexts", ()), chunks=axes.get("chunks", ()), **axes["window"], **axes["raw"],
        )  # fmt: skip

    SHARED_AXES = {
        "codecs": CODECS,
        "head_dim": (64, 128, 256),
        "group": (1, 2, 3, 4, 5, 8),
        "window": WINDOWS,
        "raw": RAW,
        "dtype": (torch.float16, torch.float32),
        "sinks": (False, True),
        "page_size": (64, 16),
    }
    DECODE = pairwise(
        SHARED_AXES
        | {
            "contexts": ((1,), (63, 1), (64, 0), (65,), (1000,), (5, 129)),
            "splits": (1, 2, 3, None),
        }
    )
    PREFILL = pairwise(
        SHARED_AXES
        | {
            "contexts": ((0, 0), (64, 0), (63, 1), (130, 65)),
            "chunks": ((1, 20), (17, 1), (64, 33)),
        }
    )

    UNPACKED = pairwise(
        {
            "codecs": (
                "turbo:lm2", "lm2:turbo", "turbo-rms:lm4", "lm4:int4", "int4:int8", "int8:fp8", "fp8:none",
                "none:lm2", "lm3:lm3",
            ),
            "head_dim": (64, 128),
            "group": (1, 3, 8),
            "window": WINDOWS,
            "raw": RAW,
            "dtype": (torch.float16,),
            "sinks": (False, True),
            "page_size": (64, 16),
            "contexts": ((0, 0), (64, 0), (63, 1), (330, 65)),
            "chunks": ((1, 20), (17, 1), (64, 33)),
        }
    )  # fmt: skip

    def run_assembly(assembly, constraints, operands, dtype, is_pure, pack):
        words = [x.handle.data.astype(np.int32).view(np.uint32) for x in operands]
        shape = [int(n) for n in operands[0].shape]
        results = (TensorHandle(x.view(np.int32), tl.int32) for x in machine.run_block(assembly, *words))
        return tuple(tl.tensor(x, tl.block_type(tl.int32, shape)) for x in results)

    @pytest.mark.parametrize("axes", DECODE, ids=label)
    def test_decode(axes: dict) -> None:
        problem = build(case_of(axes), reference.store, reference.store_raw)
        check(decode(problem, paged_decode.paged_decode, splits=axes["splits"]), problem)

    def test_decode_leaves_rows_without_context_to_others() -> None:
        case = Case("turbo", "lm2", contexts=(70, 0, 5), sink=1, recent=2, dtype=torch.float16)
        problem = build(case, reference.store, reference.store_raw)
        lens = torch.tensor(case.contexts, dtype=torch.int32)
        for op in (paged_decode.paged_decode, reference.paged_decode):
            arguments = (problem.query, problem.pages, problem.tables, lens, problem.layout)
            fresh = op(*arguments, **problem.options)
            shared = torch.full_like(fresh, 7.0)
            assert op(*arguments, out=shared, **problem.options) is shared
            assert torch.equal(shared[[0, 2]], fresh[[0, 2]]) and (shared[1] == 7).all()
            assert (fresh[1] == 0).all()

    @pytest.mark.parametrize("axes", PREFILL, ids=label)
    def test_prefill(axes: dict) -> None:
        problem = build(case_of(axes), reference.store, reference.store_raw)
        check(prefill(problem, paged_prefill.paged_prefill), problem)

    @pytest.mark.parametrize("splits", [1, 3])
    @pytest.mark.parametrize("axes", UNPACKED, ids=label)
    def test_prefill_unpacks_by_ptx(axes: dict, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The path of sm_80+, its inline assembly run in numpy."""
        monkeypatch.setattr(tl, "inline_asm_elementwise", run_assembly)
        monkeypatch.setattr(paged_prefill, "_unpacks_fast", lambda layout, device: True)
        monkeypatch.setattr(paged_prefill, "_num_splits", lambda programs, tiles, device: splits)
        problem = build(case_of(axes), reference.store, reference.store_raw)
        check(prefill(problem, paged_prefill.paged_prefill), problem)

    @triton.jit
    def find_block_kernel(found, cu_chunk_lens, chunks, BT: tl.constexpr):
        item = tl.program_id(0)
        chunk, block = history_gluon.find_block(item, cu_chunk_lens, chunks, BT)
        tl.store(found + 2 * item, chunk)
        tl.store(found + 2 * item + 1, block)

    @pytest.mark.parametrize("lengths", [(5,), (16, 0, 1, 33, 0), (0, 0, 40), (1, 1, 1)])
    def test_prefill_finds_blocks(lengths: tuple[int, ...]) -> None:
        """Every block of 16 tokens of every chunk once, in a packed batch that begins at token 3."""
        bounds = torch.tensor((3, *lengths), dtype=torch.int32).cumsum(0).int()
        blocks = -(-sum(lengths) // 16) + len(lengths) - 1
        found = torch.full((blocks, 2), -1, dtype=torch.int32)
        find_block_kernel[(blocks,)](found, bounds, len(lengths), 16)
        real = [(c, b) for c, b in found.tolist() if b * 16 < lengths[c]]
        assert real == [(c, b) for c, n in enumerate(lengths) for b in range(-(-n // 16))]

    @pytest.mark.parametrize("head_dim", [80, 96, 192])
    @pytest.mark.parametrize(
        "codecs", ["none:int8", "int4:fp8", "int8:none", "fp8:int4", "turbo:lm2", "lm3:lm4", "qjl:qjl"]
    )
    def test_decode_and_prefill_of_padded_head_dims(codecs: str, head_dim: int) -> None:
        key, value = codecs.split(":")
        case = Case(
            key,
            value,
            key_dim=head_dim,
            value_dim=80,
            contexts=(40, 3),
            sink=1,
            recent=2,
            dtype=torch.float16,
        )
        problem = build(case, quantize_store.store, quantize_store.store_raw)
        check(decode(problem, paged_decode.paged_decode), problem)
        problem = build(case.with_chunks((5, 9)), quantize_store.store, quantize_store.store_raw)
        check(prefill(problem, paged_prefill.paged_prefill), problem)

    @pytest.mark.parametrize("codecs", ["turbo:lm2", "int4:int8", "qjl:lm3"])
    @pytest.mark.parametrize("part", ["decode", "prefill"])
    def test_key_bias(codecs: str, part: str) -> None:
        """What pages leave out: the twin adds it to keys, the kernel to scores."""
        key, value = codecs.split(":")
        case = Case(
            key, value, contexts=(70, 3), page_size=64, sink=1, recent=2, window=60, dtype=torch.float32
        )
        problem = build(case.with_chunks((5, 9)) if part == "prefill" else case, reference.store,
                        reference.store_raw)  # fmt: skip
        bias = key_bias(problem)
        run = prefill if part == "prefill" else decode
        op = paged_prefill.paged_prefill if part == "prefill" else paged_decode.paged_decode
        expected = run(problem, getattr(reference, f"paged_{part}"), bias=bias)
        plain = run(problem, getattr(reference, f"paged_{part}"))
        result = run(problem, op, bias=bias)
        torch.testing.assert_close(result, expected, rtol=2e-3, atol=2e-3)
        assert (expected - plain).abs().max() > 0.1, "the bias changes nothing: this shows nothing"

    @pytest.mark.parametrize("magnitude", [1e-3, 100.0])
    @pytest.mark.parametrize(
        "codecs", ["none:none", "int8:int8", "fp8:fp8", "turbo:lm2", "lm3:int4", "qjl:qjl"]
    )
    def test_decode_and_prefill_of_small_and_large_values(codecs: str, magnitude: float) -> None:
        """fp16's range: weights times scales must not vanish, nor overflow."""
        key, value = codecs.split(":")
        case = Case(key, value, contexts=(600, 3), page_size=64, dtype=torch.float16, magnitude=magnitude)
        problem = build(case, reference.store, reference.store_raw)
        check(decode(problem, paged_decode.paged_decode), problem)
        problem = build(case.with_chunks((5, 9)), reference.store, reference.store_raw)
        check(prefill(problem, paged_prefill.paged_prefill), problem)

    @pytest.mark.parametrize(("head_dim", "page_size"), [(16, 48), (32, 32)])
    @pytest.mark.parametrize("codecs", ["none:none", "int4:int8", "turbo:lm2", "lm3:lm4"])
    def test_decode_and_prefill_of_tiny_head_dims(codecs: str, head_dim: int, page_size: int) -> None:
        key, value = codecs.split(":")
        case = Case(
            key, value, key_dim=head_dim, value_dim=head_dim, contexts=(100, 3), page_size=page_size,
            dtype=torch.float16,
        )  # fmt: skip
        problem = build(case, quantize_store.store, quantize_store.store_raw)
        check(decode(problem, paged_decode.paged_decode), problem)
        problem = build(case.with_chunks((5, 9)), quantize_store.store, quantize_store.store_raw)
        check(prefill(problem, paged_prefill.paged_prefill), problem)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    @pytest.mark.parametrize("name", CODEC_NAMES)
    def test_store(name: str, head_dim: int, dtype: torch.dtype) -> None:
        """The twin's bytes, from strided views, at random slots; the odd code may fall to its neighbour."""
        codec = get_codec(name)
        layout = PageLayout(codec, get_codec("int4"), 16, 2, head_dim, 64, dtype)
        packed = torch.randn(21, 2 * head_dim + 2 * 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        packed[3] = 0
        if not codec.rotated:  # rotated it is zeros with rounding errors, whose signs are arbitrary
            packed[4] = packed[4, 0]
        packed[5] *= 1e4 if dtype == torch.float16 else 1e9
        packed[6] *= 1e-7
        key, value = (
            packed[:, : 2 * head_dim].unflatten(1, (2, -1)),
            packed[:, 2 * head_dim :].unflatten(1, (2, -1)),
        )
        slots = torch.randperm(16 * 6, generator=torch.Generator().manual_seed(2))[:21] + 16
        ours, twin = (layout.empty_pages(8, "cpu").fill_(0xAB) for _ in range(2))
        quantize_store.store(key, value, ours, slots, layout)
        reference.store(key, value, twin, slots, layout)
        different = (ours != twin).sum().item()
        assert different <= (0 if not codec.rotated else twin.numel() // 500), different

    @pytest.mark.parametrize(
        ("head_dim", "dtype"),
        [(64, torch.float16), (128, torch.float16), (256, torch.float16), (64, torch.float32)],
        ids=str,
    )
    @pytest.mark.parametrize("name", CODEC_NAMES)
    def test_store_in_any_number_of_lanes(
        name: str, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Vectors in more lanes, as where tokens are few, become the same bytes."""
        layout = PageLayout(get_codec(name), get_codec(name), 16, 1, head_dim, head_dim, dtype)
        key, value = torch.randn(2, 9, 1, head_dim, generator=torch.Generator().manual_seed(4)).to(dtype)
        slots = torch.randperm(16, generator=torch.Generator().manual_seed(2))[:9]
        written = []
        for few in ({}, {9: 8}, {9: 16}):
            monkeypatch.setattr(quantize_store, "_FEW_LANES", few)
            written.append(layout.empty_pages(1, "cpu"))
            quantize_store.store(key, value, written[-1], slots, layout)
        assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])
        assert written[0].any()

    def test_qjl_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
        """The bytes of parts, also where the last program has few rows."""
        layout = PageLayout(get_codec("qjl"), get_codec("lm2-plain"), 16, 1, 128, 128, torch.float16)
        key, value = torch.randn(2, 70, 1, 128, generator=torch.Generator().manual_seed(4)).half()
        slots = torch.randperm(80, generator=torch.Generator().manual_seed(2))[:70]
        written = []
        for few in ({70: 8}, {}):
            monkeypatch.setattr(quantize_store, "_FEW_LANES", few)
            written.append(layout.empty_pages(6, "cpu"))
            quantize_store.store(key, value, written[-1], slots, layout)
        assert written[0].any() and all(torch.equal(written[0], pages) for pages in written)

    @pytest.mark.parametrize("head_dim", [64, 96])
    @pytest.mark.parametrize("name", [name for name in CODEC_NAMES if name != "none"])
    def test_store_of_what_is_not_finite(name: str, head_dim: int) -> None:
        """A NaN spoils its vector's metadata, an infinity counts as the largest number."""
        codec = get_codec(name)
        layout = PageLayout(codec, codec, 16, 1, head_dim, head_dim, torch.float32)
        x = torch.randn(4, 1, head_dim, generator=torch.Generator().manual_seed(5))
        x[1, 0, 7] = float("nan")
        x[2, 0, 9] = float("-inf")
        ours, twin = (layout.empty_pages(2, "cpu") for _ in range(2))
        for write, pages in ((quantize_store.store, ours), (reference.store, twin)):
            write(x, x, pages, torch.arange(4) + 16, layout)
        read = []
        for page in (ours[1, 0], twin[1, 0]):
            codes = page[: layout.value_offset].view(16, -1)[:4]
            meta = page[layout.meta_offset :].view(torch.float16).view(2, codec.num_meta, 16)[0, :, :4].T
            read.append(codec.decode(codes, meta, head_dim, torch.float32))
        assert read[0][1].isnan().any() and read[1][1].isnan().any()
        assert read[0][2].isfinite().all() and read[0][2].norm() > 5e4
        torch.testing.assert_close(read[0][[0, 3]], read[1][[0, 3]], rtol=2e-3, atol=2e-3)

    def test_store_writes_only_its_own_rows() -> None:
        layout = PageLayout(get_codec("lm3"), get_codec("fp8"), 16, 2, 64, 96, torch.float32)
        pages = layout.empty_pages(3, "cpu").fill_(0xAB)
        quantize_store.store(torch.randn(1, 2, 64), torch.randn(1, 2, 96), pages, torch.tensor([20]), layout)
        assert (pages[[0, 2]] == 0xAB).all()
        changed = (pages[1] != 0xAB).sum(1)
        assert (changed <= layout.bytes_per_token_head).all() and (changed > 100).all()

    @pytest.mark.parametrize("anchor", ["rms", "peak"])
    @pytest.mark.parametrize("residual", ["abs", "rms"])
    @pytest.mark.parametrize("norm", ["plain", "corrected", "unbiased", "balanced"])
    @pytest.mark.parametrize("name", ["lm2", "turbo"])
    def test_store_with_scale_candidates(name: str, norm: str, residual: str, anchor: str) -> None:
        """Every way of choosing codes gives the twin's bytes."""
        import copy

        codec = copy.copy(get_codec(name))
        candidates = (1.0, 0.9, 1.1) if anchor == "rms" else (2.4, 2.2, 2.7)
        codec.encoder = EncoderOptions(norm, residual, candidates, anchor)
        layout = PageLayout(codec, codec, 16, 1, 64, 64, torch.float32)
        x = torch.randn(20, 1, 64, generator=torch.Generator().manual_seed(3))
        ours, twin = (layout.empty_pages(3, "cpu") for _ in range(2))
        slots = torch.arange(20) + 16
        quantize_store.store(x, -x, ours, slots, layout)
        reference.store(x, -x, twin, slots, layout)
        assert (ours != twin).sum() <= twin.numel() // 500

    def test_store_e4m3_is_torchs() -> None:
        """Every fp16 number within range, scaled by exactly 1: the bytes are torch's own conversion."""
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
        every = every[every.isfinite() & (every.abs() < 448)].float()
        rows = torch.nn.functional.pad(every, (0, -len(every) % 255)).view(-1, 255)
        rows = torch.cat((rows, torch.full((len(rows), 1), 448.0)), 1)[:, None]
        layout = PageLayout(get_codec("fp8"), get_codec("fp8"), 64, 1, 256, 256, torch.float32)
        pages = layout.empty_pages(1 + -(-len(rows) // 64), "cpu")
        quantize_store.store(rows, rows, pages, torch.arange(len(rows)) + 64, layout)
        codes = pages[1:, 0, : layout.value_offset].reshape(-1, 256)[: len(rows)]
        assert torch.equal(codes, rows[:, 0].to(torch.float8_e4m3fn).view(torch.uint8))

    @pytest.mark.parametrize(("sink", "recent"), [(2, 4), (0, 3), (5, 0)])
    def test_store_raw(sink: int, recent: int) -> None:
        shape = (3, sink + recent, 2)
        ours, twin = (
            RawWindow(sink, recent, torch.zeros(*shape, 64), torch.zeros(*shape, 96)) for _ in range(2)
        )
        key, value = torch.randn(2, 13, 64).transpose(0, 1), torch.randn(13, 2, 96)
        position = torch.arange(13)
        ring = torch.tensor(1, dtype=torch.int32).expand(13)
        keep = (position < sink) | (position >= 13 - recent)
        for write, raw in ((quantize_store.store_raw, ours), (reference.store_raw, twin)):
            write(key, value, position, ring, raw, keep)
            write(key[:1] + 1, value[:1], position[-1:] + 1, ring[:1], raw)
        assert torch.equal(ours.keys, twin.keys) and torch.equal(ours.values, twin.values)
        assert ours.keys.abs().sum() > 0
