"""Who looks at the calls that the filter of ``mount.py run`` hands over: whose open it is, and who waits for whom."""

import errno
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest

from binderfs_fuse.command import attendant
from binderfs_fuse.command.attendant import Message, Verdict, identify_open
from binderfs_fuse.command.options import base_options
from binderfs_fuse.command.supervisor import Supervisor
from binderfs_fuse.fuse.supervised import REQUEST
from binderfs_fuse.limits import Limits
from tests.command.test_liars import liar
from tests.mounts import MOUNT, needs_mount


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def test_an_open_is_told_by_file_system_and_inode(tmp_path: Path) -> None:
    """A descriptor of a place alone is no open, nor is a number that is free."""
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    place = os.open(tmp_path / "file", os.O_PATH)
    free = os.dup(file)
    os.close(free)
    try:
        assert _identity(file) == identify_open(os.getpid(), file)
        for other, error in ((place, errno.EBADF), (free, errno.ENOENT)):
            with pytest.raises(OSError, match=r".*") as raised:
                identify_open(os.getpid(), other)

            assert error == raised.value.errno
    finally:
        os.close(file)
        os.close(place)


def test_only_what_was_open_is_told_whoever_replaces_it(tmp_path: Path) -> None:
    """While a thread puts another open and a mere place under the number, no other answer comes than its opens."""
    one = os.open(tmp_path / "one", os.O_CREAT | os.O_RDWR)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        other = os.open(Path(folder, "other"), os.O_CREAT | os.O_RDWR)
        place = os.open("/proc/self/mounts", os.O_PATH)
        shown = os.dup(one)
        ending = threading.Event()

        def replace() -> None:
            while not ending.is_set():
                for descriptor in (other, place, one):
                    os.dup2(descriptor, shown)

        thread = threading.Thread(target=replace)
        thread.start()
        seen = set()
        try:
            for _ in range(3000):
                try:
                    seen.add(identify_open(os.getpid(), shown))
                except OSError as error:
                    assert errno.EBADF == error.errno  # noqa: PT017 - none of the time it is one
        finally:
            ending.set()
            thread.join()
        opens = {_identity(one), _identity(other)}
        for descriptor in (one, other, place, shown):
            os.close(descriptor)

    assert seen <= opens


def test_a_verdict_is_read_as_it_was_said() -> None:
    """Every number of it, and texts of any bytes."""
    message = Message(
        Verdict.SERVE, -38, (1 << 64) - 1, bytes(range(REQUEST.size)), 5, 6, True, b"max=1\xff\0", b"/a b\n\xfe"
    )

    assert message == Message.unpack(message.pack())
    assert len(message.pack()) <= attendant.LONGEST


def test_no_user_has_all_attendants() -> None:
    """However many users have as many calls as they may, the next one has some served, too, but for a few."""
    supervisor = Supervisor(base_options(stats=True))
    got = Counter[int]()
    for user in range(6):
        while supervisor._may_start(user):
            supervisor._running[user] += 1
            got[user] += 1

    assert [32, 16, 8, 4, 2, 1] == [got[user] for user in range(6)]
    assert got.total() < Limits.attendants


@needs_mount
def test_a_path_that_does_not_answer_delays_only_its_caller(tmp_path: Path) -> None:
    """While the look-up of one mount's place hangs, other mounts are made; the caller can be killed at any time."""
    script = """
        mount -i -t binder binder "$0/deaf/place" & first=$!
        read line
        mkdir "$0/one" && mount -i -t binder binder "$0/one" && ls "$0/one"
        echo done
        read line
        kill -9 $first
    """
    with liar(tmp_path / "deaf", "deaf") as said:
        process = subprocess.Popen(
            [sys.executable, MOUNT, "run", "sh", "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                # The supervisor's, and not the kernel's for the call itself.
                assert "lookup\n" == said.readline()

                process.stdin.write("go\n")
                lines = [process.stdout.readline() for _ in range(6)]
                os.set_blocking(said.fileno(), False)
                again = said.readline()
                process.stdin.write("go\n")
            except BaseException:
                process.kill()
                raise

    assert ["binder\n", "binder-control\n", "features\n", "hwbinder\n", "vndbinder\n", "done\n"] == lines
    # It has not been given up meanwhile, after which the kernel itself looks for the place.
    assert "" == again
    assert 0 == process.returncode
