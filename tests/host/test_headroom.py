"""How much memory there is, as told by files like those of /proc and of cgroups, and how much of it may be taken."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from binderfs_fuse.host.headroom import Headroom

MIB = 1 << 20
MACHINE = 4096 * MIB


@dataclass
class Machine:
    """A folder with a process's folder of /proc in it, and mounted cgroups."""

    folder: Path
    budgets: list[int] = field(default_factory=list)

    @property
    def proc(self) -> Path:
        """The process's own."""
        return self.folder / "proc" / "self"

    def set(self, name: str, text: object) -> None:
        """Write a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def process(self, mounts: list[str], groups: list[str], available: int = 2048 * MIB) -> None:
        """Say what is mounted, and which cgroups the process is in."""
        self.set("proc/self/mountinfo", "\n".join(mounts))
        self.set("proc/self/cgroup", "\n".join(groups))
        kib = {"MemTotal": MACHINE >> 10, "MemAvailable": available >> 10, "SwapFree": 0}
        self.set("proc/meminfo", "\n".join(f"{name}: {size} kB" for name, size in kib.items()))

    def unified(self, *groups: tuple[str, object, int], root: str = "/", mine: str | None = None) -> None:
        """Mount cgroups of version 2: path, limit and usage of each; the process is in the last one."""
        for path, limit, usage in groups:
            self.set(f"cgroup{path}/memory.max", limit)
            self.set(f"cgroup{path}/memory.high", "max")
            self.set(f"cgroup{path}/memory.current", usage)
            self.set(f"cgroup{path}/memory.stat", "anon 1\nactive_file 0\ninactive_file 0")
        where = str(self.folder / "cgroup").replace(" ", r"\040")
        self.process(
            ["22 1 8:1 / / rw - ext4 /dev/vda rw", f"30 22 0:26 {root} {where} rw,relatime - cgroup2 cgroup2 rw"],
            [f"0::{mine or groups[-1][0]}"],
        )

    def headroom(self, wanted: int | None = None) -> Headroom:
        """Look at all this."""
        return Headroom(wanted, self.budgets.append, self.proc)


@pytest.fixture(name="machine")
def _machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "a folder")


def test_half_of_the_machine_without_a_cgroup(machine: Machine) -> None:
    """Where no cgroup has a limit the budget is half of the machine's memory, or what somebody wants."""
    machine.process([], [])

    assert MACHINE // 2 == machine.headroom().budget
    assert 300 * MIB == machine.headroom(300 * MIB).budget
    assert MACHINE // 2 == machine.headroom(2 * MACHINE).budget


def test_the_lowest_limit_counts(machine: Machine) -> None:
    """Each cgroup on the way up has a limit of its own, of which what is used by then and a sixteenth are taken."""
    machine.unified(("/", "max", 900 * MIB), ("/a", 320 * MIB, 100 * MIB), ("/a/b", 640 * MIB, 50 * MIB))

    assert 200 * MIB == machine.headroom().budget


def test_a_cgroup_namespace_and_a_mounted_part(machine: Machine) -> None:
    """The path of the process's cgroup is that below what is mounted; where it is not to be seen, the nearest is."""
    machine.unified(("/", 160 * MIB, 0), ("/b", 320 * MIB, 0), root="/outer", mine="/outer/b")
    inside = machine.headroom().budget
    machine.set("cgroup/b/memory.max", 80 * MIB)

    assert (150 * MIB, 75 * MIB) == (inside, machine.headroom().budget)

    machine.set("proc/self/cgroup", "0::/elsewhere")

    assert 150 * MIB == machine.headroom().budget


def test_version_1(machine: Machine) -> None:
    """There, limits have other names, and those of the groups around are told, too, where these cannot be seen."""
    machine.set("memory/memory.limit_in_bytes", 9223372036854771712)
    machine.set("memory/a/memory.limit_in_bytes", 640 * MIB)
    machine.set("memory/a/memory.usage_in_bytes", 90 * MIB)
    machine.set(
        "memory/a/memory.stat",
        f"hierarchical_memory_limit {320 * MIB}\ninactive_file 1\ntotal_inactive_file {40 * MIB}",
    )
    where = str(machine.folder / "memory").replace(" ", r"\040")
    machine.process(
        [f"30 22 0:26 / {where} rw - cgroup cgroup rw,cpu,memory"], ["7:cpu,memory:/a", "1:name=systemd:/x", "0::/x"]
    )

    assert 250 * MIB == machine.headroom().budget


def test_what_can_be_taken_back_is_not_used(machine: Machine) -> None:
    """Pages of files on disk go when memory is needed."""
    machine.unified(("/a", 320 * MIB, 290 * MIB))
    machine.set("cgroup/a/memory.stat", f"active_file {40 * MIB}\ninactive_file {150 * MIB}\nslab_reclaimable 0")

    assert 200 * MIB == machine.headroom().budget


def test_no_more_than_is_left(machine: Machine) -> None:
    """What others in the cgroup use by now is not to be had; when they have gone, it is."""
    machine.unified(("/a", 320 * MIB, 20 * MIB))
    headroom = machine.headroom()
    before = headroom.allows(4 * MIB)
    machine.set("cgroup/a/memory.current", 306 * MIB)
    full = [headroom.allows(size) for size in (4 * MIB, 4 * MIB, MIB)]
    machine.set("cgroup/a/memory.current", 30 * MIB)

    assert before
    assert [False, False, True] == full
    assert headroom.allows(4096)
    assert [] == machine.budgets


def test_a_limit_that_is_lowered(machine: Machine) -> None:
    """It is noticed with the next mebibyte that is wanted, and told."""
    machine.unified(("/a", 320 * MIB, 20 * MIB))
    headroom = machine.headroom()
    machine.set("cgroup/a/memory.max", 160 * MIB)
    small = [headroom.allows(4096) for _ in range(255)]
    none = list(machine.budgets)
    large = headroom.allows(4096)

    assert {True} == {*small, large}
    assert ([], [130 * MIB]) == (none, machine.budgets)


def test_a_machine_without_memory(machine: Machine) -> None:
    """Where all is used, by whomever, nothing more is taken."""
    machine.process([], [], available=MACHINE // 64)

    assert not machine.headroom().allows(MIB)


def test_this_machine() -> None:
    """What there is can be read here, whatever it is."""
    budget = Headroom().budget

    assert 0 < budget <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 2
