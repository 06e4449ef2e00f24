"""CUDA graphs of whole decode steps, one per batch bucket."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvq_core.batch import Batch


def buckets(most: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, then multiples of 8, of 16 from 64 on, and `most` itself."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most + 1, 16), most]
    return sorted({s for s in sizes if s <= most})


class DecodeGraphs:
    """Holds the static inputs of decode steps and replays the graph of the smallest bucket that fits.

    `decode_batch(rows, context_lens, max_context)` and `forward(batch, ids, None)` are the runner's own; both
    work on the device alone. Padding rows have context length 0 and lie in the row `padding_row`.
    """

    def __init__(
        self,
        decode_batch: Callable[[Tensor, Tensor, int], tuple[Batch, Tensor]],
        forward: Callable[[Batch, Tensor, Tensor | None], Tensor],
        padding_row: int,
        device: torch.device,
    ) -> None:
        self._decode_batch = decode_batch
        self._forward = forward
        self._padding_row = padding_row
        self._rows = torch.full((padding_row,), padding_row, dtype=torch.int64, device=device)
        self._context_lens = torch.zeros(padding_row, dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Capture every bucket, largest first, so that the smaller ones reuse its memory."""
        pool = None
        sizes = buckets(self._padding_row)
        for done, size in enumerate(reversed(sizes)):
            if progress is not None:
                progress(done, len(sizes))
            self._step(size)  # compiles what has to be compiled
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self._step(size)
            pool = pool or graph.pool()
            self._graphs[size] = graph, logits
        if progress is not None:
            progress(len(sizes), len(sizes))

    def replay(self, rows: Tensor, context_lens: Tensor, max_context: int) -> Tensor:
        """rows [B], context_lens [B] on the device -> logits [B, V], valid until the next replay."""
        count = rows.shape[0]
        size = next(s for s in sorted(self._graphs) if s >= count)
        self._rows[:count].copy_(rows)
        self._context_lens[:count].copy_(context_lens)
        if size > count:
            self._rows[count:size].fill_(self._padding_row)
            self._context_lens[count:size].zero_()
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:count]

    def _step(self, size: int) -> Tensor:
        batch, ids = self._decode_batch(self._rows[:size], self._context_lens[:size], 0)
        return self._forward(batch, ids, None)
