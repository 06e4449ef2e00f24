"""Prefill over quantized history on Hopper: some warps unpack while others multiply.

A program has 128 rows (token, query head of the group) of one kv head and walks over tiles of tokens:

- two *producers*, a warpgroup for keys and one for values, copy codes into shared memory some units of 64
  tokens ahead, unpack them to fp16 (`unpack.py`) and put the tiles into rings in shared memory: nothing of
  the history is ever unpacked to device memory;
- two *consumers*, warpgroups of 64 rows each, multiply tiles by `wgmma` and do the softmax. Queries and
  weights stay in registers. Scores of a tile and the weighted values of the tile before are under way at
  once (J. Shah et al., FlashAttention-3, 2024).

A producer says `full` of a stage of its ring, the consumers `empty`. The last tile comes first. Only tiles
that not every row sees whole are masked: the last one, and with windows or unquantized tokens those at
either end.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kvq_kernels import exponent, unpack
from kvq_kernels.exponent import LEAST_EXPONENT, LIFT
from kvq_kernels.layout import PageLayout, RawWindow
from kvq_kernels.unpack import WORD_ELEMENTS

ROWS = 128
"""Of a program, in two halves."""
UNIT = 64
"""Tokens that a producer unpacks at a time: a tile is one unit or more."""
_M = gl.constexpr(ROWS // 2)
_U = gl.constexpr(UNIT)
_WARPS = 4
"""Of every producer and consumer: a warpgroup."""

_unpacked = gluon.jit(unpack.unpacked.fn)
_row_words = unpack.row_words
_cap = gluon.jit(exponent.cap.fn)
_exponent_unit = gluon.jit(exponent.exponent_unit.fn)


# --- layouts ------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _powers(start: int, stop: int):
    """Powers of two from start on, below stop."""
    return [x for x in (1 << i for i in range(16)) if start <= x < stop]


@gluon.constexpr_function
def _piece(width: int):
    """Words of a row that a lane reads at once: 16 bytes, or half a row."""
    return min(4, width // 2)


@gluon.constexpr_function
def _words(width: int):
    """Words [64, width] in registers: eight lanes have pieces of the same columns of eight rows.

    Their 16-byte stores of what the words become then meet every bank of shared memory once, in rows that
    its swizzling tells apart; and so do their loads, see `_code_rows`. A lane has half of one row, so that
    what is made of a row's metadata is made by two lanes only.
    """
    piece = _piece(width)
    columns = [[0, x] for x in _powers(piece, width)]
    lanes = [[1, 0], [2, 0], [4, 0], columns[0], [8, 0]]
    registers = [[0, x] for x in _powers(1, piece)] + columns[1:]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, width])


@gluon.constexpr_function
def _code_rows(width: int):
    """Words [64, width] in shared memory: pieces change places by the row."""
    pieces = width // _piece(width)
    return gl.SwizzledSharedLayout(_piece(width), max(1, 8 // pieces), min(8, pieces), [1, 0])


@gluon.constexpr_function
def _copied(width: int, size: int):
    """[rows, width] numbers of `size` bytes, 16 bytes a lane."""
    across = width * size // 16
    return gl.BlockedLayout([1, 16 // size], [32 // across, across], [4, 1], [1, 0])


@gluon.constexpr_function
def _product(n: int):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])


@gluon.constexpr_function
def _left(n: int):
    return gl.DotOperandLayout(0, _product(n), 2)


_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
_HIGHS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 1, [1, 0]))
_ROW = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 1, [0]))


# --- producers ----------------------------------------------------------------------------------------------


@gluon.jit
def _start(unit, first, last, N: gl.constexpr):
    """The first token of a unit, counted from the last tile on; beyond the first tile, one of that."""
    tile = gl.maximum(last - 1 - unit // (N // _U), first)
    return tile * N + unit % (N // _U) * _U


@gluon.jit
def _copy(
    codes, slot, pages, page, page_stride, start, low, high,
    SCHEME: gl.constexpr, D: gl.constexpr, OFFSET: gl.constexpr, META: gl.constexpr, LOWER: gl.constexpr,
    P: gl.constexpr,
):  # fmt: skip
    """Start to copy codes and metadata of the unit that begins at token `start`, which is in `page`."""
    row = start % P
    # one instruction of five: the compiler forgets that what it has as 64 bits was 32
    stride = page_stride.to(gl.int32)
    offset = gl.inline_asm_elementwise(
        "mul.wide.u32 $0, $1, $2;", "=l,r,r", [page, stride], gl.int64, True, 1
    )  # fmt: skip
    # what is passed to a partition is not known to be aligned
    block = gl.multiple_of(pages + offset, 16)
    words, highs, metas = codes
    W: gl.constexpr = words.shape[2]
    STRIDE: gl.constexpr = _row_words(SCHEME, D)
    layout: gl.constexpr = _copied(W, 4)
    r = row + gl.arange(0, _U, gl.SliceLayout(1, layout))
    i = gl.arange(0, W, gl.SliceLayout(0, layout))
    source = (block + OFFSET).to(gl.pointer_type(gl.int32), bitcast=True) + r[:, None] * STRIDE + i[None, :]
    source = gl.multiple_of(gl.max_contiguous(source, [1, 4]), [1, 16])
    if SCHEME == "fp8":  # what was never written may be NaN, which no scale makes zero
        within = gl.arange(0, _U, gl.SliceLayout(1, layout))
        seen = within < high - start
        if LOWER:
            seen = seen & (within >= low - start)
        async_copy.async_copy_global_to_shared(words.index(slot), source, mask=seen[:, None])
    else:
        async_copy.async_copy_global_to_shared(words.index(slot), source)
    if SCHEME == "lm3":
        of_highs: gl.constexpr = _copied(W, 2)
        r = row + gl.arange(0, _U, gl.SliceLayout(1, of_highs))
        i = gl.arange(0, W, gl.SliceLayout(0, of_highs))
        half = (block + OFFSET + W * 4).to(gl.pointer_type(gl.int16), bitcast=True)
        source = gl.max_contiguous(half + r[:, None] * (STRIDE * 2) + i[None, :], [1, 8])
        async_copy.async_copy_global_to_shared(highs.index(slot), gl.multiple_of(source, [1, 16]))
    COUNT: gl.constexpr = metas.shape[1] // _U
    i = gl.arange(0, COUNT * _U, gl.BlockedLayout([8], [32], [4], [0]))
    numbers = (block + META).to(gl.pointer_type(gl.float16), bitcast=True)
    source = numbers + i // _U * P + (row + i % _U)
    source = gl.multiple_of(gl.max_contiguous(source, 8), 16)
    async_copy.async_copy_global_to_shared(metas.index(slot), source)
    async_copy.commit_group()


@gluon.jit
def _produce(
    work, codes, ring, full, empty, SCHEME: gl.constexpr, D: gl.constexpr, OFFSET: gl.constexpr,
    META: gl.constexpr, LOWER: gl.constexpr, P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """Tiles last - 1 … first of K or V into the ring; codes are copied SLOTS - 1 units ahead."""
    pages, table, page_stride, first, last, low, high = work
    words, highs, metas = codes
    UNITS: gl.constexpr = N // _U
    W: gl.constexpr = words.shape[2]
    of_words: gl.constexpr = _words(W)
    by_row: gl.constexpr = gl.SliceLayout(1, of_words)
    last_page = (high - 1) // P
    for ahead in gl.static_range(SLOTS - 1):
        start = _start(ahead, first, last, N)
        page = gl.load(table + gl.minimum(start // P, last_page))
        _copy(codes, ahead, pages, page, page_stride, start, low, high, SCHEME, D, OFFSET, META, LOWER, P)
    page = gl.load(table + gl.minimum(_start(SLOTS - 1, first, last, N) // P, last_page))
    slot = 0
    stage = 0
    phase = 1
    for i in range(last - first):
        mbarrier.wait(empty.index(stage), phase)
        for part in gl.static_range(UNITS):
            unit = i * UNITS + part
            async_copy.wait_group(SLOTS - 2)
            position = gl.arange(0, _U, by_row) + _start(unit, first, last, N)
            valid = position < high
            if LOWER:
                valid = valid & (position >= low)
            a = gl.where(valid, metas.index(slot).slice(0, _U).load(by_row), 0.0)
            b = a
            if metas.shape[1] > _U:
                b = gl.where(valid, metas.index(slot).slice(_U, _U).load(by_row), 0.0)
            word = words.index(slot).load(of_words)
            third = highs.index(slot).load(of_words) if SCHEME == "lm3" else word
            tile = _unpacked(word, third, a, b, "e4m3" if SCHEME == "fp8" else SCHEME)
            ring.index(stage).slice(part * _U, _U).store(tile)
            if part == UNITS - 1:
                fence_async_shared()
                mbarrier.arrive(full.index(stage), count=1)
            # only now: the fence would wait for them
            free = gl.where(slot == 0, SLOTS - 1, slot - 1)
            start = _start(unit + SLOTS - 1, first, last, N)
            _copy(
                codes, free, pages, page, page_stride, start, low, high, SCHEME, D, OFFSET, META, LOWER, P
            )  # fmt: skip
            page = gl.load(table + gl.minimum(_start(unit + SLOTS, first, last, N) // P, last_page))
            slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
        stage += 1
        wrap = stage == STAGES
        stage = gl.where(wrap, 0, stage)
        phase = gl.where(wrap, phase ^ 1, phase)
    async_copy.wait_group(0)


# --- consumers ----------------------------------------------------------------------------------------------


@gluon.jit
def _to_range_of_half(x):
    """x [M, D] float32 -> below 2 in magnitude, and what each row is to be multiplied by: powers of two."""
    largest = gl.max(gl.abs(x), 1)
    exponent = gl.maximum(largest.to(gl.int32, bitcast=True) & 0x7F800000, LEAST_EXPONENT)
    shrink = ((254 << 23) - exponent).to(gl.float32, bitcast=True)
    return x * shrink[:, None], exponent.to(gl.float32, bitcast=True)


@gluon.jit
def _elements(PER: gl.constexpr, D: gl.constexpr, layout: gl.constexpr):
    """`unpack.unpacked_order`."""
    element = gl.arange(0, D, layout)
    inside = element % PER
    element += inside % 2 * (PER // 2) + inside // 2 - inside
    return element


@gluon.jit
def _places(r, begin, length, block, head, G: gl.constexpr, GP: gl.constexpr, BT: gl.constexpr):
    """Token and query head of rows r of a program, and whether there is such a row."""
    token = block * BT + r // GP
    query_head = head * G + r % GP
    real = (token < length) & (r % GP < G)
    at = (begin + token).to(gl.int64)
    return at, query_head, real


@gluon.jit
def _masked(scores, tile, t, bounds, WINDOW: gl.constexpr, RECENT: gl.constexpr, N: gl.constexpr):
    """-inf where rows at t [M] do not see a tile's tokens."""
    low, high, window = bounds
    position = gl.arange(0, N, gl.SliceLayout(0, scores.type.layout)) + tile * N
    seen = ((position >= low) & (position < high))[None, :]
    if WINDOW:
        seen = seen & (position[None, :] > t[:, None] - window)
    if RECENT > 0:
        seen = seen & (position[None, :] <= t[:, None] - RECENT)
    return gl.where(seen, scores, float("-inf"))


