"""``mount.py [SOURCE] MOUNTPOINT``: mount a binderfs, and serve it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse import uapi
from binderfs_fuse.command.daemon import SYSLOG, close_inherited, in_background, log_to
from binderfs_fuse.command.options import unchangeable
from binderfs_fuse.command.program import program, quoted
from binderfs_fuse.command.servers import information, is_dead, resolve, whole_at
from binderfs_fuse.fuse import control, mounting
from binderfs_fuse.fuse.mounting import MountError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from binderfs_fuse.command.options import Options
    from binderfs_fuse.fuse.mounting import Connection


# How often it is looked whether the devices have been let go of, and after how many seconds each.
_TRIES: Final = 100
_PAUSE: Final = 0.001


def mount(source: str, mountpoint: Path, options: Options, *, foreground: bool) -> None:
    """Mount at a directory; return when the device answers, or, in the foreground, when the mount has ended.

    In the foreground this process becomes the server, and closes what descriptors it has. Raises `MountError`.
    """
    target = usable(mountpoint)

    def connect_and_serve(ready: Callable[[], object]) -> None:
        prepare(options, foreground=foreground)
        connection = mounting.connect(source, target, allow_other=options.allow_other, flags=options.flags)
        serve(connection, options, ready)

    if foreground:
        close_inherited()
        connect_and_serve(lambda: None)
    else:
        in_background(connect_and_serve)
        try:
            check(target, options.settings.devices)
        except MountError:
            mounting.unmount(target, lazy=True)
            raise


def prepare(options: Options, *, foreground: bool = False) -> None:
    """Do what a server can fail in before there is a mount. Raises `MountError`."""
    log_to(_log_destination(options, foreground=foreground), options.log_level)


def serve(
    connection: Connection, options: Options, ready: Callable[[], object], supervisor: socket.socket | None = None
) -> None:
    """Be the server of a mount until that ends. Raises `MountError`; it is unmounted then."""
    # Here, since only a server needs trio and pyfuse3, which take longer to import than all else together.
    from binderfs_fuse.fuse import server  # noqa: PLC0415

    settings = replace(options.settings, chosen=unchangeable(options))
    server.serve(connection, settings, ready, supervisor)


def remount(mountpoint: Path, options: Options) -> None:
    """Give a mount another ``max=``, or make it ``ro`` or ``rw``; what is not said stays as it is.

    What else is said must be as it is: fstab's options, and the mount table's, come with those that one types. Raises
    `MountError`.
    """
    target = whole_at(mountpoint)
    try:
        now = information(target)
        wanted = unchangeable(options)
        refused = [name for name in wanted if name in options.given and wanted[name] != now["chosen"].get(name)]
        if refused:
            raise MountError(f"a remount changes max, ro and rw, but not {', '.join(refused)}: mount it anew for that")
        control.reconfigure(
            target,
            options.settings.maximum if "max" in options.given else now["max"],
            stats=options.settings.stats if "stats" in options.given else now["stats"],
            read_only=options.settings.read_only if "ro" in options.given else now["read_only"],
        )
    except PermissionError as error:
        raise MountError(f"no right to change {mountpoint}: only root and whoever mounted it has") from error
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise MountError("Binderfs stats mode cannot be changed during a remount") from error
        if error.errno == errno.EBUSY:
            raise MountError(
                f"{mountpoint} cannot become read-only: a device that was removed is still open"
            ) from error
        raise MountError(f"cannot change {mountpoint}: {error.strerror or error}") from error


def usable(mountpoint: Path) -> Path:
    """Return the path to mount at, resolved, once what a dead server left there is gone. Raises `MountError`."""
    target = resolve(mountpoint)
    there = mounting.mount_at(target)
    if there and there.is_ours and is_dead(target):
        mounting.unmount(target, lazy=True)
        there = mounting.mount_at(target)
    if there:
        if there.is_ours:
            raise MountError(
                f"{mountpoint} is mounted already: unmount it first with `{program()} -u {quoted(mountpoint)}`"
            )
        raise MountError(f"{mountpoint} is a mount point already ({there.type}): take a directory in it, or unmount it")
    try:
        is_directory = stat.S_ISDIR(target.stat().st_mode)
    except FileNotFoundError as error:
        raise MountError(f"{mountpoint} does not exist: make it with `mkdir -p {quoted(mountpoint)}`") from error
    except OSError as error:
        raise MountError(f"{mountpoint} cannot be mounted on: {error.strerror}") from error
    if not is_directory:
        raise MountError(f"{mountpoint} is not a directory, and only on one can be mounted")
    return target


def check(mountpoint: Path, devices: tuple[bytes, ...]) -> None:
    """Ask each device for its protocol version, as a client would, and have that forgotten. Raises `MountError`."""
    for name in devices:
        device = os.fsencode(mountpoint) + b"/" + name
        try:
            descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                answer = fcntl.ioctl(descriptor, uapi.BINDER_VERSION, bytes(uapi.binder_version.size))
            finally:
                os.close(descriptor)
        except PermissionError:
            # Whoever mounted has given the device to somebody else; the server did answer to find that out.
            continue
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise MountError(
                    "region=passthrough takes Linux 6.9 and the real root: leave it out, or say region=pagecache"
                ) from error
            raise MountError(f"{os.fsdecode(device)} does not answer: {error.strerror}") from error
        (version,) = uapi.binder_version.unpack(answer)
        if version != uapi.BINDER_CURRENT_PROTOCOL_VERSION:
            raise MountError(f"{os.fsdecode(device)} answers with protocol version {version}")
    # The last of these opens may still be on its way out; and if another client was quick, so be it.
    with contextlib.suppress(OSError):
        for _ in range(_TRIES):
            try:
                control.begin_anew(mountpoint)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                time.sleep(_PAUSE)
            else:
                break


def _log_destination(options: Options, *, foreground: bool) -> str | None:
    """Return where a server logs to: without a word of that, to standard error, or the system's log for want of one."""
    if options.log or foreground or not Path(SYSLOG).exists():
        return options.log
    return "syslog"
