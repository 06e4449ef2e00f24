"""The cache in memory: uint8 pages, block tables on the device, raw windows, swapping to the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvq_core.cache.blocks import BlockManager
from kvq_core.cache.plan import CachePlan
from kvq_kernels.key_bias import KeyBias
from kvq_kernels.layout import PageLayout, RawWindow

RawCopies = list[tuple[Tensor, Tensor]]
"""Keys and values of one row of every layer's raw window."""


@dataclass(frozen=True)
class LayerCache:
    """What attention needs of a layer: its pages [num_pages, Hkv, block_bytes], and how to read them."""

    pages: Tensor
    layout: PageLayout
    group: int
    window: int
    raw: RawWindow | None
    bias: KeyBias | None = None
    """The constant part of the keys, which pages leave out."""


class PagedCache:
    """Allocates what a `CachePlan` says. Row `max_num_seqs` of tables and raw windows takes padding."""

    def __init__(
        self,
        plan: CachePlan,
        device: torch.device,
        dtype: torch.dtype,
        max_tokens: int,
        biases: Mapping[int, KeyBias] | None = None,
    ) -> None:
        self.plan = plan
        self.device = device
        self.blocks = BlockManager(
            [g.shape for g in plan.groups], plan.page_size, plan.max_num_seqs, max_tokens
        )
        self.group_pages: list[Tensor] = []
        self.tables: list[Tensor] = []
        layers: dict[int, LayerCache] = {}
        window = plan.policy.sink + plan.policy.recent
        for index, group in enumerate(plan.groups):
            layout = group.layout
            pages = layout.empty_pages(len(group.layers) * group.num_pages, device)
            pages = pages.view(len(group.layers), group.num_pages, *pages.shape[1:])
            self.group_pages.append(pages)
            table = torch.from_numpy(self.blocks.groups[index].table)
            self.tables.append(table if device.type == "cpu" else table.to(device))
            for i, layer in enumerate(group.layers):
                raw = None
                if window:
                    shape = (plan.max_num_seqs + 1, window, layout.num_kv_heads)
                    raw = RawWindow(
                        plan.policy.sink,
                        plan.policy.recent,
                        torch.zeros(*shape, layout.key_dim, dtype=dtype, device=device),
                        torch.zeros(*shape, layout.value_dim, dtype=dtype, device=device),
                    )
                layers[layer] = LayerCache(
                    pages[i],
                    layout,
                    index,
                    group.window,
                    raw,
                    (biases or {}).get(layer) if layout.key.num_meta else None,
                )
        self.layers = [layers[i] for i in range(len(layers))]
        self._raw_kept: dict[bytes, RawCopies] = {}
        """Cached chunk -> the raw windows as it left them."""
        self._swapped: dict[int, tuple[list[Tensor], RawCopies]] = {}

    def set_tables(self, changed: Sequence[tuple[list[int], np.ndarray]]) -> None:
        """Set rows of the device's block tables, for each group."""
        for table, (rows, values) in zip(self.tables, changed, strict=True):
            if not rows:
                continue
            host, index = torch.from_numpy(values), torch.tensor(rows)
            if self.device.type != "cpu":
                host = host.pin_memory().to(self.device, non_blocking=True)
                index = index.pin_memory().to(self.device, non_blocking=True)
            table.index_copy_(0, index, host)

    def swap_out(self, key: int, row: int, pages: list[list[int]]) -> None:
        """Copy a row's pages and raw windows to the host, unchanged, under `key`."""
        copies = [
            self._to_host(stack[:, torch.tensor(ids, device=self.device, dtype=torch.long)])
            for stack, ids in zip(self.group_pages, pages, strict=True)
        ]
        self._swapped[key] = copies, self._raw_to_host(row)

    def swap_in(self, key: int, row: int, pages: list[list[int]]) -> None:
        """Copy what `swap_out` kept under `key` into a row's new pages."""
        copies, raw = self._swapped.pop(key)
        for stack, ids, copy in zip(self.group_pages, pages, copies, strict=True):
            ids = ids[: copy.shape[1]]
            stack[:, torch.tensor(ids, device=self.device, dtype=torch.long)] = copy.to(
                self.device, non_blocking=True
            )
        self._raw_to_device(raw, row)

    def drop_swapped(self, key: int) -> None:
        self._swapped.pop(key, None)

    def raw_out(self, key: bytes, row: int) -> None:
        """Keep a row's raw windows with the cached chunk `key`."""
        self._raw_kept[key] = self._raw_to_host(row)

    def raw_in(self, key: bytes, row: int) -> None:
        """Set a row's raw windows as they were after the cached chunk `key`."""
        self._raw_to_device(self._raw_kept[key], row)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Let go of the raw windows of cached chunks."""
        for key in keys:
            self._raw_kept.pop(key, None)

    def _raw_to_host(self, row: int) -> RawCopies:
        return [
            (self._to_host(layer.raw.keys[row]), self._to_host(layer.raw.values[row]))
            for layer in self.layers
            if layer.raw is not None
        ]

    def _raw_to_device(self, copies: RawCopies, row: int) -> None:
        with_raw = [layer.raw for layer in self.layers if layer.raw is not None]
        for window, (keys, values) in zip(with_raw, copies, strict=True):
            window.keys[row].copy_(keys, non_blocking=True)
            window.values[row].copy_(values, non_blocking=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
