"""How much cache fits: KV groups, bytes per token, pages for a given memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvq_core.cache.blocks import GroupShape, pages_for
from kvq_core.codecs import get_codec
from kvq_core.errors import KvqError
from kvq_core.models import LayerGeometry, ModelGeometry
from kvq_core.policies import Policy
from kvq_kernels.layout import PageLayout


@dataclass(frozen=True)
class GroupPlan:
    """Layers that share a window and a page layout, and their pages, the trash page 0 included."""

    layers: tuple[int, ...]
    window: int
    layout: PageLayout
    num_pages: int

    @property
    def page_bytes(self) -> int:
        """One page of all layers of the group."""
        return len(self.layers) * self.layout.page_bytes

    @property
    def shape(self) -> GroupShape:
        return GroupShape(self.window, self.num_pages, self.page_bytes)


@dataclass(frozen=True)
class CachePlan:
    """The cache of one engine, before it is allocated."""

    groups: tuple[GroupPlan, ...]
    policy: Policy
    page_size: int
    max_num_seqs: int
    max_request_tokens: int
    """Longest request that fits in the cache alone, and in the model."""
    raw_bytes_per_request: int
    """The unquantized sink and recent tokens of one running request."""
    elements_per_token: int
    """Numbers in the keys and values of one token, all layers."""
    unquantized_tokens: int | None = None
    """Capacity of 2 bytes a number in the same memory, where some layers have windows and others not; else it
    goes with the bits."""

    @property
    def memory_bytes(self) -> int:
        """Everything the cache allocates on the device: pages and raw windows."""
        pages = sum(g.num_pages * g.page_bytes for g in self.groups)
        return pages + self.max_num_seqs * self.raw_bytes_per_request

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit at a time, by the pages of the unwindowed layers (or of the largest group)."""
        unwindowed = [g.num_pages for g in self.groups if not g.window]
        return (max(unwindowed or [g.num_pages for g in self.groups]) - 1) * self.page_size

    @property
    def bytes_per_token(self) -> int:
        """Records of one token, all layers."""
        return sum(g.page_bytes for g in self.groups) // self.page_size

    @property
    def bits_per_element(self) -> float:
        """Effective bits: codes, metadata, and the raw windows spread over the capacity."""
        raw = self.max_num_seqs * self.raw_bytes_per_request / max(1, self.capacity_tokens)
        return 8 * (self.bytes_per_token + raw) / self.elements_per_token

    @property
    def capacity_ratio(self) -> float:
        """Capacity against a 2-byte cache in the same memory."""
        if self.unquantized_tokens is None:
            return 16 / self.bits_per_element
        return self.capacity_tokens / self.unquantized_tokens


def check_head_dims(geometry: ModelGeometry, policy: Policy) -> None:
    """`KvqError` where a codec of the policy can't take a head dim of the model."""
    for layer, own in zip(geometry.layers, policy.by_layer(geometry.num_layers), strict=True):
        get_codec(own.key).check_head_dim(layer.key_dim)
        get_codec(own.value).check_head_dim(layer.value_dim)


def page_layout(layer: LayerGeometry, policy: Policy, page_size: int, dtype: torch.dtype) -> PageLayout:
    """The layout of one layer's pages."""
    key, value = get_codec(policy.key), get_codec(policy.value)
    return PageLayout(key, value, page_size, layer.num_kv_heads, layer.key_dim, layer.value_dim, dtype)


def raw_bytes_per_request(geometry: ModelGeometry, policy: Policy, dtype: torch.dtype) -> int:
    """Bytes of the sink and recent tokens of one request, in the model's dtype."""
    numbers = sum(layer.elements for layer in geometry.layers)
    return (policy.sink + policy.recent) * numbers * dtype.itemsize


def plan_cache(
    geometry: ModelGeometry,
    policy: Policy,
    memory: int,
    *,
    page_size: int,
    max_num_seqs: int,
    prefill_chunk: int,
    max_model_len: int,
    dtype: torch.dtype,
) -> CachePlan:
    """Divide `memory` bytes among the KV groups.

    Layers without a window need pages for every token, layers with one only for the window and a chunk of
    each running request; so the windowed groups get the pages that `max_num_seqs` requests can use at most,
    and never more than the unwindowed ones, and the rest is capacity.
    Raises `KvqError` where not even one short request fits, or a codec can't take the head dim.
    """
    check_head_dims(geometry, policy)
    members: dict[tuple[int, PageLayout], list[int]] = {}
    own = policy.by_layer(len(geometry.layers))
    for index, layer in enumerate(geometry.layers):
        layout = page_layout(layer, own[index], page_size, dtype)
        members.setdefault((layer.window, layout), []).append(index)
    raw = raw_bytes_per_request(geometry, policy, dtype)

    mixed = len({bool(window) for window, _ in members}) == 2
    page_bytes = {key: len(layers) * key[1].page_bytes for key, layers in members.items()}

    def share(pages: int, window: int) -> int:
        """Pages of a group where the unwindowed ones have `pages`; one of them is the trash page."""
        if not (mixed and window):
            return pages
        tokens = min(max_model_len, window + prefill_chunk + page_size)
        return min(pages, max_num_seqs * pages_for(tokens, page_size) + 1)

    def size(pages: int, page_bytes: Mapping[tuple[int, PageLayout], int]) -> int:
        return sum(share(pages, key[0]) * page_bytes[key] for key in members)

    def most(budget: int, page_bytes: Mapping[tuple[int, PageLayout], int]) -> int:
        """The most pages whose size fits."""
        low, high = 0, max(0, budget) // min(page_bytes.values())
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if size(middle, page_bytes) <= budget else (low, middle - 1)
        return low

    pages = most(memory - max_num_seqs * raw, page_bytes)
    two_bytes = {
        key: 2 * page_size * sum(geometry.layers[i].elements for i in layers)
        for key, layers in members.items()
    }
    groups = tuple(
        GroupPlan(tuple(layers), window, layout, share(pages, window))
        for (window, layout), layers in members.items()
    )
    if pages < 2:
        need = size(2, page_bytes) + max_num_seqs * raw
        windows = f" and the unquantized tokens of {max_num_seqs} requests take" if raw else " takes"
        raise KvqError(
            f"{memory:,} bytes of KV memory hold no request: a page of {page_size} tokens{windows} {need:,}",
            f"give at least `--kv-memory {-(-need // 2**20)}MiB`"
            + (", or lower `--max-num-seqs`" if raw else ""),
        )
    # Alone in the cache, a request holds all its pages in an unwindowed group, window + chunk in another.
    fits = max_model_len
    for group in groups:
        tokens = (group.num_pages - 1) * page_size
        if not group.window or tokens < group.window + prefill_chunk + page_size:
            fits = min(fits, tokens)
    return CachePlan(
        groups=groups,
        policy=policy,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_request_tokens=fits,
        raw_bytes_per_request=raw,
        elements_per_token=sum(layer.elements for layer in geometry.layers),
        unquantized_tokens=(max(2, most(memory, two_bytes)) - 1) * page_size if mixed else None,
    )
