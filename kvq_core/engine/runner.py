"""Runs one step: swaps, inputs, the model's forward, sampling; queued, without waiting for the device.

On every rank alike; the leader alone plans the step (`plan`) and samples, and the others get its tokens.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvq_core.attention import StepContext, forward_context
from kvq_core.batch import Batch, GroupTables
from kvq_core.cache.paged import PagedCache
from kvq_core.engine.fidelity import Fidelity
from kvq_core.engine.graphs import ANY, StepGraphs
from kvq_core.engine.inputs import Sizes, StepInputs, pack
from kvq_core.engine.logprobs import TokenLogprob, log_probabilities, to_list
from kvq_core.engine.sampler import Draw, sample
from kvq_core.engine.scheduler import Step
from kvq_core.engine.work import Work
from kvq_core.errors import KvqError
from kvq_core.models import LoadedModel

log = logging.getLogger("kvq")


@dataclass
class PendingTokens:
    """Sampled tokens on their way to the host."""

    tokens: Tensor
    wait: Callable[[], None] | None
    """Waits until they are there."""
    asked: dict[int, int] = field(default_factory=dict)
    """Index of a token that comes with logprobs -> how many of the likeliest come along."""
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None

    def get(self) -> list[int]:
        """Wait for the device and return the tokens."""
        if self.wait is not None:
            self.wait()
        return self.tokens.tolist()

    def get_logprobs(self) -> dict[int, TokenLogprob]:
        """By index of the token; after `get`."""
        if self.logprobs is None:
            return {}
        return dict(zip(self.asked, to_list(list(self.asked.values()), *self.logprobs), strict=True))


class ModelRunner:
    """A model, its cache, and the device state that outlives a step: the latest token of every row."""

    def __init__(
        self,
        model: LoadedModel,
        cache: PagedCache,
        seed: int,
        *,
        token_budget: int,
        fidelity: Fidelity | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.seed = seed
        self.group = model.group
        self.device = cache.device
        self.padding_row = cache.plan.max_num_seqs
        self.last_tokens = torch.zeros(self.padding_row + 1, dtype=torch.int64, device=self.device)
        self.on_logits: Callable[[list[int], Tensor], None] | None = None
        """Called with request ids and their logits before they are sampled."""
        self.fidelity = fidelity
        self._checked = False
        self._dropped: list[int] = []
        self.graphs: StepGraphs | None = None
        if self.device.type == "cuda":
            self.graphs = StepGraphs(self._forward, self.padding_row, token_budget, self.device)

    def plan(self, step: Step) -> Work:
        """What every rank does in a step, in plain data; takes note of all that changed since the last."""
        exact = Sizes(len(step.decodes), step.num_tokens, len(step.chunks), any(c.start for c in step.chunks))
        sizes = self.graphs.fit(exact) if self.graphs is not None else None
        policy, blocks = self.cache.plan.policy, self.cache.blocks
        packed = None
        if step.num_tokens:
            packed = pack(step, sizes or exact, self.padding_row, policy.sink, policy.recent)
        dropped, self._dropped = self._dropped, []
        return Work(
            dropped=dropped,
            swap_out=[(swap.request.id, swap.row, swap.pages) for swap in step.swap_out],
            swap_in=[(swap.request.id, swap.row, swap.pages) for swap in step.swap_in],
            raw_in=[(chunk.key, row) for chunk, row in step.raw_in],
            evicted=blocks.take_evicted(),
            tables=blocks.take_dirty() if packed is not None else [],
            forced=np.array([list(step.forced), list(step.forced.values())], dtype=np.int64),
            packed=packed,
            sizes=sizes or exact,
            fits_graph=sizes is not None,
            max_chunk=max((c.end - c.start for c in step.chunks), default=0),
            max_history=max((c.start for c in step.chunks), default=0),
            max_context=max(step.context_lens, default=0),
            measured=packed is not None and self.fidelity is not None and self.fidelity.plan(step),
            num_sampled=len(step.sampled),
            raw_out=[(c.key, row) for row, c in step.raw_out if blocks.prefix.get(c.key) is c],
        )

    @torch.inference_mode()
    def run(self, work: Work, step: Step | None = None) -> PendingTokens:
        """Queue a step; its tokens come later, in the order of `step.sampled`. The leader gives a `step`."""
        for request in work.dropped:
            self.cache.drop_swapped(request)
        for request, row, pages in work.swap_out:
            self.cache.swap_out(request, row, pages)
        for request, row, pages in work.swap_in:
            self.cache.swap_in(request, row, pages)
        for key, row in work.raw_in:
            self.cache.raw_in(key, row)
        self.cache.forget(work.evicted)
        if work.packed is None:
            return PendingTokens(self.last_tokens[:0], None)
        self.cache.set_tables(work.tables)
        if work.forced.size:
            rows, tokens = self._upload(work.forced)
            self.last_tokens.index_copy_(0, rows, tokens)
        if self.graphs is not None and work.fits_graph:
            inputs, logits = self.graphs.run(work.sizes, self._pinned(work.packed), eager=work.measured)
        else:
            inputs = StepInputs.unpack(self._upload(work.packed), work.sizes)
            # a graph's bound: the decodes' kernels are then those that were compiled for graphs
            longest = work.max_context if self.graphs is None else ANY
            logits = self._forward(inputs, work.max_chunk, work.max_history, longest, padded=False)
        for key, row in work.raw_out:
            self.cache.raw_out(key, row)
        if work.measured:
            assert self.fidelity is not None
            self.fidelity.finish()
        if step is not None:
            return self._sample(step, logits, inputs)
        if work.num_sampled:
            self._take(self.last_tokens.new_empty(work.num_sampled), inputs)
        return PendingTokens(self.last_tokens[:0], None)

    def drop_swapped(self, request: int) -> None:
        """Forget the pages of a swapped request, here now and on other ranks with the next step."""
        self.cache.drop_swapped(request)
        self._dropped.append(request)

    @property
    def has_graphs(self) -> bool:
        return self.graphs is not None and self.graphs.is_captured

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Capture the CUDA graphs, largest first."""
        if self.graphs is not None:
            with torch.inference_mode():
                self.graphs.capture(progress)

    def without_graphs(self, reason: Exception) -> None:
        """Run every step eagerly from now on, with a warning."""
        first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        log.warning("%s: steps run without CUDA graphs, because capture failed: %s", self.model.name, first)
        if self.graphs is not None:
            self.graphs.drop()

    def _sample(self, step: Step, logits: Tensor, inputs: StepInputs) -> PendingTokens:
        """Sample the rows of logits [B + C, V] that end in a new token."""
        requests = step.sampled
        count = len(requests)
        if not count:
            return PendingTokens(self.last_tokens[:0].cpu(), None)
        chosen = (
            logits[:count] if step.sampled_decodes == list(range(count)) else logits[inputs.sampled[:count]]
        )
        if self.on_logits is not None:
            self.on_logits([r.id for r in requests], chosen)
        draws = [
            Draw(r.params, self.seed + r.id if r.params.seed is None else r.params.seed, r.scheduled_outputs)
            for r in requests
        ]
        tokens = sample(chosen, draws)
        self._take(tokens, inputs)
        asked = {i: r.params.logprobs for i, r in enumerate(requests) if r.params.logprobs is not None}
        logprobs = None
        if asked:
            rows = self._upload(np.array(list(asked), dtype=np.int64))
            found = log_probabilities(chosen[rows], tokens[rows], max(asked.values()))
            logprobs = self._to_host(found[0]), self._to_host(found[1]), self._to_host(found[2])
        if self.device.type == "cpu":
            return PendingTokens(tokens, None, asked, logprobs)
        host = self._to_host(tokens)
        event = torch.cuda.Event()
        event.record()
        return PendingTokens(host, lambda: self.group.wait(event), asked, logprobs)

    def _take(self, tokens: Tensor, inputs: StepInputs) -> None:
        """Make the leader's tokens [R] the latest of their rows, on every rank."""
        self.last_tokens.index_copy_(0, inputs.sampled_rows[: tokens.shape[0]], self.group.share(tokens))

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _forward(
        self, inputs: StepInputs, max_chunk: int, max_history: int, max_context: int, *, padded: bool
    ) -> Tensor:
        """Logits [B + C, V] of every decode and of every chunk's last token; works on the device alone."""
        batch, ids = self._batch(inputs, max_chunk, max_history, max_context, padded)
        valid = torch.arange(ids.shape[0], device=self.device) < inputs.boundaries[-1] if padded else None
        keep = torch.cat([torch.arange(batch.num_decodes, device=self.device), inputs.ends])
        context = StepContext(batch, self.cache, valid, None if self._checked else {}, self.fidelity)
        with forward_context(self.model.model, context):
            output = self.model.model(
                input_ids=ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=keep,
                kvq=context,
            )
        if not self._checked:
            self._check(context.stored or {}, ids.shape[0])
        return output.logits[0]

    def _batch(
        self, inputs: StepInputs, max_chunk: int, max_history: int, max_context: int, padded: bool
    ) -> tuple[Batch, Tensor]:
        """The batch of a step and its input tokens [T]."""
        size = self.cache.plan.page_size
        decodes = inputs.decode_rows.shape[0]
        start = 0 if padded else decodes
        rows, positions = inputs.token_rows, inputs.positions
        groups = []
        for table in self.cache.tables:
            slots = table[rows, positions // size].long() * size + positions % size
            groups.append(GroupTables(slots, table[inputs.decode_rows], table[inputs.chunk_rows]))
        batch = Batch(
            num_decodes=decodes,
            chunk_start=start,
            positions=positions,
            context_lens=inputs.context_lens.int(),
            cu_chunk_lens=(inputs.boundaries - start).int(),
            history_lens=inputs.history_lens.int(),
            max_chunk=max_chunk,
            max_history=max_history,
            max_context=max_context,
            groups=groups,
            decode_rings=inputs.decode_rows.int(),
            prefill_rings=inputs.chunk_rows.int(),
            token_rings=inputs.token_rows.int(),
            raw_keep=inputs.raw_keep.bool(),
        )
        return batch, torch.where(inputs.ids < 0, self.last_tokens[rows], inputs.ids)

    def _check(self, stored: dict[int, int], tokens: int) -> None:
        """Assert on the first forward that every layer went through the cache, once, with every token."""
        if stored != dict.fromkeys(range(len(self.cache.layers)), tokens):
            raise KvqError(
                f"{self.model.name}: not every layer uses the cache"
                f" (tokens stored by layer: {stored}, expected {tokens} in each of {len(self.cache.layers)})",
                "this architecture keeps an attention of its own; it can't run under kvq",
            )
        self._checked = True

    def _pinned(self, array: np.ndarray) -> Tensor:
        host = torch.from_numpy(array)
        return host if self.device.type == "cpu" else host.pin_memory()

    def _upload(self, array: np.ndarray) -> Tensor:
        return self._pinned(array).to(self.device, non_blocking=True)
