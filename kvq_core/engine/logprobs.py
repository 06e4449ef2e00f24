"""Log-probabilities of sampled tokens, under the model itself: before temperature, top-k and top-p."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, and (token, logprob) of the likeliest, best first."""

    logprob: float
    top: list[tuple[int, float]]


def log_probabilities(logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits [R, V], tokens [R] -> logprobs of the tokens [R], of the likeliest [R, most], and their ids."""
    work = logits if logits.dtype == torch.float64 else logits.float()
    everything = work.log_softmax(-1)
    top = everything.topk(min(most, logits.shape[-1]), dim=-1)
    return everything.gather(-1, tokens[:, None])[:, 0], top.values, top.indices


def to_list(counts: Sequence[int], own: Tensor, values: Tensor, ids: Tensor) -> list[TokenLogprob]:
    """From tensors on the host; row r keeps its `counts[r]` likeliest."""
    rows = zip(counts, own.tolist(), values.tolist(), ids.tolist(), strict=True)
    return [TokenLogprob(logprob, list(zip(i, v, strict=True))[:count]) for count, logprob, v, i in rows]
