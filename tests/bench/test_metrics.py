"""Metrics against values computed by hand, and against numpy's percentiles."""

import math
import random

import numpy as np
import pytest

from kvq_core.bench.load import Load, run_load
from kvq_core.bench.metrics import DEFINITIONS, LATENCIES, parse_limits, percentile, quantiles, summarize
from kvq_core.bench.target import BenchRequest
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


@pytest.mark.parametrize("end", ["failed", "unfinished", "cancelled"])
def test_what_did_not_succeed_never_improves_a_figure(bench, end):
    slow = bench.trace(0.0, [2.0, 4.0])
    fast = bench.trace(0.0, [0.1, 0.2, 0.3], error="boom" if end == "failed" else None)
    if end == "unfinished":
        fast.ended = None
    fast.cancelled = end == "cancelled"
    limits = {"ttft": 5000.0}
    both, alone = summarize([slow, fast], 4.0, limits), summarize([slow], 4.0, limits)
    assert both[end] == 1
    assert both | {end: 0} == alone
    assert quantiles([slow, fast]) == quantiles([slow])


def test_every_kind_of_request_in_one_run_by_hand(bench):
    """Streams of a server, played to the load generator, and every figure worked out on paper.

    index  events (s after sending, chunks)   usage  outcome    ttft  tpot          gaps      e2e
    0      1.0, 1.4, 2.2                      3      ok         1.0   1.2/2 = 0.6   0.4, 0.8  2.2
    1      0.5                                1      ok         0.5   none          none      0.5
    2      2.0, 3.0 (one chunk of 4 tokens)   5      ok         2.0   1.0/4 = 0.25  1.0       3.0
    3      0.1, 0.2 with an error             -      failed
    4      0.1, then the end                  1 of 3 failed: it stops short
    5      0.1, 0.2, …                        -      cancelled after some token
    """
    scripts = {
        0: bench.Script([1.0, 0.4, 0.8]),
        1: bench.Script([0.5]),
        2: bench.Script([2.0, 1.0], tokens=[1, 4]),
        3: bench.Script([0.1, 0.1], error="out of memory"),
        4: bench.Script([0.1]),
        5: bench.Script([0.1] * 8),
    }
    lengths = {0: 3, 1: 1, 2: 5, 3: 2, 4: 3, 5: 8}
    requests = [BenchRequest(i, [1] * 10, 10, length) for i, length in lengths.items()]

    class OneLeaves(Load):
        def cancellations(self, requests):
            return {5: 3}

    result = run_load(
        target := bench.Target(lambda request: scripts[request.index]),
        requests,
        OneLeaves(6),
        clock=target.clock,
    )
    assert [trace.status for trace in result.traces] == ["ok"] * 3 + ["failed"] * 2 + ["cancelled"]
    assert result.duration == pytest.approx(3.0)
    m = summarize(result.traces, result.duration, {"ttft": 1500, "tpot": 500})
    assert (m["completed"], m["failed"], m["cancelled"]) == (3, 2, 1)
    assert (m["total_input_tokens"], m["total_output_tokens"]) == (30, 9)
    assert m["output_throughput"] == pytest.approx(9 / 3.0)
    assert m["request_goodput"] == pytest.approx(1 / 3.0)  # 0: a token too slow, 2: the first one too late
    assert m["mean_ttft_ms"] == pytest.approx((1000 + 500 + 2000) / 3)
    assert m["mean_tpot_ms"] == pytest.approx((600 + 250) / 2)
    assert m["mean_itl_ms"] == pytest.approx((400 + 800 + 1000) / 3)
    assert m["mean_e2el_ms"] == pytest.approx((2200 + 500 + 3000) / 3)
    assert m["p50_ttft_ms"] == pytest.approx(1000)
    assert m["p90_ttft_ms"] == pytest.approx(1800)  # 0.9 * 2 = 1.8: 1000 + 0.8 * (2000 - 1000)
    assert m["p50_itl_ms"] == pytest.approx(800)
    assert m["std_tpot_ms"] == pytest.approx(175)


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


