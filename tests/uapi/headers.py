"""Names in C headers, and their values as a compiler sees them; shared by the tests of ``uapi/``."""

import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from binderfs_fuse._uapi import ffi

UAPI = Path(__file__).parent.parent.parent / "uapi"
OURS = ("binder.h", "binderfs.h", "fuse.h")


def constants(header: str) -> list[str]:
    """Return the names that one of our headers gives a value, in order."""
    return re.findall(r"^#define (\w+) \S", (UAPI / header).read_text(), re.MULTILINE)


def structures(header: str) -> list[str]:
    """Return the structures that one of our headers defines, in order."""
    return re.findall(r"^struct (\w+) \{", (UAPI / header).read_text(), re.MULTILINE)


def members(structure: str) -> list[str]:
    """Return the paths of all members of a structure, those of unions and structures inside it too."""

    def walk(ctype: Any, prefix: str) -> Iterator[str]:
        for name, field in ctype.fields:
            yield prefix + name
            if field.type.kind in ("struct", "union"):
                yield from walk(field.type, f"{prefix}{name}.")

    return list(walk(ffi.typeof(f"struct {structure}"), ""))


def preprocess(includes: Iterable[str], *options: str) -> str:
    """Return what the preprocessor makes of these ``#include`` operands."""
    source = "".join(f"#include {name}\n" for name in includes)
    return subprocess.run(
        ["cc", "-E", "-P", *options, "-x", "c", "-"], input=source, capture_output=True, text=True, check=True
    ).stdout


def evaluate(includes: Iterable[str], expressions: Iterable[str], folder: Path, *options: str) -> dict[str, int]:
    """Compile and run a program that prints the value of each expression; raises ``CalledProcessError``."""
    lines = [f"#include {name}" for name in ("<stddef.h>", "<stdint.h>", "<stdio.h>", "<sys/ioctl.h>", *includes)]
    lines += ["int main(void) {"]
    lines += [f'printf("%llu %s\\n", (unsigned long long)({text}), "{text}");' for text in expressions]
    lines += ["return 0; }"]
    program = folder / "evaluate"
    subprocess.run(
        ["cc", "-O0", "-Wall", "-Werror", *options, "-x", "c", "-", "-o", program],
        input="\n".join(lines),
        text=True,
        check=True,
    )
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {text: int(value) for value, text in (line.split(" ", 1) for line in output.splitlines())}
