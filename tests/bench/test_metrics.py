"""Metrics against values computed by hand, and against numpy's percentiles."""

import math
import random

import numpy as np
import pytest

from kvq_core.bench.metrics import DEFINITIONS, LATENCIES, parse_limits, percentile, quantiles, summarize
from kvq_core.errors import UsageError


def test_two_scripted_requests_by_hand(bench):
    traces = [
        bench.trace(10.0, [11.0, 11.5, 12.5], input_len=7),  # ttft 1, gaps 0.5 1.0, tpot 0.75, e2e 2.5
        bench.trace(10.5, [12.5, 12.7], input_len=5),  # ttft 2, gap 0.2, tpot 0.2, e2e 2.2
    ]
    m = summarize(traces, duration=2.5)
    assert m["completed"] == 2 and m["failed"] == 0 and m["unfinished"] == 0
    assert (m["total_input_tokens"], m["total_output_tokens"]) == (12, 5)
    assert m["request_throughput"] == pytest.approx(0.8)
    assert m["input_throughput"] == pytest.approx(4.8)
    assert m["output_throughput"] == pytest.approx(2.0)
    assert m["total_token_throughput"] == pytest.approx(6.8)
    assert m["mean_ttft_ms"] == pytest.approx(1500)
    assert m["std_ttft_ms"] == pytest.approx(500)
    assert m["median_ttft_ms"] == m["p50_ttft_ms"] == pytest.approx(1500)
    assert m["p90_ttft_ms"] == pytest.approx(1900)
    assert m["p99_ttft_ms"] == pytest.approx(1990)
    assert m["mean_tpot_ms"] == pytest.approx(475)
    assert m["mean_itl_ms"] == pytest.approx((500 + 1000 + 200) / 3)
    assert m["median_itl_ms"] == pytest.approx(500)
    assert m["mean_e2el_ms"] == pytest.approx(2350)
    assert m["p95_e2el_ms"] == pytest.approx(2200 + 0.95 * 300)


def test_every_name_of_vllm_is_there(bench):
    m = summarize([bench.trace(0.0, [1.0, 2.0])], 2.0)
    for latency in LATENCIES:
        for figure in ("mean", "median", "std", "p50", "p90", "p95", "p99"):
            assert isinstance(m[f"{figure}_{latency}_ms"], float)


def test_tokens_arriving_together_are_one_gap_but_all_count_in_tpot(bench):
    m = summarize([bench.trace(0.0, [1.0, 2.0], tokens=[1, 4])], 2.0)
    assert m["total_output_tokens"] == 5
    assert m["mean_itl_ms"] == pytest.approx(1000)
    assert m["mean_tpot_ms"] == pytest.approx(250)


def test_a_single_token_has_no_tpot_and_no_gap(bench):
    m = summarize([bench.trace(0.0, [1.0]), bench.trace(0.0, [1.0, 1.5])], 2.0)
    assert m["completed"] == 2
    assert m["mean_tpot_ms"] == pytest.approx(500)
    alone = summarize([bench.trace(0.0, [1.0])], 1.0)
    assert alone["mean_tpot_ms"] is None and alone["p99_itl_ms"] is None
    assert alone["mean_ttft_ms"] == pytest.approx(1000)


@pytest.mark.parametrize("end", ["failed", "unfinished"])
def test_what_did_not_succeed_never_improves_a_figure(bench, end):
    slow = bench.trace(0.0, [2.0, 4.0])
    fast = bench.trace(0.0, [0.1, 0.2, 0.3], error="boom" if end == "failed" else None)
    if end == "unfinished":
        fast.ended = None
    both, alone = summarize([slow, fast], 4.0), summarize([slow], 4.0)
    assert both[end] == 1
    assert both | {end: 0} == alone


def test_nothing_completed_gives_zeros_and_none_but_never_nan(bench):
    for m in (summarize([], 0.0), summarize([bench.trace(0.0, [], error="boom")], 3.0)):
        assert m["request_throughput"] == 0 and m["completed"] == 0
        assert m["mean_ttft_ms"] is None
        assert not any(isinstance(value, float) and math.isnan(value) for value in m.values())


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(count):
    values = sorted(np.random.default_rng(count).lognormal(size=count).tolist())
    for p in (0, 1, 50, 90, 95, 99, 99.9, 100):
        assert percentile(values, p) == pytest.approx(np.percentile(values, p))


def test_standard_deviation_is_numpys(bench):
    firsts = np.random.default_rng(0).uniform(0.1, 3.0, size=50)
    m = summarize([bench.trace(0.0, [first]) for first in firsts.tolist()], 1.0)
    assert m["std_ttft_ms"] == pytest.approx(np.std(firsts) * 1e3)


