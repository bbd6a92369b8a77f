"""What the kernel knows of other tasks: who they are, how they are scheduled, what they have mapped and open.

Pids and thread ids are those of this process's pid namespace, for which /proc must be mounted. Nothing is cached here:
all of it can change while the task lives, and the numbers can be another's once it is gone. An answer is certain only
for a task that is known to stay, such as one whose request is unanswered.

Sources: proc_pid_status(5), proc_pid_maps(5), proc_pid_fdinfo(5), ioctl_nsfs(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass, field
from typing import Final

_NS_GET_PARENT: Final = 0xB702
_SCHED_RESET_ON_FORK: Final = 0x40000000
# process_vm_readv and process_vm_writev.
_COPYING: Final = {"x86_64": (b"310", b"311"), "aarch64": (b"270", b"271")}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a task is.

    `pid`            its thread group
    `euid`           its effective user, as this process's user namespace numbers them
    `nice`           its nice value, -20..19
    `pid_namespace`  the pid namespace it lives in: 0 for this process's own, else the namespace's inode number
    `pids`           its thread group's pid in each namespace that sees it, keyed likewise
    """

    pid: int
    euid: int
    nice: int
    pid_namespace: int = 0
    pids: dict[int, int] = field(default_factory=dict)


def _read(path: str) -> bytes:
    # os.read(), and not an open(): files of /proc are read in one go or by line, and this is twice as fast.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
    finally:
        os.close(descriptor)
    return b"".join(parts)


def status(tid: int) -> dict[bytes, bytes]:
    """Return the fields of /proc/TID/status by name. Raises `OSError`.

    Nothing but a newline ends a line here, and in what else /proc says: a task chooses its name, and those of files
    that it maps, and the kernel escapes only newlines in them.
    """
    lines = _read(f"/proc/{tid}/status").split(b"\n")
    return {name: value for name, _, value in (line.partition(b":\t") for line in lines)}


def identify(tid: int) -> Identity:
    """Find out who a task is. Raises `OSError`: ENOENT or ESRCH if there is no such task, or no /proc."""
    fields = status(tid)
    pid = int(fields[b"Tgid"])
    euid = int(fields[b"Uid"].split()[1])
    nice = os.getpriority(os.PRIO_PROCESS, tid)
    numbers = [int(number) for number in fields[b"NStgid"].split()] if b"NStgid" in fields else [pid]
    # The first number is that of the namespace /proc was mounted in, the last that of the task's own.
    if len(numbers) == 1:
        return Identity(pid, euid, nice)
    namespaces = _namespaces(tid, len(numbers))
    return Identity(pid, euid, nice, namespaces[-1], dict(zip(namespaces, numbers, strict=True)))


