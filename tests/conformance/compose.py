"""The bytes of commands and of the payloads of transactions, as the player in C composes them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Protocol

from binderfs_fuse import uapi

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.conformance.scenario import Line

# Command: the sizes of its values; "t" and "T" for transactions.
_SHAPES: Final = {
    "BC_TRANSACTION": "t",
    "BC_REPLY": "t",
    "BC_TRANSACTION_SG": "T",
    "BC_REPLY_SG": "T",
    "BC_ACQUIRE_RESULT": "4",
    "BC_FREE_BUFFER": "8",
    "BC_INCREFS": "4",
    "BC_ACQUIRE": "4",
    "BC_RELEASE": "4",
    "BC_DECREFS": "4",
    "BC_INCREFS_DONE": "88",
    "BC_ACQUIRE_DONE": "88",
    "BC_ATTEMPT_ACQUIRE": "44",
    "BC_REGISTER_LOOPER": "",
    "BC_ENTER_LOOPER": "",
    "BC_EXIT_LOOPER": "",
    "BC_REQUEST_DEATH_NOTIFICATION": "48",
    "BC_CLEAR_DEATH_NOTIFICATION": "48",
    "BC_DEAD_BINDER_DONE": "8",
    "BC_REQUEST_FREEZE_NOTIFICATION": "48",
    "BC_CLEAR_FREEZE_NOTIFICATION": "48",
    "BC_FREEZE_NOTIFICATION_DONE": "8",
}

OBJECTS: Final = {
    "binder": uapi.BINDER_TYPE_BINDER,
    "weak-binder": uapi.BINDER_TYPE_WEAK_BINDER,
    "handle": uapi.BINDER_TYPE_HANDLE,
    "weak-handle": uapi.BINDER_TYPE_WEAK_HANDLE,
    "fd": uapi.BINDER_TYPE_FD,
    "fda": uapi.BINDER_TYPE_FDA,
    "ptr": uapi.BINDER_TYPE_PTR,
}

_ESCAPE: Final = re.compile(r"\\(x[0-9a-fA-F]{2}|.)")


class Surroundings(Protocol):
    """What composing needs of the process that it is for."""

    def evaluate(self, expression: str) -> int:
        """Return the value of an expression."""

    def place(self, data: bytes, reach: int) -> int:
        """Put bytes into memory, only the first `reach` of them accessible (-1: all); their address."""


def text_bytes(word: str) -> bytes:
    """Return what a quoted text stands for."""

    def escape(match: re.Match[str]) -> str:
        if match[1][0] == "x":
            return chr(int(match[1][1:], 16))
        return {"n": "\n", "0": "\0"}.get(match[1], match[1])

    return _ESCAPE.sub(escape, word[1:-1]).encode("latin-1")


def _number(value: int, size: int) -> bytes:
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


class Composer:
    """Composes for one step of one thread."""

    def __init__(self, where: Surroundings) -> None:
        self._where = where

    def _option(self, line: Line, key: str, otherwise: int) -> int:
        value = line.option(key)
        return otherwise if value is None else self._where.evaluate(value)

    def _operand(self, line: Line, index: int) -> int:
        words = line.positional(1)
        return self._where.evaluate(words[index]) if index < len(words) else 0

    def _plain(self, out: bytearray, line: Line) -> bool:
        """Append one line that stands for plain bytes; false when it is none."""
        kind = line.words[0]
        if kind.startswith('"'):
            out += text_bytes(kind)
        elif kind == "zero":
            out += bytes(self._operand(line, 0))
        elif kind == "fill":
            out += bytes((index * 7 + 1) & 0xFF for index in range(self._operand(line, 0)))
        elif kind == "align":
            out += bytes(-len(out) % self._operand(line, 0))
        elif kind in ("u8", "u32", "u64"):
            for word in line.words[1:]:
                out += _number(self._where.evaluate(word), int(kind[1:]) // 8)
        else:
            return False
        return True

    def items(self, lines: Iterable[Line]) -> bytearray:
        """Return the bytes of plain items."""
        out = bytearray()
        for line in lines:
            self._plain(out, line)
        return out

    def _object(self, data: bytearray, offsets: list[int], line: Line) -> int:
        """Append one object; the bytes that the buffer it points to takes."""
        kind = OBJECTS[line.words[0]]
        flags = self._option(line, "flags", 0)
        taken = 0
        if kind in (uapi.BINDER_TYPE_BINDER, uapi.BINDER_TYPE_WEAK_BINDER):
            raw = uapi.flat_binder_object.pack(kind, flags, self._operand(line, 0), self._operand(line, 1))
        elif kind in (uapi.BINDER_TYPE_HANDLE, uapi.BINDER_TYPE_WEAK_HANDLE):
            raw = uapi.flat_binder_object_handle.pack(
                kind, flags, self._operand(line, 0) & 0xFFFF_FFFF, self._option(line, "cookie", 0)
            )
        elif kind == uapi.BINDER_TYPE_FD:
            raw = uapi.binder_fd_object.pack(
                kind, flags, self._operand(line, 0) & 0xFFFF_FFFF, self._option(line, "cookie", 0)
            )
        elif kind == uapi.BINDER_TYPE_FDA:
            parent = self._option(line, "parent", 0)
            raw = uapi.binder_fd_array_object.pack(
                kind, flags, self._operand(line, 0), parent, self._option(line, "at", 0)
            )
        else:
            shift = self._option(line, "misalign", 0)
            content = bytes(shift) + self.items(line.children)
            length = self._option(line, "length", len(content) - shift)
            address = self._where.place(content, self._option(line, "reach", -1)) + shift
            address = self._option(line, "address", address)
            parent = at = 0
            if line.option("parent") is not None:
                flags |= uapi.BINDER_BUFFER_FLAG_HAS_PARENT
                parent = self._option(line, "parent", 0)
                at = self._option(line, "at", 0)
            raw = uapi.binder_buffer_object.pack(kind, flags, address, length, parent, at)
            taken = (length + 7) & ~7
        if line.option("unaligned") is None:
            data += bytes(-len(data) % 8)
        offsets.append(len(data))
        data += raw[: self._option(line, "cut", len(raw))]
        return taken

    def _transaction(self, line: Line, *, scatter: bool) -> bytes:
        data = bytearray()
        offsets: list[int] = []
        buffers = 0
        for item in line.children:
            if item.words[0] in OBJECTS:
                buffers += self._object(data, offsets, item)
            elif item.words[0] == "object":
                offsets.append(len(data))
                data += _number(self._operand(item, 0), 4)
            else:
                self._plain(data, item)
        replaced = line.option("offsets")
        if replaced is not None:
            offsets = [self._where.evaluate(word) for word in replaced.split(",")]
        table = b"".join(_number(offset, 8) for offset in offsets)
        target = self._option(line, "handle", 0) & 0xFFFF_FFFF
        if line.option("ptr") is not None:
            target = self._option(line, "ptr", 0)
        fields = (
            target,
            self._option(line, "cookie", 0),
            self._option(line, "code", 0) & 0xFFFF_FFFF,
            self._option(line, "flags", 0) & 0xFFFF_FFFF,
            self._option(line, "pid", 0),
            self._option(line, "euid", 0),
            self._option(line, "size", len(data)),
            self._option(line, "offsets-size", len(table)),
            self._option(line, "address", self._where.place(bytes(data), self._option(line, "reach", -1))),
            self._option(line, "offsets-address", self._where.place(table, self._option(line, "offsets-reach", -1))),
        )
        raw = uapi.binder_transaction_data_received.pack(*fields)
        if scatter:
            raw += _number(self._option(line, "buffers", buffers), 8)
        return raw

    def commands(self, lines: Iterable[Line]) -> bytes:
        """Return the write buffer of these lines."""
        out = bytearray()
        for line in lines:
            shape = _SHAPES.get(line.words[0])
            if shape is None:
                self._plain(out, line)
                continue
            out += _number(getattr(uapi, line.words[0]), 4)
            if shape in ("t", "T"):
                out += self._transaction(line, scatter=shape == "T")
            else:
                for index, size in enumerate(shape):
                    out += _number(self._operand(line, index), int(size))
        return bytes(out)
