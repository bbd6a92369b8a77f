"""uapi/ is held against the kernel headers of the system (another set: ``KERNEL_HEADERS=FOLDER pytest tests/uapi``).

A header older than Linux 7.3 lacks some of our names: those are found by looking for the name in it, and left out.
"""

import os
import re
from functools import cache
from pathlib import Path

import pytest

from tests.uapi import headers

OPTIONS = [f"-isystem{os.environ['KERNEL_HEADERS']}"] if "KERNEL_HEADERS" in os.environ else []
THEIRS = {
    "binder.h": "<linux/android/binder.h>",
    "binderfs.h": "<linux/android/binderfs.h>",
    "fuse.h": "<linux/fuse.h>",
}
# FUSE carves new fields out of its padding, so that moves from version to version.
PADDING = re.compile(r"(padding|unused|dummy)\w*$")
# It says of which version a header is.
VERSION = "FUSE_KERNEL_MINOR_VERSION"
# Linux 7.3 as <linux/version.h> writes it.
KNOWN = 7 << 16 | 3 << 8


@cache
def _system(header: str) -> tuple[str, set[str]]:
    """Return the preprocessed text of the system's header, and all names in it, macros included."""
    text = headers.preprocess([THEIRS[header]], *OPTIONS)
    macros = re.findall(r"^#define (\w+) \S", headers.preprocess([THEIRS[header]], "-dM", *OPTIONS), re.MULTILINE)
    return text, {*re.findall(r"\w+", text), *macros}


def _body(text: str, structure: str) -> set[str] | None:
    """Return the words between the braces of a structure, or ``None`` where it is not defined."""
    start = re.search(rf"\bstruct {structure} \{{", text)
    if start is None:
        return None
    depth, end = 1, start.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return set(re.findall(r"\w+", text[start.end() : end]))


def _expressions(header: str) -> tuple[list[str], list[str]]:
    """Return what can be compared of a header, as C expressions, and the names that the system does not have."""
    text, names = _system(header)
    common = [name for name in headers.constants(header) if name in names and name != VERSION]
    missing = [name for name in headers.constants(header) if name not in names]
    for structure in headers.structures(header):
        body = _body(text, structure)
        if body is None:
            missing.append(f"struct {structure}")
            continue
        common.append(f"sizeof(struct {structure})")
        for member in headers.members(structure):
            if header == "fuse.h" and PADDING.search(member):
                continue
            if member.rpartition(".")[2] in body or "." in member:
                common.append(f"offsetof(struct {structure}, {member})")
                common.append(f"sizeof(((struct {structure} *)0)->{member})")
            else:
                missing.append(f"struct {structure}.{member}")
    return common, missing


def _system_version() -> int:
    macros = headers.preprocess(["<linux/version.h>"], "-dM", *OPTIONS)
    return int(re.findall(r"#define LINUX_VERSION_CODE (\d+)", macros)[0])


@pytest.mark.parametrize("header", headers.OURS)
def test_values_sizes_and_offsets_are_the_kernel_s(header: str, tmp_path: Path) -> None:
    """Every constant, structure and member that the system's header also has is the same there."""
    common, _ = _expressions(header)
    ours = headers.evaluate([f'"{headers.UAPI / header}"'], common, tmp_path)
    theirs = headers.evaluate([THEIRS[header]], common, tmp_path, *OPTIONS)

    assert theirs == ours


@pytest.mark.parametrize("header", headers.OURS)
def test_a_name_is_missing_only_from_an_older_kernel_s_header(header: str) -> None:
    """We name nothing that the kernel of our version does not have, so a misspelt name is found with its headers."""
    _, missing = _expressions(header)
    if missing and _system_version() < KNOWN:
        pytest.skip(f"the system's {header} is older and lacks {', '.join(missing)}")

    assert [] == missing


@pytest.mark.parametrize("header", ["binder.h", "binderfs.h"])
def test_nothing_of_binder_is_left_out(header: str) -> None:
    """Every binder constant and structure of the system's header is in ours; of FUSE we take what we use."""
    text, names = _system(header)
    ours = {name for each in headers.OURS[:2] for name in (*headers.constants(each), *headers.structures(each))}
    theirs = {name for name in names if re.match(r"(BC|BR|TF|BINDER|BINDERFS|FLAT_BINDER)_[A-Z]", name)}
    theirs |= set(re.findall(r"\bstruct (\w+) \{", text))
    unknown = sorted(theirs - ours)
    if unknown and _system_version() > KNOWN:
        pytest.skip(f"the system's {header} is newer and has {', '.join(unknown)}")

    assert [] == unknown
