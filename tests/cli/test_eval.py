"""`kvq eval` on a tiny model: rows, records, checks and bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvq_cli.app import main
from kvq_core.bench.record import read_records
from tests.tiny import BYTES, byte_tokenizer, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("model"), vocab_size=BYTES + 1, max_position_embeddings=128)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 10)
    return path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["eval", "--device", "cpu", *map(str, args)])
    output = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, output.out, output.err


@pytest.fixture
def options(folder: Path, text: Path) -> list[Any]:
    return ["--model", folder, "--dataset-path", text, "--context-len", 40]


def test_sensitivity_ranks_layers_and_proposes(
    capsys: pytest.CaptureFixture[str], options: list[Any]
) -> None:
    """The flags that it prints are those of the policy that it measured, and within the budget."""
    options = [*options, "--limit", 1, "--sensitivity", "--budget", "1.2x"]
    code, out, err = run(capsys, *options, "--json")
    assert code == 0, err
    base, proposed = json.loads(out)
    found = proposed["kv"]["sensitivity"]
    assert base["policy"]["name"] == "turbo" and len(found["layers"]) == 2
    assert found["bytes_per_token"] <= found["budget"] == int(1.2 * 2 * 2 * 30)
    assert proposed["policy"]["layers"] and proposed["kl"] < base["kl"]
    flags = found["flags"].split()
    assert flags[:2] == ["--policy", "42"] and flags[3::2] == proposed["policy"]["layers"]
    code, out, err = run(capsys, *options)
    assert code == 0, err
    assert "--layers" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--budget", "1.1x"], "--budget is for --sensitivity"),
        (["--sensitivity", "--policies", "42,8"], "starts from one policy"),
        (["--sensitivity", "--policies", "42@0=8"], "proposes layers by itself"),
        (["--sensitivity", "--budget", "much"], "`much` is no budget"),
    ],
)
def test_mistakes_with_sensitivity(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], options: list[Any]
) -> None:
    code, out, err = run(capsys, *options, *args)
    assert code == 2 and message in err and out == ""


def test_rows_on_stdout_and_in_the_file(
    capsys: pytest.CaptureFixture[str], options: list[Any], tmp_path: Path
) -> None:
    output = tmp_path / "quality.json"
    code, out, err = run(
        capsys, *options, "--policies", "none,int8,42", "--limit", 3, "--json", "--output", output
    )
    assert code == 0, err
    rows = json.loads(out)
    assert json.loads(output.read_text()) == rows
    assert [row["policy"]["name"] for row in rows] == ["none", "int8", "turbo"]
    assert [row["bits_per_element"] for row in rows] == [16.0, 9.0, 3.75]
    assert rows[0]["kl"] == 0 and rows[0]["top1"] == 1 and rows[0]["ppl"] == rows[0]["reference_ppl"]
    assert 0 < rows[1]["kl"] < rows[2]["kl"] and rows[2]["top1"] < 1
    assert {row["predicted_tokens"] for row in rows} == {3 * 39}
    assert rows[0]["workload"]["name"] == "book.txt" and rows[0]["workload"]["windows"] == 3
    assert str(tmp_path.parent) not in out, "a record tells nothing of a disk"
    assert {row["model"]["name"] for row in rows} == {options[1].name}
    records = read_records([output])
    assert [record.label for record in records] == ["none", "int8", "turbo"]
    assert records[2].get("kl") == rows[2]["kl"]


def test_one_policy_gives_one_record_and_unquantized_tokens_count(
    capsys: pytest.CaptureFixture[str], options: list[Any]
) -> None:
    code, out, _ = run(
        capsys, *options, "--policies", "8", "--sink", 2, "--recent", 8, "--limit", 1, "--json"
    )
    row = json.loads(out)
    assert code == 0
    assert row["policy"] | {"sink": 2, "recent": 8} == row["policy"]
    assert row["bits_per_element"] == pytest.approx(9.0 + 16 * 10 / 40)


def test_a_table_for_people(capsys: pytest.CaptureFixture[str], options: list[Any]) -> None:
    code, out, err = run(capsys, *options, "--policies", "0,42", "--limit", 0)
    assert code == 0
    assert "turbo" in out and "KL p99" in out
    assert "13 of 13 windows" in err


@pytest.mark.parametrize("policy", ["8", "42+s2r8"])
def test_both_ways_of_measuring_agree(
    capsys: pytest.CaptureFixture[str], options: list[Any], policy: str
) -> None:
    both = []
    for way in ([], ["--through-engine"]):
        code, out, _ = run(capsys, *options, "--policies", policy, "--limit", 1, "--json", *way)
        assert code == 0
        both.append(json.loads(out))
    assert both[0]["ppl"] == pytest.approx(both[1]["ppl"], rel=0.01)
    assert both[0]["workload"]["read_back"] != both[1]["workload"]["read_back"]


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (["--max-kl", "1e-9"], 3),
        (["--max-kl", "100"], 0),
        (["--max-ppl-increase", "100000%"], 0),
        (["--max-ppl-increase", "0", "--policies", "0"], 0),
    ],
)
def test_checks_give_their_exit_code(
    capsys: pytest.CaptureFixture[str], options: list[Any], check: list[str], code: int
) -> None:
    got, out, err = run(capsys, *options, "--policies", "42", "--limit", 2, *check)
    assert got == code, err
    assert "KL" in out, "the table is shown either way"
    if code:
        assert "above --max-kl" in err


def test_a_rise_of_perplexity_that_was_ruled_out(
    capsys: pytest.CaptureFixture[str], options: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvq_core.quality import perplexity

    monkeypatch.setattr(perplexity.Drift, "add", _worse(perplexity.Drift.add))
    code, _, err = run(capsys, *options, "--policies", "42", "--limit", 1, "--max-ppl-increase", "0.01")
    assert code == 3 and "perplexity rises by" in err


def _worse(add: Any) -> Any:
    def changed(self: Any, reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        if logits is not reference:
            logits = logits.clone()
            logits[torch.arange(len(targets)), targets] -= 5.0
        add(self, reference, logits, targets)

    return changed


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--policies", "nonsense"], 1, "unknown policy"),
        (["--dataset-path", "/no/such/file"], 1, "cannot read"),
        (["--context-len", "1"], 2, "context-len"),
        (["--context-len", "4096"], 2, "--context-len must lie in"),
        (["--limit", "-1"], 2, "limit"),
        (["--max-ppl-increase", "much"], 2, "not a share"),
        (["--max-kl", "-1"], 2, "max-kl"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], options: list[Any], args: list[str], code: int, message: str
) -> None:
    got, out, err = run(capsys, *options, *args)
    assert got == code and message in err and "Traceback" not in err
    assert not out


def test_a_text_that_is_too_short(
    capsys: pytest.CaptureFixture[str], options: list[Any], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    code, _, err = run(capsys, *options, "--dataset-path", short)
    assert code == 1 and "less than one window" in err


def test_ctrl_c_keeps_the_windows_that_were_measured(
    capsys: pytest.CaptureFixture[str], options: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kvq_core.quality import perplexity

    original, calls = perplexity.logits, 0

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(perplexity, "logits", interrupt)
    output = tmp_path / "quality.json"
    code, _, _ = run(capsys, *options, "--policies", "42", "--limit", 3, "--output", output)
    record = json.loads(output.read_text())
    assert code == 130 and record["complete"] is False and record["completed"] == 1
    calls = 3
    code, _, _ = run(capsys, *options, "--policies", "42", "--limit", 3)
    assert code == 130


def test_tasks_give_rows_that_compare_shows(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    rows = [{"context": f"a b c {i}", "continuation": "d"} for i in range(3)]
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = tmp_path / "tasks.json"
    flags = ("--tasks", "lambada", "--tasks-path", tmp_path, "--policies", "none,42", "--limit", 2)
    code, out, err = run(capsys, "--model", folder, *flags, "--output", record)
    assert code == 0, err
    assert "lambada_acc" in out and "the first 2 samples" in err and "it/s" not in err
    records = read_records([record])
    assert [r.label for r in records] == ["none", "turbo"]
    assert records[0].workload["samples"] == {"lambada": 2}
    assert records[0].metrics["lambada_perplexity"] != records[1].metrics["lambada_perplexity"]
    with pytest.raises(SystemExit):
        main(["compare", str(record), "--markdown"])
    table = capsys.readouterr().out
    assert "| 42 turbo |" in table and "lambada_perplexity" in table and "speed" not in table


def test_flags_of_tasks_and_of_texts_do_not_mix(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    for flags in (
        ("--tasks", "needle", "--dataset-path", text),
        ("--tasks", "needle", "--max-kl", 0),
        ("--tasks", ","),
        ("--num-fewshot", 2),
    ):
        code, _, err = run(capsys, *flags)
        assert code == 2 and "hint:" in err
