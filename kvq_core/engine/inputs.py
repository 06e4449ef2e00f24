"""The integers of a step in one array, so that they reach the device in one copy."""

from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor

from kvq_core.engine.scheduler import Step


@dataclass(frozen=True)
class Sizes:
    """What a step, or the CUDA graph that runs it, has room for."""

    decodes: int
    tokens: int
    """Those of decodes and chunks together: they follow each other without a gap, padding comes last."""
    chunks: int
    history: bool = False
    """Whether chunks may have earlier tokens in pages."""


@dataclass(frozen=True)
class StepInputs:
    """All int64, on the device. Padding lies in the padding row, whose pages are the trash page."""

    decode_rows: Tensor
    """[B] rows of the block tables."""
    context_lens: Tensor
    """[B], this step's token included; 0 for padding."""
    ids: Tensor
    """[T] tokens of the chunks; -1 for decodes, whose tokens the device holds."""
    positions: Tensor
    """[T]"""
    token_rows: Tensor
    """[T]"""
    raw_keep: Tensor
    """[T] 1 where a chunk's token belongs in the raw window and no later token of the chunk supersedes it."""
    chunk_rows: Tensor
    """[C]"""
    history_lens: Tensor
    """[C]"""
    ends: Tensor
    """[C] index of each chunk's last token among the T."""
    boundaries: Tensor
    """[C + 1] where chunks start and end among the T; padding chunks are empty, padding follows the last."""
    sampled: Tensor
    """[B + C] rows of the logits that are sampled, in order; the rest is padding."""
    sampled_rows: Tensor
    """[B + C] their rows of the block tables."""

    @staticmethod
    def lengths(sizes: Sizes) -> list[int]:
        """Integers of each field, in the order of the fields."""
        b, t, c = sizes.decodes, sizes.tokens, sizes.chunks
        return [b, b, t, t, t, t, c, c, c, c + 1, b + c, b + c]

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
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64) + decodes
    chunk_of = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(decodes, boundaries[-1]) - boundaries[chunk_of] + starts[chunk_of]
    raw_keep = (positions < sink) | (positions >= (starts + lengths)[chunk_of] - recent)
    decode_rows = np.array([r.row for r in step.decodes], dtype=np.int64)
    context_lens = np.array(step.context_lens, dtype=np.int64)
    sampled = step.sampled_decodes + [sizes.decodes + i for i in step.sampled_chunks]
    parts: dict[str, tuple[list[int] | np.ndarray, int]] = {
        "decode_rows": (decode_rows, padding_row),
        "context_lens": (context_lens, 0),
        "ids": ([-1] * decodes + [token for c in chunks for token in c.request.tokens(c.start, c.end)], 0),
        "positions": (np.concatenate([context_lens - 1, positions]), 0),
        "token_rows": (np.concatenate([decode_rows, rows[chunk_of]]), padding_row),
        "raw_keep": (np.concatenate([np.zeros(decodes, dtype=np.int64), raw_keep]), 0),
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
