"""What a target holds over time: requests and tokens in its cache, in a few hundred samples a run."""

from dataclasses import dataclass, field
from typing import Any

from kvq_core.bench.target import Usage

INTERVAL = 0.005
"""Seconds from which on something new is looked at."""
MOST = 256
"""Samples kept; beyond them every other one is dropped, and they are half as frequent."""


@dataclass
class Timeline:
    """Samples of one run, evenly spaced however long it takes, each of the time since the one before."""

    start: float
    interval: float = INTERVAL
    """Seconds between samples that are kept."""
    samples: list[tuple[float, int, Usage | None]] = field(default_factory=list)
    """(time, requests in flight, what the target says)."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds that requests ran and that they waited inside the target, added up."""

    def __post_init__(self) -> None:
        self._seen = self.start

    def is_due(self, now: float) -> bool:
        return now - self._seen >= INTERVAL

    def add(self, now: float, in_flight: int, usage: Usage | None) -> None:
        """Count what was until now; samples beyond `MOST` are thinned out."""
        if usage is not None:
            for name in ("running", "waiting"):
                passed = getattr(usage, name) * (now - self._seen)
                self.seconds[name] = self.seconds.get(name, 0.0) + passed
        self._seen = now
        if not self.samples or now - self.samples[-1][0] >= self.interval:
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
        """Requests that ran and that waited inside the target, on average over the time."""
        passed = self._seen - self.start
        return {f"mean_{name}": seconds / passed for name, seconds in self.seconds.items() if passed > 0}
