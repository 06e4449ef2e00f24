"""Prefill over quantized history on Hopper: some warps unpack while others multiply.

A program has 128 rows (token, query head of the group) of one kv head and walks over tiles of 64 tokens:

- two *producers*, a warpgroup for keys and one for values, load codes one tile ahead, unpack them to fp16
  (`unpack.py`) and put the tiles into rings in shared memory: nothing of the history is ever unpacked to
  device memory;
- two *consumers*, warpgroups of 64 rows each, multiply tiles by `wgmma` and do the softmax. Queries and
  weights stay in registers. Scores of a tile and the weighted values of the tile before are under way at
  once, and so is the softmax (J. Shah et al., FlashAttention-3, 2024).

A producer says `full` of a stage of its ring, the consumers `empty` of a stage of both. The last tile comes
first: it is the only one that may reach beyond the history, so that no other has to be masked.
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
from kvq_kernels.exponent import LEAST_EXPONENT, LIFT, LOG2E
from kvq_kernels.layout import PageLayout
from kvq_kernels.unpack import WORD_ELEMENTS

ROWS = 128
"""Of a program, in two halves."""
TOKENS = 64
"""Of a tile."""
_M = gl.constexpr(ROWS // 2)
_N = gl.constexpr(TOKENS)
_WARPS = 4
"""Of every producer and consumer: a warpgroup."""

_unpacked = gluon.jit(unpack.unpacked.fn)


# --- layouts ------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _powers(start: int, stop: int):
    """Powers of two from start on, below stop."""
    return [x for x in (1 << i for i in range(16)) if start <= x < stop]


@gluon.constexpr_function
def _words(per: int, width: int):
    """Words [64, width] in registers: four lanes share a row, in pieces of 8 elements.

    Eight lanes' 16-byte stores of what the words become then meet every bank of shared memory once, in rows
    that its swizzling tells apart.
    """
    piece = max(1, 8 // per)
    inside = [[0, x] for x in _powers(1, piece)]
    lanes = [[0, piece], [0, 2 * piece]] + [[y, 0] for y in ((4, 1, 2) if per <= 8 else (1, 2, 4))]
    columns = [[0, x] for x in _powers(4 * piece, width)]
    registers = [*inside, *columns, [32, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [64, width])


@gluon.constexpr_function
def _product(n: int):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])


@gluon.constexpr_function
def _left(n: int):
    return gl.DotOperandLayout(0, _product(n), 2)


@gluon.constexpr_function
def _rows_of(width: int):
    """[rows, width] 16-bit numbers, 16 bytes a lane."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


# --- producers ----------------------------------------------------------------------------------------------


