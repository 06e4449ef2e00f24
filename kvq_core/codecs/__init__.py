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

_CORRECTED = EncoderOptions(norm_mode="corrected")
_PLAIN = EncoderOptions(norm_mode="plain", residual="rms")

_CODECS: dict[str, BaseCodec] = {
    codec.name: codec
    for codec in (
        NoneCodec("none", "none"),
        Fp8Codec("fp8", "fp8"),
        IntCodec(8),
        IntCodec(4),
        LloydMaxCodec("lm4", 4, _CORRECTED),
        LloydMaxCodec("lm3", 3, _CORRECTED),
        LloydMaxCodec("lm2", 2, _CORRECTED),
        LloydMaxCodec("lm2-plain", 2, _PLAIN),
        TurboCodec("turbo", _CORRECTED),
        TurboCodec("turbo-rms", _PLAIN),
        QjlCodec("qjl", "qjl"),
    )
}
assert tuple(_CODECS) == CODEC_NAMES


def get_codec(name: str) -> BaseCodec:
    """The codec of that name; `KvqError` lists the known ones."""
    if name not in _CODECS:
        raise KvqError(f"unknown codec {name!r}", f"use one of {', '.join(CODEC_NAMES)}")
    return _CODECS[name]
