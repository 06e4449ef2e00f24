"""The normalised Hadamard transform over the last dimension.

A power of two has Sylvester's matrix (Walsh-Hadamard). Head dims like 80, 96 or 192 are a power of two times
12, 20, 28, 36 or 60, sizes with a Hadamard matrix of their own: the Kronecker product of the two mixes all
elements alike, as rotating blocks of 32 or 64 would not, without padding or a norm for each block.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_FAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache(maxsize=64)
def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H, [size, size], symmetric and its own inverse; `size` as `has_hadamard` has it."""
    assert has_hadamard(size), f"no Hadamard matrix of size {size}"
    odd = size // (size & -size)
    signs = _walsh(size) if odd == 1 else torch.kron(_walsh(size // (4 * odd)), _paley(2 * odd - 1))
    return (signs.to(torch.float64) / math.sqrt(size)).to(device=device, dtype=dtype)


def has_hadamard(size: int) -> bool:
    """Whether `hadamard_matrix` knows a matrix of this size: 2^k, or 4m · 2^k with m of 3, 5, 7, 9, 15."""
    odd = size // (size & -size) if size > 0 else 0
    return odd == 1 or (odd in _ODD and size % 4 == 0)


_ODD = (3, 5, 7, 9, 15)
"""m for which 2m - 1 is 9 or a prime, and 1 modulo 4: what Paley's second construction needs."""


def _walsh(size: int) -> Tensor:
    """Sylvester's matrix of ±1, [size, size]."""
    index = torch.arange(size)
    common = index[:, None] & index[None, :]
    parity = torch.zeros_like(common)
    while common.any():
        parity ^= common & 1
        common >>= 1
    return 1 - 2 * parity


def _paley(q: int) -> Tensor:
    """±1, [2(q + 1), 2(q + 1)], symmetric: Paley's second construction over the field of q elements.

    R. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933).
    """
    # elements are pairs a + b·i modulo p; of primes only b = 0 occurs, and 9 is 3²: -1 is no square modulo 3
    p, imaginary = (3, range(3)) if q == 9 else (q, range(1))
    field = [(a, b) for a in range(p) for b in imaginary]
    squares = {((a * a - b * b) % p, 2 * a * b % p) for a, b in field}

    def character(a: int, b: int) -> int:
        return 0 if (a, b) == (0, 0) else (1 if (a, b) in squares else -1)

    conference = torch.ones(q + 1, q + 1, dtype=torch.int64)
    conference[0, 0] = 0
    for i, (a, b) in enumerate(field):
        for j, (c, d) in enumerate(field):
            conference[1 + i, 1 + j] = character((a - c) % p, (b - d) % p)
    eye = torch.eye(q + 1, dtype=torch.int64)
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(conference, plus) + torch.kron(eye, minus)


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
