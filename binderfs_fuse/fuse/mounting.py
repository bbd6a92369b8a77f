"""Mounting and unmounting: with the right to by system calls, without it by fusermount3; and what mountinfo says of it.

A mount belongs to whoever holds the descriptor of /dev/fuse that it was made with: once that is closed, the mount is
dead, and every use of it is answered ENOTCONN until it is unmounted.

Theory of operation. The directory to mount on may belong to another user, who can rename it, and put a link in its
place, at any moment. So a path is used once, to open that directory (`place`), and the descriptor is mounted on: a
mount that is not attached yet (fsmount) is moved there by descriptor (move_mount). A descriptor of the new mount's root
names the mount from then on. Where the kernel or a filter has no fsopen, and with fusermount3, the mount is looked for
afterwards, by what it was mounted on; if it is not there it is taken away, and the call fails. Unmounting begins with a
line of mountinfo. Its path is opened, and the number of the mount that this leads to must be the line's.

Invariants:
- Nothing is mounted on a path. No mount is left by a call that fails.
- A lazy unmount goes by a descriptor of the mount. One that is not lazy cannot, since a descriptor makes a mount busy:
  it goes by a name in the directory that led to the right mount just before, without following a link.
- A descriptor of a mount's root is not kept by a server: `Connection` has none.
- The text of mountinfo is bytes until it has been cut into fields.

Sources: mount(2), umount2(2), fsopen(2), fsconfig(2), fsmount(2), move_mount(2), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import secrets
import select
import shutil
import socket
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse.host import places, procfs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_log = logging.getLogger(__name__)

FUSE_DEVICE: Final = "/dev/fuse"
SUBTYPE: Final = "binder"
TYPE: Final = f"fuse.{SUBTYPE}"
"""What /proc/mounts calls such a mount."""

# <sys/mount.h>; the kernel's binderfs lets nothing be executed from it either.
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

MS_NOATIME: Final = 1 << 10
MS_NODIRATIME: Final = 1 << 11
MS_STRICTATIME: Final = 1 << 24
MS_LAZYTIME: Final = 1 << 25

# <linux/mount.h>, and the numbers of the system calls, which are the same on every machine that is known here.
_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSMOUNT_CLOEXEC: Final = 1
_LONGEST_STRING: Final = 255
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_MOUNT_ATTR_NOSUID: Final = 0x02
_MOUNT_ATTR_NODEV: Final = 0x04
_MOUNT_ATTR_NOEXEC: Final = 0x08
_MOUNT_ATTR_NOATIME: Final = 0x10
_MOUNT_ATTR_STRICTATIME: Final = 0x20
_MOUNT_ATTR_NODIRATIME: Final = 0x80

# How often a mount is looked for whose place is renamed meanwhile, and the seconds between.
_TRIES: Final = 50
_PAUSE: Final = 0.002

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


class MountError(Exception):
    """What is wrong, and what to do about it, in one line; `number` is the errno that mount(2) would give."""

    def __init__(self, text: str, number: int = errno.EINVAL) -> None:
        super().__init__(text)
        self.number = number


def system_mount(source: str, target: str | Path, kind: str, flags: int, data: str = "") -> None:
    """Call mount(2). Raises `OSError`."""
    if _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), flags, os.fsencode(data)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def system_umount(target: str | Path, flags: int = 0) -> None:
    """Call umount2(2). Raises `OSError`."""
    if _libc.umount2(os.fsencode(target), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo.

    `number` tells mounts apart, `device` is st_dev of everything in it, `root` the directory of the file system that is
    seen at `mountpoint`, `parent` the number of the mount that this one is mounted on.
    """

    number: int
    device: int
    root: str
    mountpoint: Path
    options: str
    type: str
    source: str
    parent: int = 0

    @property
    def is_ours(self) -> bool:
        """Tell whether this is, or was, served by this package."""
        return self.type == TYPE

    @property
    def shows_root(self) -> bool:
        """Tell whether it shows the whole file system, and not, as a bind mount may, a file or directory of it."""
        return self.root == "/"


