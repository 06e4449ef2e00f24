"""Run records: round trip, one-stroke writing, full disks, damaged files."""

import errno
import json
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from kvq_core.bench import record as record_module
from kvq_core.bench.record import (
    RunRecord,
    check_output,
    read_records,
    read_rows,
    requests_path,
    without_folder,
    write_atomic,
    write_records,
)  # fmt: skip
from kvq_core.errors import KvqError


def test_round_trip(bench, tmp_path):
    record = bench.record("turbo", 42, failed=1)
    path = tmp_path / "r.json"
    write_records(path, record.to_dict(), [{"index": 0}, {"index": 1}])
    assert read_records([path]) == [record]
    assert (tmp_path / "r.requests.jsonl").read_text().splitlines() == ['{"index": 0}', '{"index": 1}']
    assert sorted(os.listdir(tmp_path)) == ["r.json", "r.requests.jsonl"]


def test_rows_with_line_breaks_in_an_error_are_read_again(bench, tmp_path):
    rows = [{"index": 0, "error": "one\u2028two\x85three"}, {"index": 1}]
    write_records(tmp_path / "r.json", bench.record().to_dict(), rows)
    assert read_rows(tmp_path / "r.json") == rows


def test_a_figure_that_is_no_number_is_null(bench, tmp_path):
    record = replace(bench.record(), metrics=bench.record().metrics | {"ppl": math.inf, "kl": math.nan})
    write_records(tmp_path / "r.json", record.to_dict())
    (read,) = read_records([tmp_path / "r.json"])
    assert read.metrics["ppl"] is read.metrics["kl"] is None and read.metrics["completed"] == 2


def test_lists_and_several_files(bench, tmp_path):
    names = ["none", "int8", "turbo"]
    write_records(tmp_path / "two.json", [bench.record(name).to_dict() for name in names[:2]])
    write_records(tmp_path / "one.json", bench.record(names[2]).to_dict())
    records = read_records([tmp_path / "two.json", tmp_path / "one.json"])
    assert [record.label for record in records] == names


def test_the_names_that_scripts_rely_on(bench):
    document = bench.record("turbo", 42).to_dict()
    assert {
        "schema_version", "complete", "label", "policy", "model", "env", "workload", "kv", "duration",
        "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
        "input_throughput", "output_throughput", "total_token_throughput",
    } <= set(document)  # fmt: skip
    assert {"name", "key", "value", "sink", "recent"} <= set(document["policy"])
    assert document["schema_version"] == 1 and document["complete"] is True
    assert json.loads(json.dumps(document, allow_nan=False)) == document


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b'{"schema_version": 1, "lab', "ends in the middle of its JSON"),
        (b'[{"schema_version": 1}', "ends in the middle of its JSON"),
        (b"policy,ttft\n0,1\n", "is not JSON"),
        (b"\xff\xfe\x00", "is not UTF-8 text: byte 0 is 0xff"),
        (b"[]", "holds no run record"),
        (b"{}", "is not a run record"),
        (b'"text"', "is not a run record"),
        (b"[1, 2]", "record 1, is not a run record"),
        (b'{"schema_version": 99}', "has schema version 99"),
        (b'{"schema_version": 1, "label": "x"}', "lacks complete, policy"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "is not JSON: Exceeds the limit"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_bytes(text)
    with pytest.raises(KvqError, match=message) as caught:
        read_records([path])
    assert caught.value.exit_code == 1 and str(path) in caught.value.message


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"kv": 3}, "kv"),
        ({"policy": None}, "policy"),
        ({"mean_ttft_ms": "fast"}, "mean_ttft_ms"),
        ({"mean_ttft_ms": math.nan}, "mean_ttft_ms"),
        ({"mean_ttft_ms": 10**400}, "mean_ttft_ms"),
        ({"errors": 4}, "errors"),
        ({"note": ["a"]}, "note"),
        ({"policy": {"layers": 4}}, r"policy\.layers"),
        ({"policy": {"key": ["int8"]}}, r"policy\.key"),
        ({"env": {"versions": ["torch"]}}, r"env\.versions"),
        ({"workload": {"concurrency": "many"}}, r"workload\.concurrency"),
        ({"kv": {"capacity_tokens": "1,000"}}, r"kv\.capacity_tokens"),
        ({"quantiles": {"ttft": 4}}, r"quantiles\.ttft"),
        ({"timeline": {"running": ["a"]}}, r"timeline\.running"),
        ({"model": {"layers": math.inf}}, "number: NaN or an infinity"),
    ],
)
def test_wrong_types_are_damage(bench, change, where):
    with pytest.raises(KvqError, match=f"damaged run record: it has a wrong {where}"):
        RunRecord.from_dict(bench.record().to_dict() | change, "x.json")


