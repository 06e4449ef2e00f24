"""Recommendations and break-even lines, by hand."""

import json
from dataclasses import replace

import pytest

from kvq_core.bench.advice import Limits, advise, quality_warnings, read_quality
from kvq_core.bench.compare import compare_records
from kvq_core.bench.scores import collect_scores
from kvq_core.errors import KvqError

GPU = {"gpu": "H200"}
WORK = {"mean_input_len": 60, "mean_output_len": 40}
SLO = Limits(slo={"ttft": 5000.0})
KL = {"int8": 0.0003, "int4": 0.1, "turbo": 0.171}


def run(bench, name, number, speed, capacity, **parts):
    options = {"env": GPU, "workload": WORK} | parts
    return bench.record(name, number, speed=speed, kv={"capacity_tokens": capacity}, **options)


@pytest.fixture
def runs(bench):
    """int8 as quick as none and roomier, int4 a tenth slower, turbo half as quick."""
    return [
        run(bench, "none", 0, 1.0, 1000),
        run(bench, "int8", 8, 0.99, 1940),
        run(bench, "int4", 4, 0.9, 3760),
        run(bench, "turbo", 42, 0.5, 1500),
    ]


@pytest.fixture
def quality(bench, write_json):
    def write(**kl):
        records = [bench.record(name).to_dict() | {"kl": value} for name, value in kl.items()]
        return read_quality([write_json("quality.json", records)])

    return write


def test_equal_speed_is_decided_by_memory(runs, quality):
    advice = advise(compare_records(runs), quality(**KL), Limits(0.02))
    assert advice[0] == (
        "recommended: 8 int8, as quick as any with 2.475 output tok/s, and holding most tokens, "
        "within KL 0.02 (its own: 0.0003); ruled out: 4 int4 (KL 0.1), 42 turbo (KL 0.171)"
    )


def test_a_gain_within_the_interval_is_none(bench, quality):
    base, more = run(bench, "none", 0, 1.0, 1000), run(bench, "int8", 8, 1.04, 1940)
    noisy = [replace(record, intervals={"output_throughput": 0.1}) for record in (base, more)]
    assert "pays at this load already, +4.0%" in " ".join(advise(compare_records([base, more]), None, SLO))
    assert "already" not in " ".join(advise(compare_records(noisy), None, SLO))


def test_of_two_texts_the_worse_counts_everywhere(bench, write_json):
    records = [
        bench.record("int8").to_dict() | {"kl": kl, "ppl": ppl} for kl, ppl in ((0.5, 9.0), (0.1, 8.0))
    ]
    for order in (records, records[::-1]):
        quality = read_quality([write_json("quality.json", order)])
        record = quality.records[0]
        assert quality.of(record) == 0.5
        assert collect_scores(quality.records).found[record.scheme] == {"kl": 0.5, "ppl": 9.0}


def test_speed_comes_first(bench, runs, quality):
    faster = [*runs[:2], run(bench, "int4", 4, 1.5, 3760)]
    assert advise(compare_records(faster), quality(**KL), Limits(0.2))[0].startswith(
        "recommended: 4 int4, the quickest with 3.750 output tok/s within KL 0.2 (its own: 0.1)"
    )
    assert "recommended: 8 int8" in advise(compare_records(faster), quality(**KL), Limits(0.05))[0]


def test_unquantized_needs_no_measurement_and_others_do(runs, quality):
    (line, *_) = advise(compare_records(runs), quality(int4=0.1), Limits(0.0))
    assert (
        line.startswith("recommended: 0 none, the quickest")
        and "8 int8 (its quality was not measured)" in line
    )


def test_nothing_within_the_limit(runs, quality):
    (line, *_) = advise(compare_records(runs[2:]), quality(**KL), Limits(0.02))
    assert (
        line == "recommended: none of these within KL 0.02; ruled out: 4 int4 (KL 0.1), 42 turbo (KL 0.171)"
    )


def test_windows_tell_policies_apart(bench, runs, quality):
    turbo = bench.record("turbo", 42, speed=2.0, env=GPU)
    turbo.policy["recent"] = 128
    assert (
        "42 turbo (its quality was not measured)"
        in advise(compare_records([runs[0], turbo]), quality(**KL), Limits(1.0))[0]
    )


def test_goodput_decides_where_it_was_asked_for(bench, runs, quality):
    good = [run(bench, "none", 0, 1.0, 1000), run(bench, "int8", 8, 2.0, 1940)]
    good[0].metrics["request_goodput"], good[1].metrics["request_goodput"] = 0.5, 0.1
    assert (
        "0 none, the quickest with 0.500 good requests/s"
        in advise(compare_records(good), quality(**KL), Limits(1))[0]
    )


def test_on_a_cpu_memory_alone_decides_and_nothing_breaks_even(bench, quality):
    cpu = [run(bench, n, i, s, c, env={}) for n, i, s, c in (("none", 0, 9.0, 10), ("int8", 8, 1.0, 1940))]
    (line,) = advise(compare_records(cpu), quality(**KL), Limits(1))
    assert "recommended: 8 int8, which holds most tokens, 1,940 (speeds on a CPU say nothing" in line


