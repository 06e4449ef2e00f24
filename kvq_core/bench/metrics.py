"""The figures of a run, from the traces of its requests. Names are those of `vllm bench serve`."""

import re
from collections.abc import Iterable, Mapping, Sequence

from kvq_core.bench.trace import RequestTrace
from kvq_core.errors import UsageError

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")
LIMITED = ("ttft", "tpot", "e2el")
"""Latencies of a single request, which goodput can limit."""

DEFINITIONS = {
    "TTFT": "time to first token: from the moment the request is due to be sent, queueing included",
    "TPOT": "time per output token: (last - first) / (n - 1) of each request with n > 1 tokens",
    "ITL": "inter-token latency: every gap between arrivals, all requests together",
    "E2E": "end to end: from the moment the request is due to be sent to the last token",
    "due": "in an open loop (--request-rate) when it arrives, though --concurrency may make it wait; in a "
    "closed loop when it is sent, as soon as an earlier one ends",
    "throughput": "completed requests, and their input and output tokens, by the seconds from the "
    "start to the last event; warm-up excluded",
    "goodput": "completed requests that met every limit of --goodput, by the same seconds",
    "failed": "requests that ended in an error or short of the tokens asked for: excluded from latencies "
    "and throughput, always shown",
    "cancelled": "requests that the client stopped in the middle of their answer, as --cancel-rate asks: "
    "excluded likewise",
}
"""What each figure means; printed by `--help`."""

Metrics = dict[str, float | int | None]


def parse_limits(texts: Iterable[str], flag: str = "--goodput") -> dict[str, float]:
    """Milliseconds by latency from `ttft:500 tpot:50`, in one text or several."""
    limits: dict[str, float] = {}
    for item in " ".join(texts).replace(",", " ").split():
        match = re.fullmatch(r"(\w+):(\d*\.?\d+)", item)
        if not match or match[1] not in LIMITED or float(match[2]) == 0:
            raise UsageError(
                f"`{item}` is no limit of {flag}",
                f"NAME:MILLISECONDS with a name of {', '.join(LIMITED)}, as in `{flag} ttft:500 tpot:50`",
            )
        if match[1] in limits:
            raise UsageError(f"{flag} limits {match[1]} twice", "give each latency one limit")
        limits[match[1]] = float(match[2])
    return limits


def summarize(
    traces: Sequence[RequestTrace], duration: float, limits: Mapping[str, float] | None = None
) -> Metrics:
    """Every figure of a run record for requests measured over `duration` seconds.

    Only requests that succeeded count; a latency that none of them has is None. With `limits` (milliseconds
    by latency) there is a goodput.
    """
    good = [trace for trace in traces if trace.succeeded]
    samples = _samples(traces)
    input_tokens = sum(trace.input_len for trace in good)
    output_tokens = sum(trace.tokens for trace in good)
    metrics: Metrics = {
        "duration": duration,
        "completed": len(good),
        "failed": sum(trace.error is not None for trace in traces),
        "cancelled": sum(trace.status == "cancelled" for trace in traces),
        "unfinished": sum(trace.ended is None for trace in traces),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": rate(len(good), duration),
        "input_throughput": rate(input_tokens, duration),
        "output_throughput": rate(output_tokens, duration),
        "total_token_throughput": rate(input_tokens + output_tokens, duration),
    }
    if limits:
        metrics["request_goodput"] = rate(sum(_meets(trace, limits) for trace in good), duration)
    for name in LATENCIES:
        metrics |= distribution(name, samples[name])
    return metrics


def quantiles(traces: Sequence[RequestTrace]) -> dict[str, list[float]]:
    """The distribution of each latency: its percentiles 0, 1 … 100 in ms; none where no request has it."""
    found: dict[str, list[float]] = {}
    for name, seconds in _samples(traces).items():
        values = sorted(value * 1e3 for value in seconds)
        if values:
            found[name] = [round(percentile(values, p) or 0.0, 3) for p in range(101)]
    return found


def _samples(traces: Sequence[RequestTrace]) -> dict[str, list[float]]:
    """Seconds of each latency, of the requests that succeeded."""
    good = [trace for trace in traces if trace.succeeded]
    tpots = (trace.tpot for trace in good)
    return {
        "ttft": [trace.ttft for trace in good],
        "tpot": [tpot for tpot in tpots if tpot is not None],
        "itl": [gap for trace in good for gap in trace.itl],
        "e2el": [trace.e2el for trace in good],
    }


def _meets(trace: RequestTrace, limits: Mapping[str, float]) -> bool:
    """A request of a single token has no TPOT, and meets any limit of it."""
    return all((getattr(trace, name) or 0.0) * 1e3 <= limit for name, limit in limits.items())


def rate(count: int, duration: float) -> float:
    """`count` per second; 0 where no time has passed."""
    return count / duration if duration > 0 else 0.0


def distribution(name: str, seconds: Iterable[float]) -> Metrics:
    """`mean_X_ms, median_X_ms, std_X_ms, p50_X_ms, ...`: population deviation, linear percentiles."""
    values = sorted(value * 1e3 for value in seconds)
    mean = sum(values) / len(values) if values else None
    deviation = None
    if mean is not None:
        deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    return {
        f"mean_{name}_ms": mean,
        f"median_{name}_ms": percentile(values, 50),
        f"std_{name}_ms": deviation,
        **{f"p{p}_{name}_ms": percentile(values, p) for p in PERCENTILES},
    }


def percentile(ordered: Sequence[float], p: float) -> float | None:
    """The p-th percentile of sorted values, interpolated linearly between neighbours (numpy's default)."""
    if not ordered:
        return None
    position = (len(ordered) - 1) * p / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
