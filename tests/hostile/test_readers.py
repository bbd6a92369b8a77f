"""Many processes that read a long log, which takes no device: others open devices, and who is killed is gone."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.hostile.conftest import PATIENCE, Actor
from tests.mounts import CHECKOUT, Mounted

Start = Callable[..., Actor]
Mount = Callable[..., Mounted]
Readers = Callable[[int], list[subprocess.Popen[bytes]]]

OBJECTS = 16_000


@pytest.fixture(name="full")
def _full(mount_binderfs: Mount, actor: Start) -> Mounted:
    """A mount whose state takes long to tell."""
    devices = "binder", *(f"binder{number}" for number in range(9))
    mounted = mount_binderfs("mode=666", f"devices={':'.join(devices)}")
    for device in devices:
        actor(mounted, "open", "manager", device=device)
        assert str(OBJECTS) == actor(mounted, "open", device=device).do(f"publish {OBJECTS}")
    return mounted


@pytest.fixture(name="readers")
def _readers(full: Mounted) -> Iterator[Readers]:
    """Start processes that read the state from its start, over and over, as a user without rights."""
    started: list[subprocess.Popen[bytes]] = []

    def start(count: int) -> list[subprocess.Popen[bytes]]:
        script = "echo; while read -r line < binder_logs/state; do :; done"
        # Who is not root does not get to the folder by its name.
        new = [
            subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, cwd=full.path, user=3000)
            for _ in range(count)
        ]
        started.extend(new)
        for process in new:
            assert process.stdout is not None
            assert b"\n" == process.stdout.readline()
        return new

    yield start
    for process in started:
        process.kill()
    for process in started:
        process.communicate(timeout=PATIENCE)


# Makes the text of the state by another way than the file of that name, which takes about as long, and takes its start.
TELL = """
import fcntl, os, sys
from binderfs_fuse.fuse.control import _QUERY, QUERY
argument = bytearray(_QUERY.pack(b"state", 0, 0, b""))
descriptor = os.open(sys.argv[1] + "/binder-control", os.O_RDONLY)
print(flush=True)
fcntl.ioctl(descriptor, QUERY, argument)
"""


@contextlib.contextmanager
def text_being_made(mounted: Mounted) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a process that ends when it has a text of the state."""
    process = subprocess.Popen([sys.executable, "-c", TELL, mounted.path], stdout=subprocess.PIPE, cwd=CHECKOUT)
    try:
        assert process.stdout is not None
        assert b"\n" == process.stdout.readline()
        yield process
    finally:
        process.communicate(timeout=PATIENCE)


def test_opens_do_not_wait_for_readers(full: Mounted, readers: Readers, actor: Start) -> None:
    """While 120 processes read the state devices are opened, in less time than it takes to tell the state once."""
    others = [actor(full, "as 1000") for _ in range(5)]
    readers(120)
    with text_being_made(full) as text:
        opened = [other.do("open") for other in others]
        status = text.poll()

    assert ["0"] * 5 == opened
    assert status is None


def test_killed_readers_are_gone(full: Mounted, readers: Readers) -> None:
    """Whoever is killed while its text is being made, or is yet to be, is gone before a text is there."""
    killed = readers(120)
    with text_being_made(full) as text:
        for process in killed:
            process.kill()
        for process in killed:
            process.wait(timeout=PATIENCE)
        status = text.poll()

    assert status is None
