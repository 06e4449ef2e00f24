"""Can the harness be trusted? Its figures against a server with known delays, in a process of its own."""

import json
import random
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from kvq_core.bench.http_target import HttpTarget
from kvq_core.bench.load import Load, run_load
from kvq_core.bench.metrics import percentile, summarize
from kvq_core.bench.run import measure
from kvq_core.bench.spread import SpreadTarget
from kvq_core.bench.workload import Workload

TTFT, ITL, STREAMS, TOKENS = 100, 20, 64, 50
TRIES = 3
"""Another process may take the cores; what the harness can do is what it does when it has them."""
CALM = 0.02
"""Share of the time that server and generator may wait for a core on a calm machine."""


@pytest.fixture
def mock(monkeypatch):
    """`mock(ttft, itl, cached)` starts a server and returns its URL."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    servers = []

    def start(ttft: float = TTFT, itl: float = ITL, cached: int = 0) -> str:
        script = Path(__file__).with_name("mock_server.py")
        argv = [sys.executable, str(script), str(ttft), str(itl), str(cached)]
        servers.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        assert servers[-1].stdout
        return f"http://127.0.0.1:{servers[-1].stdout.readline().strip()}"

    start.pid = lambda: servers[-1].pid
    yield start
    for server in servers:
        server.kill()
        server.wait()
        assert server.stdout
        server.stdout.close()


def warm_up(target, bench, count):
    run_load(target, bench.requests(count, output_len=2, start=-count), Load(count))


def waited(pid):
    """Seconds that a process was ready to run and another one had the core; 0 where that is not told."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def slowness() -> float:
    """CPU time of 100 bytes through a socket, over that of a core held to the full rate; at least 1."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        times = []
        for _ in range(3):
            start = time.process_time()
            for _ in range(20_000):
                ours.send(bytes(100))
                theirs.recv(4096)
            times.append((time.process_time() - start) / 20_000)
    return max(1.0, min(times) / 0.75e-6)


RATE = STREAMS / ((TTFT + (TOKENS - 1) * ITL) / 1e3)
"""Requests per second that keep the streams busy: each takes 100 + 49 * 20 = 1080 ms."""


@pytest.mark.parametrize(
    "load", [Load(request_rate=RATE, burstiness=1e4), Load(STREAMS)], ids=["one by one", "all at once"]
)
def test_known_delays_and_the_cost_of_a_token(bench, mock, load):
    """64 streams, whose tokens come evenly spread over time, or all at the same moments."""
    target = HttpTarget(mock(), "mock")
    pids = ("self", mock.pid())
    found = []
    try:
        warm_up(target, bench, STREAMS)
        for _ in range(TRIES):
            spent, lost = time.process_time(), sum(map(waited, pids))
            result = run_load(target, bench.requests(3 * STREAMS, output_len=TOKENS), load)
            spent, lost = time.process_time() - spent, sum(map(waited, pids)) - lost
            metrics = summarize(result.traces, result.duration)
            assert metrics["completed"] == 3 * STREAMS
            off = {
                f"{figure}_{name}": abs(metrics[f"{figure}_{name}_ms"] - delay)
                for figure in ("mean", "p50", "p99")
                for name, delay in (("ttft", TTFT), ("itl", ITL))
            }
            off["lag"] = percentile(sorted(trace.lag * 1e3 for trace in result.traces), 99)
            # Where others have the cores, a figure may be off by as long as they had them.
            calm = lost < CALM * result.duration
            extra = 0.0 if calm else lost * 1e3
            limits = {name: (10 if "p99" in name else 2) + extra for name in off}
            good = all(off[name] <= limits[name] for name in off)
            found.append((good, calm, off, metrics["total_output_tokens"] / spent))
            if good and calm:
                break
    finally:
        target.close()
    print(found)
    assert any(good for good, *_ in found), found
    # of CPU time, which a slow or shared host makes longer
    assert max(per_second for *_, per_second in found) >= 10_000 / slowness(), found


def test_8000_tokens_a_second_from_one_process(bench, mock):
    """180 streams of 50 tokens a second: the generator keeps up in the middle half of the run."""
    target = HttpTarget(mock(), "mock")
    pids = ("self", mock.pid())
    found = []
    try:
        warm_up(target, bench, 180)
        for _ in range(TRIES):
            lost = sum(map(waited, pids))
            result = run_load(target, bench.requests(180, output_len=100), Load(180))
            assert all(trace.succeeded for trace in result.traces)
            calm = sum(map(waited, pids)) - lost < CALM * result.duration
            low, high = (result.start + share * result.duration for share in (0.35, 0.85))
            seen = sum(low <= at < high for trace in result.traces for at, _ in trace.arrivals) / (high - low)
            found.append((seen >= (8000 if calm else 500), calm, seen))
            if found[-1][0] and calm:
                break
    finally:
        target.close()
    print(found)
    assert any(good for good, *_ in found), found


def test_open_loop_arrivals_are_a_poisson_process(bench):
    """Kolmogorov-Smirnov, 1%: scaled by the last of them, the times of a Poisson process are uniform."""

    class Instant(bench.Target):
        def poll(self, timeout):
            time.sleep(min(timeout, 0.0005))
            self.now = time.perf_counter()
            events, self.pending = self.pending, []
            return events

    load = Load(request_rate=300.0, seed=random.Random(5).randrange(100))
    for _ in range(TRIES):
        target = Instant(bench.steady(0.0, 0.0))
        result = run_load(target, bench.requests(600, output_len=1), load, clock=time.perf_counter)
        times = [trace.sent - result.start for trace in result.traces]
        uniform = [at / times[-1] for at in times[:-1]]
        n = len(uniform)
        distance = max(max((i + 1) / n - at, at - i / n) for i, at in enumerate(uniform))
        if distance * n**0.5 < 1.63:
            break
    assert len(times) / times[-1] == pytest.approx(300, rel=0.05)
    assert distance * n**0.5 < 1.63, distance


def test_a_server_that_hangs_shows_in_every_request_that_was_due(bench):
    """No coordinated omission: it stops for 1 s; what was due meanwhile waited for the rest of it."""

    def script(request):
        return bench.Script([0.01])

    target = bench.Target(script, punctual=True)
    poll = target.poll
    hung = []

    def hang(timeout):
        if not hung and target.now >= 100.5:
            hung.append(target.now)
            target.now += 1.0
            late = [replace(event, time=max(event.time, target.now)) for event in target.pending]
            target.pending = late
        return poll(timeout)

    target.poll = hang
    load = Load(request_rate=100.0, burstiness=1e6)
    result = run_load(target, bench.requests(200, output_len=1), load, clock=target.clock)
    slow = [trace for trace in result.traces if hung[0] + 0.02 < trace.due < hung[0] + 0.98]
    assert len(slow) == pytest.approx(96, abs=3)
    for trace in slow:
        assert trace.ttft == pytest.approx(hung[0] + 1.0 - trace.due + 0.01, abs=0.02)
    assert summarize(result.traces, result.duration)["mean_ttft_ms"] > 200


@pytest.fixture
def spread(mock):
    target = SpreadTarget(partial(HttpTarget, mock(5, 1, cached=4), "mock"), 2)
    yield target
    target.close()


def test_several_processes_do_the_same_work(bench, spread):
    workload = Workload("fixed", bench.requests(12, output_len=5), bench.requests(4, output_len=2, start=-4))
    measurement = measure(spread, workload, Load(4), env={})
    assert measurement.record.metrics["completed"] == 12 and measurement.record.complete
    assert measurement.record.metrics["total_output_tokens"] == 60
    assert all(5 <= row["ttft_ms"] < 500 for row in measurement.rows)
    assert measurement.record.kv == {"prefix_hit_rate": 0.4}  # 4 of 10 tokens of every prompt
    spread.reset_stats()
    assert spread.kv_stats() == {}
    assert "p99_lag_ms" in measurement.record.metrics and spread.info().engine["backend"] == "http"
    cancelled = run_load(spread, bench.requests(6, output_len=40), Load(3, cancel_rate=0.5))
    assert sum(trace.cancelled for trace in cancelled.traces) == 3
    for process in spread._processes:
        process.kill()
        process.join()
    broken = run_load(spread, bench.requests(2), Load(2))
    assert {trace.error for trace in broken.traces} == {"a process of --load-processes ended"}


def test_two_servers_take_turns(kvq, mock, tmp_path, monkeypatch):
    class Words:
        def __len__(self):
            return 100

    monkeypatch.setattr("kvq_cli.remote._load_tokenizer", lambda name: Words())
    quick, slow = mock(5, 1), mock(40, 1)
    file = tmp_path / "t.json"
    flags = ("--dataset-name", "fixed", "--input-len", 8, "--output-len", 4, "--num-prompts", 4, "-c", 2)
    targets = ("--target", f"quick={quick}", "--target", f"slow={slow},model=other", "--repeats", 2)
    code, out, err = kvq("compare", *targets, *flags, "--output", file, "--html", tmp_path / "t.html")
    assert code == 0, err
    records = json.loads(file.read_text())
    assert [(r["label"], r["repeat"]) for r in records] == [
        ("quick", 1),
        ("slow", 1),
        ("quick", 2),
        ("slow", 2),
    ]
    assert records[1]["mean_ttft_ms"] > records[0]["mean_ttft_ms"] + 20
    assert records[1]["model"]["name"] == "other" and "changes are against quick" in out
    assert "8 ok" in out and "capacity" not in out  # a server's cache is its own affair
    for flags, message in (
        (("--target", "quick"), "is no --target"),
        (("--target", "a=http://h,colour=red"), "is no --target"),
        (("--target", "a=http://h", "--target", "a=http://i"), "has a twice"),
        (("--target", "a=h"), "is not the URL of a server"),
        (("--policies", "0,4", "--load-processes", 2), "needs --target"),
        (("--target", "a=http://h", "--policies", "0"), "one of them"),
    ):
        code, _, err = kvq("compare", *flags)
        assert code == 2 and message in err, err
