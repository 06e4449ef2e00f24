"""Decode in one warp and the store, compiled for sm_90 and run by `machine.py` on a CPU."""

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("a process that interprets kernels can't compile them", allow_module_level=True)

from kvq_core.codecs import get_codec
from kvq_core.engine.graphs import ANY, decode_sizes, mixed_sizes
from kvq_core.policies import CODEC_NAMES
from kvq_kernels import history_gluon, paged_decode, paged_prefill, quantize_store, reference, warp_decode
from kvq_kernels import warp_ptx as ptx
from kvq_kernels.layout import PageLayout
from tests.kernels import compiling, machine
from tests.kernels.compiling import pretend, recording
from tests.kernels.naive import Case, Problem, build, check, decode
from tests.kernels.pairwise import pairwise


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 90)


FEATURES = {
    "plain": {},
    "window": {"window": 50},
    "recent": {"sink": 4, "recent": 20},
    "all": {"window": 100, "softcap": 3.0, "sinks": True, "sink": 4, "recent": 20},
}
AXES = {
    "codecs": (
        "none:none", "int8:int8", "int4:int4", "fp8:fp8", "turbo:lm2", "lm4:lm2", "turbo:int8", "int8:lm2",
        "lm4:int4", "int4:fp8", "fp8:none", "none:lm2",
        "lm4:lm4", "int8:lm4", "lm3:lm3", "lm3:lm2", "int8:lm3",
    ),
    "head_dim": (64, 128),
    "group": (1, 3, 4, 8),
    "feature": tuple(FEATURES),
    "splits": (None, 1, 2, 3, 4, 8, 13),
    "processors": (1, 132),
    "dtype": (torch.bfloat16, torch.float16),
}  # fmt: skip


def name(axes: dict) -> str:
    return "-".join(str(x).removeprefix("torch.") for x in axes.values())


def problem_of(axes: dict, contexts: tuple[int, ...]) -> Problem:
    key, value = axes["codecs"].split(":")
    case = Case(
        key, value, key_dim=axes["head_dim"], value_dim=axes["head_dim"], kv_heads=1, group=axes["group"],
        contexts=contexts, page_size=64, dtype=axes["dtype"], **FEATURES[axes["feature"]],
    )  # fmt: skip
    return build(case, reference.store, reference.store_raw)


