"""The ops that the engine calls: the torch twins' signatures, on whatever backend the tensors lie on."""

from functools import lru_cache
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from kvq_kernels import reference
from kvq_kernels.key_bias import KeyBias
from kvq_kernels.layout import PageLayout, RawWindow


@lru_cache(maxsize=1)
def _triton() -> SimpleNamespace:
    """The Triton launchers; imported on first use, triton exists on Linux alone."""
    from kvq_kernels import moe, paged_decode, paged_prefill, quantize_store

    return SimpleNamespace(
        store=quantize_store.store,
        store_raw=quantize_store.store_raw,
        paged_decode=paged_decode.paged_decode,
        paged_prefill=paged_prefill.paged_prefill,
        route=moe.route,
    )


def _backend(x: Tensor) -> ModuleType | SimpleNamespace:
    """Triton on a GPU, the twins elsewhere and for float64, which exists to be exact."""
    return _triton() if x.is_cuda and x.dtype != torch.float64 else reference


def store(key: Tensor, value: Tensor, pages: Tensor, slots: Tensor, layout: PageLayout) -> None:
    """See `reference.store`."""
    _backend(key).store(key, value, pages, slots, layout)


def store_raw(
    key: Tensor, value: Tensor, positions: Tensor, rings: Tensor, raw: RawWindow, keep: Tensor | None = None
) -> None:
    """See `reference.store_raw`."""
    _backend(key).store_raw(key, value, positions, rings, raw, keep)


def paged_decode(
    query: Tensor,
    pages: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    layout: PageLayout,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    raw: RawWindow | None = None,
    rings: Tensor | None = None,
    max_context: int | None = None,
    bias: KeyBias | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.paged_decode`."""
    return _backend(query).paged_decode(
        query, pages, block_tables, context_lens, layout, scale=scale, window=window, softcap=softcap,
        sinks=sinks, raw=raw, rings=rings, max_context=max_context, bias=bias, out=out,
    )  # fmt: skip


def paged_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    block_tables: Tensor,
    cu_chunk_lens: Tensor,
    history_lens: Tensor,
    layout: PageLayout,
    *,
    max_chunk: int,
    max_history: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    raw: RawWindow | None = None,
    rings: Tensor | None = None,
    bias: KeyBias | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.paged_prefill`."""
    return _backend(query).paged_prefill(
        query, key, value, pages, block_tables, cu_chunk_lens, history_lens, layout, max_chunk=max_chunk,
        max_history=max_history, scale=scale, window=window, softcap=softcap, sinks=sinks, raw=raw,
        rings=rings, bias=bias, out=out,
    )  # fmt: skip


def route(logits: Tensor, top_k: int, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `reference.route`."""
    return _backend(logits).route(logits, top_k, normalize, dtype)
