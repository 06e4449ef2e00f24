"""scripts/steady.py: steady decodes without their prompts, and how long a set of spans is."""

import sys
from pathlib import Path

import pytest

from kvq_core.config import EngineConfig
from kvq_core.engine.engine import Engine
from kvq_core.models import LoadedModel, load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from steady import busy_time, without_prompts


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0), ([(1, 3)], 2), ([(4, 5), (1, 3)], 3), ([(1, 4), (2, 3), (3.5, 6)], 5), ([(0, 1), (1, 2)], 2)],
)
def test_the_union_of_spans(spans: list[tuple[float, float]], length: float) -> None:
    assert busy_time(spans) == length


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("tiny")
    LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=300,
    ).save_pretrained(folder)
    return load_model(str(folder), load_format="dummy", device="cpu", need_tokenizer=False)


def test_requests_stand_at_their_context_and_go_on(model: LoadedModel) -> None:
    engine = Engine(model, EngineConfig(policy=42, max_num_seqs=3, page_size=16, kv_memory=4 << 20))
    without_prompts(engine, 3, context=100, answer=5)
    held = [(r.computed, r.scheduled_outputs) for r in engine.scheduler.running]
    assert len(held) == 3 and all(100 <= computed <= 102 for computed, _ in held)
    while engine.has_work:
        engine.step()
    assert all(g.allocator.num_used == 0 for g in engine.cache.blocks.groups)
    engine.close()
