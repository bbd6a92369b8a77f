"""Putting a server in the background, and hearing from it whether it got there."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from binderfs_fuse.command.program import printable
from binderfs_fuse.fuse.mounting import MountError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

SYSLOG = "/dev/log"

_log = logging.getLogger(__name__)


def log_to(destination: str | None, level: int) -> None:
    """Send what the package logs to standard error (None), to ``syslog`` or to the end of a file.

    Raises `MountError`.
    """
    handler: logging.Handler
    try:
        if destination is None:
            handler = logging.StreamHandler()
        elif destination == "syslog":
            handler = logging.handlers.SysLogHandler(SYSLOG)
        else:
            handler = logging.FileHandler(destination)
    except OSError as error:
        raise MountError(f"cannot log to {destination}: {error.strerror}") from error
    form = "binderfs-fuse[%(process)d]: %(levelname)s: %(message)s"
    if destination != "syslog":
        form = "%(asctime)s " + form
    handler.setFormatter(_LineFormatter(form))
    logging.basicConfig(level=level, handlers=[handler])


class _LineFormatter(logging.Formatter):
    """Gives a message one line, whatever names are in it: they may be a client's choice."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)


class _Report:
    """The one message that a server in the making owes to the process that waits for it."""

    READY = b"\0"

    def __init__(self, pipe: int) -> None:
        self.pipe: int | None = pipe

    def send(self, message: bytes) -> bool:
        """Send it; false where that has been done before."""
        if self.pipe is None:
            return False
        # Whoever waited may have been killed.
        with contextlib.suppress(OSError):
            os.write(self.pipe, message)
        os.close(self.pipe)
        self.pipe = None
        return True


def in_background(serve: Callable[[Callable[[], object]], None], keep: Collection[int] = ()) -> int:
    """Do what `begin` does, and wait until the process is ready; return its id. Raises `MountError`."""
    child, hearing = begin(serve, keep)
    with os.fdopen(hearing, "rb") as pipe:
        message = pipe.read()
    error = failure_in(message)
    if error:
        os.waitpid(child, 0)
        raise error
    return child


def failure_in(message: bytes) -> MountError | None:
    """Return what a process that `begin` started failed with, from all that its pipe said; None: it is ready."""
    if message == _Report.READY:
        return None
    number, _, text = os.fsdecode(message).partition(" ")
    return MountError(text, int(number)) if text else MountError("the server died as it started")


def begin(serve: Callable[[Callable[[], object]], None], keep: Collection[int] = ()) -> tuple[int, int]:
    """Run `serve(ready)` in a process of its own; return its id, and a pipe that ends when `ready` has been called.

    What the pipe says until then is for `failure_in`: nothing more is written to it later. The process has its own
    session, / as its directory, and of this one's descriptors only those to `keep`; standard input, output and error
    are /dev/null.
    """
    hearing, saying = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(saying)
        return child, hearing
    report = _Report(saying)
    status = 1
    try:
        _leave({saying, *keep})
        serve(lambda: report.send(_Report.READY))
        status = 0
    except MountError as error:
        if not report.send(os.fsencode(f"{error.number} {error}")):
            _log.error("%s", error)
    except BaseException:  # noqa: BLE001 - nobody is left to whom it could be passed on
        _log.exception("the server failed")
    finally:
        logging.shutdown()
        os._exit(status)


def _leave(keep: Collection[int]) -> None:
    """Become independent of whoever started this process, but for the descriptors to `keep`."""
    os.setsid()
    os.chdir("/")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    leave_standard_descriptors()
    close_inherited(keep)


def leave_standard_descriptors() -> None:
    """Have /dev/null for standard input, output and error: others wait until nobody holds what they are."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)


def close_inherited(keep: Collection[int] = ()) -> None:
    """Close all descriptors but standard input, output and error, and those to `keep`."""
    for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if descriptor > 2 and descriptor not in keep:
            # The listing's own is gone by now.
            with contextlib.suppress(OSError):
                os.close(descriptor)
