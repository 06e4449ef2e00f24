"""The cross-check: the same figures by decoding token by token from the paged cache."""

import torch
from torch import Tensor

from kvq_core.codecs import get_codec
from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.engine.engine import Engine
from kvq_core.models import LoadedModel
from kvq_core.policies import Policy
from kvq_core.quality.drift import Drift


def decoded_drift(
    model: LoadedModel, ids: Tensor, policy: Policy, reference: Tensor, key_bias: str = "auto"
) -> Drift:
    """ids [L], reference logits [L - 1, V]: feed the text through the engine, one token a step.

    The first token is the prompt; its successors are forced, by logits that leave the sampler no choice.
    """
    tokens = ids.tolist()
    config = EngineConfig(
        policy=policy,
        tp=model.group.size,
        key_bias=key_bias,
        max_num_seqs=1,
        max_model_len=len(tokens),
        prefill_chunk=len(tokens),
        kv_memory=enough_memory(model, policy, len(tokens)),
    )
    engine, drift, step = Engine(model, config), Drift(), 0

    def force(_: list[int], row: Tensor) -> None:
        nonlocal step
        drift.add(reference[step : step + 1], row, ids[step + 1 : step + 2])
        row.fill_(float("-inf"))
        row[0, tokens[step + 1]] = 0.0
        step += 1

    engine.runner.on_logits = force
    try:
        engine.add_request(tokens[:1], SamplingParams(max_new_tokens=len(tokens) - 1, ignore_eos=True))
        with torch.inference_mode():
            while engine.has_work:
                engine.step()
    finally:
        engine.close()
    assert step == len(tokens) - 1
    return drift


def enough_memory(model: LoadedModel, policy: Policy, tokens: int) -> int:
    """Bytes of a cache that holds one request of so many tokens, and its unquantized ones."""
    own = [(get_codec(p.key), get_codec(p.value)) for p in policy.by_layer(model.geometry.num_layers)]
    page = EngineConfig().page_size
    slots = (tokens // page + 3) * page
    return sum(
        layer.num_kv_heads
        * (
            slots * key.bytes_per_vector(layer.key_dim, model.dtype)
            + slots * value.bytes_per_vector(layer.value_dim, model.dtype)
            + (policy.sink + policy.recent) * (layer.key_dim + layer.value_dim) * model.dtype.itemsize
        )
        for layer, (key, value) in zip(model.geometry.layers, own, strict=True)
    )
