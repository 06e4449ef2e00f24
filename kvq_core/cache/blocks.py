"""Which pages belong to which request; pure Python and numpy, no torch.

Layers that share a window and a page layout form a KV group. A page of a group spans all its layers;
every group has its own pages and its own block table. Page 0 is never handed out: padding is written
there, and block tables point to it where a request has no page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


class BlockAllocator:
    """Hands out the pages 1 … num_pages - 1 of one group, each to one owner at a time."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def allocate(self) -> int:
        page = self._free.pop()
        self._used.add(page)
        return page

    def free(self, page: int) -> None:
        self._used.remove(page)  # KeyError: freed twice, or never handed out
        self._free.append(page)


@dataclass(frozen=True)
class GroupShape:
    """What the block manager has to know of a group: its window (0: none), number of pages, bytes a page."""

    window: int
    num_pages: int
    page_bytes: int


class _GroupBlocks:
    """Pages and block table of one group; a row holds the pages `first` … `end` - 1 of its table."""

    def __init__(self, shape: GroupShape, page_size: int, num_rows: int, max_pages: int) -> None:
        self.shape = shape
        self.page_size = page_size
        self.allocator = BlockAllocator(shape.num_pages)
        self.table = np.zeros((num_rows, max_pages), dtype=np.int32)
        self.first = [0] * num_rows
        self.end = [0] * num_rows
        self.dirty: set[int] = set()

    def first_visible(self, computed: int) -> int:
        """The first page that a query at position `computed` or later can see."""
        if not self.shape.window:
            return 0
        return max(0, computed - self.shape.window + 1) // self.page_size

    def missing(self, row: int, tokens: int) -> int:
        return max(0, pages_for(tokens, self.page_size) - self.end[row])

    def extend(self, row: int, tokens: int) -> None:
        end = pages_for(tokens, self.page_size)
        if end > self.end[row]:
            for column in range(self.end[row], end):
                self.table[row, column] = self.allocator.allocate()
            self.end[row] = end
            self.dirty.add(row)

    def trim(self, row: int, computed: int) -> None:
        first = min(self.first_visible(computed), self.end[row])
        for column in range(self.first[row], first):
            self.allocator.free(int(self.table[row, column]))
            self.table[row, column] = 0
            self.dirty.add(row)
        self.first[row] = max(self.first[row], first)

    def release(self, row: int) -> None:
        for column in range(self.first[row], self.end[row]):
            self.allocator.free(int(self.table[row, column]))
        self.table[row, : self.end[row]] = 0
        self.first[row] = self.end[row] = 0
        self.dirty.add(row)

    def restore(self, row: int, first: int, end: int) -> None:
        self.first[row] = self.end[row] = first
        self.extend(row, end * self.page_size)


class BlockManager:
    """The pages of all groups. A running request owns a row of every group's block table."""

    def __init__(self, groups: Sequence[GroupShape], page_size: int, num_rows: int, max_tokens: int) -> None:
        self.page_size = page_size
        self.max_pages = pages_for(max_tokens, page_size)
        # one row more than requests: padding of a CUDA graph, always empty
        self.groups = [_GroupBlocks(g, page_size, num_rows + 1, self.max_pages) for g in groups]
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self.num_rows = num_rows
        self.peak_tokens = 0
        self._tokens = [0] * num_rows
        self._total_tokens = 0

    @property
    def has_free_row(self) -> bool:
        return bool(self._free_rows)

    def take_row(self) -> int:
        return self._free_rows.pop()

    def release(self, row: int) -> None:
        """Free the row and all its pages."""
        for group in self.groups:
            group.release(row)
        self._count(row, 0)
        self._free_rows.append(row)

    def _count(self, row: int, tokens: int) -> None:
        self._total_tokens += tokens - self._tokens[row]
        self._tokens[row] = tokens
        self.peak_tokens = max(self.peak_tokens, self._total_tokens)

    def reset_peak(self) -> None:
        self.peak_tokens = self._total_tokens

    @property
    def tokens(self) -> int:
        """Tokens that the running requests have pages for."""
        return self._total_tokens

    def can_admit(self, tokens: Sequence[int], reserve: int) -> bool:
        """Whether every group g has pages for `tokens[g]` tokens of a new row, and `reserve` besides."""
        return all(
            pages_for(n, self.page_size) + reserve <= g.allocator.num_free
            for g, n in zip(self.groups, tokens, strict=True)
        )

    def extend(self, row: int, tokens: Sequence[int]) -> bool:
        """Give the row pages for `tokens[g]` tokens in every group g; False, and no change, if too few."""
        for group, n in zip(self.groups, tokens, strict=True):
            if group.missing(row, n) > group.allocator.num_free:
                return False
        for group, n in zip(self.groups, tokens, strict=True):
            group.extend(row, n)
        self._count(row, max(tokens))
        return True

    def trim(self, row: int, computed: int) -> None:
        """Free the pages that no query at position `computed` or later can see."""
        for group in self.groups:
            if group.shape.window:
                group.trim(row, computed)

    def held(self, row: int) -> list[tuple[int, list[int]]]:
        """For each group: the first page column a row holds, and its pages from there."""
        return [(g.first[row], g.table[row, g.first[row] : g.end[row]].tolist()) for g in self.groups]

    def can_restore(self, held: Sequence[tuple[int, int]], tokens: int) -> bool:
        """Whether a row that held (first, count) pages of each group fits, with room for `tokens` tokens."""
        return all(
            max(count, pages_for(tokens, self.page_size) - first) <= g.allocator.num_free
            for g, (first, count) in zip(self.groups, held, strict=True)
        )

    def restore(self, row: int, held: Sequence[tuple[int, int]], tokens: int) -> None:
        """Give the row `count` pages from column `first` on, for each group's (first, count)."""
        for group, (first, count) in zip(self.groups, held, strict=True):
            group.restore(row, first, first + count)
        self._count(row, tokens)

    def check(self) -> None:
        """Assert that no page is lost or held twice: what rows hold is exactly what is in use."""
        for group in self.groups:
            pages = [
                page
                for row in range(self.num_rows + 1)
                for page in group.table[row, group.first[row] : group.end[row]].tolist()
            ]
            assert len(pages) == len(set(pages)) and 0 not in pages, "a page is held twice"
            assert set(pages) == group.allocator._used, "a page is lost"
            assert group.allocator.num_used + group.allocator.num_free == group.shape.num_pages - 1
            assert int(np.count_nonzero(group.table)) == len(pages), "a stale block table entry"
