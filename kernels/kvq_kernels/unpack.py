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

WORD_ELEMENTS = {"none": 2, "turbo": 8, "lm4": 8, "lm3": 16, "lm2": 16, "int8": 4, "int4": 8, "fp8": 4}
"""Elements of a 32-bit word of each scheme that can be read here; `none` is read as it lies.

lm3's words are of two bits, and go with 16 bits each from behind them.
"""


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
_OR_AND = (0xF0 | 0xCC) & 0xAA
_NOT_AND = ~0xF0 & 0xCC
_SIGNS = 0x80008000
_GATHER = (0x0020, 0x0031)
"""Bytes of a word whose nibbles are elements 0, 1, 4, 5 and 2, 3, 6, 7."""
_INTERLEAVE = (0x6240, 0x7351)
"""Bytes 0 and 2, or 1 and 3, of two words in turn."""


def _half(x: float) -> int:
    """The bits of x as fp16."""
    return int(torch.tensor(x, dtype=torch.float64).half().view(torch.int16)) & 0xFFFF


def _pair(x: float) -> int:
    return _half(x) * 0x10001


def _asm(*lines: str) -> str:
    return "{\n.reg .b32 i, s, l, h, t, u, x, y, p<4>;\n" + "".join(f"{x};\n" for x in lines) + "}"


def _tables(levels: tuple[float, ...]) -> str:
    """$4 n -> n times each of eight levels, for `_look_up`: $0 and $1 lower bytes, $2 and $3 upper bytes.

    A vector's own tables: nothing is left to multiply in its many codes, and what lanes compute stays in
    registers. ptxas knows that constants are the same for all lanes, and copies them before every look-up.
    """
    lines = []
    for half in range(2):
        for register, k in (("l", 4 * half), ("h", 4 * half + 2)):
            pair = _half(levels[k]) | _half(levels[k + 1]) << 16
            lines += [f"mov.b32 {register}, {pair}", f"mul.rn.f16x2 {register}, {register}, $4"]
        lines += [f"prmt.b32 ${half}, l, h, 0x6420", f"prmt.b32 ${half + 2}, l, h, 0x7531"]
    return _asm(*lines)


_TABLES = dict.fromkeys([*WORD_ELEMENTS, "e4m3"], "") | {
    "turbo": _tables(LEVELS[3]), "lm4": _tables(LEVELS[4][8:]), "lm3": _tables(LEVELS[3]),
}  # fmt: skip


def _look_up(tables: int, signed: str = "") -> list[str]:
    """p0 … p3 = what the nibbles of i, each below 8, have in the tables from operand `tables` on.

    These are elements (0, 4), (1, 5), (2, 6), (3, 7), four in a look-up of their lower and upper bytes. The
    high bits of the nibbles of `signed` change signs: here they lie as the upper bytes do.
    """
    lower, upper = (f"${tables + k}, ${tables + k + 1}" for k in (0, 2))
    lines = [f"shl.b32 u, {signed}, 4"] if signed else []
    for k, gather in enumerate(_GATHER):
        lines += [
            f"prmt.b32 s, i, i, {gather}",
            f"prmt.b32 l, {lower}, s",
            f"prmt.b32 h, {upper}, s",
        ]
        if signed:
            lines += [
                f"prmt.b32 t, u, {signed}, {_INTERLEAVE[k]}",
                f"lop3.b32 h, t, 0x80808080, h, {_AND_XOR}",
            ]
        lines += [f"prmt.b32 p{2 * k + j}, l, h, {_INTERLEAVE[j]}" for j in range(2)]
    return lines


def _turbo() -> str:
    """$4 codes, $5 … tables of n · level, $9 -n · s -> n · (level ± s): the sign bits flip -n · s."""
    lines = ["and.b32 i, $4, 0x77777777", *_look_up(5)]
    for j in range(4):
        lines += [
            f"shl.b32 t, $4, {12 - 4 * j}",
            f"lop3.b32 t, t, {_SIGNS}, $9, {_AND_XOR}",
            f"add.rn.f16x2 ${j}, p{j}, t",
        ]
    return _asm(*lines)


