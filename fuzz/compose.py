"""Composes what clients call: mostly what the driver would take, with a slip now and then, and sometimes garbage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from binderfs_fuse import uapi

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from binderfs_fuse.engine import Process
    from fuzz.choices import Choices

_OBJECT_TYPES: Final = tuple(uapi.TYPE_NAMES)
_COMMANDS: Final = tuple(uapi.BC_NAMES)
_SENDING: Final = (uapi.BC_TRANSACTION, uapi.BC_REPLY, uapi.BC_TRANSACTION_SG, uapi.BC_REPLY_SG)
_OTHER: Final = tuple(command for command in _COMMANDS if command not in _SENDING)
_IOCTLS: Final = tuple(number for number, name in uapi.IOCTL_NAMES.items() if name != "BINDER_CTL_ADD")
_FLAGS: Final = (0, uapi.TF_ONE_WAY, uapi.TF_ACCEPT_FDS, uapi.TF_CLEAR_BUF, uapi.TF_ONE_WAY | uapi.TF_UPDATE_TXN)
_NODE_FLAGS: Final = (0x100, 0x17F, 0x1100, 0x80, 0xFFFF_FFFF)
_POINTERS: Final = (0, 0x10, 0x20, 0x30)


class Memory(Protocol):
    """A client's memory: `targets` are addresses that can be written to."""

    targets: Sequence[int]

    def place(self, data: bytes) -> int:
        """Put bytes somewhere, and return where."""


