"""`kvq profile-throughput` and `kvq compare` on an engine that answers at once, without torch."""

import json
import re
import sys
import time
import types
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from kvq_cli import console
from kvq_cli.app import main
from kvq_cli.benchmark import Session
from kvq_core.bench import record as record_module
from kvq_core.bench.target import Event, TargetInfo, Usage
from kvq_core.errors import KvqError
from kvq_core.policies import Policy


@dataclass
class Fakes:
    """What the commands asked of the fake model and engine, and what these shall do."""

    loads: list[dict[str, Any]] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    closed: int = 0
    device: str = "cpu"
    tokenizer: Any = None
    fail_start: dict[str, Exception] = field(default_factory=dict)
    """policy -> raised when its engine starts."""
    raise_at: dict[str, tuple[int, BaseException]] = field(default_factory=dict)
    """policy -> (number of the poll, raised by it)."""
    interrupt_engine: int = 0
    """Ctrl-C while the n-th engine runs, after one measured request."""
    error: str | None = None
    """Every measured request fails with it."""
    kv: dict[str, Any] = field(default_factory=dict)
    """More of what engines say of their caches."""


def fake_modules(fakes: Fakes) -> dict[str, types.ModuleType]:
    def load_model(name: str, **options: Any) -> Any:
        if name in ("", "missing"):
            raise KvqError(f"cannot find model {name!r}", "use another")
        fakes.loads.append({"name": name, **options})
        layer = types.SimpleNamespace(key_dim=64, value_dim=64)
        geometry = types.SimpleNamespace(layers=(layer,), num_layers=1, vocab_size=100, max_model_len=2048)
        device = types.SimpleNamespace(type=fakes.device)
        tokenizer = fakes.tokenizer if options["need_tokenizer"] else None
        described = {"name": "fake", "dtype": "float32"}
        return types.SimpleNamespace(
            geometry=geometry, device=device, tokenizer=tokenizer, name=name, describe=lambda: described
        )

    class Engine:
        def __init__(self, model: Any, config: Any, progress: Any) -> None:
            policy = config.resolved_policy()
            if policy.name in fakes.fail_start:
                raise fakes.fail_start[policy.name]
            self.config = config.replace(kv_memory=config.kv_memory or 1 << 30)
            fakes.configs.append(self.config)

        def close(self) -> None:
            fakes.closed += 1

    class EngineTarget:
        def __init__(self, engine: Engine) -> None:
            self.policy = engine.config.resolved_policy()
            self.running: deque[Any] = deque()
            self.polls = 0

        def info(self) -> TargetInfo:
            return TargetInfo(
                {"name": "fake", "dtype": "float32"},
                self.policy.describe(),
                {"device": "cpu", "kv_memory": 1 << 30},
            )

        def send(self, request: Any) -> None:
            self.running.append(request)

        def poll(self, timeout: float) -> list[Event]:
            self.polls += 1
            at, error = fakes.raise_at.get(self.policy.name, (0, KeyError()))
            if self.polls == at:
                raise error
            if len(fakes.configs) == fakes.interrupt_engine and self.polls == 4:
                raise KeyboardInterrupt
            if not self.running:
                time.sleep(timeout)
                return []
            request = self.running.popleft()
            failure = fakes.error if request.index >= 0 else None
            return [Event(request.index, time.perf_counter(), request.output_len, True, failure)]

        def cancel(self, index: int) -> None:
            pass

        def close(self) -> None:
            self.running.clear()

        def usage(self) -> Usage:
            return Usage(10 * len(self.running), len(self.running), 0)

        def reset_stats(self) -> None:
            pass

        def kv_stats(self) -> dict[str, Any]:
            return {
                "bits_per_element": 16.0,
                "bytes_per_token": 256,
                "capacity_tokens": 5,
                "capacity_ratio": 1.0,
                **fakes.kv,
            }

    def check_head_dims(geometry: Any, policy: Policy) -> None:
        if policy.name == "qjl":
            raise KvqError(f"qjl can't take head dim {geometry.layers[0].key_dim}", "use another codec")

    modules = {
        "kvq_core.models": {"load_model": load_model},
        "kvq_core.engine.engine": {"Engine": Engine},
        "kvq_core.bench.engine_target": {"EngineTarget": EngineTarget},
        "kvq_core.cache.plan": {"check_head_dims": check_head_dims},
    }
    made = {}
    for name, content in modules.items():
        made[name] = types.ModuleType(name)
        vars(made[name]).update(content)
    return made


