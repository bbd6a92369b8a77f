"""Mounts, and processes that do what a test tells them."""

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounts import Mounted, mount_binderfs, mounted

__all__ = ["mount_binderfs", "mounted"]

HERE = Path(__file__).parent
PATIENCE = 60
"""Seconds after which something that must come is given up: no behaviour is measured by it."""


class Actor:
    """A process of actor.c; what it says comes line by line."""

    def __init__(self, program: Path, device: Path, *wrapper: str) -> None:
        self.process = subprocess.Popen(
            [*wrapper, program, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def tell(self, line: str) -> None:
        """Have it do something, without waiting for what it says."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")

    def line(self) -> str:
        """Wait for the next line; "" when it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def do(self, line: str) -> str:
        """Have it do something, and return what it says."""
        self.tell(line)
        return self.line()

    def need(self, *lines: str) -> None:
        """Have it do things that must go well."""
        for line in lines:
            said = self.do(line)

            assert "0" == said, f"{line}: {said}"

    def kill(self) -> None:
        """Kill it, and wait until it is gone: pytest hangs no longer than a client that cannot be killed."""
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)

    def end(self) -> int:
        """Let it end by itself, and return its status."""
        self.process.communicate(timeout=PATIENCE)
        return self.process.returncode


def until(condition: Callable[[], object]) -> None:
    """Wait for something that nobody announces."""
    never = threading.Event()
    for _ in range(PATIENCE * 1000):
        if condition():
            return
        never.wait(0.001)
    raise AssertionError("it did not come about")


def threads_of(pid: int) -> int:
    """Return how many threads a process has."""
    return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())


def descriptors_of(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def files_of(pid: int) -> int:
    """Return how many descriptors a process has open that are no sockets: a keeper has a socket for each channel."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(link.readlink()))
    return sum(not link.startswith("socket:") for link in links)


def keeper_of(server: int) -> int:
    """Return the process that holds files for a server: its child of that name."""
    return _child(server, "binder-keeper")


def injector_of(server: int) -> int:
    """Return the process that installs files for a server: its child of that name."""
    return _child(server, "binder-injector")


def _child(parent: int, name: str) -> int:
    """Return the child of a process that was started under a name."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found += [int(process.name)] if (process / "cmdline").read_text().split("\0")[0] == name else []
    (child,) = found
    return child


@pytest.fixture(scope="session")
def actor_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built."""
    program = tmp_path_factory.mktemp("actor") / "actor"
    subprocess.run(
        ["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-o", program, HERE / "actor.c", "-lpthread"],
        check=True,
    )
    return program


@pytest.fixture
def actor(actor_program: Path) -> Iterator[Callable[..., Actor]]:
    """Start processes, which are killed in the end; killing must always work."""
    started: list[Actor] = []

    def start(mount: Mounted, *things: str, device: str = "binder", wrapper: tuple[str, ...] = ()) -> Actor:
        new = Actor(actor_program, mount.path / device, *wrapper)
        started.append(new)
        new.need(*things)
        return new

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def manager(actor: Callable[..., Actor]) -> Callable[..., Actor]:
    """Start a process that is context manager and answers calls for ever."""

    def start(mount: Mounted, device: str = "binder") -> Actor:
        new = actor(mount, "open", "manager", device=device)
        new.tell("serve 0")
        return new

    return start
