"""As user 3000, has a name lead to a directory and to a link by turns: ``python flip.py FOLDER ELSEWHERE``.

The directory is FOLDER/mnt, and FOLDER/aside meanwhile. Says "flipping" when it has begun; it ends with its input.
"""

import contextlib
import os
import sys
import threading
from pathlib import Path


def main(folder: Path, elsewhere: str) -> None:
    """Flip until there is no input any more."""
    os.setgroups([])
    os.setresgid(3000, 3000, 3000)
    os.setresuid(3000, 3000, 3000)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    name, aside = folder / "mnt", folder / "aside"
    sys.stdout.write("flipping\n")
    sys.stdout.flush()
    while True:
        # While something is mounted on it, a directory keeps its name.
        with contextlib.suppress(OSError):
            name.rename(aside)
            name.symlink_to(elsewhere)
        with contextlib.suppress(OSError):
            name.unlink()
        with contextlib.suppress(OSError):
            aside.rename(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
