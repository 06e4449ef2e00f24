"""The load generator: a closed loop that keeps requests in flight, or an open one that sends at a rate."""

import math
import random
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from kvq_core.bench.target import BenchRequest, Event, Target
from kvq_core.bench.timeline import Timeline
from kvq_core.bench.trace import RequestTrace
from kvq_core.errors import KvqError, UsageError

POLL_SECONDS = 0.1

Progress = Callable[[int, int], None]
"""Called with (requests ended, tokens seen) whenever something happened."""


@dataclass(frozen=True)
class Ramp:
    """Requests per second from the first request to the last, linear or exponential in their number."""

    shape: str
    start: float
    end: float

    @classmethod
    def parse(cls, text: str) -> "Ramp":
        """`linear:1..10` or `exponential:1..64`."""
        match = re.fullmatch(r"(linear|exponential):(\d*\.?\d+)\.\.(\d*\.?\d+)", text)
        if not match or not (float(match[2]) and float(match[3])):
            raise UsageError(
                f"`{text}` is no --ramp-up",
                "linear or exponential, and two rates above 0, as in `--ramp-up linear:1..10`",
            )
        return cls(match[1], float(match[2]), float(match[3]))

    def rates(self, count: int) -> list[float]:
        """Requests per second at each of `count` requests."""
        shares = [i / max(1, count - 1) for i in range(count)]
        if self.shape == "linear":
            return [self.start + (self.end - self.start) * share for share in shares]
        return [self.start * (self.end / self.start) ** share for share in shares]

    def __str__(self) -> str:
        return f"{self.shape}:{self.start:g}..{self.end:g}"


@dataclass(frozen=True)
class Load:
    """How requests are sent: the next one as soon as one ends or, with a rate, each when it is due."""

    concurrency: int | None = None
    """Most requests in flight; None: no cap, which needs a rate."""
    request_rate: float | None = None
    """Requests per second; None: a closed loop."""
    ramp: "Ramp | None" = None
    """A rate that changes from the first request to the last, instead of a constant one."""
    trace_speed: float | None = None
    """Replay the arrivals of a trace, this many times as fast."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of intervals: 1 is a Poisson process, less is burstier."""
    duration: float | None = None
    """Seconds after which nothing more is sent; what is in flight then is answered still."""
    cancel_rate: float = 0.0
    """Share of the requests that are cancelled in the middle of their answer."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.request_rate is not None and not 0 < self.request_rate < math.inf:
            raise UsageError(f"--request-rate must be above 0, got {self.request_rate:g}")
        if not 0 < self.burstiness < math.inf:
            raise UsageError(f"--burstiness must be above 0, got {self.burstiness:g}", "1 is Poisson")
        if self.request_rate is None and self.ramp is None and self.burstiness != 1:
            raise UsageError("--burstiness needs --request-rate", "without a rate nothing arrives by itself")
        if sum(how is not None for how in (self.request_rate, self.ramp, self.trace_speed)) > 1:
            raise UsageError(
                "--request-rate, --ramp-up and a trace are one or the other", "each says when requests arrive"
            )
        if self.trace_speed is not None and not 0 < self.trace_speed < math.inf:
            raise UsageError(f"--trace-speed must be above 0, got {self.trace_speed:g}")
        if self.duration is not None and not 0 < self.duration < math.inf:
            raise UsageError(f"--duration must be above 0 seconds, got {self.duration:g}")
        if not 0 <= self.cancel_rate < 1:
            raise UsageError(f"--cancel-rate must lie in [0, 1), got {self.cancel_rate:g}")
        assert self.concurrency or self.is_open, "a closed loop needs a concurrency"

    @property
    def is_open(self) -> bool:
        """Whether requests arrive by themselves."""
        return any(how is not None for how in (self.request_rate, self.ramp, self.trace_speed))

    def due_times(self, requests: Sequence[BenchRequest]) -> list[float]:
        """Seconds from the start at which requests are due; -inf in a closed loop, where only room counts.

        Intervals are drawn, then scaled so that the last request is due at count / rate, or, on a ramp, at
        the sum of 1 / rate, as `vllm bench serve` does: runs at the same rate carry the same load.
        """
        count = len(requests)
        if self.trace_speed is not None:
            return [(request.arrival or 0.0) / self.trace_speed for request in requests]
        if not self.is_open or not count:
            return [-math.inf] * count
        rates = self.ramp.rates(count) if self.ramp else [self.request_rate or 0.0] * count
        generator = random.Random(f"arrivals {self.seed}")
        times = list(accumulate(generator.gammavariate(self.burstiness, 1.0) / rate for rate in rates))
        scale = sum(1 / rate for rate in rates) / (times[-1] or math.inf)  # all zero: one burst
        return [time * scale for time in times]

    def cancellations(self, requests: Sequence[BenchRequest]) -> dict[int, int]:
        """Request -> tokens after which it is cancelled: at least one, and fewer than it asks for."""
        generator = random.Random(f"cancellations {self.seed}")
        several = [request for request in requests if request.output_len > 1]
        chosen = generator.sample(several, min(len(several), round(self.cancel_rate * len(requests))))
        return {request.index: generator.randint(1, request.output_len - 1) for request in chosen}

    def describe(self) -> dict[str, Any]:
        """What a run record says of it."""
        description: dict[str, Any] = {"loop": "closed", "concurrency": self.concurrency}
        if self.request_rate is not None:
            description |= {"loop": "open", "request_rate": self.request_rate, "burstiness": self.burstiness}
        if self.ramp is not None:
            description |= {"loop": "open", "ramp_up": str(self.ramp), "burstiness": self.burstiness}
        if self.trace_speed is not None:
            description |= {"loop": "open", "trace_speed": self.trace_speed}
        if self.duration is not None:
            description["duration_limit_s"] = self.duration
        if self.cancel_rate:
            description["cancel_rate"] = self.cancel_rate
        return description


@dataclass
class LoadResult:
    """What a loop saw; `interrupted` or `error` say that it ended early."""

    traces: list[RequestTrace] = field(default_factory=list)
    start: float = 0.0
    end: float = 0.0
    interrupted: bool = False
    error: Exception | None = None
    unfinished: int = 0
    """Requests that were not sent, or not answered, because the loop ended early."""
    unsent: int = 0
    """Requests that were left when the load's duration was over."""
    timeline: Timeline = field(default_factory=lambda: Timeline(0.0))

    @property
    def complete(self) -> bool:
        return not self.interrupted and self.error is None

    @property
    def duration(self) -> float:
        """Seconds from the start to the last event."""
        return self.end - self.start

    @property
    def request_rate(self) -> float:
        """Requests sent per second, from the start to the last send."""
        seconds = max((trace.sent for trace in self.traces), default=self.start) - self.start
        return len(self.traces) / seconds if seconds > 0 else 0.0


