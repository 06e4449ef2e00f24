"""The one joint between harness and engine: an in-process engine as a `Target`."""

import time
from typing import Any

from kvq_core.bench.target import BenchRequest, Event, TargetInfo, Usage
from kvq_core.config import SamplingParams
from kvq_core.engine.engine import Engine
from kvq_core.engine.scheduler import Step
from kvq_core.errors import KvqError


class EngineTarget:
    """Drives an `Engine`: `poll` runs one step. The engine stays the caller's; `close` drops requests."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ids: dict[int, int] = {}
        """engine request -> benchmark request"""
        self._refused: list[Event] = []
        self._step: Step | None = None
        """What the last `poll` ran."""

    def info(self) -> TargetInfo:
        config = self.engine.config
        policy = config.resolved_policy()
        return TargetInfo(
            model=self.engine.model.describe(),
            policy=policy.describe(),
            engine={
                "backend": "triton" if self.engine.model.device.type == "cuda" else "reference",
                "device": config.device,
                "dtype": config.dtype,
                "tp": config.tp,
                "page_size": config.page_size,
                "prefill_chunk": config.prefill_chunk,
                "prefix_caching": config.prefix_caching,
                "max_num_seqs": config.max_num_seqs,
                "max_num_batched_tokens": config.max_num_batched_tokens,
                "max_model_len": config.max_model_len,
                "kv_memory": config.kv_memory,
                "key_bias": config.key_bias,
                "cuda_graphs": self.engine.runner.has_graphs,
            },
        )

    def send(self, request: BenchRequest) -> None:
        params = SamplingParams(max_new_tokens=request.output_len, ignore_eos=True)
        try:
            prompt = self._tokenize(request.prompt)
            self._ids[self.engine.add_request(prompt, params)] = request.index
        except KvqError as error:
            self._refused.append(
                Event(request.index, time.perf_counter(), finished=True, error=error.message)
            )

    def poll(self, timeout: float) -> list[Event]:
        events, self._refused = self._refused, []
        if not self.engine.has_work:
            self._step = None
            if not events and timeout > 0:
                time.sleep(timeout)
            return events
        outputs = self.engine.step()
        self._step = self.engine.latest_step
        for output in outputs:
            index = self._ids[output.request_id]
            if output.finished:
                del self._ids[output.request_id]
            events.append(Event(index, output.time, len(output.token_ids), output.finished))
        return events

    def cancel(self, index: int) -> None:
        for request_id, known in list(self._ids.items()):
            if known == index:
                self.engine.cancel(request_id)
                del self._ids[request_id]

    def usage(self) -> Usage:
        of = self._step or self.engine.load
        return Usage(self.engine.cache.blocks.tokens, of.running, of.waiting)

    def reset_stats(self) -> None:
        self.engine.reset_stats()

    def kv_stats(self) -> dict[str, Any]:
        return self.engine.kv_stats()

    def close(self) -> None:
        for request_id in list(self._ids):
            self.engine.cancel(request_id)
        self._ids.clear()

    def _tokenize(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        if self.engine.model.tokenizer is None:
            raise KvqError(
                "the model has no tokenizer, and the workload's prompts are text", "give prompts as token ids"
            )
        return self.engine.model.tokenizer(prompt).input_ids
