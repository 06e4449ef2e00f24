"""The kernel benchmark as a command: its record, its views, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "bench_kernels"
TINY = [
    "--device", "cpu", "--shapes", "2x70:4/2:64", "--heads", "4/2", "--head-dim", "64", "--codecs", "0,42",
    "--store-tokens", "16", "--prefills", "16+0,16+70",
]  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, cwd=ROOT)


def test_record_table_and_picture(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    done = run(*TINY, "--output", str(path))
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert record["copy_gb_s"] > 0 and record["env"]["versions"]["torch"]
    assert {r["op"] for r in record["rows"]} == {"decode", "store", "prefill"}
    decode = {r["codec"]: r for r in record["rows"] if r["op"] == "decode"}
    assert set(decode) == {"0", "42", "torch"}
    wanted = {
        "batch",
        "context",
        "q_heads",
        "kv_heads",
        "head_dim",
        "time_us",
        "bytes",
        "gb_s",
        "copy_fraction",
    }
    assert wanted | {"copy_fraction", "ratio_to_bf16", "rel_error"} <= set(decode["42"])
    assert decode["42"]["bytes"] == 2 * 70 * 2 * (32 + 16 + 6)  # codes of K and V, 3 fp16 numbers
    assert decode["0"]["ratio_to_bf16"] == 1
    assert "| 42 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 5000

    path.with_suffix(".md").unlink()
    assert run("--render", str(path)).returncode == 0
    assert path.with_suffix(".md").exists()


def test_appending_keeps_other_rows(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    first = [*TINY, "--ops", "store", "--output", str(path)]
    assert run(*first).returncode == 0
    assert run(*TINY, "--ops", "prefill", "--output", str(path), "--append").returncode == 0
    assert {r["op"] for r in json.loads(path.read_text())["rows"]} == {"store", "prefill"}


def test_several_processes_compile_and_one_measures(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    done = run(*TINY, "--jobs", "2", "--output", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 10 and all(r["time_us"] > 0 for r in rows)


def test_a_kernel_that_fails_its_check_gets_no_speed() -> None:
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader

    loader = SourceFileLoader("bench_kernels", str(SCRIPT))
    spec = spec_from_loader("bench_kernels", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["bench_kernels"] = module
    loader.exec_module(module)

    def measure() -> float:
        raise AssertionError("measured a wrong kernel")

    result = module.judged({"bytes": 1000}, 0.5, 0.1, measure)
    assert result["passed"] is False and result["time_us"] is None and result["gb_s"] is None
    assert module.judged({"bytes": 1000}, 0.1, 0.1, lambda: 2.0)["time_us"] == 2.0


def test_no_gpu_is_said() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run()
    assert done.returncode == 1 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr
