"""A FUSE file system that is a binder device to programs that were built for the kernel's.

What serves a call is compiled, where mypyc was there at installation. The Python source is used instead while any of it
is newer than that, or with BINDERFS_FUSE_UNCOMPILED in the environment: then it says where it fails, can be stepped
through, and is what coverage measures. Never some of one and some of the other: compiled modules know each other's
layout.
"""

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

__version__ = "0.1.0"

_HERE = Path(__file__).parent


class _SourceFinder(PathFinder):
    """Finds the modules that are compiled too by their source."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None) -> ModuleSpec | None:  # type: ignore[no-untyped-def] # noqa: ANN001
        """Return the source's spec for a module of this package that has one, None for any other."""
        del path, target
        package, _, name = fullname.partition(".")
        source = _HERE.joinpath(*name.split(".")).with_suffix(".py")
        if package != __name__ or not source.exists():
            return None
        return spec_from_file_location(fullname, source)


def _is_outdated() -> bool:
    for module in _HERE.rglob("*" + EXTENSION_SUFFIXES[0]):
        source = module.with_name(module.name.partition(".")[0] + ".py")
        # One library has no source of its own: the modules' common one.
        if source.exists() and source.stat().st_mtime > module.stat().st_mtime:
            return True
    return False


if os.environ.get("BINDERFS_FUSE_UNCOMPILED") or _is_outdated():
    sys.meta_path.insert(0, _SourceFinder)
