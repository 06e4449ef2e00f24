"""Attention that reads every key and value back through its codec, as decoding from the cache does.

One plain forward then shows what a policy does to a model: prefill over fresh keys and values, as the
engine does it for speed, would hide the quantization.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvq_core.codecs import get_codec
from kvq_core.models import LoadedModel
from kvq_core.policies import Policy
from kvq_kernels.key_bias import KeyBias

NAME = "kvq_read_back"
BLOCK = 256
"""Queries that are worked on at a time, so that scores of long windows fit in memory."""


@dataclass(frozen=True)
class ReadBack:
    """What the attention does; travels through the model's forward as the keyword `read_back`."""

    policies: tuple[Policy, ...]
    """Of each layer."""
    windows: tuple[int, ...]
    """Sliding window of each layer, 0 for none."""
    prompt_len: int = 0
    """The first tokens see each other unquantized, as one prompt chunk does in the engine."""
    biases: Mapping[int, KeyBias] = field(default_factory=dict)
    """Constant parts of keys, by layer, which pass by the codec."""
    observe: Callable[[int, Tensor, Tensor], None] | None = None
    """Called with the layer, its keys and its values [Hkv, T, D]."""


@contextmanager
def attention_of(model: LoadedModel, name: str) -> Iterator[None]:
    """Let transformers' model use the attention registered under `name`, for a while."""
    before = model.model.config._attn_implementation
    model.model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.model.set_attn_implementation(before)


def logits(
    model: LoadedModel,
    ids: Tensor,
    policy: Policy,
    prompt_len: int = 0,
    key_bias: str = "auto",
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """ids [L] or [B, L] -> logits [(B,) L, V] of a plain forward whose keys and values pass the codecs.

    Rows of a batch may be padded on the right: no token looks ahead. `observe` sees this rank's heads alone.
    """
    with model.group.together(whole=True):
        model.group.tell("read_back", model.number, ids.cpu(), policy, prompt_len, key_bias)
        return forward(model, ids, policy, prompt_len, key_bias, observe)


def forward(
    model: LoadedModel,
    ids: Tensor,
    policy: Policy,
    prompt_len: int,
    key_bias: str,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """What `logits` does, on one rank of all."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, read_back_attention)
    windows = tuple(layer.window for layer in model.geometry.layers)
    batch = ids if ids.dim() == 2 else ids[None]
    biases = {}
    if model.key_biases is not None and key_bias == "auto" and policy.is_quantized:
        biases = model.key_biases.layers(batch.shape[1])
    with attention_of(model, NAME), torch.inference_mode():
        output = model.model(
            input_ids=batch.to(model.device),
            position_ids=torch.arange(batch.shape[1], device=model.device)[None],
            use_cache=False,
            read_back=ReadBack(policy.by_layer(len(windows)), windows, prompt_len, biases, observe),
        )
    return output.logits if ids.dim() == 2 else output.logits[0]


def read_back_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    read_back: ReadBack,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, T, Dk], key and value [B, Hkv, T, D] -> output [B, T, Hq, Dv].

    A query at t reads j < sink and j > t - recent as they are, all others through the codec.
    """
    index: int = module.layer_idx  # type: ignore[assignment]
    policy, window = read_back.policies[index], read_back.windows[index]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    (batch, heads, tokens, _), kv_heads = query.shape, key.shape[1]
    groups = heads // kv_heads
    q = query.unflatten(1, (kv_heads, groups))
    k, v = key, value
    if read_back.observe is not None:
        read_back.observe(index, k[0], v[0])
    v_read = get_codec(policy.value).roundtrip(v)
    if index in read_back.biases and policy.key != "none":
        constant = read_back.biases[index].at(torch.arange(tokens, device=k.device)).transpose(0, 1)
        k_read = (get_codec(policy.key).roundtrip((k - constant).to(k.dtype)) + constant).to(k.dtype)
    else:
        k_read = get_codec(policy.key).roundtrip(k)
    mixed = policy.is_quantized and bool(policy.sink or policy.recent or read_back.prompt_len)
    output = value.new_empty(batch, tokens, heads, value.shape[-1])
    positions = torch.arange(tokens, device=query.device)
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        t, j = positions[start:end, None], positions[None, :end]
        rows = q[..., start:end, :].flatten(2, 3)
        fresh = (j < policy.sink) | (j > t - policy.recent) | (t < read_back.prompt_len)

        def scores(keys: Tensor, rows: Tensor = rows, end: int = end) -> Tensor:
            return (rows @ keys[..., :end, :].mT).unflatten(2, (groups, -1))

        s = torch.where(fresh, scores(k), scores(k_read)) if mixed else scores(k_read)
        s = s.to(torch.promote_types(s.dtype, torch.float32)) * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        visible = (j <= t) & (j > t - window) if window else j <= t
        weights = _softmax(s.masked_fill(~visible, float("-inf")), s_aux).to(value.dtype)
        out = (weights * ~fresh if mixed else weights).flatten(2, 3) @ v_read[..., :end, :]
        if mixed:
            out += (weights * fresh).flatten(2, 3) @ v[..., :end, :]
        output[:, start:end] = out.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2)
    return output, None


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """[B, Hkv, G, n, T] -> weights; attention sinks [Hq] take part in the sum alone."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype).view(*scores.shape[1:3], 1, 1).expand(*scores.shape[:4], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
