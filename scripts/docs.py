#!/usr/bin/env python3
"""Write docs/: a page for each command from the command line itself, and the generated parts of other pages.

`--check` only says whether they are current. A generated part lies between `<!-- generated: NAME -->` and
`<!-- /generated -->`, as in README.md.
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent))

import typer

from kvq_cli.app import app
from kvq_core.bench.advice import Limits, advise, read_quality
from kvq_core.bench.compare import compare_records
from kvq_core.bench.record import read_records
from kvq_core.bench.report import markdown, number
from readme import render

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTE = "<!-- written by scripts/docs.py from the command line; change the command, not this page -->\n\n"
RECORDS = ROOT / "results" / "h200_qwen3-30b-a3b_headline640_c64.json"
SWEEP = ROOT / "results" / "sweeps" / "h200_qwen3-8b_sweep.json"
QUALITY = ROOT / "results" / "quality" / "wikitext2_test_1024.json"

CODE = re.compile(r"(\S+=\S+ |.*\| )?kvq ")
"""A line of an example: `kvq …`, with a variable before it, or with something piped into it."""
VALUES = {int: "INTEGER", float: "FLOAT", Path: "PATH"}
"""What stands for a value where a flag has no word of its own."""


def _infos(command: Any) -> dict[str, tuple[Any, Any]]:
    """Parameter -> (what was declared of it, its type), from the signature of the command's function."""
    (callback,) = (
        known.callback
        for known in app.registered_commands
        if known.callback and known.callback.__name__.replace("_", "-") == command.name
    )
    annotations = {name: p.annotation for name, p in inspect.signature(callback).parameters.items()}
    return {name: (kind.__metadata__[0], get_args(kind)[0]) for name, kind in annotations.items()}


def commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def command_page(name: str, command: Any) -> str:
    """`kvq NAME`: what its `--help` says, its examples as a block of code, a table of flags a panel."""
    text = inspect.cleandoc(command.help or "")
    blocks = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        is_code = all(CODE.match(line) for line in lines)
        is_list = len(lines) > 1 and all(": " in line for line in lines)
        blocks.append(
            "```bash\n" + block + "\n```"
            if is_code
            else "\n".join(f"- {line}" for line in lines)
            if is_list
            else block
        )
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(["kvq", name, "[OPTIONS]", *(p.metavar or p.name.upper() for p in arguments)])
    page = f"# kvq {name}\n\n{NOTE}```\n{usage}\n```\n\n" + "\n\n".join(blocks) + "\n"
    infos = _infos(command)
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if not getattr(parameter, "hidden", False):
            usual = "Arguments" if parameter in arguments else "Options"
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(parameter)
    for panel, parameters in panels.items():
        page += f"\n## {panel}\n\n| flag | default | what it does |\n| --- | --- | --- |\n"
        for parameter in parameters:
            info, kind = infos[parameter.name]
            cells = _names(parameter, info, kind), _default(parameter, info), _cell(info.help or "")
            page += f"| {' | '.join(cells)} |\n"
    return page