@pytest.fixture
def fakes(monkeypatch, bench):
    fakes = Fakes(tokenizer=bench.Tokenizer())
    for name, module in fake_modules(fakes).items():
        monkeypatch.setitem(sys.modules, name, module)
    return fakes


SMALL = ("--concurrency", 2, "--num-prompts", 3)


def test_profile_with_nothing_else_on_a_cpu(kvq, fakes):
    code, out, err = kvq("profile-throughput", "--policy", 42, "--concurrency", 64)
    assert code == 0, err
    assert fakes.loads[0]["name"] == "demo" and fakes.loads[0]["need_tokenizer"]
    assert fakes.configs[0].max_num_seqs == 64 and fakes.closed == 1
    assert "on a CPU: 64 requests, answers cut to 64 tokens" in err
    assert "42 turbo" in out and "64 ok" in out and "speeds of the reference backend" in out
    assert "sharegpt_sample.json: 64 requests" in out and "answers cut to 64, 64 at a time" in out


def test_profile_on_a_gpu_replays_twice_the_concurrency_uncut(kvq, fakes):
    fakes.device = "cuda"
    code, out, err = kvq("profile-throughput", "--concurrency", 16, "--json")
    record = json.loads(out)
    assert code == 0 and "on a CPU" not in err
    assert record["workload"]["num_prompts"] == 32 and record["workload"]["num_warmup"] == 16
    assert record["workload"]["warmup_input_len"] is None
    assert record["workload"]["output_len_cap"] is None and record["workload"]["max_output_len"] > 64


def test_output_file_is_what_json_prints(kvq, fakes, tmp_path):
    file = tmp_path / "r.json"
    code, out, err = kvq(
        "profile-throughput", *SMALL, "--label", "mine", "--output", file, "--json", "--seed", 5
    )
    assert code == 0
    record = json.loads(out)
    assert json.loads(file.read_text()) == record
    assert record["label"] == "mine" and record["complete"] is True
    assert record["env"]["seed"] == record["workload"]["seed"] == 5
    assert record["requests_file"] == "r.requests.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "r.requests.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2] and {row["label"] for row in rows} == {"mine"}
    assert f"wrote {file}" in err


