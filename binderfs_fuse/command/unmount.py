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
    target = ours_at(mountpoint)
    if lazy or is_dead(target):
        mounting.unmount(target, lazy=True)
        return
    with hold(target) as server:
        there = mounting.mount_at(target)
        try:
            _unmount_soon(target)
        except BlockingIOError as error:
            raise MountError(
                f"{mountpoint} is in use: end the programs that have something of it open, "
                f"or take it away from under them with `{program()} -u -l {quoted(mountpoint)}`"
            ) from error
        if there and not there.shows_root:
            return
        others = [str(mount.mountpoint) for mount in mounting.mounts() if there and mount.device == there.device]
        if others:
            raise MountError(
                f"{mountpoint} is unmounted, but its server goes on: it is also mounted at {', '.join(others)}"
            )
        if server is not None and not select.select([server], [], [], _PATIENCE)[0]:
            raise MountError(
                f"{mountpoint} is unmounted here, but its server goes on: another mount namespace still has the mount "
                f"(a container, or `{program()} run`)"
            )


def _unmount_soon(target: Path) -> None:
    deadline = time.monotonic() + _SOON
    while True:
        try:
            mounting.unmount(target)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE)
        else:
            return
