"""The engine on a tiny random model: order, ends, limits, cancelling, memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.engine.engine import Engine
from kvq_core.engine.graphs import StepGraphs
from kvq_core.engine.inputs import Sizes
from kvq_core.engine.runner import ModelRunner
from kvq_core.engine.scheduler import Step
from kvq_core.errors import KvqError, UsageError
from kvq_core.models import LoadedModel, load_model
from tests.tiny import save_tiny

MAKE = Callable[..., Engine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny(
        tmp_path_factory.mktemp("tiny"), vocab_size=97, num_hidden_layers=3, max_position_embeddings=300,
        eos_token_id=96,
    )  # fmt: skip
    return load_model(str(folder), dtype="float64", device="cpu", need_tokenizer=False)


@pytest.fixture
def make(model: LoadedModel) -> Iterator[MAKE]:
    engines: list[Engine] = []

    def build(**settings: object) -> Engine:
        defaults: dict[str, object] = {
            "page_size": 16,
            "max_num_seqs": 4,
            "prefill_chunk": 32,
            "kv_memory": 8 << 20,
        }
        engines.append(Engine(model, EngineConfig(**{**defaults, **settings})))  # type: ignore[arg-type]
        return engines[-1]

    yield build
    for engine in engines:
        engine.cache.blocks.check()


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 90, (count,), generator=generator).tolist()
    return [torch.randint(0, 96, (n,), generator=generator).tolist() for n in lengths]


def generate(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    ids = [engine.add_request(p, params) for p in prompts]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    assert all(g.allocator.num_used == 0 for g in engine.cache.blocks.groups)
    return [tokens[i] for i in ids]


LONG = SamplingParams(max_new_tokens=60, ignore_eos=True)


@pytest.mark.parametrize("policy", ["none", "8", "4", "42", "fp8", "int8:lm4"])
@pytest.mark.parametrize("window", [(0, 0), (2, 20)], ids=["all-quantized", "sink-recent"])
def test_a_request_gives_the_same_tokens_whatever_else_runs(
    make: MAKE, policy: str, window: tuple[int, int]
) -> None:
    settings = {"policy": policy, "sink": window[0], "recent": window[1]}
    texts = prompts(9)
    alone = [generate(make(**settings), [p], LONG)[0] for p in texts]
    assert generate(make(**settings), texts, LONG) == alone


@pytest.mark.parametrize("policy", ["none", "4", "42"])
@pytest.mark.parametrize("swap", [1 << 30, 0], ids=["swapped", "computed-again"])
@pytest.mark.parametrize("window", [(0, 0), (2, 20)], ids=["all-quantized", "sink-recent"])
def test_preemption_changes_no_token(make: MAKE, policy: str, swap: int, window: tuple[int, int]) -> None:
    settings = {"policy": policy, "sink": window[0], "recent": window[1]}
    texts = prompts(6)
    expected = generate(make(**settings), texts, LONG)
    roomy = make(**settings)
    pages = 14 * sum(g.page_bytes for g in roomy.plan.groups)
    tight = make(**settings, kv_memory=pages + 4 * roomy.plan.raw_bytes_per_request, swap_memory=swap)
    assert generate(tight, texts, LONG) == expected
    assert tight.kv_stats()["preemptions"] > 0


def test_the_end_of_sequence_ends_an_answer(make: MAKE) -> None:
    texts = prompts(8)
    free = generate(make(), texts, LONG)
    stop = free[0][10]
    engine = make()
    reasons = {}
    for p in texts:
        engine.add_request(p, SamplingParams(max_new_tokens=60, ignore_eos=True, stop_token_ids=(stop,)))
    tokens: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finished:
                reasons[output.request_id] = output.finish_reason
    for i, answer in enumerate(free):
        end = answer.index(stop) + 1 if stop in answer else 60
        assert tokens[i] == answer[:end]
        assert reasons[i] == ("stop" if stop in answer else "length")


def test_cancelling_frees_pages_wherever_the_request_is(make: MAKE) -> None:
    engine = make(max_num_seqs=2)
    ids = [engine.add_request(p, LONG) for p in prompts(5)]
    for _ in range(4):
        engine.step()
    for i in ids:
        engine.cancel(i)
    engine.cancel(ids[0])
    while engine.has_work:
        assert engine.step() == []
    assert all(g.allocator.num_used == 0 for g in engine.cache.blocks.groups)


def test_sampling_with_a_seed_repeats_and_differs_between_seeds(make: MAKE) -> None:
    texts = prompts(3)
    first, again, other = (
        generate(make(), texts, SamplingParams(max_new_tokens=30, temperature=1.0, seed=s, ignore_eos=True))
        for s in (1, 1, 2)
    )
    assert first == again != other


def test_limits_are_told_before_anything_runs(make: MAKE) -> None:
    engine = make(max_model_len=64)
    with pytest.raises(KvqError, match="takes 64 tokens"):
        engine.add_request([1] * 64, LONG)
    with pytest.raises(KvqError, match="empty"):
        engine.add_request([], LONG)
    with pytest.raises(KvqError, match="outside"):
        engine.add_request([97], LONG)
    assert len(generate(engine, [[1] * 60], LONG)[0]) == 4  # what fits


def test_a_prompt_beyond_the_cache_is_refused_with_the_way_out(make: MAKE) -> None:
    roomy = make()
    page = sum(g.page_bytes for g in roomy.plan.groups)
    with pytest.raises(KvqError, match="cache holds 48") as caught:
        make(kv_memory=4 * page).add_request([1] * 50, LONG)
    assert "--kv-memory" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kv_memory": 1000}, "hold no request"),
        ({"kv_memory": 1 << 60}, "are free"),
    ],
)
def test_memory_that_does_not_work_is_an_error(make: MAKE, settings: dict[str, int], match: str) -> None:
    with pytest.raises(KvqError, match=match):
        make(**settings)


def test_settings_that_do_not_work_are_usage_errors(make: MAKE) -> None:
    with pytest.raises(UsageError, match="page_size"):
        EngineConfig(page_size=20)
    with pytest.raises(UsageError, match="below prefill_chunk"):
        make(max_num_batched_tokens=16)
    with pytest.raises(UsageError, match="more than"):
        make(max_model_len=301)
    with pytest.raises(UsageError, match="loaded with tp=1"):
        make(tp=2)


def test_raw_windows_count_in_memory_capacity_and_bits(make: MAKE) -> None:
    plain, window = make(policy=42), make(policy=42, sink=4, recent=28)
    a, b = plain.kv_stats(), window.kv_stats()
    assert b["raw_window_bytes"] == 4 * 32 * 3 * 2 * (32 + 32) * 8
    assert b["capacity_tokens"] < a["capacity_tokens"]
    assert b["bits_per_element"] > a["bits_per_element"] == 8 * a["bytes_per_token"] / (3 * 2 * 64)


def test_memory_that_is_stated_is_memory_that_is_allocated(make: MAKE) -> None:
    engine = make(policy=8, sink=2, recent=6)
    pages = sum(p.numel() for p in engine.cache.group_pages)
    raw = sum(
        t[:-1].numel() * t.element_size()
        for layer in engine.cache.layers
        if layer.raw is not None
        for t in (layer.raw.keys, layer.raw.values)
    )
    assert engine.kv_stats()["memory_bytes"] == pages + raw
    assert engine.kv_stats()["memory_bytes"] <= 8 << 20


def test_a_model_that_no_graph_can_hold_runs_eagerly_with_a_warning(
    make: MAKE, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(runner: ModelRunner, progress: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = generate(make(), prompts(3), LONG)
    monkeypatch.setattr(ModelRunner, "capture", refuse)
    with caplog.at_level("WARNING", "kvq"):
        engine = make()
    assert "without CUDA graphs" in caplog.text and engine.runner.graphs is None
    assert generate(engine, prompts(3), LONG) == expected


@pytest.mark.parametrize(
    ("settings", "windowed", "chunk"),
    [
        ({}, False, 8192),
        ({}, True, 2048),
        ({"prefix_caching": True}, True, 256),
        ({"prefix_caching": True, "prefill_chunk": 512}, False, 512),
    ],
)
def test_how_prompts_are_cut(settings: dict[str, Any], windowed: bool, chunk: int) -> None:
    assert EngineConfig(**settings).chunk(windowed) == chunk


@pytest.mark.parametrize("policy", ["0", "42", "8+s4r16"])
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["plain", "fidelity"])
def test_padded_steps_give_the_same_tokens(make: MAKE, policy: str, share: float) -> None:
    """What CUDA graphs run: decodes and chunks share a step's tokens, and padding follows."""
    texts = []
    for padded in (False, True):
        engine = make(policy=policy, max_num_seqs=6, fidelity=share)
        runner = engine.runner
        budget = engine.config.max_num_batched_tokens
        if padded:
            assert budget is not None
            runner.graphs = StepGraphs(runner._forward, runner.padding_row, budget, runner.device)
        texts.append(generate(engine, prompts(12), LONG))
    assert texts[0] == texts[1]


