"""A seccomp filter that hands over the few system calls that FUSE cannot serve, and the listener that answers them.

The calls are `ioctl` with BINDER_SET_CONTEXT_MGR or BINDER_THREAD_EXIT and a NULL argument, which the kernel answers
EFAULT before a FUSE server sees them (their numbers say that there is an argument, which the driver ignores); `mount`,
for type binder; and `fsopen`, for programs to fall back to `mount`. All else goes its way untouched.

Sources: seccomp(2), seccomp_unotify(2), <linux/seccomp.h>, <linux/filter.h>.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import struct
from dataclasses import dataclass
from typing import Final

from binderfs_fuse.command.calls import seccomp
from binderfs_fuse.uapi import BINDER_SET_CONTEXT_MGR, BINDER_THREAD_EXIT

IOCTL: Final = "ioctl"
MOUNT: Final = "mount"
FSOPEN: Final = "fsopen"

# AUDIT_ARCH_ of <linux/audit.h>: x86-64, i386, aarch64, arm; what the calls' numbers are there.
_CALLS: Final = {
    0xC000003E: {16: IOCTL, 165: MOUNT, 430: FSOPEN},
    0x40000003: {54: IOCTL, 21: MOUNT, 430: FSOPEN},
    0xC00000B7: {29: IOCTL, 40: MOUNT, 430: FSOPEN},
    0x40000028: {54: IOCTL, 21: MOUNT, 430: FSOPEN},
}

_SET_MODE_FILTER: Final = 1
_NEW_LISTENER: Final = 1 << 3
_WAIT_KILLABLE_RECV: Final = 1 << 5
_RET_USER_NOTIF: Final = 0x7FC00000
_RET_ALLOW: Final = 0x7FFF0000
_CONTINUE: Final = 1

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

# Offsets in struct seccomp_data; the low half of an argument comes first on every machine in _CALLS.
_NUMBER: Final = 0
_ARCH: Final = 4
_COMMAND: Final = 24
_ARGUMENT_LOW: Final = 32
_ARGUMENT_HIGH: Final = 36

_INSTRUCTION: Final = struct.Struct("=HBBI")
_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")
_RESPONSE: Final = struct.Struct("=QqiI")
_RECEIVE: Final = 3 << 30 | _NOTIFICATION.size << 16 | ord("!") << 8 | 0
_SEND: Final = 3 << 30 | _RESPONSE.size << 16 | ord("!") << 8 | 1
_IS_VALID: Final = 1 << 30 | 8 << 16 | ord("!") << 8 | 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def program() -> bytes:
    """Return the filter in classic BPF."""
    allow = _INSTRUCTION.pack(_RETURN, 0, 0, _RET_ALLOW)
    notify = _INSTRUCTION.pack(_RETURN, 0, 0, _RET_USER_NOTIF)

    def load(offset: int) -> bytes:
        return _INSTRUCTION.pack(_LOAD, 0, 0, offset)

    def skip_if(value: int, *, equal: int = 0, other: int = 0) -> bytes:
        return _INSTRUCTION.pack(_JUMP_IF_EQUAL, equal, other, value)

    # An ioctl, from where its number has been found: notify of these two commands with NULL, allow the rest.
    null_ioctl = (
        load(_COMMAND)
        + skip_if(BINDER_SET_CONTEXT_MGR, equal=1)
        + skip_if(BINDER_THREAD_EXIT, other=4)
        + load(_ARGUMENT_LOW)
        + skip_if(0, other=2)
        + load(_ARGUMENT_HIGH)
        + skip_if(0, equal=1)
        + allow
        + notify
    )
    text = load(_ARCH)
    for arch, calls in _CALLS.items():
        body = load(_NUMBER)
        for number, call in calls.items():
            if call != IOCTL:
                body += skip_if(number, other=1) + notify
        ioctl_number = next(number for number, call in calls.items() if call == IOCTL)
        body += skip_if(ioctl_number, equal=1) + allow + null_ioctl
        text += skip_if(arch, other=len(body) // _INSTRUCTION.size) + body
    return text + allow


def install() -> int:
    """Put this thread, and what it will fork and execute, under the filter; return the listener's descriptor.

    Takes CAP_SYS_ADMIN in this user namespace, so that setuid programs need not be forbidden. Raises `OSError`: EBUSY
    where such a filter is in force already; NotImplementedError on a machine that is not known here.
    """
    text = program()
    argument = _Program(len(text) // _INSTRUCTION.size, text)
    pointer = ctypes.cast(ctypes.byref(argument), ctypes.c_void_p)
    try:
        # Once a call is being served, only SIGKILL is to break it off: it would be repeated, and it is not idempotent.
        return seccomp(_SET_MODE_FILTER, _NEW_LISTENER | _WAIT_KILLABLE_RECV, pointer)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return seccomp(_SET_MODE_FILTER, _NEW_LISTENER, pointer)


@dataclass(frozen=True, slots=True)
class Notification:
    """A call that waits to be answered: by thread `tid` in this process' pid namespace."""

    id: int
    tid: int
    call: str
    arguments: tuple[int, ...]


def receive(listener: int) -> Notification | None:
    """Take the next call, waiting for one; None where the caller was killed before that. Raises `OSError`."""
    buffer = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, buffer)
    except FileNotFoundError:
        return None
    number, tid, _, call, arch, _, *arguments = _NOTIFICATION.unpack(buffer)
    return Notification(number, tid, _CALLS[arch][call], tuple(arguments))


def is_waiting(listener: int, notification: Notification) -> bool:
    """Tell whether the caller still waits: then what was read of it by its tid was indeed its own."""
    try:
        fcntl.ioctl(listener, _IS_VALID, struct.pack("=Q", notification.id))
    except FileNotFoundError:
        return False
    return True


def answer(listener: int, notification: Notification, error: int) -> None:
    """Let the call return 0 or a negative errno."""
    _respond(listener, _RESPONSE.pack(notification.id, 0, error, 0))


def proceed(listener: int, notification: Notification) -> None:
    """Let the kernel serve the call, as if nothing had been."""
    _respond(listener, _RESPONSE.pack(notification.id, 0, 0, _CONTINUE))


def _respond(listener: int, response: bytes) -> None:
    # The caller may have been killed.
    with contextlib.suppress(FileNotFoundError):
        fcntl.ioctl(listener, _SEND, response)
