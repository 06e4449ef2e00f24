"""Policy 0 against transformers' own `generate` with eager attention, architecture by architecture.

Tiny random models with large weights (so that attention is far from uniform), prompts shorter and longer than
the window, alone and in ragged batches, whole and in chunks, with and without preemption.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvq_core import attention
from kvq_core.config import EngineConfig
from kvq_core.demo import demo_folder
from kvq_core.engine.engine import Engine
from kvq_core.models import LoadedModel, load_model
from tests.tiny import TINY, replies

VOCAB = TINY["vocab_size"]
WINDOW, NEW_TOKENS, PAGE = 12, 24, 16
LENGTHS = (3, 30, WINDOW, 17)
TOLERANCE = 1e-4

BASE: dict[str, Any] = {
    **TINY,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EVERYWHERE = {"sliding_window": WINDOW}
SECOND_HALF = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}


@dataclass(frozen=True)
class Tiny:
    """A tiny config of one architecture, and the windows that its layers must have."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    windows: tuple[int, int] = (0, 0)

    @property
    def id(self) -> str:
        return self.model_type + ("-window" if any(self.windows) else "")

    @property
    def config(self) -> Any:
        return AutoConfig.for_model(self.model_type, **{**BASE, **self.settings})


TINIES = (
    Tiny("afmoe", {**MOE, **ALTERNATING, "num_dense_layers": 1}, (WINDOW, 0)),
    Tiny("apertus"),
    Tiny("arcee"),
    Tiny("bitnet"),
    Tiny("cohere"),
    Tiny("cohere2", ALTERNATING, (WINDOW, 0)),
    Tiny("cwm", ALTERNATING, (WINDOW, 0)),
    Tiny("dots1", {**MOE, **ALTERNATING, "n_shared_experts": 1, "first_k_dense_replace": 1}, (WINDOW, 0)),
    Tiny("ernie4_5"),
    Tiny("ernie4_5_moe", {**MOE, "moe_num_experts": 4, "moe_k": 2}),
    Tiny("exaone4", ALTERNATING, (WINDOW, 0)),
    Tiny("gemma"),
    Tiny("gemma2", {**ALTERNATING, "attn_logit_softcapping": 5.0}, (WINDOW, 0)),
    Tiny("gemma3_text", ALTERNATING, (WINDOW, 0)),
    Tiny(
        "gemma4_text",
        {**ALTERNATING, "global_head_dim": 32, "vocab_size_per_layer_input": VOCAB},
        (WINDOW, 0),
    ),
    Tiny("glm"),
    Tiny("glm4"),
    Tiny("glm4_moe", {**MOE, "first_k_dense_replace": 1}),
    Tiny("gpt2", {"num_key_value_heads": 4}),
    Tiny("gpt_bigcode", {"num_key_value_heads": 1}),
    Tiny("gpt_neox", {"num_key_value_heads": 4}),
    Tiny("gpt_oss", {**MOE, **ALTERNATING}, (WINDOW, 0)),
    Tiny("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    Tiny("granitemoe", MOE),
    Tiny("helium"),
    Tiny("hunyuan_v1_dense"),
    Tiny("hunyuan_v1_moe", MOE),
    Tiny("jetmoe", {**MOE, "num_key_value_heads": 2, "kv_channels": 16}),
    Tiny("llama"),
    Tiny("mimo_v2_flash", {**MOE, **ALTERNATING, "v_head_dim": 8}, (WINDOW, 0)),
    Tiny("minimax_m2", MOE),
    Tiny("mistral", EVERYWHERE, (WINDOW, WINDOW)),
    Tiny("mixtral", {**MOE, **EVERYWHERE}, (WINDOW, WINDOW)),
    Tiny(
        "modernbert-decoder",
        {**ALTERNATING, "num_key_value_heads": 4, "local_attention": 2 * WINDOW},
        (WINDOW, 0),
    ),
    Tiny("nanochat"),
    Tiny("olmo"),
    Tiny("olmo2"),
    Tiny("olmo3", ALTERNATING, (WINDOW, 0)),
    Tiny("olmoe", MOE),
    Tiny("opt", {"num_key_value_heads": 4, "word_embed_proj_dim": 64, "ffn_dim": 96}),
    Tiny("persimmon", {"num_key_value_heads": 4}),
    Tiny("phi"),
    Tiny("phi3", EVERYWHERE, (WINDOW, WINDOW)),
    Tiny("phimoe", {**MOE, **EVERYWHERE}, (WINDOW, WINDOW)),
    Tiny("qwen2"),
    Tiny("qwen2", SECOND_HALF, (0, WINDOW)),
    Tiny("qwen3", SECOND_HALF, (0, WINDOW)),
    Tiny("qwen3_moe", MOE),
    Tiny("qwen3_moe", {**MOE, **EVERYWHERE, "use_sliding_window": True}, (WINDOW, WINDOW)),
    Tiny("seed_oss"),
    Tiny("smollm3", {**ALTERNATING, "use_sliding_window": True, "no_rope_layers": [1, 0]}, (WINDOW, 0)),
    Tiny("starcoder2", EVERYWHERE, (WINDOW, WINDOW)),
    Tiny("vaultgemma", ALTERNATING, (WINDOW, 0)),
)


@dataclass(frozen=True)
class Case:
    """An architecture's model in kvq, and what transformers generates with it."""

    tiny: Tiny
    model: LoadedModel
    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[Tensor]
    """[NEW_TOKENS, V] of each prompt"""


def randomize(model: torch.nn.Module) -> None:
    """Normal weights of standard deviation 0.2, norms around 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if "norm" in name.lower() and parameter.ndim == 1:
                parameter.add_(1.0)


def build(tiny: Tiny, folder: Path) -> Case:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny.config, dtype=torch.float32)
    randomize(made)
    made.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    tokens, logits = generate(folder, prompts)
    model = load_model(str(folder), dtype="float32", device="cpu", need_tokenizer=False)
    return Case(tiny, model, prompts, tokens, logits)


def generate(folder: Path, prompts: list[list[int]]) -> tuple[list[list[int]], list[Tensor]]:
    """What transformers generates with eager attention: tokens and logits [NEW_TOKENS, V] of each prompt."""
    reference = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    reference.generation_config.eos_token_id = None
    tokens, logits = [], []
    for prompt in prompts:
        output = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        tokens.append(output.sequences[0, len(prompt) :].tolist())
        logits.append(torch.stack([step[0] for step in output.logits]))
    return tokens, logits


@pytest.fixture(scope="module", params=TINIES, ids=lambda tiny: tiny.id)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build(request.param, tmp_path_factory.mktemp(request.param.id))


def few_pages(model: LoadedModel, config: EngineConfig, pages: int) -> int:
    """Bytes for at most so many pages in every group, the trash page not counted."""
    engine = Engine(model, config)
    return sum(min(pages + 1, group.num_pages) * group.page_bytes for group in engine.plan.groups)


def run(
    model: LoadedModel, prompts: list[list[int]], config: EngineConfig, late: int = 0
) -> tuple[list[list[int]], list[Tensor], int]:
    """Tokens and logits [NEW_TOKENS, V] of each prompt, preemptions; a prompt comes every `late` steps."""
    engine = Engine(model, config)
    tokens, logits = replies(engine, prompts, NEW_TOKENS, late)
    stats = engine.kv_stats()
    assert stats["tokens"] == 0
    engine.cache.blocks.check()
    return tokens, logits, stats["preemptions"]


ROOMY = EngineConfig(page_size=PAGE, max_num_seqs=4, prefill_chunk=64, kv_memory=8 << 20)
CHUNKED = ROOMY.replace(prefill_chunk=PAGE, max_num_batched_tokens=PAGE + 6)


def alone(case: Case) -> tuple[list[list[int]], list[Tensor]]:
    results = [run(case.model, [prompt], ROOMY) for prompt in case.prompts]
    return [r[0][0] for r in results], [r[1][0] for r in results]


def batched(case: Case) -> tuple[list[list[int]], list[Tensor]]:
    return run(case.model, case.prompts, ROOMY)[:2]


def chunked(case: Case) -> tuple[list[list[int]], list[Tensor]]:
    return run(case.model, case.prompts, CHUNKED, late=2)[:2]


def preempted(case: Case, swap: bool) -> tuple[list[list[int]], list[Tensor]]:
    memory = few_pages(case.model, CHUNKED, pages=3 if all(case.tiny.windows) else 4)
    config = CHUNKED.replace(kv_memory=memory, swap_memory=1 << 20 if swap else 0)
    tokens, logits, preemptions = run(case.model, case.prompts, config)
    assert preemptions, "nothing was preempted: this scenario shows nothing"
    return tokens, logits


SCENARIOS: dict[str, Callable[[Case], tuple[list[list[int]], list[Tensor]]]] = {
    "alone": alone,
    "batched": batched,
    "chunked": chunked,
    "swapped": lambda case: preempted(case, swap=True),
    "recomputed": lambda case: preempted(case, swap=False),
}


def error(case: Case, logits: list[Tensor]) -> float:
    """The largest difference from transformers' logits, relative to their largest."""
    return max(
        ((mine - theirs).abs().max() / theirs.abs().max()).item()
        for mine, theirs in zip(logits, case.logits, strict=True)
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_greedy_tokens_and_logits_equal_those_of_generate(case: Case, scenario: str) -> None:
    assert tuple(layer.window for layer in case.model.geometry.layers) == case.tiny.windows
    tokens, logits = SCENARIOS[scenario](case)
    assert tokens == case.tokens
    assert error(case, logits) < TOLERANCE


@pytest.mark.demo
@pytest.mark.parametrize("prefill_chunk", [512, PAGE], ids=["whole", "chunked"])
def test_the_demo_model_equals_generate(prefill_chunk: int) -> None:
    model = load_model("demo", device="cpu", dtype="float32")
    texts = [
        "The capital of France is",
        "def fibonacci(n):",
        "Once upon a time, in a village by the sea, " * 3,
    ]
    prompts = [model.tokenizer(text)["input_ids"] for text in texts]
    expected, logits = generate(demo_folder(), prompts)
    config = ROOMY.replace(prefill_chunk=prefill_chunk, kv_memory=64 << 20)
    tokens, mine, _ = run(model, prompts, config)
    assert tokens == expected
    for rows, theirs in zip(mine, logits, strict=True):
        assert (rows - theirs).abs().max() < TOLERANCE * theirs.abs().max()


# Planted faults: the comparison must see them.


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @cache
    def case(model_type: str) -> Case:
        tiny = next(t for t in TINIES if t.model_type == model_type)
        return build(tiny, tmp_path_factory.mktemp(model_type))

    return case


def scaled(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "scale": kwargs["scale"] * 1.01}


def wider(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "window": kwargs["window"] and kwargs["window"] + 1}


def narrower(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "window": kwargs["window"] and kwargs["window"] - 1}


def without_sinks(kwargs: dict[str, Any]) -> dict[str, Any]:
    assert kwargs["sinks"] is not None
    return {**kwargs, "sinks": None}


def uncapped(kwargs: dict[str, Any]) -> dict[str, Any]:
    assert kwargs["softcap"]
    return {**kwargs, "softcap": 0.0}


FAULTS: list[tuple[str, str, Callable[[dict[str, Any]], dict[str, Any]], bool]] = [
    ("scale", "llama", scaled, False),
    ("window+1", "mistral", wider, False),
    ("window-1", "mistral", narrower, False),
    ("window+1", "gemma2", wider, False),
    ("window-1", "gpt_oss", narrower, False),
    ("no-sinks", "gpt_oss", without_sinks, False),
    ("no-softcap", "gemma2", uncapped, False),
    ("scale-in-decode", "llama", scaled, True),
    ("window+1-in-decode", "qwen3", wider, True),
    ("no-sinks-in-decode", "gpt_oss", without_sinks, True),
]


@pytest.mark.parametrize(
    ("fault", "model_type", "change", "decode_only"), FAULTS, ids=[f"{f[0]}-{f[1]}" for f in FAULTS]
)
def test_a_planted_fault_is_seen(
    monkeypatch: pytest.MonkeyPatch,
    case_of: Callable[[str], Case],
    fault: str,
    model_type: str,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    decode_only: bool,
) -> None:
    case = case_of(model_type)
    for name in ("paged_decode",) if decode_only else ("paged_decode", "paged_prefill"):
        original = getattr(attention.dispatch, name)
        monkeypatch.setattr(
            attention.dispatch, name, lambda *args, _call=original, **kwargs: _call(*args, **change(kwargs))
        )
    _, logits = batched(case)
    assert error(case, logits) > 3 * TOLERANCE


@pytest.mark.parametrize("dropped", ["oldest", "newest"])
def test_one_dropped_token_of_the_history_is_seen(
    case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, dropped: str
) -> None:
    case, original = case_of("llama"), attention.dispatch.paged_decode

    def decode(
        query: Tensor, pages: Tensor, tables: Tensor, lens: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if dropped == "newest":
            return original(query, pages, tables, lens - 1, *args, **kwargs)
        return original(query, pages, tables, lens, *args, **{**kwargs, "window": int(lens.max()) - 1})

    monkeypatch.setattr(attention.dispatch, "paged_decode", decode)
    _, logits = alone(case)
    assert error(case, logits) > 3 * TOLERANCE


def test_a_chunk_that_misses_one_token_of_its_history_is_seen(
    case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, original = case_of("llama"), attention.dispatch.paged_prefill

    def prefill(*args: Any, **kwargs: Any) -> Tensor:
        history = args[6]
        args = (*args[:6], (history - 1).clamp(min=0), *args[7:])
        return original(*args, **kwargs)

    monkeypatch.setattr(attention.dispatch, "paged_prefill", prefill)
    assert error(case, batched(case)[1]) < TOLERANCE, "without chunks there is no history to miss"
    assert error(case, chunked(case)[1]) > 3 * TOLERANCE


def test_a_token_in_the_wrong_slot_is_seen(
    case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, original = case_of("llama"), attention.dispatch.store

    def store(key: Tensor, value: Tensor, pages: Tensor, slots: Tensor, layout: Any) -> None:
        original(key, value, pages, slots.roll(1) if slots.numel() > 1 else slots, layout)

    monkeypatch.setattr(attention.dispatch, "store", store)
    assert error(case, batched(case)[1]) > 3 * TOLERANCE
