"""`kvq` with a pipeline that needs no model: `python tests/cli/fake_kvq.py run hello`.

Answers repeat the last message word by word. In a message, `long` repeats it 400 times, `slow` makes a
pause, and `fail` ends the stream with an error.
"""

import sys
import time
import types
from collections.abc import Iterator
from typing import Any

from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.errors import KvqError

CONTEXT = 300


class Tokenizer:
    """A token a word, and one for the role of each message."""

    chat_template: str | None = "a template"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return " ".join(f"{message['role']} {message['content']}" for message in messages)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text.split())))}


class FakePipeline:
    """What the commands use of `kvq_core.pipeline.Pipeline`; `log` has what was asked of it."""

    def __init__(self, model: str, config: EngineConfig, progress: Any = None) -> None:
        if model == "missing":
            raise KvqError("cannot find model 'missing'", "use another")
        self.log: list[Any] = []
        self.config = config
        tokenizer = Tokenizer()
        tokenizer.chat_template = None if model == "base" else "a template"
        self.model = types.SimpleNamespace(tokenizer=tokenizer, name=model)
        stats = {
            "bits_per_element": 3.375,
            "bytes_per_token": 4860,
            "capacity_tokens": 1234,
            "prefix_hit_rate": 0.25,
        }
        self.engine = types.SimpleNamespace(plan=types.SimpleNamespace(max_request_tokens=CONTEXT))
        self.kv_stats = lambda: stats
        PIPELINES.append(self)

    def __enter__(self) -> "FakePipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append("closed")

    def set_policy(self, config: EngineConfig) -> None:
        config.resolved_policy()
        self.config = config
        self.log.append(("policy", config.resolved_policy().name))

    def stream_infer(self, prompts: Any, params: SamplingParams) -> Iterator[Any]:
        self.log.append((prompts, params))
        single = isinstance(prompts, str) or isinstance(prompts[0], dict)
        answers = [self._words(prompt, params) for prompt in ([prompts] if single else prompts)]
        lens = [len(words) for words in answers]
        try:
            for position in range(max(lens)):
                for index in reversed(range(len(answers))):  # the last prompt is answered first
                    if position >= lens[index]:
                        continue
                    word = answers[index][position]
                    if word == "slow":
                        time.sleep(0.3)
                    if word == "fail":
                        raise KvqError("the stream broke", "mend it")
                    yield types.SimpleNamespace(
                        index=index,
                        text=word + " ",
                        token_ids=[position],
                        input_len=7,
                        finish_reason="stop" if position == lens[index] - 1 else None,
                    )
        finally:
            self.log.append("stream closed")

    def _words(self, prompt: Any, params: SamplingParams) -> list[str]:
        words = (prompt if isinstance(prompt, str) else prompt[-1]["content"]).split()
        if "long" in words:
            words = words * 400
        return [f"re:{words[0]}", *words[1:]][: params.max_new_tokens]


PIPELINES: list[FakePipeline] = []


def module() -> types.ModuleType:
    """A stand-in for `kvq_core.pipeline`."""
    fake = types.ModuleType("kvq_core.pipeline")
    fake.pipeline = FakePipeline  # type: ignore[attr-defined]
    return fake


if __name__ == "__main__":
    sys.modules["kvq_core.pipeline"] = module()
    from kvq_cli.app import main

    main()
