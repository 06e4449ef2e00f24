"""Starts the ranks: in a process of its own each, through torch's elastic multiprocessing, as torchrun does.

The process that asks for a group becomes rank 0, so that its terminal, its Ctrl-C and its files stay its own.
Under torchrun (several nodes) the ranks are there already, and rank 0 finds them by the environment.
"""

import atexit
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kvq_core.errors import KvqError, UsageError
from kvq_core.parallel.group import ALONE, Group, Ranks

FOLLOW = "kvq_core.parallel.follow"
STORE = "KVQ_STORE_PORT"
"""Environment of the ranks that this process starts: where they meet."""
LOST = 75
"""Exit code of a rank that ends because another one did."""
GOODBYE = 10.0
"""Seconds that ranks have to end by themselves."""
FOREVER = timedelta(days=365)
"""A server without requests may be quiet for long; a rank that dies closes its connections."""


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


_group: Ranks | None = None


def start_group(size: int, device: str) -> Group:
    """A group of `size` ranks, led by this process, on `auto`, `cpu` or `cuda`. A process starts one, once.

    Raises `UsageError` where it can't be, `KvqError` where there are too few GPUs or a rank fails to start.
    """
    global _group
    launched = int(os.environ.get("WORLD_SIZE", "1")) if is_launched() else None
    if launched not in (None, size):
        raise UsageError(f"--tp {size}, and torchrun started {launched} ranks", f"give --tp {launched}")
    if size == 1:
        return ALONE
    if device.startswith("cuda:"):
        raise UsageError(f"--device {device} is one GPU, and --tp {size} needs {size}", "give --device cuda")
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    here = size if launched is None else int(os.environ["LOCAL_WORLD_SIZE"])
    found = torch.cuda.device_count()
    if place == "cuda" and found < here:
        raise KvqError(
            f"--tp {size} needs {here} GPUs on this machine, and torch finds {found}",
            "a lower --tp, or more nodes, with torchrun (docs/parallel.md)",
        )
    if _group is None:
        _group = _lead(size, launched is not None)
    elif _group.size != size:
        raise UsageError(
            f"--tp {size}, and this process has {_group.size} ranks already",
            f"give --tp {_group.size}, or use another process",
        )
    return _group


def join(rank: int, size: int, store: dist.Store | None) -> None:
    """Enter the process group; `store` is None where torchrun says in the environment where to meet."""
    # Dead peers are ours to report: NCCL's own watchdog would end the process, and with it the record.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    options = {"init_method": "env://"} if store is None else {"store": store}
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=FOREVER, **options)  # type: ignore[arg-type]


def _lead(size: int, launched: bool) -> Ranks:
    if launched:
        # torchrun ends all ranks where one dies: what was measured is kept, as after Ctrl-C.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        join(0, size, None)
        group = Ranks(0, size)
        atexit.register(_dismiss, group)
        return group
    os.environ.update({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(size)})
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    followers = Followers(size, store.port)
    group = Ranks(0, size, followers.failure)
    atexit.register(followers.end, group)
    with group.together():
        followers.wait_until_up(store)
        join(0, size, store)
    return group


def _dismiss(group: Ranks) -> None:
    """Tell the ranks that torchrun started that this is the end."""
    try:
        group.tell("end")
    except Exception:
        os._exit(1)  # torchrun ends the others


class Followers:
    """The other ranks on this machine, and the thread that notices when one dies."""

    def __init__(self, size: int, port: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="kvq-ranks-")
        self._error: KvqError | None = None
        self._died = threading.Event()
        self._ending = False
        self._started = threading.Event()
        self._environments = {
            i: {
                "RANK": str(i + 1),
                "LOCAL_RANK": str(i + 1),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                STORE: str(port),
            }
            for i in range(size - 1)
        }
        # In a thread, where torch leaves the handlers of signals alone; it says so in a warning.
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        threading.Thread(target=self._watch, name="kvq-ranks", daemon=True).start()
        self._started.wait()

    def failure(self, seconds: float) -> KvqError | None:
        """What is known of a rank that died, after so many seconds at most."""
        self._died.wait(seconds)
        return self._error

    def wait_until_up(self, store: dist.TCPStore) -> None:
        """Wait until every rank is up; raises what ended one that is not."""
        for number in range(1, len(self._environments) + 1):
            while not store.check([f"up{number}"]):
                if (failure := self.failure(0.05)) is not None:
                    raise failure

    def end(self, group: Ranks) -> None:
        """Let the ranks end, or end them."""
        self._ending = True
        with suppress(Exception):
            group.tell("end")
            self._died.wait(GOODBYE)
        with suppress(Exception):
            self._context.close(signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _watch(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

        try:
            self._context = start_processes(
                "kvq",
                sys.executable,
                {i: ("-m", FOLLOW) for i in self._environments},
                self._environments,
                DefaultLogsSpecs(self._folder, redirects=Std.ALL),
            )
        except Exception as error:
            self._error = KvqError(
                f"the ranks of --tp could not be started: {error}", "`--tp 1` needs no further processes"
            )
        self._started.set()
        if self._error is None:
            result = self._context.wait(period=0.1)
            if result is not None and not self._ending:
                self._error = self._describe(result)
        if self._error is not None and torch.cuda.is_initialized() and dist.is_initialized():
            with suppress(Exception):  # else what waits for the dead rank never ends
                dist.distributed_c10d._abort_process_group()
        self._died.set()

    def _describe(self, result: "object") -> KvqError:
        """The rank that died first: those that lost it, or were ended because of it, come after."""
        failures = list(result.failures.values())  # type: ignore[attr-defined]
        first = [f for f in failures if f.exitcode not in (LOST, -signal.SIGTERM)] or failures
        if not first:
            return KvqError(
                "the other ranks of --tp have left", "start it again; what was measured until then is kept"
            )
        failure = min(first, key=lambda f: f.timestamp)
        how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else None
        how = how or f"ended with exit code {failure.exitcode}"
        log = Path(result.stderrs[failure.local_rank])  # type: ignore[attr-defined]
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        last = lines[-1] if lines else ""
        if Path(failure.error_file).is_file():
            told = failure.message
            last = str(told.get("message")) if isinstance(told, dict) else str(told)
        rank = f"rank {failure.local_rank + 1} on {socket.gethostname()} (process {failure.pid})"
        return KvqError(
            f"{rank} {how}" + (f": {last}" if last else ""),
            "out of memory kills without a word; the other ranks were ended, and what was measured is kept"
            if failure.exitcode == -signal.SIGKILL
            else "the other ranks were ended, and what was measured is kept",
        )
