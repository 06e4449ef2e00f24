"""One measurement: warm up, replay the workload, make the record."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvq_core.bench.load import LoadResult, Progress, run_closed_loop
from kvq_core.bench.metrics import summarize
from kvq_core.bench.record import RunRecord
from kvq_core.bench.target import BenchRequest, Target
from kvq_core.bench.workload import Workload
from kvq_core.errors import KvqError


@dataclass(frozen=True)
class Measurement:
    """A record, the rows of its requests, and what ended the run early, if anything did."""

    record: RunRecord
    rows: list[dict[str, Any]]
    load: LoadResult


def measure(
    target: Target,
    workload: Workload,
    concurrency: int,
    *,
    env: dict[str, Any],
    label: str | None = None,
    note: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_warmup: Progress | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Replay `workload` on `target`, `concurrency` requests at a time.

    Ctrl-C during warm-up is raised, since nothing was measured yet; later it gives an incomplete record.
    Raises `KvqError` if warm-up fails altogether.
    """
    _warm_up(target, workload.warmup, concurrency, clock, on_warmup)
    target.reset_stats()
    load = run_closed_loop(target, workload.requests, concurrency, clock=clock, progress=progress)
    info = target.info()
    metrics = summarize(load.traces, load.duration)
    metrics["unfinished"] = int(metrics["unfinished"] or 0) + load.unsent
    record = RunRecord(
        label=label or info.policy.get("label") or info.policy.get("name", "?"),
        complete=load.complete,
        policy=dict(info.policy),
        model=_without_folder(info.model),
        env=env,
        engine=dict(info.engine),
        workload=workload.describe() | {"loop": "closed", "concurrency": concurrency},
        kv=_kv_stats(target, load),
        metrics=metrics,
        errors=_errors(load),
        note=note,
    )
    return Measurement(record, [trace.row(load.start) for trace in load.traces], load)


def _warm_up(
    target: Target,
    requests: Sequence[BenchRequest],
    concurrency: int,
    clock: Callable[[], float],
    progress: Progress | None,
) -> None:
    load = run_closed_loop(target, requests, concurrency, clock=clock, progress=progress)
    if load.interrupted:
        raise KeyboardInterrupt
    if load.error:
        raise load.error
    if load.traces and not any(trace.succeeded for trace in load.traces):
        raise KvqError(f"all {len(load.traces)} warm-up requests failed: {load.traces[0].error}")


def _without_folder(model: dict[str, Any]) -> dict[str, Any]:
    """A model that lies in a folder is named by the folder alone: a record tells nothing of a disk."""
    name = str(model.get("name", ""))
    return model | ({"name": Path(name).name} if os.path.isabs(name) else {})


def _kv_stats(target: Target, load: LoadResult) -> dict[str, Any]:
    if load.error is None:
        return target.kv_stats()
    try:
        return target.kv_stats()
    except Exception:
        return {}  # the target broke; the requests that it served still count


def _errors(load: LoadResult) -> dict[str, int]:
    """How often each error occurred."""
    counts: dict[str, int] = {}
    for trace in load.traces:
        if trace.error is not None:
            counts[trace.error] = counts.get(trace.error, 0) + 1
    return counts
