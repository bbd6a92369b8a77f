"""Clients of a mount that do whatever a fuzzer decides, and a kernel that carries it to the channel.

Theory of operation
-------------------
A `Mount` has a genuine engine, device plane and channel, with one end of a pair of sockets for /dev/fuse. At the other
end the fuzzer plays the kernel, which is to be trusted: each request has a header that is right, the handle of an open,
a task that has no other request; RELEASE comes last. It plays the tree, too. All that clients decide is the fuzzer's:
ioctls, arguments, memory, which is genuine (that of processes that sleep), interrupts at any time, who opens what.

There is one lane, which is told to lead and never watched, and no other thread: what is posted to workers or to the
clock waits until the fuzzer has it done. So what broke once breaks again.

What is held against the channel and the device plane:

- they raise nothing, and log no error;
- each request gets one reply, but for those that the kernel waits for none, and nothing else gets one;
- the engine's invariants hold between any two requests;
- when all is closed, nothing is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import heapq
import logging
import mmap
import os
import resource
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse import uapi
from binderfs_fuse._system import lib
from binderfs_fuse.engine import Engine, invariants
from binderfs_fuse.fuse.channel import Channel
from binderfs_fuse.fuse.device import DevicePlane
from binderfs_fuse.fuse.lane import Lane
from binderfs_fuse.fuse.settings import Settings
from binderfs_fuse.fuse.texts import Texts
from binderfs_fuse.host.region import unmap_released
from fuzz.choices import Choices
from fuzz.compose import Composer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from binderfs_fuse.engine import Context
    from binderfs_fuse.fuse.device import Open
    from binderfs_fuse.fuse.workers import Pool
    from binderfs_fuse.host.files import File

MAX_STEPS: Final = 250
MAX_OPENS: Final = 5
VICTIMS: Final = 5
_PAGE: Final = mmap.PAGESIZE
_ARENA: Final = 64 * _PAGE
_ROOM: Final = 48 * _PAGE
_BUFFER: Final = 32 << 20
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_PR_SET_PDEATHSIG: Final = 1
_NO_REPLY: Final = (uapi.FUSE_FORGET, uapi.FUSE_BATCH_FORGET, uapi.FUSE_INTERRUPT)
_TREE_OPCODES: Final = (
    uapi.FUSE_LOOKUP,
    uapi.FUSE_GETATTR,
    uapi.FUSE_FORGET,
    uapi.FUSE_BATCH_FORGET,
    uapi.FUSE_WRITE,
    uapi.FUSE_READ,
    uapi.FUSE_STATFS,
    999,
)
_INODE: Final = 77
_MAPPED_AT: Final = 0x7000_0000_0000


class Broken(Exception):  # noqa: N818 - the mount is
    """The mount did what it must never do."""


class _Alarm(logging.Handler):
    """Takes each error that is logged for one."""

    def emit(self, record: logging.LogRecord) -> None:
        raise Broken(record.getMessage())


class Victims:
    """Processes that sleep; they have a piece of memory in common with this one, and at its end what is none."""

    def __init__(self) -> None:
        self._arena = mmap.mmap(-1, _ARENA + _PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._arena))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect(ctypes.c_void_p(self.address + _ARENA), ctypes.c_size_t(_PAGE), 0)
        self.targets: Sequence[int] = (
            self.address + _ROOM,
            self.address + _ROOM + 2 * _PAGE,
            self.address + _ARENA - 64,
        )
        self._next = 0
        self.tids = [self._fork(libc) for _ in range(VICTIMS)]

    @staticmethod
    def _fork(libc: ctypes.CDLL) -> int:
        pid = os.fork()
        if pid:
            return pid
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(0, 5)
        while True:
            signal.pause()

    def anew(self) -> None:
        """Let them be as they were."""
        self._next = 0
        self._arena[:_ARENA] = bytes(_ARENA)
        for tid in self.tids:
            os.setpriority(os.PRIO_PROCESS, tid, 0)

    def place(self, data: bytes) -> int:
        """Put bytes into the memory, over older ones when it is full."""
        data = data[:_ROOM]
        if self._next + len(data) > _ROOM:
            self._next = 0
        start = self._next
        self._arena[start : start + len(data)] = data
        self._next = start + len(data) + 7 & ~7
        return self.address + start


class _Installer:
    """Installs no files, but says what a real one can say, when the fuzzer has it done."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount

    def install(
        self,
        tid: int,
        files: Sequence[File],
        *,
        reply: Callable[[], bool],
        patch: Callable[[list[int]], int | None],
        failed: Callable[[int], int | None],
        closes: Sequence[int] = (),
        handle: int = 0,
        user: int = 0,
    ) -> None:
        """See `host.files.FileInstaller.install`."""
        del tid, closes, handle, user

        def run() -> None:
            kind = self._mount.choices.below(8)
            if kind == 7:
                failed(-errno.EPERM)
            elif not reply():
                failed(-errno.ECONNABORTED)
            elif kind == 6:
                failed(-errno.EMFILE)
            elif kind == 5:
                failed(-errno.ESRCH)
            else:
                patch(list(range(3, 3 + len(files))))
            for file in files:
                file.close()

        self._mount.crew.post(run)

    def withdraw(self, tid: int) -> bool:
        """See `host.files.FileInstaller.withdraw`."""
        del tid
        return False


