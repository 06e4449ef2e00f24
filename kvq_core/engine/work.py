"""One step as plain data: all that a rank needs to run it, so that one scheduler does for all of them."""

from dataclasses import dataclass

import numpy as np

from kvq_core.engine.inputs import Sizes

TableRows = list[tuple[list[int], np.ndarray]]
"""For each KV group, the rows of its block table that changed, and what they hold."""


@dataclass(frozen=True)
class Work:
    """What `ModelRunner.run` does, in this order."""

    dropped: list[int]
    """Swapped requests that ended."""
    swap_out: list[tuple[int, int, list[list[int]]]]
    """Request, row, and pages for each group."""
    swap_in: list[tuple[int, int, list[list[int]]]]
    raw_in: list[tuple[bytes, int]]
    """Cached chunk and row."""
    evicted: list[bytes]
    """Cached chunks that are given up."""
    tables: TableRows
    forced: np.ndarray
    """[2, n] int64: rows, and their input tokens."""
    packed: np.ndarray | None
    """`StepInputs` of `sizes`; None where there are only pages to move."""
    sizes: Sizes
    fits_graph: bool
    """Whether `sizes` are those of a CUDA graph."""
    max_chunk: int
    max_history: int
    max_context: int
    measured: bool
    """Whether fidelity is measured."""
    num_sampled: int
    raw_out: list[tuple[bytes, int]]
