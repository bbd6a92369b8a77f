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
from binderfs_fuse.command.program import absolute, program, quoted
from binderfs_fuse.command.servers import (
    NonsenseError,
    by_descriptor,
    explain,
    information_of,
    is_dead,
    is_death,
    is_nonsense,
    patiently,
    whole_at,
)
from binderfs_fuse.fuse import control, mounting
from binderfs_fuse.fuse.mounting import MountError
from binderfs_fuse.host import places

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from binderfs_fuse.command.options import Options
    from binderfs_fuse.fuse.mounting import Connection


# How often it is looked whether the devices have been let go of, and after how many seconds each.
_TRIES: Final = 100
_PAUSE: Final = 0.001


def mount(source: str, mountpoint: Path, options: Options, *, foreground: bool) -> None:
    """Mount at a directory; return when the device answers, or, in the foreground, when the mount has ended.

    In the foreground this process becomes the server, and closes what descriptors it has. Raises `MountError`.
    """
    if foreground:
        close_inherited()
        prepare(options, foreground=True)
        with usable(mountpoint) as place:
            connection, root = _mount_on(place, mountpoint, source, options)
        os.close(root)
        serve(connection, options, lambda: None)
        return
    with usable(mountpoint) as place:
        connection, root = _mount_on(place, mountpoint, source, options)

    def prepare_and_serve(ready: Callable[[], object]) -> None:
        prepare(options)
        serve(connection, options, ready)

    try:
        try:
            in_background(prepare_and_serve, keep=[connection.descriptor])
        finally:
            os.close(connection.descriptor)
        check(root, connection.mountpoint, options.settings.devices)
    except MountError:
        mounting.take_away(root)
        raise
    finally:
        os.close(root)


def _mount_on(place: int, mountpoint: Path, source: str, options: Options) -> tuple[Connection, int]:
    return mounting.mount_on(place, source, absolute(mountpoint), allow_other=options.allow_other, flags=options.flags)


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
    mount = whole_at(mountpoint)
    try:
        now = information_of(mount)
        wanted = unchangeable(options)
        refused = [name for name in wanted if name in options.given and wanted[name] != (now["chosen"] or {}).get(name)]
        if refused:
            raise MountError(f"a remount changes max, ro and rw, but not {', '.join(refused)}: mount it anew for that")
        maximum, stats, read_only = (
            getattr(options.settings, attribute) if name in options.given else now[attribute_of_server]
            for name, attribute, attribute_of_server in _CHANGEABLE
        )
        if None in (maximum, stats, read_only):
            raise NonsenseError("what its options are")

        def reconfigure() -> bytes:
            root = mounting.open_root(mount)
            control.reconfigure(by_descriptor(root), maximum, stats=stats, read_only=read_only)
            return b""

        patiently(reconfigure)
    except PermissionError as error:
        raise MountError(f"no right to change {mountpoint}: only root and whoever mounted it has") from error
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise MountError("Binderfs stats mode cannot be changed during a remount") from error
        if error.errno == errno.EBUSY:
            raise MountError(
                f"{mountpoint} cannot become read-only: a device that was removed is still open"
            ) from error
        reason = explain(error) if is_death(error) or is_nonsense(error) else error.strerror or error
        raise MountError(f"cannot change {mountpoint}: {reason}") from error


# An option, and what it is called in `Settings` and by a server.
_CHANGEABLE: Final = (("max", "maximum", "max"), ("stats", "stats", "stats"), ("ro", "read_only", "read_only"))


@contextlib.contextmanager
def usable(mountpoint: Path) -> Iterator[int]:
    """Give a descriptor of the directory to mount on, once what a dead server left there is gone.

    Raises `MountError`.
    """
    path = absolute(mountpoint)
    # Without it nothing is found anywhere, which is not because of the path.
    mounting.mounts()
    place = _walk(mountpoint, path)
    try:
        there = mounting.mount_of(place)
        if there and there.is_ours and is_dead(there):
            mounting.unmount(there, lazy=True)
            os.close(place)
            place = _walk(mountpoint, path)
            there = mounting.mount_of(place)
        if there:
            if there.is_ours:
                raise MountError(
                    f"{mountpoint} is mounted already: unmount it first with `{program()} -u {quoted(mountpoint)}`"
                )
            raise MountError(
                f"{mountpoint} is a mount point already ({there.type}): take a directory in it, or unmount it"
            )
        if not stat.S_ISDIR(places.identify(place).mode):
            raise MountError(f"{mountpoint} is not a directory, and only on one can be mounted")
        yield place
    finally:
        os.close(place)


def _walk(mountpoint: Path, path: Path) -> int:
    try:
        return places.walk(os.fsencode(path))
    except FileNotFoundError as error:
        raise MountError(f"{mountpoint} does not exist: make it with `mkdir -p {quoted(mountpoint)}`") from error
    except OSError as error:
        raise _unusable(mountpoint, error) from error


def _unusable(mountpoint: Path, error: OSError) -> MountError:
    if isinstance(error, places.StrangersLinkError) or error.errno == errno.ELOOP:
        return mounting.unreachable(mountpoint, error)
    return MountError(f"{mountpoint} cannot be mounted on: {error.strerror}", error.errno or errno.EINVAL)


def check(root: int, mountpoint: Path, devices: tuple[bytes, ...]) -> None:
    """Ask each device for its protocol version, as a client would, and have that forgotten. Raises `MountError`.

    `root` is a descriptor of the mount's root: the owner of the directory may have put something else at its path.
    """
    for name in devices:
        device = os.fsencode(mountpoint) + b"/" + name
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=root)
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
                control.begin_anew(by_descriptor(root))
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
