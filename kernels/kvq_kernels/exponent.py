"""Units of scores: what becomes a power of two."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LIFT = tl.constexpr(12.0)
"""log2 of the largest weight of a tile: fp16 then holds weights down to 2^-36 of it."""
LEAST_EXPONENT = tl.constexpr(67 << 23)
"""2^-60 as float32 bits: rows of smaller numbers are not scaled up to fp16's range any further."""


@triton.jit
def exponent_unit(scale, CAP: tl.constexpr):
    """What scores, m and sinks in their unit are multiplied by to become powers of two.

    Scores stay q·k until the maximum is subtracted, unless they are capped: scaling first would round them
    where they are large.
    """
    return LOG2E if CAP else scale * LOG2E


@triton.jit
def cap(scores, scale, softcap, CAP: tl.constexpr):
    """softcap · tanh(scale · scores / softcap), where there is a cap."""
    if CAP:
        scores = (1.0 - 2.0 / (1.0 + tl.exp(scores * (2.0 * scale / softcap)))) * softcap
    return scores
