"""scripts/reproduce: its commands are ones that kvq takes; and what scripts say of themselves."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import typer.main

from kvq_cli.app import app

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce"


def run(*names: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *names], cwd=cwd, env=os.environ | env, capture_output=True, text=True)


def test_commands_are_taken(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text("[[3, 4]]")
    done = run("reference", "prompts", "capacity", cwd=tmp_path, RUN="echo", PAIRS="pairs.json")
    assert done.returncode == 0, done.stderr
    command = typer.main.get_command(app)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["kvq", "compare"]] * 5
    models = []
    for _, name, *arguments in lines:
        context = command.make_context("kvq", [name, *arguments])
        _, subcommand, rest = command.resolve_command(context, [name, *arguments])  # type: ignore[attr-defined]
        assert subcommand is not None
        models.append(subcommand.make_context(name, rest, parent=context).params["model"])
    assert models == ["qwen3-30b-a3b"] * 2 + ["llama-2-7b", "llama-2-13b", "internlm2.5-7b"]


@pytest.mark.parametrize(
    ("names", "code", "said"), [((), 0, "PAIRS"), (("fast",), 2, "nothing is called fast")]
)
def test_says_what_is_wrong(names: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    done = run(*names, cwd=tmp_path)
    assert done.returncode == code and said in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["quickstart", "reproduce", "measure_tp", "slurm/submit_compare"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_what_a_script_says_at_its_top_and_does_nothing(name: str, flag: str, tmp_path: Path) -> None:
    script = SCRIPT.parent / name
    environment = os.environ | {"KVQ_VENV": str(tmp_path / "venv"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([script, flag], cwd=tmp_path, env=environment, capture_output=True, text=True)
    top = [line[2:] for line in script.read_text().splitlines()[1:] if line.startswith("# ")]
    assert done.returncode == 0 and done.stdout.splitlines()[0] == top[0] and not done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_file_of_lengths_is_named(tmp_path: Path) -> None:
    done = run("reference", cwd=tmp_path, RUN="echo")
    assert done.returncode == 1 and "there is no data/headline_pairs.json" in done.stderr and not done.stdout
