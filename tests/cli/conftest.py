"""Running the command line inside the test process, where that is enough."""

import importlib.util
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvq_cli.app import main
from kvq_cli.console import err, out


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("policies", "--json", stdin=b"...")` runs the command and returns exit code, stdout and stderr."""

    def run(*args: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        out.cache_clear()
        err.cache_clear()
        with pytest.raises(SystemExit) as exit:
            main(list(args))
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Result(exit.value.code, captured.out, captured.err)

    return run


FAKE_KVQ = Path(__file__).with_name("fake_kvq.py")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the pipeline by a fake one; the list of those that were made."""
    spec = importlib.util.spec_from_file_location("fake_kvq", FAKE_KVQ)
    assert spec and spec.loader
    fake_kvq = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake_kvq)
    monkeypatch.setitem(sys.modules, "kvq_core.pipeline", fake_kvq.module())
    return fake_kvq.PIPELINES
