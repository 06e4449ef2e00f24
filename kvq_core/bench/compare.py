"""Records side by side: which is the baseline of which, relative changes, and what makes them unlike."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvq_core.bench.record import RunRecord
from kvq_core.bench.repeats import average, group_repeats, usable
from kvq_core.errors import KvqError

CHANGES = (
    "request_throughput", "request_goodput", "input_throughput", "output_throughput",
    "mean_e2el_ms", "mean_ttft_ms", "mean_tpot_ms", "mean_itl_ms",
)  # fmt: skip
"""Figures that are put in relation to the baseline's; memory is put in relation to a 16-bit cache."""
GUARDED = {"output_throughput": "output throughput", "mean_ttft_ms": "mean TTFT", "mean_tpot_ms": "mean TPOT"}
"""Figures that must not get worse, and their names."""
_WORK = (
    "name", "dataset", "sha256", "num_prompts", "output_len_cap", "request_rate", "burstiness", "goodput",
    "duration_limit_s", "cancel_rate", "mode", "ramp_up", "trace_speed", "prefix_len", "num_prefixes",
)  # fmt: skip
_REQUESTS = "workload's requests (SHA-256)"
FULL = 0.75
"""Share of the cache that is in use at a time where memory is the limit, at least; the rest is for growth."""
_ENGINE_MAY_DIFFER = ("kv_memory", "max_num_seqs", "url", "api")
"""Parts of the engine that `_conditions` looks at in another way, or that make no difference."""
MOST_FAILED = 0.01
"""Share of the requests that may fail before what the others did says nothing of the load."""


