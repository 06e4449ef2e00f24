"""One vector of one head at one token becomes bytes, and back: the definition kernels are tested against."""

from kvq_core.codecs.base import BaseCodec
from kvq_core.codecs.fp8 import Fp8Codec
from kvq_core.codecs.int import IntCodec
from kvq_core.codecs.lloyd_max import LloydMaxCodec
from kvq_core.codecs.none import NoneCodec
from kvq_core.codecs.qjl import QjlCodec
from kvq_core.codecs.turbo import TurboCodec
from kvq_core.errors import KvqError
from kvq_core.policies import CODEC_NAMES
from kvq_kernels.hadamard import hadamard
from kvq_kernels.layout import EncoderOptions

__all__ = ["BaseCodec", "get_codec", "hadamard"]

_PLAIN = EncoderOptions(norm_mode="plain", residual="rms")
_CORRECTED = EncoderOptions(norm_mode="corrected")


def _fitted(anchor: str, *candidates: float, norm: str = "unbiased") -> EncoderOptions:
    """The best of some scales before rounding, and a norm that keeps the projection on the vector.

    Four bits follow the vector's peak: its largest element belongs on the outermost level or a little beyond,
    whatever the shape of the rest, which a few trials find as exactly as ten do around the rms. Two bits clip
    the peak and follow the rms. More candidates would lower the squared error by less than 2%. Two bits leave
    so large an error at right angles to the vector that a norm half-way to the shorter one, which keeps the
    length, drifts less: by 2 to 3% where a window keeps the latest tokens, and no more without one.
    """
    return EncoderOptions(norm_mode=norm, candidates=candidates, anchor=anchor)


_FITTED_TURBO = _fitted("peak", 2.25, 2.4, 2.55, 2.7)
_FITTED_LM4 = _fitted("peak", 2.7, 2.9, 3.1)
_FITTED_LM3 = _fitted("peak", 2.4, 2.7, 3.0)
_FITTED_LM2 = _fitted("rms", 0.8, 0.9, 1.0, 1.1, norm="balanced")

_CODECS: dict[str, BaseCodec] = {
    codec.name: codec
    for codec in (
        NoneCodec("none", "none"),
        Fp8Codec("fp8", "fp8"),
        IntCodec(8),
        IntCodec(4),
        LloydMaxCodec("lm4", 4, _PLAIN),
        LloydMaxCodec("lm4-fit", 4, _FITTED_LM4),
        LloydMaxCodec("lm3", 3, _FITTED_LM3),
        LloydMaxCodec("lm2", 2, _FITTED_LM2),
        LloydMaxCodec("lm2-plain", 2, _PLAIN),
        LloydMaxCodec("lm2-corrected", 2, _CORRECTED),
        TurboCodec("turbo", _FITTED_TURBO),
        TurboCodec("turbo-rms", _PLAIN),
        TurboCodec("turbo-corrected", _CORRECTED),
        QjlCodec("qjl", "qjl"),
    )
}
assert tuple(_CODECS) == CODEC_NAMES


def get_codec(name: str) -> BaseCodec:
    """The codec of that name; `KvqError` lists the known ones."""
    if name not in _CODECS:
        raise KvqError(f"unknown codec {name!r}", f"use one of {', '.join(CODEC_NAMES)}")
    return _CODECS[name]
