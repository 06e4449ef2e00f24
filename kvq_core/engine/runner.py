"""Runs one step: swaps, inputs, the model's forward, sampling; queued, without waiting for the device."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvq_core.attention import StepContext
from kvq_core.batch import Batch, GroupTables
from kvq_core.cache.paged import PagedCache
from kvq_core.engine.graphs import DecodeGraphs
from kvq_core.engine.sampler import Draw, sample
from kvq_core.engine.scheduler import Step
from kvq_core.errors import KvqError
from kvq_core.models import LoadedModel


@dataclass
class PendingTokens:
    """Sampled tokens on their way to the host."""

    tokens: Tensor
    event: torch.cuda.Event | None

    def get(self) -> list[int]:
        """Wait for the device and return the tokens."""
        if self.event is not None:
            self.event.synchronize()
        return self.tokens.tolist()


class ModelRunner:
    """A model, its cache, and the device state that outlives a step: the latest token of every row."""

    def __init__(self, model: LoadedModel, cache: PagedCache, seed: int, use_graphs: bool) -> None:
        self.model = model
        self.cache = cache
        self.seed = seed
        self.device = cache.device
        self.padding_row = cache.plan.max_num_seqs
        self.last_tokens = torch.zeros(self.padding_row + 1, dtype=torch.int64, device=self.device)
        self.on_logits: Callable[[list[int], Tensor], None] | None = None
        self._checked = False
        self.graphs: DecodeGraphs | None = None
        if use_graphs:
            self.graphs = DecodeGraphs(self._decode_batch, self._forward, self.padding_row, self.device)

    @torch.inference_mode()
    def run(self, step: Step) -> PendingTokens:
        for swap in step.swap_out:
            self.cache.swap_out(swap.request.id, swap.row, swap.pages)
        for swap in step.swap_in:
            self.cache.swap_in(swap.request.id, swap.row, swap.pages)
        if not step.num_tokens:
            return PendingTokens(self.last_tokens[:0], None)
        self.cache.sync_tables()
        if step.forced:
            rows, tokens = self._upload(list(step.forced), list(step.forced.values()))
            self.last_tokens.index_copy_(0, rows, tokens)
        rows = [r.row for r in step.decodes] + [c.request.row for c in step.chunks]
        if self.graphs is not None and not step.chunks:
            device_rows, context_lens = self._upload(rows, step.context_lens)
            logits = self.graphs.replay(device_rows, context_lens, max(step.context_lens))
        else:
            logits, device_rows = self._eager(step, rows)
        return self._sample(step, logits, device_rows)

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Capture the decode graphs, largest first."""
        if self.graphs is not None:
            with torch.inference_mode():
                self.graphs.capture(progress)

    def _sample(self, step: Step, logits: Tensor, rows: Tensor) -> PendingTokens:
        """logits [decodes + chunks, V]; rows [decodes + chunks] on the device."""
        decodes = len(step.decodes)
        sampled = step.sampled_decodes + [decodes + i for i in step.sampled_chunks]
        requests = step.sampled
        if len(sampled) < logits.shape[0]:
            (index,) = self._upload(sampled)
            logits, rows = logits[index], rows[index]
        if self.on_logits is not None:
            self.on_logits([r.id for r in requests], logits)
        draws = [
            Draw(r.params, self.seed + r.id if r.params.seed is None else r.params.seed, r.scheduled_outputs)
            for r in requests
        ]
        tokens = sample(logits, draws)
        self.last_tokens.index_copy_(0, rows, tokens)
        if self.device.type == "cpu":
            return PendingTokens(tokens, None)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return PendingTokens(host, event)

    def _eager(self, step: Step, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Decodes and chunks in one forward; logits of every decode and every chunk's end, and all rows."""
        decodes, chunks = len(step.decodes), step.chunks
        lengths = np.array([c.end - c.start for c in chunks], dtype=np.int64)
        starts = np.array([c.start for c in chunks], dtype=np.int64)
        boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        total = int(boundaries[-1])
        chunk_of = np.repeat(np.arange(len(chunks)), lengths)
        positions = np.arange(total) - boundaries[chunk_of] + starts[chunk_of]
        token_rows = np.array(rows[decodes:], dtype=np.int64)[chunk_of]
        ids = [token for c in chunks for token in c.request.tokens(c.start, c.end)]
        slots = [self.cache.slots(g, token_rows, positions) for g in range(len(self.cache.tables))]
        policy = self.cache.plan.policy
        ends = (starts + lengths)[chunk_of]
        keep = (positions < policy.sink) | (positions >= ends - policy.recent)
        last = np.concatenate([np.arange(decodes), decodes + boundaries[1:] - 1])
        up = self._upload(
            rows, step.context_lens, ids, positions, token_rows, keep, boundaries, starts, last, *slots
        )
        device_rows, context_lens, ids, positions, token_rings, keep, boundaries, history, last, *slots = up
        batch, decode_ids = self._decode_batch(
            device_rows[:decodes], context_lens, max(step.context_lens, default=0)
        )
        batch.positions = torch.cat([batch.positions, positions])
        batch.cu_chunk_lens = boundaries.int()
        batch.history_lens = history.int()
        batch.max_chunk = int(lengths.max(initial=0))
        batch.max_history = int(starts.max(initial=0))
        batch.prefill_rings = device_rows[decodes:].int()
        batch.token_rings = token_rings.int()
        batch.raw_keep = keep.bool()
        for tables, table, chunk_slots in zip(batch.groups, self.cache.tables, slots, strict=True):
            tables.slots = torch.cat([tables.slots, chunk_slots])
            tables.prefill_tables = table[device_rows[decodes:]]
        return self._forward(batch, torch.cat([decode_ids, ids]), last), device_rows

    def _decode_batch(self, rows: Tensor, context_lens: Tensor, max_context: int) -> tuple[Batch, Tensor]:
        """A batch of decodes alone and its input tokens, computed on the device so that graphs can hold it.

        rows [B] int64, context_lens [B] int64; a context of 0 marks padding, which goes to the trash page.
        """
        positions = (context_lens - 1).clamp(min=0)
        size = self.cache.plan.page_size
        groups = []
        for table in self.cache.tables:
            tables = table[rows]
            pages = tables.gather(1, (positions // size)[:, None])[:, 0].long()
            groups.append(GroupTables(pages * size + positions % size, tables, tables[:0]))
        empty = rows[:0].int()
        batch = Batch(
            num_decodes=rows.shape[0],
            positions=positions,
            context_lens=context_lens.int(),
            cu_chunk_lens=torch.zeros(1, dtype=torch.int32, device=self.device),
            history_lens=empty,
            max_chunk=0,
            max_history=0,
            max_context=max_context,
            groups=groups,
            decode_rings=rows.int(),
            prefill_rings=empty,
            token_rings=empty,
            raw_keep=empty.bool(),
        )
        return batch, self.last_tokens[rows]

    def _forward(self, batch: Batch, ids: Tensor, logits_to_keep: Tensor | None) -> Tensor:
        """ids [T] -> logits [R, V] of the tokens `logits_to_keep` [R] (None: of all)."""
        context = StepContext(batch, self.cache, None if self._checked else {})
        output = self.model.model(
            input_ids=ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=0 if logits_to_keep is None else logits_to_keep,
            kvq=context,
        )
        if not self._checked:
            self._check(context.stored or {}, ids.shape[0])
        return output.logits[0]

    def _check(self, stored: dict[int, int], tokens: int) -> None:
        """Assert on the first forward that every layer went through the cache, once, with every token."""
        if stored != dict.fromkeys(range(len(self.cache.layers)), tokens):
            raise KvqError(
                f"{self.model.name}: not every layer uses the cache"
                f" (tokens stored by layer: {stored}, expected {tokens} in each of {len(self.cache.layers)})",
                "this architecture keeps an attention of its own; it can't run under kvq",
            )
        self._checked = True

    def _upload(self, *arrays: "list[int] | np.ndarray") -> list[Tensor]:
        """Integers to the device, int64, in one copy."""
        parts = [np.asarray(a, dtype=np.int64) for a in arrays]
        host = torch.from_numpy(np.concatenate(parts))
        if self.device.type != "cpu":
            host = host.pin_memory().to(self.device, non_blocking=True)
        return list(host.split([len(p) for p in parts]))