@dataclass(frozen=True)
class Comparison:
    """Records, and for each the one that it is measured against (the baseline's against itself)."""

    records: Sequence[RunRecord]
    """Repeats of a run are one record, of their means."""
    baselines: Sequence[RunRecord]
    runs: Sequence[Sequence[RunRecord]]
    """For each record what was measured: itself, or its repeats."""
    measured: Sequence[RunRecord]
    """All of `runs`, in the order that they were given in."""

    @cached_property
    def names(self) -> list[str]:
        """What tells the records apart: name, and where that is not enough, concurrency or a number."""
        names = [record.name for record in self.records]
        if len({record.concurrency for record in self.records}) > 1:
            names = [_suffixed(name, "c", r.concurrency) for name, r in zip(names, self.records, strict=True)]
        if len({record.context for record in self.records}) > 1:
            names = [_suffixed(name, "ctx", r.context) for name, r in zip(names, self.records, strict=True)]
        seen: Counter[str] = Counter()
        unique = []
        for name in names:
            seen[name] += 1
            unique.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
        return unique

    @cached_property
    def order(self) -> list[int]:
        """Rows of the same load together, by context and concurrency; else as they were given."""
        return sorted(range(len(self.records)), key=lambda i: cell_of(self.records[i]))

    @cached_property
    def resumed(self) -> str | None:
        """Which records an earlier invocation measured and which a resumed one; None where there was one."""
        parts: dict[int, list[str]] = {}
        for name, runs in zip(self.names, self.runs, strict=True):
            for part in sorted({run.part or 1 for run in runs}):
                parts.setdefault(part, []).append(name)
        if max(parts, default=1) == 1:
            return None
        told = [f"{', '.join(parts[part])} in part {part}" for part in sorted(parts)]
        return f"measured in {len(parts)} parts, the run being resumed (--resume): {'; '.join(told)}"

    def is_baseline(self, i: int) -> bool:
        return self.records[i] is self.baselines[i]

    def change(self, i: int, key: str) -> float | None:
        """Record i's figure by its baseline's; None where either is missing or zero."""
        return _change(self.records[i], self.baselines[i], key)

    def noise(self, i: int, key: str) -> float:
        """How far record i's change may be chance, as a share of the baseline's figure; 0 without repeats."""
        mine, base = self.records[i], self.baselines[i]
        halves = mine.intervals.get(key, 0.0), base.intervals.get(key, 0.0)
        return math.hypot(*halves) / (base.get(key) or math.inf)

    def documents(self) -> list[dict[str, Any]]:
        """Every run as a JSON object, each with its changes: 0.05 is 5% more than the baseline."""
        row_of = {id(run): i for i, runs in enumerate(self.runs) for run in runs}
        documents = []
        for run in self.measured:
            base = self.baselines[row_of[id(run)]]
            changes = {key: _change(run, base, key) for key in CHANGES}
            relative = {key: value - 1 for key, value in changes.items() if value is not None}
            name = self.names[self._index(base)]
            documents.append(run.to_dict() | {"vs_baseline": {"baseline": name, **relative}})
        return documents

    def pairs(self, before: int = 0) -> list[tuple[int, int]]:
        """(row, row that it must not be worse than): its baseline's.

        Where the first `before` of `measured` are of an earlier state, instead the one of them that has its
        load and, if there are several, its policy. Rows without such a one are left out.
        """
        early = {id(run) for run in self.measured[:before]}
        earlier = [i for i, runs in enumerate(self.runs) if id(runs[0]) in early]
        if not earlier:
            rows = range(len(self.records))
            return [(i, self._index(self.baselines[i])) for i in rows if not self.is_baseline(i)]
        found = []
        for i, record in enumerate(self.records):
            alike = [j for j in earlier if cell_of(self.records[j]) == cell_of(record)]
            if len(earlier) > 1:
                alike = [j for j in alike if self.records[j].policy == record.policy]
            if i not in earlier and alike:
                found.append((i, alike[0]))
        return found

    def regressions(self, share: float, pairs: Sequence[tuple[int, int]] | None = None) -> list[str]:
        """What is worse than its pair's by more than `share` (0.05 is 5%), or was not measured wholly."""
        pairs = self.pairs() if pairs is None else pairs
        rows = sorted({row for pair in pairs for row in pair})
        found = [f"{self.names[i]}: {what}" for i in rows if (what := flaw(self.records[i]))]
        for i, j in pairs:
            record, base = self.records[i], self.records[j]
            for key, what in GUARDED.items():
                change = _change(record, base, key)
                if change is None and base.get(key) and not record.get(key):
                    found.append(f"{self.names[i]}: {what} was not measured")
                elif (
                    change is not None and (1 - change if key == "output_throughput" else change - 1) > share
                ):
                    found.append(f"{self.names[i]}: {what} {change - 1:+.1%}")
        return found

    def warnings(self) -> list[str]:
        """What a reader must know before trusting the comparison."""
        found = [self._incomplete(i) for i, record in enumerate(self.records) if not record.complete]
        found += [self._failed(i) for i, record in enumerate(self.records) if record.metrics.get("failed")]
        found += [warning for i in range(len(self.records)) for warning in self._left_out(i)]
        found += [self._late(i) for i, record in enumerate(self.records) if record.generator_bound]
        found += [self._ran_out(i) for i, runs in enumerate(self.runs) if any(map(_ran_out, usable(runs)))]
        return found + [
            f"records differ in {what}: " + ", ".join(f"{value} ({names})" for value, names in values.items())
            for what, values in self._differences()
        ]

    def memory_to_spare(self) -> list[str]:
        """Baselines that memory did not limit: nothing was preempted, and the cache was never full."""
        found = []
        for i, record in enumerate(self.records):
            peak, room = record.get("peak_tokens"), record.get("capacity_tokens")
            if not self.is_baseline(i) or not peak or not room or record.get("preemptions"):
                continue
            if peak < FULL * room:
                found.append(
                    f"{self.names[i]}: memory was not the limit: {peak:,.0f} tokens at most, of {room:,.0f} "
                    "that fit; raise --concurrency, or lower --kv-memory"
                )
        return found

    def _index(self, record: RunRecord) -> int:
        return next(i for i, other in enumerate(self.records) if other is record)

    def _incomplete(self, i: int) -> str:
        metrics = self.records[i].metrics
        done, open_ = metrics.get("completed") or 0, metrics.get("unfinished") or 0
        total = done + open_ + (metrics.get("failed") or 0)
        return f"{self.names[i]} is incomplete: {done:.0f} of {total:.0f} requests were measured"

    def _failed(self, i: int) -> str:
        record = self.records[i]
        error = next(iter(record.errors), "")
        return (
            f"{self.names[i]}: {record.metrics['failed']:.0f} requests failed and are left out of the figures"
            + (f" ({error})" if error else "")
        )

    def _late(self, i: int) -> str:
        lag = self.records[i].get("p99_lag_ms")
        return (
            f"{self.names[i]}: the load generator itself was late, by {lag:.1f} ms at p99, and its delays "
            "are part of the latencies; a lower rate, or a faster client"
        )

    def _left_out(self, i: int) -> list[str]:
        runs = self.runs[i]
        count = len(runs) - len(usable(runs))
        return [f"{self.names[i]}: {count} of {len(runs)} runs are incomplete and left out"] * (count > 0)

    def _ran_out(self, i: int) -> str:
        work = self.records[i].workload
        return (
            f"{self.names[i]}: all {work['num_prompts']} requests were sent before the "
            f"{work['duration_limit_s']:g} s of --duration were over; --num-prompts gives it more"
        )

    def _differences(self) -> Iterable[tuple[str, dict[str, str]]]:
        """(condition, {value: names}) where records differ that are measured against the same baseline."""
        groups: dict[int, list[tuple[str, RunRecord]]] = {}
        for name, record, base in zip(self.names, self.records, self.baselines, strict=True):
            groups.setdefault(id(base), []).append((name, record))
        all_found: dict[str, dict[str, list[str]]] = {}
        for group in groups.values():
            found: dict[str, dict[str, list[str]]] = {}
            for what, value_of in _conditions([record for _, record in group]):
                values: dict[str, list[str]] = {}
                for name, record in group:
                    values.setdefault(_show(value_of(record)), []).append(name)
                if len(values) > 1:
                    found[what] = values
            if len([what for what in found if what.startswith("workload")]) > 1:
                found.pop(_REQUESTS, None)  # something that says more differs, too
            for what, values in found.items():
                for value, names in values.items():
                    all_found.setdefault(what, {}).setdefault(value, []).extend(names)
        for what, values in all_found.items():
            yield what, {value: _shorten(names) for value, names in values.items()}


