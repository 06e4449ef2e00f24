"""Decode on sm_80 and newer, bound by memory: one warp a program, from the page's bytes to the matrix units.

Tokens stream through a ring in shared memory, as they are, by asynchronous copies; no two lanes exchange
unpacked numbers: see `warp_ptx.py` for which lane holds what. Of the programs that have a part of the same
sequence, the last to finish merges, where there are few; else `paged_decode` does in a second launch.
"""

from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from kvq_kernels import warp_ptx as ptx
from kvq_kernels.exponent import LOG2E, cap, exponent_unit
from kvq_kernels.layout import PageLayout
from kvq_kernels.quantize_store import has_e4m3

_GROUP = 8
"""Query heads of a kv head that the matrix units take at once."""
_MIN_TOKENS = 128
"""Tokens of a part at least: below that, preparing the query and merging cost more than the tokens."""
_TILE_BYTES = 8192
"""Of a tile of 64 tokens at most; where they take more, it has 32. A longer ring takes longer to fill."""
_MOST_MERGED, _MOST_MERGED_SHORT = 2, 4
"""Parts that one warp merges, in general and where they are short: with more, its loads and fences take
longer than a second launch."""
_COUNTERS = 1 << 14
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def _schemes(layout: PageLayout) -> tuple[str, str]:
    key, value = (
        _SHORT[layout.dtype] if codec.scheme == "none" else codec.scheme
        for codec in (layout.key, layout.value)
    )
    return key, value


def _shape(key: str, value: str, head_dim: int) -> tuple[int, int]:
    """Tokens that a warp has on their way, and registers of a lane, so that nothing is spilled."""
    tile = 64 if ptx.tile_bytes(key, value, head_dim, 64) <= _TILE_BYTES else 32
    small = head_dim == 64 or (key in ptx.NIBBLE_KEYS and value in ("lm2", "int4"))
    return tile, 128 if small else 168


def _warps(registers: int) -> int:
    """Of a multiprocessor with 65,536 registers: they come by fours, one for each of its schedulers."""
    return 65_536 // 32 // registers // 4 * 4


