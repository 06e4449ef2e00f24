"""Break-even from the cells of a sweep, by hand."""

import pytest

from kvq_core.bench.breakeven import Curve, break_even_table, curves
from kvq_core.bench.compare import compare_records


def curve(*points):
    return Curve("4 int4", "0 none", 4096, [(at, change, 0.0) for at, change in points], "4,096 + 128")


def test_where_it_crosses_between_two_cells():
    found = curve((1, 0.9), (8, 0.95), (64, 1.05))  # half way, on a logarithmic scale, from 8 to 64
    assert found.from_concurrency == pytest.approx(512**0.5)
    assert found.sentence == (
        "break-even: 4 int4 beats 0 none from about 23 concurrent requests of 4,096 + 128 tokens on"
    )


@pytest.mark.parametrize(
    ("points", "verdict"),
    [
        ([(1, 1.1), (8, 1.2)], "1"),
        ([(1, 1.1), (8, 0.9)], "not up to 8"),
        ([(1, 1.1), (8, 0.9), (64, 1.1)], "about 23"),
        ([(1, 0.9), (8, 1.004)], "not up to 8"),
        ([(1, 1.001), (8, 1.1)], "8"),
    ],
    ids=["at once", "never at high load", "for good", "by chance", "equal, then quicker"],
)
def test_verdicts(points, verdict):
    assert curve(*points).verdict == verdict


def test_what_repeats_leave_to_chance_is_no_gain():
    noisy = Curve("a", "b", None, [(1, 0.9, 0.0), (8, 1.05, 0.08)], "1 + 1")
    assert noisy.from_concurrency is None and "does not beat" in noisy.sentence


def test_a_table_a_row_a_policy_and_context(bench):
    records = [
        bench.record(name, number, speed=speed, concurrency=at, workload={"input_len": context, **lengths})
        for name, number, speeds in (("none", 0, (1.0, 1.0)), ("int4", 4, (0.8, 1.5)))
        for context in (64, 512)
        for at, speed in zip((1, 16), speeds, strict=True)
        for lengths in ({"mean_input_len": context, "mean_output_len": 5},)
    ]
    comparison = compare_records(records)
    table = break_even_table(comparison)
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["4 int4", "64 + 5", "-20.0%", "+50.0%", "about 3"],
        ["4 int4", "512 + 5", "-20.0%", "+50.0%", "about 3"],
    ]
    assert [found.context for found in curves(comparison)] == [64, 512]
    assert break_even_table(compare_records(records[::2])) is None  # a single load
