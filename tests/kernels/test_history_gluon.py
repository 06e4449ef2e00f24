"""How the specialised prefill kernel cuts its work, which needs no GPU; `test_triton_gpu.py` runs it."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kvq_core.codecs import get_codec
from kvq_kernels import history_gluon
from kvq_kernels.layout import PageLayout
from tests.kernels import machine


def layout_of(codecs: str, head_dim: int = 128, page_size: int = 64) -> PageLayout:
    key, value = (get_codec(name) for name in codecs.split(":"))
    return PageLayout(key, value, page_size, 4, head_dim, head_dim, torch.bfloat16)


@pytest.mark.parametrize(
    ("programs", "tokens", "splits"),
    [(512, 32768, 1), (128, 8192, 1), (64, 32768, 2), (1, 500, 1), (4, 32768, 16), (140, 32768, 3)],
)
def test_parts_fill_the_processors(programs: int, tokens: int, splits: int) -> None:
    """Of an H200; a part is worth 512 tokens, and a wave more has to pay."""
    assert history_gluon.num_splits(programs, tokens, 132) == splits


def test_serves_what_fills_its_rows() -> None:
    for codecs in ("turbo:lm2", "int8:int4", "fp8:fp8", "lm4:lm4", "lm3:lm3"):
        assert history_gluon.serves(layout_of(codecs), 8, 16)
    assert not history_gluon.serves(layout_of("turbo:lm2"), 8, 15)
    assert not history_gluon.serves(layout_of("turbo:lm2"), 256, 2048)
    for other in (layout_of("none:lm2"), layout_of("lm3:lm3", 64), layout_of("int8:int8", 256)):
        assert not history_gluon.serves(other, 8, 2048)
    assert not history_gluon.serves(layout_of("int8:int8", page_size=16), 8, 2048)


def test_registers_fit_a_multiprocessor() -> None:
    found = history_gluon.RESOURCES
    assert 2 * found.producer + 2 * found.consumer <= 512 and found.stages >= 2


@pytest.mark.parametrize(("per", "head_dim"), list(itertools.product([4, 8, 16], [64, 128])))
def test_every_word_has_one_place(per: int, head_dim: int) -> None:
    """Registers, lanes and warps of the producers' layout hold each word of a tile once."""
    layout = history_gluon._words(head_dim // per)
    bases = layout.reg_bases + layout.lane_bases + layout.warp_bases
    places = {(0, 0)}
    for row, column in bases:
        places |= {(r ^ row, c ^ column) for r, c in places}
    assert len(places) == 2 ** len(bases) == 64 * head_dim // per
    assert len(layout.lane_bases) == 5 and len(layout.warp_bases) == 2


@pytest.mark.parametrize(("per", "head_dim"), list(itertools.product([4, 8, 16], [64, 128])))
def test_lanes_meet_every_bank_once(per: int, head_dim: int) -> None:
    """Eight lanes that load 16 bytes of codes each, and store 16 bytes of what they become."""
    words = history_gluon._words(head_dim // per)
    rows = history_gluon._code_rows(head_dim // per)
    piece, width = rows.vec, head_dim // per
    assert words.reg_bases[: piece.bit_length() - 1] == [[0, 1], [0, 2]][: piece.bit_length() - 1]
    lanes = [(0, 0)]
    for row, column in words.lane_bases[: {4: 3, 2: 4}[piece]]:
        lanes += [(r ^ row, c ^ column) for r, c in lanes]
    phase = [r // rows.per_phase % rows.max_phase for r, _ in lanes]
    loads = {
        (r * width // piece + (c // piece ^ p)) % len(lanes) for (r, c), p in zip(lanes, phase, strict=True)
    }
    assert len(loads) == len(lanes)
    stores = {c * per // 8 % 8 ^ r % 8 for r, c in lanes[:8]}
    assert len(stores) == 8


def test_sums_are_multiplied_unless_by_ones() -> None:
    """A lane's elements are of two rows by turns of two; some lanes multiply, or all lanes leave them."""
    generator = np.random.default_rng(0)
    for factors in ((1.0, 1.0), (1.0, 0.5), (0.25, 1.0)):
        sums = [generator.standard_normal(32).astype(np.float32) for _ in range(8)]
        alpha = [np.where(np.arange(32) == 5, factors[i // 2 % 2], 1).astype(np.float32) for i in range(8)]
        # operands 8 … 15 are the same registers as the results 0 … 7
        assembly = history_gluon._scale_asm(8)
        moves = "".join(f"mov.b32 ${i}, ${8 + i};\n" for i in range(8))
        scaled = machine.run_block(
            assembly.replace("{", "{" + moves, 1), *(x.view(np.uint32) for x in sums + alpha)
        )
        for x, factor, found in zip(sums, alpha, scaled, strict=True):
            assert (found.view(np.float32) == x * factor).all()
