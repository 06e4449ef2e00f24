"""`kvq compare` on files of records: verdicts, and tables for narrow terminals."""

import pytest

from kvq_cli import console
from kvq_cli.app import main


def test_a_regression_fails_and_says_what_got_worse(kvq, bench, write_json):
    before, after = bench.record("before", None), bench.record("after", None, speed=0.9)
    files = write_json("a.json", before.to_dict()), write_json("b.json", after.to_dict())
    code, out, err = kvq("compare", *files, "--fail-on-regression", "5%")
    assert code == 3 and "after" in out
    assert "error: worse than --fail-on-regression 0.05 allows: after: output throughput -10.0%" in err
    assert "after: mean TTFT +11.1%" in err and "after: mean TPOT +11.1%" in err
    for fine in (
        (*files, "--fail-on-regression", "12%"),
        (*files, "--fail-on-regression", "0.12"),
        (*reversed(files), "--fail-on-regression", "0"),
        (*files, "--baseline", "after", "--fail-on-regression", "1%"),
    ):
        assert kvq("compare", *fine)[0] == 0
    code, _, err = kvq("compare", files[0], "--fail-on-regression", "5%")
    assert code == 2 and "nothing to compare with" in err


def test_after_is_held_against_before_policy_by_policy(kvq, bench, write_json):
    def several(name, turbo, **load):
        records = bench.record(**load), bench.record("turbo", 42, speed=turbo, **load)
        return write_json(name, [record.to_dict() for record in records])

    before, same, slower = several("a.json", 1.5), several("b.json", 1.5), several("c.json", 1.2)
    assert kvq("compare", before, same, "--fail-on-regression", "5%")[0] == 0
    code, _, err = kvq("compare", before, slower, "--fail-on-regression", "5%")
    assert code == 3 and "42 turbo #2: output throughput -20.0%" in err and "0 none" not in err
    other = several("d.json", 0.1, concurrency=5)
    code, _, err = kvq("compare", before, other, "--fail-on-regression", "5%")
    assert code == 2 and "nothing to compare with" in err


@pytest.mark.parametrize(
    ("flawed", "message"),
    [
        ({"complete": False}, "it is incomplete"),
        ({"failed": 2}, "2 of 4 requests failed"),
    ],
)
def test_what_was_not_measured_as_a_whole_is_no_answer(kvq, bench, write_json, flawed, message):
    gpu = {"env": {"gpu": "H200"}, "workload": {"mean_input_len": 10, "mean_output_len": 5}}
    good = write_json("a.json", bench.record("good", None, **gpu).to_dict())
    bad = write_json("b.json", bench.record("bad", None, speed=2.0, **gpu, **flawed).to_dict())
    for files in ((good, bad), (bad, good)):
        code, _, err = kvq("compare", *files, "--fail-on-regression", "5%")
        assert code == 3 and f"bad: {message}" in err
    code, out, _ = kvq("compare", good, bad, "--slo", "ttft:5000")
    assert code == 0 and "recommended: good" in out and f"ruled out: bad ({message})" in out
    assert "break-even" not in out


def test_markdown_warns_on_stderr_too(kvq, bench, write_json):
    unlike = bench.record("turbo", 42, env={"gpu": "H100"}, workload={"seed": 7})
    file = write_json("a.json", [bench.record().to_dict(), unlike.to_dict()])
    code, out, err = kvq("compare", file, "--markdown")
    assert code == 0
    for what in ("differ in GPU: none (0 none), H100 (42 turbo)", "differ in seed: 0 (0 none), 7 (42 turbo)"):
        assert f"- **warning**: records {what}" in out and f"warning: records {what}" in err


@pytest.mark.parametrize("flag", [("-c", 3), ("--kv-memory", "1GiB"), ("--repeats", 2), ("--model", "x")])
def test_records_are_not_measured_anew(kvq, bench, write_json, flag):
    file = write_json("a.json", bench.record().to_dict())
    code, out, err = kvq("compare", file, *flag)
    assert code == 2 and "this says how to measure" in err and not out


@pytest.mark.parametrize("width", [40, 80, 200])
def test_long_names_leave_figures_whole(kvq, bench, write_json, monkeypatch, width):
    from rich.console import Console

    name = "turbo@0,1,-2,-1=int8+s4r128"
    speed = {"capacity_ratio": 4.75, "peak_tokens": 94170, "preemptions": 0}
    records = [bench.record(kv=speed).to_dict(), bench.record(name, 42, speed=1.7, kv=speed).to_dict()]
    with open("/dev/null", "w") as nowhere:
        shown = Console(width=width, file=nowhere, record=True, no_color=True)
        monkeypatch.setattr(console, "out", lambda: shown)
        with pytest.raises(SystemExit):
            main(["compare", str(write_json("a.json", records))])
        text = shown.export_text()
    assert "…" not in text and all(
        word in text for word in ("4.250", "+70.0%", "x4.75", "94,170", "42 turbo@0")
    )


def test_the_first_file_counts_as_it_was_before_the_output_replaced_it(kvq, bench, write_json):
    before = write_json("a.json", bench.record().to_dict())
    after = write_json("b.json", bench.record(speed=0.5).to_dict())
    code, _, err = kvq("compare", before, after, "--output", before, "--fail-on-regression", "5%")
    assert code == 3 and "output throughput -50.0%" in err
