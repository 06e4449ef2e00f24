"""Which policy to run, by the user's own limits, and from which load on a policy pays."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvq_core.bench.compare import Comparison
from kvq_core.bench.record import RunRecord, read_records
from kvq_core.bench.report import number
from kvq_core.bench.scores import Scheme, collect_scores, scheme
from kvq_core.errors import KvqError

TIE = 0.02
"""Speeds that differ by less than this share are equal; memory decides."""


@dataclass(frozen=True)
class Quality:
    """What `kvq eval` measured, by policy, and on which models; `kl` in nats per token, of texts alone."""

    kl: Mapping[Scheme, float]
    models: frozenset[str]
    records: tuple[RunRecord, ...]

    def of(self, record: RunRecord) -> float | None:
        """None where it was not measured; an unquantized cache has 0 by definition."""
        key = scheme(record)
        return 0.0 if key[:2] == ("none", "none") else self.kl.get(key)


def read_quality(paths: Iterable[Path]) -> Quality:
    """The records of `kvq eval`; of a policy that was measured several times the worst counts.

    Raises `KvqError` for other files.
    """
    kl: dict[Scheme, float] = {}
    records = read_records(paths)
    for record in records:
        if not collect_scores([record]).names:
            raise KvqError(
                f"the record {record.name} has no figure of quality",
                "--quality takes what `kvq eval --output` wrote",
            )
        value = record.metrics.get("kl")
        if value is not None:
            key = scheme(record)
            kl[key] = max(value, kl.get(key, value))
    models = frozenset(str(record.model.get("name")) for record in records)
    return Quality(kl, models, tuple(records))


def advise(comparison: Comparison, quality: Quality, max_kl: float) -> list[str]:
    """A recommendation for every load that was measured, and the break-even of every policy."""
    groups: dict[int, list[int]] = {}
    for i, base in enumerate(comparison.baselines):
        groups.setdefault(id(base), []).append(i)
    lines = [_recommend(comparison, group, quality, max_kl) for group in groups.values()]
    return lines + [line for i in range(len(comparison.records)) for line in _break_even(comparison, i)]


def quality_warnings(comparison: Comparison, quality: Quality) -> list[str]:
    other = quality.models - {str(record.model.get("name")) for record in comparison.records}
    return [f"quality was measured on another model: {', '.join(sorted(other))}"] * bool(other)


def _recommend(comparison: Comparison, rows: Sequence[int], quality: Quality, max_kl: float) -> str:
    allowed, ruled_out = [], []
    for i in rows:
        name, kl = comparison.names[i], quality.of(comparison.records[i])
        if kl is None:
            ruled_out.append(f"{name} (its quality was not measured)")
        elif kl > max_kl:
            ruled_out.append(f"{name} (KL {kl:.4g})")
        elif not comparison.records[i].metrics.get("completed"):
            ruled_out.append(f"{name} (no request was completed)")
        else:
            allowed.append(i)
    because = f"; ruled out: {', '.join(ruled_out)}" if ruled_out else ""
    if not allowed:
        return f"recommended: none of these within KL {max_kl:g}{because}"
    chosen, why = _best(comparison, allowed)
    kl = quality.of(comparison.records[chosen]) or 0.0
    return f"recommended: {comparison.names[chosen]}, {why} within KL {max_kl:g} (its own: {kl:.4g}){because}"


def _best(comparison: Comparison, rows: Sequence[int]) -> tuple[int, str]:
    """The quickest row, among equals the one that holds most tokens; on a CPU that one alone."""
    records = comparison.records
    roomiest = max(rows, key=lambda i: records[i].get("capacity_tokens") or 0)
    if all(records[i].env.get("gpu") is None and not records[i].is_remote for i in rows):
        capacity = number(records[roomiest].get("capacity_tokens"))
        return roomiest, f"which holds most tokens, {capacity} (speeds on a CPU say nothing about a GPU),"
    asked = any(records[i].get("request_goodput") is not None for i in rows)
    key, unit = ("request_goodput", "good requests/s") if asked else ("output_throughput", "output tok/s")
    fastest = max(rows, key=lambda i: records[i].get(key) or 0)
    best = records[fastest].get(key) or 0
    tied = [i for i in rows if (records[i].get(key) or 0) >= best * (1 - TIE)]
    chosen = max(tied, key=lambda i: (records[i].get("capacity_tokens") or 0, records[i].get(key) or 0))
    figure = f"{number(records[chosen].get(key))} {unit}"
    if chosen == fastest:
        return chosen, f"the quickest with {figure}"
    return chosen, f"as quick as any with {figure}, and holding most tokens,"


def _break_even(comparison: Comparison, i: int) -> list[str]:
    """From how many requests at a time a policy gives more tokens per second than its baseline.

    Estimated from the measured speeds and capacities: the baseline stops growing when its memory is full, the
    policy goes on, and tokens per second grow with the requests in flight.
    """
    record, base = comparison.records[i], comparison.baselines[i]
    change = comparison.change(i, "output_throughput")
    if (
        comparison.is_baseline(i)
        or change is None
        or (record.env.get("gpu") is None and not record.is_remote)
    ):
        return []
    name = comparison.names[i]
    if change > 1:
        return [f"break-even: {name} pays at this load already, {change - 1:+.1%} output tok/s"]
    work = record.workload
    length = (work.get("mean_input_len") or 0) + (work.get("mean_output_len") or 0)
    mine, full = record.get("capacity_tokens"), base.get("capacity_tokens")
    if not (length and mine and full):
        return []
    needed = full / change
    text = f"break-even: {name} is {change - 1:+.1%} at this load; where more requests want to run than fit, "
    if needed > mine:
        return [text + "its memory does not make up for that"]
    return [
        text + f"it pays from about {number(needed / length)} requests of {length:.0f} tokens at a time "
        f"(fit: {number(full / length)} without it, {number(mine / length)} with it; an estimate)"
    ]
