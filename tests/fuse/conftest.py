"""A mount in this process, of an engine, a device plane and a channel; and the C client that uses it.

This process must not use the mount itself: should the server be at fault, it could not even be killed.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from binderfs_fuse.engine.context import Context, Engine
from binderfs_fuse.fuse import mounting
from binderfs_fuse.fuse.channel import Channel
from binderfs_fuse.fuse.device import DevicePlane
from binderfs_fuse.fuse.settings import Settings
from tests.fuse.rawtree import RawFiles, RawTree

_SOURCE = Path(__file__).parent / "client.c"
_MNT_FORCE = 1


class Client:
    """A running client; what it prints is read line by line."""

    def __init__(self, program: Path, device: Path, *action: str) -> None:
        self.process = subprocess.Popen(
            [program, device, *action],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self.process.pid

    def line(self) -> str:
        """Wait for the next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def ask(self) -> str:
        """Send an empty line, and return the one that comes."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return self.line()

    def rest(self) -> list[str]:
        """Wait for the end, and return the lines that were not read."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        lines = self.process.stdout.read().splitlines()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(20)
        return lines

    def kill(self, *, children: bool = True) -> None:
        """Kill it, and its children, and wait until it is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(ProcessLookupError):
            if children:
                os.killpg(self.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait(20)
        self.process.stdin.close()
        self.process.stdout.close()


@dataclass
class Served:
    """A mount and what serves it."""

    mountpoint: Path
    engine: Engine
    context: Context
    plane: DevicePlane
    channel: Channel
    tree: RawTree
    program: Path
    clients: list[Client] = field(default_factory=list)
    complaint: str = ""

    def start(self, *action: str) -> Client:
        """Start a client."""
        client = Client(self.program, self.mountpoint / "binder", *action)
        self.clients.append(client)
        return client

    def size(self, name: str = "binder") -> int | None:
        """Return st_size of a file, as another process sees it; None if that failed."""
        found = subprocess.run(["stat", "-c", "%s", self.mountpoint / name], capture_output=True, check=False)
        self.complaint = found.stderr.decode()
        return None if found.returncode else int(found.stdout)

    def run(self, *action: str) -> list[str]:
        """Run a client to its end, and return the lines that it printed."""
        return self.start(*action).rest()


def descriptors() -> int:
    """Return how many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for something that another thread brings about and does not announce."""
    deadline = time.monotonic() + seconds
    never = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        never.wait(0.001)


@pytest.fixture(scope="session")
def client_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client, built."""
    program = tmp_path_factory.mktemp("client") / "client"
    subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, _SOURCE, "-lpthread"], check=True)
    return program


@pytest.fixture
def serve(tmp_path: Path, client_program: Path) -> Iterator[Callable[..., Served]]:
    """Mount with the settings given; when the test is over, all is unmounted, and all threads have ended."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    made: list[Served] = []

    def mount(**settings: str) -> Served:
        mountpoint = tmp_path / f"mount{len(made)}"
        mountpoint.mkdir()
        connection = mounting.connect("binder", mountpoint.resolve(), allow_other=True)
        engine = Engine(time.monotonic_ns)
        context = engine.add_context("binder")
        plane = DevicePlane(engine, Settings(**settings), connection.device)  # type: ignore[arg-type]
        channel = Channel(connection.descriptor, plane, RawFiles(plane, context))
        tree = RawTree(channel.tree_fd)
        channel.start()
        served = Served(mountpoint, engine, context, plane, channel, tree, client_program)
        made.append(served)
        # INIT is answered, and what region there can be is settled with a descriptor that goes again, before this is.
        served.size()
        return served

    yield mount
    for served in made:
        for client in served.clients:
            client.kill()
        with suppress(OSError):
            mounting.system_umount(served.mountpoint, _MNT_FORCE | mounting.MNT_DETACH)
        assert served.channel.closed.wait(20)
        served.channel.stop()
        served.tree.join()


@pytest.fixture(params=["passthrough", "pagecache"])
def served(serve: Callable[..., Served], request: pytest.FixtureRequest) -> Served:
    """A mount with each kind of region."""
    return serve(region=request.param)
