"""Objects inside a transaction's data: translated on the way in, released with the buffer.

The sender's `offsets` say where objects stand in the data. Each is rewritten for the receiver: a BINDER becomes a
HANDLE and the other way round, an FD is taken from the sender to be installed in the receiver later, a PTR's bytes are
copied behind the offsets and its address (and that in its parent buffer) is that of the copy, an FDA is an array of
FDs inside a PTR's bytes.

The driver reads translated objects back from the receiver's buffer. Here the receiver's memory is never read: the
engine keeps a record of every object in `buffer.objects`, in the order of the offsets. Data between objects is copied
in fragments, so that no untranslated object is ever in the receiver's sight.

Sources: Linux 7.3 binder.c `binder_transaction`, `binder_get_object`, `binder_translate_*`, `binder_validate_*`,
`binder_fixup_parent`, `binder_do_deferred_txn_copies`, `binder_transaction_buffer_release`; their checks, in their
order.

A transaction may have 100,000 objects. So to translate, copy and release them gives turns, and nothing is looked for by
walking. Fix-ups stand in a heap. The PTR objects that may still be fixed up are a stack, `Translation.path`: an object
stands on its parent. A fix-up of one that is not on top takes off what is above it. That is for good: the driver
accepts no fix-up of those any more.

Invariants
----------
- `buffer.objects` holds what was translated, no more: a transaction that fails half-way releases just that. While they
  are released in turns it is None, and only that step knows them.
- `translation.path` is a chain: each record but the first has the one before it as its parent.
"""

from __future__ import annotations

