"""Closed and open loops against scripted targets on a clock of their own."""

import math

import numpy as np
import pytest

from kvq_core.bench.load import Load, run_load
from kvq_core.bench.metrics import summarize
from kvq_core.bench.report import requests_done
from kvq_core.bench.run import measure
from kvq_core.bench.workload import Workload
from kvq_core.errors import KvqError, UsageError


def play(target, requests, load, **options):
    load = Load(load) if isinstance(load, int) else load
    return run_load(target, requests, load, clock=target.clock, **options)


@pytest.mark.parametrize("concurrency", [1, 2, 3, 7, 50])
def test_concurrency_is_held(bench, concurrency):
    target = bench.Target(bench.steady())
    result = play(target, bench.requests(10), concurrency)
    assert target.max_running == min(concurrency, 10)
    assert [trace.index for trace in result.traces] == list(range(10))
    assert all(trace.succeeded for trace in result.traces)
    assert result.complete and result.unsent == result.unfinished == 0


def test_timing_by_hand(bench):
    # 0.5 s to the first token, then three gaps of 0.25: each request takes 1.25 s, two at a time.
    target = bench.Target(bench.steady(0.5, 0.25))
    result = play(target, bench.requests(4), 2)
    assert target.sent == [(100.0, 0), (100.0, 1), (101.25, 2), (101.25, 3)]
    m = summarize(result.traces, result.duration)
    assert result.duration == pytest.approx(2.5)
    assert m["mean_ttft_ms"] == pytest.approx(500)
    assert m["mean_tpot_ms"] == m["p99_itl_ms"] == pytest.approx(250)
    assert m["mean_e2el_ms"] == pytest.approx(1250)
    assert m["output_throughput"] == pytest.approx(16 / 2.5)
    assert m["request_throughput"] == pytest.approx(4 / 2.5)


def test_next_request_is_sent_when_one_ends_not_when_all_do(bench):
    slow = lambda request: bench.Script([10.0] if request.index == 0 else [1.0])  # noqa: E731
    target = bench.Target(slow)
    play(target, bench.requests(4, output_len=1), 2)
    assert target.sent == [(100.0, 0), (100.0, 1), (101.0, 2), (102.0, 3)]


def test_failures_are_kept_apart(bench):
    scripts = {
        0: bench.Script([1.0, 1.0]),
        1: bench.Script([0.1], error="lost"),
        2: bench.Script([0.1], refuse="too long"),
        3: bench.Script([0.1, 0.1], tokens=[1, 0]),  # ends short
        4: bench.Script([0.1], tokens=[0]),  # ends without a token
        5: bench.Script([0.1, 0.1], tokens=[0, 2]),  # an event without tokens is no arrival
    }
    target = bench.Target(lambda request: scripts[request.index])
    result = play(target, bench.requests(6, output_len=2), 2)
    errors = {trace.index: trace.error for trace in result.traces}
    assert errors == {
        0: None,
        1: "lost",
        2: "too long",
        3: "ended after 1 of 2 tokens",
        4: "ended after 0 of 2 tokens",
        5: None,
    }
    assert result.complete
    m = summarize(result.traces, result.duration)
    assert (m["completed"], m["failed"], m["total_output_tokens"]) == (2, 4, 4)
    assert {trace.index: len(trace.arrivals) for trace in result.traces}[5] == 1


def test_a_target_that_refuses_everything_ends_the_loop(bench):
    target = bench.Target(lambda request: bench.Script([], refuse="full"))
    result = play(target, bench.requests(5), 2)
    assert [trace.error for trace in result.traces] == ["full"] * 5
    assert result.complete and target.polls == 0


def test_interrupt_keeps_what_was_measured(bench):
    target = bench.Target(bench.steady(), raise_at_poll={6: KeyboardInterrupt()})
    result = play(target, bench.requests(10), 2)
    assert result.interrupted and not result.complete
    assert [trace.succeeded for trace in result.traces] == [True, True, False, False]
    assert result.unfinished == 8 and result.unsent == 0
    assert sorted(target.cancelled) == [2, 3]
    m = summarize(result.traces, result.duration)
    assert (m["completed"], m["failed"], m["unfinished"]) == (2, 0, 2)


