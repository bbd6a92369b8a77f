"""What this program is called, and how it says things."""

import errno
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Final

from binderfs_fuse.fuse.mounting import MountError

_INSTALLED: Final = "binderfs-fuse"
HELPERS: Final = ("mount.binder", "mount.fuse.binder")
"""The names under which mount(8) runs us, which is where we are installed."""


def program() -> str:
    """Return the name that the user knows it by, for messages that tell him what to type."""
    return _INSTALLED if Path(sys.argv[0]).name in (_INSTALLED, *HELPERS) else "mount.py"


def complain(text: object, name: str | None = None) -> None:
    """Say in one line on standard error what is wrong, under the name that the program was called by."""
    sys.stderr.write(printable(f"{name or program()}: {text}") + "\n")


def failure(error: OSError) -> str:
    """Say what a system call that nobody expected to fail says."""
    return f"{error.strerror or error}" + (f": {os.fsdecode(error.filename)}" if error.filename else "")


def quoted(path: Path) -> str:
    """Quote a path for a command that somebody may paste into a shell."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    # As bash, zsh and POSIX of 2024 have it.
    escaped = text.replace("\\", r"\\").replace("'", r"\'")
    return f"$'{printable(escaped)}'"


def absolute(path: Path) -> Path:
    """Return a path from the root on. Raises `MountError`."""
    try:
        return path.absolute()
    except FileNotFoundError as error:
        text = f"{path} is nowhere: the folder that this is run in has been deleted"
        raise MountError(text, errno.ENOENT) from error


def printable(text: str) -> str:
    """Escape what would be more than a sign in a line: somebody else may have chosen it, and a terminal may obey.

    A byte that is no text comes out as such.
    """
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    byte = ord(letter) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(letter)[1:-1]


def complete_descriptors() -> None:
    """Open /dev/null where standard input, output or error is closed: else what is opened next would be taken for it.

    Programs that this one executes find it closed as before.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free: this one.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def say(text: str | bytes) -> None:
    """Write what a command was asked for to standard output, its last act. Raises `MountError`.

    Where nobody reads it, this process ends by SIGPIPE, as other programs do.
    """
    if isinstance(text, str):
        # Names are bytes; what is no text goes out as it came in.
        text = text.encode(errors="surrogateescape")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    rest = memoryview(text)
    try:
        while rest:
            rest = rest[os.write(1, rest) :]
    except OSError as error:
        raise MountError(f"cannot write to standard output: {error.strerror}", error.errno or 0) from error
