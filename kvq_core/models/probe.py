"""One tiny forward that shows what a model asks of its attention, so nothing unsupported passes silently.

Every layer must call the attention function once, with heads of the planned number and size; the mask that
transformers would build for it must be causal with the planned window; and outside attention no token may
see another.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvq_core.models.geometry import LayerGeometry, ModelGeometry
from kvq_core.models.support import refusal

NAME = "kvq_probe"
NUM_TOKENS = 3
LOOKS_AHEAD, UNKNOWN_MASK = -1, -2
KNOWN_TENSORS = ("position_ids", "cache_position", "s_aux", "scaling", "softcap")
FAR = 1 << 31
MARK = 0.25
"""Added to what `_mask` returns, so that a mask which the model changed is not taken for a window."""


@dataclass
class Call:
    """What one layer passed to the attention function."""

    layer: int
    num_q_heads: int
    key: Tensor
    value: Tensor
    mask: int
    """The window of the mask, 0 for full attention, or one of the negative marks."""
    window: int | None
    """The keyword `sliding_window`."""
    causal: bool
    unknown: list[str]
    """Names of tensors among the keywords that mean nothing to kvq: a bias, a selection of keys."""


@dataclass
class Record:
    """What all layers passed in one forward."""

    calls: list[Call] = field(default_factory=list)


class _KeywordLost(Exception):
    pass


def probe(model: nn.Module, geometry: ModelGeometry) -> ModelGeometry:
    """The geometry that the model really uses: `geometry`, with heads, head dims and windows as seen.

    Leaves the model with another attention implementation: set it anew afterwards.
    Raises `KvqError` where the model asks for something that kvq does not do.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    device = next(model.parameters()).device
    ids = [token % geometry.vocab_size for token in (1, 2, 3, 5)]
    # Rows: a plain one; another first token; other positions.
    tokens = torch.tensor([[ids[0], ids[1], ids[2]], [ids[3], ids[1], ids[2]], ids[:3]], device=device)
    first = torch.tensor([[0], [0], [7]], device=device)
    record = Record()
    config: Any = model.config
    try:
        with torch.inference_mode():
            output = model(
                input_ids=tokens,
                position_ids=torch.arange(NUM_TOKENS, device=device) + first,
                use_cache=False,
                kvq_record=record,
            )
    except _KeywordLost as lost:
        raise refusal(config, "its layers do not pass keywords on to the attention function") from lost
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise what they like
        raise refusal(config, f"its forward fails here ({type(error).__name__}: {error})") from error
    problem = _problem(record.calls, geometry)
    if problem is None:
        plain, other = output.logits[0, -1].float(), output.logits[1, -1].float()
        if (plain - other).norm() > 0.05 * plain.norm():
            problem = "tokens see each other outside attention (convolution or recurrence)"
        elif not any(bool((c.key[0, :, -1] != c.key[2, :, -1]).any()) for c in record.calls):
            problem = "its keys do not depend on the positions they are given"
    if problem is not None:
        raise refusal(config, problem)
    seen = sorted(record.calls, key=lambda call: call.layer)
    layers = tuple(
        LayerGeometry(call.key.shape[1], call.key.shape[3], call.value.shape[3], call.mask) for call in seen
    )
    return replace(geometry, layers=layers, num_q_heads=seen[0].num_q_heads)


def _problem(calls: list[Call], geometry: ModelGeometry) -> str | None:
    layers = sorted(call.layer for call in calls)
    if not calls:
        return "its layers never call the attention function"
    if layers != list(range(geometry.num_layers)):
        return f"its {geometry.num_layers} layers call attention as {layers}, not once each"
    for call in calls:
        where = f"layer {call.layer}"
        if not call.causal or call.mask == LOOKS_AHEAD:
            return f"the attention of {where} looks ahead"
        if call.mask == UNKNOWN_MASK:
            return f"{where} has an attention mask that is neither causal nor a sliding window"
        if call.window is not None and call.window != call.mask:
            return f"{where} asks for a window of {call.window}, and its mask has {call.mask}"
        if call.unknown:
            return f"{where} gives its attention something that kvq does not know: {', '.join(call.unknown)}"
        if call.num_q_heads % call.key.shape[1]:
            return (
                f"{call.num_q_heads} query heads of {where} do not divide among {call.key.shape[1]} kv heads"
            )
        if call.num_q_heads != calls[0].num_q_heads:
            return "its layers differ in their number of query heads"
    return None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    kvq_record: Record | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Record the call; the output is zeros, so that nothing passes from token to token."""
    if kvq_record is None:
        raise _KeywordLost
    mask = UNKNOWN_MASK
    if attention_mask is not None and attention_mask.unique().numel() == 1:
        given = float(attention_mask.flatten()[0]) - MARK
        if given.is_integer() and LOOKS_AHEAD <= given < FAR:
            mask = int(given)
    kvq_record.calls.append(
        Call(
            layer=int(module.layer_idx),  # type: ignore[arg-type]
            num_q_heads=query.shape[1],
            key=key,
            value=value,
            mask=mask,
            window=sliding_window,
            unknown=sorted(k for k, v in kwargs.items() if torch.is_tensor(v) and k not in KNOWN_TENSORS),
            causal=bool(kwargs.get("is_causal", getattr(module, "is_causal", True))),
        )
    )
    batch, heads, tokens, _ = query.shape
    return value.new_zeros(batch, tokens, heads, value.shape[-1]), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Any,
    config: Any,
    device: Any = "cpu",
    **_: Any,
) -> Tensor:
    """[batch, 1, Tq, Tk], all of it the window that `mask_function` describes (0: none), or a negative mark.

    The function is asked about a query far behind, so that a window shows however few tokens there are.
    """
    reach = 2 * (getattr(config, "sliding_window", None) or 0) + 64
    zero = torch.tensor(0, device=device)
    keys = torch.arange(reach + 2, device=device)
    query = torch.tensor(reach, device=device)
    try:
        visible = torch.as_tensor(mask_function(zero, zero, query, keys), device=device).expand(reach + 2)
        count = int(visible.sum())
        if bool(visible[-1]):
            answer = LOOKS_AHEAD
        elif bool(visible[reach + 1 - count : reach + 1].all()):
            answer = count if count <= reach else 0
        else:
            answer = UNKNOWN_MASK
    except (IndexError, RuntimeError):
        answer = UNKNOWN_MASK
    return torch.full((batch_size, 1, q_length, kv_length), answer + MARK, device=device)
