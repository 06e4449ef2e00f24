"""The scheduler against a simulated device whose pages hold (request, position) marks instead of numbers."""

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from kvq_core.cache.blocks import BlockManager, GroupShape
from kvq_core.config import SamplingParams
from kvq_core.engine.request import Request, Status
from kvq_core.engine.scheduler import (
    MOST_PAIRS,
    MOST_TOGETHER,
    SMALLEST_CHUNK,
    Scheduler,
    SchedulerConfig,
    Step,
    chunk_end,
)

PAGE = 16


def token_after(request_id: int, position: int) -> int:
    return (request_id * 7919 + position * 104729) % 1000


@dataclass
class SimulatedDevice:
    """Runs steps as the runner does and asserts that every query finds the keys it may read."""

    blocks: BlockManager
    pages: list[np.ndarray] = field(default_factory=list)
    swapped: dict[int, list[np.ndarray]] = field(default_factory=dict)
    inputs: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pages = [np.full((g.shape.num_pages, PAGE), -1) for g in self.blocks.groups]

    def run(self, step: Step) -> list[int]:
        for swap in step.swap_out:
            self.swapped[swap.request.id] = [
                p[ids].copy() for p, ids in zip(self.pages, swap.pages, strict=True)
            ]
        for swap in step.swap_in:
            for p, ids, data in zip(self.pages, swap.pages, self.swapped.pop(swap.request.id), strict=True):
                p[ids] = data
        self.inputs.update(step.forced)
        work = [(r, n - 1, n) for r, n in zip(step.decodes, step.context_lens, strict=True)]
        assert step.context_lens == sorted(step.context_lens, reverse=True)
        for request, position, _ in work:
            assert self.inputs[request.row] == request_token(request, position)
        work += [(c.request, c.start, c.end) for c in step.chunks]
        for request, start, end in work:
            for g, p in zip(self.blocks.groups, self.pages, strict=True):
                for position in range(start, end):
                    page = g.table[request.row, position // PAGE]
                    assert page != 0
                    p[page, position % PAGE] = mark(request, position)
        for request, start, end in work:
            for g, p in zip(self.blocks.groups, self.pages, strict=True):
                first = max(0, start - g.shape.window + 1) if g.shape.window else 0
                seen = [p[g.table[request.row, j // PAGE], j % PAGE] for j in range(first, end)]
                assert seen == [mark(request, j) for j in range(first, end)]
        tokens = []
        for request, _, end in [work[i] for i in step.sampled_decodes] + [
            work[len(step.decodes) + i] for i in step.sampled_chunks
        ]:
            tokens.append(token_after(request.id, end - 1))
            self.inputs[request.row] = tokens[-1]
        return tokens


def mark(request: Request, position: int) -> int:
    return request.id * 100_000 + position


def request_token(request: Request, position: int) -> int:
    n = len(request.prompt)
    return request.prompt[position] if position < n else token_after(request.id, position - 1)


def drive(
    seed: int, *, steps: int, window: int, depth: int, swap_memory: int, exact: bool, budget: int = 45
) -> Scheduler:
    """Random arrivals, cancellations and lengths for `steps` steps; returns the drained scheduler.

    With a budget of several chunks, and no window, steps carry several of a request.
    """
    rng = random.Random(seed)
    groups = [GroupShape(0, 17, 3)] + ([GroupShape(window, 17, 2)] if window else [])
    blocks = BlockManager(groups, PAGE, num_rows=6, max_tokens=200)
    config = SchedulerConfig(
        prefill_chunk=32, token_budget=budget, swap_memory=swap_memory, row_bytes=1, exact_recompute=exact,
        consecutive=budget > 45,
    )  # fmt: skip
    scheduler, device = Scheduler(config, blocks), SimulatedDevice(blocks)
    in_flight: deque[tuple[Step, list[int]]] = deque()
    live: dict[int, Request] = {}
    next_id = done = 0
    while done < steps or scheduler.has_work or in_flight:
        if done < steps and len(live) < 12 and rng.random() < 0.5:
            prompt = [rng.randrange(1000) for _ in range(rng.choice((1, 2, 31, 32, 33, 64, 100)))]
            request = Request(next_id, prompt, SamplingParams(), max_tokens=rng.randrange(1, 80))
            live[next_id] = request
            scheduler.add(request)
            next_id += 1
        if live and rng.random() < 0.02:
            scheduler.finish(live.pop(rng.choice(list(live))))
        step = scheduler.schedule()
        blocks.check()
        assert step.num_tokens <= config.token_budget
        for chunk in step.chunks:
            assert chunk.start % 32 == 0 and (chunk.end % 32 == 0 or chunk.end == chunk.request.prefill_len)
        if not step.is_empty:
            in_flight.append((step, device.run(step)))
        else:
            assert in_flight or not scheduler.has_work, "stuck"
        if in_flight and (step.is_empty or len(in_flight) > depth):
            finished, tokens = in_flight.popleft()
            for request, token in zip(finished.sampled, tokens, strict=True):
                if request.status is Status.FINISHED:
                    continue
                assert token == token_after(request.id, request.known - 1)
                request.output.append(token)
                if len(request.output) == request.max_tokens or token % 97 == 0:
                    scheduler.finish(request)
                    del live[request.id]
        done += 1
    assert not live
    assert all(g.allocator.num_used == 0 for g in blocks.groups)
    return scheduler


@pytest.mark.parametrize(
    ("window", "budget"), [(0, 45), (0, 110), (24, 45)], ids=["full", "together", "sliding"]
)
@pytest.mark.parametrize("depth", [0, 1], ids=["sync", "ahead"])
@pytest.mark.parametrize("swap", ["swap", "short", "recompute", "replay"])
def test_every_request_gets_its_tokens_in_a_random_trace(
    window: int, budget: int, depth: int, swap: str
) -> None:
    memory = {"swap": 10**9, "short": 40, "recompute": 0, "replay": 0}[swap]
    scheduler = drive(
        depth + window, steps=5000, window=window, depth=depth, swap_memory=memory,
        exact=swap == "recompute", budget=budget,
    )  # fmt: skip
    assert scheduler.preemptions > 20


def test_a_trace_of_100_000_steps_loses_no_page() -> None:
    assert drive(1, steps=100_000, window=24, depth=1, swap_memory=60, exact=False).preemptions > 500


def test_an_old_request_alone_may_fill_the_cache() -> None:
    blocks = BlockManager([GroupShape(0, 6, 1)], PAGE, num_rows=2, max_tokens=80)
    scheduler = Scheduler(SchedulerConfig(32, 40, 10**9, 0, False), blocks)
    requests = [Request(i, [1] * 30, SamplingParams(), max_tokens=50) for i in range(2)]
    for request in requests:
        scheduler.add(request)
    for _ in range(200):
        step = scheduler.schedule()
        for request in step.sampled:
            request.output.append(0)
            if len(request.output) == request.max_tokens:
                scheduler.finish(request)
    assert not scheduler.has_work and scheduler.preemptions


def test_decodes_go_on_while_a_long_prompt_is_processed() -> None:
    blocks = BlockManager([GroupShape(0, 100, 1)], PAGE, num_rows=4, max_tokens=600)
    scheduler = Scheduler(SchedulerConfig(64, 68, 0, 0, True), blocks)
    short = Request(0, [1] * 8, SamplingParams(), max_tokens=50)
    scheduler.add(short)
    scheduler.schedule()
    short.output.append(0)
    scheduler.add(Request(1, [1] * 500, SamplingParams(), max_tokens=5))
    for _ in range(7):
        step = scheduler.schedule()
        assert step.decodes == [short] and len(step.chunks) == 1
        short.output.append(0)


def test_chunks_shrink_far_into_a_prompt() -> None:
    """From multiples of `prefill_chunk` to those of a half, a quarter …, by the position alone."""
    ends = [0]
    while ends[-1] < 30_000:
        ends.append(chunk_end(ends[-1], 2048))
    sizes = [end - start for start, end in pairwise(ends)]
    assert sizes[:3] == [2048, 2048, 1024] and sizes[-1] == SMALLEST_CHUNK
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == {2048, 1024, 512, 256}
    assert all(n == SMALLEST_CHUNK or n * start <= MOST_PAIRS for n, start in zip(sizes, ends, strict=False))
    assert chunk_end(5000, 2048) == 5120, "where a chunk starts does not matter"
    assert [chunk_end(n, 100) for n in (0, 99, 100, 30_010)] == [100, 100, 200, 30_100]


def test_a_step_carries_consecutive_chunks_as_long_as_one_would_be() -> None:
    blocks = BlockManager([GroupShape(0, 2000, 1)], PAGE, num_rows=4, max_tokens=20_000)
    scheduler = Scheduler(SchedulerConfig(256, 8192, 0, 0, True, consecutive=True), blocks)
    scheduler.add(Request(0, [1] * 10_100, SamplingParams(), max_tokens=5))
    steps = []
    while not steps or steps[-1].chunks:
        steps.append(scheduler.schedule())
    chunks = [chunk for step in steps for chunk in step.chunks]
    assert [chunk.end for chunk in chunks] == [*range(256, 10_000, 256), 10_100], "boundaries stay"
    assert len(steps[0].chunks) == 8 and all(step.num_tokens <= MOST_TOGETHER for step in steps)
    pairs = [sum((c.end - c.start) * c.start for c in step.chunks) for step in steps]
    assert max(pairs) <= MOST_PAIRS and [len(step.chunks) for step in steps[-4:-2]] == [1, 1]
