"""The allocator and the block tables."""

import random

import pytest

from kvq_core.cache.blocks import BlockAllocator, BlockManager, GroupShape


def test_pages_are_handed_out_once_and_page_0_never() -> None:
    allocator = BlockAllocator(9)
    pages = [allocator.allocate() for _ in range(8)]
    assert sorted(pages) == list(range(1, 9))
    with pytest.raises(IndexError):
        allocator.allocate()


def test_a_page_freed_twice_is_an_error() -> None:
    allocator = BlockAllocator(4)
    page = allocator.allocate()
    allocator.free(page)
    with pytest.raises(KeyError):
        allocator.free(page)


def test_extend_is_all_or_nothing() -> None:
    blocks = BlockManager([GroupShape(0, 10, 1), GroupShape(32, 3, 1)], 16, num_rows=2, max_tokens=160)
    row = blocks.take_row()
    assert not blocks.extend(row, [33, 33])  # the second group has 2 pages, and 3 are asked for
    assert [g.allocator.num_used for g in blocks.groups] == [0, 0]
    assert blocks.extend(row, [33, 32])
    assert [g.allocator.num_used for g in blocks.groups] == [3, 2]


def test_a_window_frees_the_pages_behind_it() -> None:
    blocks = BlockManager([GroupShape(20, 9, 1)], 16, num_rows=1, max_tokens=160)
    row = blocks.take_row()
    blocks.extend(row, [64])
    blocks.trim(row, 35)  # a query at 35 sees 16 … 35
    assert blocks.held(row)[0][0] == 1
    blocks.trim(row, 34)  # never goes back
    assert blocks.held(row)[0][0] == 1
    blocks.trim(row, 51)  # sees 32 … 51
    assert blocks.held(row)[0][0] == 2
    blocks.check()
    blocks.release(row)
    assert blocks.groups[0].allocator.num_used == 0


@pytest.mark.parametrize("seed", range(3))
def test_no_page_is_lost_or_held_twice_in_a_random_trace_of_100_000_operations(seed: int) -> None:
    rng = random.Random(seed)
    blocks = BlockManager([GroupShape(0, 40, 1), GroupShape(24, 25, 1)], 16, num_rows=6, max_tokens=256)
    lengths: dict[int, int] = {}
    for i in range(100_000):
        action = rng.random()
        if action < 0.15 and blocks.has_free_row:
            lengths[blocks.take_row()] = 0
        elif lengths:
            row = rng.choice(list(lengths))
            if action < 0.75:
                n = min(256, lengths[row] + rng.choice((1, 1, 1, 15, 16, 17, 60)))
                blocks.trim(row, lengths[row])
                if blocks.extend(row, [n, n]):
                    lengths[row] = n
            else:
                blocks.release(row)
                del lengths[row]
        if i % 10 == 0:
            blocks.check()
        assert blocks.tokens == sum(lengths.values())
    for row in lengths:
        blocks.release(row)
    blocks.check()
    assert all(g.allocator.num_used == 0 for g in blocks.groups)