class _Files:
    """What every open needs: names and inodes that mean nothing, and opens of `context`."""

    def __init__(self, mount: Mount, plane: DevicePlane, context: Context) -> None:
        self._mount = mount
        self._plane = plane
        self.context = context
        self.texts = Texts(Engine(time.monotonic_ns).quota, _no_text)
        self.opens: dict[int, Open] = {}
        self._next_handle = 1

    def look_up(self, parent: int, name: bytes, uid: int) -> bytes:
        """See `fuse.channel.Files.look_up`."""
        del parent, uid
        if len(name) % 2:
            raise OSError(errno.ENOENT, "")
        return bytes(uapi.fuse_entry_out.size)

    def attributes(self, inode: int) -> bytes:
        """See `fuse.channel.Files.attributes`."""
        del inode
        return bytes(uapi.fuse_attr_out.size)

    def forget(self, inode: int, lookups: int) -> None:
        """See `fuse.channel.Files.forget`."""

    def open(self, inode: int, flags: int, tid: int, uid: int) -> tuple[int, int]:
        """See `fuse.channel.Files.open`."""
        handle = self._next_handle
        self._next_handle += 1
        try:
            opened = self._plane.open(handle, inode + handle, self.context, tid, uid, flags)
        except OSError:
            _require(not tid, "an open failed")
            raise
        self.opens[handle] = opened
        self._mount.map(handle, opened)
        return handle, uapi.FOPEN_NONSEEKABLE

    def release(self, handle: int) -> None:
        """See `fuse.channel.Files.release`."""
        self._plane.release(handle)


def _no_text(source: object, check: object) -> bytes:
    raise AssertionError(source, check)


