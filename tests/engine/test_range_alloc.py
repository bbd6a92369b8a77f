"""Which bytes a buffer gets: best fit, merging, pages, asynchronous space, and the shape of the free tree."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from binderfs_fuse.engine.invariants import check_allocator
from binderfs_fuse.engine.range_alloc import ACTIVE, LRU, PAGE_SIZE, Buffer, FreeTree, RangeAllocator

if TYPE_CHECKING:
    from collections.abc import Iterator

_MASK64 = (1 << 64) - 1

# Digests of the shape of the kernel's own tree (lib/rbtree.c) after each 500 operations of `_operations`.
_KERNEL_SHAPES = [
    0xCC01B6570EF57104,
    0x40A2DD9EE42B4833,
    0x0BFBD95554E12099,
    0x28B310DC388A3413,
    0x1F1D69C2C8D1F5D4,
    0xBF5A18DA92CFFB6D,
]


def take(allocation: RangeAllocator, size: int, pid: int = 1, *, is_async: bool = False) -> Buffer:
    """Allocate a buffer, and make its pages present."""
    buffer = allocation.allocate(size, pid, is_async=is_async)
    assert isinstance(buffer, Buffer)
    missing = allocation.missing_pages(buffer)
    if missing is not None:
        allocation.installed(*missing)
    check_allocator(allocation)
    return buffer


def release(allocation: RangeAllocator, *buffers: Buffer) -> None:
    """Give buffers back."""
    for buffer in buffers:
        allocation.release(buffer)
        check_allocator(allocation)


def test_a_new_region_is_one_free_buffer() -> None:
    """Everything is free, half of it for asynchronous calls, and no page has been touched."""
    allocation = RangeAllocator(4 * PAGE_SIZE)
    check_allocator(allocation)

    assert [(0, 4 * PAGE_SIZE)] == [(buffer.offset, buffer.size) for buffer in allocation.free_buffers]
    assert 2 * PAGE_SIZE == allocation.free_async_space
    assert (0, 0, 4) == allocation.page_counts()
    assert 0 == allocation.pages_high


def test_buffers_follow_each_other() -> None:
    """Without holes, each buffer begins where the one before ends."""
    allocation = RangeAllocator(PAGE_SIZE)

    assert [0, 8, 32] == [take(allocation, size).offset for size in (8, 24, 16)]


def test_the_whole_region_is_one_buffer() -> None:
    """A request for all bytes leaves nothing free, and the next one fails."""
    allocation = RangeAllocator(PAGE_SIZE)
    buffer = take(allocation, PAGE_SIZE)

    assert PAGE_SIZE == buffer.size
    assert [] == list(allocation.free_buffers)
    assert -errno.ENOSPC == allocation.allocate(8, 1, is_async=False)


def test_more_than_the_largest_hole_fails() -> None:
    """What is free in pieces does not help."""
    allocation = RangeAllocator(PAGE_SIZE)
    take(allocation, 1024)
    middle = take(allocation, 1024)
    take(allocation, 1024)
    release(allocation, middle)

    assert -errno.ENOSPC == allocation.allocate(1032, 1, is_async=False)


def test_the_smallest_hole_that_fits_is_taken() -> None:
    """Of holes of 64, 32, 128 bytes and the rest, 24 bytes go to the one of 32."""
    allocation = RangeAllocator(PAGE_SIZE)
    holes = []
    for size in (64, 32, 128):
        holes.append(take(allocation, size))
        take(allocation, 8)
    release(allocation, *holes)

    assert holes[1].offset == take(allocation, 24).offset
    assert holes[0].offset == take(allocation, 40).offset
    assert holes[2].offset == take(allocation, 72).offset


def test_an_exact_fit_is_not_split() -> None:
    """A hole of just the size asked for is taken whole."""
    allocation = RangeAllocator(PAGE_SIZE)
    hole = take(allocation, 64)
    after = take(allocation, 8)
    release(allocation, hole)
    buffer = take(allocation, 64)

    assert (0, 64) == (buffer.offset, buffer.size)
    assert after is buffer.next


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_free_neighbours_merge(order: tuple[int, ...]) -> None:
    """In whatever order three neighbours are freed, one hole is left."""
    allocation = RangeAllocator(PAGE_SIZE)
    buffers = [take(allocation, 64) for _ in range(3)]
    release(allocation, *(buffers[index] for index in order))

    assert [(0, PAGE_SIZE)] == [(buffer.offset, buffer.size) for buffer in allocation.free_buffers]


def test_a_buffer_forgets_what_it_held() -> None:
    """A freed buffer has no node, objects or descriptors any more; a new one may not be freed by its receiver yet."""
    allocation = RangeAllocator(PAGE_SIZE)
    buffer = take(allocation, 64)
    buffer.objects = []
    buffer.fds = [3]
    buffer.allow_user_free = True
    buffer.oneway_spam_suspect = True
    release(allocation, buffer)

    assert [None, None, None] == [buffer.target_node, buffer.objects, buffer.fds]
    again = take(allocation, 64)
    assert again is buffer
    assert not again.allow_user_free
    assert not again.oneway_spam_suspect


# -- asynchronous space


def test_asynchronous_buffers_have_half_of_the_region() -> None:
    """The last byte of the half can be had, not one more; synchronous calls may use what is left."""
    allocation = RangeAllocator(PAGE_SIZE)
    take(allocation, 2048, is_async=True)

    assert 0 == allocation.free_async_space
    assert -errno.ENOSPC == allocation.allocate(8, 1, is_async=True)
    assert 2048 == take(allocation, 2048).size


def test_asynchronous_space_comes_back() -> None:
    """Freeing an asynchronous buffer gives its space back; freeing a synchronous one does not add to it."""
    allocation = RangeAllocator(PAGE_SIZE)
    synchronous = take(allocation, 64)
    asynchronous = take(allocation, 64, is_async=True)
    other = take(allocation, 128, is_async=True)
    release(allocation, synchronous)
    assert 2048 - 192 == allocation.free_async_space
    release(allocation, asynchronous)

    assert 2048 - 128 == allocation.free_async_space
    assert {1: [1, 128]} == allocation.async_by_pid
    release(allocation, other)
    assert {} == allocation.async_by_pid


def test_a_sender_of_many_is_suspected_once() -> None:
    """With less than a tenth free, a sender that has more than 50 buffers is suspected, until there is space again."""
    allocation = RangeAllocator(10 * PAGE_SIZE)
    other = take(allocation, 5 * PAGE_SIZE - PAGE_SIZE, pid=2, is_async=True)
    buffers = [take(allocation, 8, pid=1, is_async=True) for _ in range(51)]
    assert not any(buffer.oneway_spam_suspect for buffer in buffers)

    assert take(allocation, 8, pid=1, is_async=True).oneway_spam_suspect
    assert not take(allocation, 8, pid=1, is_async=True).oneway_spam_suspect
    release(allocation, other)
    take(allocation, 8, pid=1, is_async=True)
    take(allocation, 5 * PAGE_SIZE - PAGE_SIZE, pid=2, is_async=True)
    assert take(allocation, 8, pid=1, is_async=True).oneway_spam_suspect


def test_a_sender_of_much_is_suspected() -> None:
    """With less than a tenth free, a sender that has more than a quarter of the region already is suspected."""
    allocation = RangeAllocator(10 * PAGE_SIZE)
    quarter = 10 * PAGE_SIZE // 4
    take(allocation, quarter, pid=1, is_async=True)
    take(allocation, 5 * PAGE_SIZE - quarter - PAGE_SIZE, pid=2, is_async=True)

    assert not take(allocation, 16, pid=1, is_async=True).oneway_spam_suspect
    assert take(allocation, 16, pid=1, is_async=True).oneway_spam_suspect


def test_nobody_is_suspected_while_a_tenth_is_free() -> None:
    """Just a tenth of the region free for asynchronous calls is enough, eight bytes less is not."""
    allocation = RangeAllocator(10 * PAGE_SIZE)
    take(allocation, 3 * PAGE_SIZE, pid=1, is_async=True)

    assert not take(allocation, PAGE_SIZE, pid=1, is_async=True).oneway_spam_suspect
    assert PAGE_SIZE == allocation.free_async_space
    assert take(allocation, 8, pid=1, is_async=True).oneway_spam_suspect


def test_a_buffer_counts_for_who_had_it_last() -> None:
    """A fresh buffer does not count for its sender yet, a used one for its last sender (the driver looks too early)."""
    allocation = RangeAllocator(10 * PAGE_SIZE)
    used = take(allocation, 4 * PAGE_SIZE + 8, pid=1)
    take(allocation, 8)
    release(allocation, used)
    again = allocation.allocate(4 * PAGE_SIZE + 8, 1, is_async=True)
    fresh = RangeAllocator(10 * PAGE_SIZE).allocate(4 * PAGE_SIZE + 8, 1, is_async=True)

    assert isinstance(again, Buffer)
    assert again.oneway_spam_suspect
    assert isinstance(fresh, Buffer)
    assert not fresh.oneway_spam_suspect


# -- pages


def test_pages_are_missing_until_installed() -> None:
    """A buffer names the first and one past the last page to make present; then it needs none."""
    allocation = RangeAllocator(8 * PAGE_SIZE)
    take(allocation, PAGE_SIZE + 8)
    buffer = allocation.allocate(2 * PAGE_SIZE, 1, is_async=False)
    assert isinstance(buffer, Buffer)
    assert (2, 4) == allocation.missing_pages(buffer)
    allocation.installed(2, 4)

    assert allocation.missing_pages(buffer) is None
    assert (4, 0, 4) == allocation.page_counts()
    assert 4 == allocation.pages_high


def test_missing_pages_go_to_the_last_one() -> None:
    """Pages that are present in the middle are named along with those around them."""
    allocation = RangeAllocator(4 * PAGE_SIZE)
    first = take(allocation, PAGE_SIZE)
    second = take(allocation, PAGE_SIZE)
    release(allocation, first, second)
    allocation.pages[0] = 0
    buffer = allocation.allocate(3 * PAGE_SIZE, 1, is_async=False)
    assert isinstance(buffer, Buffer)

    assert (0, 3) == allocation.missing_pages(buffer)
    allocation.installed(0, 3)
    assert [ACTIVE, ACTIVE, ACTIVE, 0] == list(allocation.pages)


def test_unused_pages_stay_present() -> None:
    """Pages of a freed buffer are kept, and used again without being made present."""
    allocation = RangeAllocator(4 * PAGE_SIZE)
    buffer = take(allocation, 2 * PAGE_SIZE)
    release(allocation, buffer)
    assert (0, 2, 2) == allocation.page_counts()

    again = allocation.allocate(PAGE_SIZE + 8, 1, is_async=False)
    assert isinstance(again, Buffer)
    assert allocation.missing_pages(again) is None
    assert [ACTIVE, ACTIVE, 0, 0] == list(allocation.pages)
    assert 2 == allocation.pages_high


def test_a_shared_page_is_in_use_until_the_last_buffer_goes() -> None:
    """A page that two buffers share is unused only when both are freed, in either order."""
    for order in ((0, 1), (1, 0)):
        allocation = RangeAllocator(4 * PAGE_SIZE)
        buffers = [take(allocation, PAGE_SIZE + 64), take(allocation, 64)]
        release(allocation, buffers[order[0]])
        assert ACTIVE == allocation.pages[1]
        release(allocation, buffers[order[1]])

        assert [LRU, LRU, 0, 0] == list(allocation.pages)


def test_the_high_watermark_stays() -> None:
    """The watermark is one past the highest page that was ever used."""
    allocation = RangeAllocator(4 * PAGE_SIZE)
    first = take(allocation, 2 * PAGE_SIZE)
    second = take(allocation, 8)
    release(allocation, first, second)
    take(allocation, 8)

    assert 3 == allocation.pages_high


def test_pages_that_could_not_be_had_stay_missing() -> None:
    """A buffer that is given back because its pages could not be made present leaves them as they were."""
    allocation = RangeAllocator(4 * PAGE_SIZE)
    buffer = allocation.allocate(2 * PAGE_SIZE, 1, is_async=False)
    assert isinstance(buffer, Buffer)
    release(allocation, buffer)

    assert [0, 0, 0, 0] == list(allocation.pages)
    assert 2 == allocation.pages_high


# -- against models


@given(
    pages=st.integers(1, 6),
    choices=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2 * PAGE_SIZE // 8), st.booleans()), max_size=60),
)
def test_allocator_against_a_list(pages: int, choices: list[tuple[int, int, bool]]) -> None:
    """Whatever is taken and freed, buffers are where a plain list of intervals says that they may be."""
    size = pages * PAGE_SIZE
    allocation = RangeAllocator(size)
    taken: list[Buffer] = []
    high = 0
    touched: set[int] = set()
    for kind, units, is_async in choices:
        if kind == 0 and taken:
            release(allocation, taken.pop(units % len(taken)))
            continue
        wanted = 8 * units
        holes = _holes(size, taken)
        fitting = [hole for hole in holes if hole[1] >= wanted]
        space = size // 2 - sum(buffer.size for buffer in taken if buffer.async_transaction)
        buffer = allocation.allocate(wanted, 1 + units % 3, is_async=is_async)
        if not fitting or (is_async and space < wanted):
            assert -errno.ENOSPC == buffer
            continue
        assert isinstance(buffer, Buffer)
        assert (buffer.offset, min(length for _, length in fitting)) in fitting
        assert wanted == buffer.size
        under = set(range(buffer.offset // PAGE_SIZE, (buffer.offset + wanted - 1) // PAGE_SIZE + 1))
        missing = allocation.missing_pages(buffer)
        new = sorted(under - touched)
        assert ((new[0], new[-1] + 1) if new else None) == missing
        if missing is not None:
            allocation.installed(*missing)
        touched |= under
        high = max(high, max(under) + 1)
        taken.append(buffer)
        check_allocator(allocation)
        assert high == allocation.pages_high
    release(allocation, *taken)
    assert (0, len(touched), pages - len(touched)) == allocation.page_counts()


def _holes(size: int, taken: list[Buffer]) -> list[tuple[int, int]]:
    """Offsets and sizes of what is free between buffers."""
    holes = []
    end = 0
    for buffer in sorted(taken, key=lambda buffer: buffer.offset):
        if buffer.offset > end:
            holes.append((end, buffer.offset - end))
        end = buffer.offset + buffer.size
    if end < size:
        holes.append((end, size - end))
    return holes


def _operations(count: int) -> Iterator[tuple[bool, int]]:
    """Make up insertions (of a key of 16) and removals (of one of those there) in an order that never changes."""
    state = 1
    living = 0
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) & _MASK64
        number = state >> 33
        insert = not living or (living < 60 and number % 2 == 0)
        living += 1 if insert else -1
        yield insert, number >> 8


def test_the_tree_has_the_kernels_shape() -> None:
    """After any operation the tree is, node by node and colour by colour, what lib/rbtree.c makes of the same."""
    tree = FreeTree()
    living: list[Buffer] = []
    number = 0
    digest = 14695981039346656037
    shapes = []

    def mix(value: int) -> None:
        nonlocal digest
        for byte in value.to_bytes(4, "little"):
            digest = (digest ^ byte) * 1099511628211 & _MASK64

    def walk(node: Buffer | None) -> None:
        if node is None:
            mix(0xFFFF_FFFF)
            return
        mix(node.offset * 2 + node.red)
        walk(node.left)
        walk(node.right)

    for step, (insert, value) in enumerate(_operations(3000), 1):
        if insert:
            buffer = Buffer(number, value % 16)
            number += 1
            tree.insert(buffer)
            living.append(buffer)
        else:
            index = value % len(living)
            tree.remove(living[index])
            living[index] = living[-1]
            living.pop()
        walk(tree.root)
        if step % 500 == 0:
            shapes.append(digest)

    assert _KERNEL_SHAPES == shapes


@given(st.lists(st.integers(1, 8)), st.integers(0, 9))
def test_the_best_fit_is_the_smallest_that_is_large_enough(sizes: list[int], wanted: int) -> None:
    """Among free buffers of any sizes the smallest sufficient one is found, or none."""
    tree = FreeTree()
    for index, size in enumerate(sizes):
        tree.insert(Buffer(index, size))
    found = tree.best_fit(wanted)

    assert min((size for size in sizes if size >= wanted), default=None) == (found.size if found else None)


def test_of_equals_the_first_on_the_way_down_is_taken() -> None:
    """Three holes of one size stand with the second on top: it is the one that the driver meets first."""
    tree = FreeTree()
    buffers = [Buffer(index, 8) for index in range(3)]
    for buffer in buffers:
        tree.insert(buffer)

    assert buffers[1] is tree.best_fit(8)
    assert buffers[0] is tree.best_fit(1)
