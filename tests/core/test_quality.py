"""Perplexity and drift: the figures, attention that reads back, the cross-check by decoding, windows."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvq_core.errors import KvqError, UsageError
from kvq_core.models import LoadedModel, load_model
from kvq_core.policies import Policy, get_policy
from kvq_core.quality import perplexity
from kvq_core.quality.decoded import decoded_drift
from kvq_core.quality.drift import Drift
from kvq_core.quality.perplexity import effective_bits, evaluate
from kvq_core.quality.read_back import BLOCK, logits
from kvq_core.quality.text import Windows, cut_windows, read_text, sample_text
from tests.tiny import TINY

VOCAB = TINY["vocab_size"]
WINDOW = 20
BASE: dict[str, Any] = {
    **TINY,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "gemma2": {"attn_logit_softcapping": 5.0, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
POLICIES = [
    get_policy("8"),
    get_policy("42"),
    get_policy("42").with_window(3, 7),
    get_policy("lm4:none").with_window(0, 12),
]


def build(model_type: str, folder: Path) -> LoadedModel:
    config = AutoConfig.for_model(model_type, **{**BASE, **ARCHITECTURES[model_type]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if "norm" in name and parameter.ndim == 1:
                parameter.add_(1.0)
    model.save_pretrained(folder)
    return load_model(str(folder), dtype="float64", device="cpu", need_tokenizer=False)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return build("llama", tmp_path_factory.mktemp("llama"))


def windows(count: int, length: int) -> Windows:
    ids = torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(2))
    return Windows("random", "", length, ids, count)


# Figures


def test_figures_are_what_their_names_say() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(300, 7, generator=generator, dtype=torch.float64)
    given = reference + 0.5 * torch.randn(300, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 7, (300,), generator=generator)
    drift = Drift()
    drift.add(reference[:100], given[:100], targets[:100])
    drift.add(reference[100:], given[100:], targets[100:])
    figures = drift.figures()
    p, q = reference.softmax(-1), given.softmax(-1)
    kl = sorted(float((p[i] * (p[i] / q[i]).log()).sum()) for i in range(300))
    nll = [-math.log(q[i, targets[i]]) for i in range(300)]
    assert figures.tokens == 300
    assert figures.kl == pytest.approx(sum(kl) / 300)
    assert figures.kl_median == pytest.approx((kl[149] + kl[150]) / 2)
    assert kl[295] <= figures.kl_p99 <= kl[298]
    assert figures.ppl == pytest.approx(math.exp(sum(nll) / 300))
    assert figures.top1 == sum(int(p[i].argmax() == q[i].argmax()) for i in range(300)) / 300


def test_no_drift_from_itself() -> None:
    same = torch.randn(9, 5)
    drift = Drift()
    drift.add(same, same, torch.zeros(9, dtype=torch.int64))
    figures = drift.figures()
    assert (figures.kl, figures.kl_p99, figures.top1) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_predictions_that_are_no_numbers_have_no_figures(broken: float) -> None:
    sound, targets = torch.randn(9, 5), torch.zeros(9, dtype=torch.int64)
    wrong = sound.clone()
    wrong[4, 2] = broken
    for reference, given in ((wrong, wrong), (sound, wrong)):
        with pytest.raises(KvqError, match="no numbers"):
            Drift().add(reference, given, targets)


@pytest.mark.parametrize(
    ("policy", "head_dim", "bits"),
    [
        ("none", 128, 16.0),
        ("8", 128, 8.25),
        ("4", 128, 4.25),
        ("42", 128, 3.1875),
        ("42", 64, 3.375),
        ("fp8", 128, 8.125),
    ],
)
def test_effective_bits(llama: LoadedModel, policy: str, head_dim: int, bits: float) -> None:
    from dataclasses import replace

    layers = tuple(replace(layer, key_dim=head_dim, value_dim=head_dim) for layer in llama.geometry.layers)
    geometry = replace(llama.geometry, layers=layers)
    assert effective_bits(geometry, get_policy(policy), 1024) == bits
    if policy != "none":
        kept = get_policy(policy).with_window(4, 128)
        assert effective_bits(geometry, kept, 1024) == bits + 16 * 132 / 1024
        assert effective_bits(geometry, kept, 8192) == bits + 16 * 132 / 8192


# Reading back


def test_without_quantization_it_is_the_model_itself(model: LoadedModel) -> None:
    ids = windows(1, BLOCK + 3 * WINDOW).ids[0]
    mine = logits(model, ids, get_policy("none"))
    assert model.model.config._attn_implementation == "kvq"
    model.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            theirs = model.model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        model.model.set_attn_implementation("kvq")
    assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()  # eager takes its softmax in float32


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.label)
def test_decoding_through_the_engine_gives_the_same_figures(model: LoadedModel, policy: Policy) -> None:
    ids = windows(1, 70).ids[0]
    reference = logits(model, ids, get_policy("none"))[:-1]
    decoded = decoded_drift(model, ids, policy, reference)
    forward = Drift()
    forward.add(reference, logits(model, ids, policy, prompt_len=1)[:-1], ids[1:])
    for name in ("nll", "kl"):
        one, other = torch.cat(getattr(decoded, name)), torch.cat(getattr(forward, name))
        assert (one - other).abs().max() < 1e-7
    assert decoded.figures().kl > 1e-6
    assert decoded.figures().tokens == 69


def test_blocks_of_queries_do_not_change_the_result(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, policy = windows(1, 100).ids[0], get_policy("42").with_window(3, 7)
    whole = logits(llama, ids, policy)
    monkeypatch.setattr("kvq_core.quality.read_back.BLOCK", 16)
    assert (logits(llama, ids, policy) - whole).abs().max() < 1e-9


def test_a_sink_or_recent_tokens_bring_it_closer(llama: LoadedModel) -> None:
    chosen = [get_policy("42"), get_policy("42").with_window(0, 16), get_policy("42").with_window(0, 128)]
    result = evaluate(llama, windows(2, 128), chosen)
    kl = [row.figures.kl for row in result.rows]
    assert kl[0] > kl[1] > kl[2] == pytest.approx(0.0, abs=1e-9)


# Evaluating


def test_rows_follow_the_policies(llama: LoadedModel) -> None:
    chosen = [get_policy(p) for p in ("none", "8", "42-rms", "none:lm4")]
    seen: list[tuple[int, int]] = []
    result = evaluate(llama, windows(3, 40), chosen, progress=lambda done, total: seen.append((done, total)))
    assert result.complete and result.windows == 3
    assert [row.policy for row in result.rows] == chosen
    none, int8, rms, _ = (row.figures for row in result.rows)
    assert none.kl == 0.0 and none.ppl == result.reference_ppl
    assert 0 < int8.kl < rms.kl
    assert all(row.figures.tokens == 3 * 39 for row in result.rows)
    assert seen == sorted(seen) and seen[-1][0] < seen[-1][1]


def test_the_engine_path_measures_the_same(llama: LoadedModel) -> None:
    chosen = [get_policy("none"), get_policy("42")]
    forward, engine = (
        evaluate(llama, windows(2, 50), chosen, through_engine=through) for through in (False, True)
    )
    assert engine.rows[0].figures.kl < 1e-12
    assert engine.rows[1].figures.kl == pytest.approx(forward.rows[1].figures.kl, rel=0.2)


def test_an_interrupted_run_keeps_whole_windows(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = perplexity.logits, 0

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # the third policy of the second window
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    chosen = [get_policy("8"), get_policy("4"), get_policy("42")]
    whole = evaluate(llama, windows(1, 40), chosen)
    monkeypatch.setattr(perplexity, "logits", interrupt)
    result = evaluate(llama, windows(3, 40), chosen)
    assert not result.complete and result.windows == 1
    assert [r.figures for r in result.rows] == [r.figures for r in whole.rows]
    calls = 5
    assert evaluate(llama, windows(3, 40), chosen).rows == []


def test_a_codec_that_cannot_take_the_head_dim(llama: LoadedModel) -> None:
    from dataclasses import replace

    layers = tuple(replace(layer, key_dim=176) for layer in llama.geometry.layers)
    other = replace(llama, geometry=replace(llama.geometry, layers=layers))
    with pytest.raises(KvqError, match="Hadamard matrix"):
        evaluate(other, windows(1, 8), [get_policy("42")])


# Texts


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % VOCAB for letter in text]}


def with_tokenizer(model: LoadedModel) -> LoadedModel:
    from dataclasses import replace

    return replace(model, tokenizer=Letters())


def test_windows_do_not_overlap_and_start_at_the_start(llama: LoadedModel) -> None:
    text = "".join(chr(33 + i % 60) for i in range(105))
    cut = cut_windows(with_tokenizer(llama), text, "text", context_len=20, limit=0)
    assert cut.ids.flatten().tolist() == [ord(letter) % VOCAB for letter in text[:100]]
    assert cut.ids.shape == (5, 20) and cut.available == 5
    two = cut_windows(with_tokenizer(llama), text, "text", context_len=20, limit=2)
    assert torch.equal(two.ids, cut.ids[:2]) and two.available == 5
    assert two.describe()["predicted_tokens"] == 38
    assert len(cut_windows(with_tokenizer(llama), text, "text", context_len=20, limit=99).ids) == 5


@pytest.mark.parametrize(("length", "error"), [(1, UsageError), (513, UsageError), (106, KvqError)])
def test_window_lengths_that_cannot_be(llama: LoadedModel, length: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        cut_windows(with_tokenizer(llama), "x" * 105, "text", context_len=length)


def test_a_model_without_a_tokenizer(llama: LoadedModel) -> None:
    with pytest.raises(KvqError, match="no tokenizer"):
        cut_windows(llama, "text", "text", context_len=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"", "empty"), (b" \n", "empty"), (b"\xff\xfe", "not UTF-8")],
)
def test_bad_texts(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KvqError, match=message) as caught:
        read_text(path)
    assert caught.value.hint


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfcall me")
    assert read_text(tmp_path / "text.txt") == "call me"


def test_the_shipped_text() -> None:
    text, name = sample_text()
    assert len(text) > 100_000 and name.endswith(".json")


@pytest.mark.demo
def test_policies_order_as_their_bits_do_on_the_demo_model() -> None:
    model = load_model("demo", device="cpu", dtype="float32")
    text, name = sample_text()
    cut = cut_windows(model, text, name, context_len=256, limit=2)
    chosen = [get_policy(p) for p in ("8", "int8:int4", "lm4:lm4", "4", "42", "qjl")]
    chosen.append(get_policy("42").with_window(4, 128))
    int8, mixed, lm4, int4, turbo, qjl, kept = (row.figures.kl for row in evaluate(model, cut, chosen).rows)
    assert int8 < mixed < lm4 < int4 < turbo < qjl
    assert int8 < 0.002 and kept < 0.2 * turbo < 0.1
