"""Mounts of this package, and the servers behind them, as a command sees them from outside.

Any user can serve a FUSE file system that looks like one of ours, and a command of root's asks it, too. So an answer is
nothing but bytes until it has been looked at: it may come late or never, go on for ever, be no JSON, or be of another
shape, and it may name the process of somebody else.

Invariants:
- Only a child process asks, and it is waited for `PATIENCE` seconds at most. It may outlive its SIGKILL, in a system
  call that the server does not answer; so it holds none of the command's standard descriptors.
- What `information` returns has every field of `_FIELDS`, each of the type and in the range that is said there.
- Nothing is done to a process that a server names but to wait for its end, for a bounded time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse.command.daemon import leave_standard_descriptors
from binderfs_fuse.command.program import absolute, program
from binderfs_fuse.fuse import control, mounting
from binderfs_fuse.fuse.mounting import MountError
from binderfs_fuse.host import places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from binderfs_fuse.fuse.mounting import Mount

PATIENCE: Final = 2.0
"""Seconds that a server is given to say something of itself."""
_MOST_INFORMATION: Final = 16 << 20
"""Bytes of what a server says of itself: the names of a million devices."""
_MOST_BRACKETS: Final = 64
_MOST_ANSWER: Final = 65 << 20


class NonsenseError(OSError):
    """A server's answer is not what a server of ours says: EPROTO."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EPROTO, f"its server does not say {what}")


def find(mountpoint: Path) -> Mount | None:
    """Return what is mounted where a path leads to, or what the mount table has at it, or None.

    The latter is covered by another mount. No server is asked for anything. Raises `MountError`.
    """
    path = absolute(mountpoint)
    # Without it nothing is found anywhere, which is not because of the path.
    mounting.mounts()
    found = None
    try:
        descriptor = places.walk(os.fsencode(path))
    except OSError as error:
        if not is_elsewhere(error):
            raise mounting.unreachable(mountpoint, error) from error
    else:
        try:
            found = mounting.mount_of(descriptor)
        finally:
            os.close(descriptor)
    return found or mounting.mount_at(Path(os.path.realpath(path)))


def ours_at(mountpoint: Path) -> Mount:
    """Return the mount of this package that a path leads to. Raises `MountError`."""
    there = find(mountpoint)
    if there is None:
        raise MountError(f"nothing is mounted at {mountpoint}: `{program()} status` lists what is")
    if not there.is_ours:
        raise MountError(f"what is mounted at {mountpoint} is of type {there.type}, not one of this program's")
    return there


def whole_at(mountpoint: Path) -> Mount:
    """Return a mount that shows the root of a mount of this package, of which this path shows at least a part.

    A part of it, as a bind mount shows a single device, has nobody to ask. Raises `MountError`.
    """
    part = ours_at(mountpoint)
    if part.shows_root:
        return part
    for mount in reversed(mounting.mounts()):
        if mount.device == part.device and mount.shows_root:
            return mount
    raise MountError(f"{mountpoint} shows a part of a mount, of which the rest is not to be seen from here")


def patiently(question: Callable[[], bytes]) -> bytes:
    """Return what `question` returns, which asks the server of a mount for something.

    Raises `OSError`: what the question raises, EMSGSIZE where the answer is too long to be one, or TimeoutError where
    the server has not answered in good time, since it is stopped or stuck. So a process of its own asks: it can be
    killed, which a thread cannot, and holds on to the mount no more then.
    """
    hearing, saying = os.pipe()
    child = os.fork()
    if not child:
        _question(question, hearing, saying)
    os.close(saying)
    try:
        answer = _read_until(hearing, time.monotonic() + PATIENCE)
    finally:
        os.close(hearing)
        process = os.pidfd_open(child)
        signal.pidfd_send_signal(process, signal.SIGKILL)
        # It may not even die, if the server has taken its question and keeps it.
        if select.select([process], [], [], PATIENCE)[0]:
            os.waitpid(child, 0)
        os.close(process)
    if answer is None:
        raise TimeoutError(errno.ETIMEDOUT, "its server does not answer")
    if not answer.startswith(b"+"):
        number = int(answer[1:] or errno.EIO)
        raise OSError(number, os.strerror(number))
    return answer[1:]


def _question(question: Callable[[], bytes], hearing: int, saying: int) -> None:
    """Be the process that asks."""
    try:
        os.close(hearing)
        leave_standard_descriptors()
        with os.fdopen(saying, "wb") as pipe:
            try:
                pipe.write(b"+" + question())
            except OSError as error:
                pipe.write(b"-%d" % (error.errno or errno.EIO))
    finally:
        os._exit(0)


