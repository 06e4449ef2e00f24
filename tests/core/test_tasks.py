"""Tasks through lm-evaluation-harness on a tiny model, with small files made here."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvq_core.errors import KvqError
from kvq_core.models import LoadedModel, load_model
from kvq_core.policies import parse_policies
from kvq_core.quality import local_data, tasks
from kvq_core.quality.lm import KvqLM
from kvq_core.quality.retrieval import lookups, needles
from tests.tiny import BYTES, byte_tokenizer, save_tiny

WORDS = ["tree", "river", "stone", "house", "light", "water", "bread", "horse", "night", "table"]
HELLASWAG = {"activity_label": "Baking", "ctx_a": "A man [x] bakes.", "ctx_b": "he"}
MMLU_ROW = '"Which one, then?",a,b,c,d,B\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples of each task."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    def write(name: str, row: Any) -> None:
        (folder / name).write_text("".join(json.dumps(row(i)) + "\n" for i in range(6)))

    write("lambada_x.jsonl", lambda i: {"context": text(5 + i), "continuation": rng.choice(WORDS)})
    write(
        "arc_easy.jsonl",
        lambda i: {"query": f"Question: {text(4)}?", "choices": [text(2), text(3)], "gold": i % 2},
    )
    write("hellaswag.jsonl", lambda i: {**HELLASWAG, "endings": [text(2), text(3), text(4)], "label": i % 3})
    write("gsm8k.jsonl", lambda i: {"question": text(3), "answer": f"{text(2)}\n#### {i}"})
    for part in ("dev", "val"):
        (folder / "mmlu" / part).mkdir(parents=True)
        for subject in ("art", "game_theory"):
            (folder / "mmlu" / part / f"{subject}_{part}.csv").write_text(MMLU_ROW * 3)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(
        tmp_path_factory.mktemp("model"),
        vocab_size=BYTES + 1,
        max_position_embeddings=1024,
        eos_token_id=BYTES,
    )
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path) -> LoadedModel:
    return load_model(str(model_folder), dtype="float32", device="cpu")


def specs(names: list[str], folder: Path) -> list[Any]:
    return [tasks._spec(name, None, folder, 1, None, 256, 0) for name in names]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_policy_none_equals_the_harness_own_backend(
    model: LoadedModel, model_folder: Path, folder: Path, batch_size: int
) -> None:
    names = ["lambada", "arc_easy", "hellaswag", "mmlu"]
    options: dict[str, Any] = {"folder": folder, "batch_size": batch_size, "num_fewshot": 2}
    ours = tasks.evaluate_tasks(model, names, parse_policies("none"), **options).rows[0]
    theirs = HFLM(str(model_folder), dtype="float32", device="cpu", batch_size=batch_size)
    manager = TaskManager(include_defaults=False)
    loaded = tasks._load(manager, specs(names, folder), 2, 0)
    with tasks._quietly():
        found = evaluate(theirs, task_dict=loaded, bootstrap_iters=tasks.BOOTSTRAPS, log_samples=False)
    assert ours.scores == tasks._scores(found["results"])
    assert ours.samples == dict.fromkeys(names, 6)


def test_generation_equals_the_harness_own_backend(
    model: LoadedModel, model_folder: Path, folder: Path
) -> None:
    """Texts, not scores: a random model solves nothing."""
    texts = []
    for lm in (
        KvqLM(model, batch_size=3),
        HFLM(str(model_folder), dtype="float32", device="cpu", batch_size=3),
    ):
        loaded = tasks._load(TaskManager(include_defaults=False), specs(["gsm8k"], folder), 1, 0)
        loaded["tasks"]["gsm8k"].set_config("generation_kwargs", {"until": ["\n"], "max_gen_toks": 12})
        samples = evaluate(lm, task_dict=loaded, log_samples=True)["samples"]["gsm8k"]
        texts.append([sample["resps"] for sample in samples])
    assert texts[0] == texts[1] and len(str(texts[0])) > 100


def test_fewer_bits_move_the_scores_further_away(model: LoadedModel, folder: Path) -> None:
    rows = tasks.evaluate_tasks(
        model, ["lambada"], parse_policies("none,8,lm2,lm2+s4r64"), folder=folder, batch_size=4
    ).rows
    none, int8, lm2, window = (row.scores["lambada_perplexity"] for row in rows)
    assert 0 < abs(int8 / none - 1) < 0.05 < abs(lm2 / none - 1)
    assert window == pytest.approx(none, rel=1e-3)  # 68 tokens hold the longest sample
    assert [row.policy.label for row in rows] == ["none", "int8", "lm2", "lm2+s4r64"]


def test_kvq_is_registered_with_the_harness(model_folder: Path, folder: Path) -> None:
    found = simple_evaluate(
        "kvq",
        model_args={"pretrained": str(model_folder), "policy": 42, "dtype": "float32"},
        tasks=specs(["arc_easy"], folder),
        task_manager=TaskManager(include_defaults=False),
        limit=2,
        log_samples=False,
    )
    assert found is not None and found["n-samples"]["arc_easy"]["effective"] == 2


@pytest.mark.parametrize("make", [needles, lookups])
def test_generated_tasks_hold_their_answer_once_at_every_depth(make: Any) -> None:
    docs = make(len, 2000, 22, 0)
    assert docs == make(len, 2000, 22, 0) != make(len, 2000, 22, 1)
    assert len({doc["context"] for doc in docs}) == 22
    places = []
    for doc in docs:
        assert 1900 < len(doc["context"]) < 2100
        fact = f"{doc['context'].splitlines()[-1]} {doc['continuation']}"
        assert doc["context"].count(fact) == 1
        places.append(doc["context"].index(fact) / len(doc["context"]))
    assert places[:11] == sorted(places[:11]) and places[0] < 0.1 and places[10] > 0.9


def test_published_forms_are_understood() -> None:
    assert local_data.lambada({"text": "a b c"}) == {"context": "a b", "continuation": "c"}
    row = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    assert local_data.arc(row) == {"question": "Q?", "choices": ["x", "y"], "gold": 1}
    row = {**HELLASWAG, "endings": ["a [title] b"], "label": "0"}
    sample = local_data.hellaswag(row)
    assert sample == {"question": "Baking: A man bakes. He", "choices": ["a. b"], "gold": 0}


def test_mmlu_asks_subjects_in_turns_with_their_own_examples(folder: Path) -> None:
    samples = local_data.read_samples("mmlu", folder)
    assert len(samples) == 6 and all(s["gold"] == 1 for s in samples)
    assert "about art." in samples[0]["question"] and "about game theory." in samples[1]["question"]
    assert samples[0]["question"].count("Answer: B") == 3 and samples[0]["question"].endswith("Answer:")


def test_mistakes_are_told(model: LoadedModel, folder: Path, tmp_path: Path) -> None:
    none = parse_policies("none")
    with pytest.raises(KvqError, match="no task 'lambda'"):
        tasks.evaluate_tasks(model, ["lambda"], none, folder=folder)
    with pytest.raises(KvqError, match="must lie in 2 … 1024"):
        tasks.evaluate_tasks(model, ["needle"], none, context_len=1025)
    with pytest.raises(KvqError, match="is no folder"):
        tasks.check_names(["lambada"], tmp_path / "nowhere")
    with pytest.raises(KvqError, match=r"holds no file lambada\*.jsonl"):
        tasks.check_names(["lambada"], tmp_path)
    with pytest.raises(KvqError, match="not MMLU"):
        tasks.check_names(["mmlu"], tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "?", "answer": "!"}\n{"question": "?"}\n')
    with pytest.raises(KvqError, match=r"gsm8k.jsonl, line 2 .* KeyError 'answer'"):
        tasks.check_names(["gsm8k"], tmp_path)
    (tmp_path / "own.yaml").write_text(
        "task: own\noutput_type: nonsense\ntest_split: test\ndataset_path: json\n"
    )
    with pytest.raises(KvqError, match="harness failed on own"):
        tasks.evaluate_tasks(model, ["own"], none, folder=tmp_path)
