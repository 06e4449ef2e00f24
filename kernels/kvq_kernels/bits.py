"""Every codec's bytes inside a kernel: unpacking, packing, and the constant tables both need.

A scheme branches here and nowhere else. Tiles are [N, D] with D padded to a power of two (`DP`); unpacked
values come with a factor and a bias per token that the caller applies to scores and weights: cheaper than
scaling every element, and exact where codes are integers.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_kernels.codebook import LEVELS, qjl_projection, qjl_scale, thresholds
from kvq_kernels.hadamard import hadamard_matrix

# --- constant tables ----------------------------------------------------------------------------------------

_BITS = {"lm2": 2, "lm3": 3, "lm4": 4, "turbo": 3, "qjl": 3}


@lru_cache(maxsize=64)
def decode_table(scheme: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What codes stand for: [256, 2] by byte for lm4 and nibbles of turbo and qjl; [8] for lm3; [2] for lm2.

    Bits of `dtype` as integers: the cast that makes them floats keeps triton 3.6 from moving the reshape of a
    looked-up tile into shared memory, where it crashes for sm_90. Float32 for turbo, whose level is still to
    be added to, and for lm2: its two magnitudes. Other schemes get an unused scalar.
    """
    if scheme not in _BITS:
        return torch.zeros(1, dtype=dtype, device=device)
    levels = torch.tensor(LEVELS[_BITS[scheme]], dtype=torch.float64)
    if scheme == "lm2":
        return levels[2:].to(device, torch.float32)
    if scheme == "lm3":
        return _as_bits(levels.to(device, dtype))
    codes = (torch.arange(256)[:, None] >> torch.arange(0, 8, 4)) & 15
    if scheme in ("turbo", "qjl"):
        codes &= 7
    table = levels[codes].contiguous()
    return table.to(device, torch.float32) if scheme == "turbo" else _as_bits(table.to(device, dtype))


def _as_bits(table: Tensor) -> Tensor:
    return table.view(torch.int32 if table.dtype == torch.float32 else torch.int16)


@lru_cache(maxsize=64)
def encode_table(scheme: str, candidates: tuple[float, ...], device: torch.device) -> Tensor:
    """[2^b levels | 2^b - 1 thresholds, padded to 2^b | candidates] float32."""
    bits = _BITS.get(scheme)
    if bits is None:
        return torch.zeros(1, device=device)
    numbers = (*LEVELS[bits], *thresholds(bits), 0.0, *candidates)
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def signs_of_hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """√D · H: entries are ±1, exact in any dtype."""
    return (hadamard_matrix(size, torch.float64, torch.device("cpu")).sign()).to(device, dtype)


@lru_cache(maxsize=32)
def qjl_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """√D · H · Sᵀ · √(π/2)/D, [D, D]: x @ it is the query that meets the signs of `qjl` (of keys)."""
    cpu = torch.device("cpu")
    projection = qjl_projection(size, torch.float64, cpu) * qjl_scale(size) * size**0.5
    return (hadamard_matrix(size, torch.float64, cpu) @ projection.T).to(device, dtype)


# --- small pieces -------------------------------------------------------------------------------------------


@triton.jit
def to_half(x):
    """fp16, saturated; NaN stays NaN."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -65504.0), 65504.0), x).to(tl.float16)


@triton.jit
def round_even(x):
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def encode_e4m3(x):
    """float32 within ±448 -> e4m3 bytes, bit for bit as torch rounds them, on any architecture."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = round_even(tl.abs(x) * 512.0).to(tl.int32)
    code = tl.where(bits < 0x3C800000, subnormal, normal)
    code = tl.where(x == x, tl.minimum(code, 0x7F), 0x7F)
    return (sign | code).to(tl.uint8)


@triton.jit
def decode_e4m3(byte):
    """e4m3 bytes -> fp16, value / 256, exactly: the bits are moved to where fp16 has them."""
    bits = ((byte.to(tl.uint16) & 0x80) << 8) | ((byte.to(tl.uint16) & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def walsh(x, R: tl.constexpr, D: tl.constexpr):
    """√D · H x for every row of x [R, D] float32, D up to 256.

    Each stage replaces the halves of a row by their sums and differences, interleaved: the index turns by one
    bit, and after log2 D stages every bit had its turn and is back in its place. (Stages written as products
    with a small matrix would be shorter, but leave copies of the result in several lanes, four times more
    after each.)
    """
    for stage in tl.static_range(8):
        if 2**stage < D:
            a, b = tl.split(tl.permute(tl.reshape(x, (R, 2, D // 2)), (0, 2, 1)))
            x = tl.reshape(tl.join(a + b, a - b), (R, D))
    return x


@triton.jit
def multiply_rows(
    rows, row_mask, matrix, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr
):
    """rows [R] pointers to D contiguous elements each -> their product with matrix [D, D], [R, DP] float32.

    The matrix has the elements' dtype. With ±1 entries nothing is rounded but the float32 sums.
    """
    d = tl.arange(0, DP)
    out = tl.zeros((R, DP), tl.float32)
    for start in tl.static_range(0, D, CHUNK):
        k = start + tl.arange(0, CHUNK)
        x = tl.load(rows[:, None] + k[None, :], mask=row_mask[:, None], other=0.0)
        if DP == D:
            h = tl.load(matrix + k[:, None] * D + d[None, :])
        else:
            h = tl.load(matrix + k[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        out = tl.dot(x, h, out, input_precision="ieee")
    return out


@triton.jit
def load_square(matrix, D: tl.constexpr, DP: tl.constexpr):
    """matrix [D, D] -> [DP, DP], zero beyond."""
    d = tl.arange(0, DP)
    if DP == D:
        tile = tl.load(matrix + d[:, None] * D + d[None, :])
    else:
        inside = (d < D)[:, None] & (d < D)[None, :]
        tile = tl.load(matrix + d[:, None] * D + d[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def load_rotated(rows, row_mask, matrix, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr):
    """rows [R] pointers to D elements each -> H times them, [R, DP] float32; D is no power of two.

    matrix: √D · H in the elements' dtype.
    """
    if R >= 16:
        x = multiply_rows(rows, row_mask, matrix, D, DP, R, 32 if D % 32 == 0 else 16)
    else:  # too few for a product of matrices
        d = tl.arange(0, DP)
        x = tl.load(rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)
        h = load_square(matrix, D, DP).to(tl.float32)
        x = tl.sum(h[None, :, :] * x.to(tl.float32)[:, None, :], 2)
    return x * (1.0 / D**0.5)


# --- reading ------------------------------------------------------------------------------------------------


@triton.jit
def _bytes(
    codes, row, valid, STRIDE: tl.constexpr, OFFSET: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr
):
    """[N, PAD] uint8: COUNT bytes of each row from OFFSET on, zero beyond and where not valid."""
    i = tl.arange(0, PAD)
    pointer = codes + OFFSET + row[:, None] * STRIDE + i[None, :]
    mask = valid[:, None] if COUNT == PAD else valid[:, None] & (i < COUNT)[None, :]
    return tl.load(pointer, mask=mask, other=0)


@triton.jit
def _expand(byte, BITS: tl.constexpr):
    """[N, B] bytes -> [N, B · 8/BITS] codes, int32."""
    N: tl.constexpr = byte.shape[0]
    PER: tl.constexpr = 8 // BITS
    shifts = tl.arange(0, PER) * BITS
    codes = (byte.to(tl.int32)[:, :, None] >> shifts[None, None, :]) & (2**BITS - 1)
    return tl.reshape(codes, (N, byte.shape[1] * PER))


@triton.jit
def _look_up(byte, table, PER: tl.constexpr):
    """[N, B] bytes -> [N, B · PER] table entries: one wide load a byte."""
    N: tl.constexpr = byte.shape[0]
    index = (byte.to(tl.int32) * PER)[:, :, None] + tl.arange(0, PER)[None, None, :]
    return tl.reshape(tl.load(table + index), (N, byte.shape[1] * PER))


@triton.jit
def load_tile(
    codes, meta, row, valid, table,
    SCHEME: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Rows `row` [N] of a page: x̂ = tile [N, DP] (in DTYPE) · factor [N] + bias [N] (float32, 0 unless intN).

    codes: uint8 pointer to the block's K or V codes; meta: fp16 pointer to its first metadata row. Rows that
    are not valid are zero or finite. `qjl` lacks its residual here, see `load_signs`.
    """
    N: tl.constexpr = row.shape[0]
    bias = tl.zeros((N,), tl.float32)
    if SCHEME == "none":
        d = tl.arange(0, DP)
        typed = codes.to(tl.pointer_type(DTYPE), bitcast=True)
        mask = valid[:, None] & (d < D)[None, :]
        tile = tl.load(typed + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        factor = tl.full((N,), 1.0, tl.float32)
    else:
        factor = tl.load(meta + row, mask=valid, other=0.0).to(tl.float32)
        if SCHEME == "fp8":
            tile = decode_e4m3(_bytes(codes, row, valid, D, 0, D, DP)).to(DTYPE)
            factor = factor * 256.0
        elif SCHEME == "int8" or SCHEME == "int4":
            MIDDLE: tl.constexpr = 128.0 if SCHEME == "int8" else 8.0
            if SCHEME == "int8":
                code = _bytes(codes, row, valid, D, 0, D, DP).to(tl.int32)
            else:
                code = _expand(_bytes(codes, row, valid, D // 2, 0, D // 2, DP // 2), 4)
            # code - MIDDLE without a conversion instruction: the code becomes the last bits of 2^23 + code
            tile = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + MIDDLE)
            tile = tile.to(DTYPE)
            bias = tl.load(meta + P + row, mask=valid, other=0.0).to(tl.float32) + MIDDLE * factor
        elif SCHEME == "lm2":
            i = tl.arange(0, DP // 8)
            typed = codes.to(tl.pointer_type(tl.int16), bitcast=True)
            mask = valid[:, None] if DP == D else valid[:, None] & (i < D // 8)[None, :]
            planes = tl.load(typed + row[:, None] * (D // 8) + i[None, :], mask=mask, other=0)
            bit = planes[:, :, None] >> tl.arange(0, 16)[None, None, :] & 1
            large, negative = tl.split(tl.permute(tl.reshape(bit, (N, DP // 8, 2, 8)), (0, 1, 3, 2)))
            small, large_level = tl.load(table), tl.load(table + 1)
            tile = tl.where(large != 0, large_level, small)
            tile = tl.reshape(tl.where(negative != 0, -tile, tile), (N, DP)).to(DTYPE)
        elif SCHEME == "lm3":
            low = _expand(_bytes(codes, row, valid, D * 3 // 8, 0, D // 4, DP // 4), 2)
            high = _expand(_bytes(codes, row, valid, D * 3 // 8, D // 4, D // 8, DP // 8), 1)
            tile = tl.load(table + (low | (high << 2))).to(DTYPE, bitcast=True)
        else:
            byte = _bytes(codes, row, valid, D // 2, 0, D // 2, DP // 2)
            tile = _look_up(byte, table, 2)
            if SCHEME == "turbo":
                scale = tl.load(meta + P + row, mask=valid, other=0.0).to(tl.float32)
                sign = tl.where((_expand(byte, 4) & 8) != 0, scale[:, None], -scale[:, None])
                tile = (tile + sign).to(DTYPE)
            else:
                tile = tile.to(DTYPE, bitcast=True)
    return tile, factor, bias


@triton.jit
def weigh(weights, factor, tile, acc, alpha, DTYPE: tl.constexpr):
    """acc [M, DP] · alpha [M] + (weights [M, N] · factor [N]) @ tile [N, DP].

    In fp16 the factors are divided by the tile's largest first: small ones would vanish with the weights.
    """
    if tl.float16 == DTYPE:
        largest = tl.max(factor, 0)
        largest = tl.where(largest > 0, largest, 1.0)
        scaled = (weights * (factor / largest)[None, :]).to(DTYPE)
        acc = acc * alpha[:, None] + tl.dot(scaled, tile, input_precision="ieee") * largest
    else:
        scaled = (weights * factor[None, :]).to(DTYPE)
        acc = tl.dot(scaled, tile, acc * alpha[:, None], input_precision="ieee")
    return acc


@triton.jit
def load_signs(
    codes, meta, row, valid, DTYPE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr
):
    """The residual of `qjl`: signs [N, DP] in DTYPE, and n · ‖r‖ [N]."""
    byte = _bytes(codes, row, valid, D // 2, 0, D // 2, DP // 2)
    factor = tl.load(meta + row, mask=valid, other=0.0).to(tl.float32)
    length = tl.load(meta + P + row, mask=valid, other=0.0).to(tl.float32)
    return ((_expand(byte, 4) >> 3) * 2 - 1).to(DTYPE), factor * length


# --- writing ------------------------------------------------------------------------------------------------


@triton.jit
def _pack(code, BITS: tl.constexpr):
    """[R, DP] int32 codes -> [R, DP · BITS/8] bytes."""
    R: tl.constexpr = code.shape[0]
    PER: tl.constexpr = 8 // BITS
    parts = tl.reshape(code, (R, code.shape[1] // PER, PER))
    return tl.sum(parts << (tl.arange(0, PER) * BITS)[None, None, :], 2).to(tl.uint8)


@triton.jit
def _store_bytes(codes, byte, mask, STRIDE: tl.constexpr, OFFSET: tl.constexpr, COUNT: tl.constexpr):
    """byte [R, PAD] to `codes` [R] pointers of rows."""
    PAD: tl.constexpr = byte.shape[1]
    i = tl.arange(0, PAD)
    inside = mask[:, None] & (i < COUNT)[None, :]
    tl.store(codes[:, None] + OFFSET + i[None, :], byte, mask=inside)


@triton.jit
def _divide(x, by):
    """x / by as IEEE rounds it, 0 where `by` is 0."""
    return tl.where(by == 0, 0.0, tl.div_rn(x, tl.where(by == 0, 1.0, by)))


@triton.jit
def _nearest(y, table, BITS: tl.constexpr):
    """Index of the nearest level, and the level."""
    COUNT: tl.constexpr = 2**BITS
    index = tl.zeros(y.shape, tl.int32)
    for k in tl.static_range(COUNT - 1):
        index += (y > tl.load(table + COUNT + k)).to(tl.int32)
    return index, tl.load(table + index)


@triton.jit
def _within(x, D: tl.constexpr):
    """x [R, DP] with zeros beyond D."""
    DP: tl.constexpr = x.shape[1]
    return x if DP == D else tl.where((tl.arange(0, DP) < D)[None, :], x, 0.0)


@triton.jit
def _code(y, table, SCHEME: tl.constexpr, BITS: tl.constexpr, RESIDUAL: tl.constexpr, D: tl.constexpr):
    """y [R, DP] -> codes, what they stand for, and (turbo) the residual's scale [R] as fp16 rounds it.

    What stands beyond D is zero, but for its codes, which nobody stores.
    """
    index, coded = _nearest(y, table, BITS)
    coded = _within(coded, D)
    scale = tl.zeros((y.shape[0],), tl.float32)
    if SCHEME == "turbo":
        rest = y - coded
        scale = tl.sum(tl.abs(rest), 1) / D if RESIDUAL == "abs" else tl.sqrt_rn(tl.sum(rest * rest, 1) / D)
        scale = to_half(scale).to(tl.float32)
        coded += _within(tl.where(rest >= 0, scale[:, None], -scale[:, None]), D)
        index |= (rest >= 0).to(tl.int32) << 3
    return index, coded, scale


@triton.jit
def _store_rotated(
    x, codes, meta, mask, table, projection,
    SCHEME: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, CANDIDATES: tl.constexpr,
    ANCHOR: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Lloyd-Max codes of x [R, DP], already rotated, zero beyond D."""
    BITS: tl.constexpr = 2 if SCHEME == "lm2" else (4 if SCHEME == "lm4" else 3)
    norm = to_half(tl.sqrt_rn(tl.sum(x * x, 1) / D)).to(tl.float32)
    y = _divide(x, norm[:, None])
    unit = _divide(y, tl.max(tl.abs(y), 1)[:, None]) if ANCHOR == "peak" else y
    first = 2 * 2**BITS
    index, coded, scale = _code(unit * tl.load(table + first), table, SCHEME, BITS, RESIDUAL, D)
    dot = tl.sum(y * coded, 1)
    square = tl.sum(coded * coded, 1)
    for k in range(1, CANDIDATES):
        index2, coded2, scale2 = _code(unit * tl.load(table + first + k), table, SCHEME, BITS, RESIDUAL, D)
        dot2 = tl.sum(y * coded2, 1)
        square2 = tl.sum(coded2 * coded2, 1)
        better = dot2 * dot2 / square2 > dot * dot / square
        index = tl.where(better[:, None], index2, index)
        scale, dot = tl.where(better, scale2, scale), tl.where(better, dot2, dot)
        square = tl.where(better, square2, square)
        coded = tl.where(better[:, None], coded2, coded)
    factor = norm
    if NORM == "corrected":
        factor = norm * tl.sqrt_rn(tl.div_rn(tl.sum(y * y, 1), square))
    if NORM == "unbiased":
        factor = norm * _divide(tl.sum(y * y, 1), dot)
    if NORM == "balanced":
        power = tl.sum(y * y, 1)
        factor = norm * tl.sqrt_rn(tl.sqrt_rn(tl.div_rn(power, square)) * _divide(power, dot))
    if SCHEME == "qjl":
        rest = y - coded
        scale = tl.sqrt_rn(tl.sum(rest * rest, 1))
        s = load_square(projection, D, x.shape[1])
        projected = tl.sum(s[None, :, :] * rest[:, None, :], 2)
        index |= (projected >= 0).to(tl.int32) << 3
    tl.store(meta, to_half(factor), mask=mask)
    if SCHEME == "turbo" or SCHEME == "qjl":
        tl.store(meta + P, to_half(scale), mask=mask)
        _store_bytes(codes, _pack(index, 4), mask, D // 2, 0, D // 2)
    elif SCHEME == "lm3":
        _store_bytes(codes, _pack(index & 3, 2), mask, D * 3 // 8, 0, D // 4)
        _store_bytes(codes, _pack(index >> 2, 1), mask, D * 3 // 8, D // 4, D // 8)
    elif SCHEME == "lm2":
        negative = index < 2
        large = (index == 0) | (index == 3)
        planes = _pack(large.to(tl.int32), 1).to(tl.uint16) | (
            _pack(negative.to(tl.int32), 1).to(tl.uint16) << 8
        )
        typed = codes.to(tl.pointer_type(tl.uint16), bitcast=True)
        i = tl.arange(0, planes.shape[1])
        inside = mask[:, None] if planes.shape[1] == D // 8 else mask[:, None] & (i < D // 8)[None, :]
        tl.store(typed[:, None] + i[None, :], planes, mask=inside)
    else:
        _store_bytes(codes, _pack(index, 4), mask, D // 2, 0, D // 2)


@triton.jit
def store_rows(
    x, codes, meta, mask, table, projection,
    SCHEME: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, CANDIDATES: tl.constexpr,
    ANCHOR: tl.constexpr, ROTATED: tl.constexpr,
    DTYPE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Encode x [R, DP], zero beyond D, to rows whose codes and first metadata lie at `codes`, `meta` [R].

    x is rotated here if D is a power of two, else already (`load_rotated`).
    """
    R: tl.constexpr = x.shape[0]
    d = tl.arange(0, DP)
    if SCHEME == "none":
        typed = codes.to(tl.pointer_type(DTYPE), bitcast=True)
        tl.store(typed[:, None] + d[None, :], x.to(DTYPE), mask=mask[:, None] & (d < D)[None, :])
    else:
        x = x.to(tl.float32)
        if ROTATED and DP == D:
            x = walsh(x, R, D) * (1.0 / D**0.5)
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -1073741824.0), 1073741824.0), x)
        spoiled = tl.sum(x * 0.0, 1)  # NaN where any element is: minima and maxima pass over it
        if ROTATED:
            _store_rotated(
                x, codes, meta, mask, table, projection, SCHEME, NORM, RESIDUAL, CANDIDATES, ANCHOR, D, P
            )
        elif SCHEME == "fp8":
            scale = to_half(tl.div_rn(tl.max(tl.abs(x), 1), 448.0) + spoiled)
            scaled = _divide(x, scale.to(tl.float32)[:, None])
            scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
            tl.store(meta, scale, mask=mask)
            _store_bytes(codes, encode_e4m3(scaled), mask, D, 0, D)
        else:
            TOP: tl.constexpr = 255 if SCHEME == "int8" else 15
            inside = (d < D)[None, :]
            low = tl.min(tl.where(inside, x, float("inf")), 1)
            high = tl.max(tl.where(inside, x, float("-inf")), 1)
            scale = to_half(tl.div_rn(high - low, TOP) + spoiled)
            minimum = to_half(low)
            code = _divide(x - minimum.to(tl.float32)[:, None], scale.to(tl.float32)[:, None])
            code = round_even(tl.minimum(tl.maximum(code, 0.0), TOP)).to(tl.int32)
            tl.store(meta, scale, mask=mask)
            tl.store(meta + P, minimum, mask=mask)
            if SCHEME == "int8":
                _store_bytes(codes, code.to(tl.uint8), mask, D, 0, D)
            else:
                _store_bytes(codes, _pack(code, 4), mask, D // 2, 0, D // 2)
