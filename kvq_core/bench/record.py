"""Run records: one JSON object a run, from which every table and picture is made."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvq_core.errors import KvqError, UsageError

SCHEMA_VERSION = 1
PARTS = ("policy", "model", "env", "engine", "workload", "kv", "quantiles", "timeline")
REQUIRED = (
    "label",
    "complete",
    "policy",
    "model",
    "env",
    "workload",
    "kv",
    "duration",
    "completed",
    "failed",
)
FIELDS: dict[type, tuple[str, ...]] = {
    str: (
        "note", "policy.name", "policy.key", "policy.value", "model.name", "model.dtype", "env.gpu",
        "env.driver", "env.git_sha", "workload.dataset", "workload.name",
    ),
    float: (
        "repeat", "part", "policy.sink", "policy.recent", "workload.concurrency", "workload.input_len",
        "workload.mean_input_len", "workload.mean_output_len", "workload.num_prompts",
        "workload.request_rate", "workload.burstiness", "workload.trace_speed", "workload.duration_limit_s",
        "workload.cancel_rate", "workload.prefix_len", "workload.num_prefixes", "kv.bits_per_element",
        "kv.bytes_per_token", "kv.capacity_tokens", "kv.capacity_ratio", "kv.peak_tokens",
        "kv.preemptions", "kv.prefix_hit_rate",
    ),
    list: ("policy.layers",),
    dict: ("errors", "env.versions", "workload.goodput", "kv.fidelity"),
}  # fmt: skip
"""What readers do more with than show it, by type; all may be missing, or null."""

_NUMBERS = re.compile(r"\[\n[-+.\deE,\s]+\]")
"""A list of numbers over many lines, which is written on one; no string of JSON holds a line break."""


def scheme_of(policy: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells policies of records apart, whatever they are called: codecs, sink, recent, layers."""
    window = policy.get("sink") or 0, policy.get("recent") or 0
    return policy.get("key"), policy.get("value"), *window, *(policy.get("layers") or ())