class Mount:
    """One run over the decisions in `data`."""

    def __init__(self, data: bytes, victims: Victims) -> None:
        self.choices = Choices(data)
        self._composer = Composer(self.choices)
        self._victims = victims
        priority = "android" if self.choices.rarely(4) else "kernel"
        self._engine = Engine(time.monotonic_ns, android_priority=priority == "android")
        self._contexts = [self._engine.add_context("binder"), self._engine.add_context("hwbinder")]
        self._plane = DevicePlane(self._engine, Settings(priority=priority))
        self._kernel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._kernel, theirs):
            # As root there is more room than the system's limit.
            with contextlib.suppress(PermissionError):
                end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
                end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        self._fuse = theirs.detach()
        self._files = _Files(self, self._plane, self._contexts[0])
        self._channel = Channel(self._fuse, self._plane, self._files)
        self._tree = socket.socket(fileno=self._channel.tree_fd)
        self._plane._installer = _Installer(self)  # type: ignore[assignment]
        self.crew = self._channel.crew
        # No threads: what they would do waits in the crew's lists.
        for pool in self._pools():
            pool.most = 0
        self.crew._clock._running = True
        self._plane.turns.alone = True
        self._lane = Lane(self._channel.core)
        self._lane.leads = True
        self.crew.lanes.add(self._lane)
        self.crew.leader = self._lane
        lib.lane_lead(self._lane.pointer)
        self._answer: Any = None
        self._handlers: dict[int, Any] = self._channel._handlers
        self._unique = 0
        # Requests without a reply: (opcode, tid, handle) by `unique`; opens by handle; what the tree is to answer.
        self._waiting: dict[int, tuple[int, int, int]] = {}
        self._opens = self._files.opens
        self._asked: list[bytes] = []

    # The run.

    def run(self) -> None:
        """Do what the data says, then close everything and see what is left."""
        try:
            self._request(uapi.FUSE_INIT, uapi.fuse_init_in.pack(7, 45, 1 << 17, 0xFFFF_FFFF, 0xFFFF_FFFF))
            self._settle()
            for _ in range(2 + self.choices.below(2)):
                self._open(self._contexts[0])
            self._begin()
            for _ in range(MAX_STEPS):
                if not self.choices:
                    break
                self._do_something()
                invariants.check(self._engine)
            self._end()
        finally:
            self._kernel.close()
            self._tree.close()
            self._channel._ours.close()
            os.close(self._fuse)
            unmap_released()

    def _begin(self) -> None:
        """Have a manager, and an object of each other open known to it."""
        accepts = uapi.flat_binder_object.pack(uapi.BINDER_TYPE_BINDER, 0x17F, 0, 0)
        for handle, opened in list(self._opens.items()):
            tid = opened.identity.pid
            if handle == 1:
                self._ioctl(handle, tid, uapi.BINDER_SET_CONTEXT_MGR_EXT, accepts)
            else:
                argument, _ = self._composer.introduce(self._victims)
                self._ioctl(handle, tid, uapi.BINDER_WRITE_READ, argument)

    def _do_something(self) -> None:
        kind = self.choices.below(16)
        if kind < 8:
            self._call()
        elif kind == 8:
            self._poll()
        elif kind == 9:
            self._interrupt(self.choices.pick(sorted(self._waiting) or [3]) if not self.choices.rarely(8) else 10**6)
        elif kind == 10:
            self._do_job()
        elif kind == 11:
            self._reply_of_tree()
        elif kind == 12:
            self._tree_request()
        elif kind == 13:
            self._come_or_go()
        elif kind == 14:
            self._look()
        else:
            self._shun()

    # The kernel's side.

    def _request(self, opcode: int, body: bytes, tid: int = 0, handle: int = 0, uid: int = 0) -> int:
        """Send a request, and have it served; return its `unique`."""
        self._unique += 2
        unique = self._unique
        if opcode not in _NO_REPLY:
            self._waiting[unique] = opcode, tid, handle
        header = uapi.fuse_in_header.pack(
            uapi.fuse_in_header.size + len(body), opcode, unique, _INODE, uid, uid, tid, 0
        )
        self._kernel.send(header + body)
        self._serve()
        return unique

    def _serve(self) -> None:
        """Do what a leader does, for one request."""
        pointer = self._lane.pointer
        answer = self._answer
        while True:
            event = lib.lane_receive(pointer) if answer is None else lib.lane_exchange(pointer, *answer)
            _require(event >= 0 or event == lib.EVENT_SHORT, f"event {event}")
            answer = self._handlers.get(event, self._channel.relay)(self._lane)
            if event != lib.EVENT_SHORT:
                break
        self._answer = answer
        self._hear()

    def _settle(self) -> None:
        """Give the last answer, and those of the tree."""
        answer, self._answer = self._answer, None
        self._plane._deliver(self._lane, answer)
        self._hear()
        while self._asked:
            self._reply_of_tree()

    def _hear(self) -> None:
        """Take what the channel has said."""
        while True:
            try:
                message = self._kernel.recv(_BUFFER, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            length, error, unique = uapi.fuse_out_header.unpack_from(message)
            _require(length == len(message), f"a length of {length} in a message of {len(message)}")
            if unique:
                _require(-1000 < error <= 0, f"error {error}")
                _require(unique in self._waiting, f"a reply to {unique}, which waits for none")
                del self._waiting[unique]
        while True:
            try:
                self._asked.append(self._tree.recv(_BUFFER, socket.MSG_DONTWAIT))
            except BlockingIOError:
                break

    def _is_busy(self, tid: int) -> bool:
        return any(tid == waiting for _, waiting, _ in self._waiting.values())

    def _pick_task(self) -> int:
        """Return a task that has no request, or 0, for one that the server does not see; -1 where all are busy."""
        if self.choices.rarely(64):
            return 0
        tids = [tid for tid in self._victims.tids if not self._is_busy(tid)]
        return self.choices.pick(tids) if tids else -1

    def _pick_open(self) -> int:
        return self.choices.pick(sorted(self._opens) or [0])

    def _ioctl(self, handle: int, tid: int, command: int, argument: bytes, uid: int = 0) -> None:
        in_size = uapi.ioctl_size(command) if command >> 30 & 1 else 0
        out_size = uapi.ioctl_size(command) if command >> 31 else 0
        body = uapi.fuse_ioctl_in.pack(handle, 0, command, self._victims.targets[1], in_size, out_size)
        self._request(uapi.FUSE_IOCTL, body + argument[:in_size].ljust(in_size, b"\0"), tid, handle, uid)

    def _call(self) -> None:
        tid = self._pick_task()
        handle = self._pick_open()
        opened = self._opens.get(handle)
        if tid < 0 or opened is None:
            return
        process = opened.process
        command, argument, _ = self._composer.ioctl(self._victims, process, tid, self._victims.tids)
        self._ioctl(handle, tid, command, argument, (0, 0, 0, 1000)[self.choices.below(4)])

    def _poll(self) -> None:
        tid = self._pick_task()
        handle = self._pick_open() if not self.choices.rarely(8) else 10**6
        if tid >= 0:
            body = uapi.fuse_poll_in.pack(handle, 500 + handle, self.choices.below(4), self.choices.below(256))
            self._request(uapi.FUSE_POLL, body, tid, handle)

    def _interrupt(self, unique: int) -> None:
        self._request(uapi.FUSE_INTERRUPT, uapi.fuse_interrupt_in.pack(unique))

    def _tree_request(self) -> None:
        opcode = self.choices.pick(_TREE_OPCODES)
        body = self.choices.bytes(self.choices.below(64))
        tid = self._pick_task()
        if opcode == uapi.FUSE_READ:
            handle = self._pick_open()
            offset = self.choices.number(0, _PAGE) & (1 << 63) - 1
            body = uapi.fuse_read_in.pack(handle, offset, self.choices.below(33) * _PAGE, 0, 0, 0)
        if tid >= 0:
            self._request(opcode, body.ljust(8, b"\0"), tid)

    # Opens.

    def _open(self, context: Context) -> None:
        """Open a device."""
        tid = self._pick_task()
        if tid < 0:
            return
        self._files.context = context
        flags = os.O_RDWR | (os.O_NONBLOCK if self.choices.rarely(6) else 0)
        unique = self._request(uapi.FUSE_OPEN, uapi.fuse_open_in.pack(flags, 0), tid)
        self._settle()
        _require(unique not in self._waiting, "an open is not answered")

    def map(self, handle: int, opened: Open) -> None:
        """Map a device that was opened just now, or do not."""
        if not self.choices.rarely(6):
            size = self.choices.pick((1 << 20, 2 * _PAGE, 8 << 20, _PAGE))
            opened.process.map(_MAPPED_AT + (handle << 32), size)

    def _come_or_go(self) -> None:
        if self.choices.rarely(3):
            handle = self._pick_open()
            if handle and not any(handle == waiting for _, _, waiting in self._waiting.values()):
                self._close(handle)
        elif self.choices.rarely(4):
            handle = self._pick_open()
            if handle:
                self._flush(handle)
        elif len(self._opens) < MAX_OPENS:
            self._open(self.choices.pick(self._contexts))

    def _close(self, handle: int) -> None:
        self._flush(handle)
        del self._opens[handle]
        body = uapi.fuse_release_in.pack(handle, os.O_RDWR, 0, 0)
        self._settle_request(self._request(uapi.FUSE_RELEASE, body, 0, handle))

    def _flush(self, handle: int) -> None:
        tid = self._pick_task()
        self._settle_request(self._request(uapi.FUSE_FLUSH, uapi.fuse_flush_in.pack(handle, 0), max(tid, 0)))

    def _settle_request(self, unique: int) -> None:
        self._settle()
        _require(unique not in self._waiting, "a request that nobody can hold up is not answered")

    # The tree's side.

    def _reply_of_tree(self) -> None:
        """Have the tree answer one request: with an error, or with what means nothing."""
        if not self._asked:
            return
        message = self._asked.pop(self.choices.below(len(self._asked)))
        _, opcode, unique, *_ = uapi.fuse_in_header.unpack_from(message)
        if opcode in _NO_REPLY:
            return
        error, payload = 0, b""
        if opcode == uapi.FUSE_INIT:
            payload = uapi.fuse_init_out.pack(7, 38, 1 << 17, 0, 12, 9, 1 << 20, 1, 0, 0, 0, 0, 0)
        elif self.choices.rarely(2):
            error = -errno.ENOSYS
        else:
            payload = self.choices.bytes(self.choices.below(64))
        reply = uapi.fuse_out_header.pack(uapi.fuse_out_header.size + len(payload), error, unique) + payload
        self._channel._carry(memoryview(bytearray(reply)))
        self._hear()

    # What other threads would do.

    def _do_job(self) -> None:
        entries = self.crew._clock._entries
        if not self._do_work() and entries:
            _, _, timer = heapq.heappop(entries)
            if timer.job is not None:
                timer.job(*timer.arguments)
        self._hear()

    def _do_work(self) -> bool:
        return any(pool.do_one() for pool in self._pools())

    def _pools(self) -> Sequence[Pool]:
        return self.crew.workers, self.crew.client_workers, self.crew.turn_worker, self.crew.end_workers

    def _look(self) -> None:
        self._plane.look(idle=self.choices.rarely(2))
        for text in (self._engine.logs.state(hashed=False), self._engine.logs.stats()):
            "".join(text)

    def _shun(self) -> None:
        """Have all requests of an open wait, or go on."""
        crew = self.crew
        handle = self._pick_open()
        if not handle:
            return
        if handle in crew._shunned:
            self._pardon(handle)
        elif len(crew._shunned) < 4:
            crew._shunned.add(handle)
            lib.channel_shun(self._channel.core, handle)

    def _pardon(self, handle: int) -> None:
        self.crew._shunned.discard(handle)
        lib.channel_pardon(self._channel.core, handle)
        self.crew._rescuer = Lane(self._channel.core)
        self.crew._rescue(self.crew._rescuer)
        self._hear()

    # The end.

    def _end(self) -> None:
        for handle in sorted(self.crew._shunned):
            self._pardon(handle)
        self._settle()
        while self._do_work():
            self._hear()
        for unique, (opcode, _, _) in list(self._waiting.items()):
            if opcode == uapi.FUSE_IOCTL and unique in self._waiting:
                self._interrupt(unique)
                self._settle()
                while self._do_work():
                    self._hear()
        _require(not self._waiting, f"no reply to {self._waiting}")
        for handle in list(self._opens):
            self._close(handle)
        while self._do_work():
            self._hear()
        self._hear()
        self.crew._clock._entries.clear()
        invariants.check(self._engine, quiet=True)
        _require(not self._engine.processes, "processes left")
        _require(not self._engine.dead_nodes, "dead nodes left")
        _require(not self._plane._parked, "parked calls left")
        _require(not self._plane.transfers, "transfers left")


def _require(holds: object, what: str) -> None:
    if not holds:
        raise Broken(what)


@functools.cache
def _victims() -> Victims:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    log = logging.getLogger("binderfs_fuse")
    log.addHandler(_Alarm(logging.ERROR))
    log.propagate = False
    return Victims()


def run(data: bytes) -> None:
    """Play what `data` decides. Raises what the mount raises, and `Broken`."""
    victims = _victims()
    victims.anew()
    Mount(data, victims).run()
