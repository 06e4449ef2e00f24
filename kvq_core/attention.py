"""The attention function that transformers' models call: `attn_implementation="kvq"`.

The model makes q, k and v and applies RoPE; this stores k and v in the paged cache and attends to it. The
step's batch and the cache travel through the model's forward as the keyword `kvq`. No mask function is
registered under the name, so transformers builds no mask: causality and windows are the kernels' work.

Compiled layers can't carry Python objects, so there attention is one opaque op, `kvq::attention`. It finds
batch and cache by a tensor on the CPU, `module.kvq_place`, that names the model and the layer: nothing in
the traced code depends on the layer's number, and all layers share one compiled graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvq_core.batch import Batch
from kvq_core.cache.paged import PagedCache
from kvq_kernels import dispatch

if TYPE_CHECKING:
    from kvq_core.engine.fidelity import Fidelity

NAME = "kvq"


@dataclass
class StepContext:
    """What a forward passes to every attention layer."""

    batch: Batch
    cache: PagedCache
    valid: Tensor | None = None
    """[T] bool: tokens that are no padding; None: all."""
    stored: dict[int, int] | None = None
    """layer -> tokens stored; filled where it is not None."""
    fidelity: "Fidelity | None" = None
    """Keeps a shadow of keys and values, and compares; None: off."""


_running: dict[int, StepContext] = {}
"""model handle -> the forward that is under way; compiled layers look it up."""


@contextmanager
def forward_context(model: nn.Module, context: StepContext) -> Iterator[None]:
    """Make `context` the one that compiled layers of `model` find, for one forward."""
    handle = id(model)
    _running[handle] = context
    try:
        yield
    finally:
        del _running[handle]


def mark_places(model: nn.Module) -> None:
    """Give attention and experts modules the `kvq_place` by which compiled code finds the running forward."""
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            module.kvq_place = torch.tensor([id(model), layer])
        elif hasattr(module, "gate_up_proj"):
            module.kvq_place = torch.tensor([id(model), -1])


def running_context(place: Tensor) -> tuple[StepContext, int]:
    """The forward under way and the layer that `place` names."""
    handle, layer = place.tolist()
    return _running[handle], layer


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
    kvq: StepContext | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, Dk], key and value [1, Hkv, T, D] -> output [1, T, Hq, Dv].

    The first `batch.num_decodes` tokens are decodes; the others are prompt chunks.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    place = getattr(module, "kvq_place", None)
    if place is not None:
        return _attention_op(query, key, value, place, scale, softcap or 0.0, s_aux), None
    assert kvq is not None, "the model lost the keyword `kvq`"
    layer: int = module.layer_idx  # type: ignore[assignment]
    window = kvq.cache.layers[layer].window
    if sliding_window is not None and window and sliding_window != window:
        raise AssertionError(f"layer {layer} asks for a window of {sliding_window}, planned was {window}")
    return attend(kvq, layer, query, key, value, scale, softcap or 0.0, s_aux), None


@torch.library.custom_op("kvq::attention", mutates_args=())
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    place: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    context, layer = running_context(place)
    return attend(context, layer, query, key, value, scale, softcap, sinks)


@_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    place: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def attend(
    context: StepContext,
    layer_index: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Store the step's keys and values of one layer, and attend: shapes as in `kvq_attention`."""
    batch, layer = context.batch, context.cache.layers[layer_index]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    tables = batch.groups[layer.group]
    num_tokens, decodes = q.shape[0], batch.num_decodes
    if context.stored is not None:
        context.stored[layer_index] = context.stored.get(layer_index, 0) + num_tokens
    options: dict[str, Any] = {
        "scale": scale,
        "window": layer.window,
        "softcap": softcap,
        "sinks": sinks,
        "raw": layer.raw,
        "bias": layer.bias,
    }
    stored = k
    if layer.bias is not None:
        stored = (k - layer.bias.at(batch.positions)).to(k.dtype)
    dispatch.store(stored, v, layer.pages, tables.slots, layer.layout)
    if context.fidelity is not None:
        context.fidelity.store(layer_index, k, v, batch)
    start, has_chunks = batch.chunk_start, batch.history_lens.shape[0] > 0
    out = q.new_empty(num_tokens, q.shape[1], v.shape[2]) if decodes and has_chunks else None
    if decodes:
        if layer.raw is not None:
            dispatch.store_raw(
                k[:decodes], v[:decodes], batch.positions[:decodes], batch.decode_rings, layer.raw, None
            )
        attended = dispatch.paged_decode(
            q[:decodes],
            layer.pages,
            tables.decode_tables,
            batch.context_lens,
            layer.layout,
            rings=batch.decode_rings,
            max_context=batch.max_context,
            out=None if out is None else out[:decodes],
            **options,
        )
        if context.fidelity is not None:
            context.fidelity.compare(layer_index, q[:decodes], context.cache, batch, options)
    if has_chunks:
        attended = dispatch.paged_prefill(
            q[start:],
            k[start:],
            v[start:],
            layer.pages,
            tables.prefill_tables,
            batch.cu_chunk_lens,
            batch.history_lens,
            layer.layout,
            max_chunk=batch.max_chunk,
            max_history=batch.max_history,
            rings=batch.prefill_rings,
            out=None if out is None else out[start:],
            **options,
        )
        if layer.raw is not None:  # only now: the chunk's queries read what these overwrite
            dispatch.store_raw(
                k[start:],
                v[start:],
                batch.positions[start:],
                batch.token_rings[start:],
                layer.raw,
                batch.raw_keep[start:],
            )
    return (attended if out is None else out).unsqueeze(0)