def test_on_a_cpu_a_sweep_recommends_a_policy_and_not_one_of_its_loads(bench, quality):
    sweep = [
        bench.record(name, number, concurrency=c, kv={"capacity_tokens": capacity})
        for name, number, capacity in (("none", 0, 10), ("int8", 8, 1940))
        for c in (1, 8)
    ]
    line = advise(compare_records(sweep), quality(**KL), Limits(1))[0]
    assert line.startswith("recommended: 8 int8, which holds most tokens")


def test_break_even_by_hand(bench, runs, quality):
    # int4 gives 0.9 of the tokens: from 1000 / 0.9 tokens in flight, 11.11 requests of 100, it gives more.
    _, int8, int4, turbo = advise(compare_records(runs), quality(**KL), Limits(1))
    assert "8 int8 is -1.0%" in int8
    assert int4 == (
        "break-even: 4 int4 is -10.0% at this load; where more requests want to run than fit, it pays from "
        "about 11.11 requests of 100 tokens at a time (fit: 10 without it, 37.60 with it; an estimate)"
    )
    assert turbo.endswith("its memory does not make up for that")
    _, line = advise(compare_records([runs[3], runs[0]]), quality(**KL), Limits(1))
    assert line == "break-even: 0 none pays at this load already, +100.0% output tok/s"


def test_every_load_has_its_recommendation(bench, quality):
    grid = [
        run(bench, name, i, speed, 1000, concurrency=c)
        for c in (1, 8)
        for name, i, speed in (("none", 0, 1.0), ("int8", 8, 2.0 if c == 8 else 0.5))
    ]
    first, second, *_ = advise(compare_records(grid), quality(**KL), Limits(1))
    assert "0 none c1" in first and "8 int8 c8" in second


def test_the_worst_of_several_measurements_counts(bench, write_json):
    records = [bench.record("int8", 8).to_dict() | {"kl": kl} for kl in (0.01, 0.03, 0.02)]
    assert read_quality([write_json("q.json", records)]).of(bench.record("int8", 8)) == 0.03


def test_files_that_hold_no_quality(bench, write_json):
    with pytest.raises(KvqError, match="has no figure of quality"):
        read_quality([write_json("q.json", bench.record().to_dict())])


def test_quality_of_another_model_is_pointed_out(bench, runs, write_json):
    other = bench.record("int8", 8, model={"name": "other"}).to_dict() | {"kl": 0.1}
    found = quality_warnings(compare_records(runs), read_quality([write_json("q.json", other)]))
    assert found == ["quality was measured on another model: other"]


def test_the_command(kvq, bench, runs, write_json):
    file = write_json("runs.json", [record.to_dict() for record in runs])
    quality = write_json("q.json", [bench.record(name).to_dict() | {"kl": kl} for name, kl in KL.items()])
    flags = (file, "--quality", quality, "--max-kl", 0.02)
    code, out, _ = kvq("compare", *flags)
    assert code == 0 and "recommended: 8 int8" in out and "break-even: 4 int4" in out
    assert "- recommended: 8 int8" in kvq("compare", *flags, "--markdown")[1]
    _, out, err = kvq("compare", *flags, "--json")
    assert len(json.loads(out)) == 4 and "recommended: 8 int8" in err
    code, _, err = kvq("compare", file, "--max-kl", 0.02)
    assert code == 2 and "--max-kl needs --quality" in err
    code, out, _ = kvq("compare", file, "--quality", quality)
    assert code == 0 and "recommended" not in out and "quality" in out and "0.0003" in out
    code, out, _ = kvq("compare", file, "--quality", quality, "--markdown")
    header, _, *rows = (line.split(" | ") for line in out.split("\n\n")[0].splitlines())
    assert [row[header.index("KL")] for row in rows] == ["0", "0.000", "0.100", "0.171"]


def test_layers_make_another_policy_of_it(bench, quality):
    measured = quality(none=0.0)
    plain = run(bench, "none", 0, 1.0, 1000)
    assert measured.of(plain) == 0
    assert measured.of(replace(plain, policy=plain.policy | {"layers": ["0=int4"]})) is None


def test_a_limit_at_p99_rules_out(bench):
    runs = [run(bench, "none", 0, 1.0, 1000), run(bench, "int4", 4, 2.0, 3000)]  # TTFT 1000 and 500 ms
    (line, *_) = advise(compare_records(runs), None, Limits(slo={"ttft": 600.0}))
    assert line == (
        "recommended: 4 int4, the quickest with 5 output tok/s within p99 TTFT ≤ 600 ms; "
        "ruled out: 0 none (p99 TTFT 1,000 ms)"
    )
    (line, *_) = advise(compare_records(runs), None, Limits(slo={"tpot": 1.0}))
    assert line.startswith("recommended: none of these within p99 TPOT ≤ 1 ms")


def test_the_most_load_within_the_limits(bench):
    runs = [
        run(bench, name, number, speed, 1000, concurrency=at)
        for name, number in (("none", 0), ("int4", 4))
        for at, speed in ((1, 2.0), (8, 1.0 + 0.1 * number))
    ]
    lines = advise(compare_records(runs), None, Limits(slo={"ttft": 900.0}))
    assert [line for line in lines if line.startswith("most")] == [
        "most within p99 TTFT ≤ 900 ms: 0 none c1 with 5 output tok/s"
    ]
