"""A server on a free port, in a thread, with a tiny random model that has a tokenizer of bytes."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvq_core import EngineConfig
from kvq_core.config import ServerConfig
from kvq_core.engine.engine import Engine
from kvq_core.models import LoadedModel, load_model
from kvq_core.server.run import Server, bind, url_of
from tests.tiny import BYTES, TEMPLATE, byte_tokenizer, save_tiny

CONTEXT = 256


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(
        tmp_path_factory.mktemp("model"), vocab_size=260, max_position_embeddings=CONTEXT, eos_token_id=BYTES
    )
    byte_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(folder: Path) -> LoadedModel:
    return load_model(str(folder), device="cpu", dtype="float32")


@dataclass
class Running:
    """A server that runs, and what it runs on."""

    url: str
    server: Server
    engine: Engine
    thread: threading.Thread

    def stop(self) -> None:
        """As a first signal does."""
        self.server.handle_exit(0, None)

    def is_clean(self, seconds: float = 20) -> bool:
        """No request and no page is left, or will be: the engine's thread takes a step to let go of them."""
        return self.eventually(self._holds_nothing, seconds)

    @staticmethod
    def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        return condition()

    def _holds_nothing(self) -> bool:
        load = self.engine.load
        return not (self.server.engine.open or load.running or load.waiting or load.pages_used)


Serve = Callable[..., Running]


@pytest.fixture
def serve(model: LoadedModel) -> Iterator[Serve]:
    """`serve(policy=42, max_queue=3)`: settings of the engine and of the server in one."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running(model, settings))


@contextmanager
def running(model: LoadedModel, settings: dict) -> Iterator[Running]:
    ours = {name: settings.pop(name) for name in list(settings) if name in ServerConfig.__dataclass_fields__}
    defaults = {
        "page_size": 16,
        "max_num_seqs": 4,
        "prefill_chunk": 32,
        "kv_memory": 4 << 20,
        "prefix_caching": True,
    }
    engine = Engine(model, EngineConfig(**defaults | settings))
    config = ServerConfig(**{"port": 0} | ours)
    server = Server(engine, "tiny", config)
    with bind(config) as listener:
        url = url_of(listener)
        thread = threading.Thread(target=lambda: asyncio.run(server.listen(listener)))
        thread.start()
        while not server.started:
            thread.join(0.01)
        try:
            yield Running(url, server, engine, thread)
        finally:
            server.handle_exit(0, None)
            server.force_exit = True
            thread.join(30)
    assert not thread.is_alive()
    engine.cache.blocks.check()
    engine.close()
