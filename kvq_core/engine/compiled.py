"""Decoder layers through `torch.compile`: norms, rotary embedding, residuals and activations fuse."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from kvq_core.attention import mark_places
from kvq_core.errors import KvqError
from kvq_core.models import LoadedModel

T = TypeVar("T")
log = logging.getLogger("kvq")


def decoder_layers(model: LoadedModel) -> list[nn.Module]:
    """The decoder layers, in order; empty where the model's form is unknown."""
    for module in model.model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.geometry.num_layers:
            return list(module)
    return []


def compile_layers(model: LoadedModel) -> bool:
    """Compile every decoder layer of `model`, once; False where it can't be.

    Each layer's forward is compiled for any number of tokens. Attention and experts are opaque ops that find
    the step by a tensor, so the layers share one graph per kind of layer.
    """
    if getattr(model.model, "kvq_compiled", None) is not None:
        return model.model.kvq_compiled
    layers = decoder_layers(model)
    if layers:
        mark_places(model.model)
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    model.model.kvq_compiled = bool(layers)
    return bool(layers)


def or_uncompiled(model: LoadedModel, action: Callable[[], T]) -> T:
    """Do `action`; if it fails with compiled layers, warn, go back to eager ones, and do it again."""
    try:
        return action()
    except (KvqError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not getattr(model.model, "kvq_compiled", False):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.warning("%s: layers run uncompiled, because torch.compile failed: %s", model.name, first)
        for layer in decoder_layers(model):
            layer.__dict__.pop("forward", None)
        model.model.kvq_compiled = False
        return action()