class Composer:
    """Composes ioctls by the decisions in `choices`, and by what the engine knows of the caller."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices

    def ioctl(self, memory: Memory, process: Process, tid: int, pids: Sequence[int]) -> tuple[int, bytes, bytes | None]:
        """Return a command and its argument; and its write buffer, should that have been fetched already."""
        choices = self.choices
        if choices.rarely(6):
            command = choices.pick(_IOCTLS) if not choices.rarely(8) else choices.number() & 0xFFFF_FFFF
            if command != uapi.BINDER_WRITE_READ:
                return command, self._argument(command, pids), None
        return uapi.BINDER_WRITE_READ, *self._write_read(memory, process, tid)

    @staticmethod
    def introduce(memory: Memory) -> tuple[bytes, bytes]:
        """Return the argument and the write buffer of a one-way call that makes an object known to the manager."""
        thing = uapi.flat_binder_object.pack(uapi.BINDER_TYPE_BINDER, 0x17F, 0x10, 0)
        fields = (0, 0, 1, uapi.TF_ONE_WAY, 0, 0, len(thing), 8, memory.place(thing), memory.place(bytes(8)))
        stream = uapi.BC_TRANSACTION.to_bytes(4, "little") + uapi.binder_transaction_data.pack(*fields)
        argument = uapi.binder_write_read.pack(len(stream), 0, memory.place(stream), 256, 0, memory.targets[0])
        return argument, stream

    @staticmethod
    def _is_manager(process: Process) -> bool:
        manager = process.context.manager
        return manager is not None and manager.process is process

    def _argument(self, command: int, pids: Sequence[int]) -> bytes:
        choices = self.choices
        if command in (uapi.BINDER_FREEZE, uapi.BINDER_GET_FROZEN_INFO):
            pid = choices.number(*pids) & 0xFFFF_FFFF
            return uapi.binder_freeze_info.pack(pid, choices.below(2), choices.number(0, 100) & 0xFFFF_FFFF)
        size = uapi.ioctl_size(command)
        if choices.rarely(3):
            return choices.bytes(min(size, 40)).ljust(size, b"\0")
        words = b"".join((choices.number(0, 1) & 0xFFFF_FFFF).to_bytes(4, "little") for _ in range(min(size // 4, 6)))
        return words.ljust(size, b"\0")[:size]

    def _write_read(self, memory: Memory, process: Process, tid: int) -> tuple[bytes, bytes | None]:
        choices = self.choices
        stream = b"".join(self._commands(memory, process, tid)) if not choices.rarely(4) else b""
        address = memory.place(stream)
        write_size, write_consumed, commands = len(stream), 0, None
        if choices.rarely(12):
            write_size, write_consumed = choices.number(len(stream)), choices.number(0, 4)
        elif choices.rarely(2):
            commands = stream
        read_size = choices.number(0, 256, 256, 4, 72)
        read_consumed = choices.number() if choices.rarely(16) else 0
        argument = uapi.binder_write_read.pack(
            write_size, write_consumed, address, read_size, read_consumed, choices.number(*memory.targets)
        )
        return argument, commands

    def _commands(self, memory: Memory, process: Process, tid: int) -> Iterable[bytes]:
        choices = self.choices
        for _ in range(1 + choices.below(3)):
            kind = choices.below(16)
            if kind == 15 and choices.rarely(2):
                yield choices.bytes(4 * (1 + choices.below(3)))
                continue
            if kind < 6:
                command, payload = self._sensible(process, tid)
                if command:
                    yield command.to_bytes(4, "little") + payload
                    continue
            if kind < 12:
                command = choices.pick((uapi.BC_TRANSACTION, uapi.BC_TRANSACTION, uapi.BC_TRANSACTION_SG))
                thread = process.threads.get(tid)
                if thread is not None and thread.transaction_stack is not None and not choices.rarely(3):
                    command = choices.pick((uapi.BC_REPLY, uapi.BC_REPLY, uapi.BC_REPLY_SG))
            else:
                command = choices.pick(_OTHER)
            yield command.to_bytes(4, "little") + self._payload(memory, process, command)

    def _sensible(self, process: Process, tid: int) -> tuple[int, bytes]:
        """Choose a command that a well-behaved client would send now, or 0."""
        choices = self.choices
        found: list[tuple[int, bytes]] = []
        if process.allocation is not None:
            for buffer in list(process.allocation.allocated.values())[:8]:
                if buffer.allow_user_free:
                    address = process.address + buffer.offset & 0xFFFF_FFFF_FFFF_FFFF
                    found.append((uapi.BC_FREE_BUFFER, address.to_bytes(8, "little")))
        for node in list(process.nodes.values())[:8]:
            body = uapi.binder_ptr_cookie.pack(node.ptr, node.cookie)
            if node.pending_strong_ref:
                found.append((uapi.BC_ACQUIRE_DONE, body))
            if node.pending_weak_ref:
                found.append((uapi.BC_INCREFS_DONE, body))
        found += [(uapi.BC_DEAD_BINDER_DONE, death.key().to_bytes(8, "little")) for death in process.delivered_death]
        found += [
            (uapi.BC_FREEZE_NOTIFICATION_DONE, freeze.key().to_bytes(8, "little"))
            for freeze in process.delivered_freeze
        ]
        for ref in list(process.refs_by_desc.values())[:4]:
            handle = ref.desc.to_bytes(4, "little")
            cookie = (0x77).to_bytes(8, "little")
            death = uapi.BC_CLEAR_DEATH_NOTIFICATION if ref.death else uapi.BC_REQUEST_DEATH_NOTIFICATION
            frozen = uapi.BC_CLEAR_FREEZE_NOTIFICATION if ref.freeze else uapi.BC_REQUEST_FREEZE_NOTIFICATION
            found += [(death, handle + cookie), (frozen, handle + cookie)]
            found.append((choices.pick((uapi.BC_ACQUIRE, uapi.BC_RELEASE, uapi.BC_INCREFS, uapi.BC_DECREFS)), handle))
        thread = process.threads.get(tid)
        if thread is None or not thread.looper & 3:
            found.append((uapi.BC_ENTER_LOOPER, b""))
        return choices.pick(found) if found else (0, b"")

    def _payload(self, memory: Memory, process: Process, command: int) -> bytes:
        choices = self.choices
        if command in _SENDING:
            return self._transaction(memory, process, command)
        size = uapi.ioctl_size(command)
        if command == uapi.BC_FREE_BUFFER:
            offsets = list(process.allocation.allocated) if process.allocation is not None else []
            addresses = [process.address + offset & 0xFFFF_FFFF_FFFF_FFFF for offset in offsets[:20]]
            return choices.number(*addresses).to_bytes(8, "little")
        if size == 16:
            pointer = choices.number(*list(process.nodes)[:20])
            node = process.nodes.get(pointer)
            return uapi.binder_ptr_cookie.pack(pointer, choices.number(node.cookie if node else 0))
        handle = choices.number(*list(process.refs_by_desc)[:20]) & 0xFFFF_FFFF
        if size == 12:
            return uapi.binder_handle_cookie.pack(handle, choices.number(0x77, 0x88))
        if size == 8:
            return choices.number(0x77, 0x88).to_bytes(8, "little")
        return handle.to_bytes(4, "little") if size else b""

    def _transaction(self, memory: Memory, process: Process, command: int) -> bytes:
        choices = self.choices
        data = bytearray()
        offsets: list[int] = []
        scattered = 0
        for _ in range(choices.below(4)):
            if choices.rarely(3):
                data += bytes(4 * choices.below(8))
            offsets.append(len(data))
            thing, extra = self._object(memory, process, len(offsets))
            data += thing
            scattered += extra
        if choices.rarely(4):
            data += bytes(choices.pick((1, 4, 8, 200, 255)) * choices.pick((1, 1, 3, 20, 100)))
        if choices.rarely(8) and offsets:
            offsets[choices.below(len(offsets))] = choices.number(len(data))
        if choices.rarely(12) and data:
            place = choices.below(min(len(data), 256))
            data[place : place + 4] = choices.bytes(4)
        packed = b"".join(offset.to_bytes(8, "little") for offset in offsets)
        sizes = [len(data), len(packed)]
        if choices.rarely(10):
            sizes = [choices.number(len(data)), choices.number(len(packed))]
        handles = [desc for desc in list(process.refs_by_desc)[:20] if desc]
        fields = (
            choices.number(*handles, *([] if self._is_manager(process) else [0])) & 0xFFFF_FFFF,
            0,
            choices.below(3),
            choices.pick(_FLAGS) if not choices.rarely(16) else choices.number() & 0xFFFF_FFFF,
            0,
            0,
            *sizes,
            memory.place(bytes(data)),
            memory.place(packed),
        )
        if command in (uapi.BC_TRANSACTION_SG, uapi.BC_REPLY_SG):
            return uapi.binder_transaction_data_sg.pack(*fields, choices.number(scattered, scattered, scattered + 8))
        return uapi.binder_transaction_data.pack(*fields)

    def _object(self, memory: Memory, process: Process, index: int) -> tuple[bytes, int]:
        """Compose an object, and return also the room that it takes behind the data."""
        choices = self.choices
        if choices.rarely(24):
            return choices.bytes(8), 0
        kind = choices.pick(_OBJECT_TYPES)
        if kind in (uapi.BINDER_TYPE_HANDLE, uapi.BINDER_TYPE_WEAK_HANDLE) and not process.refs_by_desc:
            kind = uapi.BINDER_TYPE_BINDER
        if kind == uapi.BINDER_TYPE_FDA and index < 2:
            kind = uapi.BINDER_TYPE_PTR
        if kind in (uapi.BINDER_TYPE_BINDER, uapi.BINDER_TYPE_WEAK_BINDER):
            pointer = choices.number(*_POINTERS)
            node = process.nodes.get(pointer)
            flags = choices.pick(_NODE_FLAGS)
            return uapi.flat_binder_object.pack(kind, flags, pointer, choices.number(node.cookie if node else 0)), 0
        if kind in (uapi.BINDER_TYPE_HANDLE, uapi.BINDER_TYPE_WEAK_HANDLE):
            handle = choices.number(*list(process.refs_by_desc)[:20]) & 0xFFFF_FFFF
            return uapi.flat_binder_object_handle.pack(kind, 0, handle, 0), 0
        if kind == uapi.BINDER_TYPE_FD:
            return uapi.binder_fd_object.pack(kind, 0, choices.number(5) & 0xFFFF_FFFF, 0), 0
        parent = choices.number(0, index - 1)
        place = choices.number(0, 8)
        if kind == uapi.BINDER_TYPE_FDA:
            return uapi.binder_fd_array_object.pack(kind, 0, choices.number(1, 2), parent, place), 0
        length = choices.number(8, 16, 24)
        content = bytes(min(length, 64))
        address = memory.place(content)
        flags = choices.below(2)
        packed: bytes = uapi.binder_buffer_object.pack(kind, flags, address, length, parent, place)
        return packed, length + 7 & ~7 if length <= 64 else 0
