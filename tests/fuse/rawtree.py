"""The smallest tree that a channel can serve: one device in one directory, and FUSE's own words in place of pyfuse3."""

import errno
import itertools
import os
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress

from binderfs_fuse import uapi
from binderfs_fuse.engine.context import Context
from binderfs_fuse.fuse.device import DevicePlane
from binderfs_fuse.host.region import SIZE, Kind

NAME = b"binder"
_LONG = 3600
_MAX_WRITE = 1 << 20


class NoTexts:
    """There are no logs here."""

    def attach(self, post: Callable[..., None], answer: Callable[[int, int, bytes], object]) -> None:
        """Nothing is ever answered."""

    def has(self, handle: int) -> bool:
        """No open is one of a log."""
        del handle
        return False

    def read(self, unique: int, handle: int, offset: int, size: int) -> tuple[int, bytes] | None:
        """Nobody asks."""
        raise AssertionError(unique, handle, offset, size)

    def withdraw(self, unique: int) -> bool:
        """No READ waits."""
        del unique
        return False


class RawFiles:
    """Serves what every open needs, for one device in one directory. Each lookup makes a new inode, as real ones do."""

    def __init__(self, plane: DevicePlane, context: Context) -> None:
        self._plane = plane
        self._context = context
        self._inodes = itertools.count(1 << 21)
        self._handles = itertools.count(1)
        self.texts = NoTexts()

    def _attributes(self, inode: int) -> tuple[int, ...]:
        is_root = inode == uapi.FUSE_ROOT_ID
        mode = stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o666
        size = 0 if is_root or self._plane.kind is Kind.PASSTHROUGH else SIZE
        return inode, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0

    def look_up(self, parent: int, name: bytes, uid: int) -> bytes:
        """Find the device."""
        del parent, uid
        if name != NAME:
            raise OSError(errno.ENOENT, "")
        inode = next(self._inodes)
        return uapi.fuse_entry_out.pack(inode, 0, 0, _LONG, 0, 0, *self._attributes(inode))

    def attributes(self, inode: int) -> bytes:
        """Say what there is."""
        return uapi.fuse_attr_out.pack(_LONG, 0, *self._attributes(inode))

    def forget(self, inode: int, lookups: int) -> None:
        """Nothing is kept."""

    def open(self, inode: int, flags: int, tid: int, uid: int) -> tuple[int, int]:
        """Open the device."""
        handle = next(self._handles)
        self._plane.open(handle, inode, self._context, tid, uid, flags)
        return handle, uapi.FOPEN_NONSEEKABLE

    def release(self, handle: int) -> None:
        """Close the device."""
        self._plane.release(handle)


class RawTree:
    """Answers on the tree's end of a channel, in a thread, until that hangs up.

    What INIT offered is kept for a look at it.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self.offered: tuple[int, int] | None = None
        self.opcodes: list[int] = []
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end; raise what went wrong."""
        self._thread.join()
        self._socket.close()
        if self._failure is not None:
            raise self._failure

    def leave(self) -> None:
        """Hang up."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def send(self, message: bytes) -> None:
        """Say something that nobody asked for."""
        self._socket.send(message)

    def _run(self) -> None:
        while message := self._socket.recv(1 << 20):
            _, opcode, unique, *_ = uapi.fuse_in_header.unpack_from(message)
            self.opcodes.append(opcode)
            error, payload = 0, b""
            try:
                payload = self._answer(opcode, message[uapi.fuse_in_header.size :])
            except OSError as raised:
                error = -(raised.errno or errno.EIO)
            except Exception as raised:  # noqa: BLE001 - for whoever joins
                error = -errno.EIO
                self._failure = raised
            # The channel may have hung up meanwhile.
            with suppress(BrokenPipeError):
                self._socket.send(uapi.fuse_out_header.pack(16 + len(payload), error, unique) + payload)

    def _answer(self, opcode: int, body: bytes) -> bytes:
        if opcode == uapi.FUSE_INIT:
            _, minor, readahead, flags, flags2 = uapi.fuse_init_in.unpack_from(body)
            self.offered = flags, flags2
            return uapi.fuse_init_out.pack(7, min(minor, 38), readahead, 0, 12, 9, _MAX_WRITE, 1, 0, 0, 0, 0, 0)
        if opcode == uapi.FUSE_WRITE:
            raise OSError(errno.EINVAL, "")
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
