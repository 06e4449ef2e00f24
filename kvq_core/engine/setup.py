"""What an engine needs on the device, built alike on every rank: a cache, and a runner with its graphs."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvq_core.cache.paged import PagedCache
from kvq_core.cache.plan import CachePlan
from kvq_core.config import EngineConfig
from kvq_core.engine.compiled import compile_layers, or_uncompiled
from kvq_core.engine.fidelity import Fidelity
from kvq_core.engine.joint import join_projections
from kvq_core.engine.memory import fit_cache
from kvq_core.engine.runner import ModelRunner
from kvq_core.experts import install as install_experts
from kvq_core.models import LoadedModel
from kvq_kernels.key_bias import KeyBias


@dataclass(frozen=True)
class DeviceSide:
    """The part of an engine that every rank has."""

    config: EngineConfig
    """Resolved: nothing in it is "auto" any more."""
    plan: CachePlan
    cache: PagedCache
    runner: ModelRunner
    fidelity: Fidelity | None


def set_up(
    model: LoadedModel, config: EngineConfig, progress: Callable[[int, int], None] | None = None
) -> DeviceSide:
    """Plan and allocate the cache, compile layers, capture graphs; raises `KvqError` as `fit_cache` does.

    `tear_down` when it is no longer needed.
    """
    if model.device.type == "cuda" and model.dtype.itemsize == 2:
        install_experts(model.model)
        if config.compile:
            join_projections(model.model)
            compile_layers(model)
    config, plan = or_uncompiled(model, lambda: fit_cache(model, config))
    assert config.max_model_len and config.max_num_batched_tokens
    biases = _key_biases(model, config, plan)
    cache = PagedCache(plan, model.device, model.dtype, config.max_model_len, biases)
    fidelity = Fidelity(cache, config.fidelity, config.seed, model.dtype) if config.fidelity else None
    budget = config.max_num_batched_tokens
    runner = ModelRunner(model, cache, config.seed, token_budget=budget, fidelity=fidelity)
    if not config.enforce_eager:
        try:
            or_uncompiled(model, lambda: runner.capture(progress))
        except RuntimeError as error:  # a model with an op that no graph can hold
            runner.without_graphs(error)
    if model.device.type == "cuda":
        # What lives now stays. A collection would walk through the libraries' half a million objects, for a
        # quarter of a second, in which nobody plans the next step.
        gc.collect()
        gc.freeze()
    return DeviceSide(config, plan, cache, runner, fidelity)


def tear_down(on_gpu: bool) -> None:
    """Give memory back, once nothing refers to a `DeviceSide` any more."""
    if on_gpu:
        torch.cuda.synchronize()
        gc.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()


def _key_biases(model: LoadedModel, config: EngineConfig, plan: CachePlan) -> dict[int, KeyBias] | None:
    """The constant parts of keys that pages leave out, by layer."""
    if model.key_biases is None or config.key_bias == "off" or not plan.policy.is_quantized:
        return None
    assert config.max_model_len
    return model.key_biases.layers(config.max_model_len)