import struct
from errno import EFAULT, EINVAL, ENOMEM, EPERM
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse import uapi
from binderfs_fuse.engine.effects import TURN, CopyIn, CopyToBuffer, GetFile, drain
from binderfs_fuse.uapi import (
    BINDER_BUFFER_FLAG_HAS_PARENT,
    BINDER_TYPE_BINDER,
    BINDER_TYPE_FD,
    BINDER_TYPE_FDA,
    BINDER_TYPE_HANDLE,
    BINDER_TYPE_PTR,
    BINDER_TYPE_WEAK_BINDER,
    BINDER_TYPE_WEAK_HANDLE,
    BR_FAILED_REPLY,
    TF_ACCEPT_FDS,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from binderfs_fuse.engine.effects import Effect, Pace, Region, Turn, Turns
    from binderfs_fuse.engine.node import Node
    from binderfs_fuse.engine.process import Process
    from binderfs_fuse.engine.range_alloc import Buffer
    from binderfs_fuse.engine.thread import Thread
    from binderfs_fuse.engine.transaction import Transaction

U64: Final = 0xFFFF_FFFF_FFFF_FFFF
# The union of all objects is as large as the largest one; the driver reads that much where there is room.
_OBJECT_SIZE: Final = uapi.binder_buffer_object.size
_FD_OFFSET: Final = uapi.binder_fd_object.offsets["fd"]
_SIZES: Final = {
    BINDER_TYPE_BINDER: uapi.flat_binder_object.size,
    BINDER_TYPE_WEAK_BINDER: uapi.flat_binder_object.size,
    BINDER_TYPE_HANDLE: uapi.flat_binder_object.size,
    BINDER_TYPE_WEAK_HANDLE: uapi.flat_binder_object.size,
    BINDER_TYPE_FD: uapi.binder_fd_object.size,
    BINDER_TYPE_PTR: uapi.binder_buffer_object.size,
    BINDER_TYPE_FDA: uapi.binder_fd_array_object.size,
}
# Bytes that are stored in a region before it is time for others.
_STORED: Final = 65536
# Data up to this size is read once and cut up here; more is copied straight into the region, fragment by fragment.
_SMALL_DATA: Final = 16384


class TranslatedObject:
    """An object as the receiver has it: `offset` in the data, `type` (BINDER_TYPE_...), and a `value`.

    The value is for BINDER and WEAK_BINDER the node's ptr, for HANDLE and WEAK_HANDLE the desc, for FD nothing, for
    PTR the offset of the copied bytes in the buffer, for FDA the offset of the array in the buffer. `length` is the
    number of bytes of a PTR, of descriptors of an FDA; `first_file` counts the buffer's descriptors before an FDA's.
    """

    __slots__ = (
        "first_file",
        "first_file",
        "flags",
        "length",
        "offset",
        "parent",
        "parent_offset",
        "sender_address",
        "type",
        "value",
    )

    def __init__(self, offset: int, object_type: int, value: int) -> None:
        self.offset = offset
        self.type = object_type
        self.value = value
        self.first_file = 0
        self.flags = 0
        self.length = 0
        self.parent = 0
        self.parent_offset = 0
        self.sender_address = 0


class _Refused(Exception):  # noqa: N818 - not an error of ours: a check of the driver's did not hold
    """An object cannot be translated; the negative errno goes to the sender's extended error."""

    def __init__(self, error: int) -> None:
        super().__init__(error)
        self.error = error


class _Data:
    """The sender's data: where it is, and its readable bytes where it is small enough to have been read at once."""

    __slots__ = ("address", "base", "region", "size", "whole")

    def __init__(self, address: int, size: int, region: Region, base: int) -> None:
        self.address = address
        self.size = size
        self.region = region
        self.base = base
        self.whole: bytes | None = None

    def copy(self, start: int, end: int) -> Generator[Effect, Any, bool]:
        """Copy the bytes from `start` to `end` into the buffer; false on a fault."""
        if self.whole is not None:
            if end > len(self.whole):
                return False
            self.region.store(self.base + start, self.whole[start:end])
            return True
        size = end - start
        copied: int = yield CopyToBuffer((self.address + start) & U64, size, self.region, self.base + start)
        return copied == size

    def read(self, start: int, size: int) -> Generator[Effect, Any, bytes]:
        """Read `size` bytes at `start`; fewer on a fault."""
        if self.whole is not None:
            return self.whole[start : start + size]
        data: bytes = yield CopyIn((self.address + start) & U64, size)
        return data


class Translation:
    """What is known of objects on their way, beyond `buffer.objects`; the last of `path` was fixed up last.

    `fixups`   a heap of (offset, 64-bit value, skip): to be written at that offset in the buffer, or `skip` bytes there
               to be left out
    `minimum`  where in the bytes of the last of `path` the next fix-up may be
    """

    __slots__ = ("fixups", "minimum", "pace", "path")

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.fixups: list[tuple[int, int, int]] = []
        self.path: list[TranslatedObject] = []
        self.minimum = 0

    def begin_path(self, record: TranslatedObject) -> Turns:
        """The object has no parent: nothing but its own bytes may be fixed up."""
        yield from drain(self.path, self.pace)
        self.path.append(record)
        self.minimum = 0

    def may_fix_up(self, parent: TranslatedObject, offset: int) -> Generator[Turn, Any, bool]:
        """Whether a fix-up at this offset in the bytes of `parent` comes in order (binder.c `binder_validate_fixup`).

        Only the buffer fixed up last, or one of its parents, and only behind the last fix-up there. An object at offset
        0 of the data cannot be the last: the driver takes 0 for "none".
        """
        path = self.path
        if not path or not path[-1].offset:
            return False
        while path[-1] is not parent:
            last = path.pop()
            if not path:
                return False
            self.minimum = last.parent_offset + 8
            if self.pace.spend():
                yield TURN
        return offset >= self.minimum

    def drop(self) -> Turns:
        """Let go of it all."""
        yield from drain(self.path, self.pace)
        yield from drain(self.fixups, self.pace)


def translate_objects(
    thread: Thread,
    transaction: Transaction,
    in_reply_to: Transaction | None,
    offsets: bytes,
    data_address: int,
    scatter_size: int,
    translation: Translation,
) -> Generator[Effect, Any, None]:
    """Copy the data of a transaction with its objects and scatter-gather buffers.

    `offsets` are 64-bit numbers; `scatter_size` is the room for PTR bytes, a multiple of 8. Raises `TransactionError`;
    in any case the caller drops `translation`.
    """
    from binderfs_fuse.engine.transaction import TransactionError  # noqa: PLC0415 - the two modules need each other

    pace = translation.pace
    buffer = transaction.buffer
    target = transaction.to_process
    assert buffer is not None and target is not None  # noqa: PT018 - both just set
    region = target.region
    base = buffer.offset
    data_size = buffer.data_size
    data = _Data(data_address, data_size, region, base)
    if data_size <= _SMALL_DATA and offsets:
        data.whole = yield CopyIn(data_address, data_size)
    offsets_start = (data_size + 7) & ~7
    for start in range(0, len(offsets), _STORED):
        region.store(base + offsets_start + start, offsets[start : start + _STORED])
        if start + _STORED < len(offsets):
            yield TURN
    scatter_offset = offsets_start + len(offsets)
    scatter_end = scatter_offset + scatter_size
    objects = buffer.objects = []
    has_copies = False
    position = minimum = 0
    for (offset,) in struct.iter_unpack("<Q", offsets):
        if offset != position and (
            position > offset or offset > data_size or not (yield from data.copy(position, offset))
        ):
            raise TransactionError(BR_FAILED_REPLY, -EFAULT, 3512)
        raw = b""
        object_type = size = 0
        room = min(_OBJECT_SIZE, data_size - offset)
        if room >= 4 and not offset & 3:
            raw = yield from data.read(offset, room)
            if len(raw) == room:
                object_type = int.from_bytes(raw[:4], "little")
                size = _SIZES.get(object_type, 0)
        if not size or room < size or offset < minimum:
            raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3525)
        position = minimum = offset + size
        raw = raw[:size]
        try:
            if object_type in (BINDER_TYPE_BINDER, BINDER_TYPE_WEAK_BINDER):
                line = 3553
                record, raw = _translate_binder(thread, target, offset, raw)
            elif object_type in (BINDER_TYPE_HANDLE, BINDER_TYPE_WEAK_HANDLE):
                line = 3572
                record, raw = _translate_handle(thread, target, offset, raw)
            elif object_type == BINDER_TYPE_FD:
                line = 3594
                _, flags, fd, cookie = uapi.binder_fd_object.unpack(raw)
                yield from _translate_fd(transaction, in_reply_to, fd, offset + _FD_OFFSET)
                record = TranslatedObject(offset, object_type, 0)
                raw = uapi.binder_fd_object.pack(object_type, flags, 0, cookie)
            elif object_type == BINDER_TYPE_FDA:
                _, _, count, parent_index, parent_offset = uapi.binder_fd_array_object.unpack(raw)
                parent = _parent(objects, parent_index)
                if parent is None:
                    raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3618)
                if not (yield from translation.may_fix_up(parent, parent_offset)):
                    raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3631)
                line = 3665
                record = TranslatedObject(offset, object_type, parent.value + parent_offset)
                record.length = count
                record.first_file = 0 if transaction.files is None else len(transaction.files)
                if count:
                    yield from _translate_fd_array(transaction, in_reply_to, record, parent, parent_offset, pace)
                    heappush(translation.fixups, (record.value, 0, 4 * count))
                translation.minimum = (parent_offset + 4 * count) & U64
            else:
                _, flags, address, length, parent_index, parent_offset = uapi.binder_buffer_object.unpack(raw)
                if length > scatter_end - scatter_offset:
                    raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3683)
                line = 3718
                record = TranslatedObject(offset, object_type, scatter_offset)
                record.flags = flags
                record.length = length
                record.parent = parent_index
                record.parent_offset = parent_offset
                record.sender_address = address
                has_copies = True
                scatter_offset += (length + 7) & ~7
                address = target.address + base + record.value
                if flags & BINDER_BUFFER_FLAG_HAS_PARENT:
                    parent = _parent(objects, parent_index)
                    if (
                        parent is None
                        or not (yield from translation.may_fix_up(parent, parent_offset))
                        or parent.length < 8
                        or parent_offset > parent.length - 8
                    ):
                        raise _Refused(-EINVAL)
                    heappush(translation.fixups, (parent.value + parent_offset, address, 0))
                    translation.path.append(record)
                    translation.minimum = 0
                else:
                    yield from translation.begin_path(record)
                raw = uapi.binder_buffer_object.pack(object_type, flags, address, length, parent_index, parent_offset)
        except _Refused as refusal:
            raise TransactionError(BR_FAILED_REPLY, refusal.error, line) from None
        objects.append(record)
        region.store(base + offset, raw)
        # As `pace.spend` does, without its call.
        pace.left -= 1
        if pace.left <= 0:
            pace.left = pace.chunk
            yield TURN
    if position != data_size and not (yield from data.copy(position, data_size)):
        raise TransactionError(BR_FAILED_REPLY, -EFAULT, 3743)
    if has_copies and not (yield from _copy_scattered(objects, translation, region, base)):
        raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3754)


