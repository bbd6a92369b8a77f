"""Open files on their way from one task to another (pidfd_getfd(2), ptrace(2)).

Theory of operation
-------------------
A file comes out of its sender with `get_file`, and waits as a `File`, which is a number in the *keeper*: a process that
takes, holds, sends and closes the files of clients (`keeper.c`), so that a close that never ends cannot keep this one
from dying, and its clients from knowing. Into the receiver it goes by the receiver's own system calls, which `ptrace.c`
makes it run on its way out of its ioctl. So a transfer is built around the reply: a tracer thread seizes the task, has
the reply sent, waits for the task to stop, has it install the files, lets the numbers be written where they belong, and
lets it go. No code of the task runs in between: to it, this is one ioctl.

What cannot be known before the reply, that the table of descriptors is full for instance, shows when it is too late
to reply otherwise. Then the task, still stopped, is given another result, or made to make its ioctl again (`RESTART`);
what the first reply stored in its memory can be replaced.

ptrace knows threads, not processes: whoever seizes must do the rest. Tracer threads are started as needed, for one can
be held up by a client that withholds memory which the kernel needs before the task can stop, or by the close of a file
in it, and others must not wait for it. One open has `TRACERS_PER_HANDLE` of them at most, one user half of all; what
is beyond waits its turn, and what belongs to others passes it.

Invariants
----------
- No descriptor of a client's file is ever in this process.
- A `File` owns one number in the keeper, and is given up exactly once.
- Callbacks come with no lock held. `File.close` and `FileInstaller.install` wait for nothing that a client can delay:
  any lock may be held.
- A task stays seized only while its tracer is at it. A tracer that loses its task, or its way, ends, and with the
  thread the kernel takes back all that it held: no task stays stopped, no zombie is left, no exit status is kept from
  a parent.
- A transfer waits only where a limit is reached that keeps it from running.
- A channel to the keeper is one thread's at a time.
- Nothing in this process may wait for just any child (``waitpid(-1)``): it could take the tracers' news.

PTRACE_INTERRUPT looks like a signal to the kernel's FUSE, so the server gets a FUSE_INTERRUPT for the very request.
It is to be ignored: the request is being answered.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
import warnings
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from binderfs_fuse._ptrace import ffi, lib
from binderfs_fuse.host import tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_log = logging.getLogger(__name__)

RESTART: Final = -514
"""A result that makes the task make its system call again, or have -EINTR where a signal handler runs first."""
MAX_TRACERS: Final = 64
"""Tasks that may be traced at once; one user's may be half as many."""
TRACERS_PER_HANDLE: Final = 8
"""Tasks that may be traced at once over one open."""

_PROGRAM: Final = Path(__file__).with_name("keeper")


class _Keeper:
    """The process that holds the files, and the channels to it that nobody uses just now."""

    def __init__(self) -> None:
        """Start it; raises `OSError`."""
        pid = ffi.new("int *")
        self._control: int = lib.keeper_start(os.fsencode(_PROGRAM), pid)
        if self._control < 0:
            raise OSError(-self._control, os.strerror(-self._control))
        self.pid: int = pid[0]
        self._channels: list[int] = []
        self._gone = False

    def acquire(self) -> int:
        """Return a channel for this thread alone, or a negative errno."""
        try:
            return self._channels.pop()
        except IndexError:
            channel: int = lib.keeper_open(self._control)
            return channel if channel >= 0 else self._judge(channel)

    def release(self, channel: int, result: int) -> int:
        """Take a channel back after a call that returned `result`; return what that means."""
        if result != -errno.EPIPE:
            self._channels.append(channel)
            return result
        os.close(channel)
        return self._judge(result)

    def take(self, tid: int, fd: int, user: int) -> int:
        """Take a reference to a task's descriptor; return its number, or a negative errno."""
        channel = self.acquire()
        if channel < 0:
            return channel
        return self.release(channel, lib.keeper_take(channel, tid, fd, user))

    def give_up(self, numbers: Sequence[int]) -> None:
        """Let files be closed."""
        # Where the keeper is gone, so are they.
        lib.keeper_close(self._control, numbers, len(numbers))

    def _judge(self, error: int) -> int:
        """Tell one channel that could not be had from a keeper that is no more."""
        if error != -errno.EPIPE:
            return error
        poll = select.poll()
        poll.register(self._control, 0)
        if not poll.poll(0):
            return -errno.EMFILE
        if not self._gone:
            self._gone = True
            _log.error("process %d, which holds files for this one, is gone: none can be passed on", self.pid)
        return -errno.EIO


_keeper: _Keeper | None = None
_keeper_guard = threading.Lock()


def start_keeper() -> None:
    """Start the process that is to hold files, with the rights that this one has now: it drops what it does not need.

    Raises `OSError`. Where this is not called, the keeper starts when it is first needed.
    """
    global _keeper  # noqa: PLW0603 - a process has one
    _keeper = _Keeper()


