"""A mount namespace with binder devices in it: what ``mount.py run`` gives to its command.

/dev there is a tmpfs into which everything of the old /dev is bound, so that names can be added without touching the
machine's own. /proc/filesystems names binder. Nothing of it is seen outside, and it goes with the last process inside.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse.command.calls import CLONE_NEWNS, CLONE_NEWUSER, unshare
from binderfs_fuse.fuse.mounting import (
    MNT_DETACH,
    MountError,
    mounts,
    system_mount,
    system_umount,
    unmount_directly,
)

if TYPE_CHECKING:
    from collections.abc import Collection

# <sys/mount.h>
_MS_NOSUID: Final = 1 << 1
_MS_NOEXEC: Final = 1 << 3
_MS_BIND: Final = 1 << 12
_MS_MOVE: Final = 1 << 13
_MS_REC: Final = 1 << 14
_MS_SLAVE: Final = 1 << 19

BINDERFS: Final = Path("/dev/binderfs")
_FILESYSTEMS: Final = Path("/proc/filesystems")


def enter() -> None:
    """Move this process into a mount namespace of its own, and a user namespace too where it takes that.

    In the latter, the user and group remain what they are, and all others are nobody's. Raises `MountError`.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        unshare(CLONE_NEWNS)
    except PermissionError:
        try:
            unshare(CLONE_NEWUSER | CLONE_NEWNS)
        except OSError as error:
            raise MountError(
                f"no right to make a mount namespace, nor a user namespace ({error.strerror}): be root, or allow them "
                "(sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
                "kernel.apparmor_restrict_unprivileged_userns)",
                errno.EPERM,
            ) from error
        _map_user(uid, gid)
    # What is mounted on the machine later still appears here, but nothing of ours there.
    try:
        system_mount("none", "/", "", _MS_SLAVE | _MS_REC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise MountError(
            "the root directory is a chroot's and no mount point, so what is mounted here would be seen outside: "
            "`mount --bind DIRECTORY DIRECTORY` before `chroot DIRECTORY` makes it one",
            errno.EINVAL,
        ) from error
    # The other way round too: our copies of such mounts would keep them alive when they are unmounted there.
    for mount in mounts():
        if mount.is_ours:
            with contextlib.suppress(OSError):
                unmount_directly(mount, lazy=True)


def _map_user(uid: int, gid: int) -> None:
    """Keep the user and the group in a new user namespace."""
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError as error:
        # Root's, and that takes CAP_SETFCAP: a file's capabilities go by who is root.
        needed = "give it CAP_SYS_ADMIN or CAP_SETFCAP, or run it as another user" if uid == 0 else "run it as root"
        raise MountError(
            f"no right to be user {uid} in a user namespace ({error.strerror}): {needed}", errno.EPERM
        ) from error


def furnish_dev(devices: Collection[str]) -> None:
    """Give this namespace a /dev of its own, with an empty directory binderfs and symbolic links to devices in it."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise MountError(
            "there is no folder for temporary files that can be written to: name one in TMPDIR", errno.ENOENT
        ) from error
    stage = Path(tempfile.mkdtemp(prefix="binderfs-dev-"))
    try:
        _furnish(stage, devices)
    finally:
        stage.rmdir()


def _furnish(stage: Path, devices: Collection[str]) -> None:
    system_mount("binderfs-dev", stage, "tmpfs", _MS_NOSUID | _MS_NOEXEC, "mode=755,size=64k")
    try:
        for entry in Path("/dev").iterdir():
            if entry.name not in {BINDERFS.name, *devices}:
                _bind(entry, stage / entry.name)
        (stage / BINDERFS.name).mkdir()
        for name in devices:
            (stage / name).symlink_to(Path(BINDERFS.name, name))
        system_mount(str(stage), "/dev", "", _MS_MOVE)
    except OSError:
        system_umount(stage, MNT_DETACH)
        raise


def _bind(entry: Path, target: Path) -> None:
    if entry.is_symlink():
        target.symlink_to(entry.readlink())
        return
    if entry.is_dir():
        target.mkdir()
    else:
        target.touch(0o600)
    system_mount(str(entry), target, "", _MS_BIND | _MS_REC)


def name_binder() -> None:
    """Let /proc/filesystems list binder, as where the kernel has it."""
    text = _FILESYSTEMS.read_text()
    if "\tbinder\n" in text:
        return
    with tempfile.NamedTemporaryFile("w", prefix="binderfs-filesystems-") as file:
        file.write(text + "nodev\tbinder\n")
        file.flush()
        os.fchmod(file.fileno(), stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
        system_mount(file.name, _FILESYSTEMS, "", _MS_BIND)