def test_compare_loads_once_and_gives_all_the_same_memory(kvq, fakes, tmp_path):
    file = tmp_path / "all.json"
    code, out, _ = kvq("compare", "--policies", "0,8,4,42", *SMALL, "--output", file)
    assert code == 0
    assert len(fakes.loads) == 1 and fakes.closed == 4
    assert [config.resolved_policy().name for config in fakes.configs] == ["none", "int8", "int4", "turbo"]
    assert len({config.kv_memory for config in fakes.configs}) == 1
    for name in ("0 none", "8 int8", "4 int4", "42 turbo"):
        assert out.count(name) >= 2
    assert "changes are against 0 none" in out and "reference backend" in out
    records = json.loads(file.read_text())
    assert [record["label"] for record in records] == ["none", "int8", "int4", "turbo"]
    assert len({record["workload"]["requests_sha256"] for record in records}) == 1
    rows = [json.loads(line) for line in (tmp_path / "all.requests.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_files_are_joined_with_the_rows_of_their_requests(kvq, fakes, tmp_path):
    first, second, joined = (tmp_path / f"{name}.json" for name in ("first", "second", "joined"))
    kvq("compare", "--policies", "0,8", *SMALL, "--output", first)
    kvq("profile-throughput", "--policy", 42, *SMALL, "--output", second)
    code, out, _ = kvq("compare", first, second, "--output", joined, "--json")
    assert code == 0 and json.loads(out) == json.loads(joined.read_text())
    assert [record["requests_file"] for record in json.loads(out)] == ["joined.requests.jsonl"] * 3
    rows = [json.loads(line) for line in (tmp_path / "joined.requests.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    assert [row["label"] for row in rows] == ["none"] * 3 + ["int8"] * 3 + ["turbo"] * 3
    before = joined.read_text(), rows
    kvq("compare", joined, "--output", joined)
    rows = [json.loads(line) for line in (tmp_path / "joined.requests.jsonl").read_text().splitlines()]
    assert (joined.read_text(), rows) == before


def test_what_a_command_reads_is_not_written_over(kvq, fakes, write_json, tmp_path):
    runs = tmp_path / "runs.json"
    kvq("profile-throughput", *SMALL, "--output", runs)
    pairs = write_json("pairs.json", [[4, 2]] * 9)
    load = ("--dataset-name", "lengths", "--dataset-path", pairs)
    for args, message in (
        (("profile-throughput", *load, "--output", pairs), "--output and --dataset-path are the same file"),
        (("compare", "--policies", "0", *load, "--html", pairs), "--html and --dataset-path are the same"),
        (("compare", runs, "--html", runs), f"--html and {runs} are the same file"),
        (("compare", runs, "--output", "x.json", "--html", "./x.json"), "--html and --output are the same"),
        (("compare", runs, "--quality", pairs, "--output", pairs), "--output and --quality are the same"),
    ):
        before = runs.read_text(), pairs.read_text()
        code, _, err = kvq(*args)
        assert code == 2 and message in err and (runs.read_text(), pairs.read_text()) == before


def test_an_open_loop(kvq, fakes):
    load = ("--request-rate", 500, "--burstiness", 0.5, "--num-prompts", 4)
    code, out, _ = kvq("profile-throughput", *load, "--json")
    record = json.loads(out)
    assert code == 0 and record["completed"] == 4
    work = record["workload"]
    assert (work["request_rate"], work["burstiness"], work["concurrency"]) == (500, 0.5, None)
    assert record["achieved_request_rate"] > 0
    assert fakes.configs[0].max_num_seqs == 4
    _, out, _ = kvq("profile-throughput", *load, "--concurrency", 2)
    assert "500 requests per second asked for" in out and "at most 2 at a time" in out


@pytest.mark.parametrize("limits", [("ttft:1e4",), ("ttft:60000", "tpot:1000"), ("ttft:60000 e2el:60000",)])
def test_goodput(kvq, fakes, limits):
    code, out, err = kvq("profile-throughput", *SMALL, "--goodput", *limits, "--json")
    if limits == ("ttft:1e4",):
        assert code == 2 and "`ttft:1e4` is no limit" in err
        return
    record = json.loads(out)
    assert record["request_goodput"] == record["request_throughput"] > 0
    assert record["workload"]["goodput"]["ttft"] == 60000


def test_goodput_in_tables(kvq, fakes):
    _, out, _ = kvq(
        "compare", "--policies", "0,8", "--goodput", "ttft:60000", "tpot:0.5", *SMALL, "--markdown"
    )
    assert out.startswith("| policy | requests /s | goodput /s | input")
    assert "; goodput: TTFT ≤ 60000 ms and TPOT ≤ 0.5 ms" in out
    _, out, _ = kvq("profile-throughput", "--goodput", "ttft:60000", *SMALL)
    assert "goodput, requests per second" in out
    _, out, _ = kvq("profile-throughput", *SMALL)
    assert "goodput" not in out


def test_duration_rate_and_warm_up(kvq, fakes):
    load = ("--request-rate", 50, "--duration", 0.1, "--num-warmups", 70)
    code, out, _ = kvq("profile-throughput", *load, "--json")
    work = json.loads(out)["workload"]
    assert code == 0 and (work["num_prompts"], work["num_warmup"]) == (5, 70)
    assert work["duration_limit_s"] == 0.1


def test_requests_that_run_out_before_the_duration_are_pointed_out(kvq, fakes):
    code, _, err = kvq("profile-throughput", *SMALL, "--duration", 60)
    assert code == 0 and "all 3 requests were sent before the 60 s of --duration were over" in err
    code, _, err = kvq("profile-throughput", *SMALL, "--duration", 1e-9)
    assert code == 1 and "none was sent" in err and "all 3 requests were sent" not in err


def test_cancelled_requests(kvq, fakes):
    code, out, _ = kvq("profile-throughput", *SMALL, "--cancel-rate", 0.34)
    assert code == 0 and "34% to be cancelled" in out


@pytest.mark.parametrize(("cancelled", "reason"), [(3, "all were cancelled"), (0, "none was sent")])
def test_a_run_without_a_completed_request_says_why(bench, cancelled, reason):
    session = Session(None, as_list=False)
    session.add(replace(bench.record(), metrics={"completed": 0, "cancelled": cancelled}), [])
    assert str(session.error) == f"0 none: no request was completed: {reason}"


def test_an_infinite_rate_is_a_closed_loop(kvq, fakes):
    _, out, _ = kvq("profile-throughput", "--request-rate", "inf", *SMALL, "--json")
    assert json.loads(out)["workload"]["loop"] == "closed"


def test_repeats_take_turns_and_every_run_is_kept(kvq, fakes, tmp_path):
    file = tmp_path / "r.json"
    code, out, _ = kvq("compare", "--policies", "0,8,42", "--repeats", 3, *SMALL, "--output", file)
    names = ["none", "int8", "turbo"]
    assert code == 0 and len(fakes.loads) == 1
    assert [config.resolved_policy().name for config in fakes.configs] == names * 3
    assert len({config.kv_memory for config in fakes.configs}) == 1
    records = json.loads(file.read_text())
    assert [(r["label"], r["repeat"]) for r in records] == [(n, i) for i in (1, 2, 3) for n in names]
    assert out.count("42 turbo") == 2 and " ±" in out and "means of 3 runs ±" in out
    assert "9 ok" in out
    code, again, _ = kvq("compare", file)
    assert code == 0 and again == out


def test_a_run_repeated_by_itself(kvq, fakes, tmp_path):
    file = tmp_path / "r.json"
    code, out, _ = kvq("profile-throughput", "--policy", "42", "--repeats", 3, *SMALL, "--output", file)
    assert code == 0 and [record["repeat"] for record in json.loads(file.read_text())] == [1, 2, 3]
    assert "9 ok" in out and "means of 3 runs ± half their 95% interval" in out
    for name in ("requests per second", "output tokens per second", "TTFT", "E2E"):
        assert any(name in line and "±" in line for line in out.splitlines()), name
    _, out, _ = kvq("profile-throughput", "--policy", "42", "--repeats", 2, *SMALL, "--json")
    assert [record["repeat"] for record in json.loads(out)] == [1, 2]


def test_one_run_is_no_repeat(kvq, fakes, tmp_path):
    _, out, _ = kvq("compare", "--policies", "0,8", *SMALL, "--output", tmp_path / "r.json")
    assert "±" not in out and "repeat" not in json.loads((tmp_path / "r.json").read_text())[0]


def test_interrupted_repeats_keep_those_that_ended(kvq, fakes, tmp_path):
    fakes.interrupt_engine = 4
    file = tmp_path / "r.json"
    code, out, err = kvq("compare", "--policies", "0,8", "--repeats", 3, *SMALL, "--output", file)
    assert code == 130
    found = [(r["label"], r["repeat"], r["complete"]) for r in json.loads(file.read_text())]
    assert found == [("none", 1, True), ("int8", 1, True), ("none", 2, True), ("int8", 2, False)]
    assert "8 int8: 1 of 2 runs are incomplete and left out" in err and "(incomplete)" not in out
    assert "means of 1 to 2 runs" in out


def test_a_policy_that_does_not_start_is_tried_once(kvq, fakes):
    fakes.fail_start = {"int8": KvqError("no memory is left", "take less")}
    code, _, err = kvq("compare", "--policies", "0,8", "--repeats", 3, *SMALL)
    assert code == 1 and len(fakes.configs) == 3 and err.count("was not measured") == 1


def test_windows_show_in_names(kvq, fakes):
    _, out, _ = kvq("compare", "--policies", "0,42", "--sink", 4, "--recent", 128, *SMALL, "--json")
    assert [record["label"] for record in json.loads(out)] == ["none", "turbo+s4r128"]


@pytest.mark.parametrize("baseline", ["42", "turbo"])
def test_baseline(kvq, fakes, baseline):
    _, out, _ = kvq("compare", "--policies", "0,42", "--baseline", baseline, *SMALL, "--json")
    assert [record["vs_baseline"]["baseline"] for record in json.loads(out)] == ["42 turbo"] * 2


def test_files_of_one_record_and_of_a_list(kvq, fakes, tmp_path):
    kvq("profile-throughput", *SMALL, "--policy", 42, "--output", tmp_path / "a.json")
    kvq("compare", "--policies", "0,8", *SMALL, "--output", tmp_path / "b.json")
    loads = len(fakes.loads)
    files = (tmp_path / "a.json", tmp_path / "b.json")
    code, out, err = kvq("compare", *files, "--baseline", "none", "--json", "--output", tmp_path / "c.json")
    assert code == 0 and len(fakes.loads) == loads
    assert [record["label"] for record in json.loads(out)] == ["turbo", "none", "int8"]
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(out)
    code, out, _ = kvq("compare", *files, "--markdown")
    assert code == 0 and out.startswith("| policy |") and "| 42 turbo |" in out
    code, out, _ = kvq("compare", *files, "--csv")
    assert code == 0 and out.startswith("name,label,") and out.count("\n") == 4
    code, out, err = kvq("compare", *files)
    assert code == 0 and "42 turbo" in out and "warning" not in err


def test_records_that_differ_are_pointed_out(kvq, fakes, tmp_path):
    kvq("profile-throughput", *SMALL, "--seed", 1, "--output", tmp_path / "a.json")
    kvq("profile-throughput", *SMALL, "--seed", 2, "--output", tmp_path / "b.json")
    code, _, err = kvq("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 0
    assert "warning: records differ in workload" in err and "warning: records differ in seed: 1" in err


# 2 warm-up polls and 3 measured ones a policy: the fourth poll comes after one measured request.
INTERRUPT = {"int8": (4, KeyboardInterrupt())}


def test_interrupt_keeps_what_was_measured(kvq, fakes, tmp_path):
    fakes.raise_at = INTERRUPT
    file = tmp_path / "r.json"
    code, out, err = kvq("compare", "--policies", "0,8,42", *SMALL, "--output", file)
    assert code == 130
    records = json.loads(file.read_text())
    assert [(r["label"], r["complete"], r["completed"], r["unfinished"]) for r in records] == [
        ("none", True, 3, 0),
        ("int8", False, 1, 2),
    ]
    assert "8 int8 (incomplete)" in out and "8 int8 is incomplete: 1 of 3 requests" in err
    assert fakes.closed == 2
    code, out, err = kvq("compare", file)
    assert code == 0 and "8 int8 (incomplete)" in out and "is incomplete" in err


def test_interrupt_of_a_single_run(kvq, fakes, tmp_path):
    fakes.raise_at = INTERRUPT
    code, out, _ = kvq("profile-throughput", "--policy", 8, *SMALL, "--output", tmp_path / "r.json", "--json")
    assert code == 130
    assert json.loads(out)["complete"] is False
    assert json.loads((tmp_path / "r.json").read_text())["completed"] == 1


def test_interrupt_before_anything_was_measured(kvq, fakes, tmp_path):
    fakes.raise_at = {"none": (1, KeyboardInterrupt())}
    code, out, err = kvq("compare", "--policies", "0,42", *SMALL, "--output", tmp_path / "r.json")
    assert code == 130 and out == "" and "Traceback" not in err
    assert not (tmp_path / "r.json").exists() and fakes.closed == 1


def test_a_policy_that_does_not_start_leaves_the_others(kvq, fakes, tmp_path):
    fakes.fail_start = {"int8": KvqError("no memory is left", "take less")}
    code, out, err = kvq(
        "compare", "--policies", "0,8,42", "--baseline", 8, *SMALL, "--output", tmp_path / "r.json"
    )
    assert code == 1
    assert [record["label"] for record in json.loads((tmp_path / "r.json").read_text())] == ["none", "turbo"]
    assert "int8 was not measured: no memory is left" in err and "error: no memory is left" in err
    assert "baseline 8 was not measured" in err and "42 turbo" in out


def test_a_target_that_breaks_keeps_what_was_measured(kvq, fakes, tmp_path):
    fakes.raise_at = {"none": (4, RuntimeError("device lost"))}
    code, out, err = kvq("compare", "--policies", "0,42", *SMALL, "--output", tmp_path / "r.json")
    assert code == 1 and "device lost" in err
    (record,) = json.loads((tmp_path / "r.json").read_text())
    assert record["complete"] is False and record["completed"] == 1
    assert "0 none (incomplete)" in out and fakes.closed == 1


def test_failed_requests_are_shown(kvq, fakes, tmp_path):
    fakes.error = "lost"
    code, out, err = kvq("profile-throughput", *SMALL, "--output", tmp_path / "r.json")
    assert code == 1
    assert "0 ok, 3 failed" in out and "3 requests failed" in err
    assert "error: 0 none: no request was completed: lost" in err
    assert json.loads((tmp_path / "r.json").read_text())["errors"] == {"lost": 3}


def test_full_disk(kvq, fakes, tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_module, "write_atomic", full)
    code, out, err = kvq("compare", "--policies", "0,42", *SMALL, "--output", tmp_path / "r.json")
    assert code == 1 and "42 turbo" in out  # the table is there all the same
    assert err.count("warning: cannot write") == 2 and "error: cannot write" in err
    kept = Path(err.split("kept in ")[1].split(";")[0])
    try:
        assert [record["label"] for record in json.loads(kept.read_text())] == ["none", "turbo"]
    finally:
        kept.unlink()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("profile-throughput", "--policy", "43"), 1, "unknown policy '43'"),
        (("profile-throughput", "--model", "missing"), 1, "cannot find model 'missing'"),
        (("profile-throughput", "--model", ""), 1, "cannot find model ''"),
        (("profile-throughput", "--policy", "qjl"), 1, "qjl can't take head dim 64"),
        (("profile-throughput", "--kv-memory", "9" * 400), 2, "more than any memory"),
        (("profile-throughput", "--api", "chat"), 2, "--api needs --base-url"),
        (("profile-throughput", "--ramp-up", ""), 2, "`` is no --ramp-up"),
        (("profile-throughput", "--dataset-name", ""), 2, "unknown --dataset-name ``"),
        (
            ("profile-throughput", "--dataset-name", "trace", "--dataset-path", "t", "--trace-speed", "0"),
            2,
            "--trace-speed must be above 0",
        ),
        (("profile-throughput", "--concurrency", "0"), 2, "--concurrency"),
        (("profile-throughput", "--num-prompts", "-3"), 2, "--num-prompts"),
        (("profile-throughput", "--max-output-len", "0"), 2, "--max-output-len"),
        (("profile-throughput", "--input-len", "0", "--dataset-name", "fixed"), 2, "--input-len"),
        (
            ("profile-throughput", "--warmup", "8"),
            2,
            "--num-warmups 8 is less than the 64 requests in flight",
        ),
        (("profile-throughput", "--request-rate", "0"), 2, "--request-rate must be above 0"),
        (("compare", "--policies", "0,4", "--burstiness", "2"), 2, "--burstiness needs --request-rate"),
        (("compare", "--policies", "0,4", "--goodput", "ttft:9", "itl:5"), 2, "`itl:5` is no limit"),
        (("profile-throughput", "--duration", "0"), 2, "--duration must be above 0"),
        (("profile-throughput", "--cancel-rate", "1.5"), 2, "--cancel-rate must lie in [0, 1)"),
        (("profile-throughput", "--dataset-name", "alpaca"), 2, "unknown --dataset-name `alpaca`"),
        (("profile-throughput", "--dataset-name", "lengths"), 2, "needs --dataset-path"),
        (("profile-throughput", "--dataset-path", "none.json"), 1, "no file none.json"),
        (("profile-throughput", "--dataset-name", "fixed", "--input-len", "4000"), 1, "exceeds the 2048"),
        (("profile-throughput", "--output", "/proc/x/r.json"), 1, "cannot write"),
        (("compare",), 2, "takes files of records, --policies or --target"),
        (("compare", "a.json", "--policies", "0,4"), 2, "one of them"),
        (("compare", "a.json"), 1, "no file a.json"),
        (("compare", "--policies", "0,banana"), 1, "unknown policy 'banana'"),
        (("compare", "--policies", ","), 2, "no policy given"),
        (("compare", "--policies", "0,4", "--baseline", "42"), 1, "--baseline 42 is none of the policies"),
        (("compare", "--policies", "0,4", "--json", "--csv"), 2, "one or the other"),
        (("compare", "a.json", "--fail-on-regression", "much"), 2, "much"),
    ],
    ids=lambda value: " ".join(value[:5]) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_clear_error(kvq, fakes, args, code, message):
    found, out, err = kvq(*args)
    assert found == code
    assert out == "" and "Traceback" not in err
    assert err.count("error:") == 1 and message in err and "hint:" in err
    assert not fakes.configs


def test_a_model_without_tokenizer_takes_token_ids(kvq, fakes):
    fakes.tokenizer = None
    code, _, err = kvq("profile-throughput", *SMALL)
    assert code == 1 and "no tokenizer" in err
    code, out, _ = kvq("profile-throughput", *SMALL, "--dataset-name", "random", "--input-len", 20, "--json")
    assert code == 0 and json.loads(out)["workload"]["name"] == "random"


def test_a_smaller_engine_than_the_load_can_be_asked_for(kvq, fakes):
    kvq("profile-throughput", *SMALL, "--max-num-seqs", 1)
    assert fakes.configs[0].max_num_seqs == 1


@pytest.mark.parametrize("command", ["profile-throughput", "compare"])
def test_help_defines_the_figures(kvq, command):
    code, out, _ = kvq(command, "--help")
    assert code == 0
    for word in ("TTFT", "TPOT", "ITL", "E2E", "--concurrency", "--dataset-path"):
        assert word in out
    assert "queueing included" in " ".join(out.split())


def test_narrow_terminals_get_readable_tables(kvq, fakes, monkeypatch):
    from rich.console import Console

    with open("/dev/null", "w") as nowhere:
        narrow = Console(width=80, file=nowhere, record=True, no_color=True)
        monkeypatch.setattr(console, "out", lambda: narrow)
        with pytest.raises(SystemExit):
            main(["compare", "--policies", "0,42", *map(str, SMALL)])
        lines = narrow.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert sum(line.strip().startswith("42 turbo") for line in lines) == 2


SWEEP = ("--policies", "0,4", "--sweep", "concurrency=1,3", "context=8,16", "--output-len", 4)


def test_a_sweep_starts_each_engine_once(kvq, fakes, tmp_path):
    file = tmp_path / "s.json"
    code, out, err = kvq("compare", *SWEEP, "--output", file)
    assert code == 0, err
    assert len(fakes.configs) == 2 and {config.max_num_seqs for config in fakes.configs} == {3}
    records = json.loads(file.read_text())
    cells = [(r["label"], r["workload"]["input_len"], r["workload"]["concurrency"]) for r in records]
    assert cells == [(name, n, c) for name in ("none", "int4") for n in (8, 16) for c in (1, 3)]
    assert {record["workload"]["name"] for record in records} == {"fixed"}
    assert "4 int4 c3 ctx16" in out and "break-even" in out and "answers cut" not in err + out
    assert all(len(record["quantiles"]["ttft"]) == 101 for record in records)
    assert re.search(r'"ttft": \[ ?[\d., ]+\]\n?', file.read_text())  # columns of numbers lie on one line


def test_what_goes_wrong_in_a_sweep(kvq, fakes, tmp_path):
    file = tmp_path / "s.json"
    file.write_text("[]")
    for flags, message in (
        (("--output", file), "exists, and a sweep overwrites nothing"),
        (("--resume",), "--resume needs --output"),
        (("--concurrency", 2), "--concurrency is set by --sweep"),
        (("--input-len", 2), "--input-len is set by --sweep"),
        (("--dataset-name", "sharegpt"), "--sweep context=… sets the length of prompts"),
        (("--mode", "fair"), "unknown --mode `fair`"),
    ):
        code, _, err = kvq("compare", *SWEEP, *flags)
        assert code in (1, 2) and message in err and "hint:" in err, err
    code, _, err = kvq("compare", file, "--resume")
    assert code == 2 and "--resume goes with --policies" in err
    assert file.read_text() == "[]"


def test_resuming_measures_what_is_missing(kvq, fakes, tmp_path):
    file = tmp_path / "s.json"
    assert kvq("compare", *SWEEP, "--output", file, "--resume")[0] == 0  # nothing to resume is no mistake
    whole = json.loads(file.read_text())
    file.write_text(json.dumps([*whole[:5], whole[6] | {"complete": False}]))
    code, out, err = kvq("compare", *SWEEP, "--output", file, "--resume")
    assert code == 0 and "resuming: 5 of 8 cells are measured already, 3 to go" in err
    assert len(fakes.configs) == 3  # none was measured whole
    records = json.loads(file.read_text())
    assert [record.get("part") for record in records] == [None] * 5 + [2] * 3
    assert "measured in 2 parts" in out
    other = ("compare", *SWEEP[:-1], 9, "--output", file, "--resume")
    code, _, err = kvq(*other)
    assert code == 1 and "is not a cell of this sweep" in err and json.loads(file.read_text()) == records


def test_a_sweep_of_policies_by_layer_is_resumed_too(kvq, fakes, tmp_path):
    flags = ("compare", "--policies", "0,4@0=8", *SWEEP[2:], "--output", tmp_path / "s.json", "--resume")
    assert kvq(*flags)[0] == 0
    code, _, err = kvq(*flags)
    assert code == 0 and "resuming: 8 of 8 cells are measured already, 0 to go" in err


def test_an_equal_batch_must_fit(kvq, fakes):
    flags = ("compare", *SWEEP[:2], "--dataset-name", "fixed", "--input-len", 2, "--output-len", 1, "-c")
    code, out, _ = kvq(*flags, 1, "--mode", "equal-batch", "--json")
    assert code == 0 and {r["workload"]["mode"] for r in json.loads(out)} == {"equal-batch"}
    code, _, err = kvq(*flags, 2, "--mode", "equal-batch")
    assert code == 1 and "2 requests of 3 tokens, in pages of 1, do not fit into 5" in err
    assert kvq(*flags, 2)[0] == 0


def test_capacity_is_measured_where_memory_is_the_limit(kvq, fakes):
    flags = ("compare", *SWEEP[:2], "--capacity")
    for more, message in (
        ((), "--capacity needs --kv-memory"),
        (("--kv-memory", "1MiB", "--mode", "equal-batch"), "exclude each other"),
    ):
        code, _, err = kvq(*flags, *more)
        assert code == 2 and message in err and "hint:" in err
    fakes.kv = {"peak_tokens": 3, "preemptions": 0}
    code, _, err = kvq(*flags, "--kv-memory", "1MiB")
    assert code == 0 and "none: memory was not the limit: 3 tokens at most, of 5 that fit" in err
    assert "int4: memory" not in err, "policies that pack more are expected to have memory left"
    for full in ({"peak_tokens": 4, "preemptions": 0}, {"peak_tokens": 3, "preemptions": 1}):
        fakes.kv = full
        code, _, err = kvq(*flags, "--kv-memory", "1MiB")
        assert code == 0 and "not the limit" not in err


def test_a_report_and_a_recommendation_by_slo(kvq, fakes, tmp_path):
    page = tmp_path / "r.html"
    code, out, err = kvq("compare", *SWEEP, "--html", page, "--slo", "ttft:60000", "tpot:50")
    assert code == 0 and f"wrote {page}" in err
    assert "within p99 TTFT ≤ 60000 ms and p99 TPOT ≤ 50 ms" in out and out.count("recommended: ") == 1
    assert page.read_text().startswith("<!doctype html>") and "Recommended: " in page.read_text()
    code, _, err = kvq("compare", *SWEEP, "--html", tmp_path)
    assert code == 1 and "is a folder" in err and "--html" in err
    code, _, err = kvq("compare", *SWEEP, "--slo", "ttft")
    assert code == 2 and "no limit of --slo" in err
