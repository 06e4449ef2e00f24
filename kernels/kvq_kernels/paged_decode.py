"""Decode: one query per request over its pages, split over the sequence, partials merged in a second launch.

One program serves all G query heads of a kv head, so that every byte of the cache is read once. This is the
portable path: plain Triton, any architecture, every codec.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from kvq_kernels import warp_decode
from kvq_kernels.bits import (
    decode_table,
    load_signs,
    load_square,
    load_tile,
    multiply_rows,
    qjl_matrix,
    signs_of_hadamard,
    walsh,
    weigh,
)
from kvq_kernels.codebook import qjl_projection, qjl_scale
from kvq_kernels.exponent import LOG2E, cap, exponent_unit
from kvq_kernels.key_bias import KeyBias
from kvq_kernels.layout import Codec, PageLayout, RawWindow
from kvq_kernels.quantize_store import DTYPES, check_pages, has_products, unit_stride

_MIN_TILES = 2
"""Tiles of tokens that a split has at least: below that, starting a program costs more than its work."""
_TILE_BYTES = 16384
"""Of one unpacked K or V tile."""


# --- pieces shared with prefill -----------------------------------------------------------------------------


@triton.jit
def softmax_step(scores, seen, m, l, unit):
    """Running softmax: weights of this tile, the factor for what was accumulated, and the new m and l.

    scores, seen [M, N]; m, l [M]. A row that has seen nothing keeps m = -inf, l = 0.
    """
    scores = tl.where(seen, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    top = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.exp2((scores - top[:, None]) * unit)
    alpha = tl.exp2((m - top) * unit)
    return weights, alpha, m_new, l * alpha + tl.sum(weights, 1)


@triton.jit
def load_query(
    rows, row_mask, matrix,
    ROTATED: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Queries at pointers `rows` [R] -> [R, DP] in DTYPE, rotated if the keys are."""
    if ROTATED:
        CHUNK: tl.constexpr = 32 if D % 32 == 0 else 16
        q = (multiply_rows(rows, row_mask, matrix, D, DP, R, CHUNK) * (1.0 / D**0.5)).to(DTYPE)
    else:
        d = tl.arange(0, DP)
        q = tl.load(rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)
    return q


