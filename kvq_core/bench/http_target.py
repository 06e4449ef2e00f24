"""An OpenAI-compatible server as a `Target`: answers are streamed over HTTP."""

import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import h11
import httpx

from kvq_core.bench.http_client import CONNECT_SECONDS, HttpClient
from kvq_core.bench.record import load_json
from kvq_core.bench.target import BenchRequest, Event, TargetInfo, Usage
from kvq_core.errors import KvqError, UsageError

APIS = {"completions": "/completions", "chat": "/chat/completions"}
"""Name -> path under the base URL."""
REASON_LENGTH = 160
SAME_TOKENS = 0.75
"""Tokens are merged differently in an answer's text than while it was generated; to this share at least."""
MOST_TOKENS = 1 << 40
"""A usage block with more is wrong."""


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer: to count the tokens of an answer."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class CachedTokens:
    """Of `prompt` tokens the server says that its cache held `hits`."""

    hits: int = 0
    prompt: int = 0

    def __add__(self, other: "CachedTokens") -> "CachedTokens":
        return CachedTokens(self.hits + other.hits, self.prompt + other.prompt)

    def __sub__(self, other: "CachedTokens") -> "CachedTokens":
        return CachedTokens(self.hits - other.hits, self.prompt - other.prompt)


class HttpTarget:
    """Sends requests and takes down when their tokens arrive.

    Tokens are those of the server's usage block; where it sends none, `tokenizer` counts the answer.
    Whatever goes wrong with a request is its failure, with the reason, and no exception.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api: str = "completions",
        key: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.url = normalize_url(base_url)
        self.model = model
        self.api = api
        self._path = urlsplit(self.url).path + APIS[api]
        self._tokenizer = tokenizer
        self._client = HttpClient(self.url, authorization(key))
        self._answers: dict[int, _Answer] = {}
        self.cached = CachedTokens()

    def info(self) -> TargetInfo:
        return TargetInfo(
            model={"name": self.model},
            engine={"backend": "http", "url": self.url, "api": self.api},
            in_process=False,
        )

    def send(self, request: BenchRequest, asked: float | None = None) -> None:
        """`asked`: when the request was to be sent, where that was in another process."""
        if self.api == "chat" and not isinstance(request.prompt, str):
            raise KvqError("the chat API takes text, and the prompt is token ids", "use `--api completions`")
        answer = self._answers[request.index] = _Answer(request)
        self._client.post(request.index, self._path, json.dumps(self._body(request)).encode())
        if asked is not None:
            answer.lag = time.perf_counter() - asked

    def poll(self, timeout: float) -> list[Event]:
        events: list[Event] = []
        for index, at, arrival in self._client.wait(timeout):
            if answer := self._answers.get(index):
                events += self._take(answer, at, arrival)
        return events

    def cancel(self, index: int) -> None:
        """Hang up, which tells the server to stop."""
        if self._answers.pop(index, None):
            self._client.cancel(index)

    def usage(self) -> Usage | None:
        return None  # what a server holds is its own affair

    def wake_on(self, descriptor: int) -> None:
        """Let `poll` return as soon as this file can be read."""
        self._client.wake_on(descriptor)

    def sleep_on(self, descriptor: int) -> None:
        self._client.sleep_on(descriptor)

    def reset_stats(self) -> None:
        self.cached = CachedTokens()

    def kv_stats(self) -> dict[str, Any]:
        """A server says nothing of its cache but the prompt tokens that it held."""
        return prefix_hit_rate(self.cached)

    def close(self) -> None:
        self._answers.clear()
        self._client.close()

    def _take(self, answer: "_Answer", at: float, arrival: Any) -> list[Event]:
        """Events of what arrived for a request at one moment; its end is always among them, once."""
        index = answer.request.index
        events: list[Event] = []
        error, counts = None, None
        try:
            match arrival:
                case h11.Response():
                    answer.status = arrival.status_code
                    return events
                case h11.Data():
                    events += (Event(index, at, tokens=1) for _ in range(answer.read(arrival.data)))
                    return events
                case h11.EndOfMessage():
                    counts = self._count(answer)
                case ssl.SSLCertVerificationError():
                    raise _Failure(f"cannot connect to the server: {arrival.verify_message}")
                case OSError():
                    raise _Failure("cannot connect to the server")
                case _:
                    raise _Failure(f"the stream broke off ({type(arrival).__name__})")
        except _Failure as failure:
            error = str(failure)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            error = "the stream does not follow the API"
        del self._answers[index]
        if not isinstance(arrival, h11.EndOfMessage):
            self._client.cancel(index)
        return [*events, Event(index, at, finished=True, error=error, counts=counts, lag=answer.lag)]

    def _count(self, answer: "_Answer") -> tuple[int, int]:
        """How many tokens prompt and answer had."""
        request, usage = answer.request, answer.usage
        answer.check()
        if usage is not None:
            prompt, tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            if not (0 <= prompt < MOST_TOKENS and 0 <= tokens < MOST_TOKENS):
                raise ValueError("no number of tokens")
            cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            self.cached += CachedTokens(cached, prompt)
            return prompt, tokens
        # At its limit, an answer has what was asked for, or what a limit of the server's own left of it.
        tokens, at_limit = len(answer.texts), answer.finish_reason == "length"
        if self._tokenizer is not None:
            text = "".join(answer.texts)
            tokens = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            at_limit = at_limit and tokens >= SAME_TOKENS * request.output_len
        return request.input_len, request.output_len if at_limit else tokens

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt": request.prompt}
        if self.api == "chat":
            prompt = {"messages": [{"role": "user", "content": request.prompt}]}
        return {
            "model": self.model,
            **prompt,
            "max_tokens": request.output_len,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


class _Answer:
    """What a server has said so far to a request."""

    def __init__(self, request: BenchRequest) -> None:
        self.request = request
        self.lag = 0.0
        self.status = 200
        self.texts: list[str] = []
        self.usage: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self._rest = bytearray()
        """A line whose end has not come yet; what an error says, whole."""

    def read(self, data: bytes | bytearray) -> int:
        """How many chunks with tokens these bytes of the body complete; raises `_Failure` at an error."""
        self._rest += data
        if self.status != 200:
            return 0
        *lines, self._rest = self._rest.split(b"\n")
        return sum(self._line(line.decode()) for line in lines if line.startswith(b"data:"))

    def check(self) -> None:
        """Raise `_Failure` if what ended is no answer."""
        if self.status != 200:
            raise _Failure(f"HTTP {self.status}: {_reason(self._rest)}")
        if self._rest.startswith(b"data:"):  # without a newline behind it
            self._line(self._rest.decode())
        if self.finish_reason is None:
            raise _Failure("the stream broke off (no finish_reason)")

    def _line(self, line: str) -> int:
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return 0
        chunk = load_json(data)
        if chunk.get("error"):
            raise _Failure(_reason(data.encode()))
        self.usage = chunk.get("usage") or self.usage
        tokens = 0
        for choice in chunk["choices"]:
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            text = _text(choice)
            if text is not None:
                self.texts.append(text)
                tokens += 1
        return tokens


class _Failure(Exception):
    """What the server says went wrong."""


def normalize_url(url: str) -> str:
    """`http://host:8000` and `http://host:8000/v1/` are the same: what precedes `/chat/completions`."""
    if any(mark in url for mark in "@?#"):
        raise UsageError(
            "--base-url takes no user name, query or fragment",
            "a key comes from the environment: OPENAI_API_KEY, or --api-key-env NAME",
        )
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        sound = parts.scheme in ("http", "https") and host and parts.port != 0
        sound = sound and url.isascii() and url.isprintable() and " " not in url
    except ValueError:  # of the port, of brackets, of a name that can be none
        sound = False
    if not sound:
        raise UsageError(f"`{url}` is not the URL of a server", "as in `--base-url http://127.0.0.1:8000`")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def prefix_hit_rate(cached: CachedTokens) -> dict[str, Any]:
    """What a record's `kv` says where a server's cache held prompt tokens."""
    return {"prefix_hit_rate": cached.hits / cached.prompt} if cached.hits else {}


def authorization(key: str | None) -> dict[str, str]:
    """The header that carries a key; none without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def find_served_model(base_url: str, key: str | None) -> str:
    """The one model that a server says it has; `KvqError` where it can't be reached or has several."""
    url = normalize_url(base_url)
    try:
        # Directly, as requests are sent afterwards.
        reply = httpx.get(
            f"{url}/models",
            headers=authorization(key),
            timeout=CONNECT_SECONDS,
            verify=httpx.create_ssl_context(),
            trust_env=False,
        )
    except httpx.HTTPError as error:
        raise KvqError(
            f"cannot reach {url}: {error or type(error).__name__}",
            "is the server up, and is --base-url right?",
        ) from error
    if reply.status_code in (401, 403):
        raise KvqError(
            f"{url} refuses the key (HTTP {reply.status_code})",
            "set OPENAI_API_KEY, or name another variable with --api-key-env",
        )
    try:
        names = [str(model["id"]) for model in load_json(reply.text)["data"]]
    except (ValueError, LookupError, TypeError):
        names = []
    if not names:
        raise KvqError(
            f"{url}/models names no model (HTTP {reply.status_code})",
            "is --base-url what precedes /v1/completions? If so, name the model: --served-model NAME, or"
            " `,model=NAME` behind a --target",
        )
    if len(names) > 1:
        found = ", ".join(names)
        raise KvqError(
            f"{url} serves not one model, but {found}",
            "choose one: --served-model NAME, or `,model=NAME` behind a --target",
        )
    return names[0]


def _text(choice: dict[str, Any]) -> str | None:
    """The text of a chunk that carries a token; None for one that only opens or closes the answer."""
    delta = choice.get("delta", choice)
    text = (
        delta.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
    )
    if text:
        return str(text)
    return None if choice.get("finish_reason") or delta.get("role") else ""


def _reason(body: bytes | bytearray) -> str:
    """What an error document says, in one short line."""
    text = body.decode("utf-8", "replace")
    try:
        document = load_json(text)
        error = document.get("error", document) if isinstance(document, dict) else document
        text = error.get("message", text) if isinstance(error, dict) else str(error)
    except ValueError:
        pass
    words = "".join(c if c.isprintable() else " " for c in str(text)).split()  # no codes for a terminal
    return " ".join(words)[:REASON_LENGTH] or "no reason given"
