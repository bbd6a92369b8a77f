"""``mount.binder SOURCE MOUNTPOINT [-sfnv] [-o OPTION,...] [-t TYPE]``: what mount(8) runs for type binder.

Without ``stats=global`` there are no logs then, as with the kernel's binderfs. What fails has the status that mount(8)
has for that.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse.command.mount import mount, remount
from binderfs_fuse.command.options import base_options, parse
from binderfs_fuse.command.program import HELPERS, complain, failure
from binderfs_fuse.fuse.mounting import MountError

if TYPE_CHECKING:
    from collections.abc import Sequence

_FAILED: Final = 32


def is_helper(program: str) -> bool:
    """Tell whether mount(8) runs us under this name."""
    return Path(program).name in HELPERS


def helper(program: str, arguments: Sequence[str]) -> int:
    """Mount or remount; return mount(8)'s status."""
    name = Path(program).name
    parser = argparse.ArgumentParser(prog=name, description="Mount a binderfs for mount(8).")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("mountpoint", type=Path, metavar="MOUNTPOINT")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTION,...")
    parser.add_argument("-f", dest="fake", action="store_true", help="look at the options, and do not mount")
    parser.add_argument("-t", dest="type", metavar="TYPE", help="without effect, as are -s, -n, -v and -N")
    parser.add_argument("-N", dest="namespace", metavar="NAMESPACE", help=argparse.SUPPRESS)
    for flag in ("-s", "-n", "-v"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    try:
        options = parse(parsed.options, base_options(stats=False))
        if parsed.fake:
            return 0
        if options.remount:
            remount(parsed.mountpoint, options)
        else:
            mount(parsed.source, parsed.mountpoint, options, foreground=False)
    except MountError as error:
        complain(error, name)
        return _FAILED
    except OSError as error:
        complain(failure(error), name)
        return _FAILED
    return 0
