"""Open files on their way from one task to another (pidfd_getfd(2), ptrace(2)).

Theory of operation
-------------------
Two programs of their own do what this process must not. The *keeper* (`keeper.c`) takes, holds, sends and closes the
files of clients: a close that never ends cannot keep this process from dying, and its clients from knowing. The
*injector* (`injector.c`) makes a client install what the keeper sends, with ptrace: it has no system call filter, so
this process can have one.

A file comes out of its sender with `get_file`, and waits as a `File`, which is a number in the keeper. It goes into the
receiver by the receiver's own system calls, on the way out of its ioctl. So a transfer is built around the reply: the
injector seizes the task, the reply is sent, the task stops and installs the files, the numbers are written where they
belong, and the task is released. No code of the task runs in between: to it, this is one ioctl.

What cannot be known before the reply, such as a full table of descriptors, shows when it is too late to reply
otherwise. Then the task, still stopped, is given another result, or made to make its ioctl again (`RESTART`). What the
first reply stored in its memory can be replaced (`Instead`).

A client can hold up the thread that waits for its transfer: it withholds memory that the kernel needs before the task
can stop, or the close of a file hangs. Others must not wait for it, so threads are started as needed. One open has
`Limits.tracers_per_handle` of them at most, and users have shares that shrink with their number (quotas.py). A transfer
beyond that waits its turn, and transfers of others pass it.

Invariants
----------
- No descriptor of a client's file is ever in this process.
- A `File` owns one number in the keeper, and is given up exactly once.
- Callbacks come with no lock held. `File.close` and `FileInstaller.install` wait for nothing that a client can delay:
  any lock may be held.
- The task is named by number only while its request is unanswered, when the number cannot be another's. After that,
  the injector reaches it as its tracee alone (`ptrace.c`).
- A task stays stopped only while its transfer runs. If the thread of a transfer loses its way, it closes its channel,
  and the injector lets the task go.
- A transfer waits only where a limit is reached that keeps it from running, or no thread can be started.
- A channel to a program is one thread's at a time.

PTRACE_INTERRUPT looks like a signal to the kernel's FUSE, so the server gets a FUSE_INTERRUPT for the very request. It
is to be ignored: the request is being answered.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import select
import threading
import warnings
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse import complaints
from binderfs_fuse._host import ffi, lib
from binderfs_fuse.host import tasks
from binderfs_fuse.limits import Limits
from binderfs_fuse.quotas import Shares

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_log = logging.getLogger(__name__)

RESTART: Final = -514
"""A result that makes the task make its system call again, or have -EINTR where a signal handler runs first."""

_FOLDER: Final = Path(__file__).parent
# The system call of ptrace(2) by machine, and PTRACE_SEIZE.
_PTRACE: Final = {"x86_64": b"101", "aarch64": b"117"}
_SEIZE: Final = 0x4206
# The system call filters that a client is known to have beyond this process's, where nobody says.
_INHERITED_FILTERS = 0


class _Program:
    """A program that works for this process, and the channels to it that nobody uses just now.

    `path` is its file; `purpose` says in the log what it does.
    """

    def __init__(self, path: Path, control: int, pid: int, purpose: str, open_channel: Callable[[int], int]) -> None:
        if control < 0:
            raise OSError(-control, os.strerror(-control), str(path))
        self.pid = pid
        self._control = control
        self._purpose = purpose
        self._open_channel = open_channel
        self._channels: list[int] = []
        self._gone = False

    def acquire(self) -> int:
        """Return a channel for this thread alone, or a negative errno."""
        try:
            return self._channels.pop()
        except IndexError:
            channel = self._open_channel(self._control)
            return channel if channel >= 0 else self.meaning(channel)

    def release(self, channel: int, *, reusable: bool) -> None:
        """Take a channel back, or close it."""
        if reusable:
            self._channels.append(channel)
        else:
            os.close(channel)

    def meaning(self, error: int) -> int:
        """Tell one channel that could not be had from a program that is no more: -EMFILE or -EIO for -EPIPE."""
        if error != -errno.EPIPE:
            return error
        poll = select.poll()
        poll.register(self._control, 0)
        if not poll.poll(0):
            return -errno.EMFILE
        if not self._gone:
            self._gone = True
            _log.error("process %d, which %s for this one, is gone: no file can be passed on", self.pid, self._purpose)
        return -errno.EIO


def keeper_limits() -> Any:
    """Return what users may hold of a keeper, for `lib.keeper_start`."""
    return ffi.new(
        "struct keeper_limits *",
        {
            "descriptors": Limits.descriptors,
            "reserve": Limits.descriptor_reserve,
            "closers": Limits.closers,
            "user_closers": Limits.user_closers,
            "user_unclosed": Limits.user_unclosed,
        },
    )


class _Keeper(_Program):
    """The program that holds the files."""

    def __init__(self) -> None:
        """Start it; raises `OSError`."""
        pid = ffi.new("int *")
        path = _FOLDER / "keeper"
        control = lib.keeper_start(os.fsencode(path), keeper_limits(), pid)
        super().__init__(path, control, pid[0], "holds files", lib.keeper_open)

    @property
    def control(self) -> int:
        """The socket that the injector gets a copy of."""
        return self._control

    def take(self, tid: int, fd: int, user: int) -> int:
        """Take a reference to a task's descriptor; return its number, or a negative errno."""
        channel = self.acquire()
        if channel < 0:
            return channel
        result: int = lib.keeper_take(channel, tid, fd, user)
        self.release(channel, reusable=result != -errno.EPIPE)
        return self.meaning(result)

    def give_up(self, numbers: Sequence[int]) -> None:
        """Let files be closed."""
        # Where the keeper is gone, so are they.
        lib.keeper_close(self._control, numbers, len(numbers))