def test_a_step_runs_in_the_smallest_sizes_it_fits() -> None:
    graphs = StepGraphs(lambda *_, **__: torch.empty(0), 64, 8192, torch.device("cpu"))
    assert graphs.fit(Sizes(3, 3, 0)) == Sizes(4, 4, 0)
    assert graphs.fit(Sizes(3, 300, 2)) == Sizes(64, 320, 16), "without history, no kernel looks for one"
    assert graphs.fit(Sizes(3, 300, 2, history=True)) == Sizes(64, 320, 16, history=True)
    assert graphs.fit(Sizes(0, 2049, 1)) is None
    assert graphs.fit(Sizes(0, 17, 17)) is None


@pytest.mark.parametrize("policy", ["0", "42", "4+s4r16"])
def test_several_chunks_of_a_prompt_in_a_step_change_no_token(make: MAKE, policy: str) -> None:
    texts, chunks = [], []
    for budget in (36, 400):
        engine = make(policy=policy, max_num_batched_tokens=budget)
        schedule, most = engine.scheduler.schedule, 0

        def count() -> Step:
            nonlocal most
            step = schedule()  # noqa: B023
            ids = [chunk.request.id for chunk in step.chunks]
            most = max([most, *map(ids.count, ids)])
            return step

        engine.scheduler.schedule = count  # type: ignore[method-assign]
        texts.append(generate(engine, prompts(8), LONG))
        chunks.append(most)
    assert texts[0] == texts[1]
    assert chunks == [1, 1 if "r16" in policy else 3], "a raw window is read as the chunk before left it"


def test_tokens_behind_all_windows_take_no_room(tmp_path: Path) -> None:
    changes = {"sliding_window": 12, "max_position_embeddings": 256}
    folder = save_tiny(tmp_path, "mistral", **changes)
    model = load_model(str(folder), dtype="float32", device="cpu", need_tokenizer=False)
    config = EngineConfig(policy=8, page_size=16, prefill_chunk=16, max_num_seqs=4, kv_memory=1 << 20)
    engine, used = Engine(model, config), 0
    for i in range(4):
        engine.add_request([i + 2] * 100, SamplingParams(max_new_tokens=60, ignore_eos=True))
    while engine.has_work:
        engine.step()
        used = max(used, engine.load.pages_used)
    assert engine.kv_stats()["peak_tokens"] == 16 * used <= 16 * 4 * 3
    assert engine.kv_stats()["tokens"] == 0