def run_load(
    target: Target,
    requests: Sequence[BenchRequest],
    load: Load,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
    stall_timeout: float = 3600.0,
) -> LoadResult:
    """Send `requests` in order, each when it is due and `load.concurrency` leaves room.

    Never raises for what happens during the run: Ctrl-C, a target that breaks and one that says nothing
    for `stall_timeout` seconds end the loop early, and the result keeps what was measured until then.
    A request that the target refuses, that fails, or that ends short of its `output_len` is a failed one.
    """
    assert len({request.index for request in requests}) == len(requests), "indices must differ"
    traces: dict[int, RequestTrace] = {}
    running: set[int] = set()
    result = LoadResult(start=clock())
    result.timeline = timeline = Timeline(result.start)
    last = result.start
    waiting = deque(zip(load.due_times(requests), requests, strict=True))
    free = deque([-math.inf] * min(load.concurrency or len(requests), len(requests)))
    """For every request that may still be sent: since when."""
    cancel_after = load.cancellations(requests)
    chunks = counted = 0
    """Of answers that ended: their chunks, and the tokens that these were."""
    stop = result.start + (math.inf if load.duration is None else load.duration)
    ended = tokens = 0
    try:
        while waiting or running:
            if waiting and clock() >= stop:
                result.unsent = len(waiting)
                waiting.clear()
            while waiting and free and result.start + waiting[0][0] <= clock():
                due, request = waiting.popleft()
                trace = _trace(request, result.start + due, free.popleft(), clock())
                traces[trace.index] = trace
                _send(target, request, trace, clock)
                last = max(last, trace.sent)
                if trace.ended is None:
                    running.add(trace.index)
                else:
                    ended, last = ended + 1, trace.ended
                    free.append(trace.ended)
            if not waiting and not running:
                break
            in_flight = len(running)
            until_due = result.start + waiting[0][0] - clock() if waiting and free else math.inf
            events = [
                event
                for event in target.poll(min(max(until_due, 0.0), POLL_SECONDS))
                if event.index in running
            ]
            if timeline.is_due(now := clock()):
                timeline.add(now, in_flight, target.usage())
            for event in events:
                trace = traces[event.index]
                if trace.ended is not None:
                    continue  # cancelled, and more of it came with the same events
                _record(trace, event)
                tokens += event.tokens
                last = max(last, event.time)
                if event.counts is not None:
                    chunks, counted = chunks + len(trace.arrivals), counted + trace.tokens
                limit = cancel_after.get(trace.index)
                per_chunk = max(1.0, counted / max(1, chunks))
                if limit is not None and trace.ended is None and trace.tokens * per_chunk >= limit:
                    target.cancel(trace.index)
                    trace.cancelled, trace.ended = True, event.time
                if trace.ended is not None:
                    running.discard(event.index)
                    free.append(event.time)
                    ended += 1
            if not events and running and clock() - last > stall_timeout:
                raise KvqError(
                    f"nothing happened for {stall_timeout:.0f} s; the target seems to hang",
                    "its log may say why; what was measured until then is kept",
                )
            if events and progress:
                progress(ended, tokens)
    except KeyboardInterrupt:
        result.interrupted = True
    except Exception as error:
        result.error = error
    result.end = last if result.complete else max(last, clock())
    result.traces = list(traces.values())
    result.unfinished = len(waiting) + sum(trace.ended is None for trace in result.traces)
    for index in running:
        # A broken target may refuse; what was measured matters more.
        with suppress(Exception):
            target.cancel(index)
    return result


def _trace(request: BenchRequest, due: float, free: float, now: float) -> RequestTrace:
    """The trace of a request, sent now, that is due since `due` and has room since `free`."""
    ready = max(due, free)
    return RequestTrace(
        request.index,
        request.input_len,
        request.output_len,
        due=due if due > -math.inf else now,
        sent=now,
        lag=now - ready if ready > -math.inf else 0.0,
    )


def _send(target: Target, request: BenchRequest, trace: RequestTrace, clock: Callable[[], float]) -> None:
    try:
        target.send(request)
    except KvqError as error:
        trace.error, trace.ended = error.message, clock()


def _record(trace: RequestTrace, event: Event) -> None:
    if event.tokens:
        trace.arrivals.append((event.time, event.tokens))
    trace.lag += event.lag
    if event.counts is not None:
        trace.input_len, trace.counted = event.counts
    if event.error is not None:
        trace.error, trace.ended = event.error or "unknown error", event.time
    elif event.finished:
        trace.ended = event.time
        if trace.tokens < trace.output_len:
            trace.error = f"ended after {trace.tokens} of {trace.output_len} tokens"
        elif not trace.arrivals:
            trace.error = "ended without a token that could be timed"
