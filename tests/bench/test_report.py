"""Comparisons and their views: changes, baselines, warnings, Markdown, CSV, JSON."""

import csv
import io
import json
from dataclasses import replace

import pytest

from kvq_core.bench import report
from kvq_core.bench.compare import compare_records
from kvq_core.bench.record import RunRecord
from kvq_core.errors import KvqError

TURBO_KV = {
    "bits_per_element": 3.1875,
    "bytes_per_token": 200.0,
    "capacity_tokens": 502,
    "capacity_ratio": 5.02,
    "peak_tokens": 1234,
    "preemptions": 0,
}


@pytest.fixture
def pair(bench):
    """none, and turbo at half of its speed."""
    return [bench.record("none", 0), bench.record("turbo", 42, speed=0.5, kv=TURBO_KV)]


def test_changes_by_hand(pair):
    comparison = compare_records(pair)
    assert comparison.change(1, "request_throughput") == pytest.approx(0.5)
    assert comparison.change(1, "mean_e2el_ms") == pytest.approx(2.0)
    assert comparison.is_baseline(0) and not comparison.is_baseline(1)
    relative = comparison.documents()[1]["vs_baseline"]
    assert relative["baseline"] == "0 none"
    assert relative["output_throughput"] == pytest.approx(-0.5)
    assert relative["mean_ttft_ms"] == relative["mean_tpot_ms"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["turbo", "42", "42 turbo", "TURBO"])
def test_any_record_can_be_the_baseline(pair, name):
    comparison = compare_records(pair, name)
    assert comparison.change(0, "request_throughput") == pytest.approx(2.0)


def test_unknown_baseline(pair):
    with pytest.raises(KvqError, match="no record is the baseline `int8`") as caught:
        compare_records(pair, "int8")
    assert "none, turbo" in caught.value.hint


def test_each_concurrency_has_its_own_baseline(bench):
    grid = [
        bench.record(name, number, concurrency=concurrency, speed=speed)
        for concurrency, factor in ((1, 1.0), (8, 4.0))
        for name, number, speed in (("none", 0, factor), ("turbo", 42, factor * 1.5))
    ]
    comparison = compare_records(grid)
    assert comparison.names == ["0 none c1", "42 turbo c1", "0 none c8", "42 turbo c8"]
    assert [comparison.change(i, "request_throughput") for i in range(4)] == pytest.approx([1, 1.5, 1, 1.5])
    assert not comparison.warnings()
    assert report.comparison_notes(comparison)[0] == "changes are against 0 none c1, 0 none c8"


def test_names_say_lengths_and_concurrencies_where_there_are_any(bench):
    fixed = bench.record("int8", 8, concurrency=1, workload={"input_len": 512})
    replayed = bench.record("int8", 8, workload={"concurrency": None})
    assert compare_records([fixed, replayed]).names == ["8 int8 c1 ctx512", "8 int8"]


def test_what_grows_with_the_concurrency_may_differ_between_concurrencies(bench):
    grid = [
        bench.record(name, number, concurrency=c, workload={"num_prompts": 2 * c, "requests_sha256": str(c)})
        for c in (1, 8)
        for name, number in (("none", 0), ("turbo", 42))
    ]
    assert compare_records(grid).warnings() == []
    (prompts, concurrency) = compare_records(grid[:2] + grid[3:]).warnings()
    assert "differ in workload's num_prompts: 2 (0 none c1, 42 turbo c1), 16 (42 turbo c8)" in prompts
    assert "differ in concurrency: 1 (0 none c1, 42 turbo c1), 8 (42 turbo c8)" in concurrency


def test_two_runs_of_one_policy(bench):
    comparison = compare_records([bench.record("turbo", 42), bench.record("turbo", 42, speed=2.0)])
    assert comparison.names == ["42 turbo", "42 turbo #2"]
    assert comparison.change(1, "output_throughput") == pytest.approx(2.0)


def test_regressions_by_hand(bench):
    base, slower = bench.record("none", 0), bench.record("turbo", 42, speed=1 / 1.06)
    comparison = compare_records([base, slower])
    assert comparison.regressions(0.05) == [
        "42 turbo: output throughput -5.7%",
        "42 turbo: mean TTFT +6.0%",
        "42 turbo: mean TPOT +6.0%",
    ]
    assert comparison.regressions(0.058) == ["42 turbo: mean TTFT +6.0%", "42 turbo: mean TPOT +6.0%"]
    assert comparison.regressions(0.061) == []
    assert compare_records([slower, base]).regressions(0.05) == []