def _keeper_of_all() -> _Keeper:
    if _keeper is None:
        with _keeper_guard:
            if _keeper is None:
                start_keeper()
    assert _keeper is not None
    return _keeper


def keeper_pid() -> int:
    """Return the process id of the keeper."""
    return _keeper_of_all().pid


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
        _complain(f"cannot take a file descriptor from {_name(tid)}: no right to trace it (CAP_SYS_PTRACE)")
    return taken


class FileInstaller:
    """Installs files in tasks, and closes descriptors there."""

    def __init__(self, tracers: int = MAX_TRACERS, per_handle: int = TRACERS_PER_HANDLE) -> None:
        """Trace at most that many tasks at once, and over one open; others wait for one to be through."""
        self._tracers = _Tracers(tracers, per_handle)

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
        `RESTART`. It counts only where the task is stopped.

        Errors: -EPERM (traced by another already, or no right to) and -ENOSYS (no such machine) come before the reply;
        after it -ECONNABORTED (`reply` said False), -ESRCH (the task is gone), -EMFILE (too few numbers are free,
        or the user has too many files that are not closed yet), -EOPNOTSUPP (a 32-bit task), -EFAULT (no stack), -EIO
        (the keeper is gone), -ENOTSOCK (another thread of the task meddles), or what the task's system call filter says
        to socketpair or recvmsg. What the user can mend is in the log, in one line.

        `closes` are passed over where not open, and are not closed where the task could not be stopped. The files
        are taken over, and closed whatever comes of it. Raises RuntimeError after `close`.
        """
        self._tracers.submit(_Transfer(tid, handle, user, tuple(files), tuple(closes), reply, patch, failed))

    def withdraw(self, tid: int) -> bool:
        """Give up the transfer of a task that is being killed, if it still waits for a tracer; tell whether it did.

        `failed(-ESRCH)` is called, in this thread.
        """
        transfer = self._tracers.withdraw(tid)
        if transfer is None:
            return False
        transfer.give_up()
        return True

    def close_files(
        self,
        tid: int,
        fds: Sequence[int],
        *,
        reply: Callable[[], bool],
        closed: Callable[[], int | None],
        failed: Callable[[int], int | None],
    ) -> None:
        """Close descriptors in task `tid`: `install` with nothing to install, and `closed()` for `patch`."""
        self.install(tid, (), reply=reply, patch=lambda _: closed(), failed=failed, closes=fds)

    def close(self) -> None:
        """Let the tracer threads end, each after what it is at."""
        self._tracers.close()


@dataclass(frozen=True, slots=True)
class _Transfer:
    tid: int
    handle: int
    user: int
    files: tuple[File, ...]
    closes: tuple[int, ...]
    reply: Callable[[], bool]
    patch: Callable[[list[int]], int | None]
    failed: Callable[[int], int | None]

    def __call__(self) -> bool:
        """Run it; return whether this thread holds no task any more."""
        kept = [file.detach() for file in self.files]
        try:
            return self._run(kept)
        finally:
            if kept:
                _keeper_of_all().give_up(kept)

    def give_up(self) -> None:
        """Do not run it: its task is being killed."""
        for file in self.files:
            file.close()
        self.failed(-errno.ESRCH)

    def _run(self, kept: list[int]) -> bool:
        """Run it; take out of `kept` which files are given up."""
        tracee = ffi.new("struct tracee *", {"user": self.user})
        error = lib.tracee_seize(tracee, self.tid)
        if error != 0:
            self._explain(error, _seizing)
            self.failed(error)
            return not tracee.dead
        replied = self.reply()
        error = lib.tracee_stopped(tracee)
        numbers: list[int] = []
        if error == 0 and replied:
            error, numbers = self._exchange(tracee, kept)
        elif not replied:
            error = -errno.ECONNABORTED
        if tracee.dead:
            self.failed(-errno.ESRCH)
            return False
        if error != 0:
            self._explain(error, _installing)
        try:
            result = self.patch(numbers) if error == 0 else self.failed(error)
            if result == RESTART:
                lib.tracee_restart(tracee)
            elif result is not None:
                lib.tracee_return(tracee, result)
        finally:
            lib.tracee_release(tracee)
        return not tracee.dead

    def _exchange(self, tracee: ffi.CData, kept: list[int]) -> tuple[int, list[int]]:
        error = lib.tracee_close(tracee, self.closes, len(self.closes)) if self.closes else 0
        if error != 0 or not kept:
            return error, []
        keeper = _keeper_of_all()
        channel = keeper.acquire()
        if channel < 0:
            return channel, []
        numbers = ffi.new("int[]", len(kept))
        sent = ffi.new("int *")
        error = lib.tracee_install(tracee, channel, kept, len(kept), numbers, sent)
        del kept[: sent[0]]
        return keeper.release(channel, error), list(numbers)

    def _explain(self, error: int, reason: Callable[[int, int], str | None]) -> None:
        text = reason(self.tid, error)
        if text is not None:
            _complain(f"cannot install file descriptors in {_name(self.tid)}: {text}")


def _seizing(tid: int, error: int) -> str | None:
    """Say why a task could not be seized, where that is worth a line."""
    if error == -errno.EPERM:
        tracer = int(_field(tid, b"TracerPid") or 0)
        return f"{_name(tracer)} traces it" if tracer else "no right to trace it (CAP_SYS_PTRACE)"
    if error == -errno.ENOSYS:
        return f"no layout of registers for {os.uname().machine}"
    return None


def _installing(_tid: int, error: int) -> str | None:
    """Say why a stopped task could not install files, where that is worth a line."""
    if error in (-errno.ECONNABORTED, -errno.EMFILE, -errno.EIO):
        return None
    if error == -errno.EOPNOTSUPP:
        return "a 32-bit program, or one that makes system calls in an unknown way"
    return f"socketpair or recvmsg fails in it: {os.strerror(-error)}"


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


_last_complaint = ""


def _complain(line: str) -> None:
    """Log a line, but not the same one over and over: a client decides how often this happens."""
    global _last_complaint  # noqa: PLW0603 - it is about the log, of which there is one
    if line != _last_complaint:
        _last_complaint = line
        _log.warning("%s", line)


class _Tracers:
    """Threads that each run one transfer at a time: as many as there are at once, up to the limits.

    A transfer returns whether its thread can go on to another. A thread ends when it cannot, or when the transfer
    raises; those that wait get another.
    """

    def __init__(self, limit: int, per_handle: int) -> None:
        self._limit = limit
        self._per_handle = per_handle
        self._per_user = max(1, limit // 2)
        # Each in here is promised to a thread that is idle no more.
        self._promised: SimpleQueue[_Transfer | None] = SimpleQueue()
        self._lock = threading.Lock()
        # All guarded by the lock.
        self._threads = 0
        self._idle = 0
        self._by_handle: Counter[int] = Counter()  # running, or promised
        self._by_user: Counter[int] = Counter()
        self._waiting: OrderedDict[tuple[int, int], deque[_Transfer]] = OrderedDict()  # by handle and user
        self._closed = False

    def submit(self, transfer: _Transfer) -> None:
        """Have a thread run the transfer; raises RuntimeError after `close`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("no tracer threads any more")
            has_thread = self._idle or self._threads < self._limit
            if not (has_thread and self._may_run(transfer.handle, transfer.user)):
                self._waiting.setdefault((transfer.handle, transfer.user), deque()).append(transfer)
                return
            self._count(transfer, 1)
            if self._idle:
                self._idle -= 1
                self._promised.put(transfer)
            else:
                self._start(transfer)

    def withdraw(self, tid: int) -> _Transfer | None:
        """Take back the transfer of a task, if it waits."""
        with self._lock:
            for whose, transfers in self._waiting.items():
                for transfer in transfers:
                    if transfer.tid == tid:
                        transfers.remove(transfer)
                        if not transfers:
                            del self._waiting[whose]
                        return transfer
        return None

    def close(self) -> None:
        """Let the threads end once no transfer waits."""
        with self._lock:
            self._closed = True
            for _ in range(self._idle):
                self._promised.put(None)
            self._threads -= self._idle
            self._idle = 0

    def _may_run(self, handle: int, user: int) -> bool:
        return self._by_handle[handle] < self._per_handle and self._by_user[user] < self._per_user

    def _count(self, transfer: _Transfer, change: int) -> None:
        for counter, key in ((self._by_handle, transfer.handle), (self._by_user, transfer.user)):
            counter[key] += change
            if not counter[key]:
                del counter[key]

    def _take_next(self) -> _Transfer | None:
        """Take one that may run out of those that wait: another open's, if there is, than last time."""
        for whose, transfers in self._waiting.items():
            if self._may_run(*whose):
                transfer = transfers.popleft()
                if transfers:
                    self._waiting.move_to_end(whose)
                else:
                    del self._waiting[whose]
                self._count(transfer, 1)
                return transfer
        return None

    def _start(self, transfer: _Transfer) -> None:
        self._threads += 1
        threading.Thread(target=self._work, args=(transfer,), name="binderfs tracer", daemon=True).start()

    def _work(self, transfer: _Transfer | None) -> None:
        while transfer is not None:
            goes_on = False
            try:
                goes_on = transfer()
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
            self._count(transfer, -1)
            following = self._take_next()
            if goes_on and following is not None:
                return following
            if not goes_on:
                self._threads -= 1
                if following is not None:
                    self._start(following)
            elif self._closed:
                self._threads -= 1
                self._promised.put(None)
            else:
                self._idle += 1
        return None
