"""A memory cgroup with little room: clients outside of it are refused before the kernel kills the server in it."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.cgroups import MemoryGroup, memory_group
from tests.hostile.conftest import Actor, injector_of, keeper_of
from tests.mounts import Mounted

Start = Callable[..., Actor]
Mount = Callable[..., Mounted]

LARGE = (4 << 20) - 8192


@pytest.fixture(name="group")
def _group() -> Iterator[MemoryGroup]:
    with memory_group("hostile") as group:
        yield group


@pytest.mark.parametrize("region", ["passthrough", "pagecache"])
def test_a_memory_cgroup(group: MemoryGroup, mount_binderfs: Mount, actor: Start, region: str) -> None:
    """A client that fills regions gets BR_FAILED_REPLY (-ENOMEM), and the server is not killed; others are served."""
    group.limit(160 << 20)
    mounted = mount_binderfs("mode=666", region=region, preexec_fn=group.join)
    server = mounted.server
    actor(mounted, "open", "manager").tell(f"answer {LARGE}")
    hostile = actor(mounted, "as 1000")
    said = hostile.do("hoard 60")

    assert 0 == group.kills()
    assert said.endswith("BR_FAILED_REPLY -12")
    assert int(said.split()[0]) >= 4
    assert "1" == actor(mounted, "as 1001").do("hoard 1")
    assert server == mounted.server
    assert Path(f"/proc/{server}").exists()


def test_a_cgroups_limit_that_is_lowered(group: MemoryGroup, mount_binderfs: Mount, actor: Start) -> None:
    """A limit that becomes less than it was at the start holds for whatever is wanted from then on."""
    mounted = mount_binderfs("mode=666", preexec_fn=group.join)
    actor(mounted, "open", "manager").tell(f"answer {LARGE}")
    assert "4" == actor(mounted, "as 1000").do("hoard 4")
    group.limit(group.usage() + (24 << 20))
    said = actor(mounted, "as 1000").do("hoard 60")

    assert 0 == group.kills()
    assert said.endswith("BR_FAILED_REPLY -12")


def test_an_amount_of_memory_can_be_chosen(mount_binderfs: Mount, actor: Start) -> None:
    """With memory=, what clients can fill is a part of that, on a machine that has much more."""
    mounted = mount_binderfs("mode=666", "memory=64M")
    actor(mounted, "open", "manager").tell(f"answer {LARGE}")
    said = [actor(mounted, f"as {uid}").do("hoard 30") for uid in (1000, 1001, 1002)]

    assert {"BR_FAILED_REPLY -12"} == {line.partition(" ")[2] for line in said}
    assert 1 <= sum(int(line.split()[0]) for line in said) <= 6


def test_others_are_killed_first(mount_binderfs: Mount) -> None:
    """The kernel is told to spare the server and its two programs, as far as root may say so here."""
    mounted = mount_binderfs()
    script = "echo -900 2>&- >/proc/self/oom_score_adj; cat /proc/self/oom_score_adj"
    possible = subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout
    processes = mounted.server, keeper_of(mounted.server), injector_of(mounted.server)

    assert [possible] * 3 == [Path(f"/proc/{pid}/oom_score_adj").read_bytes() for pid in processes]
