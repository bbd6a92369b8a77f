"""The two C programs, compiled."""

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CHECKOUT = HERE.parent
BUILD = CHECKOUT / "build" / "benchmarks"

_FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]


def compile_program(name: str, *, static: bool = False) -> Path:
    """Compile `name`.c, unless that has been done since it changed, and return the program's path."""
    BUILD.mkdir(parents=True, exist_ok=True)
    source = HERE / f"{name}.c"
    program = BUILD / name
    parts = [source, CHECKOUT / "uapi" / "fuse.h"]
    if not program.exists() or program.stat().st_mtime < max(part.stat().st_mtime for part in parts):
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, *_FLAGS, *(["-static"] if static else []), "-o", program, source], check=True)
    return program