def test_a_broken_target_keeps_what_was_measured(bench):
    target = bench.Target(bench.steady(), raise_at_poll={6: RuntimeError("out of memory")})
    result = play(target, bench.requests(10), 2)
    assert str(result.error) == "out of memory" and not result.complete
    assert sum(trace.succeeded for trace in result.traces) == 2


def test_a_silent_target_is_given_up(bench):
    target = bench.Target(bench.steady(), silent=True)
    result = play(target, bench.requests(2), 2, stall_timeout=5.0)
    assert isinstance(result.error, KvqError) and "nothing happened for 5 s" in result.error.message
    assert 105 < target.now < 106


def test_progress_counts_ended_requests_and_tokens(bench):
    seen = []
    target = bench.Target(bench.steady())
    play(
        target,
        bench.requests(3, output_len=2),
        3,
        progress=lambda ended, tokens: seen.append((ended, tokens)),
    )
    assert seen == [(0, 3), (3, 6)]


def test_late_events_of_unknown_requests_are_ignored(bench):
    target = bench.Target(bench.steady())
    target.send(bench.requests(1, start=77)[0])
    result = play(target, bench.requests(2), 2)
    assert [trace.index for trace in result.traces] == [0, 1]


class Timetable(Load):
    """An open loop whose requests are due at 0.0, 0.1, 0.2 … s."""

    def due_times(self, requests):
        return [i / 10 for i in range(len(requests))]


def test_an_open_loop_sends_what_is_due_whatever_is_in_flight(bench):
    target = bench.Target(bench.steady(1.0), punctual=True)
    result = play(target, bench.requests(5, output_len=1), Timetable(request_rate=10))
    assert [now for now, _ in target.sent] == pytest.approx([100.0, 100.1, 100.2, 100.3, 100.4])
    assert target.max_running == 5
    assert [trace.ttft for trace in result.traces] == pytest.approx([1.0] * 5)
    assert result.request_rate == pytest.approx(5 / 0.4)


def test_waiting_for_room_counts_in_latencies(bench):
    """Each takes a second, one at a time: the third, due at 0.2 s, is sent at 2 s and answered at 3 s."""
    target = bench.Target(bench.steady(1.0), punctual=True)
    result = play(target, bench.requests(3, output_len=1), Timetable(1, request_rate=10))
    assert [now for now, _ in target.sent] == pytest.approx([100.0, 101.0, 102.0])
    assert [trace.ttft for trace in result.traces] == pytest.approx([1.0, 1.9, 2.8])
    assert [trace.e2el for trace in result.traces] == pytest.approx([1.0, 1.9, 2.8])
    assert [trace.lag for trace in result.traces] == pytest.approx([0.0] * 3)


def test_a_target_that_holds_up_the_generator_makes_it_lag(bench):
    """The first poll takes half a second: what is due at 0.1 to 0.4 s is sent late, and the delay counts."""
    target = bench.Target(bench.steady(1.0), punctual=True)
    poll = target.poll

    def slow(timeout):
        target.now += 0.5 * (target.polls == 0)
        return poll(timeout)

    target.poll = slow
    result = play(target, bench.requests(3, output_len=1), Timetable(request_rate=10))
    assert [trace.lag for trace in result.traces] == pytest.approx([0.0, 0.5, 0.4])
    assert [trace.ttft for trace in result.traces] == pytest.approx([1.0, 1.5, 1.4])


