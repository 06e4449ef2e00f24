"""`kvq chat --url`: a conversation with a server that has OpenAI's interface."""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx

from kvq_cli import console
from kvq_cli.commands.chat import Chat, Piece
from kvq_core.errors import KvqError, UsageError

if TYPE_CHECKING:
    from kvq_core.config import SamplingParams

TIMEOUT = httpx.Timeout(600, connect=10)


class ContextFull(KvqError):
    """The server says that the conversation is too long for the model."""


class RemoteChat(Chat):
    """With a model behind a URL."""

    def __init__(
        self, url: str, api_key: str | None, params: "SamplingParams", model: str | None, system: str | None
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(base_url=base_url(url), headers=headers, timeout=TIMEOUT)
        super().__init__(params, model or self._first_model(), system)

    def __enter__(self) -> "RemoteChat":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    @property
    def policy(self) -> str:
        return "of the server"

    def stream(self) -> Generator[Piece]:
        while True:
            try:
                yield from self._pieces()
                return
            except ContextFull:
                if len(self.messages) == 1:
                    raise
                del self.messages[:2]
                self.warn_of_dropped(2)

    def set_policy(self, name: str) -> None:
        if name:
            raise KvqError("the server sets the policy", "start it with another: `kvq serve --policy …`")
        console.say(f"policy {self.policy}")

    def show_stats(self, _: str) -> None:
        console.say(f"  server        {self.http.base_url}\n{self.last.summary()}")

    def _first_model(self) -> str:
        with self._complaints():
            response = self.http.get("models")
            check(response)
            try:
                return response.json()["data"][0]["id"]
            except (ValueError, LookupError, TypeError) as error:
                raise KvqError(f"{self.http.base_url} lists no model", "name one with `--model`") from error

    def _pieces(self) -> Generator[Piece]:
        """The answer as it comes; tokens are counted as the server counts them at its end, if it does."""
        tokens, finished = 0, False
        with self._complaints(), self.http.stream("POST", "chat/completions", json=self._body()) as response:
            check(response)
            for event in events(response):
                if event.get("error"):
                    raise as_error(event, "the server broke off the answer", "its log may say more")
                for choice in event.get("choices") or []:
                    finished |= choice.get("finish_reason") is not None
                    text = (choice.get("delta") or {}).get("content") or ""
                    if text:
                        tokens += 1
                        yield Piece(text, 0, 1)
                if usage := event.get("usage"):
                    yield Piece("", usage["prompt_tokens"], usage["completion_tokens"] - tokens)
                    tokens = usage["completion_tokens"]
        if not finished:
            raise KvqError("the server broke off the answer", "ask again")

    def _body(self) -> dict[str, Any]:
        params = self.params
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self.prompt(),
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
        }
        if params.stop:
            body["stop"] = list(params.stop)
        if params.top_k:  # beyond OpenAI's fields; many servers have it
            body["top_k"] = params.top_k
        return body

    @contextmanager
    def _complaints(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise KvqError(
                f"nothing answers at {self.http.base_url}: {error}", "is the server running? check `--url`"
            ) from error
        except httpx.HTTPError as error:
            what = str(error) or type(error).__name__
            raise KvqError(f"the connection to {self.http.base_url} broke: {what}", "ask again") from error


def base_url(url: str) -> str:
    """Where `models` and `chat/completions` are: `/v1` where the URL has no path of its own."""
    try:
        parsed = httpx.URL(url)
        parsed.host.encode("idna")
    except (httpx.InvalidURL, UnicodeError):  # the latter for names that can be none, as `a..b`
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"--url: `{url}` is no URL of a server", "as in `http://localhost:8000`")
    path = parsed.path.rstrip("/")
    return str(parsed.copy_with(path=path or "/v1"))


def check(response: httpx.Response) -> None:
    """Raises `KvqError` for a refusal, in the server's words where it has any."""
    if response.is_success:
        return
    response.read()
    status = f"the server answers {response.status_code} {response.reason_phrase}"
    try:
        document = response.json()
    except ValueError:
        document = None
    hint = {
        401: "`--api-key-env NAME` names the environment variable with the key",
        404: "check `--url` and `--model`",
        429: "try again later",
    }
    raise as_error(document, status, hint.get(response.status_code, ""))


def as_error(document: Any, otherwise: str, hint: str = "") -> KvqError:
    """The error in a response's body."""
    error = document.get("error") if isinstance(document, dict) else None
    fields = error if isinstance(error, dict) else {"message": error}
    message = f"{otherwise}: {fields['message']}" if fields.get("message") else otherwise
    if fields.get("code") == "context_length_exceeded":
        return ContextFull(message, "shorten the message, or ask for fewer tokens with `--max-new-tokens`")
    return KvqError(message, hint)


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON documents of a stream of server-sent events."""
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        try:
            event = json.loads(data)
        except ValueError as error:
            raise KvqError(
                f"the server sent something that is not JSON: {data[:60]}", "check `--url`"
            ) from error
        if isinstance(event, dict):
            yield event
