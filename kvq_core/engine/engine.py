"""The engine: schedule, run, update."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from typing import Any

from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.engine.request import Request, RequestOutput, Status
from kvq_core.engine.runner import PendingTokens
from kvq_core.engine.scheduler import Scheduler, SchedulerConfig, Step
from kvq_core.engine.setup import set_up, tear_down
from kvq_core.errors import KvqError, PromptTooLong
from kvq_core.models import LoadedModel

_numbers = count()
"""Names engines to other ranks."""


@dataclass(frozen=True)
class Load:
    """Requests and pages of the cache at one moment, and what happened so far."""

    running: int
    waiting: int
    """Preempted requests among them."""
    pages_used: int
    """Those of running requests; what several share counts once."""
    pages_cached: int
    """Kept for prompts to come, and free for whoever needs them."""
    pages: int
    preemptions: int
    prompt_tokens: int
    """Of the prompts that were admitted."""
    cached_tokens: int
    """Those among them that were found in the cache."""


class Engine:
    """Generates for many requests at a time on one model with a quantized, paged KV cache.

    `config` is the resolved configuration: nothing in it is "auto" any more.
    Raises `KvqError` where the cache does not fit or a codec can't take the model's head dim.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model = model
        self.group = model.group
        self._number = next(_numbers)
        with self.group.together():
            self.group.tell("start", self._number, model.number, config)
            device = set_up(model, config, progress)
        self.config, self.plan, self.cache = device.config, device.plan, device.cache
        self.runner, self.fidelity = device.runner, device.fidelity
        assert self.config.max_num_batched_tokens and self.config.prefill_chunk
        self.scheduler = Scheduler(
            SchedulerConfig(
                prefill_chunk=self.config.prefill_chunk,
                token_budget=self.config.max_num_batched_tokens,
                swap_memory=self.config.swap_memory,
                row_bytes=self.plan.raw_bytes_per_request,
                exact_recompute=not self.plan.policy.is_quantized,
                prefix_root=self._prefix_root() if self.config.prefix_caching else None,
                consecutive=not (
                    self.plan.raw_bytes_per_request or model.geometry.is_windowed or self.fidelity
                ),
            ),
            self.cache.blocks,
        )
        self._depth = 1 if model.device.type == "cuda" else 0
        """Steps that run on the device while the host plans the next."""
        self._in_flight: deque[tuple[Step, PendingTokens]] = deque()
        self.latest_step: Step | None = None
        """The one whose tokens `step` returned last."""
        self._requests: dict[int, Request] = {}
        self._next_id = 0
        self._eos = set(model.geometry.eos_token_ids)

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_work

    @property
    def load(self) -> Load:
        """What runs and waits at this moment."""
        groups = self.cache.blocks.groups
        return Load(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + len(self.scheduler.swapped),
            pages_used=sum(g.allocator.num_used for g in groups),
            pages_cached=sum(g.allocator.num_idle for g in groups),
            pages=sum(g.shape.num_pages - 1 for g in groups),
            preemptions=self.scheduler.preemptions,
            prompt_tokens=self.scheduler.prompt_tokens,
            cached_tokens=self.scheduler.cached_tokens,
        )

    def check_prompt(self, prompt_ids: list[int]) -> int:
        """How many tokens an answer to this prompt can have at most.

        Raises `KvqError` for a prompt that is empty, has ids outside the vocabulary, or leaves no room for a
        token. Reads nothing that changes: any thread may call it.
        """
        room = self.plan.max_request_tokens
        if not prompt_ids:
            raise KvqError("the prompt is empty", "give at least one token")
        vocab = self.model.geometry.vocab_size
        if not (min(prompt_ids) >= 0 and max(prompt_ids) < vocab):
            raise KvqError(f"the prompt has token ids outside 0 … {vocab - 1}", "was another tokenizer used?")
        if len(prompt_ids) >= room:
            limit = self.config.max_model_len or room
            what, mend = (
                (f"{self.model.name} takes {limit} tokens", "shorten the prompt")
                if len(prompt_ids) >= limit
                else (f"the KV cache holds {room}", "give the cache more `--kv-memory`")
            )
            raise PromptTooLong(
                f"a prompt of {len(prompt_ids)} tokens is too long: {what}, answer included", mend
            )
        return room - len(prompt_ids)

    def add_request(self, prompt_ids: list[int], params: SamplingParams) -> int:
        """Queue a prompt of token ids; returns the request's id.

        Raises `KvqError` as `check_prompt` does. Answers end early, with reason "length", where the model's
        or the cache's limit is reached.
        """
        room = self.check_prompt(prompt_ids)
        request = Request(
            id=self._next_id,
            prompt=list(prompt_ids),
            params=params,
            max_tokens=min(params.max_new_tokens, room),
        )
        self._next_id += 1
        self._requests[request.id] = request
        self.scheduler.add(request)
        return request.id

    def step(self) -> list[RequestOutput]:
        """Run one step and return what is new; nothing while the first step is under way."""
        with self.group.together(whole=True):
            step = self.scheduler.schedule()
            if not step.is_empty:
                work = self.runner.plan(step)
                self.group.tell("step", self._number, work)
                self._in_flight.append((step, self.runner.run(work, step)))
            if self._in_flight and (step.is_empty or len(self._in_flight) > self._depth):
                self.latest_step, pending = self._in_flight.popleft()
                return self._update(self.latest_step, pending)
        if step.is_empty and self.scheduler.has_work:
            raise AssertionError("the scheduler has work but plans no step")
        return []

    def cancel(self, request_id: int) -> None:
        """Stop a request and free its pages; unknown and finished ids are ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._finish(request)

    def reset_stats(self) -> None:
        """Forget peaks and counts; cached prefixes stay."""
        self.scheduler.preemptions = self.scheduler.prompt_tokens = self.scheduler.cached_tokens = 0
        self.cache.blocks.reset_peak()
        if self.fidelity is not None:
            self.fidelity.reset()

    def kv_stats(self) -> dict[str, Any]:
        """What the cache holds and costs; the `kv` part of a run record. Bytes are those of each rank."""
        plan = self.plan
        measured = {"fidelity": self.fidelity.summary()} if self.fidelity is not None else {}
        return (
            measured
            | {
                "bits_per_element": plan.bits_per_element,
                "bytes_per_token": plan.bytes_per_token,
                "total_bytes_per_token": plan.bytes_per_token * self.group.size,
                "memory_bytes": plan.memory_bytes,
                "total_memory_bytes": plan.memory_bytes * self.group.size,
                "page_size": plan.page_size,
                "pages": sum(g.num_pages - 1 for g in plan.groups),
                "capacity_tokens": plan.capacity_tokens,
                "capacity_ratio": plan.capacity_ratio,
                "biased_key_layers": sum(layer.bias is not None for layer in self.cache.layers),
                "raw_window_bytes": plan.max_num_seqs * plan.raw_bytes_per_request,
                "peak_tokens": self.cache.blocks.peak_tokens,
                "tokens": self.cache.blocks.tokens,
                "preemptions": self.scheduler.preemptions,
            }
            | ({"prefix_hit_rate": self.prefix_hit_rate} if self.config.prefix_caching else {})
        )

    @property
    def prefix_hit_rate(self) -> float:
        """The share of prompt tokens that were found in the cache."""
        return self.scheduler.cached_tokens / max(1, self.scheduler.prompt_tokens)

    def close(self) -> None:
        """Drop all requests and give the cache's memory back; the model stays."""
        with suppress(KvqError):  # ranks that are gone hold nothing
            self.group.tell("close", self._number)
        self._in_flight.clear()
        self._requests.clear()
        del self.runner, self.scheduler, self.cache, self.fidelity
        tear_down(self.model.device.type == "cuda")

    def _update(self, step: Step, pending: PendingTokens) -> list[RequestOutput]:
        tokens, now, outputs = pending.get(), time.perf_counter(), []
        logprobs = pending.get_logprobs()
        for index, (request, token) in enumerate(zip(step.sampled, tokens, strict=True)):
            if request.status is Status.FINISHED:
                continue  # ended while this step was under way
            request.output.append(token)
            reason = self._finish_reason(request, token)
            if reason:
                self._finish(request)
                del self._requests[request.id]
            outputs.append(
                RequestOutput(
                    request.id,
                    [token],
                    finished=reason is not None,
                    finish_reason=reason,
                    time=now,
                    cached_tokens=request.cached_tokens,
                    logprobs=[logprobs[index]] if index in logprobs else None,
                )
            )
        return outputs

    def _prefix_root(self) -> bytes:
        """What cached bytes depend on beside the tokens: model, policy, layout and chunks."""
        config = self.config
        parts = (self.model.name, config.policy, config.dtype, config.page_size, config.prefill_chunk)
        return sha256(repr(parts).encode()).digest()

    def _finish_reason(self, request: Request, token: int) -> str | None:
        if token in request.params.stop_token_ids or (token in self._eos and not request.params.ignore_eos):
            return "stop"
        return "length" if len(request.output) >= request.max_tokens else None

    def _finish(self, request: Request) -> None:
        if request.status is Status.SWAPPED:
            self.runner.drop_swapped(request.id)
        self.scheduler.finish(request)
