"""Repeats: means, Student's t, and which records belong together."""

import csv
import io
from dataclasses import replace

import pytest

from kvq_core.bench import report
from kvq_core.bench.compare import compare_records
from kvq_core.bench.repeats import average, group_repeats, interval, student_t


@pytest.fixture
def repeated(bench):
    """none at speeds 1 and 1.2, turbo at 2 and 2.2, in turns."""
    return [
        replace(bench.record(name, number, speed=speed), repeat=repeat)
        for repeat, speeds in ((1, (1.0, 2.0)), (2, (1.2, 2.2)))
        for (name, number), speed in zip((("none", 0), ("turbo", 42)), speeds, strict=True)
    ]


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (11, 2.201), (15, 2.131), (30, 2.042), (120, 1.980)],
)
def test_student_t_is_that_of_the_tables(freedom, t):
    assert student_t(freedom) == pytest.approx(t, abs=6e-4)


def test_interval_by_hand():
    # deviation 1, three values: 4.303 * 1 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(2.4843, abs=1e-3)
    assert interval([5.0, 5.0]) == 0
    assert interval([1.0]) is None


def test_means_and_sums(repeated):
    mean = average([repeated[0], repeated[2]])
    # Two requests in 4 s, and in 4 / 1.2 s.
    assert mean.metrics["request_throughput"] == pytest.approx((0.5 + 0.6) / 2)
    half = 12.706 * 0.1 / 2**0.5 / 2**0.5  # deviation of two values is their distance by the root of 2
    assert mean.intervals["request_throughput"] == pytest.approx(half)
    assert mean.metrics["mean_ttft_ms"] == pytest.approx((1000 + 1000 / 1.2) / 2)
    assert mean.metrics["completed"] == 4 and mean.metrics["duration"] == pytest.approx(4 + 4 / 1.2)
    assert mean.kv["capacity_tokens"] == 100
    assert not {"completed", "duration"} & set(mean.intervals)


def test_what_only_a_later_run_found_is_kept(repeated):
    first, second = repeated[0], repeated[2]
    first = replace(first, kv=first.kv | {"fidelity": {"window": 8}}, note="mine")
    second = replace(second, kv=second.kv | {"prefix_hit_rate": 0.8}, note="mine; warm")
    mean = average([first, second])
    assert mean.kv["prefix_hit_rate"] == pytest.approx(0.4) and mean.kv["fidelity"] == {"window": 8}
    assert mean.kv["capacity_tokens"] == 100 and mean.note == "mine; warm"


def test_a_comparison_has_a_row_a_policy_and_a_document_a_run(repeated):
    comparison = compare_records(repeated)
    assert comparison.names == ["0 none", "42 turbo"]
    assert comparison.change(1, "request_throughput") == pytest.approx(2.1 / 1.1)
    documents = comparison.documents()
    assert [(d["label"], d["repeat"]) for d in documents] == [
        ("none", 1), ("turbo", 1), ("none", 2), ("turbo", 2),
    ]  # fmt: skip
    assert [d["request_throughput"] for d in documents] == pytest.approx([0.5, 1.0, 0.6, 1.1])
    assert documents[3]["vs_baseline"]["request_throughput"] == pytest.approx(2.2 / 1.1 - 1)


def test_intervals_stand_beside_the_means(repeated):
    text = report.markdown(compare_records(repeated))
    assert "| 0 none | 0.550 ±0.635 |" in text and "| 42 turbo | 1.050 ±0.635 (+90.9%) |" in text
    assert "- means of 2 runs ± half their 95% interval (Student's t)" in text
    rows = list(csv.DictReader(io.StringIO(report.csv(compare_records(repeated)))))
    assert [row["runs"] for row in rows] == ["2", "2"]
    assert float(rows[0]["request_throughput_ci95"]) == pytest.approx(0.6353)


def test_a_change_within_the_intervals_is_neither_better_nor_worse(bench, repeated):
    speed, _ = report.comparison_tables(compare_records(repeated))
    assert speed.rows[1][1].better is None
    steady = [replace(record, repeat=i) for i in (1, 2) for record in (bench.record(), repeated[1])]
    speed, _ = report.comparison_tables(compare_records(steady))
    assert speed.rows[1][1].better is True


def test_incomplete_runs_are_left_out_where_there_are_others(bench, repeated):
    broken = replace(repeated[3], complete=False)
    comparison = compare_records([*repeated[:3], broken])
    assert comparison.records[1].metrics["request_throughput"] == pytest.approx(1.0)
    assert comparison.records[1].complete and not comparison.records[1].intervals
    assert comparison.warnings() == ["42 turbo: 1 of 2 runs are incomplete and left out"]
    assert len(comparison.documents()) == 4
    alone = compare_records([broken])
    assert not alone.records[0].complete


def test_records_of_two_invocations_are_kept_apart(bench):
    first, second = ([replace(bench.record(), repeat=i) for i in (1, 2)] for _ in range(2))
    assert [len(group) for group in group_repeats(first + second)] == [2, 2]
    assert compare_records(first + second).names == ["0 none", "0 none #2"]
    assert [len(group) for group in group_repeats([bench.record(), bench.record()])] == [1, 1]
