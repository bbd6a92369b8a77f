"""How much more memory this process may take before the kernel kills it.

Theory of operation
-------------------
Pages of regions, and all that a server keeps for its clients, are charged to the server. Where it is in a memory
cgroup with a limit, the kernel does not answer with ENOMEM at that limit: it kills. So the server stays below.

`budget` says what clients may hold altogether: the lowest limit of the cgroups on the way up, less what the server
itself uses, less a reserve. Where no limit is below half of the machine's memory, it is half of that.

The sum of all that clients may hold (`binderfs_fuse.limits`) is below the budget. But a limit can be lowered at any
time, and other processes of a cgroup use memory, too. `Headroom.allows` therefore looks again each time that so much
more is wanted as `_STEP`: at what is left below the limits, without what the kernel can take back, and on the machine.

Files of cgroups can be read quickly, and no client can make them wait. But no lock is held meanwhile.

Invariants
----------
- What has been allowed since the last look is less than `_STEP`, or what that look left room for.

Sources: cgroups(7), Linux's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, proc_pid_mountinfo(5).
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_STEP: Final = 1 << 20
# Part of a limit that is never given away: for the kernel's own needs, and for what is not counted.
_RESERVE: Final = 16
_OOM_SCORE: Final = -900
# What version 1 says where there is no limit is a little below 2^63.
_UNLIMITED: Final = 1 << 60


class _Group:
    """A cgroup with a memory controller, by its folder; version 2 where `unified`."""

    def __init__(self, folder: Path, *, unified: bool) -> None:
        self._folder = folder
        self._unified = unified

    def limit(self) -> int:
        """Return how many bytes its processes may use: 2^60 or more where that is not limited."""
        if self._unified:
            # Above `high` the kernel slows processes down, by more and more.
            limits = [self._number("memory.max"), self._number("memory.high")]
        else:
            limits = [self._number("memory.limit_in_bytes"), self._stat("hierarchical_memory_limit")]
        return min((limit for limit in limits if limit is not None), default=_UNLIMITED)

    def used(self) -> int:
        """Return how many bytes its processes use that the kernel cannot take back; 0 where that is not known."""
        usage = self._number("memory.current" if self._unified else "memory.usage_in_bytes")
        if usage is None:
            return 0
        prefix = "" if self._unified else "total_"
        names = [f"{prefix}active_file", f"{prefix}inactive_file"]
        if self._unified:
            names.append("slab_reclaimable")
        return max(0, usage - sum(self._stat(name) or 0 for name in names))

    def _text(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return (self._folder / name).read_text()
        return ""

    def _number(self, name: str) -> int | None:
        text = self._text(name).strip()
        return int(text) if text.isdecimal() else None

    def _stat(self, name: str) -> int | None:
        found = re.search(rf"^{name} (\d+)$", self._text("memory.stat"), re.MULTILINE)
        return int(found[1]) if found is not None else None


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _groups(proc: Path) -> Iterator[_Group]:
    """Find the memory cgroups of the process that this folder of /proc is about, and those around them."""
    try:
        mounts = os.fsdecode((proc / "mountinfo").read_bytes()).split("\n")
        memberships = os.fsdecode((proc / "cgroup").read_bytes()).split("\n")
    except OSError:
        return
    paths: dict[str, str] = {}
    for line in filter(None, memberships):
        _, controllers, path = line.split(":", 2)
        paths[controllers or "cgroup2"] = path
    for line in filter(None, mounts):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        name = "cgroup2"
        if kind == "cgroup" and "memory" in options.split(" ")[-1].split(","):
            name = next((names for names in paths if "memory" in names.split(",")), "")
        elif kind != "cgroup2":
            continue
        if name not in paths:
            continue
        path = paths[name]
        root, mountpoint = (Path(_unescape(field)) for field in before.split(" ")[3:5])
        # Where the mount does not show the process's own cgroup, its root is the nearest one that can be seen.
        inside = Path(path)
        folder = mountpoint / inside.relative_to(root) if inside.is_relative_to(root) else mountpoint
        if not folder.is_dir():
            folder = mountpoint
        while True:
            yield _Group(folder, unified=kind == "cgroup2")
            if folder == mountpoint:
                break
            folder = folder.parent


def _machine(proc: Path) -> tuple[int, int]:
    """Return the bytes of memory of the machine, and how many of them, and of swap, can still be had."""
    sizes = dict.fromkeys(("MemTotal", "MemAvailable", "SwapFree"), 0)
    with contextlib.suppress(OSError):
        for line in (proc.parent / "meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in sizes:
                sizes[name] = int(value.split()[0]) << 10
    return sizes["MemTotal"] or _UNLIMITED, sizes["MemAvailable"] + sizes["SwapFree"]


class Headroom:
    """What is left for clients; `wanted` is how many bytes they may have at most, where somebody chose that.

    `resized` is called with the new budget when that has changed, by whichever thread noticed.
    """

    def __init__(
        self, wanted: int | None = None, resized: Callable[[int], object] = int, proc: Path = Path("/proc/self")
    ) -> None:
        self._proc = proc
        self._wanted = wanted
        self._resized = resized
        self._groups = list(_groups(proc))
        self._guard = threading.Lock()
        self._machine = _machine(proc)[0]
        # What is used now is the server's own.
        self._own = [(group, group.used()) for group in self._groups]
        self._unseen = 0
        self.budget = self._count()
        """Bytes that clients may hold altogether, as far as is known now."""

    def _count(self) -> int:
        budgets = [self._machine // 2]
        for group, own in self._own:
            limit = group.limit()
            budgets.append(limit - limit // _RESERVE - own)
        if self._wanted is not None:
            budgets.append(self._wanted)
        return max(0, min(budgets))

    def allows(self, size: int) -> bool:
        """Whether so many bytes may be taken now."""
        with self._guard:
            self._unseen += size
            if self._unseen < _STEP:
                return True
        return self._look(size)

    def _look(self, size: int) -> bool:
        budget = self._count()
        available = _machine(self._proc)[1]
        fits = not available or available > self._machine // 64 + size
        for group in self._groups:
            limit = group.limit()
            if limit < _UNLIMITED and group.used() + size + _STEP > limit - limit // _RESERVE // 2:
                fits = False
        with self._guard:
            # Where there is no room the next one looks again.
            self._unseen = 0 if fits else _STEP
            changed = budget != self.budget
            self.budget = budget
        if changed:
            self._resized(budget)
        return fits


def survive() -> None:
    """Have the kernel kill other processes first when memory is short, as far as this one may ask for that."""
    with contextlib.suppress(OSError):
        path = Path("/proc/self/oom_score_adj")
        if int(path.read_text()) > _OOM_SCORE:
            path.write_text(str(_OOM_SCORE))
