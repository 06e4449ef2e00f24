#!/usr/bin/env python3
"""Fills the generated parts of README.md from the code and from results/; `--check` only says if it is.

A part lies between `<!-- generated: NAME -->` and `<!-- /generated -->`.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvq_core.bench.compare import compare_records
from kvq_core.bench.metrics import DEFINITIONS
from kvq_core.bench.record import read_records
from kvq_core.bench.report import markdown
from kvq_core.codecs import get_codec
from kvq_core.policies import CODEC_NAMES, REGISTRY

ROOT = Path(__file__).resolve().parent.parent
HEAD_DIM = 128
PART = re.compile(r"(<!-- generated: (\S+) -->\n)(.*?)(<!-- /generated -->)", re.DOTALL)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def policies() -> str:
    rows = []
    for policy in REGISTRY:
        size = sum(get_codec(name).bytes_per_vector(HEAD_DIM) for name in (policy.key, policy.value))
        number = "" if policy.number is None else str(policy.number)
        sizes = [str(size), f"{4 * size / HEAD_DIM:.2f}", f"{4 * HEAD_DIM / size:.2f}"]
        rows.append([number, f"`{policy.name}`", policy.key, policy.value, *sizes, policy.summary])
    return table(["number", "name", "K", "V", "bytes", "bits", "ratio to 2 bytes", "what it is"], rows)


def codecs() -> str:
    rows = []
    for name in CODEC_NAMES:
        codec = get_codec(name)
        size = codec.bytes_per_vector(HEAD_DIM)
        rows.append([f"`{name}`", str(size), f"{8 * size / HEAD_DIM:.2f}", "yes" if codec.rotated else ""])
    return table(["codec", "bytes a vector", "bits", "rotated"], rows)


def metrics() -> str:
    return table(["figure", "what it means"], [[name, meaning] for name, meaning in DEFINITIONS.items()])


def results() -> str:
    """A heading and a table for each file of run records in results/."""
    text = ""
    for file in sorted((ROOT / "results").glob("*.json")):
        if is_run_record(json.loads(file.read_text("utf-8"))):
            records = read_records([file])
            env = records[0].env
            text += f"**{file.stem}** (commit {str(env.get('git_sha'))[:10]}): `{env['command']}`\n\n"
            text += markdown(compare_records(records)) + "\n\n"
    return text and f"\n{text}"


def architectures() -> str:
    """Model types that tests compare with transformers, read from the test's source."""
    tree = ast.parse((ROOT / "tests" / "core" / "test_architectures.py").read_text("utf-8"))
    names = {
        call.args[0].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Tiny"
        if call.args and isinstance(call.args[0], ast.Constant)
    }
    return f"{len(names)} model types: " + ", ".join(f"`{name}`" for name in sorted(names)) + ".\n"


def is_run_record(document: Any) -> bool:
    """results/ also has the records of kernel benchmarks and of evaluations."""
    first = document[0] if isinstance(document, list) and document else document
    return isinstance(first, dict) and "request_throughput" in first


PARTS: dict[str, Callable[[], str]] = {
    "architectures": architectures,
    "policies": policies,
    "codecs": codecs,
    "metrics": metrics,
    "results": results,
}


def render(text: str, more: Mapping[str, Callable[[], str]] | None = None) -> str:
    """A page's text with every part made anew, those of the README and `more`."""
    parts = PARTS | dict(more or {})
    return PART.sub(lambda part: part[1] + parts[part[2]]() + part[4], text)


def main() -> int:
    file = ROOT / "README.md"
    before = file.read_text("utf-8")
    after = render(before)
    if before == after:
        return 0
    if "--check" in sys.argv[1:]:
        print("error: README.md is not current\n\nhint: `python scripts/readme.py`", file=sys.stderr)
        return 3
    file.write_text(after, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
