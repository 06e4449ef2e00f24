"""README.md: its generated parts are current, links lead somewhere, and the commands it shows exist."""

import importlib.util
import json
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
    changed = README.replace("| x5.02 |", "| x6.02 |")
    assert changed != README and readme.render(changed) == README


def test_the_headline_is_that_of_the_records(readme: ModuleType) -> None:
    """By the definition of each figure, from the JSON itself."""
    records = json.loads((ROOT / "results" / "h200_llama-2-7b_16GiB_c256.json").read_text())
    speed = {record["policy"]["name"]: record["output_throughput"] for record in records}
    (line,) = (line for line in readme.headline().splitlines() if "llama-2-7b" in line)
    assert f"| {speed['none']:,.0f} | {speed['int8'] / speed['none'] - 1:+.1%} |" in line
    assert line.endswith(f"| {speed['turbo'] / speed['none'] - 1:+.1%} |")


def test_the_first_screen_has_what_a_newcomer_needs() -> None:
    first = "\n".join(README.splitlines()[:40])
    for words in (
        "<!-- generated: headline -->",
        "scripts/quickstart",
        "scripts/test",
        "kvq profile-throughput --policy 42 --concurrency 64",
    ):
        assert words in first


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert targets and all((ROOT / target).exists() for target in targets)


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
