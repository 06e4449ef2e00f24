"""A rank that is not the first: does what the leader tells, until it says `end` or is gone.

`python -m kvq_core.parallel.follow`, as `launch` starts it; under torchrun, `kvq` itself ends up here.
"""

import logging
import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from kvq_core.config import EngineConfig
from kvq_core.engine.runner import ModelRunner
from kvq_core.engine.setup import set_up, tear_down
from kvq_core.engine.work import Work
from kvq_core.errors import KvqError
from kvq_core.models import LoadedModel
from kvq_core.models.load import load_shard
from kvq_core.parallel.group import Ranks, is_lost
from kvq_core.parallel.launch import LOST, STORE, is_launched, join
from kvq_core.quality.read_back import forward as read_back


class Follower:
    """Models and engines of this rank, by the numbers that the leader gave them."""

    def __init__(self, group: Ranks) -> None:
        self.group = group
        self.on_gpu = False
        self.models: dict[int, LoadedModel] = {}
        self.runners: dict[int, ModelRunner] = {}

    def run(self) -> None:
        """Do as told until the end; each message names one of the methods below."""
        while True:
            name, args = self.group.hear()
            if name == "end":
                return
            getattr(self, name)(*args)

    def load(self, number: int, name: str, kind: str, options: dict[str, Any]) -> None:
        """Load this rank's shard of a model."""
        self.on_gpu = kind == "cuda"
        self.models[number] = load_shard(name, self.group, number, self.group.place(kind), **options)

    def start(self, number: int, model: int, config: EngineConfig) -> None:
        """Set up the device side of an engine."""
        try:
            self.runners[number] = set_up(self.models[model], config).runner
        except KvqError as error:  # the leader's, too, who plans by the same numbers, and tells the user
            logging.getLogger("kvq").info("engine %d: %s", number, error)

    def step(self, number: int, work: Work) -> None:
        """Run a step of an engine."""
        self.runners[number].run(work)

    def read_back(self, model: int, *args: Any) -> None:
        """Run a forward whose keys and values pass the codecs."""
        read_back(self.models[model], *args)

    def close(self, number: int) -> None:
        """Drop an engine and give its memory back."""
        self.runners.pop(number, None)
        tear_down(self.on_gpu)


@record
def main() -> None:
    """Join the group as the rank that the environment names, and follow."""
    logging.getLogger("kvq").propagate = False  # rank 0 says it
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = None
    if not is_launched():
        _end_with(os.getppid())
        store = dist.TCPStore("127.0.0.1", int(os.environ[STORE]), size, is_master=False)
        store.set(f"up{rank}", "1")
    join(rank, size, store)
    try:
        Follower(Ranks(rank, size)).run()
    except RuntimeError as error:
        if is_lost(error):  # not an error of this rank's own: no report of it, and no cleaning up
            print(f"lost the other ranks: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            os._exit(LOST)
        raise
    os._exit(0)


def _end_with(parent: int) -> None:
    """Leave as soon as the leader's process is gone, wherever this one is."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(LOST)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
