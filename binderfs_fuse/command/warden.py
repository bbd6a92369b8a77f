"""The process between ``mount.py run`` and its command, which lets nothing that the command starts outlive `run`.

Whoever is an orphan among the command's descendants becomes a child of this process, as of any subreaper. When `run`
ends, also by SIGKILL, their socket does, and this process kills all its children until there are none. Should it be
this one that is killed, the command goes with it, and the orphans come to `run`, which is a subreaper too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

from binderfs_fuse.command import calls
from binderfs_fuse.command.daemon import close_inherited

if TYPE_CHECKING:
    from collections.abc import Callable

_EVENT: Final = struct.Struct("=?i")
"""Whether the command has ended, and its wait status; else it was stopped, and this is by which signal."""


class Warden:
    """The process and its command, as `run` has them. Give `become` that turns a process into the command.

    All signals that `run` gets itself must be blocked. Only its socket may hold on to it: who is forked later has to
    close that, or to go with `run`.
    """

    def __init__(self, become: Callable[[], None]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if not self.pid:
            # Whatever happens here, nothing of `run` is to be gone on with.
            try:
                self._socket.close()
                _watch(theirs, become)
            finally:
                os._exit(1)
        theirs.close()
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
        self._command = descriptors[0] if descriptors else None

    def fileno(self) -> int:
        """Return what to poll: it is readable when there is something to `hear`."""
        return self._socket.fileno()

    def hear(self) -> tuple[bool, int]:
        """Return whether the command has ended, and its wait status, or else by which signal it has been stopped."""
        event = self._socket.recv(_EVENT.size)
        has_ended, number = _EVENT.unpack(event) if event else (True, signal.SIGKILL)
        return has_ended, number

    def signal(self, number: int) -> None:
        """Send the command a signal, if it is there and may be sent one."""
        if self._command is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._command, number)

    def end(self) -> None:
        """Have the command and all that it has left killed."""
        self._socket.close()
        # It waits as long for its own children, and a moment more for those that they leave.
        if not calls.wait_for(self.pid, time.monotonic() + 2 * calls.PATIENCE):
            os.kill(self.pid, signal.SIGKILL)
            calls.wait_for(self.pid, time.monotonic() + calls.PATIENCE)
        if self._command is not None:
            os.close(self._command)


def _watch(run: socket.socket, become: Callable[[], None]) -> None:
    """Start the command, and tell of it until `run` hangs up; then kill all there is."""
    calls.adopt_orphans()
    changes = calls.SignalQueue([signal.SIGCHLD])
    command = os.fork()
    if not command:
        run.close()
        become()
    try:
        # Others wait for the end of what only the command is to hold.
        close_inherited({run.fileno(), changes.fileno()})
        descriptor = os.pidfd_open(command)
        socket.send_fds(run, [b"\0"], [descriptor])
        os.close(descriptor)
        poll = select.poll()
        poll.register(run, select.POLLIN)
        poll.register(changes, select.POLLIN)
        while run.fileno() not in dict(poll.poll()):
            changes.take()
            _tell(run, command)
    except OSError:
        # It is gone before it could be told.
        pass
    finally:
        calls.end_children()
        os._exit(0)


def _tell(run: socket.socket, command: int) -> None:
    with contextlib.suppress(ChildProcessError):
        while changed := os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WNOHANG):
            if changed.si_pid != command:
                continue
            if changed.si_code == os.CLD_STOPPED:
                run.send(_EVENT.pack(False, changed.si_status))
            else:
                status = changed.si_status << 8 if changed.si_code == os.CLD_EXITED else changed.si_status
                run.send(_EVENT.pack(True, status))
