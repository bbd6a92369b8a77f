"""What a server may do, once it needs no more than to serve.

A server reads and writes the memory of its clients, takes files from them and gives them files, sets their priority,
registers backing files, and in the end unmounts. That takes five capabilities at most, `KEPT`; all others go for good,
and nothing that it might execute could get any back. Where there were none, as without root, none are missed.

The filter of system calls is a list of what no server has any business to do, in case that somebody should ever make
one do something else: execute, fork, mount, load modules, change user, send signals, take connections.

Everything here holds for the calling thread and those that it starts. So it is for before the first of them.

Sources: capabilities(7), prctl(2), seccomp(2), <linux/seccomp.h>, <linux/filter.h>, the kernel's tables of system
calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from typing import Final

DAC_READ_SEARCH: Final = 2
SYS_PTRACE: Final = 19
SYS_ADMIN: Final = 21
SYS_NICE: Final = 23
SYS_RESOURCE: Final = 24
KEPT: Final = (DAC_READ_SEARCH, SYS_PTRACE, SYS_ADMIN, SYS_NICE, SYS_RESOURCE)
"""For descriptors of others in /proc; their memory; backing files, and unmounting; their priorities; to lift a client's
limit of descriptors while it is given some (host/ptrace.c)."""

_SETPCAP: Final = 8
_VERSION: Final = 0x20080522
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2

_CLONE_VM: Final = 0x100
_RET_ALLOW: Final = 0x7FFF0000
_RET_ERRNO: Final = 0x00050000
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_IF_SET: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_INSTRUCTION: Final = struct.Struct("=HBBI")
# Offsets in struct seccomp_data.
_NUMBER: Final = 0
_ARCH: Final = 4
_ARGUMENT: Final = 16
MACHINES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The machines that there is a filter for, and what the kernel calls them there (AUDIT_ARCH_)."""
DENIED: Final[dict[str, tuple[int, int | None]]] = {
    "execve": (59, 221),
    "execveat": (322, 281),
    "mount": (165, 40),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "setuid": (105, 146),
    "setgid": (106, 144),
    "setreuid": (113, 145),
    "setregid": (114, 143),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "setfsuid": (122, 151),
    "setfsgid": (123, 152),
    "setgroups": (116, 159),
    "setns": (308, 268),
    "unshare": (272, 97),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "rt_sigqueueinfo": (129, 138),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "acct": (163, 89),
    "open_by_handle_at": (304, 265),
    "fork": (57, None),
    "vfork": (58, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
}
"""What the filter denies, by name: the numbers on these machines, in their order; None where there is no such call."""
CLONE: Final = (56, 220)
CLONE3: Final = (435, 435)

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


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


def filter_program(machine: str) -> bytes:
    """Return the filter for one of `MACHINES`, in classic BPF: EPERM for what is denied."""

    def load(offset: int) -> bytes:
        return _INSTRUCTION.pack(_LOAD, 0, 0, offset)

    def unless(operation: int, value: int, otherwise: bytes) -> bytes:
        """Do `otherwise` only where the comparison holds."""
        return _INSTRUCTION.pack(operation, 0, len(otherwise) // _INSTRUCTION.size, value) + otherwise

    def leave(action: int) -> bytes:
        return _INSTRUCTION.pack(_RETURN, 0, 0, action)

    column = list(MACHINES).index(machine)
    deny = leave(_RET_ERRNO | errno.EPERM)
    text = load(_NUMBER)
    # The x32 calls of x86_64.
    text += unless(_JUMP_IF_SET, 0x4000_0000, deny)
    # What glibc takes an ENOSYS for is to use clone, whose flags can be seen.
    text += unless(_JUMP_IF_EQUAL, CLONE3[column], leave(_RET_ERRNO | errno.ENOSYS))
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            text += unless(_JUMP_IF_EQUAL, number, deny)
    # A clone that shares memory is a thread.
    text += unless(
        _JUMP_IF_EQUAL, CLONE[column], load(_ARGUMENT) + unless(_JUMP_IF_SET, _CLONE_VM, leave(_RET_ALLOW)) + deny
    )
    text += leave(_RET_ALLOW)
    # Other numbers hold for calls as on another machine, such as those of 32-bit programs: it makes none.
    return load(_ARCH) + unless(_JUMP_IF_EQUAL, MACHINES[machine], text) + deny


def confine() -> str | None:
    """Put the filter in force; where that cannot be, return why."""
    if not capabilities() & 1 << SYS_ADMIN:
        return "without CAP_SYS_ADMIN, fusermount3 has to be executed to unmount"
    machine = os.uname().machine
    if machine not in MACHINES:
        return f"nothing is known of the system calls of {machine}"
    text = filter_program(machine)
    program = _Program(len(text) // _INSTRUCTION.size, text)
    pointer = ctypes.cast(ctypes.byref(program), ctypes.c_void_p)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer)
    return None


def settle() -> None:
    """Take the limits that a server needs: as many descriptors as may be, and no core with its clients' data in it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))