class _Injector(_Program):
    """The program that has clients install files."""

    def __init__(self, keeper: _Keeper, filters: int) -> None:
        """Start it; raises `OSError`."""
        pid = ffi.new("int *")
        path = _FOLDER / "injector"
        control = lib.injector_start(os.fsencode(path), keeper.control, filters, pid)
        super().__init__(path, control, pid[0], "installs files", lib.injector_open)

    def is_seizing(self, tid: int) -> bool:
        """Tell whether a thread of it is blocked in PTRACE_SEIZE of a task.

        The kernel has the task then, and not its number. It waits for another thread of the task's process, which
        executes a program.
        """
        number = _PTRACE.get(os.uname().machine)
        try:
            threads = os.listdir(f"/proc/{self.pid}/task")  # noqa: PTH208 - as in tasks
        except OSError:
            return False
        for thread in threads:
            call = tasks.system_call(self.pid, int(thread))
            if len(call) > 2 and call[0] == number and (int(call[1], 16), int(call[2], 16)) == (_SEIZE, tid):
                return True
        return False


_keeper: _Keeper | None = None
_injector: _Injector | None = None
_programs_guard = threading.Lock()


def start_programs(filters: int = 0) -> None:
    """Start the keeper and the injector with the rights of this process: each drops what it does not need.

    `filters` is the number of system call filters that every client has beyond those of this process, and that let the
    injector's calls pass. Raises `OSError`, which names the program's file. Where this is not called, each program
    starts when it is first needed.
    """
    global _keeper, _injector  # noqa: PLW0603 - a process has one of each
    _keeper = _Keeper()
    _injector = _Injector(_keeper, filters)


def _keeper_of_all() -> _Keeper:
    global _keeper  # noqa: PLW0603 - a process has one
    if _keeper is None:
        with _programs_guard:
            if _keeper is None:
                _keeper = _Keeper()
    return _keeper


def _injector_of_all() -> _Injector:
    global _injector  # noqa: PLW0603 - a process has one
    keeper = _keeper_of_all()
    if _injector is None:
        with _programs_guard:
            if _injector is None:
                _injector = _Injector(keeper, _INHERITED_FILTERS)
    return _injector


