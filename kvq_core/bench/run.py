"""One measurement: warm up, replay the workload, make the record."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvq_core.bench.load import Load, LoadResult, Progress, run_load
from kvq_core.bench.metrics import percentile, quantiles, summarize
from kvq_core.bench.record import RunRecord, without_folder
from kvq_core.bench.target import BenchRequest, Target
from kvq_core.bench.workload import Workload
from kvq_core.errors import KvqError

MAX_LAG_MS = 2.0
"""A load generator whose sends are later than this at p99 measures itself."""
WARM_CACHE = (
    "{rate:.0%} of the prompt tokens came from the prefix cache: with a fixed seed, warm-up, repeats and"
    " other runs send the same prompts, and a warm cache makes TTFT and throughput better than with new ones"
)


@dataclass(frozen=True)
class Measurement:
    """A record, the rows of its requests, and what ended the run early, if anything did."""

    record: RunRecord
    rows: list[dict[str, Any]]
    load: LoadResult


def measure(
    target: Target,
    workload: Workload,
    load: Load,
    *,
    env: dict[str, Any],
    limits: Mapping[str, float] | None = None,
    label: str | None = None,
    note: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_warmup: Progress | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Replay `workload` on `target` under `load`; `limits` are those of the goodput, in milliseconds.

    Ctrl-C during warm-up is raised, since nothing was measured yet; later it gives an incomplete record.
    Raises `KvqError` if warm-up fails altogether.
    """
    _warm_up(target, workload.warmup, load, clock, on_warmup)
    target.reset_stats()
    result = run_load(target, workload.requests, load, clock=clock, progress=progress)
    info = target.info()
    metrics = summarize(result.traces, result.duration, limits)
    metrics |= {"unfinished": result.unfinished, "unsent": result.unsent}
    metrics |= result.timeline.means()
    if load.is_open:
        metrics["achieved_request_rate"] = result.request_rate
    generator_bound = False
    if not info.in_process:
        lag = percentile(sorted(trace.lag * 1e3 for trace in result.traces), 99)
        metrics["p99_lag_ms"] = lag
        generator_bound = lag is not None and lag > MAX_LAG_MS
    kv = _kv_stats(target, result)
    if kv.get("prefix_hit_rate"):
        warning = WARM_CACHE.format(rate=kv["prefix_hit_rate"])
        note = f"{note}; {warning}" if note else warning
    record = RunRecord(
        label=label or info.policy.get("label") or info.policy.get("name", "?"),
        complete=result.complete,
        policy=dict(info.policy),
        model=without_folder(info.model),
        env=env,
        engine=dict(info.engine),
        workload=describe_work(workload, load, limits),
        kv=kv,
        metrics=metrics,
        errors=_errors(result),
        note=note,
        generator_bound=generator_bound,
        quantiles=quantiles(result.traces),
        timeline=result.timeline.describe(),
    )
    return Measurement(record, [trace.row(result.start) for trace in result.traces], result)


def describe_work(workload: Workload, load: Load, limits: Mapping[str, float] | None) -> dict[str, Any]:
    """The `workload` of a run record: equal for runs that did the same under the same load."""
    return workload.describe() | load.describe() | ({"goodput": dict(limits)} if limits else {})


def _warm_up(
    target: Target,
    requests: Sequence[BenchRequest],
    load: Load,
    clock: Callable[[], float],
    progress: Progress | None,
) -> None:
    """A closed loop: as many at a time as the load allows, at most all of them."""
    closed = Load(concurrency=load.concurrency or max(1, len(requests)))
    result = run_load(target, requests, closed, clock=clock, progress=progress)
    if result.interrupted:
        raise KeyboardInterrupt
    if result.error:
        raise result.error
    if result.traces and not any(trace.succeeded for trace in result.traces):
        raise KvqError(
            f"all {len(result.traces)} warm-up requests failed: {result.traces[0].error}",
            "nothing was measured; what refused them says why, and a server's log may say more",
        )


def _kv_stats(target: Target, result: LoadResult) -> dict[str, Any]:
    if result.error is None:
        return target.kv_stats()
    try:
        return target.kv_stats()
    except Exception:
        return {}  # the target broke; the requests that it served still count


def _errors(result: LoadResult) -> dict[str, int]:
    """How often each error occurred."""
    counts: dict[str, int] = {}
    for trace in result.traces:
        if trace.error is not None:
            counts[trace.error] = counts.get(trace.error, 0) + 1
    return counts
