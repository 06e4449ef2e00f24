"""Keys with a large constant part: found at load, left out of the pages, and added again by every reader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvq_core.codecs import get_codec
from kvq_core.config import EngineConfig
from kvq_core.errors import UsageError
from kvq_core.models import LoadedModel, load_model
from kvq_core.policies import get_policy
from kvq_core.quality.decoded import decoded_drift
from kvq_core.quality.read_back import logits
from kvq_kernels import reference
from tests.kernels.naive import Case, build, decode, key_bias, prefill

SPIKE = 40.0
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
IDS = torch.randint(2, 96, (40,), generator=torch.Generator().manual_seed(1))


def model(folder: Path, model_type: str, spike: float, **changes: Any) -> LoadedModel:
    """A tiny model whose keys have spikes in their slowest rotated pairs."""
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TINY | changes)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
            if "norm" in name or "ln_" in name:
                parameter.add_(1.0)
            if name.endswith("k_proj.bias"):
                parameter[-1] += spike
            if name.endswith("c_attn.bias"):
                parameter[64 + 31] += spike
    made.save_pretrained(folder)
    return load_model(str(folder), dtype="float64", device="cpu", need_tokenizer=False)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("qwen2", {}), ("phi", {"num_key_value_heads": 2}), ("gpt2", {"num_key_value_heads": None})],
    ids=["qwen2", "phi", "gpt2"],
)
def test_engine_and_read_back_agree_and_drift_little(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """By rotary embedding, by one of a part of the head, and by none; token by token and in one forward."""
    loaded = model(tmp_path, model_type, SPIKE, **changes)
    assert loaded.key_biases is not None and set(loaded.key_biases.biases) == {0, 1}
    policy = get_policy("turbo:none+s2r5")
    none = logits(loaded, IDS, get_policy(0))
    errors = {}
    for mode in ("auto", "off"):
        forward = logits(loaded, IDS, policy, key_bias=mode)
        errors[mode] = (forward - none).norm()
        drift = decoded_drift(loaded, IDS, policy, forward[:-1], mode).figures()
        assert drift.kl < 1e-12, "the engine reads something else"
    assert errors["auto"] < 0.7 * errors["off"]


def test_the_forward_is_that_of_keys_without_their_constant_part(tmp_path: Path) -> None:
    """Against transformers' own rotary embedding of the bias."""
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    loaded = model(tmp_path, "qwen2", SPIKE)
    assert loaded.key_biases is not None
    positions = torch.arange(100)
    cos, sin = loaded.model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), positions[None])
    for layer, bias in loaded.key_biases.layers(128).items():
        own = loaded.model.model.layers[layer].self_attn.k_proj.bias.view(1, 1, 1, -1).expand(1, 1, 100, -1)
        turned, _ = apply_rotary_pos_emb(own, own, cos, sin)
        torch.testing.assert_close(bias.at(positions)[:, 0], turned[0, 0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "spike", "changes"),
    [("qwen2", 0.0, {}), ("llama", SPIKE, {}), ("qwen3", SPIKE, {"attention_bias": True, "head_dim": 32})],
    ids=["small", "no bias", "normalised keys"],
)
def test_other_keys_are_cached_as_they_are(
    model_type: str, spike: float, changes: dict[str, Any], tmp_path: Path
) -> None:
    assert model(tmp_path, model_type, spike, **changes).key_biases is None


def test_flag() -> None:
    with pytest.raises(UsageError, match="key_bias"):
        EngineConfig(key_bias="on")


def test_weights_and_positions_say_the_same() -> None:
    problem = build(Case(contexts=(9,)), reference.store, reference.store_raw)
    bias = key_bias(problem)
    query = torch.randn(3, 4, 64, dtype=torch.float64)
    positions = torch.tensor([0, 5, 1000])
    constant = bias.at(positions).repeat_interleave(2, 1)
    torch.testing.assert_close(
        (bias.weights(query) * bias.table[positions][:, None]).sum(-1), (query * constant).sum(-1)
    )


FEATURES = {"plain": {}, "all": {"window": 30, "softcap": 5.0, "sinks": True, "sink": 2, "recent": 7}}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("key", ["none", "lm4"])
def test_twins_add_what_was_left_out(key: str, feature: str) -> None:
    """Pages of keys less their constant part, and it, are what pages of the keys are."""
    case = Case(key, "none", contexts=(40, 3), **FEATURES[feature])
    bias = key_bias(build(case, reference.store, reference.store_raw))

    def store_without(keys: Tensor, values: Tensor, *rest: Any) -> None:
        positions = torch.cat([torch.arange(n) for n in case.contexts])
        reference.store(keys - bias.at(positions), values, *rest)

    def store_read_back(keys: Tensor, values: Tensor, *rest: Any) -> None:
        """As `none` in float64: what comes back of keys that went without."""
        positions = torch.cat([torch.arange(n) for n in case.contexts])
        constant = bias.at(positions)
        pages, slots, layout = rest
        reference.store(get_codec(key).roundtrip(keys - constant) + constant, values, pages, slots, layout)

    plain = Case("none", "none", contexts=case.contexts, **FEATURES[feature])
    for chunks in ((), (5, 9)):
        left, whole = (
            build(c.with_chunks(chunks), write, reference.store_raw)
            for c, write in ((case, store_without), (plain, store_read_back))
        )
        if chunks:
            result, expected = (
                prefill(left, reference.paged_prefill, bias=bias),
                prefill(whole, reference.paged_prefill),
            )
        else:
            result, expected = (
                decode(left, reference.paged_decode, bias=bias),
                decode(whole, reference.paged_decode),
            )
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
