"""Every kernel compiles for every architecture, without a GPU, and stays within its resources."""

import os
from dataclasses import replace

import pytest
import torch

from tests.kernels.naive import Case, build, decode, key_bias, prefill

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("a process that interprets kernels can't compile them", allow_module_level=True)

from kvq_kernels import history_gluon, paged_decode, paged_prefill, quantize_store, reference, warp_decode
from tests.kernels.compiling import SHARED_LIMIT, pretend, recording, resources

FULL = {"window": 100, "softcap": 5.0, "sinks": True, "sink": 4, "recent": 20}
CASES = {
    "turbo-D128": (Case("turbo", "lm2", key_dim=128, value_dim=128), (75, 80, 86, 89, 90)),
    "lm4-D128": (Case("lm4", "lm2", key_dim=128, value_dim=128), (90,)),
    "lm4s-D128": (Case("lm4", "lm4", key_dim=128, value_dim=128), (80, 90)),
    "lm3-D128": (Case("lm3", "lm3", key_dim=128, value_dim=128), (86, 90)),
    "int-D128": (Case("int8", "int4", key_dim=128, value_dim=128), (75, 80, 86, 89, 90)),
    "none-D128": (Case("none", "none", key_dim=128, value_dim=128, **FULL), (75, 90)),
    "fp8-D64": (Case("fp8", "fp8", **FULL), (75, 86, 90)),
    "turbo-raw-D64": (Case("turbo", "lm2", **FULL), (86, 90)),
    "mixed-D64": (Case("int4", "fp8"), (90,)),
    "lm-D256": (Case("lm3", "lm4", key_dim=256, value_dim=256), (80, 90)),
    "padded-D96x80": (Case("int4", "fp8", key_dim=96, value_dim=80), (75, 90)),
    "rotated-D96": (Case("turbo", "lm2", key_dim=96, value_dim=96), (75, 80, 86, 89, 90)),
    "rotated-D80x192": (Case("lm3", "lm4", key_dim=80, value_dim=192), (75, 90)),
    "qjl-D80": (Case("qjl", "qjl", key_dim=80, value_dim=80), (75, 90)),
    "qjl-D64": (Case("qjl", "qjl"), (75, 90)),
    "float32-D128": (Case("turbo", "int8", key_dim=128, value_dim=128), (86, 90)),
}
BIASED = {"biased-D128": (Case("turbo", "lm2", key_dim=128, value_dim=128), (75, 80, 90))}
CASES |= BIASED
SPECIALIZED_CASES = (
    "turbo-D128", "lm4-D128", "lm4s-D128", "lm3-D128", "int-D128", "fp8-D64", "turbo-raw-D64", "mixed-D64",
)  # fmt: skip
WARP_CASES = (
    "turbo-D128", "lm4-D128", "lm4s-D128", "lm3-D128", "int-D128", "none-D128", "fp8-D64", "turbo-raw-D64",
    "mixed-D64",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "capability"),
    [(name, capability) for name, (_, capabilities) in CASES.items() for capability in capabilities],
)
def test_compiles(name: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability)
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    if name.startswith("float32"):
        dtype = torch.float32
    case = replace(
        CASES[name][0],
        contexts=(200,),
        page_size=64,
        dtype=dtype,
        kv_heads=4,
        group=7 if "D64" in name else 8,
    )
    problem = build(case, reference.store, reference.store_raw)
    chunked = build(replace(case, chunks=(40,)), reference.store, reference.store_raw)
    with recording(quantize_store, paged_decode, paged_prefill, history_gluon, warp_decode) as launches:
        for lanes in (4, 8, 16):
            monkeypatch.setattr(quantize_store, "_FEW_LANES", {2**20: lanes} if lanes > 4 else {})
            quantize_store.store(
                problem.keys[0], problem.values[0], problem.pages, problem.slots, problem.layout
            )
        if problem.raw is not None:
            ring = torch.zeros(1, dtype=torch.int32)
            quantize_store.store_raw(
                problem.keys[0][:1], problem.values[0][:1], ring.long(), ring, problem.raw
            )
        biased = {"bias": key_bias(problem)} if name in BIASED else {}
        with monkeypatch.context() as portable:
            portable.setattr(warp_decode, "has_products", lambda device: False)
            decode(problem, paged_decode.paged_decode, splits=4, **biased)
        for splits in (1, 4, 7, 16):  # one or several warps of one or several programs
            decode(problem, paged_decode.paged_decode, splits=splits, **biased)
        prefill(chunked, paged_prefill.paged_prefill, **biased)
    specialized = name in SPECIALIZED_CASES and capability == 90
    history = "_history_gluon_kernel" if specialized else "_history_kernel"
    assert {launch.name for launch in launches} >= {
        "_store_kernel", "_decode_kernel", "_merge_kernel", history, "_fresh_kernel",
    }  # fmt: skip
    assert (name in WARP_CASES and capability >= 80) == any(x.name == "_warp_decode_kernel" for x in launches)
    for launch in launches:
        compiled = launch.compile(capability)
        assert compiled.metadata.shared <= SHARED_LIMIT[capability] * 1024, launch.name
        if launch.name == history and specialized:
            assert all(x in compiled.asm["ptx"] for x in ("wgmma", "setmaxnreg", "f16x2"))
        used = resources(compiled.asm["cubin"])
        fast = capability >= 80 and dtype != torch.float32 and name in ("turbo-D128", "int-D128", "none-D128")
        kernels = ("_store_kernel", "_decode_kernel", "_merge_kernel")
        if used and (launch.name == "_warp_decode_kernel" or (fast and launch.name in kernels)):
            assert used["STACK"] == used["LOCAL"] == 0, f"{launch.name} spills: {used}"
