"""Cached prefixes: random traces on a simulated device, and the same tokens from an engine with and without.

A simulated page holds, for each token, what its bytes would depend on: all tokens up to it, and the chunk
that it was computed in.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvq_core.cache.blocks import BlockManager, GroupShape
from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.engine.engine import Engine
from kvq_core.engine.request import Request
from kvq_core.engine.scheduler import Scheduler, SchedulerConfig, Step
from kvq_core.models import LoadedModel, load_model

PAGE = 16
BASES = [[base * 1000 + i for i in range(150)] for base in range(3)]
"""What prompts begin with."""


def next_token(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % 500


@dataclass
class SimulatedDevice:
    """Runs steps as the runner does, and asserts that every query finds what it would without a cache."""

    blocks: BlockManager
    chunk: int
    exact: bool
    has_raw: bool
    pages: list[np.ndarray] = field(default_factory=list)
    raw: dict[int, int] = field(default_factory=dict)
    """Row -> what its raw window holds: the tokens up to the latest."""
    kept: dict[bytes, int] = field(default_factory=dict)
    """Cached chunk -> the same, as it left it."""
    swapped: dict[int, tuple[list[np.ndarray], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pages = [np.zeros((g.shape.num_pages, PAGE), dtype=np.int64) for g in self.blocks.groups]

    def mark(self, request: Request, position: int) -> int:
        chunk: Any = ()
        if position < len(request.prompt) and not self.exact:
            start = position // self.chunk * self.chunk
            chunk = start, min(start + self.chunk, len(request.prompt))
        return hash((tuple(request.tokens(0, position + 1)), chunk))

    def run(self, step: Step) -> list[int]:
        for swap in step.swap_out:
            copies = [p[ids].copy() for p, ids in zip(self.pages, swap.pages, strict=True)]
            self.swapped[swap.request.id] = copies, self.raw[swap.row]
        for swap in step.swap_in:
            copies, self.raw[swap.row] = self.swapped.pop(swap.request.id)
            for p, ids, data in zip(self.pages, swap.pages, copies, strict=True):
                p[ids] = data
        for chunk, row in step.raw_in:
            self.raw[row] = self.kept[chunk.key]
        work = [(r, n - 1, n) for r, n in zip(step.decodes, step.context_lens, strict=True)]
        work += [(c.request, c.start, c.end) for c in step.chunks]
        for request, start, end in work:
            assert start < end
            for g, p in zip(self.blocks.groups, self.pages, strict=True):
                for position in range(start, end):
                    page = int(g.table[request.row, position // PAGE])
                    assert g.allocator._users[page] == 1, "a page that another request reads is written"
                    p[page, position % PAGE] = self.mark(request, position)
            if start and self.has_raw:
                assert self.raw[request.row] == hash(tuple(request.tokens(0, start)))
            self.raw[request.row] = hash(tuple(request.tokens(0, end)))
        for request, start, end in work:
            for g, p in zip(self.blocks.groups, self.pages, strict=True):
                first = max(0, start - g.shape.window + 1) if g.shape.window else 0
                seen = [p[g.table[request.row, j // PAGE], j % PAGE] for j in range(first, end)]
                assert seen == [self.mark(request, j) for j in range(first, end)]
        for row, chunk in step.raw_out:
            self.kept[chunk.key] = self.raw[row]
        return [next_token(request.tokens(0, request.computed)) for request in step.sampled]


class Traces(RuleBasedStateMachine):
    """Requests come, share prefixes, are cancelled, preempted and finished, in any order."""

    window, chunk, swap_memory, exact = 0, 32, 10**9, False
    seen: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        groups = [GroupShape(0, 17, 3)] + ([GroupShape(self.window, 17, 2)] if self.window else [])
        self.blocks = BlockManager(groups, PAGE, num_rows=4, max_tokens=256)
        raw_bytes = 5 if self.swap_memory else 0
        config = SchedulerConfig(self.chunk, 45, self.swap_memory, raw_bytes, self.exact, prefix_root=b"root")
        self.scheduler = Scheduler(config, self.blocks)
        self.device = SimulatedDevice(self.blocks, self.chunk, self.exact, has_raw=raw_bytes > 0)
        self.live: dict[int, Request] = {}
        self.next_id = 0

    @rule(
        base=st.sampled_from(BASES),
        shared=st.integers(0, 130),
        own=st.integers(1, 40),
        max_tokens=st.integers(1, 60),
    )
    @precondition(lambda self: len(self.live) < 8)
    def add(self, base: list[int], shared: int, own: int, max_tokens: int) -> None:
        prompt = base[:shared] + [5000 + self.next_id] * own
        request = Request(self.next_id, prompt, SamplingParams(), max_tokens)
        self.live[request.id] = request
        self.scheduler.add(request)
        self.next_id += 1

    @rule(again=st.integers(0, 7))
    @precondition(lambda self: self.live)
    def add_again(self, again: int) -> None:
        """The same prompt as somebody's, a page longer or as it is."""
        prompt = list(self.live.values())[again % len(self.live)].prompt
        request = Request(self.next_id, prompt[: len(prompt) // PAGE * PAGE] or prompt, SamplingParams(), 3)
        self.live[request.id] = request
        self.scheduler.add(request)
        self.next_id += 1

    @rule(which=st.integers(0, 7))
    @precondition(lambda self: self.live)
    def cancel(self, which: int) -> None:
        request = list(self.live.values())[which % len(self.live)]
        self.scheduler.finish(request)
        self.device.swapped.pop(request.id, None)
        del self.live[request.id]

    @rule(steps=st.integers(1, 12))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            step = self.scheduler.schedule()
            self.blocks.check()
            assert not step.is_empty or not self.scheduler.has_work, "stuck"
            tokens = self.device.run(step)
            for request, token in zip(step.sampled, tokens, strict=True):
                request.output.append(token)
                if len(request.output) == request.max_tokens:
                    self.scheduler.finish(request)
                    del self.live[request.id]

    @invariant()
    def pages_are_accounted_for(self) -> None:
        self.blocks.check()
        used = {p for r in self.scheduler.running for p in self.blocks.held(r.row)[0][1]}
        assert self.blocks.groups[0].allocator.num_used == len(used), "shared pages count once"
        assert self.scheduler._host_free >= 0

    def teardown(self) -> None:
        for _ in range(5000):
            if not self.scheduler.has_work:
                break
            self.run(1)
        self.seen["preemptions"] += self.scheduler.preemptions
        self.seen["cached"] += self.scheduler.cached_tokens
        assert not self.live and not self.device.swapped
        assert self.blocks.tokens == 0
        for group in self.blocks.groups:
            assert group.allocator.num_used == group.allocator.num_shares == 0
        while len(self.blocks.prefix):
            self.blocks.evict()
        assert all(g.allocator.num_free == g.shape.num_pages - 1 for g in self.blocks.groups)


QUIET = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize(("window", "chunk"), [(0, 32), (24, 32), (40, 24)])
@pytest.mark.parametrize("swap", ["swap", "short", "recompute", "exact"])
def test_random_traces_lose_no_page_and_mix_up_no_prefix(window: int, chunk: int, swap: str) -> None:
    memory = {"swap": 10**9, "short": 60, "recompute": 0, "exact": 0}[swap]
    settings = {"window": window, "chunk": chunk, "swap_memory": memory, "exact": swap == "exact"}
    machine: Any = type("Case", (Traces,), settings | {"seen": Counter()})
    case = machine.TestCase
    case.settings = QUIET
    for _ in range(10):  # few draws preempt nobody
        case("runTest").debug()
        if machine.seen["preemptions"] and machine.seen["cached"] > 1000:
            return
    raise AssertionError(f"nothing happened: {machine.seen}")


def keep(blocks: BlockManager, row: int, name: str, parent: str | None, end: int, step: int) -> None:
    before = blocks.prefix.get(parent.encode()) if parent else None
    blocks.keep(row, name.encode(), before, end, step)


def test_the_least_recently_used_chunk_goes_first_and_none_before_what_builds_on_it() -> None:
    blocks = BlockManager([GroupShape(0, 9, 1)], PAGE, num_rows=2, max_tokens=128)
    row = blocks.take_row()
    assert blocks.extend(row, [64])
    for step, (name, parent, end) in enumerate([("a", None, 16), ("b", "a", 32), ("c", "b", 48)]):
        keep(blocks, row, name, parent, end, step)
    blocks.release(row)
    assert blocks.groups[0].allocator.num_idle == 3 and blocks.tokens == 0
    row = blocks.take_row()
    assert blocks.extend(row, [32])
    keep(blocks, row, "x", None, 32, 3)
    blocks.release(row)
    row = blocks.take_row()
    blocks.adopt(row, blocks.prefix.get(b"b"))  # type: ignore[arg-type]
    assert blocks.tokens == 32
    order = []
    while len(blocks.prefix):
        left = {chunk.key for chunk in blocks.prefix}
        blocks.evict()
        order += left - {chunk.key for chunk in blocks.prefix}
    assert order == [b"c", b"x", b"b", b"a"]
    assert blocks.groups[0].allocator.num_free == 6, "what a row uses stays"
    blocks.release(row)
    blocks.check()


def test_pages_that_several_rows_use_count_once_and_come_last() -> None:
    blocks = BlockManager([GroupShape(0, 7, 1)], PAGE, num_rows=3, max_tokens=96)
    first = blocks.take_row()
    assert blocks.extend(first, [40])
    keep(blocks, first, "a", None, 32, 0)
    chunk = blocks.prefix.get(b"a")
    assert chunk is not None
    rows = [blocks.take_row(), blocks.take_row()]
    for row in rows:
        assert blocks.can_admit([40], reserve=0, chunk=chunk)
        blocks.adopt(row, chunk)
        assert blocks.extend(row, [40])
    assert blocks.groups[0].allocator.num_used == 2 + 3
    assert blocks.tokens == blocks.peak_tokens == 32 + 3 * 8
    assert not blocks.extend(first, [80]), "one page is free, and what others use is not to be had"
    for row in (first, *rows):
        blocks.release(row)
    assert blocks.groups[0].allocator.num_idle == 2
    row = blocks.take_row()
    assert blocks.extend(row, [96]) and len(blocks.prefix) == 0
    blocks.check()


# The engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny(tmp_path_factory.mktemp("tiny"), None)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Every second layer sees 24 tokens."""
    return tiny(tmp_path_factory.mktemp("sliding"), 24)


def tiny(folder: Path, window: int | None) -> LoadedModel:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=300,
        initializer_range=0.3,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return load_model(str(folder), dtype="float64", device="cpu", need_tokenizer=False)


POLICIES: dict[str, dict[str, Any]] = {
    "0": {"policy": 0},
    "8": {"policy": 8},
    "42": {"policy": 42},
    "42-window": {"policy": 42, "sink": 4, "recent": 8},
}


def engine_for(model: LoadedModel, caching: bool, **options: Any) -> Engine:
    defaults = {"page_size": 16, "max_num_seqs": 16, "prefill_chunk": 32, "kv_memory": 4 << 20}
    return Engine(model, EngineConfig(prefix_caching=caching, **defaults | options))


def sharing_prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts that begin like one of a few, or like any earlier one, for a random length."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(96) for _ in range(160)] for _ in range(4)]
    while len(prompts) < count:
        first = rng.choice(prompts[:4] if rng.random() < 0.7 else prompts)
        shared = first[: rng.choice((32, 33, 64, 96, 128, rng.randrange(160)))]
        prompts.append(shared + [rng.randrange(96) for _ in range(rng.choice((0, 1, 5, 31, 32)))] or [1])
    return prompts


def answers(engine: Engine, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Greedy tokens; requests come a few at a time, so that later ones meet what earlier ones left."""
    tokens: dict[int, list[int]] = {}
    ids, waiting = [], list(zip(prompts, lengths, strict=True))
    while waiting or engine.has_work:
        while waiting and len(engine.scheduler.waiting) < 3:
            prompt, length = waiting.pop(0)
            ids.append(engine.add_request(prompt, SamplingParams(max_new_tokens=length, ignore_eos=True)))
            tokens[ids[-1]] = []
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    engine.cache.blocks.check()
    assert engine.load.pages_used == 0
    return [tokens[i] for i in ids]


@pytest.mark.parametrize("name", POLICIES)
def test_500_requests_give_the_same_tokens_with_and_without(model: LoadedModel, name: str) -> None:
    prompts = sharing_prompts(500, seed=len(name))
    lengths = [random.Random(i).choice((1, 1, 2, 4)) for i in range(500)]
    expected = answers(engine_for(model, False, **POLICIES[name]), prompts, lengths)
    engine = engine_for(model, True, **POLICIES[name])
    assert answers(engine, prompts, lengths) == expected
    assert engine.kv_stats()["prefix_hit_rate"] > 0.4


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_under_windows_little_memory_and_preemption(sliding: LoadedModel, name: str) -> None:
    prompts = sharing_prompts(60, seed=1)
    lengths = [random.Random(i).choice((4, 40)) for i in range(60)]
    expected = answers(engine_for(sliding, False, **POLICIES[name]), prompts, lengths)
    roomy = engine_for(sliding, False, **POLICIES[name])
    pages = 26 * sum(g.page_bytes for g in roomy.plan.groups) + 16 * roomy.plan.raw_bytes_per_request
    for swap in (1 << 30, 3 * roomy.plan.raw_bytes_per_request, 0):
        engine = engine_for(sliding, True, kv_memory=pages, swap_memory=swap, **POLICIES[name])
        assert answers(engine, prompts, lengths) == expected
        assert engine.scheduler.preemptions
        if swap or name != "42-window":
            assert engine.prefix_hit_rate > 0.05


def test_what_is_computed_again_is_no_hit_of_the_cache(model: LoadedModel) -> None:
    """Requests preempted without a place to swap to find their own chunks; no two prompts begin alike."""
    page = sum(group.page_bytes for group in engine_for(model, True).plan.groups)
    engine = engine_for(model, True, max_num_seqs=4, prefill_chunk=16, kv_memory=8 * page, swap_memory=0)
    prompts = [[(10 * i + j) % 96 for j in range(18)] for i in range(6)]
    assert len(answers(engine, prompts, [60] * 6)) == 6
    assert engine.kv_stats()["preemptions"] > 0
    assert (engine.load.prompt_tokens, engine.load.cached_tokens) == (6 * 18, 0)
