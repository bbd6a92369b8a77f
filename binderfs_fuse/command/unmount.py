"""``mount.py -u MOUNTPOINT``: unmount a binderfs, and wait for its server to end."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Final

from binderfs_fuse.command.program import program, quoted
from binderfs_fuse.command.servers import hold, is_dead, ours_at
from binderfs_fuse.fuse import mounting
from binderfs_fuse.fuse.mounting import MountError

if TYPE_CHECKING:
    from pathlib import Path

    from binderfs_fuse.fuse.mounting import Mount


_PATIENCE: Final = 10.0
"""Seconds that a server is given to end. It does so at once, unless the mount is in some other mount namespace too."""
_SOON: Final = 1.0
"""Seconds for which it is tried again what somebody has open: who has just ended may have left a file to be closed."""
_PAUSE: Final = 0.01


def unmount(mountpoint: Path, *, lazy: bool) -> None:
    """Unmount what is at this path and wait for its server to end.

    `lazy` takes it out of the tree though it is in use, and does not wait: the server ends with the last user. Raises
    `MountError`.
    """
    there = ours_at(mountpoint)
    if lazy or is_dead(there):
        mounting.unmount(there, lazy=True)
        return
    with hold(there) as server:
        # Those of before: the kernel gives st_dev to another file system as soon as this one is gone.
        before = {mount.number for mount in mounting.mounts() if mount.device == there.device}
        try:
            _unmount_soon(there)
        except BlockingIOError as error:
            raise MountError(
                f"{mountpoint} is in use: end the programs that have something of it open, "
                f"or take it away from under them with `{program()} -u -l {quoted(mountpoint)}`"
            ) from error
        if not there.shows_root:
            return
        others = [
            str(mount.mountpoint)
            for mount in mounting.mounts()
            if mount.device == there.device and mount.number in before - {there.number}
        ]
        if others:
            raise MountError(
                f"{mountpoint} is unmounted, but its server goes on: it is also mounted at {', '.join(others)}"
            )
        if server is not None and not select.select([server], [], [], _PATIENCE)[0]:
            raise MountError(
                f"{mountpoint} is unmounted here, but its server goes on: another mount namespace still has the mount "
                f"(a container, or `{program()} run`)"
            )


def _unmount_soon(mount: Mount) -> None:
    deadline = time.monotonic() + _SOON
    while True:
        try:
            mounting.unmount(mount)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE)
        else:
            return
