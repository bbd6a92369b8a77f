"""The process that stands by a command of ``mount.py run``: it serves what the filter hands over, and passes signals.

A call that the filter hands over (`seccomp`) is answered in one of three ways:

- ``ioctl(fd, BINDER_SET_CONTEXT_MGR or BINDER_THREAD_EXIT, NULL)`` on a device of a mount that this process made goes
  to that mount's server, by a socket (`fuse.supervised`): fd's mount and inode tell which open of which mount it is.
- ``mount(..., "binder", ...)`` makes such a mount where the caller is: a helper enters the caller's namespaces, mounts
  there, and hands back the descriptor of /dev/fuse, which a server of ours then answers on. A remount goes to that.
- Everything else proceeds as if there were no filter.

What a caller may do is for the kernel to say: the helper is in the caller's namespaces, and the caller must have
CAP_SYS_ADMIN, as for any mount.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse.command import calls, options, seccomp
from binderfs_fuse.command.daemon import in_background
from binderfs_fuse.command.mount import prepare, serve
from binderfs_fuse.fuse import mounting
from binderfs_fuse.fuse.mounting import Connection, MountError
from binderfs_fuse.fuse.settings import MAX_DEVICES
from binderfs_fuse.fuse.supervised import ANSWER, REQUEST, Kind
from binderfs_fuse.host import tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from binderfs_fuse.command.calls import SignalQueue
    from binderfs_fuse.command.options import Options
    from binderfs_fuse.command.seccomp import Notification

TYPE: Final = b"binder"

# <sys/mount.h>: with one of the latter, mount(2) does not look at the type.
_MS_RDONLY: Final = 1
_MS_REMOUNT: Final = 1 << 5
_WITHOUT_TYPE: Final = 1 << 12 | 1 << 13 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20
_PASSED_ON: Final = 1 << 10 | 1 << 11 | 1 << 21 | 1 << 24 | 1 << 25

# Seconds that servers are given to end of themselves.
_PATIENCE: Final = 5.0
_PAGE: Final = os.sysconf("SC_PAGESIZE")
_CAP_SYS_ADMIN: Final = 21


@dataclass(frozen=True, slots=True)
class Served:
    """A mount that this process made: its server, and the socket to that."""

    pid: int
    socket: socket.socket


class Supervisor:
    """Makes mounts, by `base` where nothing else is said, and serves what a filtered command cannot ask of FUSE."""

    def __init__(self, base: Options) -> None:
        calls.adopt_orphans()
        self._base = base
        # By st_dev.
        self._served: dict[int, Served] = {}
        self._serve: dict[str, Callable[[Notification], int | None]] = {
            seccomp.IOCTL: self._ioctl,
            seccomp.MOUNT: self._mount,
            seccomp.FSOPEN: self._fsopen,
        }

    def adopt(self, connection: Connection, chosen: Options) -> None:
        """Start a server for a mount, and return when it is ready. Raises `MountError`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def serve_supervised(ready: Callable[[], object]) -> None:
            calls.die_with_parent(signal.SIGTERM)
            prepare(chosen)
            serve(connection, chosen, ready, theirs)

        try:
            pid = in_background(serve_supervised, keep=[theirs.fileno(), connection.descriptor])
        except MountError:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(connection.descriptor)
        self._served[connection.device] = Served(pid, ours)

    def stand_by(self, command: int, listener: int | None, signals: SignalQueue) -> int:
        """Serve and pass on until the child process `command` ends; return its wait status."""
        child = os.pidfd_open(command)
        poll = select.poll()
        for descriptor in (child, signals.fileno(), *([] if listener is None else [listener])):
            poll.register(descriptor, select.POLLIN)
        try:
            while True:
                ready = dict(poll.poll())
                if signals.fileno() in ready:
                    self._pass_on(command, signals)
                if listener is not None and listener in ready:
                    if ready[listener] & select.POLLIN:
                        self._answer(listener)
                    else:
                        # Nobody is left under the filter.
                        poll.unregister(listener)
                if child in ready:
                    return os.waitpid(command, 0)[1]
        finally:
            os.close(child)

    def stop(self) -> None:
        """End what the command has left running, then the servers, and wait for them."""
        servers = {served.pid for served in self._served.values()}
        given_up: set[int] = set()
        # What they leave comes to be our children in turn.
        while left := set(calls.children()) - servers - given_up:
            for process in left:
                try:
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                except OSError:
                    given_up.add(process)
        for served in self._served.values():
            os.kill(served.pid, signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        for served in self._served.values():
            process = os.pidfd_open(served.pid)
            if not select.select([process], [], [], max(0.0, deadline - time.monotonic()))[0]:
                os.kill(served.pid, signal.SIGKILL)
            os.close(process)
            os.waitpid(served.pid, 0)
            served.socket.close()
        self._served.clear()

    def _pass_on(self, command: int, signals: SignalQueue) -> None:
        for received in signals.take():
            if received.number == signal.SIGCHLD:
                self._reap(command)
            elif not received.from_terminal:
                os.kill(command, received.number)

    def _reap(self, command: int) -> None:
        """Let go of children that have ended, mounts whose servers have among them, but for the command itself."""
        devices = {served.pid: device for device, served in self._served.items()}
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == command:
                return
            os.waitpid(ended.si_pid, 0)
            device = devices.get(ended.si_pid)
            if device is not None:
                self._served.pop(device).socket.close()

    def _answer(self, listener: int) -> None:
        notification = seccomp.receive(listener)
        if notification is None:
            return
        try:
            error = self._serve[notification.call](notification)
        except MountError as failure:
            error = -failure.number
        except OSError:
            # The caller is gone, or is not what this is made for.
            error = None
        if error is None:
            seccomp.proceed(listener, notification)
        else:
            seccomp.answer(listener, notification, error)

    # What is served: each returns 0 or a negative errno, or None to let the call proceed.

    def _ioctl(self, notification: Notification) -> int | None:
        descriptor, command, *_ = notification.arguments
        lines = Path(f"/proc/{notification.tid}/fdinfo/{descriptor & 0xFFFFFFFF}").read_text().splitlines()
        info = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        mounts = {mount.number: mount for mount in mounting.mounts(notification.tid)}
        mount = mounts.get(int(info["mnt_id"]))
        # Linux before 5.14 does not say the inode.
        if mount is None or mount.device not in self._served or "ino" not in info:
            return None
        return self._ask(mount.device, Kind.IOCTL, notification.tid, command, int(info["ino"]))

    def _mount(self, notification: Notification) -> int | None:
        source, target, kind, flags, data = notification.arguments[:5]
        tid = notification.tid
        if flags & _WITHOUT_TYPE or not target:
            return None
        if flags & _MS_REMOUNT:
            return self._remount(tid, _string(tid, target), _string(tid, data))
        if not kind or _string(tid, kind) != TYPE:
            return None
        if not _may_mount(tid):
            return -errno.EPERM
        chosen = options.parse([os.fsdecode(_string(tid, data))], self._kernel_base())
        if flags & _MS_RDONLY:
            chosen = replace(chosen, settings=replace(chosen.settings, read_only=True))
        name = os.fsdecode(_string(tid, source)) if source else "none"
        with _connect_where(tid, name, _string(tid, target), flags & _PASSED_ON) as connection:
            self.adopt(connection, chosen)
        return 0

    def _kernel_base(self) -> Options:
        """Return what holds where mount(2) is told nothing."""
        return replace(self._base, settings=replace(self._base.settings, maximum=MAX_DEVICES, stats=False))

    def _remount(self, tid: int, target: bytes, data: bytes) -> int | None:
        """Remount as mount(2) does: what is not said is then as if it had never been."""
        place = "root" if target.startswith(b"/") else "cwd"
        mount = mounting.mount_at(Path(os.path.realpath(f"/proc/{tid}/{place}/{os.fsdecode(target)}")), tid)
        if mount is None or mount.device not in self._served:
            return None
        if not _may_mount(tid):
            return -errno.EPERM
        settings = options.parse([os.fsdecode(data)], self._kernel_base()).settings
        return self._ask(mount.device, Kind.RECONFIGURE, settings.maximum, settings.stats, 0)

    def _fsopen(self, notification: Notification) -> int | None:
        """Send those who would open binder by fsopen(2) to mount(2), as from a kernel that has only that."""
        return -errno.ENOSYS if _string(notification.tid, notification.arguments[0]) == TYPE else None

    def _ask(self, device: int, kind: Kind, first: int, second: int, last: int) -> int:
        connection = self._served[device].socket
        connection.send(REQUEST.pack(kind, first, second, 0, last))
        error: int = ANSWER.unpack(connection.recv(ANSWER.size))[0]
        return error


def _string(tid: int, address: int) -> bytes:
    """Read a string of a task up to its NUL, at most a page, as mount(2) does; at NULL there is an empty one."""
    if not address:
        return b""
    with Path(f"/proc/{tid}/mem").open("rb", buffering=0) as memory:
        text = b""
        while b"\0" not in text and len(text) < _PAGE:
            # Not beyond a page at a time: the next one may not be there.
            memory.seek(address + len(text))
            text += memory.read(_PAGE - (address + len(text)) % _PAGE)
    return text.partition(b"\0")[0][:_PAGE]


def _may_mount(tid: int) -> bool:
    """Tell whether a task has CAP_SYS_ADMIN in its user namespace."""
    return bool(int(tasks.status(tid)[b"CapEff"], 16) >> _CAP_SYS_ADMIN & 1)


@contextlib.contextmanager
def _connect_where(tid: int, source: str, target: bytes, flags: int) -> Iterator[Connection]:
    """Mount as a task would: at a path of its, in its mount and user namespaces; unmount should the body fail.

    Raises `MountError`.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    helper = os.fork()
    if not helper:
        with contextlib.suppress(BaseException):
            ours.close()
            _help(theirs, tid, source, target, flags)
        os._exit(0)
    theirs.close()
    try:
        with ours:
            answer, descriptors, _, _ = socket.recv_fds(ours, 2 * _PAGE, 1)
            if not descriptors:
                raise MountError("the mount failed", int(answer or errno.EIO))
            uid, gid, place = answer.split(b" ", 2)
            # The helper stays where it is until it has been asked what that looks like.
            mount = mounting.mount_at(Path(os.fsdecode(place)), helper)
            if mount is None:
                os.close(descriptors[0])
                raise MountError("unmounted as soon as it was mounted")
            try:
                yield Connection(descriptors[0], mount.device, mount.mountpoint, int(uid), int(gid))
            except BaseException:
                ours.send(b"unmount")
                raise
    finally:
        os.waitpid(helper, 0)


def _help(supervisor: socket.socket, tid: int, source: str, target: bytes, flags: int) -> None:
    """Be the process that mounts for a task: send an errno, or what there is to know of the mount, and stand by."""
    try:
        descriptor = _mount_where(tid, source, target, flags)
    except MountError as error:
        supervisor.send(b"%d" % error.number)
    except OSError as error:
        supervisor.send(b"%d" % (error.errno or errno.EIO))
    else:
        place = Path.cwd()
        told = b"%d %d %s" % (os.geteuid(), os.getegid(), os.fsencode(place))
        socket.send_fds(supervisor, [told], [descriptor])
        if supervisor.recv(16):
            mounting.system_umount(place, mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)


def _mount_where(tid: int, source: str, target: bytes, flags: int) -> int:
    root, directory = (os.open(f"/proc/{tid}/{name}", os.O_PATH | os.O_CLOEXEC) for name in ("root", "cwd"))
    spaces = [
        (os.open(f"/proc/{tid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), kind)
        for name, kind in (("user", calls.CLONE_NEWUSER), ("mnt", calls.CLONE_NEWNS))
        if Path(f"/proc/{tid}/ns/{name}").stat().st_ino != Path(f"/proc/self/ns/{name}").stat().st_ino
    ]
    for space, kind in spaces:
        calls.setns(space, kind)
    # The kernel takes a descriptor only in the user namespace where it was opened; the user is still who started us.
    descriptor = mounting.open_fuse()
    if any(kind == calls.CLONE_NEWUSER for _, kind in spaces):
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    # Find the directory as the caller would, then leave its root again: /proc/self/mountinfo shows what is below.
    whole = os.open("/", os.O_PATH | os.O_CLOEXEC)
    os.fchdir(root)
    os.chroot(".")
    os.fchdir(directory)
    place = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.fchdir(whole)
    os.chroot(".")
    os.fchdir(place)
    mounting.mount_fuse(descriptor, source, Path(), allow_other=True, flags=flags)
    return descriptor
