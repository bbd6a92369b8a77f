"""What came back from the driver, as text, as the player in C says it."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, field
from typing import Final, Protocol

from binderfs_fuse import uapi
from tests.conformance.compose import OBJECTS

MAX_RECEIVED: Final = 8

_KINDS: Final = {value: name for name, value in OBJECTS.items()}
_FLAGS: Final = ("TF_ONE_WAY", "TF_ROOT_OBJECT", "TF_STATUS_CODE", "TF_ACCEPT_FDS", "TF_CLEAR_BUF", "TF_UPDATE_TXN")
_WITH_NUMBER: Final = ("BR_ERROR", "BR_ACQUIRE_RESULT")
_WITH_COOKIE: Final = ("BR_DEAD_BINDER", "BR_CLEAR_DEATH_NOTIFICATION_DONE", "BR_CLEAR_FREEZE_NOTIFICATION_DONE")
_WITH_PTR_COOKIE: Final = ("BR_INCREFS", "BR_ACQUIRE", "BR_RELEASE", "BR_DECREFS")


@dataclass
class Label:
    """What a transaction or reply carried, to be used in later steps."""

    buffer: int = 0
    ptr: int = 0
    cookie: int = 0
    handles: list[int] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)


class Receiver(Protocol):
    """What reporting needs of the process that received."""

    def fetch(self, address: int, size: int) -> bytes | None:
        """Read own memory; None where it cannot all be read."""

    def address_name(self, address: int) -> str:
        """Return map+N for an address in a mapping of the device."""

    def process_name(self, pid: int) -> str:
        """Return the name of a process."""

    def received_fd(self, number: int) -> int:
        """Count a received descriptor: its number in the order of arrival."""


def error_name(error: int) -> str:
    """Return the name of an errno, 0 for none."""
    if not error:
        return "0"
    return {errno.EOPNOTSUPP: "EOPNOTSUPP"}.get(error, errno.errorcode[error])


def quoted(data: bytes) -> str:
    """Return bytes as text in quotes."""
    out = []
    for byte in data:
        if byte in b'"\\':
            out.append("\\" + chr(byte))
        elif 0x20 <= byte < 0x7F:
            out.append(chr(byte))
        else:
            out.append(f"\\x{byte:02x}")
    return '"' + "".join(out) + '"'


def flag_names(flags: int) -> str:
    """Return transaction flags by name."""
    names = [name for name in _FLAGS if flags & getattr(uapi, name)]
    for name in names:
        flags &= ~getattr(uapi, name)
    if flags:
        names.append(f"0x{flags:x}")
    return "|".join(names) or "0"


def return_name(command: int) -> str:
    """Return the name of a BR_ number, "?" for none."""
    return uapi.BR_NAMES.get(command, "?")


def _describe_bytes(data: bytes) -> list[str]:
    if not data:
        return []
    if not any(data):
        return [f"zero {len(data)}"]
    if len(data) > 96:
        checksum = 2166136261
        for byte in data:
            checksum = (checksum ^ byte) * 16777619 & 0xFFFF_FFFF
        return [f"{len(data)} bytes, checksum {checksum:08x}"]
    return [quoted(data)]


class Reporter:
    """Says what one read returned, and keeps what it carried in `label`."""

    def __init__(self, receiver: Receiver, label: Label) -> None:
        self._receiver = receiver
        self._label = label
        self.got_transaction = False

    def returns(self, data: bytes) -> list[str]:
        """Describe the returns in `data`, a line each and more for payloads."""
        lines: list[str] = []
        at = 0
        while len(data) - at >= 4:
            command = int.from_bytes(data[at : at + 4], "little")
            size = command >> 16 & 0x3FFF
            name = uapi.BR_NAMES.get(command)
            if name is None or len(data) - at < 4 + size:
                lines.append(f"0x{command:08x}, and {len(data) - at - 4} bytes more")
                return lines
            lines += self._one(name, data[at + 4 : at + 4 + size])
            at += 4 + size
        if at != len(data):
            lines.append(f"{len(data) - at} bytes more")
        return lines

    def _one(self, name: str, argument: bytes) -> list[str]:
        if name in _WITH_NUMBER:
            return [f"{name} {struct.unpack('<i', argument)[0]}"]
        if name in _WITH_COOKIE:
            return [f"{name} 0x{int.from_bytes(argument, 'little'):x}"]
        if name in _WITH_PTR_COOKIE:
            ptr, cookie = uapi.binder_ptr_cookie.unpack(argument)
            return [f"{name} 0x{ptr:x} 0x{cookie:x}"]
        if name == "BR_FROZEN_BINDER":
            cookie, is_frozen, reserved = uapi.binder_frozen_state_info.unpack(argument)
            return [f"{name} 0x{cookie:x} is_frozen={is_frozen} reserved={reserved}"]
        if argument:
            return self._transaction(name, argument)
        return [name]

    def _transaction(self, name: str, argument: bytes) -> list[str]:
        codec = uapi.binder_transaction_data_received
        fields = codec.unpack(argument[: codec.size])
        ptr, cookie, code, flags, pid, euid, data_size, offsets_size, address, offsets_address = fields
        receiver = self._receiver
        self.got_transaction = True
        label = self._label
        label.buffer, label.ptr, label.cookie = address, ptr, cookie
        label.handles, label.fds = [], []
        head = (
            f"{name} ptr=0x{ptr:x} cookie=0x{cookie:x} code=0x{code:x} flags={flag_names(flags)}"
            f" pid={receiver.process_name(pid)} euid={euid} size={data_size} offsets={offsets_size}"
            f" at {receiver.address_name(address)} {receiver.address_name(offsets_address)}"
        )
        lines = [head]
        data = receiver.fetch(address, data_size)
        table = receiver.fetch(offsets_address, offsets_size)
        if data is None or table is None:
            lines.append("    not readable")
        else:
            offsets = [offset for (offset,) in struct.iter_unpack("<Q", table[: len(table) // 8 * 8])]
            lines += ["    " + line for line in self._payload(data, offsets)]
        if name == "BR_TRANSACTION_SEC_CTX":
            context = int.from_bytes(argument[codec.size :], "little")
            text = b""
            while (byte := receiver.fetch(context + len(text), 1)) not in (None, b"\0"):
                assert byte is not None
                text += byte
            lines.append(f"    security context {quoted(text)} at {receiver.address_name(context)}")
        return lines

    def _payload(self, data: bytes, offsets: list[int]) -> list[str]:
        lines: list[str] = []
        at = 0
        for index, offset in enumerate(offsets):
            lines += _describe_bytes(data[at:offset])
            more, size = self._object(data, offsets, index)
            lines += more
            at = offset + size
        return lines + _describe_bytes(data[at:])

    def _fd(self, number: int) -> str:
        if len(self._label.fds) < MAX_RECEIVED:
            self._label.fds.append(number)
        return f"fd#{self._receiver.received_fd(number)}"

    def _object(self, data: bytes, offsets: list[int], index: int) -> tuple[list[str], int]:
        at = offsets[index]
        kind = int.from_bytes(data[at : at + 4], "little")
        name = _KINDS.get(kind, "")
        if name in ("binder", "weak-binder"):
            codec = uapi.flat_binder_object
            _, flags, ptr, cookie = codec.unpack(data[at : at + codec.size])
            return [f"{name} 0x{ptr:x} 0x{cookie:x} flags=0x{flags:x}"], codec.size
        if name in ("handle", "weak-handle"):
            codec = uapi.flat_binder_object_handle
            _, flags, handle, cookie = codec.unpack(data[at : at + codec.size])
            if len(self._label.handles) < MAX_RECEIVED:
                self._label.handles.append(handle)
            return [f"{name} {handle} flags=0x{flags:x} cookie=0x{cookie:x}"], codec.size
        if name == "fd":
            codec = uapi.binder_fd_object
            _, _, number, cookie = codec.unpack(data[at : at + codec.size])
            return [f"fd {self._fd(number)} cookie=0x{cookie:x}"], codec.size
        if name == "fda":
            codec = uapi.binder_fd_array_object
            _, _, count, parent, parent_offset = codec.unpack(data[at : at + codec.size])
            return [f"fda {count} parent={parent} at={parent_offset}"], codec.size
        if name == "ptr":
            codec = uapi.binder_buffer_object
            _, flags, address, length, parent, parent_offset = codec.unpack(data[at : at + codec.size])
            line = (
                f"ptr {self._receiver.address_name(address)} length={length} flags=0x{flags:x}"
                f" parent={parent} at={parent_offset}"
            )
            return [line] + ["    " + more for more in self._buffer(data, offsets, index, address, length)], codec.size
        return [f"object 0x{kind:x}"], 4

    def _buffer(self, data: bytes, offsets: list[int], index: int, address: int, length: int) -> list[str]:
        """Describe a buffer that an object points to: what the driver wrote into it as what it means."""
        content = self._receiver.fetch(address, length)
        if content is None:
            return ["not readable"]
        places: dict[int, int] = {}  # offset in this buffer: descriptors there, 0 for an address
        for offset in offsets[index + 1 :]:
            kind = int.from_bytes(data[offset : offset + 4], "little")
            if kind == uapi.BINDER_TYPE_PTR:
                codec = uapi.binder_buffer_object
                _, flags, _, _, parent, at = codec.unpack(data[offset : offset + codec.size])
                if flags & uapi.BINDER_BUFFER_FLAG_HAS_PARENT and parent == index:
                    places.setdefault(at, 0)
            elif kind == uapi.BINDER_TYPE_FDA:
                codec = uapi.binder_fd_array_object
                _, _, count, parent, at = codec.unpack(data[offset : offset + codec.size])
                if parent == index and count:
                    places.setdefault(at, count)
        lines: list[str] = []
        position = 0
        for at, count in sorted(places.items()):
            if at < position or at >= length:
                continue
            lines += _describe_bytes(content[position:at])
            if count:
                numbers = struct.unpack_from(f"<{count}I", content, at)
                lines.append("fds " + " ".join(self._fd(number) for number in numbers))
                position = at + 4 * count
            else:
                lines.append("address " + self._receiver.address_name(int.from_bytes(content[at : at + 8], "little")))
                position = at + 8
        return lines + _describe_bytes(content[position:])
