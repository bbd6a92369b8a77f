"""Builds ``binderfs_fuse._system`` from ``system.c``; what Python sees of it is what ``system.h`` declares.

``system.h`` follows the rules of form of ``_uapi_build``, may include ``uapi/*.h`` and use their types.
"""

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

# setuptools runs this file by its path, before the package can be imported.
_uapi_build = runpy.run_path(str(HERE / "_uapi_build.py"))

ffibuilder = FFI()
ffibuilder.include(_uapi_build["ffibuilder"])
ffibuilder.cdef(_uapi_build["declarations"]((HERE / "system.h").read_text()))
ffibuilder.set_source(
    "binderfs_fuse._system",
    # The module repeats what it includes, so it needs all of uapi whatever system.h makes do with.
    "\n".join(f'#include "{name}"' for name in (*_uapi_build["HEADERS"], "system.h")),
    sources=["binderfs_fuse/system.c"],
    include_dirs=["binderfs_fuse", "uapi"],
    depends=["binderfs_fuse/system.h", *(f"uapi/{name}" for name in _uapi_build["HEADERS"])],
    extra_compile_args=["-O2", "-Wall", "-Wextra"],
)
