"""Builds ``binderfs_fuse._uapi``: the constants and layouts of ``uapi/*.h``, as this machine's compiler sees them.

cffi cannot evaluate C, so the headers are turned into declarations that leave every value to the compiler. They are
written so that a few rules suffice:

- ``#define NAME expression`` becomes ``#define NAME ...``; macros with parameters and other directives go;
- ``__attribute__((packed))`` becomes a ``...;`` member, which lets the compiler place the others;
- an array length that is not a plain number becomes ``...``.
"""

import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ("binder.h", "binderfs.h", "fuse.h")

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_CONSTANT = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+\S.*$", re.MULTILINE)
_DIRECTIVE = re.compile(r"^[ \t]*#(?!define \w+ \.\.\.$).*\n", re.MULTILINE)
_PACKED = re.compile(r"\}[ \t]*__attribute__\(\(packed\)\)")
_LENGTH = re.compile(r"\[(?!\d+\]|\])[^\]]+\]")


def declarations(header: str) -> str:
    """Return the text of a C header as a cdef in which the compiler fills in every value."""
    text = _COMMENT.sub("", header).replace("\\\n", " ")
    text = _CONSTANT.sub(r"#define \1 ...", text)
    text = _DIRECTIVE.sub("", text)
    text = _PACKED.sub("...; }", text)
    return _LENGTH.sub("[...]", text)


ffibuilder = FFI()
for name in HEADERS:
    ffibuilder.cdef(declarations((ROOT / "uapi" / name).read_text()))
ffibuilder.set_source(
    "binderfs_fuse._uapi",
    "\n".join(f'#include "{name}"' for name in HEADERS),
    include_dirs=["uapi"],
    depends=[f"uapi/{name}" for name in HEADERS],
)
