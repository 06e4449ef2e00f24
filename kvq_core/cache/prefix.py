"""Chunks of prompts that outlive their request, so that a prompt that begins alike need not run them again.

A prompt chunk sees itself unquantized and what precedes it through the pages, so its keys and values depend
on all tokens up to its end and on where chunks end. Hence whole chunks are shared, from the prompt's start,
and nothing less: what follows a hit reads the same bytes, in the same chunks, as if all had been run.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a chunk that holds `tokens` and follows the one with the key `parent`."""
    return sha256(parent + array("q", tokens).tobytes()).digest()


@dataclass(eq=False)
class CachedChunk:
    """One chunk, and through `parent` all that precede it."""

    key: bytes
    parent: "CachedChunk | None"
    end: int
    """Tokens up to its end; a multiple of the page size."""
    columns: list[tuple[int, list[int]]]
    """For each group: a column of block tables, and the pages from there to `end`. Without a window they are
    the chunk's own, with one all that a query after `end` can see."""
    step: int
    """The step that computes it; later ones may use it."""

    def chain(self) -> list["CachedChunk"]:
        """From the prompt's start to this chunk."""
        chunks = [self]
        while (parent := chunks[-1].parent) is not None:
            chunks.append(parent)
        return chunks[::-1]


class PrefixCache:
    """Cached chunks by key, least recently used first.

    A chunk is never more recent than the one before it, so the first of all has none that builds on it.
    """

    def __init__(self) -> None:
        self._chunks: OrderedDict[bytes, CachedChunk] = OrderedDict()

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[CachedChunk]:
        return iter(self._chunks.values())

    def get(self, key: bytes) -> CachedChunk | None:
        return self._chunks.get(key)

    def find(self, keys: Sequence[bytes]) -> list[CachedChunk]:
        """The cached chunks that a prompt with these chunks begins with."""
        found = []
        for key in keys:
            chunk = self._chunks.get(key)
            if chunk is None:
                break
            found.append(chunk)
        return found

    def add(self, chunk: CachedChunk) -> None:
        """Keep a chunk whose parent is kept already."""
        assert chunk.parent is None or chunk.parent.key in self._chunks
        self._chunks[chunk.key] = chunk
        self.touch(chunk)

    def touch(self, chunk: CachedChunk) -> None:
        """Note that a chunk, and all before it, is used."""
        link: CachedChunk | None = chunk
        while link is not None:
            self._chunks.move_to_end(link.key)
            link = link.parent

    def pop(self) -> CachedChunk:
        """Give up the least recently used one; the caller lets go of its pages."""
        return self._chunks.popitem(last=False)[1]