def _names(parameter: Any, info: Any, kind: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_cell(parameter.metavar or parameter.name.upper())}`"
    usual = next((word for type_, word in VALUES.items() if type_ in (kind, *get_args(kind))), "TEXT")
    takes = "" if parameter.is_flag else f" {info.metavar or usual}"
    return ", ".join(f"`{_cell(name + takes * (i == 0))}`" for i, name in enumerate(parameter.opts))


def _default(parameter: Any, info: Any) -> str:
    if isinstance(info.show_default, str):
        return _cell(info.show_default)
    if info.show_default is False or any(parameter.default is nothing for nothing in (None, "", False)):
        return ""
    return f"`{_cell(str(parameter.default))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def index() -> str:
    rows = [
        f"- [`kvq {name}`](commands/{name}.md): {_first(command)}" for name, command in commands().items()
    ]
    return "\n".join(rows) + "\n"


def _first(command: Any) -> str:
    return (
        inspect.cleandoc(command.help or "")
        .split("\n\n")[0]
        .replace("\n", " ")
        .partition(": ")[0]
        .rstrip(".")
        + "."
    )


def example() -> str:
    """The tables of the H200's records, and what `kvq compare` says of them with the demo model's quality."""
    records = read_records([RECORDS])
    quality = read_quality([QUALITY])
    comparison = compare_records(records)
    lines = advise(comparison, quality, Limits(max_kl=0.02))
    files = f"{RECORDS.relative_to(ROOT)} --quality {QUALITY.relative_to(ROOT)}"
    command = f"kvq compare {files} --max-kl 0.02 --markdown"
    tables = markdown(comparison, lines, quality.of)
    text = f"```bash\n{records[0].env['command']}\n{command}\n```\n\n{tables}\n\n"
    return text + reading(comparison)


def reading(comparison: Any) -> str:
    """What the figures of the example say, computed from them."""
    base, best = comparison.records[0], max(comparison.records, key=lambda r: r.get("output_throughput") or 0)
    roomy = max(comparison.records, key=lambda r: r.get("capacity_tokens") or 0)
    used = (base.get("peak_tokens") or 0) / (base.get("capacity_tokens") or 1)
    gain = (best.get("output_throughput") or 0) / (base.get("output_throughput") or 1) - 1
    length = base.workload["mean_input_len"] + base.workload["mean_output_len"]
    fit = [f"{number((r.get('capacity_tokens') or 0) // length)} under {r.name}" for r in (base, roomy)]
    return (
        "- **Everything fits.** The requests in flight held at most "
        f"{number(base.get('peak_tokens'))} tokens, {used:.1%} of what fits even unquantized. "
        "This is an equal batch: what differs is the speed of a step.\n"
        f"- **The gain is small here:** {best.name} gives {gain:+.1%} output tokens per second. "
        f"At {length:.0f} tokens a request the experts' weights, not the cache, are most of what a step "
        "reads.\n"
        f"- **Where it pays is room.** About {fit[0]} requests of this length fit, {fit[1]}. "
        "With more users than that, or longer requests, the others wait.\n"
        "- **The quality is another model's**, the demo model's, which is far smaller: measure yours with "
        "`kvq eval`.\n"
    )


def sweep() -> str:
    """The break-even table of the sweep's records, and where its page lies."""
    records = read_records([SWEEP])
    quality = read_quality([QUALITY])
    comparison = compare_records(records)
    lines = advise(comparison, quality, Limits(max_kl=0.02))
    page = SWEEP.with_suffix(".html").relative_to(ROOT)
    files = f"{SWEEP.relative_to(ROOT)} --quality {QUALITY.relative_to(ROOT)}"
    command = f"kvq compare {files} --max-kl 0.02 --markdown"
    text = f"```bash\n{records[0].env['command']}\n{command}\n```\n\n"
    text += f"Its page with charts: [`{page}`](../{page}).\n\n"
    return text + markdown(comparison, lines, quality.of) + "\n"


PARTS = {"commands": index, "h200-example": example, "h200-sweep": sweep}


def pages() -> dict[Path, str]:
    """Every page that is generated, wholly or in part, with its text."""
    made = {
        DOCS / "commands" / f"{name}.md": command_page(name, command) for name, command in commands().items()
    }
    for file in sorted(DOCS.glob("*.md")):
        made[file] = render(file.read_text("utf-8"), PARTS)
    return made


def stale() -> list[Path]:
    """Pages that differ from what they should be, and pages of commands that are gone."""
    made = pages()
    changed = [file for file, text in made.items() if not file.exists() or file.read_text("utf-8") != text]
    return changed + [file for file in (DOCS / "commands").glob("*.md") if file not in made]


def main() -> int:
    if "--check" in sys.argv[1:]:
        old = ", ".join(str(file.relative_to(ROOT)) for file in stale())
        if old:
            print(f"error: not current: {old}\n\nhint: `python scripts/docs.py`", file=sys.stderr)
        return 3 if old else 0
    made = pages()
    for file in stale():
        if file in made:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(made[file], "utf-8")
        else:
            file.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
