"""42's keys with a true quantized Johnson-Lindenstrauss residual, kept to show why nobody ships it.

A. Zandieh et al., QJL, https://arxiv.org/abs/2406.03482. Unbiased, but with much more variance than the
coordinate's own sign: at 3 + 1 bits the keys come out worse than without it.
"""

import torch
from torch import Tensor

from kvq_core.codecs.base import BaseCodec, bounded, byte_table, lookup, pack, to_half, working_dtype
from kvq_core.codecs.lloyd_max import nearest, unit_rms
from kvq_core.codecs.turbo import NIBBLE_LEVELS, NIBBLE_SIGNS, SIGN_BIT
from kvq_kernels.codebook import qjl_projection, qjl_scale
from kvq_kernels.layout import EncoderOptions


class QjlCodec(BaseCodec):
    """meta: n, ‖r‖; x̂ = n · (level[i] + √(π/2)/D · ‖r‖ · Sᵀσ), σ = sign(S·r), r what the levels leave.

    The nibble of element j is i_j | (σ_j > 0) << 3.
    """

    rotated = True
    num_meta = 2
    encoder = EncoderOptions(norm_mode="plain")

    def code_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        return head_dim // 2

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, norm = unit_rms(bounded(x))
        index, level = nearest(y, 3)
        residual = y - level
        projected = residual @ qjl_projection(y.shape[-1], y.dtype, y.device).T
        nibbles = index + SIGN_BIT * (projected >= 0)
        meta = torch.cat((norm, residual.norm(dim=-1, keepdim=True)), -1)
        return pack(nibbles.to(torch.uint8), 4), to_half(meta)

    def decode(self, codes: Tensor, meta: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        norm, length = meta.to(working_dtype(dtype)).split(1, -1)
        values = lookup(codes, byte_table(NIBBLE_LEVELS, 4, norm.dtype, codes.device))
        signs = lookup(codes, byte_table(NIBBLE_SIGNS, 4, norm.dtype, codes.device))
        back = signs @ qjl_projection(head_dim, norm.dtype, codes.device)
        return values.addcmul_(back, length * qjl_scale(head_dim)).mul_(norm).to(dtype)
