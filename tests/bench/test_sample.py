"""The shipped sample: made by its script, in ShareGPT's schema, with ShareGPT's lengths."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from kvq_core.bench.sharegpt import find_dataset, read_conversations
from kvq_core.bench.workload import WorkloadSpec, make_workload, read_dataset

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_sample.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_sample", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_script_writes_exactly_the_committed_file(script):
    assert json.loads(find_dataset(None).read_text("utf-8")) == script.make_sample()


def test_size_and_schema():
    path = find_dataset(None)
    assert path.stat().st_size < 1_000_000
    conversations = json.loads(path.read_text("utf-8"))
    assert len(conversations) == 320 and len({entry["id"] for entry in conversations}) == 320
    pairs, dropped = read_conversations(conversations, path)
    assert len(pairs) == 320 and not dropped
    assert len(set(pairs)) == 320
    for entry in conversations:
        assert [turn["from"] for turn in entry["conversations"]][:2] == ["human", "gpt"]
        assert not any("{" in turn["value"] and "}" in turn["value"] and "def" not in turn["value"]
                       and "class" not in turn["value"] for turn in entry["conversations"])  # fmt: skip


def test_lengths_are_sharegpts_by_the_estimate(script):
    class Estimate:
        def __call__(self, texts, *, add_special_tokens):
            return {"input_ids": [[0] * script.estimate_tokens(text) for text in texts]}

    check_lengths(Estimate())


def check_lengths(tokenizer):
    """Means near 220 in and 204 out, long tails, and hardly anything lost to the filter."""
    spec = WorkloadSpec(num_prompts=320, num_warmup=0)
    workload = make_workload(spec, read_dataset(spec), tokenizer=tokenizer, vocab_size=0)
    described = workload.describe()
    assert described["distinct_prompts"] >= 316
    assert described["mean_input_len"] == pytest.approx(220, rel=0.03)
    assert described["mean_output_len"] == pytest.approx(204, rel=0.03)
    for lengths in ([r.input_len for r in workload.requests], [r.output_len for r in workload.requests]):
        ordered = sorted(lengths)
        median, tail = ordered[160], ordered[304]
        assert median < 0.8 * sum(ordered) / len(ordered) and tail > 2.5 * sum(ordered) / len(ordered)
        assert ordered[0] < 20 and ordered[-1] > 800
