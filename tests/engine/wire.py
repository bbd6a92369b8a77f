"""What clients write and read, as bytes: commands, parcels of objects, and returns taken apart."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from binderfs_fuse import uapi

if TYPE_CHECKING:
    from collections.abc import Callable

    from binderfs_fuse.uapi import Codec

_PAYLOADS: Final[dict[int, Callable[..., bytes]]] = {
    uapi.BC_FREE_BUFFER: struct.Struct("<Q").pack,
    uapi.BC_INCREFS_DONE: uapi.binder_ptr_cookie.pack,
    uapi.BC_ACQUIRE_DONE: uapi.binder_ptr_cookie.pack,
    uapi.BC_REQUEST_DEATH_NOTIFICATION: uapi.binder_handle_cookie.pack,
    uapi.BC_CLEAR_DEATH_NOTIFICATION: uapi.binder_handle_cookie.pack,
    uapi.BC_REQUEST_FREEZE_NOTIFICATION: uapi.binder_handle_cookie.pack,
    uapi.BC_CLEAR_FREEZE_NOTIFICATION: uapi.binder_handle_cookie.pack,
    uapi.BC_DEAD_BINDER_DONE: struct.Struct("<Q").pack,
    uapi.BC_FREEZE_NOTIFICATION_DONE: struct.Struct("<Q").pack,
}
for _command in (uapi.BC_INCREFS, uapi.BC_ACQUIRE, uapi.BC_RELEASE, uapi.BC_DECREFS):
    _PAYLOADS[_command] = struct.Struct("<I").pack

_RETURNS: Final[dict[int, Codec | struct.Struct]] = {
    uapi.BR_TRANSACTION: uapi.binder_transaction_data_received,
    uapi.BR_REPLY: uapi.binder_transaction_data_received,
    uapi.BR_TRANSACTION_SEC_CTX: uapi.binder_transaction_data_secctx,
    uapi.BR_INCREFS: uapi.binder_ptr_cookie,
    uapi.BR_ACQUIRE: uapi.binder_ptr_cookie,
    uapi.BR_RELEASE: uapi.binder_ptr_cookie,
    uapi.BR_DECREFS: uapi.binder_ptr_cookie,
    uapi.BR_DEAD_BINDER: struct.Struct("<Q"),
    uapi.BR_CLEAR_DEATH_NOTIFICATION_DONE: struct.Struct("<Q"),
    uapi.BR_FROZEN_BINDER: uapi.binder_frozen_state_info,
    uapi.BR_CLEAR_FREEZE_NOTIFICATION_DONE: struct.Struct("<Q"),
}


def command(number: int, *values: int) -> bytes:
    """Compose a BC_ command with the values of its structure."""
    payload = _PAYLOADS[number](*values) if number in _PAYLOADS else b""
    return number.to_bytes(4, "little") + payload


@dataclass(frozen=True)
class Received:
    """What a BR_TRANSACTION, BR_TRANSACTION_SEC_CTX or BR_REPLY says."""

    ptr: int
    cookie: int
    code: int
    flags: int
    sender_pid: int
    sender_euid: int
    data_size: int
    offsets_size: int
    buffer: int
    offsets: int
    secctx: int | None = None


@dataclass(frozen=True)
class Return:
    """One BR_ return: its name and the values of its structure."""

    name: str
    values: tuple[int, ...]

    @property
    def received(self) -> Received:
        """The values of a transaction or reply."""
        return Received(*self.values)


def parse(data: bytes | bytearray) -> list[Return]:
    """Take the data of a read apart."""
    returns = []
    position = 0
    while position < len(data):
        number = int.from_bytes(data[position : position + 4], "little")
        position += 4
        size = uapi.ioctl_size(number)
        values: tuple[Any, ...] = ()
        if size:
            values = _RETURNS[number].unpack(data[position : position + size])
        position += size
        returns.append(Return("BR_TRANSACTION_SEC_CTX" if size == 72 else uapi.BR_NAMES[number], values))
    assert position == len(data)
    return returns


@dataclass
class Parcel:
    """A transaction's data, where the objects stand in it, and the buffers that they point to."""

    data: bytearray = field(default_factory=bytearray)
    offsets: list[int] = field(default_factory=list)
    # (where in the data the address goes, the content to point to, how many of its bytes can be read)
    pointed: list[tuple[int, bytes, int | None]] = field(default_factory=list)
    buffers_size: int = 0

    def raw(self, content: bytes) -> Self:
        """Add bytes that are no object."""
        self.data += content
        return self

    def object(self, content: bytes) -> Self:
        """Add bytes that the offsets name."""
        self.offsets.append(len(self.data))
        self.data += content
        return self

    def binder(self, ptr: int, cookie: int = 0, flags: int = 0, *, weak: bool = False) -> Self:
        """Add an object of the sender's own."""
        kind = uapi.BINDER_TYPE_WEAK_BINDER if weak else uapi.BINDER_TYPE_BINDER
        return self.object(uapi.flat_binder_object.pack(kind, flags, ptr, cookie))

    def handle(self, handle: int, flags: int = 0, *, weak: bool = False) -> Self:
        """Add a reference that the sender holds."""
        kind = uapi.BINDER_TYPE_WEAK_HANDLE if weak else uapi.BINDER_TYPE_HANDLE
        return self.object(uapi.flat_binder_object_handle.pack(kind, flags, handle, 0))

    def fd(self, fd: int, cookie: int = 0, flags: int = 0) -> Self:
        """Add a descriptor."""
        return self.object(uapi.binder_fd_object.pack(uapi.BINDER_TYPE_FD, flags, fd, cookie))

    def ptr(
        self,
        content: bytes = b"",
        *,
        parent: int | None = None,
        at: int = 0,
        length: int | None = None,
        readable: int | None = None,
    ) -> Self:
        """Add a buffer to copy along; with `parent`, its address is also written `at` an offset of that buffer."""
        flags = uapi.BINDER_BUFFER_FLAG_HAS_PARENT if parent is not None else 0
        self.pointed.append((len(self.data) + 8, content, readable))
        size = len(content) if length is None else length
        self.buffers_size += (size + 7) & ~7
        return self.object(uapi.binder_buffer_object.pack(uapi.BINDER_TYPE_PTR, flags, 0, size, parent or 0, at))

    def fda(self, count: int, *, parent: int, at: int = 0) -> Self:
        """Add an array of descriptors that stands in a buffer."""
        return self.object(uapi.binder_fd_array_object.pack(uapi.BINDER_TYPE_FDA, 0, count, parent, at))


def parcel() -> Parcel:
    """Begin a parcel."""
    return Parcel()


def fds(*numbers: int) -> bytes:
    """Compose an array of descriptors."""
    return b"".join(number.to_bytes(4, "little") for number in numbers)
