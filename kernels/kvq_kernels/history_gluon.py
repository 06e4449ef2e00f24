"""Prefill over quantized history on Hopper: some warps unpack while others multiply.

A program has 128 rows (token, query head of the group) of one kv head and walks over its tiles of 64 tokens:

- the *producers*, a warpgroup for keys and one for values, read codes, unpack them to fp16 (`unpack.py`)
  and put tiles into rings in shared memory: nothing of the history is ever unpacked to device memory;
- two *consumers* of 64 rows each multiply tiles by `wgmma` and do the softmax. Queries and weights stay in
  registers. Scores of a tile and the weighted values of the one before are under way at once, and the
  softmax of a tile under its predecessor's values (J. Shah et al., FlashAttention-3, 2024).

Barriers `full` and `empty` pass the stages of a ring back and forth. The last tile comes first: it is the
only one that may be partly beyond the history, so that no other has to be masked.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kvq_kernels import unpack
from kvq_kernels.exponent import LOG2E
from kvq_kernels.layout import PageLayout
from kvq_kernels.quantize_store import DTYPES
from kvq_kernels.unpack import WORD_ELEMENTS

ROWS = 128
"""Of a program, in two halves."""
TOKENS = 64
"""Of a tile."""
_N = gl.constexpr(TOKENS)
_M = gl.constexpr(ROWS // 2)
_WARPS = 4
_LIFT = gl.constexpr(12.0)
_LEAST_EXPONENT = gl.constexpr(67 << 23)
_LARGEST_NORM = gl.constexpr(20000.0)
_LARGEST_SCALE = gl.constexpr(37000.0 / 256)
_LARGEST_SUM = gl.constexpr(65000.0)
_SMALL, _LARGE = unpack._SMALL, unpack._LARGE
_TURBO, _LM4, _LM2, _INT8, _INT4, _FP8 = (
    unpack._TURBO,
    unpack._LM4,
    unpack._LM2,
    unpack._INT8,
    unpack._INT4,
    unpack._FP8,
)
_4_FROM_2, _4_FROM_3 = unpack._4_FROM_2, unpack._4_FROM_3
_2_FROM_2, _2_FROM_3, _8_FROM_3 = unpack._2_FROM_2, unpack._2_FROM_3, unpack._8_FROM_3


@gluon.constexpr_function
def word_layout(per, D, N, warps):
    """Words [N, D / per] over lanes: a row over four lanes, pieces of 8 elements each, so that eight lanes' 16-byte stores of unpacked
    elements meet all banks of swizzled shared memory once."""
    W = D // per
    step = max(1, 8 // per)
    reg = []
    x = 1
    while x < step:
        reg.append([0, x])
        x *= 2
    lane = []
    for _ in range(2):
        lane.append([0, x])
        x *= 2
    while x < W:
        reg.append([0, x])
        x *= 2
    rows = [4, 1, 2] if per <= 8 else [1, 2, 4]
    lane += [[r, 0] for r in rows]
    warp = []
    y = 8
    while y < 8 * warps:
        warp.append([y, 0])
        y *= 2
    while y < N:
        reg.append([y, 0])
        y *= 2
    return gl.DistributedLinearLayout(reg, lane, warp, [], [N, W])


@gluon.constexpr_function
def mma_layout(n):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])


@gluon.jit
def _elements(PER: gl.constexpr, D: gl.constexpr, layout: gl.constexpr):
    element = gl.arange(0, D, layout)
    if PER > 2:
        inside = element % PER
        element += inside % 2 * (PER // 2) + inside // 2 - inside
    return element


@gluon.jit
def _doubled(x, like):
    """x [N] float32 -> [N, W]: twice as fp16 in a register."""
    bits = (x.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF) * 0x10001
    bits, _ = gl.broadcast(gl.expand_dims(bits, 1), like)
    return bits


@gluon.jit
def _clamped(x, largest):
    return gl.minimum(x, largest, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def _unpack(words, first, second, SCHEME: gl.constexpr):
    """words [N, W], metadata [N] -> registers of two fp16 [N, D / 2]."""
    N: gl.constexpr = words.shape[0]
    W: gl.constexpr = words.shape[1]
    first = first.to(gl.float32)
    second = second.to(gl.float32)
    if SCHEME == "none":
        pairs = words
    elif SCHEME == "turbo":
        n = _clamped(first, _LARGEST_NORM)
        a, b, c, d = gl.inline_asm_elementwise(
            _TURBO, _4_FROM_3, [words, _doubled(n, words), _doubled(-n * second, words)],
            (gl.int32, gl.int32, gl.int32, gl.int32), True, 1,
        )  # fmt: skip
        pairs = gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), [N, W * 4])
    elif SCHEME == "lm4":
        a, b, c, d = gl.inline_asm_elementwise(
            _LM4, _4_FROM_2, [words, _doubled(-_clamped(first, _LARGEST_NORM), words)],
            (gl.int32, gl.int32, gl.int32, gl.int32), True, 1,
        )  # fmt: skip
        pairs = gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), [N, W * 4])
    elif SCHEME == "int4":
        scale = _clamped(first, (second - _LARGEST_SUM) * (-1 / 15))
        a, b, c, d = gl.inline_asm_elementwise(
            _INT4, _4_FROM_3, [words, _doubled(scale, words), _doubled(second, words)],
            (gl.int32, gl.int32, gl.int32, gl.int32), True, 1,
        )  # fmt: skip
        pairs = gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), [N, W * 4])
    elif SCHEME == "int8":
        scale = _clamped(first, (second - _LARGEST_SUM) * (-1 / 255))
        a, b = gl.inline_asm_elementwise(
            _INT8, _2_FROM_3, [words, _doubled(scale, words), _doubled(second, words)],
            (gl.int32, gl.int32), True, 1,
        )  # fmt: skip
        pairs = gl.reshape(gl.join(a, b), [N, W * 2])
    elif SCHEME == "fp8":
        a, b = gl.inline_asm_elementwise(
            _FP8, _2_FROM_2, [words, _doubled(_clamped(first, _LARGEST_SCALE) * 256.0, words)],
            (gl.int32, gl.int32), True, 1,
        )  # fmt: skip
        pairs = gl.reshape(gl.join(a, b), [N, W * 2])
    else:
        gl.static_assert(SCHEME == "lm2")
        n = _clamped(first, _LARGEST_NORM)
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            _LM2, _8_FROM_3, [words, _doubled(n * (_LARGE - _SMALL), words), _doubled(n * _SMALL, words)],
            (gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32), True, 1,
        )  # fmt: skip
        even = gl.join(gl.join(a, e), gl.join(c, g))
        odd = gl.join(gl.join(b, f), gl.join(d, h))
        pairs = gl.reshape(gl.join(even, odd), [N, W * 8])
    return pairs


@gluon.jit
def _tile(pairs, DTYPE: gl.constexpr):
    """[N, D / 2] registers -> [N, D] in DTYPE."""
    low = pairs.to(gl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.reshape(gl.join(low, high), [pairs.shape[0], pairs.shape[1] * 2])


@gluon.jit
def _load(block, meta, offset, row, valid, SCHEME: gl.constexpr, P: gl.constexpr):
    """Words and metadata of a tile; metadata beyond the history is zero, and so is what it multiplies."""
    pointer = block.to(gl.pointer_type(gl.int32), bitcast=True) + offset
    layout: gl.constexpr = row.type.layout
    first = gl.zeros([_N], gl.float16, layout)
    second = first
    if SCHEME == "none":
        words = gl.load(pointer, mask=gl.expand_dims(valid, 1), other=0)
    else:
        words = gl.load(pointer)
        half = meta.to(gl.pointer_type(gl.float16), bitcast=True) + row
        first = gl.load(half, mask=valid, other=0.0)
        if SCHEME == "turbo" or (SCHEME == "int8" or SCHEME == "int4"):
            second = gl.load(half + P, mask=valid, other=0.0)
    return words, first, second


@gluon.jit
def _produce(
    work, ring, full,
    SCHEME: gl.constexpr, PER: gl.constexpr, D: gl.constexpr, OFFSET: gl.constexpr, META: gl.constexpr,
    P: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles last - 1 … first of K or V into the ring."""
    pages, table, page_stride, first, last, high, empty = work
    layout: gl.constexpr = word_layout(PER, D, _N, 4)
    W: gl.constexpr = D // PER
    row = gl.arange(0, _N, gl.SliceLayout(1, layout))
    word = gl.arange(0, W, gl.SliceLayout(0, layout))
    offset = gl.expand_dims(row, 1) * W + gl.expand_dims(word, 0)
    tile = last - 1
    page = gl.load(table + tile * _N // P)
    block = pages + page.to(gl.int64) * page_stride
    start = tile * _N % P
    words, a, b = _load(
        block + OFFSET + start * (W * 4), block + META, offset, start + row, row < high - tile * _N, SCHEME, P
    )
    page = gl.load(table + gl.maximum(tile - 1, first) * _N // P)
    stage = 0
    phase = 1
    for i in range(last - first):
        tile = gl.maximum(last - 2 - i, first)
        block = pages + page.to(gl.int64) * page_stride
        start = tile * _N % P
        next_words, next_a, next_b = _load(
            block + OFFSET + start * (W * 4), block + META, offset, start + row, row < high - tile * _N,
            SCHEME, P,
        )  # fmt: skip
        page = gl.load(table + gl.maximum(tile - 1, first) * _N // P)
        mbarrier.wait(empty.index(stage), phase)
        pairs = _unpack(words, a, b, SCHEME)
        ring.index(stage).store(_tile(pairs, ring.dtype))
        fence_async_shared()
        mbarrier.arrive(full.index(stage), count=1)
        words, a, b = next_words, next_a, next_b
        stage += 1
        wrap = stage == STAGES
        stage = gl.where(wrap, 0, stage)
        phase = gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _to_range_of_half(x):
    """x [M, D] float32 -> below 2 in magnitude, and what each row is to be multiplied by: powers of two."""
    largest = gl.max(gl.abs(x), 1)
    exponent = gl.maximum(largest.to(gl.int32, bitcast=True) & 0x7F800000, _LEAST_EXPONENT)
    shrink = ((254 << 23) - exponent).to(gl.float32, bitcast=True)
    return x * gl.expand_dims(shrink, 1), exponent.to(gl.float32, bitcast=True)


@gluon.jit
def _consume(
    rows, HALF: gl.constexpr, DTYPE: gl.constexpr, KEY: gl.constexpr, VALUE: gl.constexpr,
    KEY_ROTATED: gl.constexpr, VALUE_ROTATED: gl.constexpr,
    KEY_PER: gl.constexpr, VALUE_PER: gl.constexpr,
    QUERY_HEADS: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, BT: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Half of the rows over the tiles of the rings."""
    query, query_stride, query_head_stride, begin, length, block, head, unit, out, logs = rows[:10]
    first, last, high, split_offset, rotation, back, keys, full_k, values, full_v, empty = rows[10:]
    score_layout: gl.constexpr = mma_layout(_N)
    key_layout: gl.constexpr = mma_layout(DK)
    value_layout: gl.constexpr = mma_layout(DV)
    q_layout: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, value_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    VDTYPE: gl.constexpr = DTYPE if VALUE == "none" else gl.float16

    # queries
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DK, DK // 8], [4, 1], [1, 0])
    r = gl.arange(0, _M, gl.SliceLayout(1, load_layout)) + HALF * _M
    token = block * BT + r // GP
    query_head = head * G + r % GP
    real = (token < length) & (r % GP < G)
    at = (begin + token).to(gl.int64)
    source = query + at * query_stride + query_head * query_head_stride
    column = gl.arange(0, DK, gl.SliceLayout(0, load_layout))
    if not KEY_ROTATED:
        column = _elements(KEY_PER, DK, gl.SliceLayout(0, load_layout))
    q = gl.load(
        gl.expand_dims(source, 1) + gl.expand_dims(column, 0), mask=gl.expand_dims(real, 1), other=0.0
    )
    grow = gl.full([_M], 1.0, gl.float32, rows_layout)
    if KEY != "none":
        if KEY_ROTATED:
            operand = gl.convert_layout(q, gl.DotOperandLayout(0, key_layout, 2))
            zeros = gl.zeros([_M, DK], gl.float32, key_layout)
            rotated = warpgroup_mma(operand, rotation, zeros, use_acc=False)
            scaled, factor = _to_range_of_half(rotated * (1.0 / DK**0.5))
            q = scaled.to(gl.float16)
        else:
            scaled, factor = _to_range_of_half(q.to(gl.float32))
            q = scaled.to(gl.float16)
        grow = gl.convert_layout(factor, rows_layout)
    q = gl.convert_layout(q, q_layout)
    units = unit * grow

    m = gl.full([_M], float("-inf"), gl.float32, rows_layout)
    l = gl.zeros([_M], gl.float32, rows_layout)
    acc = gl.zeros([_M, DV], gl.float32, value_layout)
    zero_scores = gl.zeros([_M, _N], gl.float32, score_layout)

    # the last tile, which may end early
    mbarrier.wait(full_k.index(0), 0)
    scores = warpgroup_mma(q, keys.index(0).permute((1, 0)), zero_scores, use_acc=False)
    position = gl.arange(0, _N, gl.SliceLayout(0, score_layout)) + (last - 1) * _N
    scores = gl.where(gl.expand_dims(position < high, 0), scores, float("-inf"))
    m = gl.max(scores, 1) * units
    weights = gl.exp2(scores * gl.expand_dims(units, 1) - gl.expand_dims(m - _LIFT, 1))
    l = gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(VDTYPE), p_layout)
    stage = 0
    phase = 0
    for _ in range(last - first - 1):
        next_stage = stage + 1
        wrap = next_stage == STAGES
        next_stage = gl.where(wrap, 0, next_stage)
        next_phase = gl.where(wrap, phase ^ 1, phase)
        mbarrier.wait(full_k.index(next_stage), next_phase)
        next_scores = warpgroup_mma(
            q, keys.index(next_stage).permute((1, 0)), zero_scores, use_acc=False, is_async=True
        )
        mbarrier.wait(full_v.index(stage), phase)
        next_acc = warpgroup_mma(p, values.index(stage), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[next_scores])
        m_new = gl.maximum(m, gl.max(scores, 1) * units)
        alpha = gl.exp2(m - m_new)
        weights = gl.exp2(scores * gl.expand_dims(units, 1) - gl.expand_dims(m_new - _LIFT, 1))
        l = l * alpha + gl.sum(weights, 1)
        m = m_new
        acc = warpgroup_mma_wait(0, deps=[next_acc])
        mbarrier.arrive(empty.index(stage), count=1)
        p = gl.convert_layout(weights.to(VDTYPE), p_layout)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, value_layout)), 1)
        stage = next_stage
        phase = next_phase
    mbarrier.wait(full_v.index(stage), phase)
    acc = warpgroup_mma(p, values.index(stage), acc)

    # the mean, back in the model's basis
    inverse = gl.convert_layout(1.0 / l, gl.SliceLayout(1, value_layout))
    acc = acc * gl.expand_dims(inverse, 1)
    if VALUE_ROTATED:
        acc, factor = _to_range_of_half(acc)
        high_part = acc.to(gl.float16)
        low_part = (acc - high_part.to(gl.float32)).to(gl.float16)
        acc = warpgroup_mma(gl.convert_layout(high_part, p_layout), back, acc, use_acc=False)
        acc = warpgroup_mma(gl.convert_layout(low_part, p_layout), back, acc)
        acc = acc * gl.expand_dims(factor * (1.0 / DV**0.5), 1)
    r = gl.arange(0, _M, gl.SliceLayout(1, value_layout)) + HALF * _M
    token = block * BT + r // GP
    real = (token < length) & (r % GP < G)
    to = (begin + token).to(gl.int64) * QUERY_HEADS + head * G + r % GP + split_offset
    if VALUE_ROTATED:
        column = gl.arange(0, DV, gl.SliceLayout(0, value_layout))
    else:
        column = _elements(VALUE_PER, DV, gl.SliceLayout(0, value_layout))
    gl.store(out + gl.expand_dims(to, 1) * DV + gl.expand_dims(column, 0), acc, mask=gl.expand_dims(real, 1))
    r = gl.arange(0, _M, rows_layout) + HALF * _M
    token = block * BT + r // GP
    real = (token < length) & (r % GP < G)
    to = (begin + token).to(gl.int64) * QUERY_HEADS + head * G + r % GP + split_offset
    gl.store(logs + to, m + gl.log2(l) - _LIFT, mask=real)


@gluon.jit
def _load_square(matrix, D: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    x = gl.arange(0, D, gl.SliceLayout(1, layout))
    y = gl.arange(0, D, gl.SliceLayout(0, layout))
    tile = gl.load(matrix + gl.expand_dims(x, 1) * D + gl.expand_dims(y, 0))
    return gl.allocate_shared_memory(tile.dtype, [D, D], gl.NVMMASharedLayout(128, 16, 2), tile)


@gluon.jit
def _barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["table_stride", "splits", "split_stride"])
def _history_gluon_kernel(
    query, pages, tables, cu_chunk_lens, history_lens, matrix, back, out, logs,
    query_stride, query_head_stride, page_stride, table_stride, unit, splits, split_stride,
    KEY: gl.constexpr, VALUE: gl.constexpr, KEY_ROTATED: gl.constexpr, VALUE_ROTATED: gl.constexpr,
    KEY_PER: gl.constexpr, VALUE_PER: gl.constexpr, KEY_META: gl.constexpr,
    VALUE_OFFSET: gl.constexpr, META_OFFSET: gl.constexpr, BLOCK_BYTES: gl.constexpr,
    QUERY_HEADS: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, DTYPE: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr, P: gl.constexpr, BT: gl.constexpr, SPLIT_TILES: gl.constexpr,
    STAGES: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    block, head = gl.program_id(0), gl.program_id(1)
    chunk, split = gl.program_id(2) // splits, gl.program_id(2) % splits
    begin = gl.load(cu_chunk_lens + chunk)
    length = gl.load(cu_chunk_lens + chunk + 1) - begin
    high = gl.load(history_lens + chunk)
    tiles = gl.cdiv(high, _N)
    share = gl.maximum(gl.cdiv(tiles, splits), SPLIT_TILES)
    first = gl.minimum(split * share, tiles)
    last = gl.minimum(first + share, tiles)
    split_offset = split.to(gl.int64) * split_stride
    present = (block * BT < length) & (high > 0)
    if present & (first == last):
        empty_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        r = gl.arange(0, 2 * _M, empty_layout)
        token = block * BT + r // GP
        to = (begin + token).to(gl.int64) * QUERY_HEADS + head * G + r % GP + split_offset
        nothing = gl.full([2 * _M], float("-inf"), gl.float32, empty_layout)
        gl.store(logs + to, nothing, mask=(token < length) & (r % GP < G))
    if present & (first < last):
        KDTYPE: gl.constexpr = DTYPE if KEY == "none" else gl.float16
        VDTYPE: gl.constexpr = DTYPE if VALUE == "none" else gl.float16
        tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        keys = gl.allocate_shared_memory(KDTYPE, [STAGES, _N, DK], tile_layout)
        values = gl.allocate_shared_memory(VDTYPE, [STAGES, _N, DV], tile_layout)
        full_k, full_v, empty = _barriers(STAGES, 1), _barriers(STAGES, 1), _barriers(STAGES, 2)
        rotation = keys.index(0)
        if KEY_ROTATED:
            rotation = _load_square(matrix, DK)
        rotation_back = values.index(0)
        if VALUE_ROTATED:
            rotation_back = _load_square(back, DV)
        fence_async_shared()
        pages += head.to(gl.int64) * BLOCK_BYTES
        table = tables + chunk.to(gl.int64) * table_stride
        work = (pages, table, page_stride, first, last, high, empty)
        rows = (
            query, query_stride, query_head_stride, begin, length, block, head, unit, out, logs,
            first, last, high, split_offset, rotation, rotation_back, keys, full_k, values, full_v, empty,
        )  # fmt: skip
        meta_of_values: gl.constexpr = META_OFFSET + KEY_META * P * 2
        gl.warp_specialize(
            [
                (_consume, (
                    rows, 0, DTYPE, KEY, VALUE, KEY_ROTATED, VALUE_ROTATED, KEY_PER, VALUE_PER,
                    QUERY_HEADS, G, GP, BT, DK, DV, STAGES,
                )),
                (_consume, (
                    rows, 1, DTYPE, KEY, VALUE, KEY_ROTATED, VALUE_ROTATED, KEY_PER, VALUE_PER,
                    QUERY_HEADS, G, GP, BT, DK, DV, STAGES,
                )),
                (_produce, (work, keys, full_k, KEY, KEY_PER, DK, 0, META_OFFSET, P, STAGES)),
                (_produce, (
                    work, values, full_v, VALUE, VALUE_PER, DV, VALUE_OFFSET, meta_of_values, P, STAGES,
                )),
            ],
            [4, 4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


class Resources(NamedTuple):
    """Stages of the rings, and registers of a thread."""

    stages: int = 3
    producer: int = 72
    consumer: int = 184


_SPLIT_TILES = 8
_MOST_SPLITS = 16
_TILES_TO_BEGIN = 4


def serves(layout: PageLayout, rows: int) -> bool:
    """Whether this kernel takes such pages and `rows` (tokens times heads of a group) of a chunk, on Hopper."""
    return (
        layout.page_size % TOKENS == 0
        and layout.key_dim in (64, 128)
        and layout.value_dim in (64, 128)
        and rows >= ROWS
    )


@lru_cache(maxsize=1024)
def num_splits(programs: int, tiles: int, processors: int) -> int:
    """Parts of the history that `processors`, each with one program at a time, are done with first."""

    def time(splits: int) -> int:
        waves = triton.cdiv(programs * splits, processors)
        return waves * (triton.cdiv(tiles, splits) + _TILES_TO_BEGIN)

    return min(range(1, max(1, min(tiles // _SPLIT_TILES, _MOST_SPLITS)) + 1), key=time)


def attend_history(
    query: Tensor, pages: Tensor, block_tables: Tensor, cu_chunk_lens: Tensor, history_lens: Tensor,
    layout: PageLayout, matrix: Tensor, back: Tensor, *, max_chunk: int, max_history: int, scale: float,
    processors: int, resources: Resources | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weighted mean of the history's values for each query, float32 [splits, T, Hq, Dv], where its log is
    not -inf, and log2 of the weights' sum, [splits, T, Hq]."""
    resources = resources or Resources()
    tokens, query_heads, _ = query.shape
    chunks = history_lens.shape[0]
    group = query_heads // layout.num_kv_heads
    padded = triton.next_power_of_2(group)
    block_tokens = ROWS // padded
    programs = triton.cdiv(tokens, block_tokens) * layout.num_kv_heads
    splits = num_splits(programs, triton.cdiv(max_history, TOKENS), processors)
    out = torch.empty(splits, tokens, query_heads, layout.value_dim, dtype=torch.float32, device=query.device)
    logs = torch.empty(splits, tokens, query_heads, dtype=torch.float32, device=query.device)
    grid = (triton.cdiv(max_chunk, block_tokens), layout.num_kv_heads, chunks * splits)
    _history_gluon_kernel[grid](
        query, pages, block_tables, cu_chunk_lens, history_lens, matrix, back, out, logs,
        query.stride(0), query.stride(1), pages.stride(0), block_tables.stride(0),
        scale * LOG2E.value, splits, tokens * query_heads,
        KEY=layout.key.scheme, VALUE=layout.value.scheme,
        KEY_ROTATED=layout.key.rotated, VALUE_ROTATED=layout.value.rotated,
        KEY_PER=WORD_ELEMENTS[layout.key.scheme], VALUE_PER=WORD_ELEMENTS[layout.value.scheme],
        KEY_META=layout.key.num_meta, VALUE_OFFSET=layout.value_offset, META_OFFSET=layout.meta_offset,
        BLOCK_BYTES=layout.block_bytes, QUERY_HEADS=query_heads, G=group, GP=padded,
        DTYPE=DTYPES[query.dtype], DK=layout.key_dim, DV=layout.value_dim, P=layout.page_size, BT=block_tokens,
        SPLIT_TILES=_SPLIT_TILES, STAGES=resources.stages,
        PRODUCER_REGISTERS=resources.producer, CONSUMER_REGISTERS=resources.consumer, num_warps=_WARPS,
    )  # fmt: skip
    return out, logs