def keeper_pid() -> int:
    """Return the process id of the keeper."""
    return _keeper_of_all().pid


def injector_pid() -> int:
    """Return the process id of the injector."""
    return _injector_of_all().pid


def is_keeper(tid: int) -> bool:
    """Tell whether a task is a thread of the keeper."""
    return _keeper is not None and os.path.exists(f"/proc/{_keeper.pid}/task/{tid}")  # noqa: PTH110 - as in tasks


class File:
    """A reference to somebody's open file: a number in the keeper, which it owns."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        """Take over that number."""
        self._number = number

    @property
    def number(self) -> int:
        """The number; raises ValueError after `close`."""
        if self._number < 0:
            raise ValueError("the file is closed")
        return self._number

    def close(self) -> None:
        """Give the reference up, without waiting for its close. Raises ValueError the second time."""
        _keeper_of_all().give_up([self.detach()])

    def detach(self) -> int:
        """Return the number, which from now on is the caller's; raises ValueError after `close`."""
        number = self.number
        self._number = -1
        return number

    def __del__(self) -> None:
        """Close what was forgotten, with a ResourceWarning."""
        if self._number >= 0:
            warnings.warn(f"unclosed file {self._number}", ResourceWarning, source=self, stacklevel=2)
            self.close()


def get_file(tid: int, fd: int, user: int) -> File | int:
    """Return a reference to what descriptor `fd` is to task `tid`, a thread of `user`, or a negative errno.

    -EBADF where the descriptor is not open, or is an O_PATH one, as in the kernel; -EPERM, with a line in the log,
    where this process may not trace that task; -EMFILE where there are too many, or too many of that user that are not
    closed yet; -ESRCH where the task is gone; -EIO, with a line in the log, where the keeper is.
    """
    taken = _keeper_of_all().take(tid, fd, user)
    if taken >= 0:
        return File(taken)
    if taken == -errno.EPERM:
        line = f"cannot take a file descriptor from {_name(tid)}: no right to trace it (CAP_SYS_PTRACE)"
        complaints.say(user, line)
    return taken


class FileInstaller:
    """Installs files in tasks, and closes descriptors there."""

    def __init__(
        self,
        tracers: int = Limits.tracers,
        per_handle: int = Limits.tracers_per_handle,
        reserve: int = Limits.tracer_reserve,
    ) -> None:
        """Trace at most that many tasks at once, and over one open; others wait for one to be through.

        So many of the `reserve` are only for users of whom none is traced.
        """
        self._tracers = _Tracers(tracers, per_handle, reserve)

    def install(
        self,
        tid: int,
        files: Sequence[File],
        *,
        reply: Callable[[], bool],
        patch: Callable[[list[int]], int | None],
        failed: Callable[[int], int | Instead | None],
        closes: Sequence[int] = (),
        handle: int = 0,
        user: int = 0,
    ) -> None:
        """Close descriptors in task `tid`, then install files there, while a system call of it is being answered.

        The task, a thread of `user`, is blocked in that system call on the open `handle`, and stays so until `reply`.
        Returns at once; a tracer thread then calls

        `reply()`         answer the system call; False if it turns out that nobody waits for the answer
        `patch(numbers)`  all files are installed, close-on-exec, under these numbers, each the lowest that was free.
                          The task has left the system call, but runs only once this has returned
        `failed(error)`   in its place, with a negative errno: no file is installed. Where `reply` has not been called
                          yet, which this may do now, the task still waits for it; else the task is stopped as for
                          `patch`, unless it is gone

        The last two return None, or the system call's result in place of the one replied: 0, a negative errno or
        `RESTART`. `failed` may return an `Instead`. It counts only where the task is stopped.

        Errors before the reply: -EPERM (traced by another already, or no right to), -EACCES (its system call filter may
        refuse what has to be done, and cannot be suspended), -ENOSYS (no such machine), -EIO (a program is gone). After
        it: -ECONNABORTED (`reply` said False), -ESRCH (the task is gone), -EMFILE (too few numbers are free, or the
        user has too many files that are not closed yet), -EOPNOTSUPP (a 32-bit task), -EFAULT (no stack), -EIO (a
        program is gone), -EPROTO (another thread of the task meddles). What the user can mend is in the log, in one
        line.

        `closes` are passed over where not open, and are not closed where the task could not be stopped. The files
        are taken over, and closed whatever comes of it. Raises RuntimeError after `close`.
        """
        self._tracers.submit(_Transfer(tid, handle, user, tuple(files), tuple(closes), reply, patch, failed))

    def withdraw(self, tid: int) -> bool:
        """Give up the transfer of a task that is being killed, if nothing of it has begun; tell whether that was so.

        It waits for a thread then, or the injector waits to seize the task. `failed(-ESRCH)` is called, in this thread.
        """
        transfer = self._tracers.withdraw(tid)
        return transfer is not None and transfer.give_up()

    def close(self) -> None:
        """Let the tracer threads end, each after what it is at."""
        self._tracers.close()


