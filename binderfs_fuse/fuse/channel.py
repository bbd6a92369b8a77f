"""The channel: it owns /dev/fuse, and splits what comes from there into two planes.

Theory of operation
-------------------
The **device plane** (`device.py`: IOCTL, POLL, INTERRUPT, FLUSH and reads of a device) is answered by the thread that
reads it. Everything else is the **tree plane**: it goes to pyfuse3 over one end of a pair of sockets that keep message
boundaries. pyfuse3 takes the other end, as mountpoint ``/dev/fd/N``, for /dev/fuse itself. A pump carries its replies
back, and amends that to INIT, so that what is negotiated is what the two planes can do together: nothing is spliced (a
socket cannot be), no write is longer than a page (nobody writes here), and backing files are asked for where regions
may be passed through.

What every open needs does not go to pyfuse3 either: LOOKUP, FORGET, GETATTR, OPEN, RELEASE, and the READs of logs
(`inodes.py`, `texts.py`). Each hop to another thread costs a wake-up, and where many clients compute, a thread that
wakes up may wait for tens of ms. Nor does INTERRUPT: what is pyfuse3's is soon done.

The answer to OPEN of a device says that the client's mmap maps the open's memfd (`host/region.py`): FOPEN_PASSTHROUGH
and the backing id; with FOPEN_DIRECT_IO, which keeps read(2) and write(2) out of the memfd and leaves mmap alone.

Whether the kernel passes through shows when INIT has been answered: a backing file is tried at once. It needs Linux 6.9
and CAP_SYS_ADMIN outside of any user namespace.

Invariants
----------
- Only this process has /dev/fuse open. When it dies, the kernel fails every request and every one to come.
- Every request gets exactly one reply: from the channel's threads, or from pyfuse3, or, should code of this package
  raise, -EIO.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from binderfs_fuse import complaints, uapi
from binderfs_fuse._system import ffi, lib
from binderfs_fuse.fuse.lane import Crew
from binderfs_fuse.host.region import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from binderfs_fuse.fuse.device import DevicePlane, Open
    from binderfs_fuse.fuse.lane import Answer, Lane

_log = logging.getLogger(__name__)

_MESSAGE_ROOM: Final = (1 << 20) + 4096
_SOCKET_BUFFER: Final = 8 << 20
_SO_SNDBUFFORCE: Final = 32
_MAX_WRITE: Final = 4096
_SHORT: Final[int] = lib.EVENT_SHORT
_FLAG2_PASSTHROUGH: Final = uapi.FUSE_PASSTHROUGH >> 32
# A thread that computes lets go of the interpreter after this many seconds if another one wants it.
_SWITCH_INTERVAL: Final = 0.0001

# What the kernel offers and is not taken up: see the theory of operation; MAX_PAGES keeps messages below 128 KiB.
_REFUSED: Final = (
    uapi.FUSE_SPLICE_READ
    | uapi.FUSE_SPLICE_WRITE
    | uapi.FUSE_SPLICE_MOVE
    | uapi.FUSE_WRITEBACK_CACHE
    | uapi.FUSE_MAX_PAGES
)

_IN_SIZE: Final = uapi.fuse_in_header.size
_OUT_SIZE: Final = uapi.fuse_out_header.size
_FLAGS_IN: Final = _IN_SIZE + uapi.fuse_init_in.offsets["flags"]
_FLAGS2_IN: Final = _IN_SIZE + uapi.fuse_init_in.offsets["flags2"]
_INIT_OUT: Final = {name: _OUT_SIZE + offset for name, offset in uapi.fuse_init_out.offsets.items()}


def _get(message: memoryview | bytearray | bytes, offset: int, size: int = 4) -> int:
    return int.from_bytes(message[offset : offset + size], sys.byteorder)


def _put(message: memoryview | bytearray, offset: int, value: int) -> None:
    message[offset : offset + 4] = value.to_bytes(4, sys.byteorder)


class Reads(Protocol):
    """What serves READs of files other than devices, as far as these have text."""

    def attach(self, post: Callable[..., None], answer: Callable[[int, int, bytes], object]) -> None:
        """Take what calls a function in a thread, and what answers a READ: unique, 0 or a negative errno, data."""

    def has(self, handle: int) -> bool:
        """Tell whether READs of this open are served here."""

    def read(self, unique: int, handle: int, offset: int, size: int) -> tuple[int, bytes] | None:
        """Serve a READ: 0 or a negative errno, and data; None: it is answered later. Never waits."""

    def withdraw(self, unique: int) -> bool:
        """Take back a READ that is to be answered later; tell whether there was such a one."""


class Files(Protocol):
    """What serves the requests that every open needs; all but `forget` and `release` may raise `OSError`."""

    @property
    def texts(self) -> Reads:
        """What serves READs of logs."""

    def look_up(self, parent: int, name: bytes, uid: int) -> bytes:
        """Find a name; return a ``struct fuse_entry_out``."""

    def attributes(self, inode: int) -> bytes:
        """Return a ``struct fuse_attr_out``."""

    def forget(self, inode: int, lookups: int) -> None:
        """Take back so many lookups of an inode."""

    def open(self, inode: int, flags: int, tid: int, uid: int) -> tuple[int, int]:
        """Open a file; return its handle and FOPEN flags."""

    def release(self, handle: int) -> None:
        """Forget an open file."""


class Channel:
    """All traffic of one mount, over `fuse_fd`, which it takes over; `files` serves what every open needs.

    `tree_fd` is for pyfuse3 to take over. Nothing is read before `start`. `closed` is set when the connection has
    ended; `hang_up`, which one may replace, is called then, by a thread of the channel. It makes pyfuse3's main loop
    raise `OSError`.
    """

    def __init__(self, fuse_fd: int, devices: DevicePlane, files: Files) -> None:
        self._fuse_fd = fuse_fd
        os.set_inheritable(fuse_fd, False)
        # For ever: a thread that is stuck may come back to it at any time.
        self.core: Any = lib.channel_create(fuse_fd)
        if self.core == ffi.NULL:
            raise MemoryError
        self._devices = devices
        self.crew = Crew(self.core, self._lead, devices.look, devices.restore, devices.blame)
        self._handlers = devices.attach(self)
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, theirs):
            _widen(end)
        self.tree_fd = theirs.detach()
        self._pump_thread = threading.Thread(target=self._pump, name="binder-pump", daemon=True)
        # The flags that INIT offered, in two halves, until that is answered.
        self._offered: tuple[int, int] | None = None
        # Set once INIT has been answered, and it is known which kind of region there is.
        self._settled = threading.Event()
        self._files = files
        self._reads = files.texts
        self._reads.attach(self.crew.post, self._answer_read)
        self._handlers.update(
            {
                uapi.FUSE_LOOKUP: functools.partial(self._answer_with, self._look_up),
                uapi.FUSE_FORGET: self._forget,
                uapi.FUSE_BATCH_FORGET: self._forget_batch,
                uapi.FUSE_GETATTR: functools.partial(self._answer_with, self._get_attributes),
                uapi.FUSE_OPEN: functools.partial(self._answer_with, self._open),
                uapi.FUSE_RELEASE: self._release,
            }
        )
        self.closed = threading.Event()
        self.hang_up: Callable[[], object] = self._hang_up

    def start(self) -> None:
        """Start to answer."""
        sys.setswitchinterval(_SWITCH_INTERVAL)
        self._pump_thread.start()
        self.crew.start()

    def stop(self) -> None:
        """Stop to answer, after the mount has gone: end what threads can be ended, and pyfuse3's main loop.

        The descriptors are closed unless a thread is stuck, which could find something else under their numbers.
        """
        self.closed.set()
        self._hang_up()
        ended = self.crew.stop()
        self._devices.stop()
        self._pump_thread.join()
        self._ours.close()
        if ended and self._fuse_fd >= 0:
            os.close(self._fuse_fd)
            self._fuse_fd = -1

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)

    # From the kernel.

    def _lead(self, lane: Lane) -> bool:
        """Serve requests as the leader until another lane leads (true) or the connection is gone (false)."""
        pointer = lane.pointer
        receive = lib.lane_receive
        exchange = lib.lane_exchange
        handlers = self._handlers
        relay = self.relay
        lane.leads = True
        answer = self._devices.work_off(lane, None)
        while True:
            event: int = receive(pointer) if answer is None else exchange(pointer, *answer)
            # Closed or demoted.
            if event < 0 and event != _SHORT:
                break
            try:
                answer = handlers.get(event, relay)(lane)
            except Exception:  # noqa: BLE001 - no request may go unanswered
                complaints.mistake(f"{uapi.OPCODE_NAMES.get(lane.fields.opcode, lane.fields.opcode)} failed")
                answer = plain(lane.fields.unique, -errno.EIO)
        lane.leads = False
        if event == lib.EVENT_CLOSED:
            if lane.fields.error not in (errno.ENODEV, errno.ECONNABORTED):
                _log.error("reading from /dev/fuse: %s", os.strerror(lane.fields.error))
            self.closed.set()
            self.hang_up()
            return False
        return True

    def withdraw(self, unique: int) -> bool:
        """Take back the READ of a log that waits for its text; tell whether there was such a one."""
        return self._reads.withdraw(unique)

    def relay(self, lane: Lane) -> Answer | None:
        """Hand the request at hand to pyfuse3; return the answer if pyfuse3 has left."""
        self._devices.collector.count()
        fields = lane.fields
        message: bytes | bytearray = lane.message[: fields.length]
        if fields.opcode == uapi.FUSE_INIT:
            message = self._offer(bytearray(message))
        try:
            self._ours.send(message)
        except OSError:
            return plain(fields.unique, -errno.ENODEV)
        return None

    def read(self, lane: Lane) -> Answer | None:
        """Serve the READ at hand, of a log or, with an error, of what is none."""
        fields = lane.fields
        handle, offset, size, *_ = uapi.fuse_read_in.unpack_from(lane.message, _IN_SIZE)
        if not self._reads.has(handle):
            return self.relay(lane)
        served = self._reads.read(fields.unique, handle, offset, size)
        return None if served is None else plain(fields.unique, served[0], served[1])

    # What every open needs.

    def _answer_with(self, serve: Callable[[Lane], bytes], lane: Lane) -> Answer:
        """Answer the request at hand with what `serve` returns, or the number of the `OSError` that it raises.

        Not before INIT is settled: the kernel sends more as soon as it has the answer.
        """
        self._settled.wait()
        unique = lane.fields.unique
        try:
            return plain(unique, 0, serve(lane))
        except OSError as error:
            return plain(unique, -(error.errno or errno.EIO))

    def _look_up(self, lane: Lane) -> bytes:
        fields = lane.fields
        name = lane.message[_IN_SIZE : fields.length].partition(b"\0")[0]
        return self._files.look_up(_inode(lane), name, fields.uid)

    def _forget(self, lane: Lane) -> None:
        self._files.forget(_inode(lane), uapi.fuse_forget_in.unpack_from(lane.message, _IN_SIZE)[0])

    def _forget_batch(self, lane: Lane) -> None:
        count = uapi.fuse_batch_forget_in.unpack_from(lane.message, _IN_SIZE)[0]
        offset = _IN_SIZE + uapi.fuse_batch_forget_in.size
        for _ in range(min(count, (lane.fields.length - offset) // uapi.fuse_forget_one.size)):
            inode, lookups = uapi.fuse_forget_one.unpack_from(lane.message, offset)
            self._files.forget(inode, lookups)
            offset += uapi.fuse_forget_one.size

    def _get_attributes(self, lane: Lane) -> bytes:
        return self._files.attributes(_inode(lane))

    def _open(self, lane: Lane) -> bytes:
        # Should this take long, it is not the fault of the last call's client.
        lane.serving = None
        fields = lane.fields
        flags, _ = uapi.fuse_open_in.unpack_from(lane.message, _IN_SIZE)
        handle, answer_flags = self._files.open(_inode(lane), flags, fields.tid, fields.uid)
        backing_id = 0
        opened = self._devices.opens.get(handle)
        if opened is not None:
            backing_id = self._open_region(opened)
            if backing_id:
                answer_flags = uapi.FOPEN_PASSTHROUGH | uapi.FOPEN_DIRECT_IO
        packed: bytes = uapi.fuse_open_out.pack(handle, answer_flags, backing_id)
        return packed

    def _open_region(self, opened: Open) -> int:
        """Say how the region of an open comes into its client: the id of a backing file, or 0 for the page cache."""
        region = opened.region
        if region.kind is Kind.PASSTHROUGH:
            backing_id: int = lib.channel_backing_open(self.core, region.fd)
            if backing_id > 0:
                opened.backing_id = backing_id
            else:
                line = f"no backing file ({os.strerror(-backing_id)}): page cache instead"
                complaints.say(opened.identity.euid, line)
                region.kind = Kind.PAGE_CACHE
        region.close_descriptor()
        return opened.backing_id

    def _release(self, lane: Lane) -> Answer:
        self._files.release(uapi.fuse_release_in.unpack_from(lane.message, _IN_SIZE)[0])
        return plain(lane.fields.unique, 0)

    def _offer(self, message: bytearray) -> bytearray:
        """Leave only what we can do in what the kernel offers."""
        flags = _get(message, _FLAGS_IN)
        self._offered = flags, _get(message, _FLAGS2_IN) if flags & uapi.FUSE_INIT_EXT else 0
        _put(message, _FLAGS_IN, flags & ~_REFUSED)
        return message

    # From pyfuse3.

    def _pump(self) -> None:
        message = memoryview(bytearray(_MESSAGE_ROOM))
        receive = self._ours.recv_into
        while True:
            try:
                length = receive(message)
            except OSError:
                return
            if not length:
                return
            self._carry(message[:length])

    def _carry(self, message: memoryview) -> None:
        unique = _get(message, 8, 8)
        if not unique:
            # A notification, which may wait for the answer to a request that is yet to be carried.
            self.crew.post(self._write, bytes(message))
        elif self._offered is not None:
            try:
                self._carry_init(message, *self._offered)
            finally:
                self._offered = None
                self._settled.set()
        else:
            self._write(message)

    def _carry_init(self, message: memoryview, offered: int, flags2: int) -> None:
        """Answer INIT, and find out which kind of region there can be."""
        passthrough = self._devices.wants_passthrough and bool(flags2 & _FLAG2_PASSTHROUGH)
        if len(message) <= _INIT_OUT["max_stack_depth"]:
            self._write(message)
            return
        _put(message, _INIT_OUT["max_write"], _MAX_WRITE)
        # Or the kernel lets one process at a time look anything up in a directory, or list it.
        flags = _get(message, _INIT_OUT["flags"]) | (offered & uapi.FUSE_PARALLEL_DIROPS)
        _put(message, _INIT_OUT["flags"], flags | (uapi.FUSE_INIT_EXT if passthrough else 0))
        if passthrough:
            _put(message, _INIT_OUT["flags2"], _get(message, _INIT_OUT["flags2"]) | _FLAG2_PASSTHROUGH)
            _put(message, _INIT_OUT["max_stack_depth"], 1)
        self._write(message)
        if passthrough and self._can_pass_through():
            self._devices.kind = Kind.PASSTHROUGH

    def _can_pass_through(self) -> bool:
        descriptor = os.memfd_create("binder-probe")
        try:
            backing_id: int = lib.channel_backing_open(self.core, descriptor)
        finally:
            os.close(descriptor)
        if backing_id > 0:
            lib.channel_backing_close(self.core, backing_id)
        return backing_id > 0

    def _write(self, message: memoryview | bytes) -> None:
        try:
            os.write(self._fuse_fd, message)
        except OSError as error:
            # ENOENT: the request, or the inode of a notification, is gone. ENODEV: so is the mount.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                complaints.say(None, f"writing to /dev/fuse: {error.strerror}", logging.ERROR)
                if unique := _get(message, 8, 8):
                    self.answer(plain(unique, -errno.EIO))

    def _answer_read(self, unique: int, error: int, data: bytes) -> None:
        self.answer(plain(unique, error, data))

    def answer(self, answer: Answer) -> int:
        """Answer a request now. Return the bytes stored in the caller; fewer than there were: it is not answered."""
        stored: int = lib.channel_deliver(self.core, *answer)
        return stored


def _inode(lane: Lane) -> int:
    return int(uapi.fuse_in_header.unpack_from(lane.message)[3])


def plain(unique: int, error: int, payload: bytes = b"") -> Answer:
    """Make the answer to a request that is no ioctl: a negative errno, or what it asked for."""
    return unique, lib.ANSWER_PLAIN, error, payload, len(payload), 0, 0, b"", 0


def _widen(end: socket.socket) -> None:
    """Make room for many messages: the thread that reads /dev/fuse should not have to wait for pyfuse3."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
