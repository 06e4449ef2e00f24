"""Prefill: prompt chunks over themselves, unquantized, and over earlier tokens in pages, tile by tile.

Earlier tokens come first, by a launch of their own, because they live in the rotated basis. It leaves for
each query their weighted mean, rotated back, and the logarithm of their weights' sum; the launch over the
fresh tokens continues from there. Rows of a tile are (token, query head of the group).

On sm_80 and later, codes are unpacked to fp16 by `unpack.py`, and on Hopper `history_gluon.py` has some warps
do that while others multiply. `bits.py` serves older GPUs, float32, head dims that are no power of two, qjl.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvq_kernels import history_gluon
from kvq_kernels.bits import decode_table, signs_of_hadamard, walsh
from kvq_kernels.codebook import qjl_projection, qjl_scale
from kvq_kernels.exponent import LEAST_EXPONENT, LIFT
from kvq_kernels.hadamard import hadamard
from kvq_kernels.key_bias import KeyBias
from kvq_kernels.layout import PageLayout, RawWindow
from kvq_kernels.paged_decode import (
    LOG2E,
    attend_pages,
    attend_raw,
    cap,
    exponent_unit,
    key_matrices,
    load_query,
    tile_tokens,
)
from kvq_kernels.quantize_store import DTYPES, check_pages, has_products, unit_stride
from kvq_kernels.unpack import WORD_ELEMENTS, load_meta, unpack_tile, unpacked_elements, unpacked_order

# --- pieces -------------------------------------------------------------------------------------------------


@triton.jit
def _softmax_step(scores, m, l, unit, lift, MASKED: tl.constexpr):
    """Running softmax: weights of this tile, the factor for what was accumulated, and the new m and l.

    scores [M, N], -inf where not seen; m, l [M], m in powers of two: scores times `unit` (a number or [M]).
    Weights are 2^lift at most. A row that has seen nothing keeps m = -inf, l = 0; only MASKED allows for it.
    """
    m_new = tl.maximum(m, tl.max(scores, 1) * unit)
    top = m_new
    if MASKED:
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - top)
    # one multiply-add: the product is not rounded, and m's rounding cancels
    weights = tl.exp2(scores * (tl.zeros_like(m) + unit)[:, None] - (top - lift)[:, None])
    return weights, alpha, m_new, l * alpha + tl.sum(weights, 1)


@triton.jit
def _to_range_of_half(x):
    """x [M, D] -> float32 below 2 in magnitude, and what each row is to be multiplied by: powers of two."""
    x = x.to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, LEAST_EXPONENT)
    shrink = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    return x * shrink[:, None], exponent.to(tl.float32, bitcast=True)


@triton.jit
def _rotated_back(x, place, real, matrix, D: tl.constexpr):
    """x [M, D] times H in `unpacked_order`, by way of memory at `place` [M, 1], piece by piece.

    In two fp16 parts and times ±1, so that nothing but the sums is rounded.
    """
    d = tl.arange(0, D)
    x, factor = _to_range_of_half(x)
    tl.store(place + d[None, :], x, mask=real[:, None])
    tl.debug_barrier()
    out = tl.zeros(x.shape, tl.float32)
    for start in tl.range(0, D, 64, num_stages=1):
        k = start + tl.arange(0, 64)
        piece = tl.load(place + k[None, :], mask=real[:, None], other=0.0)
        h = tl.load(matrix + k[:, None] * D + d[None, :])
        high = piece.to(tl.float16)
        out = tl.dot((piece - high.to(tl.float32)).to(tl.float16), h, tl.dot(high, h, out))
    tl.debug_barrier()
    return out * (factor * (1.0 / D**0.5))[:, None]


@triton.jit
def _load_metas(
    block, tile, low, high,
    MASKED: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, KEY_META: tl.constexpr,
    META_OFFSET: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Two metadata numbers [N] of the keys of a tile, two of its values."""
    meta = (block + META_OFFSET).to(tl.pointer_type(tl.float16), bitcast=True)
    row = tile * N % P + tl.arange(0, N)
    position = tile * N + tl.arange(0, N)
    valid = (position >= low) & (position < high)
    key_1, key_2 = load_meta(meta, row, valid, MASKED, KEY, P)
    value_1, value_2 = load_meta(meta + KEY_META * P, row, valid, MASKED, VALUE, P)
    return key_1, key_2, value_1, value_2


