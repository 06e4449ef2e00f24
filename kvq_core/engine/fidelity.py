"""Is it right? For a share of decode steps, attention through the codec against that over raw values.

While it is on, the first rows of the batch keep a shadow: keys and values of their latest tokens in the
model's dtype, in rings like those of a policy's recent tokens. On a sampled step every layer attends to that
window twice, by the same kernel: as decoding does, and from the shadow. What differs is what the codec, or a
fault, does to the layer's output. Sampled steps run without CUDA graphs.
"""

import logging
import random
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvq_core.batch import Batch
from kvq_core.cache.paged import LayerCache, PagedCache
from kvq_core.engine.scheduler import Step
from kvq_kernels import dispatch
from kvq_kernels.layout import RawWindow

ROWS = 4
"""Requests that have a shadow at a time."""
TOKENS = 128
"""Tokens of the window beyond the policy's own recent ones, which are never read through the codec."""
MEMORY = 256
"""Sampled steps that the running median looks back on."""
ENOUGH = 8
"""Sampled steps before anything is called a jump."""
JUMP = 3.0
"""An error of the pages of more than this many running medians is a jump …"""
FLOOR = 0.02
"""… unless it is smaller than this: rounding makes small errors jump as well."""
LARGEST = 1e6
"""What counts as the error of an output that is not a number."""
log = logging.getLogger("kvq")


def _memory() -> deque[float]:
    return deque(maxlen=MEMORY)


