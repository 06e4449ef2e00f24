"""Quality beside speed: what `kvq eval` found for the policies that a comparison shows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvq_core.bench.record import RunRecord

TEXT_FIGURES = ("ppl", "kl", "top1")
"""Of records that measured a text; those of tasks name their scores in `workload.scores`."""

Scheme = tuple[Any, ...]
"""What tells policies apart: `RunRecord.scheme`."""


def score_text(value: float | None, stderr: float | None = None) -> str:
    """Four significant digits, and the standard error with as many places."""
    if value is None:
        return "-"
    digits = 4 if abs(value) < 10 else 2
    return f"{value:.{digits}f}" + (f" ±{stderr:.{digits}f}" if stderr is not None else "")


@dataclass
class Scores:
    """Figures by policy, in the order they were found."""

    names: list[str] = field(default_factory=list)
    found: dict[Scheme, dict[str, float]] = field(default_factory=dict)

    def cells(self, record: RunRecord) -> list[str]:
        """A text for each of `names`."""
        mine = self.found.get(record.scheme, {})
        return [score_text(mine.get(name), mine.get(f"{name}_stderr")) for name in self.names]


def collect_scores(records: Sequence[RunRecord]) -> Scores:
    """The figures of quality in these records.

    Of a policy that was measured twice the later counts, but of texts the one that it changes more: the same
    that `advice.read_quality` takes.
    """
    scores = Scores()
    for record in records:
        names = [*TEXT_FIGURES, *record.workload.get("scores", ())]
        figures = {name: value for name in names if (value := record.metrics.get(name)) is not None}
        if figures:
            known = scores.found.setdefault(record.scheme, {})
            scores.found[record.scheme] = (
                figures | known if known.get("kl", 0) > figures.get("kl", 0) else known | figures
            )
            new = [name for name in figures if not name.endswith("_stderr") and name not in scores.names]
            scores.names += new
    return scores


def has_speed(record: RunRecord) -> bool:
    """False for what `kvq eval` wrote."""
    return record.workload.get("kind") not in ("quality", "tasks")
