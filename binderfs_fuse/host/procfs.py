"""Text that the kernel writes in /proc: how it is read, and how it is cut into lines and fields.

A task chooses its name, and the names of the files that it opens, maps and mounts. The kernel escapes a newline in such
a name, and nothing else that ends a line elsewhere: a carriage return, a vertical tab and a form feed stay as they are.
So the text is bytes to every reader here, and a newline alone ends a line of it.
"""

from __future__ import annotations

import os

root = "/proc"
"""Where /proc is for what this process asks of itself: see `stay`."""


def stay(descriptor: int) -> None:
    """Go on with this /proc, by a descriptor of it, in a mount namespace where /proc is somebody else's choice.

    It becomes the working directory. Raises `OSError`.
    """
    global root  # noqa: PLW0603 - a process has one
    os.fchdir(descriptor)
    root = "."


def read(path: str | bytes) -> bytes:
    """Return a whole file. Raises `OSError`."""
    # os.read(), and not an open(): files of /proc are read in one go or by line, and this is twice as fast.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
    finally:
        os.close(descriptor)
    return b"".join(parts)


def lines(text: bytes) -> list[bytes]:
    """Return the lines of a text, without the newlines."""
    return text.removesuffix(b"\n").split(b"\n") if text else []


def fields(text: bytes) -> dict[bytes, bytes]:
    """Return what stands after ``NAME:`` and a tab in each line, by NAME, as in ``status`` and ``fdinfo``.

    Of two lines with one name the first counts, since what a driver says of itself comes last.
    """
    return {name: value for name, _, value in (line.partition(b":\t") for line in reversed(lines(text)))}


def start_time(stat: bytes) -> int:
    """Read from ``/proc/PID/stat`` when the process began, in clock ticks since the machine did."""
    return int(_after_name(stat)[19])


def parent(stat: bytes) -> int:
    """Read from ``/proc/PID/stat`` the id of the process's parent."""
    return int(_after_name(stat)[1])


def _after_name(stat: bytes) -> list[bytes]:
    # The second field, a name in parentheses, may have blanks, parentheses and newlines in it.
    return stat.rpartition(b")")[2].split()