def _median(values: Collection[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


@dataclass
class LayerErrors:
    """Relative errors of a layer's attention output, ‖codec - raw‖ / ‖raw‖, requests' mean of each step."""

    recent: deque[float] = field(default_factory=_memory)
    pages: deque[float] = field(default_factory=_memory)
    """The same without the policy's unquantized tokens, which hide most of it while a context is short."""
    total: float = 0.0
    worst: float = 0.0
    """Of any request at any step."""

    @property
    def median(self) -> float:
        return _median(self.recent)


class Fidelity:
    """Samples steps, holds the shadow, and keeps count; one for each engine that has `fidelity` above 0."""

    def __init__(self, cache: PagedCache, share: float, seed: int, dtype: torch.dtype) -> None:
        self.share = share
        self.rows = min(ROWS, cache.plan.max_num_seqs)
        self.tokens = cache.plan.policy.recent + TOKENS
        self.shadows = [self._shadow(layer, dtype) for layer in cache.layers]
        self._random = random.Random(seed)
        self._from = [0] * self.rows
        """The first position of each row's request that the shadow has seen."""
        self._chosen: Tensor | None = None
        self._found: list[Tensor] = []
        self.reset()

    def _shadow(self, layer: LayerCache, dtype: torch.dtype) -> RawWindow:
        """One row more than requests that have one: what the others write."""
        shape, layout = (self.rows + 1, self.tokens, layer.layout.num_kv_heads), layer.layout
        keys, values = (
            torch.zeros(*shape, dim, dtype=dtype, device=layer.pages.device)
            for dim in (layout.key_dim, layout.value_dim)
        )
        return RawWindow(0, self.tokens, keys, values)

    def reset(self) -> None:
        """Forget what was measured; shadows stay."""
        self.layers = [LayerErrors() for _ in self.shadows]
        self.steps = self.jumps = 0

    def plan(self, step: Step) -> bool:
        """Follow which request each row holds; whether this step is to be measured."""
        for swap in step.swap_in:
            if swap.row < self.rows:
                self._from[swap.row] = swap.request.computed
        for chunk in step.chunks:
            if chunk.start == chunk.request.begin and chunk.request.row < self.rows:
                self._from[chunk.request.row] = chunk.start  # its first: what precedes it others have written
        wanted = bool(step.decodes) and self._random.random() < self.share
        chosen = [
            index
            for index, (request, length) in enumerate(zip(step.decodes, step.context_lens, strict=True))
            if request.row < self.rows and self._from[request.row] <= max(0, length - self.tokens)
        ]
        self._found = []
        self._chosen = torch.tensor(chosen, device=self.shadows[0].keys.device) if wanted and chosen else None
        return self._chosen is not None

    def store(self, layer: int, key: Tensor, value: Tensor, batch: Batch) -> None:
        """Put a step's keys and values [T, Hkv, D] into the shadow; safe in a CUDA graph."""
        shadow, decodes = self.shadows[layer], batch.num_decodes
        if decodes:
            rings = batch.decode_rings.clamp(max=self.rows)
            dispatch.store_raw(key[:decodes], value[:decodes], batch.positions[:decodes], rings, shadow, None)
        start = batch.chunk_start
        if batch.history_lens.shape[0]:  # of a decode that is among them, the same is written again
            positions, rings = batch.positions[start:], batch.token_rings[start:].clamp(max=self.rows)
            ends = batch.history_lens + batch.cu_chunk_lens[1:] - batch.cu_chunk_lens[:-1]
            tokens = torch.arange(positions.shape[0], device=positions.device, dtype=torch.int32)
            chunk = torch.searchsorted(batch.cu_chunk_lens[1:].contiguous(), tokens, right=True)
            keep = positions >= ends[chunk.clamp(max=ends.shape[0] - 1)] - self.tokens
            dispatch.store_raw(key[start:], value[start:], positions, rings, shadow, keep)

    def compare(
        self, layer: int, query: Tensor, cache: PagedCache, batch: Batch, options: dict[str, Any]
    ) -> None:
        """query [B, Hq, D] of the decodes: attend twice to the window, where this step is measured."""
        if self._chosen is None:
            return
        held = cache.layers[layer]
        chosen, window = self._chosen, min(self.tokens, held.window or self.tokens)
        tables, lens = batch.groups[held.group].decode_tables[chosen], batch.context_lens[chosen]
        q, rings = query[chosen], batch.decode_rings[chosen]

        def attend(raw: RawWindow | None) -> Tensor:
            settings = {**options, "window": window, "raw": raw, "rings": rings}
            settings["max_context"] = batch.max_context
            return dispatch.paged_decode(q, held.pages, tables, lens, held.layout, **settings).float()

        exact = attend(self.shadows[layer])
        norm = exact.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)

        def off(output: Tensor) -> Tensor:
            error = (output - exact).flatten(1).norm(dim=1) / norm
            return error.nan_to_num(LARGEST, LARGEST).clamp(max=LARGEST)

        error = off(attend(held.raw))
        self._found.append(torch.stack((error, error if held.raw is None else off(attend(None)))))

    def finish(self) -> None:
        """Take the errors of a measured step; one warning for all layers that jumped."""
        self.steps += 1
        jumps: list[tuple[int, float, float]] = []
        for index, (errors, of_pages) in enumerate(torch.stack(self._found).tolist()):
            layer, worst = self.layers[index], max(of_pages)
            usual = _median(layer.pages)
            if len(layer.pages) >= ENOUGH and worst > max(FLOOR, JUMP * usual):
                jumps.append((index, worst, usual))
            layer.pages.append(sum(of_pages) / len(of_pages))
            layer.recent.append(sum(errors) / len(errors))
            layer.total += layer.recent[-1]
            layer.worst = max(layer.worst, *errors)
        self.jumps += len(jumps)
        if jumps:
            text = "fidelity: attention of layer %d is off by %.3g, usually by %.3g%s: is its cache damaged?"
            log.warning(text, *jumps[0], f" (and {len(jumps) - 1} more layers)" if jumps[1:] else "")
        self._chosen, self._found = None, []

    def summary(self) -> dict[str, Any]:
        """The `kv.fidelity` of a run record; errors by layer."""
        return {
            "share": self.share,
            "window": self.tokens,
            "steps": self.steps,
            "mean_errors": [layer.total / max(1, self.steps) for layer in self.layers],
            "worst_errors": [layer.worst for layer in self.layers],
            "jumps": self.jumps,
        }
