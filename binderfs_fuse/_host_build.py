"""Builds ``binderfs_fuse._host`` from what a server needs of ``host``; Python sees what the headers declare."""

import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

# setuptools runs this file by its path, before the package can be imported.
declarations = runpy.run_path(str(HERE / "_uapi_build.py"))["declarations"]

ffibuilder = FFI()
HEADERS = ("confine.h", "injector.h", "keeper.h")
SOURCES = ("confine.c", "filter.c", "injector_client.c", "keeper_client.c", "message.c")
INCLUDED = ("filter.h", "injector_protocol.h", "keeper_protocol.h", "message.h")
for name in HEADERS:
    ffibuilder.cdef(declarations((HERE / "host" / name).read_text()))
ffibuilder.set_source(
    "binderfs_fuse._host",
    "\n".join(f'#include "{name}"' for name in HEADERS),
    sources=[f"binderfs_fuse/host/{name}" for name in SOURCES],
    include_dirs=["binderfs_fuse/host"],
    depends=[f"binderfs_fuse/host/{name}" for name in (*HEADERS, *INCLUDED)],
    extra_compile_args=["-O2", "-Wall", "-Wextra"],
)
