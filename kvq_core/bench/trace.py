"""What was seen of one request: when it was due and sent, when tokens came, how it ended."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class RequestTrace:
    """Times are seconds on the target's clock; latencies count from `due`, not from `sent`.

    A request that waits for room would otherwise look quick just when the target is slow.
    """

    index: int
    input_len: int
    output_len: int
    """Tokens asked for."""
    due: float
    """When it was to be sent: at its arrival in an open loop, when there is room for it in a closed one."""
    sent: float
    lag: float = 0.0
    """Seconds that sending was late through the load generator alone, waiting for room not included."""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(time, number of tokens) of every event that carried tokens."""
    counted: int | None = None
    """Tokens of the answer as the target counted them, where arrivals are chunks of a stream."""
    ended: float | None = None
    """None: still running when the run was interrupted."""
    error: str | None = None
    cancelled: bool = False
    """Stopped by the client, on purpose."""

    @property
    def tokens(self) -> int:
        """Tokens of the answer: as the target counted them, else those that arrived."""
        return sum(count for _, count in self.arrivals) if self.counted is None else self.counted

    @property
    def status(self) -> str:
        """`ok`, `failed`, `cancelled` or `unfinished`."""
        if self.ended is None:
            return "unfinished"
        return "failed" if self.error is not None else "cancelled" if self.cancelled else "ok"

    @property
    def succeeded(self) -> bool:
        return self.status == "ok"

    @property
    def ttft(self) -> float:
        """Seconds from when it was due to the first token."""
        return self.arrivals[0][0] - self.due

    @property
    def e2el(self) -> float:
        """Seconds from when it was due to the last token."""
        return self.arrivals[-1][0] - self.due

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None with a single token."""
        return (self.e2el - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Seconds between arrivals; tokens that arrive together are one arrival."""
        times = [time for time, _ in self.arrivals]
        return [later - earlier for earlier, later in pairwise(times)]

    def row(self, start: float) -> dict[str, Any]:
        """One line of the file of requests; times in ms, `due_ms` and `sent_ms` from the window's start."""
        seen = bool(self.arrivals)
        return {
            "index": self.index,
            "input_len": self.input_len,
            "asked_output_len": self.output_len,
            "output_len": self.tokens,
            "due_ms": to_ms(self.due - start),
            "sent_ms": to_ms(self.sent - start),
            "ttft_ms": to_ms(self.ttft) if seen else None,
            "e2el_ms": to_ms(self.e2el) if seen else None,
            "itl_ms": [to_ms(gap) for gap in self.itl],
            "status": self.status,
            "error": self.error,
        }


def to_ms(seconds: float) -> float:
    """Milliseconds, to the microsecond."""
    return round(seconds * 1e3, 3)
