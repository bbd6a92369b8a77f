"""The three that are measured: the mount, the floor and the real driver. To client.c they are all one device."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from benchmarks.building import CHECKOUT, compile_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MOUNT_COMMAND: Final = CHECKOUT / "mount.py"

Figures = dict[str, Any]
"""One line of client.c: what was measured, and rate, mean_us, p50_us, p99_us, max_us and the like."""


class System(Protocol):
    """Something that benchmarks/client.c runs on."""

    name: str

    def measure(self, measurements: Sequence[str]) -> list[Figures]:
        """Run client.c; one `Figures` for each measurement, in order."""


def _figures(output: str, measurements: Sequence[str]) -> list[Figures]:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if [line["measurement"] for line in lines] != list(measurements):
        raise RuntimeError(f"client.c ended after {len(lines)} of {len(measurements)} measurements")
    return lines


class Mounted:
    """A file system on this machine that is served by process `pid`."""

    def __init__(self, name: str, device: Path, pid: int) -> None:
        self.name = name
        self.device = device
        self.pid = pid
        self._client = compile_program("client", static=True)

    def pin(self, cpus: set[int]) -> None:
        """Let the server run on these CPUs only: each of its threads, and so those that they start."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            # A thread may end meanwhile.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cpus)

    def measure(self, measurements: Sequence[str]) -> list[Figures]:
        """Run client.c on the device. Raises `subprocess.CalledProcessError`, its complaint on standard error."""
        done = subprocess.run(
            [self._client, self.device, *measurements], check=True, stdout=subprocess.PIPE, text=True, timeout=300
        )
        return _figures(done.stdout, measurements)

    @contextlib.contextmanager
    def holding(self, measurement: str) -> Iterator[None]:
        """Keep the processes of a "hold" measurement for as long as the context lasts."""
        command = [str(self._client), str(self.device), measurement]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdin is not None  # they are pipes
            assert client.stdout is not None
            if not client.stdout.readline():
                raise RuntimeError(f"client.c has failed: {measurement}")
            yield
            client.stdin.close()

    def memory(self) -> int:
        """Return what the server occupies: the bytes of its address space that are present."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"the server of the {self.name} is gone")

    def cpu_seconds(self) -> float:
        """Return the processor time that the server has used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _wait_for(device: Path, server: subprocess.Popen[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    # Not `exists`, which a mount whose server has died answers with an exception.
    while not os.access(device, os.F_OK):
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{device} did not appear")
        time.sleep(0.01)


@contextlib.contextmanager
def _served(name: str, command: Sequence[str]) -> Iterator[Mounted]:
    """Serve a file system in a temporary folder, whose path is added to the command, until the context ends."""
    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as folder:
        server = subprocess.Popen([*command, folder], stdout=subprocess.DEVNULL, text=True)
        device = Path(folder) / "binder"
        try:
            _wait_for(device, server, 20)
            yield Mounted(name, device, server.pid)
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            subprocess.run(["umount", "--lazy", folder], check=False, stderr=subprocess.DEVNULL)


def floor() -> contextlib.AbstractContextManager[Mounted]:
    """Serve the floor; needs root."""
    return _served("floor", [str(compile_program("floor"))])


def mount() -> contextlib.AbstractContextManager[Mounted]:
    """Serve binderfs-fuse, as `mount.py -f` does."""
    return _served("mount", [sys.executable, str(MOUNT_COMMAND), "-f"])


class Oracle:
    """The real driver: a kernel under qemu's software emulation, one processor, booted for each run."""

    name = "driver"

    def __init__(self, program: Path) -> None:
        self._program = program
        self._client = compile_program("client", static=True)

    def measure(self, measurements: Sequence[str]) -> list[Figures]:
        """Boot, and run client.c."""
        command = [str(self._program), "--timeout", "120", str(self._client), "/dev/binderfs/binder", *measurements]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return _figures(done.stdout, measurements)


def find_oracle() -> Oracle | None:
    """Return the oracle, where there is one: `$BINDER_ORACLE`, or `run-oracle` beside the checkout; and qemu."""
    named = os.environ.get("BINDER_ORACLE")
    program = Path(named) if named else CHECKOUT.parent / "shared" / "oracle" / "run-oracle"
    if not os.access(program, os.X_OK) or not shutil.which("qemu-system-x86_64"):
        return None
    return Oracle(program)


def ready_seconds() -> float:
    """Return how long `mount.py MOUNTPOINT` takes until it says that the device answers."""
    with tempfile.TemporaryDirectory(prefix="bench-ready-") as folder:
        begin = time.perf_counter()
        subprocess.run([MOUNT_COMMAND, folder], check=True)
        seconds = time.perf_counter() - begin
        subprocess.run([MOUNT_COMMAND, "-u", folder], check=True)
    return seconds
