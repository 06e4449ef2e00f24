"""The integers of a step in one array, so that they reach the device in one copy."""

from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor

from kvq_core.engine.scheduler import Step


@dataclass(frozen=True)
class Sizes:
    """Rows that a step, or the CUDA graph that runs it, has room for: decodes, chunk tokens, chunks."""

    decodes: int
    tokens: int
    chunks: int


@dataclass(frozen=True)
class StepInputs:
    """All int64, on the device. Padding lies in the padding row, whose pages are the trash page."""

    decode_rows: Tensor
    """[B] rows of the block tables."""
    context_lens: Tensor
    """[B], this step's token included; 0 for padding."""
    ids: Tensor
    """[P] tokens of the chunks."""
    positions: Tensor
    """[P]"""
    token_rows: Tensor
    """[P]"""
    raw_keep: Tensor
    """[P] 1 where the token belongs in the raw window and no later token of the chunk supersedes it."""
    chunk_rows: Tensor
    """[C]"""
    history_lens: Tensor
    """[C]"""
    ends: Tensor
    """[C] index of each chunk's last token."""
    boundaries: Tensor
    """[C + 1] where chunks start and end; padding chunks are empty."""
    sampled: Tensor
    """[B + C] rows of the logits that are sampled, in order; the rest is padding."""
    sampled_rows: Tensor
    """[B + C] their rows of the block tables."""

    @staticmethod
    def lengths(sizes: Sizes) -> list[int]:
        b, p, c = sizes.decodes, sizes.tokens, sizes.chunks
        return [b, b, p, p, p, p, c, c, c, c + 1, b + c, b + c]

    @classmethod
    def unpack(cls, packed: Tensor, sizes: Sizes) -> "StepInputs":
        """Views into a packed array of sum(lengths(sizes)) integers."""
        return cls(*packed.split(cls.lengths(sizes)))


def pack(step: Step, sizes: Sizes, padding_row: int, sink: int, recent: int) -> np.ndarray:
    """The inputs of `step`, padded to `sizes`, in the order of `StepInputs`."""
    decodes, chunks = len(step.decodes), step.chunks
    lengths = np.array([c.end - c.start for c in chunks], dtype=np.int64)
    starts = np.array([c.start for c in chunks], dtype=np.int64)
    rows = np.array([c.request.row for c in chunks], dtype=np.int64)
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    chunk_of = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(boundaries[-1]) - boundaries[chunk_of] + starts[chunk_of]
    sampled = step.sampled_decodes + [sizes.decodes + i for i in step.sampled_chunks]
    parts: dict[str, tuple[list[int] | np.ndarray, int]] = {
        "decode_rows": ([r.row for r in step.decodes], padding_row),
        "context_lens": (step.context_lens, 0),
        "ids": ([token for c in chunks for token in c.request.tokens(c.start, c.end)], 0),
        "positions": (positions, 0),
        "token_rows": (rows[chunk_of], padding_row),
        "raw_keep": ((positions < sink) | (positions >= (starts + lengths)[chunk_of] - recent), 0),
        "chunk_rows": (rows, padding_row),
        "history_lens": (starts, 0),
        "ends": (boundaries[1:] - 1, 0),
        "boundaries": (boundaries, int(boundaries[-1])),
        "sampled": (sampled, 0),
        "sampled_rows": ([r.row for r in step.sampled], padding_row),
    }
    assert list(parts) == [f.name for f in fields(StepInputs)]
    assert decodes <= sizes.decodes and len(chunks) <= sizes.chunks and boundaries[-1] <= sizes.tokens
    room = StepInputs.lengths(sizes)
    packed = np.empty(sum(room), dtype=np.int64)
    start = 0
    for (values, fill), length in zip(parts.values(), room, strict=True):
        packed[start : start + len(values)] = values
        packed[start + len(values) : start + length] = fill
        start += length
    return packed
