"""No quantization: the model's dtype."""

import torch
from torch import Tensor

from kvq_core.codecs.base import BaseCodec


class NoneCodec(BaseCodec):
    """The bytes of the vector as they are."""

    def code_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        return head_dim * dtype.itemsize

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = x.contiguous().view(torch.uint8)
        return codes, x.new_empty(*x.shape[:-1], 0, dtype=torch.float16)

    def decode(self, codes: Tensor, meta: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        """`dtype` is the one that was stored."""
        return codes.view(dtype)
