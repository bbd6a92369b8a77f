"""Which bytes of a receive region belong to which buffer: best fit, as the driver does it.

Theory of operation
-------------------
The region is tiled by buffers, linked in address order; each is free or allocated. Free ones also stand in a red-black
tree ordered by size. The driver takes the first exact match on the way down that tree, or else the smallest buffer
that is larger; of several with one size, which one it meets first depends on the *shape* of the tree. A client sees
the choice as an address, so the tree is balanced by the same textbook algorithm as the kernel's (insertion to the
right of equals, removal by successor).

Most regions have a single free buffer most of the time; the tree then is its root, and splitting or merging replaces it
without any balancing.

Sources: Linux 7.3 binder_alloc.c (`binder_alloc_new_buf_locked`, `binder_free_buf_locked`), lib/rbtree.c.

Invariants
----------
- Neighbours in `next`/`previous` touch: `buffer.offset + buffer.size == buffer.next.offset`.
- No two neighbours are both free.
- A buffer is in the tree if and only if it is free, and in `allocated` (by offset) if and only if it is not.
- `free_async_space` is half of the region less the sizes of the allocated asynchronous buffers.
- `pages[i]` is 0 (never touched), ACTIVE (under an allocated buffer) or LRU (present, unused).
"""

from __future__ import annotations

from errno import ENOSPC
from typing import TYPE_CHECKING, Final

from binderfs_fuse.engine.limits import Account
from binderfs_fuse.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from binderfs_fuse.engine.node import Node
    from binderfs_fuse.engine.objects import TranslatedObject
    from binderfs_fuse.engine.transaction import Transaction

PAGE_SIZE: Final = 4096
PAGE_SHIFT: Final = 12
_LIMIT: Final = Limits().buffers
ACTIVE: Final = 1
LRU: Final = 2
# What becomes of a page's state when a buffer comes or goes: one that was never touched stays so.
_TO_ACTIVE: Final = bytes([0, *[ACTIVE] * 255])
_TO_LRU: Final = bytes([0, *[LRU] * 255])
# And when pages are made present: those that are stay as they are.
_FROM_ABSENT: Final = bytes([ACTIVE, *range(1, 256)])


class Buffer:
    """A stretch of a region, allocated for one transaction or free (binder_alloc.h `struct binder_buffer`).

    `offset` and `size` are in bytes from the region's start; `data_size`, `offsets_size` and `extra_buffers_size` as
    the sender gave them. `pid` is the thread group of who sent it. A buffer that was merged into the free one before it
    has size 0, and that one still as `previous`.
    """

    __slots__ = (
        "allow_user_free",
        "async_transaction",
        "clear_on_free",
        "data_size",
        "debug_id",
        "extra_buffers_size",
        "fds",
        "free",
        "left",
        "next",
        "objects",
        "offset",
        "offsets_size",
        "oneway_spam_suspect",
        "parent",
        "pid",
        "previous",
        "records",
        "red",
        "right",
        "size",
        "target_node",
        "transaction",
    )

    def __init__(self, offset: int, size: int) -> None:
        self.offset = offset
        self.size = size
        self.previous: Buffer | None = None
        self.next: Buffer | None = None
        self.free = True
        self.allow_user_free = False
        self.async_transaction = False
        self.oneway_spam_suspect = False
        self.clear_on_free = False
        self.debug_id = 0
        self.records = 0
        self.data_size = 0
        self.offsets_size = 0
        self.extra_buffers_size = 0
        self.pid = 0
        self.transaction: Transaction | None = None
        self.target_node: Node | None = None
        self.objects: list[TranslatedObject] | None = None
        # The numbers of the descriptors that were installed with it, in the order of `Transaction.files`.
        self.fds: list[int] | None = None
        self.parent: Buffer | None = None
        self.left: Buffer | None = None
        self.right: Buffer | None = None
        self.red = False

    def is_large(self, chunk: int) -> bool:
        """Whether as many objects as go into a slice, or descriptors of theirs, are released with it; it has some."""
        assert self.objects is not None  # the caller has looked
        return len(self.objects) >= chunk or (self.fds is not None and len(self.fds) >= chunk)


