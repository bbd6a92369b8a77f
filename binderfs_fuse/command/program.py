"""What this program is called, and how it says things."""

import os
import signal
import sys
from pathlib import Path
from typing import Final

from binderfs_fuse.fuse.mounting import MountError

_INSTALLED: Final = "binderfs-fuse"


def program() -> str:
    """Return the name that the user knows it by, for messages that tell him what to type."""
    return _INSTALLED if Path(sys.argv[0]).name == _INSTALLED else "mount.py"


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
