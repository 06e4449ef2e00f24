"""42's keys: a 3-bit Lloyd-Max index and the sign of what it leaves, one nibble an element.

A. Zandieh et al., TurboQuant, https://arxiv.org/abs/2504.19874; the residual's sign is taken of the
coordinate itself, as LMDeploy does it, not of a random projection (that is `qjl`).
"""

import torch
from torch import Tensor

from kvq_core.codecs.base import BaseCodec, bounded, byte_table, lookup, pack, to_half, working_dtype
from kvq_core.codecs.lloyd_max import alignment, nearest, stored_norm, trials, unit_rms
from kvq_kernels.codebook import LEVELS
from kvq_kernels.layout import EncoderOptions

SIGN_BIT = 8
NIBBLE_LEVELS = LEVELS[3] * 2
NIBBLE_SIGNS = (-1.0,) * 8 + (1.0,) * 8


class TurboCodec(BaseCodec):
    """meta: n, s; x̂ = n · (level[i] + s · sign); the nibble is i | sign bit << 3."""

    rotated = True
    num_meta = 2

    def __init__(self, name: str, encoder: EncoderOptions) -> None:
        super().__init__(name, "turbo")
        self.encoder = encoder

    def code_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        return head_dim // 2

    def _code(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y at a candidate's scale -> nibbles, s [..., 1] fp16, and the vector they stand for."""
        index, level = nearest(y, 3)
        residual = y - level
        if self.encoder.residual == "abs":  # the least-squares scale of fixed signs
            scale = residual.abs().mean(-1, keepdim=True)
        else:
            scale = residual.square().mean(-1, keepdim=True).sqrt()
        scale = to_half(scale)
        positive = residual >= 0
        step = scale.to(y.dtype)
        return index + SIGN_BIT * positive, scale, level + torch.where(positive, step, -step)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, norm = unit_rms(bounded(x))
        first, *rest = trials(y, self.encoder)
        nibbles, scale, coded = self._code(first)
        score = alignment(y, coded)
        for scaled in rest:
            other_nibbles, other_scale, other = self._code(scaled)
            other_score = alignment(y, other)
            better = other_score > score
            nibbles, coded = torch.where(better, other_nibbles, nibbles), torch.where(better, other, coded)
            scale, score = torch.where(better, other_scale, scale), torch.where(better, other_score, score)
        meta = torch.cat((stored_norm(y, coded, norm, self.encoder.norm_mode), scale), -1)
        return pack(nibbles.to(torch.uint8), 4), meta

    def decode(self, codes: Tensor, meta: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        norm, scale = meta.to(working_dtype(dtype)).split(1, -1)
        values = lookup(codes, byte_table(NIBBLE_LEVELS, 4, norm.dtype, codes.device))
        signs = lookup(codes, byte_table(NIBBLE_SIGNS, 4, norm.dtype, codes.device))
        return values.addcmul_(signs, scale).mul_(norm).to(dtype)
