"""Runs one step: swaps, inputs, the model's forward, sampling; queued, without waiting for the device."""

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
from kvq_core.engine.graphs import StepGraphs
from kvq_core.engine.inputs import Sizes, StepInputs, pack
from kvq_core.engine.logprobs import TokenLogprob, log_probabilities, to_list
from kvq_core.engine.sampler import Draw, sample
from kvq_core.engine.scheduler import Step
from kvq_core.errors import KvqError
from kvq_core.models import LoadedModel

log = logging.getLogger("kvq")


@dataclass
class PendingTokens:
    """Sampled tokens on their way to the host."""

    tokens: Tensor
    event: torch.cuda.Event | None
    asked: dict[int, int] = field(default_factory=dict)
    """Index of a token that comes with logprobs -> how many of the likeliest come along."""
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None

    def get(self) -> list[int]:
        """Wait for the device and return the tokens."""
        if self.event is not None:
            self.event.synchronize()
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
        self.device = cache.device
        self.padding_row = cache.plan.max_num_seqs
        self.last_tokens = torch.zeros(self.padding_row + 1, dtype=torch.int64, device=self.device)
        self.on_logits: Callable[[list[int], Tensor], None] | None = None
        """Called with request ids and their logits before they are sampled."""
        self.fidelity = fidelity
        self._checked = False
        self.graphs: StepGraphs | None = None
        if self.device.type == "cuda":
            self.graphs = StepGraphs(self._forward, self.padding_row, token_budget, self.device)

    @torch.inference_mode()
    def run(self, step: Step) -> PendingTokens:
        """Queue a step; its tokens come later, in the order of `step.sampled`."""
        for swap in step.swap_out:
            self.cache.swap_out(swap.request.id, swap.row, swap.pages)
        for swap in step.swap_in:
            self.cache.swap_in(swap.request.id, swap.row, swap.pages)
        for chunk, row in step.raw_in:
            self.cache.raw_in(chunk, row)
        if not step.num_tokens:
            return PendingTokens(self.last_tokens[:0], None)
        self.cache.sync_tables()
        if step.forced:
            rows, tokens = self._upload(
                np.array([list(step.forced), list(step.forced.values())], dtype=np.int64)
            )
            self.last_tokens.index_copy_(0, rows, tokens)
        exact = Sizes(len(step.decodes), step.num_tokens - len(step.decodes), len(step.chunks))
        sizes = self.graphs.fit(exact) if self.graphs is not None else None
        policy = self.cache.plan.policy
        packed = pack(step, sizes or exact, self.padding_row, policy.sink, policy.recent)
        measured = self.fidelity is not None and self.fidelity.plan(step)
        if self.graphs is not None and sizes is not None:
            inputs, logits = self.graphs.run(sizes, self._pinned(packed), eager=measured)
        else:
            inputs = StepInputs.unpack(self._upload(packed), exact)
            longest = max((c.end - c.start for c in step.chunks), default=0)
            history = max((c.start for c in step.chunks), default=0)
            logits = self._forward(inputs, longest, history, max(step.context_lens, default=0), padded=False)
        for row, chunk in step.raw_out:
            self.cache.raw_out(row, chunk)
        if measured:
            assert self.fidelity is not None
            self.fidelity.finish()
        return self._sample(step, logits, inputs)

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
        self.last_tokens.index_copy_(0, inputs.sampled_rows[:count], tokens)
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
        return PendingTokens(host, event, asked, logprobs)

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _forward(
        self, inputs: StepInputs, max_chunk: int, max_history: int, max_context: int, *, padded: bool
    ) -> Tensor:
        """Logits [B + C, V] of every decode and of every chunk's last token; works on the device alone."""
        batch, ids = self._batch(inputs, max_chunk, max_history, max_context)
        decodes = batch.num_decodes
        valid = None
        if padded:
            tokens = torch.arange(inputs.ids.shape[0], device=self.device)
            valid = torch.cat([inputs.context_lens > 0, tokens < inputs.boundaries[-1]])
        keep = torch.cat([torch.arange(decodes, device=self.device), inputs.ends + decodes])
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
        self, inputs: StepInputs, max_chunk: int, max_history: int, max_context: int
    ) -> tuple[Batch, Tensor]:
        """The batch of a step and its input tokens [B + P]."""
        size = self.cache.plan.page_size
        decodes = inputs.decode_rows.shape[0]
        rows = torch.cat([inputs.decode_rows, inputs.token_rows])
        positions = torch.cat([(inputs.context_lens - 1).clamp(min=0), inputs.positions])
        groups = []
        for table in self.cache.tables:
            slots = table[rows, positions // size].long() * size + positions % size
            groups.append(GroupTables(slots, table[inputs.decode_rows], table[inputs.chunk_rows]))
        batch = Batch(
            num_decodes=decodes,
            positions=positions,
            context_lens=inputs.context_lens.int(),
            cu_chunk_lens=inputs.boundaries.int(),
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
        return batch, torch.cat([self.last_tokens[inputs.decode_rows], inputs.ids])

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