def _unescape(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def parse_mountinfo(text: bytes) -> list[Mount]:
    """Read the text of a mountinfo file; the order is the kernel's, with later mounts over earlier ones."""
    mounts = []
    for line in procfs.lines(text):
        # The kernel escapes blanks, tabs, newlines and backslashes in every field that somebody may choose.
        place, _, kind = line.partition(b" - ")
        number, parent, device, root, mountpoint, options, *_ = place.split(b" ")
        file_system, source, _ = kind.split(b" ", 2)
        major, minor = device.split(b":")
        mounts.append(
            Mount(
                int(number),
                os.makedev(int(major), int(minor)),
                _unescape(root),
                Path(_unescape(mountpoint)),
                _unescape(options),
                _unescape(file_system),
                _unescape(source),
                int(parent),
            )
        )
    return mounts


def mounts(process: int | str = "self") -> list[Mount]:
    """Return what is mounted in a process' mount namespace, as seen from its root directory.

    Raises `OSError`; `MountError` where that of this process itself cannot be had.
    """
    try:
        return parse_mountinfo(procfs.read(f"{procfs.root}/{process}/mountinfo"))
    except FileNotFoundError as error:
        if process != "self":
            raise
        raise MountError("there is no /proc/self/mountinfo: `mount -t proc proc /proc` first", errno.ENOENT) from error


def mount_at(mountpoint: Path, process: int | str = "self") -> Mount | None:
    """Return the mount that a process sees at this (absolute, resolved) path. Raises `OSError`."""
    return next((mount for mount in reversed(mounts(process)) if mount.mountpoint == mountpoint), None)


def mount_of(descriptor: int) -> Mount | None:
    """Return the mount whose root a descriptor is; None where it is something inside one. Raises `OSError`."""
    table = mounts()
    number = places.mount_number(descriptor)
    path = Path(os.fsdecode(places.path_of(descriptor)))
    return next((mount for mount in table if mount.number == number and mount.mountpoint == path), None)


def open_root(mount: Mount) -> int:
    """Return an O_PATH descriptor of a mount's root.

    Raises `OSError`: ENOENT where the mount's path leads to another mount, or is not there any more.
    """
    descriptor = os.open(mount.mountpoint, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _demand(descriptor, mount)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _demand(descriptor: int, mount: Mount) -> None:
    if places.mount_number(descriptor) != mount.number:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(mount.mountpoint))


def is_dead(root: int) -> bool:
    """Tell whether the server of the mount of this descriptor is gone; waits for it if it is there."""
    try:
        # Not stat, whose answer the kernel may still have.
        os.statvfs(root)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


@dataclass(frozen=True, slots=True)
class Connection:
    """A mount that waits for a server.

    `descriptor` is that of /dev/fuse to answer on, `device` st_dev of the mount, `uid` and `gid` who made it, as the
    user namespace that it was made in numbers them.
    """

    descriptor: int
    device: int
    mountpoint: Path
    uid: int
    gid: int


@contextlib.contextmanager
def place_at(mountpoint: Path) -> Iterator[int]:
    """Give a descriptor of the directory that an absolute path leads to.

    Raises `MountError`: ENOTDIR, EACCES where another user's symbolic link is on the way, or as open(2) does.
    """
    try:
        place = places.walk(os.fsencode(mountpoint.absolute()))
    except OSError as error:
        raise unreachable(mountpoint, error) from error
    try:
        yield place
    finally:
        os.close(place)


def unreachable(mountpoint: Path, error: OSError) -> MountError:
    """Say that a path leads nowhere."""
    number = error.errno or errno.EINVAL
    if isinstance(error, places.StrangersLinkError):
        text = f"user {error.owner} can turn it round at any moment: name the place that it leads to"
        return MountError(f"a symbolic link of another user is on the way to {mountpoint}, and {text}", number)
    if number == errno.ELOOP:
        return MountError(f"{mountpoint} leads nowhere: it is a loop of symbolic links", number)
    return MountError(f"{mountpoint} cannot be reached: {error.strerror}", number)


def connect(source: str, mountpoint: Path, *, allow_other: bool, flags: int = 0) -> Connection:
    """Mount at a directory, by its absolute path. `flags` are MS_ bits over those that are always set.

    Raises `MountError`.
    """
    with place_at(mountpoint) as place:
        connection, root = mount_on(place, source, mountpoint, allow_other=allow_other, flags=flags)
    os.close(root)
    return connection


def mount_on(place: int, source: str, mountpoint: Path, *, allow_other: bool, flags: int = 0) -> tuple[Connection, int]:
    """Mount on the directory of a descriptor; return also an O_PATH descriptor of the new mount's root.

    `mountpoint` is the absolute path that led to the directory. While that descriptor is open the mount cannot be
    unmounted but lazily. Raises `MountError`: EAGAIN where the path leads elsewhere now.
    """
    try:
        descriptor, root = _mount_directly(place, source, mountpoint, allow_other=allow_other, flags=flags)
    except PermissionError as error:
        if not os.geteuid():
            raise _forbidden(mountpoint, error) from error
        descriptor, root = _mount_with_fusermount(place, source, mountpoint, allow_other=allow_other)
    try:
        _let_renames_end(place)
        _confirm(mountpoint, root)
        path = Path(os.fsdecode(places.path_of(root)))
        return Connection(descriptor, places.device_number(root), path, os.geteuid(), os.getegid()), root
    except BaseException:
        take_away(root)
        os.close(root)
        os.close(descriptor)
        raise


def _let_renames_end(place: int) -> None:
    """Wait until no rename of a directory, which is mounted on by now, is under way.

    The kernel renames no directory that is mounted on. But it looks whether one is before it renames, and a mount that
    comes between the two moves along. While it renames, it holds the lock of the directory above. To unlink there takes
    that lock; the name is one that nobody can have made.
    """
    with contextlib.suppress(OSError):
        above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place)
        try:
            os.unlink(f".binderfs-{secrets.token_hex(16)}", dir_fd=above)
        finally:
            os.close(above)