@gluon.constexpr_function
def _scale_asm(count: int):
    """$0 … times the number of each from ${2 · count} on, unless those of all lanes are 1.

    A lane's elements are of two rows by turns of two: the first and the third tell.
    """
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};\n" for i in range(count))
    return f"""{{
    .reg .pred p;
    setp.neu.f32 p, ${2 * count}, 0f3F800000;
    setp.neu.or.f32 p, ${2 * count + 2}, 0f3F800000, p;
    vote.sync.any.pred p, p, 0xFFFFFFFF;
    @!p bra DONE;
    {products}
    DONE:
    }}"""


@gluon.constexpr_function
def _scale_constraints(count: int):
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def _scaled(acc, alpha, DV: gl.constexpr):
    """acc [M, DV] · alpha [M], in warps that have alpha other than 1: few, once large scores were seen."""
    alpha = gl.broadcast(acc, alpha[:, None])[1]
    return gl.inline_asm_elementwise(
        _scale_asm(DV // 2), _scale_constraints(DV // 2), [acc, alpha], gl.float32, True, DV // 2
    )  # fmt: skip


@gluon.jit
def _attend(
    state, tile, count, q, grow, units, t, bounds, scale, softcap, keys, values, barriers,
    MASKED: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr, RECENT: gl.constexpr,
    DV: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`count` tiles from `tile` down, each with the values of the one before."""
    p, m, l, acc, stage, phase = state
    full_k, empty_k, full_v, empty_v = barriers
    nothing = gl.zeros([_M, N], gl.float32, _product(N))
    for i in range(count):
        next_stage = stage + 1
        wrap = next_stage == STAGES
        next_stage = gl.where(wrap, 0, next_stage)
        next_phase = gl.where(wrap, phase ^ 1, phase)
        mbarrier.wait(full_k.index(next_stage), next_phase)
        next_scores = warpgroup_mma(
            q, keys.index(next_stage).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        mbarrier.wait(full_v.index(stage), phase)
        next_acc = warpgroup_mma(p, values.index(stage), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[next_scores])
        mbarrier.arrive(empty_k.index(next_stage), count=1)
        if CAP:
            scores = _cap(scores * grow[:, None], scale, softcap, CAP)
        if MASKED:
            scores = _masked(scores, tile - i, t, bounds, WINDOW, RECENT, N)
        m_new = gl.maximum(m, gl.max(scores, 1) * units)
        top = m_new
        if MASKED:
            top = gl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = gl.exp2(m - top)
        # one multiply-add: the product is not rounded, and m's rounding cancels
        weights = gl.exp2(scores * units[:, None] - (top - LIFT)[:, None])
        l = l * alpha + gl.sum(weights, 1)
        m = m_new
        acc = warpgroup_mma_wait(0, deps=[next_acc])
        mbarrier.arrive(empty_v.index(stage), count=1)
        p = gl.convert_layout(weights.to(gl.float16), _left(DV))
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, _product(DV)))
        acc = _scaled(acc, alpha, DV)
        stage = next_stage
        phase = next_phase
    return p, m, l, acc, stage, phase


@gluon.jit
def _consume(
    rows, work, HALF: gl.constexpr, KEY_ROTATED: gl.constexpr, VALUE_ROTATED: gl.constexpr,
    KEY_PER: gl.constexpr, VALUE_PER: gl.constexpr,
    WINDOW: gl.constexpr, CAP: gl.constexpr, SINK: gl.constexpr, RECENT: gl.constexpr,
    QUERY_HEADS: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, BT: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Half of the rows over the tiles of the rings."""
    query, query_stride, query_head_stride, begin, length, block, head, scale, softcap, out, logs = rows
    history, first, whole, end, last, bounds, split_offset, rotation, back, keys, values, barriers = work
    full_k, empty_k, full_v, _ = barriers
    by_scores: gl.constexpr = gl.SliceLayout(1, _product(N))
    of_values: gl.constexpr = _product(DV)
    by_values: gl.constexpr = gl.SliceLayout(1, of_values)

    # queries, rotated like the keys, as fp16
    loaded: gl.constexpr = _copied(DK, 2)
    r = gl.arange(0, _M, gl.SliceLayout(1, loaded)) + HALF * _M
    at, query_head, real = _places(r, begin, length, block, head, G, GP, BT)
    source = query + at * query_stride + query_head * query_head_stride
    column = gl.arange(0, DK, gl.SliceLayout(0, loaded))
    if not KEY_ROTATED:
        column = _elements(KEY_PER, DK, gl.SliceLayout(0, loaded))
    q = gl.load(source[:, None] + column[None, :], mask=real[:, None], other=0.0)
    if KEY_ROTATED:
        zeros = gl.zeros([_M, DK], gl.float32, _product(DK))
        q = warpgroup_mma(gl.convert_layout(q, _left(DK)), rotation, zeros, use_acc=False) * (1.0 / DK**0.5)
    q, grow = _to_range_of_half(q.to(gl.float32))
    grow = gl.convert_layout(grow, by_scores)
    q = gl.convert_layout(q.to(gl.float16), _left(N))
    units = gl.full([_M], 1.0, gl.float32, by_scores) * _exponent_unit(scale, CAP)
    if not CAP:
        units = units * grow
    t = history + block * BT + (gl.arange(0, _M, by_scores) + HALF * _M) // GP

    # the last tile, which may end early
    acc = gl.zeros([_M, DV], gl.float32, of_values)
    nothing = gl.zeros([_M, N], gl.float32, _product(N))
    mbarrier.wait(full_k.index(0), 0)
    scores = warpgroup_mma(q, keys.index(0).permute((1, 0)), nothing, use_acc=False)
    mbarrier.arrive(empty_k.index(0), count=1)
    if CAP:
        scores = _cap(scores * grow[:, None], scale, softcap, CAP)
    scores = _masked(scores, last - 1, t, bounds, WINDOW, RECENT, N)
    m = gl.max(scores, 1) * units
    top = m
    if WINDOW or RECENT > 0:
        top = gl.where(m == float("-inf"), 0.0, m)
    weights = gl.exp2(scores * units[:, None] - (top - LIFT)[:, None])
    l = gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(gl.float16), _left(DV))

    # the others; those that not every row sees whole are at either end
    state = p, m, l, acc, 0, 0
    end = gl.minimum(end, last - 1)
    whole = gl.minimum(whole, end)
    for part in gl.static_range(3):
        if part == 1 or (part == 0 and RECENT > 0) or (part == 2 and (WINDOW or SINK > 0)):
            begins = last - 1 if part == 0 else (end if part == 1 else whole)
            ends = end if part == 0 else (whole if part == 1 else first)
            state = _attend(
                state, begins - 1, begins - ends, q, grow, units, t, bounds, scale, softcap,
                keys, values, barriers, part != 1, WINDOW, CAP, RECENT, DV, N, STAGES,
            )  # fmt: skip
    p, m, l, acc, stage, phase = state
    mbarrier.wait(full_v.index(stage), phase)
    acc = warpgroup_mma(p, values.index(stage), acc)

    # the mean, rotated back in two fp16 parts and by ±1, so that nothing but the sums is rounded
    acc = acc * gl.convert_layout(1.0 / l, by_values)[:, None]
    if VALUE_ROTATED:
        acc, grow = _to_range_of_half(acc)
        upper = acc.to(gl.float16)
        lower = (acc - upper.to(gl.float32)).to(gl.float16)
        acc = warpgroup_mma(gl.convert_layout(upper, _left(DV)), back, acc, use_acc=False)
        acc = warpgroup_mma(gl.convert_layout(lower, _left(DV)), back, acc)
        acc = acc * (grow * (1.0 / DV**0.5))[:, None]
    at, query_head, real = _places(
        gl.arange(0, _M, by_values) + HALF * _M, begin, length, block, head, G, GP, BT
    )
    to = at * QUERY_HEADS + query_head + split_offset
    if VALUE_ROTATED:
        column = gl.arange(0, DV, gl.SliceLayout(0, of_values))
    else:
        column = _elements(VALUE_PER, DV, gl.SliceLayout(0, of_values))
    gl.store(out + to[:, None] * DV + column[None, :], acc, mask=real[:, None])
    at, query_head, real = _places(
        gl.arange(0, _M, by_scores) + HALF * _M, begin, length, block, head, G, GP, BT
    )
    gl.store(logs + at * QUERY_HEADS + query_head + split_offset, m + gl.log2(l) - LIFT, mask=real)


# --- kernel -------------------------------------------------------------------------------------------------


@gluon.jit
def _load_square(matrix, D: gl.constexpr):
    """A matrix [D, D] into shared memory."""
    x = gl.arange(0, D, gl.SliceLayout(1, _copied(D, 2)))
    y = gl.arange(0, D, gl.SliceLayout(0, _copied(D, 2)))
    tile = gl.load(matrix + x[:, None] * D + y[None, :])
    return gl.allocate_shared_memory(tile.dtype, [D, D], _TILE, tile)


@gluon.jit
def _code_rings(
    SCHEME: gl.constexpr, PER: gl.constexpr, D: gl.constexpr, META: gl.constexpr, SLOTS: gl.constexpr
):
    """Words, lm3's high bits, and META numbers of each token of SLOTS units."""
    W: gl.constexpr = D // PER
    layout: gl.constexpr = _code_rows(W)
    words = gl.allocate_shared_memory(gl.int32, [SLOTS, _U, W], layout)
    highs = words
    if SCHEME == "lm3":
        highs = gl.allocate_shared_memory(gl.int16, [SLOTS, _U, W], _HIGHS)
    return words, highs, gl.allocate_shared_memory(gl.float16, [SLOTS, META * _U], _ROW)


@gluon.jit
def _barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@triton.jit
def find_block(item, cu_chunk_lens, chunks, BT: tl.constexpr):
    """The chunk of the item-th block of BT tokens of all chunks, and the block's place in it.

    Beyond the last block the place is beyond the end of a chunk.
    """
    chunk = 0
    block = 0
    passed = 0
    begin = tl.load(cu_chunk_lens)
    for i in range(chunks):
        stop = tl.load(cu_chunk_lens + i + 1)
        if item >= passed:
            chunk = i
            block = item - passed
        passed += (stop - begin + BT - 1) // BT
        begin = stop
    return chunk, block


_find_block = gluon.jit(find_block.fn)


@gluon.jit(do_not_specialize=["table_stride", "window", "chunks", "splits", "split_stride"])
def _history_gluon_kernel(
    query, pages, tables, cu_chunk_lens, history_lens, matrix, back, out, logs,
    query_stride, query_head_stride, page_stride, table_stride, scale, softcap, window,
    chunks, splits, split_stride,
    KEY: gl.constexpr, VALUE: gl.constexpr, KEY_ROTATED: gl.constexpr, VALUE_ROTATED: gl.constexpr,
    KEY_PER: gl.constexpr, VALUE_PER: gl.constexpr, KEY_META: gl.constexpr, VALUE_META: gl.constexpr,
    VALUE_OFFSET: gl.constexpr, META_OFFSET: gl.constexpr, BLOCK_BYTES: gl.constexpr,
    WINDOW: gl.constexpr, CAP: gl.constexpr, SINK: gl.constexpr, RECENT: gl.constexpr,
    QUERY_HEADS: gl.constexpr, G: gl.constexpr, GP: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BT: gl.constexpr,
    SPLIT_TILES: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """BT tokens of one chunk and one kv head a program, over one of `splits` parts of the pages.

    Writes log2 of the weights' sum and, unless it is -inf, the weighted mean of the values.
    """
    head, split = gl.program_id(1), gl.program_id(2)
    chunk, block = _find_block(gl.program_id(0), cu_chunk_lens, chunks, BT)
    begin = gl.load(cu_chunk_lens + chunk)
    length = gl.load(cu_chunk_lens + chunk + 1) - begin
    history = gl.load(history_lens + chunk)
    stop = gl.minimum(block * BT + BT, length)
    low = 0
    whole = 0
    high = history
    end = history
    if WINDOW:
        low = gl.maximum(history + block * BT - window + 1, 0)
        whole = gl.maximum(history + stop - window, 0)
    if SINK > 0:
        low = gl.maximum(low, SINK)
        whole = gl.maximum(whole, SINK)
    if RECENT > 0:
        high = gl.minimum(history, history + stop - RECENT)
        end = gl.minimum(history, gl.maximum(history + block * BT - RECENT + 1, 0))
    first = low // N
    last = gl.maximum(gl.cdiv(high, N), first)
    share = gl.maximum(gl.cdiv(last - first, splits), SPLIT_TILES)
    first = gl.minimum(first + split * share, last)
    last = gl.minimum(first + share, last)
    whole = gl.minimum(gl.maximum(gl.cdiv(whole, N), first), last)
    end = gl.maximum(gl.minimum(end // N, last), whole)
    split_offset = split.to(gl.int64) * split_stride
    present = (block * BT < length) & (history > 0)
    if present & (first == last):
        r = gl.arange(0, 2 * _M, gl.BlockedLayout([1], [32], [4], [0]))
        at, query_head, real = _places(r, begin, length, block, head, G, GP, BT)
        nothing = gl.full([2 * _M], float("-inf"), gl.float32, r.type.layout)
        gl.store(logs + at * QUERY_HEADS + query_head + split_offset, nothing, mask=real)
    if present & (first < last):
        keys = gl.allocate_shared_memory(gl.float16, [STAGES, N, DK], _TILE)
        values = gl.allocate_shared_memory(gl.float16, [STAGES, N, DV], _TILE)
        key_codes = _code_rings(KEY, KEY_PER, DK, KEY_META, SLOTS)
        value_codes = _code_rings(VALUE, VALUE_PER, DV, VALUE_META, SLOTS)
        full_k, empty_k = _barriers(STAGES, 1), _barriers(STAGES, 2)
        full_v, empty_v = _barriers(STAGES, 1), _barriers(STAGES, 2)
        rotation = keys.index(0)  # not looked at
        if KEY_ROTATED:
            rotation = _load_square(matrix, DK)
        rotation_back = values.index(0)
        if VALUE_ROTATED:
            rotation_back = _load_square(back, DV)
        fence_async_shared()
        pages += head.to(gl.int64) * BLOCK_BYTES
        table = tables + chunk.to(gl.int64) * table_stride
        source = (pages, table, page_stride, first, last, low, high)
        rows = (
            query, query_stride, query_head_stride, begin, length, block, head, scale, softcap, out, logs,
        )  # fmt: skip
        work = (
            history, first, whole, end, last, (low, high, window), split_offset, rotation, rotation_back,
            keys, values, (full_k, empty_k, full_v, empty_v),
        )  # fmt: skip
        LOWER: gl.constexpr = WINDOW or SINK > 0
        VALUE_META_OFFSET: gl.constexpr = META_OFFSET + KEY_META * P * 2
        gl.warp_specialize(
            [
                (_consume, (
                    rows, work, 0, KEY_ROTATED, VALUE_ROTATED, KEY_PER, VALUE_PER, WINDOW, CAP, SINK, RECENT,
                    QUERY_HEADS, G, GP, BT, DK, DV, N, STAGES,
                )),
                (_consume, (
                    rows, work, 1, KEY_ROTATED, VALUE_ROTATED, KEY_PER, VALUE_PER, WINDOW, CAP, SINK, RECENT,
                    QUERY_HEADS, G, GP, BT, DK, DV, N, STAGES,
                )),
                (_produce, (
                    source, key_codes, keys, full_k, empty_k, KEY, DK, 0, META_OFFSET, LOWER,
                    P, N, STAGES, SLOTS,
                )),
                (_produce, (
                    source, value_codes, values, full_v, empty_v, VALUE, DV, VALUE_OFFSET, VALUE_META_OFFSET,
                    LOWER, P, N, STAGES, SLOTS,
                )),
            ],
            [4, 4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


# --- launcher -----------------------------------------------------------------------------------------------


class Resources(NamedTuple):
    """What a program fills a multiprocessor with; registers of all threads at one place are 512."""

    tokens: int
    """Of a tile."""
    stages: int
    """Tiles in a ring."""
    slots: int
    """Units of codes in a ring, one of them being unpacked."""
    producer: int
    """Registers of a thread."""
    consumer: int


RESOURCES = Resources(64, 2, 4, 56, 200)
"""Measured on an H200 for every codec, see NOTES.md."""
_SPLIT_TOKENS = 512
"""Of history, that a program of its own is worth."""
_MOST_SPLITS = 16
_EXTRA_TOKENS = 640
"""That a program could read in the time that it takes to begin, and its part to be merged."""


def serves(layout: PageLayout, heads: int, max_chunk: int) -> bool:
    """Whether this kernel takes such pages, and chunks that fill its rows; `heads` of a group, padded."""
    codecs = (layout.key, layout.value)
    return (
        layout.page_size % UNIT == 0
        and all(codec.scheme in WORD_ELEMENTS and codec.scheme != "none" for codec in codecs)
        and all(dim in (64, 128) for dim in (layout.key_dim, layout.value_dim))
        and layout.key_code_bytes % 16 == layout.value_code_bytes % 16 == 0
        and heads <= ROWS <= heads * max_chunk
    )


@lru_cache(maxsize=1024)
def num_splits(programs: int, tokens: int, processors: int) -> int:
    """Parts of the history that `processors`, with one program each at a time, are done with first."""

    def time(splits: int) -> int:
        return triton.cdiv(programs * splits, processors) * (triton.cdiv(tokens, splits) + _EXTRA_TOKENS)

    most = min(tokens // _SPLIT_TOKENS, 4 * processors // programs, _MOST_SPLITS)
    return min(range(1, max(1, most) + 1), key=time)


def attend_history(
    query: Tensor,
    pages: Tensor,
    block_tables: Tensor,
    cu_chunk_lens: Tensor,
    history_lens: Tensor,
    layout: PageLayout,
    matrix: Tensor,
    back: Tensor,
    *,
    max_chunk: int,
    max_history: int,
    scale: float,
    window: int,
    softcap: float,
    raw: RawWindow | None,
    processors: int,
    resources: Resources = RESOURCES,
) -> tuple[Tensor, Tensor]:
    """Queries of chunks over their history, see `reference.paged_prefill`, in parts [S].

    matrix, back: √D · H with columns of keys and rows of values in `unpacked_order`, where they are rotated.
    Returns means of the values [S, T, Hq, Dv] float32, and log2 of their weights' sums [S, T, Hq]: where that
    is -inf there is no mean.
    """
    tokens, query_heads, _ = query.shape
    chunks, device = history_lens.shape[0], query.device
    group = query_heads // layout.num_kv_heads
    padded = triton.next_power_of_2(group)
    block_tokens = ROWS // padded
    programs = triton.cdiv(tokens, block_tokens) * layout.num_kv_heads
    splits = num_splits(programs, min(max_history, window or max_history), processors)
    means = torch.empty(splits, tokens, query_heads, layout.value_dim, dtype=torch.float32, device=device)
    logs = torch.empty(splits, tokens, query_heads, dtype=torch.float32, device=device)
    # blocks of all chunks together: not many, however many chunks a graph has room for
    blocks = min(
        triton.cdiv(max_chunk, block_tokens) * chunks, triton.cdiv(tokens, block_tokens) + chunks - 1
    )
    _history_gluon_kernel[(blocks, layout.num_kv_heads, splits)](
        query, pages, block_tables, cu_chunk_lens, history_lens, matrix, back, means, logs,
        query.stride(0), query.stride(1), pages.stride(0), block_tables.stride(0),
        scale, softcap, window, chunks, splits, tokens * query_heads,
        KEY=layout.key.scheme, VALUE=layout.value.scheme,
        KEY_ROTATED=layout.key.rotated, VALUE_ROTATED=layout.value.rotated,
        KEY_PER=WORD_ELEMENTS[layout.key.scheme], VALUE_PER=WORD_ELEMENTS[layout.value.scheme],
        KEY_META=layout.key.num_meta, VALUE_META=layout.value.num_meta,
        VALUE_OFFSET=layout.value_offset, META_OFFSET=layout.meta_offset, BLOCK_BYTES=layout.block_bytes,
        WINDOW=window > 0, CAP=softcap > 0, SINK=0 if raw is None else raw.sink,
        RECENT=0 if raw is None else raw.recent, QUERY_HEADS=query_heads, G=group, GP=padded,
        DK=layout.key_dim, DV=layout.value_dim, P=layout.page_size, N=resources.tokens, BT=block_tokens,
        SPLIT_TILES=_SPLIT_TOKENS // resources.tokens, STAGES=resources.stages, SLOTS=resources.slots,
        PRODUCER_REGISTERS=resources.producer, CONSUMER_REGISTERS=resources.consumer, num_warps=_WARPS,
    )  # fmt: skip
    return means, logs