def without_folder(model: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` of a record: a folder or file is named by the last part of its path alone.

    So a record tells nothing of a disk, and every command calls the same model the same.
    """
    path = Path(str(model.get("name", ""))).expanduser()
    return dict(model) | ({"name": path.name} if path.is_absolute() or path.exists() else {})


@dataclass(frozen=True)
class RunRecord:
    """What one benchmark run measured, and under what conditions.

    `metrics` are the figures of `metrics.summarize`; they lie at the top level of the JSON object.
    """

    label: str
    complete: bool
    """False: interrupted, or the target broke; the figures cover what was measured until then."""
    policy: dict[str, Any]
    model: dict[str, Any]
    env: dict[str, Any]
    workload: dict[str, Any]
    kv: dict[str, Any]
    metrics: dict[str, float | int | None]
    engine: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    """Message -> number of requests that failed with it."""
    note: str | None = None
    """What a reader must know before using the figures."""
    generator_bound: bool = False
    """The load generator sent late, so that latencies contain its own delays."""
    repeat: int | None = None
    """Which of several runs of the same thing this is, from 1; None: the only one."""
    intervals: dict[str, float] = field(default_factory=dict)
    """For the mean of several runs, figure -> half its 95% interval. No run by itself has any."""

    quantiles: dict[str, list[float]] = field(default_factory=dict)
    """Latency -> its percentiles 0 to 100, ms."""
    timeline: dict[str, list[Any]] = field(default_factory=dict)
    """Columns of samples over the run, as `Timeline.describe` has them."""
    part: int | None = None
    """Which invocation measured it, from 2, where a sweep was resumed."""

    @property
    def name(self) -> str:
        """The label with LMDeploy's number in front, where the policy has one: `42 turbo`."""
        number = self.policy.get("number")
        return self.label if number is None or self.label == str(number) else f"{number} {self.label}"

    @property
    def concurrency(self) -> int | None:
        return self.workload.get("concurrency")

    @property
    def context(self) -> int | None:
        """Tokens of a prompt, where all were asked to have the same."""
        return self.workload.get("input_len")

    @property
    def scheme(self) -> tuple[Any, ...]:
        """`scheme_of` its policy."""
        return scheme_of(self.policy)

    @property
    def is_remote(self) -> bool:
        """Whether a server was measured; `env` then tells of the client alone."""
        return self.engine.get("backend") == "http"

    def is_called(self, name: str) -> bool:
        """Whether `name` is the label, or the policy's name or number."""
        known = (self.label, self.name, self.policy.get("name"), self.policy.get("number"))
        return name.lower() in {str(value).lower() for value in known if value is not None}

    def get(self, key: str) -> float | None:
        """A figure by its name, of the metrics or of `kv`."""
        return self.metrics.get(key, self.kv.get(key))

    def to_dict(self) -> dict[str, Any]:
        """The record as a JSON object."""
        document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "complete": self.complete,
            "label": self.label,
            "policy": self.policy,
            "model": self.model,
            "env": self.env,
            "engine": self.engine,
            "workload": self.workload,
            "kv": self.kv,
            # JSON has no NaN: the score of a broken model, say, is null.
            **{key: value if _is_figure(value) else None for key, value in self.metrics.items()},
            "errors": self.errors,
        }
        extra = {
            "note": self.note,
            "generator_bound": self.generator_bound,
            "repeat": self.repeat,
            "part": self.part,
            "quantiles": self.quantiles,
            "timeline": self.timeline,
        }
        return document | {key: value for key, value in extra.items() if value}

    @classmethod
    def from_dict(cls, document: Any, where: str) -> "RunRecord":
        """The inverse of `to_dict`; `KvqError` naming `where` for anything that is no run record."""
        if not isinstance(document, dict) or "schema_version" not in document:
            raise KvqError(
                f"{where} is not a run record",
                "give files written by `kvq profile-throughput --output` or `kvq compare --output`",
            )
        version = document["schema_version"]
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise KvqError(
                f"{where} has schema version {version}; this kvq knows up to {SCHEMA_VERSION}",
                "read it with the kvq that wrote it, or a newer one",
            )
        missing = [key for key in REQUIRED if key not in document]
        wrong = [key for key in PARTS if not isinstance(document.get(key, {}), dict)]
        wrong += [key for key, value in document.items() if key.endswith("_ms") and not _is_figure(value)]
        wrong = wrong or _wrong_fields(document)
        if missing or wrong:
            problem = f"lacks {', '.join(missing)}" if missing else f"has a wrong {', '.join(wrong)}"
            raise KvqError(f"{where} is a damaged run record: it {problem}", "measure it again")
        return cls(
            label=str(document["label"]),
            complete=bool(document["complete"]),
            metrics={
                key: value
                for key, value in document.items()
                if key not in ("schema_version", "repeat", "part") and _is_figure(value)
            },
            errors=document.get("errors", {}),
            note=document.get("note"),
            generator_bound=bool(document.get("generator_bound")),
            repeat=document.get("repeat"),
            part=document.get("part"),
            **{key: document.get(key, {}) for key in PARTS},
        )


def _is_figure(value: Any) -> bool:
    """Null or a number; not NaN, which is none, nor one that no float holds."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and abs(value) <= sys.float_info.max)


def _wrong_fields(document: dict[str, Any]) -> list[str]:
    """Fields of a part whose type no reader expects, as an edit by hand may leave them."""
    wrong = []
    for kind, names in FIELDS.items():
        for name in names:
            part, _, key = name.rpartition(".")
            value = (document.get(part, {}) if part else document).get(key)
            if not (_is_figure(value) if kind is float else value is None or isinstance(value, kind)):
                wrong.append(name)
    for part in ("quantiles", "timeline"):
        for key, values in document.get(part, {}).items():
            if not (isinstance(values, list) and all(map(_is_figure, values))):
                wrong.append(f"{part}.{key}")
    try:
        json.dumps(document, allow_nan=False)
    except ValueError:
        wrong.append("number: NaN or an infinity")
    return wrong


def read_records(paths: Iterable[Path]) -> list[RunRecord]:
    """The records of all files, each of which holds one or a list of them.

    Raises `KvqError` for a missing, unreadable, truncated or empty file, and for other JSON.
    """
    records = []
    for path in paths:
        document = read_json(path)
        documents = document if isinstance(document, list) else [document]
        if not documents:
            raise KvqError(
                f"{path} holds no run record", "was its run interrupted before it measured anything?"
            )
        for number, part in enumerate(documents, 1):
            where = str(path) if len(documents) == 1 else f"{path}, record {number},"
            records.append(RunRecord.from_dict(part, where))
    return records


def read_json(path: Path) -> Any:
    """The JSON document in a file, or a `KvqError` that says what is wrong with it."""
    return parse_json(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """A file's bytes; `KvqError` where it is missing or can't be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise KvqError(f"no file {path}", "check the path") from None
    except OSError as error:
        raise KvqError(f"cannot read {path}: {error.strerror or error}", "check the path") from error


def parse_json(data: bytes, path: Path) -> Any:
    """The JSON document in `data`; `KvqError` that names `path` and the place where it is wrong."""
    if not data.strip():
        raise KvqError(f"{path} is empty", "a download or run that was cut off? Get the file again")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise KvqError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}",
            "save it as UTF-8, or get the file again",
        ) from error
    try:
        return load_json(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        what = "ends in the middle of its JSON" if cut else f"is not JSON: {error.msg}"
        raise KvqError(
            f"{path} {what} (line {error.lineno}, column {error.colno})",
            "a download or run that was cut off? Get the file again"
            if cut
            else "it must hold one JSON document",
        ) from error
    except ValueError as error:
        raise KvqError(f"{path} is not JSON: {error}", "it must hold one JSON document") from error


def load_json(text: str) -> Any:
    """`json.loads`, with a `ValueError` for text that is nested without end, too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def requests_path(path: Path) -> Path:
    """Where the rows of a record's requests go: `NAME.requests.jsonl` beside `NAME.json`."""
    return path.with_name((path.stem if path.suffix == ".json" else path.name) + ".requests.jsonl")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the requests of the records in `path`; none where there is no such file."""
    try:
        lines = requests_path(path).read_text("utf-8").split("\n")
        return [load_json(line) for line in lines if line]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise KvqError(
            f"cannot read {requests_path(path)}: {error}", "remove it, or choose another --output"
        ) from error


def read_with_rows(paths: Iterable[Path]) -> tuple[list[RunRecord], list[dict[str, Any]]]:
    """The records of all files, and the rows of their requests; `run` numbers the records of all files."""
    records: list[RunRecord] = []
    rows = []
    for path in paths:
        before, found = len(records), read_records([path])
        records += found
        for row in read_rows(path):
            run = row.get("run")
            if isinstance(run, int) and 0 <= run < len(found) and row.get("label") == found[run].label:
                rows.append(row | {"run": before + run})
    return records, rows


def check_output(path: Path, flag: str = "--output", others: Iterable[tuple[str, Path | None]] = ()) -> None:
    """Make sure, before anything is measured, that `path` can be written; creates its folder.

    `others` are files that the command reads or writes as well, by what names them: `UsageError` for one of
    them.
    """
    for name, other in others:
        if other is not None and path.resolve() == other.resolve():
            raise UsageError(
                f"{flag} and {name} are the same file, {path}", f"choose another name for {flag}"
            )
    try:
        if path.is_dir():
            raise KvqError(f"{path} is a folder", f"{flag} takes the name of a file")
        if path.name == "-" or (path.exists() and not path.is_file()):
            # A file is replaced as a whole, by renaming: root would lose its /dev/null.
            raise KvqError(
                f"{flag} {path} is no file", f"{flag} takes the name of a file; stdout has `--json`"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise KvqError(
            f"cannot write {path}: {error.strerror or error}", f"choose another place for {flag}"
        ) from error


def write_text(path: Path, text: str, flag: str) -> None:
    """Write a file in one stroke; `KvqError` naming `flag` where that can't be done."""
    try:
        write_atomic(path, text)
    except OSError as error:
        raise KvqError(
            f"cannot write {path}: {error.strerror or error}", f"choose another place for {flag}"
        ) from error


def write_records(
    path: Path, documents: Any, rows: Sequence[dict[str, Any]] = (), *, rescue: bool = True
) -> None:
    """Write a record, or a list of them, and the rows of their requests, each file in one stroke.

    On a full disk or where writing is forbidden, a `KvqError` says so; with `rescue`, what was measured
    goes to the folder for temporary files, or else to stdout, and the error says where.
    """
    text = json.dumps(documents, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    text = _NUMBERS.sub(lambda match: " ".join(match[0].split()), text)
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    try:
        # Rows first: a record that is there is there with its requests, whatever happens in between.
        if rows:
            write_atomic(requests_path(path), lines)
        write_atomic(path, text)
    except OSError as error:
        kept = f"what was measured is {_rescue(path.name, text)}; " if rescue else ""
        raise KvqError(
            f"cannot write {path}: {error.strerror or error}",
            f"{kept}free some space, or choose another place for --output",
        ) from error


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader sees the old file or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _rescue(name: str, text: str) -> str:
    """Keep `text` somewhere; returns where."""
    try:
        handle, place = tempfile.mkstemp(prefix=f"{Path(name).stem}.", suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            os.unlink(place)
            raise
        return f"kept in {place}"
    except OSError:
        sys.stdout.write(text)
        sys.stdout.flush()
        return "printed above, on stdout"
