"""A client that floods is refused, with the driver's own errors; others are served, and what it held is had again."""

import subprocess
from collections.abc import Callable

import pytest

from tests.hostile.conftest import Actor, descriptors_of, until
from tests.mounts import Mounted

Start = Callable[..., Actor]
Mount = Callable[..., Mounted]


def test_opens(mount_binderfs: Mount, actor: Start) -> None:
    """A user who opens too often gets EMFILE, one beyond its share of the mount ENFILE; failed opens cost nothing."""
    mounted = mount_binderfs("mode=666", "limit_user_opens=40", "limit_opens=81")
    hostile = actor(mounted, "as 1000")
    opened = hostile.do("open-many 60")
    other = actor(mounted, "as 1001", "open")
    full = other.do("open-many 60")
    third = actor(mounted, "as 1002").do("open-many 3")
    held = descriptors_of(mounted.server)
    again = [hostile.do("open-many 10") for _ in range(20)]
    hostile.kill()
    until(lambda: other.do("open-many 1") == "1")

    assert "40 EMFILE" == opened
    # Half of what is left, of which it had one already.
    assert "19 ENFILE" == full
    assert "3" == third
    assert {"0 EMFILE"} == set(again)
    assert descriptors_of(mounted.server) <= held


def test_threads(mount_binderfs: Mount, actor: Start) -> None:
    """Threads that end without saying so count; one too many gets ENOMEM, and other processes do not."""
    mounted = mount_binderfs("limit_threads=50")
    hostile = actor(mounted, "open")
    said = hostile.do("threads 80")
    other = actor(mounted, "open").do("threads 10")

    # The thread that opened is one of them.
    assert ("49 ENOMEM", "10") == (said, other)


def test_flood_of_one_way_calls(mount_binderfs: Mount, actor: Start, manager: Start) -> None:
    """One-way calls to a process that does not read fail in the end, with ENOSPC; another device is not concerned."""
    mounted = mount_binderfs("limit_buffers=100")
    lazy = actor(mounted, "open", "manager")
    manager(mounted, device="hwbinder")
    said = actor(mounted, "open").do("tell 200")
    other = actor(mounted, "open", device="hwbinder").do("tell 200")
    received = lazy.do("receive 1")

    assert "100 BR_FAILED_REPLY -28" == said
    assert "200" == other
    assert "1" == received


def test_flood_without_reading(mount_binderfs: Mount, actor: Start, manager: Start) -> None:
    """A thread that sends and never reads is refused, however quickly its calls are served."""
    mounted = mount_binderfs("limit_unread=100")
    manager(mounted)
    hostile = actor(mounted, "open")
    said = hostile.do("tell-unread 1000")
    other = actor(mounted, "open").do("tell 1000")

    assert "100 BR_FAILED_REPLY" == said
    assert "1000" == other


def test_pages(mount_binderfs: Mount, actor: Start) -> None:
    """What a user's regions may occupy has an end: ENOMEM; another user's have room."""
    mounted = mount_binderfs("mode=666", "limit_user_pages=4")
    actor(mounted, "as 1000", "open", "manager")
    actor(mounted, "as 1001", "open", "manager", device="hwbinder")
    said = actor(mounted, "open").do("tell 1000")
    other = actor(mounted, "open", device="hwbinder").do("tell 100")

    assert said.endswith("BR_FAILED_REPLY -12")
    assert "100" == other


@pytest.mark.parametrize("path", ["binder_logs/state", "binder_logs", "features"])
def test_opens_of_other_files(mount_binderfs: Mount, actor: Start, path: str) -> None:
    """Logs and folders that a user has open have an end, too: EMFILE; others, and devices, have theirs."""
    mounted = mount_binderfs("mode=666", "limit_user_files=40", "limit_files=101")
    hostile = actor(mounted, "as 1000")
    opened = hostile.do(f"open-files 60 {path}")
    device = hostile.do("open")
    other = actor(mounted, "as 1001").do(f"open-files 60 {path}")
    third = actor(mounted, "as 1002").do(f"open-files 1 {path}")
    hostile.kill()
    again = actor(mounted, "as 1000")

    assert ("40 EMFILE", "0", "30 ENFILE", "1") == (opened, device, other, third)
    until(lambda: again.do(f"open-files 1 {path}") == "1")


def test_names_that_are_held(mount_binderfs: Mount, actor: Start) -> None:
    """Devices that a user has looked up and holds, by O_PATH, have an end: EMFILE; those that are not held do not."""
    mounted = mount_binderfs("mode=666", "limit_user_inodes=40")
    hostile = actor(mounted, "as 1000")
    held = hostile.do("look-up 60 binder")
    refused = hostile.do("open")
    other = actor(mounted, "as 1001", "open")
    fleeting = [other.do("open-many 1") for _ in range(30)]
    stated = subprocess.run(
        ["sh", "-c", "for i in $(seq 200); do test -e binder || echo no; done"],
        cwd=mounted.path,
        user=1002,
        capture_output=True,
        check=True,
    ).stdout
    hostile.kill()
    again = actor(mounted, "as 1000")

    assert ("40 EMFILE", "EMFILE") == (held, refused)
    assert {"1"} == {*fleeting}
    assert b"" == stated
    until(lambda: again.do("open") == "0")


# Opens a device anew, and that open a second time, which is refused and worth a line in the log.
REOPEN = """
for i in $(seq 500); do
    exec 3<>binder
    (exec 4<>/proc/self/fd/3) 2>&- || echo refused
    exec 3>&-
done
"""


def test_lines_of_the_log(mount_binderfs: Mount) -> None:
    """A client that causes hundreds of lines gets few into the log, where the sum of the others is said in the end."""
    mounted = mount_binderfs("mode=666")
    mounted.expect("binder was opened once more")
    mounted.expect("lines about clients of 1 users were left out")
    done = subprocess.run(["sh", "-c", REOPEN], cwd=mounted.path, user=3000, capture_output=True, check=True)
    mounted.unmount()
    lines = mounted.log.read_text().splitlines()

    assert [b"refused"] * 500 == done.stdout.split()
    assert len(lines) <= 30
    assert 500 == sum(int(line.split(" lines about ")[0].split()[-1]) if "left out" in line else 1 for line in lines)
