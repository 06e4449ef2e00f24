"""The torch twins against a loop over tokens and heads in float64."""

import pytest
import torch

from kvq_core.codecs import get_codec
from kvq_core.policies import CODEC_NAMES
from kvq_kernels import dispatch, reference
from kvq_kernels.layout import PageLayout, RawWindow
from tests.kernels.naive import Case, build, decode, prefill, truth

RAGGED = (1, 15, 16, 17, 0, 40, 33)
FEATURES = {
    "plain": {},
    "window": {"window": 9},
    "window-of-one": {"window": 1},
    "window-of-a-page": {"window": 16},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "sink": {"sink": 3},
    "recent": {"recent": 5},
    "sink-recent": {"sink": 4, "recent": 18},
    "all": {"window": 21, "softcap": 2.0, "sinks": True, "sink": 2, "recent": 6},
    "dims": {"key_dim": 64, "value_dim": 32},
    "no-group": {"group": 1, "kv_heads": 3},
    "wide-group": {"group": 5, "kv_heads": 1},
}


def close(result: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert result.shape == expected.shape
    assert result.isfinite().all()
    error = (result.double() - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), error


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("codecs", ["none:none", "int8:int4", "turbo:lm2", "fp8:lm3"])
def test_decode(codecs: str, feature: str) -> None:
    key, value = codecs.split(":")
    problem = build(
        Case(key, value, contexts=RAGGED, **FEATURES[feature]), reference.store, reference.store_raw
    )
    close(decode(problem, reference.paged_decode), truth(problem))


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_decode_with_every_codec(name: str) -> None:
    problem = build(Case(name, name, contexts=(35, 7)), reference.store, reference.store_raw)
    close(decode(problem, reference.paged_decode), truth(problem))


@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 192, 256])
def test_decode_head_dims(head_dim: int) -> None:
    case = Case("turbo", "lm4", key_dim=head_dim, value_dim=head_dim, contexts=(20,))
    problem = build(case, reference.store, reference.store_raw)
    close(decode(problem, reference.paged_decode), truth(problem))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("codecs", ["none:none", "int8:int4", "turbo:lm2", "lm4:qjl"])
def test_prefill(codecs: str, feature: str) -> None:
    """Chunks of many lengths in one step, with and without history, at page edges and beyond the window."""
    key, value = codecs.split(":")
    case = Case(
        key, value, contexts=(0, 16, 33, 1, 0, 50), chunks=(30, 1, 17, 40, 1, 19), **FEATURES[feature]
    )
    problem = build(case, reference.store, reference.store_raw)
    close(prefill(problem, reference.paged_prefill), truth(problem))