def _confirm(mountpoint: Path, root: int) -> None:
    """Make sure that a path leads to the mount of this descriptor: its directory may have got another name."""
    with place_at(mountpoint) as there:
        if places.mount_number(there) != places.mount_number(root):
            text = f"{mountpoint} was given to something else while it was mounted on: nothing is mounted"
            raise MountError(text, errno.EAGAIN)


def take_away(root: int) -> None:
    """Unmount what has just been mounted, by a descriptor of its root, if it is mounted still."""
    try:
        detach(root)
    except PermissionError:
        there = mount_of(root)
        if there is not None:
            with contextlib.suppress(MountError):
                unmount(there, lazy=True)
    except OSError:
        # It is unmounted.
        pass


def _forbidden(mountpoint: Path, error: PermissionError) -> MountError:
    if error.filename == FUSE_DEVICE:
        return MountError(_closed(error), errno.EPERM)
    reason = f"no right to mount at {mountpoint} ({error.strerror})"
    advice = f"give the container CAP_SYS_ADMIN and {FUSE_DEVICE}, or try it under `unshare -Urm`"
    return MountError(f"{reason}: {advice}", errno.EPERM)


def _closed(error: PermissionError) -> str:
    """Say that /dev/fuse does not let this user in, and what to do about it."""
    text = f"{FUSE_DEVICE} cannot be opened ({error.strerror})"
    if error.errno == errno.EPERM:
        return f"{text}: let the container have it, with `--device {FUSE_DEVICE}`"
    mode = stat.S_IMODE(Path(FUSE_DEVICE).stat().st_mode)
    return f"{text}: its mode is {mode:04o}; `chmod 666 {FUSE_DEVICE}`, by the machine's root, opens it to all"


