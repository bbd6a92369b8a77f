"""The oracle's sample client (tree, transactions, one-way, death, errors, every log): a mount against the driver."""

import difflib
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.building import find_oracle
from tests.mounts import Mounted


def _normalized(text: str, binderfs: str) -> list[str]:
    """Replace what must differ: the kernel, devices' type, inodes, times, pointers, addresses, source lines, pids."""
    for pattern, replacement in (
        (re.escape(binderfs), "BINDERFS"),
        (r"^Linux version .*", "KERNEL"),
        (r"mode=020(\d{3})", r"mode=100\1"),
        (r"rdev=char\nparent    minor=\d+", "rdev=0"),
        (r"ino=\d+", "ino=N"),
        (r"elapsed \d+ms", "elapsed T"),
        (r"---- end, \d+ bytes", "---- end"),
        (r"(transaction \d+:) [0-9a-f]{16}", r"\1 POINTER"),
        (r"(s \d+ w \d+ d) (?!0{16})[0-9a-f]{16}", r"\1 POINTER"),
        # Hashed, they have eight digits, and none is zero.
        (r"u0{8}(?!0{8})[0-9a-f]{8} c0{8}[0-9a-f]{8}", "u-c-"),
        (r"l=\d+", "l=N"),
        # What is read has pids and addresses in it; it is shown decoded, too.
        (r"(read [0-9a-f]{4}) .*", r"\1"),
        # Where it comes between the lines of the other process is for the scheduler to say.
        (r"^.*TIMING.*\n", ""),
    ):
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    pids = dict.fromkeys(re.findall(r"(?:^proc |process |thread )(\d+)\b", text, flags=re.MULTILINE))
    for number, pid in enumerate(pids):
        text = re.sub(rf"\b{pid}\b", f"PID{number}", text)
    return text.splitlines()


def test_the_sample_prints_what_it_prints_on_the_driver(mount_binderfs: Callable[..., Mounted], tmp_path: Path) -> None:
    """On a fresh mount, more than a thousand lines are the same, among them all log files at nine points."""
    oracle = find_oracle()
    if oracle is None:
        pytest.skip("the sample comes with run-oracle ($BINDER_ORACLE)")
    program = tmp_path / "sample"
    subprocess.run(
        [os.environ.get("CC", "cc"), "-O1", "-static", "-o", program, oracle.with_name("sample.c")], check=True
    )
    mounted = mount_binderfs()
    done = subprocess.run([program, "-d", mounted.path], stdout=subprocess.PIPE, text=True, check=True)
    expected = _normalized(oracle.with_name("sample-transcript.txt").read_text(), "/dev/binderfs")
    said = _normalized(done.stdout, str(mounted.path))

    assert [] == [line for line in difflib.unified_diff(expected, said, n=0, lineterm="") if line[0] in "+-"]
