"""Where words go: data on stdout, talk on stderr, progress on stderr and only on a terminal."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

from kvq_core.errors import KvqError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ONE_LINE_WIDTH = 140
"""From this width on headings take one line, and a change stands beside its value instead of under it."""
WORD, TEXT = 7, 3
"""Columns of a terminal that a word of a heading, and a column of text, get where it is narrow."""
RED, YELLOW, CYAN = "1;31", "1;33", "1;36"


def use_colour(stream: TextIO) -> bool:
    """Colour only on a terminal, and never where `NO_COLOR` is set or the terminal is dumb."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def _paint(text: str, code: str, stream: TextIO) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if use_colour(stream) else text


@cache
def out() -> "Console":
    """The console for data that is a table; text and JSON go through `emit` and `emit_json`."""
    from rich.console import Console

    piped = not sys.stdout.isatty()
    return Console(no_color=not use_colour(sys.stdout), highlight=False, width=200 if piped else None)


@cache
def err() -> "Console":
    """The console for talk."""
    from rich.console import Console

    return Console(stderr=True, no_color=not use_colour(sys.stderr), highlight=False)


def emit(text: str, end: str = "\n") -> None:
    """Data: exactly this text, at once, so that a stream of tokens is seen as it grows."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def emit_json(document: Any) -> None:
    """Data: the one JSON document of a `--json` run."""
    emit(json.dumps(document, indent=2, ensure_ascii=False))


def emit_table(title: str, columns: list[str], rows: list[list[str]], notes: tuple[str, ...] = ()) -> None:
    """Data: a table; columns of numbers are right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = all(_is_number(row[index]) for row in rows)
        width = column_width(column, (row[index] for row in rows)) if numeric or index == 0 else None
        table.add_column(column, justify="right" if numeric else "left", width=width, overflow="fold")
    for row in rows:
        table.add_row(*row)
    print_table(table)
    for note in notes:
        out().print(note, markup=False)
    sys.stdout.flush()


def column_width(heading: str, cells: Iterable[str]) -> int:
    """Columns of a terminal that whole cells take and, where it is narrow, a heading's words up to `WORD`."""
    from rich.cells import cell_len

    lines = [line for cell in cells for line in cell.split("\n")]
    wide = out().width >= ONE_LINE_WIDTH
    words = heading.split("\n") if wide else [word[:WORD] for word in heading.split()]
    return max(cell_len(text) for text in [*words, *lines])


def print_table(table: "Table") -> None:
    """Data: as wide as the terminal or, where that is not enough for columns with a `width`, wider."""
    from rich.measure import Measurement

    console = out()
    wide = console.options.update(width=1 << 16)
    least = Measurement.get(console, wide, table).minimum
    for column in table.columns:
        if column.width is None:  # text, whose words may be broken
            texts = (column.header, *column.cells)
            least -= max(Measurement.get(console, wide, text).minimum for text in texts) - TEXT
    if least > console.width:
        table.width = least
    console.print(table, crop=False)


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("+-")[:1].isdigit()


def say(text: str) -> None:
    """Talk: something worth knowing that is not part of the result."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Talk: something that may make the result less than what was asked for."""
    print(f"{_paint('warning:', YELLOW, sys.stderr)} {text}", file=sys.stderr, flush=True)


class TalkHandler(logging.Handler):
    """Shows what the library logs under `kvq` as talk."""

    def emit(self, record: logging.LogRecord) -> None:
        (warn if record.levelno >= logging.WARNING else say)(record.getMessage())


def show_error(error: KvqError) -> None:
    """`error: what`, a blank line, `hint: how to mend it`."""
    print(f"{_paint('error:', RED, sys.stderr)} {error.message}", file=sys.stderr)
    if error.hint:
        print(f"\n{_paint('hint:', CYAN, sys.stderr)} {error.hint}", file=sys.stderr)
    sys.stderr.flush()


@contextmanager
def progress(label: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, or its label alone where stderr is no terminal.

    Yields `update(done=None, total=None, label=None)`: `done` is the count so far, not an increment.
    """
    if not sys.stderr.isatty():
        say(label)
        yield lambda done=None, total=None, label=None: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err(), transient=True) as bar:
        task = bar.add_task(label, total=total)

        def update(done: float | None = None, total: float | None = None, label: str | None = None) -> None:
            bar.update(task, completed=done, total=total, description=label)

        yield update