@triton.jit
def _half(pair, i: tl.constexpr):
    """Number i, 0 or 1, of a register of two fp16 numbers, as float32."""
    return tl.inline_asm_elementwise(
        ptx.half_to_float(i == 1), "=&f,r", [pair], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _load_keys(address, metadata, i: tl.constexpr, SCHEME: tl.constexpr, D: tl.constexpr, T: tl.constexpr):
    """Step i of a tile, see `ptx.load_keys`."""
    COUNT: tl.constexpr = 2 * ptx.key_words(SCHEME, D) + ptx.key_numbers(SCHEME)
    return tl.inline_asm_elementwise(
        ptx.load_keys(SCHEME, D, i, T), ptx.constraints("r" * COUNT, "rr"), [address, metadata],
        dtype=ptx.types(COUNT, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _load_values(address, metadata, i: tl.constexpr, SCHEME: tl.constexpr, D: tl.constexpr, T: tl.constexpr):
    """Step i of a tile, see `ptx.load_values`."""
    COUNT: tl.constexpr = 4 * ptx.value_words(SCHEME, D) + ptx.value_numbers(SCHEME)
    return tl.inline_asm_elementwise(
        ptx.load_values(SCHEME, D, i, T), ptx.constraints("r" * COUNT, "rr"), [address, metadata],
        dtype=ptx.types(COUNT, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _swizzled(offset, SWIZZLE: tl.constexpr):
    return offset ^ ((offset >> SWIZZLE[0] & SWIZZLE[1]) << SWIZZLE[2])


@triton.jit
def _sources(
    block, row, KEY: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, META_OFFSET: tl.constexpr,
):  # fmt: skip
    """Where the lane begins to copy a tile from `row` of a block on: keys, values, numbers."""
    lane = tl.arange(0, 32)
    return (
        (block + row * ptx.key_bytes(KEY, D) + lane * 16).to(tl.int64),
        (block + row * ptx.value_bytes(VALUE, D) + (VALUE_OFFSET + lane * 16)).to(tl.int64),
        (block + row * 2 + (META_OFFSET + lane // 2 * (2 * P) + lane % 2 * 16)).to(tl.int64),
    )


@triton.jit
def _targets(ring, KEY: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, T: tl.constexpr):
    """Where to."""
    lane = tl.arange(0, 32)
    K: tl.constexpr = ptx.key_bytes(KEY, D)
    V: tl.constexpr = ptx.value_bytes(VALUE, D)
    return (
        ring + _swizzled(lane * 16, ptx.key_swizzle(KEY, D)),
        ring + T * K + _swizzled(lane * 16, ptx.value_swizzle(VALUE, D)),
        ring + T * (K + V) + lane // 2 * (2 * T) + lane % 2 * 16,
    )


@triton.jit
def _copy(
    sources, targets, wanted, i: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Start copying step i of a tile, where `wanted`."""
    lane = tl.arange(0, 32)
    tl.inline_asm_elementwise(
        ptx.copy(KEY, VALUE, D, i), ptx.constraints("r", "lllrrrrr"),
        sources + targets + (lane, wanted.to(tl.int32)), dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _parts(ring, KEY: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, T: tl.constexpr):
    """Where in the ring the lane finds its parts of a tile: of keys, values, keys' numbers and values'."""
    lane = tl.arange(0, 32)
    g, t = lane // 4, lane % 4
    K: tl.constexpr = ptx.key_bytes(KEY, D)
    V: tl.constexpr = ptx.value_bytes(VALUE, D)
    PART: tl.constexpr = 8 if K == 32 else 16
    VALUE_PART: tl.constexpr = 16 if V == 256 else V // 8
    return (
        ring + _swizzled(g * (2 * K) + t * PART, ptx.key_swizzle(KEY, D)),
        ring + T * K + _swizzled(t * (4 * V) + g * VALUE_PART, ptx.value_swizzle(VALUE, D)),
        ring + T * (K + V) + g * 4,
        ring + T * (K + V + 2 * ptx.key_numbers(KEY)) + g * 4,
    )


@triton.jit
def _scores(loaded, query, tables, start0, start1, all0, all1, SCHEME: tl.constexpr, D: tl.constexpr):
    """One step: q·k of tokens a, b and heads 2t, 2t + 1, in the query's unit and the codes'."""
    WORDS: tl.constexpr = ptx.key_words(SCHEME, D)
    QUERY: tl.constexpr = ptx.query_registers(SCHEME, D)[0]
    pair = loaded[0 : 2 * WORDS]
    FP8: tl.constexpr = SCHEME == "fp8" or SCHEME == "e4m3"
    if SCHEME == "bf16" or SCHEME == "fp16" or FP8:
        r = tl.inline_asm_elementwise(
            ptx.scores(SCHEME, D), ptx.constraints("f" * 4, "r" * (2 * WORDS + QUERY)),
            pair + query, dtype=ptx.types(4, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        a0, a1, b0, b1 = r[0], r[1], r[2], r[3]
        if FP8:
            factor_a, factor_b = _half(loaded[2 * WORDS], 0), _half(loaded[2 * WORDS], 1)
            a0, a1, b0, b1 = a0 * factor_a, a1 * factor_a, b0 * factor_b, b1 * factor_b
    else:
        COUNT: tl.constexpr = 8 if SCHEME == "turbo" else 4
        TABLES: tl.constexpr = ptx.tables_held(SCHEME)
        EXTRA: tl.constexpr = 3 if SCHEME == "turbo" else TABLES
        r = tl.inline_asm_elementwise(
            ptx.scores(SCHEME, D),
            ptx.constraints("r" * COUNT, "r" * (2 * WORDS + QUERY + EXTRA)),
            pair + query + (tables + (start0, start1))[0:EXTRA],
            dtype=ptx.types(COUNT, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        a0, a1 = r[0].to(tl.float32), r[1].to(tl.float32)
        b0, b1 = r[2].to(tl.float32), r[3].to(tl.float32)
        factor_a, factor_b = _half(loaded[2 * WORDS], 0), _half(loaded[2 * WORDS], 1)
        if SCHEME == "turbo":
            residual_a = _half(loaded[2 * WORDS + 1], 0) * (2.0 / ptx.TURBO_UNIT)
            residual_b = _half(loaded[2 * WORDS + 1], 1) * (2.0 / ptx.TURBO_UNIT)
            for i in tl.static_range(4, 8):
                r = r[0:i] + (r[i].to(tl.float32, bitcast=True) - ptx.AS_BITS,) + r[i + 1 :]
            a0, a1 = a0 + r[4] * residual_a, a1 + r[5] * residual_a
            b0, b1 = b0 + r[6] * residual_b, b1 + r[7] * residual_b
            a0, a1, b0, b1 = a0 * factor_a, a1 * factor_a, b0 * factor_b, b1 * factor_b
        elif SCHEME == "lm4":
            half0, half1 = all0 * 0.5, all1 * 0.5
            a0, a1 = (a0 + half0) * factor_a, (a1 + half1) * factor_a
            b0, b1 = (b0 + half0) * factor_b, (b1 + half1) * factor_b
        else:
            bias_a, bias_b = _half(loaded[2 * WORDS + 1], 0), _half(loaded[2 * WORDS + 1], 1)
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
    units = {"fp8": 256.0, "e4m3": 1.0, "lm2": ptx.LM2_UNIT / ptx.HALF_UNIT}
    return units.get(scheme, 1.0 / ptx.HALF_UNIT)


@triton.constexpr_function
def _first_scale(scheme: str) -> float:
    return 1.0 if scheme in ptx.PLAIN else ptx.FIRST_SCALE


@triton.jit
def _value_scale(loaded, i: tl.constexpr, SCHEME: tl.constexpr, D: tl.constexpr):
    """Scale and bias of token a (0) or b (1)."""
    WORDS: tl.constexpr = 4 * ptx.value_words(SCHEME, D)
    if SCHEME == "bf16" or SCHEME == "fp16":
        scale = tl.full((32,), 1.0, tl.float32)
        bias = scale
    else:
        scale = _half(loaded[WORDS], i)
        bias = scale
        if SCHEME == "int4" or SCHEME == "int8":
            bias = _half(loaded[WORDS + 1], i)
    return scale, bias


@triton.jit
def _keep_seen(words, position, low, high, W: tl.constexpr):
    """Words of the four tokens that the lane weighs in a step, zero where a token is not seen."""
    kept = ()
    for i in tl.static_range(4):
        token = position + i // 2 + i % 2 * 2
        mask = tl.where((token >= low) & (token < high), -1, 0)
        for j in tl.static_range(W):
            kept = kept + (words[i * W + j] & mask,)  # type: ignore[assignment]
    return kept


@triton.jit
def _sum_over_groups(x):
    return tl.inline_asm_elementwise(
        ptx.sum_over_groups(), "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _join(m, l, sums, part, i: tl.constexpr, weighted, unit):
    """Head 2t + i of a part (see `ptx.load_part`) joins what is merged, weighted by 1, or 0: not at all."""
    top = tl.maximum(m, part[2 * i])
    old, new = tl.exp2((m - top) * unit), tl.exp2((part[2 * i] - top) * unit) * weighted
    joined = ()
    for j in tl.static_range(len(sums)):
        x = sums[j]
        if j % 2 == i:
            x = x * old + part[4 + j] * new
        joined = joined + (x,)  # type: ignore[assignment]
    return top, l * old + part[2 * i + 1] * new, joined


@triton.jit
def _store_part(at, m0, l0, m1, l1, sums, D: tl.constexpr):
    tl.inline_asm_elementwise(
        ptx.store_part(D), ptx.constraints("r", "l" + "f" * (4 + D // 4)),
        (at.to(tl.int64), m0, l0, m1, l1) + sums, dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _load_part(at, D: tl.constexpr):
    return tl.inline_asm_elementwise(
        ptx.load_part(D), ptx.constraints("f" * (4 + D // 4), "l"), [at.to(tl.int64)],
        dtype=ptx.types(4 + D // 4, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def merge_parts(scratch, used, unit, D: tl.constexpr):
    """`used` parts, as `_store_part` leaves them -> m and l of heads 2t and 2t + 1, and their undivided sums.

    Two are loaded at a time.
    """
    zero = unit * 0.0 + tl.zeros((32,), tl.float32)
    m0, m1, l0, l1, sums = zero + ptx.NO_MAXIMUM, zero + ptx.NO_MAXIMUM, zero, zero, (zero,) * (D // 4)
    at = scratch + tl.arange(0, 32) * 4
    for i in range(0, used, 2):
        j = tl.minimum(i + 1, used - 1)
        there = (j - i).to(tl.float32)
        part, next_ = _load_part(at + i * ptx.part_floats(D), D), _load_part(at + j * ptx.part_floats(D), D)
        m0, l0, sums = _join(m0, l0, sums, part, 0, 1.0, unit)
        m1, l1, sums = _join(m1, l1, sums, part, 1, 1.0, unit)
        m0, l0, sums = _join(m0, l0, sums, next_, 0, there, unit)
        m1, l1, sums = _join(m1, l1, sums, next_, 1, there, unit)
    return m0, m1, l0, l1, sums


@triton.jit
def _final_factor(m, l, sinks, head, exists, unit, HAS_SINKS: tl.constexpr):
    """What sums are multiplied by in the end."""
    factor = l * 0.0 + 1.0
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=exists, other=0.0).to(tl.float32) * (LOG2E / unit)
        top = tl.maximum(m, sink)
        factor = tl.exp2((m - top) * unit)
        l = l * factor + tl.exp2((sink - top) * unit)
    return factor / tl.where(l == 0, 1.0, l)


@triton.jit
def store_output(
    out0, out1, exists0, exists1, m0, m1, l0, l1, sums, sinks, head0, head1, unit,
    HAS_SINKS: tl.constexpr, ROTATED: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Divide, rotate back, and store at the lane's first dim of both heads."""
    NORM: tl.constexpr = D**-0.5 if ROTATED else 1.0
    factor0 = _final_factor(m0, l0, sinks, head0, exists0, unit, HAS_SINKS) * NORM
    factor1 = _final_factor(m1, l1, sinks, head1, exists1, unit, HAS_SINKS) * NORM
    final = ()
    for i in tl.static_range(D // 4):
        final = final + (sums[i] * (factor0 if i % 2 == 0 else factor1),)  # type: ignore[assignment]
    tl.inline_asm_elementwise(
        ptx.store_output(D, APART, ROTATED, DTYPE), ptx.constraints("r", "rllrr" + "f" * (D // 4)),
        (tl.arange(0, 32), out0.to(tl.int64), out1.to(tl.int64), exists0.to(tl.int32), exists1.to(tl.int32))
        + final,
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride", "window", "splits", "parts", "group", "min_tiles"])
def _warp_decode_kernel(
    query, pages, tables, context_lens, partial, stats, out, sinks, counters,
    query_stride, query_head_stride, out_stride, out_head_stride, page_stride, table_stride,
    scale, softcap, window, splits, parts, group, min_tiles,
    MERGE: tl.constexpr, LEAVE: tl.constexpr, EARLY: tl.constexpr, HAS_SINKS: tl.constexpr,
    VALUE_ROTATED: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ROTATED: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, META_OFFSET: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    HEADS: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
    FINGERPRINT: tl.constexpr,
):  # fmt: skip
    """One part of one request's sequence and one kv head. MERGE: the last of them to come writes the output.

    LEAVE: rows of context 0 are somebody else's. EARLY: whoever merges is launched meanwhile, and waits.
    """
    if EARLY:
        gdc_launch_dependents()
    part, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, 32)
    g, t = lane // 4, lane % 4
    at = query + request * query_stride + (head * group + g) * query_head_stride + t * ptx.query_part(KEY, D)
    words = tl.inline_asm_elementwise(
        ptx.load_query(KEY, D), ptx.constraints("r" * (D // 8), "lr"),
        [at.to(tl.int64), (g < group).to(tl.int32)],
        dtype=ptx.types(D // 8, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    context = tl.load(context_lens + request)
    low = SINK
    if WINDOW:
        low = tl.maximum(context - window, SINK)
    high = context - RECENT
    first = low // T
    last = tl.maximum(tl.cdiv(high, T), first)
    tiles = last - first
    share = tl.maximum(tl.cdiv(tiles, splits), min_tiles)
    first = first + part * share
    last = tl.minimum(first + share, last)
    row = (request * HEADS + head) * group
    out += request * out_stride + head * group * out_head_stride
    if first >= last:
        every = tl.arange(0, 8)
        if not MERGE:
            nothing = stats + ((row + every) * parts + part) * 2
            tl.store(nothing, tl.full((8,), float("-inf"), tl.float32), mask=every < group)
            tl.store(nothing + 1, tl.zeros((8,), tl.float32), mask=every < group)
        elif not LEAVE:
            place = out + every[:, None] * out_head_stride + tl.arange(0, D)[None, :]
            nothing = tl.zeros((8, D), out.dtype.element_ty)
            tl.store(place, nothing, mask=(every < group)[:, None] & (part == 0))
        return

    # the first tile is on its way while the query is prepared
    STEPS: tl.constexpr = T // 16
    ring = tl.inline_asm_elementwise(
        ptx.ring(ptx.tile_bytes(KEY, VALUE, D, T)), "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1
    )
    targets, parts_at = _targets(ring, KEY, VALUE, D, T), _parts(ring, KEY, VALUE, D, T)
    table = tables + request * table_stride
    block = pages + head.to(tl.int64) * BLOCK_BYTES
    here = block + tl.load(table + first * T // P).to(tl.int64) * page_stride
    following = tl.load(table + tl.minimum(first + 1, last - 1) * T // P)
    sources = _sources(here, first * T % P, KEY, VALUE, D, P, VALUE_OFFSET, META_OFFSET)
    for i in tl.static_range(STEPS):
        _copy(sources, targets, lane >= 0, i, KEY, VALUE, D)

    QUERY: tl.constexpr = ptx.query_registers(KEY, D)[0]
    prepared = tl.inline_asm_elementwise(
        ptx.prepare_query(KEY, D, ROTATED, DTYPE), ptx.constraints("r" * (QUERY + 6), "r" * (D // 8 + 2)),
        words + (t, t * 8), dtype=ptx.types(QUERY + 6, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    q = prepared[0:QUERY]
    unit0 = prepared[QUERY].to(tl.float32, bitcast=True) * _key_unit(KEY)
    unit1 = prepared[QUERY + 1].to(tl.float32, bitcast=True) * _key_unit(KEY)
    start0, start1 = ptx.AS_BITS_ZERO - prepared[QUERY + 2] * 64, ptx.AS_BITS_ZERO - prepared[QUERY + 3] * 64
    all0, all1 = prepared[QUERY + 4].to(tl.float32), prepared[QUERY + 5].to(tl.float32)
    power0, power1 = unit0 * (scale * LOG2E), unit1 * (scale * LOG2E)
    if CAP:
        power0, power1 = unit0 * 0.0 + LOG2E, unit1 * 0.0 + LOG2E

    held = ()
    TABLES: tl.constexpr = ptx.tables_held(KEY)
    HELD: tl.constexpr = TABLES + ptx.multiplies(KEY)
    if HELD:
        held = tl.inline_asm_elementwise(
            ptx.held_constants(KEY), ptx.constraints("r" * HELD, "r"), [lane],
            dtype=ptx.types(HELD, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip

    STATE: tl.constexpr = ptx.step_state(D)
    W: tl.constexpr = ptx.value_words(VALUE, D)
    zero = tl.zeros((32,), tl.float32)
    lowest = zero + ptx.NO_MAXIMUM
    state = (lowest, lowest, zero, zero, zero, zero, zero + _first_scale(VALUE)) + (zero,) * (STATE - 7)
    V: tl.constexpr = 4 * W + ptx.value_numbers(VALUE)
    for tile in range(first, last):
        here = block + following.to(tl.int64) * page_stride
        following = tl.load(table + tl.minimum(tile + 2, last - 1) * T // P)
        sources = _sources(here, (tile + 1) * T % P, KEY, VALUE, D, P, VALUE_OFFSET, META_OFFSET)
        more = (tile + 1 < last) & (lane >= 0)
        edge = (tile * T < low) | (tile * T + T > high)
        for i in tl.static_range(STEPS):
            tl.inline_asm_elementwise(ptx.wait(STEPS - 1), "=r,r", [lane], tl.int32, False, 1)
            keys = _load_keys(parts_at[0], parts_at[2], i, KEY, D, T)
            a0, a1, b0, b1 = _scores(keys, q, held[0:TABLES], start0, start1, all0, all1, KEY, D)
            loaded = _load_values(parts_at[1], parts_at[3], i, VALUE, D, T)
            # what is read is filled again at once: the next tile has all of this one's time
            tl.inline_asm_elementwise(ptx.all_read(), "=r,r", [lane], tl.int32, False, 1)
            _copy(sources, targets, more, i, KEY, VALUE, D)
            if CAP:
                a0, a1 = cap(a0 * unit0, scale, softcap, CAP), cap(a1 * unit1, scale, softcap, CAP)
                b0, b1 = cap(b0 * unit0, scale, softcap, CAP), cap(b1 * unit1, scale, softcap, CAP)
            if edge:
                start = tile * T + 16 * i
                position = start + 2 * g
                a_seen = (position >= low) & (position < high)
                b_seen = (position + 1 >= low) & (position + 1 < high)
                a0, a1 = tl.where(a_seen, a0, float("-inf")), tl.where(a_seen, a1, float("-inf"))
                b0, b1 = tl.where(b_seen, b0, float("-inf")), tl.where(b_seen, b1, float("-inf"))
                # rows that hold no token may hold anything, and 0 · NaN is NaN
                if V == 4 * W or VALUE == "e4m3":
                    loaded = _keep_seen(loaded, start + 4 * t, low, high, W) + loaded[4 * W :]
                kept = tl.where(a_seen, 0xFFFF, 0) | tl.where(b_seen, -65536, 0)
                if V == 4 * W + 1:
                    loaded = loaded[0 : 4 * W] + (loaded[4 * W] & kept,)
                elif V == 4 * W + 2:
                    loaded = loaded[0 : 4 * W] + (loaded[4 * W] & kept, loaded[4 * W + 1] & kept)
            scale_a, bias_a = _value_scale(loaded, 0, VALUE, D)
            scale_b, bias_b = _value_scale(loaded, 1, VALUE, D)
            state = tl.inline_asm_elementwise(
                ptx.weigh(VALUE, D, HELD > TABLES),
                ptx.constraints("f" * STATE, "f" * 10 + "r" * (4 * W) + "f" * STATE + "r" * (HELD - TABLES)),
                (a0, a1, b0, b1, power0, power1, scale_a, scale_b, bias_a, bias_b)
                + loaded[0 : 4 * W]
                + state
                + held[TABLES:],
                dtype=ptx.types(STATE, tl.float32), is_pure=True, pack=1,
            )  # fmt: skip

    # m, l and the sums of heads 2t and 2t + 1
    bias0, bias1 = _sum_over_groups(state[4]), _sum_over_groups(state[5])
    l0, l1 = _sum_over_groups(state[2]), _sum_over_groups(state[3])
    unit = exponent_unit(scale, CAP)
    head0, head1 = 2 * t, 2 * t + 1
    exists0, exists1 = head0 < group, head1 < group
    m0 = tl.where(l0 > 0, state[0] * (1.0 / unit), tl.where(l0 == 0, float("-inf"), l0))
    m1 = tl.where(l1 > 0, state[1] * (1.0 / unit), tl.where(l1 == 0, float("-inf"), l1))
    factor = _value_unit(VALUE) / state[6]
    sums = ()
    for i in tl.static_range(STATE - 7):
        total = state[7 + i] * factor
        if VALUE == "int4" and i // 4 % 2 == 1:  # the upper nibble of a byte counts 16 times
            total = total * 0.0625
        sums = sums + (total + (bias0 if i % 2 == 0 else bias1),)  # type: ignore[assignment]
    APART: tl.constexpr = W == 8
    at = g * (8 if APART else D // 8)
    if not MERGE:
        row0, row1 = (row + head0) * parts + part, (row + head1) * parts + part
        tl.store(stats + row0 * 2, m0, mask=exists0 & (g == 0))
        tl.store(stats + row0 * 2 + 1, l0, mask=exists0 & (g == 0))
        tl.store(stats + row1 * 2, m1, mask=exists1 & (g == 0))
        tl.store(stats + row1 * 2 + 1, l1, mask=exists1 & (g == 0))
        tl.inline_asm_elementwise(
            ptx.store_sums(D, APART), ptx.constraints("r", "llrr" + "f" * (D // 4)),
            (
                (partial + row0 * D + at).to(tl.int64),
                (partial + row1 * D + at).to(tl.int64),
                exists0.to(tl.int32),
                exists1.to(tl.int32),
            )
            + sums,
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        return
    used = tl.cdiv(tiles, share)
    if used > 1:
        pair = request * HEADS + head
        scratch = partial + pair * (parts * ptx.part_floats(D))
        _store_part(scratch + part * ptx.part_floats(D) + lane * 4, m0, l0, m1, l1, sums, D)
        before = tl.inline_asm_elementwise(
            ptx.arrive(), "=&r,l,r", [(counters + pair).to(tl.int64), used - 1],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        if before < used - 1:
            return
        m0, m1, l0, l1, sums = merge_parts(scratch, used, unit, D)
    store_output(
        out + head0 * out_head_stride + at, out + head1 * out_head_stride + at, exists0, exists1,
        m0, m1, l0, l1, sums, sinks + head * group, head0, head1, unit,
        HAS_SINKS, VALUE_ROTATED, DTYPE, D, APART,
    )  # fmt: skip


@lru_cache(maxsize=16)
def has_products(device: torch.device) -> bool:
    """Whether the device has the `mma` of bytes and fp16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=16)
def has_dependent_launches(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one it waits for has finished."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def fits(query: Tensor, layout: PageLayout) -> bool:
    """Whether this kernel takes the case; all others go to the portable one."""
    return (
        has_products(query.device)
        and query.dtype in (torch.float16, torch.bfloat16)
        and layout.key.scheme in (*ptx.KEYS, "none")
        and layout.value.scheme in (*ptx.VALUES, "none")
        and layout.key_dim == layout.value_dim
        and layout.key_dim in (64, 128)
        and query.shape[1] <= _GROUP * layout.num_kv_heads
        and layout.page_size % 64 == 0
        and query.stride(0) % 8 == query.stride(1) % 8 == query.data_ptr() % 16 == 0
    )


def num_splits(requests: int, layout: PageLayout, longest: int, multiprocessors: int) -> int:
    """Programs along the sequence: one wave of warps, no more than there is work for."""
    _, registers = _shape(*_schemes(layout), layout.key_dim)
    wanted = _warps(registers) * multiprocessors // (requests * layout.num_kv_heads)
    return max(1, min(wanted, longest // _MIN_TOKENS, 128))


@cache
def _counters(device: torch.device) -> Tensor:
    """How many programs of a request's kv head have finished: zeros again after every launch.

    Decodes of one device share them, so they must not overlap: one stream a device decodes. Made by the first
    decode, which comes before any is captured, and kept: graphs hold its address.
    """
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def merges(layout: PageLayout, out: Tensor, splits: int, longest: int) -> bool:
    """Whether the launch writes the output itself."""
    most = _MOST_MERGED_SHORT if longest <= 2 * _MIN_TOKENS * splits else _MOST_MERGED
    return (
        splits <= most
        and (splits == 1 or out.shape[0] * layout.num_kv_heads <= _COUNTERS)
        and out.stride(0) % 8 == out.stride(1) % 8 == out.data_ptr() % 16 == 0
    )


def launch(
    query: Tensor,
    pages: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    layout: PageLayout,
    partial: Tensor,
    stats: Tensor,
    out: Tensor,
    *,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    sink: int,
    recent: int,
    splits: int,
    merge: bool,
    leave: bool,
    early: bool,
) -> None:
    """Parts 0 … splits - 1 of all requests to partial and stats, as `_merge_kernel` reads them.

    Or, to `merge`, the output; partial [B, Hkv, splits, ptx.part_floats(D)] is scratch then.
    """
    requests, query_heads, head_dim = query.shape
    heads = layout.num_kv_heads
    key, value = _schemes(layout)
    if has_e4m3(query.device):
        key, value = ("e4m3" if scheme == "fp8" else scheme for scheme in (key, value))
    tile, registers = _shape(key, value, head_dim)
    _warp_decode_kernel[(splits, heads, requests)](
        query, pages, block_tables, context_lens, partial, stats, out, stats if sinks is None else sinks,
        _counters(query.device), query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        pages.stride(0), block_tables.stride(0), scale, softcap, window,
        splits, partial.shape[2], query_heads // heads, max(1, _MIN_TOKENS // tile),
        MERGE=merge, LEAVE=leave, EARLY=early and not merge, HAS_SINKS=sinks is not None,
        VALUE_ROTATED=layout.value.rotated, KEY=key, VALUE=value, ROTATED=layout.key.rotated,
        VALUE_OFFSET=layout.value_offset, META_OFFSET=layout.meta_offset, BLOCK_BYTES=layout.block_bytes,
        WINDOW=window > 0, CAP=softcap > 0, SINK=sink, RECENT=recent,
        HEADS=heads, DTYPE=_SHORT[layout.dtype], D=head_dim, P=layout.page_size, T=tile,
        FINGERPRINT=ptx.FINGERPRINT, num_warps=1, maxnreg=registers,
    )  # fmt: skip
