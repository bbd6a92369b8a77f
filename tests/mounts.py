"""Fixtures that mount: `mounted`, with each kind of region in turn, and `mount_binderfs`, for whatever options.

Import them into a folder's conftest.py. Both unmount, and see to it that the server logged nothing worse than what the
test announced, and is gone; also when the test fails.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from binderfs_fuse.command import servers

CHECKOUT = Path(__file__).parent.parent
MOUNT = CHECKOUT / "mount.py"

needs_mount = pytest.mark.skipif(
    not os.access("/dev/fuse", os.W_OK) or os.geteuid() != 0, reason="mounting needs root and /dev/fuse"
)


def mount_py(*arguments: str | Path, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, and return what it said."""
    return subprocess.run(
        [sys.executable, MOUNT, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        **keywords,
    )


@dataclass
class Mounted:
    """A mounted binderfs: where, what its regions are, what it logs to, and which lines may be there."""

    path: Path
    log: Path
    region: str = "auto"
    announced: list[str] = field(default_factory=list)

    @property
    def server(self) -> int:
        """The server's process id."""
        pid: int = servers.information(self.path)["pid"]
        return pid

    def expect(self, pattern: str) -> None:
        """Announce that the server will log lines like this (a regular expression), at least one."""
        self.announced.append(pattern)

    def unmount(self) -> None:
        """Unmount, and wait for the server's end."""
        done = mount_py("-u", self.path)

        assert ("", 0) == (done.stderr, done.returncode)

    def complaints(self) -> list[str]:
        """Return what was logged unannounced, and what was announced and not logged."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        unannounced = [line for line in lines if not any(re.search(pattern, line) for pattern in self.announced)]
        missing = [p for p in self.announced if not any(re.search(p, line) for line in lines)]
        return unannounced + [f"never logged: {pattern}" for pattern in missing]


def _mounts() -> str:
    return os.fsdecode(Path("/proc/self/mountinfo").read_bytes())


def is_there(path: Path) -> bool:
    """Tell whether something is mounted at a path, without asking it."""
    return any(line.split(" ")[4] == str(path) for line in _mounts().split("\n")[:-1])


@pytest.fixture
def mount_binderfs(tmp_path: Path) -> Iterator[Callable[..., Mounted]]:
    """Mount as often as called, each time in a new folder of the test's; the arguments are options.

    `keywords` are those of `subprocess.run`, for the command.
    """
    if needs_mount.args[0]:
        pytest.skip(needs_mount.kwargs["reason"])
    mounted: list[Mounted] = []

    def mount(*options: str, region: str = "auto", **keywords: Any) -> Mounted:
        path = tmp_path / f"binderfs{len(mounted)}"
        path.mkdir()
        new = Mounted(path, tmp_path / f"binderfs{len(mounted)}.log", region)
        mounted.append(new)
        done = mount_py(path, "-o", ",".join((f"log={new.log}", f"region={region}", *options)), **keywords)
        if region == "passthrough" and "region=passthrough takes" in done.stderr:
            new.announced.append("region=passthrough takes")
            pytest.skip("the kernel has no FUSE passthrough")

        assert ("", "", 0) == (done.stdout, done.stderr, done.returncode), done

        return new

    yield mount
    complaints = []
    for one in mounted:
        if is_there(one.path):
            pid = None
            try:
                pid = one.server
                one.unmount()
            except (OSError, AssertionError) as error:
                complaints.append(f"{one.path}: {error}")
                subprocess.run(["umount", "--lazy", one.path], check=False)
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
        complaints += one.complaints()

    assert [] == complaints, complaints


@pytest.fixture(params=["passthrough", "pagecache"])
def mounted(request: pytest.FixtureRequest, mount_binderfs: Callable[..., Mounted]) -> Mounted:
    """A mounted binderfs, for end-to-end tests: once with each kind of region."""
    return mount_binderfs(region=request.param)
