"""How much memory the cache gets: resolves "auto" in an `EngineConfig` and plans the pages."""

import torch

from kvq_core.cache.paged import PagedCache
from kvq_core.cache.plan import CachePlan, plan_cache
from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.engine.request import Request
from kvq_core.engine.scheduler import Chunk, Step
from kvq_core.errors import KvqError, UsageError
from kvq_core.host import available_bytes
from kvq_core.models import LoadedModel

_CPU_SHARE, _CPU_MOST = 0.25, 4 << 30
"""On a CPU the cache takes a quarter of the free memory, and no more than 4 GiB, unless told."""
_GRAPH_RESERVE = 512 << 20
"""Kept free for CUDA graphs and the allocator's fragments."""
_LEAST_STEP, _MOST_STEP = 2048, 8192
"""Bounds of the prompt tokens that a step has room for on a GPU, unless told; more take as long each."""


def fit_cache(model: LoadedModel, config: EngineConfig) -> tuple[EngineConfig, CachePlan]:
    """The resolved configuration and the plan of the largest cache that it allows.

    With `kv_memory` the cache takes that; else, on a GPU, what `gpu_memory_utilization` leaves beside the
    weights and the measured peak of a full prompt step.
    """
    group = model.group
    if config.tp != group.size:
        raise UsageError(f"tp={config.tp}, and {model.name} was loaded with tp={group.size}", "load it anew")
    if config.fidelity and group.size > 1:
        raise UsageError("fidelity needs --tp 1", "a rank sees the error of its own heads alone")
    geometry = model.geometry
    limit = config.max_model_len or geometry.max_model_len
    if limit > geometry.max_model_len:
        raise UsageError(
            f"max_model_len {limit} is more than the {geometry.max_model_len} that {model.name} takes",
            "leave it out for the model's own limit",
        )
    on_gpu = model.device.type == "cuda"
    chunk = config.chunk(geometry.is_windowed)
    prompts = max(chunk, min(max(4 * chunk, _LEAST_STEP), _MOST_STEP)) if on_gpu else chunk
    budget = config.max_num_batched_tokens or config.max_num_seqs + prompts
    if budget < chunk + 1:
        raise UsageError(
            f"max_num_batched_tokens {budget} is below prefill_chunk + 1 = {chunk + 1}",
            "a step must be able to carry a whole chunk and a decode",
        )
    config = config.replace(
        policy=config.resolved_policy(),
        layers=(),
        max_model_len=limit,
        max_num_batched_tokens=budget,
        prefill_chunk=chunk,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
    )
    memory = config.kv_memory or (
        _free_gpu_memory(model, config) if on_gpu else group.smallest(_free_host_memory() // group.size)
    )
    plan = _plan(model, config, memory)
    _check_allocatable(model, plan)
    return config.replace(kv_memory=memory), plan


def _plan(model: LoadedModel, config: EngineConfig, memory: int) -> CachePlan:
    assert config.max_model_len and config.prefill_chunk
    return plan_cache(
        model.geometry,
        config.resolved_policy(),
        memory,
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        prefill_chunk=config.prefill_chunk,
        max_model_len=config.max_model_len,
        dtype=model.dtype,
    )


def _check_allocatable(model: LoadedModel, plan: CachePlan) -> None:
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = available_bytes() // model.group.size
    free = model.group.smallest(free)
    if plan.memory_bytes > free:
        raise KvqError(
            f"the KV cache needs {plan.memory_bytes / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free",
            "lower `--kv-memory`, or close what else uses the memory",
        )


def _free_host_memory() -> int:
    return min(int(available_bytes() * _CPU_SHARE), _CPU_MOST)


def _free_gpu_memory(model: LoadedModel, config: EngineConfig) -> int:
    peak = _measure_peak(model, config)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    memory = int(free - total * (1 - config.gpu_memory_utilization) - peak - _GRAPH_RESERVE)
    memory = model.group.smallest(memory)  # all ranks plan alike
    if memory <= 0:
        raise KvqError(
            f"no memory is left for the KV cache: {free / 2**30:.1f} GiB are free beside the weights, a full"
            f" prompt step needs {peak / 2**30:.1f} GiB, and {1 - config.gpu_memory_utilization:.0%} of the"
            " device stay unused",
            "raise `--gpu-memory-utilization`, or lower `--prefill-chunk` or `--max-num-seqs`",
        )
    return memory


def _measure_peak(model: LoadedModel, config: EngineConfig) -> int:
    """Bytes that the largest step allocates beside weights and cache: chunks that fill the token budget."""
    from kvq_core.engine.runner import ModelRunner

    assert config.max_num_batched_tokens and config.max_model_len and config.prefill_chunk
    lengths: list[int] = []
    left = config.max_num_batched_tokens
    while left > 0 and len(lengths) < config.max_num_seqs:
        lengths.append(min(left, config.prefill_chunk, config.max_model_len))
        left -= lengths[-1]
    small = config.replace(max_num_seqs=len(lengths))
    layers = _plan(model, small, 1 << 50)
    pages = sum(-(-n // config.page_size) for n in lengths) + len(lengths) + 1
    memory = sum(pages * g.page_bytes for g in layers.groups) + len(lengths) * layers.raw_bytes_per_request
    plan = _plan(model, small, memory)
    cache = PagedCache(plan, model.device, model.dtype, config.max_model_len)
    runner = ModelRunner(model, cache, 0, token_budget=config.max_num_batched_tokens)
    step = Step()
    for i, length in enumerate(lengths):
        request = Request(i, [0] * length, SamplingParams(), 1)
        request.row = cache.blocks.take_row()
        assert cache.blocks.extend(request.row, [length] * len(plan.groups))
        step.chunks.append(Chunk(request, 0, length))
        step.sampled_chunks.append(i)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    runner.run(runner.plan(step), step).get()
    return torch.cuda.max_memory_allocated(model.device) - before
