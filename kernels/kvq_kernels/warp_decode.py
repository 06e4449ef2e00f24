"""Decode on sm_80 and newer, bound by memory: a warp for a share of a sequence, from the page's bytes to the
matrix units.

Tokens stream through a ring in shared memory, as they are, by asynchronous copies; no two lanes exchange
unpacked numbers: see `warp_ptx.py` for which lane holds what. A *team* of warps takes a part of a sequence,
the whole of it where it can. Its warps have nothing in common until the end, where they merge what they
found. Where a sequence has several parts, `paged_decode` merges them in a second launch.

A program has one team, or, where that fills the GPU, as many as a multiprocessor has warps for: a scheduler
prefers the oldest of its warps, so that those of several programs would end one after the other.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from kvq_kernels import warp_ptx as ptx
from kvq_kernels.batches import planned
from kvq_kernels.exponent import LOG2E, cap, exponent_unit
from kvq_kernels.layout import PageLayout
from kvq_kernels.quantize_store import has_e4m3

_GROUP = 8
"""Query heads of a kv head that the matrix units take at once."""
_MIN_TOKENS, _FEW_TOKENS = 128, 32
"""Of a warp at least where there is work for all, as preparing the query and merging cost as much; and where
schedulers would have nothing to do."""
_TILE_BYTES = 8192
"""Of a tile of 64 tokens at most; where they take more, it has 32. A longer ring takes longer to fill."""
_PIECES = 2
"""Of a tile: each is filled again as soon as it is read."""
_SCHEDULERS = 4
"""Of a multiprocessor."""
_MOST_IDLE = 0.25
"""Share of the GPU's warps that may be missing where that makes a sequence one team's: less than a second
launch costs."""
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def _schemes(layout: PageLayout) -> tuple[str, str]:
    key, value = (
        _SHORT[layout.dtype] if codec.scheme == "none" else codec.scheme
        for codec in (layout.key, layout.value)
    )
    return key, value


@lru_cache(maxsize=64)
def _shape(key: str, value: str, head_dim: int) -> tuple[int, int]:
    """Tokens that a warp has on their way, and warps of a multiprocessor: what takes long to unpack needs
    many, of long rows few have enough on their way."""
    tile = 64 if ptx.tile_bytes(key, value, head_dim, 64) <= _TILE_BYTES else 32
    small = head_dim == 64 or (key in ptx.NIBBLE_KEYS and value in ("lm2", "lm3", "lm4", "int4"))
    return tile, 16 if small else 8


def _registers(warps: int) -> int:
    """Of a lane, where a multiprocessor with 65,536 has so many warps."""
    return min(65_536 // 32 // warps, 255)


@triton.jit
def _half(pair, i: tl.constexpr):
    """Number i, 0 or 1, of a register of two fp16 numbers, as float32."""
    return tl.inline_asm_elementwise(
        ptx.half_to_float(i == 1), "=&f,r", [pair], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _load_keys(
    address, high, metadata, i: tl.constexpr, SCHEME: tl.constexpr, D: tl.constexpr, T: tl.constexpr
):
    """Step i of a tile, see `ptx.load_keys`."""
    COUNT: tl.constexpr = 2 * ptx.key_words(SCHEME, D) + ptx.key_numbers(SCHEME)
    return tl.inline_asm_elementwise(
        ptx.load_keys(SCHEME, D, i, T), ptx.constraints("r" * COUNT, "rrr"), [address, high, metadata],
        dtype=ptx.types(COUNT, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _load_values(
    address, high, metadata, i: tl.constexpr, SCHEME: tl.constexpr, D: tl.constexpr, T: tl.constexpr
):
    """Step i of a tile, see `ptx.load_values`."""
    COUNT: tl.constexpr = 4 * ptx.value_words(SCHEME, D) + ptx.value_numbers(SCHEME)
    return tl.inline_asm_elementwise(
        ptx.load_values(SCHEME, D, i, T), ptx.constraints("r" * COUNT, "rrr"), [address, high, metadata],
        dtype=ptx.types(COUNT, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _swizzled(offset, SWIZZLE: tl.constexpr):
    return offset ^ ((offset >> SWIZZLE[0] & SWIZZLE[1]) << SWIZZLE[2])


@triton.jit
def _sources(block, row, places, KEY: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr):
    """Where the lane begins to copy a tile from `row` of a block on: keys, values, numbers."""
    rows = row * ptx.key_bytes(KEY, D), row * ptx.value_bytes(VALUE, D), row * 2
    found = ()
    for i in tl.static_range(3):
        place = tl.inline_asm_elementwise(
            ptx.address(), "=l,l,r", [block.to(tl.int64), places[i] + rows[i]], tl.int64, True, 1
        )
        found = found + (place,)  # type: ignore[assignment]
    return found


@triton.jit
def _targets(lane, ring, KEY: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, T: tl.constexpr):
    """Where to."""
    K: tl.constexpr = ptx.key_bytes(KEY, D)
    V: tl.constexpr = ptx.value_bytes(VALUE, D)
    return (
        ring + _swizzled(lane * 16, ptx.key_swizzle(KEY, D)),
        ring + T * K + _swizzled(lane * 16, ptx.value_swizzle(VALUE, D)),
        ring + T * (K + V) + lane // 2 * (2 * T) + lane % 2 * 16,
    )


@triton.jit
def _copy(
    lane, sources, targets, wanted, first: tl.constexpr, STEPS: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Start copying STEPS steps of a tile, where `wanted`."""
    tl.inline_asm_elementwise(
        ptx.copy(KEY, VALUE, D, T, first, STEPS), ptx.constraints("r", "lllrrrrr"),
        sources + targets + (lane, wanted.to(tl.int32)), dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _parts(lane, ring, KEY: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, T: tl.constexpr):
    """Where in the ring the lane finds its parts of a tile: of keys, values, keys' numbers and values', and
    the high bits of lm3's keys and values."""
    g, t = lane // 4, lane % 4
    K: tl.constexpr = ptx.key_bytes(KEY, D)
    V: tl.constexpr = ptx.value_bytes(VALUE, D)
    PART: tl.constexpr = 8 if K == 32 or KEY == "lm3" else 16
    VALUE_PART: tl.constexpr = 16 if V == 256 else 4 if VALUE == "lm3" else V // 8
    keys, values = ring + g * (2 * K), ring + T * K + t * (4 * V)
    return (
        ring + _swizzled(g * (2 * K) + t * PART, ptx.key_swizzle(KEY, D)),
        ring + T * K + _swizzled(t * (4 * V) + g * VALUE_PART, ptx.value_swizzle(VALUE, D)),
        ring + T * (K + V) + g * 4,
        ring + T * (K + V + 2 * ptx.key_numbers(KEY)) + g * 4,
        keys + D // 4 + t * 4,
        values + D // 4 + g * 2,
    )


@triton.jit
def _scores(loaded, query, constants, start0, start1, all0, all1, SCHEME: tl.constexpr, D: tl.constexpr):
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
        TURBO: tl.constexpr = SCHEME == "turbo" or SCHEME == "turbo-whole"
        COUNT: tl.constexpr = 8 if TURBO else 4
        EXTRA: tl.constexpr = len(constants) + (2 if TURBO or SCHEME == "lm4" else 0)
        r = tl.inline_asm_elementwise(
            ptx.scores(SCHEME, D),
            ptx.constraints("r" * COUNT, "r" * (2 * WORDS + QUERY + EXTRA)),
            pair + query + (constants + (start0, start1))[0:EXTRA],
            dtype=ptx.types(COUNT, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        a0, a1 = r[0].to(tl.float32), r[1].to(tl.float32)
        b0, b1 = r[2].to(tl.float32), r[3].to(tl.float32)
        factor_a, factor_b = _half(loaded[2 * WORDS], 0), _half(loaded[2 * WORDS], 1)
        if TURBO:
            UNIT: tl.constexpr = (2.0 if SCHEME == "turbo" else 1.0) / ptx.TURBO_UNIT
            residual_a, residual_b = _half(loaded[2 * WORDS + 1], 0), _half(loaded[2 * WORDS + 1], 1)
            residual_a, residual_b = residual_a * UNIT, residual_b * UNIT
            for i in tl.static_range(4, 8):
                r = r[0:i] + (r[i].to(tl.float32, bitcast=True) - ptx.AS_BITS,) + r[i + 1 :]
            a0, a1 = a0 + r[4] * residual_a, a1 + r[5] * residual_a
            b0, b1 = b0 + r[6] * residual_b, b1 + r[7] * residual_b
            a0, a1, b0, b1 = a0 * factor_a, a1 * factor_a, b0 * factor_b, b1 * factor_b
        elif SCHEME == "lm3" or SCHEME == "lm4":
            a0, a1, b0, b1 = a0 * factor_a, a1 * factor_a, b0 * factor_b, b1 * factor_b
        else:
            bias_a, bias_b = _half(loaded[2 * WORDS + 1], 0), _half(loaded[2 * WORDS + 1], 1)
            a0, a1 = a0 * factor_a + all0 * bias_a, a1 * factor_a + all1 * bias_a
            b0, b1 = b0 * factor_b + all0 * bias_b, b1 * factor_b + all1 * bias_b
    return a0, a1, b0, b1


@triton.constexpr_function
def _key_unit(scheme: str) -> float:
    units = {"lm4": ptx.LM4_UNIT, "fp8": 256.0} | dict.fromkeys((*ptx.TURBO, "lm3"), ptx.TURBO_UNIT)
    return units.get(scheme, 1.0)


@triton.constexpr_function
def _value_unit(scheme: str) -> float:
    """What the sums' operands are counted in, value scales apart."""
    if scheme in ptx.PLAIN:
        return 1.0
    units = {
        "fp8": 256.0,
        "e4m3": 1.0,
        "lm2": ptx.LM2_UNIT / ptx.HALF_UNIT,
        "lm3": ptx.TURBO_UNIT / ptx.HALF_UNIT,
        "lm4": ptx.LM4_UNIT / 2 / ptx.HALF_UNIT,
    }
    return units.get(scheme, 1.0 / ptx.HALF_UNIT)


@triton.constexpr_function
def _first_scale(scheme: str) -> float:
    return 1.0 if scheme in ptx.PLAIN else ptx.FIRST_SCALE


@triton.jit
def _value_scale(loaded, one, i: tl.constexpr, SCHEME: tl.constexpr, D: tl.constexpr):
    """Scale and bias of token a (0) or b (1)."""
    WORDS: tl.constexpr = 4 * ptx.value_words(SCHEME, D)
    if SCHEME == "bf16" or SCHEME == "fp16":
        scale = one
        bias = scale
    else:
        scale = _half(loaded[WORDS], i)
        bias = scale
        if SCHEME == "int4" or SCHEME == "int8":
            bias = _half(loaded[WORDS + 1], i)
    return scale, bias


@triton.jit
def _mask(
    inside, start, low, high, row, column, a0, a1, b0, b1, loaded, SCHEME: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Scores and values of a step without those of tokens that are not seen, see `ptx.mask`."""
    V: tl.constexpr = 4 * ptx.value_words(SCHEME, D) + ptx.value_numbers(SCHEME)
    return tl.inline_asm_elementwise(
        ptx.mask(SCHEME, D), ptx.constraints("f" * 4 + "r" * V, "r" * 6 + "f" * 4 + "r" * V),
        (inside, start, low, high, row, column, a0, a1, b0, b1) + loaded,
        dtype=ptx.types(4, tl.float32) + ptx.types(V, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _sum_over_groups(x):
    return tl.inline_asm_elementwise(
        ptx.sum_over_groups(), "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _merge(at, unit, TEAM: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr):
    """Shares of one head, `STRIDE` bytes from one to the next -> m, l and undivided sums, by dim."""
    COUNT: tl.constexpr = 2 + D // 8
    ms = ()
    for i in tl.static_range(TEAM):
        m = tl.inline_asm_elementwise(
            ptx.load_maximum(), "=f,r", [at + i * STRIDE], dtype=tl.float32, is_pure=False, pack=1
        )
        ms = ms + (m,)  # type: ignore[assignment]
    top = ms[0]  # type: ignore[misc]
    for i in tl.static_range(1, TEAM):
        top = tl.maximum(top, ms[i])
    base = tl.where(top == float("-inf"), 0.0, top)
    merged = ()
    for i in tl.static_range(TEAM):
        weight = tl.exp2((ms[i] - base) * unit)
        share = tl.inline_asm_elementwise(
            ptx.load_share(D), ptx.constraints("f" * COUNT, "r"), [at + i * STRIDE],
            dtype=ptx.types(COUNT, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
        joined = ()
        for j in tl.static_range(1, COUNT):
            so_far = share[j] * weight if i == 0 else merged[j - 1] + share[j] * weight  # type: ignore[misc]
            joined = joined + (so_far,)  # type: ignore[assignment]
        merged = joined
    return top, merged[0], merged[1:]  # type: ignore[misc]


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
def _store_output(
    lane, heads, ms, ls, sums, out, out_head_stride, at, sinks, group, unit,
    HAS_SINKS: tl.constexpr, ROTATED: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Divide, rotate back, and store one or two heads of the lane, from its first dim `at` on."""
    COUNT: tl.constexpr = len(heads)
    NORM: tl.constexpr = D**-0.5 if ROTATED else 1.0
    factors, places, exist = (), (), ()
    for i in tl.static_range(COUNT):
        there = heads[i] < group
        factor = _final_factor(ms[i], ls[i], sinks, heads[i], there, unit, HAS_SINKS) * NORM
        factors = factors + (factor,)  # type: ignore[assignment]
        places = places + ((out + heads[i] * out_head_stride + at).to(tl.int64),)  # type: ignore[assignment]
        exist = exist + (there.to(tl.int32),)  # type: ignore[assignment]
    final = ()
    for i in tl.static_range(COUNT * D // 8):
        final = final + (sums[i] * factors[i % COUNT],)  # type: ignore[assignment]
    tl.inline_asm_elementwise(
        ptx.store_output(D, COUNT, APART, ROTATED, DTYPE),
        ptx.constraints("r", "r" + "l" * COUNT + "r" * COUNT + "f" * (COUNT * D // 8)),
        (lane,) + places + exist + final, dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _store_part(
    heads, ms, ls, sums, partial, stats, row, parts, part, at, first, group,
    D: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """One or two heads of the lane, as `_merge_kernel` reads them; m and l by lanes that are `first`."""
    COUNT: tl.constexpr = len(heads)
    places, exist = (), ()
    for i in tl.static_range(COUNT):
        there = heads[i] < group
        place = (row + heads[i]) * parts + part
        tl.store(stats + place * 2, ms[i], mask=there & first)
        tl.store(stats + place * 2 + 1, ls[i], mask=there & first)
        places = places + ((partial + place * D + at).to(tl.int64),)  # type: ignore[assignment]
        exist = exist + (there.to(tl.int32),)  # type: ignore[assignment]
    tl.inline_asm_elementwise(
        ptx.store_sums(D, COUNT, APART),
        ptx.constraints("r", "l" * COUNT + "r" * COUNT + "f" * (COUNT * D // 8)),
        places + exist + sums, dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["table_stride", "window", "sequences", "splits", "parts", "group", "min_tiles"]
    + ["leave", "by1", "by2", "by4", "by7"]
)
def _warp_decode_kernel(
    query, pages, tables, context_lens, partial, stats, out, sinks,
    query_stride, query_head_stride, out_stride, out_head_stride, page_stride, table_stride,
    scale, softcap, window, sequences, splits, parts, group, min_tiles, leave,
    by1, by2, by4, by7,
    MERGE: tl.constexpr, EARLY: tl.constexpr, HAS_SINKS: tl.constexpr,
    VALUE_ROTATED: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ROTATED: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, META_OFFSET: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    HEADS: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
    PIECES: tl.constexpr, WARPS: tl.constexpr, TEAM: tl.constexpr, FINGERPRINT: tl.constexpr,
):  # fmt: skip
    """Teams of TEAM warps, each for one of `splits` parts of one request's sequence and one kv head.

    MERGE: there are no other parts. leave: rows of context 0 are somebody else's. EARLY: whoever merges is
    launched meanwhile, and waits. Scalars that follow from `warp` differ between warps: no operation here is
    the program's as a whole.
    """
    if EARLY:
        gdc_launch_dependents()
    thread = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    lane = thread % 32
    g, t = lane // 4, lane % 4
    sequence, part = tl.program_id(0), tl.program_id(1)
    number, member = 0, 0
    if WARPS > 1:
        warp = tl.inline_asm_elementwise(ptx.warp(), "=r,r", [sequence], tl.int32, True, 1)
        number, member = warp // TEAM, warp % TEAM
        sequence = sequence * (WARPS // TEAM) + number
    there = sequence < sequences
    sequence = tl.minimum(sequence, sequences - 1)
    request, head = (sequence // HEADS).to(tl.int64), sequence % HEADS
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
    begin = low // T
    end = tl.maximum(tl.cdiv(high, T), begin)
    share = end - begin
    if not MERGE:
        share = tl.maximum(tl.cdiv(share, splits), min_tiles)
    first = begin + part * share
    count = tl.minimum(share, end - first)
    row = (request * HEADS + head) * group
    out += request * out_stride + head * group * out_head_stride
    if (count <= 0) | (not there):
        if not MERGE:
            place = stats + ((row + g) * parts + part) * 2
            kept = (g < group) & (t == 0) & there & (member == 0)
            tl.store(place, lane * 0.0 - float("inf"), mask=kept)
            tl.store(place + 1, lane * 0.0, mask=kept)
        else:
            zeros = (lane * 0).to(out.dtype.element_ty)
            for i in tl.static_range(D // 4):
                place = out + g * out_head_stride + (t * (D // 4) + i)
                tl.store(place, zeros, mask=(g < group) & (part == 0) & there & (member == 0) & (leave == 0))
        return

    # the first tile is on its way while the query is prepared
    STEPS: tl.constexpr = T // 16
    AT_ONCE: tl.constexpr = max(1, STEPS // PIECES)
    RING: tl.constexpr = ptx.ring_bytes(KEY, VALUE, D, T, TEAM)
    memory = gl.allocate_shared_memory(
        gl.int32, [RING // 128 + 1, 32 * WARPS], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    memory.index(RING // 128).store(thread)
    start_of_rings = tl.inline_asm_elementwise(ptx.shared_memory(), "=r,r", [sequence], tl.int32, True, 1)
    rings = start_of_rings + number * (TEAM * RING)
    ring = rings + member * RING
    targets, parts_at = _targets(lane, ring, KEY, VALUE, D, T), _parts(lane, ring, KEY, VALUE, D, T)
    last = first + count
    if TEAM > 1:
        share = tl.maximum(tl.cdiv(count, TEAM), min_tiles)
        first += member * share
        last = tl.minimum(first + share, last)
    table = tables + request * table_stride
    block = pages + head.to(tl.int64) * BLOCK_BYTES
    here = block + tl.load(table + tl.minimum(first, end - 1) * T // P).to(tl.int64) * page_stride
    following = tl.load(table + tl.minimum(first + 1, end - 1) * T // P)
    places = (
        lane * 16 + ptx.middle(ptx.key_bytes(KEY, D), T),
        lane * 16 + VALUE_OFFSET + ptx.middle(ptx.value_bytes(VALUE, D), T),
        META_OFFSET + lane // 2 * (2 * P) + lane % 2 * 16,
    )
    sources = _sources(here, first * T % P, places, KEY, VALUE, D)
    for i in tl.static_range(0, STEPS, AT_ONCE):
        _copy(lane, sources, targets, first < last, i, AT_ONCE, KEY, VALUE, D, T)

    zero = tl.inline_asm_elementwise(
        ptx.zero_after_copies(), "=&r,r,r", [thread, start_of_rings + WARPS * RING + thread * 4],
        tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    QUERY: tl.constexpr = ptx.query_registers(KEY, D)[0]
    prepared = tl.inline_asm_elementwise(
        ptx.prepare_query(KEY, D, ROTATED, DTYPE), ptx.constraints("r" * (QUERY + 6), "r" * (D // 8 + 3)),
        words + (t, t * 8, zero), dtype=ptx.types(QUERY + 6, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    q = prepared[0:QUERY]
    unit0 = prepared[QUERY].to(tl.float32, bitcast=True) * _key_unit(KEY)
    unit1 = prepared[QUERY + 1].to(tl.float32, bitcast=True) * _key_unit(KEY)
    start0, start1 = ptx.AS_BITS_ZERO - prepared[QUERY + 2] * 64, ptx.AS_BITS_ZERO - prepared[QUERY + 3] * 64
    if KEY == "turbo-whole":
        start0, start1 = ptx.AS_BITS_ZERO + prepared[QUERY + 4], ptx.AS_BITS_ZERO + prepared[QUERY + 5]
    if KEY == "lm4":  # what its levels lack, to one part in some millions of the sum
        start0, start1 = prepared[QUERY + 4] >> 1, prepared[QUERY + 5] >> 1
    all0, all1 = prepared[QUERY + 4].to(tl.float32), prepared[QUERY + 5].to(tl.float32)
    power0, power1 = unit0 * (scale * LOG2E), unit1 * (scale * LOG2E)
    if CAP:
        power0, power1 = unit0 * 0.0 + LOG2E, unit1 * 0.0 + LOG2E

    powers = by1, by2, by4, by7
    held = ()
    HELD: tl.constexpr = ptx.tables_held(KEY)
    if HELD:
        held = tl.inline_asm_elementwise(
            ptx.held_constants(KEY), ptx.constraints("r" * HELD, "r"), [lane],
            dtype=ptx.types(HELD, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip

    STATE: tl.constexpr = ptx.step_state(D)
    W: tl.constexpr = ptx.value_words(VALUE, D)
    nothing = lane * 0.0
    one = nothing + 1.0
    lowest = nothing + ptx.NO_MAXIMUM
    state = (lowest, lowest) + (nothing,) * 4 + (nothing + _first_scale(VALUE),) + (nothing,) * (STATE - 7)
    for tile in range(first, last):
        here = block + following.to(tl.int64) * page_stride
        following = tl.load(table + tl.minimum(tile + 2, end - 1) * T // P)
        sources = _sources(here, (tile + 1) * T % P, places, KEY, VALUE, D)
        more = tile + 1 < last
        inside = tl.minimum(tile * T - low, high - (tile * T + T))
        for i in tl.static_range(STEPS):
            if i % AT_ONCE == 0:
                tl.inline_asm_elementwise(ptx.wait(STEPS // AT_ONCE - 1), "=r,r", [lane], tl.int32, False, 1)
            keys = _load_keys(parts_at[0], parts_at[4], parts_at[2], i, KEY, D, T)
            a0, a1, b0, b1 = _scores(keys, q, held + powers, start0, start1, all0, all1, KEY, D)
            loaded = _load_values(parts_at[1], parts_at[5], parts_at[3], i, VALUE, D, T)
            # what is read is filled again at once: the next tile has all of this one's time
            if i % AT_ONCE == AT_ONCE - 1:
                tl.inline_asm_elementwise(ptx.all_read(), "=r,r", [lane], tl.int32, False, 1)
                _copy(lane, sources, targets, more, i + 1 - AT_ONCE, AT_ONCE, KEY, VALUE, D, T)
            if CAP:
                a0, a1 = cap(a0 * unit0, scale, softcap, CAP), cap(a1 * unit1, scale, softcap, CAP)
                b0, b1 = cap(b0 * unit0, scale, softcap, CAP), cap(b1 * unit1, scale, softcap, CAP)
            masked = _mask(
                lane * 0 + inside, tile * T + 16 * i, lane * 0 + low, lane * 0 + high, 2 * g, 4 * t,
                a0, a1, b0, b1, loaded, VALUE, D,
            )  # fmt: skip
            a0, a1, b0, b1, loaded = masked[0], masked[1], masked[2], masked[3], masked[4:]
            scale_a, bias_a = _value_scale(loaded, one, 0, VALUE, D)
            scale_b, bias_b = _value_scale(loaded, one, 1, VALUE, D)
            state = tl.inline_asm_elementwise(
                ptx.weigh(VALUE, D),
                ptx.constraints("f" * STATE, "f" * 10 + "r" * (4 * W) + "f" * STATE + "r" * len(powers)),
                (a0, a1, b0, b1, power0, power1, scale_a, scale_b, bias_a, bias_b)
                + loaded[0 : 4 * W]
                + state
                + powers,
                dtype=ptx.types(STATE, tl.float32), is_pure=True, pack=1,
            )  # fmt: skip

    # m, l and the sums of heads 2t and 2t + 1
    bias0, bias1 = _sum_over_groups(state[4]), _sum_over_groups(state[5])
    l0, l1 = _sum_over_groups(state[2]), _sum_over_groups(state[3])
    unit = exponent_unit(scale, CAP)
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
    heads, ms, ls = (2 * t, 2 * t + 1), (m0, m1), (l0, l1)
    if TEAM > 1:
        # the first two of a team merge one head each of a lane's
        tl.inline_asm_elementwise(
            ptx.leave_share(D), ptx.constraints("r", "r" + "f" * (4 + D // 4)),
            (ring + lane * 16, m0, m1, l0, l1) + sums, dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.inline_asm_elementwise(
            ptx.meet(TEAM), "=r,r,r", [lane * 0 + number, lane * 0 + member], tl.int32, False, 1
        )
        here = rings + lane * 16 + member * (128 * ptx.share_words(D))
        m, l, sums = _merge(here, unit, TEAM, D, RING)
        heads, ms, ls = (2 * t + member,), (m,), (l,)  # type: ignore[assignment]
    if MERGE:
        _store_output(
            lane, heads, ms, ls, sums, out, out_head_stride, at, sinks + head * group, group, unit,
            HAS_SINKS, VALUE_ROTATED, DTYPE, D, APART,
        )  # fmt: skip
    else:
        _store_part(heads, ms, ls, sums, partial, stats, row, parts, part, at, g == 0, group, D, APART)


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
        and layout.key_dim in ((128,) if "lm3" in (layout.key.scheme, layout.value.scheme) else (64, 128))
        and query.shape[1] <= _GROUP * layout.num_kv_heads
        and layout.page_size % 64 == 0
        and query.stride(0) % 8 == query.stride(1) % 8 == query.data_ptr() % 16 == 0
    )


@lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class Plan(NamedTuple):
    """How the warps of a launch share the work."""

    parts: int
    """Of a sequence, one for a team."""
    team: int
    """Warps of a team."""
    warps: int
    """Of a program: of one team, or of several."""
    least: int
    """Tokens of a warp, where the sequence has as many."""
    tile: int
    """Tokens that a warp has on their way."""


@lru_cache(maxsize=4096)
def plan(
    requests: int, layout: PageLayout, longest: int, multiprocessors: int, shared: int, splits: int | None
) -> Plan:
    """One wave of warps, no more than there is work for; `splits`: instead, so many warps for a sequence.

    One team, where that takes not many of them; else as few teams as keep nearly all. `shared` is the memory
    that a program may have.
    """
    key, value = _schemes(layout)
    tile, warps = _shape(key, value, layout.key_dim)
    ring = ptx.ring_bytes(key, value, layout.key_dim, tile, 2) + 128
    room = min(warps, shared // ring // _SCHEDULERS * _SCHEDULERS)
    sequences = planned(requests) * layout.num_kv_heads
    least = _FEW_TOKENS
    while least < _MIN_TOKENS and sequences * longest > multiprocessors * _SCHEDULERS * least:
        least *= 2
    if splits:
        least = tile
    wanted = splits or max(1, min(room * multiprocessors // sequences, longest // least, 128))
    full = sequences * wanted > (1 - _MOST_IDLE) * room * multiprocessors
    most = room & -room if full else _SCHEDULERS
    team = min(most, 1 << wanted.bit_length() - 1)
    parts = 1
    if team < (1 - _MOST_IDLE) * wanted:
        while wanted % team > wanted // 8:
            team //= 2
        parts = wanted // team
    return Plan(parts, team, most if full and team > 1 else team, least, min(tile, least))


def merges(out: Tensor, parts: int) -> bool:
    """Whether the launch writes the output itself."""
    return parts == 1 and out.stride(0) % 8 == out.stride(1) % 8 == out.data_ptr() % 16 == 0


def launch(
    query: Tensor,
    pages: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    layout: PageLayout,
    partial: Tensor,
    stats: Tensor,
    out: Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    sink: int,
    recent: int,
    merge: bool,
    leave: bool,
    early: bool,
) -> None:
    """Parts 0 … plan.parts - 1 of all requests to partial and stats, as `_merge_kernel` reads them; or, to
    `merge`, the output."""
    requests, query_heads, head_dim = query.shape
    heads = layout.num_kv_heads
    key, value = _schemes(layout)
    if key == "turbo" and layout.dtype == torch.float16:
        key = "turbo-whole"
    if has_e4m3(query.device):
        key, value = ("e4m3" if scheme == "fp8" else scheme for scheme in (key, value))
    parts, team, warps, least, tile = plan
    registers = _registers(_shape(key, value, head_dim)[1])
    programs = triton.cdiv(requests * heads, warps // team)
    _warp_decode_kernel[(programs, parts)](
        query, pages, block_tables, context_lens, partial, stats, out, stats if sinks is None else sinks,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        pages.stride(0), block_tables.stride(0), scale, softcap, window,
        requests * heads, parts, partial.shape[2], query_heads // heads, max(1, least // tile),
        int(leave), *ptx.POWERS,
        MERGE=merge, EARLY=early and not merge, HAS_SINKS=sinks is not None,
        VALUE_ROTATED=layout.value.rotated, KEY=key, VALUE=value, ROTATED=layout.key.rotated,
        VALUE_OFFSET=layout.value_offset, META_OFFSET=layout.meta_offset, BLOCK_BYTES=layout.block_bytes,
        WINDOW=window > 0, CAP=softcap > 0, SINK=sink, RECENT=recent,
        HEADS=heads, DTYPE=_SHORT[layout.dtype], D=head_dim, P=layout.page_size, T=tile, PIECES=_PIECES,
        WARPS=warps, TEAM=team, FINGERPRINT=ptx.FINGERPRINT,
        num_warps=warps, maxnreg=registers,
    )  # fmt: skip