def test_a_model_in_a_folder_is_called_the_same_however_it_is_named(tmp_path, monkeypatch):
    """`kvq eval` and `kvq compare` must agree on it, or quality seems to be another model's."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("models/mine", "./models/mine/", str(tmp_path / "models" / "mine"), "/elsewhere/mine"):
        assert without_folder({"name": name, "dtype": "float32"}) == {"name": "mine", "dtype": "float32"}
    for name in ("Qwen/Qwen3-8B", "demo"):
        assert without_folder({"name": name}) == {"name": name}


@pytest.mark.parametrize("part", ["policy", "model", "env", "workload", "kv"])
@pytest.mark.parametrize("view", ["--json", "--csv", "--markdown", "--html"])
def test_fields_that_are_missing_or_null_are_no_error(kvq, bench, write_json, tmp_path, part, view):
    work = {"mean_input_len": 4.0, "mean_output_len": 5.0, "num_prompts": 2}
    document = bench.record(workload=work).to_dict()
    for fields in ([], *([key] for key in document[part])):
        less = {key: None if key in fields else value for key, value in document[part].items() if fields}
        less_of_it = write_json("less.json", document | {part: less})
        flags = [view, tmp_path / "page.html"] if view == "--html" else [view]
        code, _, err = kvq("compare", less_of_it, write_json("all.json", document), *flags)
        assert code == 0 and "unexpected" not in err, (fields, err)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(KvqError, match="no file"):
        read_records([tmp_path / "none.json"])
    with pytest.raises(KvqError, match="cannot read"):
        read_records([tmp_path])


def test_unknown_keys_of_the_same_version_are_no_error(bench):
    document = bench.record().to_dict() | {"later": {"a": 1}}
    assert RunRecord.from_dict(document, "x") == bench.record()


def test_the_old_file_stays_whole_until_the_new_one_is(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["r.json"]


def test_an_interrupt_while_writing_leaves_no_half_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "r.json", "new")
    assert os.listdir(tmp_path) == []


def test_permissions_are_those_of_any_new_file(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "r.json", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "r.json").stat().st_mode & 0o777 == 0o640


def refuse(*folders: Path):
    """A `mkstemp` to which the disks of some folders are full."""
    original = tempfile.mkstemp

    def mkstemp(*args, dir=None, **options):
        if Path(dir or tempfile.gettempdir()) in folders:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, dir=dir, **options)

    return mkstemp


def test_full_disk_keeps_the_record_elsewhere(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(record_module.tempfile, "mkstemp", refuse(tmp_path))
    document = bench.record().to_dict()
    with pytest.raises(KvqError, match=r"cannot write .*r\.json: No space left") as caught:
        write_records(tmp_path / "r.json", document)
    kept = Path(caught.value.hint.split("kept in ")[1].split(";")[0])
    try:
        assert json.loads(kept.read_text()) == document
    finally:
        kept.unlink()


def test_full_disks_everywhere_print_the_record(bench, tmp_path, monkeypatch, capsys):
    full = refuse(tmp_path, Path(tempfile.gettempdir()))
    monkeypatch.setattr(record_module.tempfile, "mkstemp", full)
    document = bench.record().to_dict()
    with pytest.raises(KvqError, match="No space left") as caught:
        write_records(tmp_path / "r.json", document)
    assert "on stdout" in caught.value.hint
    assert json.loads(capsys.readouterr().out) == document


def test_output_is_checked_before_anything_is_measured(tmp_path):
    check_output(tmp_path / "new" / "folder" / "r.json")
    assert os.listdir(tmp_path / "new" / "folder") == []
    with pytest.raises(KvqError, match="is a folder"):
        check_output(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(KvqError, match="cannot write"):
        check_output(tmp_path / "file" / "r.json")
    with pytest.raises(KvqError, match="cannot write"):
        check_output(Path("/proc/nowhere/r.json"))
    with pytest.raises(KvqError, match="File name too long"):
        check_output(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    for special in (Path("/dev/null"), tmp_path / "pipe", Path("-")):
        with pytest.raises(KvqError, match=f"--html {special} is no file"):
            check_output(special, "--html")


def test_requests_lie_beside_the_record():
    assert requests_path(Path("a/b.json")) == Path("a/b.requests.jsonl")
    assert requests_path(Path("a/b.v2")) == Path("a/b.v2.requests.jsonl")