def test_what_was_not_measured_is_a_regression(bench):
    broken = bench.record("turbo", 42).to_dict() | {"mean_ttft_ms": None, "output_throughput": 0.0}
    comparison = compare_records([bench.record(), RunRecord.from_dict(broken, "x")])
    assert comparison.regressions(0.05) == [
        "42 turbo: output throughput was not measured",
        "42 turbo: mean TTFT was not measured",
    ]


def test_figures_that_are_missing_give_no_change(bench):
    empty = RunRecord.from_dict(bench.record("turbo", 42).to_dict() | {"mean_tpot_ms": None}, "x")
    comparison = compare_records([bench.record(), empty])
    assert comparison.change(1, "mean_tpot_ms") is None
    assert "mean_tpot_ms" not in comparison.documents()[1]["vs_baseline"]
    assert "| - |" in report.markdown(comparison)


def test_alike_records_give_no_warning(pair):
    assert compare_records(pair).warnings() == []


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"model": {"name": "other"}}, "differ in model: demo float32 (0 none), other float32 (42 turbo)"),
        ({"model": {"dtype": "float16"}}, "differ in model: demo float32"),
        ({"env": {"gpu": "H100"}}, "differ in GPU: none (0 none), H100 (42 turbo)"),
        ({"env": {"cpu": "abacus"}}, "differ in CPU: none (0 none), abacus (42 turbo)"),
        ({"env": {"driver": "570"}}, "differ in driver"),
        (
            {"env": {"versions": {"torch": "2.12"}}},
            "differ in version of torch: 2.13 (0 none), 2.12 (42 turbo)",
        ),
        ({"env": {"git_sha": "f" * 40}}, "differ in kvq commit: none (0 none), ffffffffff (42 turbo)"),
        ({"workload": {"requests_sha256": "other"}}, "differ in workload's requests (SHA-256): abc (0 none)"),
        ({"workload": {"sha256": "other"}}, "differ in workload's sha256: none (0 none), other (42 turbo)"),
        (
            {"workload": {"num_prompts": 9, "requests_sha256": "other"}},
            "differ in workload's num_prompts: none (0 none), 9 (42 turbo)",
        ),
        ({"workload": {"seed": 1}}, "differ in seed: 0 (0 none), 1 (42 turbo)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_makes_records_unlike_is_said(bench, change, warning):
    comparison = compare_records([bench.record("none", 0), bench.record("turbo", 42, **change)])
    assert len(comparison.warnings()) == 1
    assert warning in comparison.warnings()[0]


def test_incomplete_and_failed_runs_are_shown(bench):
    records = [bench.record("none", 0), bench.record("turbo", 42, complete=False, failed=3)]
    comparison = compare_records(records)
    assert comparison.warnings() == [
        "42 turbo is incomplete: 2 of 5 requests were measured",
        "42 turbo: 3 requests failed and are left out of the figures (no luck)",
    ]
    text = report.markdown(comparison)
    assert "| 42 turbo (incomplete) |" in text and "| 2 ok, 3 failed |" in text
    assert "- **warning**: 42 turbo is incomplete" in text


def test_markdown_by_value(pair):
    # 2 requests of 10 + 5 tokens in 4 s (8 s at half speed), 1 s to the first token, 0.5 s between tokens.
    lines = report.markdown(compare_records(pair)).splitlines()
    assert lines[:4] == [
        "| policy | requests /s | input tok/s | output tok/s | E2E s | TTFT s | TPOT ms | ITL ms "
        "| KV B/token | effective bits | capacity tokens | peak tokens | preempted | requests |",
        "| --- |" + " ---: |" * 13,
        "| 0 none | 0.500 | 5 | 2.500 | 3 | 1 | 500 | 500 | 1,000 (x1.00) | 16 | 100 | - | - | 2 ok |",
        "| 42 turbo | 0.250 (-50.0%) | 2.500 (-50.0%) | 1.250 (-50.0%) | 6 (+100.0%) | 2 (+100.0%) "
        "| 1,000 (+100.0%) | 1,000 (+100.0%) | 200 (x0.20) | 3.188 | 502 (x5.02) | 1,234 | 0 | 2 ok |",
    ]
    assert "- changes are against 0 none" in lines
    assert f"- {report.REFERENCE_NOTE}" in lines


def test_csv_by_value(pair):
    rows = list(csv.DictReader(io.StringIO(report.csv(compare_records(pair)))))
    assert [row["name"] for row in rows] == ["0 none", "42 turbo"]
    assert rows[1]["policy_key"] == "turbo" and rows[1]["baseline"] == "0 none" and rows[1]["gpu"] == ""
    assert float(rows[1]["request_throughput"]) == pytest.approx(0.25)
    assert float(rows[1]["p99_ttft_ms"]) == pytest.approx(2000)
    assert float(rows[1]["output_throughput_change"]) == pytest.approx(-0.5)
    assert float(rows[0]["output_throughput_change"]) == 0
    assert float(rows[1]["bytes_per_token"]) == 200


def test_documents_are_records_again(pair):
    documents = json.loads(json.dumps(compare_records(pair).documents(), allow_nan=False))
    assert [RunRecord.from_dict(document, "x") for document in documents] == pair


def test_better_and_worse(pair):
    speed, memory = report.comparison_tables(compare_records(pair))
    assert [cell.better for cell in speed.rows[1]] == [None] + [False] * 7
    assert [cell.better for cell in speed.rows[0]] == [None] * 8
    speed, _ = report.comparison_tables(compare_records(pair, "turbo"))
    assert [cell.better for cell in speed.rows[0]] == [None] + [True] * 7
    assert len(memory.rows) == len(speed.rows) == 2


def test_a_change_below_half_a_percent_is_neither(bench):
    comparison = compare_records([bench.record(), bench.record("int8", 8, speed=1.004)])
    speed, _ = report.comparison_tables(comparison)
    assert speed.rows[1][1] == report.Cell("0.502", "+0.4%", None)


def test_one_run_in_full(bench):
    record = bench.record("turbo", 42, failed=1, kv=TURBO_KV)
    summary, latencies = report.run_tables(record)
    values = {row[0].text: row[1].text for row in summary.rows}
    assert values["requests"] == "2 ok, 1 failed"
    assert values["output tokens per second"] == "2.500"
    assert values["KV capacity, tokens"] == "502"
    assert latencies.columns == ["latency, ms", "mean", "p50", "p90", "p95", "p99"]
    assert [cell.text for cell in latencies.rows[0]] == ["TTFT"] + ["1,000"] * 5


def test_one_run_of_a_server_in_full(bench):
    """Nothing of a cache that a client does not see, and whether the client kept up."""
    record = replace(
        bench.record("vllm", kv={"prefix_hit_rate": 0.25}),
        engine={"backend": "http", "url": "http://h:80/v1"},
    )
    record.metrics["p99_lag_ms"] = 0.4321
    summary, _ = report.run_tables(record)
    values = {row[0].text: row[1].text for row in summary.rows}
    assert values["prompt tokens from its prefix cache"] == "25%"
    assert values["load generator late by, p99"] == "0.432 ms"
    assert "-" not in values.values() and not any("KV" in name for name in values)


def test_the_reference_backend_is_named_only_on_a_cpu(bench):
    assert report.REFERENCE_NOTE in report.notes([bench.record()])
    assert report.REFERENCE_NOTE not in report.notes([bench.record(env={"gpu": "H100"})])


def test_conditions_say_what_was_replayed(bench):
    work = {
        "dataset": "sharegpt_sample.json",
        "num_prompts": 64,
        "distinct_prompts": 50,
        "mean_input_len": 220.4,
        "mean_output_len": 60,
        "output_len_cap": 64,
    }
    assert report.conditions(bench.record(workload=work, concurrency=8)) == (
        "demo (float32, CPU), sharegpt_sample.json: 64 requests of 220 + 60 tokens on average, "
        "answers cut to 64, 8 at a time; only 50 different prompts"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0"), (64, "64"), (0.0123, "0.012"), (0.5, "0.500"), (9.3042, "9.304"),
        (27.94, "27.94"), (999.96, "1000"), (2368.8, "2,369"), (698176, "698,176"), (-1.5, "-1.500"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert report.number(value) == text
