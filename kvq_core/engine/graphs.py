"""CUDA graphs of whole steps: decodes alone by batch size, and decodes with prompt chunks by token count."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kvq_core.engine.inputs import Sizes, StepInputs
from kvq_kernels.batches import planned

MOST_CHUNKS = 16
"""Prompt chunks in a captured step; steps with more run eagerly."""
MOST_TOKENS = 2048
"""Tokens of a captured step with chunks; beyond that the launches hide behind the work anyway."""
ANY = 1 << 30
"""Bounds the longest history and context of any step: the real ones are not known at capture."""


class Forward(Protocol):
    """`ModelRunner._forward`: the logits of a step's inputs."""

    def __call__(
        self, inputs: StepInputs, max_chunk: int, max_history: int, max_context: int, *, padded: bool
    ) -> Tensor: ...


def decode_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph: those that decodes are planned for, and `most` itself."""
    return sorted({min(planned(n), most) for n in range(1, most + 1)})


def mixed_sizes(most: int, history: bool) -> list[int]:
    """Token counts that get a graph of decodes and chunks.

    From some 300 tokens on products are bound by arithmetic, and padding costs what tokens do: 16 for every
    doubling. Chunks with earlier tokens in pages are rarer, and have one more kernel a layer: 8.
    """
    fine = [*range(32, 512, 32), *range(512, 1024, 64), *range(1024, 2049, 128)]
    coarse = [*range(32, 256, 32), *range(256, 512, 64), *range(512, 1024, 128), *range(1024, 2049, 256)]
    return [s for s in (coarse if history else fine) if s <= most]


class StepGraphs:
    """Graphs of `forward` on static inputs. A step runs in the smallest size that it fits, padded.

    Decodes and chunks share a graph's tokens: how many there are of each is read on the device. All sizes
    that the kernels see are the graph's. Without capture the same sizes run eagerly: matrix products round by
    their shapes, and this way a step's tokens are the same either way.
    """

    def __init__(self, forward: Forward, max_num_seqs: int, token_budget: int, device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._padding_row = max_num_seqs
        chunks = min(MOST_CHUNKS, max_num_seqs)
        self._decodes = [Sizes(n, n, 0) for n in decode_sizes(max_num_seqs)]
        self._mixed = [
            Sizes(min(max_num_seqs, n), n, min(chunks, n), history)
            for history in (False, True)
            for n in mixed_sizes(min(MOST_TOKENS, token_budget), history)
        ]
        self._graphs: dict[Sizes, tuple[torch.cuda.CUDAGraph, Tensor, StepInputs, Tensor]] = {}

    def fit(self, exact: Sizes) -> Sizes | None:
        """The sizes that a step runs in; None where it fits in none and runs as it is."""
        candidates = self._mixed if exact.chunks else self._decodes
        return next(
            (
                s
                for s in candidates
                if exact.decodes <= s.decodes
                and exact.tokens <= s.tokens
                and exact.chunks <= s.chunks
                and exact.history <= s.history
            ),
            None,
        )

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Capture every size, the largest first, so that the smaller ones reuse its memory."""
        pool = None
        wanted = [*reversed(self._mixed), *reversed(self._decodes)]
        for done, sizes in enumerate(wanted):
            if progress is not None:
                progress(done, len(wanted))
            packed = self._idle(sizes)
            inputs = StepInputs.unpack(packed, sizes)
            self._run(inputs, sizes)  # compiles what has to be compiled
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Not `global`: NCCL's watchdog thread asks for events meanwhile, which is none of our business.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = self._run(inputs, sizes)
            pool = pool or graph.pool()
            self._graphs[sizes] = graph, packed, inputs, logits
        if progress is not None:
            progress(len(wanted), len(wanted))

    @property
    def is_captured(self) -> bool:
        return bool(self._graphs)

    def drop(self) -> None:
        """Forget what was captured."""
        self._graphs.clear()

    def run(self, sizes: Sizes, packed: Tensor, eager: bool = False) -> tuple[StepInputs, Tensor]:
        """Run a step whose packed inputs lie in pinned memory; logits are valid until the next run."""
        if eager or sizes not in self._graphs:
            inputs = StepInputs.unpack(packed.to(self._device, non_blocking=True), sizes)
            return inputs, self._run(inputs, sizes)
        graph, static, inputs, logits = self._graphs[sizes]
        static.copy_(packed, non_blocking=True)
        graph.replay()
        return inputs, logits

    def _idle(self, sizes: Sizes) -> Tensor:
        """Inputs of a step that is all padding."""
        packed = torch.zeros(sum(StepInputs.lengths(sizes)), dtype=torch.int64, device=self._device)
        inputs = StepInputs.unpack(packed, sizes)
        for rows in (inputs.decode_rows, inputs.token_rows, inputs.chunk_rows, inputs.sampled_rows):
            rows.fill_(self._padding_row)
        return packed

    def _run(self, inputs: StepInputs, sizes: Sizes) -> Tensor:
        return self._forward(inputs, sizes.tokens, ANY if sizes.history else 0, ANY, padded=True)
