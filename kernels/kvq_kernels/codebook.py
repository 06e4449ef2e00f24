"""Numbers that codecs and kernels share: Lloyd-Max levels and the QJL projection."""

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

LEVELS: dict[int, tuple[float, ...]] = {
    bits: tuple(sign * n / per_unit for sign, half in ((-1, integers[::-1]), (1, integers)) for n in half)
    for bits, per_unit, integers in (
        (2, 121.305, (55, 183)),
        (3, 40.92, (10, 31, 55, 88)),
        (4, 41.86, (5.5, 16.5, 27.5, 39.5, 52.5, 67.5, 86.5, 114.5)),
    )
}
"""bits -> the levels of the Lloyd-Max quantizer of a unit normal, ascending: a code is an index into them.

S. Lloyd, Least squares quantization in PCM (1982); J. Max, Quantizing for minimum distortion (1960). All are
multiples of a unit that a byte holds, so that kernels look them up exactly; the distortion is that of the
best levels to within 0.01% at 2 and 3 bits and 0.05% at 4.
"""

LARGEST = float(2**30)
"""Encoders clamp to this: far beyond what fp16 metadata can express, and its square does not overflow."""


def thresholds(bits: int) -> tuple[float, ...]:
    """The 2^bits - 1 midpoints between levels: the code of y is the number of thresholds below y."""
    levels = LEVELS[bits]
    return tuple((a + b) / 2 for a, b in pairwise(levels))


def qjl_scale(head_dim: int) -> float:
    """What undoes the expected shrinking of `Sᵀ sign(S r) ‖r‖`."""
    return math.sqrt(math.pi / 2) / head_dim


@lru_cache(maxsize=32)
def qjl_projection(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """S, [D, D] standard normal, the same for every layer, head and process."""
    generator = torch.Generator().manual_seed(head_dim)
    projection = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
    return projection.to(device=device, dtype=dtype)
