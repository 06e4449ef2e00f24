"""Which pages belong to which request; pure Python and numpy, no torch.

Layers that share a window and a page layout form a KV group. A page of a group spans all its layers;
every group has its own pages and its own block table. Page 0 is never handed out: padding is written
there, and block tables point to it where a request has no page.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvq_core.cache.prefix import CachedChunk, PrefixCache


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page_size)


class BlockAllocator:
    """Hands out the pages 1 … num_pages - 1 of one group, and counts who holds them.

    Holders are users (rows of block tables) and keepers (cached chunks). A page without either is free, one
    with keepers alone is idle: its keepers can be asked to give it up.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._users: dict[int, int] = {}
        self._keepers: dict[int, int] = {}
        self.num_shares = 0
        """Users beyond the first of each page."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._users)

    @property
    def num_available(self) -> int:
        """Pages that are free or idle."""
        return self.num_pages - 1 - len(self._users)

    @property
    def num_idle(self) -> int:
        """Pages that only cached chunks hold."""
        return self.num_available - len(self._free)

    def is_used(self, page: int) -> bool:
        return page in self._users

    def allocate(self) -> int:
        """A free page, for one user."""
        page = self._free.pop()
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """One user more for a page that is in use or kept."""
        assert page in self._users or page in self._keepers
        self.num_shares += page in self._users
        self._users[page] = self._users.get(page, 0) + 1

    def free(self, page: int) -> None:
        """One user less."""
        self._users[page] -= 1  # KeyError: freed twice, or never handed out
        if self._users[page]:
            self.num_shares -= 1
            return
        del self._users[page]
        if page not in self._keepers:
            self._free.append(page)

    def keep(self, page: int) -> None:
        """One keeper more for a page that is in use or kept."""
        assert page in self._users or page in self._keepers
        self._keepers[page] = self._keepers.get(page, 0) + 1

    def drop(self, page: int) -> None:
        """One keeper less."""
        self._keepers[page] -= 1
        if not self._keepers[page]:
            del self._keepers[page]
            if page not in self._users:
                self._free.append(page)

    def check(self, users: dict[int, int], keepers: dict[int, int]) -> None:
        """Assert that exactly these hold pages, and that no page is lost."""
        assert users == self._users, "a page is lost, or held by a row that does not know of it"
        assert keepers == self._keepers, "a page is kept for no chunk"
        assert 0 not in users and 0 not in keepers
        held = users.keys() | keepers.keys()
        assert held.isdisjoint(self._free) and len(held) + len(self._free) == self.num_pages - 1
        assert self.num_shares == sum(users.values()) - len(users)


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

    def adopt(self, row: int, first: int, pages: list[int]) -> None:
        """Begin an empty row with pages of a cached prefix."""
        for page in pages:
            self.allocator.share(page)
        self.first[row], self.end[row] = first, first + len(pages)
        self.table[row, first : self.end[row]] = pages
        self.dirty.add(row)

    def shared(self, chunk: CachedChunk, index: int) -> tuple[int, list[int]]:
        """The first column and the pages of a row that begins with `chunk`; `index` is the group's number."""
        if self.shape.window:
            return chunk.columns[index]
        return 0, [page for link in chunk.chain() for page in link.columns[index][1]]


