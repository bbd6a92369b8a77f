"""The memory of other tasks (process_vm_readv(2), process_vm_writev(2)).

Either call can take as long as the task's owner likes: its memory may be served by userfaultfd or by a FUSE file
system, this one included. So no lock may be held around one.

Invariant: a task's memory is touched only while one of its requests is unanswered, for that is what keeps its thread id
from being used again.
"""

from __future__ import annotations

from binderfs_fuse._system import ffi, lib


def read(tid: int, address: int, size: int) -> bytes:
    """Return the bytes at `address` of task `tid`, up to the first page that cannot be read; b"" if there are none."""
    buffer = bytearray(size)
    done: int = lib.memory_read(tid, address, ffi.from_buffer(buffer), size)
    return bytes(buffer) if done == size else bytes(buffer[: max(done, 0)])


def write(tid: int, address: int, data: bytes) -> int:
    """Store bytes at `address` of task `tid`; return how many, up to the first page that cannot be written."""
    done: int = lib.memory_write(tid, address, data, len(data))
    return max(done, 0)
