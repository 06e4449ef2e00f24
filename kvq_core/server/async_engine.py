"""An engine in a thread of its own, driven from asyncio."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue

from kvq_core.config import SamplingParams
from kvq_core.engine.engine import Engine, Load
from kvq_core.engine.request import RequestOutput
from kvq_core.server.errors import ApiError, engine_died, queue_full, shutting_down
from kvq_core.server.metrics import Metrics

log = logging.getLogger("kvq")


@dataclass(frozen=True)
class Sequence:
    """A prompt of token ids, and how it is continued."""

    prompt: list[int]
    params: SamplingParams


class Generation:
    """Sequences that belong together; iterating gives (index of the sequence, its new tokens).

    Ends when all have ended; raises `ApiError` where the engine dies or the server stops first.
    """

    def __init__(self, owner: "AsyncEngine", count: int) -> None:
        self._owner = owner
        self._events: asyncio.Queue[tuple[int, RequestOutput] | None] = asyncio.Queue()
        self._running = set(range(count))
        self._error: ApiError | None = None
        self._arrived = time.perf_counter()
        self._last: dict[int, float] = {}
        """When a sequence's latest token came."""

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        while self._running:
            event = await self._events.get()
            if event is not None and event[0] in self._running:  # else: cancelled while this was on its way
                index, output = event
                if output.finish_reason is not None:
                    self._end(index, output.finish_reason)
                yield index, output
        if self._error is not None:
            raise self._error

    @property
    def running(self) -> int:
        """Sequences that have not ended."""
        return len(self._running)

    def cancel(self, index: int, reason: str = "cancelled") -> None:
        """End one sequence and free its pages; nothing where it has ended."""
        if index in self._running:
            self._owner.submit(partial(self._owner.cancel_now, (self, index)))
            self._end(index, reason)

    def close(self, reason: str = "cancelled") -> None:
        """Cancel what still runs."""
        for index in list(self._running):
            self.cancel(index, reason)

    def fail(self, error: ApiError) -> None:
        """Cancel what still runs; whoever iterates gets the error."""
        self._error = error
        self.close("error")
        self._events.put_nowait(None)

    def push(self, index: int, output: RequestOutput) -> None:
        """New tokens from the engine."""
        if index not in self._running:
            return
        before = self._last.get(index)
        self._owner.metrics.tokens(len(output.token_ids), output.time - (before or self._arrived), not before)
        self._last[index] = output.time
        self._events.put_nowait((index, output))

    def _end(self, index: int, reason: str) -> None:
        self._owner.metrics.ended(reason)
        self._running.discard(index)
        if not self._running:
            self._owner.generations.discard(self)


Key = tuple[Generation, int]


class AsyncEngine:
    """Takes sequences on the event loop and steps the engine in a thread.

    The thread alone touches the engine's requests; it gets callables through a queue and hands outputs back
    with `call_soon_threadsafe`. Everything else here runs on the event loop.
    """

    def __init__(self, engine: Engine, max_queue: int) -> None:
        self.engine = engine
        self.limit = engine.config.max_num_seqs + max_queue
        """Sequences taken at a time: those that run, and a queue."""
        self.metrics = Metrics()
        self.generations: set[Generation] = set()
        self.refusal: Callable[[], ApiError] | None = None
        """Why new requests are refused, if they are."""
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._keys: dict[int, Key] = {}
        """Of every request in the engine; the thread's."""
        self._ids: dict[Key, int] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def open(self) -> int:
        """Sequences taken and not ended."""
        return sum(generation.running for generation in self.generations)

    @property
    def load(self) -> Load:
        """The engine's load; sequences on their way to it wait."""
        load = self.engine.load
        return replace(load, waiting=max(0, self.open - load.running))

    def start(self) -> None:
        """Start the thread; called on the event loop that requests will come from."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Cancel everything and end the thread."""
        self.abort(shutting_down)
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def generate(self, sequences: list[Sequence]) -> Generation:
        """Queue sequences, all or none; raises `ApiError` where they can't be taken now."""
        if self.refusal is not None:
            raise self.refusal()
        if len(sequences) > self.limit:
            raise ApiError(
                400, f"{len(sequences)} sequences in one request; the server takes {self.limit} at a time"
            )
        if self.open + len(sequences) > self.limit:
            raise queue_full(self.limit)
        generation = Generation(self, len(sequences))
        self.generations.add(generation)
        for index, sequence in enumerate(sequences):
            self.metrics.prompt_tokens.inc(len(sequence.prompt))
            self.submit(partial(self._add, (generation, index), sequence))
        return generation

    def drain(self, timeout: float) -> None:
        """Refuse new requests; end what still runs after `timeout` seconds. A signal handler may call it."""
        self.refusal = self.refusal or shutting_down
        self._loop.call_soon_threadsafe(self._loop.call_later, timeout, self.abort, shutting_down)

    def abort(self, why: Callable[[], ApiError]) -> None:
        """End every generation with an error."""
        self.refusal = self.refusal or why
        for generation in list(self.generations):
            generation.fail(why())

    def submit(self, command: Callable[[], None]) -> None:
        """Have the thread run a command before its next step."""
        self._inbox.put(command)

    # In the thread

    def cancel_now(self, key: Key) -> None:
        """Cancel a sequence in the engine; nothing where it has ended."""
        request = self._ids.pop(key, None)
        if request is not None:
            del self._keys[request]
            self.engine.cancel(request)

    def _add(self, key: Key, sequence: Sequence) -> None:
        request = self.engine.add_request(sequence.prompt, sequence.params)
        self._keys[request], self._ids[key] = key, request

    def _work(self) -> None:
        try:
            while True:
                while not (self._inbox.empty() and self.engine.has_work):
                    command = self._inbox.get()
                    if command is None:
                        return
                    command()
                outputs = self.engine.step()
                if outputs:
                    self._loop.call_soon_threadsafe(
                        self._deliver, [self._claim(output) for output in outputs]
                    )
        except BaseException as error:  # whatever ends the thread: nobody else would tell the clients
            log.exception("the engine died: %s", error)
            self._loop.call_soon_threadsafe(self._die)

    def _claim(self, output: RequestOutput) -> tuple[Key, RequestOutput]:
        key = self._keys[output.request_id]
        if output.finished:
            del self._keys[output.request_id], self._ids[key]
        return key, output

    # On the event loop again

    def _deliver(self, outputs: list[tuple[Key, RequestOutput]]) -> None:
        for key, output in outputs:
            generation, index = key
            generation.push(index, output)

    def _die(self) -> None:
        self.refusal = engine_died
        self.abort(partial(engine_died, 500))