class FreeTree:
    """Free buffers by size: a red-black tree of the kernel's shape (lib/rbtree.c)."""

    __slots__ = ("root",)

    def __init__(self) -> None:
        self.root: Buffer | None = None

    def best_fit(self, size: int) -> Buffer | None:
        """The buffer that the driver would take for `size` bytes, or None."""
        node = self.root
        best = None
        while node is not None:
            if size < node.size:
                best = node
                node = node.left
            elif size > node.size:
                node = node.right
            else:
                return node
        return best

    def insert(self, node: Buffer) -> None:
        """Add a free buffer; among equals it goes to the right."""
        node.left = node.right = None
        parent = None
        place = self.root
        size = node.size
        while place is not None:
            parent = place
            place = place.left if size < place.size else place.right
        node.parent = parent
        if parent is None:
            node.red = False
            self.root = node
            return
        node.red = True
        if size < parent.size:
            parent.left = node
        else:
            parent.right = node
        self._balance_insertion(node)

    def _balance_insertion(self, node: Buffer) -> None:
        parent = node.parent
        while True:
            if parent is None:
                node.red = False
                return
            if not parent.red:
                return
            grandparent = parent.parent
            assert grandparent is not None  # a red node is never the root
            on_left = parent is grandparent.left
            uncle = grandparent.right if on_left else grandparent.left
            if uncle is not None and uncle.red:
                uncle.red = parent.red = False
                grandparent.red = True
                node = grandparent
                parent = node.parent
                continue
            if on_left:
                if node is parent.right:
                    self._rotate_left(parent)
                    parent = node
                self._rotate_right(grandparent)
            else:
                if node is parent.left:
                    self._rotate_right(parent)
                    parent = node
                self._rotate_left(grandparent)
            parent.red = False
            grandparent.red = True
            return

    def _rotate_left(self, node: Buffer) -> None:
        pivot = node.right
        assert pivot is not None
        node.right = pivot.left
        if pivot.left is not None:
            pivot.left.parent = node
        self._replace(node, pivot)
        pivot.left = node
        node.parent = pivot

    def _rotate_right(self, node: Buffer) -> None:
        pivot = node.left
        assert pivot is not None
        node.left = pivot.right
        if pivot.right is not None:
            pivot.right.parent = node
        self._replace(node, pivot)
        pivot.right = node
        node.parent = pivot

    def _replace(self, old: Buffer, new: Buffer | None) -> None:
        """Put `new` where `old` hangs."""
        parent = old.parent
        if parent is None:
            self.root = new
        elif parent.left is old:
            parent.left = new
        else:
            parent.right = new
        if new is not None:
            new.parent = parent

    def remove(self, node: Buffer) -> None:
        """Take a buffer out; its place goes to its successor."""
        if node.left is None or node.right is None:
            child = node.right if node.left is None else node.left
            parent = node.parent
            removed_red = node.red
            self._replace(node, child)
        else:
            successor = node.right
            while successor.left is not None:
                successor = successor.left
            child = successor.right
            removed_red = successor.red
            if successor.parent is node:
                parent = successor
            else:
                parent = successor.parent
                self._replace(successor, child)
                successor.right = node.right
                successor.right.parent = successor
            self._replace(node, successor)
            successor.left = node.left
            successor.left.parent = successor
            successor.red = node.red
        node.parent = node.left = node.right = None
        if not removed_red:
            self._balance_removal(child, parent)

    def _balance_removal(self, node: Buffer | None, parent: Buffer | None) -> None:
        """`node` (perhaps a leaf, None) under `parent` is one black short."""
        while parent is not None and (node is None or not node.red):
            if node is parent.left:
                sibling = parent.right
                assert sibling is not None  # the other side has a black more
                if sibling.red:
                    sibling.red = False
                    parent.red = True
                    self._rotate_left(parent)
                    sibling = parent.right
                    assert sibling is not None
                near, far = sibling.left, sibling.right
                if (near is None or not near.red) and (far is None or not far.red):
                    sibling.red = True
                    node = parent
                    parent = node.parent
                    continue
                if far is None or not far.red:
                    assert near is not None
                    near.red = False
                    sibling.red = True
                    self._rotate_right(sibling)
                    sibling = near
                    far = sibling.right
                sibling.red = parent.red
                parent.red = False
                assert far is not None
                far.red = False
                self._rotate_left(parent)
                return
            sibling = parent.left
            assert sibling is not None
            if sibling.red:
                sibling.red = False
                parent.red = True
                self._rotate_right(parent)
                sibling = parent.left
                assert sibling is not None
            near, far = sibling.right, sibling.left
            if (near is None or not near.red) and (far is None or not far.red):
                sibling.red = True
                node = parent
                parent = node.parent
                continue
            if far is None or not far.red:
                assert near is not None
                near.red = False
                sibling.red = True
                self._rotate_left(sibling)
                sibling = near
                far = sibling.left
            sibling.red = parent.red
            parent.red = False
            assert far is not None
            far.red = False
            self._rotate_right(parent)
            return
        if node is not None:
            node.red = False

    def __iter__(self) -> Iterator[Buffer]:
        """Free buffers, the smallest first."""
        stack: list[Buffer] = []
        node = self.root
        while stack or node is not None:
            while node is not None:
                stack.append(node)
                node = node.left
            node = stack.pop()
            yield node
            node = node.right


