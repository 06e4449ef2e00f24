"""Help pages: there for every command, quick, and complete; shell completion."""

import json
import os
import resource
import subprocess
import sys

import pytest
import typer

from kvq_cli.app import app

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
HEAVY = (
    "torch",
    "triton",
    "transformers",
    "pandas",
    "numpy",
    "datasets",
    "matplotlib",
    "httpx",
    "fastapi",
    "pydantic",
)


def kvq(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvq_cli.app", *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=60)


def test_every_command_is_there() -> None:
    assert {"run", "chat", "serve", "profile-throughput", "compare", "eval", "policies", "doctor"} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_page(command: str, cli) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert f"kvq {command}" in result.out
    assert not result.err
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    for parameter in parameters:
        assert getattr(parameter, "help", None), f"--{parameter.name} of {command} has no help"


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)], ids=["bare", "long", "short"])
def test_first_page(args: tuple[str, ...], cli) -> None:
    result = cli(*args)
    assert result.code == 0
    for command in COMMANDS:
        assert command in result.out


def test_help_is_quick() -> None:
    """Counted in processor time, which is the time on the clock where nothing else runs, as it may here."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert kvq("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert 0 < min(seconds) < 0.3, seconds


def test_commands_import_nothing_heavy() -> None:
    code = "import sys, json, kvq_cli.app; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert loaded.isdisjoint(HEAVY)


def test_version() -> None:
    done = kvq("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("kvq ")


@pytest.mark.parametrize(
    "flags", [("--policy", "--quant-policy"), ("--gpu-memory-utilization", "--cache-max-entry-count")]
)
@pytest.mark.parametrize("command", ["run", "chat", "serve", "profile-throughput"])
def test_aliases(command: str, flags: tuple[str, str]) -> None:
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert any(set(flags) <= set(parameter.opts) for parameter in parameters)


def test_no_colour_where_none_is_wanted() -> None:
    assert "\x1b" not in kvq("--help", NO_COLOR="1").stdout
    assert "\x1b" not in kvq("run", "-p", "43", "hi", NO_COLOR="1").stderr


@pytest.mark.parametrize(
    ("shell", "sign"), [("bash", "complete "), ("zsh", "#compdef kvq"), ("fish", "complete ")]
)
def test_completion_script(shell: str, sign: str) -> None:
    # Which shell runs is told from the parent process, which is no shell here.
    done = kvq(_KVQ_COMPLETE=f"source_{shell}")
    assert done.returncode == 0
    assert sign in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("kvq ", ["run", "chat", "compare"]),
        ("kvq pol", ["policies"]),
        ("kvq run --pol", ["--policy"]),
        ("kvq run --policy 4", ["4", "42"]),
        ("kvq run --model q", ["qwen3-30b-a3b", "qwen3-8b"]),
    ],
)
def test_completion(words: str, expected: list[str]) -> None:
    done = kvq(_KVQ_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1))
    offered = done.stdout.split()
    assert set(expected) <= set(offered)
