"""System calls that Python 3.11 does not offer, each raising `OSError` as ``os`` does."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse.host import procfs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

# <linux/sched.h>
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000

# <linux/prctl.h>
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36

# <linux/capability.h>
_CAPABILITY_VERSION: Final = 0x20080522

# <linux/nsfs.h>
_NS_GET_PARENT: Final = 0xB702

_SYS_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}

PATIENCE: Final = 5.0
"""Seconds that a process is given to end."""

_SI_KERNEL: Final = 0x80
_SIGINFO_SIZE: Final = 128

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def unshare(flags: int) -> None:
    """Leave what `flags` (CLONE_) name for something of one's own."""
    _checked(_libc.unshare(flags))


def setns(descriptor: int, kind: int) -> None:
    """Enter the namespace, of this kind (CLONE_), that a descriptor names."""
    _checked(_libc.setns(descriptor, kind))


def parent_user_namespace(descriptor: int) -> int:
    """Return a descriptor of the user namespace that the one which a descriptor names is in. EPERM: not to be seen."""
    return fcntl.ioctl(descriptor, _NS_GET_PARENT)


@contextlib.contextmanager
def with_rights_of(uid: int, gid: int, capabilities: int) -> Iterator[None]:
    """Reach for files as somebody with these ids and, of this thread's own, these capabilities.

    Raises `OSError`: EINVAL where this user namespace has no such ids.
    """
    before = _capabilities()
    own = os.geteuid(), os.getegid()
    try:
        _set_file_system_ids(uid, gid)
        # Last, since it takes a capability to change the ids, and that changes capabilities.
        _set_effective(_capabilities()[1] & capabilities)
        yield
    finally:
        _set_effective(before[1])
        _set_file_system_ids(*own)
        _set_effective(before[0])


def _set_file_system_ids(uid: int, gid: int) -> None:
    for call, number in ((_libc.setfsgid, gid), (_libc.setfsuid, uid)):
        call(number)
        # They say nothing of failure, but what was before.
        if call(-1) & 0xFFFF_FFFF != number:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _capabilities() -> tuple[int, int]:
    """Return which are effective in this thread, and which are permitted, a bit each."""
    data = ctypes.create_string_buffer(24)
    _checked(_libc.capget(struct.pack("=Ii", _CAPABILITY_VERSION, 0), data))
    effective, permitted, _, effective_high, permitted_high, _ = struct.unpack("=6I", data)
    return effective | effective_high << 32, permitted | permitted_high << 32


def _set_effective(capabilities: int) -> None:
    permitted = _capabilities()[1]
    low, high = capabilities & 0xFFFF_FFFF, capabilities >> 32
    data = struct.pack("=6I", low, permitted & 0xFFFF_FFFF, 0, high, permitted >> 32, 0)
    _checked(_libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION, 0), data))


def die_with_parent(number: int) -> None:
    """Get a signal when the thread that forked this process ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0))


def hide() -> None:
    """Let no process of the same user, or of root in a user namespace below, trace this one or reach its files."""
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parents end."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def children() -> list[int]:
    """Return the ids of this process's children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if procfs.parent(procfs.read(f"/proc/{entry.name}/stat")) == os.getpid():
                    found.append(int(entry.name))
    return found


def end_children(but: Collection[int] = ()) -> None:
    """Kill this process's children but for some, and what these leave, which comes to be its children in turn.

    A child that has not ended `PATIENCE` seconds later, as it waits for a file system that does not answer, is left: it
    ends as soon as that is over.
    """
    given_up: set[int] = set()
    while left := set(children()) - {*but} - given_up:
        # A child's id is its own until it is waited for.
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE
        given_up |= {process for process in left if not wait_for(process, deadline)}


def wait_for(process: int, deadline: float) -> bool:
    """Wait for a child's end, at most until a time of time.monotonic(); tell whether it has come, and let go of it."""
    try:
        descriptor = os.pidfd_open(process)
    except OSError:
        return False
    try:
        # poll(2), which knows no highest descriptor.
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return False
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)
        return True
    finally:
        os.close(descriptor)


def seccomp(operation: int, flags: int, argument: ctypes.c_void_p) -> int:
    """Do one of the SECCOMP_ operations. Raises NotImplementedError on a machine where its number is not known."""
    number = _SYS_SECCOMP.get(platform.machine())
    if number is None:
        raise NotImplementedError(f"seccomp on {platform.machine()}")
    return _checked(_libc.syscall(number, operation, flags, argument))


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal that came; `from_terminal` means that the whole foreground process group got it.

    `from_self` means that this process brought it about, as by writing to a pipe that nobody reads.
    """

    number: int
    from_terminal: bool
    from_self: bool


class SignalQueue:
    """Blocks signals, and is readable (poll it) while there are any to `take`."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        bits = sum(1 << number - 1 for number in numbers)
        mask = ctypes.c_uint64(bits)
        # SFD_CLOEXEC and SFD_NONBLOCK are O_CLOEXEC and O_NONBLOCK.
        self._descriptor = _checked(_libc.signalfd(-1, ctypes.byref(mask), os.O_CLOEXEC | os.O_NONBLOCK))

    def fileno(self) -> int:
        """Return what to poll."""
        return self._descriptor

    def take(self) -> list[Signal]:
        """Return the signals that have come."""
        try:
            data = os.read(self._descriptor, 64 * _SIGINFO_SIZE)
        except BlockingIOError:
            return []
        infos = (struct.unpack_from("=IiiI", data, start) for start in range(0, len(data), _SIGINFO_SIZE))
        return [Signal(number, code == _SI_KERNEL, sender == os.getpid()) for number, _, code, sender in infos]

    def let_through(self, number: int) -> None:
        """Have one of the signals do to this process what it does to others, as to stop it."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])

    def unblock(self) -> None:
        """Put this thread's signal mask back as it was, as for a child to inherit."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
