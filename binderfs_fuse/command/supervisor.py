"""The process that stands by a command of ``mount.py run``: it passes signals, and has the filter's calls served.

A call that the filter hands over (`seccomp`) is answered in one of three ways:

- ``ioctl(fd, BINDER_SET_CONTEXT_MGR or BINDER_THREAD_EXIT, NULL)`` on a device of a mount that this process made goes
  to that mount's server, by a socket (`fuse.supervised`): fd's file system and inode tell which open of which mount.
- ``mount(..., "binder", ...)`` makes such a mount where the caller is, and a server of ours answers on it. A remount
  goes to that.
- Everything else proceeds as if there were no filter.

What a caller may do is for the kernel to say: the place is looked for with the caller's rights, in its namespaces, and
the caller must have CAP_SYS_ADMIN, as for any mount. What it can say about the mount is what the kernel's binderfs
knows of (`options.parse_data`); everything else about a server is for whoever started this.

Theory of operation. One thread waits for everything (`loop`), and does nothing that could make it wait elsewhere. What
reads a caller's memory or walks its path is a process apart for each call (`attendant`). A call is answered when its
attendant has said what is to become of it, and, where that takes a server, when that is ready or has answered. A user's
calls can have half of the attendants that nobody else has (`_may_start`), so that one whose paths do not answer delays
only itself. An attendant is killed after `calls.PATIENCE` seconds, and its call proceeds; it counts until it has ended.

Invariants:
- Nothing here waits but `Loop.turn`, the start of the first server, and the ends of children in `stop`, for a bounded
  time.
- Each call is answered once, and then only if it still waits, which the kernel sees to.
- An attendant has let go of a mount before its call is answered: the caller may unmount it at once.
- A child's id is used only until it has been waited for, which `_reap` and `stop` alone do.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import socket
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse.command import attendant, calls, seccomp
from binderfs_fuse.command.attendant import Attendant, Message, Verdict
from binderfs_fuse.command.daemon import begin, failure_in, in_background
from binderfs_fuse.command.loop import Loop
from binderfs_fuse.command.mount import prepare, serve
from binderfs_fuse.fuse.mounting import Connection, MountError
from binderfs_fuse.fuse.supervised import ANSWER
from binderfs_fuse.host import tasks
from binderfs_fuse.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from binderfs_fuse.command.calls import SignalQueue
    from binderfs_fuse.command.options import Options
    from binderfs_fuse.command.seccomp import Notification
    from binderfs_fuse.command.warden import Warden

# When a shell has its command stopped by one of these, `run` has to stop, too: it is what the shell waits for.
_JOB_CONTROL: Final = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)

_MOST_REPORT: Final = 1 << 16


@dataclass(slots=True)
class Served:
    """A mount that this process made: its server, the socket to that, and the user namespace that it was made in.

    `asked` are the calls that the server has not answered yet, in their order.
    """

    pid: int
    socket: socket.socket
    user_namespace: int
    asked: deque[Notification] = field(default_factory=deque)

    def close(self) -> None:
        """Let go of it."""
        self.socket.close()
        os.close(self.user_namespace)


@dataclass(slots=True)
class _Job:
    """A call, and the attendant that looks at it.

    `reply` is what to do once the attendant has hung up; None: the call is in other hands. `deadline` None: it is not
    the caller that is waited for.
    """

    notification: Notification
    user: int
    pid: int
    socket: socket.socket
    deadline: float | None
    reply: Callable[[], None] | None
    is_open: bool = True


@dataclass(slots=True)
class _Start:
    """A server in the making for a mount of a `job`; `said` is what its pipe has said."""

    job: _Job
    pid: int
    pipe: int
    device: int
    socket: socket.socket
    user_namespace: int
    said: bytes = b""
    has_ended: bool = False


class Supervisor:
    """Makes mounts, by `base` where nothing else is said, and serves what a filtered command cannot ask of FUSE.

    It waits for its process's children: those are its servers, its attendants, and orphans (`calls.adopt_orphans`).
    """

    def __init__(self, base: Options) -> None:
        self._base = base
        self.loop = Loop()
        self._listener: int | None = None
        # By st_dev.
        self._served: dict[int, Served] = {}
        # By process id, until that has been waited for.
        self._jobs: dict[int, _Job] = {}
        self._running: Counter[int] = Counter()
        self._waiting: dict[int, deque[Notification]] = {}
        self._starts: dict[int, _Start] = {}

    def adopt(self, connection: Connection, chosen: Options) -> None:
        """Start a server for a mount of this process's own, and return when it is ready. Raises `MountError`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = in_background(_server(connection, chosen, theirs), keep=[theirs.fileno(), connection.descriptor])
        except MountError:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(connection.descriptor)
        self._register(connection.device, pid, ours, os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC))

    def stand_by(self, warden: Warden, listener: int | None, signals: SignalQueue) -> int:
        """Serve and pass on until the command of `warden` ends; return its wait status."""
        status: list[int] = []

        def hear() -> bool:
            has_ended, number = warden.hear()
            if has_ended:
                status.append(number)
            elif number in _JOB_CONTROL:
                signals.let_through(number)
            return True

        self.loop.add(warden.fileno(), hear, lambda: status.append(signal.SIGKILL))
        self.attend_signals(warden, signals)
        if listener is not None:
            self._listener = listener
            self.loop.add(listener, self._receive, self._hang_up)
        while not status:
            self.loop.turn(self._check_deadlines())
        return status[0]

    def wait_for_start(self, starting: socket.socket, warden: Warden, signals: SignalQueue) -> bytes:
        """Return what the process says that is to become the command, b"" where it has; pass signals on meanwhile."""
        said: list[bytes] = []

        def hear() -> bool:
            said.append(starting.recv(1024, socket.MSG_DONTWAIT))
            return True

        self.attend_signals(warden, signals)
        self.loop.add(starting.fileno(), hear, lambda: said.append(b""))
        while not said:
            self.loop.turn()
        self.loop.drop(starting.fileno())
        return said[0]

    def attend_signals(self, warden: Warden, signals: SignalQueue) -> None:
        """Pass signals on to the command from now on."""
        self.loop.drop(signals.fileno())

        def lost() -> None:
            # A queue of signals that does not say which would leave a process that only SIGKILL ends.
            raise RuntimeError("signals are lost")

        self.loop.add(signals.fileno(), lambda: self._pass_on(warden, signals), lost)

    def stop(self) -> None:
        """End what the command has left running, then the servers, and wait for them, for a bounded time."""
        calls.end_children(but={served.pid for served in self._served.values()})
        for served in self._served.values():
            os.kill(served.pid, signal.SIGTERM)
        deadline = time.monotonic() + calls.PATIENCE
        for served in self._served.values():
            if not calls.wait_for(served.pid, deadline):
                os.kill(served.pid, signal.SIGKILL)
                calls.wait_for(served.pid, time.monotonic() + calls.PATIENCE)
            self.loop.drop(served.socket.fileno())
            served.close()
        self._served.clear()
        # The servers' programs are this process's children now. They end by themselves.
        deadline = time.monotonic() + calls.PATIENCE
        for child in calls.children():
            calls.wait_for(child, deadline)

    # Signals and children.

    def _pass_on(self, warden: Warden, signals: SignalQueue) -> bool:
        received = signals.take()
        for each in received:
            if each.number == signal.SIGCHLD:
                self._reap(warden.pid)
            elif not each.from_terminal and not each.from_self:
                warden.signal(each.number)
        return bool(received)

    def _reap(self, warden: int) -> None:
        """Let go of children that have ended, mounts whose servers have among them, but for the warden."""
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == warden:
                return
            os.waitpid(ended.si_pid, 0)
            job = self._jobs.pop(ended.si_pid, None)
            if job is not None:
                self._running -= Counter([job.user])
                self._start_waiting(job.user)
            if ended.si_pid in self._starts:
                self._starts[ended.si_pid].has_ended = True
            for device, served in self._served.items():
                if served.pid == ended.si_pid:
                    self._lose(device)
                    break

    def _lose(self, device: int) -> None:
        """Let go of a mount whose server is gone."""
        served = self._served.pop(device, None)
        if served is None:
            return
        self.loop.drop(served.socket.fileno())
        served.close()
        self._give_up(served)

    # Calls, and their attendants.

    def _hang_up(self) -> None:
        """Let go of the listener: nobody is left under the filter, or it is no listener any more."""
        if self._listener is not None:
            os.close(self._listener)
            self._listener = None

    def _receive(self) -> bool:
        """Take a call. Raises nothing for a caller that is gone: that it was there is progress."""
        if self._listener is None:
            return False
        try:
            notification = seccomp.receive(self._listener)
        except OSError:
            return False
        if notification is None:
            # The kernel counts calls to be taken, and one less is left.
            return True
        if attendant.is_foreign(notification):
            # A process for each of a container's many bind mounts would cost more than the mounts.
            self._proceed(notification)
            return True
        try:
            user = tasks.caller(notification.tid)[1]
        except OSError:
            self._proceed(notification)
            return True
        if self._may_start(user) and not self._waiting.get(user):
            self._start(notification, user)
            return True
        waiting = self._waiting.setdefault(user, deque())
        if len(waiting) >= Limits.user_calls:
            self._answer(notification, -errno.ENOMEM)
        else:
            waiting.append(notification)
        return True

    def _may_start(self, user: int) -> bool:
        """Tell whether a user has fewer attendants than there are free: whoever comes later finds some, too."""
        return self._running[user] < Limits.attendants - self._running.total()

    def _start_waiting(self, ended: int) -> None:
        """Start attendants for calls that wait: first of the user who had one that has ended, then of all."""
        for user in [ended, *self._waiting]:
            waiting = self._waiting.get(user)
            while waiting and self._may_start(user):
                self._start(waiting.popleft(), user)
        self._waiting = {user: waiting for user, waiting in self._waiting.items() if waiting}

    def _start(self, notification: Notification, user: int) -> None:
        listener = self._listener
        if listener is None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        spaces = {device: served.user_namespace for device, served in self._served.items()}
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            self._answer(notification, -errno.ENOMEM)
            return
        if not pid:
            Attendant(listener, theirs, notification, spaces, self._base).serve()
        theirs.close()
        deadline = time.monotonic() + calls.PATIENCE
        job = _Job(notification, user, pid, ours, deadline, functools.partial(self._proceed, notification))
        self._jobs[pid] = job
        self._running[user] += 1
        self.loop.add(ours.fileno(), lambda: self._hear(job), lambda: self._finish(job))

    def _check_deadlines(self) -> float | None:
        """Let calls proceed whose attendants take too long; return the seconds until that may be so of another."""
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if job.is_open and job.deadline is not None and job.deadline <= now:
                # It has not been waited for, so this is its id.
                os.kill(job.pid, signal.SIGKILL)
                self._finish(job)
        left = [job.deadline - now for job in self._jobs.values() if job.is_open and job.deadline is not None]
        return min(left, default=None)

    def _hear(self, job: _Job) -> bool:
        """Take what an attendant says, or that it has hung up."""
        try:
            text, descriptors, _, _ = socket.recv_fds(job.socket, attendant.LONGEST, 2, socket.MSG_DONTWAIT)
        except OSError:
            # It was killed before it took what was said to it.
            text, descriptors = b"", []
        if not text:
            self._finish(job)
            return True
        message = Message.unpack(text)
        if message.verdict is Verdict.ANSWER:
            job.reply = functools.partial(self._answer, job.notification, message.number)
        elif message.verdict is Verdict.ASK:
            self._ask(job, message)
        elif message.verdict is Verdict.SERVE:
            job.deadline = None
            job.reply = None
            self._begin_server(job, message, *descriptors)
        return True

    def _finish(self, job: _Job) -> None:
        """Do with a call what is to be done once its attendant has let go of everything."""
        if not job.is_open:
            return
        job.is_open = False
        self.loop.drop(job.socket.fileno())
        job.socket.close()
        if job.reply is not None:
            job.reply()

    def _answer(self, notification: Notification, error: int) -> None:
        # The caller may be gone, and the listener with the last of them.
        if self._listener is not None:
            with contextlib.suppress(OSError):
                seccomp.answer(self._listener, notification, error)

    def _proceed(self, notification: Notification) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                seccomp.proceed(self._listener, notification)

    # Servers.

    def _register(self, device: int, pid: int, connection: socket.socket, user_namespace: int) -> None:
        """Take a server that is ready for that of a mount."""
        # The kernel gives out the number of a file system again whose server has not quite ended.
        self._lose(device)
        served = Served(pid, connection, user_namespace)
        self._served[device] = served
        self.loop.add(connection.fileno(), lambda: self._hear_server(served), lambda: self._give_up(served))

    def _ask(self, job: _Job, message: Message) -> None:
        """Ask a server what a call is to return. Those that are asked answer in the order of the questions."""
        served = self._served.get(message.device)
        if served is None:
            return
        try:
            served.socket.send(message.request, socket.MSG_DONTWAIT)
        except BlockingIOError:
            # It is stopped, or stuck, and has some hundred questions.
            job.reply = functools.partial(self._answer, job.notification, -errno.ENOMEM)
        except OSError:
            job.reply = functools.partial(self._answer, job.notification, -errno.ENOTCONN)
        else:
            job.reply = None
            served.asked.append(job.notification)

    def _hear_server(self, served: Served) -> bool:
        try:
            answer = served.socket.recv(ANSWER.size, socket.MSG_DONTWAIT)
        except OSError:
            # It was killed with questions that it had not taken.
            answer = b""
        if not answer or not served.asked:
            self.loop.drop(served.socket.fileno())
            self._give_up(served)
            return True
        self._answer(served.asked.popleft(), ANSWER.unpack(answer)[0])
        return True

    def _give_up(self, served: Served) -> None:
        """Answer what a server will not: it has hung up."""
        while served.asked:
            self._answer(served.asked.popleft(), -errno.ENOTCONN)

    def _begin_server(self, job: _Job, message: Message, fuse: int, user_namespace: int) -> None:
        """Start a server for a mount that an attendant has made."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            chosen, _ = attendant.choose(self._base, message.data, None, read_only=message.read_only)
            place = Path(os.fsdecode(message.place))
            connection = Connection(fuse, message.device, place, message.uid, message.gid)
            pid, pipe = begin(_server(connection, chosen, theirs), keep=[theirs.fileno(), fuse])
        except (OSError, MountError) as error:
            ours.close()
            os.close(user_namespace)
            self._settle(job, -(error.number if isinstance(error, MountError) else error.errno or errno.ENOMEM))
            return
        finally:
            theirs.close()
            os.close(fuse)
        start = _Start(job, pid, pipe, message.device, ours, user_namespace)
        self._starts[pid] = start
        self.loop.add(pipe, lambda: self._hear_start(start), lambda: self._end_start(start))

    def _hear_start(self, start: _Start) -> bool:
        part = os.read(start.pipe, _MOST_REPORT)
        if part and len(start.said) < _MOST_REPORT:
            start.said += part
        else:
            self.loop.drop(start.pipe)
            self._end_start(start)
        return True

    def _end_start(self, start: _Start) -> None:
        """Answer a mount: its server is ready, or has failed."""
        os.close(start.pipe)
        del self._starts[start.pid]
        failure = failure_in(start.said)
        if failure is None and start.has_ended:
            failure = MountError("the server died as it started", errno.EIO)
        if failure is None:
            self._register(start.device, start.pid, start.socket, start.user_namespace)
            self._settle(start.job, 0)
        else:
            start.socket.close()
            os.close(start.user_namespace)
            self._settle(start.job, -failure.number)

    def _settle(self, job: _Job, error: int) -> None:
        """Have the attendant that made a mount let go of it, or take it away, and then the call return."""
        job.reply = functools.partial(self._answer, job.notification, error)
        if not job.is_open:
            job.reply()
            return
        job.deadline = time.monotonic() + calls.PATIENCE
        # It hangs up now; or has, and that is still to be heard.
        with contextlib.suppress(OSError):
            if error:
                job.socket.send(attendant.TAKE_AWAY, socket.MSG_DONTWAIT)
            job.socket.shutdown(socket.SHUT_WR)


def _server(
    connection: Connection, chosen: Options, supervisor: socket.socket
) -> Callable[[Callable[[], object]], None]:
    """Return what a server does that a supervisor starts."""

    def serve_supervised(ready: Callable[[], object]) -> None:
        calls.die_with_parent(signal.SIGTERM)
        prepare(chosen)
        serve(connection, chosen, ready, supervisor)

    return serve_supervised
