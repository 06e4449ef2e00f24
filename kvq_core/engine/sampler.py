"""Sampling on the device: greedy, temperature, top-k, top-p, with noise that depends on the request alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_core.config import SamplingParams


@dataclass(frozen=True)
class Draw:
    """How one token is drawn: a request's parameters, its seed, and the index of the token in its answer."""

    params: SamplingParams
    seed: int
    index: int


def sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """logits [R, V] -> tokens [R] int64.

    A token is the argmax of logits / temperature + Gumbel noise over the tokens that top-k and top-p keep,
    and the noise is a hash of (seed, index, token): the same in any batch, on any device.
    """
    if all(d.params.temperature == 0 for d in draws):
        return logits.argmax(-1)
    device = logits.device
    temperature = torch.tensor([d.params.temperature for d in draws], device=device)
    scores = logits.float() / temperature.clamp(min=1e-5)[:, None]
    if any(d.params.top_k or d.params.top_p < 1 for d in draws):
        vocab = logits.shape[-1]
        top_k = torch.tensor([min(d.params.top_k or vocab, vocab) for d in draws], device=device)
        top_p = torch.tensor([d.params.top_p for d in draws], device=device)
        scores = _restrict(scores, top_k, top_p)
    keys = torch.tensor([_mix_host(d.seed, d.index) for d in draws], device=device)
    drawn = (scores + _gumbel(keys, logits.shape[-1])).argmax(-1)
    return torch.where(temperature > 0, drawn, logits.argmax(-1))


def _restrict(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the top_k most likely tokens and the smallest set whose probability reaches top_p."""
    ordered, order = scores.sort(dim=-1, descending=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    ordered = ordered.masked_fill(ranks >= top_k[:, None], float("-inf"))
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # the most likely token always stays
    # A sum of float32 may reach 1 before the last token: who asks for all of them gets all.
    beyond = (before >= top_p[:, None]) & (top_p[:, None] < 1) & (ranks > 0)
    ordered = ordered.masked_fill(beyond, float("-inf"))
    return torch.full_like(scores, float("-inf")).scatter(-1, order, ordered)


_MASK = (1 << 64) - 1


def _mix_host(seed: int, index: int) -> int:
    """A signed 64-bit key of (seed, index): two rounds of splitmix64's finalizer (Steele et al., 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _MASK
    for _ in range(2):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


def _gumbel(keys: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise [R, vocab], a hash of each key and the token's number."""
    tokens = torch.arange(vocab, device=keys.device, dtype=torch.int64)
    z = keys[:, None] + (tokens * -7046029254386353131)[None, :]  # the golden ratio's increment, signed
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    z = z ^ _shift(z, 31)
    uniform = (_shift(z, 12).double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log().float()


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
