import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from binderfs_fuse.host import memory

PAGE = mmap.PAGESIZE

# Maps two pages, the second one unreadable, and a third that is read-only; says where, and waits.
_OTHER = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None)
pages = mmap.mmap(-1, 3 * mmap.PAGESIZE)
pages[:4] = b"text"
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
libc.mprotect(ctypes.c_void_p(start + mmap.PAGESIZE), mmap.PAGESIZE, 0)
libc.mprotect(ctypes.c_void_p(start + 2 * mmap.PAGESIZE), mmap.PAGESIZE, mmap.PROT_READ)
print(start, flush=True)
while line := sys.stdin.readline():
    offset, size = map(int, line.split())
    print(ctypes.string_at(start + offset, size).hex(), flush=True)
"""


@dataclass
class Other:
    """Another process and its pages."""

    process: subprocess.Popen[str]
    start: int

    def see(self, offset: int, size: int) -> bytes:
        """Return what it has there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{offset} {size}\n")
        self.process.stdin.flush()
        return bytes.fromhex(self.process.stdout.readline())


@pytest.fixture
def other() -> Iterator[Other]:
    """Another process."""
    with subprocess.Popen(
        [sys.executable, "-c", _OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield Other(process, int(process.stdout.readline()))
        process.kill()


def test_memory_is_read(other: Other) -> None:
    """Bytes of another process are what it has there."""
    assert memory.read(other.process.pid, other.start, 6) == b"text\0\0"


def test_memory_is_written(other: Other) -> None:
    """Another process finds what was stored."""
    assert memory.write(other.process.pid, other.start + 10, b"more") == 4
    assert other.see(8, 8) == b"\0\0more\0\0"


def test_a_read_ends_at_the_first_fault(other: Other) -> None:
    """A read that runs into a page which is not readable gives what is before it."""
    assert PAGE - 16 == len(memory.read(other.process.pid, other.start + 16, 2 * PAGE))


def test_a_write_ends_at_the_first_fault(other: Other) -> None:
    """A write that runs into a page which is not writable stores what is before it, and says how much."""
    assert memory.write(other.process.pid, other.start + PAGE - 3, b"abcdef") == 3
    assert other.see(PAGE - 3, 3) == b"abc"


@pytest.mark.parametrize("offset", [PAGE, 64 << 20, -(1 << 40)])
def test_nothing_is_read_where_nothing_is(other: Other, offset: int) -> None:
    """Where nothing is readable there are no bytes, and nothing can be stored."""
    address = (other.start + offset) % (1 << 64)

    assert memory.read(other.process.pid, address, 8) == b""
    assert memory.write(other.process.pid, address, b"x") == 0


def test_what_is_read_only_is_not_written(other: Other) -> None:
    """A page that its process may not write to is not written to."""
    assert memory.write(other.process.pid, other.start + 2 * PAGE, b"x") == 0
    assert other.see(2 * PAGE, 1) == b"\0"


def test_addresses_at_the_end_of_all(other: Other) -> None:
    """An address and a size that wrap around are a fault."""
    assert memory.read(other.process.pid, (1 << 64) - 4, 8) == b""
    assert memory.write(other.process.pid, (1 << 64) - 4, b"12345678") == 0


def test_a_task_that_is_gone_has_no_memory(other: Other) -> None:
    """A task that has ended is a fault like any other."""
    other.process.kill()
    other.process.wait()

    assert memory.read(other.process.pid, other.start, 4) == b""


def test_a_thread_has_the_memory_of_its_process() -> None:
    """The number of a thread that is not the first one stands for its process."""
    text = ctypes.create_string_buffer(b"here")

    assert memory.read(os.getpid(), ctypes.addressof(text), 4) == b"here"
