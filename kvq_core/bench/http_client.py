"""HTTP/1.1 for a load generator: a request leaves in the call that sends it, bytes are stamped as they come.

Clients for general use hand every piece of an answer through a task, a pool and several layers; with 64
streams that costs milliseconds, which a benchmark would count as the server's. Here asyncio does the
transport (TCP, TLS, names), h11 the protocol, and nothing lies between.
"""

import asyncio
import math
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import h11
import httpx

CONNECT_SECONDS = 10.0
STALE_SECONDS = 0.25
"""A server that hung up on an idle connection is heard of this soon after a request is sent on it."""

Arrival = tuple[int, float, "h11.Response | h11.Data | h11.EndOfMessage | OSError | h11.RemoteProtocolError"]
"""(key of the request, seconds on the clock of `time.perf_counter`, what came); an exception is the last."""


def whole_milliseconds(timeout: float) -> float:
    """Seconds to wait where one wants to wait `timeout` and not longer, so as to send something on time.

    The operating system's poll counts milliseconds and rounds up. Who comes back early asks again, and the
    last millisecond is spent on that.
    """
    return math.floor(timeout * 1e3) / 1e3


class HttpClient:
    """Sends requests to one server, each on a connection that it has to itself, kept for later ones.

    It connects directly: proxies in the environment are not used, since their time would be measured too.
    The event loop runs in `wait` alone.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        assert parts.hostname
        self._address = (parts.hostname, parts.port or (443 if secure else 80))
        self._tls = httpx.create_ssl_context() if secure else None
        self._headers = [
            ("Host", parts.netloc),
            ("User-Agent", "kvq"),
            ("Accept", "text/event-stream, application/json"),
            ("Content-Type", "application/json"),
            *headers.items(),
        ]
        self._loop = asyncio.new_event_loop()
        self._idle: list[_Connection] = []
        self._busy: dict[int, _Connection] = {}
        self._connecting: dict[int, asyncio.Task[None]] = {}
        self._received: list[tuple[_Connection, float, bytes]] = []
        """What connections have read, and when, not parsed yet; no bytes are the end of a connection."""
        self._failed: list[Arrival] = []
        self._closed = False

    def post(self, key: int, path: str, body: bytes) -> None:
        """Send at once where a connection is free, else as soon as there is one. Keys in use must differ."""
        request = h11.Request(
            method="POST", target=path, headers=[*self._headers, ("Content-Length", str(len(body)))]
        )
        if self._idle:
            self._send(self._idle.pop(), key, request, body)
        else:
            self._connect(key, request, body)

    def cancel(self, key: int) -> None:
        """Hang up; nothing more arrives for the key."""
        if task := self._connecting.pop(key, None):
            task.cancel()
        if connection := self._busy.pop(key, None):
            connection.abort()

    def wait(self, timeout: float) -> list[Arrival]:
        """What arrived since the last call; waits at most `timeout` seconds for something to arrive."""
        timer = self._loop.call_later(whole_milliseconds(timeout), self._loop.stop)
        self._loop.run_forever()
        timer.cancel()
        received, self._received = self._received, []
        arrivals, self._failed = self._failed, []
        for connection, at, data in received:
            arrivals += self._parse(connection, at, data)
        return arrivals

    def wake_on(self, descriptor: int) -> None:
        """Let `wait` return as soon as this file can be read."""
        self._loop.add_reader(descriptor, self._loop.stop)

    def sleep_on(self, descriptor: int) -> None:
        self._loop.remove_reader(descriptor)

    def close(self) -> None:
        self._closed = True
        for key in [*self._connecting, *self._busy]:
            self.cancel(key)
        for connection in self._idle:
            connection.abort()
        self._loop.call_soon(self._loop.stop)
        self._loop.run_forever()  # transports close in it
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def receive(self, connection: "_Connection", data: bytes) -> None:
        """Called by connections, of all that have bytes before any of these is parsed."""
        self._received.append((connection, time.perf_counter(), data))
        if not self._closed:
            self._loop.stop()

    def _connect(self, key: int, request: h11.Request, body: bytes) -> None:
        self._connecting[key] = self._loop.create_task(self._open(key, request, body))

    async def _open(self, key: int, request: h11.Request, body: bytes) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(self), *self._address, ssl=self._tls
                )
        except OSError as error:  # of names, of TLS, and of time as well
            self._failed.append((key, time.perf_counter(), error))
            self._loop.stop()
        else:
            self._send(connection, key, request, body)
        del self._connecting[key]

    def _send(self, connection: "_Connection", key: int, request: h11.Request, body: bytes) -> None:
        self._busy[key] = connection
        connection.send(key, request, body)

    def _parse(self, connection: "_Connection", at: float, data: bytes) -> list[Arrival]:
        key = connection.key
        if key is None or self._busy.get(key) is not connection:  # idle, or hung up on
            if not data and connection in self._idle:
                self._idle.remove(connection)
            return []
        if not data and connection.was_stale(at):
            del self._busy[key]
            assert connection.sent
            self._connect(key, *connection.sent)
            return []
        arrivals: list[Arrival] = []
        try:
            for event in connection.parse(data):
                arrivals.append((key, at, event))
        except h11.RemoteProtocolError as error:
            arrivals.append((key, at, error))
        if arrivals and not isinstance(arrivals[-1][2], h11.Response | h11.Data):
            del self._busy[key]
            if connection.rest():
                self._idle.append(connection)
            else:
                connection.abort()
        return arrivals


class _Connection(asyncio.Protocol):
    """One connection and the request that it carries, if any."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._http = h11.Connection(h11.CLIENT)
        self._used = False
        self._answered = False
        self._sent_at = 0.0
        self.key: int | None = None
        self.sent: tuple[h11.Request, bytes] | None = None

    def was_stale(self, now: float) -> bool:
        """Whether the server hung up on it while nothing was asked: then the request has not been seen."""
        return self._used and not self._answered and now - self._sent_at < STALE_SECONDS

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._client.receive(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.receive(self, b"")

    def send(self, key: int, request: h11.Request, body: bytes) -> None:
        self.key, self.sent, self._answered = key, (request, body), False
        self._sent_at = time.perf_counter()
        pieces = (self._http.send(event) for event in (request, h11.Data(data=body), h11.EndOfMessage()))
        self._transport.write(b"".join(piece for piece in pieces if piece))

    def parse(self, data: bytes) -> "list[h11.Response | h11.Data | h11.EndOfMessage]":
        """What these bytes complete, in order; raises `h11.RemoteProtocolError` for what is no HTTP/1.1."""
        self._answered = True
        self._http.receive_data(data)
        events: list[h11.Response | h11.Data | h11.EndOfMessage] = []
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Response | h11.Data | h11.EndOfMessage):
                events.append(event)
            elif not isinstance(event, h11.InformationalResponse):
                return events

    def rest(self) -> bool:
        """Make it ready for another request; False where that can't be."""
        self.key = self.sent = None
        self._used = True
        if self._transport.is_closing() or self._http.states != {
            h11.CLIENT: h11.DONE,
            h11.SERVER: h11.DONE,
        }:
            return False
        self._http.start_next_cycle()
        return True

    def abort(self) -> None:
        self.key = None
        self._transport.abort()
