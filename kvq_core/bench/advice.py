"""Which policy to run, by the user's own limits, and from which load on a policy pays."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvq_core.bench.breakeven import NOTHING, sentences
from kvq_core.bench.compare import Comparison, flaw
from kvq_core.bench.record import RunRecord, read_records
from kvq_core.bench.report import NAMES, is_on_cpu, number
from kvq_core.bench.scores import Scheme, collect_scores
from kvq_core.errors import KvqError

TIE = 0.02
"""Speeds that differ by less than this share are equal; memory decides."""
SPEED = "output_throughput"


@dataclass(frozen=True)
class Quality:
    """What `kvq eval` measured, by policy, and on which models; `kl` in nats per token, of texts alone."""

    kl: Mapping[Scheme, float]
    models: frozenset[str]
    records: Sequence[RunRecord] = ()

    def of(self, record: RunRecord) -> float | None:
        """None where it was not measured; an unquantized cache has 0 by definition."""
        key, value, _, _, *layers = record.scheme
        return 0.0 if (key, value, layers) == ("none", "none", []) else self.kl.get(record.scheme)


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
            scheme = record.scheme
            kl[scheme] = max(value, kl.get(scheme, value))
    return Quality(kl, frozenset(str(record.model.get("name")) for record in records), records)


@dataclass(frozen=True)
class Limits:
    """What a policy must keep to be recommended; None and empty: no limit."""

    max_kl: float | None = None
    slo: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds at p99 by latency."""

    def __str__(self) -> str:
        parts = [f"KL {self.max_kl:g}"] if self.max_kl is not None else []
        return " and ".join(parts + [f"p99 {NAMES[name]} ≤ {ms:g} ms" for name, ms in self.slo.items()])


def advise(comparison: Comparison, quality: Quality | None, limits: Limits) -> list[str]:
    """A recommendation for every load that was measured, the best of all loads, and where policies pay."""
    groups: dict[int, list[int]] = {}
    for i in comparison.order:
        groups.setdefault(id(comparison.baselines[i]), []).append(i)
    # On a CPU memory decides, which is the same at every load.
    loads = list(groups.values())[: 1 if is_on_cpu(comparison.records) else None]
    names = comparison.names
    if len(loads) < len(groups):  # it then is one of policies, not of loads
        names = [record.name for record in comparison.records]
    lines = [_recommend(comparison, names, group, quality, limits) for group in loads]
    if limits.slo and len(loads) > 1:
        lines += _most_load(comparison, quality, limits)
    measured = sentences(comparison)
    if measured:
        return lines + measured
    return lines + [line for i in range(len(comparison.records)) for line in _break_even(comparison, i)]


def quality_warnings(comparison: Comparison, quality: Quality) -> list[str]:
    """A warning where quality was measured on another model than speed."""
    other = quality.models - {str(record.model.get("name")) for record in comparison.records}
    return [f"quality was measured on another model: {', '.join(sorted(other))}"] * bool(other)


def _ruled_out(record: RunRecord, quality: Quality | None, limits: Limits) -> str | None:
    """Which limit a record breaks; None where it keeps them all."""
    if reason := flaw(record):
        return reason
    if limits.max_kl is not None:
        kl = quality.of(record) if quality else None
        if kl is None:
            return "its quality was not measured"
        if kl > limits.max_kl:
            return f"KL {kl:.4g}"
    for name, limit in limits.slo.items():
        value = record.get(f"p99_{name}_ms")
        if value is not None and value > limit:
            return f"p99 {NAMES[name]} {number(value)} ms"
    return None


def _recommend(
    comparison: Comparison,
    names: Sequence[str],
    rows: Sequence[int],
    quality: Quality | None,
    limits: Limits,
) -> str:
    reasons = {i: _ruled_out(comparison.records[i], quality, limits) for i in rows}
    allowed = [i for i in rows if reasons[i] is None]
    ruled_out = [f"{names[i]} ({reason})" for i, reason in reasons.items() if reason]
    because = f"; ruled out: {', '.join(ruled_out)}" if ruled_out else ""
    if not allowed:
        return f"recommended: none of these within {limits}{because}"
    chosen, why = _best(comparison, allowed)
    kl = quality.of(comparison.records[chosen]) if quality else None
    own = f" (its own: {kl:.4g})" if limits.max_kl is not None and kl is not None else ""
    return f"recommended: {names[chosen]}, {why} within {limits}{own}{because}"


def _most_load(comparison: Comparison, quality: Quality | None, limits: Limits) -> list[str]:
    """For each context the record with most output tokens per second that keeps the limits."""
    best: dict[int | None, int] = {}
    for i, record in enumerate(comparison.records):
        known = best.get(record.context)
        more = known is None or (record.get(SPEED) or 0) > (comparison.records[known].get(SPEED) or 0)
        if _ruled_out(record, quality, limits) is None and more:
            best[record.context] = i
    return [
        f"most within {limits}: {comparison.names[i]} with {number(comparison.records[i].get(SPEED))} "
        "output tok/s"
        for i in best.values()
    ]


def _best(comparison: Comparison, rows: Sequence[int]) -> tuple[int, str]:
    """The quickest row, among equals the one that holds most tokens; on a CPU that one alone."""
    records = comparison.records
    roomiest = max(rows, key=lambda i: records[i].get("capacity_tokens") or 0)
    if all(records[i].env.get("gpu") is None and not records[i].is_remote for i in rows):
        capacity = number(records[roomiest].get("capacity_tokens"))
        return roomiest, f"which holds most tokens, {capacity} (speeds on a CPU say nothing about a GPU),"
    asked = any(records[i].get("request_goodput") is not None for i in rows)
    key, unit = ("request_goodput", "good requests/s") if asked else (SPEED, "output tok/s")
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
    change = comparison.change(i, SPEED)
    if (
        comparison.is_baseline(i)
        or change is None
        or (record.env.get("gpu") is None and not record.is_remote)
    ):
        return []
    name = comparison.names[i]
    if flaw(record) or flaw(base):
        return []
    if change - 1 > max(comparison.noise(i, SPEED), NOTHING):
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