def vllm_bench_serve(outputs, duration, goodput):
    """What `vllm bench serve` works out of its request outputs, by its definitions, written down anew.

    An output has: success; prompt_len; output_tokens, as the usage block says; ttft, from sending to the
    first chunk; itl, from each chunk to the next one, whatever number of tokens it holds; latency, to the
    last chunk. TPOT is (latency - ttft) / (output_tokens - 1) of outputs of more than one token; for goodput,
    but not in its distribution, that of a single token is 0. What did not succeed is left out everywhere.
    """
    good = [output for output in outputs if output["success"]]
    samples = {name: [] for name in ("ttft", "tpot", "itl", "e2el")}
    met = 0
    for output in good:
        samples["ttft"].append(output["ttft"])
        samples["e2el"].append(output["latency"])
        samples["itl"] += output["itl"]
        tpot = 0.0
        if output["output_tokens"] > 1:
            tpot = (output["latency"] - output["ttft"]) / (output["output_tokens"] - 1)
            samples["tpot"].append(tpot)
        met += output["ttft"] <= goodput["ttft"] / 1e3 and tpot <= goodput["tpot"] / 1e3
    tokens = sum(output["output_tokens"] for output in good)
    prompts = sum(output["prompt_len"] for output in good)
    metrics = {
        "completed": len(good),
        "failed": len(outputs) - len(good),
        "total_input_tokens": prompts,
        "total_output_tokens": tokens,
        "request_throughput": len(good) / duration,
        "request_goodput": met / duration,
        "output_throughput": tokens / duration,
        "total_token_throughput": (prompts + tokens) / duration,
    }
    for name, seconds in samples.items():
        ms = np.array(seconds) * 1e3
        metrics |= {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": np.median(ms)}
        metrics |= {f"std_{name}_ms": np.std(ms)}
        metrics |= {f"p{p}_{name}_ms": np.percentile(ms, p) for p in (50, 90, 95, 99)}
    return metrics, samples


def test_the_same_as_vllm_bench_serve_says_of_the_same_timestamps(bench):
    """Random streams: chunks of 1 to 4 tokens, some of them at one moment; one-token answers; failures."""
    generator = random.Random(7)
    traces, outputs = [], []
    for index in range(80):
        sent = generator.uniform(0, 5)
        times = [sent + generator.uniform(0.05, 0.4)]
        for _ in range(0 if index % 10 == 3 else generator.randint(0, 30)):
            times.append(times[-1] + generator.choice([0.0, generator.expovariate(40)]))
        tokens = [1] + [generator.randint(1, 4) for _ in times[1:]]
        success = index % 9 > 1
        trace = bench.trace(sent, times, index=index, input_len=index + 1)
        trace.counted, trace.output_len = sum(tokens), sum(tokens)
        if index % 9 == 0:
            trace.error = "no"
        trace.cancelled = index % 9 == 1
        traces.append(trace)
        outputs.append(
            {
                "success": success,
                "prompt_len": index + 1,
                "output_tokens": sum(tokens),
                "ttft": times[0] - sent,
                "itl": np.diff(times).tolist(),
                "latency": times[-1] - sent,
            }
        )
    limits = {"ttft": 250.0, "tpot": 12.0}
    expected, samples = vllm_bench_serve(outputs, 9.0, limits)
    metrics = summarize(traces, 9.0, limits)
    assert 0 < metrics["request_goodput"] < metrics["request_throughput"]
    assert len(samples["tpot"]) < len(samples["ttft"]) and 0.0 in samples["itl"]
    # There, requests that the client cancelled count as failed; here apart.
    assert metrics["cancelled"] == 9 and metrics["failed"] + metrics["cancelled"] == expected.pop("failed")
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value), name
    for name, seconds in samples.items():
        ms = np.array(seconds) * 1e3
        assert quantiles(traces)[name] == pytest.approx(np.percentile(ms, range(101)), abs=1e-3)