class RangeAllocator:
    """The buffers of one region of `size` bytes (a multiple of the page size).

    They count as objects of `account`, as do the objects in them, and there are at most `limit` of them.
    """

    __slots__ = (
        "account",
        "allocated",
        "async_by_pid",
        "first",
        "free_async_space",
        "free_buffers",
        "limit",
        "oneway_spam_detected",
        "pages",
        "pages_high",
        "present",
        "records",
        "size",
    )

    def __init__(self, size: int, account: Account | None = None, limit: int = _LIMIT) -> None:
        self.account = account or Account()
        self.limit = limit
        # How many pages have been touched ever.
        self.present = 0
        # How many objects the buffers in use may hold.
        self.records = 0
        self.size = size
        self.pages = bytearray(size >> PAGE_SHIFT)
        self.pages_high = 0
        self.free_async_space = size // 2
        self.oneway_spam_detected = False
        self.allocated: dict[int, Buffer] = {}
        # Senders' processes: [count, bytes] of their asynchronous buffers here. The driver walks all buffers instead.
        self.async_by_pid: dict[int, list[int]] = {}
        self.first = Buffer(0, size)
        self.free_buffers = FreeTree()
        self.free_buffers.insert(self.first)

    def forget(self) -> None:
        """Let no buffer know of another one: nobody uses them any more, and without that they would never be freed."""
        buffer: Buffer | None = self.first
        while buffer is not None:
            following = buffer.next
            buffer.next = buffer.previous = buffer.left = buffer.right = buffer.parent = None
            buffer = following

    def allocate(self, size: int, pid: int, *, is_async: bool, records: int = 0) -> Buffer | int:
        """Take `size` bytes (a multiple of 8, not 0) for the process `pid`; -ENOSPC when nothing fits, or no more.

        The account counts the `records` of objects that the buffer is to hold. The caller has looked for room for them.
        An asynchronous buffer must also fit in the free asynchronous space. Newly covered pages that were never touched
        keep the state 0: the caller makes them present, then calls `installed`.
        """
        if (is_async and self.free_async_space < size) or len(self.allocated) >= self.limit:
            return -ENOSPC
        tree = self.free_buffers
        buffer = tree.best_fit(size)
        if buffer is None:
            return -ENOSPC
        whole = buffer.size
        if whole != size:
            rest = Buffer(buffer.offset + size, whole - size)
            buffer.size = size
            after = buffer.next
            rest.previous = buffer
            rest.next = after
            buffer.next = rest
            if after is not None:
                after.previous = rest
            if tree.root is buffer and buffer.left is None and buffer.right is None:
                tree.root = rest
            else:
                tree.insert(rest)
                tree.remove(buffer)
        else:
            tree.remove(buffer)
        # The pages that no neighbour in use shares with this buffer leave the LRU list.
        start = (buffer.offset + PAGE_SIZE - 1) >> PAGE_SHIFT
        end = min((buffer.offset + whole) >> PAGE_SHIFT, (buffer.offset + size + PAGE_SIZE - 1) >> PAGE_SHIFT)
        pages = self.pages
        if end - start == 1:
            if pages[start]:
                pages[start] = ACTIVE
            elif start >= self.pages_high:
                self.pages_high = end
        elif start < end:
            # By pieces, not page by page: 512 KiB are 128 of them.
            covered = pages[start:end]
            pages[start:end] = covered.translate(_TO_ACTIVE)
            untouched = covered.rfind(0)
            if untouched >= 0:
                self.pages_high = max(self.pages_high, start + untouched + 1)
        buffer.free = False
        buffer.allow_user_free = False
        buffer.async_transaction = is_async
        self.allocated[buffer.offset] = buffer
        self.account.objects += 1
        buffer.oneway_spam_suspect = False
        if is_async:
            self.free_async_space -= size
            buffer.oneway_spam_suspect = self._is_spam(buffer, pid)
            usage = self.async_by_pid.setdefault(pid, [0, 0])
            usage[0] += 1
            usage[1] += size
        buffer.pid = pid
        if records:
            buffer.records = records
            self.records += records
            self.account.objects += records
        return buffer

    def _is_spam(self, buffer: Buffer, pid: int) -> bool:
        """Whether this sender just became the suspect (binder_alloc.c `debug_low_async_space_locked`).

        The driver looks before it writes the sender's pid into the buffer: this one counts only if it was the same
        sender's when it was last in use.
        """
        if self.free_async_space >= self.size // 10:
            self.oneway_spam_detected = False
            return False
        count, total = self.async_by_pid.get(pid, (0, 0))
        if buffer.pid == pid:
            count += 1
            total += buffer.size
        if (count > 50 or total > self.size // 4) and not self.oneway_spam_detected:
            self.oneway_spam_detected = True
            return True
        return False

    def missing_pages(self, buffer: Buffer) -> tuple[int, int] | None:
        """The first and one past the last page under `buffer` that is not present yet, or None."""
        pages = self.pages
        start = buffer.offset >> PAGE_SHIFT
        end = (buffer.offset + buffer.size + PAGE_SIZE - 1) >> PAGE_SHIFT
        if end - start == 1:
            return None if pages[start] else (start, end)
        first = pages.find(0, start, end)
        if first < 0:
            return None
        return first, pages.rfind(0, start, end) + 1

    def installed(self, first: int, end: int) -> None:
        """Pages `first`..`end` are present now: those that were not become active."""
        pages = self.pages
        count = pages.count(0, first, end)
        pages[first:end] = pages[first:end].translate(_FROM_ABSENT)
        self.present += count
        self.account.pages += count

    def release(self, buffer: Buffer) -> None:
        """Give an allocated buffer back, merging it with free neighbours."""
        tree = self.free_buffers
        offset = buffer.offset
        size = buffer.size
        if buffer.async_transaction:
            self.free_async_space += size
            usage = self.async_by_pid[buffer.pid]
            usage[0] -= 1
            usage[1] -= size
            if not usage[0]:
                del self.async_by_pid[buffer.pid]
        self._to_lru((offset + PAGE_SIZE - 1) >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT)
        del self.allocated[offset]
        self.account.objects -= 1
        if buffer.records:
            self.account.objects -= buffer.records
            self.records -= buffer.records
            buffer.records = 0
        buffer.free = True
        buffer.target_node = None
        buffer.objects = None
        buffer.fds = None
        following = buffer.next
        if following is not None and following.free:
            tree.remove(following)
            self._unlink(following)
        previous = buffer.previous
        if previous is not None and previous.free:
            self._unlink(buffer)
            tree.remove(previous)
            buffer = previous
        tree.insert(buffer)

    def _unlink(self, buffer: Buffer) -> None:
        """Merge a free buffer into the free one before it (binder_alloc.c `binder_delete_free_buffer`)."""
        previous = buffer.previous
        following = buffer.next
        assert previous is not None  # only a buffer with a free one before it is merged
        start = buffer.offset >> PAGE_SHIFT
        # The page in which the merged buffer starts is unused now, unless a buffer in use reaches into it.
        if (
            buffer.offset & (PAGE_SIZE - 1)
            and (previous.offset - 1) >> PAGE_SHIFT != start
            and (following is None or following.offset >> PAGE_SHIFT != start)
        ):
            self._to_lru(start, start + 1)
        previous.size += buffer.size
        previous.next = following
        if following is not None:
            following.previous = previous
        # Whoever walks the buffers and stands at this one finds the way on by `previous`.
        buffer.next = None
        buffer.size = 0

    def _to_lru(self, start: int, end: int) -> None:
        pages = self.pages
        if end - start == 1:
            if pages[start]:
                pages[start] = LRU
        elif start < end:
            pages[start:end] = pages[start:end].translate(_TO_LRU)

    def page_counts(self) -> tuple[int, int, int]:
        """Numbers of active, unused but present, and never touched pages."""
        active = self.pages.count(ACTIVE)
        unused = self.pages.count(LRU)
        return active, unused, len(self.pages) - active - unused
