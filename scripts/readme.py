#!/usr/bin/env python3
"""Fill the generated parts of README.md from the code and from results/.

`--check` only says whether they are current. A part lies between `<!-- generated: NAME -->` and
`<!-- /generated -->`. Pages of docs/ have such parts, too: scripts/docs.py fills them by the functions below.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kvq_core.bench.compare import Comparison, compare_records
from kvq_core.bench.metrics import DEFINITIONS
from kvq_core.bench.record import read_records
from kvq_core.bench.report import markdown, number
from kvq_core.codecs import get_codec
from kvq_core.policies import CODEC_NAMES, REGISTRY

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
QUALITY = RESULTS / "quality" / "wikitext2_test_1024.json"
HEAD_DIM = 128
HEADLINE = {"none": "unquantized", "int8": "8 `int8`", "int4": "4 `int4`", "turbo": "42 `turbo`"}
"""Policies of the headline table, and their headings."""
WINDOW = "turbo+s4r128"
"""The policy of the headline's last row."""
PART = re.compile(r"(<!-- generated: (\S+) -->\n)(.*?)(<!-- /generated -->)", re.DOTALL)


def table(header: list[str], rows: list[list[str]], rule: list[str] | None = None) -> str:
    """A Markdown table; `rule` aligns the columns, to the left where there is none."""
    lines = [header, rule or ["---"] * len(header), *rows]
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


def comparisons() -> Iterator[tuple[str, Comparison]]:
    """The name of each file of run records in results/, and its records side by side."""
    for file in sorted(RESULTS.glob("*.json")):
        if is_run_record(json.loads(file.read_text("utf-8"))):
            yield file.stem, compare_records(read_records([file]))


def results() -> str:
    """A heading and a table for each file of run records in results/."""
    text = ""
    for name, comparison in comparisons():
        env = comparison.records[0].env
        text += f"**{name}** (commit {str(env.get('git_sha'))[:10]}): `{env['command']}`\n\n"
        text += markdown(comparison) + "\n\n"
    return text and f"\n{text}"


def headline() -> str:
    """Capacity, speed and quality of the best known policies, from records in results/ that have them all."""
    complete = (c for _, c in comparisons() if {record.label for record in c.records} >= set(HEADLINE))
    runs = sorted(complete, key=lambda c: -max(gains(c).values()))
    first = {record.label: record for record in runs[0].records}
    rows = [
        ["tokens that fit in the same memory", *(f"x{first[n].kv['capacity_ratio']:.2f}" for n in HEADLINE)]
    ]
    for comparison in runs:
        base, found = comparison.records[0], gains(comparison)
        assert base.label == "none"
        speeds = [number(base.get("output_throughput")), *(f"{found[n]:+.1%}" for n in list(HEADLINE)[1:])]
        rows.append([f"output tok/s, {workload(comparison)}", *speeds])
    quality = read_records([QUALITY])
    kl = {record.label: f"{record.metrics['kl']:.4f}" for record in quality}
    rows.append([f"KL divergence, {quality[0].model['name']} model", *(kl[name] for name in HEADLINE)])
    rows.append(["… with 4 first and 128 last tokens unquantized", "", "", "", kl[WINDOW]])
    gpus = {record.env["gpu"] for comparison in runs for record in comparison.records}
    assert len(gpus) == 1
    header = [f"one {gpus.pop()}", *HEADLINE.values()]
    return table(header, rows, ["---", *["---:"] * len(HEADLINE)])


def gains(comparison: Comparison) -> dict[str, float]:
    """Policy -> change of its output throughput against the unquantized cache; 0.05 is 5% more."""
    changes = {r.label: comparison.change(i, "output_throughput") for i, r in enumerate(comparison.records)}
    return {label: change - 1 for label, change in changes.items() if change is not None}


def workload(comparison: Comparison) -> str:
    """`llama-2-13b, 178 + 216 tokens, 256 at a time, 16 GiB`."""
    record = comparison.records[0]
    work = record.workload
    tokens = f"{work['mean_input_len']:,.0f} + {work['mean_output_len']:,.0f} tokens"
    memory = record.engine["kv_memory"] / 2**30
    return f"{record.model['name']}, {tokens}, {record.concurrency} at a time, {memory:.0f} GiB"


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
    "headline": headline,
    "architectures": architectures,
    "policies": policies,
    "codecs": codecs,
    "metrics": metrics,
    "results": results,
}


def render(text: str, more: Mapping[str, Callable[[], str]] | None = None) -> str:
    """A page's text with every generated part made anew; `more` are parts beside `PARTS`."""
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
