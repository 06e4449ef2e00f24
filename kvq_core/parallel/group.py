"""The ranks that run a model together, as one of them sees them; a single process is a group of one.

Rank 0 leads: it schedules, samples, prints and writes. It tells the others what to do (`tell`), they hear it
in turn (`hear`), and all run the same forwards on their shards, whose partial sums meet in `all_reduce`.
"""

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kvq_core.errors import KvqError, UsageError

_THREADS = torch.get_num_threads()
INLINE = 16 << 10
"""Bytes of a message that travel with its length; longer ones take a second broadcast."""
PATIENCE = 10.0
"""Seconds that a failed collective waits for news of the rank that made it fail."""


class Group:
    """A group of one: nobody to tell, nothing to wait for."""

    rank = 0
    size = 1

    def tell(self, name: str, *args: Any) -> None:
        """Have every other rank do `name` with these arguments, after all that it was told before."""

    def place(self, kind: str) -> torch.device:
        """This rank's device of a kind, `cpu` or `cuda`, made torch's current one."""
        return torch.device(kind)

    def smallest(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return number

    def share(self, tensor: Tensor) -> Tensor:
        """The leader's tensor, in place, on every rank."""
        return tensor

    def wait(self, event: torch.cuda.Event) -> None:
        """Wait for the device."""
        event.synchronize()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """One rank after the other: for what would take too much host memory all at once."""
        yield

    @contextmanager
    def together(self, whole: bool = False) -> Iterator[None]:
        """Around work that all ranks do: where one of them dies, its end is the error that is raised.

        With `whole`, Ctrl-C waits for the end of it, so that no rank is left in the middle.
        """
        yield


ALONE = Group()


class Ranks(Group):
    """A group of several processes over torch.distributed: gloo on a CPU, NCCL between GPUs.

    `failure` gives what is known of a rank that died, waiting up to so many seconds for news.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        failure: Callable[[float], KvqError | None] = lambda seconds: None,
    ) -> None:
        self.rank = rank
        self.size = size
        self._failure = failure
        self._broken = False
        """Ranks may stand at different points: nothing more can be told."""

    def tell(self, name: str, *args: Any) -> None:
        if self._broken:
            raise self._failure(0) or KvqError("the ranks of this run are out of step", "start it again")
        data = pickle.dumps((name, args), protocol=pickle.HIGHEST_PROTOCOL)
        first = torch.zeros(8 + INLINE, dtype=torch.uint8)
        first[:8] = torch.tensor([len(data)]).view(torch.uint8)
        body = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with self.together():
            if len(data) <= INLINE:
                first[8 : 8 + len(data)] = body
                dist.broadcast(first, 0)
            else:
                dist.broadcast(first, 0)
                dist.broadcast(body, 0)

    def hear(self) -> tuple[str, tuple[Any, ...]]:
        """What the leader tells next; waits for it."""
        first = torch.empty(8 + INLINE, dtype=torch.uint8)
        dist.broadcast(first, 0)
        length = int(first[:8].view(torch.int64))
        body = first[8 : 8 + length]
        if length > INLINE:
            body = torch.empty(length, dtype=torch.uint8)
            dist.broadcast(body, 0)
        return pickle.loads(body.numpy().tobytes())

    def place(self, kind: str) -> torch.device:
        if kind == "cpu":  # the ranks of a machine share its cores
            torch.set_num_threads(max(1, _THREADS // int(os.environ["LOCAL_WORLD_SIZE"])))
            return torch.device("cpu")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        return device

    def smallest(self, number: int) -> int:
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MIN)
        return int(numbers)

    def share(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0)
        return tensor

    def wait(self, event: torch.cuda.Event) -> None:
        # Not `synchronize`: a collective whose peer is gone never ends, and this thread has to hear of it.
        while not event.query():
            if (failure := self._failure(0)) is not None:
                raise failure
            time.sleep(5e-5)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        for rank in range(self.size):
            if rank == self.rank:
                yield
            dist.all_reduce(torch.zeros(1))

    @contextmanager
    def together(self, whole: bool = False) -> Iterator[None]:
        with _interrupt_later() if whole else nullcontext():
            try:
                yield
            except KvqError:
                raise
            except BaseException as error:
                self._broken = True
                failure = self._failure(PATIENCE) if isinstance(error, Exception) else None
                if failure is not None:
                    raise failure from error
                if is_lost(error):
                    raise KvqError(
                        f"another rank is gone: {str(error).splitlines()[0]}",
                        "torchrun reports which one died; what was measured is kept",
                    ) from error
                raise


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed because of another rank: gloo has no type of its own for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended; a second one comes through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def hold(number: int, frame: FrameType | None) -> None:
        if held and callable(before):
            before(number, frame)
        held.append(number)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if len(held) == 1 and callable(before):
        before(held[0], None)


def check_heads(name: str, q_heads: int, kv_heads: int, size: int) -> None:
    """`UsageError` where attention heads can't be split over `size` ranks."""
    fits = sorted(n for n in range(1, q_heads + 1) if not (q_heads % n or (kv_heads % n and n % kv_heads)))
    if size not in fits:
        raise UsageError(
            f"--tp {size} does not divide {name}: {q_heads} query heads and {kv_heads} kv heads",
            f"query heads must divide by it, kv heads by it or it by them: {', '.join(map(str, fits))}",
        )


@torch.library.custom_op("kvq::all_reduce_", mutates_args=("x",))
def all_reduce_(x: Tensor) -> None:
    """Sum `x` over the ranks, in place; an opaque op, so that compiled layers may hold it."""
    dist.all_reduce(x)


@all_reduce_.register_fake
def _(x: Tensor) -> None:
    return None
