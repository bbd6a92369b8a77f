"""What the kernel knows of other tasks: who they are, how they are scheduled, what they have mapped and open.

Pids and thread ids are those of this process's pid namespace, for which /proc must be mounted. Nothing is cached here:
all of it can change while the task lives, and the numbers can be another's once it is gone. An answer is certain only
for a task that is known to stay, such as one whose request is unanswered.

Sources: proc_pid_status(5), proc_pid_maps(5), proc_pid_fdinfo(5), ioctl_nsfs(2).
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from dataclasses import dataclass, field
from typing import Final

from binderfs_fuse.host import procfs
from binderfs_fuse.host.procfs import read as _read

_NS_GET_PARENT: Final = 0xB702
_SCHED_RESET_ON_FORK: Final = 0x40000000
_MIN_NICE: Final = -20
_MAX_NICE: Final = 19
_CAP_SYS_NICE: Final = 23
_UNLIMITED: Final = 1 << 63
_REALTIME: Final = (os.SCHED_FIFO, os.SCHED_RR)
# Of a thread with nice value 0, on the kernel's scale of priorities.
_NICE_0: Final = 120
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
    `user_ids`       None: its user namespace is this process's own; else [(first there, first here, count)], the users
                     that it knows
    """

    pid: int
    euid: int
    nice: int
    pid_namespace: int = 0
    pids: dict[int, int] = field(default_factory=dict)
    user_ids: list[tuple[int, int, int]] | None = None


def status(tid: int) -> dict[bytes, bytes]:
    """Return the fields of /proc/TID/status by name. Raises `OSError`."""
    return procfs.fields(_read(f"/proc/{tid}/status"))


def identify(tid: int) -> Identity:
    """Find out who a task is. Raises `OSError`: ENOENT or ESRCH if there is no such task, or no /proc."""
    fields = status(tid)
    pid = int(fields[b"Tgid"])
    euid = int(fields[b"Uid"].split()[1])
    nice = os.getpriority(os.PRIO_PROCESS, tid)
    numbers = [int(number) for number in fields[b"NStgid"].split()] if b"NStgid" in fields else [pid]
    user_ids = None if _shares_users(tid) else _user_ids(tid)
    # The first number is that of the namespace /proc was mounted in, the last that of the task's own.
    if len(numbers) == 1:
        return Identity(pid, euid, nice, user_ids=user_ids)
    namespaces = _namespaces(tid, len(numbers))
    return Identity(pid, euid, nice, namespaces[-1], dict(zip(namespaces, numbers, strict=True)), user_ids)


def caller(tid: int) -> tuple[int, int]:
    """Return a task's thread group and its effective user. Raises `OSError`."""
    fields = status(tid)
    return int(fields[b"Tgid"]), int(fields[b"Uid"].split()[1])


def _shares_users(tid: int) -> bool:
    """Tell whether a task lives in this process's own user namespace. Raises `OSError`."""
    return os.readlink(f"/proc/{tid}/ns/user") == os.readlink("/proc/self/ns/user")  # noqa: PTH115 - as everywhere here


def _user_ids(tid: int) -> list[tuple[int, int, int]]:
    """Return /proc/TID/uid_map: its second numbers are as this process's user namespace has them. Raises `OSError`."""
    rows = [[int(number) for number in line.split()] for line in procfs.lines(_read(f"/proc/{tid}/uid_map"))]
    return [(inside, outside, count) for inside, outside, count in rows]


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
    """Give a thread a nice value as far as its own rights go, and return the one that it then has.

    A thread without CAP_SYS_NICE has no nice value below 20 - RLIMIT_NICE, not even one that it has already, and
    keeps what it has where that limit is 0, as it mostly is (binder.c `binder_set_nice`). Raising it takes CAP_SYS_NICE
    of this process, too.
    """
    try:
        allowed = _least_nice(tid)
        value = max(value, allowed)
        if value <= _MAX_NICE:
            os.setpriority(os.PRIO_PROCESS, tid, value)
            return value
    except (PermissionError, FileNotFoundError):
        pass
    return nice(tid)


def _least_nice(tid: int) -> int:
    """Return the least nice value that a thread may have; 20: none but what it has. Raises `OSError`."""
    limit = _soft_limit(tid, b"Max nice priority")
    # The capability is that of the first user namespace, or of what is that to this process.
    if limit >= _MAX_NICE - _MIN_NICE + 1 or _has_sys_nice(tid):
        return _MIN_NICE
    return _MAX_NICE + 1 - limit


def _has_sys_nice(tid: int) -> bool:
    return bool(int(status(tid)[b"CapEff"], 16) & 1 << _CAP_SYS_NICE) and _shares_users(tid)


def maps(pid: int) -> bytes:
    """Return /proc/PID/maps; b"" where there is none.

    Makes wait while the process executes another program, and that as long as its files take to close.
    """
    try:
        return _read(f"/proc/{pid}/maps") or _maps_of_threads(pid)
    except OSError:
        return b""


