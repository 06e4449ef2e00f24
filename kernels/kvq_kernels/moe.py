"""Experts of a mixture-of-experts layer: at the speed of memory for few tokens, of arithmetic for many.

A decode step gives each expert a handful of tokens, so its time is that of reading the weights once. Weights
are the M side of every product and tokens the N side: few tokens waste nothing. Four launches: each expert's
token list, gate and up with SiLU in the epilogue, down, and the sum over a token's experts. No launch depends
on the routing, so CUDA graphs can hold them, and every sum has a fixed order. The router is one more.

A prompt gives some experts hundreds of tokens and some a few. Pairs are sorted by expert and cut into tiles
of one expert; a program finds its tile on the device, and the last of an expert is only as wide as needed.

Shapes: T tokens, K experts a token, E experts, H hidden, I intermediate size; a pair is t · K + k.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

MAX_TOKENS = 1024
"""Steps of more tokens are bound by arithmetic."""
UP_ROWS, DOWN_ROWS = 64, 128
"""Rows of weights a program: of gate and up each, and of down."""
STAGES = {"FEW": 5, "SOME": 5, "MANY": 4}
"""Stages of weights and tokens on their way, for tiles of 16, 32 and 64 tokens: two programs must fit the
shared memory of a multiprocessor. An expert's tile is as large as its tokens need: routing is skewed, and a
second pass over the weights costs as much as the first."""


class Tile(NamedTuple):
    """What a program computes of a product bound by arithmetic."""

    rows: int
    """Of weights; of gate and up each."""
    tokens: int
    depth: int
    """Of the sum at a time."""
    stages: int
    warps: int


UP_TILE = Tile(rows=128, tokens=128, depth=64, stages=4, warps=8)
DOWN_TILE = Tile(rows=128, tokens=128, depth=64, stages=3, warps=4)


@triton.jit
def _route_kernel(
    logits_ptr, weights_ptr, index_ptr,
    E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, KP: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """One token a program. Top-k as maxima of integers: a logit's bits, in its order, then the expert."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EP)
    logits = tl.load(logits_ptr + token * E + expert, mask=expert < E, other=float("-inf")).to(tl.float32)
    top = tl.max(logits, 0)
    total = tl.sum(tl.exp(logits - top), 0)
    bits = logits.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (order.to(tl.int64) << 32) | (EP - 1 - expert)
    least = -0x8000000000000000
    key = tl.where(expert < E, key, least)
    place = tl.arange(0, KP)
    chosen = tl.full((KP,), 0, tl.int64)
    for k in tl.static_range(TOP_K):
        best = tl.max(key, 0)
        chosen = tl.where(place == k, best, chosen)
        key = tl.where(key == best, least, key)
    order = (chosen >> 32).to(tl.int32)
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    weights = tl.where(place < TOP_K, tl.exp(bits.to(tl.float32, bitcast=True) - top) / total, 0.0)
    if NORMALIZE:
        weights /= tl.sum(weights, 0)
    out = token * TOP_K + place
    tl.store(weights_ptr + out, weights.to(weights_ptr.dtype.element_ty), mask=place < TOP_K)
    tl.store(index_ptr + out, EP - 1 - (chosen & 0xFFFFFFFF), mask=place < TOP_K)