def test_a_quiet_stretch_between_arrivals_is_no_stall(bench):
    class Sparse(Load):
        def due_times(self, requests):
            return [i * 100.0 for i in range(len(requests))]

    target = bench.Target(bench.steady(1.0), punctual=True)
    result = play(target, bench.requests(3), Sparse(request_rate=0.01), stall_timeout=5.0)
    assert result.complete and all(trace.succeeded for trace in result.traces)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_intervals_have_the_rate_and_the_spread_asked_for(bench, burstiness):
    times = Load(request_rate=8.0, burstiness=burstiness, seed=3).due_times(bench.requests(20_000))
    gaps = np.diff([0.0, *times])
    assert times[-1] == pytest.approx(20_000 / 8.0) and min(gaps) >= 0
    assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_intervals_too_small_for_a_float_are_one_burst(bench):
    assert Load(request_rate=8.0, burstiness=1e-300).due_times(bench.requests(3)) == [0.0, 0.0, 0.0]


def test_arrivals_follow_the_seed(bench):
    one, again, other = (
        Load(request_rate=2.0, seed=seed).due_times(bench.requests(50)) for seed in (1, 1, 2)
    )
    assert one == again != other


@pytest.mark.parametrize(
    "wrong",
    [
        {"request_rate": 0.0},
        {"request_rate": -1.0},
        {"request_rate": math.nan},
        {"request_rate": 1.0, "burstiness": 0.0},
        {"burstiness": 2.0},
        {"duration": 0.0},
        {"cancel_rate": 1.0},
        {"cancel_rate": -0.1},
    ],
)
def test_a_load_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(UsageError):
        Load(concurrency=1, **wrong)


def test_the_record_states_the_rate_asked_for_and_the_rate_sent(bench):
    target = bench.Target(bench.steady(), punctual=True)
    load = Load(2, request_rate=0.5, burstiness=0.5)
    record = measure(target, workload(bench), load, env={}, clock=target.clock).record
    assert record.workload["loop"] == "open" and record.workload["concurrency"] == 2
    assert record.workload["request_rate"] == 0.5 and record.workload["burstiness"] == 0.5
    assert record.metrics["achieved_request_rate"] == pytest.approx(0.5, rel=0.2)


def test_nothing_is_sent_after_the_duration(bench):
    """Two at a time, 1.25 s each: sent at 0, 1.25 and 2.5 s, all answered, the other four left out."""
    target = bench.Target(bench.steady(0.5, 0.25))
    load = Load(2, duration=2.6)
    record = measure(target, workload(bench, 10), load, env={}, clock=target.clock).record
    assert record.complete and record.workload["duration_limit_s"] == 2.6
    counts = [record.metrics[key] for key in ("completed", "failed", "unfinished", "unsent")]
    assert counts == [6, 0, 0, 4]
    assert record.metrics["duration"] == pytest.approx(3.75)
    assert requests_done(record) == "6 ok, 4 unsent"


def test_an_interrupt_after_the_duration_is_one_all_the_same(bench):
    target = bench.Target(bench.steady(0.5, 0.25), raise_at_poll={6: KeyboardInterrupt()})
    result = play(target, bench.requests(10), Load(2, duration=1.5))
    assert result.interrupted and (result.unsent, result.unfinished) == (6, 2)


def test_an_open_loop_stops_at_the_duration_too(bench):
    target = bench.Target(bench.steady(1.0), punctual=True)
    result = play(target, bench.requests(9, output_len=1), Timetable(request_rate=10, duration=0.35))
    assert len(target.sent) == 4 and result.unsent == 5 and result.complete
    assert target.now < 102


def test_cancelled_requests_are_counted_apart(bench):
    target = bench.Target(bench.steady(0.5, 0.25))
    requests = bench.requests(10)
    load = Load(3, cancel_rate=0.3, seed=4)
    planned = load.cancellations(requests)
    result = play(target, requests, load)
    assert sorted(target.cancelled) == sorted(planned) and len(planned) == 3
    assert result.complete
    for trace in result.traces:
        assert trace.status == ("cancelled" if trace.index in planned else "ok")
        assert trace.tokens == planned.get(trace.index, 4)
    m = summarize(result.traces, result.duration)
    assert (m["completed"], m["cancelled"], m["failed"], m["unfinished"]) == (7, 3, 0, 0)
    assert m["total_output_tokens"] == 28 and m["mean_e2el_ms"] == pytest.approx(1250)


