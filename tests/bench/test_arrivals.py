"""Ramps, traces, prompts from files and shared prefixes."""

import json

import numpy as np
import pytest

from kvq_core.bench.load import Load, Ramp
from kvq_core.bench.workload import WorkloadSpec, make_workload, read_dataset
from kvq_core.errors import KvqError, UsageError


def test_a_ramp_goes_from_one_rate_to_the_other(bench):
    assert Ramp.parse("linear:1..5").rates(3) == [1, 3, 5]
    assert Ramp.parse("exponential:1..16").rates(3) == [1, 4, 16]
    load = Load(ramp=Ramp.parse("linear:1..9"), burstiness=50.0, seed=1)
    times = np.array(load.due_times(bench.requests(2000)))
    assert times[-1] == pytest.approx(sum(1 / rate for rate in Ramp("linear", 1, 9).rates(2000)))
    rates = [100 / (times[at + 100] - times[at]) for at in (0, 950, 1890)]
    assert rates == pytest.approx([1.2, 5, 8.8], rel=0.1)
    assert load.describe()["ramp_up"] == "linear:1..9" and load.describe()["loop"] == "open"


@pytest.mark.parametrize("text", ["linear", "linear:1", "linear:0..4", "steep:1..4", "linear:1..x"])
def test_what_is_no_ramp(text):
    with pytest.raises(UsageError, match="no --ramp-up"):
        Ramp.parse(text)
    with pytest.raises(UsageError, match="one or the other"):
        Load(request_rate=1.0, ramp=Ramp("linear", 1, 2))


@pytest.fixture
def workload(tmp_path, bench):
    def make(name, *lines, **spec):
        file = tmp_path / "requests.jsonl"
        file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        made = WorkloadSpec(name, str(file), **{"num_prompts": 3, "num_warmup": 1} | spec)
        return make_workload(
            made, read_dataset(made), tokenizer=bench.Tokenizer(), vocab_size=50, max_len=2000
        )

    return make


def test_prompts_of_a_file(workload):
    work = workload("jsonl", {"prompt": "one two", "output_length": 7}, "", {"prompt": [4, 5]}, output_len=9)
    assert [(r.prompt, r.output_len) for r in work.requests] == [([0, 3, 3], 7), ([4, 5], 9), ([0, 3, 3], 7)]
    assert len(work.warmup) == 1 and work.describe()["distinct_prompts"] == 2
    assert all(request.arrival is None for request in work.requests)


def test_line_breaks_inside_a_string_are_no_line_breaks(workload):
    line = json.dumps({"prompt": "one\u2028two\x85three four"}, ensure_ascii=False)
    assert workload("jsonl", line + "\r").requests[0].input_len == 5


def test_a_trace_is_replayed_by_its_timestamps(bench, workload):
    lines = [
        {"timestamp": 5000 + at, "input_length": length, "output_length": 2, "hash_ids": blocks}
        for at, length, blocks in ((0, 600, [1, 2]), (250, 3000, []), (1000, 700, [1, 3]))
    ]
    work = workload("trace", *lines)
    assert [request.arrival for request in work.requests] == [0.0, 1.0]  # the second is longer than the model
    assert work.settings["left_out"] == 1
    first, second = (request.prompt for request in work.requests)
    assert (
        first[:512] == second[:512]
        and first[512:] != second[512:600]
        and (len(first), len(second)) == (600, 700)
    )
    assert Load(trace_speed=4.0).due_times(work.requests) == [0.0, 0.25]

    target = bench.Target(bench.steady(0.1, 0.1), punctual=True)
    from kvq_core.bench.load import run_load

    result = run_load(target, work.requests, Load(trace_speed=2.0), clock=target.clock)
    assert [trace.due - result.start for trace in result.traces] == pytest.approx([0.0, 0.5])


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("jsonl", "{", "line 1 is not JSON"),
        ("jsonl", "3", "line 1 is no JSON object"),
        ("jsonl", {"input_length": 4}, "line 1 has no prompt"),
        ("jsonl", {"prompt": ""}, "neither text nor token ids"),
        ("jsonl", {"prompt": "x", "output_length": 0}, "whole numbers above 0"),
        ("jsonl", {"prompt": "half \ud83d"}, "broken Unicode"),
        ("jsonl", "[" * 200_000, "nested too deeply"),
        ("trace", {"input_length": 4}, "no `timestamp`"),
        ("trace", {"timestamp": 1}, "no `input_length`"),
        ("trace", {"timestamp": 1, "input_length": 4000}, "longer than the 2000 tokens"),
        ("trace", {"timestamp": 1, "input_length": 10**15}, "longer than the 2000 tokens"),
        ("trace", '{"timestamp": Infinity, "input_length": 4}', "no `timestamp`"),
    ],
)
def test_a_wrong_line_is_named(workload, name, line, message):
    with pytest.raises(KvqError, match=message) as error:
        workload(name, line)
    assert error.value.hint


def test_timestamps_out_of_order_and_an_empty_file(workload):
    with pytest.raises(KvqError, match="not in order"):
        workload("trace", *({"timestamp": at, "input_length": 4} for at in (2, 1)))
    with pytest.raises(KvqError, match="holds no request"):
        workload("jsonl", "")
    with pytest.raises(UsageError, match="needs --dataset-path"):
        WorkloadSpec("trace")


def test_prefixes_are_shared(bench):
    spec = WorkloadSpec(
        "prefix", num_prompts=40, num_warmup=1, input_len=6, prefix_len=30, num_prefixes=3, output_len=4
    )
    work = make_workload(spec, None, tokenizer=None, vocab_size=1000, max_len=64)
    prompts = [request.prompt for request in work.requests]
    assert {len(prompt) for prompt in prompts} == {36}
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 3
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 40
    assert work.describe()["num_prefixes"] == 3
    with pytest.raises(KvqError, match="30 \\+ 6 \\+ 4 tokens exceeds the 39"):
        make_workload(spec, None, tokenizer=None, vocab_size=1000, max_len=39)


def test_a_trace_by_the_command_line(kvq, tmp_path):
    code, _, err = kvq("profile-throughput", "--trace-speed", 2)
    assert code == 2 and "--trace-speed needs --dataset-name trace" in err
    code, _, err = kvq(
        "profile-throughput", "--dataset-name", "trace", "--dataset-path", tmp_path / "none.jsonl"
    )
    assert code == 1 and "no file" in err
    code, _, err = kvq("profile-throughput", "--dataset-name", "trace")
    assert code == 2 and "needs --dataset-path" in err and "timestamp in ms" in err