@triton.jit
def _lists_kernel(
    index_ptr, valid_ptr, lists_ptr, counts_ptr, num_pairs, capacity,
    TOP_K: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program an expert: the pairs of valid tokens that chose it, in order, and how many they are."""
    expert = tl.program_id(0)
    count = 0
    for start in range(0, num_pairs, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        chosen = tl.load(index_ptr + pairs, mask=pairs < num_pairs, other=-1) == expert
        if MASKED:
            chosen = chosen & (tl.load(valid_ptr + pairs // TOP_K, mask=pairs < num_pairs, other=0) != 0)
        ones = chosen.to(tl.int32)
        place = count + tl.cumsum(ones, 0) - ones
        tl.store(lists_ptr + expert * capacity + place, pairs, mask=chosen)
        count += tl.sum(ones, 0)
    tl.store(counts_ptr + expert, count)


@triton.jit
def _gate_up_columns(
    x_ptr, weights, list_ptr, act_ptr, start, count, expert, tile,
    TOP_K: tl.constexpr, H: tl.constexpr, I: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """act[pair, i] = silu(gate) · up for BM values of i and BN tokens of an expert's list from `start` on."""
    columns = start + tl.arange(0, BN)
    real = columns < count
    pair = tl.load(list_ptr + columns, mask=real, other=0)
    token = (pair // TOP_K).to(tl.int64)
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    for k in tl.range(0, H, BK, num_stages=STAGES):
        x = tl.load(
            x_ptr + token[None, :] * H + (k + tl.arange(0, BK))[:, None], mask=real[None, :], other=0.0
        )
        w_gate = weights.load([expert * 2 * I + tile * BM, k])
        w_up = weights.load([expert * 2 * I + I + tile * BM, k])
        gate = tl.dot(w_gate, x, gate)
        up = tl.dot(w_up, x, up)
    act = gate * tl.sigmoid(gate) * up
    rows = tile * BM + tl.arange(0, BM)
    out = act_ptr + pair.to(tl.int64)[None, :] * I + rows[:, None]
    tl.store(out, act.to(act_ptr.dtype.element_ty), mask=real[None, :])


@triton.jit
def _gate_up_kernel(
    x_ptr, weights, lists_ptr, counts_ptr, act_ptr, capacity,
    TOP_K: tl.constexpr, H: tl.constexpr, I: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    FEW: tl.constexpr, SOME: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """BM values of i of one expert, for all its tokens; FEW, SOME and MANY are the stages of tiles that hold
    16, 32 and 64 of them."""
    tiles: tl.constexpr = I // BM
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    count = tl.load(counts_ptr + expert)
    list_ptr = lists_ptr + expert * capacity
    for start in range(0, count, 64):
        if count - start <= 16:
            _gate_up_columns(
                x_ptr, weights, list_ptr, act_ptr, start, count, expert, tile,
                TOP_K, H, I, BM, 16, BK, FEW,
            )  # fmt: skip
        elif count - start <= 32:
            _gate_up_columns(
                x_ptr, weights, list_ptr, act_ptr, start, count, expert, tile,
                TOP_K, H, I, BM, 32, BK, SOME,
            )  # fmt: skip
        else:
            _gate_up_columns(
                x_ptr, weights, list_ptr, act_ptr, start, count, expert, tile,
                TOP_K, H, I, BM, 64, BK, MANY,
            )  # fmt: skip


@triton.jit
def _down_columns(
    act_ptr, weights, list_ptr, routing_ptr, out_ptr, start, count, expert, tile,
    H: tl.constexpr, I: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[pair, h] = routing weight · (down · act)[h] for BM values of h and BN tokens from `start` on."""
    columns = start + tl.arange(0, BN)
    real = columns < count
    pair = tl.load(list_ptr + columns, mask=real, other=0).to(tl.int64)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in tl.range(0, I, BK, num_stages=STAGES):
        act = tl.load(
            act_ptr + pair[None, :] * I + (k + tl.arange(0, BK))[:, None], mask=real[None, :], other=0.0
        )
        acc = tl.dot(weights.load([expert * H + tile * BM, k]), act, acc)
    acc *= tl.load(routing_ptr + pair, mask=real, other=0.0).to(tl.float32)[None, :]
    rows = tile * BM + tl.arange(0, BM)
    out = out_ptr + pair[None, :] * H + rows[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=real[None, :])


@triton.jit
def _down_kernel(
    act_ptr, weights, lists_ptr, counts_ptr, routing_ptr, out_ptr, capacity,
    H: tl.constexpr, I: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    FEW: tl.constexpr, SOME: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """BM values of h of one expert, for all its tokens; stages as in `_gate_up_kernel`."""
    tiles: tl.constexpr = H // BM
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    count = tl.load(counts_ptr + expert)
    list_ptr = lists_ptr + expert * capacity
    for start in range(0, count, 64):
        if count - start <= 16:
            _down_columns(
                act_ptr, weights, list_ptr, routing_ptr, out_ptr, start, count, expert, tile,
                H, I, BM, 16, BK, FEW,
            )  # fmt: skip
        elif count - start <= 32:
            _down_columns(
                act_ptr, weights, list_ptr, routing_ptr, out_ptr, start, count, expert, tile,
                H, I, BM, 32, BK, SOME,
            )  # fmt: skip
        else:
            _down_columns(
                act_ptr, weights, list_ptr, routing_ptr, out_ptr, start, count, expert, tile,
                H, I, BM, 64, BK, MANY,
            )  # fmt: skip


@triton.jit
def _sum_kernel(pairs_ptr, out_ptr, H: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = the sum of a token's TOP_K pairs, in their order."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = pairs_ptr + (token * TOP_K + k) * H
        total += tl.load(row + columns, mask=columns < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + columns, total.to(out_ptr.dtype.element_ty), mask=columns < H)


@triton.jit
def _tile_of(tile, ends_ptr, E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr):
    """Tile `tile` of at most BN pairs of one expert, where pairs are sorted by expert and end at ends [E].

    Returns the expert (E or more: there is no such tile), where its pairs begin, how many they are, and the
    first of them in the tile.
    """
    e = tl.arange(0, EP)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    begin = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    count = tl.where(e < E, end - begin, 0)
    tiles = (count + BN - 1) // BN
    until = tl.cumsum(tiles, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    here = e == expert
    before = tl.sum(tl.where(here, until - tiles, 0), 0)
    return (
        expert,
        tl.sum(tl.where(here, begin, 0), 0),
        tl.sum(tl.where(here, count, 0), 0),
        (tile - before) * BN,
    )


@triton.jit
def _gate_up_tile_kernel(
    x_ptr, weights, pairs_ptr, ends_ptr, act_ptr,
    TOP_K: tl.constexpr, H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BM values of i for one tile of an expert's pairs: of BN, the last one as small as its pairs allow."""
    rows: tl.constexpr = I // BM
    row = tl.program_id(0) % rows
    expert, begin, count, start = _tile_of(tl.program_id(0) // rows, ends_ptr, E, EP, BN)
    if expert >= E:
        return
    if count - start <= 16:
        _gate_up_columns(
            x_ptr, weights, pairs_ptr + begin, act_ptr, start, count, expert, row,
            TOP_K, H, I, BM, 16, BK, STAGES,
        )  # fmt: skip
    elif count - start <= 64:
        _gate_up_columns(
            x_ptr, weights, pairs_ptr + begin, act_ptr, start, count, expert, row,
            TOP_K, H, I, BM, 64, BK, STAGES,
        )  # fmt: skip
    else:
        _gate_up_columns(
            x_ptr, weights, pairs_ptr + begin, act_ptr, start, count, expert, row,
            TOP_K, H, I, BM, BN, BK, STAGES,
        )  # fmt: skip


@triton.jit
def _down_tile_kernel(
    act_ptr, weights, pairs_ptr, ends_ptr, routing_ptr, out_ptr,
    H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BM values of h for one tile of an expert's pairs, as in `_gate_up_tile_kernel`."""
    rows: tl.constexpr = H // BM
    row = tl.program_id(0) % rows
    expert, begin, count, start = _tile_of(tl.program_id(0) // rows, ends_ptr, E, EP, BN)
    if expert >= E:
        return
    if count - start <= 16:
        _down_columns(
            act_ptr, weights, pairs_ptr + begin, routing_ptr, out_ptr, start, count, expert, row,
            H, I, BM, 16, BK, STAGES,
        )  # fmt: skip
    elif count - start <= 64:
        _down_columns(
            act_ptr, weights, pairs_ptr + begin, routing_ptr, out_ptr, start, count, expert, row,
            H, I, BM, 64, BK, STAGES,
        )  # fmt: skip
    else:
        _down_columns(
            act_ptr, weights, pairs_ptr + begin, routing_ptr, out_ptr, start, count, expert, row,
            H, I, BM, BN, BK, STAGES,
        )  # fmt: skip


def takes(gate_up: Tensor, down: Tensor) -> bool:
    """Whether `experts` can run with these weights: whole tiles, and a dtype that the matrix units take."""
    hidden, intermediate = down.shape[1], down.shape[2]
    return hidden % 128 == 0 and intermediate % 64 == 0 and gate_up.dtype in (torch.bfloat16, torch.float16)


@lru_cache(maxsize=16)
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return 1 << 20
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024


def route(logits: Tensor, top_k: int, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `reference.route`; one launch."""
    tokens, count = logits.shape
    logits = logits.contiguous()
    weights = torch.empty(tokens, top_k, dtype=dtype, device=logits.device)
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    if tokens:
        _route_kernel[(tokens,)](
            logits, weights, index, E=count, EP=triton.next_power_of_2(count),
            TOP_K=top_k, KP=triton.next_power_of_2(top_k), NORMALIZE=normalize, num_warps=1,
        )  # fmt: skip
    return weights, index


def experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """See `reference.experts`: Σ_k w_k · down_e(silu(gate_e x) · up_e x) over each token's experts e.

    hidden [T, H], top_k_index and top_k_weights [T, K], gate_up [E, 2I, H], down [E, H, I] -> [T, H]. Rows of
    tokens that are not `valid` [T] bool (padding; None: all are) hold anything.
    """
    tokens, top_k = top_k_index.shape
    num_experts, width, intermediate = down.shape
    assert gate_up.shape == (num_experts, 2 * intermediate, width) and hidden.shape == (tokens, width)
    assert gate_up.is_contiguous() and down.is_contiguous()
    hidden, top_k_index, top_k_weights = (x.contiguous() for x in (hidden, top_k_index, top_k_weights))
    pairs = tokens * top_k
    device = hidden.device
    lists = torch.empty(num_experts, tokens, dtype=torch.int32, device=device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    act = torch.empty(pairs, intermediate, dtype=hidden.dtype, device=device)
    parts = torch.empty(pairs, width, dtype=hidden.dtype, device=device)
    out = torch.empty_like(hidden)
    block = min(1024, triton.next_power_of_2(pairs))
    _lists_kernel[(num_experts,)](
        top_k_index, top_k_index if valid is None else valid, lists, counts, pairs, tokens,
        TOP_K=top_k, MASKED=valid is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    options = {"BK": 64, "num_warps": 4, **STAGES}
    weights = TensorDescriptor.from_tensor(gate_up.view(-1, width), [UP_ROWS, 64])
    _gate_up_kernel[(num_experts * (intermediate // UP_ROWS),)](
        hidden, weights, lists, counts, act, tokens,
        TOP_K=top_k, H=width, I=intermediate, BM=UP_ROWS, **options,
    )  # fmt: skip
    weights = TensorDescriptor.from_tensor(down.view(-1, intermediate), [DOWN_ROWS, 64])
    _down_kernel[(num_experts * (width // DOWN_ROWS),)](
        act, weights, lists, counts, top_k_weights, parts, tokens,
        H=width, I=intermediate, BM=DOWN_ROWS, **options,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(width))
    _sum_kernel[(tokens, triton.cdiv(width, block))](
        parts, out, H=width, TOP_K=top_k, BLOCK=block, num_warps=4
    )
    return out


def sorted_experts(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """See `experts`; for steps bound by arithmetic."""
    tokens, top_k = top_k_index.shape
    num_experts, width, intermediate = down.shape
    pairs, device = tokens * top_k, hidden.device
    hidden, top_k_weights = hidden.contiguous(), top_k_weights.contiguous()
    # radix sort: a pass for each byte of the keys
    keys = top_k_index.reshape(-1).to(torch.uint8 if num_experts <= 256 else torch.int16)
    chosen, order = keys.sort(stable=True)
    ends = torch.searchsorted(
        chosen.int(), torch.arange(num_experts, dtype=torch.int32, device=device), right=True, out_int32=True
    )
    act = torch.empty(pairs, intermediate, dtype=hidden.dtype, device=device)
    parts = torch.empty(pairs, width, dtype=hidden.dtype, device=device)
    out = torch.empty_like(hidden)
    common = {"E": num_experts, "EP": triton.next_power_of_2(num_experts)}

    def cut(
        tile: Tile, weights: Tensor, rows: int, least: int, matrices: int
    ) -> tuple[tuple[int], TensorDescriptor, dict[str, int]]:
        """Grid, weights and options of a launch over `matrices` of so many rows, of which `least` divide."""
        height = tile.rows if rows % tile.rows == 0 else least
        tiles = min(pairs, triton.cdiv(pairs, tile.tokens) + num_experts)  # an expert's last may be in part
        stage = (matrices * height + tile.tokens) * tile.depth * hidden.element_size()
        stages = min(tile.stages, _shared_memory(device) // stage)
        options = {
            "BM": height,
            "BN": tile.tokens,
            "BK": tile.depth,
            "STAGES": stages,
            "num_warps": tile.warps,
        }
        descriptor = TensorDescriptor.from_tensor(weights, [height, tile.depth])
        return (tiles * (rows // height),), descriptor, options

    grid, weights, options = cut(UP_TILE, gate_up.view(-1, width), intermediate, 64, 2)
    _gate_up_tile_kernel[grid](
        hidden, weights, order, ends, act,
        TOP_K=top_k, H=width, I=intermediate, **common, **options,
    )  # fmt: skip
    grid, weights, options = cut(DOWN_TILE, down.view(-1, intermediate), width, 128, 1)
    _down_tile_kernel[grid](
        act, weights, order, ends, top_k_weights, parts,
        H=width, I=intermediate, **common, **options,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(width))
    _sum_kernel[(tokens, triton.cdiv(width, block))](
        parts, out, H=width, TOP_K=top_k, BLOCK=block, num_warps=4
    )
    return out
