"""Codes to fp16 by inline PTX, two elements an instruction: what prefill needs on the matrix units of sm_80+.

Codes are read as 32-bit words. A word of E elements becomes E/2 registers; register j holds elements j and
j + E/2 of the word, so that one shift brings the sign bits of both in place. Columns of a tile are therefore
permuted within each word, see `unpacked_order`: whoever meets a tile permutes alike (queries, outputs).

A tile holds what the codec decodes to in fp16, metadata included: nothing is left to apply to scores and
weights, which have far more elements than K and V where many queries share a tile.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_kernels.codebook import LEVELS

WORD_ELEMENTS = {"none": 2, "turbo": 8, "lm4": 8, "lm2": 16, "int8": 4, "int4": 8, "fp8": 4}
"""Elements of a 32-bit word of each scheme that can be read here; `none` is read as it lies."""


@lru_cache(maxsize=64)
def unpacked_order(per: int, head_dim: int, device: torch.device) -> Tensor:
    """[head_dim] int64: the element of the vector in each column of a tile, for words of `per` elements."""
    column = torch.arange(head_dim, device=device)
    inside = column % per
    return column - inside + inside % 2 * (per // 2) + inside // 2


@triton.jit
def unpacked_elements(PER: tl.constexpr, D: tl.constexpr):
    """`unpacked_order` inside a kernel."""
    element = tl.arange(0, D)
    if PER > 2:
        inside = element % PER
        element += inside % 2 * (PER // 2) + inside // 2 - inside
    return element


# --- instructions -------------------------------------------------------------------------------------------
# prmt d, a, b, s: byte i of d is byte (nibble i of s, below 8) of b:a. lop3's truth tables: a, b, c are
# 0xF0, 0xCC, 0xAA. fp16 numbers 1024 … 2047 have their distance from 1024 in the last bits: 0x6400 | n.

_AND_OR = (0xF0 & 0xCC) | 0xAA
_AND_XOR = (0xF0 & 0xCC) ^ 0xAA
_XOR_AND = (0xF0 ^ 0xCC) & 0xAA
_NOT_AND = ~0xF0 & 0xCC
_SIGNS = 0x80008000
_GATHER = (0x0020, 0x0031)
"""Bytes of a word whose nibbles are elements 0, 1, 4, 5 and 2, 3, 6, 7."""


def _half(x: float) -> int:
    """The bits of x as fp16."""
    return int(torch.tensor(x, dtype=torch.float64).half().view(torch.int16)) & 0xFFFF


def _pair(x: float) -> int:
    return _half(x) * 0x10001


def _asm(*lines: str) -> tl.constexpr:
    return tl.constexpr(
        "{\n.reg .b32 i, s, l, h, t, u, x, y, p<4>;\n" + "".join(f"{x};\n" for x in lines) + "}"
    )


def _constraints(outputs: int, inputs: int) -> tl.constexpr:
    return tl.constexpr(",".join(["=&r"] * outputs + ["r"] * inputs))


def _look_up(levels: tuple[float, ...]) -> list[str]:
    """p0 … p3 = the levels of the nibbles of i, each below 8: elements (0, 4), (1, 5), (2, 6), (3, 7).

    Four elements a look-up, in two tables of 8 bytes: the halves of fp16 numbers.
    """
    bits = [_half(level) for level in levels]
    tables = [
        int.from_bytes(bytes(x >> shift & 255 for x in bits[start : start + 4]), "little")
        for shift in (0, 8)
        for start in (0, 4)
    ]
    lines = []
    for k, gather in enumerate(_GATHER):
        lines += [
            f"prmt.b32 s, i, i, {gather}",
            f"prmt.b32 l, {tables[0]}, {tables[1]}, s",
            f"prmt.b32 h, {tables[2]}, {tables[3]}, s",
            f"prmt.b32 p{2 * k}, l, h, 0x6240",
            f"prmt.b32 p{2 * k + 1}, l, h, 0x7351",
        ]
    return lines


def _turbo() -> tl.constexpr:
    """$4 codes, $5 n, $6 -n · s -> n · (level ± s): the sign bits flip -n · s."""
    lines = ["and.b32 i, $4, 0x77777777", *_look_up(LEVELS[3])]
    for j in range(4):
        lines += [
            f"shl.b32 t, $4, {12 - 4 * j}",
            f"lop3.b32 t, t, {_SIGNS}, $6, {_AND_XOR}",
            f"fma.rn.f16x2 ${j}, p{j}, $5, t",
        ]
    return _asm(*lines)


def _lm4() -> tl.constexpr:
    """$4 codes, $5 -n -> n · level: codes below 8 are mirrored, the high bit is the sign."""
    lines = [
        f"lop3.b32 t, $4, 0x88888888, 0, {_NOT_AND}",
        "shr.u32 u, t, 3",
        "sub.u32 t, t, u",
        f"lop3.b32 i, $4, t, 0x77777777, {_XOR_AND}",
        *_look_up(LEVELS[4][8:]),
    ]
    for j in range(4):
        lines += [
            f"mul.rn.f16x2 p{j}, p{j}, $5",
            f"shl.b32 t, $4, {12 - 4 * j}",
            f"lop3.b32 ${j}, t, {_SIGNS}, p{j}, {_AND_XOR}",
        ]
    return _asm(*lines)


def _lm2() -> tl.constexpr:
    """$8 planes, $9 n · (large - small), $10 n · small -> ±n · small or large."""
    lines = [f"mov.b32 x, {_pair(1 / 128)}", f"mov.b32 y, {_pair(-8)}"]
    for j in range(8):
        lines += [
            f"shl.b32 t, $8, {7 - j}",
            f"lop3.b32 u, t, 0x00800080, {_pair(1024)}, {_AND_OR}",
            "fma.rn.f16x2 u, u, x, y",
            "fma.rn.f16x2 u, u, $9, $10",
            f"lop3.b32 ${j}, t, {_SIGNS}, u, {_AND_XOR}",
        ]
    return _asm(*lines)


def _int8() -> tl.constexpr:
    """$2 codes, $3 scale, $4 minimum -> code · scale + minimum, rounded once."""
    lines = [f"mov.b32 x, {_pair(-1024)}"]
    for j, selector in enumerate(("0x4240", "0x4341")):
        lines += [
            f"prmt.b32 t, $2, {_pair(1024) | 0x00640064}, {selector}",
            "add.rn.f16x2 t, t, x",
            f"fma.rn.f16x2 ${j}, t, $3, $4",
        ]
    return _asm(*lines)


def _int4() -> tl.constexpr:
    """$4 codes, $5 scale, $6 minimum -> code · scale + minimum, rounded once."""
    lines = [
        "shr.u32 s, $4, 8",
        f"mov.b32 u, {_pair(-1024)}",
        f"mov.b32 x, {_pair(1 / 16)}",
        f"mov.b32 y, {_pair(-64)}",
    ]
    for j, word in enumerate(("$4", "$4", "s", "s")):
        lines += [
            f"lop3.b32 t, {word}, {'0x00F000F0' if j % 2 else '0x000F000F'}, {_pair(1024)}, {_AND_OR}",
            "fma.rn.f16x2 t, t, x, y" if j % 2 else "add.rn.f16x2 t, t, u",
            f"fma.rn.f16x2 ${j}, t, $5, $6",
        ]
    return _asm(*lines)


def _fp8() -> tl.constexpr:
    """$2 codes, $3 256 · scale -> e4m3 · scale: its bits, moved to where fp16 has them, are a 256th."""
    lines = [
        "shl.b32 t, $2, 7",
        "shl.b32 u, $2, 8",
        "and.b32 t, t, 0x3F803F80",
        f"lop3.b32 t, u, {_SIGNS}, t, {_AND_OR}",
        "mul.rn.f16x2 $0, t, $3",
        "shr.u32 t, $2, 1",
        "and.b32 t, t, 0x3F803F80",
        f"lop3.b32 t, $2, {_SIGNS}, t, {_AND_OR}",
        "mul.rn.f16x2 $1, t, $3",
    ]
    return _asm(*lines)


_TURBO, _LM4, _LM2, _INT8, _INT4, _FP8 = _turbo(), _lm4(), _lm2(), _int8(), _int4(), _fp8()
_4_FROM_2, _4_FROM_3 = _constraints(4, 2), _constraints(4, 3)
_2_FROM_2, _2_FROM_3, _8_FROM_3 = _constraints(2, 2), _constraints(2, 3), _constraints(8, 3)
_SMALL, _LARGE = tl.constexpr(LEVELS[2][2]), tl.constexpr(LEVELS[2][3])
_LARGEST_NORM = tl.constexpr(20000.0)
"""Norms are clamped to it: times the largest level they stay finite in fp16. No model's vectors get there."""
_LARGEST_SCALE = tl.constexpr(37000.0 / 256)
"""Of fp8, for the same reason."""
_LARGEST_SUM = tl.constexpr(65000.0)
"""Minimum + largest code · scale, likewise."""


