"""The user's guide and the manual page: every shell line in them runs, and prints what they say it prints."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from binderfs_fuse.command.options import TABLE
from tests.mounts import CHECKOUT, needs_mount

GUIDE = CHECKOUT / "docs" / "guide.md"
MANUAL = CHECKOUT / "docs" / "manual.md"

# Where a reader's machine is the test's to change: namespaces of its own, with /dev and /sbin that may be written to.
_MACHINE = """
import os, sys
from binderfs_fuse.command import namespace
namespace.enter()
namespace.furnish_dev(())
os.execvp("bash", ["bash", "-eu", "-o", "pipefail"])
"""
# Were the tests run by make, these would have the make of the reader tell of the folders that it enters and leaves.
_OF_MAKE = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
_PREPARE = """
mount -t tmpfs none "$FOLDER"
mkdir "$FOLDER/upper" "$FOLDER/work" "$FOLDER/bin" "$FOLDER/prefix" "$FOLDER/tmp"
sbin=$(readlink -f /sbin)
mount -t overlay -o "lowerdir=$sbin,upperdir=$FOLDER/upper,workdir=$FOLDER/work" none "$sbin"
printf '#!/bin/sh\\nexec "$@"\\n' >"$FOLDER/bin/sudo"
chmod +x "$FOLDER/bin/sudo"
"""


@dataclass
class Block:
    """Shell lines, what to wait for before them, and what they are said to print, if anything is said."""

    script: str
    wait: str
    output: str | None


def blocks(document: Path) -> list[Block]:
    """Return the shell blocks of a document, in order; one marked as text right after one is what that prints."""
    found = re.finditer(
        r"(?:^<!-- wait: (?P<wait>.*) -->\n)?^```sh\n(?P<script>.*?)^```$(?:\n\n```text\n(?P<output>.*?)^```$)?",
        document.read_text(),
        flags=re.MULTILINE | re.DOTALL,
    )
    return [Block(match["script"], match["wait"] or "", match["output"]) for match in found]


def follow(documents: list[Block], folder: Path) -> list[str]:
    """Do what a document says; return what each block prints."""
    script = _PREPARE
    for block in documents:
        if block.wait:
            script += f"until {block.wait}; do :; done\n"
        script += "echo '=== block'\n" + block.script.replace("/tmp/", f"{folder}/tmp/")
    done = subprocess.run(
        [sys.executable, "-c", _MACHINE],
        input=script,
        cwd=CHECKOUT,
        env={name: value for name, value in os.environ.items() if name not in _OF_MAKE}
        | {
            "FOLDER": str(folder),
            "PREFIX": str(folder / "prefix"),
            "PATH": f"{folder}/bin:{folder}/prefix/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(CHECKOUT),
            "LC_ALL": "C",
        },
        capture_output=True,
        text=True,
        check=False,
    )

    # Where other users cannot reach this Python, installing says so.
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("tools/install: only root, or ")]

    assert ([], 0) == (complaints, done.returncode)

    return done.stdout.split("=== block\n")[1:]


def assert_said(block: Block, printed: str) -> None:
    """Hold what a block printed against what it is said to print, where ``...`` stands for anything within a line."""
    if block.output is not None:
        pattern = ".*".join(map(re.escape, block.output.split("...")))

        assert re.fullmatch(pattern, printed), f"{printed!r}\nis not\n{block.output!r}"


@needs_mount
def test_the_guide_can_be_followed(tmp_path: Path) -> None:
    """From the installation on, on one machine, in its order."""
    guide = blocks(GUIDE)

    assert len(guide) > 10

    for block, printed in zip(guide, follow(guide, tmp_path), strict=True):
        assert_said(block, printed)


@needs_mount
def test_the_manuals_examples_work(tmp_path: Path) -> None:
    """Once it is installed."""
    manual = [Block("make install\n", "", None), *blocks(MANUAL)]
    follow(manual, tmp_path)


@needs_mount
def test_the_lines_for_ci_work(tmp_path: Path) -> None:
    """What the guide's example of a job runs, step by step, beginning with nothing but this project as a folder."""
    steps = re.findall(r"^ +- run: (.*)$", GUIDE.read_text(), flags=re.MULTILINE)

    assert len(steps) > 3

    submodule = Block('ln -s "$PWD" "$FOLDER/binderfs-fuse"; cd "$FOLDER"\n', "", None)
    follow([submodule, *(Block(step + "\n", "", None) for step in steps)], tmp_path)


@pytest.mark.parametrize("document", [GUIDE, MANUAL], ids=["guide", "manual"])
def test_every_option_is_described(document: Path) -> None:
    """Those that take a value, in the guide's table and in the manual."""
    text = document.read_text().replace("*", "")

    assert [] == [name for name in TABLE if f"{name}=" not in text]


@pytest.mark.skipif(not shutil.which("man"), reason="there is no man")
def test_the_manual_is_a_manual_page(tmp_path: Path) -> None:
    """One command makes it of its source, and man has nothing to complain about."""
    page = tmp_path / "binderfs-fuse.8"
    subprocess.run([CHECKOUT / "tools" / "manual", page], check=True)
    shown = subprocess.run(
        ["man", "--warnings", "-l", page],
        env=os.environ | {"LC_ALL": "C.UTF-8", "MANWIDTH": "100", "MAN_KEEP_FORMATTING": ""},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "" == shown.stderr
    assert "BINDERFS-FUSE(8)" in shown.stdout
    assert "binderfs-fuse run [-o OPTION,...] [--] COMMAND ..." in shown.stdout
