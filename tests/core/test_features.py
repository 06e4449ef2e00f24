"""scripts/features.py, on the CPU: features leave tokens as they are; and what is said if one does not."""

import sys
from pathlib import Path
from typing import Any

import pytest

from kvq_core.engine.engine import Engine
from kvq_core.models import LoadedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import features


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return features.biased_model(tmp_path_factory.mktemp("biased"), "float32", "cpu")


def test_all_hold(model: LoadedModel) -> None:
    rows = {row["feature"]: row for row in features.features(model, "8+s4r32")}
    assert len(rows) == 7 and all(row["ok"] for row in rows.values()), rows
    assert rows["little memory"]["preemptions"] > 0 and rows["prefix caching"]["hit_rate"] > 0.5
    assert rows["key bias off"]["biased_key_layers"] == 4


def test_other_tokens_are_a_failure(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = features.answers

    def wrong(engine: Engine, params: Any) -> Any:
        tokens, logprobs = right(engine, params)
        return [t[:-1] if engine.config.prefix_caching else t for t in tokens], logprobs

    monkeypatch.setattr(features, "answers", wrong)
    rows = features.features(model, "0")
    verdicts = {row["feature"]: row["ok"] for row in (next(rows) for _ in range(3))}
    assert verdicts == {"logprobs": True, "seeded sampling": True, "prefix caching": False}
