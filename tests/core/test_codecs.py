"""Codecs: bytes, error bounds against theory, and the edges of fp16 metadata."""

import copy
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_core.codecs import get_codec, hadamard
from kvq_core.codecs.lloyd_max import LloydMaxCodec
from kvq_core.codecs.turbo import TurboCodec
from kvq_core.errors import KvqError
from kvq_core.policies import CODEC_NAMES, get_policy
from kvq_kernels import hadamard as hadamard_module
from kvq_kernels.codebook import LEVELS, qjl_projection, thresholds
from kvq_kernels.layout import EncoderOptions

QUANTIZED = tuple(name for name in CODEC_NAMES if name != "none")
ROTATED = tuple(name for name in CODEC_NAMES if get_codec(name).rotated)
UNROTATED = ("fp8", "int8", "int4")
CORRECTED = ("turbo-corrected", "lm2-corrected")
FITTED = ("turbo", "lm2", "lm3", "lm4-fit")


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(decoded: torch.Tensor, x: torch.Tensor) -> float:
    return ((decoded - x).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize(
    ("name", "size"),
    {
        "none": 256, "fp8": 130, "int8": 132, "int4": 68, "lm4": 66, "lm4-fit": 66, "lm3": 50, "lm2": 34,
        "lm2-plain": 34, "lm2-corrected": 34, "turbo": 68, "turbo-rms": 68, "turbo-corrected": 68, "qjl": 68,
    }.items(),
)  # fmt: skip
def test_bytes_per_vector(name: str, size: int) -> None:
    codec = get_codec(name)
    assert codec.bytes_per_vector(128) == size
    x = gaussian(3, 128, dtype=torch.bfloat16)
    codes, meta = codec.encode(x)
    assert codes.dtype == torch.uint8 and meta.dtype == torch.float16
    assert codes.shape == (3, codec.code_bytes(128, x.dtype)) and meta.shape == (3, codec.num_meta)


@pytest.mark.parametrize(
    ("policy", "size"),
    [
        (0, 512),
        (16, 260),
        (8, 264),
        (4, 136),
        (42, 102),
        ("42-rms", 102),
        ("42-corrected", 102),
        ("42-lm4", 100),
        ("k8v4", 200),
        ("k4v4", 136),
    ],
)
def test_bytes_of_policies(policy: int | str, size: int) -> None:
    chosen = get_policy(policy)
    assert sum(get_codec(name).bytes_per_vector(128) for name in (chosen.key, chosen.value)) == size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_none_is_exact(dtype: torch.dtype) -> None:
    x = gaussian(5, 3, 80, dtype=dtype)
    assert torch.equal(get_codec("none").roundtrip(x), x)
    assert get_codec("none").bytes_per_vector(80, dtype) == 80 * dtype.itemsize


# --- distortion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.117482), (3, 0.034548), (4, 0.009501)])
def test_lloyd_max_reaches_its_distortion(bits: int, distortion: float) -> None:
    """On a unit normal, the error that Max's tables give: the levels are right, and codes are the nearest."""
    codec = LloydMaxCodec("plain", bits, EncoderOptions(norm_mode="plain"))
    x = gaussian(4000, 256, dtype=torch.float64)
    assert relative_error(codec.roundtrip(x), x) == pytest.approx(distortion, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_centroids_of_their_cells(bits: int) -> None:
    """But for what makes them small multiples of a unit."""
    edges = [-math.inf, *thresholds(bits), math.inf]
    for level, low, high in zip(LEVELS[bits], edges, edges[1:], strict=False):
        density = [math.exp(-e * e / 2) / math.sqrt(2 * math.pi) for e in (low, high)]
        mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
        assert level == pytest.approx((density[0] - density[1]) / mass, abs=0.02)


@pytest.mark.parametrize(("bits", "largest"), [(2, 183), (3, 88), (4, 114.5)])
def test_levels_are_multiples_that_bytes_hold(bits: int, largest: float) -> None:
    multiples = [level / LEVELS[bits][-1] * largest for level in LEVELS[bits]]
    assert multiples == pytest.approx([-x for x in reversed(multiples)])
    assert [2 * x for x in multiples] == pytest.approx([round(2 * x) for x in multiples])


@pytest.mark.parametrize(("bits", "best"), [(2, 0.117482), (3, 0.034548), (4, 0.009501)])
def test_multiples_cost_no_precision(bits: int, best: float) -> None:
    """The mean squared error on a unit normal, integrated, against that of Lloyd-Max's own levels."""
    edges = [-40.0, *thresholds(bits), 40.0]
    error = 0.0
    for level, low, high in zip(LEVELS[bits], edges, edges[1:], strict=False):
        a, b = (math.exp(-e * e / 2) / math.sqrt(2 * math.pi) for e in (low, high))
        mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
        error += mass + low * a - high * b - 2 * level * (a - b) + level * level * mass
    assert error == pytest.approx(best, rel=6e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_the_nearest_levels(bits: int) -> None:
    codec = LloydMaxCodec("plain", bits, EncoderOptions(norm_mode="plain"))
    x = gaussian(50, 64, dtype=torch.float64)
    codes, meta = codec.encode(x)
    decoded = codec.decode(codes, meta, 64, torch.float64)
    candidates = torch.tensor(LEVELS[bits], dtype=torch.float64) * meta.double()[..., None]
    assert torch.equal((x - decoded).abs(), (x[..., None] - candidates).abs().amin(-1))


ERRORS = {
    "fp8": 0.0007, "int8": 5e-5, "int4": 0.0135, "lm4": 0.0100, "lm4-fit": 0.0092, "lm3": 0.0360,
    "lm2": 0.1360, "lm2-plain": 0.1200, "lm2-corrected": 0.1250, "turbo": 0.0105, "turbo-rms": 0.0140,
    "turbo-corrected": 0.0125, "qjl": 0.0580,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", QUANTIZED)
def test_error_on_gaussian(name: str, head_dim: int, dtype: torch.dtype) -> None:
    x = gaussian(500, head_dim, dtype=dtype)
    decoded = get_codec(name).roundtrip(x)
    assert decoded.dtype == dtype
    assert relative_error(decoded.double(), x.double()) < ERRORS[name]


def test_rotation_spreads_an_outlier() -> None:
    """With one channel far above the others, 4 rotated bits beat 4 plain ones clearly."""
    x = gaussian(200, 128)
    x[:, 7] += 20
    rotated, plain = (relative_error(get_codec(name).roundtrip(x), x) for name in ("lm4", "int4"))
    assert rotated < 0.5 * plain


def test_order_of_the_keys_of_42() -> None:
    """The rms scale is worse than the mean, and a true QJL residual worse than either."""
    x = gaussian(1000, 128)
    names = ("turbo", "turbo-corrected", "turbo-rms", "qjl")
    errors = [relative_error(get_codec(name).roundtrip(x), x) for name in names]
    assert errors[0] < 0.9 * errors[1] and errors[1] < 0.9 * errors[2] and errors[2] < 0.5 * errors[3]


@pytest.mark.parametrize("kind", ["lm2", "lm3", "lm4", "turbo"])
def test_scale_candidates_reduce_the_error(kind: str) -> None:
    """More candidates before rounding never hurt, by the measure they are chosen by."""
    x = gaussian(300, 64, dtype=torch.float64)

    def build(candidates: tuple[float, ...]) -> LloydMaxCodec | TurboCodec:
        options = EncoderOptions(candidates=candidates, norm_mode="unbiased")
        return TurboCodec(kind, options) if kind == "turbo" else LloydMaxCodec(kind, int(kind[2]), options)

    def angle(codec: LloydMaxCodec | TurboCodec) -> torch.Tensor:
        decoded = codec.decode(*codec.encode(x), 64, torch.float64)
        return torch.cosine_similarity(decoded, x, dim=-1)

    single, many = angle(build((1.0,))), angle(build((1.0, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2)))
    assert (many >= single - 1e-3).all()
    assert (1 - many).mean() < 0.99 * (1 - single).mean()


def angle(name: str, x: torch.Tensor) -> float:
    """1 - cos between x, as if already rotated, and what is read back: the error after the best norm."""
    codec = get_codec(name)
    decoded = codec.decode(*codec.encode(x), x.shape[-1], x.dtype)
    return (1 - torch.cosine_similarity(decoded, x, dim=-1)).mean().item()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("fitted", "plain", "gain"), [("turbo", "turbo-corrected", 0.86), ("lm4-fit", "lm4", 0.94)]
)
def test_scales_at_the_peak(fitted: str, plain: str, gain: float, head_dim: int) -> None:
    """Normal vectors gain; one with an element far above the others, which fixed scales clip, gains most."""
    x = gaussian(400, head_dim, dtype=torch.float64)
    assert angle(fitted, x) < gain * angle(plain, x)
    x[:, 3] = 8
    assert angle(fitted, x) < 0.5 * angle(plain, x)


def test_more_candidates_would_gain_little() -> None:
    """The few that are used come within 3% of a fine grid over all scales."""
    x = gaussian(400, 128, dtype=torch.float64)
    for name, grid in (("turbo", range(160, 340, 5)), ("lm2", range(60, 160, 5))):
        codec = copy.copy(get_codec(name))
        codec.encoder = replace(codec.encoder, candidates=tuple(i / 100 for i in grid))
        decoded = codec.decode(*codec.encode(x), 128, x.dtype)
        best = (1 - torch.cosine_similarity(decoded, x, dim=-1)).mean().item()
        assert best <= angle(name, x) < 1.03 * best


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("name", FITTED)
def test_fitted_norm_keeps_the_projection_or_half_of_it(name: str, scale: float) -> None:
    x = gaussian(200, 128, dtype=torch.float64) * scale
    decoded = get_codec(name).roundtrip(x)
    projection = (x * decoded).sum(-1) / x.square().sum(-1)
    if get_codec(name).encoder.norm_mode == "balanced":  # as much too short along x as too long in all
        projection *= decoded.norm(dim=-1) / x.norm(dim=-1)
    assert (projection - 1).abs().max() < 2**-10


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("name", CORRECTED)
def test_norm_correction_is_exact_to_fp16(name: str, scale: float) -> None:
    x = gaussian(200, 128, dtype=torch.float64) * scale
    ratio = get_codec(name).roundtrip(x).norm(dim=-1) / x.norm(dim=-1)
    assert (ratio - 1).abs().max() <= 2**-11


# --- codes agree with the fp16 metadata ---------------------------------------------------------------------


def fraction_round(value: Fraction) -> int:
    return round(value)  # to even, as torch does


@pytest.mark.parametrize("bits", [4, 8])
def test_int_codes_come_from_stored_metadata(bits: int) -> None:
    """Exact rational arithmetic on the fp16 scale and minimum gives the stored codes."""
    codec = get_codec(f"int{bits}")
    x = gaussian(20, 64, dtype=torch.float64) * 3
    codes, meta = codec.encode(x)
    top = 2**bits - 1
    for row, packed, (scale, minimum) in zip(x.tolist(), codes.tolist(), meta.double().tolist(), strict=True):
        assert scale == torch.tensor((max(row) - min(row)) / top, dtype=torch.float64).half().item()
        assert minimum == torch.tensor(min(row), dtype=torch.float64).half().item()
        unpacked = packed if bits == 8 else [n for byte in packed for n in (byte & 15, byte >> 4)]
        for value, code in zip(row, unpacked, strict=True):
            exact = (Fraction(value) - Fraction(minimum)) / Fraction(scale)
            assert code == min(max(fraction_round(exact), 0), top)


@pytest.mark.parametrize("name", UNROTATED)
@given(
    values=st.lists(st.floats(-1e4, 1e4, allow_nan=False, width=32), min_size=16, max_size=16),
    shift=st.sampled_from([0.0, 1.0, 1000.0, -30000.0]),
)
@settings(max_examples=60, deadline=None)
def test_error_bound_of_unrotated_codecs(name: str, values: list[float], shift: float) -> None:
    x = torch.tensor(values, dtype=torch.float64) + shift
    decoded = get_codec(name).roundtrip(x)
    if name == "fp8":
        bound = x.abs() / 16 + x.abs().max() * 2**-9 + 448 * 2**-24
    else:
        top = 255 if name == "int8" else 15
        step = (x.max() - x.min()) / top
        half_steps = 0.5 + top * 2**-11  # rounding, and clipping where the fp16 scale was rounded down
        bound = step * half_steps + x.min().abs() * 2**-11 + (top + 1) * 2**-24
    assert ((decoded - x).abs() <= bound + 1e-12).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integers_are_exact(name: str) -> None:
    top = 255 if name == "int8" else 15
    x = torch.arange(-3, top - 2).repeat(4)[: max(64, top + 1)].float()
    assert torch.equal(get_codec(name).roundtrip(x[None])[0], x)


def test_fp8_values_are_exact() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = values[values.isfinite()].view(-1, 127).repeat(1, 2)[:, :240]
    x[:, 0] = 448
    assert torch.equal(get_codec("fp8").roundtrip(x), x)


def test_bits_of_every_code() -> None:
    """The packing that kernels rely on: element i of a byte at bit i · bits; lm3 as planes of 2 and 1;
    lm2 as pairs of bytes: the larger magnitude, negative."""

    def decode(name: str, codes: list[int], meta: list[float], head_dim: int) -> list[float]:
        bytes_ = torch.tensor(codes, dtype=torch.uint8)
        return get_codec(name).decode(bytes_, torch.tensor(meta).half(), head_dim, torch.float64).tolist()

    nibbles = [2 * i | (2 * i + 1) << 4 for i in range(8)]
    assert decode("int8", [0, 1, 255], [0.5, -1.0], 3) == [-1.0, -0.5, 126.5]
    assert decode("int4", nibbles, [0.5, -1.0], 16) == [i / 2 - 1 for i in range(16)]
    assert decode("fp8", [0x38, 0xB8, 0x7E, 0x01], [2.0], 4) == [2.0, -2.0, 896.0, 2.0**-8]
    assert decode("lm4", nibbles, [2.0], 16) == [2 * level for level in LEVELS[4]]
    assert decode("lm3", [0b11100100] * 4 + [0b11110000] * 2, [2.0], 16) == [2 * x for x in LEVELS[3] * 2]
    assert decode("lm2", [0b10011001, 0b00110011] * 2, [2.0], 16) == [2 * level for level in LEVELS[2]] * 4
    turbo = [2 * (x + s) for s in (-0.25, 0.25) for x in LEVELS[3]]
    assert decode("turbo", nibbles, [2.0, 0.25], 16) == turbo


@pytest.mark.parametrize("name", [name for name in QUANTIZED if name != "qjl"])
def test_encoding_what_was_decoded(name: str) -> None:
    """A decoded vector lies on its own grid: coding it again finds the same codes (QJL has no such grid)."""
    codec = get_codec(name)
    x = gaussian(40, 64, dtype=torch.float64)
    codes, meta = codec.encode(x)
    again, _ = codec.encode(codec.decode(codes, meta, 64, torch.float64))
    assert (again == codes).double().mean() > (0.9 if codec.rotated else 0.99)


# --- extremes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1000.0, 3e-8, 60000.0])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_constant_vector(name: str, value: float, dtype: torch.dtype) -> None:
    x = torch.full((2, 96), value, dtype=dtype)
    decoded = get_codec(name).roundtrip(x).double()
    if name == "fp8":
        assert ((decoded - x.double()).abs() <= x.double().abs() * 2**-10 + 448 * 2**-25).all()
    else:
        assert torch.equal(decoded, x.half().double())


@pytest.mark.parametrize("name", QUANTIZED)
def test_zero_vector_is_zero(name: str) -> None:
    assert torch.equal(get_codec(name).roundtrip(torch.zeros(3, 64)), torch.zeros(3, 64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-7, 1e-5, 7e4, 1e6, 1e10, 1e30])
@pytest.mark.parametrize("name", QUANTIZED)
def test_extremes_stay_finite(name: str, scale: float, dtype: torch.dtype) -> None:
    """Beyond fp16's range a vector saturates or vanishes; it never turns into NaN or infinity."""
    x = (gaussian(8, 64, dtype=torch.float64) * scale).to(dtype)
    x[0, :8] = 0
    _, meta = get_codec(name).encode(x)
    assert meta.isfinite().all()
    decoded = get_codec(name).roundtrip(x).double()
    assert decoded.isfinite().all()
    if scale < 1e-8:
        assert decoded.abs().max() <= 448 * 2**-24
    if scale in (1e-5, 7e4) and not name.startswith("lm2"):
        assert relative_error(decoded, x.double()) < (0.15 if scale > 1 else 0.2)


@pytest.mark.parametrize("head_dim", [48, 64, 128])
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_edge_of_half_precision_stays_finite(name: str, head_dim: int) -> None:
    """Rotated codecs read a large element back with an error of the vector's size, beyond what fp16 holds."""
    x = gaussian(8, head_dim, dtype=torch.float64).sign() * 65000
    x[4:, 1:] = 0.1
    decoded = get_codec(name).roundtrip(x.half())
    assert decoded.dtype == torch.float16 and decoded.isfinite().all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_float64_is_float64_throughout(name: str) -> None:
    """Decoding in float64 has no float32 rounding in it: it is code arithmetic on exact fp16 metadata."""
    x = gaussian(20, 64, dtype=torch.float64)
    codec = get_codec(name)
    codes, meta = codec.encode(x)
    wide = codec.decode(codes, meta, 64, torch.float64)
    narrow = codec.decode(codes, meta, 64, torch.float32)
    assert wide.dtype == torch.float64 and narrow.dtype == torch.float32
    assert 0 < (wide - narrow).abs().max() < 1e-5 or name in UNROTATED
    assert codec.decode(codes, meta, 64, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_batches_and_strides_do_not_matter(name: str) -> None:
    """Any leading shape, and views that are not contiguous, give each vector's own bytes."""
    codec = get_codec(name)
    x = gaussian(6, 4, 64).transpose(0, 1)
    codes, meta = codec.encode(x)
    for i in range(4):
        for j in range(6):
            one_codes, one_meta = codec.encode(x[i, j].clone())
            assert torch.equal(codes[i, j], one_codes) and torch.equal(meta[i, j], one_meta)


# --- QJL ----------------------------------------------------------------------------------------------------


def test_qjl_residual_is_unbiased() -> None:
    """E over S of √(π/2)/D · ‖r‖ · Sᵀ sign(S r) is r, and one sample is far from it."""
    head_dim, samples = 64, 3000
    residual = gaussian(head_dim, dtype=torch.float64, seed=1) * 0.2
    projections = gaussian(samples, head_dim, head_dim, dtype=torch.float64, seed=2)
    signs = torch.where(projections @ residual >= 0, 1.0, -1.0).double()
    estimates = torch.einsum("sij,si->sj", projections, signs)
    estimates *= math.sqrt(math.pi / 2) / head_dim * residual.norm()
    spread = estimates.std(0) / math.sqrt(samples)
    assert ((estimates.mean(0) - residual).abs() < 5 * spread).all()
    assert (estimates[0] - residual).norm() > 0.5 * residual.norm()


def test_qjl_decodes_what_its_formula_says() -> None:
    x = gaussian(10, 64, dtype=torch.float64)
    codec = get_codec("qjl")
    codes, meta = codec.encode(x)
    norm, length = meta.double().split(1, -1)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    level = torch.tensor(LEVELS[3], dtype=torch.float64)[(nibbles & 7).long()]
    sign = (nibbles >> 3).double() * 2 - 1
    residual = x / norm - level
    projection = qjl_projection(64, torch.float64, x.device)
    assert torch.equal(sign > 0, residual @ projection.T >= 0)
    assert torch.equal(length, residual.norm(dim=-1, keepdim=True).half().double())
    expected = norm * (level + math.sqrt(math.pi / 2) / 64 * length * (sign @ projection))
    torch.testing.assert_close(codec.decode(codes, meta, 64, torch.float64), expected, rtol=1e-12, atol=1e-12)


# --- rotation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 48, 64, 80, 96, 112, 128, 144, 160, 192, 224, 240, 256])
def test_hadamard_is_orthogonal_and_its_own_inverse(size: int) -> None:
    x = gaussian(7, size, dtype=torch.float64)
    y = hadamard(x)
    torch.testing.assert_close(hadamard(y), x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    ones = hadamard(torch.eye(size, dtype=torch.float64)) * math.sqrt(size)
    torch.testing.assert_close(ones.abs(), torch.ones(size, size, dtype=torch.float64))
    if size & (size - 1) == 0:
        assert ones[0].min() > 0.99  # Sylvester's order: the first row is all ones


def test_stand_in_transform_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module named fast_hadamard_transform is picked up, and gives the same numbers as our own."""
    import sys
    from types import ModuleType

    calls = []

    def hadamard_transform(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        calls.append(tuple(x.shape))
        y = x.float()
        step = 1
        while step < x.shape[-1]:
            pairs = y.unflatten(-1, (-1, 2, step))
            y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2)
            y = y.flatten(-3)
            step *= 2
        return (y * scale).to(x.dtype)

    module = ModuleType("fast_hadamard_transform")
    module.hadamard_transform = hadamard_transform  # type: ignore[attr-defined]

    def forget() -> None:
        hadamard_module._fast_transform.cache_clear()
        hadamard_module._fast_works.cache_clear()

    x = gaussian(5, 128)
    own = hadamard(x)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fast_hadamard_transform", module)
        forget()
        assert hadamard_module.hadamard_backend() == "fast_hadamard_transform"
        theirs = hadamard(x)
        assert (5, 128) in calls
        assert hadamard(x.double()).dtype == torch.float64 and calls[-1] == (5, 128)
        module.hadamard_transform = lambda x, scale: x  # type: ignore[attr-defined]
        forget()
        assert hadamard_module.hadamard_backend() == "built-in", "a wrong transform is not used"
    forget()
    assert hadamard_module.hadamard_backend() in ("built-in", "fast_hadamard_transform")
    truth = hadamard(x.double())
    error = (own - truth).abs().max()
    assert (theirs - truth).abs().max() <= 2 * error + 1e-7


# --- head dims ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("name", ["none", *UNROTATED])
def test_head_dims_of_unrotated_codecs(name: str, head_dim: int) -> None:
    codec = get_codec(name)
    codec.check_head_dim(head_dim)
    x = gaussian(50, head_dim)
    assert relative_error(codec.roundtrip(x), x) < 0.02


@pytest.mark.parametrize("head_dim", [80, 96, 112, 160, 192])
@pytest.mark.parametrize("name", ROTATED)
def test_rotated_head_dims_that_are_no_power_of_two(name: str, head_dim: int) -> None:
    """As good as the next power of two, on Gaussian and on spiky vectors, with as many bits a code."""
    codec = get_codec(name)
    assert (
        codec.code_bytes(head_dim, torch.bfloat16) * 128 == codec.code_bytes(128, torch.bfloat16) * head_dim
    )

    def error(size: int, spike: float) -> float:
        x = gaussian(800, size, dtype=torch.float64)
        x[:, 5] *= spike
        return relative_error(codec.roundtrip(x), x)

    for spike in (1.0, 20.0):
        most = 1.05 if head_dim == 96 and name in ("turbo", "lm2") else 1.1
        assert error(head_dim, spike) < most * error(256 if head_dim > 128 else 128, spike)


@pytest.mark.parametrize("head_dim", [8, 176, 208])
@pytest.mark.parametrize("name", ROTATED)
def test_rotated_codecs_want_a_hadamard_matrix(name: str, head_dim: int) -> None:
    with pytest.raises(KvqError) as caught:
        get_codec(name).check_head_dim(head_dim)
    assert name in caught.value.message and str(head_dim) in caught.value.message
    assert "int4" in caught.value.hint
    with pytest.raises(KvqError):
        get_codec(name).roundtrip(gaussian(2, head_dim))


@pytest.mark.parametrize("name", UNROTATED)
def test_odd_head_dims_are_refused(name: str) -> None:
    with pytest.raises(KvqError, match="multiple of 16"):
        get_codec(name).check_head_dim(72)
    get_codec("none").check_head_dim(72)


def test_unknown_codec() -> None:
    with pytest.raises(KvqError) as caught:
        get_codec("int5")
    assert "int5" in caught.value.message and "turbo" in caught.value.hint