@pytest.mark.parametrize("axes", pairwise(AXES), ids=name)
def test_decode(axes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one multiprocessor, a program has several teams, and more than there are sequences for."""
    monkeypatch.setattr(paged_decode, "_multiprocessors", lambda device: axes["processors"])
    if "lm3" in axes["codecs"]:
        axes = axes | {"head_dim": 128}  # the portable kernel has the others
    problem = problem_of(axes, contexts=(1, 0, 63, 330, 129))
    with recording(paged_decode, warp_decode, run=True) as launches:
        out = decode(problem, paged_decode.paged_decode, splits=axes["splits"])
    assert launches[0].name == "_warp_decode_kernel"
    assert launches[0].counts["conflicts"] == 0 or "lm3" in axes["codecs"], "lanes met in a bank"
    check(out, problem)


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_without_context_are_left_to_others(splits: int) -> None:
    """Zeros where the result is new; in a given one they stay what they are."""
    axes = {"codecs": "turbo:lm2", "head_dim": 64, "group": 3, "dtype": torch.bfloat16, "feature": "plain"}
    problem = problem_of(axes, contexts=(200, 0, 65))
    with recording(paged_decode, warp_decode, run=True):
        new = decode(problem, paged_decode.paged_decode, splits=splits)
        given = torch.full_like(new, 7.0)
        decode(problem, paged_decode.paged_decode, splits=splits, out=given)
    check(new, problem)
    assert (new[1] == 0).all() and (given[1] == 7).all()
    assert torch.equal(given[[0, 2]], new[[0, 2]])


@pytest.mark.parametrize(
    ("codecs", "requests", "kv_heads", "longest", "expected"),
    [
        ("turbo:lm2", 64, 4, 16384, (1, 8, 16)),
        ("turbo:lm2", 64, 8, 4096, (1, 4, 16)),
        ("turbo:lm2", 8, 4, 65536, (4, 16, 16)),
        ("turbo:lm2", 64, 4, 512, (1, 4, 4)),
        ("turbo:lm2", 1, 4, 128, (1, 4, 4)),
        ("turbo:lm2", 8, 32, 128, (1, 2, 2)),
        ("turbo:lm2", 256, 32, 4096, (1, 1, 1)),
        ("none:none", 64, 4, 4096, (1, 4, 8)),
        ("none:none", 64, 8, 4096, (1, 2, 8)),
        ("int4:int4", 1, 1, 64, (1, 2, 2)),
        ("int8:int8", 10_000, 8, 1024, (1, 1, 1)),
    ],
)
def test_plan(
    codecs: str, requests: int, kv_heads: int, longest: int, expected: tuple[int, int, int]
) -> None:
    """On an H200: parts, team, warps. No program asks for more memory than there is, here or on an A100."""
    key, value = (get_codec(name) for name in codecs.split(":"))
    layout = PageLayout(key, value, 64, kv_heads, 128, 128, torch.bfloat16)
    assert warp_decode.plan(requests, layout, longest, 132, 227 << 10, None)[:3] == expected
    for memory in (227 << 10, 163 << 10, 99 << 10):
        plan = warp_decode.plan(requests, layout, longest, 108, memory, None)
        ring = ptx.ring_bytes(*warp_decode._schemes(layout), 128, plan.tile, plan.team)
        assert plan.warps * (ring + 128) <= memory and plan.warps % plan.team == 0


@pytest.mark.parametrize("kv_heads", [1, 4, 32])
@pytest.mark.parametrize("codecs", ["turbo:lm2", "int8:int8", "none:none"])
def test_steps_without_a_graph_need_no_other_kernel(
    codecs: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled while requests wait: large steps launch what graphs were captured with."""
    for module in (paged_decode, paged_prefill):
        monkeypatch.setattr(module, "_multiprocessors", lambda device: 132)
    key, value = (get_codec(name) for name in codecs.split(":"))
    layout = PageLayout(key, value, 64, kv_heads, 128, 128, torch.bfloat16)
    pages, scale = layout.empty_pages(1, "cpu"), 0.1

    def tensors(count: int, *heads: int) -> list[torch.Tensor]:
        return [torch.empty(count, n, 128, dtype=torch.bfloat16) for n in heads]

    def numbers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def decodes(count: int, beside_chunks: bool) -> None:
        query, out = tensors(count, 32, 32)
        paged_decode.paged_decode(
            query, pages, numbers(count, 640), numbers(count), layout, scale=scale, max_context=ANY,
            out=out if beside_chunks else None,
        )  # fmt: skip

    def chunks(tokens: int, count: int, longest: int, history: int) -> None:
        query, out, k, v = tensors(tokens, 32, 32, kv_heads, kv_heads)
        paged_prefill.paged_prefill(
            query, k, v, pages, numbers(count, 640), numbers(count + 1), numbers(count), layout,
            max_chunk=longest, max_history=history, scale=scale, out=out,
        )  # fmt: skip

    modules = paged_decode, warp_decode, paged_prefill, history_gluon
    with recording(*modules) as captured:
        for size in decode_sizes(300):
            decodes(size, False)
        for history in (False, True):
            for size in mixed_sizes(2048, history):
                chunks(size, min(16, size), size, ANY if history else 0)
                decodes(min(300, size), True)
    with recording(*modules) as launched:
        for count in range(1, 301):
            decodes(count, True)
        for step in ((8192, 43, 1200, 0), (3840, 22, 700, 150), (8192, 60, 8000, 33), (2500, 3, 2000, 8192)):
            chunks(*step)
    assert launched
    assert {launch.variant for launch in launched} <= {launch.variant for launch in captured}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_residuals_meet_all_digits_of_fp16(head_dim: int, seed: int) -> None:
    """Half of the query's would do for bf16, and come out at twice the error of torch here."""
    case = Case(
        "turbo", "lm2", key_dim=head_dim, value_dim=head_dim, kv_heads=1, group=4, window=50,
        contexts=(1, 63, 64, 65, 300, 200), page_size=64, dtype=torch.float16, seed=seed,
    )  # fmt: skip
    problem = build(case, reference.store, reference.store_raw)
    with recording(paged_decode, warp_decode, run=True):
        check(decode(problem, paged_decode.paged_decode), problem)


FAULTS = {
    "a step is read before its copies are there": ("cp.async.wait_group 1", "cp.async.wait_group 2"),
    "warps do not meet": ("bar.sync ", "// bar.sync "),
    "weights are not transposed": ("movmatrix.sync.aligned.m8n8.trans.b16", "mov.b32"),
    "a table's levels are permuted": ("0x77777777", "0x67777777"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = FAULTS[fault]
    planted = []

    def run_wrong(ptx: str, *arguments: Any) -> Any:
        planted.append(right in ptx)
        return machine.run_kernel(ptx.replace(right, wrong), *arguments)

    axes = {"codecs": "turbo:lm2", "head_dim": 128, "group": 4, "feature": "plain", "dtype": torch.bfloat16}
    problem = problem_of(axes, contexts=(330, 200))
    monkeypatch.setattr(compiling, "run_kernel", run_wrong)
    with pytest.raises((AssertionError, ValueError)), recording(paged_decode, warp_decode, run=True):
        check(decode(problem, paged_decode.paged_decode, splits=2), problem)
    assert any(planted), f"there is no {right}"


STORES = [
    (codec, dim, lanes)
    for codec in CODEC_NAMES
    for dim in (64, 96, 128)
    for lanes in (4, 8, 16)
    if codec != "qjl" or (dim != 96 and lanes > 4)  # a warpgroup's product, which the machine does not know
]


@pytest.mark.parametrize(("codec", "head_dim", "lanes"), STORES)
def test_store(codec: str, head_dim: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin's bytes; codes at a threshold may fall to the neighbour."""
    monkeypatch.setattr(quantize_store, "_FEW_LANES", {2**20: lanes} if lanes > 4 else {})
    layout = PageLayout(get_codec(codec), get_codec(codec), 64, 2, head_dim, head_dim, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 21, 2, head_dim, generator=generator).bfloat16()
    key[3], key[7, 0] = 0, key[7, 0] * 1000
    if not layout.value.rotated:  # rotated, it is zeros but for one number, and all of them at a threshold
        value[5] = 1.5
    slots = torch.randperm(128, generator=generator)[:21] + 64
    ours, twin = (layout.empty_pages(3, "cpu").fill_(7) for _ in range(2))
    with recording(quantize_store, run=True) as launches:
        quantize_store.store(key, value, ours, slots, layout)
    reference.store(key, value, twin, slots, layout)
    assert [launch.name for launch in launches] == ["_store_kernel"]
    different = (ours != twin).sum().item()
    assert different <= (21 * layout.bytes_per_token_head // 100 if layout.key.rotated else 0), different
