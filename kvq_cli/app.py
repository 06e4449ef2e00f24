"""`kvq`: the commands, and the one place where errors become messages and exit codes."""

import errno
import io
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from typing import Annotated

import typer

from kvq_cli.commands.chat import chat
from kvq_cli.commands.compare import compare
from kvq_cli.commands.doctor import doctor
from kvq_cli.commands.eval import eval
from kvq_cli.commands.policies import policies
from kvq_cli.commands.profile_throughput import profile_throughput
from kvq_cli.commands.run import run
from kvq_cli.commands.serve import serve
from kvq_cli.console import TalkHandler, emit, show_error
from kvq_cli.load_options import spread_values
from kvq_cli.options import name_the_flag
from kvq_core.errors import INTERRUPTED, KvqError, UsageError
from kvq_core.host import is_out_of_memory

HELP = """Quantize the KV cache of a language model while it generates, and measure what that buys.

kvq compare --policies 0,8,4,42   replay conversations under each policy, side by side
kvq chat --policy 42              feel the difference
kvq policies                      what each policy costs in memory
"""

app = typer.Typer(
    name="kvq",
    help=HELP,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for panel, commands in {
    "Generate": (run, chat, serve),
    "Measure": (profile_throughput, compare, eval),
    "Look around": (policies, doctor),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from kvq_core.bench.env import kvq_version

        emit(f"kvq {kvq_version()}")
        raise typer.Exit


@app.callback()
def _kvq(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit.

    0; 1 for a user's mistake or a limit, 2 for a bad flag, 3 for a failed check, 130 for Ctrl-C or SIGTERM.
    """
    # Set before torch and transformers are imported. Advice to programmers is noise to users of a command.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Spinning at barriers makes a CPU run many times slower as soon as anything else wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    args = sys.argv[1:] if args is None else args
    _open_closed_streams()
    _follow_under_torchrun(args)
    if threading.current_thread() is threading.main_thread():
        # A job that is cancelled, or out of time, keeps what it measured, as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    logger = logging.getLogger("kvq")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, TalkHandler) for handler in logger.handlers):
        logger.addHandler(TalkHandler())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a narrow locale shows `?` and does not end the run
    sys.exit(_run(args))


def _open_closed_streams() -> None:
    """`kvq … >&-` and a daemon's closed streams: nothing is read, and nobody listens."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _follow_under_torchrun(args: list[str]) -> None:
    """torchrun starts every rank with the same command line: rank 0 goes on, the others follow it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    if not any(arg == "--tp" or arg.startswith("--tp=") for arg in args):
        size = os.environ["WORLD_SIZE"]
        show_error(UsageError(f"torchrun started {size} ranks, and there is no --tp", f"give --tp {size}"))
        sys.exit(UsageError.exit_code)
    if os.environ["RANK"] != "0":
        from kvq_core.parallel.follow import main as follow

        follow()


def _run(args: list[str]) -> int:
    try:
        code = app(args=spread_values(args) or ["--help"], prog_name="kvq", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`kvq policies | head -1`); nobody is left to tell, at exit included.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as exception:
        error = as_kvq_error(exception, f"kvq {args[0]}" if args else "kvq")
        if os.environ.get("KVQ_DEBUG"):
            traceback.print_exc()
        show_error(error)
        return error.exit_code


def as_kvq_error(exception: Exception, command: str = "kvq") -> KvqError:
    """The message, hint and exit code for any exception that reached the command line."""
    if isinstance(exception, UsageError):
        return name_the_flag(exception, command)
    if isinstance(exception, KvqError):
        return exception
    if hasattr(exception, "format_message"):
        # Typer's own complaint about a flag; duck-typed, because only since 0.26 Typer carries its own click.
        where = getattr(getattr(exception, "ctx", None), "command_path", "kvq")
        return UsageError(exception.format_message(), f"`{where} --help` shows every option")
    if isinstance(exception, OSError) and exception.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        where = f" {exception.filename}" if exception.filename else ""
        return KvqError(f"cannot write{where}: {exception.strerror}", "free some space, or write elsewhere")
    if is_out_of_memory(exception):
        return KvqError(
            "out of memory" + (f": {str(exception).splitlines()[0]}" if str(exception) else ""),
            "a smaller --kv-memory, --gpu-memory-utilization, --max-num-seqs or --prefill-chunk",
        )
    with tempfile.NamedTemporaryFile("w", prefix="kvq-traceback-", suffix=".txt", delete=False) as file:
        traceback.print_exception(exception, file=file)
    return KvqError(
        f"unexpected {type(exception).__name__}: {exception}",
        f"this is a fault of kvq; the traceback is in {file.name}, and `KVQ_DEBUG=1` prints it",
    )


if __name__ == "__main__":
    main()
