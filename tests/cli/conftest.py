"""Running the command line inside the test process, where that is enough."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

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
