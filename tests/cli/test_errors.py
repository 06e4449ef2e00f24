"""The error boundary: message, hint and exit code whatever goes wrong; no traceback for users' mistakes."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvq_cli.app import as_kvq_error
from kvq_core.errors import CheckFailed, KvqError, UsageError

RAISE = """
import sys
from kvq_cli import app
def boom():
    raise {expression}
app.app.command()(boom)
app.main(["boom"])
"""


def run_raising(expression: str, **env: str) -> subprocess.CompletedProcess[str]:
    code = "from kvq_core.errors import *\n" + RAISE.format(expression=expression)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, timeout=60
    )


@pytest.mark.parametrize(
    ("expression", "code"),
    [
        ("KvqError('what', 'how')", 1),
        ("UsageError('what', 'how')", 2),
        ("CheckFailed('what', 'how')", 3),
        ("KeyboardInterrupt", 130),
        ("SystemExit(7)", 7),
        ("BrokenPipeError", 1),
    ],
)
def test_exit_codes(expression: str, code: int) -> None:
    done = run_raising(expression)
    assert done.returncode == code
    assert done.stdout == ""
    expected = "error: what\n\nhint: how\n" if "what" in expression else ""
    assert done.stderr == expected


def test_debug_shows_the_traceback_too() -> None:
    done = run_raising("KvqError('what', 'how')", KVQ_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("error: what\n\nhint: how\n")


def test_a_fault_of_ours_is_short_and_keeps_its_traceback(tmp_path: Path) -> None:
    done = run_raising("ZeroDivisionError('by zero')", TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: unexpected ZeroDivisionError: by zero\n\nhint: ")
    assert "Traceback" not in done.stderr
    (kept,) = tmp_path.iterdir()
    assert "ZeroDivisionError: by zero" in kept.read_text()
    assert str(kept) in done.stderr


@pytest.mark.parametrize(
    ("exception", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write: No space left on device"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.json"),
            "cannot write a.json: No space left on device",
        ),
        (MemoryError(), "out of memory"),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried\nmore"),
            "out of memory: CUDA out",
        ),
    ],
    ids=["disk", "disk-file", "host", "gpu"],
)
def test_limits_of_the_machine(exception: Exception, message: str) -> None:
    error = as_kvq_error(exception)
    assert error.exit_code == 1
    assert error.message.startswith(message)
    assert error.hint


@pytest.mark.parametrize("error", [KvqError("a"), UsageError("a", "b"), CheckFailed("a")])
def test_our_own_errors_pass_unchanged(error: KvqError) -> None:
    same = as_kvq_error(error)
    assert (type(same), same.message, same.hint) == (type(error), error.message, error.hint)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a Linux device")
def test_full_disk_behind_stdout() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvq_cli.app", "policies", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write: No space left on device\n\nhint: ")
    assert "Traceback" not in done.stderr


def test_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kvq_cli.app", "policies"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    stderr = process.stderr.read()
    process.wait(timeout=60)
    assert stderr == b""
    assert process.returncode == 1


@pytest.mark.parametrize("closed", ["<", ">", "2>"])
def test_streams_that_are_closed(closed: str) -> None:
    kvq = f"exec {sys.executable} -m kvq_cli.app"
    ended = subprocess.run(["sh", "-c", f"{kvq} policies {closed}&-"], capture_output=True, timeout=60)
    assert ended.returncode == 0 and ended.stderr == b"" and (ended.stdout == b"") is (closed == ">")
    failed = subprocess.run(["sh", "-c", f"{kvq} run {closed}&-"], input=b"", capture_output=True, timeout=60)
    assert failed.returncode == 2 and failed.stdout == b""
    assert (b"error: the prompt is empty" in failed.stderr) is (closed != "2>")


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_interrupt_while_loading(sent: str) -> None:
    code = "import os, signal\n" + RAISE.format(
        expression=f"os.kill(os.getpid(), signal.{sent}) or SystemError"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["run", "--nonsense", "hi"], 2, "No such option: --nonsense"),
        (["run", "hi", "there"], 2, "unexpected extra argument"),
        (["run", "hi", "--policy"], 2, "requires an argument"),
        (["run", "hi", "--policy", "43"], 1, "unknown policy '43'"),
        (["run", "hi", "--policy", "int8:int5"], 1, "unknown policy 'int8:int5'"),
        (["run", "hi", "--quant-policy", ""], 1, "unknown policy ''"),
        (["run", "hi", "--sink", "-1"], 2, "'--sink'"),
        (["run", "hi", "--recent", "x"], 2, "'--recent'"),
        (["run", "hi", "--kv-memory", "8XB"], 2, "`8XB` is not an amount of memory"),
        (["run", "hi", "--kv-memory", "0GiB"], 2, "`0GiB` is no memory at all"),
        (["run", "hi", "--gpu-memory-utilization", "1.5"], 2, "--gpu-memory-utilization must lie in (0, 1]"),
        (["run", "hi", "--cache-max-entry-count", "0"], 2, "--gpu-memory-utilization must lie in (0, 1]"),
        (["run", "hi", "--page-size", "17"], 2, "--page-size must be a multiple of 16"),
        (["run", "hi", "--page-size", "0"], 2, "'--page-size'"),
        (["run", "hi", "--max-num-seqs", "0"], 2, "'--max-num-seqs'"),
        (["run", "hi", "--prefill-chunk", "0"], 2, "'--prefill-chunk'"),
        (["run", "hi", "--max-model-len", "0"], 2, "'--max-model-len'"),
        (["run", "hi", "--dtype", "int4"], 2, "unknown dtype `int4`"),
        (["run", "hi", "--device", "tpu"], 2, "unknown device `tpu`"),
        (["run", "hi", "--load-format", "gguf"], 2, "--load-format must be auto or dummy, got gguf"),
        (["run", "hi", "--max-new-tokens", "0"], 2, "'--max-new-tokens'"),
        (["run", "hi", "--temperature", "-1"], 2, "'--temperature'"),
        (["run", "hi", "--top-p", "0"], 2, "--top-p must lie in (0, 1]"),
        (["run", "hi", "--top-k", "-1"], 2, "'--top-k'"),
        (["run", ""], 2, "the prompt is empty"),
        (["run", "--prompt", "a", "--prompt", "  "], 2, "the prompt is empty"),
        (["run", "--file", "missing.txt"], 1, "cannot read missing.txt: No such file or directory"),
        (["run", "--file", "/"], 1, "cannot read /: Is a directory"),
        (["chat", "--policy", "nope"], 1, "unknown policy 'nope'"),
        (["run", "hi", "--device", "cuda"], 1, "torch finds no GPU"),
        (["run", "hi", "--model", "no/such-model"], 1, "no/such-model"),
        (["run", "hi", "--model", "./missing"], 1, "there is no model at './missing'"),
        (["run", "hi", "--model", "missing.gguf"], 1, "there is no model at 'missing.gguf'"),
        (["policies", "nope"], 1, "unknown policy 'nope'"),
        (["policies", "--head-dim", "0"], 2, "'--head-dim'"),
        (["policies", "--kv-memory", "much"], 2, "`much` is not an amount of memory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(args: list[str], code: int, message: str, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = cli(*args)
    refused(result, code, message)


def refused(result, code: int, message: str) -> None:
    """One clear error with a hint, and nothing else."""
    assert result.code == code
    assert result.err.count("error: ") == 1
    assert message in result.err
    assert "Traceback" not in result.err
    assert "unexpected" not in result.err or "unexpected extra" in result.err
    assert "\nhint: " in result.err
    assert result.out == ""


TINY = {
    "model_type": "llama",
    "hidden_size": 352,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}


@pytest.fixture
def folder(tmp_path: Path):
    """Makes a folder with nothing in it but a config."""

    def make(**config: object) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    "command", [("run", "hi", "--load-format", "dummy"), ("policies",)], ids=["run", "policies"]
)
def test_unsupported_architecture(command: tuple[str, ...], cli, folder) -> None:
    refused(
        cli(*command, "--model", folder(model_type="mamba")), 1, "(model type 'mamba') is not supported: "
    )


def test_head_dim_that_a_codec_cannot_take(cli, folder) -> None:
    result = cli("run", "hi", "--load-format", "dummy", "--policy", "42", "--model", folder(**TINY))
    refused(result, 1, "needs a head dim that is a multiple of 16 with a Hadamard matrix")


def test_model_without_a_tokenizer(cli, folder) -> None:
    result = cli("run", "hi", "--load-format", "dummy", "--model", folder(**TINY))
    refused(result, 1, "has no tokenizer")


def test_folder_without_a_model(cli, tmp_path: Path) -> None:
    refused(cli("run", "hi", "--model", str(tmp_path)), 1, "it has no config.json")


def test_broken_gguf(cli, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    refused(cli("run", "hi", "--model", str(tmp_path / "x.gguf")), 1, "not a GGUF file")


@pytest.mark.demo
@pytest.mark.parametrize(
    ("words", "flags", "code", "message"),
    [
        (9000, [], 1, "is too long: demo takes 8192 tokens"),
        (600, ["--kv-memory", "20MiB", "--max-num-seqs", "1"], 1, "is too long: the KV cache holds "),
        (1, ["--kv-memory", "1KiB"], 1, "hold no request"),
        (1, ["--kv-memory", "900TiB"], 1, "the KV cache needs 921600.00 GiB"),
        (1, ["--max-model-len", "100000"], 2, "--max-model-len 100000 is more than the 8192"),
        (100, ["--max-model-len", "64"], 1, "is too long: demo takes 64 tokens"),
    ],
    ids=["model", "cache", "no-page", "more-than-there-is", "limit-too-high", "limit"],
)
def test_limits_of_model_and_cache(words: int, flags: list[str], code: int, message: str, cli) -> None:
    refused(cli("run", "word " * words, "--raw", "-n", "2", *flags), code, message)
