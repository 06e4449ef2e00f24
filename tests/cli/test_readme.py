"""README.md: its generated parts are current, and the commands it shows exist."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import typer

from kvq_cli.app import app
from kvq_core.policies import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    command
    for block in BLOCKS
    for command in block.replace("\\\n", " ").splitlines()
    if command.startswith("kvq ")
]


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts" / "readme.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current(readme: ModuleType) -> None:
    assert readme.render(README) == README, "run `python scripts/readme.py`"


def test_generated_parts_notice_a_change(readme: ModuleType) -> None:
    for policy in REGISTRY:
        assert f"`{policy.name}`" in readme.policies()
    assert "| 102 | 3.19 | 5.02 |" in README
    changed = README.replace("| 102 | 3.19 | 5.02 |", "| 101 | 3.19 | 5.02 |")
    assert readme.render(changed) == README


def test_the_first_screen_has_what_a_newcomer_needs() -> None:
    first = "\n".join(README.splitlines()[:40])
    for words in (
        "scripts/quickstart",
        "scripts/test",
        "kvq profile-throughput --policy 42 --concurrency 64",
    ):
        assert words in first


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_their_flags_exist(command: str) -> None:
    words = shlex.split(command, comments=True)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[1] in commands
    known = {flag for parameter in commands[words[1]].params for flag in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_every_command_is_listed() -> None:
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`kvq {name}`" in README
