"""`kvq serve` and `kvq chat --url` as they are typed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--kv-memory", "4MiB", "--page-size", "16", "--max-num-seqs", "4", "--port", "0")


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "kvq_cli.app", *args]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))} | extra


def kvq(*args: str, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args), input=stdin, capture_output=True, text=True, timeout=100, env=environment(**extra)
    )


class Served:
    """`kvq serve` as a process; what it says is in `talk`."""

    def __init__(self, *args: str, **extra: str) -> None:
        self.process = subprocess.Popen(
            command("serve", *args), stderr=subprocess.PIPE, text=True, env=environment(**extra)
        )
        self.talk = ""
        assert self.process.stderr
        while not (found := re.search(r"serving .* at (http\S+);", self.talk)):
            line = self.process.stderr.readline()
            assert line, self.talk
            self.talk += line
        self.url = found[1]

    def end(self, sig: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        assert self.process.stderr
        self.talk += self.process.stderr.read()
        return self.process.wait(60)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish(folder: Path, sig: signal.Signals) -> None:
    body = {"model": str(folder), "prompt": "Hi", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with Served("--model", str(folder), "--policy", "42", *SMALL) as served:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            served.process.send_signal(sig)
            assert len([line for line in lines if line]) == 200
        assert served.process.wait(60) == 0
        served.talk += served.process.stderr.read()  # type: ignore[union-attr]
        assert "finishing 1 requests, for 30 s at most" in served.talk
        assert "Traceback" not in served.talk


def test_a_second_signal_ends_them(folder: Path) -> None:
    body = {"model": str(folder), "prompt": "Hi", "max_tokens": 250, "ignore_eos": True, "stream": True}
    with Served("--model", str(folder), *SMALL) as served:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body | {"n": 4}) as stream:
            next(stream.iter_lines())
            served.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
            assert served.end(signal.SIGINT) == 0
        assert "Traceback" not in served.talk


def test_mistakes(folder: Path) -> None:
    done = kvq("serve", "--api-key-env", "KVQ_NO_KEY")
    assert done.returncode == 2 and "nothing in the environment variable KVQ_NO_KEY" in done.stderr
    done = kvq("serve", "--model", "./nowhere", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 1
    assert "anyone who reaches this address can use the server" in done.stderr
    done = kvq("serve", "--host", "nowhere.invalid")
    assert done.returncode == 1 and "cannot listen on nowhere.invalid" in done.stderr


# kvq chat --url


def test_chat(serve: Any) -> None:
    running = serve(api_key="secret")
    talk = "Hello there\n/policy 42\n/stats\n/policy\n" + "And so on and on?\n" * 8
    done = kvq("chat", "--url", running.url, "--api-key-env", "KEY", "-n", "30", stdin=talk, KEY="secret")
    assert done.returncode == 0
    assert "tiny, policy of the server." in done.stderr
    assert "error: the server sets the policy" in done.stderr
    assert re.search(r"last answer   \d+ tokens, first after", done.stderr)
    assert "the context is full: the oldest 2 messages" in done.stderr
    assert done.stderr.count("error") == 1
    assert done.stdout.count("\n") >= 9
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 30}
    answer = httpx.post(
        f"{running.url}/v1/chat/completions",
        json=body | {"temperature": 0},
        headers={"Authorization": "Bearer secret"},
    )
    assert done.stdout.startswith(answer.json()["choices"][0]["message"]["content"] + "\n")


def test_what_a_chat_is_refused(serve: Any) -> None:
    running = serve(api_key="secret")
    done = kvq("chat", "--url", running.url, stdin="Hi\n")
    assert done.returncode == 1
    assert "401" in done.stderr and "the API key is wrong" in done.stderr and "--api-key-env" in done.stderr
    chat = ("chat", "--url", running.url, "--api-key-env", "KEY")
    done = kvq(*chat, "--model", "gpt-4", stdin="Hi\n", KEY="secret")
    assert "no model `gpt-4`" in done.stderr
    done = kvq(*chat, "-n", "9", stdin="x" * 300 + "\nHi\n", KEY="secret")
    assert "takes 256 tokens" in done.stderr and done.stdout


def test_mistakes_of_a_chat() -> None:
    done = kvq("chat", "--url", "http://127.0.0.1:9", stdin="Hi\n")
    assert done.returncode == 1 and "nothing answers at http://127.0.0.1:9/v1" in done.stderr
    done = kvq("chat", "--url", "localhost")
    assert done.returncode == 2 and "is no URL of a server" in done.stderr
    done = kvq("chat", "--url", "http://a..b")
    assert done.returncode == 2 and "is no URL of a server" in done.stderr
    for flags in (("--policy", "42"), ("--no-prefix-caching",)):
        done = kvq("chat", "--url", "http://localhost:1", *flags)
        assert done.returncode == 2 and "exclude each other" in done.stderr
    done = kvq("serve", "--shutdown-timeout", "inf")
    assert done.returncode == 2 and "'--shutdown-timeout'" in done.stderr
    done = kvq("chat", "--api-key-env", "KEY")
    assert done.returncode == 2 and "--url" in done.stderr


class Other(BaseHTTPRequestHandler):
    """Another server, which sends its `events` whatever it is asked, and no usage."""

    events: list[str]
    bodies: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._send(b'{"data": [{"id": "other-model"}]}')

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self._send("".join(f"{event}\n\n" for event in self.events).encode())

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def other() -> Iterator[tuple[str, type[Other]]]:
    handler = type("Handler", (Other,), {"events": [], "bodies": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api/", handler
        server.shutdown()
        thread.join()


def delta(text: str | None, finish: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


def test_chat_with_another_server(other: tuple[str, type[Other]]) -> None:
    url, handler = other
    handler.events = [
        ": a comment",
        delta(None),
        delta("Good "),
        delta("day"),
        delta(None, "stop"),
        "data: [DONE]",
    ]
    done = kvq("chat", "--url", url, "--stop", "x", "--top-k", "3", stdin="Hi\nHo\n/stats\n")
    assert done.stdout == "Good day\nGood day\n" and "2 tokens, first after" in done.stderr
    first, second = handler.bodies
    assert first["model"] == "other-model" and first["stop"] == ["x"] and first["top_k"] == 3
    assert [message["content"] for message in second["messages"]] == ["Hi", "Good day", "Ho"]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (['data: {"error": {"message": "it fell over"}}'], "the server broke off the answer: it fell over"),
        ([delta("Good")], "the server broke off the answer"),
        (["data: <html>"], "the server sent something that is not JSON: <html>"),
    ],
)
def test_streams_that_break(other: tuple[str, type[Other]], events: list[str], message: str) -> None:
    url, handler = other
    handler.events = events
    done = kvq("chat", "--url", url, stdin="Hi\n")
    assert done.returncode == 1 and f"error: {message}" in done.stderr and "hint" in done.stderr


@pytest.mark.demo
def test_the_demo_model_served() -> None:
    with Served("--port", "0", "--policy", "42", "--kv-memory", "64MiB") as served:
        question = "What is the capital of France? One word."
        remote = kvq("chat", "--url", served.url, "-n", "12", stdin=question + "\n")
        assert served.end() == 0
    local = kvq("chat", "--policy", "42", "--kv-memory", "64MiB", "-n", "12", stdin=question + "\n")
    assert remote.stdout == local.stdout and "Paris" in remote.stdout
