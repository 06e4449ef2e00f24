"""The same run several times: the means of its figures, and how far they can be trusted."""

import json
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from kvq_core.bench.record import RunRecord

COUNTS = (
    "duration", "completed", "failed", "cancelled", "unfinished", "unsent", "total_input_tokens",
    "total_output_tokens",
)  # fmt: skip
"""Figures that repeats add up to; of all others there is a mean."""
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for 1, 2, … degrees of freedom, two-sided 95%."""


def student_t(freedom: int) -> float:
    """The factor of a two-sided 95% interval, by table or, beyond it, by Cornish and Fisher's expansion."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95% interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    return student_t(len(values) - 1) * stdev(values) / len(values) ** 0.5


def group_repeats(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Records in their order, those that repeat one another in one group.

    A repeat number that a group has already begins a new one: records of another invocation.
    """
    groups: list[list[RunRecord]] = []
    newest: dict[str, list[RunRecord]] = {}
    for record in records:
        key = json.dumps([record.label, record.policy, record.model, record.workload], sort_keys=True)
        group = newest.get(key)
        if record.repeat is None or not group or record.repeat in {other.repeat for other in group}:
            newest[key] = group = []
            groups.append(group)
        group.append(record)
    return groups


def usable(runs: Sequence[RunRecord]) -> Sequence[RunRecord]:
    """The runs that count: complete ones, where there are any."""
    return [run for run in runs if run.complete] or runs


def average(runs: Sequence[RunRecord]) -> RunRecord:
    """One record for repeats of a run: means with their intervals, and sums of what is counted."""
    runs = usable(runs)
    first = runs[0]
    if first.repeat is None:
        return first
    means, intervals = _means([run.metrics for run in runs])
    notes = dict.fromkeys(part for run in runs if run.note for part in run.note.split("; "))
    errors: dict[str, int] = {}
    for run in runs:
        for error, count in run.errors.items():
            errors[error] = errors.get(error, 0) + count
    return replace(
        first,
        metrics=means | {key: _sum(runs, key) for key in COUNTS if key in first.metrics},
        intervals={key: half for key, half in intervals.items() if key not in COUNTS},
        kv=_average_kv([run.kv for run in runs]),
        errors=errors,
        generator_bound=any(run.generator_bound for run in runs),
        note="; ".join(notes) or None,
        repeat=None,
        quantiles={
            key: [fmean(values) for values in zip(*(run.quantiles[key] for run in runs), strict=True)]
            for key in first.quantiles
            if all(len(run.quantiles.get(key, ())) == len(first.quantiles[key]) for run in runs)
        },
    )


def _means(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, float]]:
    means: dict[str, Any] = {}
    intervals: dict[str, float] = {}
    for key in runs[0]:
        values = [value for run in runs if isinstance(value := run.get(key), int | float)]
        means[key] = fmean(values) if values else None
        half = interval(values)
        if half is not None:
            intervals[key] = half
    return means, intervals


def _average_kv(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of the numbers, of those that have them (hits of a cache: 0); the rest is the first's."""
    found: dict[str, Any] = {}
    for run in reversed(runs):
        found |= run
    if "prefix_hit_rate" in found:
        runs = [{"prefix_hit_rate": 0.0} | run for run in runs]
    for key in found:
        values = [value for run in runs if isinstance(value := run.get(key), int | float)]
        if values:
            found[key] = fmean(values)
    return found


def _sum(runs: Sequence[RunRecord], key: str) -> float:
    return sum(run.metrics.get(key) or 0 for run in runs)
