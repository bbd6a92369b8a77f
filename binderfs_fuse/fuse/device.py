"""The device plane: IOCTL, POLL, INTERRUPT and reads of an open device, each a drive of the engine.

Theory of operation
-------------------
An ioctl is a `Call`. Its step is resumed under the engine's lock and yields effects, which are performed without it;
when it waits, the call is *parked*: its request stays unanswered, and the thread goes on to the next. Whoever resumes a
step looks afterwards at `Engine.ready`, for calls that it woke, and at `Engine.poll_ready`. So in the common case - a
client calls, a parked server is woken - one thread does it all, and the last answer leaves together with the next read
(`lane_exchange`).

Whom a call has woken goes before its caller, who has less to do next, if anything (4 us of a call's 50). All of it is
in `Lane.work`, the caller's answer too, where a new leader finds the rest should this thread be held up; and it goes
before whatever touches the caller's memory and may hold that up, but for the first bytes of its read (`_copy_out`).

**INTERRUPT** ends a parked call with -EINTR. If the call is being served just then, it is marked, and does not park any
more. If it is stuck, nothing but a SIGKILL matters, as with the kernel's driver; the client is then let go (-EINTR,
which it will not see), and the step's own answer comes too late, which the kernel takes well.

**O_NONBLOCK** is a property of the descriptor that fcntl can change, and FUSE does not show it. Who opens with it has
it looked up (/proc/TID/fdinfo) each time before it parks. Who sets it later is found out when a call has been parked
for some milliseconds; from then on the same holds for this open.

**TURN** ends a slice of a long step. The call then leaves its thread, which goes on to others' requests, and its next
slices are one worker's, who takes users in turn (turns.py). What the step asks for next is done by another worker,
since it may be held up.

**POLL** that wants to be told leaves its handle (kh); one wake-up uses it up, since whoever is woken polls again.

Invariants
----------
- A call is in `_parked` from its first wait or turn until it is answered; `Call.wait` is set exactly while it is
  parked, and changes only under the engine's lock.
- No thread is at a call that is in `_queued`, or one does a slice of it, under the engine's lock.
- A caller's memory is touched only on behalf of a call that is not answered yet.
- `RELEASE` reaches the engine after the last step of the open: the kernel sends it after the last request, and where a
  stuck call was let go before its step's end, the release waits for that.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import sys
import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from binderfs_fuse import complaints, uapi
from binderfs_fuse._system import ffi, lib
from binderfs_fuse.engine.context import Task
from binderfs_fuse.engine.effects import (
    CopyIn,
    CopyOut,
    CopyToBuffer,
    FindMapping,
    FindRoom,
    GetFile,
    GetSecurityContext,
    Outcome,
    Populate,
    SetNice,
    SetScheduling,
    Turn,
    Wait,
    conclude,
)
from binderfs_fuse.fuse.channel import plain
from binderfs_fuse.fuse.garbage import Collector
from binderfs_fuse.fuse.lane import Lane, Timer
from binderfs_fuse.fuse.transfer import Transfer
from binderfs_fuse.fuse.turns import Passage, Turns
from binderfs_fuse.host import files, memory, tasks
from binderfs_fuse.host.region import Kind, Region, has_released, unmap_released
from binderfs_fuse.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from binderfs_fuse.engine.context import Context, Engine
    from binderfs_fuse.engine.effects import Effect, Step
    from binderfs_fuse.engine.process import Process
    from binderfs_fuse.fuse.channel import Channel
    from binderfs_fuse.fuse.lane import Answer
    from binderfs_fuse.fuse.settings import Settings

    ControlHandler: TypeAlias = Callable[[Task, int, bytes], tuple[int, bytes]]

_EINTR: Final = -errno.EINTR
_EAGAIN: Final = -errno.EAGAIN
_ETIMEDOUT: Final = -errno.ETIMEDOUT
# Parked calls are looked at when they have been passed once before, so that those are spared which are soon resumed.
_LOOKED: Final = 2
# On a busy machine a caller may not have come to sleep in its ioctl by then: it is looked at again, ever more seldom.
_LOOK_AGAIN_SECONDS: Final = 0.01
_LOOK_AGAIN_SECONDS_MAX: Final = 1.0
# A look costs as much as a call. Whoever sets O_NONBLOCK does so early, or again: only then is it taken before parking.
_LOOKS_AT_FIRST: Final = 4
_LOOKS_AGAIN: Final = 64
_INT_MAX: Final = (1 << 31) - 1
# A slice of a long step waits for so many naps of 100 us at most, while requests are served.
_NAPS: Final = 8
# So many ends of opens that wait are a pile: who opens and closes all the time makes them faster than slices do.
_PILE: Final = 32
# Attributes of classes and of `lib` that each call needs: looked up once.
_PAGE_CACHE: Final = Kind.PAGE_CACHE
_ANSWER_IOCTL: Final[int] = lib.ANSWER_IOCTL
_copy_fetched: Final = lib.lane_copy
# POLLIN, POLLOUT, POLLRDNORM and POLLWRNORM: what a file says that has no poll.
_ALWAYS_READY: Final = 0x001 | 0x004 | 0x040 | 0x100
# Seconds that a log waits for what is mapped where. To look that up takes much less than the second figure; where it
# does not, it is done again only after so many times as long.
_MAPPINGS_PATIENCE: Final = 0.1
_SOON: Final = 0.005
_SEEK_AGAIN: Final = 1000
_NEVER: Final = float("inf")
# How often it is looked whether a client that cannot be answered is being killed.
_KILL_INTERVAL: Final = 0.1
# A signal that is no kill has it looked at for as long as it is not answered: ever more seldom.
_KILL_INTERVAL_MAX: Final = 2.0

# The head of `struct record`, and where an ioctl's argument lies in the message.
_unpack_record: Final = struct.Struct("=QQQIIIIIii").unpack_from
_record_fields: Final = [name for name, _ in ffi.typeof("struct record").fields[:10]]
assert _record_fields == [
    "unique", "fh", "argument", "tid", "uid", "command", "in_size", "out_size", "nice", "commands_size",
]  # fmt: skip
_BODY: Final = uapi.fuse_in_header.size
_ARGUMENT: Final = _BODY + uapi.fuse_ioctl_in.size


class Open:
    """One open of a device; `handle` is its fh, `inode` its node id and inode number.

    `tasks`        the callers seen, by thread id
    `kh`           the kernel's handle of who waits in poll, or 0
    `nonblocking`  O_NONBLOCK was seen when it was last looked at
    `looks`        so many more calls are looked at before they are parked
    `searches`     how often its process has asked for something before it was known where it has mapped the device
    `sought_again` when the logs may look that up again, by the monotonic clock
    `denied`       it has been logged that its memory is out of reach
    `let_go`       calls that may be answered before the end of their steps
    `released`     the kernel has let go of it
    """

    __slots__ = (
        "backing_id",
        "denied",
        "handle",
        "identity",
        "inode",
        "kh",
        "let_go",
        "looks",
        "nonblocking",
        "process",
        "region",
        "released",
        "searches",
        "sought_again",
        "tasks",
    )

    def __init__(
        self, handle: int, inode: int, identity: tasks.Identity, process: Process, region: Region, *, nonblocking: bool
    ) -> None:
        self.handle = handle
        self.inode = inode
        self.identity = identity
        self.process = process
        # A Region, until the open is over.
        self.region: Any = region
        self.nonblocking = nonblocking
        self.looks = _LOOKS_AGAIN if nonblocking else _LOOKS_AT_FIRST
        self.backing_id = 0
        self.tasks: dict[int, Task] = {}
        self.kh = 0
        self.let_go = 0
        self.searches = 0
        self.sought_again = 0.0
        self.released = False
        self.denied = False


class Call:
    """One ioctl, from its request to its answer.

    `send`         resumes its step; `over` says that the step has ended
    `argument`     the address of the ioctl's argument; `out_size` bytes may be laid over it
    `timer`        ends the wait, where that has a time
    `wait`         what it is parked on now; `parked` says that it ever was, or took a turn
    `interrupted`  it is not to be parked any more
    `let_go`       nothing of its task is to be touched any more: it may be answered before its step ends
    `elsewhere`    the open of another process that is being looked at for it
    `looked`       how often it was passed when parked calls were looked at
    """

    __slots__ = (
        "argument",
        "elsewhere",
        "interrupted",
        "let_go",
        "looked",
        "open",
        "out_size",
        "over",
        "parked",
        "send",
        "task",
        "timer",
        "unique",
        "wait",
    )

    def __init__(self, unique: int, opened: Open, task: Task, argument: int, out_size: int) -> None:
        self.unique = unique
        self.open = opened
        self.task = task
        self.argument = argument
        self.out_size = out_size
        self.send: Callable[[Any], Effect | Outcome] = _unmade
        self.over = False
        self.wait: Wait | None = None
        self.timer: Timer | None = None
        self.parked = False
        self.interrupted = False
        self.let_go = False
        self.elsewhere: Open | None = None
        self.looked = 0

    def unpark(self) -> None:
        """Let it go on: who parked it resumes it next."""
        assert self.wait is not None  # it is parked
        # What the engine keeps must not keep the call, and with it the open.
        self.wait.owner = None
        self.wait = None
        # What waits for its time must not keep it either.
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def answer(self, outcome: Outcome) -> Answer:
        """Make the answer that an outcome stands for."""
        argument = outcome.argument
        if len(argument) > self.out_size:
            argument = argument[: self.out_size]
        data = outcome.data if not self.let_go else b""
        if type(data) is not bytes:
            data = bytes(data)
        return (
            self.unique,
            _ANSWER_IOCTL,
            outcome.error,
            argument,
            len(argument),
            self.task.tid,
            outcome.address,
            data,
            len(data),
        )


def _unperformed(effect: Effect) -> Any:
    """Answer an effect of a call that was let go: as where the caller is gone."""
    match effect:
        case CopyIn():
            return b""
        case CopyOut() | CopyToBuffer():
            return 0
        case FindRoom():
            return 0
        case SetNice():
            return effect.nice
        case SetScheduling():
            return effect.scheduling
        case FindMapping() | Turn():
            return None
    return -errno.ESRCH


class _Nowhere:
    """The region of a process that is over, whatever kind it was of."""

    kind: Final = Kind.PASSTHROUGH

    def store(self, offset: int, data: bytes | bytearray) -> None:
        """Forget it."""


_NOWHERE: Final = _Nowhere()


def _unmade(value: Any) -> Effect | Outcome:
    raise AssertionError(value)


def _result(unique: int, result: int, argument: bytes = b"") -> Answer:
    """Make the answer to an ioctl that needs no step."""
    return unique, lib.ANSWER_IOCTL, result, argument, len(argument), 0, 0, b"", 0


class DevicePlane:
    """Serves the devices of one mount.

    `device` is st_dev of the mount, which tells its files from others' in /proc/PID/maps; None where it is not known.
    `kind` is what new regions are; the channel settles it when it hears from the kernel.
    """

    def __init__(self, engine: Engine, settings: Settings, device: int | None = None) -> None:
        self.device = device
        self.opens: dict[int, Open] = {}
        self.kind = Kind.PAGE_CACHE
        self.wants_passthrough = settings.region != Kind.PAGE_CACHE.value
        self._insists = settings.region == Kind.PASSTHROUGH.value
        self._label = settings.secctx
        self._android = settings.priority == "android"
        self._engine = engine
        self._lock = engine.lock
        self._controls: dict[int, ControlHandler] = {}
        self._by_process: dict[Process, Open] = {}
        self._parked: dict[int, Call] = {}
        # Calls that no reader is at: those that wait for a worker, what each worker has resumed, and those that are a
        # tracer's, by `unique`.
        self._queued: set[Call] = set()
        self._resumed: dict[Lane, Call] = {}
        self.transfers: dict[int, Call] = {}
        self._installer = files.FileInstaller()
        self._turn_lane: Lane | None = None
        self._strangers: set[int] = set()
        self._perform: dict[type, Callable[[Lane, Call, Any], Any]] = {
            CopyIn: self._copy_in,
            CopyOut: self._copy_out,
            CopyToBuffer: self._copy_to_buffer,
            FindMapping: self._find_mapping,
            Populate: self._populate,
            GetFile: self._get_file,
            FindRoom: self._find_room,
            GetSecurityContext: self._get_security_context,
            SetNice: self._set_nice,
            SetScheduling: self._set_scheduling,
        }

    def attach(self, channel: Channel) -> dict[int, Callable[[Lane], Answer | None]]:
        """Take the channel to answer on; return what serves each opcode, and EVENT_SHORT."""
        self._channel = channel
        self._core = channel.core
        self._crew = channel.crew
        self.collector = Collector(self._engine, self._crew.post)
        self.turns = Turns(self._crew.turn_worker.post, self._give_way)
        return {
            uapi.FUSE_IOCTL: self._ioctl,
            uapi.FUSE_POLL: self._poll,
            uapi.FUSE_INTERRUPT: self._interrupt,
            uapi.FUSE_READ: self._read,
            uapi.FUSE_FLUSH: self._flush_request,
            lib.EVENT_SHORT: self._short,
        }

    def _give_way(self) -> None:
        """Let others go before a slice, but not for long where ends of opens pile up, and with them what they hold."""
        lib.channel_give_way(self._core, _NAPS if self._crew.end_workers.aside < _PILE else 1)

    def stop(self) -> None:
        """Let the threads of transfers end: the connection is gone."""
        self._installer.close()

    # Opens.

    def open(self, handle: int, inode: int, context: Context, tid: int, uid: int, flags: int) -> Open:
        """Open a device for the process of task `tid`.

        Raises `OSError`: EPERM for a task that this process's pid namespace or its /proc does not show, EOPNOTSUPP
        where the kernel does not pass through and nothing else was asked for, EMFILE and ENFILE for one open too many,
        or what making a region fails with.
        """
        if not tid:
            self._note_stranger(uid)
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if self._insists and self.kind is not Kind.PASSTHROUGH:
            complaints.say(uid, "region=passthrough takes Linux 6.9 and CAP_SYS_ADMIN: try region=pagecache")
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        try:
            identity = tasks.identify(tid)
        except (FileNotFoundError, ProcessLookupError) as error:
            # The task waits for this very answer, so it is there.
            self._note_hidden(uid)
            raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from error
        region = Region(inode, self.kind)
        extra = {"scheduling": tasks.scheduling(tid)} if self._android else {}
        try:
            with self._lock:
                process = context.open(
                    identity.pid,
                    identity.euid,
                    region,
                    nice=identity.nice,
                    pid_namespace=identity.pid_namespace,
                    pids=identity.pids,
                    user_ids=identity.user_ids,
                    **extra,
                )
        except OSError:
            region.close_descriptor()
            raise
        opened = Open(handle, inode, identity, process, region, nonblocking=bool(flags & os.O_NONBLOCK))
        self._by_process[process] = opened
        self.opens[handle] = opened
        return opened

    def register_control(self, handle: int, handler: ControlHandler) -> None:
        """Have `handler(task, command, argument)` serve the ioctls of an open of binder-control.

        It returns 0 or a negative errno, and the bytes to copy out. A worker calls it, so it may wait.
        """
        self._controls[handle] = handler

    def release(self, handle: int) -> None:
        """The kernel has let go of this open, of a device or of binder-control; never waits."""
        if self._controls.pop(handle, None) is None:
            opened = self.opens.pop(handle)
            with self._lock:
                opened.released = True
                if opened.let_go:
                    return
            self._crew.post_end(opened.identity.euid, self._release, opened)

    def ioctl_without_argument(self, inode: int, caller: Task, command: int) -> int:
        """Carry out an ioctl on the open with this inode, whose argument, NULL, FUSE did not let through.

        The driver does not look at the argument of BINDER_THREAD_EXIT and BINDER_SET_CONTEXT_MGR. Returns 0 or a
        negative errno; -EBADF if there is no such open, -EFAULT for any other command. The caller may have been killed
        by now, and its ids be another's: nothing is looked up by them. Another thread of the server may be resumed
        meanwhile, but nothing here waits for a client.
        """
        if command not in (uapi.BINDER_THREAD_EXIT, uapi.BINDER_SET_CONTEXT_MGR):
            return -errno.EFAULT
        opened = next((opened for opened in list(self.opens.values()) if opened.inode == inode), None)
        if opened is None:
            return -errno.EBADF
        with self._lock:
            # Neither asks for anything but turns.
            step = opened.process.ioctl(caller, command, bytes(uapi.ioctl_size(command)))
            outcome = self._conclude(step, caller.euid)
            woken, pollers = self._woken()
        self._resume_each(woken, pollers)
        return outcome.error

    def _flush(self, opened: Open) -> None:
        with self._lock:
            self._conclude(opened.process.flush(), opened.identity.euid)
            woken, pollers = self._woken()
        self._resume_each(woken, pollers)

    def _release(self, opened: Open) -> None:
        if opened.backing_id:
            lib.channel_backing_close(self._core, opened.backing_id)
        with self._lock:
            self._conclude(opened.process.release(), opened.identity.euid)
            freed = self._engine.freed
            self._engine.freed = []
            del self._by_process[opened.process]
            # A call that is still under way must not keep the region.
            opened.region = _NOWHERE
            woken, pollers = self._woken()
        self._resume_each(woken, pollers)
        # Nobody else knows of them any more.
        for process in freed:
            process.region = _NOWHERE
            process.forget()
        self.collector.count()

    # Requests.

    def _ioctl(self, lane: Lane) -> Answer | None:
        # Declared, or mypyc takes them for objects, and compares them as Python does.
        unique: int
        handle: int
        address: int
        tid: int
        uid: int
        command: int
        in_size: int
        out_size: int
        nice: int
        commands_size: int
        unique, handle, address, tid, uid, command, in_size, out_size, nice, commands_size = _unpack_record(lane.record)
        opened = self.opens.get(handle)
        if opened is None:
            return self._control(lane, handle)
        if lane.interrupted == unique:
            # It may have been answered, and its thread id be another's.
            return _result(unique, _EINTR)
        task = opened.tasks.get(tid)
        if task is None or task.nice != nice or task.euid != uid or self._android:
            if not tid:
                self._note_stranger(uid)
                return _result(unique, -errno.EPERM)
            task = self._meet(opened, tid, uid, nice)
        commands = None
        if commands_size >= 0:
            commands = lane.commands[:commands_size]
        elif command == uapi.BINDER_WRITE_READ and lane.leads and self._crew.put_off(lane):
            return None
        if lane.interrupted == unique:
            return _result(unique, _EINTR)
        argument = lane.message[_ARGUMENT : _ARGUMENT + in_size]
        call = lane.call = Call(unique, opened, task, address, out_size)
        if opened.process.allocation is None and task.pid == opened.identity.pid:
            self._find_own_mapping(call)
        self._lock.acquire()  # _drive() releases it
        try:
            call.send = opened.process.ioctl(task, command, argument, commands).send
        except BaseException:
            self._lock.release()
            raise
        answer = self._drive(lane, call, None)
        return self.work_off(lane, answer) if lane.work else answer

    def _meet(self, opened: Open, tid: int, uid: int, nice: int) -> Task:
        """Return the task that calls, which is not known yet, or not as it is now.

        `uid` is what FUSE says, its user as far as files go. That is nearly always the effective one; where it is not,
        /proc is asked at each call, since a change of the other one would not show.
        """
        known = opened.tasks.get(tid)
        if known is not None and known.euid == uid:
            pid, euid = known.pid, uid
        else:
            try:
                pid, euid = tasks.caller(tid)
            except OSError:
                pid, euid = opened.identity.pid, uid
        task = Task(tid, pid, euid, nice)
        if self._android:
            task.scheduling = tasks.scheduling(tid)
        if len(opened.tasks) > Limits.tasks + 2 * len(opened.process.threads):
            # Most of them are gone, or had no thread in the engine, which limits these.
            opened.tasks.clear()
        opened.tasks[tid] = task
        return task

    def _control(self, lane: Lane, handle: int) -> Answer | None:
        fields = lane.fields
        unique = fields.unique
        handler = self._controls.get(handle)
        if handler is None:
            # Plain, here and below: where the kernel itself asks for a file's flags, it takes no short answer.
            return plain(unique, -errno.ENOTTY)
        task = Task(fields.tid, fields.tid, fields.uid, fields.nice)
        command = fields.command
        out_size = fields.out_size
        argument = lane.message[_ARGUMENT : _ARGUMENT + fields.in_size]
        self._crew.post(self._serve_control, unique, handler, task, command, argument, out_size)
        return None

    def _serve_control(
        self, unique: int, handler: ControlHandler, task: Task, command: int, argument: bytes, out_size: int
    ) -> None:
        error, out = -errno.EIO, b""
        try:
            error, out = handler(task, command, argument)
        finally:
            self._channel.answer(_result(unique, error, out[:out_size]) if out or not error else plain(unique, error))

    def _poll(self, lane: Lane) -> Answer | None:
        fields = lane.fields
        unique = fields.unique
        tid = fields.tid
        handle, kh, flags, _ = uapi.fuse_poll_in.unpack_from(lane.message, _BODY)
        opened = self.opens.get(handle)
        if opened is None:
            # pyfuse3 would say that it has no poll, and the kernel would never ask again, for the devices neither.
            return plain(unique, 0, uapi.fuse_poll_out.pack(_ALWAYS_READY))
        if not tid:
            self._note_stranger(fields.uid)
            return plain(unique, -errno.EPERM)
        task = opened.tasks.get(tid)
        if task is None or task.nice != fields.nice:
            task = self._meet(opened, tid, fields.uid, fields.nice)
        with self._lock:
            if flags & uapi.FUSE_POLL_SCHEDULE_NOTIFY:
                opened.kh = kh
            events = opened.process.poll(task)
        return plain(unique, 0, uapi.fuse_poll_out.pack(events))

    def _read(self, lane: Lane) -> Answer | None:
        """Serve a read(2), for which the driver has nothing, or a page of a region that the page cache lacks."""
        handle, offset, size, *_ = uapi.fuse_read_in.unpack_from(lane.message, _BODY)
        opened = self.opens.get(handle)
        if opened is None:
            return self._channel.read(lane)
        region = opened.region
        if region.kind is Kind.PASSTHROUGH:
            return plain(lane.fields.unique, -errno.EINVAL)
        return plain(lane.fields.unique, 0, region.read(offset, size))

    def _flush_request(self, lane: Lane) -> Answer:
        """Serve the close of a descriptor, which is nothing to a device if the descriptor was one of the keeper's.

        A client that passes its device on has us hold a descriptor of it for a while. The driver holds none, so that
        our close of it is to wake nobody.
        """
        opened = self.opens.get(uapi.fuse_flush_in.unpack_from(lane.message, _BODY)[0])
        if opened is not None and not files.is_keeper(lane.fields.tid):
            self._crew.post_end(opened.identity.euid, self._flush, opened)
        return plain(lane.fields.unique, 0)

    def _interrupt(self, lane: Lane) -> Answer | None:
        (unique,) = uapi.fuse_interrupt_in.unpack_from(lane.message, _BODY)
        if self._crew.withdraw(unique):
            return _result(unique, _EINTR)
        if self._channel.withdraw(unique):
            return plain(unique, _EINTR)
        with self._lock:
            call = self._parked.get(unique)
            if call is not None and call.wait is not None:
                call.unpark()
                lane.work.append((call, _EINTR))
            else:
                # Being served by a thread that may be stuck; or a request of the tree; or an old one.
                call, tid = self._find(unique)
                if not tid:
                    return None
                if call is not None:
                    call.interrupted = True
                for server in self._crew.lanes_serving(unique):
                    server.interrupted = unique
                    if server.fields.opcode == uapi.FUSE_READ and self._channel.withdraw(unique):
                        # A thread that led before this one has only now let it wait.
                        return plain(unique, _EINTR)
        if lane.work:
            return self.work_off(lane, None)
        if unique in self.transfers:
            # Most likely its tracer has stopped it, and is soon through.
            self._crew.after(_KILL_INTERVAL, self._let_go, unique)
        else:
            self._crew.post(self._let_go, unique)
        return None

    def _find(self, unique: int) -> tuple[Call | None, int]:
        """Find a call that is not answered yet, and its task; (None, tid) if there is only a request, (None, 0) if not.

        The call may have been answered a moment ago, though: a thread forgets it with the next one.
        """
        call = self._parked.get(unique) or self.transfers.get(unique)
        if call is None:
            candidates = list(self._resumed.values())
            for lane in list(self._crew.lanes):
                candidates += [] if lane.call is None else [lane.call]
                candidates += [] if lane.delivery is None else [lane.delivery[0]]
            call = next((candidate for candidate in candidates if candidate.unique == unique), None)
        if call is not None:
            return call, call.task.tid
        server = next(iter(self._crew.lanes_serving(unique)), None)
        return None, server.fields.tid if server is not None else 0

    def _let_go(self, unique: int, delay: float = _KILL_INTERVAL) -> None:
        """Answer for a call whose thread is stuck, if its client is being killed; if not, look again in a while.

        Without an answer the client could not die, nor let go of the memory that the thread is stuck in. With it, its
        thread id is soon another's. So nothing more is begun for it from the moment that the call is marked, and it is
        answered only while no thread is at it, or at nothing of its task, or while one is found in the middle of a
        copy, which has its task and not its number.
        """
        with self._lock:
            call, tid = self._find(unique)
        if not tid:
            return
        if tasks.is_being_killed(tid):
            if self._installer.withdraw(tid):
                return
            untouched = False
            with self._lock:
                if call is not None:
                    if not call.let_go:
                        call.let_go = True
                        if not call.over:
                            call.open.let_go += 1
                    untouched = call in self._queued or call.elsewhere is not None
            if call is None:
                for server in self._crew.lanes_serving(unique):
                    lib.lane_let_go(server.pointer, unique)
            if untouched or tasks.is_being_copied(tid):
                self._channel.answer(_result(unique, _EINTR))
                return
        self._crew.after(delay, self._let_go, unique, min(2 * delay, _KILL_INTERVAL_MAX))

    # The watcher's side.

    @staticmethod
    def blame(lane: Lane) -> tuple[int, int]:
        """Return the handle and the user of the call whose memory a lane is stuck at."""
        fields = lane.fields
        fetched = lane.call is not None and lane.call.unique == fields.unique
        if fields.opcode == uapi.FUSE_IOCTL and not fetched:
            return fields.fh, fields.uid
        call = lane.serving
        if call is None:
            return 0, fields.uid
        if call.elsewhere is not None:
            return call.elsewhere.handle, call.elsewhere.identity.euid
        return call.open.handle, call.task.euid

    def look(self, idle: bool) -> None:
        """Find out about O_NONBLOCK of calls that have been parked for some time: all if nothing happens (`idle`)."""
        due = []
        for call in list(self._parked.values()):
            if call.looked < _LOOKED:
                call.looked = _LOOKED if idle else call.looked + 1
                if call.looked == _LOOKED:
                    due.append(call)
        if due:
            self._crew.post(self._look_at, due)
        if has_released():
            self._crew.post(unmap_released)

    def _look_at(self, calls: Sequence[Call], delay: float = _LOOK_AGAIN_SECONDS) -> None:
        for call in calls:
            wait = call.wait
            if wait is None or wait.timeout_ms is not None:
                continue
            nonblocking = tasks.is_nonblocking(call.task.tid, call.open.inode)
            if nonblocking is None:
                self._crew.after(delay, self._look_at, [call], min(2 * delay, _LOOK_AGAIN_SECONDS_MAX))
            elif nonblocking:
                call.open.nonblocking = True
                call.open.looks = _LOOKS_AGAIN
                self._resume_from(call, wait, _EAGAIN)

    def restore(self, lane: Lane, message: bytes) -> None:
        """Serve a request that had to wait, on a lane that does not lead."""
        lib.lane_restore(lane.pointer, message, len(message))
        try:
            answer = self._ioctl(lane)
        except Exception:  # noqa: BLE001 - no request may go unanswered
            complaints.mistake("a request that had to wait failed")
            answer = _result(lane.fields.unique, -errno.EIO)
        self._deliver(lane, answer)

    # Steps.

    def _drive(self, lane: Lane, call: Call, value: Any) -> Answer | None:
        """Send `value` into the step of a call, and whatever it asks for then, until it parks, takes a turn or is over.

        The engine is locked on entry, and not on return. Returns the answer, if it is over.
        """
        lane.serving = call
        return self._follow(lane, call, self._send(lane, call, value))

    def _send(self, lane: Lane, call: Call, value: Any) -> Effect | Outcome:
        """Send `value` into the step of a call, and return what it asks for.

        The engine is locked on entry, and not on return. A call that waits is parked.
        """
        engine = self._engine
        send = call.send
        while True:
            try:
                effect = send(value)
            except Exception:  # noqa: BLE001 - no request may go unanswered
                complaints.mistake(f"a step failed, of a call of task {call.task.tid}")
                effect = Outcome(-errno.EIO)
            if type(effect) is Outcome:
                # Nothing is to be kept of the step, not even by the lane, which keeps the call until its next one.
                call.send = _unmade
                self._over(call)
            elif type(effect) is Wait:
                if call.interrupted or lane.interrupted == call.unique:
                    value = _EINTR
                    continue
                self._park(call, effect)
            elif type(effect) is CopyToBuffer and lane.call is call:
                # What came with the request is ours: to copy it cannot be held up, and takes less than to unlock and
                # lock again would.
                region = effect.region
                if isinstance(region, Region) and _copy_fetched(
                    lane.pointer, effect.address, effect.size, region.memory, effect.offset
                ):
                    value = effect.size
                    continue
            if engine.ready:
                self._take_ready(lane.work)
            pollers = self._pollers() if engine.poll_ready else None
            self._lock.release()
            if pollers is not None:
                for kh in pollers:
                    lib.channel_notify_poll(self._core, kh)
            return effect

    def _follow(self, lane: Lane, call: Call, effect: Effect | Outcome) -> Answer | None:
        """Do what a step asks for, send the result, and so on; as `_drive`. The engine is not locked."""
        while True:
            if type(effect) is Outcome:
                return self._finish(lane, call, effect)
            if type(effect) is Wait:
                self._waits(lane, call, effect)
                if effect.timeout_ms is not None or not call.open.looks or not self._unpark(call, effect):
                    return None
                value: Any = _EAGAIN
            elif type(effect) is Turn:
                self._take_turn(lane, call)
                return None
            elif call.let_go:
                value = _unperformed(effect)
            else:
                value = self._perform[type(effect)](lane, call, effect)
            self._lock.acquire()  # _send() releases it
            effect = self._send(lane, call, value)

    def _waits(self, lane: Lane, call: Call, wait: Wait) -> None:
        """See that somebody looks after a call that is parked."""
        if self._crew.leader is not lane:
            lib.channel_ring(self._core)
        if wait.timeout_ms is not None:
            call.timer = self._crew.after(wait.timeout_ms / 1000, self._resume_from, call, wait, _ETIMEDOUT)
            with self._lock:
                # It may have been woken before there was a timer to cancel.
                if call.wait is not wait:
                    call.timer.cancel()

    def _take_turn(self, lane: Lane, call: Call) -> None:
        """Have a call go on when its turn comes."""
        call.interrupted = call.interrupted or lane.interrupted == call.unique
        if not call.parked:
            call.parked = True
            self._parked[call.unique] = call
        self._queued.add(call)
        self.turns.put(call.task.euid, self._slice, call)

    def _slice(self, call: Call) -> None:
        """Do the next slice of a call; only the worker that does slices calls this."""
        lane = self._turn_lane
        if lane is None:
            lane = self._turn_lane = Lane(self._core)
        self._resumed[lane] = call
        try:
            self._lock.acquire()  # _send() releases it
            self._queued.discard(call)
            effect = self._send(lane, call, True if call.let_go else None)
            if type(effect) is Turn:
                self._take_turn(lane, call)
            elif type(effect) is Wait:
                self._waits(lane, call, effect)
                if effect.timeout_ms is None and call.open.looks:
                    self._crew.post(self._look_at, [call])
            else:
                self._queued.add(call)
                self._crew.post_for(call.open.handle, call.task.euid, self._go_on, call, effect)
        finally:
            del self._resumed[lane]
            woken = list(lane.work)
            lane.work.clear()
            self._resume_each(woken)

    def _go_on(self, call: Call, effect: Effect | Outcome) -> None:
        """Do what a step asked for at the end of a slice, in a worker: it may be stuck then."""
        lane = Lane(self._core)
        lane.serving = call
        self._resumed[lane] = call
        try:
            with self._lock:
                self._queued.discard(call)
            answer = self._follow(lane, call, effect)
            self._hand_over(lane.work)
            self._deliver(lane, answer)
        finally:
            del self._resumed[lane]
            self._hand_over(lane.work)

    def _conclude(self, step: Step, user: int) -> Outcome:
        """Drive a step of a user that asks for nothing but turns; the engine is locked, but for these."""
        passage = Passage(self.turns, user)
        try:
            return conclude(step, lambda: self._give_turn(passage))
        finally:
            passage.leave()

    def _give_turn(self, passage: Passage) -> None:
        """Resume the calls that a step has woken so far, and wait for its next turn, without the lock."""
        woken, pollers = self._woken()
        self._lock.release()
        try:
            self._resume_each(woken, pollers)
            lib.channel_set_aside(self._core, True)
            passage.wait()
        finally:
            lib.channel_set_aside(self._core, False)
            self._lock.acquire()

    def _park(self, call: Call, wait: Wait) -> None:
        wait.owner = call
        call.wait = wait
        call.looked = 0
        if not call.parked:
            call.parked = True
            self._parked[call.unique] = call

    def _unpark(self, call: Call, wait: Wait) -> bool:
        """Take back a call that was just parked if its descriptor is non-blocking; tell whether that was done."""
        opened = call.open
        nonblocking = tasks.is_nonblocking(call.task.tid, opened.inode)
        if nonblocking is not None:
            opened.nonblocking = nonblocking
        if not opened.nonblocking:
            opened.looks -= 1
            return False
        opened.looks = _LOOKS_AGAIN
        with self._lock:
            if call.wait is not wait:
                return False
            call.unpark()
        return True

    def _over(self, call: Call) -> None:
        """Note that a call's step has ended; the engine is locked."""
        call.over = True
        if call.let_go:
            opened = call.open
            opened.let_go -= 1
            if opened.released and not opened.let_go:
                self._crew.post_end(opened.identity.euid, self._release, opened)

    def _woken(self) -> tuple[list[tuple[Call, int]], list[int]]:
        """Take what the engine has made ready: calls to resume, and who is to poll again; the engine is locked."""
        woken: deque[tuple[Call, int]] = deque()
        self._take_ready(woken)
        return list(woken), self._pollers()

    def _take_ready(self, work: deque[tuple[Call, int]]) -> None:
        """Add the calls to `work` that the engine has made ready; it is locked."""
        ready = self._engine.ready
        for wait in ready:
            call = wait.owner
            if call is not None and call.wait is wait:
                call.unpark()
                work.append((call, 0))
        ready.clear()

    def _pollers(self) -> list[int]:
        """Take the kernel's handles of those who are to poll again; the engine is locked."""
        engine = self._engine
        pollers = []
        for process in engine.poll_ready:
            opened = self._by_process.get(process)
            if opened is not None and opened.kh:
                pollers.append(opened.kh)
                opened.kh = 0
        engine.poll_ready.clear()
        return pollers

    def work_off(self, lane: Lane, answer: Answer | None) -> Answer | None:
        """Resume what is to be resumed, and answer; return the last answer, which is still to be given."""
        work = lane.work
        if not work:
            return answer
        if self._crew.austere or self._crew.leader is not lane:
            # Nobody would take over, except who is just doing so.
            self._hand_over(work)
            return answer
        if answer is not None:
            work.append((None, (answer, lane.delivery)))
        last: Answer | None = None
        while work:
            # What has been taken from the work nobody takes over: so this may be held up only between the two.
            self._deliver(lane, last)
            last = None
            try:
                call, value = work.popleft()
            except IndexError:  # taken over by a new leader
                break
            if call is None:
                last, lane.delivery = value
                lane.serving = lane.delivery[0] if lane.delivery is not None else None
            else:
                self._lock.acquire()  # _drive() releases it
                last = self._drive(lane, call, value)
        return last

    def _hand_over(self, work: deque[tuple[Any, Any]]) -> None:
        """Have workers do what waits in a lane's work; others may be taking from it."""
        while work:
            try:
                call, value = work.popleft()
            except IndexError:
                return
            if call is None:
                self._post_give(*value)
            else:
                self._post_resume(call, value)

    def _post_give(self, answer: Answer, delivery: Any) -> None:
        if delivery is None:
            self._crew.post(self._channel.answer, answer)
            return
        call = delivery[0]
        self._queued.add(call)
        self._crew.post_for(call.open.handle, call.task.euid, self._give, answer, delivery)

    def _give(self, answer: Answer, delivery: Any) -> None:
        """Give an answer that stores data, in a worker."""
        lane = Lane(self._core)
        lane.delivery = delivery
        call = delivery[0]
        self._resumed[lane] = call
        try:
            with self._lock:
                self._queued.discard(call)
                if call.let_go:
                    return
            self._deliver(lane, answer)
        finally:
            del self._resumed[lane]

    def _resume_each(self, woken: Sequence[tuple[Call, int]], pollers: Sequence[int] = ()) -> None:
        for kh in pollers:
            lib.channel_notify_poll(self._core, kh)
        for call, value in woken:
            self._post_resume(call, value)

    def _resume_from(self, call: Call, wait: Wait, value: int) -> None:
        """Resume a call with `value` if it is still parked on this; in a worker."""
        with self._lock:
            if call.wait is not wait:
                return
            call.unpark()
        self._post_resume(call, value)

    def _post_resume(self, call: Call, value: int) -> None:
        """Have a worker resume a call that is unparked."""
        self._queued.add(call)
        self._crew.post_for(call.open.handle, call.task.euid, self._resume, call, value)

    def _resume(self, call: Call, value: int) -> None:
        """Resume a call in a worker, and leave those that it wakes to others: it may be stuck then."""
        lane = Lane(self._core)
        lane.nested = True
        self._resumed[lane] = call
        try:
            self._lock.acquire()  # _drive() releases it
            self._queued.discard(call)
            answer = self._drive(lane, call, value)
            self._resume_each(lane.work)
            lane.work.clear()
            self._deliver(lane, answer)
        finally:
            del self._resumed[lane]
        self._resume_each(lane.work)

    # Answers.

    def _finish(self, lane: Lane, call: Call, outcome: Outcome) -> Answer | None:
        """Make the answer of a call that is over; None: it is given elsewhere."""
        if call.parked:
            del self._parked[call.unique]
        if outcome.buffers and call.open.region.kind is _PAGE_CACHE:
            self._clear_way(lane)
            if not self.publish(outcome) and outcome.data:
                for file, _, _ in outcome.files:
                    file.close()
                outcome = self.undelivered(call, outcome, 0, errno.ENOMEM)
        if (outcome.files or outcome.closes) and not call.let_go:
            self.transfers[call.unique] = call
            Transfer(self, self._channel, call, outcome).begin(self._installer)
            return None
        for file, _, _ in outcome.files:
            file.close()
        if outcome.data:
            lane.delivery = call, outcome
        return call.answer(outcome)

    def _deliver(self, lane: Lane, answer: Answer | None) -> None:
        """Give an answer now."""
        while answer is not None:
            stored = lib.channel_deliver(self._core, *answer)
            if stored == answer[-1]:
                return
            call, outcome = lane.delivery
            answer = call.answer(self.undelivered(call, outcome, max(stored, 0), -min(stored, 0)))

    def _short(self, lane: Lane) -> Answer | None:
        fields = lane.fields
        call, outcome = lane.delivery
        return call.answer(self.undelivered(call, outcome, fields.copied, fields.error))  # type: ignore[no-any-return]

    def undelivered(self, call: Call, outcome: Outcome, copied: int, error: int) -> Outcome:
        """Have the engine take back an outcome, since only `copied` bytes of its data were stored; return another."""
        process = call.open.process
        if error == errno.EPERM:
            self._note_denied(call)
        with self._lock:
            # A release does not wait for answers of calls that were let go.
            if process.is_dead:
                return Outcome(-errno.EFAULT)
            instead = self._conclude(process.undeliver(call.task, outcome, copied), call.task.euid)
            woken, pollers = self._woken()
        self._resume_each(woken, pollers)
        return instead

    def install_failed(self, call: Call, outcome: Outcome) -> Outcome | None:
        """Have the engine take back an outcome whose files could not be installed; return the one instead, if any."""
        process = call.open.process
        with self._lock:
            if process.is_dead:
                return None
            instead = self._conclude(process.install_failed(call.task, outcome), call.task.euid)
            woken, pollers = self._woken()
        self._resume_each(woken, pollers)
        return instead

    def installed(self, call: Call, outcome: Outcome, numbers: list[int]) -> None:
        """Tell the engine which numbers an outcome's files have in the client, and the client."""
        for (_, region, offset), number in zip(outcome.files, numbers, strict=True):
            region.store(offset, number.to_bytes(4, sys.byteorder))
        if call.open.region.kind is _PAGE_CACHE:
            self.publish(outcome)
        with self._lock:
            if not call.open.process.is_dead:
                call.open.process.installed(call.task, numbers, outcome)

    def publish(self, outcome: Outcome) -> bool:
        """Put an outcome's buffers into the client's page cache; tell whether that went well."""
        for region, offset, size in outcome.buffers:
            assert isinstance(region, Region)  # all of this mount's are
            error = region.publish(self._core, offset, size)
            if error and error != -errno.ENOENT:
                complaints.say(None, f"cannot store into the page cache: {os.strerror(-error)}", logging.ERROR)
                return False
        return True

    # Effects.

    def _clear_way(self, lane: Lane) -> None:
        """Do what others wait for before what a client can delay."""
        if lane.work and not lane.nested:
            lane.nested = True
            call = lane.serving
            self._deliver(lane, self.work_off(lane, None))
            lane.serving = call
            lane.nested = False

    def _copy_in(self, lane: Lane, call: Call, effect: CopyIn) -> bytes:
        address = effect.address
        size = effect.size
        if lane.call is call:
            fields = lane.fields
            start = address - fields.data_address
            data_size = fields.data_size
            if start >= 0 and start + size <= data_size:
                return lane.data[start : start + size]  # type: ignore[no-any-return]
            start = address - fields.offsets_address
            if start >= 0 and start + size <= fields.offsets_size:
                start += data_size
                return lane.data[start : start + size]  # type: ignore[no-any-return]
        self._clear_way(lane)
        return memory.read(call.task.tid, address, size)

    def _copy_out(self, lane: Lane, call: Call, effect: CopyOut) -> int:
        # As with the driver the caller reads before they run whom it has woken. Should this be held up, a new leader
        # finds them in `lane.work`; only where there will be none do they go first.
        if self._crew.austere or self._crew.leader is not lane:
            self._clear_way(lane)
        return memory.write(call.task.tid, effect.address, effect.data)

    def _copy_to_buffer(self, lane: Lane, call: Call, effect: CopyToBuffer) -> int:
        region = effect.region
        if not isinstance(region, Region):
            # The receiver is over, and so is its region.
            return effect.size
        self._clear_way(lane)
        return region.copy_from(call.task.tid, effect.address, effect.size, effect.offset)

    def _find_mapping(self, lane: Lane, call: Call, effect: FindMapping) -> tuple[int, int] | None:
        """Look up where a process has mapped its device that has asked for nothing since it has.

        /proc/PID/maps of a process that is about to execute another program can make wait, for as long as it likes.
        """
        opened = self._by_process.get(effect.process)
        if opened is None:
            return None
        self._clear_way(lane)
        call.elsewhere = opened
        mapping = tasks.find_mapping(tasks.maps(opened.identity.pid), opened.inode, self.device)
        call.elsewhere = None
        return mapping

    def _find_own_mapping(self, call: Call) -> None:
        """Look up where the process has mapped its device that asks for something just now.

        It cannot execute another program meanwhile. As it may ask for much without ever mapping it, it is looked at
        ever more seldom.
        """
        opened = call.open
        opened.searches += 1
        if opened.searches & (opened.searches - 1):
            return
        call.elsewhere = opened
        mapping = tasks.find_mapping(tasks.maps(opened.identity.pid), opened.inode, self.device)
        call.elsewhere = None
        if mapping is not None:
            with self._lock:
                opened.process.map(*mapping)

    def find_mappings(self) -> None:
        """Look up where those have mapped their device who have asked for nothing since: the logs show its size.

        Whose mappings make wait, or are so many that they take long, cannot make the logs wait for more than a moment.
        """
        now = time.monotonic()
        unmapped: dict[int, list[Open]] = {}
        for opened in list(self.opens.values()):
            if opened.process.allocation is None and now >= opened.sought_again:
                opened.sought_again = _NEVER
                unmapped.setdefault(opened.identity.pid, []).append(opened)
        done: SimpleQueue[None] = SimpleQueue()
        for pid, opens in unmapped.items():
            # One at a time for each user.
            account = ("maps", opens[0].identity.euid), 1
            self._crew.client_workers.post(self._find_mappings_of, pid, opens, done, accounts=(account,))
        for _ in unmapped:
            try:
                done.get(timeout=max(0.0, now + _MAPPINGS_PATIENCE - time.monotonic()))
            except Empty:
                return

    def _find_mappings_of(self, pid: int, opens: Sequence[Open], done: SimpleQueue[None]) -> None:
        begin = time.monotonic()
        text = tasks.maps(pid)
        for opened in opens:
            mapping = tasks.find_mapping(text, opened.inode, self.device)
            if mapping is not None:
                with self._lock:
                    opened.process.map(*mapping)
        end = time.monotonic()
        for opened in opens:
            opened.sought_again = end + _SEEK_AGAIN * max(0.0, end - begin - _SOON)
        done.put(None)

    def wake(self) -> None:
        """Resume, and let poll again, whom the engine has made ready while somebody else had it locked."""
        with self._lock:
            woken, pollers = self._woken()
        self._resume_each(woken, pollers)

    def _populate(self, lane: Lane, call: Call, effect: Populate) -> int:
        del lane, call
        region = effect.region
        if not isinstance(region, Region):
            return 0
        return region.populate(effect.offset, effect.size)

    def _get_file(self, lane: Lane, call: Call, effect: GetFile) -> files.File | int:
        if effect.fd > _INT_MAX:
            return -errno.EBADF
        self._clear_way(lane)
        return files.get_file(call.task.tid, effect.fd, call.task.euid)

    def _find_room(self, lane: Lane, call: Call, effect: FindRoom) -> int:
        self._clear_way(lane)
        return 0 if tasks.has_room(call.task.tid, effect.count) else -errno.EMFILE

    def _get_security_context(self, lane: Lane, call: Call, effect: GetSecurityContext) -> bytes | int:
        del lane, effect
        label = tasks.label(call.task.tid)
        return label if isinstance(label, bytes) else self._label or label

    def _set_nice(self, lane: Lane, call: Call, effect: SetNice) -> int:
        del lane
        return tasks.set_nice(call.task.tid, effect.nice)

    def _set_scheduling(self, lane: Lane, call: Call, effect: SetScheduling) -> tuple[int, int]:
        del lane
        return tasks.set_scheduling(call.task.tid, effect.scheduling, verify=effect.verify)

    # The log.

    def _note_stranger(self, uid: int) -> None:
        if uid not in self._strangers:
            self._strangers.add(uid)
            complaints.say(uid, f"a process of user {uid} lives in a pid namespace that this one does not see: EPERM")

    def _note_hidden(self, uid: int) -> None:
        if uid not in self._strangers:
            self._strangers.add(uid)
            complaints.say(uid, f"a process of user {uid} is not in /proc, which is hidden or not mounted: EPERM")

    def _note_denied(self, call: Call) -> None:
        opened = call.open
        if not opened.denied:
            opened.denied = True
            line = f"no right to the memory of process {opened.identity.pid} (CAP_SYS_PTRACE): EFAULT"
            complaints.say(opened.identity.euid, line)
