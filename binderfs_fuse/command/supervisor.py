"""The process that stands by a command of ``mount.py run``: it serves what the filter hands over, and passes signals.

A call that the filter hands over (`seccomp`) is answered in one of three ways:

- ``ioctl(fd, BINDER_SET_CONTEXT_MGR or BINDER_THREAD_EXIT, NULL)`` on a device of a mount that this process made goes
  to that mount's server, by a socket (`fuse.supervised`): fd's mount and inode tell which open of which mount it is.
- ``mount(..., "binder", ...)`` makes such a mount where the caller is: a helper enters the caller's namespaces, mounts
  there, and hands back the descriptor of /dev/fuse, which a server of ours then answers on. A remount goes to that.
- Everything else proceeds as if there were no filter.

What a caller may do is for the kernel to say: the helper is in the caller's namespaces, looks for the directory with
the caller's rights, and the caller must have CAP_SYS_ADMIN, as for any mount. What it can say about the mount is what
the kernel's binderfs knows of (`options.parse_data`); everything else about a server is for whoever started this.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from binderfs_fuse.command import calls, options, seccomp
from binderfs_fuse.command.daemon import in_background
from binderfs_fuse.command.mount import prepare, serve
from binderfs_fuse.fuse import mounting
from binderfs_fuse.fuse.mounting import Connection, MountError
from binderfs_fuse.fuse.settings import MAX_DEVICES
from binderfs_fuse.fuse.supervised import ANSWER, REQUEST, Kind
from binderfs_fuse.host import tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from binderfs_fuse.command.calls import SignalQueue
    from binderfs_fuse.command.options import Options
    from binderfs_fuse.command.seccomp import Notification
    from binderfs_fuse.command.warden import Warden
    from binderfs_fuse.fuse.mounting import Mount

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

# When a shell has its command stopped by one of these, `run` has to stop, too: it is what the shell waits for.
_JOB_CONTROL: Final = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)

# Seconds that servers are given to end of themselves.
_PATIENCE: Final = 5.0
_PAGE: Final = os.sysconf("SC_PAGESIZE")
_CAP_SYS_ADMIN: Final = 21


@dataclass(frozen=True, slots=True)
class Served:
    """A mount that this process made: its server, the socket to that, and the user namespace that it was made in."""

    pid: int
    socket: socket.socket
    user_namespace: int

    def close(self) -> None:
        """Let go of it."""
        self.socket.close()
        os.close(self.user_namespace)


class Supervisor:
    """Makes mounts, by `base` where nothing else is said, and serves what a filtered command cannot ask of FUSE."""

    def __init__(self, base: Options) -> None:
        calls.adopt_orphans()
        self._base = base
        # By st_dev.
        self._served: dict[int, Served] = {}
        self._serve: dict[str, Callable[[Notification, Callable[[], bool]], int | None]] = {
            seccomp.IOCTL: self._ioctl,
            seccomp.MOUNT: self._mount,
            seccomp.FSOPEN: self._fsopen,
        }

    def adopt(self, connection: Connection, chosen: Options, user_namespace: int | None = None) -> None:
        """Start a server for a mount, and return when it is ready.

        `user_namespace` is a descriptor of the one that it was made in, where that is not this process's. Raises
        `MountError`.
        """
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
        if user_namespace is None:
            space = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        else:
            space = os.dup(user_namespace)
        self._served[connection.device] = Served(pid, ours, space)

    def stand_by(self, warden: Warden, listener: int | None, signals: SignalQueue) -> int:
        """Serve and pass on until the command of `warden` ends; return its wait status."""
        poll = select.poll()
        for descriptor in (warden.fileno(), signals.fileno(), *([] if listener is None else [listener])):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if signals.fileno() in ready:
                self._pass_on(warden, signals)
            if listener is not None and listener in ready:
                if ready[listener] & select.POLLIN:
                    self._answer(listener)
                else:
                    # Nobody is left under the filter.
                    poll.unregister(listener)
            if warden.fileno() in ready:
                has_ended, number = warden.hear()
                if has_ended:
                    return number
                if number in _JOB_CONTROL:
                    signals.let_through(number)

    def stop(self) -> None:
        """End what the command has left running, then the servers, and wait for them."""
        calls.end_children(but={served.pid for served in self._served.values()})
        for served in self._served.values():
            os.kill(served.pid, signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        for served in self._served.values():
            process = os.pidfd_open(served.pid)
            if not select.select([process], [], [], max(0.0, deadline - time.monotonic()))[0]:
                os.kill(served.pid, signal.SIGKILL)
            os.close(process)
            os.waitpid(served.pid, 0)
            served.close()
        self._served.clear()

    def _pass_on(self, warden: Warden, signals: SignalQueue) -> None:
        for received in signals.take():
            if received.number == signal.SIGCHLD:
                self._reap(warden.pid)
            elif not received.from_terminal and not received.from_self:
                warden.signal(received.number)

    def _reap(self, warden: int) -> None:
        """Let go of children that have ended, mounts whose servers have among them, but for the warden."""
        devices = {served.pid: device for device, served in self._served.items()}
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == warden:
                return
            os.waitpid(ended.si_pid, 0)
            device = devices.get(ended.si_pid)
            if device is not None:
                self._served.pop(device).close()

    def _answer(self, listener: int) -> None:
        notification = seccomp.receive(listener)
        if notification is None:
            return
        # What is read of the caller by its id is its own only if it still waits afterwards.
        waits = functools.partial(seccomp.is_waiting, listener, notification)
        try:
            error = self._serve[notification.call](notification, waits)
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

    def _ioctl(self, notification: Notification, waits: Callable[[], bool]) -> int | None:
        descriptor, command, *_ = notification.arguments
        lines = Path(f"/proc/{notification.tid}/fdinfo/{descriptor & 0xFFFFFFFF}").read_text().splitlines()
        info = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        mounts = {mount.number: mount for mount in mounting.mounts(notification.tid)}
        mount = mounts.get(int(info["mnt_id"]))
        # Linux before 5.14 does not say the inode.
        if mount is None or mount.device not in self._served or "ino" not in info or not waits():
            return None
        return self._ask(mount.device, Kind.IOCTL, notification.tid, command, 0, int(info["ino"]))

    def _mount(self, notification: Notification, waits: Callable[[], bool]) -> int | None:
        source, target, kind, flags, data = notification.arguments[:5]
        tid = notification.tid
        if flags & _MAGIC_MASK == _MAGIC:
            flags &= ~_MAGIC_MASK
        if not target:
            return None
        if flags & _MS_REMOUNT and not flags & _MS_BIND:
            return self._remount(notification, waits, flags)
        if flags & _WITHOUT_TYPE or not kind or _string(tid, kind) != TYPE:
            return None
        said = _string(tid, data)[: _PAGE - 1]
        name = os.fsdecode(_string(tid, source)) if source else None
        if name is not None and len(os.fsencode(name)) == _PAGE:
            return -errno.EINVAL
        with (
            Path(f"/proc/{tid}/ns/user").open("rb", buffering=0) as space,
            _Helper(tid, _string(tid, target)) as helper,
        ):
            may_mount = _may_mount(tid)
            if not waits():
                return None
            # In the kernel's order: is the place there, may the caller, are the options right, is it a directory?
            if not may_mount:
                return -errno.EPERM
            if flags & _MS_NOUSER:
                return -errno.EINVAL
            chosen, name = options.parse_data(os.fsdecode(said), self._kernel_base(), name)
            if flags & _MS_RDONLY:
                chosen = replace(chosen, settings=replace(chosen.settings, read_only=True))
            connection = helper.mount(name or "none", flags & _PASSED_ON | chosen.flags)
            try:
                self.adopt(connection, chosen, space.fileno())
            except BaseException:
                # Somebody may have killed it.
                with contextlib.suppress(OSError):
                    helper.unmount()
                raise
        return 0

    def _kernel_base(self) -> Options:
        """Return what holds where mount(2) is told nothing."""
        settings = replace(self._base.settings, maximum=MAX_DEVICES, stats=False, read_only=False)
        return replace(self._base, settings=settings, flags=0)

    def _remount(self, notification: Notification, waits: Callable[[], bool], flags: int) -> int | None:
        """Remount as mount(2) does: what is not said is then as if it had never been."""
        tid = notification.tid
        target, data = (_string(tid, notification.arguments[index]) for index in (1, 4))
        with contextlib.suppress(MountError), _Helper(tid, target) as helper:
            mount = helper.mount_there()
            if mount is None or not mount.shows_root or mount.device not in self._served:
                return None
            may_mount = _may_mount(tid)
            is_within = _is_within(self._served[mount.device].user_namespace, tid)
            if not waits():
                return None
            if not may_mount:
                return -errno.EPERM
            try:
                said = os.fsdecode(data[: _PAGE - 1])
                chosen, _ = options.parse_data(said, self._kernel_base(), ignored=options.OF_THE_TABLE)
            except MountError as error:
                return -error.number
            if not is_within:
                return -errno.EPERM
            settings = chosen.settings
            read_only = settings.read_only or bool(flags & _MS_RDONLY)
            return self._ask(mount.device, Kind.RECONFIGURE, settings.maximum, settings.stats, read_only, 0)
        # The kernel says what is wrong with the place.
        return None

    def _fsopen(self, notification: Notification, _waits: Callable[[], bool]) -> int | None:
        """Send those who would open binder by fsopen(2) to mount(2), as from a kernel that has only that."""
        return -errno.ENOSYS if _string(notification.tid, notification.arguments[0]) == TYPE else None

    def _ask(self, device: int, kind: Kind, first: int, second: int, third: int, last: int) -> int:
        connection = self._served[device].socket
        connection.send(REQUEST.pack(kind, first, second, third, last))
        answer = connection.recv(ANSWER.size)
        # Where there is none, the server has just died.
        error: int = ANSWER.unpack(answer)[0] if answer else -errno.ENOTCONN
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


class _Helper:
    """A process that stands where a path leads a task, in the task's mount and user namespaces, to mount there.

    Use as a context. Raises `MountError`, as it is made, where the path does not lead the task anywhere.
    """

    def __init__(self, tid: int, target: bytes) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if not self.pid:
            with contextlib.suppress(BaseException):
                calls.die_with_parent(signal.SIGKILL)
                self._socket.close()
                _help(theirs, tid, target)
            os._exit(0)
        theirs.close()
        # The path may lead through file systems whose servers do not answer.
        self._socket.settimeout(_PATIENCE)
        try:
            # It says nothing where it is killed.
            answer = self._socket.recv(2 * _PAGE) or b"%d 0 0 " % errno.EIO
            error, uid, gid, self._place = answer.split(b" ", 3)
            if int(error):
                raise MountError("there is no such place", int(error))
        except BaseException:
            self.__exit__()
            raise
        self._uid, self._gid = int(uid), int(gid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def mount_there(self) -> Mount | None:
        """Return what is mounted there, of which it shows the root; None if it does not, or that is no directory."""
        return mounting.mount_at(Path(os.fsdecode(self._place)), self.pid)

    def mount(self, source: str, flags: int) -> Connection:
        """Mount FUSE there. Raises `MountError`."""
        self._socket.send(b"%d %s" % (flags, os.fsencode(source)))
        error, descriptors, _, _ = socket.recv_fds(self._socket, 16, 1)
        if not descriptors:
            raise MountError("the mount failed", int(error or errno.EIO))
        mount = self.mount_there()
        if mount is None:
            os.close(descriptors[0])
            raise MountError("unmounted as soon as it was mounted")
        return Connection(descriptors[0], mount.device, mount.mountpoint, self._uid, self._gid)

    def unmount(self) -> None:
        """Take away what it has mounted."""
        self._socket.send(b"unmount")
        self._socket.recv(16)


def _help(supervisor: socket.socket, tid: int, target: bytes) -> None:
    """Be a `_Helper`: say an errno, or who mounts and the place; then do what is asked, saying an errno each time."""
    try:
        descriptor = _go_where(tid, target)
        place = os.fsencode(Path.cwd()) if descriptor is not None else b""
    except MountError as error:
        supervisor.send(b"%d 0 0 " % error.number)
        return
    except OSError as error:
        supervisor.send(b"%d 0 0 " % (error.errno or errno.EIO))
        return
    supervisor.send(b"0 %d %d %s" % (os.geteuid(), os.getegid(), place))
    flags, _, source = supervisor.recv(2 * _PAGE).partition(b" ")
    if not flags:
        return
    if descriptor is None:
        supervisor.send(b"%d" % errno.ENOTDIR)
        return
    try:
        mounting.mount_fuse(descriptor, os.fsdecode(source), Path(), allow_other=True, flags=int(flags))
    except MountError as error:
        supervisor.send(b"%d" % error.number)
    except OSError as error:
        supervisor.send(b"%d" % (error.errno or errno.EIO))
    else:
        socket.send_fds(supervisor, [b"0"], [descriptor])
        if supervisor.recv(16):
            mounting.system_umount(Path.cwd(), mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)
            supervisor.send(b"0")


def _go_where(tid: int, target: bytes) -> int | None:
    """Go where a path leads a task, and return a descriptor of /dev/fuse to mount there; None: it is no directory."""
    root, directory = (os.open(f"/proc/{tid}/{name}", os.O_PATH | os.O_CLOEXEC) for name in ("root", "cwd"))
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
    # Find the place as the task would, then leave its root again: /proc/self/mountinfo shows what is below.
    whole = os.open("/", os.O_PATH | os.O_CLOEXEC)
    os.fchdir(root)
    os.chroot(".")
    os.fchdir(directory)
    uid, gid = (int(task[name].split()[_FILE_SYSTEM]) for name in (b"Uid", b"Gid"))
    with calls.with_rights_of(uid, gid, int(task[b"CapEff"], 16)):
        place = os.open(target, os.O_PATH | os.O_CLOEXEC)
    os.fchdir(whole)
    os.chroot(".")
    try:
        os.fchdir(place)
    except NotADirectoryError:
        os.close(descriptor)
        return None
    return descriptor


# Which of the four numbers in /proc/TID/status.
_EFFECTIVE: Final = 1
_FILE_SYSTEM: Final = 3


def _become_owner(task: Mapping[bytes, bytes]) -> None:
    """Become who a mount in this user namespace belongs to: its root, as in the kernel.

    Where there is no root in it, the kernel's belongs to nobody, and can be used by nobody. That is of no use to
    anyone, and FUSE wants a user: then it is the task's.
    """
    for change, name, ids in ((os.setresgid, "gid_map", b"Gid"), (os.setresuid, "uid_map", b"Uid")):
        has_root = any(line.split()[0] == "0" for line in Path("/proc/self", name).read_text().splitlines())
        number = 0 if has_root else int(task[ids].split()[_EFFECTIVE])
        change(number, number, number)