def _lm4() -> str:
    """$4 codes, $5 … tables of -n · level -> n · level: codes below 8 are mirrored, the high bit signs."""
    return _asm(
        f"lop3.b32 t, $4, 0x88888888, 0, {_NOT_AND}",
        "shr.u32 u, t, 3",
        "sub.u32 t, t, u",
        f"lop3.b32 i, $4, t, 0x77777777, {_XOR_AND}",
        *_look_up(5, "$4"),
        *(f"mov.b32 ${j}, p{j}" for j in range(4)),
    )


def _lm3() -> str:
    """$8 low bits, $9 high bits, $10 … tables of n · level: eight codes at a time become nibbles."""
    lines = ["prmt.b32 t, $9, 0, 0x4140"]
    for distance, mask in ((4, 0x0F0F0F0F), (2, 0x33333333)):
        lines += [f"shl.b32 u, t, {distance}", f"lop3.b32 t, t, u, {mask}, {_OR_AND}"]
    for parity in range(2):
        lines += [
            f"shr.u32 s, $8, {2 * parity}",
            "and.b32 s, s, 0x33333333",
            f"shl.b32 u, t, {2 - parity}",
            f"lop3.b32 i, u, 0x44444444, s, {_AND_OR}",
            *_look_up(10),
            *(f"mov.b32 ${2 * k + parity}, p{k}" for k in range(4)),
        ]
    return _asm(*lines)


def _lm2() -> str:
    """$8 planes, $9 n · small, $10 n · small ^ n · large -> ±n · small or large: a bit becomes a mask."""
    lines = []
    for j in range(8):
        lines += [
            f"shl.b32 t, $8, {7 - j}",
            "prmt.b32 u, t, t, 0xAA88",
            f"lop3.b32 u, u, $10, $9, {_AND_XOR}",
            f"lop3.b32 ${j}, t, {_SIGNS}, u, {_AND_XOR}",
        ]
    return _asm(*lines)


def _int8() -> str:
    """$2 codes, $3 scale, $4 minimum -> code · scale + minimum, rounded once."""
    lines = [f"mov.b32 x, {_pair(-1024)}"]
    for j, selector in enumerate(("0x4240", "0x4341")):
        lines += [
            f"prmt.b32 t, $2, {_pair(1024) | 0x00640064}, {selector}",
            "add.rn.f16x2 t, t, x",
            f"fma.rn.f16x2 ${j}, t, $3, $4",
        ]
    return _asm(*lines)


def _int4() -> str:
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


def _fp8() -> str:
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


def _e4m3() -> str:
    """$2 codes, $3 scale -> e4m3 · scale, by the conversion of sm_89 and later."""
    return _asm(
        ".reg .b16 a, b",
        "prmt.b32 s, $2, $2, 0x3120",
        "mov.b32 {a, b}, s",
        "cvt.rn.f16x2.e4m3x2 t, a",
        "cvt.rn.f16x2.e4m3x2 u, b",
        "mul.rn.f16x2 $0, t, $3",
        "mul.rn.f16x2 $1, u, $3",
    )


_ASSEMBLY = {
    "turbo": (_turbo(), 4, 5), "lm4": (_lm4(), 4, 4), "lm3": (_lm3(), 8, 5),
    "lm2": (_lm2(), 8, 2), "int8": (_int8(), 2, 2),
    "int4": (_int4(), 4, 2), "fp8": (_fp8(), 2, 1), "e4m3": (_e4m3(), 2, 1),
}  # fmt: skip
"""scheme -> instructions, registers that they fill, operands that they need beside the word."""


@triton.constexpr_function
def assembly(scheme: str) -> str:
    return _ASSEMBLY[scheme][0]


@triton.constexpr_function
def tables(scheme: str) -> str:
    """Instructions that make a vector's tables; empty where the scheme has none."""
    return _TABLES[scheme]


@triton.constexpr_function
def registers(scheme: str) -> int:
    """Of two fp16 numbers each, that a word becomes."""
    return _ASSEMBLY[scheme][1]


@triton.constexpr_function
def numbers(scheme: str) -> int:
    return _ASSEMBLY[scheme][2]


@triton.constexpr_function
def row_words(scheme: str, head_dim: int) -> int:
    """Words of a vector's codes."""
    words = head_dim // WORD_ELEMENTS[scheme]
    return words * 3 // 2 if scheme == "lm3" else words


@triton.constexpr_function
def _constraints(scheme: str) -> str:
    return ",".join(["=&r"] * registers(scheme) + ["r"] * (1 + numbers(scheme)))