@dataclass(frozen=True, slots=True)
class Instead:
    """What a stopped task finds in place of what was replied.

    `result` is that of its system call, as `FileInstaller.install` says; `stores` are [(address, bytes)] of its memory.
    """

    result: int
    stores: Sequence[tuple[int, bytes]] = ()


class _Stage(enum.Enum):
    WAITING = enum.auto()
    SEIZING = enum.auto()
    BEGUN = enum.auto()
    GIVEN_UP = enum.auto()


@dataclass(slots=True)
class _Transfer:
    tid: int
    handle: int
    user: int
    files: tuple[File, ...]
    closes: tuple[int, ...]
    reply: Callable[[], bool]
    patch: Callable[[list[int]], int | None]
    failed: Callable[[int], int | Instead | None]
    stage: _Stage = _Stage.WAITING
    guard: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self) -> None:
        """Run it."""
        with self.guard:
            if self.stage is _Stage.GIVEN_UP:
                return
            self.stage = _Stage.SEIZING
        kept = [file.detach() for file in self.files]
        try:
            self._run(kept)
        finally:
            if kept:
                _keeper_of_all().give_up(kept)

    def give_up(self) -> bool:
        """Give it up if nothing of it has begun; tell whether that was so. Its task is being killed."""
        with self.guard:
            if self.stage is _Stage.SEIZING:
                # What is answered from now on, and so runs again, the kernel still seizes as what it was.
                if not _injector_of_all().is_seizing(self.tid):
                    return False
            elif self.stage is not _Stage.WAITING:
                return False
            was_waiting = self.stage is _Stage.WAITING
            self.stage = _Stage.GIVEN_UP
        if was_waiting:
            for file in self.files:
                file.close()
        self.failed(-errno.ESRCH)
        return True

    def _run(self, kept: list[int]) -> None:
        """Run it; take out of `kept` which files are given up."""
        injector = _injector_of_all()
        channel = injector.acquire()
        if channel < 0:
            self.failed(channel)
            return
        result = -errno.ESRCH
        try:
            # Several files get the lowest free numbers only if the socket that they come by stands above these.
            above = tasks.end_of_free(self.tid, len(kept)) if len(kept) > 1 else 0
            error = lib.injector_seize(channel, self.tid)
            with self.guard:
                if self.stage is _Stage.GIVEN_UP:
                    return
                self.stage = _Stage.BEGUN
            if error == 0:
                result = self._exchange(channel, kept, above)
            else:
                result = error
                self._explain(error, _seizing)
                self.failed(injector.meaning(error))
        finally:
            # If the task is gone, so is the thread at the other end. If it is not released, that end lets it go.
            injector.release(channel, reusable=result not in (-errno.ESRCH, -errno.EPIPE))

    def _exchange(self, channel: int, kept: list[int], above: int) -> int:
        """Reply, install, and let the task go on; return what shows whether the channel is of further use."""
        replied = self.reply()
        error: int = lib.injector_stopped(channel)
        numbers: list[int] = []
        if error == 0 and replied:
            error, numbers = self._install(channel, kept, above)
        elif not replied and error != -errno.ESRCH:
            error = -errno.ECONNABORTED
        if error in (-errno.ESRCH, -errno.EPIPE):
            self.failed(_injector_of_all().meaning(error))
            return error
        if error != 0:
            self._explain(error, _installing)
        outcome = self.patch(numbers) if error == 0 else self.failed(error)
        if isinstance(outcome, Instead):
            for address, data in outcome.stores:
                lib.injector_store(channel, address, data, len(data))
            outcome = outcome.result
        if outcome is None:
            return lib.injector_release(channel, lib.INJECTOR_KEEP, 0)  # type: ignore[no-any-return]
        if outcome == RESTART:
            return lib.injector_release(channel, lib.INJECTOR_RESTART, 0)  # type: ignore[no-any-return]
        return lib.injector_release(channel, lib.INJECTOR_RETURN, outcome)  # type: ignore[no-any-return]

    def _install(self, channel: int, kept: list[int], above: int) -> tuple[int, list[int]]:
        error: int = lib.injector_shut(channel, self.closes, len(self.closes)) if self.closes else 0
        if error != 0 or not kept:
            return error, []
        numbers = ffi.new("int[]", len(kept))
        sent = ffi.new("int *")
        error = lib.injector_install(channel, self.user, kept, len(kept), above, numbers, sent)
        del kept[: sent[0]]
        if error == -errno.EIO:
            _keeper_of_all().meaning(-errno.EPIPE)
        return error, list(numbers)

    def _explain(self, error: int, reason: Callable[[int, int], str | None]) -> None:
        text = reason(self.tid, error)
        if text is not None:
            complaints.say(self.user, f"cannot install file descriptors in {_name(self.tid)}: {text}")