def _mount_directly(place: int, source: str, mountpoint: Path, *, allow_other: bool, flags: int) -> tuple[int, int]:
    descriptor = open_fuse()
    try:
        root = mount_fuse(descriptor, place, source, mountpoint, allow_other=allow_other, flags=flags)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, _LostError):
            _sweep(error.before)
        raise
    return descriptor, root


class _LostError(MountError):
    """What has just been mounted is not there; `before` has the numbers of the mounts that were there before."""

    def __init__(self, before: Collection[int]) -> None:
        super().__init__("unmounted, or moved away, as soon as it was mounted", errno.EAGAIN)
        self.before = before


def open_fuse() -> int:
    """Open /dev/fuse. Raises `PermissionError`, `MountError`."""
    try:
        return os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MountError(
            f"there is no {FUSE_DEVICE}: load the kernel's module with `modprobe fuse`, "
            f"or start the container with `--device {FUSE_DEVICE}`",
            errno.ENODEV,
        ) from error
    except PermissionError:
        raise
    except OSError as error:
        raise MountError(
            f"{FUSE_DEVICE} cannot be opened ({error.strerror}): is the kernel's fuse module there?", errno.ENODEV
        ) from error


def mount_fuse(descriptor: int, place: int, source: str, mountpoint: Path, *, allow_other: bool, flags: int) -> int:
    """Mount a descriptor of /dev/fuse on the directory of another; return an O_PATH descriptor of the mount's root.

    Raises `PermissionError`, `MountError`.
    """
    options = {"rootmode": f"{stat.S_IFDIR:o}", "user_id": str(os.geteuid()), "group_id": str(os.getegid())}
    options |= {"fd": str(descriptor), "default_permissions": "", **({"allow_other": ""} if allow_other else {})}
    # Unlike other types, FUSE takes no empty source.
    source = source or "none"
    try:
        root = _make_mount(source, options, flags)
        if root is None:
            return _mount_on_descriptor(place, source, options, flags)
    except PermissionError:
        raise
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise MountError("the kernel has no FUSE: load the module with `modprobe fuse`", errno.ENODEV) from error
        raise _failed(mountpoint, error) from error
    try:
        _system_call(_SYS_MOVE_MOUNT, root, b"", place, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)
    except OSError as error:
        os.close(root)
        if isinstance(error, PermissionError):
            raise
        raise _failed(mountpoint, error) from error
    return root


def _failed(mountpoint: Path, error: OSError) -> MountError:
    return MountError(f"cannot mount at {mountpoint}: {error.strerror}", error.errno or errno.EINVAL)


def _make_mount(source: str, options: dict[str, str], flags: int) -> int | None:
    """Make a mount that is not attached anywhere; return a descriptor of its root.

    None: there are no such system calls, a filter hides them, or they do not take the source. Raises `OSError`.
    """
    if len(os.fsencode(source)) > _LONGEST_STRING:
        return None
    try:
        context = _system_call(_SYS_FSOPEN, b"fuse", _FSOPEN_CLOEXEC)
    except OSError as error:
        # Where it is the right that is missing, mount(2) says so again.
        if error.errno in (errno.ENOSYS, errno.EPERM):
            return None
        raise
    try:
        for name, value in {"source": source, "subtype": SUBTYPE, **options}.items():
            _configure(context, name, value)
        if flags & MS_LAZYTIME:
            _configure(context, "lazytime", "")
        _system_call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _system_call(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, _attributes(flags))
    finally:
        os.close(context)


def _configure(context: int, name: str, value: str) -> None:
    kind, text = (_FSCONFIG_SET_STRING, os.fsencode(value)) if value else (_FSCONFIG_SET_FLAG, None)
    _system_call(_SYS_FSCONFIG, context, kind, name.encode(), text, 0)


