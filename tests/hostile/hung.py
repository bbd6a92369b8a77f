"""A FUSE file system of one file that lets every read of it hang: ``python -m tests.hostile.hung MOUNTPOINT``.

It says "mounted", and "read" for each READ that it leaves unanswered. Once it is told "flush", it does the same with
FLUSH, that is with the close of any descriptor, which not even SIGKILL ends; and says "flush" once when that holds, and
for each. When its standard input ends, so does it: all that hangs is then answered by the kernel with an error.
"""

import os
import stat
import sys
import threading
from pathlib import Path
from typing import Final

from binderfs_fuse import uapi
from binderfs_fuse.fuse import mounting

NAME: Final = b"file"
_SIZE: Final = 1 << 20
_FILE: Final = 2
_hangs: Final = {uapi.FUSE_READ: "read"}


def _attributes(inode: int) -> tuple[int, ...]:
    mode = stat.S_IFDIR | 0o755 if inode == uapi.FUSE_ROOT_ID else stat.S_IFREG | 0o444
    size = 0 if inode == uapi.FUSE_ROOT_ID else _SIZE
    values = {"ino": inode, "size": size, "mode": mode, "nlink": 1, "blksize": 4096}
    return tuple(values.get(name, 0) for name in uapi.fuse_attr.fields)


def _pack(codec: uapi.Codec, **values: int) -> bytes:
    return codec.pack(*(values.get(name, 0) for name in codec.fields))


def _answer(opcode: int, inode: int, body: bytes) -> tuple[int, bytes] | None:
    """Return the error and the answer to a request; None for none."""
    attributes = uapi.fuse_attr.pack(*_attributes(inode))
    if opcode == uapi.FUSE_INIT:
        major, minor = uapi.fuse_init_in.unpack(body.ljust(uapi.fuse_init_in.size, b"\0"))[:2]
        return 0, _pack(uapi.fuse_init_out, major=major, minor=min(minor, 31), max_write=4096)
    if opcode == uapi.FUSE_LOOKUP:
        if body.rstrip(b"\0") != NAME:
            return -2, b""
        entry = _pack(uapi.fuse_entry_out, nodeid=_FILE)
        return 0, entry[: -uapi.fuse_attr.size] + uapi.fuse_attr.pack(*_attributes(_FILE))
    if opcode == uapi.FUSE_GETATTR:
        return 0, _pack(uapi.fuse_attr_out)[: -uapi.fuse_attr.size] + attributes
    if opcode in (uapi.FUSE_OPEN, uapi.FUSE_OPENDIR):
        # Or opening would wait for the pages that are being read.
        return 0, _pack(uapi.fuse_open_out, open_flags=uapi.FOPEN_KEEP_CACHE)
    if opcode in _hangs:
        _say(_hangs[opcode])
        return None
    if opcode in (uapi.FUSE_RELEASE, uapi.FUSE_RELEASEDIR, uapi.FUSE_FLUSH):
        return 0, b""
    if opcode in (uapi.FUSE_FORGET, uapi.FUSE_BATCH_FORGET, uapi.FUSE_INTERRUPT):
        return None
    return -38, b""


def _say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


def _listen() -> None:
    for _ in sys.stdin:
        _hangs[uapi.FUSE_FLUSH] = "flush"
        _say("flush")
    os._exit(0)


def main(mountpoint: Path) -> None:
    """Mount, and serve for ever."""
    connection = mounting.connect("hung", mountpoint, allow_other=True)
    threading.Thread(target=_listen, daemon=True).start()
    _say("mounted")
    while True:
        message = os.read(connection.descriptor, 1 << 17)
        _, opcode, unique, inode = uapi.fuse_in_header.unpack_from(message)[:4]
        answer = _answer(opcode, inode, message[uapi.fuse_in_header.size :])
        if answer is not None:
            error, text = answer
            head = uapi.fuse_out_header.pack(uapi.fuse_out_header.size + len(text), error, unique)
            os.write(connection.descriptor, head + text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
