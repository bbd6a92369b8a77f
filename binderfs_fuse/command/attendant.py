"""A process that looks at one call that the filter of ``mount.py run`` handed over, and says what is to become of it.

Theory of operation. What a call says is in the caller's memory, and its path leads where the caller has it lead: both
may be with a server that does not answer, or with one of the caller's own. So none of it is touched by the supervisor,
which serves all callers. It forks an attendant for each call, which can wait, and can be killed.

An attendant reads the call, decides, and says so in one message (`Verdict`). Where it has mounted something it hands
over the descriptor of /dev/fuse and waits: while it does, it holds the root of the mount, to take that away if there is
no server for it. To mount, it enters the caller's namespaces, and takes the caller's rights to look for the place.

Invariants:
- What is read of a caller by its thread id counts only if the caller still waited afterwards (`_waits`).
- The open that an ioctl acts on comes from one reading of fdinfo, so it is a file that the caller has open. The mount
  that fdinfo names is pinned meanwhile, by an O_PATH descriptor: no other can get its number, and st_dev is that
  mount's. To close such a descriptor tells no server anything.
- In the caller's mount namespace there is no way through its paths but the one to the place: /proc is the one of before
  (`procfs.stay`).
- Nobody waits for an attendant that cannot be killed: it holds none of the command's standard descriptors.
- A verdict is told when nothing is held that would keep a mount busy, but for that of which the server is awaited.
- No process below the supervisor can trace an attendant, which has rights that the caller has not.

Sources: seccomp_unotify(2), setns(2), mount(2), proc_pid_fdinfo(5), ptrace(2) on dumpable processes.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import signal
import socket
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from binderfs_fuse.command import calls, options, seccomp
from binderfs_fuse.command.daemon import close_inherited, leave_standard_descriptors
from binderfs_fuse.fuse import mounting
from binderfs_fuse.fuse.mounting import MountError
from binderfs_fuse.fuse.settings import MAX_DEVICES
from binderfs_fuse.fuse.supervised import REQUEST, Kind
from binderfs_fuse.host import places, procfs, tasks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from binderfs_fuse.command.options import Options
    from binderfs_fuse.command.seccomp import Notification

TYPE: Final = b"binder"

# <sys/mount.h>: with one of the latter, mount(2) does not look at the type.
_MS_RDONLY: Final = 1
_MS_REMOUNT: Final = 1 << 5
_MS_BIND: Final = 1 << 12
_WITHOUT_TYPE: Final = _MS_BIND | 1 << 13 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20
_MS_NOUSER: Final = 1 << 31
# What old programs put into the upper half of the flags, where it is no flags.
_MAGIC: Final = 0xC0ED0000
_MAGIC_MASK: Final = 0xFFFF0000
_PASSED_ON: Final = 1 << 10 | 1 << 11 | 1 << 21 | 1 << 24 | 1 << 25

_PAGE: Final = os.sysconf("SC_PAGESIZE")
_CAP_SYS_ADMIN: Final = 21


class Verdict(enum.IntEnum):
    """What is to become of a call.

    `PROCEED`  the kernel serves it, as if there were no filter
    `ANSWER`   it returns the number, 0 or a negative errno
    `ASK`      the server of the mount `device` is asked `request`, and its answer is the call's
    `SERVE`    the mount `device` wants a server, with `data` and `source` for options; two descriptors come along, of
               /dev/fuse and of the user namespace that the mount was made in
    """

    PROCEED = 0
    ANSWER = 1
    ASK = 2
    SERVE = 3


_HEAD: Final = struct.Struct(f"=BiQ{REQUEST.size}sIII")
LONGEST: Final = _HEAD.size + 3 * _PAGE
"""Bytes of the longest message."""
TAKE_AWAY: Final = b"take away"
"""The supervisor's word that a mount is to go; any other, or its hanging up, lets it stay."""


@dataclass(frozen=True, slots=True)
class Message:
    """A verdict, and what goes with it.

    `request` is one of `fuse.supervised`. `uid` and `gid` made a mount, at `place`.
    """

    verdict: Verdict
    number: int = 0
    device: int = 0
    request: bytes = b""
    uid: int = 0
    gid: int = 0
    read_only: bool = False
    data: bytes = b""
    place: bytes = b""

    def pack(self) -> bytes:
        """Return it as bytes."""
        head = _HEAD.pack(
            self.verdict,
            self.number,
            self.device,
            self.request,
            self.uid,
            self.gid,
            len(self.data) << 1 | self.read_only,
        )
        return head + self.data + self.place

    @classmethod
    def unpack(cls, text: bytes) -> Message:
        """Read what `pack` returned."""
        verdict, number, device, request, uid, gid, lengths = _HEAD.unpack_from(text)
        middle = _HEAD.size + (lengths >> 1)
        return cls(
            Verdict(verdict),
            number,
            device,
            request,
            uid,
            gid,
            bool(lengths & 1),
            text[_HEAD.size : middle],
            text[middle:],
        )


