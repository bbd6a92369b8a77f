"""Who looks at the calls that the filter of ``mount.py run`` hands over: whose open it is, and who waits for whom."""

import contextlib
import errno
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.command import attendant, seccomp
from binderfs_fuse.command.attendant import Message, Verdict, identify_open
from binderfs_fuse.command.options import base_options
from binderfs_fuse.command.seccomp import Notification
from binderfs_fuse.command.supervisor import _ATTENDANTS, Supervisor
from binderfs_fuse.fuse.supervised import REQUEST
from binderfs_fuse.host import procfs, tasks
from tests.command.test_liars import liar
from tests.hostile.conftest import until
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


@pytest.mark.parametrize("call", [seccomp.IOCTL, seccomp.MOUNT, seccomp.FSOPEN])
def test_a_call_is_read_as_it_was_told(call: str) -> None:
    """With the largest of numbers, too."""
    notification = Notification(
        (1 << 64) - 1, (1 << 32) - 1, call, tuple((1 << 64) - 1 - number for number in range(6))
    )

    assert notification == Notification.unpack(notification.pack())
    assert len(notification.pack()) <= seccomp.LONGEST


def test_no_user_has_all_attendants() -> None:
    """However many users have as many calls as they may, the next one has some served, too, but for a few."""
    supervisor = Supervisor(base_options(stats=True))
    got = Counter[int]()
    for user in range(6):
        while supervisor._may_start(user):
            supervisor._running[user] += 1
            got[user] += 1

    assert [32, 16, 8, 4, 2, 1] == [got[user] for user in range(6)]
    assert got.total() < _ATTENDANTS


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


# ---- the attendant that stands ready ----

RECVFROM = {"x86_64": b"45", "aarch64": b"207"}[platform.machine()]
# Does what it is told, line by line, and says what came of it.
CLIENT = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for line in sys.stdin:
    word, path = line.split()
    if word == "ioctl":
        device = os.open(path, os.O_RDWR)
        result = libc.ioctl(device, {uapi.BINDER_THREAD_EXIT}, None)
        os.close(device)
    elif word == "mount":
        os.mkdir(path)
        result = libc.mount(b"binder", path.encode(), b"binder", 0, None)
    elif word == "begin":
        client = os.fork()
        if not client:
            libc.mount(b"binder", path.encode(), b"binder", 0, None)
            os._exit(0)
        continue
    elif word == "kill":
        os.kill(client, 9)
        result = os.waitpid(client, 0)[1]
    else:
        result = libc.umount(path.encode())
    print(result, flush=True)
"""


class _Commanded:
    """``mount.py run`` with a command that does what it is told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def tell(self, word: str, path: str | Path) -> None:
        """Have it do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word} {path}\n")

    def do(self, word: str, path: str | Path) -> int:
        """Have it do something, and return the result."""
        self.tell(word, path)
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def attendants(self) -> set[int]:
        """Return the processes that look at calls, or stand ready to: children with the filter's listener."""
        found = set()
        for entry in Path("/proc").iterdir():
            # It may end meanwhile.
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and self.process.pid == procfs.parent(procfs.read(f"{entry}/stat")):
                    links = {os.readlink(link) for link in (entry / "fd").iterdir()}  # noqa: PTH115 - it is no path
                    if "anon_inode:seccomp notify" in links:
                        found.add(int(entry.name))
        return found

    def ready(self, other_than: int = 0) -> int:
        """Wait until one attendant waits for a call, and return it."""
        found: list[int] = []

        def is_there() -> bool:
            waiting = [pid for pid in self.attendants() if tasks.system_call(pid, pid)[:1] == [RECVFROM]]
            found[:] = [pid for pid in waiting if pid != other_than]
            return len(found) == 1

        until(is_there)
        return found[0]


@pytest.fixture(name="run")
def _run() -> Iterator[Callable[[], _Commanded]]:
    """Run such a command, which ends with the test."""
    with contextlib.ExitStack() as stack:

        def run() -> _Commanded:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, MOUNT, "run", sys.executable, "-c", CLIENT],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    bufsize=1,
                )
            )
            # It ends with its input, but not where it waits in a call for ever.
            stack.callback(process.terminate)
            return _Commanded(process)

        yield run


def test_without_a_filter_nobody_stands_ready() -> None:
    """And the supervisor does not look for a moment to start somebody, which it would do for ever."""
    assert not Supervisor(base_options(stats=True))._may_prepare()


@needs_mount
def test_a_call_is_served_by_who_stood_ready(run: Callable[[], _Commanded], tmp_path: Path) -> None:
    """While a call hangs in the look-up of its place, the process that does is the one that was there before."""
    with liar(tmp_path / "deaf", "deaf") as said:
        commanded = run()
        ready = commanded.ready()
        commanded.tell("begin", tmp_path / "deaf/place")

        assert "lookup\n" == said.readline()

        serving = commanded.attendants()

        assert signal.SIGKILL == commanded.do("kill", "it")

    assert {ready} == serving


@needs_mount
def test_an_attendant_serves_one_call(run: Callable[[], _Commanded]) -> None:
    """It ends when it has, and another one stands ready for the next call."""
    commanded = run()
    served = []
    for _ in range(5):
        served.append(commanded.ready())
        end = os.pidfd_open(served[-1])

        assert 0 == commanded.do("ioctl", "/dev/binder")

        select.select([end], [], [])
        os.close(end)

    assert 5 == len({*served})


@needs_mount
def test_an_attendant_that_is_killed_as_it_stands_ready(run: Callable[[], _Commanded]) -> None:
    """The next call is served by another one."""
    commanded = run()
    ready = commanded.ready()
    end = os.pidfd_open(ready)
    os.kill(ready, signal.SIGKILL)
    select.select([end], [], [])
    os.close(end)

    assert 0 == commanded.do("ioctl", "/dev/binder")
    assert ready != commanded.ready()


@needs_mount
def test_who_stands_ready_knows_the_mounts_that_are_served(run: Callable[[], _Commanded], tmp_path: Path) -> None:
    """After a mount a call on that is served; when it is gone, who knew it is replaced without having had a call."""
    commanded = run()

    assert 0 == commanded.do("mount", tmp_path / "other")

    commanded.ready()

    assert 0 == commanded.do("ioctl", tmp_path / "other/binder")

    ready = commanded.ready()

    assert 0 == commanded.do("umount", tmp_path / "other")
    assert ready != commanded.ready(other_than=ready)