class BlockManager:
    """The pages of all groups. A running request owns a row of every group's block table."""

    def __init__(self, groups: Sequence[GroupShape], page_size: int, num_rows: int, max_tokens: int) -> None:
        self.page_size = page_size
        self.max_pages = pages_for(max_tokens, page_size)
        # one row more than requests: padding of a CUDA graph, always empty
        self.groups = [_GroupBlocks(g, page_size, num_rows + 1, self.max_pages) for g in groups]
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self.num_rows = num_rows
        self.prefix = PrefixCache()
        self._evicted: list[bytes] = []
        unwindowed = [g for g in self.groups if not g.shape.window]
        self._counted = (unwindowed or self.groups)[0].allocator
        """Of the group by which tokens are counted."""
        self._all_windowed = not unwindowed
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
        self.peak_tokens = max(self.peak_tokens, self.tokens)

    def reset_peak(self) -> None:
        self.peak_tokens = self.tokens

    @property
    def tokens(self) -> int:
        """Tokens that the running requests have pages for; those that several share count once."""
        if self._all_windowed:  # what windows have left behind has no pages any more
            return self._counted.num_used * self.page_size
        return self._total_tokens - self._counted.num_shares * self.page_size

    def can_admit(self, tokens: Sequence[int], reserve: int, chunk: CachedChunk | None = None) -> bool:
        """Whether every group g has pages for `tokens[g]` tokens of a new row, and `reserve` besides.

        The row is to begin with the prefix that ends with `chunk`, if any.
        """
        for index, (group, n) in enumerate(zip(self.groups, tokens, strict=True)):
            first, pages = group.shared(chunk, index) if chunk else (0, [])
            fresh = pages_for(n, self.page_size) - first - len(pages)
            woken = sum(not group.allocator.is_used(page) for page in pages)
            if fresh + woken + reserve > group.allocator.num_available:
                return False
        return True

    def adopt(self, row: int, chunk: CachedChunk) -> None:
        """Begin an empty row with the cached prefix that ends with `chunk`."""
        for index, group in enumerate(self.groups):
            group.adopt(row, *group.shared(chunk, index))
        self._count(row, chunk.end)
        self.prefix.touch(chunk)

    def keep(self, row: int, key: bytes, parent: CachedChunk | None, end: int, step: int) -> CachedChunk:
        """Keep a row's pages from the end of `parent` to `end` for other requests, under `key`."""
        columns = []
        start = parent.end // self.page_size if parent else 0
        for group in self.groups:
            first = group.first_visible(end) if group.shape.window else start
            pages = group.table[row, first : end // self.page_size].tolist()
            for page in pages:
                group.allocator.keep(page)
            columns.append((first, pages))
        chunk = CachedChunk(key, parent, end, columns, step)
        self.prefix.add(chunk)
        return chunk

    def evict(self) -> None:
        """Give up the cached chunk that was used least recently."""
        chunk = self.prefix.pop()
        self._evicted.append(chunk.key)
        for group, (_, pages) in zip(self.groups, chunk.columns, strict=True):
            for page in pages:
                group.allocator.drop(page)

    def take_evicted(self) -> list[bytes]:
        """The keys of the cached chunks that were given up since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def take_dirty(self) -> list[tuple[list[int], np.ndarray]]:
        """For each group, the rows of its table that changed since the last call, and copies of them."""
        changed = []
        for group in self.groups:
            rows = sorted(group.dirty)
            changed.append((rows, group.table[rows]))
            group.dirty.clear()
        return changed

    def _free_pages(self, group: _GroupBlocks, count: int) -> None:
        """See that `count` of the available pages are free, at the cost of cached chunks."""
        while group.allocator.num_free < count:
            self.evict()

    def extend(self, row: int, tokens: Sequence[int]) -> bool:
        """Give the row pages for `tokens[g]` tokens in every group g; False, and no change, if too few."""
        for group, n in zip(self.groups, tokens, strict=True):
            if group.missing(row, n) > group.allocator.num_available:
                return False
        for group, n in zip(self.groups, tokens, strict=True):
            self._free_pages(group, group.missing(row, n))
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
            max(count, pages_for(tokens, self.page_size) - first) <= g.allocator.num_available
            for g, (first, count) in zip(self.groups, held, strict=True)
        )

    def restore(self, row: int, held: Sequence[tuple[int, int]], tokens: int) -> None:
        """Give the row `count` pages from column `first` on, for each group's (first, count)."""
        for group, (first, count) in zip(self.groups, held, strict=True):
            self._free_pages(group, count)
            group.restore(row, first, first + count)
        self._count(row, tokens)

    def check(self) -> None:
        """Assert that no page is lost: what rows and cached chunks hold is exactly what is not free."""
        for index, group in enumerate(self.groups):
            rows = [
                group.table[row, group.first[row] : group.end[row]].tolist()
                for row in range(self.num_rows + 1)
            ]
            assert all(len(pages) == len(set(pages)) for pages in rows), "a row holds a page twice"
            users = Counter(page for pages in rows for page in pages)
            keepers = Counter(page for chunk in self.prefix for page in chunk.columns[index][1])
            group.allocator.check(users, keepers)
            assert int(np.count_nonzero(group.table)) == users.total(), "a stale block table entry"