@triton.jit
def attend_pages(
    q, q2, bias_q, m, l, acc, acc2, t,
    pages, table, low, high, first, last,
    key_table, value_table, bias_table, scale, softcap, window,
    BIAS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, KEY_META: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, META_OFFSET: tl.constexpr, page_stride,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    DTYPE: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Tiles `first` to `last` of N tokens, of which positions low … high - 1 are read, for queries at t [M].

    pages: pointer to the kv head's block in page 0; table: pointer to the request's block table. If BIAS,
    bias_q [M, DKP] meets rows of bias_table by position (`key_bias.py`), in float32: spikes need its digits.
    """
    unit = exponent_unit(scale, CAP)
    KEY_BIAS: tl.constexpr = KEY == "int8" or KEY == "int4"
    VALUE_BIAS: tl.constexpr = VALUE == "int8" or VALUE == "int4"
    total = tl.sum(q.to(tl.float32), 1)
    shift = tl.zeros(m.shape, tl.float32)
    for tile in range(first, last):
        start = tile * N
        page = tl.load(table + start // P).to(tl.int64)
        block = pages + page * page_stride
        meta = (block + META_OFFSET).to(tl.pointer_type(tl.float16), bitcast=True)
        row = start % P + tl.arange(0, N)
        position = start + tl.arange(0, N)
        valid = (position >= low) & (position < high)
        k, k_factor, k_bias = load_tile(block, meta, row, valid, key_table, KEY, DTYPE, DK, DKP, P)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * k_factor[None, :]
        if KEY_BIAS:
            scores += total[:, None] * k_bias[None, :]
        if KEY == "qjl":
            signs, length = load_signs(block, meta, row, valid, DTYPE, DK, DKP, P)
            scores += tl.dot(q2, tl.trans(signs), input_precision="ieee") * length[None, :]
        if BIAS:
            d = tl.arange(0, DKP)
            place = bias_table + position.to(tl.int64)[:, None] * DK + d[None, :]
            row_of_table = tl.load(place, mask=valid[:, None] & (d < DK)[None, :], other=0.0)
            scores += tl.dot(bias_q, tl.trans(row_of_table), input_precision="ieee")
        seen = valid[None, :]
        if WINDOW:
            seen = seen & (position[None, :] > t[:, None] - window)
        if RECENT > 0:
            seen = seen & (position[None, :] <= t[:, None] - RECENT)
        weights, alpha, m, l = softmax_step(cap(scores, scale, softcap, CAP), seen, m, l, unit)
        v, v_factor, v_bias = load_tile(
            block + VALUE_OFFSET, meta + KEY_META * P, row, valid, value_table, VALUE, DTYPE, DV, DVP, P
        )
        if VALUE == "none":
            acc = tl.dot(weights.to(DTYPE), v, acc * alpha[:, None], input_precision="ieee")
        else:
            acc = weigh(weights, v_factor, v, acc, alpha, DTYPE)
        if VALUE_BIAS:
            shift = shift * alpha + tl.sum(weights * v_bias[None, :], 1)
        if VALUE == "qjl":
            signs, length = load_signs(
                block + VALUE_OFFSET, meta + KEY_META * P, row, valid, DTYPE, DV, DVP, P
            )
            acc2 = weigh(weights, length, signs, acc2, alpha, DTYPE)
    if VALUE_BIAS:
        acc += shift[:, None]
    return m, l, acc, acc2


@triton.jit
def attend_raw(
    q, m, l, acc, t, last_position,
    raw_keys, raw_values, ring, head, scale, softcap, window,
    HEADS: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    DTYPE: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """The raw window of a request whose latest position there is `last_position`, for queries at t [M]."""
    unit = exponent_unit(scale, CAP)
    for start in range(0, SINK + RECENT, N):
        slot = start + tl.arange(0, N)
        position = slot
        if RECENT > 0:
            back = (last_position - slot) % RECENT
            back = (back + RECENT) % RECENT  # whatever sign the remainder of a negative number has
            position = tl.where(slot < SINK, slot, last_position - back)
        valid = (slot < SINK + RECENT) & (position <= last_position) & (position >= 0)
        valid = valid & ((slot < SINK) | (position >= SINK))
        row = (ring * (SINK + RECENT) + slot) * HEADS + head
        d = tl.arange(0, DKP)
        mask = valid[:, None] & (d < DK)[None, :]
        k = tl.load(raw_keys + row[:, None] * DK + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = valid[None, :] & ((position[None, :] < SINK) | (position[None, :] > t[:, None] - RECENT))
        if WINDOW:
            seen = seen & (position[None, :] > t[:, None] - window)
        weights, alpha, m, l = softmax_step(cap(scores, scale, softcap, CAP), seen, m, l, unit)
        d = tl.arange(0, DVP)
        mask = valid[:, None] & (d < DV)[None, :]
        v = tl.load(raw_values + row[:, None] * DV + d[None, :], mask=mask, other=0.0)
        acc = tl.dot(weights.to(DTYPE), v, acc * alpha[:, None], input_precision="ieee")
    return m, l, acc


# --- kernels ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["table_stride", "window", "splits", "parts", "first_part", "G"])
def _decode_kernel(
    query, pages, tables, context_lens, matrix, matrix2, key_table, value_table, bias_query, bias_table,
    raw_keys, raw_values, rings, partial, partial2, stats,
    query_stride, query_head_stride, page_stride, table_stride, scale, softcap, window, splits, parts,
    first_part, G,
    BIAS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ROTATED: tl.constexpr, KEY_META: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, META_OFFSET: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, HAS_RAW: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr,
    HEADS: tl.constexpr, GP: tl.constexpr,
    DTYPE: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, MIN_TILES: tl.constexpr,
):  # fmt: skip
    """One part of one request's sequence and one kv head a program; part `splits` is the raw window."""
    part, head, request = first_part + tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g = tl.arange(0, GP)
    query_head = head * G + g
    rows = query + request * query_stride + query_head * query_head_stride
    context = tl.load(context_lens + request)
    t = tl.zeros((GP,), tl.int32) + context - 1
    m = tl.full((GP,), float("-inf"), tl.float32)
    l = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, DVP), tl.float32)
    acc2 = acc
    if part < splits:
        low = SINK
        if WINDOW:
            low = tl.maximum(context - window, SINK)
        high = context - RECENT
        first = low // N
        last = tl.maximum(tl.cdiv(high, N), first)
        share = tl.maximum(tl.cdiv(last - first, splits), MIN_TILES)
        first = first + part * share
        last = tl.minimum(first + share, last)
        if first < last:
            q = load_query(rows, g < G, matrix, ROTATED, DTYPE, DK, DKP, GP)
            q2 = q
            if KEY == "qjl":
                q2 = load_query(rows, g < G, matrix2, ROTATED, DTYPE, DK, DKP, GP)
            bias_q = q
            if BIAS:
                at = bias_query + (request * HEADS * G + query_head) * DK
                bias_q = load_query(at, g < G, matrix, False, DTYPE, DK, DKP, GP)
            m, l, acc, acc2 = attend_pages(
                q, q2, bias_q, m, l, acc, acc2, t,
                pages + head * BLOCK_BYTES, tables + request * table_stride, low, high, first, last,
                key_table, value_table, bias_table, scale, softcap, window,
                BIAS, KEY, VALUE, KEY_META, VALUE_OFFSET, META_OFFSET, page_stride,
                WINDOW, CAP, SINK, RECENT, DTYPE, DK, DKP, DV, DVP, P, N,
            )  # fmt: skip
    elif HAS_RAW:
        q = load_query(rows, g < G, matrix, False, DTYPE, DK, DKP, GP)
        ring = tl.load(rings + request).to(tl.int64)
        m, l, acc = attend_raw(
            q, m, l, acc, t, context - 1, raw_keys, raw_values, ring, head, scale, softcap, window,
            HEADS, WINDOW, CAP, SINK, RECENT, DTYPE, DK, DKP, DV, DVP, N,
        )  # fmt: skip
    out = (request * HEADS * G + query_head) * parts + part
    tl.store(stats + out * 2, m, mask=g < G)
    tl.store(stats + out * 2 + 1, l, mask=g < G)
    d = tl.arange(0, DVP)
    mask = (g < G)[:, None] & (d < DV)[None, :] & (m > float("-inf"))[:, None]
    tl.store(partial + out[:, None] * DV + d[None, :], acc, mask=mask)
    if VALUE == "qjl":
        tl.store(partial2 + out[:, None] * DV + d[None, :], acc2, mask=mask)