def _attributes(flags: int) -> int:
    """Return the MOUNT_ATTR_ bits of MS_ bits."""
    bits = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
    if flags & MS_STRICTATIME:
        bits |= _MOUNT_ATTR_STRICTATIME
    elif flags & MS_NOATIME:
        bits |= _MOUNT_ATTR_NOATIME
    return bits | (_MOUNT_ATTR_NODIRATIME if flags & MS_NODIRATIME else 0)


def _system_call(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call that the C library may not have. Raises `OSError`."""
    passed = [ctypes.c_long(each) if isinstance(each, int) else ctypes.c_char_p(each) for each in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *passed)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _mount_on_descriptor(place: int, source: str, options: dict[str, str], flags: int) -> int:
    """Mount by mount(2), on what a descriptor refers to. Raises `OSError`, `MountError`."""
    data = ",".join(f"{name}={value}" if value else name for name, value in options.items())
    before = {mount.number for mount in mounts()}
    system_mount(source, f"{procfs.root}/self/fd/{place}", TYPE, MS_NOSUID | MS_NODEV | MS_NOEXEC | flags, data)
    root = _landed(place, before)
    if root is None:
        raise _LostError(before)
    return root


def _landed(place: int, before: Collection[int]) -> int | None:
    """Return a descriptor of the mount that is on a directory now, and was not `before`; None: there is none."""
    parent = places.mount_number(place)
    for _ in range(_TRIES):
        path = Path(os.fsdecode(places.path_of(place)))
        for mount in reversed(mounts()):
            if mount.is_ours and mount.parent == parent and mount.mountpoint == path and mount.number not in before:
                # Somebody may rename the directory, or one above it, at any moment.
                with contextlib.suppress(OSError):
                    return open_root(mount)
        time.sleep(_PAUSE)
    return None


def _fusermount() -> str:
    program = shutil.which("fusermount3")
    if program is None:
        raise MountError(
            "mounting without root takes fusermount3: install the package fuse3, or use `unshare -Urm`", errno.EPERM
        )
    return program


def _mount_with_fusermount(place: int, source: str, mountpoint: Path, *, allow_other: bool) -> tuple[int, int]:
    """Let the setuid helper mount, and take the descriptor that it sends.

    It takes nothing but a path, which it looks at itself. What it has mounted elsewhere is taken away.
    """
    before = {mount.number for mount in mounts()}
    descriptor = _ask_fusermount(places.path_of(place), source, mountpoint, allow_other=allow_other)
    root = _landed(place, before)
    if root is None:
        os.close(descriptor)
        _sweep(before)
        raise MountError(f"{mountpoint} was not what fusermount3 mounted on", errno.EAGAIN)
    return descriptor, root


def _sweep(before: Collection[int]) -> None:
    """Unmount what has come since `before` and has no server any more."""
    for mount in mounts():
        if not mount.is_ours or mount.number in before:
            continue
        with contextlib.suppress(OSError, MountError):
            root = open_root(mount)
            try:
                dead = is_dead(root)
            finally:
                os.close(root)
            if dead:
                unmount(mount, lazy=True)


def _ask_fusermount(path: bytes, source: str, mountpoint: Path, *, allow_other: bool) -> int:
    escaped = (source or "none").replace("\\", "\\\\").replace(",", "\\,")
    options = f"fsname={escaped},subtype={SUBTYPE},nosuid,nodev,noexec,default_permissions"
    if allow_other:
        options += ",allow_other"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        result = subprocess.run(  # noqa: S603 - there is no shell in between
            [_fusermount(), "-o", options, "--", path],
            env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno()), "LC_ALL": "C"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        theirs.close()
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if result.returncode or not descriptors:
        said = " ".join(result.stderr.split()) or f"status {result.returncode}"
        if f"failed to open {FUSE_DEVICE}" in said:
            try:
                os.close(open_fuse())
            except PermissionError as error:
                said += f"; {_closed(error)}"
        raise MountError(f"no right to mount at {mountpoint}, and fusermount3 refused: {said}", errno.EPERM)
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def unmount(mount: Mount, *, lazy: bool = False) -> None:
    """Unmount this very mount; `lazy`: at once from the tree, and wholly when it is used no more.

    Raises `BlockingIOError` (EBUSY) while it is in use and not `lazy`, `MountError` for everything else: ESTALE where
    its path has come to lead elsewhere.
    """
    mountpoint = mount.mountpoint
    unique = None
    try:
        unique = unmount_directly(mount, lazy=lazy)
    except PermissionError:
        _unmount_with_fusermount(mountpoint, lazy=lazy)
    except FileNotFoundError as error:
        raise MountError(f"{mountpoint} leads to something else now: nothing is unmounted", errno.ESTALE) from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BlockingIOError(errno.EBUSY, error.strerror, str(mountpoint)) from error
        raise MountError(f"cannot unmount {mountpoint}: {error.strerror}", error.errno or errno.EINVAL) from error
    if unique is not None and _is_mounted(mount, unique):
        raise MountError(f"{mountpoint} is mounted still: it was moved while it was unmounted", errno.ESTALE)


def _is_mounted(mount: Mount, unique: int) -> bool:
    """Tell whether a mount is in the tree: the kernel soon gives its number, and st_dev, to another one."""
    for other in mounts():
        if (other.number, other.device) == (mount.number, mount.device):
            with contextlib.suppress(OSError):
                root = open_root(other)
                try:
                    return places.unique_mount(root) == unique
                finally:
                    os.close(root)
    return False


def unmount_directly(mount: Mount, *, lazy: bool) -> int | None:
    """Unmount this very mount by umount2(2); return its number as `places.unique_mount` does.

    Raises `OSError`: ENOENT where its path leads elsewhere.
    """
    folder, name = os.path.split(mount.mountpoint)
    above = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        root = os.open(name or ".", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        try:
            _demand(root, mount)
            unique = places.unique_mount(root)
            if lazy:
                detach(root)
                return unique
        finally:
            os.close(root)
        # Between these two, the owner of the directory may put another of our mounts there: it is seen afterwards.
        system_umount(f"{procfs.root}/self/fd/{above}/{name or '.'}", UMOUNT_NOFOLLOW)
        return unique
    finally:
        os.close(above)


def detach(root: int) -> None:
    """Take the mount of this descriptor, which is of its root, out of the tree. Raises `OSError`."""
    system_umount(f"{procfs.root}/self/fd/{root}", MNT_DETACH)


def _unmount_with_fusermount(mountpoint: Path, *, lazy: bool) -> None:
    result = subprocess.run(  # noqa: S603 - there is no shell in between
        [_fusermount(), "-u", *(["-z"] if lazy else []), "--", str(mountpoint)],
        env=os.environ | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        said = " ".join(result.stderr.split())
        if os.strerror(errno.EBUSY) in said:
            raise BlockingIOError(errno.EBUSY, said, str(mountpoint))
        raise MountError(f"no right to unmount {mountpoint}, and fusermount3 refused: {said}", errno.EPERM)


def disconnect(connection: Connection) -> None:
    """Take every mount of this connection out of this mount namespace, wherever it has been moved or bound to."""
    poll = select.poll()
    poll.register(connection.descriptor, 0)
    for _ in range(_TRIES):
        if poll.poll(0):
            # It has come to its end already, and st_dev may be another one's by now.
            return
        try:
            found = [mount for mount in mounts() if mount.device == connection.device]
        except MountError as error:
            # It is dead with this process's end, and the next one for this place takes it away.
            _log.warning("%s stays mounted: %s", connection.mountpoint, error)
            return
        for mount in reversed(found):
            # Somebody else may be quicker, or have renamed a directory on the way: then it is looked for again.
            with contextlib.suppress(MountError):
                unmount(mount, lazy=True)
        if not found:
            return
        time.sleep(_PAUSE)
    _log.warning("%s stays mounted: it is moved again and again", connection.mountpoint)
