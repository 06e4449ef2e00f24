"""Tensor parallelism on the CPU, over gloo: processes give the tokens of one, and die in good order."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from kvq_core.attention import register
from kvq_core.config import EngineConfig
from kvq_core.engine.engine import Engine
from kvq_core.errors import KvqError, UsageError
from kvq_core.models import load_model
from kvq_core.models.dummy import build_dummy
from kvq_core.models.geometry import model_geometry
from kvq_core.parallel.group import Ranks
from kvq_core.parallel.shard import find_shards
from tests.tiny import TINY

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    "OMP_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
KVQ = [sys.executable, "-m", "kvq_cli.app"]


def write_config(folder: Path, kind: str = "llama", **options: Any) -> str:
    AutoConfig.for_model(kind, **(TINY | {"eos_token_id": None} | options)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tp", [2, 4])
def test_several_processes_give_the_tokens_of_one(tp: int, tmp_path: Path) -> None:
    """4 query and 2 kv heads: split over 2 ranks, each kv head on two of 4; preempted, prompts in chunks."""
    script = Path(__file__).with_name("parallel_cases.py")
    command = [sys.executable, str(script), str(tp), str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout.splitlines()[-1]):
        one, several, case = row["one"], row["several"], row["case"]
        assert several["answers"] == one["answers"], case
        assert len({tuple(answer) for answer in one["answers"]}) > 3, (
            f"{case}: the prompts make no difference"
        )
        assert several["preemptions"] == one["preemptions"], case
        assert several["cached"] == one["cached"], case
        assert one["cached"] > 0 if "+" in case else one["preemptions"] > 0, case
        assert several["drift"] == pytest.approx(one["drift"], abs=1e-6), case
        assert row["described"], f"{case}: records describe the shard, not the model"
        assert several["kv"]["capacity_tokens"] == one["kv"]["capacity_tokens"], case
        assert several["kv"]["memory_bytes"] * min(tp, 2) == one["kv"]["memory_bytes"], case
        assert several["kv"]["total_memory_bytes"] == several["kv"]["memory_bytes"] * tp, case


class Benchmark:
    """`kvq profile-throughput` on two ranks, in the middle of its work."""

    def __init__(self, folder: Path) -> None:
        self.output, log = folder / "record.json", folder / "log"
        model = write_config(folder / "model")
        engine = "--load-format dummy --dtype float32 --device cpu --tp 2 --policy 42 --kv-memory 16MiB"
        work = "--dataset-name fixed --input-len 16 --output-len 16 --num-prompts 9000"
        flags = f"{engine} {work} --concurrency 4 --num-warmups 4"
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*KVQ, "profile-throughput", "--model", model, "--output", str(self.output), *flags.split()],
                env=ENVIRONMENT, stdout=file, stderr=file, preexec_fn=_hear_interrupts,
            )  # fmt: skip
        self.log = log
        end = time.monotonic() + 60
        while "warm-up" not in log.read_text() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(3)
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        (self.follower,) = [int(pid) for path in children for pid in path.read_text().split()]

    def end(self) -> tuple[int, str, dict[str, Any]]:
        """Exit code, what was said, and the record."""
        code = self.process.wait(30)
        end = time.monotonic() + 5
        while Path(f"/proc/{self.follower}").exists():
            assert time.monotonic() < end, "a rank outlives the run"
            time.sleep(0.1)
        return code, self.log.read_text(), json.loads(self.output.read_text())


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background


def test_a_killed_rank_ends_the_run_with_its_name_and_the_record_is_kept(tmp_path: Path) -> None:
    run = Benchmark(tmp_path)
    os.kill(run.follower, signal.SIGKILL)
    code, log, record = run.end()
    assert code == 1
    assert f"error: rank 1 on {os.uname().nodename} (process {run.follower}) was killed by SIGKILL" in log
    assert "Traceback" not in log
    assert record["complete"] is False and 0 < record["completed"] < 9000
    assert record["engine"]["tp"] == 2


def test_ctrl_c_ends_all_ranks_and_the_record_is_kept(tmp_path: Path) -> None:
    run = Benchmark(tmp_path)
    run.process.send_signal(signal.SIGINT)
    code, log, record = run.end()
    assert code == 130
    assert "error" not in log and "Traceback" not in log
    assert record["complete"] is False and 0 < record["completed"] < 9000


def test_under_torchrun_rank_0_leads_and_the_others_follow(tmp_path: Path) -> None:
    """As on several machines: both ranks are there before kvq starts."""
    model = write_config(tmp_path / "model")
    kvq = f"-m kvq_cli.app profile-throughput --model {model} --load-format dummy --device cpu --tp 2 --json"
    work = "--dataset-name fixed --input-len 16 --output-len 8 --num-prompts 4 --kv-memory 1MiB"
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node 2 {kvq} {work}"
    done = subprocess.run(
        [sys.executable, *torchrun.split()], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completed"] == 4


def test_heads_that_do_not_divide_are_refused_before_anything_starts(tmp_path: Path) -> None:
    model = write_config(tmp_path)
    with pytest.raises(UsageError, match=r"--tp 3 does not divide.* 4 query heads and 2 kv heads") as error:
        load_model(model, load_format="dummy", device="cpu", tp=3)
    assert error.value.hint.endswith("1, 2, 4")


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_models_that_have_no_plan_or_keep_attention_whole_are_refused(kind: str, tmp_path: Path) -> None:
    register()
    if kind == "gpt2":
        config = AutoConfig.for_model(kind, n_embd=64, n_head=4, n_layer=2, vocab_size=96)
    else:
        config = AutoConfig.from_pretrained(write_config(tmp_path, kind, pad_token_id=0, head_dim=16))
    model = build_dummy(config, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(KvqError, match="does not run with --tp"):
        find_shards(model, model_geometry(config), Ranks(0, 2))


def test_an_engine_has_the_ranks_of_its_model(tmp_path: Path) -> None:
    model = load_model(write_config(tmp_path), load_format="dummy", device="cpu", need_tokenizer=False)
    with pytest.raises(UsageError, match="loaded with tp=1"):
        Engine(model, EngineConfig(tp=2))
