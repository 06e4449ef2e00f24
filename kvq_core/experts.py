"""The experts function that transformers' mixture-of-experts layers call: `experts_implementation="kvq"`.

Steps of few tokens are bound by reading each expert's weights once, larger ones by arithmetic: kernels for
both are in `kvq_kernels.moe`. Experts of another form (biases, transposed weights, other activations) go
through transformers' own function.
Routers that take the softmax of their logits and its largest entries do so in one launch.
"""

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kvq_core.attention import running_context
from kvq_kernels import dispatch, moe, reference

NAME = "kvq"


def install(model: nn.Module) -> None:
    """Let experts of `model` go through `kvq_experts`, if its class allows, and routers through `_routed`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    can_set = getattr(model, "_can_set_experts_implementation", None)
    if can_set is not None and can_set():
        ALL_EXPERTS_FUNCTIONS.register(NAME, kvq_experts)
        model.set_experts_implementation(NAME)  # type: ignore[operator]
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter") and (form := _router_form(module)):
            module.kvq_router_form = form  # type: ignore[assignment]
            module.forward = MethodType(_routed, module)


def kvq_experts(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden [T, H], top_k_index and top_k_weights [T, K] -> weighted sum of the chosen experts [T, H]."""
    if not _has_kernel(module, hidden):
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(module, hidden, top_k_index, top_k_weights)
    experts: Any = module
    place = getattr(module, "kvq_place", None)
    return _experts_op(hidden, top_k_index, top_k_weights, experts.gate_up_proj, experts.down_proj, place)


def _has_kernel(module: Any, hidden: Tensor) -> bool:
    """Whether the module's experts are the plain kind: down(silu(gate x) · up x), without biases."""
    return (
        hidden.is_cuda
        and module.has_gate
        and module.is_concatenated
        and not module.has_bias
        and not module.is_transposed
        and type(module)._apply_gate.__name__ == "_default_apply_gate"
        and getattr(module.config, "hidden_act", None) in ("silu", "swish")
        and moe.takes(module.gate_up_proj, module.down_proj)
    )


@torch.library.custom_op("kvq::experts", mutates_args=())
def _experts_op(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    place: Tensor | None,
) -> Tensor:
    if hidden.shape[0] > moe.MAX_TOKENS:
        return moe.sorted_experts(hidden, top_k_index, top_k_weights, gate_up, down)
    valid = None if place is None else running_context(place)[0].valid
    return moe.experts(hidden, top_k_index, top_k_weights, gate_up, down, valid)


@_experts_op.register_fake
def _(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    place: Tensor | None,
) -> Tensor:
    return torch.empty_like(hidden)


# --- routers ------------------------------------------------------------------------------------------------


def _routed(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A router's forward: logits [T, E], weights [T, K], index [T, K]."""
    logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), module.weight)
    normalize, dtype = module.kvq_router_form
    return logits, *_route_op(logits, module.top_k, normalize, dtype)


def _router_form(module: Any) -> tuple[bool, torch.dtype] | None:
    """Whether the weights of a softmax router are normalized, and their dtype; None for any other router.

    Found by trying: what the module makes of random tokens, against `route`.
    """
    weight = getattr(module, "weight", None)
    parameters = inspect.signature(module.forward).parameters
    if weight is None or weight.dim() != 2 or not isinstance(getattr(module, "top_k", None), int):
        return None
    if len(parameters) != 1:
        return None
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (64, weight.shape[1])
    hidden = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
    with torch.inference_mode():
        answer = module.forward(hidden)
        if not (isinstance(answer, tuple) and len(answer) == 3 and all(x.dim() == 2 for x in answer)):
            return None
        logits, weights, index = answer
        if not logits.equal(nn.functional.linear(hidden, weight)):
            return None
        for normalize in (True, False):
            expected, chosen = reference.route(logits, module.top_k, normalize, weights.dtype)
            if expected.shape != weights.shape or chosen.shape != index.shape:
                return None
            # Of equal logits either expert is right.
            same = logits.gather(1, chosen).equal(logits.gather(1, index))
            if same and torch.allclose(expected.float(), weights.float(), rtol=1e-2, atol=1e-6):
                return normalize, weights.dtype
    return None


@torch.library.custom_op("kvq::route", mutates_args=())
def _route_op(logits: Tensor, top_k: int, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return dispatch.route(logits, top_k, normalize, dtype)


@_route_op.register_fake
def _(logits: Tensor, top_k: int, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], top_k
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int64)
