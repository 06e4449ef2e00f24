"""Every policy against transformers' model whose keys and values pass through the torch codec, in float64.

The reference is one plain forward over prompt and answer. Its attention applies the rule: a query at t reads
keys and values at j < sink, at j > t - recent and in its own prompt chunk unquantized, others via the codec.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from kvq_core.codecs import get_codec
from kvq_core.config import EngineConfig
from kvq_core.engine.engine import Engine
from kvq_core.models import LoadedModel, load_model
from kvq_core.policies import Policy
from tests.tiny import TINY, replies

VOCAB = TINY["vocab_size"]
WINDOW, NEW_TOKENS, PAGE, CHUNK = 20, 20, 16, 16
LENGTHS = (5, 45, PAGE, 33)
TOLERANCE = 1e-8
REFERENCE = "policy_parity_reference"

BASE: dict[str, Any] = {
    **TINY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "sliding_window": WINDOW,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"sliding_window": None},
    "mistral": {},
    "gemma2": {"attn_logit_softcapping": 5.0, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {**EXPERTS, "layer_types": ["sliding_attention", "full_attention"]},
}


@dataclass(frozen=True)
class Rule:
    """What the reference needs to know of the request; travels through the model as a keyword."""

    policy: Policy
    prompt_len: int
    chunk: int
    windows: tuple[int, ...]


def reference_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    rule: Rule,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D]; scores with fresh and with read-back keys, mixed."""
    policy = rule.policy.by_layer(len(rule.windows))[module.layer_idx]  # type: ignore[index]
    groups = query.shape[1] // key.shape[1]
    fresh = [x.repeat_interleave(groups, dim=1) for x in (key, value)]
    read = [
        get_codec(name).roundtrip(x).repeat_interleave(groups, dim=1)
        for name, x in ((policy.key, key), (policy.value, value))
    ]
    t, j = torch.arange(query.shape[2])[:, None], torch.arange(query.shape[2])[None, :]
    same_chunk = (t < rule.prompt_len) & (j >= t // rule.chunk * rule.chunk)
    is_fresh = (j < policy.sink) | (j > t - policy.recent) | same_chunk
    scores = torch.where(is_fresh, query @ fresh[0].mT, query @ read[0].mT) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    window = rule.windows[module.layer_idx]  # type: ignore[index]
    visible = (j <= t) & (j > t - window) if window else j <= t
    scores = scores.masked_fill(~visible, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    output = (weights * is_fresh) @ fresh[1] + (weights * ~is_fresh) @ read[1]
    return output.transpose(1, 2), None


@dataclass(frozen=True)
class Case:
    model: LoadedModel
    reference: Any
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build("llama", tmp_path_factory.mktemp("llama"))


def build(model_type: str, folder: Path, **changes: Any) -> Case:
    AttentionInterface.register(REFERENCE, reference_attention)
    config = AutoConfig.for_model(model_type, **{**BASE, **ARCHITECTURES.get(model_type, {}), **changes})
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if "norm" in name and parameter.ndim == 1:
                parameter.add_(1.0)
    made.save_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=REFERENCE, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    model = load_model(str(folder), dtype="float64", device="cpu", need_tokenizer=False)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    return Case(model, reference, prompts)


@dataclass(frozen=True)
class Run:
    tokens: list[list[int]]
    logits: list[Tensor]
    """[NEW_TOKENS, V] of each prompt"""
    preemptions: int


def run(case: Case, config: EngineConfig, only: int | None = None, late: int = 0) -> Run:
    """Answer all prompts (or one) with the engine; a prompt comes every `late` steps."""
    engine = Engine(case.model, config)
    prompts = case.prompts if only is None else [case.prompts[only]]
    tokens, logits = replies(engine, prompts, NEW_TOKENS, late)
    return Run(tokens, logits, engine.kv_stats()["preemptions"])


def error(case: Case, config: EngineConfig, result: Run) -> float:
    """The largest difference from the reference's logits, relative to their largest."""
    worst = 0.0
    windows = tuple(layer.window for layer in case.model.geometry.layers)
    for prompt, answer, logits in zip(case.prompts, result.tokens, result.logits, strict=True):
        rule = Rule(config.resolved_policy(), len(prompt), config.prefill_chunk, windows)
        with torch.inference_mode():
            output = case.reference(
                input_ids=torch.tensor([prompt + answer[:-1]]), use_cache=False, rule=rule
            )
        expected = output.logits[0, len(prompt) - 1 :]
        worst = max(worst, ((logits - expected).abs().max() / expected.abs().max()).item())
    return worst


POLICIES = {
    "4": {"policy": 4},
    "8": {"policy": 8},
    "16": {"policy": 16},
    "42": {"policy": 42},
    "42-rms": {"policy": "42-rms"},
    "42-lm4": {"policy": "42-lm4"},
    "qjl": {"policy": "qjl"},
    "lm4-lm2": {"policy": "lm4:lm2"},
    "int8-lm4": {"policy": "int8:lm4"},
    "none-lm3": {"policy": "none:lm3"},
    "42-sink-recent": {"policy": 42, "sink": 2, "recent": 11},
    "4-sink": {"policy": 4, "sink": 18},
    "4-recent": {"policy": 4, "recent": 24},
    "42-layers": {"policy": 42, "layers": ("-1=int8:none",), "sink": 1, "recent": 6},
    "42-recent-1": {"policy": 42, "recent": 1},
}
WHOLE = EngineConfig(page_size=PAGE, max_num_seqs=4, prefill_chunk=64, kv_memory=8 << 20)
CHUNKED = WHOLE.replace(prefill_chunk=CHUNK, max_num_batched_tokens=CHUNK + 6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("config", [WHOLE, CHUNKED], ids=["whole", "chunked"])
def test_logits_equal_those_of_the_quantized_reference(case: Case, policy: str, config: EngineConfig) -> None:
    config = config.replace(**POLICIES[policy])
    assert error(case, config, run(case, config, late=2)) < TOLERANCE


def few_pages(case: Case, config: EngineConfig, pages: int) -> int:
    """Bytes for at most so many pages in every group, the trash page not counted, and for the raw windows."""
    plan = Engine(case.model, config).plan
    raw = plan.max_num_seqs * plan.raw_bytes_per_request
    return raw + sum(min(pages + 1, group.num_pages) * group.page_bytes for group in plan.groups)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_does_not_depend_on_load_or_on_being_swapped_out(case: Case, policy: str) -> None:
    config = CHUNKED.replace(**POLICIES[policy])
    alone = [run(case, config, only=i) for i in range(len(case.prompts))]
    together = run(case, config, late=3)
    full = any(not layer.window for layer in case.model.geometry.layers)
    tight = config.replace(kv_memory=few_pages(case, config, 5 if full else 4))
    swapped = run(case, tight)
    assert swapped.preemptions, "nothing was preempted: this shows nothing"
    assert together.tokens == swapped.tokens == [r.tokens[0] for r in alone]
    assert error(case, config, swapped) < TOLERANCE


def generate(case: Case, config: EngineConfig, prompt: list[int]) -> list[int]:
    """Greedy decoding by the reference, a forward over everything for each token."""
    windows = tuple(layer.window for layer in case.model.geometry.layers)
    rule = Rule(config.resolved_policy(), len(prompt), config.prefill_chunk, windows)
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            logits = case.reference(input_ids=torch.tensor([ids]), use_cache=False, rule=rule).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("policy", ["42+s2r11", "42-lm4+s0r24", "k8v4+s18r0", "8+s1r1"])
def test_tokens_equal_those_that_the_reference_generates(case: Case, policy: str) -> None:
    """Sinks and recent tokens, chunked prompts, requests that are swapped out in the middle."""
    config = CHUNKED.replace(policy=policy)
    full = any(not layer.window for layer in case.model.geometry.layers)
    swapped = run(case, config.replace(kv_memory=few_pages(case, config, 5 if full else 4)))
    assert swapped.preemptions, "nothing was preempted: this shows nothing"
    assert max(map(len, case.prompts)) > CHUNK, "no prompt was chunked"
    assert swapped.tokens == [generate(case, config, prompt) for prompt in case.prompts]


@pytest.mark.parametrize("policy", ["42", "42-sink-recent", "qjl", "none-lm3"])
@pytest.mark.parametrize(("model_type", "head_dim"), [("phi3", 96), ("phi", 80)])
def test_head_dims_that_are_no_power_of_two(
    model_type: str, head_dim: int, policy: str, tmp_path: Path
) -> None:
    """As Phi-3-mini and phi-2 have them."""
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim}
    case = build(model_type, tmp_path, **sizes, num_key_value_heads=1, sliding_window=None)
    assert {layer.key_dim for layer in case.model.geometry.layers} == {head_dim}
    config = CHUNKED.replace(**POLICIES[policy])
    assert error(case, config, run(case, config)) < TOLERANCE


FAULTS: dict[str, Callable[[Rule], Rule]] = {
    "another policy": lambda r: Rule(Policy("x", "lm4", "lm2", 2, 11), r.prompt_len, r.chunk, r.windows),
    "recent + 1": lambda r: Rule(Policy("x", "turbo", "lm2", 2, 12), r.prompt_len, r.chunk, r.windows),
    "recent - 1": lambda r: Rule(Policy("x", "turbo", "lm2", 2, 10), r.prompt_len, r.chunk, r.windows),
    "sink + 1": lambda r: Rule(Policy("x", "turbo", "lm2", 3, 11), r.prompt_len, r.chunk, r.windows),
    "sink - 1": lambda r: Rule(Policy("x", "turbo", "lm2", 1, 11), r.prompt_len, r.chunk, r.windows),
    "prompt read back": lambda r: Rule(r.policy, 0, r.chunk, r.windows),
    "chunk + 1": lambda r: Rule(r.policy, r.prompt_len, r.chunk + 1, r.windows),
    "answer kept fresh": lambda r: Rule(r.policy, r.prompt_len + 1, r.chunk, r.windows),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_rule_is_seen(llama: Case, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    config = CHUNKED.replace(policy=42, sink=2, recent=11)
    result = run(llama, config)
    assert error(llama, config, result) < TOLERANCE
    forward = llama.reference.forward

    def changed(*args: Any, rule: Rule, **kwargs: Any) -> Any:
        return forward(*args, rule=FAULTS[fault](rule), **kwargs)

    monkeypatch.setattr(llama.reference, "forward", changed)
    assert error(llama, config, result) > 1e4 * TOLERANCE
