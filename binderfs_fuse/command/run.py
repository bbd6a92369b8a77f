"""``mount.py run [-o OPTION,...] [--] COMMAND ...``: run a command with binder devices in /dev, of its own."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import resource
import shlex
import signal
import socket
from typing import TYPE_CHECKING, Final, NoReturn

from binderfs_fuse.command import calls, namespace, seccomp
from binderfs_fuse.command.mount import check
from binderfs_fuse.command.options import base_options, parse
from binderfs_fuse.command.program import complain, program
from binderfs_fuse.command.supervisor import Supervisor
from binderfs_fuse.command.warden import Warden
from binderfs_fuse.fuse import mounting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from binderfs_fuse.command.options import Options

_log = logging.getLogger(__name__)

# All that can be, and that say nothing of this process's own children.
_PASSED_ON: Final = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}
# What a shell says of a command that it cannot execute, or cannot find.
_NOT_EXECUTABLE: Final = 126
_NOT_FOUND: Final = 127


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status, or end by the signal that it ended by. Raises `MountError`."""
    parser = argparse.ArgumentParser(
        prog=f"{program()} run",
        description="Run a command in a mount namespace of its own, with /dev/binderfs and what Android links to it.",
    )
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTION,...", help="as for a mount")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="[--] COMMAND ...", help="what to run")
    parsed = parser.parse_args(arguments)
    command = parsed.command[1:] if parsed.command[:1] == ["--"] else parsed.command
    if not command:
        parser.error("what command?")
    base = base_options(stats=True)
    options = parse(parsed.options, base)

    namespace.enter()
    namespace.furnish_dev([os.fsdecode(name) for name in options.settings.devices])
    namespace.name_binder()
    signals = calls.SignalQueue([*_PASSED_ON, signal.SIGCHLD])
    calls.adopt_orphans()
    supervisor = Supervisor(options)
    try:
        _mount(supervisor, options)
        warden, listener = _start(command, supervisor, signals)
        try:
            status = supervisor.stand_by(warden, listener, signals)
        finally:
            warden.end()
    finally:
        supervisor.stop()
    if os.WIFSIGNALED(status):
        _end_by(os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


def _mount(supervisor: Supervisor, options: Options) -> None:
    """Mount in the new /dev, and have it served."""
    binderfs = namespace.BINDERFS
    with mounting.place_at(binderfs) as place:
        connection, root = mounting.mount_on(
            place, "binder", binderfs, allow_other=options.allow_other, flags=options.flags
        )
    try:
        supervisor.adopt(connection, options)
        check(root, binderfs, options.settings.devices)
    finally:
        os.close(root)


def _start(command: list[str], supervisor: Supervisor, signals: calls.SignalQueue) -> tuple[Warden, int | None]:
    """Execute the command below a warden, under the filter; return both, a listener where there is a filter."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def become() -> None:
        ours.close()
        _become(command, theirs, signals)

    warden = Warden(become)
    theirs.close()
    with ours:
        message, descriptors, _, _ = socket.recv_fds(ours, 1024, 1)
        if message != _FILTERED:
            complain(f"without help for NULL arguments and mount(2): {os.fsdecode(message)}", f"{program()} run")
        # Nothing more comes when the command has been executed: that closes the socket. Its path may lead through file
        # systems that do not answer, so signals are passed on already.
        failure = supervisor.wait_for_start(ours, warden, signals)
    if failure:
        complain(f"{shlex.quote(command[0])}: {os.strerror(int(failure))}", f"{program()} run")
    return warden, descriptors[0] if descriptors else None


_FILTERED: Final = b"filtered"


def _become(command: list[str], supervisor: socket.socket, signals: calls.SignalQueue) -> NoReturn:
    """Turn this process into the command."""
    try:
        calls.die_with_parent(signal.SIGKILL)
        # Python ignores these, and what is ignored would stay so.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signals.unblock()
        try:
            listener = seccomp.install()
        except (OSError, NotImplementedError) as error:
            supervisor.send(os.fsencode(str(error)))
        else:
            socket.send_fds(supervisor, [_FILTERED], [listener])
            os.close(listener)
        if not command[0]:
            # Python takes that for a mistake of the program's.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        os.execvp(command[0], command)  # noqa: S606 - the command is the user's
    except OSError as error:
        supervisor.send(str(error.errno).encode())
        os._exit(_NOT_FOUND if error.errno in (errno.ENOENT, errno.ENOTDIR) else _NOT_EXECUTABLE)
    finally:
        os._exit(_NOT_EXECUTABLE)


def _end_by(number: int) -> None:
    """End as the command did, so that whoever waits for this process sees that."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
