"""What a target held, over the time that it held it."""

import pytest

from kvq_core.bench.target import Usage
from kvq_core.bench.timeline import INTERVAL, MOST, Timeline


def test_means_are_over_time_not_over_samples():
    timeline = Timeline(100.0)
    timeline.add(101.0, 4, Usage(10, running=1, waiting=3))
    for i in range(10):
        timeline.add(101.0 + 0.01 * (i + 1), 4, Usage(10, running=4, waiting=0))
    assert timeline.means() == pytest.approx({"mean_running": (1 + 4 * 0.1) / 1.1, "mean_waiting": 3 / 1.1})


def test_thinning_out_changes_no_mean():
    timeline = Timeline(0.0)
    for i in range(1, 10 * MOST + 1):
        assert timeline.is_due(INTERVAL * i * 1.0001) and not timeline.is_due(INTERVAL * (i - 0.5))
        timeline.add(INTERVAL * i, i % 2, Usage(i, running=i % 2, waiting=2))
    assert MOST // 2 <= len(timeline.samples) <= MOST
    assert timeline.means() == pytest.approx({"mean_running": 0.5, "mean_waiting": 2.0})
    assert [len(column) for column in timeline.describe().values()] == [len(timeline.samples)] * 5


def test_nothing_is_said_of_a_target_that_says_nothing():
    timeline = Timeline(0.0)
    timeline.add(1.0, 2, None)
    assert timeline.means() == {} and list(timeline.describe()) == ["time_s", "in_flight"]