def _ref_for_node(target: Process, node: Node, *, strong: bool, thread: Thread | None) -> int:
    """Count a reference of `target` to `node`, making the ref at need; its desc."""
    desc = target.increment_ref_for_node(node, strong=strong, target=thread)
    if desc < 0:
        raise _Refused(desc)
    return desc


def _translate_binder(thread: Thread, target: Process, offset: int, raw: bytes) -> tuple[TranslatedObject, bytes]:
    object_type, flags, ptr, cookie = uapi.flat_binder_object.unpack(raw)
    strong = object_type == BINDER_TYPE_BINDER
    node = thread.process.get_or_create_node(ptr, cookie, flags)
    if node is None:
        raise _Refused(-ENOMEM)
    try:
        if cookie != node.cookie:
            raise _Refused(-EINVAL)
        desc = _ref_for_node(target, node, strong=strong, thread=thread)
    finally:
        node.put()
    translated = BINDER_TYPE_HANDLE if strong else BINDER_TYPE_WEAK_HANDLE
    return (
        TranslatedObject(offset, translated, desc),
        uapi.flat_binder_object_handle.pack(translated, flags, desc, 0),
    )


def _translate_handle(thread: Thread, target: Process, offset: int, raw: bytes) -> tuple[TranslatedObject, bytes]:
    object_type, flags, handle, _ = uapi.flat_binder_object_handle.unpack(raw)
    strong = object_type == BINDER_TYPE_HANDLE
    ref = thread.process.ref(handle, strong=strong)
    if ref is None:
        raise _Refused(-EINVAL)
    node = ref.node
    node.tmp_refs += 1
    try:
        if node.process is target:
            translated = BINDER_TYPE_BINDER if strong else BINDER_TYPE_WEAK_BINDER
            node.increment(strong=strong, internal=False)
            return (
                TranslatedObject(offset, translated, node.ptr),
                uapi.flat_binder_object.pack(translated, flags, node.ptr, node.cookie),
            )
        desc = _ref_for_node(target, node, strong=strong, thread=None)
        return (
            TranslatedObject(offset, object_type, desc),
            uapi.flat_binder_object_handle.pack(object_type, flags, desc, 0),
        )
    finally:
        node.put()


