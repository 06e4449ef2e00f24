"""Features of the engine that must leave tokens as they are, tried on a tiny model on any device.

Products round by what else is in a batch and by how a step is compiled, and a rounded number can fall to the
next code: where batches or kernels differ, tokens of a few prompts may, too; where something is wrong, those
of all will.
"""

import random
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.engine.engine import Engine
from kvq_core.engine.logprobs import TokenLogprob
from kvq_core.models import LoadedModel, load_model

MODEL = {
    "vocab_size": 997, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 64,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048, "eos_token_id": 996,
}  # fmt: skip
SPIKE = 100.0
"""Added to one channel of every kv head's keys, so that they have a bias to leave out."""
CHUNK, LENGTH = 64, 40
SHARED = 200
"""Tokens that all prompts begin with."""
PROMPTS = (5, 40, 70, 133, 12, 300, 200, 90, 64, 65)
"""Tokens after those."""
FEW = 1200
"""Tokens in a cache that makes requests wait for each other."""
POLICIES = ("0", "42", "42+s4r32")
MOST_ERROR = 0.5
"""Of attention through the codec: random keys are all alike, and few bits tell them apart badly."""
ENOUGH = 0.7
"""Share of prompts whose tokens are the same, where batches differ, or kernels and codes do."""


def biased_model(folder: Path, dtype: str, device: str) -> LoadedModel:
    """A Qwen2 with random weights and spikes in its keys."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **MODEL, initializer_range=0.2))
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.k_proj.bias.view(-1, MODEL["head_dim"])[:, -1] += SPIKE
    made.save_pretrained(folder)
    return load_model(str(folder), dtype=dtype, device=device, need_tokenizer=False)


def prompts() -> list[list[int]]:
    source = random.Random(1)
    shared = [source.randrange(1, 900) for _ in range(SHARED)]
    return [shared + [source.randrange(1, 900) for _ in range(n)] for n in PROMPTS]


def answers(engine: Engine, params: SamplingParams) -> tuple[list[list[int]], list[TokenLogprob]]:
    """Tokens by prompt, and the log-probabilities of all."""
    tokens: dict[int, list[int]] = {engine.add_request(ids, params): [] for ids in prompts()}
    logprobs: list[TokenLogprob] = []
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            logprobs += output.logprobs or []
    return list(tokens.values()), logprobs


def features(model: LoadedModel, policy: str) -> Iterator[dict[str, Any]]:
    """One row for each feature: how many prompts have the tokens of an engine without it."""
    greedy = SamplingParams(max_new_tokens=LENGTH, ignore_eos=True)
    plain = EngineConfig(policy=policy, page_size=16, max_num_seqs=8, prefill_chunk=CHUNK, kv_memory=64 << 20)
    engine = Engine(model, plain)
    plan, quantizes = engine.plan, engine.plan.policy.is_quantized
    few = plan.max_num_seqs * plan.raw_bytes_per_request + FEW * plan.bytes_per_token
    expected, _ = answers(engine, greedy)

    def row(
        feature: str, found: list[list[int]], like: list[list[int]], ok: bool, share: float, **more: Any
    ) -> dict[str, Any]:
        same = sum(a == b for a, b in zip(found, like, strict=True))
        return {
            "check": "features", "feature": feature, "policy": policy, "same": same, "of": len(like),
            **more, "ok": ok and same >= share * len(like),
        }  # fmt: skip

    found, logprobs = answers(engine, replace(greedy, logprobs=3))
    likeliest = all(x.logprob == x.top[0][1] <= 0 and len(x.top) == 3 for x in logprobs)
    yield row("logprobs", found, expected, likeliest and len(logprobs) == LENGTH * len(found), 1.0)

    sampling = replace(greedy, temperature=1.0, top_p=0.9, seed=3)
    sampled, again = (answers(engine, sampling)[0] for _ in range(2))
    yield row("seeded sampling", again, sampled, sampled != expected, 1.0)
    engine.close()

    engine = Engine(model, plain.replace(prefix_caching=True))
    answers(engine, greedy)
    found, rate = answers(engine, greedy)[0], engine.prefix_hit_rate
    yield row("prefix caching", found, expected, rate > 0.5, ENOUGH, hit_rate=rate)
    engine.close()

    engine = Engine(model, plain.replace(kv_memory=few))
    found, preemptions = answers(engine, greedy)[0], engine.kv_stats()["preemptions"]
    yield row("little memory", found, expected, preemptions > 0, ENOUGH, preemptions=preemptions)
    engine.close()

    engine = Engine(model, plain.replace(max_num_batched_tokens=plain.max_num_seqs + CHUNK))
    yield row("a chunk a step", answers(engine, greedy)[0], expected, True, ENOUGH)
    engine.close()

    engine = Engine(model, plain.replace(fidelity=1.0))
    found, error = answers(engine, greedy)[0], mean_error(engine)
    accurate = error < (MOST_ERROR if quantizes else 1e-2)
    yield row("fidelity", found, expected, accurate, ENOUGH if quantizes else 1.0, error=error)
    biased = engine.kv_stats()["biased_key_layers"]
    engine.close()

    engine = Engine(model, plain.replace(fidelity=1.0, key_bias="off"))
    found, left_in = answers(engine, greedy)[0], mean_error(engine)
    wanted = model.geometry.layers if quantizes else ()
    better = error < left_in if quantizes else True
    yield row(
        "key bias off", found, expected, biased == len(wanted) and better, 0.0 if quantizes else 1.0,
        error=left_in, biased_key_layers=biased,
    )  # fmt: skip
    engine.close()


def mean_error(engine: Engine) -> float:
    """Of attention's outputs over all layers and steps, as `fidelity` finds it."""
    return statistics.mean(engine.kv_stats()["fidelity"]["mean_errors"])
