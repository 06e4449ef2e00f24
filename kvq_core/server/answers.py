"""Answers as they grow, and their shapes on the wire: whole, or as server-sent events."""

import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from kvq_core.detokenizer import Detokenizer
from kvq_core.models import LoadedModel
from kvq_core.server.async_engine import Generation, Sequence
from kvq_core.server.errors import ApiError, internal_error
from kvq_core.server.logprobs import Scored, chat_logprobs, completion_logprobs, name
from kvq_core.server.protocol import ChatRequest, GenerationRequest

log = logging.getLogger("kvq")


@dataclass(frozen=True)
class Delta:
    """What is new of one choice."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    scored: list[Scored]
    """Tokens and their logprobs, where they were asked for, but for one that ends the answer."""
    offset: int
    """Characters of tokens with logprobs before these."""


@dataclass
class Choice:
    """One answer so far."""

    detokenizer: Detokenizer
    ends: set[int]
    """Tokens that end it and have no text."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cached_tokens: int = 0
    """Tokens of its prompt that the prefix cache held."""
    scored: list[Scored] = field(default_factory=list)
    scored_text: int = 0
    """Characters of their texts."""


class Answers:
    """All choices of one HTTP request."""

    def __init__(
        self,
        model: LoadedModel,
        asked: GenerationRequest,
        prompt_tokens: int,
        sequences: list[Sequence],
        generation: Generation,
    ) -> None:
        eos = model.geometry.eos_token_ids
        self._choices = [
            Choice(Detokenizer(model.tokenizer, s.params.stop), {*s.params.stop_token_ids, *eos})
            for s in sequences
        ]
        self._generation = generation
        self._asked = asked
        self._prompt_tokens = prompt_tokens
        self._chat = isinstance(asked, ChatRequest)
        self._tokenizer = model.tokenizer
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }

    async def whole(self) -> dict[str, Any]:
        """The response, once everything has ended."""
        async for _ in self._deltas():
            pass
        choices = []
        for index, choice in enumerate(self._choices):
            entry = self._choice(index, choice.token_ids, choice.finish_reason, choice.scored)
            if self._chat:
                entry["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                entry["text"] = choice.text
            choices.append(entry)
        kind = "chat.completion" if self._chat else "text_completion"
        return self._head | {"object": kind, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The response as server-sent events; an error is the last of them."""
        kind = {"object": "chat.completion.chunk" if self._chat else "text_completion"}
        usage: dict[str, Any] = {"usage": None} if self._asked.include_usage else {}
        started: set[int] = set()
        try:
            async for delta in self._deltas():
                entry = self._choice(
                    delta.index, delta.token_ids, delta.finish_reason, delta.scored, delta.offset
                )
                if self._chat:
                    role = {} if delta.index in started else {"role": "assistant"}
                    started.add(delta.index)
                    entry["delta"] = role | {"content": delta.text}
                else:
                    entry["text"] = delta.text
                yield _event(self._head | kind | {"choices": [entry]} | usage)
            if usage:
                yield _event(self._head | kind | {"choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)
        except Exception:
            log.exception("a stream broke")
            yield _event(internal_error().body)

    async def _deltas(self) -> AsyncIterator[Delta]:
        async for index, output in self._generation:
            choice = self._choices[index]
            text, choice.finish_reason = choice.detokenizer.take(output, choice.ends)
            choice.text += text
            choice.token_ids += output.token_ids
            choice.cached_tokens = output.cached_tokens
            scored = list(zip(output.token_ids, output.logprobs or [], strict=False))
            if output.finish_reason == "stop" and output.token_ids[-1] in choice.ends:
                scored = scored[:-1]
            offset, choice.scored_text = (
                choice.scored_text,
                choice.scored_text + sum(len(name(self._tokenizer, token)[0]) for token, _ in scored),
            )
            choice.scored += scored
            if choice.finish_reason is not None:
                self._generation.cancel(index, choice.finish_reason)  # a stop string is news to the engine
            yield Delta(index, text, output.token_ids, choice.finish_reason, scored, offset)

    def _choice(
        self,
        index: int,
        token_ids: list[int],
        finish_reason: str | None,
        scored: list[Scored],
        offset: int = 0,
    ) -> dict[str, Any]:
        logprobs = None
        if self._asked.logprobs_asked is not None:
            logprobs = (
                chat_logprobs(self._tokenizer, scored)
                if self._chat
                else completion_logprobs(self._tokenizer, scored, offset)
            )
        entry: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": finish_reason}
        return entry | ({"token_ids": token_ids} if self._asked.return_token_ids else {})

    def _usage(self) -> dict[str, Any]:
        completion = sum(len(choice.token_ids) for choice in self._choices)
        # The first choice of each prompt: its others find in the cache what this one computed.
        first = self._choices[:: self._asked.choices]
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in first)},
        }


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"
