"""An OpenAI-compatible server as a `Target`: answers are streamed over HTTP, all in one event loop."""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from kvq_core.bench.target import BenchRequest, Event, TargetInfo, Usage
from kvq_core.errors import KvqError, UsageError

APIS = {"completions": "/completions", "chat": "/chat/completions"}
"""Name -> path under the base URL."""
CONNECT_SECONDS = 10.0
REASON_LENGTH = 160


class Tokenizer(Protocol):
    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]: ...


class HttpTarget:
    """Sends requests and takes down when their tokens arrive; `poll` runs the event loop.

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
        self._tokenizer = tokenizer
        self._runner = asyncio.Runner()
        self._arrived = asyncio.Event()
        self._events: list[Event] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._prompt_tokens = 0
        self._cached_tokens = 0
        """Those that the server says its cache held."""
        self._client = httpx.AsyncClient(
            headers=authorization(key),
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def info(self) -> TargetInfo:
        return TargetInfo(
            model={"name": self.model},
            engine={"backend": "http", "url": self.url, "api": self.api},
            in_process=False,
        )

    def send(self, request: BenchRequest, asked: float | None = None) -> None:
        """`asked`: when the request was to be sent, where that was in another process."""
        if self.api == "chat" and not isinstance(request.prompt, str):
            raise KvqError("the chat API takes text, and the prompt is token ids")
        self._tasks[request.index] = self._runner.get_loop().create_task(
            self._answer(request, time.perf_counter() if asked is None else asked)
        )

    def poll(self, timeout: float) -> list[Event]:
        return self._runner.run(self._wait(timeout))

    def cancel(self, index: int) -> None:
        """Hang up, which tells the server to stop."""
        task = self._tasks.pop(index, None)
        if task is not None:
            task.cancel()

    def usage(self) -> Usage | None:
        return None  # what a server holds is its own affair

    def wake_on(self, descriptor: int) -> None:
        """Let `poll` return as soon as this file can be read."""
        self._runner.get_loop().add_reader(descriptor, self._arrived.set)

    def sleep_on(self, descriptor: int) -> None:
        self._runner.get_loop().remove_reader(descriptor)

    def reset_stats(self) -> None:
        self._prompt_tokens = self._cached_tokens = 0

    def kv_stats(self) -> dict[str, Any]:
        """A server says nothing of its cache but the prompt tokens that it held."""
        if not self._cached_tokens:
            return {}
        return {"prefix_hit_rate": self._cached_tokens / self._prompt_tokens}

    def close(self) -> None:
        for index in list(self._tasks):
            self.cancel(index)
        self._runner.run(self._client.aclose())
        self._runner.close()

    async def _wait(self, timeout: float) -> list[Event]:
        try:
            async with asyncio.timeout(timeout):
                await self._arrived.wait()
        except TimeoutError:
            pass
        self._arrived.clear()
        events, self._events = self._events, []
        return events

    def _report(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    async def _answer(self, request: BenchRequest, asked: float) -> None:
        """One request from sending to its end, which is always reported, unless it is cancelled."""
        lag = time.perf_counter() - asked
        error, counts = None, None
        try:
            counts = await self._stream(request)
        except _Failure as failure:
            error = str(failure)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            error = "cannot connect to the server"
        except httpx.HTTPError as problem:
            error = f"the stream broke off ({type(problem).__name__})"
        except (ValueError, LookupError, TypeError, AttributeError):
            error = "the stream does not follow the API"
        self._tasks.pop(request.index, None)
        now = time.perf_counter()
        self._report(Event(request.index, now, finished=True, error=error, counts=counts, lag=lag))

    async def _stream(self, request: BenchRequest) -> tuple[int, int]:
        """Report tokens as they arrive; returns how many tokens prompt and answer had."""
        texts: list[str] = []
        usage, finish_reason = None, None
        async with self._client.stream("POST", self.url + APIS[self.api], json=self._body(request)) as reply:
            if reply.status_code != 200:
                raise _Failure(f"HTTP {reply.status_code}: {_reason(await reply.aread())}")
            async for line in reply.aiter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                now, chunk = time.perf_counter(), json.loads(data)
                if "error" in chunk:
                    raise _Failure(_reason(data.encode()))
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    finish_reason = choice.get("finish_reason") or finish_reason
                    text = _text(choice)
                    if text is not None:
                        texts.append(text)
                        self._report(Event(request.index, now, tokens=1))
        if finish_reason is None:
            raise _Failure("the stream broke off (no finish_reason)")
        if usage is not None:
            self._prompt_tokens += int(usage["prompt_tokens"])
            self._cached_tokens += int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            return int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        if finish_reason == "length":  # as many as were asked for, by the API's definition
            return request.input_len, request.output_len
        return request.input_len, self._count(texts)

    def _count(self, texts: list[str]) -> int:
        """Tokens of an answer; a chunk is one where there is no tokenizer."""
        if self._tokenizer is None:
            return len(texts)
        return len(self._tokenizer("".join(texts), add_special_tokens=False)["input_ids"])

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


class _Failure(Exception):
    """What the server says went wrong."""


def normalize_url(url: str) -> str:
    """`http://host:8000` and `http://host:8000/v1/` are the same: what precedes `/chat/completions`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"`{url}` is not the URL of a server", "as in `--base-url http://127.0.0.1:8000`")
    if parts.username or parts.query or parts.fragment:
        raise UsageError(
            "--base-url takes no user name, query or fragment",
            "a key comes from the environment: OPENAI_API_KEY, or --api-key-env NAME",
        )
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def authorization(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def find_served_model(base_url: str, key: str | None) -> str:
    """The one model that a server says it has; `KvqError` where it can't be reached or has several."""
    url = normalize_url(base_url)
    try:
        reply = httpx.get(f"{url}/models", headers=authorization(key), timeout=CONNECT_SECONDS)
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
        names = [str(model["id"]) for model in reply.json()["data"]]
    except (ValueError, LookupError, TypeError):
        names = []
    if len(names) != 1:
        found = ", ".join(names) or f"none (HTTP {reply.status_code})"
        raise KvqError(f"{url} serves not one model, but {found}", "choose one with --served-model NAME")
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


def _reason(body: bytes) -> str:
    """What an error document says, in one short line."""
    text = body.decode("utf-8", "replace")
    try:
        document = json.loads(text)
        error = document.get("error", document) if isinstance(document, dict) else document
        text = error.get("message", text) if isinstance(error, dict) else str(error)
    except ValueError:
        pass
    return " ".join(str(text).split())[:REASON_LENGTH] or "no reason given"
