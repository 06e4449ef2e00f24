"""Sampling: greedy, top-k, top-p, and noise that depends on the request alone."""

import pytest
import torch

from kvq_core.config import SamplingParams
from kvq_core.engine.sampler import Draw, sample

LOGITS = torch.tensor([0.0, 2.0, 1.0, 3.0, -1.0])


def draw(count: int, seed: int = 0, **params: float) -> torch.Tensor:
    """[count] tokens drawn one after the other from `LOGITS`."""
    draws = [Draw(SamplingParams(**params), seed, i) for i in range(count)]  # type: ignore[arg-type]
    return sample(LOGITS.expand(count, -1), draws)


def test_greedy_takes_the_largest() -> None:
    assert draw(3).tolist() == [3, 3, 3]


def test_a_greedy_row_stays_greedy_beside_a_sampled_one() -> None:
    draws = [Draw(SamplingParams(), 0, 0), Draw(SamplingParams(temperature=5.0), 0, 0)] * 50
    assert set(sample(LOGITS.expand(100, -1), draws)[::2].tolist()) == {3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    counts = torch.bincount(draw(40_000, temperature=temperature), minlength=5) / 40_000
    expected = (LOGITS / temperature).softmax(-1)
    assert torch.allclose(counts, expected, atol=4 * (0.25 / 40_000) ** 0.5)


def test_top_k_keeps_the_k_most_likely() -> None:
    assert set(draw(2000, temperature=3.0, top_k=2).tolist()) == {3, 1}
    assert draw(50, temperature=3.0, top_k=10**30).tolist() == draw(50, temperature=3.0).tolist()


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities = LOGITS.softmax(-1)  # 3: 0.64, 1: 0.24, 2: 0.09
    assert set(draw(2000, temperature=1.0, top_p=0.6).tolist()) == {3}
    assert probabilities[3] < 0.8 < probabilities[3] + probabilities[1]
    assert set(draw(2000, temperature=1.0, top_p=0.8).tolist()) == {3, 1}


def test_a_draw_is_the_same_in_any_batch() -> None:
    draws = [Draw(SamplingParams(temperature=1.0), seed, 7) for seed in range(50)]
    together = sample(LOGITS.expand(50, -1), draws)
    alone = torch.cat([sample(LOGITS[None], [d]) for d in draws])
    assert together.equal(alone)
    assert len(set(together.tolist())) > 1


def test_seeds_and_indices_give_other_noise() -> None:
    flat = torch.zeros(200, 1000)
    params = SamplingParams(temperature=1.0)
    by_index = sample(flat, [Draw(params, 3, i) for i in range(200)])
    by_seed = sample(flat, [Draw(params, i, 3) for i in range(200)])
    assert len(set(by_index.tolist())) > 150 and len(set(by_seed.tolist())) > 150
    assert not by_index.equal(by_seed)


def test_all_of_the_probability_is_all_of_it_beside_others_that_want_less() -> None:
    """A sum of float32 reaches 1 before the last of many unlikely tokens."""
    logits = torch.zeros(2, 32_000)
    logits[:, 0] = 15.54
    plain, other = SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.9)
    for seed in (8657, 11165):
        alone = sample(logits[:1], [Draw(plain, seed, 0)])
        assert alone[0] == sample(logits, [Draw(plain, seed, 0), Draw(other, 0, 0)])[0] != 0
