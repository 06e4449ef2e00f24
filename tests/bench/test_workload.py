"""Workloads: the filter, seeds, lengths, and every kind of bad input."""

import hashlib
import json

import pytest

from kvq_core.bench.sharegpt import find_dataset
from kvq_core.bench.workload import WorkloadSpec, make_workload, read_dataset
from kvq_core.errors import KvqError, UsageError


def conversation(prompt: int, answer: int, **extra) -> dict:
    turns = [{"from": "human", "value": "p " * prompt}, {"from": "gpt", "value": "a " * answer}]
    return {"id": "x", "conversations": turns} | extra


def build(spec: WorkloadSpec, **options):
    return make_workload(spec, read_dataset(spec), **options)


@pytest.fixture
def load(bench, write_json):
    """Load a document as a ShareGPT file; the fake tokenizer counts words, prompts get one token more."""

    def run(document, *, max_len=None, **spec):
        path = write_json("data.json", document)
        settings = {"num_prompts": 4, "num_warmup": 0} | spec
        return build(
            WorkloadSpec(path=str(path), **settings),
            tokenizer=bench.Tokenizer(),
            vocab_size=100,
            max_len=max_len,
        )

    return run


def lengths(workload):
    return sorted((request.input_len, request.output_len) for request in workload.requests)


@pytest.mark.parametrize(
    ("prompt", "answer", "kept"),
    [
        (2, 50, False), (3, 50, True), (50, 3, False), (50, 4, True),
        (1023, 1024, True), (1024, 5, False), (1023, 1025, False), (4, 2043, True), (4, 2044, False),
    ],
)  # fmt: skip
def test_filter_edges(load, prompt, answer, kept):
    workload = load([conversation(prompt, answer), conversation(20, 20)], num_prompts=2)
    assert ((prompt + 1, answer) in lengths(workload)) is kept


def test_first_human_turn_and_the_answer_after_it(load):
    turns = [
        ("system", "be kind"),
        ("gpt", "early"),
        ("human", "a b c d"),
        ("human", "x " * 9),
        ("gpt", "r " * 6),
    ]
    entry = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    assert lengths(load([entry], num_prompts=1)) == [(5, 6)]


def test_conversations_without_an_exchange_are_dropped(load):
    alone = {"conversations": [{"from": "human", "value": "a b c d e"}]}
    empty = {"conversations": []}
    torn = {"conversations": [{"from": "human", "value": "\ud800 " * 9}, {"from": "gpt", "value": "b " * 9}]}
    assert lengths(load([alone, empty, torn, conversation(9, 9)], num_prompts=1)) == [(10, 9)]


def test_seed_decides_and_repeats(load):
    document = [conversation(10 + i, 20 + i) for i in range(50)]
    first, same, other = (load(document, seed=seed, num_prompts=10) for seed in (1, 1, 2))
    assert first.requests == same.requests and first.requests != other.requests
    assert first.describe()["requests_sha256"] == same.describe()["requests_sha256"]
    assert first.describe()["requests_sha256"] != other.describe()["requests_sha256"]


def test_too_few_conversations_are_repeated_and_recorded(load):
    workload = load([conversation(10, 20), conversation(11, 21)], num_prompts=5)
    assert len(workload.requests) == 5
    assert workload.describe()["distinct_prompts"] == 2 and workload.describe()["num_prompts"] == 5


def test_warm_up_uses_other_conversations_where_there_are_enough(load):
    document = [conversation(10 + i, 20) for i in range(6)]
    workload = load(document, num_prompts=3, num_warmup=3)
    measured = {request.input_len for request in workload.requests}
    warmed = {request.input_len for request in workload.warmup}
    assert not measured & warmed and len(measured | warmed) == 6
    assert [request.output_len for request in workload.warmup] == [8, 8, 8]
    assert len({r.index for r in workload.requests + workload.warmup}) == 6


def test_warm_up_prompts_can_be_cut(load):
    workload = load([conversation(50, 20)], num_prompts=1, num_warmup=2, warmup_input_len=32)
    assert [request.input_len for request in workload.warmup] == [len(r.prompt) for r in workload.warmup]
    assert [request.input_len for request in workload.warmup] == [32, 32]
    assert [request.input_len for request in workload.requests] == [51]


def test_answers_are_cut_after_the_filter(load):
    document = [conversation(10, 500), conversation(10, 30)]
    assert lengths(load(document, num_prompts=2, max_output_len=64)) == [(11, 30), (11, 64)]


def test_a_short_model_narrows_the_filter(load):
    workload = load([conversation(100, 100), conversation(20, 20)], num_prompts=1, max_len=64)
    assert lengths(workload) == [(21, 20)]
    assert workload.describe()["filter"]["max_total_len"] == 64


def test_record_has_name_and_checksum_but_no_path(load, tmp_path):
    described = load([conversation(10, 20)]).describe()
    assert described["dataset"] == "data.json"
    assert described["sha256"] == hashlib.sha256((tmp_path / "data.json").read_bytes()).hexdigest()
    assert str(tmp_path) not in json.dumps(described)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "holds no conversation"),
        ({}, "holds no list"),
        ([1], "entry 0 has no list `conversations`"),
        ([conversation(9, 9), {"text": "x"}], "entry 1 has no list `conversations`"),
        ([{"conversations": "x"}], "entry 0 has no list `conversations`"),
        ([{"conversations": ["x"]}], "a turn of entry 0 lacks"),
        ([{"conversations": [{"from": "human"}]}], "a turn of entry 0 lacks"),
        ([{"conversations": [{"from": "human", "value": None}]}], "a turn of entry 0 lacks"),
        ([conversation(1, 1), conversation(3000, 3)], "passes the filter: 2 too short"),
        ([conversation(2000, 9)], "passes the filter: 1 too long"),
        ([{"conversations": []}], "passes the filter: 1 without question and answer"),
    ],
)  # fmt: skip
def test_bad_documents(load, document, message):
    with pytest.raises(KvqError, match=message) as caught:
        load(document)
    assert caught.value.exit_code == 1 and caught.value.hint


