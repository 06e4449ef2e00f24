"""scripts/quality: a grid of evaluations, and the table and picture made of their records."""

import json
import re
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvq_core.policies import parse_policies

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "quality"
KL = {"none": 0.0, "int8": 0.0003, "turbo": 0.14, "turbo+s4r128": 0.01, "42-rms": 0.23}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with results/ in a folder of its own."""
    spec = spec_from_loader("quality_script", SourceFileLoader("quality_script", str(SCRIPT)))
    assert spec and spec.loader
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quality_script", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "results" / "quality")
    module.FOLDER.mkdir(parents=True)
    return module


def record(label: str, text: str, context: int, kl: float) -> dict[str, Any]:
    return {
        "schema_version": 1, "complete": True, "label": label, "policy": {"name": label},
        "model": {"name": "tiny", "dtype": "float32"}, "env": {"versions": {"torch": "2"}},
        "workload": {"name": text, "sha256": "ab" * 32, "context_len": context, "windows": 2},
        "kv": {}, "duration": 1.0, "completed": 2, "failed": 0, "ppl": 20 * (1 + kl), "reference_ppl": 20.0,
        "kl": kl, "kl_median": kl / 2, "kl_p99": kl * 9, "top1": 0.9, "bits_per_element": 3.375,
    }  # fmt: skip


def write(script: ModuleType, text: str, context: int, factor: float = 1.0) -> None:
    rows = [record(label, text, context, kl * factor) for label, kl in KL.items()]
    (script.FOLDER / f"{text}_{context}.json").write_text(json.dumps(rows))


def test_table_and_picture_come_from_the_records(script: ModuleType, tmp_path: Path) -> None:
    for context in (512, 1024, 8192):
        write(script, "a.txt", context)
    write(script, "b.txt", 1024, factor=2)
    task = record("turbo", "lambada", 1024, 0.0) | {"lambada_acc": 0.25, "lambada_acc_stderr": 0.05}
    for name in ("ppl", "kl", "top1"):
        del task[name]
    task["workload"] |= {
        "kind": "tasks",
        "samples": {"lambada": 9},
        "scores": ["lambada_acc", "lambada_acc_stderr"],
    }
    task["policy"] |= {"key": "turbo", "value": "lm2"}
    (script.FOLDER / "tasks.json").write_text(json.dumps(task))
    script.render()
    table = (tmp_path / "results" / "quality.md").read_text()
    assert re.search(r"\| `turbo` \| 0.1400 \| 0.1400 \| 0.1400 \| 0.2800 \|", table)
    assert "| `42-rms` | 3.38 | 24.600 | +23.00% | 0.23000 | 0.11500 | 2.0700 | 90.00% |" in table
    assert "ab" * 32 in table
    assert "The first 9 of lambada." in table and "| `turbo` | 0.2500 ±0.0500 |" in table
    picture = tmp_path / "results" / "quality.svg"
    first = picture.read_bytes()
    write(script, "b.txt", 1024, factor=3)
    script.render()
    assert picture.read_bytes() != first, "another figure, another picture"
    write(script, "b.txt", 1024, factor=2)
    script.render()
    assert picture.read_bytes() == first, "the same records, the same picture"


def test_cells_with_a_record_are_not_measured_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def run(command: list[Any], check: bool) -> None:
        calls.append([str(part) for part in command])
        output = Path(calls[-1][calls[-1].index("--output") + 1])
        write(script, "a.txt", int(output.stem.split("_")[1]))
        (script.FOLDER / f"a.txt_{output.stem.split('_')[1]}.json").rename(output)

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["quality", str(tmp_path / "a.txt"), "--context-lens", "512,1024"])
    assert script.main() == 0 and script.main() == 0
    assert [call[call.index("--context-len") + 1] for call in calls] == ["512", "1024"]
    assert [call[call.index("--limit") + 1] for call in calls] == ["8", "4"]


def test_its_policies_exist(script: ModuleType) -> None:
    labels = [policy.label for policy in parse_policies(script.POLICIES)]
    assert {"none", "turbo", "turbo+s4r32", "turbo+s4r64", "turbo+s4r128", "k8v4"} <= set(labels)
