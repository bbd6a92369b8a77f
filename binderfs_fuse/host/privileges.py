"""What a server may do, once it needs no more than to serve.

A server reads and writes the memory of its clients, sets their priority, registers backing files, and in the end
unmounts. That takes four capabilities at most, `KEPT`; all others go for good, and nothing that it might execute could
get any back. Where there were none, as without root, none are missed.

A filter of system calls allows a server what it does and refuses it all else (`confine.c`), in case that somebody
should ever make it do something else.

Everything here holds for the calling thread and those that it starts. So it is for before the first of them.

Sources: capabilities(7), prctl(2), seccomp(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import logging.handlers
import os
import resource
import struct
from typing import Final

from binderfs_fuse._host import lib

DAC_READ_SEARCH: Final = 2
SYS_PTRACE: Final = 19
SYS_ADMIN: Final = 21
SYS_NICE: Final = 23
KEPT: Final = (DAC_READ_SEARCH, SYS_PTRACE, SYS_ADMIN, SYS_NICE)
"""For descriptors of others in /proc; their memory; backing files, and unmounting; their priorities."""

_SETPCAP: Final = 8
_VERSION: Final = 0x20080522
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _prctl(option: int, *arguments: int | ctypes.c_void_p) -> int:
    rest = [ctypes.c_ulong(argument) if isinstance(argument, int) else argument for argument in arguments]
    rest += [ctypes.c_ulong(0)] * (4 - len(rest))
    return _checked(_libc.prctl(option, *rest))


def capabilities() -> int:
    """Return the permitted capabilities of this thread, a bit each."""
    data = ctypes.create_string_buffer(24)
    _checked(_libc.capget(struct.pack("=Ii", _VERSION, 0), data))
    _, low, _, _, high, _ = struct.unpack("=6I", data)
    return int(low | high << 32)


def drop() -> None:
    """Keep only the capabilities that a server needs, as far as there are any, and never get more."""
    before = capabilities()
    after = before & sum(1 << capability for capability in KEPT)
    if before & 1 << _SETPCAP:
        for capability in range(64):
            try:
                if _prctl(_PR_CAPBSET_READ, capability) and capability not in KEPT:
                    _prctl(_PR_CAPBSET_DROP, capability)
            except OSError:
                break  # there are no more
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    low, high = after & 0xFFFF_FFFF, after >> 32
    _checked(_libc.capset(struct.pack("=Ii", _VERSION, 0), struct.pack("=6I", low, low, 0, high, high, 0)))
    if after & 1 << SYS_ADMIN:
        # Without it, it takes fusermount3 to unmount, which gets new privileges.
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def confine() -> str | None:
    """Put the filter of system calls in force; where that cannot be, return why."""
    if not capabilities() & 1 << SYS_ADMIN:
        return "without CAP_SYS_ADMIN, fusermount3 has to be executed to unmount"
    # It connects again after the system's log was started anew.
    syslog = any(isinstance(handler, logging.handlers.SysLogHandler) for handler in logging.getLogger().handlers)
    error = lib.confine_server(syslog)
    if error == -errno.EOPNOTSUPP:
        return f"this kernel has none, or they are not known on {os.uname().machine}"
    if error < 0:
        return os.strerror(-error)
    return None


def settle() -> None:
    """Take what a server needs: as many descriptors as may be, no core with its clients' data in it, and a library.

    Python ends threads that are left when it ends itself (pthread_exit(3)). The C library unwinds their stacks by this
    library, and aborts where it cannot be loaded by then, as under the filter.
    """
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))
