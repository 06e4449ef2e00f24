"""Sweeps: loads and lengths in every combination under every policy, and which cells are measured already."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from kvq_core.bench.record import RunRecord
from kvq_core.errors import KvqError, UsageError

AXES = ("concurrency", "context")
EXAMPLE = "as in `--sweep concurrency=1,8,64 context=512,2048`"


@dataclass(frozen=True)
class Point:
    """One cell of a sweep, whatever the policy; None: as the other flags have it."""

    concurrency: int | None = None
    context: int | None = None
    """Tokens of a prompt."""

    @property
    def label(self) -> str:
        """`8 at a time, context 2,048`."""
        return _join(self.concurrency, self.context)


def parse_sweep(texts: Iterable[str]) -> list[Point]:
    """The cells of `concurrency=1,8 context=512,2048`, in one text or several; a single one for none."""
    axes: dict[str, list[int]] = {}
    for item in " ".join(texts).split():
        name, _, values = item.partition("=")
        if name not in AXES or not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", values):
            raise UsageError(
                f"`{item}` is no axis of --sweep", f"NAME=N,N with a name of {', '.join(AXES)}, {EXAMPLE}"
            )
        if name in axes:
            raise UsageError(f"--sweep has {name} twice", EXAMPLE)
        axes[name] = sorted({int(value) for value in values.split(",")})
    contexts: list[int] | list[None] = axes.get("context") or [None]
    concurrencies: list[int] | list[None] = axes.get("concurrency") or [None]
    return [Point(concurrency, context) for context, concurrency in product(contexts, concurrencies)]


@dataclass(frozen=True)
class Cell:
    """What one record of a sweep is to measure."""

    scheme: tuple[Any, ...]
    """`RunRecord.scheme` of the policy."""
    work: dict[str, Any]
    """The record's `workload`."""
    repeat: int | None

    def matches(self, record: RunRecord) -> bool:
        """Whether the record is a measurement of this cell."""
        return (
            record.scheme == self.scheme
            and record.repeat == self.repeat
            and _plain(record.workload) == _plain(self.work)
        )


def take_up(records: Sequence[RunRecord], cells: Sequence[Cell], model: dict[str, Any]) -> list[RunRecord]:
    """The complete records of an earlier invocation, all of which must be cells of this one.

    Raises `KvqError` where the file holds anything else, so that nothing measured is ever lost.
    """
    for record in records:
        other = [key for key, value in model.items() if record.model.get(key) != value]
        if other or not any(cell.matches(record) for cell in cells):
            reason = f"of another model ({record.model.get('name')})" if other else "not a cell of this sweep"
            raise KvqError(
                f"--resume: the record {record.name} of {_where(record)} is {reason}",
                "give the same flags as before (cells may be added), or another --output",
            )
    return [record for record in records if record.complete]


def _where(record: RunRecord) -> str:
    return _join(record.concurrency, record.context) or "an earlier run"


def _join(concurrency: int | None, context: int | None) -> str:
    parts = [f"{concurrency} at a time" if concurrency else "", f"context {context:,}" if context else ""]
    return ", ".join(filter(None, parts))


def _plain(value: Any) -> Any:
    """As it is when it was written to a file and read again."""
    return json.loads(json.dumps(value))
