"""The machine that runs PTX: what it makes of instructions, and what it refuses."""

import numpy as np
import pytest
import torch

from tests.kernels import machine
from tests.kernels.machine import LANES, Memory, Warp, parse, run_block, run_kernel

KERNEL = """
.visible .entry copy(
    .param .u64 .ptr .global .align 1 copy_param_0,
    .param .u64 .ptr .global .align 1 copy_param_1,
    .param .u32 copy_param_2
)
{{
    .reg .pred %p<2>;
    .shared .align 16 .b8 held[256];
    ld.param.b64 %rd1, [copy_param_0];
    ld.param.b64 %rd2, [copy_param_1];
    ld.param.b32 %r9, [copy_param_2];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    mov.u32 %r3, held;
    add.s32 %r3, %r3, %r2;
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    cp.async.ca.shared.global [%r3], [%rd3], 4;
    cp.async.commit_group;
    {wait};
    bar.sync 0;
    xor.b32 %r4, %r2, 128;
    mov.u32 %r5, held;
    add.s32 %r5, %r5, %r4;
    ld.shared.b32 %r6, [%r5];
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    setp.lt.u32 %p1, %r1, %r9;
    {store}
    ret;
}}
"""
WAIT, STORE = "cp.async.wait_group 0", "@%p1 st.global.b32 [%rd4], %r6;"


def copied(wait: str = WAIT, store: str = STORE, room: int = 64) -> torch.Tensor:
    """What two warps store of what the other one has copied."""
    source, target = torch.arange(64, dtype=torch.int32), torch.full((room,), -1, dtype=torch.int32)
    run_kernel(KERNEL.format(wait=wait, store=store), (1,), [source, target, 50], warps=2, shared_bytes=0)
    return target


def test_warps_meet_at_a_barrier() -> None:
    expected = (torch.arange(64) + 32) % 64
    expected[50:] = -1
    assert torch.equal(copied().long(), expected)


def test_copies_are_not_there_before_they_are_waited_for() -> None:
    assert not torch.equal(copied(), copied("cp.async.wait_group 1"))


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("@%p1 st.global.b32 [%rd4+2], %r6;", "not a multiple of 4"),
        ("st.global.b32 [%rd4+8], %r6;", "no tensor has the address"),
        ("@%p1 bra DONE;\nDONE:", "lanes part"),
        ("frobnicate.b32 %r1, %r2;", "does not know frobnicate"),
    ],
)
def test_refuses(store: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        copied(store=store)


def test_banks() -> None:
    meets = machine._meets_a_bank_twice
    assert not meets(LANES * 4, 4) and not meets(LANES * 16, 16) and not meets(LANES * 0, 4)
    assert meets(LANES * 8, 4) and meets(LANES * 32, 16)


def test_permute() -> None:
    a, b = np.array([0x03020100, 0x83828180], np.uint32), np.array([0x07060504, 0x87868584], np.uint32)
    (result,) = run_block("{ prmt.b32 $0, $1, $2, 0xF470; }", a, b)  # the last: the sign of byte 7
    assert result.tolist() == [0x00040700, 0xFF848780]


@pytest.mark.parametrize("kinds", ["f32.f16.f16.f32", "s32.u8.s8.s32"])
def test_product(kinds: str) -> None:
    """Against the whole matrices, whose elements lie where the ISA's figures have them."""
    depth, each = (16, 2) if "f16" in kinds else (32, 4)
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 99, (16, depth)), generator.integers(-99, 99, (depth, 8))
    dtypes = (np.float16, np.float16) if each == 2 else (np.uint8, np.int8)
    g, t = LANES // 4, LANES % 4

    def words(pick: np.ndarray, dtype: type) -> np.ndarray:
        return np.ascontiguousarray(pick.astype(dtype)).view(np.uint32)[:, 0]

    k = (each * t)[:, None] + np.arange(each)
    operands = [words(a[(g + r)[:, None], k + half], dtypes[0]) for half in (0, depth // 2) for r in (0, 8)]
    operands += [words(b[k + half, g[:, None]], dtypes[1]) for half in (0, depth // 2)]
    names = {f"%r{i}": x for i, x in enumerate(operands)} | {
        f"%c{i}": np.zeros(32, np.uint32) for i in range(4)
    }
    shape = "m16n8k16" if each == 2 else "m16n8k32"
    sums = "{%c0, %c1, %c2, %c3}"
    line = f"mma.sync.aligned.{shape}.row.col.{kinds} {sums}, {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}}, {sums};"
    warp = Warp(parse(line), names, Memory(), np.zeros(0, np.uint8))
    assert list(warp.run()) == []
    for i in range(4):
        result = warp.names[f"%c{i}"].view(np.float32 if each == 2 else np.int32)
        assert (result == (a @ b)[g + 8 * (i // 2), 2 * t + i % 2]).all()
