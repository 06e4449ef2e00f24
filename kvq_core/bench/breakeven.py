"""From which load on a policy pays, measured: the cells of a sweep against the baseline's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvq_core.bench.compare import Comparison, flaw
from kvq_core.bench.report import Cell, Table, is_on_cpu, number

KEY = "output_throughput"
NOTHING = 0.005
"""A change below this share, or below its 95% interval, is none."""


@dataclass(frozen=True)
class Curve:
    """One policy at one context: (concurrency, throughput by the baseline's, what of it may be chance)."""

    name: str
    baseline: str
    context: int | None
    points: Sequence[tuple[int, float, float]]
    request: str
    """Tokens of a request, `2,048 + 128`."""

    @property
    def wins(self) -> list[bool]:
        """Whether it is quicker at each load, by more than chance."""
        return [change - 1 > max(noise, NOTHING) for _, change, noise in self.points]

    @property
    def from_concurrency(self) -> float | None:
        """Requests at a time from which on it is quicker in every cell; between two cells it is interpolated.

        None where it is not quicker in the cell of the highest load.
        """
        first = len(self.points)
        while first and self.wins[first - 1]:
            first -= 1
        if first == len(self.points):
            return None
        at, change, _ = self.points[first]
        if first == 0:
            return at
        before, lower, _ = self.points[first - 1]
        if lower >= 1:
            return at  # quicker already, by no more than chance
        share = (1 - lower) / (change - lower)
        return math.exp(math.log(before) + share * (math.log(at) - math.log(before)))

    @property
    def verdict(self) -> str:
        """From how many requests at a time on it pays, for a table."""
        found = self.from_concurrency
        if found is None:
            return f"not up to {self.points[-1][0]}"
        exact = any(found == concurrency for concurrency, _, _ in self.points)
        return f"{found:.0f}" if exact else f"about {number(max(math.ceil(found), self.points[0][0] + 1))}"

    @property
    def sentence(self) -> str:
        """The same as a sentence."""
        if self.from_concurrency is None:
            shown = ", ".join(f"{change - 1:+.1%} at {at}" for at, change, _ in self.points)
            return f"break-even: {self.name} does not beat {self.baseline} with {self._requests} ({shown})"
        load = f"{self.verdict} concurrent {self._requests}"
        return f"break-even: {self.name} beats {self.baseline} from {load} on"

    @property
    def _requests(self) -> str:
        return f"requests of {self.request} tokens"


def curves(comparison: Comparison) -> list[Curve]:
    """A curve for each policy and context that was measured, with its baseline, at several concurrencies."""
    rows: dict[tuple[str, int | None], list[int]] = {}
    for i in comparison.order:
        record = comparison.records[i]
        alike = comparison.baselines[i].concurrency == record.concurrency
        if not comparison.is_baseline(i) and alike and record.concurrency:
            rows.setdefault((record.name, record.context), []).append(i)
    found = []
    for (name, context), indices in rows.items():
        points = [
            (comparison.records[i].concurrency or 0, change, comparison.noise(i, KEY))
            for i in indices
            if not (flaw(comparison.records[i]) or flaw(comparison.baselines[i]))
            and (change := comparison.change(i, KEY)) is not None
        ]
        if len({at for at, _, _ in points}) > 1:
            record = comparison.records[indices[0]]
            work = record.workload
            request = f"{work.get('mean_input_len') or 0:,.0f} + {work.get('mean_output_len') or 0:,.0f}"
            found.append(Curve(name, comparison.baselines[indices[0]].name, context, points, request))
    return found


def sentences(comparison: Comparison) -> list[str]:
    """A line for each curve; none for speeds of a CPU, which say nothing about a GPU."""
    return [] if is_on_cpu(comparison.records) else [curve.sentence for curve in curves(comparison)]


def break_even_table(comparison: Comparison) -> Table | None:
    """Change of the output throughput in every cell, and from how many requests at a time on it is a gain."""
    found = curves(comparison)
    if not found:
        return None
    loads = sorted({at for curve in found for at, _, _ in curve.points})
    rows = []
    for curve in found:
        cells = []
        for load in loads:
            change = next((change for at, change, _ in curve.points if at == load), None)
            cells.append(Cell("-" if change is None else f"{change - 1:+.1%}"))
        rows.append([Cell(curve.name), Cell(curve.request), *cells, Cell(curve.verdict)])
    title = f"break-even (output tok/s against {found[0].baseline}, by requests at a time)"
    return Table(
        title, ["policy", "request\ntokens", *(f"{load}\nat a time" for load in loads), "pays\nfrom"], rows
    )
