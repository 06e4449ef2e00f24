"""The HTTP target against a small server on 127.0.0.1: what it sends, counts, times, and how it fails."""

import json
import math
import os
import signal
import socket
import threading
import time
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import pytest

from kvq_core.bench.http_client import STALE_SECONDS
from kvq_core.bench.http_target import HttpTarget, find_served_model, normalize_url
from kvq_core.bench.load import Load, run_load
from kvq_core.bench.metrics import summarize
from kvq_core.bench.record import RunRecord
from kvq_core.bench.report import notes
from kvq_core.bench.run import measure
from kvq_core.bench.target import BenchRequest, TargetInfo
from kvq_core.bench.workload import Workload
from kvq_core.errors import KvqError, UsageError


@dataclass
class FakeServer:
    """Answers every POST with what `script(body)` yields: floats are pauses, bytes are sent, as they come."""

    script: Callable[[dict[str, Any]], Any] = lambda body: completion(body["max_tokens"])
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    models: list[str] = field(default_factory=lambda: ["fake-model"])
    models_status: int = 200
    bodies: list[dict[str, Any]] = field(default_factory=list)
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, authorization) of every request."""
    hung_up: list[float] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.seen.append((self.path, self.headers["Authorization"]))
            self.reply(fake.models_status, {})
            self.wfile.write(json.dumps({"data": [{"id": name} for name in fake.models]}).encode())

        def do_POST(self) -> None:
            fake.seen.append((self.path, self.headers["Authorization"]))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.bodies.append(body)
            self.reply(fake.status, fake.headers)
            try:
                for part in fake.script(body):
                    if isinstance(part, float):
                        time.sleep(part)
                    else:
                        self.wfile.write(part)
                        self.wfile.flush()
            except OSError:
                fake.hung_up.append(time.perf_counter())

        def reply(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield fake
    http.shutdown()
    http.server_close()


def data(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def choice(text: str = "", finish: str | None = None) -> bytes:
    return data({"choices": [{"text": text, "finish_reason": finish}]})


def usage(prompt: int, completion: int) -> bytes:
    return data({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


DONE = b"data: [DONE]\n\n"


def completion(tokens: int, gap: float = 0.0) -> list[Any]:
    """A stream of so many tokens, a chunk each, and the usage block."""
    parts: list[Any] = [b": comment\n\n"]
    for i in range(tokens):
        parts += [gap, choice(f" t{i}", "length" if i == tokens - 1 else None)]
    return [*parts, usage(11, tokens), DONE]


def replay(server: FakeServer, requests: list[BenchRequest], load: Load | None = None, **options: Any) -> Any:
    target = HttpTarget(server.url, "fake-model", **options)
    try:
        return run_load(target, requests, load or Load(2), stall_timeout=20.0)
    finally:
        target.close()


def test_what_is_sent_and_what_is_counted(bench, server):
    result = replay(server, bench.requests(5, output_len=3), key="secret")
    assert result.complete and [trace.status for trace in result.traces] == ["ok"] * 5
    assert [(trace.input_len, trace.tokens) for trace in result.traces] == [(11, 3)] * 5
    assert server.seen == [("/v1/completions", "Bearer secret")] * 5
    assert server.bodies[0] == {
        "model": "fake-model",
        "prompt": [1] * 10,
        "max_tokens": 3,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_latencies_are_those_of_the_stream(bench, server):
    server.script = lambda body: completion(body["max_tokens"], gap=0.05)
    result = replay(server, bench.requests(2, output_len=5))
    for trace in result.traces:
        assert 0.05 <= trace.ttft < 0.25
        assert 0.045 <= trace.tpot < 0.1  # below 0.05 where the first token was read late
        assert len(trace.itl) == 4 and trace.e2el == pytest.approx(0.25, abs=0.15)


def test_the_usage_block_says_how_many_tokens_the_chunks_held(bench, server):
    server.script = lambda body: [choice("a b c d"), 0.1, choice(" e f g h", "length"), usage(7, 8), DONE]
    (trace,) = replay(server, bench.requests(1, output_len=8)).traces
    assert trace.succeeded and (trace.input_len, trace.tokens, len(trace.arrivals)) == (7, 8, 2)
    assert trace.tpot == pytest.approx(trace.itl[0] / 7)


def test_prompt_tokens_that_the_servers_cache_held_make_a_warning(bench, server):
    details = {"prompt_tokens": 8, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}}
    server.script = lambda body: [choice("a", "length"), data({"choices": [], "usage": details}), DONE]
    target = HttpTarget(server.url, "fake-model")
    work = Workload("fixed", bench.requests(4, output_len=1), bench.requests(1, output_len=1))
    record = measure(target, work, Load(1), env={"seed": 0}, label="server").record
    target.reset_stats()
    assert target.kv_stats() == {}
    target.close()
    assert record.kv == {"prefix_hit_rate": 0.25}
    assert record.note.startswith("25% of the prompt tokens came from the prefix cache: with a fixed seed")
    assert record.note in notes([RunRecord.from_dict(record.to_dict(), "file")])


def test_chat(server):
    def script(body):
        delta = lambda delta, finish=None: data({"choices": [{"delta": delta, "finish_reason": finish}]})  # noqa: E731
        yield delta({"role": "assistant", "content": ""})
        yield 0.1
        yield delta({"reasoning_content": "hm"})
        yield delta({"content": "yes"})
        yield delta({}, "length")
        yield usage(5, 2)

    server.script = script
    (trace,) = replay(server, [BenchRequest(0, "why?", 3, 2)], api="chat").traces
    assert trace.succeeded and len(trace.arrivals) == 2 and trace.ttft >= 0.1
    assert server.seen[0][0] == "/v1/chat/completions"
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "why?"}]
    (refused,) = replay(server, [BenchRequest(0, [1, 2], 2, 2)], api="chat").traces
    assert "takes text" in refused.error


@pytest.mark.parametrize(
    ("finish", "tokenizer", "expected"),
    [("length", True, 4), ("length", True, 3), ("length", False, 4), ("stop", True, 3), ("stop", False, 2)],
    ids=["as asked for", "the server's limit", "at a limit", "by the tokenizer", "by chunks"],
)
def test_tokens_without_a_usage_block(server, finish, tokenizer, expected):
    server.script = lambda body: [choice("one two"), choice(" three", finish), DONE]
    count = lambda text, *, add_special_tokens: {"input_ids": text.split()}  # noqa: E731
    asked = 5 if (finish, expected) == ("length", 3) else 4
    request = BenchRequest(0, [1], 1, asked)
    (trace,) = replay(server, [request], tokenizer=count if tokenizer else None).traces
    assert trace.tokens == expected and trace.input_len == 1
    assert trace.error == (None if expected == asked else f"ended after {expected} of {asked} tokens")


@pytest.mark.parametrize(
    ("parts", "headers", "reason"),
    [
        ([choice("a")], {}, "the stream broke off (no finish_reason)"),
        ([choice("a")], {"Content-Length": "9999"}, "the stream broke off (RemoteProtocolError)"),
        ([choice("a"), b"data: {not json\n\n"], {}, "the stream does not follow the API"),
        ([data({"choices": [7]})], {}, "the stream does not follow the API"),
        ([data([])], {}, "the stream does not follow the API"),
        ([b"data: " + b"[" * 200_000 + b"\n\n"], {}, "the stream does not follow the API"),
        ([choice("a b", "length"), usage(-3, 2)], {}, "the stream does not follow the API"),
        ([choice("a b", "length"), usage(3, 10**400)], {}, "the stream does not follow the API"),
        ([choice("a b", "length"), usage(math.inf, 2)], {}, "the stream does not follow the API"),
        ([choice("a"), data({"error": {"message": "out of\n memory"}})], {}, "out of memory"),
        ([choice("", "length"), usage(3, 2), DONE], {}, "ended without a token that could be timed"),
        ([choice("a", "stop"), usage(3, 1), DONE], {}, "ended after 1 of 2 tokens"),
    ],
)
def test_a_stream_that_breaks_is_a_failed_request(bench, server, parts, headers, reason):
    server.headers = headers
    server.script = lambda body: parts
    result = replay(server, bench.requests(3, output_len=2))
    assert result.complete and [trace.error for trace in result.traces] == [reason] * 3


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (500, b'{"error": {"message": "no memory"}}', "HTTP 500: no memory"),
        (400, b'{"error": "bad prompt"}', "HTTP 400: bad prompt"),
        (429, b"slow down", "HTTP 429: slow down"),
        (503, b"", "HTTP 503: no reason given"),
        (500, b"\x1b[31mred\x00 alert", "HTTP 500: [31mred alert"),
        (500, b"[" * 200_000, "HTTP 500: " + "[" * 160),
    ],
)
def test_http_errors_are_failed_requests_with_their_reason(bench, server, status, body, reason):
    server.status, server.script = status, lambda _: [body]
    result = replay(server, bench.requests(2))
    assert result.complete and [trace.error for trace in result.traces] == [reason] * 2


def test_an_error_that_is_null_is_none(bench, server):
    server.script = lambda body: [data({"choices": [{"text": "a"}], "error": None}), *completion(2)[1:]]
    (trace,) = replay(server, bench.requests(1, output_len=2)).traces
    assert trace.succeeded


def test_failures_are_counted_and_the_others_measured(bench, server):
    def script(body):
        return completion(2) if len(server.bodies) % 2 else [choice("a")]

    server.script = script
    target = HttpTarget(server.url, "fake-model")
    load = Workload("fixed", bench.requests(6, output_len=2), [])
    record = measure(target, load, Load(1), env={}, label="server").record
    target.close()
    assert record.complete and record.errors == {"the stream broke off (no finish_reason)": 3}
    assert (record.metrics["completed"], record.metrics["failed"]) == (3, 3)
    assert record.metrics["total_input_tokens"] == 33
    assert record.is_remote and record.engine["api"] == "completions" and record.kv == {}


def test_a_server_that_is_not_there(bench, server):
    server.url = f"http://127.0.0.1:{free_port()}"
    result = replay(server, bench.requests(2))
    assert [trace.error for trace in result.traces] == ["cannot connect to the server"] * 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_cancelled_request_hangs_up(bench, server):
    server.script = lambda body: completion(200, gap=0.01)
    load = Load(4, cancel_rate=0.5, seed=2)
    requests = bench.requests(4, output_len=200)
    planned = load.cancellations(requests)
    result = replay(server, requests, load)
    assert {trace.index for trace in result.traces if trace.status == "cancelled"} == set(planned)
    for trace in result.traces:
        assert trace.tokens == planned.get(trace.index, 200)
    assert len(server.hung_up) == 2


def test_ctrl_c_keeps_what_was_measured(bench, server):
    server.script = lambda body: completion(4, gap=0.05)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    result = replay(server, bench.requests(100, output_len=4))
    timer.join()
    done = sum(trace.succeeded for trace in result.traces)
    assert result.interrupted and 0 < done < 20 and result.unfinished == 100 - done


def test_an_open_loop_is_sent_on_time(bench, server):
    server.script = lambda body: completion(2, gap=0.3)
    result = replay(server, bench.requests(8, output_len=2), Load(request_rate=40, seed=1))
    assert all(trace.succeeded for trace in result.traces)
    assert max(trace.sent - trace.due for trace in result.traces) < 0.1
    assert result.duration < 0.2 + 0.6 + 0.5  # and not eight times 0.6 s
    assert summarize(result.traces, result.duration)["completed"] == 8


@pytest.mark.parametrize(("lag", "bound"), [(0.0001, False), (0.005, True)])
@pytest.mark.parametrize("in_process", [True, False])
def test_a_late_generator_is_marked(bench, lag, bound, in_process):
    class Late(Load):
        def due_times(self, requests):
            return [0.1 * i for i in range(len(requests))]

    target = bench.Target(bench.steady(0.001), punctual=True)
    poll = target.poll

    def late(timeout):
        events = poll(timeout)
        target.now += lag
        return events

    target.poll = late
    target.info = lambda: TargetInfo({"name": "m"}, in_process=in_process)
    work = Workload("fixed", bench.requests(5, output_len=1), [])
    record = measure(target, work, Late(request_rate=10), env={}, label="server", clock=target.clock).record
    assert record.generator_bound is (bound and not in_process)
    assert record.to_dict().get("generator_bound", False) is record.generator_bound
    assert ("p99_lag_ms" in record.metrics) is not in_process
    if record.generator_bound:
        from kvq_core.bench.compare import compare_records

        assert record.metrics["p99_lag_ms"] == pytest.approx(5.0, abs=0.5)
        assert (
            "server: the load generator itself was late, by 5.0 ms" in compare_records([record]).warnings()[0]
        )


@pytest.fixture
def raw_server():
    """`raw_server(serve)` runs `serve(connection, number)` for every connection; returns its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    numbers = count()

    def start(serve: Callable[[socket.socket, int], None]) -> str:
        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        serve(connection, next(numbers))

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def chunked(*parts: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


def test_bytes_may_be_cut_anywhere(bench, raw_server):
    """A byte at a time, with CRLF as SSE allows, and letters of several bytes."""
    event = data({"choices": [{"text": "né", "finish_reason": None}]}).replace(b"\\u00e9", "é".encode())
    end = choice("!", "length").replace(b"\n", b"\r\n")

    def serve(connection, number):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.recv(65536)
        for byte in chunked(event + event[:9], event[9:] + end, usage(4, 3), DONE):
            connection.sendall(bytes([byte]))

    result = replay(types.SimpleNamespace(url=raw_server(serve)), bench.requests(1, output_len=3))
    (trace,) = result.traces
    assert trace.error is None and (trace.input_len, trace.tokens, len(trace.arrivals)) == (4, 3, 3)


def test_an_answer_that_has_arrived_is_stamped_before_it_is_read(bench, raw_server):
    """Chunks that come in one piece are arrivals of one moment, however long the parser takes."""
    stream = chunked(*(choice("t", "length" if i == 199 else None) for i in range(200)), usage(1, 200), DONE)

    def serve(connection, number):
        connection.recv(65536)
        connection.sendall(stream)

    result = replay(types.SimpleNamespace(url=raw_server(serve)), bench.requests(1, output_len=200))
    (trace,) = result.traces
    assert trace.succeeded and len(trace.itl) == 199 and len(set(trace.itl) - {0.0}) <= 3


def test_connections_are_kept_and_a_stale_one_is_replaced(bench, raw_server):
    """The server drops the first connection when it reads the third request, which is sent anew, once."""
    read: list[int] = []

    def serve(connection, number):
        while connection.recv(65536):
            read.append(number)
            if len(read) == 3:
                return
            connection.sendall(chunked(choice("a", "length"), usage(1, 1), DONE))

    result = replay(types.SimpleNamespace(url=raw_server(serve)), bench.requests(4, output_len=1), Load(1))
    assert [trace.status for trace in result.traces] == ["ok"] * 4
    assert read == [0, 0, 0, 1, 1]


def test_who_hangs_up_late_has_seen_the_request(bench, raw_server):
    """It is not sent again, which would hide that servers drop requests, and load them twice."""
    read: list[int] = []

    def serve(connection, number):
        while connection.recv(65536):
            read.append(number)
            if len(read) == 2:
                time.sleep(2 * STALE_SECONDS)
                return
            connection.sendall(chunked(choice("a", "length"), usage(1, 1), DONE))

    result = replay(types.SimpleNamespace(url=raw_server(serve)), bench.requests(3, output_len=1), Load(1))
    assert [trace.error for trace in result.traces] == [
        None,
        "the stream broke off (RemoteProtocolError)",
        None,
    ]
    assert read == [0, 0, 1]


def test_a_server_by_its_name(bench, server):
    """Names are looked up in threads, which end while connections are still being closed."""
    server.url = server.url.replace("127.0.0.1", "localhost")
    result = replay(server, bench.requests(4, output_len=2))
    assert [trace.status for trace in result.traces] == ["ok"] * 4


def test_a_server_that_always_hangs_up_is_not_asked_for_ever(bench, raw_server):
    read: list[int] = []

    def serve(connection, number):
        connection.recv(65536)
        read.append(number)

    result = replay(types.SimpleNamespace(url=raw_server(serve)), bench.requests(2), Load(1))
    assert [trace.error for trace in result.traces] == ["the stream broke off (RemoteProtocolError)"] * 2
    assert read == [0, 1]


def test_what_is_no_http_is_a_failed_request(bench, raw_server):
    def serve(connection, number):
        connection.recv(65536)
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

    (trace,) = replay(types.SimpleNamespace(url=raw_server(serve)), bench.requests(1), Load(1)).traces
    assert trace.error == "the stream broke off (RemoteProtocolError)"


@pytest.mark.parametrize("url", ["http://h:80", "http://h:80/", "http://h:80/v1", "http://h:80/v1/"])
def test_base_urls(url):
    assert normalize_url(url) == "http://h:80/v1"


@pytest.mark.parametrize(
    "url",
    [
        "", "h:80", "ftp://h", "http://", "http://me:secret@h", "http://me:secret@h:99999", "http://h/?key=1",
        "http://h:99999", "http://h:x", "http://h:0", "http://[::1", "http://a..b", "http://h h",
        "http://h/a b", "http://h/é", "http://é.org",
    ],
)  # fmt: skip
def test_wrong_base_urls(url):
    with pytest.raises(UsageError) as caught:
        normalize_url(url)
    assert "secret" not in caught.value.message


def test_the_served_model(server):
    assert find_served_model(server.url, "key") == "fake-model"
    assert server.seen == [("/v1/models", "Bearer key")]
    server.models = ["a", "b"]
    with pytest.raises(KvqError, match="a, b"):
        find_served_model(server.url, None)
    server.models = []
    with pytest.raises(KvqError, match=r"/v1/models names no model \(HTTP 200\)"):
        find_served_model(server.url, None)
    server.models_status = 401
    with pytest.raises(KvqError, match="refuses the key"):
        find_served_model(server.url, None)
    with pytest.raises(KvqError, match="cannot reach"):
        find_served_model(f"http://127.0.0.1:{free_port()}", None)


class Words:
    """A token a word, ids being lengths of words."""

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    def __len__(self) -> int:
        return 100

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join("x" * i for i in ids)


@pytest.fixture
def tokenizers(monkeypatch):
    """Names whose tokenizer was loaded."""
    import sys

    names: list[str] = []
    module = types.ModuleType("kvq_core.models.load")
    module.load_tokenizer = lambda name: names.append(name) or (None if name == "bare" else Words())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvq_core.models.load", module)
    if "kvq_core.models" not in sys.modules:
        monkeypatch.setitem(sys.modules, "kvq_core.models", types.ModuleType("kvq_core.models"))
    return names


SMALL = ("--concurrency", 2, "--num-prompts", 4, "--max-output-len", 5)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_the_command(kvq, server, tokenizers, tmp_path, monkeypatch, api):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    chunk = lambda i, n: data({"choices": [{"delta": {"content": "t"}, "finish_reason": None}]})  # noqa: E731
    if api == "chat":
        server.script = lambda body: [
            *(chunk(i, body) for i in range(body["max_tokens"])),
            data({"choices": [{"delta": {}, "finish_reason": "length"}]}),
            usage(9, body["max_tokens"]),
        ]
    file = tmp_path / "r.json"
    code, out, err = kvq(
        "profile-throughput", "--base-url", server.url, "--api", api, *SMALL, "--output", file
    )
    assert code == 0, err
    record = json.loads(file.read_text())
    assert (record["label"], record["completed"], record["failed"]) == ("fake-model", 4, 0)
    assert record["engine"] == {"backend": "http", "url": f"{server.url}/v1", "api": api}
    assert "secret" not in file.read_text() and tokenizers == ["fake-model"]
    assert {key for _, key in server.seen} == {"Bearer secret"}
    assert f"{server.url}/v1" in out and "measured on a CPU" not in out
    prompts = [body.get("prompt") or body["messages"][0]["content"] for body in server.bodies]
    assert all(isinstance(prompt, str if api == "chat" else list) for prompt in prompts)


def test_a_tokenizer_is_named_even_if_it_is_the_default_model(kvq, server, tokenizers):
    """Without --model it is the served model's; `--model demo` says otherwise."""
    code, _, err = kvq("profile-throughput", "--base-url", server.url, "--model", "demo", *SMALL)
    assert code == 0, err
    assert tokenizers == ["demo"] and server.bodies[0]["model"] == "fake-model"


def test_names_of_model_and_key(kvq, server, tokenizers, monkeypatch):
    monkeypatch.setenv("MY_KEY", "mine")
    server.models = ["a", "b"]
    flags = ("--base-url", server.url, "--model", "folder", "--served-model", "b", "--api-key-env", "MY_KEY")
    code, out, err = kvq("profile-throughput", *flags, *SMALL, "--label", "vLLM", "--json")
    assert code == 0, err
    assert json.loads(out)["label"] == "vLLM" and json.loads(out)["model"]["name"] == "b"
    assert tokenizers == ["folder"] and server.bodies[0]["model"] == "b"
    assert server.seen[0] == ("/v1/completions", "Bearer mine")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--policy", "42"), 2, "--policy is up to the server"),
        (("--kv-memory", "1GiB"), 2, "--kv-memory is up to the server"),
        (("--max-num-seqs", "4"), 2, "--max-num-seqs is up to the server"),
        (("--api", "grpc"), 2, "unknown --api `grpc`"),
        (("--api-key-env", "NO_SUCH_VARIABLE"), 2, "nothing in the environment variable NO_SUCH_VARIABLE"),
        (("--model", "bare"), 1, "bare has no tokenizer"),
        (("--base-url", "host:80"), 2, "is not the URL of a server"),
    ],
)
def test_mistakes_are_one_clear_error(kvq, server, tokenizers, flags, code, message):
    found, out, err = kvq("profile-throughput", "--base-url", server.url, *SMALL, *flags)
    assert found == code and out == "" and message in err and "hint:" in err
    assert not server.bodies


def test_a_server_that_refuses_everything_is_an_error(kvq, server, tokenizers):
    server.status, server.script = 400, lambda body: [b"unknown field ignore_eos"]
    code, out, err = kvq("profile-throughput", "--base-url", server.url, *SMALL)
    assert code == 1 and "warm-up requests failed: HTTP 400: unknown field ignore_eos" in err and out == ""


def test_served_model_without_a_server(kvq):
    code, _, err = kvq("profile-throughput", "--served-model", "x")
    assert code == 2 and "--served-model needs --base-url" in err
