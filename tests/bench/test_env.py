"""What a record says of where it was made."""

import os
import subprocess
import sys

import pytest

from kvq_core.bench import env


def test_fields():
    found = env.collect_env(seed=3, command=["kvq", "compare", "--policies", "0,42"])
    assert found["seed"] == 3 and found["command"] == "kvq compare --policies 0,42"
    assert found["gpu"] is None and found["driver"] is None and found["device"] == "cpu"
    assert found["versions"]["torch"] and found["versions"]["kvq"]
    assert found["date"].endswith("+00:00") and found["cpu_count"] >= 1


def test_commands_are_shown_without_paths():
    argv = [
        "/usr/bin/kvq",
        "compare",
        "--dataset-path",
        "/data/private/x.json",
        "--output=/tmp/o.json",
        "-c",
        "4",
    ]
    assert env.command_line(argv) == "kvq compare --dataset-path x.json --output=o.json -c 4"
    assert env.command_line(["/opt/kvq/scripts/soak", "--clients", "2"]) == "scripts/soak --clients 2"
    assert (
        env.command_line(["kvq", "compare", "my file.json", "a/b.json"])
        == "kvq compare 'my file.json' a/b.json"
    )


def test_commit_is_that_of_kvqs_own_checkout(tmp_path, monkeypatch):
    assert env._source_tree() == env._source_tree().resolve()
    monkeypatch.setattr(env, "_source_tree", lambda: tmp_path / "site-packages")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "site-packages").mkdir()
    assert env.git_state() == (None, None)  # the repository around a virtual environment
    own = tmp_path / "own"
    subprocess.run(["git", "init", "-q", str(own)], check=True)
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(own), *name, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(env, "_source_tree", lambda: own)
    sha, dirty = env.git_state()
    assert sha is not None and len(sha) == 40 and dirty is False


def test_gpu_by_nvidia_smi(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.1.2'\necho 'other, 1'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert env.gpu_state("cuda") == ("NVIDIA H100 80GB HBM3", "570.1.2")
    assert env.collect_env(seed=0, device="cuda:0")["gpu"] == "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("body", ["exit 9", "true"])
def test_a_broken_nvidia_smi_is_no_gpu(tmp_path, monkeypatch, body):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\n{body}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert env.gpu_state("cuda") == (None, None)


def test_the_harness_knows_no_torch():
    modules = ["workload", "sharegpt", "load", "metrics", "record", "report", "env", "run", "trace", "target"]
    imports = "; ".join(f"import kvq_core.bench.{name}" for name in modules)
    heavy = "[m for m in ('torch', 'transformers', 'pandas', 'numpy') if m in sys.modules]"
    code = f"import sys; {imports}; assert not {heavy}, {heavy}"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
