"""Every codec's bytes inside a kernel: unpacking, and the constant tables that it needs.

A scheme branches here and, where it is written, in `encode.py`. Tiles are [N, D] with D padded to a power of
two (`DP`); unpacked values come with a factor and a bias per token that the caller applies to scores and
weights: cheaper than scaling every element, and exact where codes are integers.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_kernels.codebook import LEVELS, qjl_projection, qjl_scale
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
def signs_of_hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """√D · H: entries are ±1, exact in any dtype."""
    return (hadamard_matrix(size, torch.float64, torch.device("cpu")).sign()).to(device, dtype)


@lru_cache(maxsize=16)
def walsh_operand(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 16 × 16 signs of `walsh_by_products`, [32, 8]: by threads of a warp, as m16n8k16 wants them."""
    lane, i = torch.arange(32)[:, None], torch.arange(8)[None, :]
    row = lane % 4 << 2 | i & 3
    column = (lane >> 3) << 2 | i >> 2 << 1 | lane >> 2 & 1  # sums of a thread's elements become its own
    return hadamard_matrix(16, torch.float64, torch.device("cpu")).sign()[row, column].to(device, dtype)


@lru_cache(maxsize=32)
def qjl_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """√D · H · Sᵀ · √(π/2)/D, [D, D]: x @ it is the query that meets the signs of `qjl` (of keys)."""
    cpu = torch.device("cpu")
    projection = qjl_projection(size, torch.float64, cpu) * qjl_scale(size) * size**0.5
    return (hadamard_matrix(size, torch.float64, cpu) @ projection.T).to(device, dtype)


# --- small pieces -------------------------------------------------------------------------------------------


@triton.jit
def decode_e4m3(byte):
    """e4m3 bytes -> fp16, value / 256, exactly: the bits are moved to where fp16 has them."""
    bits = ((byte.to(tl.uint16) & 0x80) << 8) | ((byte.to(tl.uint16) & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def _butterfly(x, stage: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """Sums and differences of elements D / 2^(stage + 1) apart.

    An element's partner comes as what is left of their sum as integers: a copy where both lie in one thread,
    one exchange between lanes otherwise, whatever the layout, which stays what it was.
    """
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)
    pairs = tl.reshape(x, (R, 2**stage, 2, D // 2 ** (stage + 1)))
    bits = pairs.to(tl.int32, bitcast=True)
    partner = (tl.sum(bits, 2)[:, :, None, :] - bits).to(tl.float32, bitcast=True)
    return tl.reshape(partner + pairs * sign[None, None, :, None], (R, D))


@triton.jit
def walsh(x, R: tl.constexpr, D: tl.constexpr):
    """√D · H x for every row of x [R, D] float32, D up to 256."""
    for stage in tl.static_range(8):
        if 2**stage < D:
            x = _butterfly(x, stage, R, D)
    return x


@triton.jit
def walsh_by_products(x, operand, zero, R: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr):
    """√D · H x + zero for every row of x [R, D] of 16 bits, as `load_rows` leaves it in LANES lanes.

    A product with 16 × 16 signs takes the dims of quarters and dims 2 and 0, in any number of lanes: what is
    loaded are its operands as they lie in registers (m16n8k16), and sums lie in the lanes of their elements.
    Of joined loads the compiler gives a thread four columns in a row, of one load, and where four warps share
    a product, 2t, 2t + 1, 2t + 8, 2t + 9.
    """
    OUTER: tl.constexpr = LANES // 4
    INNER: tl.constexpr = D // (LANES * 8)
    TWOS: tl.constexpr = INNER == 1 or R >= 64
    NEAR: tl.constexpr = min(R, 8 // OUTER)  # rows among the lanes of a warp
    FAR: tl.constexpr = R // NEAR
    signs = tl.load(operand + tl.arange(0, 32)[:, None] * 8 + tl.arange(0, 8)[None, :])
    signs = tl.reshape(signs, (8, 4, 2, 2, 2))
    signs = tl.permute(signs, (3, 1, 4, 2, 0) if TWOS else (1, 3, 4, 2, 0))
    signs = tl.reshape(signs, (16, 16))
    m = tl.arange(0, INNER * R * 2 * OUTER)
    first = (m < R * 2 * OUTER) & (m // (NEAR * OUTER) % 2 == 0) & (m % OUTER == 0)  # of those summed below
    start = tl.where(first, zero, 0.0)
    x = tl.reshape(x, (FAR, NEAR, 4, OUTER, INNER, 2, 2, 2))
    x = tl.permute(x, (4, 0, 6, 1, 3, 5, 2, 7) if TWOS else (4, 0, 6, 1, 3, 2, 5, 7))
    x = tl.reshape(x, (INNER * R * 2 * OUTER, 16))
    x = tl.dot(x, signs, tl.broadcast_to(start[:, None], x.shape))
    x = tl.reshape(x, (INNER, FAR, 2, NEAR, OUTER, 2, 4, 2))
    x = tl.reshape(tl.permute(x, (1, 3, 6, 4, 0, 5, 2, 7)), (R, D))
    for stage in tl.static_range(8):
        if (stage >= 2 and 2**stage < D // 8) or 2**stage == D // 4:
            x = _butterfly(x, stage, R, D)
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
