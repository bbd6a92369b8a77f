"""The command line: which command it is, and what is printed when it fails."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse import __version__
from binderfs_fuse.command.graph import graph
from binderfs_fuse.command.helper import helper, is_helper
from binderfs_fuse.command.mount import mount, remount
from binderfs_fuse.command.options import base_options, parse
from binderfs_fuse.command.program import complain, complete_descriptors, failure, program
from binderfs_fuse.command.run import run
from binderfs_fuse.command.status import status
from binderfs_fuse.command.unmount import unmount
from binderfs_fuse.fuse.mounting import MountError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DESCRIPTION: Final = """\
Mount a binder device that needs no kernel module, and serve it in the background.

commands:
  {program} [SOURCE] MOUNTPOINT [-o OPTION,...] [-f]    mount; ready when this returns
  {program} -u [-l] MOUNTPOINT                          unmount
  {program} run [-o OPTION,...] [--] COMMAND ...        run a command with /dev/binder of its own
  {program} status [MOUNTPOINT] [--json]                what is mounted, and who uses it
  {program} graph [MOUNTPOINT] [--output FILE]          who holds references to whose nodes, as a picture
"""

_EPILOGUE: Final = """\
options (-o):
  max=N               at most N devices (1048576)
  stats=global|unset  whether there is a directory binder_logs (global)
  devices=A:B:...     the devices to begin with (binder:hwbinder:vndbinder)
  mode=M,uid=U,gid=G  the permissions and the owner of devices (0600, whoever mounts)
  allow_other         let other users in; root does unless it says noallow_other
  ro, rw              devices cannot be removed, renamed or changed, or can
  region=auto|passthrough|pagecache   how receive regions are made (auto)
  secctx=LABEL        the label of senders that have none (u:r:unlabeled:s0)
  priority=kernel|android             what a call hands on: nice values, or policies too (kernel)
  noseccomp           the server does not filter its own system calls
  memory=SIZE         the most that the server holds for all clients, such as 256M (as the machine allows)
  log=FILE|syslog, log_level=debug|info|warning|error
  remount             change max=, ro and rw of what is mounted there
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(),
        usage=f"{program()} [SOURCE] MOUNTPOINT [-o OPTION,...] [-f]",
        description=_DESCRIPTION.format(program=program()),
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="[SOURCE] MOUNTPOINT", help="SOURCE is a name for the mount table")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTION,...", help="see below")
    parser.add_argument("-f", dest="foreground", action="store_true", help="stay in the foreground")
    parser.add_argument("-u", dest="unmount", action="store_true", help="unmount, and wait for the server to end")
    parser.add_argument("-l", dest="lazy", action="store_true", help="with -u: even though it is in use")
    parser.add_argument("-V", "--version", action="version", version=f"binderfs-fuse {__version__}")
    return parser


def _mount_or_unmount(arguments: Sequence[str]) -> None:
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if len(parsed.paths) > (1 if parsed.unmount else 2):
        parser.error("one mount point, please")
    if parsed.lazy and not parsed.unmount:
        parser.error("-l goes with -u")
    if not parsed.paths[-1]:
        raise MountError("the mount point's name is empty")
    mountpoint = Path(parsed.paths[-1])
    if parsed.unmount:
        unmount(mountpoint, lazy=parsed.lazy)
        return
    options = parse(parsed.options, base_options(stats=True))
    source = parsed.paths[0] if len(parsed.paths) > 1 else "binder"
    if options.remount:
        remount(mountpoint, options)
    else:
        mount(source, mountpoint, options, foreground=parsed.foreground)


COMMANDS: Final[dict[str, Callable[[Sequence[str]], int | None]]] = {"run": run, "status": status, "graph": graph}
"""The commands with a name of their own, each given the arguments after that."""


def main(argv: Sequence[str]) -> int:
    """Run one command; return its exit status. What goes wrong is one line on standard error, and status 1."""
    complete_descriptors()
    if is_helper(argv[0]):
        return helper(argv[0], argv[1:])
    try:
        command = COMMANDS.get(argv[1]) if len(argv) > 1 else None
        if command:
            return command(argv[2:]) or 0
        _mount_or_unmount(argv[1:])
    except MountError as error:
        complain(error)
        return 1
    except OSError as error:
        complain(failure(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
