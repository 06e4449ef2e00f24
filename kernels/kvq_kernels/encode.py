"""Every codec's bytes inside a kernel, the other way than `bits.py`: vectors to codes and metadata.

Tiles are [R, D], D padded to a power of two (`DP`). A row lies in a few lanes of one warp, contiguous
elements in each: sums over it need two or three shuffles, packing and most of the rotation none. Codes are
floats that hold small integers, exactly, until they are packed, and comparisons products that saturate to 0
or 1: additions and products are twice as fast as comparisons, selections and shifts. Levels lie alike on both
sides of zero: magnitudes are coded, signs set last. Divisions by a row's number are products, square roots of
the rotated codecs approximate to the last place or two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_kernels.codebook import LARGEST, LEVELS, thresholds

_MAGNITUDES_2 = tl.constexpr(LEVELS[2][2:])
_MAGNITUDES_3 = tl.constexpr(LEVELS[3][4:])
_MAGNITUDES_4 = tl.constexpr(LEVELS[4][8:])
_SHARP = tl.constexpr(2.0**60)
_EDGES_2 = tl.constexpr(tuple(-(2.0**60) * x for x in thresholds(2)[2:]))
_EDGES_3 = tl.constexpr(tuple(-(2.0**60) * x for x in thresholds(3)[4:]))
_EDGES_4 = tl.constexpr(tuple(-(2.0**60) * x for x in thresholds(4)[8:]))
_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def load_rows(
    base, stride, first, tokens, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr
):
    """Rows first … first + R - 1 of `base`, zero from row `tokens` on -> [R, DP], zero beyond D.

    A row lies in LANES lanes of a warp, quarters of it in lanes 0 to 3 and others that differ by multiples of
    4, which suits products of matrices. Chunks of 16 bytes a lane are loaded as tiles that leave Triton no
    other layout, or, of more rows than a warp has lanes for, whose first dims it gives lanes to first.
    """
    INNER: tl.constexpr = 32 // LANES if LANES * R >= 32 else R
    CHUNK: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    COUNT: tl.constexpr = DP // (LANES * CHUNK)
    OUTER: tl.constexpr = max(LANES // 4, 1)
    lane = tl.arange(0, LANES)
    d = (lane % 4 * OUTER + lane // 4) * (COUNT * CHUNK)
    d = d[:, None, None, None] + tl.arange(0, CHUNK)[None, None, None, :]
    row = first + tl.arange(0, INNER)[:, None] + (tl.arange(0, R // INNER) * INNER)[None, :]
    row = row[None, :, :, None]
    rows = base + row.to(tl.int64) * stride
    x = _chunk(rows, row < tokens, d, OUTER, D, DP)
    if COUNT == 1:
        x = tl.permute(x, (3, 2, 1, 0, 4))
    elif COUNT == 2:
        x = tl.join(x, _chunk(rows, row < tokens, d + CHUNK, OUTER, D, DP))
        x = tl.permute(x, (3, 2, 1, 0, 5, 4))
    else:
        tl.static_assert(COUNT == 4)
        x = tl.join(x, _chunk(rows, row < tokens, d + 2 * CHUNK, OUTER, D, DP))
        y = tl.join(
            _chunk(rows, row < tokens, d + CHUNK, OUTER, D, DP),
            _chunk(rows, row < tokens, d + 3 * CHUNK, OUTER, D, DP),
        )
        x = tl.permute(tl.join(x, y), (3, 2, 1, 0, 5, 6, 4))
    return tl.reshape(x, (R, DP))


@triton.jit
def _chunk(rows, mask, d, OUTER: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[LANES, ·, ·, CHUNK], lanes as [OUTER, up to 4]."""
    x = tl.load(rows + d, mask=mask if D == DP else mask & (d < D), other=0.0)
    return tl.reshape(x, (OUTER, x.shape[0] // OUTER, x.shape[1], x.shape[2], x.shape[3]))


# --- pieces -------------------------------------------------------------------------------------------------


@triton.jit
def _total(x):
    """Sums over rows of x [R, DP], the same to the last bit in any number of lanes up to 16."""
    parts = tl.sum(tl.reshape(x, (x.shape[0], 2, 2, 2, 2, x.shape[1] // 16)), 5)
    return tl.sum(tl.sum(tl.sum(tl.sum(parts, 4), 3), 2), 1)


@triton.jit
def _to_half(x):
    """fp16, saturated; NaN stays NaN."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -65504.0), 65504.0), x).to(tl.float16)


@triton.jit
def _round_even(x):
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _encode_e4m3(x):
    """float32 within ±448 -> e4m3 bytes, bit for bit as torch rounds them, on any architecture."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = _round_even(tl.abs(x) * 512.0).to(tl.int32)
    code = tl.where(bits < 0x3C800000, subnormal, normal)
    code = tl.where(x == x, tl.minimum(code, 0x7F), 0x7F)
    return (sign | code).to(tl.uint8)


@triton.jit
def _over(x, by):
    """x / by to the last place or two, 0 where `by` is 0."""
    return tl.where(by == 0, 0.0, x / tl.where(by == 0, 1.0, by))


@triton.jit
def _divide(x, by):
    """x / by as IEEE rounds it, 0 where `by`, a number of at most 11 bits, is 0.

    The product with a reciprocal is a few units of the last place off, and what it leaves of x is known
    exactly: P. Markstein, Computation of elementary functions on the IBM RISC System/6000 (1990). No quotient
    lies so close to the middle of two floats that the last step could fall to the wrong side. (The compiler's
    own division calls a subroutine in rare cases, for which it keeps registers free.)
    """
    inverse = _over(1.0, by)
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, by, x), inverse, quotient)


@triton.jit
def _flip(x, sign):
    """x with its sign changed where `sign` is negative."""
    bits = x.to(tl.int32, bitcast=True) ^ (sign.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _place(
    base, page_stride, slot, OFFSET: tl.constexpr, BYTES: tl.constexpr, META: tl.constexpr, P: tl.constexpr
):
    """Pointers [R] to the codes and to the first metadata of slots.

    Called last: slots, which nobody has read yet, arrive while vectors are encoded.
    """
    slot = slot.to(tl.uint32)
    block = base + (slot // P).to(tl.int64) * page_stride
    row = slot % P
    return block + OFFSET + row * BYTES, (block + META).to(tl.pointer_type(tl.float16), bitcast=True) + row


@triton.jit
def _pack(code, COUNT: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr):
    """code [R, DP], numbers around MIDDLE, of which COUNT make 16 bits -> [R, DP / COUNT] uint16.

    The first is in the lowest bits, the next BITS higher.
    """
    words = _sum(code, COUNT, BITS) + MIDDLE * ((2 ** (COUNT * BITS) - 1) // (2**BITS - 1))
    return _to_word(words)


@triton.jit
def _sum(code, COUNT: tl.constexpr, BITS: tl.constexpr):
    """code [R, DP], COUNT of it times their places in 16 bits -> sums [R, DP / COUNT] float32."""
    place = (1 << (tl.arange(0, COUNT) * BITS)).to(tl.float32)
    return tl.sum(tl.reshape(code, (code.shape[0], code.shape[1] // COUNT, COUNT)) * place[None, None, :], 2)


@triton.jit
def _to_word(x):
    """Integers below 2^16 -> uint16."""
    return (x + 8388608.0).to(tl.int32, bitcast=True).to(tl.uint16)


@triton.jit
def _store_words(codes, words, mask, OFFSET: tl.constexpr, COUNT: tl.constexpr):
    """words [R, PAD] uint16, COUNT of them, to `codes` [R] + OFFSET bytes."""
    PAD: tl.constexpr = words.shape[1]
    i = tl.arange(0, PAD)
    typed = (codes + OFFSET).to(tl.pointer_type(tl.uint16), bitcast=True)
    inside = mask[:, None] if PAD == COUNT else mask[:, None] & (i < COUNT)[None, :]
    tl.store(typed[:, None] + i[None, :], words, mask=inside)


@triton.jit
def _store_bytes(codes, byte, mask, D: tl.constexpr):
    """byte [R, DP], D of them, to `codes` [R] pointers of rows."""
    DP: tl.constexpr = byte.shape[1]
    i = tl.arange(0, DP)
    inside = mask[:, None] if DP == D else mask[:, None] & (i < D)[None, :]
    tl.store(codes[:, None] + i[None, :], byte, mask=inside)


@triton.jit
def _within(x, D: tl.constexpr):
    """x [R, DP] with zeros beyond D."""
    DP: tl.constexpr = x.shape[1]
    return x if DP == D else tl.where((tl.arange(0, DP) < D)[None, :], x, 0.0)


@triton.jit
def _hold(x, words):
    """x [R, DP], not known before words [R, DP / COUNT] are, finite numbers.

    The compiler would keep what words are made of, up to COUNT registers each, while it works on x.
    """
    COUNT: tl.constexpr = x.shape[1] // words.shape[1]
    nothing = tl.where(tl.arange(0, COUNT)[None, None, :] == 0, (words * 0.0)[:, :, None], -0.0)
    return tl.reshape(tl.reshape(x, (x.shape[0], words.shape[1], COUNT)) + nothing, x.shape)


# --- the projection of qjl ----------------------------------------------------------------------------------

PARTS = 4
"""Programs that can share the projection of some vectors: each has every fourth four of its columns."""
_PARTS = tl.constexpr(PARTS)


def projection_operand(projection: Tensor) -> Tensor:
    """A matrix [D, D] that `_project` multiplies with, D a power of two from 64 on: in its operands' order.

    Rows (k) are dims of vectors as threads have them in 4 lanes, eight of each quarter in two products of 16,
    of which each has a register's two of the first four and of the next; columns (n) are such that a thread
    gets what belongs to these dims.
    """
    size = len(projection)
    tile, half, steps, column, quarter, two, step, one = torch.meshgrid(
        *(torch.arange(n) for n in (size // 16, 2, size // 32, 8, 4, 2, 2, 2)), indexing="ij"
    )
    k = quarter * (size // 4) + (steps * 2 + step) * 4 + two * 2 + one
    n = (column // 2) * (size // 4) + tile * 4 + half * 2 + column % 2
    return projection.cpu()[k, n].to(projection.device)


def projection_square(projection: Tensor) -> Tensor:
    """A matrix [D, D] that `_project_all` multiplies with, zero beyond D up to a power of two.

    From 64 on, powers of two are in the order that `_project_all` has: each product of 16 (k) is of the same
    dims as one of `projection_operand`, so that sums are alike.
    """
    size = len(projection)
    padded = triton.next_power_of_2(size)
    if padded != size or size < 64:
        rest = padded - size
        return torch.nn.functional.pad(projection, (0, rest, 0, rest))
    steps, two, step, quarter, one = torch.meshgrid(
        *(torch.arange(n) for n in (size // 32, 2, 2, 4, 2)), indexing="ij"
    )
    k = (quarter * (size // 4) + (steps * 2 + step) * 4 + two * 2 + one).flatten()
    column, quarter, one = torch.meshgrid(*(torch.arange(n) for n in (size // 8, 4, 2)), indexing="ij")
    n = (quarter * (size // 4) + column * 2 + one).flatten()
    return projection.cpu()[k[:, None], n[None, :]].to(projection.device)


@triton.jit
def load_operand(projection, part, D: tl.constexpr):
    """A part of the matrix: [32, D / 64, D / 32, 8] for either half of the columns, 16 bytes a thread."""
    STEPS: tl.constexpr = D // 32
    tile = tl.arange(0, D // 16 // _PARTS) * _PARTS + part
    i = (tile * 2 * STEPS)[None, :, None, None] + tl.arange(0, STEPS)[None, None, :, None]
    i = (i * 32 + tl.arange(0, 32)[:, None, None, None]) * 8 + tl.arange(0, 8)[None, None, None, :]
    return tl.load(projection + i), tl.load(projection + STEPS * 256 + i)


@triton.jit
def _project(x, first, second):
    """Signs of x [R, D] fp16 times a part of the matrix -> words [R, D / 16]: the highest bits of nibbles.

    Operands are joined, from which the compiler takes it that a thread has four rows (k) in a row.
    """
    D: tl.constexpr = x.shape[1]
    N: tl.constexpr = D // _PARTS
    y = tl.reshape(tl.join(first, second), (8, 4, N // 16, D // 32, 2, 2, 2, 2))
    y = tl.reshape(tl.permute(y, (3, 5, 1, 4, 6, 2, 7, 0)), (D, N))
    x = tl.permute(tl.reshape(x, (x.shape[0], 4, D // 16, 4)), (0, 2, 1, 3))
    z = tl.dot(tl.reshape(x, (x.shape[0], D)), y)
    z = tl.permute(tl.reshape(z, (x.shape[0], N // 16, 2, 4, 2)), (0, 3, 1, 2, 4))
    z = tl.reshape(z, (x.shape[0], N))
    return _to_word(_sum(_not_negative(z), 4, 4) * 8.0)


@triton.jit
def _project_all(x, projection, ORDERED: tl.constexpr):
    """1 where x [R, D] fp16 times `projection_square` is not negative, 0 elsewhere.

    Of 64 rows, four warps have 8 and other 8 in the registers of a product, as `load_rows` gave them.
    """
    R: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    WARPS: tl.constexpr = 4 if R >= 64 else 1
    FAR: tl.constexpr = R // 64 if R >= 64 else 1
    ROWS: tl.constexpr = R // (WARPS * FAR * 2)
    if ORDERED:
        x = tl.reshape(x, (FAR, 2, WARPS, ROWS, 4, D // 32, 2, 2, 2))
        x = tl.reshape(tl.permute(x, (0, 2, 1, 3, 5, 7, 6, 4, 8)), (R, D))
    z = tl.dot(x, projection)
    if ORDERED:
        z = tl.reshape(z, (FAR, WARPS, 2, ROWS, D // 8, 4, 2))
        z = tl.reshape(tl.permute(z, (0, 2, 1, 3, 5, 4, 6)), (R, D))
    return _not_negative(z)


@triton.jit
def _not_negative(z):
    """1 or 0: sums of products of fp16 are zero or far from it."""
    return tl.clamp(tl.fma(z, _SHARP, 1.0), 0.0, 1.0)


# --- Lloyd-Max codes ----------------------------------------------------------------------------------------


@triton.jit
def _pick2(b, V0: tl.constexpr, V1: tl.constexpr):
    """V0 where b is 0, V1 where it is 1."""
    return b * (V1 - V0) + V0


@triton.jit
def _pick4(high, low, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr):
    return low * _pick2(high, V1 - V0, V3 - V2) + _pick2(high, V0, V2)


@triton.jit
def _above(x, edge):
    """1 where x > -edge / _SHARP, 0 elsewhere: a product that saturates, at twice a comparison's rate."""
    return tl.clamp(tl.fma(x, _SHARP, edge), 0.0, 1.0)


@triton.jit
def _nearest(size, FIRST: tl.constexpr, inverse, BITS: tl.constexpr, D: tl.constexpr):
    """size ≥ 0 -> FIRST + index of the magnitude nearest to size / inverse, and that magnitude, 0 beyond D.

    A binary search; what is compared with next is picked by multiplying with 0 or 1.
    """
    if BITS == 2:
        A: tl.constexpr = _MAGNITUDES_2
        low = _above(size, _EDGES_2[0] * inverse)
        index = low + FIRST
        level = _pick2(low, A[0], A[1])
    elif BITS == 3:
        B: tl.constexpr = _MAGNITUDES_3
        E: tl.constexpr = _EDGES_3
        high = _above(size, E[1] * inverse)
        low = _above(size, tl.fma(high, (E[2] - E[0]) * inverse, E[0] * inverse))
        index = (high * 2 + FIRST) + low
        level = _pick4(high, low, B[0], B[1], B[2], B[3])
    else:
        C: tl.constexpr = _MAGNITUDES_4
        F: tl.constexpr = _EDGES_4
        top = _above(size, F[3] * inverse)
        high = _above(size, tl.fma(top, (F[5] - F[1]) * inverse, F[1] * inverse))
        first = tl.fma(top, (F[4] - F[0]) * inverse, F[0] * inverse)
        step = tl.fma(top, (F[6] - F[4] - F[2] + F[0]) * inverse, (F[2] - F[0]) * inverse)
        low = _above(size, tl.fma(high, step, first))
        index = (high * 2 + (top * 4 + FIRST)) + low
        step = _pick4(top, high, C[1] - C[0], C[3] - C[2], C[5] - C[4], C[7] - C[6])
        level = low * step + _pick4(top, high, C[0], C[2], C[4], C[6])
    return index, _within(level, D)


@triton.jit
def _candidate(k, CANDIDATES: tl.constexpr):
    """CANDIDATES[k] and its inverse, to the same bit whether or not the compiler knows k."""
    candidate, inverse = CANDIDATES[0], 1.0 / CANDIDATES[0]
    for j in tl.static_range(1, len(CANDIDATES)):
        candidate = tl.where(k == j, CANDIDATES[j], candidate)
        inverse = tl.where(k == j, 1.0 / CANDIDATES[j], inverse)
    return candidate, inverse


@triton.jit
def _try(
    size, candidate, inverse, SCHEME: tl.constexpr, BITS: tl.constexpr, RESIDUAL: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Of codes of size · candidate: their product with size, their square, and turbo's residual scale, [R].

    The candidate's inverse comes with it. What could be rounded in two ways is not left to the compiler.
    """
    if BITS == 2:  # both follow from the larger magnitudes' number and sum
        A: tl.constexpr = _MAGNITUDES_2
        large = _above(size, _EDGES_2[0] * inverse)
        dot = tl.fma(_total(large * size), A[1] - A[0], A[0] * _total(size))
        square = A[0] * A[0] * D + (A[1] * A[1] - A[0] * A[0]) * tl.sum(large, 1)
    else:
        _, level = _nearest(size, 0.0, inverse, BITS, D)
        dot = _total(size * level)
        square = _total(level * level)
    scale = dot * 0.0
    if SCHEME == "turbo":
        rest = size * candidate - level
        length = _total(tl.abs(rest))
        if RESIDUAL == "abs":
            scale = (length * (1.0 / D)).to(tl.float16).to(tl.float32)
        else:
            scale = tl.sqrt(_total(rest * rest) * (1.0 / D)).to(tl.float16).to(tl.float32)
        # codes are level + scale · sign of rest, and Σ level · sign = candidate · Σ size · sign - Σ |rest|
        signed = _total(_flip(size, rest))
        square += scale * (2 * (candidate * signed - length) + scale * D)
        dot += scale * signed
    return dot, square, scale


@triton.jit
def _store_rotated(
    x, base, page_stride, slot, mask, projection, part,
    SCHEME: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, CANDIDATES: tl.constexpr,
    ANCHOR: tl.constexpr, OFFSET: tl.constexpr, BYTES: tl.constexpr, META: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, PROJECTION: tl.constexpr,
):  # fmt: skip
    """Lloyd-Max codes of x [R, DP]: √D times the rotated vectors, zero beyond D, no zero before."""
    BITS: tl.constexpr = 2 if SCHEME == "lm2" else (4 if SCHEME == "lm4" else 3)
    size = tl.abs(x)
    if NORM != "plain" or len(CANDIDATES) > 1:  # infinities would meet in quotients
        size = tl.minimum(size, _LARGEST * D**0.5, propagate_nan=tl.PropagateNan.ALL)
    power = _total(size * size)
    norm = _to_half(tl.sqrt(power) * (1.0 / D)).to(tl.float32)
    inverse = _over(1.0, norm * D**0.5)
    power = power * inverse * inverse  # from here on of vectors divided by their norm
    unit, length = inverse, 1.0
    if ANCHOR == "peak":
        peak = tl.max(size, 1)
        unit, length = tl.where(norm == 0, 0.0, _over(1.0, peak)), peak * inverse
    size = size * unit[:, None]

    if len(CANDIDATES) == 1:
        dot, square, scale = _try(size, CANDIDATES[0], 1.0 / CANDIDATES[0], SCHEME, BITS, RESIDUAL, D)
        size = size * CANDIDATES[0]
    else:  # unrolled, trials of more than 2 bits keep too much of long parts of vectors in registers at once
        UNROLLED: tl.constexpr = len(CANDIDATES) if BITS == 2 or x.shape[0] * x.shape[1] <= 512 else 1
        dot, square, scale = norm * 0.0, norm * 0.0 + 1.0, norm * 0.0
        chosen = scale + CANDIDATES[0]
        for k in tl.range(len(CANDIDATES), loop_unroll_factor=UNROLLED):
            candidate, over = _candidate(k, CANDIDATES)
            dot2, square2, scale2 = _try(size, candidate, over, SCHEME, BITS, RESIDUAL, D)
            better = dot2 * dot2 * square > dot * dot * square2
            chosen = tl.where(better, candidate, chosen)
            scale, dot = tl.where(better, scale2, scale), tl.where(better, dot2, dot)
            square = tl.where(better, square2, square)
        size = size * chosen[:, None]
    FIRST: tl.constexpr = (
        -3.5 if SCHEME == "turbo" else (-1.5 if SCHEME == "lm3" else (0.0 if SCHEME == "lm2" else 0.5))
    )
    index, level = _nearest(size, FIRST, 1.0, BITS, D)

    factor = norm
    if NORM == "corrected":
        factor = norm * tl.sqrt(power / square)
    if NORM == "unbiased":
        factor = norm * _over(power, dot * length)
    if NORM == "balanced":
        factor = norm * tl.sqrt(tl.sqrt(power / square) * _over(power, dot * length))
    if SCHEME == "qjl":
        rest = size - level
        scale = tl.sqrt(_total(rest * rest))
    codes, meta = _place(base, page_stride, slot, OFFSET, BYTES, META, P)
    tl.store(meta, _to_half(factor), mask=mask)
    if SCHEME == "turbo" or SCHEME == "qjl":
        tl.store(meta + P, _to_half(scale), mask=mask)
        if SCHEME == "turbo":
            # the nibble above the middle of all sixteen, which a negative element has as far below it
            code = _flip((size >= level).to(tl.float32) * 8 + index, x)
            words = _pack(code, 4, 4, 7.5)
            _store_words(codes, words, mask, 0, D // 4)
        elif PROJECTION == "square":
            words = _sum(_flip(index, x), 4, 4) + 3.5 * 0x1111
            rest = _flip(_hold(rest, words), x).to(tl.float16)
            signs = _project_all(rest, projection, x.shape[1] == D and D >= 64)
            _store_words(codes, _to_word(tl.fma(_sum(signs, 4, 4), 8.0, words)), mask, 0, D // 4)
        else:
            words = _pack(_flip(index, x), 4, 4, 3.5)
            words = tl.reshape(words, (x.shape[0], D // 4 // _PARTS, _PARTS)).to(tl.int32)
            words = tl.sum(tl.where(tl.arange(0, _PARTS)[None, None, :] == part, words, 0), 2)
            rest = _flip(rest, x).to(tl.float16)
            words = words.to(tl.uint16) | _project(rest, projection[0], projection[1])
            at = codes.to(tl.pointer_type(tl.uint16), bitcast=True) + part
            at = at[:, None] + (tl.arange(0, D // 4 // _PARTS) * _PARTS)[None, :]
            tl.store(at, words, mask=mask[:, None])
    elif SCHEME == "lm4":
        _store_words(codes, _pack(_flip(index, x), 4, 4, 7.5), mask, 0, D // 4)
    elif SCHEME == "lm3":
        _store_words(codes, _pack(_flip(index, x), 8, 2, 1.5), mask, 0, D // 8)
        half = _flip(tl.full(x.shape, 0.5, tl.float32), x)
        _store_words(codes, _pack(half, 16, 1, 0.5), mask, D // 4, D // 16)
    else:
        # a byte that tells the larger magnitudes of 8 elements, and one that tells negative numbers
        half = _flip(tl.full(x.shape, 128.0, tl.float32), x)
        _store_words(codes, _pack(index - half, 8, 1, 128.0), mask, 0, D // 8)


# --- all codecs ---------------------------------------------------------------------------------------------


@triton.jit
def store_rows(
    x, base, page_stride, slot, mask, projection, part,
    SCHEME: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, CANDIDATES: tl.constexpr,
    ANCHOR: tl.constexpr, ROTATED: tl.constexpr, HAS_E4M3: tl.constexpr, OFFSET: tl.constexpr,
    BYTES: tl.constexpr, META: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    PROJECTION: tl.constexpr,
):  # fmt: skip
    """Encode x [R, DP], zero beyond D, to the slots [R] of a head whose block in page 0 lies at `base`.

    Codes lie OFFSET bytes into a block, BYTES a row, metadata META bytes. Rotated vectors come times √D.
    HAS_E4M3: the GPU converts to it. PROJECTION of qjl: by the `square` matrix, or by a `part` of it, for
    that part of the codes; either comes loaded.
    """
    DP: tl.constexpr = x.shape[1]
    d = tl.arange(0, DP)
    if SCHEME == "none":
        codes, meta = _place(base, page_stride, slot, OFFSET, BYTES, META, P)
        typed = codes.to(tl.pointer_type(DTYPE), bitcast=True)
        tl.store(typed[:, None] + d[None, :], x.to(DTYPE), mask=mask[:, None] & (d < D)[None, :])
    elif ROTATED:
        _store_rotated(
            x, base, page_stride, slot, mask, projection, part, SCHEME, NORM, RESIDUAL, CANDIDATES, ANCHOR,
            OFFSET, BYTES, META, D, P, PROJECTION,
        )  # fmt: skip
    else:
        x = x.to(tl.float32)
        x = tl.maximum(x, -_LARGEST, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
        spoiled = tl.sum(x * 0.0, 1)  # NaN where any element is: minima and maxima over a row pass over it
        if SCHEME == "fp8":
            size = tl.abs(x)
            scale = _to_half(_divide(tl.max(size, 1), 448.0) + spoiled)
            code = tl.minimum(_divide(size, scale.to(tl.float32)[:, None]), 448.0)
            code = _flip(code, tl.where((scale == 0)[:, None], 0.0, x))
            codes, meta = _place(base, page_stride, slot, OFFSET, BYTES, META, P)
            tl.store(meta, scale, mask=mask)
            if HAS_E4M3:
                _store_bytes(codes, code.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask, D)
            else:
                _store_bytes(codes, _encode_e4m3(code), mask, D)
        else:
            TOP: tl.constexpr = 255.0 if SCHEME == "int8" else 15.0
            inside = (d < D)[None, :]
            low = tl.min(tl.where(inside, x, float("inf")), 1)
            high = tl.max(tl.where(inside, x, float("-inf")), 1)
            scale = _to_half(_divide(high - low, TOP) + spoiled)
            minimum = _to_half(low)
            code = _divide(x - minimum.to(tl.float32)[:, None], scale.to(tl.float32)[:, None])
            code = tl.minimum(tl.maximum(code, 0.0), TOP)
            codes, meta = _place(base, page_stride, slot, OFFSET, BYTES, META, P)
            tl.store(meta, scale, mask=mask)
            tl.store(meta + P, minimum, mask=mask)
            if SCHEME == "int8":
                _store_bytes(codes, (code + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8), mask, D)
            else:
                _store_words(codes, _pack(_round_even(code), 4, 4, 0.0), mask, 0, D // 4)
