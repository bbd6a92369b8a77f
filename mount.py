#!/usr/bin/env python3
"""Mount a binder device that needs no kernel module: ``mount.py [SOURCE] MOUNTPOINT [-o OPTION,...]``.

Runs with any Python 3.11: what it needs is in ``.venv`` beside it (``make setup``), unless this Python has it too.
"""

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NEEDED = ("trio", "pyfuse3", "binderfs_fuse._uapi", "binderfs_fuse._system")


def main() -> int:
    """Run the command, by the Python that can."""
    sys.path.insert(0, str(HERE))
    if not all(map(importlib.util.find_spec, NEEDED)):
        python = HERE / ".venv/bin/python"
        if not python.exists() or Path(sys.prefix) == python.parent.parent:
            sys.stderr.write(f"mount.py: not set up: run `make -C {HERE} setup`\n")
            return 1
        os.execv(python, [str(python), *sys.argv])  # noqa: S606 - it is this very program

    from binderfs_fuse.command.main import main as command  # noqa: PLC0415 - it can only now be found

    return command(sys.argv)


if __name__ == "__main__":
    sys.exit(main())
