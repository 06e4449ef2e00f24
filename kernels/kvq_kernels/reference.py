"""The torch twin of every kernel: what kernels are tested against, and the backend where there is no GPU.

Shapes: T packed tokens, B decoding requests, C prompt chunks, M pages a request, P page size, S keys.
Everything is worked on in float32 (float64 for float64 models); only metadata is fp16.

The rule (one for every backend): a query at position t reads keys and values at j < raw.sink, at
j > t - raw.recent and inside its own prompt chunk in the model's dtype, all others through the codec.
Prefill therefore reads the raw window as it was before its chunk: `store_raw` comes after `paged_prefill`,
and before `paged_decode`, whose own token is among the recent ones.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kvq_kernels.hadamard import hadamard
from kvq_kernels.key_bias import KeyBias
from kvq_kernels.layout import Codec, PageLayout, RawWindow

_PREFILL_ELEMENTS = 1 << 24
"""Scores or mask entries that prefill holds at a time."""
_DECODE_ELEMENTS = 1 << 19
"""Elements of decoded keys that decode holds at a time, unless one request has more."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is worked on in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- writing ------------------------------------------------------------------------------------------------


def _encode(codec: Codec, x: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """[T, H, D] -> codes [T, H, code_bytes], meta [T, H, num_meta]."""
    if not codec.num_meta:
        return codec.encode(x.to(stored))
    work = x.to(working_dtype(x.dtype))
    return codec.encode(hadamard(work) if codec.rotated else work)


def store(key: Tensor, value: Tensor, pages: Tensor, slots: Tensor, layout: PageLayout) -> None:
    """Rotate, quantize and scatter key [T, Hkv, Dk] and value [T, Hkv, Dv] to `slots` [T] (int64) of `pages`.

    A slot is page · P + row. Several tokens may share a slot of page 0 only, whose bytes nobody reads.
    """
    page, row = slots // layout.page_size, slots % layout.page_size
    key_codes, key_meta = _encode(layout.key, key, layout.dtype)
    value_codes, value_meta = _encode(layout.value, value, layout.dtype)
    size = layout.page_size
    pages[..., : layout.value_offset].unflatten(-1, (size, -1))[page, :, row] = key_codes
    pages[..., layout.value_offset : layout.meta_offset].unflatten(-1, (size, -1))[page, :, row] = value_codes
    if layout.num_meta:
        meta = pages[..., layout.meta_offset :].view(torch.float16).unflatten(-1, (-1, size))
        meta[page, :, :, row] = torch.cat((key_meta, value_meta), -1)


def store_raw(
    key: Tensor, value: Tensor, positions: Tensor, rings: Tensor, raw: RawWindow, keep: Tensor | None = None
) -> None:
    """Write key [T, Hkv, Dk] and value [T, Hkv, Dv] at `positions` [T] to rows `rings` [T] of the raw window.

    `keep` [T] bool leaves out tokens that a later one of this call would overwrite, so that the result does
    not depend on the order of writing.
    """
    wanted = positions < raw.sink if raw.recent == 0 else torch.ones_like(positions, dtype=torch.bool)
    if keep is not None:
        wanted = wanted & keep
    tokens = wanted.nonzero().squeeze(-1)
    position, ring = positions[tokens].long(), rings[tokens].long()
    slot = torch.where(position < raw.sink, position, raw.sink + (position - raw.sink) % max(raw.recent, 1))
    raw.keys[ring, slot] = key[tokens].to(raw.keys.dtype)
    raw.values[ring, slot] = value[tokens].to(raw.values.dtype)


# --- reading ------------------------------------------------------------------------------------------------


def _width(query: Tensor, longest: int, window: int, page_size: int) -> tuple[int, Tensor]:
    """How many pages queries at positions `query` [B] reach over, and the first position [B] in reach."""
    width = max(1, -(-longest // page_size))
    if not window:
        return width, torch.zeros_like(query)
    return min(width, (window - 2) // page_size + 2), (query - window + 1).clamp(min=0)


def _reach(tables: Tensor, first: Tensor, width: int, page_size: int) -> tuple[Tensor, Tensor]:
    """`width` pages of each block table from position `first` [B] on: ids [B, width], positions [B, S]."""
    columns = first[:, None] // page_size + torch.arange(width, device=tables.device)
    ids = tables.gather(1, columns.clamp(max=tables.shape[1] - 1).long())
    positions = columns[:, :, None] * page_size + torch.arange(page_size, device=tables.device)
    return ids, positions.flatten(1)


def _gather(
    pages: Tensor, ids: Tensor, valid: Tensor, layout: PageLayout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Decode pages `ids` [B, M] -> K [B, M, Hkv, P, Dk], V [B, M, Hkv, P, Dv], in the stored basis.

    Zero where not `valid` [B, M·P]: a weight of 0 does not silence the NaN of an unwritten page.
    """
    request, page, row = (~valid).unflatten(1, (-1, layout.page_size)).nonzero().unbind(1)

    def part(start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """[B, M, Hkv, ·, P] fp16 metadata, or [B, M, Hkv, P, ·] codes."""
        gathered = pages[..., start:stop].view(dtype).index_select(0, ids.reshape(-1)).unflatten(0, ids.shape)
        return gathered.unflatten(-1, (layout.page_size, -1))

    def decode(codec: Codec, start: int, stop: int, meta: Tensor, head_dim: int) -> Tensor:
        if codec.num_meta:  # a record without scale or norm decodes to zeros
            return codec.decode(part(start, stop, torch.uint8), meta, head_dim, dtype)
        elements = part(start, stop, layout.dtype)
        elements[request, page, :, row] = 0
        return elements.to(dtype)

    meta = part(layout.meta_offset, layout.block_bytes, torch.float16)
    meta = meta.reshape(*ids.shape, pages.shape[1], layout.num_meta, layout.page_size).mT
    meta[request, page, :, row] = 0
    key_meta, value_meta = meta.split((layout.key.num_meta, layout.value.num_meta), -1)
    return (
        decode(layout.key, 0, layout.value_offset, key_meta, layout.key_dim),
        decode(layout.value, layout.value_offset, layout.meta_offset, value_meta, layout.value_dim),
    )


def _read_raw(
    raw: RawWindow, rings: Tensor, last: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw windows of requests whose latest position is `last` [B]: K and V [B, Hkv, R, D], positions [B, R].

    A slot that holds no token yet has position -1, and zeros.
    """
    slot = torch.arange(raw.sink + raw.recent, device=last.device)
    ring = last[:, None] - (last[:, None] - slot) % max(raw.recent, 1)
    positions = torch.where(slot < raw.sink, slot, ring)
    empty = (positions > last[:, None]) | ((slot >= raw.sink) & (positions < raw.sink))
    positions = positions.masked_fill(empty, -1)
    keys = raw.keys[rings.long()].transpose(1, 2).to(dtype)
    values = raw.values[rings.long()].transpose(1, 2).to(dtype)
    empty = empty[:, None, :, None]
    return keys.masked_fill(empty, 0), values.masked_fill(empty, 0), positions


def _through_codec(positions: Tensor, query: Tensor, raw: RawWindow | None) -> Tensor:
    """Whether a query at `query` reads `positions` from the pages, as far as the raw window decides it."""
    if raw is None:
        return torch.ones((), dtype=torch.bool, device=positions.device)
    return (positions >= raw.sink) & (positions <= query - raw.recent)


def _in_window(positions: Tensor, query: Tensor, window: int) -> Tensor:
    within = positions <= query
    return within & (positions > query - window) if window else within


def _cap(scores: Tensor, softcap: float) -> Tensor:
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """exp(scores - max) over the last dim, and its sum; `sinks`, broadcast to [..., 1], join the sum.

    A row without any key has weights 0 and sum 1.
    """
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    top = top.clamp_min(torch.finfo(scores.dtype).min)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp()
    return weights, total.masked_fill(total == 0, 1)


@dataclass(frozen=True)
class _Attention:
    """What the attention of a layer has in common for all requests of a step."""

    pages: Tensor
    layout: PageLayout
    scale: float
    window: int
    softcap: float
    sinks: Tensor | None
    raw: RawWindow | None
    bias: KeyBias | None

    def _constant(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """What pages leave out of the keys at `positions` [B, M · P]: [B, M, Hkv, P, Dk], in their basis."""
        assert self.bias is not None
        constant = self.bias.at(positions).to(dtype)
        constant = hadamard(constant) if self.layout.key.rotated else constant
        return constant.unflatten(1, (-1, self.layout.page_size)).transpose(2, 3)


# --- decode -------------------------------------------------------------------------------------------------


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
) -> Tensor:
    """One query per request, query [B, Hq, Dk], over its pages -> [B, Hq, Dv]; its own token included.

    block_tables [B, M] int32, context_lens [B] int32, sinks [Hq], rings [B] int32. `window` 0 is none, else
    keys j > t - window are read. `max_context` saves a look at the longest context. Context 0 yields zeros.
    `bias` is what the pages' keys lack. `out` takes the result, and keeps its rows of context 0.
    """
    if out is not None:
        seen = context_lens > 0
        found = paged_decode(
            query, pages, block_tables, context_lens, layout, scale=scale, window=window, softcap=softcap,
            sinks=sinks, raw=raw, rings=rings, max_context=max_context, bias=bias,
        )  # fmt: skip
        return out.copy_(torch.where(seen[:, None, None], found, out))
    work = working_dtype(query.dtype)
    lens = context_lens.tolist() if max_context is None or query.device.type == "cpu" else None
    attend = _Decode(pages, layout, scale, window, softcap, sinks, raw, bias)
    if lens is None:
        assert max_context is not None
        longest = min(max_context, block_tables.shape[1] * layout.page_size)
        return attend(query.to(work), block_tables, context_lens, rings, longest).to(query.dtype)
    out = query.new_empty(*query.shape[:2], layout.value_dim)
    for members in _by_length(lens, layout):
        index = torch.tensor(members, device=query.device)
        longest = max(lens[i] for i in members)
        ring = None if rings is None else rings[index]
        block = attend(query[index].to(work), block_tables[index], context_lens[index], ring, longest)
        out[index] = block.to(query.dtype)
    return out


def _by_length(lens: list[int], layout: PageLayout) -> Iterator[list[int]]:
    """Requests, shortest first, in blocks whose keys fit a cache: less padding, less memory, and faster."""
    row = layout.num_kv_heads * max(layout.key_dim, layout.value_dim)
    order = sorted(range(len(lens)), key=lens.__getitem__)
    block: list[int] = []
    for i in order:
        if block and (len(block) + 1) * lens[i] * row > _DECODE_ELEMENTS:
            yield block
            block = []
        block.append(i)
    if block:
        yield block


class _Decode(_Attention):
    """`paged_decode` of some requests, query [B, Hq, Dk] in the working dtype."""

    def __call__(
        self, query: Tensor, tables: Tensor, context_lens: Tensor, rings: Tensor | None, longest: int
    ) -> Tensor:
        layout, window, raw, dtype = self.layout, self.window, self.raw, query.dtype
        position = context_lens[:, None].long() - 1
        width, first = _width(position[:, 0], longest, window, layout.page_size)
        ids, positions = _reach(tables, first, width, layout.page_size)
        read = _in_window(positions, position, window) & _through_codec(positions, position, raw)
        keys, values = _gather(self.pages, ids, read, layout, dtype)
        if self.bias is not None:
            keys = keys + self._constant(positions, dtype)

        plain = query * self.scale
        rotated = hadamard(plain) if layout.key.rotated else plain
        grouped = rotated.unflatten(1, (layout.num_kv_heads, -1))
        scores = (grouped[:, None] @ keys.mT).permute(0, 2, 3, 1, 4).flatten(3)
        scores = _cap(scores, self.softcap).masked_fill_(~read[:, None, None], -torch.inf)
        if raw is not None:
            assert rings is not None, "a raw window needs the requests' rows in it"
            raw_keys, raw_values, raw_positions = _read_raw(raw, rings, position[:, 0], dtype)
            seen = (raw_positions >= 0) & _in_window(raw_positions, position, window)
            raw_scores = _cap(plain.view_as(grouped) @ raw_keys.mT, self.softcap)
            scores = torch.cat((scores, raw_scores.masked_fill_(~seen[:, None, None], -torch.inf)), -1)
        sinks = None if self.sinks is None else self.sinks.to(dtype).view(layout.num_kv_heads, -1, 1)
        weights, total = _softmax(scores, sinks)
        by_page = weights[..., : positions.shape[1]].unflatten(-1, (width, -1)).permute(0, 3, 1, 2, 4)
        out = (by_page @ values).sum(1)
        if layout.value.rotated:
            out = hadamard(out)
        if raw is not None:
            out = out + weights[..., positions.shape[1] :] @ raw_values
        return (out / total).flatten(1, 2)


# --- prefill ------------------------------------------------------------------------------------------------


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
) -> Tensor:
    """Packed prompt chunks over themselves, unquantized, and over earlier tokens -> [T, Hq, Dv].

    query [T, Hq, Dk], key [T, Hkv, Dk], value [T, Hkv, Dv] of the chunks; block_tables [C, M] int32,
    cu_chunk_lens [C + 1], history_lens [C], rings [C] int32; `max_chunk` and `max_history` are host numbers.
    `out` takes the result; rows outside all chunks are left alone.
    """
    dtype = working_dtype(query.dtype)
    if out is None:
        out = query.new_zeros(query.shape[0], query.shape[1], layout.value_dim)
    starts = cu_chunk_lens.tolist()
    lens = [b - a for a, b in pairwise(starts)]
    histories = history_lens.tolist() if max_history else [0] * len(lens)
    for chunks in _alike(lens, histories):
        index = torch.tensor(chunks, device=query.device)
        length = max(lens[i] for i in chunks)
        inside = torch.arange(length, device=query.device)
        chunk_lens = (cu_chunk_lens[1:] - cu_chunk_lens[:-1])[index, None].long()
        rows = cu_chunk_lens[index, None].long() + torch.minimum(inside, chunk_lens - 1)
        q, k, v = (x[rows].transpose(1, 2).to(dtype) for x in (query, key, value))
        group = _Prefill(pages, layout, scale, window, softcap, sinks, raw, bias)
        longest = max(histories[i] for i in chunks)
        if longest:
            ring = None if rings is None else rings[index]
            history = history_lens[index, None].long()
            result = group.with_history(q, k, v, block_tables[index], chunk_lens, history, longest, ring)
        else:
            result = group.fresh(q, k, v)
        real = inside < chunk_lens
        out[rows[real]] = result.transpose(1, 2)[real].to(query.dtype)
    return out


def _alike(lens: list[int], histories: list[int]) -> Iterator[list[int]]:
    """Chunks in groups of like length and history, so that padding them to the longest wastes little."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (length, history) in enumerate(zip(lens, histories, strict=True)):
        if length:
            groups[length.bit_length(), history.bit_length()].append(i)
    yield from groups.values()


class _Prefill(_Attention):
    """Attention of prompt chunks [C, H, L, D], padded to one length, in the working dtype."""

    def fresh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """No earlier tokens. Rows beyond a chunk's end see only real keys or are never read."""
        length = q.shape[2]
        if self.sinks is None and not self.softcap and (not self.window or self.window >= length):
            return _sdpa(q, k, v, self.scale, None)
        position = torch.arange(length, device=q.device)
        return self._blocks(
            q, k, v, lambda t: _in_window(position, t[..., None], self.window), position[None]
        )

    def with_history(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: Tensor,
        chunk_lens: Tensor,
        history: Tensor,
        longest: int,
        rings: Tensor | None,
    ) -> Tensor:
        """Keys are earlier tokens, the chunk, the raw window, all in the basis that pages are stored in."""
        layout, window, raw = self.layout, self.window, self.raw
        width, first = _width(history[:, 0], longest, window, layout.page_size)
        ids, positions = _reach(tables, first, width, layout.page_size)
        valid = (positions < history) & (positions > history - window if window else True)
        old = _gather(self.pages, ids, valid, layout, q.dtype)
        if self.bias is not None:
            old = old[0] + self._constant(positions, q.dtype), old[1]
        old_keys, old_values = (x.transpose(1, 2).flatten(2, 3) for x in old)
        if layout.key.rotated:
            q, k = hadamard(q), hadamard(k)
        if layout.value.rotated:
            v = hadamard(v)
        inside = torch.arange(q.shape[2], device=q.device)
        keys, values = [old_keys, k], [old_values, v]
        if raw is not None:
            assert rings is not None, "a raw window needs the requests' rows in it"
            raw_keys, raw_values, raw_positions = _read_raw(raw, rings, history[:, 0] - 1, q.dtype)
            keys.append(hadamard(raw_keys) if layout.key.rotated else raw_keys)
            values.append(hadamard(raw_values) if layout.value.rotated else raw_values)

        def mask(t: Tensor) -> Tensor:
            """t [C, rows] -> [C, rows, S]"""
            t = t[..., None]
            old = valid[:, None] & _in_window(positions[:, None], t, window)
            chunk = _in_window(history[..., None] + inside, t, window) & (inside < chunk_lens)[:, None]
            parts = [old & _through_codec(positions[:, None], t, raw), chunk]
            if raw is not None:
                p = raw_positions[:, None]
                parts.append((p >= 0) & _in_window(p, t, window) & ~_through_codec(p, t, raw))
            return torch.cat(parts, -1)

        out = self._blocks(q, torch.cat(keys, 2), torch.cat(values, 2), mask, history + inside)
        return hadamard(out) if layout.value.rotated else out

    def _blocks(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Callable[[Tensor], Tensor], position: Tensor
    ) -> Tensor:
        """Query blocks one after another, so that masks and scores stay small; `position` [C or 1, L]."""
        direct = self.sinks is not None or bool(self.softcap)
        per_row = q.shape[0] * k.shape[2] * (q.shape[1] if direct else 1)
        rows = max(1, _PREFILL_ELEMENTS // per_row)
        out = []
        for start in range(0, q.shape[2], rows):
            block, t = q[:, :, start : start + rows], position[:, start : start + rows]
            seen = mask(t)
            seen = seen if seen.dim() == 3 else seen[None]
            if direct:
                out.append(self._direct(block, k, v, seen))
            else:
                out.append(_sdpa(block, k, v, self.scale, seen[:, None]))
        return torch.cat(out, 2)

    def _direct(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Sinks and softcap, which torch's attention has not."""
        heads = k.shape[1]
        grouped = q.unflatten(1, (heads, -1)) * self.scale
        scores = _cap(grouped @ k[:, :, None].mT, self.softcap)
        scores = scores.masked_fill_(~seen[:, None, None], -torch.inf)
        sinks = None if self.sinks is None else self.sinks.to(q.dtype).view(heads, -1, 1, 1)
        weights, total = _softmax(scores, sinks)
        return ((weights @ v[:, :, None]) / total).flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """torch's attention, causal where there is no mask (True: seen)."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


# --- experts ------------------------------------------------------------------------------------------------


def route(logits: Tensor, top_k: int, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Softmax over experts, then the most likely ones: logits [T, E] -> weights [T, K] `dtype`, index [T, K].

    Largest first, of equal ones the lower index (int64); `normalize` makes the weights of a token sum to 1.
    """
    probabilities = logits.to(working_dtype(logits.dtype)).softmax(-1)
    index = logits.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weights = probabilities.gather(1, index)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(dtype), index


def experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """Σ_k w_k · down_e(silu(gate_e x) · up_e x) over the experts e that each token chose.

    hidden [T, H], top_k_index and top_k_weights [T, K], gate_up [E, 2I, H], down [E, H, I] -> [T, H]. Rows of
    tokens that are not `valid` [T] bool (None: all are) hold anything. Gathers the weights of every pair.
    """
    dtype = working_dtype(hidden.dtype)
    x, weights = hidden.to(dtype), top_k_weights.to(dtype)
    gate, up = torch.einsum("th,tkih->tki", x, gate_up.to(dtype)[top_k_index]).chunk(2, -1)
    parts = torch.einsum("tki,tkhi->tkh", F.silu(gate) * up, down.to(dtype)[top_k_index])
    return (parts * weights[..., None]).sum(1).to(hidden.dtype)
