"""The attention function that transformers' models call: `attn_implementation="kvq"`.

The model makes q, k and v and applies RoPE; this stores k and v in the paged cache and attends to it. The
step's batch and the cache travel through the model's forward as the keyword `kvq`. No mask function is
registered under the name, so transformers builds no mask: causality and windows are the kernels' work.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvq_core.batch import Batch
from kvq_core.cache.paged import PagedCache
from kvq_kernels import dispatch

NAME = "kvq"


@dataclass
class StepContext:
    """What a forward passes to every attention layer."""

    batch: Batch
    cache: PagedCache
    stored: dict[int, int] | None = None
    """layer -> tokens stored; filled where it is not None."""


def register() -> None:
    """Make `attn_implementation="kvq"` known to transformers; harmless when repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, kvq_attention)


def kvq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    kvq: StepContext,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, Dk], key and value [1, Hkv, T, D] -> output [1, T, Hq, Dv].

    The first `batch.num_decodes` tokens are decodes; the others are prompt chunks.
    """
    batch, layer = kvq.batch, kvq.cache.layers[module.layer_idx]  # type: ignore[index]
    if sliding_window is not None and layer.window and sliding_window != layer.window:
        raise AssertionError(
            f"layer {module.layer_idx} asks for a window of {sliding_window}, planned was {layer.window}"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    tables = batch.groups[layer.group]
    num_tokens, decodes = q.shape[0], batch.num_decodes
    if kvq.stored is not None:
        kvq.stored[module.layer_idx] = kvq.stored.get(module.layer_idx, 0) + num_tokens  # type: ignore[index,call-overload]
    options = {
        "scale": scaling if scaling is not None else q.shape[-1] ** -0.5,
        "window": layer.window,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "raw": layer.raw,
    }
    dispatch.store(k, v, layer.pages, tables.slots, layer.layout)
    outputs = []
    if decodes:
        if layer.raw is not None:
            dispatch.store_raw(
                k[:decodes], v[:decodes], batch.positions[:decodes], batch.decode_rings, layer.raw, None
            )
        outputs.append(
            dispatch.paged_decode(
                q[:decodes],
                layer.pages,
                tables.decode_tables,
                batch.context_lens,
                layer.layout,
                rings=batch.decode_rings,
                max_context=batch.max_context,
                **options,
            )
        )
    if num_tokens > decodes:
        outputs.append(
            dispatch.paged_prefill(
                q[decodes:],
                k[decodes:],
                v[decodes:],
                layer.pages,
                tables.prefill_tables,
                batch.cu_chunk_lens,
                batch.history_lens,
                layer.layout,
                max_chunk=batch.max_chunk,
                max_history=batch.max_history,
                rings=batch.prefill_rings,
                **options,
            )
        )
        if layer.raw is not None:  # only now: the chunk's queries read what these overwrite
            dispatch.store_raw(
                k[decodes:],
                v[decodes:],
                batch.positions[decodes:],
                batch.token_rings,
                layer.raw,
                batch.raw_keep,
            )
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.unsqueeze(0), None
