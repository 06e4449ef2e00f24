"""8-bit floats with a scale: e4m3 × fp16.

P. Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433
"""

import torch
from torch import Tensor

from kvq_core.codecs.base import BaseCodec, bounded, safe_divide, to_half, working_dtype

E4M3_MAX = 448.0


class Fp8Codec(BaseCodec):
    """meta: scale = max|x| / 448; x̂ = scale · e4m3(x / scale)."""

    num_meta = 1

    def code_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        return head_dim

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = bounded(x)
        scale = to_half(x.abs().amax(-1, keepdim=True) / E4M3_MAX)
        scaled = safe_divide(x, scale.to(x.dtype)).clamp(-E4M3_MAX, E4M3_MAX)
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale

    def decode(self, codes: Tensor, meta: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        # e4m3's bits, moved to where fp16 has them, are the value / 256: exact, and much faster than torch's
        # conversion on a CPU; its two NaNs, which are never written, become ±480
        bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
        work = working_dtype(dtype)
        return bits.view(torch.float16).to(work).mul_(meta.to(work) * 256).to(dtype)
