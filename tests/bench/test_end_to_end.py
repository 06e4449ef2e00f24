"""The commands on a real engine: a tiny model with random weights, and the demo model."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvq_core.bench.workload import WorkloadSpec, make_workload, read_dataset

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}


@pytest.fixture
def tiny(tmp_path):
    """Flags for a model of two layers, head dim 64."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    return ["--model", str(folder), "--load-format", "dummy", "--device", "cpu", "--kv-memory", "1MiB"]


def command(*args: object) -> dict:
    paths = os.pathsep.join(path for path in sys.path if path)
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "kvq_cli.app", *map(str, args)]
    return {"args": argv, "env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def kvq(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(*args), timeout=600)


def test_compare_on_a_real_engine(tiny, tmp_path):
    file = tmp_path / "r.json"
    load = ("--dataset-name", "random", "--input-len", 40, "--output-len", 12, "-c", 3, "--num-prompts", 8)
    done = kvq("compare", "--policies", "0,8,4,42", *tiny, *load, "--output", file, "--json")
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert json.loads(file.read_text()) == records
    assert [record["label"] for record in records] == ["none", "int8", "int4", "turbo"]
    for record in records:
        assert record["complete"] and record["completed"] == 8 and record["failed"] == 0
        # Little's law: requests there on average are their rate times the seconds that each takes.
        there = record["request_throughput"] * record["mean_e2el_ms"] / 1e3
        assert record["mean_running"] + record["mean_waiting"] == pytest.approx(there, rel=0.15)
        assert record["model"]["name"] == "tiny" and str(tmp_path) not in json.dumps(record)
        assert record["total_output_tokens"] == sum(
            row["output_len"] for row in rows(tmp_path, record["label"])
        )
        assert 0 < record["mean_ttft_ms"] < record["mean_e2el_ms"]
        assert record["kv"]["peak_tokens"] > 0 and record["kv"]["preemptions"] == 0
        # The same seconds by two ways: what requests saw, and what the window lasted.
        assert max(r["sent_ms"] + r["e2el_ms"] for r in rows(tmp_path, record["label"])) == pytest.approx(
            record["duration"] * 1e3, rel=0.02
        )
    assert len({record["workload"]["requests_sha256"] for record in records}) == 1
    assert len({record["total_output_tokens"] for record in records}) == 1
    assert len({record["engine"]["kv_memory"] for record in records}) == 1
    # Head dim 64 against 2 bytes a number; the model is float32, so that `none` holds half.
    capacity = {record["label"]: record["kv"]["capacity_ratio"] for record in records}
    assert capacity["none"] == pytest.approx(0.5, rel=0.02)
    assert capacity["int8"] >= 1.8 and capacity["int4"] >= 3.4 and capacity["turbo"] >= 4.6


def rows(folder, label):
    lines = (folder / "r.requests.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["label"] == label]


def test_an_open_loop_with_cancellations_frees_every_page(tiny):
    load = ("--dataset-name", "fixed", "--input-len", 100, "--output-len", 12, "--num-prompts", 8)
    arrivals = ("--request-rate", 20, "--concurrency", 3, "--cancel-rate", 0.5, "--goodput", "ttft:60000")
    done = kvq("profile-throughput", *tiny, *load, *arrivals, "--policy", 42, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["completed"], record["cancelled"], record["failed"]) == (4, 4, 0)
    assert record["kv"]["tokens"] == 0 < record["kv"]["peak_tokens"]
    assert record["request_goodput"] == record["request_throughput"]
    assert record["duration"] >= 8 / 20 * 0.999


def test_a_cache_too_small_for_the_load_makes_requests_wait_but_none_fail(tiny, tmp_path):
    load = ("--dataset-name", "fixed", "--input-len", 200, "--output-len", 60, "-c", 6, "--num-prompts", 6)
    done = kvq("profile-throughput", *tiny, *load, "--policy", 0, "--json", "--kv-memory", "1MiB")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["completed"] == 6 and record["kv"]["capacity_tokens"] < 6 * 260
    assert record["p99_ttft_ms"] > 2 * record["std_ttft_ms"]


def test_ctrl_c_keeps_what_was_measured(tiny, tmp_path):
    file = tmp_path / "r.json"
    load = ("--dataset-name", "fixed", "--input-len", 16, "--output-len", 16, "-c", 1, "--num-prompts", 5000)
    process = subprocess.Popen(**command("profile-throughput", *tiny, *load, "--output", file))
    for line in process.stderr:
        if "warm-up, then 5000 requests" in line:
            break
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "(incomplete)" in out and "is incomplete" in err
    record = json.loads(file.read_text())
    assert record["complete"] is False and 0 < record["completed"] < 5000
    assert record["completed"] + record["unfinished"] == 5000 and record["failed"] == 0
    assert record["output_throughput"] > 0


@pytest.mark.demo
def test_the_demo_model_on_the_shipped_sample(tmp_path):
    file = tmp_path / "r.json"
    load = ("-c", 2, "--num-prompts", 2, "--max-output-len", 4)
    done = kvq("compare", "--policies", "0,42", "--device", "cpu", *load, "--output", file)
    assert done.returncode == 0, done.stderr
    assert "0 none" in done.stdout and "42 turbo" in done.stdout
    assert "speeds of the reference backend" in done.stdout
    none, turbo = json.loads(file.read_text())
    assert (
        none["completed"] == turbo["completed"] == 2 and none["workload"]["dataset"] == "sharegpt_sample.json"
    )
    assert turbo["kv"]["capacity_ratio"] >= 4.7


@pytest.mark.demo
def test_lengths_of_the_sample_in_tokens_of_the_demo_model():
    from kvq_core.models.load import load_tokenizer

    spec = WorkloadSpec(num_prompts=320, num_warmup=0)
    tokenizer = load_tokenizer("demo")
    described = make_workload(spec, read_dataset(spec), tokenizer=tokenizer, vocab_size=0).describe()
    assert described["distinct_prompts"] >= 316
    assert described["mean_input_len"] == pytest.approx(220, rel=0.03)
    assert described["mean_output_len"] == pytest.approx(204, rel=0.03)
