"""The normalised Walsh-Hadamard transform over the last dimension."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_FAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache(maxsize=64)
def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H, [size, size], symmetric and its own inverse; `size` is a power of two."""
    assert size > 0 and size & (size - 1) == 0, f"no Hadamard matrix of size {size}"
    index = torch.arange(size)
    common = index[:, None] & index[None, :]
    parity = torch.zeros_like(common)
    while common.any():
        parity ^= common & 1
        common >>= 1
    matrix = (1 - 2 * parity).to(torch.float64) / math.sqrt(size)
    return matrix.to(device=device, dtype=dtype)


@lru_cache(maxsize=1)
def _fast_transform() -> Callable[..., Tensor] | None:
    """`hadamard_transform(x, scale)` of the optional package `fast_hadamard_transform`."""
    try:
        from fast_hadamard_transform import hadamard_transform
    except Exception:  # a build for another torch or CUDA fails with whatever its loader raises
        return None
    return hadamard_transform


@lru_cache(maxsize=64)
def _fast_works(size: int, device_type: str) -> bool:
    """Whether the package takes tensors of this size and device (its CUDA files take no CPU tensor)."""
    transform = _fast_transform()
    if transform is None:
        return False
    probe = torch.eye(size, device=device_type)
    try:
        result = transform(probe, 1 / math.sqrt(size))
    except Exception:
        return False
    return torch.allclose(result, hadamard_matrix(size, probe.dtype, probe.device), atol=1e-5)


def hadamard(x: Tensor) -> Tensor:
    """H·x over the last dimension, in `x.dtype`; `fast_hadamard_transform` does it where it is installed."""
    size = x.shape[-1]
    if x.dtype in _FAST_DTYPES and _fast_works(size, x.device.type):
        transform = _fast_transform()
        assert transform is not None
        return transform(x.contiguous(), 1 / math.sqrt(size))
    return x @ hadamard_matrix(size, x.dtype, x.device)


def hadamard_backend(device_type: str = "cpu", size: int = 128) -> str:
    """Who rotates tensors on this device: `fast_hadamard_transform` or `built-in`."""
    return "fast_hadamard_transform" if _fast_works(size, device_type) else "built-in"
