"""Clients that race against the transfer of files to them, to reach what is not theirs."""

import contextlib
import os
import platform
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty

import pytest

from binderfs_fuse.host import tasks
from binderfs_fuse.host.files import FileInstaller
from tests.conftest import LogWatch
from tests.host.parking import Parked, ParkingDevice
from tests.host.test_files import duplicate

pytestmark = [
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="mounts a file system, traces other processes"
    ),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the attacks are written in instructions of x86-64"),
]

HERE = Path(__file__).parent
ADDRESS = 0x20000000
SIZE = 16384
FILES = 40
"""More than one message of the keeper's carries."""


@pytest.fixture(scope="session")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the attacking program."""
    program = tmp_path_factory.mktemp("attack") / "attack"
    subprocess.run(
        ["cc", "-O1", "-Wall", "-Wextra", "-Werror", HERE / "attack.c", "-o", program, "-pthread"], check=True
    )
    return program


@pytest.fixture(scope="session")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a program that notices a write to its memory at `ADDRESS`."""
    program = tmp_path_factory.mktemp("attack") / "victim"
    options = ["-O1", "-static", "-no-pie", f"-DWATCHED_SIZE={SIZE}", f"-Wl,--section-start=.watched={ADDRESS:#x}"]
    subprocess.run(["cc", *options, HERE / "victim.c", "-o", program], check=True)
    return program


class Giver:
    """Gives `FILES` to every task that waits in a device, until it is told to end; `given` says how many came.

    A task that is being killed before its transfer has begun is let go, as the device plane does.
    """

    def __init__(self, device: ParkingDevice, installer: FileInstaller) -> None:
        self.given = 0
        self._device = device
        self._installer = installer
        self._ending = threading.Event()
        self._waiting: dict[int, Parked] = {}
        self._interrupted: dict[int, Parked] = {}
        self._thread = threading.Thread(target=self._give)
        self._thread.start()

    def _give(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(Empty):
                self._begin(self._device.parked.get(timeout=0.001))
            with contextlib.suppress(Empty):
                unique = self._device.interrupted.get_nowait()
                if unique in self._waiting:
                    self._interrupted[unique] = self._waiting[unique]
            for unique, parked in list(self._interrupted.items()):
                if unique not in self._waiting or (
                    tasks.is_being_killed(parked.tid) and self._installer.withdraw(parked.tid)
                ):
                    del self._interrupted[unique]

    def _begin(self, parked: Parked) -> None:
        def reply() -> bool:
            self._waiting.pop(parked.unique, None)
            return parked.reply(7)

        def failed(_error: int) -> None:
            if self._waiting.pop(parked.unique, None) is not None:
                parked.reply(9)

        self.given += 1
        self._waiting[parked.unique] = parked
        self._installer.install(
            parked.tid,
            [duplicate(0) for _ in range(FILES)],
            reply=reply,
            patch=lambda _: None,
            failed=failed,
            handle=parked.unique,
            user=parked.unique,
        )

    def end(self) -> None:
        """Give no more."""
        self._ending.set()
        self._thread.join()


@pytest.fixture
def giver(tmp_path: Path) -> Iterator[tuple[Path, Giver]]:
    """Mount a device, and give everybody a file that waits in it."""
    device = ParkingDevice(tmp_path)
    installer = FileInstaller()
    giver = Giver(device, installer)
    yield device.path, giver
    device.abort()
    giver.end()
    installer.close()
    for thread in threading.enumerate():
        if thread.name == "binderfs tracer":
            thread.join()
    device.close()


def run(*command: str | Path) -> str:
    """Run an attack to its end; return what it says."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


def executions() -> int:
    """Return how many races against execution are run: a command of the Makefile runs more."""
    return int(os.environ.get("BINDERFS_FUSE_RACES", "300"))


def test_nothing_is_written_to_a_program_executed_meanwhile(
    attack: Path, victim: Path, giver: tuple[Path, Giver]
) -> None:
    """While the leader of a process gets a file, another thread executes a program: its memory stays as it is."""
    device, _ = giver
    count = executions()
    said = run(attack, device, "exec", victim, hex(ADDRESS), str(SIZE), str(count))

    assert f"{count} executed, 0 changed\n" == said


def test_no_call_is_made_that_the_clients_filter_refuses(
    attack: Path, giver: tuple[Path, Giver], tmp_path_factory: pytest.TempPathFactory, logs: LogWatch
) -> None:
    """While a client gets a file, another thread changes the instruction that it makes calls by: its filter holds."""
    device, gives = giver
    folder = tmp_path_factory.mktemp("forbidden") / "folder"
    logs.allow("cannot install")
    said = run(attack, device, "rewrite", folder, "400")

    assert "refused\n" == said
    assert gives.given > 0


def test_no_third_program_gets_a_message(
    attack: Path, giver: tuple[Path, Giver], tmp_path_factory: pytest.TempPathFactory, logs: LogWatch
) -> None:
    """While a client gets a file, another thread puts a socket of its own under every number: nothing is sent there."""
    device, _ = giver
    path = tmp_path_factory.mktemp("third") / "socket"
    logs.allow("cannot install")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as third:
        third.bind(os.fspath(path))
        third.setblocking(False)
        said = run(attack, device, "swap", path, "400")

        assert "done\n" == said
        with pytest.raises(BlockingIOError):
            third.recv(100)


@pytest.mark.parametrize("way", ["exit", "kill"])
def test_a_process_can_end_at_any_point(way: str, attack: Path, giver: tuple[Path, Giver]) -> None:
    """While a client gets files, another thread ends the process: it ends as it wished, and the next one is served."""
    device, _ = giver

    assert "200 ended\n" == run(attack, device, "end", way, "200")


def test_a_process_can_be_stopped_at_any_point(attack: Path, giver: tuple[Path, Giver]) -> None:
    """While a client gets files, it is stopped and continued over and over: each of its calls goes well."""
    device, _ = giver

    assert "0\n" == run(attack, device, "stop", "200")


def test_a_process_can_write_over_what_is_exchanged(attack: Path, giver: tuple[Path, Giver], logs: LogWatch) -> None:
    """While a client gets files, another thread writes over the messages: it lives, and each of its calls ends."""
    device, _ = giver
    logs.allow("cannot install")

    assert "done\n" == run(attack, device, "scribble", "200")