@pytest.mark.parametrize("elements", [1, 2000])
@pytest.mark.parametrize("feature", ["plain", "window", "all"])
def test_prefill_in_query_blocks(feature: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the queries into blocks, which bounds memory, changes nothing."""
    monkeypatch.setattr(reference, "_PREFILL_ELEMENTS", elements)
    case = Case("int8", "lm2", contexts=(20, 0), chunks=(23, 23), **FEATURES[feature])
    problem = build(case, reference.store, reference.store_raw)
    close(prefill(problem, reference.paged_prefill), truth(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codecs", ["none:none", "int8:int8", "turbo:lm2", "fp8:int4", "lm3:lm4"])
def test_narrow_dtypes(codecs: str, dtype: torch.dtype) -> None:
    """bf16 and fp16 models are worked on in float32: only the result is rounded."""
    key, value = codecs.split(":")
    tolerance = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    case = Case(key, value, contexts=(40, 3), dtype=dtype, sinks=True, sink=1, recent=2)
    problem = build(case, reference.store, reference.store_raw)
    result = decode(problem, reference.paged_decode)
    assert result.dtype == dtype
    close(result, truth(problem), tolerance)
    case = Case(key, value, contexts=(40, 0), chunks=(5, 30), dtype=dtype)
    problem = build(case, reference.store, reference.store_raw)
    close(prefill(problem, reference.paged_prefill), truth(problem), tolerance)


def test_blocks_of_requests_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("turbo", "lm2", contexts=(40, 1, 0, 17, 64, 3), sink=1, recent=3)
    problem = build(case, reference.store, reference.store_raw)
    together = decode(problem, reference.paged_decode)
    monkeypatch.setattr(reference, "_DECODE_ELEMENTS", 1)
    close(decode(problem, reference.paged_decode), together)


def test_planted_faults_are_seen() -> None:
    """The comparison is sharp: small changes of scale, window or sinks are far above its tolerance."""
    case = Case("int8", "int8", contexts=(40, 30), window=12, sinks=True)
    problem = build(case, reference.store, reference.store_raw)
    expected = truth(problem)
    changes = [{"scale": problem.scale * 1.01}, {"window": 11}, {"window": 13}, {"sinks": None}]
    for change in changes:
        result = decode(problem, reference.paged_decode, **change).nan_to_num(1e3)
        assert (result - expected).abs().max() > 1e-5, change


def test_max_context_is_only_a_hint() -> None:
    problem = build(Case(contexts=(33, 2)), reference.store, reference.store_raw)
    close(decode(problem, reference.paged_decode, max_context=33), decode(problem, reference.paged_decode))


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_store_writes_what_the_codec_says(name: str) -> None:
    """Bytes land where PageLayout says, from strided views, and nothing else is touched."""
    layout = PageLayout(get_codec(name), get_codec("int8"), 16, 2, 64, 32, torch.float32)
    pages = layout.empty_pages(4, "cpu").fill_(0xAB)
    packed = torch.randn(3, 2 * 64 + 2 * 32)
    key, value = packed[:, :128].unflatten(-1, (2, 64)), packed[:, 128:].unflatten(-1, (2, 32))
    slots = torch.tensor([2 * 16 + 5, 1 * 16 + 15, 3 * 16])
    reference.store(key, value, pages, slots, layout)

    untouched = torch.ones_like(pages, dtype=torch.bool)
    for token, slot in enumerate(slots.tolist()):
        page, row = divmod(slot, 16)
        for head in range(2):
            block = pages[page, head]
            width = layout.key_code_bytes
            codes = block[row * width : (row + 1) * width]
            meta_bytes = block[layout.meta_offset :].view(torch.float16).view(-1, 16)
            count = layout.key.num_meta
            expected = get_codec(name).roundtrip(key[token, head])
            decoded = get_codec(name).decode(codes, meta_bytes[:count, row], 64, torch.float32)
            if layout.key.rotated:
                decoded = reference.hadamard(decoded)
            torch.testing.assert_close(decoded, expected)
            value_codes = block[layout.value_offset + row * 32 :][:32]
            expected_codes, expected_meta = get_codec("int8").encode(value[token, head])
            assert torch.equal(value_codes, expected_codes)
            assert torch.equal(meta_bytes[count:, row], expected_meta)
            untouched[page, head, row * width : (row + 1) * width] = False
            untouched[page, head, layout.value_offset + row * 32 :][:32] = False
            for index in range(layout.num_meta):
                start = layout.meta_offset + 2 * (index * 16 + row)
                untouched[page, head, start : start + 2] = False
    assert (pages[untouched] == 0xAB).all()


def test_store_raw_keeps_the_latest() -> None:
    """A chunk longer than the ring leaves its last tokens there, and the sink its first."""
    raw = RawWindow(2, 4, torch.zeros(3, 6, 1, 16), torch.zeros(3, 6, 1, 16))
    position = torch.arange(13)
    tokens = (position + 1.0)[:, None, None].expand(13, 1, 16)
    keep = (position < 2) | (position >= 9)
    reference.store_raw(tokens, -tokens, position, torch.full((13,), 1), raw, keep)
    assert raw.keys[1, :, 0, 0].tolist() == [1, 2, 11, 12, 13, 10]
    assert torch.equal(raw.values, -raw.keys)
    assert raw.keys[[0, 2]].abs().max() == 0


@pytest.mark.parametrize(("sink", "recent"), [(0, 3), (3, 0), (2, 2)])
def test_store_raw_one_token_at_a_time(sink: int, recent: int) -> None:
    """Token by token and in one call give the same window."""
    shape = (1, sink + recent, 1, 16)
    one, all_ = (RawWindow(sink, recent, torch.zeros(shape), torch.zeros(shape)) for _ in range(2))
    key = torch.randn(9, 1, 16)
    ring = torch.zeros(9, dtype=torch.int32)
    position = torch.arange(9)
    for i in range(9):
        reference.store_raw(key[i : i + 1], key[i : i + 1], position[i : i + 1], ring[i : i + 1], one)
    keep = (position < sink) | (position >= 9 - recent)
    reference.store_raw(key, key, position, ring, all_, keep)
    assert torch.equal(one.keys, all_.keys) and torch.equal(one.values, all_.values)


def test_dispatch_on_a_cpu_is_the_twin() -> None:
    case = Case("turbo", "lm2", contexts=(20, 5), sink=1, recent=2)
    ours = build(case, dispatch.store, dispatch.store_raw)
    twin = build(case, reference.store, reference.store_raw)
    assert torch.equal(ours.pages, twin.pages)
    assert torch.equal(decode(ours, dispatch.paged_decode), decode(twin, reference.paged_decode))
    case = Case("turbo", "lm2", contexts=(20, 5), chunks=(3, 4), sink=1, recent=2)
    ours = build(case, dispatch.store, dispatch.store_raw)
    assert torch.equal(prefill(ours, dispatch.paged_prefill), prefill(ours, reference.paged_prefill))
