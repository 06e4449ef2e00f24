"""Refusals with their status and body, clients that hang up, an engine that dies, and the end of it all."""

import asyncio
import json
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from kvq_core import KvqError
from kvq_core.config import ServerConfig
from kvq_core.server.run import bind

HI = {"model": "tiny", "prompt": "Hi", "max_tokens": 4}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
ENDLESS = {"model": "tiny", "prompt": "Hi", "max_tokens": 250, "ignore_eos": True, "stream": True}


@pytest.fixture
def running(serve: Any) -> Any:
    return serve(api_key="secret", max_queue=2, max_body=4096)


def ask(running: Any, body: Any, path: str = "completions", key: str = "secret") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{running.url}/v1/{path}", content=content, headers=headers, timeout=30)


def slow(running: Any, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    step = running.engine.step

    def slow_step() -> Any:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(running.engine, "step", slow_step)


@pytest.mark.parametrize(
    ("body", "param", "code", "message"),
    [
        (b"{", None, None, "not valid JSON"),
        (b"\xff", None, None, "not valid JSON"),
        (b"", None, None, "not valid JSON"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', None, None, "not valid JSON"),
        ([1], None, None, "the body: "),
        ({"model": "tiny"}, "prompt", "missing_required_parameter", "`prompt` is missing"),
        (HI | {"max_tokens": "4"}, "max_tokens", None, "integer"),
        (HI | {"max_tokens": 0}, "max_tokens", None, "greater than or equal to 1"),
        (HI | {"temperature": -1}, "temperature", None, "greater than or equal to 0"),
        (HI | {"temperature": float("nan")}, "temperature", None, "finite"),
        (HI | {"top_p": 0}, "top_p", None, "greater than 0"),
        (HI | {"n": 200}, "n", None, "128"),
        (HI | {"n": 7}, None, None, "takes 6 at a time"),
        (HI | {"prompt": ""}, "prompt", None, "the prompt is empty"),
        (HI | {"prompt": []}, "prompt", None, "the list is empty"),
        (HI | {"prompt": [1, True]}, "prompt", None, "not a prompt"),
        (HI | {"prompt": [999]}, "prompt", None, "outside 0 … 259"),
        (HI | {"prompt": [{"role": "user"}]}, "prompt", None, "chat/completions"),
        (HI | {"stop": ["x"] * 17}, "stop", None, "at most 16"),
        (HI | {"best_of": 3}, "best_of", "unsupported_parameter", "`best_of` is not supported"),
        (HI | {"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter", "not supported"),
        (HI | {"echo": True}, "echo", "unsupported_parameter", "`echo` is not supported"),
        (HI | {"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter", "not supported"),
        (HI | {"colour": "red"}, "colour", "unknown_parameter", "unknown field `colour`"),
        (HI | {"stream_options": {}}, "stream_options", None, "needs `stream`"),
        (HI | {"max_tokens": 300}, "max_tokens", "context_length_exceeded", "has room for 254"),
        (HI | {"prompt": "x" * 256}, "prompt", "context_length_exceeded", "takes 256 tokens"),
        (HI | {"prompt": "x" * 256, "stream": True}, "prompt", "context_length_exceeded", "takes 256 tokens"),
    ],
)
def test_bad_requests(running: Any, body: Any, param: str | None, code: str | None, message: str) -> None:
    response = ask(running, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error.pop("message")
    assert error == {"type": "invalid_request_error", "param": param, "code": code}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least 1"),
        ([{"role": "king", "content": "x"}], "`messages.0.role`"),
        ([{"role": "user"}], "`messages.0.content` is missing"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only text is supported"),
    ],
)
def test_bad_messages(running: Any, messages: Any, message: str) -> None:
    response = ask(running, CHAT | {"messages": messages}, "chat/completions")
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "messages"


def test_fields_that_ask_for_nothing_are_taken(running: Any) -> None:
    body = CHAT | {
        "max_tokens": 2,
        "presence_penalty": 0,
        "logprobs": None,
        "tools": [],
        "function_call": None,
        "reasoning_effort": None,
        "user": "me",
        "n": None,
    }
    assert ask(running, body, "chat/completions").status_code == 200


def test_the_key(running: Any) -> None:
    for key in ("wrong", "secret2"):
        response = ask(running, HI, key=key)
        assert response.status_code == 401
        error = response.json()["error"]
        assert "API key" in error.pop("message")
        assert error == {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    assert httpx.get(f"{running.url}/v1/models").status_code == 401
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{running.url}/metrics").status_code == 200
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0).models.list()


def test_unknown_model_and_unknown_path(running: Any) -> None:
    response = ask(running, HI | {"model": "gpt-4"})
    assert response.status_code == 404
    error = response.json()["error"]
    assert "no model `gpt-4`" in error.pop("message")
    assert error == {"type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    assert ask(running, HI, "models").json()["error"]["message"].startswith("POST /v1/models: ")
    assert ask(running, HI, "embeddings").status_code == 404
    assert ask(running, HI, "embeddings").json()["error"]["type"] == "invalid_request_error"


def test_a_large_body(running: Any) -> None:
    body = json.dumps(HI | {"prompt": "x" * (8 << 20)}).encode()
    for content in (body, iter([body[:5000], body[5000:]])):  # with its length announced, and without
        response = httpx.post(
            f"{running.url}/v1/completions", content=content, headers={"Authorization": "Bearer secret"}
        )
        assert response.status_code == 413
        error = response.json()["error"]
        assert error.pop("message") == "the body is larger than 4,096 bytes"
        assert error == {"type": "invalid_request_error", "param": None, "code": "request_too_large"}


def test_a_full_queue(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(running, monkeypatch)
    headers = {"Authorization": "Bearer secret"}
    body = ENDLESS | {"prompt": ["Hi"] * 5}
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body, headers=headers) as stream:
        lines = stream.iter_lines()
        next(lines)
        response = ask(running, HI | {"n": 2})
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
        error = response.json()["error"]
        assert "takes 6 requests at a time" in error.pop("message")
        assert error == {"type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
        text = httpx.get(f"{running.url}/metrics").text
        assert "kvq_requests_running 4.0" in text and "kvq_requests_waiting 1.0" in text
    assert running.is_clean()
    assert ask(running, HI).status_code == 200


def test_hang_ups_leave_nothing_behind(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(max_queue=200, max_num_seqs=16)
    slow(running, monkeypatch, 0.005)

    async def client(http: httpx.AsyncClient, index: int) -> int:
        leaves = index % 10 == 0
        body = ENDLESS | {"prompt": f"client {index}", "max_tokens": 200 if leaves else 20 + index % 7}
        tokens = 0
        async with http.stream("POST", f"{running.url}/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                tokens += line.startswith("data: {")
                if leaves and tokens > index % 4:
                    return -1
        return tokens

    async def clients() -> list[int]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=120) as http:
            return await asyncio.gather(*(client(http, index) for index in range(100)))

    tokens = asyncio.run(clients())
    assert tokens == [-1 if i % 10 == 0 else 20 + i % 7 for i in range(100)]
    assert running.is_clean()
    text = httpx.get(f"{running.url}/metrics").text
    assert 'kvq_requests_total{reason="cancelled"} 10.0' in text
    assert 'kvq_requests_total{reason="length"} 90.0' in text


def test_hanging_up_on_a_whole_answer(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(running, monkeypatch, 0.1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{running.url}/v1/completions",
            json=ENDLESS | {"stream": False},
            headers={"Authorization": "Bearer secret"},
            timeout=0.5,
        )
    cancelled = 'kvq_requests_total{reason="cancelled"} 1.0'
    assert running.eventually(lambda: cancelled in httpx.get(f"{running.url}/metrics").text, 10)
    assert running.is_clean(5)


@pytest.mark.parametrize("death", [RuntimeError("a kernel failed"), SystemExit(1)], ids=["error", "exit"])
def test_an_engine_that_dies(running: Any, monkeypatch: pytest.MonkeyPatch, death: BaseException) -> None:
    """With streams and whole answers under way, of which one begins with what another left in the cache."""
    prompt = "A prompt that is longer than two chunks of thirty-two tokens each."
    assert ask(running, HI | {"prompt": prompt}).status_code == 200
    slow(running, monkeypatch)
    body = ENDLESS | {"prompt": prompt, "max_tokens": 180}
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0)
    whole: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: whole.append(ask(running, body | {"stream": False})))
    waiting.start()
    stream = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=180, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert running.eventually(lambda: running.server.engine.open == 2)
    assert running.eventually(lambda: running.engine.load.cached_tokens == 2 * 64)

    def die() -> None:
        raise death

    monkeypatch.setattr(running.engine, "step", die)
    with pytest.raises(openai.APIError, match="the engine died"):
        list(stream)
    waiting.join(20)
    assert whole[0].status_code == 500
    assert whole[0].json()["error"]["code"] == "engine_died"
    health = httpx.get(f"{running.url}/health")
    assert health.status_code == 503 and health.json()["error"]["code"] == "engine_died"
    response = ask(running, HI)
    assert response.status_code == 503 and response.json()["error"]["type"] == "server_error"
    assert httpx.get(f"{running.url}/metrics").status_code == 200
    for request in range(running.engine._next_id):
        running.engine.cancel(request)  # nobody else can; the fixture looks for lost pages


def test_stopping_lets_requests_finish(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(shutdown_timeout=30)
    slow(running, monkeypatch)
    with httpx.stream("POST", f"{running.url}/v1/completions", json=ENDLESS | {"max_tokens": 40}) as stream:
        lines = stream.iter_lines()
        next(lines)
        running.stop()
        events = [line for line in lines if line]
    assert len(events) == 40 and events[-1] == "data: [DONE]"
    running.thread.join(20)
    assert not running.thread.is_alive() and running.is_clean()
    with pytest.raises(httpx.ConnectError):
        ask(running, HI)


def test_stopping_ends_what_takes_too_long(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(shutdown_timeout=0.3)
    slow(running, monkeypatch, 0.1)
    with httpx.stream("POST", f"{running.url}/v1/completions", json=ENDLESS) as stream:
        lines = stream.iter_lines()
        next(lines)
        running.stop()
        events = [line for line in lines if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    running.thread.join(20)
    assert not running.thread.is_alive() and running.is_clean()


def test_no_new_requests_while_it_stops(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    running.server.engine.drain(30)
    for response in (ask(running, HI), httpx.get(f"{running.url}/health")):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "shutting_down"


def test_a_port_that_is_taken(running: Any) -> None:
    port = int(running.url.rpartition(":")[2])
    with pytest.raises(KvqError, match=f"cannot listen on 127.0.0.1, port {port}") as caught:
        bind(ServerConfig(port=port))
    assert "--port" in caught.value.hint
    with pytest.raises(KvqError, match=r"cannot listen on nowhere\.invalid"):
        bind(ServerConfig(host="nowhere.invalid"))
