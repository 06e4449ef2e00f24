"""docs/: generated pages are current, links lead somewhere, and the commands shown exist."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import typer

from kvq_cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
SHOWN = [
    (page.name, command)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
    if command.strip().startswith("kvq ")
]


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs", ROOT / "scripts" / "docs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_current(docs: ModuleType) -> None:
    assert docs.stale() == [], "run `python scripts/docs.py`"


def test_a_page_has_every_flag_of_its_command(docs: ModuleType) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {page.stem for page in PAGES if page.parent.name == "commands"} == set(commands)
    for name, command in commands.items():
        page = (ROOT / "docs" / "commands" / f"{name}.md").read_text("utf-8")
        for parameter in command.params:
            assert (
                getattr(parameter, "hidden", False)
                or any(f"`{opt}" in page for opt in parameter.opts)
                or (parameter.param_type_name == "argument")
            ), parameter.name


def test_a_change_of_a_command_is_noticed(docs: ModuleType) -> None:
    command = typer.main.get_command(app).commands["compare"]  # type: ignore[attr-defined]
    before = docs.command_page("compare", command)
    option = next(parameter for parameter in command.params if parameter.name == "resume")
    old, option.opts = option.opts, ["--go-on"]
    try:
        assert docs.command_page("compare", command) != before
    finally:
        option.opts = old


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_commands_and_their_flags_exist(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[1] in commands
    known = {flag for parameter in commands[words[1]].params for flag in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known | {"--help"}