def _read_until(descriptor: int, deadline: float) -> bytes | None:
    """Read to the end; None where that has not come in time. Raises `OSError`: EMSGSIZE."""
    parts: list[bytes] = []
    size = 0
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > _MOST_ANSWER:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    return None


def ask(mountpoint: Path, name: str) -> bytes:
    """Ask the server of a mount for one of its texts. Raises `OSError` as `patiently` does."""
    return patiently(lambda: control.query(mountpoint, name))


def ask_exactly(mount: Mount, name: str) -> bytes:
    """Ask the server of this very mount, and not of what covers it, for one of its texts.

    Raises `OSError` as `patiently` does; FileNotFoundError, too, where its place leads elsewhere.
    """
    return patiently(lambda: control.query(by_descriptor(mounting.open_root(mount)), name))


def by_descriptor(root: int) -> Path:
    """Return a path that leads to what a descriptor of this process refers to, and nowhere else."""
    return Path(f"/proc/self/fd/{root}")


def is_death(error: OSError) -> bool:
    """Tell whether this is what a question ends with whose server is gone, or stuck."""
    return isinstance(error, TimeoutError) or error.errno in (errno.ENOTCONN, errno.ECONNABORTED)


def is_nonsense(error: OSError) -> bool:
    """Tell whether this is what a question ends with whose answer cannot be a server's of ours."""
    return error.errno in (errno.EPROTO, errno.EMSGSIZE)


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
    if is_nonsense(error):
        return f"not a server of this program, by what it answers ({reason})"
    return f"not to be asked ({reason})"


def is_dead(mount: Mount) -> bool:
    """Tell whether the server of a mount is gone; one that only does not answer is not."""
    try:
        return patiently(lambda: b"dead" if mounting.is_dead(mounting.open_root(mount)) else b"") == b"dead"
    except OSError:
        return False


def information(mountpoint: Path) -> dict[str, Any]:
    """Return what the server of the mount at a path says of itself. Raises `OSError` as `information_of` does."""
    return parse_information(patiently(lambda: control.query(mountpoint, "info", _MOST_INFORMATION)))


def information_of(mount: Mount) -> dict[str, Any]:
    """Return what the server of this very mount says of itself, every field of `_FIELDS`; one left out is None.

    Raises `OSError` as `ask_exactly` does, and `NonsenseError`.
    """
    question = control.query
    return parse_information(
        patiently(lambda: question(by_descriptor(mounting.open_root(mount)), "info", _MOST_INFORMATION))
    )


def _is_whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_text(value: object, most: int = 4096) -> bool:
    return isinstance(value, str) and len(value) <= most


_FIELDS: Final[dict[str, Callable[[Any], bool]]] = {
    "pid": lambda value: _is_whole(value, 1, (1 << 31) - 1),
    "start": lambda value: _is_whole(value, 0, (1 << 64) - 1),
    "version": lambda value: _is_text(value, 256),
    "uptime": lambda value: type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e10,
    "max": lambda value: _is_whole(value, 0, (1 << 32) - 1),
    "stats": lambda value: isinstance(value, bool),
    "read_only": lambda value: isinstance(value, bool),
    "filter": lambda value: isinstance(value, bool),
    "chosen": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "managers": lambda value: isinstance(value, list) and all(_is_whole(each, 0, (1 << 64) - 1) for each in value),
    "region": lambda value: _is_text(value, 256),
    "devices": lambda value: isinstance(value, list) and all(map(_is_text, value)),
}
"""What a server says of itself, and what it can be. A server of another version may leave out some."""


def parse_information(text: bytes) -> dict[str, Any]:
    """Read what a server says of itself. Raises `NonsenseError`."""
    # Each costs twenty times its length, or a level of the parser's.
    if text.count(b"[") + text.count(b"{") > _MOST_BRACKETS:
        raise NonsenseError("what it is")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NonsenseError("what it is") from error
    if not isinstance(said, dict):
        raise NonsenseError("what it is")
    for name, is_right in _FIELDS.items():
        if said.get(name) is not None and not is_right(said[name]):
            raise NonsenseError(f"what its {name} is")
    return {name: said.get(name) for name in _FIELDS}


@contextlib.contextmanager
def hold(mount: Mount) -> Iterator[int | None]:
    """Give a pidfd of a mount's server, or None where it is dead, silent, or not to be seen from here.

    It is a server's word which process that is: do nothing but wait for its end, and not for ever.
    """
    descriptor = None
    with contextlib.suppress(OSError):
        said = information_of(mount)
        if said["pid"] is not None:
            descriptor = os.pidfd_open(said["pid"])
            # The server says its id in its own pid namespace, where it is somebody else's in this one.
            if control.start_time(said["pid"]) != said["start"]:
                os.close(descriptor)
                descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)