def _translate_fd(
    transaction: Transaction, in_reply_to: Transaction | None, fd: int, offset: int
) -> Generator[Effect, Any, None]:
    if in_reply_to is not None:
        allowed = bool(in_reply_to.flags & TF_ACCEPT_FDS)
    else:
        buffer = transaction.buffer
        assert buffer is not None and buffer.target_node is not None  # noqa: PT018 - only a reply has no node
        allowed = buffer.target_node.accept_fds
    if not allowed:
        raise _Refused(-EPERM)
    file = yield GetFile(fd)
    if isinstance(file, int):
        raise _Refused(file)
    buffer = transaction.buffer
    target = transaction.to_process
    assert buffer is not None and target is not None  # noqa: PT018 - the descriptor is to go there
    if transaction.files is None:
        transaction.files = []
    transaction.files.append((file, target.region, buffer.offset + offset))


def _translate_fd_array(
    transaction: Transaction,
    in_reply_to: Transaction | None,
    record: TranslatedObject,
    parent: TranslatedObject,
    parent_offset: int,
    pace: Pace,
) -> Generator[Effect, Any, None]:
    size = 4 * record.length
    if size > U64 or size > parent.length or parent_offset > parent.length - size:
        raise _Refused(-EINVAL)
    address = (parent.sender_address + parent_offset) & U64
    if record.value & 3 or address & 3:
        raise _Refused(-EINVAL)
    numbers = yield CopyIn(address, size)
    for index in range(record.length):
        number = numbers[4 * index : 4 * index + 4]
        if len(number) != 4:
            raise _Refused(-EINVAL)
        yield from _translate_fd(transaction, in_reply_to, int.from_bytes(number, "little"), record.value + 4 * index)
        if pace.spend():
            yield TURN


