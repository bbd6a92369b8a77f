"""The smallest tree that a channel can serve: one device in one directory, in FUSE's own words, in place of pyfuse3."""

import errno
import itertools
import os
import socket
import stat
import threading
from contextlib import suppress

from binderfs_fuse import uapi
from binderfs_fuse.engine.context import Context
from binderfs_fuse.fuse.device import DevicePlane
from binderfs_fuse.host.region import SIZE, Kind

NAME = b"binder"
_LONG = 3600
_MAX_WRITE = 1 << 20


class RawTree:
    """Answers on the tree's end of a channel, in a thread, until that hangs up.

    Each lookup makes a new inode, as the real tree does. What INIT offered is kept for a look at it.
    """

    def __init__(self, descriptor: int, plane: DevicePlane, context: Context) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._plane = plane
        self._context = context
        self._inodes = itertools.count(1 << 21)
        self._handles = itertools.count(1)
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
            _, opcode, unique, node, uid, _, tid, _ = uapi.fuse_in_header.unpack_from(message)
            self.opcodes.append(opcode)
            if opcode in (uapi.FUSE_FORGET, uapi.FUSE_BATCH_FORGET):
                continue
            error, payload = 0, b""
            try:
                payload = self._answer(opcode, node, tid, uid, message[uapi.fuse_in_header.size :])
            except OSError as raised:
                error = -(raised.errno or errno.EIO)
            except Exception as raised:  # noqa: BLE001 - for whoever joins
                error = -errno.EIO
                self._failure = raised
            # The channel may have hung up meanwhile.
            with suppress(BrokenPipeError):
                self._socket.send(uapi.fuse_out_header.pack(16 + len(payload), error, unique) + payload)

    def _attributes(self, inode: int) -> tuple[int, ...]:
        is_root = inode == uapi.FUSE_ROOT_ID
        mode = stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o666
        size = 0 if is_root or self._plane.kind is Kind.PASSTHROUGH else SIZE
        return inode, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0

    def _answer(self, opcode: int, node: int, tid: int, uid: int, body: bytes) -> bytes:
        if opcode == uapi.FUSE_INIT:
            _, minor, readahead, flags, flags2 = uapi.fuse_init_in.unpack_from(body)
            self.offered = flags, flags2
            return uapi.fuse_init_out.pack(7, min(minor, 38), readahead, 0, 12, 9, _MAX_WRITE, 1, 0, 0, 0, 0, 0)
        if opcode == uapi.FUSE_LOOKUP:
            if body != NAME + b"\0":
                raise OSError(errno.ENOENT, "")
            inode = next(self._inodes)
            return uapi.fuse_entry_out.pack(inode, 0, 0, _LONG, 0, 0, *self._attributes(inode))
        if opcode == uapi.FUSE_GETATTR:
            return uapi.fuse_attr_out.pack(_LONG, 0, *self._attributes(node))
        if opcode == uapi.FUSE_OPEN:
            handle = next(self._handles)
            flags, _ = uapi.fuse_open_in.unpack_from(body)
            self._plane.open(handle, node, self._context, tid, uid, flags)
            return uapi.fuse_open_out.pack(handle, uapi.FOPEN_NONSEEKABLE, 0)
        if opcode == uapi.FUSE_FLUSH:
            self._plane.flush(uapi.fuse_flush_in.unpack_from(body)[0])
            return b""
        if opcode == uapi.FUSE_RELEASE:
            self._plane.release(uapi.fuse_release_in.unpack_from(body)[0])
            return b""
        if opcode == uapi.FUSE_WRITE:
            raise OSError(errno.EINVAL, "")
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