class _ProceedError(Exception):
    """The call is not one to serve here."""


class Attendant:
    """The process's side. `user_namespaces` are descriptors of those that the served mounts were made in, by device."""

    def __init__(
        self,
        listener: int,
        supervisor: socket.socket,
        notification: Notification,
        user_namespaces: Mapping[int, int],
        base: Options,
    ) -> None:
        self._listener = listener
        self._supervisor = supervisor
        self._call = notification
        self._user_namespaces = user_namespaces
        self._base = base
        self._held = contextlib.ExitStack()

    def serve(self) -> NoReturn:
        """Be the process that looks at a call, in a fresh child of the supervisor."""
        try:
            calls.die_with_parent(signal.SIGKILL)
            calls.hide()
            leave_standard_descriptors()
            close_inherited({self._listener, self._supervisor.fileno(), *self._user_namespaces.values()})
            serve = {seccomp.IOCTL: self._ioctl, seccomp.MOUNT: self._mount, seccomp.FSOPEN: self._fsopen}
            try:
                # What is held keeps mounts busy, and the caller goes on as soon as the verdict is told.
                with self._held:
                    message = serve[self._call.call]()
            except MountError as failure:
                message = _answer(-failure.number)
            except (OSError, _ProceedError):
                # The caller is gone, or is not what this is made for.
                message = Message(Verdict.PROCEED)
            if message is not None:
                self._supervisor.send(message.pack())
        finally:
            os._exit(0)

    def _waits(self) -> None:
        """Make sure that what was read of the caller by its id was its own."""
        if not seccomp.is_waiting(self._listener, self._call):
            raise _ProceedError

    def _ioctl(self) -> Message:
        descriptor, command, *_ = self._call.arguments
        tid = self._call.tid
        device, inode = identify_open(tid, descriptor & 0xFFFFFFFF)
        pid, euid = tasks.caller(tid)
        nice = tasks.nice(tid)
        self._waits()
        if device not in self._user_namespaces:
            raise _ProceedError
        request = REQUEST.pack(Kind.IOCTL, command, tid, pid, euid, nice, inode)
        return Message(Verdict.ASK, device=device, request=request)

    def _fsopen(self) -> Message:
        """Send those who would open binder by fsopen(2) to mount(2), as from a kernel that has only that."""
        if _string(self._call.tid, self._call.arguments[0]) != TYPE:
            raise _ProceedError
        return _answer(-errno.ENOSYS)

    def _mount(self) -> Message | None:
        source, target, kind, flags, data = self._call.arguments[:5]
        tid = self._call.tid
        flags = _flags(flags)
        if is_foreign(self._call):
            raise _ProceedError
        if _is_remount(flags):
            return self._remount(flags)
        if _string(tid, kind) != TYPE:
            raise _ProceedError
        said = _string(tid, data)[: _PAGE - 1]
        name = os.fsdecode(_string(tid, source)) if source else None
        if name is not None and len(os.fsencode(name)) == _PAGE:
            return _answer(-errno.EINVAL)
        user_namespace = os.open(f"/proc/{tid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        may_mount = _may_mount(tid)
        place = self._go(_string(tid, target))
        self._waits()
        # In the kernel's order: is the place there, may the caller, are the options right, is it a directory?
        if not may_mount:
            return _answer(-errno.EPERM)
        if flags & _MS_NOUSER:
            return _answer(-errno.EINVAL)
        chosen, name = choose(self._base, said, name, read_only=bool(flags & _MS_RDONLY))
        if place.fuse is None:
            return _answer(-errno.ENOTDIR)
        try:
            root = mounting.mount_fuse(
                place.fuse,
                place.descriptor,
                name or "none",
                Path("there"),
                allow_other=True,
                flags=flags & _PASSED_ON | chosen.flags,
            )
        except OSError as error:
            return _answer(-(error.errno or errno.EIO))
        self._held.callback(os.close, root)
        try:
            message = Message(
                Verdict.SERVE,
                device=places.device_number(root),
                uid=os.geteuid(),
                gid=os.getegid(),
                read_only=bool(flags & _MS_RDONLY),
                data=said,
                place=places.path_of(root)[:_PAGE],
            )
            socket.send_fds(self._supervisor, [message.pack()], [place.fuse, user_namespace])
            os.close(place.fuse)
            word = self._supervisor.recv(len(TAKE_AWAY))
        except OSError:
            word = TAKE_AWAY
        if word == TAKE_AWAY:
            mounting.detach(root)
        return None

    def _remount(self, flags: int) -> Message:
        """Remount as mount(2) does: what is not said is then as if it had never been."""
        tid = self._call.tid
        target, data = (_string(tid, self._call.arguments[index]) for index in (1, 4))
        may_mount = _may_mount(tid)
        within = {device: _is_within(space, tid) for device, space in self._user_namespaces.items()}
        try:
            place = self._go(target)
            mount = mounting.mount_of(place.descriptor)
        except MountError:
            # The kernel says what is wrong with the place.
            raise _ProceedError from None
        if place.fuse is None or mount is None or not mount.shows_root or mount.device not in within:
            raise _ProceedError
        self._waits()
        if not may_mount:
            return _answer(-errno.EPERM)
        said = os.fsdecode(data[: _PAGE - 1])
        chosen, _ = options.parse_data(said, kernel_base(self._base), ignored=options.OF_THE_TABLE)
        if not within[mount.device]:
            return _answer(-errno.EPERM)
        settings = chosen.settings
        read_only = settings.read_only or bool(flags & _MS_RDONLY)
        request = REQUEST.pack(Kind.RECONFIGURE, settings.maximum, settings.stats, read_only, 0, 0, 0)
        return Message(Verdict.ASK, device=mount.device, request=request)

    def _go(self, target: bytes) -> _Place:
        """Go where a path leads the caller. Raises `MountError` with the errno that it ends with."""
        try:
            place = _go_where(self._call.tid, target)
        except OSError as error:
            self._waits()
            raise MountError("there is no such place", error.errno or errno.EIO) from error
        self._held.callback(os.close, place.descriptor)
        return place


def is_foreign(call: Notification) -> bool:
    """Tell whether a call's numbers alone say that it is not one to serve, as those of a bind mount do."""
    if call.call != seccomp.MOUNT:
        return False
    _, target, kind, flags, *_ = call.arguments
    flags = _flags(flags)
    return not target or (not _is_remount(flags) and (bool(flags & _WITHOUT_TYPE) or not kind))


def _flags(flags: int) -> int:
    """Return the flags of mount(2) without what old programs put there."""
    return flags & ~_MAGIC_MASK if flags & _MAGIC_MASK == _MAGIC else flags


def _is_remount(flags: int) -> bool:
    return bool(flags & _MS_REMOUNT) and not flags & _MS_BIND


def _answer(error: int) -> Message:
    return Message(Verdict.ANSWER, error)


def kernel_base(base: Options) -> Options:
    """Return what holds where mount(2) is told nothing; all else about a server is as in `base`."""
    settings = replace(base.settings, maximum=MAX_DEVICES, stats=False, read_only=False)
    return replace(base, settings=settings, flags=0)


def choose(base: Options, said: bytes, source: str | None, *, read_only: bool) -> tuple[Options, str | None]:
    """Read the data of a mount(2); return also the source. Raises `MountError`."""
    chosen, source = options.parse_data(os.fsdecode(said), kernel_base(base), source)
    if read_only:
        chosen = replace(chosen, settings=replace(chosen.settings, read_only=True))
    return chosen, source


def identify_open(tid: int, descriptor: int) -> tuple[int, int]:
    """Return st_dev and the inode of the file that a task has open by this number.

    A client that gives this another answer, by closing and opening while it is looked at, has that other file open.
    Raises `OSError`: EBADF where the task has no file open by that number, or before Linux 5.14, which does not tell
    the inode of an open.
    """
    place = os.open(f"/proc/{tid}/fd/{descriptor}", os.O_PATH | os.O_CLOEXEC)
    try:
        # While it is pinned, no other mount gets its number.
        device, mount = places.device_number(place), places.mount_number(place)
        info = procfs.fields(procfs.read(f"/proc/{tid}/fdinfo/{descriptor}"))
        if int(info[b"flags"], 8) & os.O_PATH or int(info[b"mnt_id"]) != mount or b"ino" not in info:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return device, int(info[b"ino"])
    finally:
        os.close(place)


def _string(tid: int, address: int) -> bytes:
    """Read a string of a task up to its NUL, at most a page, as mount(2) does; at NULL there is an empty one.

    Raises `OSError`: EIO where there is no such memory, ESRCH where the task has ended.
    """
    if not address:
        return b""
    with Path(f"/proc/{tid}/mem").open("rb", buffering=0) as memory:
        text = b""
        while b"\0" not in text and len(text) < _PAGE:
            # Not beyond a page at a time: the next one may not be there.
            memory.seek(address + len(text))
            part = memory.read(_PAGE - (address + len(text)) % _PAGE)
            if not part:
                # The memory of a task that is being killed has an end, right where one is.
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
            text += part
    return text.partition(b"\0")[0][:_PAGE]


def _may_mount(tid: int) -> bool:
    """Tell whether a task has CAP_SYS_ADMIN in its user namespace."""
    return bool(int(tasks.status(tid)[b"CapEff"], 16) >> _CAP_SYS_ADMIN & 1)


def _is_within(user_namespace: int, tid: int) -> bool:
    """Tell whether a user namespace, by a descriptor of it, is a task's own or somewhere below that."""
    own = Path(f"/proc/{tid}/ns/user").stat().st_ino
    space = os.dup(user_namespace)
    try:
        while os.fstat(space).st_ino != own:
            above = calls.parent_user_namespace(space)
            os.close(space)
            space = above
    except PermissionError:
        # That is above the one which this process is in.
        return False
    finally:
        os.close(space)
    return True


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a path led: a descriptor of that, and one of /dev/fuse to mount there, or None where it is no directory."""

    descriptor: int
    fuse: int | None


def _go_where(tid: int, target: bytes) -> _Place:
    """Enter a task's namespaces, and find where a path leads the task. Raises `OSError`, `MountError`."""
    root, directory = (os.open(f"/proc/{tid}/{name}", os.O_PATH | os.O_CLOEXEC) for name in ("root", "cwd"))
    own_proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    user, mount = (
        os.open(f"/proc/{tid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        if Path(f"/proc/{tid}/ns/{name}").stat().st_ino != Path(f"/proc/self/ns/{name}").stat().st_ino
        else None
        for name in ("user", "mnt")
    )
    # Where that is denied, the task has not been able to, either: it has the groups that this process has.
    with contextlib.suppress(PermissionError):
        os.setgroups([int(group) for group in tasks.status(tid)[b"Groups"].split()])
    if user is not None:
        calls.setns(user, calls.CLONE_NEWUSER)
    # By its numbers in the namespace, which are what a call takes there.
    task = tasks.status(tid)
    # The kernel takes a descriptor only in the user namespace where it was opened; the user is still who started us,
    # and so is the mount namespace, for /dev/fuse to be that.
    descriptor = mounting.open_fuse()
    if user is not None:
        _become_owner(task)
    if mount is not None:
        calls.setns(mount, calls.CLONE_NEWNS)
    # Find the place as the task would, then leave its root again: mountinfo shows what is below.
    whole = os.open("/", os.O_PATH | os.O_CLOEXEC)
    os.fchdir(root)
    os.chroot(".")
    os.fchdir(directory)
    uid, gid = (int(task[name].split()[_FILE_SYSTEM]) for name in (b"Uid", b"Gid"))
    with calls.with_rights_of(uid, gid, int(task[b"CapEff"], 16)):
        place = os.open(target, os.O_PATH | os.O_CLOEXEC)
    os.fchdir(whole)
    os.chroot(".")
    procfs.stay(own_proc)
    # Another descriptor of it would keep it busy when the caller goes on.
    for each in (root, directory, whole):
        os.close(each)
    if not places.is_directory(place):
        os.close(descriptor)
        return _Place(place, None)
    return _Place(place, descriptor)


# Which of the four numbers in /proc/TID/status.
_EFFECTIVE: Final = 1
_FILE_SYSTEM: Final = 3


def _become_owner(task: Mapping[bytes, bytes]) -> None:
    """Become who a mount in this user namespace belongs to: its root, as in the kernel.

    Where there is no root in it, the kernel's belongs to nobody, and can be used by nobody. That is of no use to
    anyone, and FUSE wants a user: then it is the task's.
    """
    for change, name, ids in ((os.setresgid, "gid_map", b"Gid"), (os.setresuid, "uid_map", b"Uid")):
        has_root = any(line.split()[0] == b"0" for line in procfs.lines(procfs.read(f"/proc/self/{name}")))
        number = 0 if has_root else int(task[ids].split()[_EFFECTIVE])
        change(number, number, number)
