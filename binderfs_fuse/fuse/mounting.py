"""Mounting and unmounting: mount(2) where there is the right to, fusermount3 elsewhere; and what mountinfo says of it.

A mount belongs to whoever holds the descriptor of /dev/fuse that it was made with: once that is closed, the mount is
dead, and every use of it is answered ENOTCONN until it is unmounted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import select
import shutil
import socket
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
    seen at `mountpoint`.
    """

    number: int
    device: int
    root: str
    mountpoint: Path
    options: str
    type: str
    source: str

    @property
    def is_ours(self) -> bool:
        """Tell whether this is, or was, served by this package."""
        return self.type == TYPE

    @property
    def shows_root(self) -> bool:
        """Tell whether it shows the whole file system, and not, as a bind mount may, a file or directory of it."""
        return self.root == "/"


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def parse_mountinfo(text: str) -> list[Mount]:
    """Read the text of a mountinfo file; the order is the kernel's, with later mounts over earlier ones."""
    mounts = []
    # Not splitlines(), nor what open() takes for the end of a line: the kernel escapes only blanks, tabs, newlines and
    # backslashes in paths.
    for line in text.removesuffix("\n").split("\n"):
        place, _, kind = line.partition(" - ")
        number, _, device, root, mountpoint, options, *_ = place.split(" ")
        file_system, source, _ = kind.split(" ", 2)
        major, minor = device.split(":")
        mounts.append(
            Mount(
                int(number),
                os.makedev(int(major), int(minor)),
                _unescape(root),
                Path(_unescape(mountpoint)),
                options,
                file_system,
                _unescape(source),
            )
        )
    return mounts


def mounts(process: int | str = "self") -> list[Mount]:
    """Return what is mounted in a process' mount namespace, as seen from its root directory.

    Raises `OSError`; `MountError` where that of this process itself cannot be had.
    """
    try:
        return parse_mountinfo(os.fsdecode(Path(f"/proc/{process}/mountinfo").read_bytes()))
    except FileNotFoundError as error:
        if process != "self":
            raise
        raise MountError("there is no /proc/self/mountinfo: `mount -t proc proc /proc` first", errno.ENOENT) from error


def mount_at(mountpoint: Path, process: int | str = "self") -> Mount | None:
    """Return the mount that a process sees at this (absolute, resolved) path. Raises `OSError`."""
    return next((mount for mount in reversed(mounts(process)) if mount.mountpoint == mountpoint), None)


def is_dead(mountpoint: Path) -> bool:
    """Tell whether the server of the mount at this path is gone; waits for it if it is there."""
    try:
        # Not stat, whose answer the kernel may still have.
        os.statvfs(mountpoint)
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


def connect(source: str, mountpoint: Path, *, allow_other: bool, flags: int = 0) -> Connection:
    """Mount at a directory, by its absolute and resolved path. `flags` are MS_ bits over those that are always set.

    Raises `MountError`.
    """
    descriptor = _make_mount(source, mountpoint, allow_other=allow_other, flags=flags)
    mount = mount_at(mountpoint)
    if mount is None:
        os.close(descriptor)
        raise MountError(f"{mountpoint} was unmounted as soon as it was mounted")
    return Connection(descriptor, mount.device, mountpoint, os.geteuid(), os.getegid())


def _make_mount(source: str, mountpoint: Path, *, allow_other: bool, flags: int) -> int:
    """Mount, and return the descriptor of /dev/fuse."""
    try:
        return _mount_directly(source, mountpoint, allow_other=allow_other, flags=flags)
    except PermissionError as error:
        if os.geteuid():
            return _mount_with_fusermount(source, mountpoint, allow_other=allow_other)
        if error.filename == FUSE_DEVICE:
            raise MountError(_closed(error), errno.EPERM) from error
        reason = f"no right to mount at {mountpoint} ({error.strerror})"
        raise MountError(
            f"{reason}: give the container CAP_SYS_ADMIN and {FUSE_DEVICE}, or try it under `unshare -Urm`",
            errno.EPERM,
        ) from error


def _closed(error: PermissionError) -> str:
    """Say that /dev/fuse does not let this user in, and what to do about it."""
    text = f"{FUSE_DEVICE} cannot be opened ({error.strerror})"
    if error.errno == errno.EPERM:
        return f"{text}: let the container have it, with `--device {FUSE_DEVICE}`"
    mode = stat.S_IMODE(Path(FUSE_DEVICE).stat().st_mode)
    return f"{text}: its mode is {mode:04o}; `chmod 666 {FUSE_DEVICE}`, by the machine's root, opens it to all"


def _mount_directly(source: str, mountpoint: Path, *, allow_other: bool, flags: int) -> int:
    descriptor = open_fuse()
    try:
        mount_fuse(descriptor, source, mountpoint, allow_other=allow_other, flags=flags)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


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


def mount_fuse(descriptor: int, source: str, mountpoint: Path, *, allow_other: bool, flags: int) -> None:
    """Call mount(2) for a descriptor of /dev/fuse. Raises `PermissionError`, `MountError`."""
    data = f"fd={descriptor},rootmode={stat.S_IFDIR:o},user_id={os.geteuid()},group_id={os.getegid()}"
    data += ",default_permissions" + (",allow_other" if allow_other else "")
    try:
        # Unlike other types, FUSE takes no empty source.
        system_mount(source or "none", mountpoint, TYPE, MS_NOSUID | MS_NODEV | MS_NOEXEC | flags, data)
    except PermissionError:
        raise
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise MountError("the kernel has no FUSE: load the module with `modprobe fuse`", errno.ENODEV) from error
        raise MountError(f"cannot mount at {mountpoint}: {error.strerror}", error.errno or errno.EINVAL) from error


def _fusermount() -> str:
    program = shutil.which("fusermount3")
    if program is None:
        raise MountError(
            "mounting without root takes fusermount3: install the package fuse3, or use `unshare -Urm`", errno.EPERM
        )
    return program


def _mount_with_fusermount(source: str, mountpoint: Path, *, allow_other: bool) -> int:
    """Let the setuid helper mount, and take the descriptor that it sends."""
    escaped = (source or "none").replace("\\", "\\\\").replace(",", "\\,")
    options = f"fsname={escaped},subtype={SUBTYPE},nosuid,nodev,noexec,default_permissions"
    if allow_other:
        options += ",allow_other"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        result = subprocess.run(  # noqa: S603 - there is no shell in between
            [_fusermount(), "-o", options, "--", str(mountpoint)],
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


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount what is at this path; `lazy`: at once from the tree, and wholly when it is used no more.

    Raises `BlockingIOError` (EBUSY) while it is in use and not `lazy`, `MountError` for everything else.
    """
    try:
        system_umount(mountpoint, UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0))
    except PermissionError:
        _unmount_with_fusermount(mountpoint, lazy=lazy)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BlockingIOError(errno.EBUSY, error.strerror, str(mountpoint)) from error
        raise MountError(f"cannot unmount {mountpoint}: {error.strerror}", error.errno or errno.EINVAL) from error


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
    if poll.poll(0):
        # It has come to its end already, and st_dev may be another one's by now.
        return
    try:
        found = mounts()
    except MountError as error:
        # It is dead with this process's end, and the next one for this place takes it away.
        _log.warning("%s stays mounted: %s", connection.mountpoint, error)
        return
    for mount in reversed(found):
        if mount.device == connection.device:
            # Somebody else may be quicker.
            with contextlib.suppress(MountError):
                unmount(mount.mountpoint, lazy=True)
