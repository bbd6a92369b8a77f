"""A FUSE file system that looks like a mount of ours, and lies: ``-m tests.command.liar MOUNTPOINT MODE NUMBER``.

MODE says how it answers what commands ask (`answers`), the number which of several ways. "deaf" answers no LOOKUP, and
says "lookup" for each. It says "mounted", and ends when it is unmounted or its input ends.
"""

import json
import os
import random
import stat
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from binderfs_fuse import uapi
from binderfs_fuse.fuse import control, mounting
from tests.hostile.hung import _pack

_CONTROL: Final = 2
_QUERY: Final = struct.Struct("=32sQQ8000s")
_ESCAPE: Final = "\x1b]0;owned\x07\x1b[2J\r\x0b\x0c\x7f\x85\u202e\u2028\n  x"
_INFORMATION: Final = {
    "pid": 1,
    "start": 1,
    "version": _ESCAPE,
    "uptime": 1.5,
    "max": 3,
    "stats": True,
    "read_only": False,
    "chosen": {_ESCAPE: _ESCAPE},
    "managers": [1],
    "region": _ESCAPE,
    "devices": [_ESCAPE, "\udcff", "\ud800"],
}
_STATE: Final = (
    "binder state:\nproc 1\ncontext a\x1b[2J\r\x0b\x85b\n  thread 1: l 00\n"
    "  node 1: u0000000000000000 c0000000000000000\n"
    'proc 2\ncontext "];evil[label=\\\n  ref 1: desc 1 node 1 s 1 w 1 d 0\n'
)
SHAPES: Final = (
    *("", "[]", "7", '"x"', "null", "{", "nul", "NaN", "9" * 5000, "[" * 100000, '{"a":' * 100000),
    *('{"pid": "1"}', '{"pid": -5}', '{"pid": 1e400}', '{"pid": 99999999999999999999}', '{"pid": true}'),
    *('{"uptime": NaN}', '{"uptime": "x"}', '{"devices": {"a": 1}}', '{"devices": [1]}', '{"devices": "binder"}'),
    *('{"managers": "x"}', '{"managers": [-1]}', '{"region": ["\\u001b"]}', '{"start": 1.5}', '{"chosen": [1]}'),
)
"""What is no information of a server's."""


def _noise(number: int) -> bytes:
    chance = random.Random(number)
    return chance.randbytes(chance.randrange(20000))


def _text(text: Callable[[str], bytes]) -> Callable[[str, int], tuple[int, int, bytes] | None]:
    return lambda name, offset: (0, len(text(name)), text(name)[offset : offset + 8000])


def _controls(name: str) -> bytes:
    if name == "info":
        return json.dumps(_INFORMATION).encode()
    return _STATE.encode() if name == "state" else b"BC_TRANSACTION: 5\x1b[2J\nBC_TRANSACTION: 7\n"


def answers(mode: str, number: int) -> Callable[[str, int], tuple[int, int, bytes] | None]:
    """Return how a question for a text from an offset on is answered: a result, the whole size, and a part."""
    return {
        "noise": _text(lambda _: _noise(number)),
        "shapes": _text(lambda name: SHAPES[number].encode() if name == "info" else b""),
        "controls": _text(_controls),
        "state": _text(lambda name: _controls(name) if name == "info" else _noise(number)),
        "endless": lambda _, offset: (0, offset + 100000, b"x" * 8000),
        "huge": lambda _, __: (0, (1 << 64) - 1, b"x" * 8000),
        "shrinking": lambda _, offset: (0, 100 if offset else 100000, b"{" * 8000),
        "refusing": lambda _, __: (-number, 0, b""),
        "silent": lambda _, __: None,
    }[mode]


def main(mountpoint: Path, mode: str, number: int) -> None:
    """Mount, and serve until that is unmounted."""
    if mode == "deaf":
        # `mount.py run` takes away mounts of ours in its namespace.
        mounting.SUBTYPE = "deaf"  # type: ignore[misc]
    connection = mounting.connect("liar", mountpoint, allow_other=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    _say("mounted")
    answer_question = None if mode == "deaf" else answers(mode, number)
    while True:
        try:
            message = os.read(connection.descriptor, 1 << 17)
        except OSError:
            return
        _, opcode, unique, inode = uapi.fuse_in_header.unpack_from(message)[:4]
        body = message[uapi.fuse_in_header.size :]
        attributes = {"ino": inode, "mode": stat.S_IFDIR | 0o777 if inode == 1 else stat.S_IFREG | 0o666, "nlink": 1}
        error, text = 0, b""
        if opcode == uapi.FUSE_INIT:
            major, minor = uapi.fuse_init_in.unpack(body.ljust(uapi.fuse_init_in.size, b"\0"))[:2]
            text = _pack(uapi.fuse_init_out, major=major, minor=min(minor, 31), max_write=4096)
        elif opcode == uapi.FUSE_LOOKUP:
            if mode == "deaf":
                _say("lookup")
                continue
            if body.rstrip(b"\0") == control.CONTROL.encode():
                entry = _pack(uapi.fuse_entry_out, nodeid=_CONTROL)[: -uapi.fuse_attr.size]
                text = entry + _pack(uapi.fuse_attr, **attributes | {"ino": 2, "mode": stat.S_IFREG | 0o666})
            else:
                error = -2
        elif opcode == uapi.FUSE_GETATTR:
            text = _pack(uapi.fuse_attr_out)[: -uapi.fuse_attr.size] + _pack(uapi.fuse_attr, **attributes)
        elif opcode in (uapi.FUSE_OPEN, uapi.FUSE_OPENDIR):
            text = _pack(uapi.fuse_open_out)
        elif opcode == uapi.FUSE_IOCTL and answer_question is not None:
            name, offset, _, _ = _QUERY.unpack(body[-_QUERY.size :].ljust(_QUERY.size, b"\0"))
            answer = answer_question(name.rstrip(b"\0").decode(errors="replace"), offset)
            if answer is None:
                continue
            result, size, part = answer
            text = struct.pack("=iIII", result, 0, 0, 0)
            text += b"" if result else _QUERY.pack(name, offset, size, part)
        elif opcode in (uapi.FUSE_FORGET, uapi.FUSE_BATCH_FORGET, uapi.FUSE_INTERRUPT):
            continue
        elif opcode not in (uapi.FUSE_RELEASE, uapi.FUSE_RELEASEDIR, uapi.FUSE_FLUSH):
            error = -38
        head = uapi.fuse_out_header.pack(uapi.fuse_out_header.size + len(text), error, unique)
        os.write(connection.descriptor, head + text)


def _say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
