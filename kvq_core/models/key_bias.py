"""Finds the constant part of a model's keys, by what its attention layers make of nothing.

No layer is known by its name: each is given zeros, its own input and the same with the other sign. Where
k(x) + k(-x) = 2 k(0), and k(0) turns with the position as the model's rotary embedding says, k(0) at position
0 is the bias.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvq_core.models.geometry import ModelGeometry
from kvq_kernels.key_bias import KeyBias

NAME = "kvq_key_bias"
POSITIONS = (0, 1, 5, 31)
LARGE = 1.0
"""Norm of a bias, relative to that of what is added to it, from which on it is taken out of the cache."""
TOLERANCE = 0.02
"""Of a comparison of keys, relative to the bias: models are in half precision."""


@dataclass(frozen=True, eq=False)
class KeyBiases:
    """The large constant parts of a model's keys."""

    biases: dict[int, Tensor]
    """Layer -> [Hkv, D] float32 (float64 for such a model)."""
    rotary: Callable[[int], tuple[Tensor, int]]
    """Length -> the table [L, D] and the number of pairs, as `KeyBias` has them."""

    def layers(self, length: int) -> dict[int, KeyBias]:
        """For positions below `length`."""
        table, pairs = self.rotary(length)
        return {layer: KeyBias(bias, table, pairs) for layer, bias in self.biases.items()}


def find_key_biases(model: nn.Module, geometry: ModelGeometry) -> KeyBiases | None:
    """None where no layer has a large one, or where it is not one that `KeyBias` describes.

    Leaves the model with another attention implementation: set it anew afterwards.
    """
    if len({layer.key_dim for layer in geometry.layers}) > 1:
        return None
    keys = _keys_of_nothing(model, geometry)
    if keys is None:
        return None
    biases: dict[int, Tensor] = {}
    turned: dict[int, Tensor] = {}
    for layer, key in keys.items():  # [3, Hkv, T, D]: of zeros, of x, of -x
        constant, plus, minus = key.to(torch.promote_types(key.dtype, torch.float32))
        size = constant.norm(dim=-1).amax()
        varying = (plus - constant).square().sum(-1).mean(-1).sqrt()
        if not bool((constant[:, 0].norm(dim=-1) > LARGE * varying).any()):
            continue
        if bool((plus + minus - 2 * constant).abs().amax() > TOLERANCE * size):
            continue  # normalised, or otherwise more than an affine function
        biases[layer], turned[layer] = constant[:, 0], constant.transpose(0, 1)
    if not biases:
        return None
    positions = torch.tensor(POSITIONS, device=next(model.parameters()).device)
    for rotary in _rotaries(model, geometry.layers[0].key_dim, next(iter(biases.values())).dtype):
        try:
            table, pairs = rotary(max(POSITIONS) + 1)
        except (TypeError, RuntimeError, ValueError, AttributeError):
            continue  # this model's module wants more than positions
        fits = {
            layer: bias
            for layer, bias in biases.items()
            if (KeyBias(bias, table, pairs).at(positions) - turned[layer]).abs().amax()
            <= TOLERANCE * bias.norm(dim=-1).amax()
        }
        if fits:
            return KeyBiases(fits, rotary)
    return None


def _rotaries(model: nn.Module, dim: int, dtype: torch.dtype) -> list[Callable[[int], tuple[Tensor, int]]]:
    """Ways in which keys may turn with their position: as a rotary embedding of the model has it, or not."""
    device = next(model.parameters()).device

    def still(length: int) -> tuple[Tensor, int]:
        return torch.ones(length, dim, dtype=dtype, device=device), 0

    def turning(module: Any) -> Callable[[int], tuple[Tensor, int]]:
        def table(length: int) -> tuple[Tensor, int]:
            with torch.inference_mode():
                x = torch.zeros(1, 1, dtype=dtype, device=device)
                cos, sin = module(x, torch.arange(length, device=device)[None])
            pairs = cos.shape[-1] // 2
            size = cos[0, 0, 0]  # some types scale cosine and sine; the bias at position 0 has it already
            ones = cos.new_ones(length, dim - 2 * pairs)
            parts = (cos[0, :, :pairs] / size, sin[0, :, :pairs] / size, ones)
            return torch.cat(parts, -1).to(dtype).clone(), pairs

        return table

    modules = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    return [*(turning(module) for module in modules), still]


def _keys_of_nothing(model: nn.Module, geometry: ModelGeometry) -> dict[int, Tensor] | None:
    """Layer -> keys [3, Hkv, T, D] of zeros, of the layer's input x and of -x, at `POSITIONS`."""
    from transformers import AttentionInterface

    keys: dict[int, Tensor] = {}
    modules: dict[int, nn.Module] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        modules[layer], keys[layer] = module, key
        batch, heads, tokens, _ = query.shape
        return value.new_zeros(batch, tokens, heads, value.shape[-1]), None

    def change(module: nn.Module, args: Any, kwargs: Any) -> Any:
        def signs(x: Tensor) -> Tensor:
            return torch.stack((torch.zeros_like(x[1]), x[1], -x[1]))

        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": signs(kwargs["hidden_states"])}
        return (signs(args[0]), *args[1:]), kwargs

    AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    device = next(model.parameters()).device
    ids = torch.arange(1, 1 + len(POSITIONS), device=device) % geometry.vocab_size
    batch = {
        "input_ids": ids.expand(3, -1),
        "position_ids": torch.tensor(POSITIONS, device=device).expand(3, -1),
        "use_cache": False,
    }
    with torch.inference_mode():
        model(**batch)
        hooks = [m.register_forward_pre_hook(change, with_kwargs=True) for m in modules.values()]
        try:
            model(**batch)
        except (TypeError, IndexError, AttributeError):
            return None  # attention layers that take their input by another name
        finally:
            for hook in hooks:
                hook.remove()
    return keys
