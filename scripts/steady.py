"""Steady decodes, for the scripts that time them."""

import random
from collections.abc import Iterable

import torch

from kvq_core.config import SamplingParams
from kvq_core.engine.engine import Engine
from kvq_core.engine.runner import PendingTokens
from kvq_core.engine.scheduler import Step
from kvq_core.engine.work import Work


def without_prompts(engine: Engine, requests: int, context: int, answer: int) -> None:
    """Bring requests to `context` tokens, `answer` more to come, without computing any.

    Pages are theirs and hold whatever they held: bytes take as long to read, whatever they say.
    """

    def idle(work: Work, step: Step) -> PendingTokens:
        engine.cache.set_tables(work.tables)
        return PendingTokens(torch.full((len(step.sampled),), 7), None)

    vocab = engine.model.geometry.vocab_size
    engine.runner.run = idle  # type: ignore
    params = SamplingParams(max_new_tokens=answer, ignore_eos=True)
    for _ in range(requests):
        engine.add_request([random.randrange(1, vocab) for _ in range(context)], params)
    while engine.scheduler.waiting or any(r.is_prefilling for r in engine.scheduler.running):
        engine.step()
    for _ in range(2):
        engine.step()
    del engine.runner.run  # the instance's: the class has the method


def busy_time(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
