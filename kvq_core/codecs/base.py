"""What all codecs share."""

from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from kvq_core.errors import KvqError
from kvq_kernels.codebook import LARGEST
from kvq_kernels.hadamard import hadamard, has_hadamard
from kvq_kernels.layout import EncoderOptions

HALF_MAX = 65504.0


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is worked on in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_half(x: Tensor) -> Tensor:
    """fp16, saturated: metadata never becomes infinite."""
    return x.clamp(-HALF_MAX, HALF_MAX).to(torch.float16)


def safe_divide(x: Tensor, by: Tensor) -> Tensor:
    """x / by, and 0 where `by` is 0."""
    return torch.where(by == 0, 0, x / torch.where(by == 0, 1, by))


def pack(codes: Tensor, bits: int) -> Tensor:
    """[..., D] uint8 codes of `bits` bits -> [..., D·bits/8]; element i of a byte sits at bit i·bits."""
    per_byte = 8 // bits
    parts = codes.unflatten(-1, (-1, per_byte))
    packed = parts[..., 0].clone()
    for i in range(1, per_byte):
        packed |= parts[..., i] << (i * bits)
    return packed


@lru_cache(maxsize=64)
def byte_table(values: tuple[float, ...], bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8/bits]: what each byte of packed codes stands for; `values[code]` is a code's value."""
    shifts = torch.arange(0, 8, bits)
    codes = (torch.arange(256)[:, None] >> shifts) & (2**bits - 1)
    return torch.tensor(values, dtype=torch.float64)[codes].to(device=device, dtype=dtype)


_WIDE = {8: torch.float64, 16: torch.complex128}


def lookup(codes: Tensor, table: Tensor) -> Tensor:
    """[..., N] packed bytes -> [..., N·per_byte] values.

    The values of a byte are copied as one number of their joint width: several times faster on a CPU.
    """
    wide = _WIDE.get(table.shape[1] * table.element_size())
    index = codes.reshape(-1).int()
    if wide is None:
        values = table.index_select(0, index)
    else:
        values = table.view(wide).reshape(256).index_select(0, index).view(table.dtype)
    return values.reshape(*codes.shape[:-1], codes.shape[-1] * table.shape[1])


class BaseCodec(ABC):
    """A codec; see `kvq_kernels.layout.Codec` for what each method promises."""

    rotated = False
    num_meta = 0
    encoder = EncoderOptions()

    def __init__(self, name: str, scheme: str) -> None:
        self.name = name
        self.scheme = scheme

    def __repr__(self) -> str:
        return f"get_codec({self.name!r})"

    @abstractmethod
    def code_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of the codes of one vector."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D], rotated if `rotated` -> codes [..., code_bytes] uint8, meta [..., num_meta] fp16."""

    @abstractmethod
    def decode(self, codes: Tensor, meta: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        """[..., D] in `dtype`, still in the rotated basis."""

    def bytes_per_vector(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Codes and metadata of one vector."""
        return self.code_bytes(head_dim, dtype) + 2 * self.num_meta

    def check_head_dim(self, head_dim: int) -> None:
        """`KvqError` unless this codec takes vectors of `head_dim` elements."""
        if self.rotated and (head_dim % 16 or not has_hadamard(head_dim)):
            raise KvqError(
                f"codec {self.name} rotates its vectors and needs a head dim that is a multiple of 16 with a "
                f"Hadamard matrix: 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 224, 240, 256; this "
                f"model has {head_dim}",
                "use int8, int4 or fp8, which take any multiple of 16: `--policy 4`",
            )
        if head_dim < 1 or (head_dim % 16 and self.num_meta):
            raise KvqError(
                f"codec {self.name} needs a head dim that is a multiple of 16, this model has {head_dim}",
                "use policy 0, which takes any: `--policy 0`",
            )

    def write(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] in the model's dtype and basis -> codes and metadata, as a cache stores them."""
        if not self.num_meta:
            return self.encode(x)
        work = x.to(working_dtype(x.dtype))
        return self.encode(hadamard(work) if self.rotated else work)

    def read(self, codes: Tensor, meta: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        """The inverse, [..., D] in `dtype`, rotated back."""
        if not self.num_meta:
            return self.decode(codes, meta, head_dim, dtype)
        decoded = self.decode(codes, meta, head_dim, working_dtype(dtype))
        decoded = hadamard(decoded) if self.rotated else decoded
        # what lies at the edge of fp16's range may come back a little beyond it
        return to_half(decoded) if dtype == torch.float16 else decoded.to(dtype)

    def roundtrip(self, x: Tensor) -> Tensor:
        """[..., D] -> what a reader of the cache sees of it, rotated back, in `x.dtype`."""
        self.check_head_dim(x.shape[-1])
        return self.read(*self.write(x), x.shape[-1], x.dtype)


def bounded(x: Tensor) -> Tensor:
    """`x` in its working dtype, clamped so that no square overflows."""
    return x.to(working_dtype(x.dtype)).clamp(-LARGEST, LARGEST)
