"""The compiled parts of the package; all else is in pyproject.toml.

Three modules are C, built by cffi. What serves a call is plain Python, which mypyc compiles where it is installed: the
same source runs without that, at a third of the speed (see binderfs_fuse/__init__.py).
"""

import contextlib
import os
import sys
from pathlib import Path

from setuptools import setup

BUILDERS = ["_uapi_build", "_ptrace_build", "_system_build"]

SERVING = []
with contextlib.suppress(ImportError):
    from mypyc.build import mypycify

    if not os.environ.get("BINDERFS_FUSE_UNCOMPILED"):
        engine = sorted(path for path in Path("binderfs_fuse/engine").glob("[a-z]*.py") if path.stem != "invariants")
        plane = [Path("binderfs_fuse/fuse", name) for name in ("channel.py", "device.py", "lane.py", "transfer.py")]
        # Their constants: to compiled code, a name of an uncompiled module is a look-up in a dict, each time.
        wire = Path("binderfs_fuse/uapi.py")
        try:
            SERVING = mypycify(
                [str(path) for path in [wire, *engine, *plane]],
                group_name="binderfs_fuse._serving",
                opt_level="2",
                debug_level="0",
            )
        except SystemExit:
            print("binderfs-fuse: this mypyc cannot compile it; it works without, more slowly", file=sys.stderr)  # noqa: T201

setup(
    cffi_modules=[f"binderfs_fuse/{builder}.py:ffibuilder" for builder in BUILDERS],
    ext_modules=SERVING,  # type: ignore[arg-type] # mypyc's are setuptools' by another name
)
