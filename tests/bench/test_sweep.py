"""Sweeps: their cells, and that nothing which was measured is lost, kill -9 included."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvq_core.bench.record import RunRecord
from kvq_core.bench.sweep import Cell, Point, parse_sweep, take_up
from kvq_core.errors import KvqError, UsageError


def test_cells_are_all_combinations():
    assert parse_sweep(["concurrency=8,1", "context=64"]) == [Point(1, 64), Point(8, 64)]
    assert parse_sweep(["context=64,32 concurrency=2"]) == [Point(2, 32), Point(2, 64)]
    assert parse_sweep([]) == [Point()]


@pytest.mark.parametrize(
    "text", ["speed=1", "concurrency", "concurrency=", "context=0", "context=1,x", "context=-4"]
)
def test_what_is_no_axis(text):
    with pytest.raises(UsageError, match="no axis of --sweep"):
        parse_sweep([text])
    with pytest.raises(UsageError, match="twice"):
        parse_sweep(["context=1", "context=2"])


def test_a_record_of_another_sweep_is_refused_and_an_unfinished_one_measured_again(bench):
    record = bench.record("int4", 4)
    cell = Cell(record.scheme, dict(record.workload), None)
    model = {"name": "demo", "dtype": "float32"}
    assert take_up([record], [cell], model) == [record]
    assert take_up([bench.record("int4", 4, complete=False)], [cell], model) == []
    with pytest.raises(KvqError, match="not a cell of this sweep"):
        take_up([bench.record("int4", 4, concurrency=3)], [cell], model)
    with pytest.raises(KvqError, match="another model"):
        take_up([record], [cell], model | {"name": "other"})


def test_records_keep_distributions_and_timelines(bench):
    result = bench.record().to_dict() | {
        "quantiles": {"ttft": [1.0, 2.0]},
        "timeline": {"time_s": [0.0, 0.5], "in_flight": [1, 2]},
        "part": 2,
    }
    again = RunRecord.from_dict(json.loads(json.dumps(result)), "here")
    assert again.quantiles == {"ttft": [1.0, 2.0]} and again.timeline["in_flight"] == [1, 2]
    assert again.part == 2 and "part" not in again.metrics
    assert again.to_dict() == result


SIZES = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 64,     "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip


def test_a_sweep_survives_kill_9(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(SIZES))
    file = tmp_path / "sweep.json"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    argv = [
        sys.executable, "-m", "kvq_cli.app", "compare", "--policies", "0,4",
        "--model", str(tmp_path / "tiny"), "--load-format", "dummy", "--device", "cpu",
        "--kv-memory", "1MiB", "--output-len", "24",
        "--sweep", "concurrency=1,2", "context=16,40", "--output", str(file),
    ]  # fmt: skip
    with subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True, stdout=subprocess.PIPE) as run:
        deadline = time.monotonic() + 120
        while not (file.exists() and len(json.loads(file.read_text())) >= 3):
            assert run.poll() is None and time.monotonic() < deadline, "the sweep ended before it was killed"
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.communicate()
    assert run.returncode == -signal.SIGKILL
    before = json.loads(file.read_text())
    assert 3 <= len(before) < 8 and all(record["complete"] for record in before)

    again = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1 and "exists, and a sweep overwrites nothing" in again.stderr
    assert json.loads(file.read_text()) == before

    done = subprocess.run(
        [*argv, "--resume", "--markdown"], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming: {len(before)} of 8 cells are measured already, {8 - len(before)} to go" in done.stderr
    assert "measured in 2 parts" in done.stdout and "0 none c1 ctx16" in done.stdout.split("in part 1")[0]
    records = json.loads(file.read_text())
    cells = {(r["label"], r["workload"]["concurrency"], r["workload"]["input_len"]) for r in records}
    assert cells == {(label, c, n) for label in ("none", "int4") for c in (1, 2) for n in (16, 40)}
    for old, new in zip(before, records, strict=False):
        assert {key: new[key] for key in old} == old
    assert [record.get("part") for record in records] == [None] * len(before) + [2] * (8 - len(before))
    rows = [json.loads(line) for line in (tmp_path / "sweep.requests.jsonl").read_text().splitlines()]
    assert [sum(row["run"] == i for row in rows) for i in range(8)] == [r["completed"] for r in records]
