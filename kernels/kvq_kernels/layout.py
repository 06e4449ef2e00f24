"""How the bytes of a page are laid out; shared by the torch twins and the Triton kernels."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncoderOptions:
    """How a rotated codec chooses its codes; none of it changes how bytes are read."""

    norm_mode: str = "corrected"
    """plain | corrected (decoded vectors keep their length) | unbiased (their projection on x is x) |
    balanced (the geometric mean of these two)"""
    residual: str = "abs"
    """The residual scale of `turbo`: abs (least squares) | rms (as LMDeploy stores it)"""
    candidates: tuple[float, ...] = (1.0,)
    """Scales tried before rounding; the one with the least squared error after its best norm is kept."""
    anchor: str = "rms"
    """What a candidate is the size of: the vector's rms, or its peak (largest absolute element)"""


class Codec(Protocol):
    """How one vector of one head at one token becomes bytes, and back; implemented in `kvq_core.codecs`."""

    name: str
    scheme: str
    """The branch of `bits.py` that decodes it in a kernel, and of `encode.py` that encodes it."""
    rotated: bool
    """Stored in the Hadamard-rotated basis: queries are rotated, or outputs rotated back."""
    num_meta: int
    """fp16 numbers stored beside the codes of a vector."""
    encoder: EncoderOptions

    def code_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of codes of one vector; `dtype` is the model's and matters to `none` alone."""
        ...

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D], rotated if `rotated` -> codes [..., code_bytes] uint8, meta [..., num_meta] fp16."""
        ...

    def decode(self, codes: Tensor, meta: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        """The inverse, [..., D] in `dtype` (for `none` the stored one), still in the rotated basis."""
        ...


@dataclass(frozen=True)
class PageLayout:
    """One (page, kv head) is a contiguous block of `block_bytes`:

    | K codes [P, key_code_bytes] | V codes [P, value_code_bytes] | meta [num_meta, P] fp16, K's first |

    P is `page_size`. Pages of a layer are a uint8 tensor [num_pages, num_kv_heads, block_bytes].
    """

    key: Codec
    value: Codec
    page_size: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    """The model's dtype, in which `none` stores."""

    @property
    def key_code_bytes(self) -> int:
        return self.key.code_bytes(self.key_dim, self.dtype)

    @property
    def value_code_bytes(self) -> int:
        return self.value.code_bytes(self.value_dim, self.dtype)

    @property
    def value_offset(self) -> int:
        """Byte offset of V codes in a block."""
        return self.page_size * self.key_code_bytes

    @property
    def meta_offset(self) -> int:
        """Byte offset of the metadata in a block."""
        return self.page_size * (self.key_code_bytes + self.value_code_bytes)

    @property
    def num_meta(self) -> int:
        return self.key.num_meta + self.value.num_meta

    @property
    def bytes_per_token_head(self) -> int:
        """The record: bytes of one (token, kv head)."""
        return self.key_code_bytes + self.value_code_bytes + 2 * self.num_meta

    @property
    def block_bytes(self) -> int:
        return self.page_size * self.bytes_per_token_head

    @property
    def page_bytes(self) -> int:
        """One page of one layer, all kv heads."""
        return self.num_kv_heads * self.block_bytes

    def empty_pages(self, num_pages: int, device: torch.device | str) -> Tensor:
        """[num_pages, num_kv_heads, block_bytes] uint8 zeros, which decode to finite numbers."""
        return torch.zeros(num_pages, self.num_kv_heads, self.block_bytes, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class RawWindow:
    """The unquantized tokens of a layer: the first `sink` and the last `recent` of each running request.

    `keys` [R, sink + recent, Hkv, Dk] and `values` [R, sink + recent, Hkv, Dv] are in the model's dtype;
    request rings are rows. Position p lies in slot p where p < sink, else sink + (p - sink) % recent.
    Every token is also quantized into its page when it is written, so that nothing has to be
    re-quantized when it leaves the window: attention takes a token from here where the rule says so.
    """

    sink: int
    recent: int
    keys: Tensor
    values: Tensor
