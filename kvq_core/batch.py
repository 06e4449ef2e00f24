"""What one step carries: packed tokens, decodes first (one token each), then prompt chunks."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class GroupTables:
    """Where the step's tokens lie in one KV group (layers that share a window share pages)."""

    slots: Tensor
    """[T] int64: page · page_size + row of every token of the step."""
    decode_tables: Tensor
    """[B, max_pages] int32: pages of each decoding request; freed and unused entries are page 0."""
    prefill_tables: Tensor
    """[C, max_pages] int32: pages of each request with a chunk in this step."""


@dataclass
class Batch:
    """Decodes (a token each), then C prompt chunks, then padding; T tokens together."""

    num_decodes: int
    """B: at least the step's decodes. Where padding makes it more, the last of the B tokens are chunks'."""
    chunk_start: int
    """Where the host knows that chunks begin; 0 where the device alone does."""
    positions: Tensor
    """[T] int64: position of each token in its request."""
    context_lens: Tensor
    """[B] int32: tokens of each decoding request, this step's included; 0 marks padding."""
    cu_chunk_lens: Tensor
    """[C + 1] int32: chunk boundaries, counted from `chunk_start`."""
    history_lens: Tensor
    """[C] int32: tokens of each chunk's request before the chunk."""
    max_chunk: int
    """Longest chunk (0 without chunks)."""
    max_history: int
    max_context: int
    """At least the longest context of a decode; bounds the block table columns that are read."""
    groups: list[GroupTables]
    decode_rings: Tensor
    """[B] int32: the row of each decoding request in the raw windows."""
    prefill_rings: Tensor
    """[C] int32"""
    token_rings: Tensor
    """[T] int32: the same for every token."""
    raw_keep: Tensor
    """[T] bool: chunk tokens that belong in the raw window, none of them superseded by a later one."""
