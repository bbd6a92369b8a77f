"""Receive regions: the pages that the mmap of one open shows to its client.

Theory of operation
-------------------
A region is a memfd that the server maps shared and writable. How its pages come into the client's address space is the
region's `kind`:

- *passthrough*: the memfd is the backing file of the open (FUSE_DEV_IOC_BACKING_OPEN), so the client's mmap maps the
  same pages. What is stored here is there at once.
- *page cache*: the client's mmap maps pages that belong to the kernel's FUSE. `publish` puts ours over them
  (FUSE_NOTIFY_STORE), in whole pages, since a part of one would not make a page valid that is not yet there; and what
  the client touches before, or after the kernel has dropped it, the kernel asks for with READ, answered by `read`.

A page is stored from this very mapping while the kernel has it locked, so two stores of one page cannot leave the older
contents, and a READ of the page in flight is over before.

The descriptor is of use until the open has been answered. After that the mapping, and the kernel's backing file, keep
the memfd alive; the mapping goes with the last reference to the `Region`: an effect that copies into a region holds
one, so the memory cannot go away under it.

The end of the last reference only notes that a region is to be unmapped; `unmap_released` does it. For it may come in
compiled code that replaces one value by another: mypyc lets go of the old one before it stores the new one, and were a
destructor to let other threads run then, as every call of C and all Python code does, they would find what is gone.

Invariants
----------
- The memfd keeps its size and its pages: it is sealed, so nobody can truncate it or punch holes. A page once populated
  stays, and touching it cannot fail.
- Nothing here reads a region but `read`, for the client whose region it is.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse._system import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE: Final = 4 << 20
"""Bytes of a region: the driver uses no more of a mapping, whatever its size."""
_PAGE: Final = os.sysconf("SC_PAGESIZE")
_released: Final[deque[Any]] = deque()
_allows: Callable[[int], bool] = bool  # as many as there are


class Kind(enum.Enum):
    """How a region's pages get into the client's address space."""

    PASSTHROUGH = "passthrough"
    PAGE_CACHE = "pagecache"


class Region:
    """The `SIZE` bytes of one open; see the module for `kind`, which is settled when the open is answered.

    `memory` is where they are mapped here, for `lib`.

    Raises `OSError` (EMFILE, ENFILE, ENOMEM) when there is no room for another.
    """

    __slots__ = ("__weakref__", "_bytes", "fd", "kind", "memory", "nodeid")

    def __init__(self, nodeid: int, kind: Kind) -> None:
        unmap_released()
        self.nodeid = nodeid
        self.kind = kind
        self.fd: int = lib.region_create(SIZE)
        if self.fd < 0:
            raise OSError(-self.fd, os.strerror(-self.fd))
        memory = lib.region_map(self.fd, SIZE)
        if memory == ffi.NULL:
            number = ffi.errno
            self.close_descriptor()
            raise OSError(number, os.strerror(number))
        self.memory: Any = ffi.gc(memory, _released.append)
        self._bytes: Any = ffi.buffer(self.memory, SIZE)

    def close_descriptor(self) -> None:
        """Let go of the memfd's descriptor; the pages stay."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def store(self, offset: int, data: bytes | bytearray) -> None:
        """Put `data` at `offset`. The pages are present: touching others could end the server for lack of memory."""
        self._bytes[offset : offset + len(data)] = data

    def copy_from(self, tid: int, address: int, size: int, offset: int) -> int:
        """Copy `size` bytes at `address` of a task to `offset`, once. Return how many, up to the first fault."""
        done: int = lib.memory_read(tid, address, self.memory + offset, size)
        return max(done, 0)

    def populate(self, offset: int, size: int) -> int:
        """Make the pages of `size` bytes at `offset` present. Return 0 or a negative errno (-ENOMEM).

        They are charged to this process, whom the kernel kills where they are too many: so that is asked before.
        """
        if not _allows(size):
            return -errno.ENOMEM
        error: int = lib.region_populate(self.memory + offset, size)
        return error

    def read(self, offset: int, size: int) -> bytes:
        """Return what the client is to see at `offset`; past the end there is nothing."""
        data: bytes = self._bytes[offset : offset + size]
        return data

    def publish(self, channel: Any, offset: int, size: int) -> int:
        """Put the whole pages of `size` bytes at `offset` into the page cache. Return 0 or a negative errno.

        -ENOENT: nobody knows the inode any more. May wait for a READ of the same page to be answered.
        """
        start = offset & -_PAGE
        end = offset + size + _PAGE - 1 & -_PAGE
        error: int = lib.channel_notify_store(channel, self.nodeid, start, self.memory + start, end - start)
        return error


def allow_pages(allows: Callable[[int], bool]) -> None:
    """Have `allows` asked before pages are made present: whether there may be so many bytes more."""
    global _allows  # noqa: PLW0603 - a process has one memory
    _allows = allows


def unmap_released() -> None:
    """Unmap the regions that nobody refers to any more."""
    while _released:
        # Another thread may be at it, too.
        with contextlib.suppress(IndexError):
            lib.region_unmap(_released.popleft(), SIZE)


def has_released() -> bool:
    """Tell whether there is something for `unmap_released` to do."""
    return bool(_released)
