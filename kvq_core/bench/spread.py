"""Several processes that send requests to one server, so that the load generator is not what is measured.

Times are of the system-wide monotonic clock that `time.perf_counter` reads: one clock for all.
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from kvq_core.bench.http_client import whole_milliseconds
from kvq_core.bench.http_target import CachedTokens, HttpTarget, prefix_hit_rate
from kvq_core.bench.target import BenchRequest, Event, TargetInfo, Usage
from kvq_core.errors import KvqError

START_SECONDS = 60.0


class SpreadTarget:
    """A `Target` whose requests go in turns to `count` processes, each with an `HttpTarget` of its own."""

    def __init__(self, make: Callable[[], HttpTarget], count: int) -> None:
        """`make` is pickled: a class or function of a module, bound with `functools.partial`."""
        # A fresh interpreter each: a fork would copy a process that may hold locks, threads and a GPU.
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        self._next = 0
        self._place: dict[int, Connection] = {}
        self._cached: dict[Connection, CachedTokens] = {}
        """Counts of each process, from its start."""
        self._before = CachedTokens()
        """All of them when statistics were last reset."""
        for _ in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(make, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self._info: TargetInfo | None = None
        for pipe in self._pipes:
            self._info = self._answer(pipe)

    def info(self) -> TargetInfo:
        assert self._info is not None
        return self._info

    def send(self, request: BenchRequest) -> None:
        pipe = self._pipes[self._next]
        self._next = (self._next + 1) % len(self._pipes)
        self._place[request.index] = pipe
        self._tell(pipe, ("send", (request, time.perf_counter())))

    def poll(self, timeout: float) -> list[Event]:
        events: list[Event] = []
        for pipe in wait(self._pipes, whole_milliseconds(timeout)):
            assert isinstance(pipe, Connection)
            while pipe.poll():
                seen, self._cached[pipe] = self._receive(pipe)
                events += seen
        for event in events:
            if event.finished:
                self._place.pop(event.index, None)
        return events

    def cancel(self, index: int) -> None:
        pipe = self._place.pop(index, None)
        if pipe is not None:
            self._tell(pipe, ("cancel", index))

    def usage(self) -> Usage | None:
        return None

    def reset_stats(self) -> None:
        self._before = self._sum()

    def kv_stats(self) -> dict[str, Any]:
        return prefix_hit_rate(self._sum() - self._before)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # what a process takes as its end
        for process in self._processes:
            process.join(5.0)
            if process.is_alive():
                process.terminate()

    def _sum(self) -> CachedTokens:
        return sum(self._cached.values(), CachedTokens())

    def _answer(self, pipe: Connection) -> TargetInfo:
        if not pipe.poll(START_SECONDS):
            raise KvqError("a process of --load-processes did not start", "fewer of them?")
        info = self._receive(pipe)
        assert isinstance(info, TargetInfo)
        return info

    def _receive(self, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except (EOFError, OSError) as error:
            raise KvqError("a process of --load-processes ended", "fewer of them, or more memory?") from error

    def _tell(self, pipe: Connection, command: tuple[str, Any]) -> None:
        try:
            pipe.send(command)
        except OSError as error:
            raise KvqError("a process of --load-processes ended", "fewer of them, or more memory?") from error


def _serve(make: Callable[[], HttpTarget], pipe: Connection) -> None:
    """What a process does: follow commands, report events, end with its parent."""
    target = make()
    target.wake_on(pipe.fileno())
    try:
        pipe.send(target.info())
        while True:
            events = target.poll(1.0)
            if events:
                pipe.send((events, target.cached))
            while pipe.poll():
                command, value = pipe.recv()
                if command == "cancel":
                    target.cancel(value)
                    continue
                request, asked = value
                try:
                    target.send(request, asked)
                except KvqError as error:
                    refused = Event(request.index, time.perf_counter(), finished=True, error=error.message)
                    pipe.send(([refused], target.cached))
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the parent is done, or was interrupted and tells of it
    finally:
        target.sleep_on(pipe.fileno())
        target.close()