def compare_records(records: Sequence[RunRecord], baseline: str | None = None) -> Comparison:
    """Put records side by side.

    `baseline` is a label, a policy's name or its number; by default the first record is it. Where records
    were made at several concurrencies or lengths, each is measured against the baseline at its own.
    Raises `KvqError` where no record is the baseline.
    """
    assert records
    measured, runs = records, group_repeats(records)
    records = [average(group) for group in runs]
    first = records[0] if baseline is None else _find(records, baseline)
    alike = [record for record in records if record.label == first.label and record.policy == first.policy]
    baselines = []
    for record in records:
        same = [other for other in alike if cell_of(other) == cell_of(record)]
        baselines.append(first if first in same or not same else same[0])
    return Comparison(records, baselines, runs, measured)


def flaw(record: RunRecord) -> str | None:
    """Why a record's figures are not those of its load; None where they are."""
    done, failed = (record.metrics.get(key) or 0 for key in ("completed", "failed"))
    if not done:
        return "no request was completed"
    if not record.complete:
        return "it is incomplete"
    if failed > MOST_FAILED * (done + failed):
        return f"{failed:.0f} of {done + failed:.0f} requests failed"
    return None


def _suffixed(name: str, unit: str, value: float | None) -> str:
    return name if value is None else f"{name} {unit}{value}"


def cell_of(record: RunRecord) -> tuple[float, float]:
    """(context, concurrency): the cell of a sweep; records of one are measured against each other."""
    return record.context or 0, record.concurrency or 0


def _change(record: RunRecord, baseline: RunRecord, key: str) -> float | None:
    mine, base = record.get(key), baseline.get(key)
    return mine / base if mine and base else None


def _find(records: Sequence[RunRecord], baseline: str) -> RunRecord:
    for record in records:
        if record.is_called(baseline):
            return record
    raise KvqError(
        f"no record is the baseline `{baseline}`",
        f"use one of {', '.join(dict.fromkeys(record.label for record in records))}",
    )


def _conditions(records: Sequence[RunRecord]) -> list[tuple[str, Callable[[RunRecord], Any]]]:
    """(name, getter) of everything that must agree for a comparison to be one of policies alone."""
    packages = sorted({name for record in records for name in record.env.get("versions") or {}})
    engine = sorted({name for record in records for name in record.engine} - {*_ENGINE_MAY_DIFFER})
    same_model = len({_model(record) for record in records}) == 1
    same_load = len({record.concurrency for record in records}) == 1
    # The same text is other token ids to another model, so that only its source can be compared.
    return [
        ("model", _model),
        ("GPU", lambda r: r.env.get("gpu") or "none"),
        *([("CPU", _part("env", "cpu"))] * all(r.env.get("gpu") is None for r in records)),
        ("driver", lambda r: r.env.get("driver")),
        *((f"version of {name}", _part("env", "versions", name)) for name in packages),
        ("kvq commit", lambda r: (r.env.get("git_sha") or "none")[:10] + "+" * bool(r.env.get("git_dirty"))),
        *((f"workload's {key}", _part("workload", key)) for key in _WORK),
        *([(_REQUESTS, lambda r: _show(r.workload.get("requests_sha256"))[:10])] * same_model),
        ("concurrency", lambda r: r.concurrency),
        ("seed", lambda r: r.workload.get("seed", r.env.get("seed"))),
        *((f"engine's {name}", _part("engine", name)) for name in engine),
        ("engine's kv_memory", _memory),
        *([("engine's max_num_seqs", _part("engine", "max_num_seqs"))] * same_load),
    ]


def _ran_out(record: RunRecord) -> bool:
    """Whether a closed loop that was to last a while had nothing left to send."""
    work, seconds = record.workload, record.metrics.get("duration") or 0
    limit = work.get("duration_limit_s")
    if limit is None or work.get("loop") != "closed" or not record.complete or record.metrics.get("unsent"):
        return False
    return seconds < limit


def _model(record: RunRecord) -> str:
    keys = ("name", "dtype", "load_format")
    return " ".join(str(record.model[key]) for key in keys if record.model.get(key) is not None)


def _memory(record: RunRecord) -> str | None:
    """Of the cache, to two digits: what is free on a GPU differs a little from run to run."""
    memory = record.engine.get("kv_memory")
    return None if memory is None else f"{float(f'{memory / 2**30:.2g}'):g} GiB"


def _part(*path: str) -> Callable[[RunRecord], Any]:
    def get(record: RunRecord) -> Any:
        value: Any = getattr(record, path[0])
        for key in path[1:]:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return get


def _show(value: Any) -> str:
    return "none" if value is None else str(value)


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
