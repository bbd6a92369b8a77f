"""Files and directories by descriptor: what a path leads to is found once, and what is found is named by a descriptor.

Theory of operation. Whoever may write to a directory can make a name in it lead elsewhere at any moment. A path that is
used twice may so lead to two places, and one that goes through another user's symbolic link leads where that user
chooses. So `walk` goes along a path one name at a time, each looked up in the directory that the last step opened, and
follows no link of another user. It returns an O_PATH descriptor: that stays the same place whatever is renamed. No
file system is asked for anything but names, so a mount whose server does not answer can be walked up to.

Invariants:
- A name is looked up once. What is known of a link was read from the descriptor that the lookup returned.
- A link is followed only if it is root's, this process's own user's, or of a user whom this user namespace cannot name.
- A descriptor that is not returned is closed.

Sources: open(2), path_resolution(7), symlink(7), statx(2), proc_pid_fdinfo(5).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from typing import Final, NamedTuple

from binderfs_fuse.host import procfs

_MOST_LINKS: Final = 40
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_BASIC_STATS: Final = 0x7FF
_STATX_MNT_ID: Final = 0x1000
_STATX_MNT_ID_UNIQUE: Final = 0x4000
_STATX: Final = struct.Struct("=I16xI4xH2xQ96xIIQ104x")
"""The struct statx: mask, owner, mode, inode, major and minor number of the device, and the mount's number."""

_libc = ctypes.CDLL(None, use_errno=True)


class StrangersLinkError(OSError):
    """A path leads through a symbolic link of another user: EACCES. `owner` is that user's id."""

    def __init__(self, path: bytes, owner: int) -> None:
        super().__init__(errno.EACCES, f"a symbolic link of user {owner} is on the way", os.fsdecode(path))
        self.owner = owner


class Identity(NamedTuple):
    """What a descriptor refers to: `mount` as in mountinfo, st_dev, st_ino, st_mode and the owner."""

    mount: int
    device: int
    inode: int
    mode: int
    owner: int


def identify(descriptor: int) -> Identity:
    """Tell what a descriptor refers to, from what the kernel knows without asking a file system.

    Raises `OSError`: EACCES for a FUSE file system that this process may not use.
    """
    _, owner, mode, inode, major, minor, _ = _statx(descriptor, _STATX_BASIC_STATS | _STATX_MNT_ID)
    return Identity(mount_number(descriptor), os.makedev(major, minor), inode, mode, owner)


def mount_number(descriptor: int) -> int:
    """Return the number of the mount that a descriptor was opened in. Raises `OSError`."""
    # Asked for nothing, FUSE says what it is of also to those who may not use it.
    try:
        mask, *_, number = _statx(descriptor, 0)
    except OSError:
        mask = number = 0
    if not mask & _STATX_MNT_ID:
        return int(procfs.fields(procfs.read(f"{procfs.root}/self/fdinfo/{descriptor}"))[b"mnt_id"])
    return number


def unique_mount(descriptor: int) -> int | None:
    """Return the number of a mount that no other gets after it; None before Linux 6.8, or where it may not be asked."""
    try:
        mask, *_, number = _statx(descriptor, _STATX_MNT_ID_UNIQUE)
    except OSError:
        return None
    return number if mask & _STATX_MNT_ID_UNIQUE else None


def device_number(descriptor: int) -> int:
    """Return st_dev of what a descriptor refers to, without asking its file system. Raises `OSError`."""
    *_, major, minor, _ = _statx(descriptor, 0)
    return os.makedev(major, minor)


def _statx(descriptor: int, mask: int) -> tuple[int, ...]:
    buffer = ctypes.create_string_buffer(_STATX.size)
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    if _libc.statx(descriptor, b"", flags, mask, buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return _STATX.unpack(buffer.raw)


def path_of(descriptor: int) -> bytes:
    """Return the path that a descriptor's file has now, from this process's root on. Raises `OSError`."""
    return os.readlink(f"{procfs.root}/self/fd/{descriptor}".encode())  # noqa: PTH115 - a name of any bytes


def walk(path: bytes) -> int:
    """Return an O_PATH descriptor of what an absolute path leads to; a symbolic link at its end is followed too.

    Raises `OSError`: ELOOP after 40 links, `StrangersLinkError`, or as open(2) does.
    """
    names = _names(path)
    here = _open(b"/", None)
    try:
        links = 0
        while names:
            name = names.pop()
            there = _open(name, here)
            target = None
            try:
                target = _link(there, path)
                links += target is not None
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(path))
            except BaseException:
                os.close(there)
                raise
            if target is None:
                os.close(here)
                here = there
                continue
            os.close(there)
            if target.startswith(b"/"):
                os.close(here)
                here = _open(b"/", None)
            names += _names(target)
    except BaseException:
        os.close(here)
        raise
    return here


def _names(path: bytes) -> list[bytes]:
    """Return the names in a path, the first one last; a slash at the end asks for a directory, as a dot does."""
    names = [name for name in path.split(b"/") if name]
    return [*([b"."] if path.endswith(b"/") and names else []), *reversed(names)]


def _open(name: bytes, directory: int | None) -> int:
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)


def is_directory(descriptor: int) -> bool:
    """Tell whether a descriptor refers to a directory, without asking its file system. Raises `OSError`."""
    try:
        os.close(os.open(f"{procfs.root}/self/fd/{descriptor}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except NotADirectoryError:
        return False
    return True


def _link(descriptor: int, path: bytes) -> bytes | None:
    """Return where a symbolic link leads; None: it is none. Raises `StrangersLinkError`."""
    if is_directory(descriptor):
        return None
    try:
        found = identify(descriptor)
    except PermissionError:
        # Of a FUSE file system of another user only the root, which is no link, is reached.
        return None
    if not stat.S_ISLNK(found.mode):
        return None
    if found.owner not in (0, os.geteuid()) and _is_known(found.owner):
        raise StrangersLinkError(path, found.owner)
    return os.readlink(b"", dir_fd=descriptor)


def _is_known(user: int) -> bool:
    """Tell whether this process's user namespace has a user of this id: others all look like one, who is none."""
    rows = [
        [int(number) for number in line.split()] for line in procfs.lines(procfs.read(f"{procfs.root}/self/uid_map"))
    ]
    return any(first <= user < first + count for first, _, count in rows)
