"""Decode on sm_80 and newer, bound by memory: one warp a program, from the page's bytes to the matrix units.

Nothing passes through shared memory and no two lanes exchange unpacked numbers: see `warp_ptx.py` for which
lane holds what. Parts of a sequence are merged by `paged_decode`'s second launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_kernels import warp_ptx as ptx
from kvq_kernels.exponent import LOG2E, cap, exponent_unit
from kvq_kernels.layout import PageLayout

_GROUP = 8
"""Query heads of a kv head that the matrix units take at once."""
_REGISTERS = 168
"""Of a lane: 12 warps a multiprocessor."""
_WARPS = 12
_MIN_TOKENS = 128
"""Tokens of a part at least: below that, preparing the query and merging cost more than the tokens."""


@triton.constexpr_function
def _tile(key: str, value: str) -> int:
    """Tokens whose codes a warp holds at a time: 64 of at most 4 bits, 32 of bytes, 16 unquantized."""
    if key in ptx.PLAIN or value in ptx.PLAIN:
        return 16
    return 64 if key in ptx.NIBBLE_KEYS and value in ("lm2", "lm4", "int4") else 32


@triton.jit
def _half(pairs, i: tl.constexpr):
    """Number i of fp16 pairs in a tuple of registers, as float32."""
    return tl.inline_asm_elementwise(
        ptx.half_to_float(i % 2 == 1), "=&f,r", [pairs[i // 2]], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _load_metadata(address, wanted, T: tl.constexpr):
    return tl.inline_asm_elementwise(
        ptx.load_metadata(T), ptx.constraints("r" * (T // 16), "lr"), [address, wanted],
        dtype=ptx.types(T // 16, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _load_keys(
    block, row, wanted, SCHEME: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    META: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Tokens `row` … of a block: their words, first and second metadata."""
    lane = tl.arange(0, 32)
    g, t = lane // 4, lane % 4
    WORDS: tl.constexpr = ptx.key_words(SCHEME, D)
    COUNT: tl.constexpr = T // 8 * WORDS
    PART: tl.constexpr = 16 if WORDS > 4 else WORDS * 4
    token = row + g * (T // 8)
    words = tl.inline_asm_elementwise(
        ptx.load_keys(SCHEME, D, T), ptx.constraints("r" * COUNT, "lr"),
        [(block + token * (WORDS * 16) + t * PART).to(tl.int64), wanted],
        dtype=ptx.types(COUNT, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    first = (wanted,)
    if SCHEME != "bf16" and SCHEME != "fp16":
        first = _load_metadata((block + META + token * 2).to(tl.int64), wanted, T)
    second = first
    if SCHEME == "turbo" or SCHEME == "int4" or SCHEME == "int8":
        second = _load_metadata((block + META + P * 2 + token * 2).to(tl.int64), wanted, T)
    return words, first, second


@triton.jit
def _load_values(
    block, row, wanted, SCHEME: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    OFFSET: tl.constexpr, META: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The same for values; words are of the tokens that the lane weighs, metadata of those it scores."""
    lane = tl.arange(0, 32)
    g, t = lane // 4, lane % 4
    WORDS: tl.constexpr = ptx.value_words(SCHEME, D)
    BYTES: tl.constexpr = 2 if SCHEME == "lm2" and D == 64 else WORDS * 4  # of a lane and token
    PART: tl.constexpr = 16 if WORDS == 8 else BYTES
    COUNT: tl.constexpr = T // 4 * WORDS
    weighed = row + t * (T // 4)
    words = tl.inline_asm_elementwise(
        ptx.load_values(SCHEME, D, T), ptx.constraints("r" * COUNT, "lr"),
        [(block + OFFSET + weighed * (BYTES * 8) + g * PART).to(tl.int64), wanted],
        dtype=ptx.types(COUNT, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    token = row + g * (T // 8)
    first = (wanted,)
    if SCHEME != "bf16" and SCHEME != "fp16":
        first = _load_metadata((block + META + token * 2).to(tl.int64), wanted, T)
    second = first
    if SCHEME == "int4" or SCHEME == "int8":
        second = _load_metadata((block + META + P * 2 + token * 2).to(tl.int64), wanted, T)
    return words, first, second


@triton.jit
def _scores(
    words, first, second, query, high0, high1, all0, all1, i: tl.constexpr,
    SCHEME: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Step i of a tile: q·k of tokens a, b and heads 2t, 2t + 1, in the query's unit and the codes'."""
    WORDS: tl.constexpr = ptx.key_words(SCHEME, D)
    QUERY: tl.constexpr = ptx.query_registers(SCHEME, D)[0]
    pair = words[2 * i * WORDS : 2 * (i + 1) * WORDS]
    if SCHEME == "bf16" or SCHEME == "fp16" or SCHEME == "fp8":
        r = tl.inline_asm_elementwise(
            ptx.scores(SCHEME, D), ptx.constraints("f" * 4, "r" * (2 * WORDS + QUERY)),
            pair + query, dtype=ptx.types(4, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        a0, a1, b0, b1 = r[0], r[1], r[2], r[3]
        if SCHEME == "fp8":
            factor_a, factor_b = _half(first, 2 * i), _half(first, 2 * i + 1)
            a0, a1, b0, b1 = a0 * factor_a, a1 * factor_a, b0 * factor_b, b1 * factor_b
    else:
        COUNT: tl.constexpr = 8 if SCHEME == "turbo" else 4
        r = tl.inline_asm_elementwise(
            ptx.scores(SCHEME, D), ptx.constraints("r" * COUNT, "r" * (2 * WORDS + QUERY + COUNT // 4 * 2 - 2)),
            pair + query + (high0, high1)[0 : COUNT // 4 * 2 - 2],
            dtype=ptx.types(COUNT, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        a0, a1 = r[0].to(tl.float32), r[1].to(tl.float32)
        b0, b1 = r[2].to(tl.float32), r[3].to(tl.float32)
        factor_a, factor_b = _half(first, 2 * i), _half(first, 2 * i + 1)
        if SCHEME == "turbo":
            residual_a = _half(second, 2 * i) * (2.0 / ptx.TURBO_UNIT)
            residual_b = _half(second, 2 * i + 1) * (2.0 / ptx.TURBO_UNIT)
            a0, a1 = a0 + r[4].to(tl.float32) * residual_a, a1 + r[5].to(tl.float32) * residual_a
            b0, b1 = b0 + r[6].to(tl.float32) * residual_b, b1 + r[7].to(tl.float32) * residual_b
            a0, a1, b0, b1 = a0 * factor_a, a1 * factor_a, b0 * factor_b, b1 * factor_b
        elif SCHEME == "lm4":
            a0, a1 = (a0 - all0 * ptx.LM4_MIDDLE) * factor_a, (a1 - all1 * ptx.LM4_MIDDLE) * factor_a
            b0, b1 = (b0 - all0 * ptx.LM4_MIDDLE) * factor_b, (b1 - all1 * ptx.LM4_MIDDLE) * factor_b
        else:
            bias_a, bias_b = _half(second, 2 * i), _half(second, 2 * i + 1)
            a0, a1 = a0 * factor_a + all0 * bias_a, a1 * factor_a + all1 * bias_a
            b0, b1 = b0 * factor_b + all0 * bias_b, b1 * factor_b + all1 * bias_b
    return a0, a1, b0, b1


@triton.constexpr_function
def _key_unit(scheme: str) -> float:
    return {"turbo": ptx.TURBO_UNIT, "lm4": ptx.LM4_UNIT, "fp8": 256.0}.get(scheme, 1.0)


@triton.constexpr_function
def _value_unit(scheme: str) -> float:
    """What the sums' operands are counted in, value scales apart."""
    if scheme in ptx.PLAIN:
        return 1.0
    return {"fp8": 256.0, "lm2": ptx.LM2_UNIT / ptx.HALF_UNIT, "lm4": ptx.LM4_UNIT / ptx.HALF_UNIT}.get(
        scheme, 1.0 / ptx.HALF_UNIT
    )


@triton.constexpr_function
def _first_scale(scheme: str) -> float:
    return 1.0 if scheme in ptx.PLAIN else ptx.FIRST_SCALE


@triton.jit
def _value_scale(first, second, i: tl.constexpr, SCHEME: tl.constexpr):
    """Scale and bias of token i."""
    if SCHEME == "bf16" or SCHEME == "fp16":
        scale = tl.full((32,), 1.0, tl.float32)
        bias = scale
    else:
        scale = _half(first, i)
        bias = scale
        if SCHEME == "lm4":
            bias = scale * (-ptx.LM4_MIDDLE * ptx.LM4_UNIT)
        elif SCHEME == "int4" or SCHEME == "int8":
            bias = _half(second, i)
    return scale, bias


@triton.jit
def _keep(pairs, seen, U: tl.constexpr):
    """fp16 pairs, zero where a token is not seen: such rows may hold anything, and 0 · NaN is NaN."""
    kept = ()
    for j in tl.static_range(U // 2):
        lower, upper = tl.where(seen[2 * j], 0xFFFF, 0), tl.where(seen[2 * j + 1], -65536, 0)
        kept = kept + (pairs[j] & (lower | upper),)
    return kept


@triton.jit
def _sum_over_groups(x):
    return tl.inline_asm_elementwise(
        ptx.sum_over_groups(), "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit(do_not_specialize=["table_stride", "window", "splits", "parts", "group", "min_tiles"])
def _warp_decode_kernel(
    query, pages, tables, context_lens, partial, stats,
    query_stride, query_head_stride, page_stride, table_stride, scale, softcap, window,
    splits, parts, group, min_tiles,
    KEY: tl.constexpr, VALUE: tl.constexpr, ROTATED: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, KEY_META: tl.constexpr, VALUE_META: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    HEADS: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, P: tl.constexpr, FINGERPRINT: tl.constexpr,
):  # fmt: skip
    """One part of one request's sequence and one kv head."""
    T: tl.constexpr = _tile(KEY, VALUE)
    U: tl.constexpr = T // 8
    part, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, 32)
    g, t = lane // 4, lane % 4
    context = tl.load(context_lens + request)
    low = SINK
    if WINDOW:
        low = tl.maximum(context - window, SINK)
    high = context - RECENT
    first = low // T
    last = tl.maximum(tl.cdiv(high, T), first)
    share = tl.maximum(tl.cdiv(last - first, splits), min_tiles)
    first = first + part * share
    last = tl.minimum(first + share, last)
    two = tl.arange(0, 8)
    stats_at = stats + (((request * HEADS + head) * group + two) * parts + part) * 2
    if first >= last:
        tl.store(stats_at, tl.full((8,), float("-inf"), tl.float32), mask=two < group)
        tl.store(stats_at + 1, tl.zeros((8,), tl.float32), mask=two < group)
        return

    # loads of the first tile, before the query is prepared
    table = tables + request * table_stride
    block = pages + head.to(tl.int64) * BLOCK_BYTES
    row = first * T % P
    here = block + tl.load(table + first * T // P).to(tl.int64) * page_stride
    following = tl.load(table + tl.minimum(first + 1, last - 1) * T // P)
    yes = tl.full((32,), 1, tl.int32)
    words, key_first, key_second = _load_keys(here, row, yes, KEY, D, T, KEY_META, P)
    codes, value_first, value_second = _load_values(here, row, yes, VALUE, D, T, VALUE_OFFSET, VALUE_META, P)

    PART: tl.constexpr = D // 4 if KEY == "turbo" or KEY == "lm4" or KEY == "int4" else 16
    QUERY: tl.constexpr = ptx.query_registers(KEY, D)[0]
    source = query + request * query_stride + (head * group + g) * query_head_stride + t * PART
    prepared = tl.inline_asm_elementwise(
        ptx.load_query(KEY, D, ROTATED, DTYPE), ptx.constraints("r" * (QUERY + 6), "lrrr"),
        [source.to(tl.int64), t, t * 8, (g < group).to(tl.int32)],
        dtype=ptx.types(QUERY + 6, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    q = prepared[0:QUERY]
    unit0 = prepared[QUERY].to(tl.float32, bitcast=True) * _key_unit(KEY)
    unit1 = prepared[QUERY + 1].to(tl.float32, bitcast=True) * _key_unit(KEY)
    high0, high1 = prepared[QUERY + 2], prepared[QUERY + 3]
    all0, all1 = prepared[QUERY + 4].to(tl.float32), prepared[QUERY + 5].to(tl.float32)
    power0, power1 = unit0 * (scale * LOG2E), unit1 * (scale * LOG2E)
    if CAP:
        power0, power1 = unit0 * 0.0 + LOG2E, unit1 * 0.0 + LOG2E

    STATE: tl.constexpr = ptx.step_state(D)
    W: tl.constexpr = ptx.value_words(VALUE, D)
    zero = tl.zeros((32,), tl.float32)
    lowest = zero + ptx.NO_MAXIMUM
    state = (lowest, lowest, zero, zero, zero, zero, zero + _first_scale(VALUE)) + (zero,) * (STATE - 7)
    for tile in range(first, last):
        more = ((tile + 1 < last) & (lane >= 0)).to(tl.int32)
        row = (tile + 1) * T % P
        here = block + following.to(tl.int64) * page_stride
        following = tl.load(table + tl.minimum(tile + 2, last - 1) * T // P)
        position = tile * T + g * U
        scored = ()
        for i in tl.static_range(U // 2):
            scored = scored + _scores(words, key_first, key_second, q, high0, high1, all0, all1, i, KEY, D)
        words, key_first, key_second = _load_keys(here, row, more, KEY, D, T, KEY_META, P)
        if CAP:
            capped = ()
            for i in tl.static_range(U * 2):
                capped = capped + (cap(scored[i] * (unit0 if i % 2 == 0 else unit1), scale, softcap, CAP),)
            scored = capped
        if (tile * T < low) | (tile * T + T > high):
            masked, seen = (), ()
            for i in tl.static_range(U):
                seen = seen + ((position + i >= low) & (position + i < high),)
            for i in tl.static_range(U * 2):
                masked = masked + (tl.where(seen[i // 2], scored[i], float("-inf")),)
            scored = masked
            if VALUE != "bf16" and VALUE != "fp16":
                value_first = _keep(value_first, seen, U)
                value_second = _keep(value_second, seen, U)
        for i in tl.static_range(U // 2):
            scale_a, bias_a = _value_scale(value_first, value_second, 2 * i, VALUE)
            scale_b, bias_b = _value_scale(value_first, value_second, 2 * i + 1, VALUE)
            four = (
                codes[2 * i * W : (2 * i + 1) * W]
                + codes[(2 * i + U) * W : (2 * i + U + 1) * W]
                + codes[(2 * i + 1) * W : (2 * i + 2) * W]
                + codes[(2 * i + 1 + U) * W : (2 * i + 2 + U) * W]
            )
            state = tl.inline_asm_elementwise(
                ptx.weigh(VALUE, D), ptx.constraints("f" * STATE, "f" * 10 + "r" * (4 * W) + "f" * STATE),
                scored[4 * i : 4 * i + 4]
                + (power0, power1, scale_a, scale_b, bias_a, bias_b)
                + four
                + state,
                dtype=ptx.types(STATE, tl.float32), is_pure=True, pack=1,
            )  # fmt: skip
        codes, value_first, value_second = _load_values(
            here, row, more, VALUE, D, T, VALUE_OFFSET, VALUE_META, P
        )

    # m, l and the sums of heads 2t and 2t + 1
    out = (request * HEADS + head) * group
    bias0, bias1 = _sum_over_groups(state[4]), _sum_over_groups(state[5])
    l0, l1 = _sum_over_groups(state[2]), _sum_over_groups(state[3])
    into_m = 1.0 / exponent_unit(scale, CAP)
    head0, head1 = 2 * t, 2 * t + 1
    exists0, exists1 = head0 < group, head1 < group
    at0, at1 = (out + head0) * parts + part, (out + head1) * parts + part
    m0 = tl.where(l0 > 0, state[0] * into_m, tl.where(l0 == 0, float("-inf"), l0))
    m1 = tl.where(l1 > 0, state[1] * into_m, tl.where(l1 == 0, float("-inf"), l1))
    tl.store(stats + at0 * 2, m0, mask=exists0 & (g == 0))
    tl.store(stats + at0 * 2 + 1, l0, mask=exists0 & (g == 0))
    tl.store(stats + at1 * 2, m1, mask=exists1 & (g == 0))
    tl.store(stats + at1 * 2 + 1, l1, mask=exists1 & (g == 0))
    factor = _value_unit(VALUE) / state[6]
    final = ()
    for i in tl.static_range(STATE - 7):
        total = state[7 + i] * factor
        if VALUE == "int4" and i // 4 % 2 == 1:  # the upper nibble of a byte counts 16 times
            total = total * 0.0625
        final = final + (total + (bias0 if i % 2 == 0 else bias1),)
    PART_V: tl.constexpr = 8 if W == 8 else D // 8
    tl.inline_asm_elementwise(
        ptx.store_sums(D, W == 8), ptx.constraints("r", "llrr" + "f" * (STATE - 7)),
        (
            (partial + at0 * D + g * PART_V).to(tl.int64),
            (partial + at1 * D + g * PART_V).to(tl.int64),
            exists0.to(tl.int32),
            exists1.to(tl.int32),
        )
        + final,
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def fits(query: Tensor, layout: PageLayout) -> bool:
    """Whether this kernel takes the case; all others go to the portable one."""
    key, value = layout.key.scheme, layout.value.scheme
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and key in (*ptx.KEYS, "none")
        and value in (*ptx.VALUES, "none")
        and layout.key_dim == layout.value_dim
        and layout.key_dim in (64, 128)
        and query.shape[1] <= _GROUP * layout.num_kv_heads
        and layout.page_size % 64 == 0
        and query.stride(0) % 8 == 0
        and query.stride(1) % 8 == 0
        and query.data_ptr() % 16 == 0
    )


def num_splits(requests: int, layout: PageLayout, longest: int, multiprocessors: int) -> int:
    """Programs along the sequence: one wave of warps, no more than there is work for."""
    wanted = _WARPS * multiprocessors // (requests * layout.num_kv_heads)
    return max(1, min(wanted, longest // _MIN_TOKENS, 128))


def launch(
    query: Tensor,
    pages: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    layout: PageLayout,
    partial: Tensor,
    stats: Tensor,
    *,
    scale: float,
    softcap: float,
    window: int,
    sink: int,
    recent: int,
    splits: int,
) -> None:
    """Parts 0 … splits - 1 of all requests, as `paged_decode` describes partial and stats."""
    requests, query_heads, head_dim = query.shape
    heads, dtype = layout.num_kv_heads, "bf16" if query.dtype == torch.bfloat16 else "fp16"
    key, value = (dtype if codec.scheme == "none" else codec.scheme for codec in (layout.key, layout.value))
    _warp_decode_kernel[(splits, heads, requests)](
        query, pages, block_tables, context_lens, partial, stats,
        query.stride(0), query.stride(1), pages.stride(0), block_tables.stride(0), scale, softcap, window,
        splits, partial.shape[2], query_heads // heads, _MIN_TOKENS // _tile(key, value),
        KEY=key, VALUE=value, ROTATED=layout.key.rotated, VALUE_OFFSET=layout.value_offset,
        KEY_META=layout.meta_offset, VALUE_META=layout.meta_offset + 2 * layout.key.num_meta * layout.page_size,
        BLOCK_BYTES=layout.block_bytes, WINDOW=window > 0, CAP=softcap > 0, SINK=sink, RECENT=recent,
        HEADS=heads, DTYPE=dtype, D=head_dim,
        P=layout.page_size, FINGERPRINT=ptx.FINGERPRINT, num_warps=1, maxnreg=_REGISTERS,
    )  # fmt: skip
