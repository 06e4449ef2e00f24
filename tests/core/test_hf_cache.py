"""`KVQCache` under transformers' own `generate`: against the default cache, and against the engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvq_core import EngineConfig, KVQCache, KvqError, pipeline
from kvq_core.hf_cache import CodecLayer
from kvq_core.models import load_model
from kvq_core.policies import get_policy
from tests.tiny import TINY

VOCAB = TINY["vocab_size"]
WINDOW, NEW = 20, 24
BASE: dict[str, Any] = {
    **TINY,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
}
PROMPT_LENGTHS = (1, 9, 45)


def tiny(model_type: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**BASE, **ARCHITECTURES.get(model_type, {})})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def prompt(length: int, seed: int = 0) -> Tensor:
    """[1, length] token ids; no padding token among them."""
    return torch.randint(1, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed + length))


def padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    """A batch, padded on the left."""
    longest = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def generate(model: Any, ids: Tensor, cache: KVQCache | None = None, **options: Any) -> list[list[int]]:
    """New tokens of every row."""
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, past_key_values=cache, **options)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_policy_none_equals_the_default_cache(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    batch = padded([prompt(n) for n in PROMPT_LENGTHS])
    ways: list[dict[str, Any]] = [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 4, "attention_mask": torch.ones(1, 45), "input_ids": prompt(45) % 3 + 1},
        {"prefill_chunk_size": 16},
    ]
    for way in ways:
        options = {**batch, **way}
        ids = options.pop("input_ids")
        expected = generate(model, ids, **options)
        assert generate(model, ids, KVQCache(model.config, policy=0), **options) == expected, way


@pytest.mark.parametrize("policy", ["8", "42", "4+s4r10", "42+s2r0", "none:int8+s0r30"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantized_policies_equal_the_engine(name: str, policy: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path)
    config = EngineConfig(policy=policy, page_size=16, max_num_seqs=4, kv_memory=4 << 20)
    prompts = [prompt(n) for n in PROMPT_LENGTHS]
    loaded = load_model(str(tmp_path), dtype="float64", device="cpu", need_tokenizer=False)
    with pipeline(loaded, config) as pipe:
        expected = [r.token_ids for r in pipe([p[0].tolist() for p in prompts], max_new_tokens=NEW)]
    for ids, answer in zip(prompts, expected, strict=True):
        assert generate(model, ids, KVQCache(model.config, policy)) == [answer]
    batch = padded(prompts)
    cache = KVQCache(model.config, policy, attention_mask=batch["attention_mask"])
    assert generate(model, batch["input_ids"], cache, attention_mask=batch["attention_mask"]) == expected


def test_sinks_of_padded_rows_need_the_mask_and_get_it() -> None:
    model, batch = tiny("llama"), padded([prompt(4), prompt(45)])
    alone = generate(model, prompt(4), KVQCache(model.config, "lm2+s4r0"))
    rows = {
        mask is not None: generate(
            model,
            batch["input_ids"],
            KVQCache(model.config, "lm2+s4r0", attention_mask=mask),
            attention_mask=batch["attention_mask"],
        )
        for mask in (None, batch["attention_mask"])
    }
    assert rows[True][0] == alone[0] != rows[False][0]


@pytest.mark.demo
def test_the_demo_model_gives_the_engines_tokens() -> None:
    loaded = load_model("demo", dtype="float64", device="cpu")
    text = "Once upon a time, in a village by the sea,"
    with pipeline(loaded, EngineConfig(policy=42, kv_memory=32 << 20, max_num_seqs=1)) as pipe:
        expected = pipe(text, max_new_tokens=16).token_ids
    loaded.model.set_attn_implementation("sdpa")
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    cache = KVQCache(loaded.model.config, policy=42)
    assert generate(loaded.model, ids, cache, max_new_tokens=16, use_cache=True) == [expected]


def test_a_token_is_written_once_and_the_cache_is_small() -> None:
    model = tiny("llama", torch.bfloat16)
    cache = KVQCache(model.config, policy=42)
    model(prompt(45), past_key_values=cache)
    before = [part.clone() for layer in cache.layers for part in layer._records]
    for seed in range(3):
        model(prompt(1, seed), past_key_values=cache)
    after = [part for layer in cache.layers for part in layer._records]
    assert all(torch.equal(old, new[..., :45, :]) for old, new in zip(before, after, strict=True))
    tokens, heads, layers = 48, 2, 2
    assert cache.nbytes == tokens * heads * layers * (32 // 2 + 4 + 32 // 4 + 2)
    assert repr(cache) == f"KVQCache(policy='turbo', tokens=48, bytes={cache.nbytes:,})"


@pytest.mark.parametrize("policy", ["42", "8+s2r12"])
def test_what_was_cropped_leaves_no_trace(policy: str) -> None:
    model = tiny("gemma3_text")
    caches = [KVQCache(model.config, policy) for _ in range(2)]
    for cache in caches:
        cache.activate_past_recording()
        model(prompt(45), past_key_values=cache)
        cache.crop(0)
    model(prompt(7), past_key_values=caches[0])
    caches[0].crop(-7)
    logits = [model(prompt(3), past_key_values=cache).logits for cache in caches]
    assert torch.equal(*logits)
    assert caches[0].get_seq_length() == 48


def test_rows_can_be_repeated_chosen_and_forgotten() -> None:
    model, batch = tiny("mistral"), padded([prompt(9), prompt(45)])
    cache = KVQCache(model.config, "4+s2r8", attention_mask=batch["attention_mask"])
    model(**batch, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 3]))
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    step = model(torch.tensor([[5], [5]]), attention_mask=mask, past_key_values=cache).logits
    whole = KVQCache(model.config, "4+s2r8", attention_mask=batch["attention_mask"])
    model(**batch, past_key_values=whole)
    assert torch.equal(
        step, model(torch.tensor([[5], [5]]), attention_mask=mask, past_key_values=whole).logits
    )
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0


def test_mistakes_are_told() -> None:
    model = tiny("mistral")
    with pytest.raises(KvqError, match=r"no model's config") as error:
        KVQCache(model, policy=42)
    assert "model.config" in error.value.hint
    with pytest.raises(KvqError, match="unknown policy"):
        KVQCache(model.config, policy="turbo9")
    narrow = AutoConfig.for_model("llama", **{**BASE, "head_dim": 24})
    with pytest.raises(KvqError, match="head dim"):
        generate(AutoModelForCausalLM.from_config(narrow), prompt(3), KVQCache(narrow, 42))
    cache = KVQCache(model.config, policy=42)
    model(prompt(45), past_key_values=cache)
    with pytest.raises(KvqError, match="earlier ones are gone"):
        cache.crop(-1)
    batch = padded([prompt(9), prompt(45)])
    with pytest.raises(KvqError, match="has 2 rows, the batch 3"):
        cache = KVQCache(model.config, "4+s2r0", attention_mask=batch["attention_mask"])
        model(prompt(9).repeat(3, 1), past_key_values=cache)
    hybrid = AutoConfig.for_model("falcon_h1")
    with pytest.raises(KvqError, match="caches more than keys and values"):
        KVQCache(hybrid, policy=42)


@pytest.mark.parametrize("window", [1, 2])
def test_a_decode_step_reads_its_own_token_through_the_codec(window: int) -> None:
    layer = CodecLayer(get_policy("4"), window)
    x = torch.randn(1, 1, 6, 32, generator=torch.Generator().manual_seed(0))
    layer.update(x[:, :, :5], x[:, :, :5])
    keys, _ = layer.update(x[:, :, 5:], x[:, :, 5:])
    assert keys.shape[-2] == window and not torch.equal(keys[:, :, -1], x[:, :, 5])