def _namespaces(tid: int, count: int) -> list[int]:
    """Return the `count` pid namespaces that a task is in, as `Identity.pid_namespace` has them, its own last."""
    found = []
    descriptor = os.open(f"/proc/{tid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(count - 1):
            found.append(os.fstat(descriptor).st_ino)
            parent = fcntl.ioctl(descriptor, _NS_GET_PARENT)
            os.close(descriptor)
            descriptor = parent
    finally:
        os.close(descriptor)
    return [0, *reversed(found)]


def label(tid: int) -> bytes | int:
    """Return a task's security label, without a NUL; a negative errno (-EINVAL) where no security module gives one."""
    try:
        return _read(f"/proc/{tid}/attr/current").rstrip(b"\0\n") or -errno.EINVAL
    except OSError as error:
        return -(error.errno or errno.EINVAL)


def nice(tid: int) -> int:
    """Return a thread's nice value, -20..19. Raises `ProcessLookupError`."""
    return os.getpriority(os.PRIO_PROCESS, tid)


def set_nice(tid: int, value: int) -> int:
    """Give a thread a nice value, and return the one that it then has: lowering it takes CAP_SYS_NICE."""
    try:
        os.setpriority(os.PRIO_PROCESS, tid, value)
    except PermissionError:
        return nice(tid)
    return value


def find_mapping(pid: int, inode: int, device: int | None) -> tuple[int, int] | None:
    """Find where a process has mapped a file, by inode number and st_dev: the address and size in bytes.

    What is left of a mapping that the process has cut up is put together again as far as it is in one piece. None: it
    is not mapped. `device` None stands for any file system without a device of its own, as FUSE is one.
    """
    try:
        text = _read(f"/proc/{pid}/maps")
    except OSError:
        return None
    wanted = b" %d " % inode
    place = b"00:" if device is None else b"%02x:%02x" % (os.major(device), os.minor(device))
    start = end = 0
    for line in text.split(b"\n"):
        if wanted not in line:
            continue
        addresses, _, offset, where, number, *_ = line.split(maxsplit=5)
        if int(number) != inode or not where.startswith(place):
            continue
        first, last = (int(address, 16) for address in addresses.split(b"-"))
        if not end:
            start = first - int(offset, 16)
            end = last
        elif first == end:
            end = last
    return (start, end - start) if end else None


def is_nonblocking(tid: int, inode: int) -> bool | None:
    """Tell whether the descriptor that a task's ioctl waits on has O_NONBLOCK now; None if it cannot be told.

    `inode` is the number of the file, which must be on it: the task may have gone on to something else.
    """
    try:
        call = _read(f"/proc/{tid}/syscall").split()
        if len(call) < 2 or call[0] == b"-1":
            return None
        lines = _read(f"/proc/{tid}/fdinfo/{int(call[1], 16)}").split(b"\n")
    except OSError:
        return None
    info = {name: value for name, _, value in (line.partition(b":\t") for line in lines)}
    # Before Linux 5.14 there is no ino.
    if int(info.get(b"ino", inode)) != inode:
        return None
    return bool(int(info[b"flags"], 8) & os.O_NONBLOCK)


def has_room(tid: int, count: int) -> bool:
    """Tell whether a task has numbers free for `count` more descriptors; true where that cannot be seen.

    Others with the same descriptors may take or free some at any time.
    """
    try:
        limit = _soft_limit(tid, b"Max open files")
        # The size of its table, taken numbers and free ones: seldom as large as the limit.
        if int(status(tid)[b"FDSize"]) + count <= limit:
            return True
        numbers = os.listdir(f"/proc/{tid}/fd")  # noqa: PTH208 - as everywhere here
        return sum(int(number) < limit for number in numbers) + count <= limit
    except OSError:
        return True


def _soft_limit(tid: int, name: bytes) -> int:
    """Return one of /proc/TID/limits, which always has a number there. Raises `OSError`."""
    text = _read(f"/proc/{tid}/limits")
    return int(text[text.index(name) + len(name) :].split(maxsplit=1)[0])


def is_being_killed(tid: int) -> bool:
    """Tell whether a SIGKILL waits for a thread, or for its whole process; also when it is gone."""
    try:
        fields = status(tid)
    except OSError:
        return True
    pending = int(fields[b"SigPnd"], 16) | int(fields[b"ShdPnd"], 16)
    return bool(pending & 1 << 8)


def is_own(tid: int) -> bool:
    """Tell whether a task is a thread of this process."""
    return os.path.exists(f"/proc/self/task/{tid}")  # noqa: PTH110 - as everywhere here


def is_being_copied(tid: int) -> bool:
    """Tell whether a thread of this process waits in the middle of copying to or from a task's memory.

    On a machine whose system calls are not known here, it does.
    """
    numbers = _COPYING.get(os.uname().machine)
    if numbers is None:
        return True
    for thread in os.listdir("/proc/self/task"):  # noqa: PTH208 - as everywhere here
        try:
            call = _read(f"/proc/self/task/{thread}/syscall").split()
        except OSError:
            continue
        if call[0] in numbers and int(call[1], 16) == tid:
            return True
    return False


def scheduling(tid: int) -> tuple[int, int]:
    """Return a thread's scheduler policy, and its priority: 120 + nice, or 99 - real-time priority."""
    policy = os.sched_getscheduler(tid) & ~_SCHED_RESET_ON_FORK
    if policy in (os.SCHED_FIFO, os.SCHED_RR):
        return policy, 99 - os.sched_getparam(tid).sched_priority
    return policy, 120 + nice(tid)


def set_scheduling(tid: int, wanted: tuple[int, int]) -> tuple[int, int]:
    """Give a thread a policy and priority (see `scheduling`), and return those that it then has, as rights allow."""
    policy, priority = wanted
    realtime = policy in (os.SCHED_FIFO, os.SCHED_RR)
    try:
        os.sched_setscheduler(tid, policy, os.sched_param(99 - priority if realtime else 0))
        if not realtime:
            os.setpriority(os.PRIO_PROCESS, tid, priority - 120)
    except OSError:
        return scheduling(tid)
    return wanted
