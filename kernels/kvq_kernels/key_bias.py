"""Keys with a constant part: k = R(p)·(W x + b), as Qwen2's, whose bias has spikes of many times W x.

A codec that has to cover the spikes leaves nothing for the rest. So pages hold k - R(p)·b, and whoever reads
them adds the constant part again. It depends on the position alone, and costs the cache nothing:

q·R(p)·b = Σ over pairs (q₁b₁ + q₂b₂)·cos(pθ) + (q₂b₁ - q₁b₂)·sin(pθ),

the product of numbers of the query with a row of a table that all layers, heads and requests share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyBias:
    """The constant part of a layer's keys."""

    bias: Tensor
    """[Hkv, D]: what a key at position 0 has of it."""
    table: Tensor
    """[L, D], rows by position: the cosine of each rotated pair, the sine of each, and ones for the rest."""
    pairs: int
    """Rotated pairs: elements i and i + pairs for i < pairs; elements from 2·pairs on are not rotated."""

    def at(self, positions: Tensor) -> Tensor:
        """positions [...] -> R(p)·b, [..., Hkv, D]; those beyond the table read its last row."""
        n = self.pairs
        row = self.table[positions.clamp(max=self.table.shape[0] - 1)][..., None, :]
        cos, sin, ones = row[..., :n], row[..., n : 2 * n], row[..., 2 * n :]
        first, second, rest = self.bias[:, :n], self.bias[:, n : 2 * n], self.bias[:, 2 * n :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest * ones), -1)

    def weights(self, query: Tensor) -> Tensor:
        """query [..., Hq, D] -> [..., Hq, D] in the table's dtype: their product with row p is q·R(p)·b."""
        n, groups = self.pairs, query.shape[-2] // self.bias.shape[0]
        bias, q = self.bias.repeat_interleave(groups, 0), query.to(self.table.dtype)
        b1, b2, q1, q2 = bias[:, :n], bias[:, n : 2 * n], q[..., :n], q[..., n : 2 * n]
        return torch.cat((q1 * b1 + q2 * b2, q2 * b1 - q1 * b2, q[..., 2 * n :] * bias[:, 2 * n :]), -1)