def _parent(objects: list[TranslatedObject], index: int) -> TranslatedObject | None:
    """The PTR object at `index` of those before this one (binder.c `binder_validate_ptr`)."""
    if index < len(objects) and objects[index].type == BINDER_TYPE_PTR:
        return objects[index]
    return None


def _copy_scattered(
    objects: list[TranslatedObject], translation: Translation, region: Region, base: int
) -> Generator[Effect, Any, bool]:
    """Copy the bytes of all PTR objects, around and with their fix-ups; false on a fault."""
    fixups = translation.fixups
    pace = translation.pace
    for record in objects:
        if pace.spend():
            yield TURN
        if record.type != BINDER_TYPE_PTR:
            continue
        offset = record.value
        length = record.length
        done = 0
        while done < length:
            left = length - done
            size = left if not fixups else min(left, (fixups[0][0] - offset - done) & U64)
            if size:
                address = (record.sender_address + done) & U64
                copied = yield CopyToBuffer(address, size, region, base + offset + done)
                if copied != size:
                    return False
            done += size
            if size != left:
                position, value, skip = heappop(fixups)
                if skip:
                    done += skip
                elif position & 3:
                    # The driver writes into a buffer at multiples of four alone.
                    return False
                else:
                    region.store(base + position, value.to_bytes(8, "little"))
                    done += 8
                if pace.spend():
                    yield TURN
    return True


def release_few_objects(process: Process, thread: Thread | None, buffer: Buffer, *, is_failure: bool) -> None:
    """Drop what the objects in a buffer of `process` hold, all at once (binder.c `binder_transaction_buffer_release`).

    With `thread`, the descriptors of its FDAs are put on that thread's list to close, unless `is_failure`.
    """
    if buffer.target_node is not None:
        buffer.target_node.decrement(strong=True, internal=False)
    if buffer.objects:
        for record in buffer.objects:
            _release_object(process, record)
            if record.type == BINDER_TYPE_FDA and record.length and thread is not None and not is_failure:
                assert buffer.fds is not None  # it could not be freed before they were installed
                thread.closes += buffer.fds[record.first_file : record.first_file + record.length]
                thread.looper_need_return = True
        buffer.objects = None


def release_objects(process: Process, thread: Thread | None, buffer: Buffer, pace: Pace, *, is_failure: bool) -> Turns:
    """Do the same in turns; nobody else frees the buffer meanwhile."""
    node = buffer.target_node
    if node is not None:
        buffer.target_node = None
        node.decrement(strong=True, internal=False)
    objects = buffer.objects
    if objects is None:
        return
    buffer.objects = None
    for record in objects:
        _release_object(process, record)
        if record.type == BINDER_TYPE_FDA and record.length and thread is not None and not is_failure:
            assert buffer.fds is not None  # it could not be freed before they were installed
            thread.looper_need_return = True
            end = record.first_file + record.length
            for first in range(record.first_file, end, pace.chunk):
                thread.closes += buffer.fds[first : min(end, first + pace.chunk)]
                yield TURN
        if pace.spend():
            yield TURN
    yield from drain(objects, pace)


def _release_object(process: Process, record: TranslatedObject) -> None:
    """Drop the reference that an object holds, if it is of a kind that does."""
    kind = record.type
    if kind in (BINDER_TYPE_BINDER, BINDER_TYPE_WEAK_BINDER):
        node = process.nodes.get(record.value)
        if node is not None:
            node.tmp_refs += 1
            node.decrement(strong=kind == BINDER_TYPE_BINDER, internal=False)
            node.put()
    elif kind in (BINDER_TYPE_HANDLE, BINDER_TYPE_WEAK_HANDLE):
        strong = kind == BINDER_TYPE_HANDLE
        ref = process.ref(record.value, strong=strong)
        if ref is not None:
            ref.decrement(strong=strong)
