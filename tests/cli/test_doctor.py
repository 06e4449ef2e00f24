"""`kvq doctor`: what it finds on this machine, and what it would say of others."""

import json
import platform
import re
import tomllib
from pathlib import Path

import pytest

from kvq_cli.commands import doctor as module
from kvq_cli.commands.doctor import MINIMUM, Finding, gpu_advice


def test_findings(cli, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("KVQ_CACHE", str(tmp_path))
    result = cli("doctor", "--json")
    assert result.code == 0, result.out + result.err
    document = json.loads(result.out)
    assert document["ok"] is True
    found = {finding["what"]: finding for finding in document["findings"]}
    assert {"kvq", "python", "torch", "transformers", "kernels", "hadamard", "host memory"} <= set(found)
    assert found["python"]["value"].startswith(platform.python_version())
    assert found["demo model"]["status"] == "note"
    assert str(tmp_path) in found["demo model"]["value"]
    assert any(what.startswith("gpu") for what in found)


def test_minimum_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    asked = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(project["dependencies"]), re.MULTILINE))
    assert {name: ".".join(map(str, least)) for name, least in MINIMUM.items()}.items() <= asked.items()


def test_text_says_the_same(cli) -> None:
    document = json.loads(cli("doctor", "--json").out)
    text = cli("doctor").out
    for finding in document["findings"]:
        assert finding["what"] in text
        assert finding["hint"] in text


def test_cached_demo_model(cli, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from kvq_core.demo import FOLDER

    monkeypatch.setenv("KVQ_CACHE", str(tmp_path))
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "config.json").write_text("{}")
    assert f"cached in {tmp_path}" in cli("doctor").out


def test_an_old_package_is_a_problem(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "version", lambda name: "5.16.2" if name == "transformers" else "99.1.0.dev1+cu1"
    )
    result = cli("doctor")
    assert result.code == 3
    assert "! transformers   5.16.2" in result.out
    assert "pip install --upgrade 'transformers>=5.17'" in result.out
    assert result.err.startswith("error: not ready: transformers\n\nhint: ")


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_is_a_problem(package: str, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == package:
            raise module.PackageNotFoundError(name)
        return "99.0"

    monkeypatch.setattr(module, "version", version)
    result = cli("doctor", "--json")
    assert result.code == 3
    document = json.loads(result.out)
    assert document["ok"] is False
    assert [f["what"] for f in document["findings"] if f["status"] == "problem"] == [package]


@pytest.mark.parametrize(
    ("capability", "cuda", "status", "hint"),
    [
        ((6, 1), "12.8", "problem", "sm_70"),
        ((7, 0), "13.0", "problem", "CUDA 12"),
        ((7, 0), "12.8", "note", "float16"),
        ((7, 5), "13.0", "note", "float16"),
        ((8, 0), "13.0", "note", "fp8"),
        ((8, 6), "13.0", "note", "fp8"),
        ((8, 9), "13.0", "ok", ""),
        ((9, 0), "13.0", "ok", ""),
        ((10, 0), "13.0", "ok", ""),
    ],
)
def test_advice_for_gpus(capability: tuple[int, int], cuda: str, status: str, hint: str) -> None:
    found = gpu_advice(capability, cuda)
    assert found[0] == status
    assert hint in found[1]


@pytest.mark.parametrize(
    ("name", "cuda", "status", "words"),
    [
        (None, None, "note", "none"),
        ("H100", None, "problem", "CPU build"),
        ("H100", "13.0", "problem", "driver 1"),
    ],
    ids=["no-gpu", "cpu-torch", "old-driver"],
)
def test_gpu_that_torch_cannot_use(
    name: str | None, cuda: str | None, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvq_core.bench import env

    monkeypatch.setattr(env, "gpu_state", lambda device: (name, "1" if name else None))
    finding: Finding = module._no_gpu(cuda)
    assert finding.status == status
    assert words in finding.value + finding.hint
