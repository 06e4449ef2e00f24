"""The load generator: a closed loop that keeps a set number of requests in flight."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kvq_core.bench.target import BenchRequest, Event, Target
from kvq_core.bench.trace import RequestTrace
from kvq_core.errors import KvqError

POLL_SECONDS = 0.1

Progress = Callable[[int, int], None]
"""Called with (requests ended, tokens seen) whenever something happened."""


@dataclass
class LoadResult:
    """What a loop saw; `interrupted` or `error` say that it ended early."""

    traces: list[RequestTrace] = field(default_factory=list)
    start: float = 0.0
    end: float = 0.0
    interrupted: bool = False
    error: Exception | None = None
    unsent: int = 0

    @property
    def complete(self) -> bool:
        return not self.interrupted and self.error is None

    @property
    def duration(self) -> float:
        """Seconds from before the first send to the last event."""
        return self.end - self.start


def run_closed_loop(
    target: Target,
    requests: Sequence[BenchRequest],
    concurrency: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
    stall_timeout: float = 3600.0,
) -> LoadResult:
    """Send `requests` in order, `concurrency` at a time, the next one as soon as one ends.

    Never raises for what happens during the run: Ctrl-C, a target that breaks and one that says nothing
    for `stall_timeout` seconds end the loop early, and the result keeps what was measured until then.
    A request that the target refuses, that fails, or that ends short of its `output_len` is a failed one.
    """
    assert concurrency > 0
    assert len({request.index for request in requests}) == len(requests), "indices must differ"
    waiting = deque(requests)
    traces: dict[int, RequestTrace] = {}
    running: set[int] = set()
    result = LoadResult(start=clock())
    last = result.start
    ended = tokens = 0
    try:
        while waiting or running:
            while waiting and len(running) < concurrency:
                trace = _send(target, waiting.popleft(), traces, clock)
                if trace.ended is None:
                    running.add(trace.index)
                else:
                    ended, last = ended + 1, trace.ended
            if not running:
                break
            events = [event for event in target.poll(POLL_SECONDS) if event.index in running]
            for event in events:
                _record(traces[event.index], event)
                tokens += event.tokens
                last = max(last, event.time)
                if traces[event.index].ended is not None:
                    running.discard(event.index)
                    ended += 1
            if not events and clock() - last > stall_timeout:
                raise KvqError(f"nothing happened for {stall_timeout:.0f} s; the target seems to hang")
            if events and progress:
                progress(ended, tokens)
    except KeyboardInterrupt:
        result.interrupted = True
    except Exception as error:
        result.error = error
    result.end = last if result.complete else max(last, clock())
    result.traces = list(traces.values())
    result.unsent = len(waiting)
    for index in running:
        # A broken target may refuse; what was measured matters more.
        with suppress(Exception):
            target.cancel(index)
    return result


def _send(
    target: Target,
    request: BenchRequest,
    traces: dict[int, RequestTrace],
    clock: Callable[[], float],
) -> RequestTrace:
    trace = RequestTrace(request.index, request.input_len, request.output_len, sent=clock())
    traces[request.index] = trace
    try:
        target.send(request)
    except KvqError as error:
        trace.error, trace.ended = error.message, clock()
    return trace


def _record(trace: RequestTrace, event: Event) -> None:
    if event.tokens:
        trace.arrivals.append((event.time, event.tokens))
    if event.error is not None:
        trace.error, trace.ended = event.error or "unknown error", event.time
    elif event.finished:
        trace.ended = event.time
        if trace.tokens < trace.output_len:
            trace.error = f"ended after {trace.tokens} of {trace.output_len} tokens"