def _seizing(tid: int, error: int) -> str | None:
    """Say why a task could not be seized, where that is worth a line."""
    if error == -errno.EPERM:
        tracer = int(_field(tid, b"TracerPid") or 0)
        return f"{_name(tracer)} traces it" if tracer else "no right to trace it (CAP_SYS_PTRACE)"
    if error == -errno.EACCES:
        return "its system call filter may refuse what has to be done, and cannot be suspended"
    if error == -errno.ENOSYS:
        return f"no layout of registers for {os.uname().machine}"
    return None


def _installing(_tid: int, error: int) -> str | None:
    """Say why a stopped task could not install files, where that is worth a line."""
    if error in (-errno.ECONNABORTED, -errno.EMFILE, -errno.EIO):
        return None
    if error == -errno.EOPNOTSUPP:
        return "a 32-bit program, or one that makes system calls in an unknown way"
    if error == -errno.EPROTO:
        return "another thread changes its code, its memory or its descriptors meanwhile"
    if error == -errno.EACCES:
        return "its system call filter has refused what has to be done"
    return f"a call that has to be made in it fails: {os.strerror(-error)}"


def _field(tid: int, name: bytes) -> bytes | None:
    """Return one value of ``/proc/TID/status``, or None."""
    try:
        return tasks.status(tid).get(name)
    except OSError:
        return None


def _name(tid: int) -> str:
    # A task may have any characters in its name: the log gets only those that are harmless.
    name = _field(tid, b"Name")
    return f"task {tid} ({ascii(os.fsdecode(name))[1:-1] if name is not None else 'gone'})"


