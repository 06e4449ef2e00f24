"""Random weights for any config, built in the target dtype straight on the device."""

from typing import Any

import torch
from torch import nn

STD = 0.02


def build_dummy(
    config: Any, *, dtype: torch.dtype, device: torch.device, seed: int = 0, **options: Any
) -> nn.Module:
    """A causal language model with normal weights of standard deviation 0.02, and norms that only normalise.

    Modules are constructed on the device itself, not on `meta`: so buffers that no checkpoint holds
    (RoPE frequencies) come out as they do in a normally built model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="kvq", **options)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                model._init_weights(module)  # ones, or zeros where the class adds one
                continue
            for parameter in module.parameters(recurse=False):
                parameter.normal_(0.0, STD, generator=generator)
    return model
