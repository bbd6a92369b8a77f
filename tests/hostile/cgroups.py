"""A memory cgroup of the test's own, of whichever version the machine has mounted."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.conftest import until


class MemoryGroup:
    """A memory cgroup, by the names that its version has for the files."""

    def __init__(self, folder: Path, *, unified: bool) -> None:
        self.folder = folder
        self._limit = "memory.max" if unified else "memory.limit_in_bytes"
        self._usage = "memory.current" if unified else "memory.usage_in_bytes"
        self._kills = "memory.events" if unified else "memory.oom_control"

    def limit(self, size: int) -> None:
        """Set how many bytes all members may use together."""
        (self.folder / self._limit).write_text(str(size))

    def usage(self) -> int:
        """Return how many bytes they use."""
        return int((self.folder / self._usage).read_text())

    def kills(self) -> int:
        """Return how many processes the kernel has killed in it for lack of memory."""
        found = re.search(r"oom_kill (\d+)", (self.folder / self._kills).read_text())
        assert found is not None
        return int(found[1])

    def join(self) -> None:
        """Move the calling process into it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> bool:
        """Remove it, if it has no members any more; tell whether that was done. Who is killed takes a moment to go."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        return not self.folder.exists()


def _parents() -> Iterator[tuple[Path, bool]]:
    """Find the folders in which a memory cgroup can be made, and whether they are of version 2."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        folder = Path(before.split(" ")[4])
        if kind == "cgroup" and "memory" in options.split(" ")[-1].split(","):
            yield folder, False
        if kind == "cgroup2" and "memory" in (folder / "cgroup.subtree_control").read_text().split():
            yield folder, True


@contextlib.contextmanager
def memory_group(name: str) -> Iterator[MemoryGroup]:
    """Make a memory cgroup for a while; skip the test where none can be made. Members end before it does."""
    group = None
    for parent, unified in _parents():
        folder = parent / f"binderfs-fuse-{os.getpid()}-{name}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            group = MemoryGroup(folder, unified=unified)
            break
    if group is None:
        pytest.skip("there is no memory cgroup in which another one can be made")
    try:
        yield group
    finally:
        until(group.remove)