class _Tracers:
    """Threads that each run one transfer at a time: as many as there are at once, up to the limits.

    A thread ends when its transfer raises. Transfers that wait get another thread.
    """

    def __init__(self, limit: int, per_handle: int, reserve: int) -> None:
        self._per_handle = per_handle
        # Each in here is promised to a thread that is idle no more.
        self._promised: SimpleQueue[_Transfer | None] = SimpleQueue()
        self._lock = threading.Lock()
        # All guarded by the lock.
        self._threads = 0
        self._idle = 0
        self._by_handle: Counter[int] = Counter()  # transfers that run, or are promised; as the shares
        self._shares = Shares(limit, reserve)
        self._running: dict[int, _Transfer] = {}  # by thread id of the task
        self._waiting: OrderedDict[tuple[int, int], deque[_Transfer]] = OrderedDict()  # by handle and user
        self._closed = False

    def submit(self, transfer: _Transfer) -> None:
        """Have a thread run the transfer; raises RuntimeError after `close`, or where no thread can be started."""
        with self._lock:
            if self._closed:
                raise RuntimeError("no tracer threads any more")
            if self._may_run(transfer.handle, transfer.user):
                self._let_in(transfer)
            else:
                self._waiting.setdefault((transfer.handle, transfer.user), deque()).append(transfer)

    def withdraw(self, tid: int) -> _Transfer | None:
        """Return the transfer of a task, which waits no more if it did."""
        with self._lock:
            for whose, transfers in self._waiting.items():
                for transfer in transfers:
                    if transfer.tid == tid:
                        transfers.remove(transfer)
                        if not transfers:
                            del self._waiting[whose]
                        return transfer
            return self._running.get(tid)

    def close(self) -> None:
        """Let the threads end once no transfer waits."""
        with self._lock:
            self._closed = True
            for _ in range(self._idle):
                self._promised.put(None)
            self._threads -= self._idle
            self._idle = 0

    def _may_run(self, handle: int, user: int) -> bool:
        return self._by_handle[handle] < self._per_handle and self._shares.has_room(user)

    def _count(self, transfer: _Transfer) -> None:
        self._by_handle[transfer.handle] += 1
        self._shares.take(transfer.user)
        self._running[transfer.tid] = transfer

    def _discount(self, transfer: _Transfer) -> None:
        self._by_handle[transfer.handle] -= 1
        if not self._by_handle[transfer.handle]:
            del self._by_handle[transfer.handle]
        self._shares.give_back(transfer.user)
        if self._running.get(transfer.tid) is transfer:
            del self._running[transfer.tid]

    def _take_next(self) -> _Transfer | None:
        """Take one that may run out of those that wait: another open's, if there is, than last time."""
        for whose, transfers in self._waiting.items():
            if self._may_run(*whose):
                transfer = transfers.popleft()
                if transfers:
                    self._waiting.move_to_end(whose)
                else:
                    del self._waiting[whose]
                return transfer
        return None

    def _let_in(self, transfer: _Transfer) -> None:
        """Have a transfer that may run do so, in an idle thread or a new one. Raises RuntimeError without either."""
        if self._idle:
            self._idle -= 1
            self._promised.put(transfer)
        else:
            threading.Thread(target=self._work, args=(transfer,), name="binderfs tracer", daemon=True).start()
            self._threads += 1
        self._count(transfer)

    def _work(self, transfer: _Transfer | None) -> None:
        while transfer is not None:
            goes_on = False
            try:
                transfer()
                goes_on = True
            finally:
                following = self._end(transfer, goes_on=goes_on)
            if not goes_on:
                return
            # What it was about must not stay until the next one.
            del transfer
            transfer = following or self._promised.get()

    def _end(self, transfer: _Transfer, *, goes_on: bool) -> _Transfer | None:
        """Note the end of a transfer; return the next for this thread, if it goes on and any may run."""
        with self._lock:
            self._discount(transfer)
            following = self._take_next() if goes_on else None
            if following is not None:
                self._count(following)
            elif not goes_on:
                self._threads -= 1
            elif self._closed:
                self._threads -= 1
                self._promised.put(None)
            else:
                self._idle += 1
            # The user has one less, and there is one more for others: so one of each may have room now.
            while (another := self._take_next()) is not None:
                try:
                    self._let_in(another)
                except RuntimeError:
                    # The machine has no thread to spare. The next end of another transfer is another chance.
                    whose = another.handle, another.user
                    self._waiting.setdefault(whose, deque()).appendleft(another)
                    self._waiting.move_to_end(whose, last=False)
                    break
        return following
