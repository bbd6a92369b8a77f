#!/usr/bin/env python3
"""Mount a binder device that needs no kernel module: ``mount.py [SOURCE] MOUNTPOINT [-o OPTION,...]``.

Runs with any Python 3.11: what it needs is in ``.venv`` beside it (``make setup``), unless this Python has it too.
"""

import importlib.util
import os
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NEEDED = ("trio", "pyfuse3", "binderfs_fuse._uapi", "binderfs_fuse._system", "binderfs_fuse._host")


def main() -> int:
    """Run the command, by the Python that can."""
    sys.path.insert(0, str(HERE))
    if not all(map(importlib.util.find_spec, NEEDED)):
        python = HERE / ".venv/bin/python"
        if not os.path.lexists(python) or Path(sys.prefix) == python.parent.parent:
            sys.stderr.write(f"mount.py: not set up: run `make -C {shlex.quote(str(HERE))} setup`\n")
            return 1
        try:
            os.execv(python, [str(python), *sys.argv])  # noqa: S606 - it is this very program
        except OSError as error:
            place = os.path.realpath(python)
            reason = f"{place} cannot be executed by this user ({error.strerror})"
            advice = "it has to be set up with one that all can reach (`make clean setup PYTHON=...`, then install)"
            sys.stderr.write(f"mount.py: {reason}: {advice}\n")
            return 1

    from binderfs_fuse.command.main import main as command  # noqa: PLC0415 - it can only now be found

    return command(sys.argv)


if __name__ == "__main__":
    sys.exit(main())