def find_mapping(text: bytes, inode: int, device: int | None) -> tuple[int, int] | None:
    """Find in `maps` where a process has mapped a file, by inode number and st_dev: the address and size in bytes.

    What is left of a mapping that the process has cut up is put together again as far as it is in one piece. None: it
    is not mapped, or not from the file's start, be it that this was unmapped or left out. `device` None stands for any
    file system without a device of its own, as FUSE is one.
    """
    # Not line by line: there may be tens of thousands.
    wanted = b" %d " % inode
    place = b"00:" if device is None else b"%02x:%02x" % (os.major(device), os.minor(device))
    start = end = at = 0
    while (at := text.find(wanted, at)) >= 0:
        begin = text.rfind(b"\n", 0, at) + 1
        at += len(wanted)
        addresses, _, offset, where, number, *_ = text[begin:at].split(maxsplit=5)
        # It may have been found in a name.
        if int(number) == inode and where.startswith(place):
            first, last = (int(address, 16) for address in addresses.split(b"-"))
            if not end:
                if int(offset, 16):
                    return None
                start = first
                end = last
            elif first == end:
                end = last
    return (start, end - start) if end else None


def _maps_of_threads(pid: int) -> bytes:
    """Return the mappings of a process whose main thread has ended: it has none, but its other threads do."""
    for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - as everywhere here
        try:
            text = _read(f"/proc/{pid}/task/{thread}/maps")
        except OSError:
            continue
        if text:
            return text
    return b""


def is_nonblocking(tid: int, inode: int) -> bool | None:
    """Tell whether the descriptor that a task's ioctl waits on has O_NONBLOCK now; None if it cannot be told.

    `inode` is the number of the file, which must be on it: the task may have gone on to something else.
    """
    try:
        call = _read(f"/proc/{tid}/syscall").split()
        if len(call) < 2 or call[0] == b"-1":
            return None
        info = procfs.fields(_read(f"/proc/{tid}/fdinfo/{int(call[1], 16)}"))
    except OSError:
        return None
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
    """Return one of /proc/TID/limits. Raises `OSError`."""
    text = _read(f"/proc/{tid}/limits")
    value = text[text.index(name) + len(name) :].split(maxsplit=1)[0]
    return _UNLIMITED if value == b"unlimited" else int(value)


def is_being_killed(tid: int) -> bool:
    """Tell whether a SIGKILL waits for a thread, or for its whole process; also when it is gone."""
    try:
        fields = status(tid)
    except OSError:
        return True
    pending = int(fields[b"SigPnd"], 16) | int(fields[b"ShdPnd"], 16)
    return bool(pending & 1 << 8)


def is_being_copied(tid: int) -> bool:
    """Tell whether a thread of this process waits in the middle of copying to or from a task's memory.

    On a machine whose system calls are not known here, it does.
    """
    numbers = _COPYING.get(os.uname().machine)
    if numbers is None:
        return True
    for thread in os.listdir("/proc/self/task"):  # noqa: PTH208 - as everywhere here
        call = system_call(os.getpid(), int(thread))
        if len(call) > 1 and call[0] in numbers and int(call[1], 16) == tid:
            return True
    return False


def system_call(pid: int, tid: int) -> list[bytes]:
    """Return the number and the arguments (hexadecimal) of the call that a sleeping thread of a process is in.

    One word or none where the thread runs, makes no call, is gone, or may not be looked at.
    """
    try:
        return _read(f"/proc/{pid}/task/{tid}/syscall").split()
    except OSError:
        return []


def end_of_free(tid: int, count: int) -> int:
    """Return the number behind the `count` lowest descriptors that are free in a task; 0 where that cannot be seen."""
    try:
        taken = {int(number) for number in os.listdir(f"/proc/{tid}/fd")}  # noqa: PTH208 - as everywhere here
    except OSError:
        return 0
    free = (number for number in itertools.count() if number not in taken)
    return next(itertools.islice(free, count - 1, None)) + 1


def scheduling(tid: int) -> tuple[int, int]:
    """Return a thread's scheduler policy, and its priority: 120 + nice, or 99 - real-time priority."""
    policy = os.sched_getscheduler(tid) & ~_SCHED_RESET_ON_FORK
    if policy in _REALTIME:
        return policy, 99 - os.sched_getparam(tid).sched_priority
    return policy, _NICE_0 + nice(tid)


def set_scheduling(tid: int, wanted: tuple[int, int], *, verify: bool) -> tuple[int, int]:
    """Give a thread a policy and priority (see `scheduling`), and return those that it then has.

    With `verify` the thread's own rights count, RLIMIT_RTPRIO and RLIMIT_NICE where it lacks CAP_SYS_NICE; without, it
    gets back what it had (Android common kernel, `binder_do_set_priority`). This process's rights count in any case.
    """
    policy, priority = wanted
    try:
        if verify and not _has_sys_nice(tid):
            if policy in _REALTIME:
                most = _soft_limit(tid, b"Max realtime priority")
                if most:
                    priority = max(priority, 99 - most)
                else:
                    policy, priority = os.SCHED_OTHER, _NICE_0 + _MIN_NICE
            if policy not in _REALTIME:
                least = _least_nice(tid)
                if least > _MAX_NICE:
                    return scheduling(tid)
                priority = max(priority, _NICE_0 + least)
        realtime = policy in _REALTIME
        os.sched_setscheduler(tid, policy, os.sched_param(99 - priority if realtime else 0))
        if not realtime:
            os.setpriority(os.PRIO_PROCESS, tid, priority - _NICE_0)
    except OSError:
        return scheduling(tid)
    return policy, priority
