"""A target that plays a script on a clock of its own, and records made by hand."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvq_cli import console
from kvq_cli.app import main
from kvq_core.bench.metrics import summarize
from kvq_core.bench.record import RunRecord
from kvq_core.bench.target import BenchRequest, Event, TargetInfo, Usage
from kvq_core.bench.trace import RequestTrace
from kvq_core.errors import KvqError


@dataclass
class Script:
    """What happens to one request: seconds between its events, tokens of each, and how it ends."""

    gaps: list[float]
    tokens: list[int] | None = None
    error: str | None = None
    """Reported with the last event."""
    refuse: str | None = None
    """`send` raises this."""


@dataclass
class ScriptedTarget:
    """`script(request)` is played from the moment of sending; `poll` moves the clock to the next event."""

    script: Callable[[BenchRequest], Script]
    now: float = 100.0
    raise_at_poll: dict[int, BaseException] = field(default_factory=dict)
    sent: list[tuple[float, int]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    resets: list[float] = field(default_factory=list)
    polls: int = 0
    max_running: int = 0
    silent: bool = False
    punctual: bool = False
    """`poll` returns when its time is up, as an open loop needs, and not only when something happens."""
    pending: list[Event] = field(default_factory=list)
    policy: dict[str, Any] = field(default_factory=lambda: {"name": "turbo", "number": 42, "label": "turbo"})

    def clock(self) -> float:
        return self.now

    def info(self) -> TargetInfo:
        return TargetInfo(model={"name": "scripted"}, policy=self.policy, engine={"device": "cpu"})

    def send(self, request: BenchRequest) -> None:
        script = self.script(request)
        if script.refuse:
            raise KvqError(script.refuse)
        self.sent.append((self.now, request.index))
        time, last = self.now, len(script.gaps) - 1
        for i, gap in enumerate(script.gaps):
            time += gap
            tokens = script.tokens[i] if script.tokens else 1
            error = script.error if i == last else None
            self.pending.append(Event(request.index, time, tokens, i == last, error))
        self.max_running = max(self.max_running, len({event.index for event in self.pending}))

    def poll(self, timeout: float) -> list[Event]:
        self.polls += 1
        if self.polls in self.raise_at_poll:
            raise self.raise_at_poll[self.polls]
        next_event = min((event.time for event in self.pending), default=math.inf)
        too_late = self.punctual and next_event > self.now + timeout
        if self.silent or not self.pending or too_late:
            self.now += timeout
            return []
        self.now = next_event
        due = [event for event in self.pending if event.time == self.now]
        self.pending = [event for event in self.pending if event.time > self.now]
        return due

    def cancel(self, index: int) -> None:
        self.cancelled.append(index)

    def usage(self) -> Usage:
        return Usage(7 * self.polls, len({event.index for event in self.pending}), 0)

    def reset_stats(self) -> None:
        self.resets.append(self.now)

    def kv_stats(self) -> dict[str, Any]:
        return {"bits_per_element": 3.1875, "bytes_per_token": 2295.0, "capacity_tokens": 1000}

    def close(self) -> None:
        pass


def steady(first: float = 0.5, gap: float = 0.25) -> Callable[[BenchRequest], Script]:
    """Every request: first token after `first` seconds, the others `gap` apart."""
    return lambda request: Script([first] + [gap] * (request.output_len - 1))


def requests(count: int, output_len: int = 4, input_len: int = 10, start: int = 0) -> list[BenchRequest]:
    return [BenchRequest(start + i, [1] * input_len, input_len, output_len) for i in range(count)]


def trace(
    sent: float,
    times: list[float],
    *,
    tokens: list[int] | None = None,
    error: str | None = None,
    **lengths: int,
) -> RequestTrace:
    """A finished trace with tokens at the given times."""
    arrivals = list(zip(times, tokens or [1] * len(times), strict=True))
    asked = sum(count for _, count in arrivals)
    return RequestTrace(
        index=lengths.get("index", 0),
        input_len=lengths.get("input_len", 10),
        output_len=asked,
        due=sent,
        sent=sent,
        arrivals=arrivals,
        ended=times[-1] if times else sent,
        error=error,
    )


def make_record(
    name: str = "none",
    number: int | None = 0,
    *,
    speed: float = 1.0,
    kv: dict[str, Any] | None = None,
    complete: bool = True,
    failed: int = 0,
    concurrency: int = 2,
    **parts: dict[str, Any],
) -> RunRecord:
    """Two requests of 10 + 5 tokens, first token after 1 s, the others 0.5 s apart, divided by `speed`."""
    times = [1.0, 1.5, 2.0, 2.5, 3.0]
    traces = [trace(0.0, [time / speed for time in times], index=i) for i in range(2)]
    traces += [trace(0.0, [1.0], error="no luck", index=9 + i) for i in range(failed)]
    workload = {"name": "fixed", "requests_sha256": "abc", "seed": 0, "concurrency": concurrency}
    return RunRecord(
        label=name,
        complete=complete,
        policy={"name": name, "number": number, "key": name, "value": name, "sink": 0, "recent": 0},
        model={"name": "demo", "dtype": "float32"} | parts.get("model", {}),
        env={"gpu": None, "device": "cpu", "versions": {"torch": "2.13"}, "seed": 0} | parts.get("env", {}),
        workload=workload | parts.get("workload", {}),
        kv={"bits_per_element": 16.0, "bytes_per_token": 1000.0, "capacity_tokens": 100} | (kv or {}),
        metrics=summarize(traces, 4.0 / speed),
        errors={"no luck": failed} if failed else {},
    )


class WordTokenizer:
    """A token a word, one in front where special tokens are asked for."""

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        first = [0] if add_special_tokens else []
        return {"input_ids": [first + [len(word) for word in text.split()] for text in texts]}


@dataclass
class Bench:
    """What the tests of this folder share."""

    Script = Script
    Target = ScriptedTarget
    Tokenizer = WordTokenizer
    steady = staticmethod(steady)
    requests = staticmethod(requests)
    trace = staticmethod(trace)
    record = staticmethod(make_record)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Write a JSON document into the test's folder; returns its path."""

    def write(name: str, document: Any) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(document), "utf-8")
        return path

    return write


@pytest.fixture
def kvq(capsys):
    """`kvq("compare", ...)` -> (exit code, stdout, stderr)."""

    def run(*args: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        console.out.cache_clear()
        console.err.cache_clear()
        with pytest.raises(SystemExit) as done:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return done.value.code, captured.out, captured.err

    return run