@gluon.jit
def _load(block, meta, offset, row, valid, SCHEME: gl.constexpr, P: gl.constexpr):
    """Words and metadata of a tile; metadata beyond the history is zero, and so is what it multiplies."""
    words = gl.load(block.to(gl.pointer_type(gl.int32), bitcast=True) + offset)
    half = meta.to(gl.pointer_type(gl.float16), bitcast=True) + row
    first = gl.load(half, mask=valid, other=0.0)
    second = first
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
    W: gl.constexpr = D // PER
    layout: gl.constexpr = _words(PER, W)
    row = gl.arange(0, _N, gl.SliceLayout(1, layout))
    word = gl.arange(0, W, gl.SliceLayout(0, layout))
    offset = row[:, None] * W + word[None, :]
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
        ring.index(stage).store(_unpacked(words, a, b, SCHEME))
        fence_async_shared()
        mbarrier.arrive(full.index(stage), count=1)
        words, a, b = next_words, next_a, next_b
        stage += 1
        wrap = stage == STAGES
        stage = gl.where(wrap, 0, stage)
        phase = gl.where(wrap, phase ^ 1, phase)


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
def _consume(
    rows, HALF: gl.constexpr, KEY_ROTATED: gl.constexpr, VALUE_ROTATED: gl.constexpr,
    KEY_PER: gl.constexpr, VALUE_PER: gl.constexpr,
    QUERY_HEADS: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, BT: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Half of the rows over the tiles of the rings."""
    query, query_stride, query_head_stride, begin, length, block, head, unit, out, logs = rows[:10]
    first, last, high, split_offset, rotation, back, keys, full_k, values, full_v, empty = rows[10:]
    of_scores: gl.constexpr = _product(_N)
    of_values: gl.constexpr = _product(DV)
    by_scores: gl.constexpr = gl.SliceLayout(1, of_scores)
    by_values: gl.constexpr = gl.SliceLayout(1, of_values)

    # queries, rotated like the keys, as fp16
    loaded: gl.constexpr = _rows_of(DK)
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
    q = gl.convert_layout(q.to(gl.float16), _left(_N))
    units = unit * grow

    # the last tile, which may end early
    acc = gl.zeros([_M, DV], gl.float32, of_values)
    nothing = gl.zeros([_M, _N], gl.float32, of_scores)
    mbarrier.wait(full_k.index(0), 0)
    scores = warpgroup_mma(q, keys.index(0).permute((1, 0)), nothing, use_acc=False)
    position = gl.arange(0, _N, gl.SliceLayout(0, of_scores)) + (last - 1) * _N
    scores = gl.where((position < high)[None, :], scores, float("-inf"))
    m = gl.max(scores, 1) * units
    weights = gl.exp2(scores * units[:, None] - (m - LIFT)[:, None])
    l = gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(gl.float16), _left(DV))

    # the others, each with the values of the one before
    stage = 0
    phase = 0
    for _ in range(last - first - 1):
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
        m_new = gl.maximum(m, gl.max(scores, 1) * units)
        alpha = gl.exp2(m - m_new)
        # one multiply-add: the product is not rounded, and m's rounding cancels
        weights = gl.exp2(scores * units[:, None] - (m_new - LIFT)[:, None])
        l = l * alpha + gl.sum(weights, 1)
        m = m_new
        acc = warpgroup_mma_wait(0, deps=[next_acc])
        mbarrier.arrive(empty.index(stage), count=1)
        p = gl.convert_layout(weights.to(gl.float16), _left(DV))
        acc = acc * gl.convert_layout(alpha, by_values)[:, None]
        stage = next_stage
        phase = next_phase
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
    x = gl.arange(0, D, gl.SliceLayout(1, _rows_of(D)))
    y = gl.arange(0, D, gl.SliceLayout(0, _rows_of(D)))
    tile = gl.load(matrix + x[:, None] * D + y[None, :])
    return gl.allocate_shared_memory(tile.dtype, [D, D], _TILE, tile)


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


@gluon.jit(do_not_specialize=["table_stride", "chunks", "splits", "split_stride"])
def _history_gluon_kernel(
    query, pages, tables, cu_chunk_lens, history_lens, matrix, back, out, logs,
    query_stride, query_head_stride, page_stride, table_stride, unit, chunks, splits, split_stride,
    KEY: gl.constexpr, VALUE: gl.constexpr, KEY_ROTATED: gl.constexpr, VALUE_ROTATED: gl.constexpr,
    KEY_PER: gl.constexpr, VALUE_PER: gl.constexpr, KEY_META: gl.constexpr,
    VALUE_OFFSET: gl.constexpr, META_OFFSET: gl.constexpr, BLOCK_BYTES: gl.constexpr,
    QUERY_HEADS: gl.constexpr, G: gl.constexpr, GP: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr, P: gl.constexpr, BT: gl.constexpr, SPLIT_TILES: gl.constexpr,
    STAGES: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """BT tokens of one chunk and one kv head a program, over one of `splits` parts of the pages.

    Writes log2 of the weights' sum and, unless it is -inf, the weighted mean of the values.
    """
    head, split = gl.program_id(1), gl.program_id(2)
    chunk, block = _find_block(gl.program_id(0), cu_chunk_lens, chunks, BT)
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
        r = gl.arange(0, 2 * _M, gl.BlockedLayout([1], [32], [4], [0]))
        at, query_head, real = _places(r, begin, length, block, head, G, GP, BT)
        nothing = gl.full([2 * _M], float("-inf"), gl.float32, r.type.layout)
        gl.store(logs + at * QUERY_HEADS + query_head + split_offset, nothing, mask=real)
    if present & (first < last):
        keys = gl.allocate_shared_memory(gl.float16, [STAGES, _N, DK], _TILE)
        values = gl.allocate_shared_memory(gl.float16, [STAGES, _N, DV], _TILE)
        full_k, full_v, empty = _barriers(STAGES, 1), _barriers(STAGES, 1), _barriers(STAGES, 2)
        rotation = keys.index(0)  # not looked at
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
        VALUE_META: gl.constexpr = META_OFFSET + KEY_META * P * 2
        gl.warp_specialize(
            [
                (_consume, (
                    rows, 0, KEY_ROTATED, VALUE_ROTATED, KEY_PER, VALUE_PER, QUERY_HEADS, G, GP, BT,
                    DK, DV, STAGES,
                )),
                (_consume, (
                    rows, 1, KEY_ROTATED, VALUE_ROTATED, KEY_PER, VALUE_PER, QUERY_HEADS, G, GP, BT,
                    DK, DV, STAGES,
                )),
                (_produce, (work, keys, full_k, KEY, KEY_PER, DK, 0, META_OFFSET, P, STAGES)),
                (_produce, (work, values, full_v, VALUE, VALUE_PER, DV, VALUE_OFFSET, VALUE_META, P, STAGES)),
            ],
            [4, 4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


# --- launcher -----------------------------------------------------------------------------------------------


class Resources(NamedTuple):
    """Stages of the rings, and registers of a thread: together they fill a multiprocessor's 512 for each."""

    stages: int
    producer: int
    consumer: int


_RESOURCES = {"int8": Resources(2, 72, 184), "fp8": Resources(3, 80, 176)}
_NARROW = Resources(3, 56, 200)
"""Of up to four bits: fewer codes are under way, and queries and weights take what is left."""
_SPLIT_TILES = 8
"""Tiles of history that a program of its own is worth."""
_MOST_SPLITS = 16
_EXTRA_TILES = 10
"""Tiles that a program could read in the time that it takes to begin, and its part to be merged."""


def serves(layout: PageLayout, heads: int, max_chunk: int) -> bool:
    """Whether this kernel takes such pages, and chunks that fill its rows; `heads` of a group, padded."""
    codecs = (layout.key, layout.value)
    return (
        layout.page_size % TOKENS == 0
        and all(codec.scheme in WORD_ELEMENTS and codec.scheme != "none" for codec in codecs)
        and all(dim in (64, 128) for dim in (layout.key_dim, layout.value_dim))
        and heads <= ROWS <= heads * max_chunk
    )


def resources_of(layout: PageLayout) -> Resources:
    """Measured on an H200, see NOTES.md."""
    schemes = (layout.key.scheme, layout.value.scheme)
    return next((found for scheme, found in _RESOURCES.items() if scheme in schemes), _NARROW)


@lru_cache(maxsize=1024)
def num_splits(programs: int, tiles: int, processors: int) -> int:
    """Parts of the history that `processors`, with one program each at a time, are done with first."""

    def time(splits: int) -> int:
        return triton.cdiv(programs * splits, processors) * (triton.cdiv(tiles, splits) + _EXTRA_TILES)

    most = min(tiles // _SPLIT_TILES, 4 * processors // programs, _MOST_SPLITS)
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
    processors: int,
    resources: Resources | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries of chunks over their history, see `reference.paged_prefill`, in parts [S].

    matrix, back: √D · H with columns of keys and rows of values in `unpacked_order`, where they are rotated.
    Returns means of the values [S, T, Hq, Dv] float32, and log2 of their weights' sums [S, T, Hq]: where that
    is -inf there is no mean.
    """
    resources = resources or resources_of(layout)
    tokens, query_heads, _ = query.shape
    chunks, device = history_lens.shape[0], query.device
    group = query_heads // layout.num_kv_heads
    padded = triton.next_power_of_2(group)
    block_tokens = ROWS // padded
    programs = triton.cdiv(tokens, block_tokens) * layout.num_kv_heads
    splits = num_splits(programs, triton.cdiv(max_history, TOKENS), processors)
    means = torch.empty(splits, tokens, query_heads, layout.value_dim, dtype=torch.float32, device=device)
    logs = torch.empty(splits, tokens, query_heads, dtype=torch.float32, device=device)
    # blocks of all chunks together: not many, however many chunks a graph has room for
    blocks = min(
        triton.cdiv(max_chunk, block_tokens) * chunks, triton.cdiv(tokens, block_tokens) + chunks - 1
    )
    _history_gluon_kernel[(blocks, layout.num_kv_heads, splits)](
        query, pages, block_tables, cu_chunk_lens, history_lens, matrix, back, means, logs,
        query.stride(0), query.stride(1), pages.stride(0), block_tables.stride(0),
        scale * LOG2E.value, chunks, splits, tokens * query_heads,
        KEY=layout.key.scheme, VALUE=layout.value.scheme,
        KEY_ROTATED=layout.key.rotated, VALUE_ROTATED=layout.value.rotated,
        KEY_PER=WORD_ELEMENTS[layout.key.scheme], VALUE_PER=WORD_ELEMENTS[layout.value.scheme],
        KEY_META=layout.key.num_meta, VALUE_OFFSET=layout.value_offset, META_OFFSET=layout.meta_offset,
        BLOCK_BYTES=layout.block_bytes, QUERY_HEADS=query_heads, G=group, GP=padded,
        DK=layout.key_dim, DV=layout.value_dim, P=layout.page_size, BT=block_tokens,
        SPLIT_TILES=_SPLIT_TILES, STAGES=resources.stages,
        PRODUCER_REGISTERS=resources.producer, CONSUMER_REGISTERS=resources.consumer, num_warps=_WARPS,
    )  # fmt: skip
    return means, logs
