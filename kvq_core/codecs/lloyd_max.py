"""Lloyd-Max codes of a rotated vector: the scalar stage of TurboQuant.

A. Zandieh et al., TurboQuant, https://arxiv.org/abs/2504.19874. A rotated vector's coordinates are close to
normal, so that one fixed codebook serves every vector, without calibration.
"""

from collections.abc import Iterator

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
from kvq_kernels.codebook import LEVELS, thresholds
from kvq_kernels.layout import EncoderOptions


def unit_rms(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> y = x / n, and n [..., 1]: the root mean square of x, rounded as fp16 stores it."""
    norm = to_half(x.square().mean(-1, keepdim=True).sqrt()).to(x.dtype)
    return safe_divide(x, norm), norm


def nearest(y: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[..., D] -> index of the nearest level (int32), and that level."""
    edges = torch.tensor(thresholds(bits), dtype=y.dtype, device=y.device)
    index = torch.bucketize(y, edges, out_int32=True)
    levels = torch.tensor(LEVELS[bits], dtype=y.dtype, device=y.device)
    return index, levels.index_select(0, index.reshape(-1)).view_as(y)


def stored_norm(y: Tensor, coded: Tensor, norm: Tensor, mode: str) -> Tensor:
    """The fp16 number [..., 1] that multiplies `coded`, which stands for y = x / norm.

    plain: the norm itself; corrected: the decoded vector is as long as x; unbiased: its projection on x is x;
    balanced: the geometric mean of these two.
    """
    if mode == "plain":
        return to_half(norm)
    power = y.square().sum(-1, keepdim=True)
    corrected = (power / coded.square().sum(-1, keepdim=True)).sqrt()
    unbiased = safe_divide(power, (y * coded).sum(-1, keepdim=True))
    factors = {"corrected": corrected, "unbiased": unbiased, "balanced": (corrected * unbiased).sqrt()}
    return to_half(norm * factors[mode])


def alignment(y: Tensor, coded: Tensor) -> Tensor:
    """[..., 1], the larger the smaller the squared error of `coded` after its best scale."""
    return (y * coded).sum(-1, keepdim=True).square() / coded.square().sum(-1, keepdim=True)


def trials(y: Tensor, encoder: EncoderOptions) -> Iterator[Tensor]:
    """y [..., D] of unit rms, scaled as each candidate has it."""
    if encoder.anchor == "peak":
        y = safe_divide(y, y.abs().amax(-1, keepdim=True))
    for candidate in encoder.candidates:
        yield y * candidate


class LloydMaxCodec(BaseCodec):
    """meta: n; x̂ = n · level[code], codes of y·√D/‖y‖.

    4 bits: nibbles. 3 bits: a plane of 2 and a plane of 1. 2 bits: for every 8 elements a byte that tells the
    larger magnitude and a byte that tells negative numbers, element i at bit i: shifted and masked, the 16
    bits are an fp16 number as they lie there.
    """

    rotated = True
    num_meta = 1

    def __init__(self, name: str, bits: int, encoder: EncoderOptions) -> None:
        super().__init__(name, f"lm{bits}")
        self.bits = bits
        self.encoder = encoder

    def code_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        return head_dim * self.bits // 8

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, norm = unit_rms(bounded(x))
        first, *rest = trials(y, self.encoder)
        index, coded = nearest(first, self.bits)
        score = alignment(y, coded)
        for scaled in rest:
            other_index, other = nearest(scaled, self.bits)
            other_score = alignment(y, other)
            better = other_score > score
            index, coded = torch.where(better, other_index, index), torch.where(better, other, coded)
            score = torch.where(better, other_score, score)
        codes = index.to(torch.uint8)
        if self.bits == 3:
            packed = torch.cat((pack(codes & 3, 2), pack(codes >> 2, 1)), -1)
        elif self.bits == 2:
            large, negative = (codes == 0) | (codes == 3), codes < 2
            packed = torch.stack((pack(large.byte(), 1), pack(negative.byte(), 1)), -1).flatten(-2)
        else:
            packed = pack(codes, self.bits)
        return packed, stored_norm(y, coded, norm, self.encoder.norm_mode)

    def decode(self, codes: Tensor, meta: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        norm = meta.to(working_dtype(dtype))
        levels = LEVELS[self.bits]
        if self.bits == 3:
            low, high = codes.split((head_dim // 4, head_dim // 8), -1)
            index = lookup(low, byte_table((0.0, 1.0, 2.0, 3.0), 2, norm.dtype, codes.device))
            index += lookup(high, byte_table((0.0, 4.0), 1, norm.dtype, codes.device))
            table = torch.tensor(levels, dtype=norm.dtype, device=codes.device)
            values = table.index_select(0, index.reshape(-1).int()).view_as(index)
        elif self.bits == 2:
            large, negative = codes.unflatten(-1, (-1, 2)).unbind(-1)
            values = lookup(large, byte_table(levels[2:], 1, norm.dtype, codes.device))
            values *= lookup(negative, byte_table((1.0, -1.0), 1, norm.dtype, codes.device))
        else:
            values = lookup(codes, byte_table(levels, self.bits, norm.dtype, codes.device))
        return values.mul_(norm).to(dtype)
