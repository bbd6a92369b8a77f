"""What the commands ask of a server: ioctls of binder-control that the kernel's does not have.

They go where the mount goes, need no socket beside it, and are open to whoever may open binder-control:

- `QUERY` reads a named text (`Control.texts`), a part at a time, from a snapshot that the first part takes.
- `RECONFIGURE` is ``mount -o remount``; root's and the server's own user's only, like
- `BEGIN_ANEW`, which makes a mount that nobody uses as if nobody ever had: ``mount.py`` tries the devices, and that is
  not to show in the statistics.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

from binderfs_fuse.engine.stats import Stats
from binderfs_fuse.host import procfs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from binderfs_fuse.engine.context import Engine, Task
    from binderfs_fuse.fuse.inodes import ControlOpen, Inodes

CONTROL: Final = "binder-control"
# What stands under the name in a mount of somebody else's may be a link, a terminal, or a pipe that nobody writes to.
_OPENING: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

_QUERY: Final = struct.Struct("=32sQQ8000s")
"""Name, offset, whole size (out), and the text from the offset on (out), as far as it fits."""
_PART: Final = 8000
_MOST: Final = 64 << 20
"""Bytes of the longest text that a command takes."""
_RECONFIGURE: Final = struct.Struct("=III")
"""The most devices, whether there are logs, and whether it is read-only."""


def _command(number: int, layout: struct.Struct) -> int:
    """Return the ioctl number that <asm-generic/ioctl.h> calls _IOWR('b', number, layout)."""
    return 3 << 30 | layout.size << 16 | ord("b") << 8 | number


QUERY: Final = _command(0x70, _QUERY)
RECONFIGURE: Final = _command(0x71, _RECONFIGURE)
BEGIN_ANEW: Final = _command(0x72, _RECONFIGURE)


class Control:
    """The server's side. `texts` are what QUERY can ask for, by name."""

    def __init__(self, inodes: Inodes, engine: Engine, texts: dict[str, Callable[[], bytes]]) -> None:
        self._inodes = inodes
        self._engine = engine
        self._texts = texts
        inodes.controls[QUERY] = self._query
        inodes.controls[RECONFIGURE] = self._reconfigure
        inodes.controls[BEGIN_ANEW] = self._begin_anew

    def _query(self, opened: ControlOpen, _task: Task, argument: bytes) -> tuple[int, bytes]:
        """Return a part of a text. ENOENT: there is none of that name."""
        name, offset, _, _ = _QUERY.unpack(argument)
        if not offset:
            text = self._texts.get(name.rstrip(b"\0").decode(errors="replace"))
            if text is None:
                return -errno.ENOENT, b""
            opened.snapshot = text()
        size = len(opened.snapshot)
        part = opened.snapshot[offset : offset + _PART]
        if offset + _PART >= size:
            opened.snapshot = b""
        return 0, _QUERY.pack(name, offset, size, part)

    def _reconfigure(self, _opened: ControlOpen, task: Task, argument: bytes) -> tuple[int, bytes]:
        """Set what ``max=`` and ``ro`` set. EPERM: for somebody else. EINVAL, EBUSY: as `Inodes.reconfigure`."""
        if task.euid not in (0, os.geteuid()):
            return -errno.EPERM, b""
        maximum, stats, read_only = _RECONFIGURE.unpack(argument)
        return self._inodes.reconfigure(maximum, stats=bool(stats), read_only=bool(read_only)), b""

    def _begin_anew(self, _opened: ControlOpen, task: Task, _argument: bytes) -> tuple[int, bytes]:
        """Set all counters back. EPERM: for somebody else. EBUSY: somebody has a device open."""
        if task.euid not in (0, os.geteuid()):
            return -errno.EPERM, b""
        with self._engine.lock:
            if self._engine.processes:
                return -errno.EBUSY, b""
            self._engine.stats = Stats()
        return 0, b""


def query(mountpoint: Path, name: str, most: int = _MOST) -> bytes:
    """Ask the server of a mount for a text of at most so many bytes.

    Any program can serve a file system that looks like a mount of ours, so what it says of the size is checked. Raises
    `OSError`: EINVAL where it is the kernel's binderfs, EMSGSIZE where there is more, EPROTO where the parts make no
    text.
    """
    descriptor = os.open(mountpoint / CONTROL, _OPENING)
    try:
        text = bytearray()
        while True:
            # A bytearray, since fcntl takes no more than 1024 bytes of what it could not change.
            argument = bytearray(_QUERY.pack(name.encode(), len(text), 0, b""))
            fcntl.ioctl(descriptor, QUERY, argument)
            _, _, size, part = _QUERY.unpack(argument)
            if size > most:
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            if size < len(text):
                raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
            text += part[: size - len(text)]
            if len(text) == size:
                return bytes(text)
    finally:
        os.close(descriptor)


def reconfigure(mountpoint: Path, maximum: int, *, stats: bool, read_only: bool) -> None:
    """Change the options of a mount. Raises `OSError`: EPERM, or EINVAL or EBUSY where the kernel's binderfs would."""
    descriptor = os.open(mountpoint / CONTROL, _OPENING)
    try:
        fcntl.ioctl(descriptor, RECONFIGURE, _RECONFIGURE.pack(maximum, stats, read_only))
    finally:
        os.close(descriptor)


def begin_anew(mountpoint: Path) -> None:
    """Forget that a mount has been tried. Raises `OSError`: EBUSY while a device is open, or EPERM."""
    descriptor = os.open(mountpoint / CONTROL, _OPENING)
    try:
        fcntl.ioctl(descriptor, BEGIN_ANEW, bytes(_RECONFIGURE.size))
    finally:
        os.close(descriptor)


def start_time(pid: int) -> int:
    """Return when a process began, in clock ticks since the machine did: with its id, this names it for ever.

    Raises `OSError` where there is no such process.
    """
    return procfs.start_time(procfs.read(f"/proc/{pid}/stat"))
