"""The cross-check: the same figures by decoding token by token from the paged cache."""

import torch
from torch import Tensor

from kvq_core.cache.blocks import pages_for
from kvq_core.cache.plan import page_layout, raw_bytes_per_request
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
    page = EngineConfig().page_size
    pages = pages_for(tokens, page) + 2  # one that is never handed out, and one to spare
    layouts = (
        page_layout(layer, own, page, model.dtype)
        for layer, own in zip(model.geometry.layers, policy.by_layer(model.geometry.num_layers), strict=True)
    )
    raw = raw_bytes_per_request(model.geometry, policy, model.dtype)
    return pages * sum(layout.page_bytes for layout in layouts) + raw