def test_goodput_by_hand(bench):
    traces = [
        bench.trace(0.0, [0.5, 0.55]),  # meets both limits, each of them just
        bench.trace(0.0, [0.51, 0.52]),  # first token too late
        bench.trace(0.0, [0.1, 0.2]),  # too slow a token
        bench.trace(0.0, [0.1]),  # a single token has no TPOT
        bench.trace(0.0, [0.1, 0.11], error="boom"),
    ]
    limits = parse_limits(["ttft:500", "tpot:50.001"])
    assert summarize(traces, 4.0, limits)["request_goodput"] == pytest.approx(2 / 4)
    assert summarize(traces, 4.0, {"e2el": 200})["request_goodput"] == pytest.approx(2 / 4)
    assert "request_goodput" not in summarize(traces, 4.0)


def test_limits_of_goodput():
    assert parse_limits(["ttft:500", "tpot:50.5"]) == parse_limits(["ttft:500 tpot:50.5"])
    assert parse_limits(["ttft:500,e2el:20000"]) == {"ttft": 500.0, "e2el": 20000.0}
    assert parse_limits([]) == {}
    for wrong in ("ttft", "ttft:", "ttft:fast", "itl:5", "ttft:0", "ttft:-1", "ttft:1 ttft:2"):
        with pytest.raises(UsageError):
            parse_limits([wrong])


def test_definitions_cover_the_latencies():
    assert {"TTFT", "TPOT", "ITL", "E2E"} <= set(DEFINITIONS)


def test_row_of_a_request(bench):
    row = bench.trace(10.0, [11.0, 11.5], index=3).row(start=9.0)
    assert row == {
        "index": 3, "input_len": 10, "asked_output_len": 2, "output_len": 2, "due_ms": 1000.0,
        "sent_ms": 1000.0, "ttft_ms": 1000.0, "e2el_ms": 1500.0, "itl_ms": [500.0], "status": "ok",
        "error": None,
    }  # fmt: skip
    nothing = bench.trace(10.0, [], error="boom").row(start=9.0)
    assert nothing["status"] == "failed" and nothing["ttft_ms"] is None and nothing["error"] == "boom"


def test_the_same_as_vllm_bench_serve_says_of_the_same_timestamps(bench):
    """`calculate_metrics` of `vllm bench serve`, by its definitions, with numpy, on random streams.

    There an output has latency, ttft and itl, and TPOT is (latency - ttft) / (output tokens - 1).
    """
    generator = random.Random(7)
    traces, outputs = [], []
    for index in range(60):
        sent = generator.uniform(0, 5)
        times = [sent + generator.uniform(0.05, 0.4)]
        for _ in range(generator.randint(0, 30)):
            times.append(times[-1] + generator.expovariate(40))
        failed = index % 9 == 0
        traces.append(
            bench.trace(sent, times, index=index, input_len=index + 1, error="no" if failed else None)
        )
        if not failed:
            gaps = np.diff(times)
            outputs.append((index + 1, len(times), times[0] - sent, times[-1] - sent, gaps))
    metrics = summarize(traces, 9.0)
    assert metrics["completed"] == len(outputs) and metrics["failed"] == 60 - len(outputs)
    assert metrics["request_throughput"] == pytest.approx(len(outputs) / 9.0)
    assert metrics["output_throughput"] == pytest.approx(sum(n for _, n, *_ in outputs) / 9.0)
    assert metrics["total_token_throughput"] == pytest.approx(sum(i + n for i, n, *_ in outputs) / 9.0)
    expected = {
        "ttft": [ttft for _, _, ttft, _, _ in outputs],
        "tpot": [(latency - ttft) / (n - 1) for _, n, ttft, latency, _ in outputs if n > 1],
        "itl": [gap for *_, gaps in outputs for gap in gaps],
        "e2el": [latency for _, _, _, latency, _ in outputs],
    }
    for name, seconds in expected.items():
        ms = np.array(seconds) * 1e3
        assert metrics[f"mean_{name}_ms"] == pytest.approx(ms.mean())
        assert metrics[f"median_{name}_ms"] == pytest.approx(np.median(ms))
        assert metrics[f"std_{name}_ms"] == pytest.approx(ms.std())
        for p in (50, 90, 95, 99):
            assert metrics[f"p{p}_{name}_ms"] == pytest.approx(np.percentile(ms, p))
        assert quantiles(traces)[name] == pytest.approx(np.percentile(ms, range(101)), abs=1e-3)
