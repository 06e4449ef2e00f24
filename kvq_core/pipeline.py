"""The Python API: a model and an engine behind one call.

from kvq_core import EngineConfig, pipeline

with pipeline("Qwen/Qwen3-8B", EngineConfig(policy=42)) as pipe:
    for response in pipe(["Hi", "Shanghai is"], max_new_tokens=64):
        print(response.text)
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from os import PathLike, fspath
from types import ModuleType
from typing import Any

from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.detokenizer import Detokenizer
from kvq_core.engine.engine import Engine
from kvq_core.engine.logprobs import TokenLogprob
from kvq_core.engine.request import RequestOutput
from kvq_core.errors import KvqError, UsageError
from kvq_core.models import LoadedModel, load_model
from kvq_core.policies import Policy
from kvq_core.prompts import as_prompts, encode


@dataclass(frozen=True)
class Response:
    """An answer, or, in a stream, what is new of it."""

    text: str
    token_ids: list[int]
    """With the end-of-sequence token, where it ended with one; its text is left out."""
    finish_reason: str | None
    """None while it runs; "stop" (end of sequence, stop token or stop string), "length" or "cancelled"."""
    input_len: int
    """Tokens of the prompt."""
    index: int
    """Which of the prompts it answers."""
    logprobs: list[TokenLogprob] | None = None
    """Of each token, with the option `logprobs`."""


def pipeline(
    model: str | PathLike[str] | LoadedModel,
    config: EngineConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> "Pipeline":
    """Load a model by name and start an engine for it; raises `KvqError` where either fails.

    `progress` is called with (done, total) while CUDA graphs are captured.
    """
    config = config or EngineConfig()
    if not isinstance(model, LoadedModel):
        model = load_model(
            fspath(model),
            dtype=config.dtype,
            device=config.device,
            load_format=config.load_format,
            tp=config.tp,
        )
    return Pipeline(model, config, progress)


class Pipeline:
    """Answers prompts; all prompts of a call run in one continuous batch.

    A prompt is a string (continued as it stands), a list of token ids, or a list of chat messages
    (`{"role": …, "content": …}`, put into the model's chat template). One prompt gives one `Response`,
    a list of prompts a list.
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.model = model
        self._progress = progress
        self._asked = config
        self._outputs: dict[int, deque[RequestOutput]] = {}
        """Request id -> outputs that its stream has not taken yet."""
        self._engine: Engine | None = Engine(model, config, progress)

    def __call__(
        self, prompts: Any, params: SamplingParams | None = None, **options: Any
    ) -> Response | list[Response]:
        """Answer one prompt or several.

        Options are those of `SamplingParams` (max_new_tokens, temperature, top_k, top_p, seed, stop, …) and
        override `params`. Greedy unless the temperature is above 0.
        Raises `KvqError` for prompts that are empty, too long, or of the wrong type.
        """
        requests, single = as_prompts(prompts)
        texts = ["" for _ in requests]
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[TokenLogprob]] = [[] for _ in requests]
        last: dict[int, Response] = {}
        for delta in self._stream(requests, sampling(params, options)):
            texts[delta.index] += delta.text
            ids[delta.index] += delta.token_ids
            logprobs[delta.index] += delta.logprobs or []
            last[delta.index] = delta
        responses = [
            replace(last[i], text=texts[i], token_ids=ids[i], logprobs=logprobs[i] or None)
            for i in range(len(requests))
        ]
        return responses[0] if single else responses

    infer = __call__

    def stream_infer(
        self, prompts: Any, params: SamplingParams | None = None, **options: Any
    ) -> Iterator[Response]:
        """The same, as a stream of what is new of each answer, in the order it is made.

        Closing the stream (or leaving its loop by an exception) cancels what still runs.
        """
        requests, _ = as_prompts(prompts)
        return self._stream(requests, sampling(params, options))

    def set_policy(self, config: "EngineConfig | int | str | Policy") -> None:
        """Start a new engine on the same model, with another policy or configuration.

        Running streams end. Where the new engine can't start, the old configuration comes back. Raises
        `KvqError` once the pipeline is closed.
        """
        _ = self.engine
        if not isinstance(config, EngineConfig):
            config = self._asked.replace(policy=config, sink=None, recent=None, layers=())
        self.close()
        try:
            self._engine = Engine(self.model, config, self._progress)
        except KvqError:
            self._engine = Engine(self.model, self._asked, self._progress)
            raise
        self._asked = config

    @property
    def engine(self) -> Engine:
        """The engine that runs now; raises `KvqError` once the pipeline is closed."""
        if self._engine is None:
            raise KvqError("this pipeline is closed", "make a new one with `pipeline(…)`")
        return self._engine

    @property
    def config(self) -> EngineConfig:
        """The engine's configuration, with everything automatic resolved."""
        return self.engine.config

    def kv_stats(self) -> dict[str, Any]:
        """What the cache holds and costs."""
        return self.engine.kv_stats()

    def close(self) -> None:
        """Give the cache's memory back; may be called twice."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            self._outputs.clear()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, prompts: list[Any], params: SamplingParams) -> Iterator[Response]:
        engine = self.engine
        if params.stop and self.model.tokenizer is None:
            raise KvqError(f"{self.model.name} has no tokenizer for stop strings", "use `stop_token_ids`")
        return self._generate(engine, [encode(self.model, prompt) for prompt in prompts], params)

    def _generate(
        self, engine: Engine, prompts: list[list[int]], params: SamplingParams
    ) -> Iterator[Response]:
        ends = {*params.stop_token_ids, *self.model.geometry.eos_token_ids}
        indices: dict[int, int] = {}
        try:
            for index, ids in enumerate(prompts):
                request = engine.add_request(ids, params)
                indices[request] = index
                self._outputs[request] = deque()
            texts = {request: Detokenizer(self.model.tokenizer, params.stop) for request in indices}
            while indices:
                if self._engine is not engine:
                    return  # closed, or another policy was set
                for output in self._next(engine, indices):
                    request, index = output.request_id, indices[output.request_id]
                    text, reason = texts[request].take(output, ends)
                    if reason is not None:
                        engine.cancel(request)  # a stop string: the engine does not know of it
                        del indices[request], self._outputs[request]
                    prompt = len(prompts[index])
                    yield Response(text, output.token_ids, reason, prompt, index, output.logprobs)
        finally:
            for request in indices:
                self._outputs.pop(request, None)
                if self._engine is engine:
                    engine.cancel(request)

    def _next(self, engine: Engine, requests: dict[int, int]) -> list[RequestOutput]:
        """Outputs of these requests, after a step where there are none; others' wait for their own stream."""
        if not any(self._outputs[r] for r in requests):
            for output in engine.step():
                if output.request_id in self._outputs:
                    self._outputs[output.request_id].append(output)
        return [self._outputs[r].popleft() for r in requests if self._outputs[r]]


def sampling(params: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    """`params` with options that override it; raises `UsageError` for one that does not exist."""
    known = SamplingParams.__dataclass_fields__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageError(f"unknown sampling option {unknown[0]!r}", f"there are {', '.join(known)}")
    changes = {name: value for name, value in options.items() if value is not None}
    return replace(params or SamplingParams(), **changes)


class _CallableModule(ModuleType):
    """`from kvq_core import pipeline` is this module, not the function, once it has been imported.

    Python puts a submodule into its package under its name; so the module answers like the function.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Pipeline:
        return pipeline(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
