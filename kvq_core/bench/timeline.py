"""What a target holds over time: requests and tokens in its cache, in a few hundred samples a run."""

from dataclasses import dataclass, field
from typing import Any

from kvq_core.bench.target import Usage

MOST = 256
"""Samples kept; beyond them every other one is dropped, and sampling is half as frequent."""


@dataclass
class Timeline:
    """Samples of one run, evenly spaced however long it takes."""

    start: float
    interval: float = 0.005
    """Seconds between samples."""
    samples: list[tuple[float, int, Usage | None]] = field(default_factory=list)
    """(time, requests in flight, what the target says)."""

    def is_due(self, now: float) -> bool:
        return not self.samples or now - self.samples[-1][0] >= self.interval

    def add(self, now: float, in_flight: int, usage: Usage | None) -> None:
        """Keep a sample; beyond `MOST`, thin out all of them."""
        self.samples.append((now, in_flight, usage))
        if len(self.samples) > MOST:
            self.samples, self.interval = self.samples[::2], self.interval * 2

    def describe(self) -> dict[str, list[Any]]:
        """Columns: `time_s` from the start, `in_flight`; where known `kv_tokens`, `running`, `waiting`."""
        columns: dict[str, list[Any]] = {
            "time_s": [round(time - self.start, 4) for time, _, _ in self.samples],
            "in_flight": [count for _, count, _ in self.samples],
        }
        usages = [usage for _, _, usage in self.samples if usage is not None]
        if len(usages) == len(self.samples):
            for name in ("kv_tokens", "running", "waiting"):
                columns[name] = [getattr(usage, name) for usage in usages]
        return columns

    def means(self) -> dict[str, float]:
        """Requests that ran and that waited inside the target, on average over the samples."""
        usages = [usage for _, _, usage in self.samples if usage is not None]
        if not usages:
            return {}
        return {
            f"mean_{name}": sum(getattr(usage, name) for usage in usages) / len(usages)
            for name in ("running", "waiting")
        }
