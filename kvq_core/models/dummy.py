"""Random weights for any config, made in the target dtype straight on the device, each from its own name.

So a rank that keeps a part of every weight has that part of the same model, whatever the number of ranks.
"""

from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

STD = 0.02


def build_dummy(config: Any, *, dtype: torch.dtype, device: torch.device, **options: Any) -> nn.Module:
    """A causal language model whose parameters are on `meta`, for `fill_dummy`.

    Its buffers are on the device, as they are in a normally built model: those that no checkpoint holds (RoPE
    frequencies) are computed there.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="kvq", **options)
    model.tie_weights()
    return model


def fill_dummy(
    model: Any, device: torch.device, cut: Callable[[str, Tensor], Tensor] = lambda name, weight: weight
) -> None:
    """Normal weights of standard deviation 0.02, norms that only normalise; of each weight what `cut` keeps.

    At no time is more than one whole weight on the device beside what is kept.
    """
    made: dict[int, nn.Parameter] = {}
    """By the parameter on `meta`, which tied modules share."""
    with torch.no_grad():
        for prefix, module in model.named_modules():
            is_norm = "Norm" in type(module).__name__
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in made:
                    weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    name = f"{prefix}.{leaf}"
                    if not is_norm:
                        generator = torch.Generator(device).manual_seed(crc32(name.encode()))
                        weight = cut(name, weight.normal_(0.0, STD, generator=generator))
                    made[id(parameter)] = nn.Parameter(weight, requires_grad=False)
                setattr(module, leaf, made[id(parameter)])
            if is_norm:
                model._init_weights(module)  # ones, or zeros where the class adds one
