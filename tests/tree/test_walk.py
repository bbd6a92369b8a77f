"""The tree of a mount, held against the real binderfs: one program asks both everything (walk.c)."""

import difflib
import os
import re
import subprocess
from pathlib import Path

import pytest

from binderfs_fuse.host.region import SIZE
from tests.conformance.building import find_oracle
from tests.mounts import Mounted

HERE = Path(__file__).parent
TRANSCRIPT = HERE / "walk.txt"

# Where FUSE lets nobody answer as the driver does: what the driver says, and what a mount says, which has a reason.
DIFFERENCES = {
    # What is in the page cache can be mapped.
    "mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0) -> -1 ENODEV": (
        "mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0) -> ADDRESS"
    ),
    # pyfuse3 has no such operation.
    "fallocate(fd, 0, 0, 1) -> -1 ENODEV": "fallocate(fd, 0, 0, 1) -> -1 EOPNOTSUPP",
    # The kernel answers for regular files, which devices are here.
    "ioctl(fd, FIONREAD, b) -> -1 EINVAL": "ioctl(fd, FIONREAD, b) -> 0",
    'setxattr(at("binder"), "user.x", "1", 1, 0) -> -1 EPERM': (
        'setxattr(at("binder"), "user.x", "1", 1, 0) -> -1 EOPNOTSUPP'
    ),
    'getxattr(at("binder"), "user.x", b, 10) -> -1 ENODATA': (
        'getxattr(at("binder"), "user.x", b, 10) -> -1 EOPNOTSUPP'
    ),
    # The kernel computes these from the size; the second goes on from where the first has led.
    "lseek(fd, 0, SEEK_END) -> -1 EINVAL": "lseek(fd, 0, SEEK_END) -> 0",
    "lseek(fd, 5, SEEK_CUR) -> 7": "lseek(fd, 5, SEEK_CUR) -> 5",
    "lseek(fd, 0, SEEK_DATA) -> -1 EINVAL": "lseek(fd, 0, SEEK_DATA) -> -1 ENXIO",
}
# What differs for devices (binder-control comes before them). In the page cache, a page that is read for read(2) cannot
# be told from one for a mapping, and what is mapped must have a size.
PASSED_THROUGH = {
    # The kernel wants no other flag with FOPEN_PASSTHROUGH.
    "lseek(fd, 0, SEEK_SET) -> -1 ESPIPE": "lseek(fd, 0, SEEK_SET) -> 0",
}
IN_PAGE_CACHE = {
    "read(fd, b, 1) -> -1 EINVAL": "read(fd, b, 1) -> 1",
    "pread(fd, b, 1, 0) -> -1 EINVAL": "pread(fd, b, 1, 0) -> -1 ESPIPE",
    'pwrite(fd, "x", 1, 0) -> -1 EINVAL': 'pwrite(fd, "x", 1, 0) -> -1 ESPIPE',
}


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled to run anywhere."""
    program = tmp_path_factory.mktemp("walk") / "walk"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-static"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", program, HERE / "walk.c"], check=True)
    return program


def _said(*command: str | Path) -> list[str]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return re.sub(r"(mmap\(.*\)) -> \d+$", r"\1 -> ADDRESS", done.stdout, flags=re.MULTILINE).splitlines()


def _expected(region: str) -> list[str]:
    """Return the transcript with what differs for this kind of region."""
    lines = [DIFFERENCES.get(line, line) for line in TRANSCRIPT.read_text().splitlines()]
    devices = lines.index("# opening devices")
    there = PASSED_THROUGH if region == "passthrough" else IN_PAGE_CACHE
    return lines[:devices] + [there.get(line, line) for line in lines[devices:]]


def _differences(expected: list[str], said: list[str]) -> list[str]:
    return [line for line in difflib.ndiff(expected, said) if line[0] in "+-"]


def test_the_tree_answers_as_the_drivers_does(walk: Path, mounted: Mounted) -> None:
    """Every listing, attribute and errno is the recorded one, but for what FUSE decides."""
    said = _said(walk, mounted.path)
    if mounted.region == "pagecache":
        said = [line.replace(f"size={SIZE}", "size=0") for line in said]

    assert [] == _differences(_expected(mounted.region), said)


def test_the_transcript_is_the_drivers(walk: Path) -> None:
    """The real driver says now what was recorded."""
    oracle = find_oracle()
    if oracle is None:
        pytest.skip("no run-oracle ($BINDER_ORACLE), or no qemu-system-x86_64: the transcript is taken on trust")

    assert [] == _differences(TRANSCRIPT.read_text().splitlines(), _said(oracle, walk, "/dev/binderfs"))
