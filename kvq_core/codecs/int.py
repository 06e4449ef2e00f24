"""Asymmetric integers per head and token, as in LMDeploy's policies 8 and 4.

Z. Liu et al., KIVI, https://arxiv.org/abs/2402.02750 (there per channel for K)
"""

import torch
from torch import Tensor

from kvq_core.codecs.base import (
    BaseCodec,
    bounded,
    byte_table,
    lookup,
    pack,
    safe_divide,
    to_half,
    working_dtype,
)


class IntCodec(BaseCodec):
    """meta: scale, minimum; x̂ = scale · code + minimum, code = round((x - minimum) / scale), 0 … 2^bits - 1.

    A constant vector has scale 0 and reads back as its fp16 value.
    """

    num_meta = 2

    def __init__(self, bits: int) -> None:
        super().__init__(f"int{bits}", f"int{bits}")
        self.bits = bits

    def code_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        return head_dim * self.bits // 8

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = bounded(x)
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        top = 2**self.bits - 1
        meta = to_half(torch.cat(((high - low) / top, low), -1))
        scale, minimum = meta.to(x.dtype).split(1, -1)
        codes = safe_divide(x - minimum, scale).round().clamp(0, top).to(torch.uint8)
        return pack(codes, self.bits), meta

    def decode(self, codes: Tensor, meta: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        scale, minimum = meta.to(working_dtype(dtype)).split(1, -1)
        if self.bits == 8:
            values = codes.to(scale.dtype)
        else:
            values = lookup(codes, byte_table(tuple(map(float, range(16))), 4, scale.dtype, codes.device))
        return values.mul_(scale).add_(minimum).to(dtype)
