"""`--fidelity`: errors by layer, their order among policies, and damage that shows."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvq_core.bench.report import fidelity_table
from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.engine.engine import Engine
from kvq_core.errors import UsageError
from kvq_core.models import LoadedModel, load_model
from tests.tiny import save_tiny

MAKE = Callable[..., Engine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Two layers with a window beyond the shadow's, so that both bounds are met."""
    folder = save_tiny(
        tmp_path_factory.mktemp("tiny"), "mistral", vocab_size=97, max_position_embeddings=600,
        sliding_window=400, eos_token_id=96,
    )  # fmt: skip
    return load_model(str(folder), dtype="float64", device="cpu", need_tokenizer=False)


@pytest.fixture
def make(model: LoadedModel) -> Iterator[MAKE]:
    def build(policy: Any, fidelity: float = 1.0, **settings: Any) -> Engine:
        defaults = {"page_size": 16, "max_num_seqs": 6, "prefill_chunk": 32, "kv_memory": 8 << 20}
        return Engine(model, EngineConfig(policy=policy, fidelity=fidelity, **{**defaults, **settings}))

    yield build


def generate(engine: Engine, count: int = 3, length: int = 150, new: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    tokens: dict[int, list[int]] = {}
    for index in range(count):
        prompt = torch.randint(0, 96, (length + 7 * index,), generator=generator).tolist()
        tokens[engine.add_request(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True))] = []
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    return list(tokens.values())


def errors(engine: Engine) -> list[float]:
    return engine.kv_stats()["fidelity"]["mean_errors"]


def test_fewer_bits_are_further_off_and_none_is_exact(make: MAKE) -> None:
    means = []
    for policy in ("none", "int8", "int4", "lm2"):
        engine = make(policy)
        generate(engine)
        means.append(errors(engine))
        assert engine.kv_stats()["fidelity"]["jumps"] == 0
    for none, int8, int4, lm2 in zip(*means, strict=True):
        assert none < 1e-6 < int8 < int4 < lm2 < 1


def test_unquantized_recent_tokens_help_where_they_do(make: MAKE) -> None:
    """The window reaches 128 tokens beyond the recent ones, so that it never goes blind."""
    plain, window = make("lm2"), make("lm2+s4r128")
    for engine in (plain, window):
        generate(engine, length=300)
    assert window.kv_stats()["fidelity"]["window"] == 256
    assert all(0 < b < a for a, b in zip(errors(plain), errors(window), strict=True))


def test_tokens_are_the_same_and_a_share_is_sampled(make: MAKE) -> None:
    off, some, every = make(42, 0.0), make(42, 0.25), make(42, 1.0)
    assert generate(off, count=8) == generate(some, count=8) == generate(every, count=8)
    assert "fidelity" not in off.kv_stats() and off.fidelity is None
    steps = every.kv_stats()["fidelity"]["steps"]
    assert 0.05 * steps < some.kv_stats()["fidelity"]["steps"] < 0.5 * steps


@pytest.mark.parametrize("policy", ["none", "int8", "42"])
def test_a_damaged_page_is_a_jump(policy: str, make: MAKE, caplog: pytest.LogCaptureFixture) -> None:
    engine = make(policy)
    engine.add_request(list(range(60)), SamplingParams(max_new_tokens=60, ignore_eos=True))
    while engine.kv_stats()["fidelity"]["steps"] < 20:
        engine.step()
    assert engine.fidelity is not None and engine.fidelity.jumps == 0 and not caplog.records
    table = engine.cache.blocks.groups[0].table
    page = int(table[table.any(axis=1)][0, 2])
    pages = engine.cache.layers[1].pages
    pages[page] ^= 0x55
    with caplog.at_level(logging.WARNING, "kvq"):
        engine.step()
    assert engine.fidelity.jumps == 1 and "layer 1 is off by" in caplog.text
    assert len(caplog.records) == 1 and engine.fidelity.layers[0].worst < 0.6
    engine.reset_stats()
    assert engine.kv_stats()["fidelity"] == {
        "share": 1.0, "window": 128, "steps": 0, "mean_errors": [0, 0], "worst_errors": [0, 0], "jumps": 0,
    }  # fmt: skip


def test_contexts_that_outgrow_the_unquantized_tokens_are_no_jump(
    make: MAKE, caplog: pytest.LogCaptureFixture
) -> None:
    """Short ones are exact, and longer ones as far off as the codec is: no page is damaged."""
    engine = make("42+s4r100")
    for length in (40, 90, 300):
        generate(engine, count=1, length=length, new=20)
    found = engine.kv_stats()["fidelity"]
    assert found["jumps"] == 0 and not caplog.records
    assert min(found["worst_errors"]) > 3 * 0.02, "errors that would be jumps from none"
    assert engine.fidelity is not None and engine.fidelity.layers[0].median == 0


def test_a_preempted_request_is_not_compared_with_anothers_tokens(make: MAKE) -> None:
    """Too little memory for all: rows change hands, and what the shadow holds of others does not count."""
    engine = make("int8", kv_memory=46_000, swap_memory=1 << 20, max_num_seqs=4)
    generate(engine, count=4, length=60, new=60)
    assert engine.kv_stats()["preemptions"] > 0
    found = engine.kv_stats()["fidelity"]
    assert found["steps"] > 20 and max(found["worst_errors"]) < 0.05


def test_the_table_and_mistakes(make: MAKE) -> None:
    engine = make("int4")
    generate(engine)
    table = fidelity_table(engine.kv_stats()["fidelity"])
    assert "128 tokens" in table.title and len(table.rows) == 2
    with pytest.raises(UsageError, match="fidelity must lie"):
        EngineConfig(fidelity=1.5)
