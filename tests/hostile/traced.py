"""A server whose locks show in a trace: ``strace -ff python -m tests.hostile.traced MOUNTPOINT -f``.

Each lock that this package makes says, by a system call that nothing else makes, when it is taken, and another one when
it is about to be given back.
"""

import os
import sys
import threading
from typing import Any

TAKEN, GIVEN_BACK = "getsid", "getpgid"

_lock = threading.Lock


class Told:
    """A lock that tells."""

    def __init__(self) -> None:
        self._lock = _lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it, and tell if that went well."""
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            os.getsid(0)
        return taken

    def release(self) -> None:
        """Tell, and give it back."""
        os.getpgid(0)
        self._lock.release()

    def locked(self) -> bool:
        """Tell whether somebody has it."""
        return self._lock.locked()

    def __enter__(self) -> bool:
        """Take it."""
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        self.release()


def make() -> Any:
    """Make a lock, for this package one that tells; its compiled modules have no frames, but their callers have."""
    name = sys._getframe(1).f_globals["__name__"]
    return Told() if name.startswith("binderfs_fuse") else _lock()


if __name__ == "__main__":
    threading.Lock = make  # type: ignore[assignment]

    from binderfs_fuse.command.main import main

    sys.exit(main(["mount.py", *sys.argv[1:]]))