@triton.jit(do_not_specialize=["splits", "parts", "leave"])
def _merge_kernel(
    out, partial, partial2, stats, sinks, context_lens, projection, back, out_stride, qjl_factor, scale,
    splits, parts, leave,
    VALUE: tl.constexpr, ROTATED: tl.constexpr, CAP: tl.constexpr,
    HAS_RAW: tl.constexpr, HAS_SINKS: tl.constexpr, EARLY: tl.constexpr,
    QUERY_HEADS: tl.constexpr, PP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """One request and query head a program: weigh the parts, rotate back, divide.

    leave: rows of context 0 are somebody else's. EARLY: launched while the programs that make the parts run.
    All is asked for at once: what parts without tokens left, if anything, is thrown away once it is there.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PP)
    d = tl.arange(0, DVP)
    kept = (d < DV) & (tl.load(context_lens + row // QUERY_HEADS, mask=leave != 0, other=1) > 0)
    if EARLY:
        gdc_wait()
    m = tl.load(stats + (row * parts + part) * 2, mask=part < parts, other=float("-inf"))
    l = tl.load(stats + (row * parts + part) * 2 + 1, mask=part < parts, other=0.0)
    source = (row * parts + part)[:, None] * DV + d[None, :]
    mask = (part < splits)[:, None] & (d < DV)[None, :]
    x = tl.load(partial + source, mask=mask, other=0.0)
    top = tl.max(m, 0)
    unit = exponent_unit(scale, CAP)
    if HAS_SINKS:
        sink = tl.load(sinks + row % QUERY_HEADS).to(tl.float32) * (LOG2E / unit)
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2((m - top) * unit)
    total = tl.sum(weight * l, 0)
    if HAS_SINKS:
        total += tl.exp2((sink - top) * unit)
    weight = tl.where(part < splits, weight, 0.0)[:, None]
    x = tl.sum(tl.where(weight > 0, x * weight, 0.0), 0)
    if VALUE == "qjl":
        x2 = tl.load(partial2 + source, mask=mask, other=0.0)
        x2 = tl.sum(tl.where(weight > 0, x2 * weight, 0.0), 0)
        s = load_square(projection, DV, DVP)
        x += tl.sum(s * x2[:, None], 0) * qjl_factor
    if ROTATED and DV == DVP:
        x = tl.reshape(walsh(tl.reshape(x, (1, DV)), 1, DV), (DV,)) * (1.0 / DV**0.5)
    elif ROTATED:
        x = tl.sum(load_square(back, DV, DVP) * x[None, :], 1) * (1.0 / DV**0.5)
    if HAS_RAW:
        raw_m = tl.load(stats + (row * parts + splits) * 2)
        mask = d < tl.where(raw_m > float("-inf"), DV, 0)
        x += tl.load(partial + (row * parts + splits) * DV + d, mask=mask, other=0.0) * tl.exp2(
            (raw_m - top) * unit
        )
    x = x / tl.where(total == 0, 1.0, total)
    tl.store(out + row * out_stride + d, x.to(out.dtype.element_ty), mask=kept)


# --- launchers ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def padded_group(layout: PageLayout, query_heads: int) -> tuple[int, int]:
    """G, and G padded to what `tl.dot` takes."""
    group = query_heads // layout.num_kv_heads
    assert group * layout.num_kv_heads == query_heads, (query_heads, layout.num_kv_heads)
    return group, max(16, triton.next_power_of_2(group))


def tile_tokens(layout: PageLayout, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a tile: a power of two that divides the page, so that a tile has one page."""
    wide = triton.next_power_of_2(max(layout.key_dim, layout.value_dim))
    tokens = layout.page_size & -layout.page_size
    budget = _TILE_BYTES if has_products(dtype, device) else _TILE_BYTES // 2
    return max(16, min(tokens, 64, budget // (wide * dtype.itemsize)))


def key_matrices(
    codec: Codec, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What queries are multiplied by for a codec's keys, and (qjl) for its residual's signs."""
    if not codec.rotated:
        unused = decode_table("none", dtype, device)
        return unused, unused
    signs = signs_of_hadamard(head_dim, dtype, device)
    return signs, qjl_matrix(head_dim, dtype, device) if codec.scheme == "qjl" else signs


def value_projection(codec: Codec, head_dim: int, device: torch.device) -> Tensor:
    """S of `qjl` values; else something unused."""
    if codec.scheme == "qjl":
        return qjl_projection(head_dim, torch.float32, device)
    return decode_table("none", torch.float32, device)


def rotation(codec: Codec, head_dim: int, device: torch.device) -> Tensor:
    """√D · H of rotated values whose head dim is no power of two (float32); else something unused."""
    if codec.rotated and head_dim & (head_dim - 1):
        return signs_of_hadamard(head_dim, torch.float32, device)
    return decode_table("none", torch.float32, device)


def _merge_warps(codec: Codec, head_dim: int, parts: int) -> int:
    """Of 16 parts each: what a warp holds needs no exchange. More where a [D, D] matrix is to be held."""
    if codec.rotated and head_dim & (head_dim - 1):
        return 8 if head_dim < 128 else 16
    if codec.scheme == "qjl":
        return 8
    held = triton.next_power_of_2(parts) * triton.next_power_of_2(head_dim)
    return max(1, min(8, held // (16 * 128)))


def num_splits(requests: int, layout: PageLayout, tiles: int, multiprocessors: int) -> int:
    """Programs along the sequence: enough to fill the GPU four times, no more than there is work for.

    Depends on host numbers alone; each program finds its share on the device, from the context's length.
    """
    wanted = -(-4 * multiprocessors // (requests * layout.num_kv_heads))
    return max(1, min(wanted, tiles // _MIN_TILES, 128))


def paged_decode(
    query: Tensor,
    pages: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    layout: PageLayout,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    raw: RawWindow | None = None,
    rings: Tensor | None = None,
    max_context: int | None = None,
    bias: KeyBias | None = None,
    out: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """See `reference.paged_decode`; no look at device memory. `splits` overrides the choice."""
    requests, query_heads, key_dim = query.shape
    assert key_dim == layout.key_dim and query.dtype == layout.dtype, (query.shape, query.dtype)
    assert context_lens.shape == (requests,) and block_tables.shape[0] == requests
    check_pages(pages, layout)
    query = unit_stride(query)
    group, padded = padded_group(layout, query_heads)
    tokens = tile_tokens(layout, query.dtype, query.device)
    longest = block_tables.shape[1] * layout.page_size if max_context is None else max_context
    reach = min(longest, window) if window else longest
    by_warps = bias is None and warp_decode.fits(query, layout)
    device, value_dim = query.device, layout.value_dim
    leave = out is not None
    if out is None:
        out = torch.empty(requests, query_heads, value_dim, dtype=query.dtype, device=device)
    if not requests:
        return out
    plan = None
    if by_warps:
        memory = warp_decode.shared_memory(device)
        plan = warp_decode.plan(requests, layout, reach, _multiprocessors(device), memory, splits)
        splits = plan.parts
    elif splits is None:
        splits = num_splits(requests, layout, triton.cdiv(reach, tokens), _multiprocessors(device))
    parts = splits + (raw is not None)
    merge = by_warps and raw is None and warp_decode.merges(out, splits)
    partial = torch.empty(requests, query_heads, parts, value_dim, dtype=torch.float32, device=device)
    partial2 = torch.empty_like(partial) if layout.value.scheme == "qjl" else partial
    stats = torch.empty(requests, query_heads, parts, 2, dtype=torch.float32, device=device)
    matrix, matrix2 = key_matrices(layout.key, key_dim, query.dtype, device)
    sink, recent = (0, 0) if raw is None else (raw.sink, raw.recent)
    first_part = 0
    early = by_warps and raw is None and warp_decode.has_dependent_launches(device)
    if plan:
        warp_decode.launch(
            query, pages, block_tables, context_lens, layout, partial, stats, out, plan,
            scale=scale, softcap=softcap, window=window, sinks=sinks, sink=sink, recent=recent,
            merge=merge, leave=leave, early=early,
        )  # fmt: skip
        if merge:
            return out
        first_part = splits
    if first_part < parts:
        _decode_kernel[(parts - first_part, layout.num_kv_heads, requests)](
            query, pages, block_tables, context_lens, matrix, matrix2,
            decode_table(layout.key.scheme, query.dtype, device),
            decode_table(layout.value.scheme, query.dtype, device),
            query if bias is None else bias.weights(query), query if bias is None else bias.table,
            query if raw is None else raw.keys, query if raw is None else raw.values,
            context_lens if rings is None else rings, partial, partial2, stats,
            query.stride(0), query.stride(1), pages.stride(0), block_tables.stride(0),
            scale, softcap, window, splits, parts, first_part, group,
            BIAS=bias is not None,
            KEY=layout.key.scheme, VALUE=layout.value.scheme, ROTATED=layout.key.rotated,
            KEY_META=layout.key.num_meta, VALUE_OFFSET=layout.value_offset, META_OFFSET=layout.meta_offset,
            BLOCK_BYTES=layout.block_bytes, WINDOW=window > 0, CAP=softcap > 0, HAS_RAW=raw is not None,
            SINK=sink, RECENT=recent, HEADS=layout.num_kv_heads, GP=padded, DTYPE=DTYPES[query.dtype],
            DK=key_dim, DKP=triton.next_power_of_2(key_dim),
            DV=value_dim, DVP=triton.next_power_of_2(value_dim),
            P=layout.page_size, N=tokens, MIN_TILES=_MIN_TILES,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    _merge_kernel[(requests * query_heads,)](
        out, partial, partial2, stats, stats if sinks is None else sinks, context_lens,
        value_projection(layout.value, value_dim, device), rotation(layout.value, value_dim, device),
        out.stride(1), qjl_scale(value_dim),
        scale, splits, parts, int(leave),
        VALUE=layout.value.scheme, ROTATED=layout.value.rotated, CAP=softcap > 0,
        HAS_RAW=raw is not None, HAS_SINKS=sinks is not None, EARLY=early, QUERY_HEADS=query_heads,
        PP=triton.next_power_of_2(parts),
        DV=value_dim, DVP=triton.next_power_of_2(value_dim),
        num_warps=_merge_warps(layout.value, value_dim, parts), launch_pdl=early,
    )  # fmt: skip
    return out
