"""The bit logic of `unpack.py`, run on a CPU: what the codecs decode to, rounded to fp16."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kvq_core.codecs import get_codec
from kvq_kernels import unpack
from kvq_kernels.codebook import LEVELS
from kvq_kernels.unpack import WORD_ELEMENTS, unpacked_order
from tests.kernels import machine

HEAD_DIM = 128


def pair(x: torch.Tensor) -> np.ndarray:
    """[N] -> [N, 1]: the fp16 number twice in a register."""
    return x.half().view(torch.int16).numpy().astype(np.uint16).astype(np.uint32)[:, None] * np.uint32(
        0x10001
    )


def operands(scheme: str, meta: torch.Tensor) -> list[np.ndarray]:
    """What `unpacked` passes beside the codes."""
    first, second = meta[:, 0].float(), meta[:, -1].float()
    if unpack.tables(scheme):
        made = machine.run_block(unpack.tables(scheme), pair(-first if scheme == "lm4" else first))
        assert len(made) == 4
        return made + [pair(-first * second)] * (scheme == "turbo")
    if scheme == "lm2":
        small, large = LEVELS[2][2:]
        return [pair(first * small), pair(first * small) ^ pair(first * large)]
    if scheme in ("fp8", "e4m3"):
        return [pair(first * 256 if scheme == "fp8" else first)]
    return [pair(first), pair(second)]


@pytest.mark.parametrize("name", ["turbo", "turbo-rms", "lm4", "lm3", "lm2", "int8", "int4", "fp8", "e4m3"])
def test_unpacks_what_the_codec_decodes(name: str) -> None:
    codec = get_codec("fp8" if name == "e4m3" else name)
    scheme = name if name == "e4m3" else codec.scheme
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(
        0, 256, (300, codec.code_bytes(HEAD_DIM, torch.float16)), generator=generator
    ).byte()
    codes[:256] = torch.arange(256, dtype=torch.uint8)[:, None]
    if codec.scheme == "fp8":
        codes[(codes & 127) == 127] = 0  # NaN, which is never written
    meta = torch.rand(300, codec.num_meta, generator=generator).add_(0.1).half()
    words, more = codes.numpy(), []
    if scheme == "lm3":
        words, high = np.split(words, [HEAD_DIM // 4], 1)
        more = [np.ascontiguousarray(high).view(np.int16).astype(np.int32).view(np.uint32)]
    words = np.ascontiguousarray(words).view(np.uint32)
    others = more + [np.broadcast_to(x, words.shape) for x in operands(scheme, meta)]
    assert len(others) == unpack.numbers(scheme)
    registers = machine.run_block(unpack.assembly(scheme), words, *others)
    assert len(registers) == unpack.registers(scheme)
    assert len(registers) * 2 == WORD_ELEMENTS[codec.scheme]
    halves = [r.view(np.float16).reshape(*words.shape, 2) for r in registers]
    columns = torch.from_numpy(np.stack(halves, 2).astype(np.float64)).reshape(300, HEAD_DIM)
    ours = torch.empty_like(columns)
    ours[:, unpacked_order(WORD_ELEMENTS[codec.scheme], HEAD_DIM, torch.device("cpu"))] = columns
    expected = codec.decode(codes, meta, HEAD_DIM, torch.float64)
    # turbo and lm2 round what they add and multiply as well
    torch.testing.assert_close(ours, expected, rtol=2**-9, atol=2**-11)
    assert (ours - expected).square().mean().sqrt() <= 2**-11 * expected.square().mean().sqrt()
