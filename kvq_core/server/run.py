"""Runs the server until a signal ends it."""

import asyncio
import logging
import math
import socket
from types import FrameType

import uvicorn

from kvq_core.config import ServerConfig
from kvq_core.engine.engine import Engine
from kvq_core.errors import KvqError
from kvq_core.server.app import make_app
from kvq_core.server.async_engine import AsyncEngine

log = logging.getLogger("kvq")


def bind(config: ServerConfig) -> socket.socket:
    """The server's socket, which takes no connections yet; raises `KvqError` where it can't be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise KvqError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror or error}",
            "choose another `--port` or `--host`",
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL under which a bound socket can be reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn with an engine: a first signal lets what runs finish, a second one ends it all."""

    def __init__(self, engine: Engine, name: str, config: ServerConfig) -> None:
        self.engine = AsyncEngine(engine, config.max_queue)
        self._name = name
        self._timeout = config.shutdown_timeout
        super().__init__(
            uvicorn.Config(
                make_app(self.engine, name, config),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=math.ceil(config.shutdown_timeout) + 5,
            )
        )

    async def listen(self, listener: socket.socket) -> None:
        """Serve until a signal, or `handle_exit`, ends it."""
        self.engine.start()
        try:
            await self.serve(sockets=[listener])
        finally:
            await self.engine.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            log.info("serving %s at %s; Ctrl-C stops", self._name, url_of(listener))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        if self.engine.open:
            log.info(
                "finishing %d requests, for %g s at most; Ctrl-C again ends them now",
                self.engine.open,
                self._timeout,
            )
        self.engine.drain(self._timeout)


def serve(engine: Engine, name: str, listener: socket.socket, config: ServerConfig) -> None:
    """Serve a model under this name until SIGINT or SIGTERM."""
    asyncio.run(Server(engine, name, config).listen(listener))