@triton.constexpr_function
def _types(scheme: str) -> tuple:
    return (tl.int32,) * registers(scheme)


_SMALL, _LARGE = tl.constexpr(LEVELS[2][2]), tl.constexpr(LEVELS[2][3])
_ALL = tl.constexpr(tl.PropagateNan.ALL)
_LARGEST_NORM = tl.constexpr(20000.0)
"""Norms are clamped to it: times the largest level they stay finite in fp16. No model's vectors get there."""
_LARGEST_SCALE = tl.constexpr(37000.0 / 256)
"""Of fp8, for the same reason."""
_LARGEST_SUM = tl.constexpr(65000.0)
"""Minimum + largest code · scale, likewise."""


# --- tiles --------------------------------------------------------------------------------------------------


@triton.jit
def unpacked(word, high, first, second, SCHEME: tl.constexpr):
    """Words [N, W] and their vectors' metadata [N], see `load_meta` -> fp16 [N, D] in `unpacked_order`.

    high [N, W]: lm3's high bits, not looked at otherwise. "e4m3" is fp8 on sm_89 and later.

    Calls no other kernel function, so that Gluon can compile it as well. Clamped NaN stays NaN.
    """
    N: tl.constexpr = word.shape[0]
    W: tl.constexpr = word.shape[1]
    COUNT: tl.constexpr = registers(SCHEME)
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    if SCHEME == "fp8" or SCHEME == "e4m3":
        x = tl.minimum(first, _LARGEST_SCALE, propagate_nan=_ALL)
        if SCHEME == "fp8":
            x *= 256.0
    elif SCHEME == "int8" or SCHEME == "int4":
        CODES: tl.constexpr = 255.0 if SCHEME == "int8" else 15.0
        x = tl.minimum(first, (second - _LARGEST_SUM) * (-1 / CODES), propagate_nan=_ALL)
        y = second
    else:
        x = tl.minimum(first, _LARGEST_NORM, propagate_nan=_ALL)
        if SCHEME == "turbo":
            y = -x * second
        elif SCHEME == "lm4":
            x = -x
        elif SCHEME == "lm2":
            y = x * _LARGE
            x = x * _SMALL
    # each number twice in a register
    x = (x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001
    operands = [word]
    if SCHEME == "lm3":
        operands += [high.to(tl.int32)]
    if tables(SCHEME) != "":
        made = tl.inline_asm_elementwise(
            tables(SCHEME), "=&r,=&r,=&r,=&r,r", [x], (tl.int32,) * 4, True, 1
        )  # fmt: skip
        operands += [tl.broadcast_to(table[:, None], (N, W)) for table in made]
    else:
        operands += [tl.broadcast_to(x[:, None], (N, W))]
    if SCHEME == "turbo" or SCHEME == "lm2" or SCHEME == "int8" or SCHEME == "int4":
        y = (y.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001
        if SCHEME == "lm2":
            y = x ^ y
        operands += [tl.broadcast_to(y[:, None], (N, W))]
    r = tl.inline_asm_elementwise(
        assembly(SCHEME), _constraints(SCHEME), operands, _types(SCHEME), True, 1
    )  # fmt: skip
    if COUNT == 2:
        pairs = tl.join(r[0], r[1])
    elif COUNT == 4:
        pairs = tl.join(tl.join(r[0], r[2]), tl.join(r[1], r[3]))
    else:
        even = tl.join(tl.join(r[0], r[4]), tl.join(r[2], r[6]))
        odd = tl.join(tl.join(r[1], r[5]), tl.join(r[3], r[7]))
        pairs = tl.join(even, odd)
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(low, high), (N, W * COUNT * 2))


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
        W: tl.constexpr = D // PER
        i = tl.arange(0, W)
        STRIDE: tl.constexpr = row_words(SCHEME, D)
        # codes of invalid rows need no mask: whatever they are, their metadata is zero
        word = tl.load(codes.to(tl.pointer_type(tl.int32), bitcast=True) + row[:, None] * STRIDE + i[None, :])
        high = word
        if SCHEME == "lm3":
            halves = (codes + W * 4).to(tl.pointer_type(tl.int16), bitcast=True)
            high = tl.load(halves + row[:, None] * (STRIDE * 2) + i[None, :])
        tile = unpacked(word, high, first, second, SCHEME)
    return tile