def test_what_arrives_after_a_cancellation_is_ignored(bench):
    """Tokens that were under way come with the same events as the one that made the client hang up."""
    target = bench.Target(lambda request: bench.Script([1.0, 0.0, 0.0, 0.0]))
    result = play(target, bench.requests(1), Load(1, cancel_rate=0.9, seed=1))
    (trace,) = result.traces
    assert trace.status == "cancelled" and trace.tokens < 4 and trace.error is None


def test_a_cancelled_request_makes_room_for_the_next(bench):
    target = bench.Target(bench.steady(1.0, 1.0))
    requests = bench.requests(2, output_len=2)
    first = next(s for s in range(99) if 0 in Load(1, cancel_rate=0.5, seed=s).cancellations(requests))
    play(target, requests, Load(1, cancel_rate=0.5, seed=first))
    assert target.sent == [(100.0, 0), (101.0, 1)]


def test_cancellations_follow_the_seed_and_leave_a_token_to_come(bench):
    requests = bench.requests(200, output_len=5) + bench.requests(50, output_len=1, start=200)
    plans = [Load(1, cancel_rate=0.5, seed=seed).cancellations(requests) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert len(plans[0]) == 125 and max(plans[0]) < 200
    assert set(plans[0].values()) == {1, 2, 3, 4}
    assert Load(1).cancellations(requests) == {}


def workload(bench, count=4, warmup=3):
    return Workload("fixed", bench.requests(count), bench.requests(warmup, output_len=2, start=-warmup))


def test_warm_up_is_excluded(bench):
    target = bench.Target(bench.steady(0.5, 0.25))
    measurement = measure(target, workload(bench), Load(2), env={"seed": 0}, clock=target.clock)
    record = measurement.record
    assert target.resets == [101.5]  # three warm-up requests of 0.75 s, two at a time
    assert [index for _, index in target.sent] == [-3, -2, -1, 0, 1, 2, 3]
    assert record.metrics["completed"] == 4
    assert record.metrics["total_output_tokens"] == 16
    assert record.metrics["duration"] == pytest.approx(2.5)
    assert measurement.rows[0]["sent_ms"] == 0
    assert record.workload["num_warmup"] == 3 and record.workload["concurrency"] == 2
    assert record.label == "turbo" and record.name == "42 turbo" and record.complete
    assert record.kv["capacity_tokens"] == 1000


def test_warm_up_that_fails_altogether_is_an_error(bench):
    target = bench.Target(lambda request: bench.Script([], refuse="no memory"))
    with pytest.raises(KvqError, match="all 3 warm-up requests failed: no memory"):
        measure(target, workload(bench), Load(2), env={}, clock=target.clock)


def test_interrupted_warm_up_measured_nothing(bench):
    target = bench.Target(bench.steady(), raise_at_poll={1: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        measure(target, workload(bench), Load(2), env={}, clock=target.clock)


def test_interrupted_run_gives_an_incomplete_record(bench):
    target = bench.Target(bench.steady(), raise_at_poll={9: KeyboardInterrupt()})
    measurement = measure(target, workload(bench, 10), Load(2), env={}, clock=target.clock)
    assert measurement.load.interrupted and not measurement.record.complete
    done, unfinished = (measurement.record.metrics[key] for key in ("completed", "unfinished"))
    assert 0 < done < 10 and done + unfinished == 10


def test_errors_are_counted_by_message(bench):
    def script(request):
        return bench.Script([0.1], error="lost" if request.index in (1, 2) else None)

    load = Workload("fixed", bench.requests(4, output_len=1), [])
    record = measure(target := bench.Target(script), load, Load(2), env={}, clock=target.clock).record
    assert record.errors == {"lost": 2} and record.metrics["failed"] == 2