@triton.jit
def _attend_tiles(
    q, m, l, acc, unit, grow, t, pages, table, low, high, first, last, scale, softcap, window, page_stride,
    MASKED: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    KEY_PER: tl.constexpr, VALUE_PER: tl.constexpr, KEY_META: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, META_OFFSET: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, RECENT: tl.constexpr, DTYPE: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Tiles `first` to `last` of N tokens for q [M, DK] at t [M]; unless MASKED every row sees all of them.

    grow [M]: what makes q·k the scores (applied by `unit` unless they are capped).
    """
    page = tl.load(table + first * N // P, mask=first < last, other=0)
    key_1, key_2, value_1, value_2 = _load_metas(
        pages + page.to(tl.int64) * page_stride,
        first,
        low,
        high,
        MASKED,
        KEY,
        VALUE,
        KEY_META,
        META_OFFSET,
        P,
        N,
    )
    for tile in range(first, last):
        start = tile * N
        row = start % P + tl.arange(0, N)
        position = start + tl.arange(0, N)
        valid = (position >= low) & (position < high)
        block = pages + page.to(tl.int64) * page_stride
        # the next tile's page and metadata are on their way meanwhile; the compiler sees to the codes
        following = tl.minimum(tile + 1, last - 1)
        page = tl.load(table + following * N // P)
        k = unpack_tile(block, key_1, key_2, row, valid, MASKED, KEY, DTYPE, KEY_PER, DK)
        key_1, key_2, next_1, next_2 = _load_metas(
            pages + page.to(tl.int64) * page_stride, following, low, high,
            MASKED, KEY, VALUE, KEY_META, META_OFFSET, P, N,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k))
        if CAP:
            scores = cap(scores * grow[:, None], scale, softcap, CAP)
        if MASKED:
            seen = valid[None, :]
            if WINDOW:
                seen = seen & (position[None, :] > t[:, None] - window)
            if RECENT > 0:
                seen = seen & (position[None, :] <= t[:, None] - RECENT)
            scores = tl.where(seen, scores, float("-inf"))
        weights, alpha, m, l = _softmax_step(scores, m, l, unit, LIFT, MASKED)
        v = unpack_tile(
            block + VALUE_OFFSET, value_1, value_2, row, valid, MASKED, VALUE, DTYPE, VALUE_PER, DV
        )
        acc = tl.dot(weights.to(v.dtype), v, acc * alpha[:, None])
        value_1, value_2 = next_1, next_2
    return m, l, acc


# --- kernels ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["table_stride", "window", "splits", "split_stride"])
def _history_kernel(
    query, pages, tables, cu_chunk_lens, history_lens, matrix, matrix2, back, key_table, value_table,
    bias_query, bias_table, scratch, out, out2, logs,
    query_stride, query_head_stride, page_stride, table_stride, scale, softcap, window, splits, split_stride,
    FAST: tl.constexpr, BIAS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    KEY_ROTATED: tl.constexpr, VALUE_ROTATED: tl.constexpr,
    KEY_PER: tl.constexpr, VALUE_PER: tl.constexpr, KEY_META: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, META_OFFSET: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    QUERY_HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    DTYPE: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, SPLIT_TILES: tl.constexpr,
):  # fmt: skip
    """BT tokens of one chunk and one kv head a program, over one of `splits` parts of the pages.

    Writes log2 of the weights' sum and, unless it is -inf, the weighted mean of the values.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    chunk, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    begin = tl.load(cu_chunk_lens + chunk)
    length = tl.load(cu_chunk_lens + chunk + 1) - begin
    history = tl.load(history_lens + chunk)
    low = SINK
    if WINDOW:
        low = tl.maximum(history + block * BT - window + 1, SINK)
    high = history
    if RECENT > 0:
        high = tl.minimum(history, history + tl.minimum(block * BT + BT, length) - RECENT)
    first = low // N
    last = tl.maximum(tl.cdiv(high, N), first)
    share = tl.maximum(tl.cdiv(last - first, splits), SPLIT_TILES)
    first = tl.minimum(first + split * share, last)
    last = tl.minimum(first + share, last)
    M: tl.constexpr = BT * GP
    r = tl.arange(0, M)
    token = block * BT + r // GP
    query_head = head * G + r % GP
    real = (token < length) & (r % GP < G)
    at = (begin + token).to(tl.int64)
    to = at * QUERY_HEADS + query_head + split.to(tl.int64) * split_stride
    present = (block * BT < length) & (history > 0)
    if present & (first == last):
        tl.store(logs + to, tl.full((M,), float("-inf"), tl.float32), mask=real)
    if present & (first < last):
        rows = query + at * query_stride + query_head * query_head_stride
        t = history + token
        pages += head.to(tl.int64) * BLOCK_BYTES
        table = tables + chunk.to(tl.int64) * table_stride
        m = tl.full((M,), float("-inf"), tl.float32)
        l = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, DVP), tl.float32)
        acc2 = acc
        unit = exponent_unit(scale, CAP)
        if FAST:
            if KEY_ROTATED:
                q = load_query(rows, real, matrix, True, tl.float32, DK, DK, M)
            else:
                q = tl.load(
                    rows[:, None] + unpacked_elements(KEY_PER, DK)[None, :], mask=real[:, None], other=0.0
                )
            grow = tl.full((M,), 1.0, tl.float32)
            if KEY != "none":
                q, grow = _to_range_of_half(q)
                # by way of memory: loaded, the compiler keeps it in shared memory, computed, in registers
                place = scratch + (at * QUERY_HEADS + query_head)[:, None] * DK + tl.arange(0, DK)[None, :]
                tl.store(place, q.to(tl.float16), mask=real[:, None])
                tl.debug_barrier()
                q = tl.load(place, mask=real[:, None], other=0.0)
            units = tl.zeros((M,), tl.float32) + unit
            if not CAP:
                units = units * grow
            # tiles that every row sees whole: the others are at either end
            LOWER: tl.constexpr = WINDOW or SINK > 0
            whole = first
            if LOWER:
                whole = tl.cdiv(SINK, N)
                if WINDOW:
                    whole = tl.maximum(
                        tl.cdiv(history + tl.minimum(block * BT + BT, length) - window, N), whole
                    )
                whole = tl.minimum(tl.maximum(whole, first), last)
            end = history
            if RECENT > 0:
                end = tl.minimum(history, tl.maximum(history + block * BT - RECENT + 1, 0))
            end = tl.maximum(tl.minimum(end // N, last), whole)
            for part in tl.static_range(3):
                if part > 0 or LOWER:
                    m, l, acc = _attend_tiles(
                        q, m, l, acc, units, grow, t, pages, table, low, high,
                        first if part == 0 else (whole if part == 1 else end),
                        whole if part == 0 else (end if part == 1 else last),
                        scale, softcap, window, page_stride, part != 1, KEY, VALUE, KEY_PER, VALUE_PER,
                        KEY_META, VALUE_OFFSET, META_OFFSET, WINDOW, CAP, RECENT, DTYPE, DK, DV, P, N,
                    )  # fmt: skip
            log = m + tl.log2(l) - LIFT
        else:
            q = load_query(rows, real, matrix, KEY_ROTATED, DTYPE, DK, DKP, M)
            q2 = q
            if KEY == "qjl":
                q2 = load_query(rows, real, matrix2, KEY_ROTATED, DTYPE, DK, DKP, M)
            bias_q = q
            if BIAS:
                rows = bias_query + (at * QUERY_HEADS + query_head) * DK
                bias_q = load_query(rows, real, matrix, False, DTYPE, DK, DKP, M)
            m, l, acc, acc2 = attend_pages(
                q, q2, bias_q, m, l, acc, acc, t, pages, table, low, high, first, last,
                key_table, value_table, bias_table, scale, softcap, window,
                BIAS, KEY, VALUE, KEY_META, VALUE_OFFSET, META_OFFSET, page_stride,
                WINDOW, CAP, SINK, RECENT, DTYPE, DK, DKP, DV, DVP, P, N,
            )  # fmt: skip
            log = m * unit + tl.log2(l)
        inverse = tl.where(l > 0, 1.0 / l, 0.0)[:, None]
        acc = acc * inverse
        d = tl.arange(0, DVP)
        if FAST and VALUE_ROTATED:
            acc = _rotated_back(acc, out + to[:, None] * DV, real, back, DV)
        elif FAST:
            d = unpacked_elements(VALUE_PER, DV)
        elif VALUE_ROTATED and VALUE != "qjl" and DV == DVP:
            acc = walsh(acc, M, DV) * (1.0 / DV**0.5)
        tl.store(logs + to, tl.where(l > 0, log, float("-inf")), mask=real)
        mask = real[:, None] & (d < DV)[None, :]
        tl.store(out + to[:, None] * DV + d[None, :], acc, mask=mask)
        if VALUE == "qjl":
            tl.store(out2 + to[:, None] * DV + d[None, :], acc2 * inverse, mask=mask)


@triton.jit
def _attend_fresh(
    q, m, l, acc, token, key, value, length, first, last, unit, window,
    key_stride, value_stride, scale, softcap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DTYPE: tl.constexpr,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Tiles `first` to `last` of N tokens of the chunk; unless MASKED every row sees all of them.

    key, value: pointers to the chunk's first token.
    """
    d, e = tl.arange(0, DKP), tl.arange(0, DVP)
    for tile in range(first, last):
        j = tile * N + tl.arange(0, N)
        source = j.to(tl.int64)
        keys = key + source[:, None] * key_stride + d[None, :]
        values = value + source[:, None] * value_stride + e[None, :]
        if MASKED:
            k = tl.load(keys, mask=(j < length)[:, None] & (d < DK)[None, :], other=0.0)
        elif DKP > DK:
            k = tl.load(keys, mask=(d < DK)[None, :], other=0.0)
        else:
            k = tl.load(keys)
        scores = cap(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, CAP)
        if MASKED:
            seen = j[None, :] <= token[:, None]
            if WINDOW:
                seen = seen & (j[None, :] > token[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        weights, alpha, m, l = _softmax_step(scores, m, l, unit, 0.0, MASKED)
        if MASKED:
            v = tl.load(values, mask=(j < length)[:, None] & (e < DV)[None, :], other=0.0)
        elif DVP > DV:
            v = tl.load(values, mask=(e < DV)[None, :], other=0.0)
        else:
            v = tl.load(values)
        acc = tl.dot(weights.to(DTYPE), v, acc * alpha[:, None], input_precision="ieee")
    return m, l, acc


@triton.jit(do_not_specialize=["window", "splits", "split_stride"])
def _fresh_kernel(
    query, key, value, out, cu_chunk_lens, history_lens, earlier, logs, sinks,
    raw_keys, raw_values, rings,
    query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride,
    scale, softcap, window, splits, split_stride,
    HAS_HISTORY: tl.constexpr, HAS_RAW: tl.constexpr, HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    HEADS: tl.constexpr, QUERY_HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    DTYPE: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    N: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """BT tokens of one chunk and one kv head a program, over the chunk itself; goes on from the history."""
    # late blocks have the most keys: they start first
    block, head, chunk = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_chunk_lens + chunk)
    length = tl.load(cu_chunk_lens + chunk + 1) - begin
    if block * BT < length:
        M: tl.constexpr = BT * GP
        r = tl.arange(0, M)
        token = block * BT + r // GP
        query_head = head * G + r % GP
        real = (token < length) & (r % GP < G)
        at = (begin + token).to(tl.int64)
        rows = query + at * query_stride + query_head * query_head_stride
        q = load_query(rows, real, query, False, DTYPE, DK, DKP, M)
        to = at * QUERY_HEADS + query_head
        d = tl.arange(0, DVP)
        real_values = real[:, None] & (d < DV)[None, :]
        m = tl.full((M,), float("-inf"), tl.float32)
        l = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, DVP), tl.float32)
        unit = exponent_unit(scale, CAP)
        if HAS_HISTORY:
            history = tl.load(history_lens + chunk)
            if history > 0:
                for split in range(splits):
                    part_of = to + tl.cast(split, tl.int64) * split_stride
                    log = tl.load(logs + part_of, mask=real, other=float("-inf"))
                    there = real_values & (log > float("-inf"))[:, None]
                    mean = tl.load(earlier + part_of[:, None] * DV + d[None, :], mask=there, other=0.0)
                    m_new = tl.maximum(m, log)
                    top = tl.where(m_new == float("-inf"), 0.0, m_new)
                    alpha, weight = tl.exp2(m - top), tl.exp2(log - top)
                    acc = acc * alpha[:, None] + mean * weight[:, None]
                    l = l * alpha + weight
                    m = m_new
                if HAS_RAW:
                    ring = tl.load(rings + chunk).to(tl.int64)
                    m, l, acc = attend_raw(
                        q, m / unit, l, acc, history + token, history - 1,
                        raw_keys, raw_values, ring, head, scale, softcap, window,
                        HEADS, WINDOW, CAP, SINK, RECENT, DTYPE, DK, DKP, DV, DVP, N,
                    )  # fmt: skip
                    m = m * unit
        stop = tl.minimum(block * BT + BT, length)
        first = 0
        whole = 0
        if WINDOW:
            first = tl.maximum(block * BT - window + 1, 0) // N
            whole = tl.cdiv(tl.maximum(stop - window, 0), N)
        last = tl.cdiv(stop, N)
        end = tl.maximum((block * BT + 1) // N, whole)
        if WINDOW:
            whole = tl.minimum(whole, last)
            end = tl.minimum(end, last)
        keys = key + begin.to(tl.int64) * key_stride + head * key_head_stride
        values = value + begin.to(tl.int64) * value_stride + head * value_head_stride
        for part in tl.static_range(3):
            if part > 0 or WINDOW:
                m, l, acc = _attend_fresh(
                    q, m, l, acc, token, keys, values, length,
                    first if part == 0 else (whole if part == 1 else end),
                    whole if part == 0 else (end if part == 1 else last),
                    unit, window, key_stride, value_stride, scale, softcap,
                    part != 1, WINDOW, CAP, DTYPE, DK, DKP, DV, DVP, N,
                )  # fmt: skip
        if HAS_SINKS:
            sink = tl.load(sinks + query_head, mask=real, other=0.0).to(tl.float32) * LOG2E
            m_new = tl.maximum(m, sink)
            alpha = tl.exp2(m - m_new)
            acc = acc * alpha[:, None]
            l = l * alpha + tl.exp2(sink - m_new)
        acc = acc / tl.where(l == 0, 1.0, l)[:, None]
        tl.store(out + to[:, None] * DV + d[None, :], acc.to(DTYPE), mask=real_values)


# --- launchers ----------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """How a kernel is cut: rows of queries a program, tokens a tile, and what the compiler is told."""

    rows: int
    tokens: int
    warps: int
    stages: int
    registers: int | None = None
    """Of a thread, at most: so that two programs fit a multiprocessor."""


_PACKED = {
    (9, 64): Geometry(128, 64, 8, 3, 128),
    (9, 128): Geometry(128, 64, 8, 3, 128),
    (9, 256): Geometry(128, 64, 8, 2),
    (8, 64): Geometry(128, 64, 4, 3),
    (8, 128): Geometry(128, 64, 8, 2),
}
"""(generation of the GPU, head dim) -> geometry over codes to unpack; 9 stands for 10 and 11, 8 for 12."""
_PLAIN = {
    (9, 64): Geometry(128, 64, 4, 3),
    (9, 128): Geometry(128, 64, 8, 2, 128),
    (9, 256): Geometry(128, 64, 8, 2),
    (8, 64): Geometry(128, 64, 4, 3),
    (8, 128): Geometry(64, 64, 4, 2),
    (8, 256): Geometry(64, 32, 4, 2),
}
"""The same over K and V as they are: fewer tiles under way, they are larger."""
_SPLIT_TILES = 8
"""Tiles of history that a program of its own is worth."""
_MOST_SPLITS = 16
_WARP_ROWS = 16
"""Rows that one warp holds at least, where the matrix units multiply."""
_ROW_BYTES = 16384
"""Of one tile of queries, on the portable path."""


@lru_cache(maxsize=16)
def generation(device: torch.device) -> int:
    """Major compute capability; 0 without a GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _unpacks_fast(layout: PageLayout, device: torch.device) -> bool:
    """Whether `unpack.py` serves; at head dim 256 only where registers and memory allow."""
    widest = 256 if generation(device) in (9, 10, 11) else 128
    return (
        has_products(layout.dtype, device)
        and generation(device) >= 8
        and all(codec.scheme in WORD_ELEMENTS for codec in (layout.key, layout.value))
        and all(dim & (dim - 1) == 0 and 64 <= dim <= widest for dim in (layout.key_dim, layout.value_dim))
        and layout.page_size % 16 == 0
    )


def _portable_geometry(layout: PageLayout, rows: int, device: torch.device) -> Geometry:
    """64 rows with the group's heads, fewer where the accumulator would not fit."""
    wide = triton.next_power_of_2(max(layout.key_dim, layout.value_dim))
    most = 64 if has_products(layout.dtype, device) else 16
    rows = max(16, min(most, _ROW_BYTES // (wide * 2), rows))
    return Geometry(rows, tile_tokens(layout, layout.dtype, device), 4, 2)


def _geometry(
    table: dict[tuple[int, int], Geometry], layout: PageLayout, rows: int, device: torch.device
) -> Geometry:
    """The table's geometry; fewer rows where a chunk has no more."""
    wide = max(64, triton.next_power_of_2(max(layout.key_dim, layout.value_dim)))
    family = 9 if generation(device) in (9, 10, 11) else 8
    if not has_products(layout.dtype, device) or (family, wide) not in table:
        return _portable_geometry(layout, rows, device)
    chosen = table[family, wide]
    most = max(16, min(chosen.rows, rows))
    page = layout.page_size & -layout.page_size
    return chosen._replace(
        rows=most,
        tokens=max(16, min(chosen.tokens, page)),
        warps=min(chosen.warps, max(4, most // _WARP_ROWS)),
    )


def _num_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Parts of the history for programs of their own: where few chunks are long, two for each processor."""
    return max(1, min(2 * _multiprocessors(device) // programs, tiles // _SPLIT_TILES, _MOST_SPLITS))


@lru_cache(maxsize=32)
def _rotation_of_queries(per: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """√D · H with columns in `unpacked_order`."""
    return signs_of_hadamard(head_dim, dtype, device)[:, unpacked_order(per, head_dim, device)].contiguous()


@lru_cache(maxsize=32)
def _rotation_back(per: int, head_dim: int, device: torch.device) -> Tensor:
    """√D · H with rows in `unpacked_order`."""
    signs = signs_of_hadamard(head_dim, torch.float16, device)
    return signs[unpacked_order(per, head_dim, device)].contiguous()


def paged_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    block_tables: Tensor,
    cu_chunk_lens: Tensor,
    history_lens: Tensor,
    layout: PageLayout,
    *,
    max_chunk: int,
    max_history: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    raw: RawWindow | None = None,
    rings: Tensor | None = None,
    bias: KeyBias | None = None,
    out: Tensor | None = None,
    _geometries: tuple[Geometry | history_gluon.Resources | None, Geometry | None] = (None, None),
) -> Tensor:
    """See `reference.paged_prefill`; one launch without history, two with it.

    `_geometries` overrides the choice for the history and for the chunk.
    """
    tokens, query_heads, key_dim = query.shape
    chunks, value_dim, device = history_lens.shape[0], layout.value_dim, query.device
    assert key_dim == layout.key_dim and query.dtype == layout.dtype, (query.shape, query.dtype)
    assert cu_chunk_lens.shape == (chunks + 1,) and block_tables.shape[0] == chunks
    check_pages(pages, layout)
    simple = not (max_history or window or softcap or sinks is not None)
    if simple and chunks == 1 and max_chunk == tokens and _torch_is_fast(layout, device):
        attended = _whole_prompt(query, key, value, scale)
        return attended.contiguous() if out is None else out.copy_(attended)
    if out is None:
        out = torch.empty(tokens, query_heads, value_dim, dtype=query.dtype, device=device)
    if not max_chunk:
        return out
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    group = query_heads // layout.num_kv_heads
    padded = triton.next_power_of_2(group)
    rows = padded * triton.next_power_of_2(max_chunk)
    common = {
        "WINDOW": window > 0, "CAP": softcap > 0, "SINK": 0 if raw is None else raw.sink,
        "RECENT": 0 if raw is None else raw.recent, "QUERY_HEADS": query_heads, "G": group, "GP": padded,
        "DTYPE": DTYPES[query.dtype], "DK": key_dim, "DKP": triton.next_power_of_2(key_dim),
        "DV": value_dim, "DVP": triton.next_power_of_2(value_dim),
    }  # fmt: skip

    def cut(geometry: Geometry) -> tuple[tuple[int, int, int], dict[str, int | None]]:
        block_tokens = max(1, geometry.rows // padded)
        grid = (triton.cdiv(max_chunk, block_tokens), layout.num_kv_heads, chunks)
        options = {
            "N": geometry.tokens, "BT": block_tokens, "num_warps": geometry.warps,
            "num_stages": geometry.stages, "maxnreg": geometry.registers,
        }  # fmt: skip
        return grid, options

    earlier = logs = out  # unused without history
    splits = 1
    if max_history:
        fast = bias is None and _unpacks_fast(layout, device)
        if fast:
            matrix = matrix2 = back = decode_table("none", query.dtype, device)
            key_per, value_per = WORD_ELEMENTS[layout.key.scheme], WORD_ELEMENTS[layout.value.scheme]
            if layout.key.rotated:
                matrix = _rotation_of_queries(key_per, key_dim, query.dtype, device)
            if layout.value.rotated:
                back = _rotation_back(value_per, value_dim, device)
            plain = "none" in (layout.key.scheme, layout.value.scheme)
            geometry = _geometry(_PLAIN if plain else _PACKED, layout, rows, device)
        else:
            matrix, matrix2 = key_matrices(layout.key, key_dim, query.dtype, device)
            key_per = value_per = 2
            back = matrix
            geometry = _portable_geometry(layout, rows, device)
        specialized = fast and generation(device) == 9
        specialized = specialized and history_gluon.serves(layout, padded, max_chunk)
        chosen = _geometries[0] or (history_gluon.RESOURCES if specialized else geometry)
        if isinstance(chosen, history_gluon.Resources):
            earlier, logs = history_gluon.attend_history(
                query, pages, block_tables, cu_chunk_lens, history_lens, layout, matrix, back,
                max_chunk=max_chunk, max_history=max_history, scale=scale, window=window, softcap=softcap,
                raw=raw, processors=_multiprocessors(device), resources=chosen,
            )  # fmt: skip
            splits = len(logs)
        else:
            geometry = chosen
            grid, options = cut(geometry)
            # Of a graph's programs those that find a chunk count: chunks are as long as all tokens at most.
            programs = triton.cdiv(tokens, max(1, geometry.rows // padded)) * layout.num_kv_heads
            splits = _num_splits(programs, min(max_history, window or max_history) // geometry.tokens, device)
            grid = (grid[0], grid[1], chunks * splits)
            earlier = torch.empty(splits, tokens, query_heads, value_dim, dtype=torch.float32, device=device)
            signs = torch.empty_like(earlier) if layout.value.scheme == "qjl" else earlier
            logs = torch.empty(splits, tokens, query_heads, dtype=torch.float32, device=device)
            scratch = torch.empty(tokens, query_heads, key_dim, dtype=torch.float16, device=device)
            _history_kernel[grid](
                query, pages, block_tables, cu_chunk_lens, history_lens, matrix, matrix2, back,
                decode_table(layout.key.scheme, query.dtype, device),
                decode_table(layout.value.scheme, query.dtype, device),
                query if bias is None else bias.weights(query), query if bias is None else bias.table,
                scratch, earlier, signs, logs,
                query.stride(0), query.stride(1), pages.stride(0), block_tables.stride(0),
                scale, softcap, window, splits, tokens * query_heads,
                FAST=fast, BIAS=bias is not None, KEY=layout.key.scheme, VALUE=layout.value.scheme,
                KEY_ROTATED=layout.key.rotated, VALUE_ROTATED=layout.value.rotated,
                KEY_PER=key_per, VALUE_PER=value_per, KEY_META=layout.key.num_meta,
                VALUE_OFFSET=layout.value_offset, META_OFFSET=layout.meta_offset,
                BLOCK_BYTES=layout.block_bytes, P=layout.page_size, SPLIT_TILES=_SPLIT_TILES,
                **common, **options,
            )  # fmt: skip
            if layout.value.scheme == "qjl":
                projection = qjl_projection(value_dim, torch.float32, device)
                earlier = hadamard(earlier + signs @ (projection * qjl_scale(value_dim)))
            elif layout.value.rotated and value_dim & (value_dim - 1):
                earlier = hadamard(earlier)
    grid, options = cut(_geometries[1] or _geometry(_PLAIN, layout, rows, device))
    _fresh_kernel[grid](
        query, key, value, out, cu_chunk_lens, history_lens, earlier, logs, out if sinks is None else sinks,
        query if raw is None else raw.keys, query if raw is None else raw.values,
        history_lens if rings is None else rings,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        scale, softcap, window, splits, tokens * query_heads,
        HAS_HISTORY=max_history > 0, HAS_RAW=raw is not None, HAS_SINKS=sinks is not None,
        HEADS=layout.num_kv_heads, **common, **options,
    )  # fmt: skip
    return out


def _torch_is_fast(layout: PageLayout, device: torch.device) -> bool:
    """Whether torch's attention of a whole prompt runs on the matrix units."""
    return (
        has_products(layout.dtype, device) and generation(device) >= 8 and layout.key_dim == layout.value_dim
    )


def _whole_prompt(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One chunk over itself: torch's attention. query [T, Hq, D], key and value [T, Hkv, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)
