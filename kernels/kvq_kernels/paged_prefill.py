"""Prefill: prompt chunks over themselves, unquantized, and over earlier tokens in pages, tile by tile.

Earlier tokens come first, by a launch of their own, because they live in the rotated basis; their result is
rotated back (a small transform over the chunk's queries, never over the history) and is what the launch
over the fresh tokens continues from. Rows of a tile are (token, query head of the group).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_kernels.bits import decode_table
from kvq_kernels.codebook import qjl_projection, qjl_scale
from kvq_kernels.hadamard import hadamard
from kvq_kernels.layout import PageLayout, RawWindow
from kvq_kernels.paged_decode import (
    LOG2E,
    attend_pages,
    attend_raw,
    cap,
    exponent_unit,
    has_products,
    key_matrices,
    load_query,
    softmax_step,
    tile_tokens,
)
from kvq_kernels.quantize_store import DTYPES, check_pages, unit_stride

_ROW_BYTES = 16384
"""Of one tile of queries."""


@triton.jit(do_not_specialize=["table_stride", "window"])
def _history_kernel(
    query, pages, tables, cu_chunk_lens, history_lens, matrix, matrix2, key_table, value_table,
    out, out2, stats,
    query_stride, query_head_stride, page_stride, table_stride, scale, softcap, window,
    KEY: tl.constexpr, VALUE: tl.constexpr, ROTATED: tl.constexpr, KEY_META: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, META_OFFSET: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    QUERY_HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    DTYPE: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """BT tokens of one chunk and one kv head a program, over the pages: sums, and m and l of the softmax."""
    block, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_chunk_lens + chunk)
    length = tl.load(cu_chunk_lens + chunk + 1) - begin
    history = tl.load(history_lens + chunk)
    if (block * BT < length) & (history > 0):
        M: tl.constexpr = BT * GP
        r = tl.arange(0, M)
        token = block * BT + r // GP
        query_head = head * G + r % GP
        real = (token < length) & (r % GP < G)
        at = (begin + token).to(tl.int64)
        rows = query + at * query_stride + query_head * query_head_stride
        t = history + token
        low = SINK
        if WINDOW:
            low = tl.maximum(history + block * BT - window + 1, SINK)
        high = history
        if RECENT > 0:
            high = tl.minimum(history, history + tl.minimum(block * BT + BT, length) - RECENT)
        first = low // N
        last = tl.maximum(tl.cdiv(high, N), first)
        q = load_query(rows, real, matrix, ROTATED, DTYPE, DK, DKP, M)
        q2 = q
        if KEY == "qjl":
            q2 = load_query(rows, real, matrix2, ROTATED, DTYPE, DK, DKP, M)
        m = tl.full((M,), float("-inf"), tl.float32)
        l = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, DVP), tl.float32)
        m, l, acc, acc2 = attend_pages(
            q, q2, m, l, acc, acc, t,
            pages + head.to(tl.int64) * BLOCK_BYTES, tables + chunk.to(tl.int64) * table_stride,
            low, high, first, last, key_table, value_table, scale, softcap, window,
            KEY, VALUE, KEY_META, VALUE_OFFSET, META_OFFSET, page_stride,
            WINDOW, CAP, SINK, RECENT, DTYPE, DK, DKP, DV, DVP, P, N,
        )  # fmt: skip
        to = at * QUERY_HEADS + query_head
        tl.store(stats + to * 2, m, mask=real)
        tl.store(stats + to * 2 + 1, l, mask=real)
        d = tl.arange(0, DVP)
        mask = real[:, None] & (d < DV)[None, :]
        tl.store(out + to[:, None] * DV + d[None, :], acc, mask=mask)
        if VALUE == "qjl":
            tl.store(out2 + to[:, None] * DV + d[None, :], acc2, mask=mask)


@triton.jit(do_not_specialize=["window"])
def _fresh_kernel(
    query, key, value, out, cu_chunk_lens, history_lens, earlier, stats, sinks,
    raw_keys, raw_values, rings,
    query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride,
    scale, softcap, window,
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
        if HAS_HISTORY:
            history = tl.load(history_lens + chunk)
            if history > 0:
                m = tl.load(stats + to * 2, mask=real, other=float("-inf"))
                l = tl.load(stats + to * 2 + 1, mask=real, other=0.0)
                acc = tl.load(earlier + to[:, None] * DV + d[None, :], mask=real_values, other=0.0)
                if HAS_RAW:
                    ring = tl.load(rings + chunk).to(tl.int64)
                    m, l, acc = attend_raw(
                        q, m, l, acc, history + token, history - 1,
                        raw_keys, raw_values, ring, head, scale, softcap, window,
                        HEADS, WINDOW, CAP, SINK, RECENT, DTYPE, DK, DKP, DV, DVP, N,
                    )  # fmt: skip
        unit = exponent_unit(scale, CAP)
        stop = tl.minimum(block * BT + BT, length)
        start = 0
        if WINDOW:
            start = tl.maximum(block * BT - window + 1, 0) // N * N
        for first in range(start, stop, N):
            j = first + tl.arange(0, N)
            source = (begin + j).to(tl.int64)
            e = tl.arange(0, DKP)
            k = tl.load(
                key + source[:, None] * key_stride + head * key_head_stride + e[None, :],
                mask=(j < length)[:, None] & (e < DK)[None, :], other=0.0,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            seen = j[None, :] <= token[:, None]
            if WINDOW:
                seen = seen & (j[None, :] > token[:, None] - window)
            weights, alpha, m, l = softmax_step(cap(scores, scale, softcap, CAP), seen, m, l, unit)
            v = tl.load(
                value + source[:, None] * value_stride + head * value_head_stride + d[None, :],
                mask=(j < length)[:, None] & (d < DV)[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(weights.to(DTYPE), v, acc * alpha[:, None], input_precision="ieee")
        if HAS_SINKS:
            sink = tl.load(sinks + query_head, mask=real, other=0.0).to(tl.float32) * (LOG2E / unit)
            m_new = tl.maximum(m, sink)
            alpha = tl.exp2((m - m_new) * unit)
            acc = acc * alpha[:, None]
            l = l * alpha + tl.exp2((sink - m_new) * unit)
        acc = acc / tl.where(l == 0, 1.0, l)[:, None]
        tl.store(out + to[:, None] * DV + d[None, :], acc.to(DTYPE), mask=real_values)


def _block_tokens(layout: PageLayout, padded_group: int, longest: int, query: Tensor) -> int:
    """Tokens of a program: 64 rows with the group's heads, fewer where the accumulator would not fit."""
    wide = triton.next_power_of_2(max(layout.key_dim, layout.value_dim))
    most = 64 if has_products(query.dtype, query.device) else 16
    rows = max(16, min(most, _ROW_BYTES // (wide * 2), padded_group * triton.next_power_of_2(longest)))
    return max(1, rows // padded_group)


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
) -> Tensor:
    """See `reference.paged_prefill`; one launch without history, two and a transform with it."""
    tokens, query_heads, key_dim = query.shape
    chunks, value_dim, device = history_lens.shape[0], layout.value_dim, query.device
    assert key_dim == layout.key_dim and query.dtype == layout.dtype, (query.shape, query.dtype)
    assert cu_chunk_lens.shape == (chunks + 1,) and block_tables.shape[0] == chunks
    check_pages(pages, layout)
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    group = query_heads // layout.num_kv_heads
    padded = triton.next_power_of_2(group)
    block_tokens = _block_tokens(layout, padded, max_chunk, query)
    out = torch.empty(tokens, query_heads, value_dim, dtype=query.dtype, device=device)
    if not max_chunk:
        return out
    grid = (triton.cdiv(max_chunk, block_tokens), layout.num_kv_heads, chunks)
    common = {
        "WINDOW": window > 0, "CAP": softcap > 0, "SINK": 0 if raw is None else raw.sink,
        "RECENT": 0 if raw is None else raw.recent, "QUERY_HEADS": query_heads, "G": group, "GP": padded,
        "DTYPE": DTYPES[query.dtype], "DK": key_dim, "DKP": triton.next_power_of_2(key_dim),
        "DV": value_dim, "DVP": triton.next_power_of_2(value_dim),
        "N": tile_tokens(layout, query.dtype, device), "BT": block_tokens, "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    earlier = stats = out  # unused without history
    if max_history:
        earlier = torch.empty(tokens, query_heads, value_dim, dtype=torch.float32, device=device)
        signs = torch.empty_like(earlier) if layout.value.scheme == "qjl" else earlier
        stats = torch.empty(tokens, query_heads, 2, dtype=torch.float32, device=device)
        matrix, matrix2 = key_matrices(layout.key, key_dim, query.dtype, device)
        _history_kernel[grid](
            query, pages, block_tables, cu_chunk_lens, history_lens, matrix, matrix2,
            decode_table(layout.key.scheme, query.dtype, device),
            decode_table(layout.value.scheme, query.dtype, device),
            earlier, signs, stats,
            query.stride(0), query.stride(1), pages.stride(0), block_tables.stride(0), scale, softcap, window,
            KEY=layout.key.scheme, VALUE=layout.value.scheme, ROTATED=layout.key.rotated,
            KEY_META=layout.key.num_meta, VALUE_OFFSET=layout.value_offset, META_OFFSET=layout.meta_offset,
            BLOCK_BYTES=layout.block_bytes, P=layout.page_size, **common,
        )  # fmt: skip
        if layout.value.scheme == "qjl":
            projection = qjl_projection(value_dim, torch.float32, device)
            earlier += signs @ (projection * qjl_scale(value_dim))
        if layout.value.rotated:
            earlier = hadamard(earlier)
    _fresh_kernel[grid](
        query, key, value, out, cu_chunk_lens, history_lens, earlier, stats, out if sinks is None else sinks,
        query if raw is None else raw.keys, query if raw is None else raw.values,
        history_lens if rings is None else rings,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        scale, softcap, window, HAS_HISTORY=max_history > 0, HAS_RAW=raw is not None,
        HAS_SINKS=sinks is not None, HEADS=layout.num_kv_heads, **common,
    )  # fmt: skip
    return out
