"""A memory cgroup with little room: clients outside of it are refused before the kernel kills the server in it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.cgroups import MemoryGroup, memory_group
from tests.hostile.conftest import Actor
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
