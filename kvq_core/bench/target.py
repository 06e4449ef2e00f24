"""What the harness drives: anything that takes requests and reports tokens.

The harness is single-threaded: it calls `send` when a request is due and `poll` for what happened.
An in-process engine runs one step in `poll`; an HTTP target drains what its streams received.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class BenchRequest:
    """One request of a workload."""

    index: int
    prompt: str | list[int]
    input_len: int
    """Tokens of the prompt."""
    output_len: int
    """Tokens to generate; end-of-sequence is ignored, so that every policy does the same work."""
    arrival: float | None = None
    """In a trace, seconds from its start at which the request arrives."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a request: new tokens, its end, or its failure."""

    index: int
    time: float
    """Seconds on the clock of `time.perf_counter`."""
    tokens: int = 0
    finished: bool = False
    error: str | None = None
    counts: tuple[int, int] | None = None
    """At the end, tokens of prompt and answer, where `tokens` were but chunks of a stream."""
    lag: float = 0.0
    """At the end, seconds that the target's client itself was late in sending the request."""


@dataclass(frozen=True)
class TargetInfo:
    """What a target says of itself; goes into the run record."""

    model: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    in_process: bool = True
    """Whether `poll` does the target's work; then it is no fault of the load generator that sends wait."""


@dataclass(frozen=True)
class Usage:
    """What a target held while it was polled last."""

    kv_tokens: int
    """Tokens in the cache."""
    running: int
    """Requests that it works on."""
    waiting: int
    """Requests that it has and does not work on, preempted ones among them."""


class Target(Protocol):
    """What `run_load` drives. Times are those of `time.perf_counter`."""

    def info(self) -> TargetInfo: ...

    def send(self, request: BenchRequest) -> None:
        """Take a request; returns at once. Time counts from before this call."""
        ...

    def poll(self, timeout: float) -> list[Event]:
        """What happened since the last call; waits at most `timeout` seconds for something to happen."""
        ...

    def cancel(self, index: int) -> None: ...

    def usage(self) -> Usage | None:
        """What it held during the last `poll`; None where that is not known. Called often, so it must be
        quick."""
        ...

    def reset_stats(self) -> None:
        """Forget peaks and counters; called when the measured window starts."""
        ...

    def kv_stats(self) -> dict[str, Any]:
        """`bits_per_element, bytes_per_token, memory_bytes, pages, capacity_tokens, peak_tokens,
        preemptions`, and, where prefixes are cached, `prefix_hit_rate`."""
        ...

    def close(self) -> None: ...
