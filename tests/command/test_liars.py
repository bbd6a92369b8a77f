"""Commands that ask a server which is none of ours, and which says what it likes, or nothing."""

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from binderfs_fuse.command import servers
from binderfs_fuse.command.graph import dot
from binderfs_fuse.command.servers import NonsenseError
from binderfs_fuse.command.snapshot import parse_calls, parse_state
from binderfs_fuse.fuse import mounting
from tests.command.liar import SHAPES
from tests.mounts import CHECKOUT, mount_py, needs_mount


@contextlib.contextmanager
def liar(mountpoint: Path, mode: str, number: int = 0) -> Iterator[IO[str]]:
    """Have a lying server at a new directory; give what it says."""
    mountpoint.mkdir()
    command = [sys.executable, "-m", "tests.command.liar", str(mountpoint), mode, str(number)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert "mounted\n" == process.stdout.readline()

            yield process.stdout
        finally:
            process.kill()
            if mounting.mount_at(mountpoint):
                subprocess.run(["umount", "--lazy", mountpoint], check=False)


def run_all(mountpoint: Path) -> list[int]:
    """Run every command that asks; return their statuses, once nothing but text has been seen."""
    statuses = []
    for command in (
        ("status", "--interval", "0"),
        ("status", "--interval", "0", "--json"),
        ("graph", "--dot"),
        ("-u",),
    ):
        done = mount_py(*command, mountpoint, errors="surrogateescape")
        said = done.stdout + done.stderr

        assert "Traceback" not in said
        assert "" == "".join(letter for letter in said if not letter.isprintable() and letter not in "\n\t")
        assert bool(said) or not done.returncode or command == ("-u",)

        statuses.append(done.returncode)
    return statuses


@needs_mount
@pytest.mark.parametrize(
    ("mode", "number"),
    [
        *((mode, 0) for mode in ("endless", "huge", "shrinking", "silent")),
        *(("noise", number) for number in range(4)),
        *(("shapes", number) for number in (1, 7, 8, 9, 10, 12, 14, 16, 18)),
        *(("refusing", number) for number in (errno.EPERM, errno.ENOENT, errno.EPROTO, errno.ENOTTY)),
    ],
)
def test_nonsense_is_an_error_line(tmp_path: Path, mode: str, number: int) -> None:
    """Whatever a server answers, and if it answers nothing, a command ends with a line, and can unmount.

    Questions that are not answered keep a mount in use.
    """
    with liar(tmp_path / "lies", mode, number):
        status, as_json, graph, unmount = run_all(tmp_path / "lies")

        assert unmount == int(mode == "silent")
        assert 0 == mount_py("-u", "-l", tmp_path / "lies").returncode or not unmount

    assert 1 == graph
    assert status == as_json
    assert status or mode == "refusing"


@needs_mount
@pytest.mark.parametrize(("mode", "number"), [("controls", 0), ("state", 1), ("state", 2)])
def test_no_name_commands_a_terminal(tmp_path: Path, mode: str, number: int) -> None:
    """Names of regions, devices and contexts come out escaped, in a picture's text, too."""
    with liar(tmp_path / "lies", mode, number):
        done = mount_py("status", "--interval", "0", tmp_path / "lies")

        assert r"regions \x1b]0;owned\x07\x1b[2J\r\x0b\x0c\x7f\x85\u202e\u2028\n  x, devices " in done.stdout
        assert [0, 0, 0, 0] == run_all(tmp_path / "lies")


@pytest.mark.parametrize("text", SHAPES)
def test_what_is_no_information_is_nonsense(text: str) -> None:
    """JSON of another shape, out of range, too deep or no JSON at all is refused in one way."""
    with pytest.raises(NonsenseError):
        servers.parse_information(text.encode())


@given(st.binary() | st.text().map(lambda text: text.encode(errors="replace")))
def test_any_text_is_read(text: bytes) -> None:
    """No text makes a reader of it fail in another way than it says."""
    with contextlib.suppress(NonsenseError):
        servers.parse_information(text)
    decoded = os.fsdecode(text)
    parse_calls(decoded)
    picture = dot(decoded, parse_state("proc 1\ncontext " + decoded + "\n" + decoded))

    assert [] == [letter for letter in picture if letter != "\n" and not letter.isprintable()]


def test_many_opens_are_too_many() -> None:
    """A text that lists more processes than there can be is refused, and takes no time for each of them."""
    with pytest.raises(OSError, match=r"Message too long"):
        parse_state("proc 4194305\ncontext \n" * ((1 << 17) + 1))
