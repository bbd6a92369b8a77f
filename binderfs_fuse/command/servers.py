"""Mounts of this package, and the servers behind them, as a command sees them from outside."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse.command.program import absolute, program
from binderfs_fuse.fuse import control, mounting
from binderfs_fuse.fuse.mounting import MountError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from binderfs_fuse.fuse.mounting import Mount

_MOST_LINKS: Final = 40
PATIENCE: Final = 2.0
"""Seconds that a server is given to say something of itself."""


def resolve(mountpoint: Path) -> Path:
    """Return a path without symbolic links; of what is mounted there, nothing is asked, since it may not answer."""
    place = absolute(mountpoint)
    for _ in range(_MOST_LINKS):
        place = Path(os.path.realpath(place.parent), place.name) if place.name != ".." else place.resolve()
        try:
            place = place.parent / place.readlink()
        except OSError:
            return place
    raise MountError(f"{mountpoint} leads nowhere: it is a loop of symbolic links")


def ours_at(mountpoint: Path) -> Path:
    """Return the resolved path of a mount of this package. Raises `MountError`."""
    target = resolve(mountpoint)
    there = mounting.mount_at(target)
    if there is None:
        raise MountError(f"nothing is mounted at {mountpoint}: `{program()} status` lists what is")
    if not there.is_ours:
        raise MountError(f"what is mounted at {mountpoint} is of type {there.type}, not one of this program's")
    return target


def whole_at(mountpoint: Path) -> Path:
    """Return a path where the root is seen of a mount of this package, of which this path shows at least a part.

    A part of it, as a bind mount shows a single device, has nobody to ask. Raises `MountError`.
    """
    target = ours_at(mountpoint)
    part = mounting.mount_at(target)
    for mount in reversed(mounting.mounts()):
        if part and mount.device == part.device and mount.shows_root:
            return target if part.shows_root else mount.mountpoint
    raise MountError(f"{mountpoint} shows a part of a mount, of which the rest is not to be seen from here")


def patiently(question: Callable[[], bytes]) -> bytes:
    """Return what `question` returns, which asks the server of a mount for something.

    Raises `OSError`: what the question raises, or TimeoutError where the server has not answered in good time, since it
    is stopped or stuck. So a process of its own asks: it can be killed, which a thread cannot, and holds on to the
    mount no more then.
    """
    hearing, saying = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(hearing)
            with os.fdopen(saying, "wb") as pipe:
                try:
                    pipe.write(b"+" + question())
                except OSError as error:
                    pipe.write(b"-%d" % (error.errno or errno.EIO))
        finally:
            os._exit(0)
    os.close(saying)
    try:
        answer = _read_until(hearing, time.monotonic() + PATIENCE)
    finally:
        os.close(hearing)
        os.kill(child, signal.SIGKILL)
        # It may not even die, if the server has taken its question and keeps it.
        process = os.pidfd_open(child)
        if select.select([process], [], [], PATIENCE)[0]:
            os.waitpid(child, 0)
        os.close(process)
    if answer is None:
        raise TimeoutError("its server does not answer")
    if not answer.startswith(b"+"):
        number = int(answer[1:] or errno.EIO)
        raise OSError(number, os.strerror(number))
    return answer[1:]


def _read_until(descriptor: int, deadline: float) -> bytes | None:
    """Read to the end; None where that has not come in time."""
    parts: list[bytes] = []
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None


def ask(mountpoint: Path, name: str) -> bytes:
    """Ask the server of a mount for one of its texts. Raises `OSError` as `patiently` does."""
    return patiently(lambda: control.query(mountpoint, name))


def ask_exactly(mount: Mount, name: str) -> bytes:
    """Ask the server of this very mount, and not of what covers it, for one of its texts.

    Raises `OSError` as `patiently` does; FileNotFoundError, too, where its place leads elsewhere.
    """

    def question() -> bytes:
        # Nothing of the mount is asked for that, which may not answer.
        place = os.open(mount.mountpoint, os.O_PATH | os.O_CLOEXEC)
        lines = Path(f"/proc/self/fdinfo/{place}").read_text().splitlines()
        if f"mnt_id:\t{mount.number}" not in lines:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return control.query(Path(f"/proc/self/fd/{place}"), name)

    return patiently(question)


def is_death(error: OSError) -> bool:
    """Tell whether this is what a question ends with whose server is gone, or stuck."""
    return isinstance(error, TimeoutError) or error.errno in (errno.ENOTCONN, errno.ECONNABORTED)


def is_elsewhere(error: OSError) -> bool:
    """Tell whether this is what a question ends with whose mount its own path does not lead to."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR)


def explain(error: OSError) -> str:
    """Say of a mount why its server cannot be asked."""
    reason = error.strerror or str(error)
    if is_death(error):
        return f"no answer ({reason})"
    if is_elsewhere(error):
        return f"covered by another mount ({reason})"
    if isinstance(error, PermissionError):
        return f"another user's to ask ({reason})"
    return f"not to be asked ({reason})"


def is_dead(mountpoint: Path) -> bool:
    """Tell whether the server of the mount at this path is gone; one that only does not answer is not."""
    try:
        return patiently(lambda: b"dead" if mounting.is_dead(mountpoint) else b"") == b"dead"
    except OSError:
        return False


def information(mountpoint: Path) -> dict[str, Any]:
    """Return what the server of a mount says of itself. Raises `OSError` as `ask` does."""
    answer: dict[str, Any] = json.loads(ask(mountpoint, "info"))
    return answer


@contextlib.contextmanager
def hold(mountpoint: Path) -> Iterator[int | None]:
    """Give a pidfd of the mount's server, or None where it is dead, silent, or not to be seen from here."""
    descriptor = None
    with contextlib.suppress(OSError):
        information_ = information(mountpoint)
        descriptor = os.pidfd_open(information_["pid"])
        # The server says its id in its own pid namespace, where it is somebody else's in this one.
        if control.start_time(information_["pid"]) != information_["start"]:
            os.close(descriptor)
            descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)
