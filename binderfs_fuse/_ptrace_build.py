"""Builds ``binderfs_fuse._ptrace`` from ``host/ptrace.c``; Python sees what ``host/ptrace.h`` declares."""

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

# setuptools runs this file by its path, before the package can be imported.
declarations = runpy.run_path(str(HERE / "_uapi_build.py"))["declarations"]

ffibuilder = FFI()
ffibuilder.cdef(declarations((HERE / "host" / "ptrace.h").read_text()))
ffibuilder.set_source(
    "binderfs_fuse._ptrace",
    '#include "ptrace.h"',
    sources=["binderfs_fuse/host/ptrace.c"],
    include_dirs=["binderfs_fuse/host"],
    depends=["binderfs_fuse/host/ptrace.h"],
    extra_compile_args=["-O2", "-Wall", "-Wextra"],
)