# --- tiles --------------------------------------------------------------------------------------------------


@triton.jit
def _doubled(x, W: tl.constexpr):
    """x [N] float32 -> [N, W]: twice as fp16 in a register."""
    N: tl.constexpr = x.shape[0]
    bits = (x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001
    return tl.broadcast_to(bits[:, None], (N, W))


@triton.jit
def _clamped(x, largest):
    """min(x, largest), but NaN stays NaN."""
    return tl.minimum(x, largest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_meta(meta, row, valid, MASKED: tl.constexpr, SCHEME: tl.constexpr, P: tl.constexpr):
    """The first two metadata numbers of rows `row` [N] of a page, fp16; zeros if MASKED and not `valid`.

    meta: fp16 pointer to the codec's first metadata row. What the scheme does not have is anything.
    """
    first = tl.zeros(row.shape, tl.float16)
    second = first
    if SCHEME != "none":
        mask = valid if MASKED else None
        other = 0.0 if MASKED else None
        first = tl.load(meta + row, mask=mask, other=other)
        if SCHEME == "turbo" or (SCHEME == "int8" or SCHEME == "int4"):
            second = tl.load(meta + P + row, mask=mask, other=other)
    return first, second


@triton.jit
def unpack_tile(
    codes, first, second, row, valid, MASKED: tl.constexpr, SCHEME: tl.constexpr, DTYPE: tl.constexpr,
    PER: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rows `row` [N] of a page -> their vectors [N, D], fp16 in `unpacked_order` (`none`: DTYPE, in order).

    codes: uint8 pointer to the block's K or V codes; first, second: see `load_meta`. If MASKED, rows that are
    not `valid` [N] are zeros, else `valid` is not looked at.
    """
    if SCHEME == "none":
        d = tl.arange(0, D)
        pointer = codes.to(tl.pointer_type(DTYPE), bitcast=True) + row[:, None] * D + d[None, :]
        tile = tl.load(pointer, mask=valid[:, None], other=0.0) if MASKED else tl.load(pointer)
    else:
        N: tl.constexpr = row.shape[0]
        W: tl.constexpr = D // PER
        i = tl.arange(0, W)
        # codes of invalid rows need no mask: whatever they are, their metadata is zero
        word = tl.load(codes.to(tl.pointer_type(tl.int32), bitcast=True) + row[:, None] * W + i[None, :])
        first = first.to(tl.float32)
        second = second.to(tl.float32)
        if SCHEME == "turbo":
            n = _clamped(first, _LARGEST_NORM)
            a, b, c, d = tl.inline_asm_elementwise(
                _TURBO, _4_FROM_3, [word, _doubled(n, W), _doubled(-n * second, W)],
                (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
            )  # fmt: skip
            pairs = tl.join(tl.join(a, c), tl.join(b, d))
        elif SCHEME == "lm4":
            a, b, c, d = tl.inline_asm_elementwise(
                _LM4, _4_FROM_2, [word, _doubled(-_clamped(first, _LARGEST_NORM), W)],
                (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
            )  # fmt: skip
            pairs = tl.join(tl.join(a, c), tl.join(b, d))
        elif SCHEME == "int4":
            scale = _clamped(first, (second - _LARGEST_SUM) * (-1 / 15))
            a, b, c, d = tl.inline_asm_elementwise(
                _INT4, _4_FROM_3,
                [word, _doubled(scale, W), _doubled(second, W)],
                (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
            )  # fmt: skip
            pairs = tl.join(tl.join(a, c), tl.join(b, d))
        elif SCHEME == "int8":
            scale = _clamped(first, (second - _LARGEST_SUM) * (-1 / 255))
            a, b = tl.inline_asm_elementwise(
                _INT8, _2_FROM_3,
                [word, _doubled(scale, W), _doubled(second, W)],
                (tl.int32, tl.int32), True, 1,
            )  # fmt: skip
            pairs = tl.join(a, b)
        elif SCHEME == "fp8":
            a, b = tl.inline_asm_elementwise(
                _FP8, _2_FROM_2, [word, _doubled(_clamped(first, _LARGEST_SCALE) * 256.0, W)],
                (tl.int32, tl.int32), True, 1,
            )  # fmt: skip
            pairs = tl.join(a, b)
        else:
            tl.static_assert(SCHEME == "lm2")
            n = _clamped(first, _LARGEST_NORM)
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                _LM2, _8_FROM_3, [word, _doubled(n * (_LARGE - _SMALL), W), _doubled(n * _SMALL, W)],
                (tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
            )  # fmt: skip
            even = tl.join(tl.join(a, e), tl.join(c, g))
            odd = tl.join(tl.join(b, f), tl.join(d, h))
            pairs = tl.join(even, odd)
        low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        tile = tl.reshape(tl.join(low, high), (N, D))
    return tile