@pytest.mark.parametrize("name", ["sharegpt", "lengths"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b'[{"conversations": [{"from": "hum', "ends in the middle of its JSON"),
        (b"[[10, 2", "ends in the middle of its JSON"),
        (b"not json", "is not JSON"),
        (
            b'[{"conversations": [{"from": "human", "value": "caf\xe9"}]}]',
            "is not UTF-8 text: byte 51 is 0xe9",
        ),
    ],
)
def test_bad_files(bench, tmp_path, name, data, message):
    path = tmp_path / "data.json"
    path.write_bytes(data)
    with pytest.raises(KvqError, match=message):
        build(WorkloadSpec(name=name, path=str(path)), tokenizer=bench.Tokenizer(), vocab_size=100)


def test_missing_file(bench, tmp_path):
    for name in ("sharegpt", "lengths"):
        spec = WorkloadSpec(name=name, path=str(tmp_path / "none.json"))
        with pytest.raises(KvqError, match="no file"):
            build(spec, tokenizer=bench.Tokenizer(), vocab_size=100)


def test_text_needs_a_tokenizer():
    with pytest.raises(KvqError, match="no tokenizer") as caught:
        build(WorkloadSpec(), tokenizer=None, vocab_size=100)
    assert "fixed" in caught.value.hint


def test_no_network_for_the_hub_is_a_clear_error(monkeypatch):
    import huggingface_hub

    def offline(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(KvqError, match=r"cannot get .* from the hub: OSError: Name or service"):
        find_dataset("hub")


def test_lengths_in_the_files_order(write_json):
    path = write_json("pairs.json", [[5, 7], [3, 2]])
    spec = WorkloadSpec(name="lengths", path=str(path), num_prompts=3, num_warmup=1)
    workload = build(spec, tokenizer=None, vocab_size=50)
    assert [(r.input_len, r.output_len) for r in workload.requests] == [(5, 7), (3, 2), (5, 7)]
    assert [(r.input_len, r.output_len) for r in workload.warmup] == [(3, 2)]
    assert all(len(r.prompt) == r.input_len and max(r.prompt) < 50 for r in workload.requests)
    assert workload.requests[0].prompt != workload.requests[2].prompt
    assert workload == build(spec, tokenizer=None, vocab_size=50)
    assert workload.describe()["dataset"] == "pairs.json" and workload.sha256


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"a": 1}, "holds no list of lengths"),
        ([], "holds an empty list"),
        ([[1, 2], [3]], "entry 1 is not a pair"),
        ([[1, "2"]], "entry 0 is not a pair"),
        ([[1, 2.5]], "entry 0 is not a pair"),
        ([[True, 2]], "entry 0 is not a pair"),
        ([[1, 2], [0, 5]], r"entry 1 is \[0, 5\]"),
        ([[1, -2]], r"entry 0 is \[1, -2\]"),
        ([[60, 50]], "60 \\+ 50 tokens exceeds the 100"),
    ],
)  # fmt: skip
def test_bad_lengths(write_json, pairs, message):
    spec = WorkloadSpec(name="lengths", path=str(write_json("pairs.json", pairs)))
    with pytest.raises(KvqError, match=message):
        build(spec, tokenizer=None, vocab_size=50, max_len=100)


def test_lengths_that_fit_once_answers_are_cut(write_json):
    path = write_json("pairs.json", [[60, 50]])
    spec = WorkloadSpec(name="lengths", path=str(path), num_prompts=1, num_warmup=0, max_output_len=40)
    (request,) = build(spec, tokenizer=None, vocab_size=50, max_len=100).requests
    assert (request.input_len, request.output_len) == (60, 40)


def test_fixed_and_random_lengths():
    spec = WorkloadSpec(name="fixed", num_prompts=5, num_warmup=2, input_len=12, output_len=34)
    workload = build(spec, tokenizer=None, vocab_size=50)
    assert {(r.input_len, r.output_len) for r in workload.requests} == {(12, 34)}
    spec = WorkloadSpec(name="random", num_prompts=400, input_len=100, output_len=50, range_ratio=0.5)
    drawn = build(spec, tokenizer=None, vocab_size=50).requests
    assert {r.input_len for r in drawn} >= {50, 150}
    assert min(r.input_len for r in drawn) == 50 and max(r.output_len for r in drawn) == 75
    assert sum(r.input_len for r in drawn) / 400 == pytest.approx(100, abs=5)
    narrow = WorkloadSpec(name="random", range_ratio=0.0, input_len=9, output_len=9)
    assert {r.input_len for r in build(narrow, tokenizer=None, vocab_size=50).requests} == {9}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "alpaca"}, "unknown --dataset-name `alpaca`"),
        ({"num_prompts": 0}, "--num-prompts must be at least 1"),
        ({"input_len": 0}, "--input-len must be at least 1"),
        ({"output_len": -5}, "--output-len must be at least 1"),
        ({"max_output_len": 0}, "--max-output-len must be at least 1"),
        ({"num_warmup": -1}, "--warmup must not be negative"),
        ({"range_ratio": 1.0}, "--range-ratio must lie in"),
        ({"name": "lengths"}, "needs --dataset-path"),
        ({"name": "fixed", "path": "x.json"}, "takes no --dataset-path"),
    ],
)  # fmt: skip
def test_bad_settings_are_usage_errors(settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        WorkloadSpec(**settings)
    assert caught.value.exit_code == 2
