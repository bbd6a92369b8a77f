"""A client that lies hurts nobody but itself: others go on, and get what is theirs."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.hostile.conftest import PATIENCE, Actor, until
from tests.hostile.test_blocking import PARTS, others_go_on
from tests.mounts import Mounted

Start = Callable[..., Actor]
READV = (b"310", b"270")
IOCTL = (b"16", b"29")
"""System calls on x86-64 and aarch64."""


def threads(pid: int) -> list[int]:
    """Return the threads of a process."""
    return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]


def calls(pid: int, tid: int) -> bytes:
    """Return the number of the system call that a thread is in; nothing where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/task/{tid}/syscall").read_bytes().split()[0]
    return b""


def test_extremes(mounted: Mounted, actor: Start, manager: Start) -> None:
    """Each length, count, offset and pointer of a call at its extremes is refused or makes sense; others go on."""
    manager(mounted)
    liar = actor(mounted, "open")
    made, fine = map(int, liar.do("extremes").split())

    # Some of each: it is not all refused for one reason.
    assert 24 * 17 == made
    assert made // 4 < fine < made
    others_go_on(mounted, actor)
    liar.kill()
    others_go_on(mounted, actor)


def test_scribbled_region(mounted: Mounted, actor: Start) -> None:
    """A client that writes all over its own region loses what it was told, and no more: what is in use is freed."""
    service = actor(mounted, "open", "manager")
    client = actor(mounted, "open")
    assert "3" == client.do("tell 3")
    assert "1" == service.do("receive 1")
    said = service.do("scribble")
    service.need("free")
    service.tell("serve 0")
    others_go_on(mounted, actor)

    # Where a region is pages of the page cache, they are not to be had for writing.
    assert said in ("0", "EACCES", "ENODEV")


def test_inherited_device(mounted: Mounted, actor: Start) -> None:
    """A child that uses its parent's open is, to all others, its parent: it cannot be anybody else by that."""
    service = actor(mounted, "open", "manager")
    parent = actor(mounted, "open")
    child = int(parent.do("fork"))
    service.tell("receive-sender")
    parent.tell("forge")

    assert child != parent.pid
    assert f"pid {parent.pid} euid 0" == service.line()
    assert parent.line().startswith("0")
    service.tell("serve 0")
    assert "5" == parent.do("call 5")
    others_go_on(mounted, actor)


def test_device_passed_on(mounted: Mounted, actor: Start) -> None:
    """A device that is passed as a descriptor is the open of who opened it, whoever uses it."""
    service = actor(mounted, "open", "manager")
    client = actor(mounted, "open")
    number = client.do("device")
    assert "BR_TRANSACTION_COMPLETE" == client.do(f"give {number}")
    assert service.do("take").startswith("1")
    service.tell("serve 0")

    assert "10" == client.do("call 10")
    others_go_on(mounted, actor)


def test_reused_pid(mounted: Mounted, actor: Start, manager: Start) -> None:
    """A process that gets the pid of one that was killed as the server waited for its memory is another one."""
    manager(mounted)
    for part in PARTS:
        while True:
            first = actor(mounted, "open")
            assert "fault" == first.do(f"&block {part} absent")
            second = actor(mounted)
            first.kill()
            said = second.do(f"fork {first.pid}")
            if said != "EEXIST":  # somebody else was quicker
                break

        assert str(first.pid) == said
        second.need("open")
        assert "20" == second.do("call 20")
        others_go_on(mounted, actor)
        second.kill()


def test_memory_of_a_reused_thread_id(mounted: Mounted, actor: Start, manager: Start) -> None:
    """Where a read of a killed client's memory ends well after all, no further one is begun under its number."""
    manager(mounted)
    while True:
        first = actor(mounted, "open")
        assert "fault" == first.do("&block apart absent")
        # A child must not inherit a lock that the thread which said "fault" has yet to release.
        assert first.do("tid").isdigit()
        (tid,) = (tid for tid in threads(first.pid) if calls(first.pid, tid) in IOCTL)
        heir = int(first.do("fork"))
        second = actor(mounted)
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait(PATIENCE)
        said = second.do(f"fork {tid}")
        if said != "EEXIST":  # somebody else was quicker
            break
        os.kill(heir, signal.SIGKILL)
    assert str(tid) == said
    second.need("watch-apart")
    first.tell("serve-fault")
    assert first.do("tid") == str(heir)
    others_go_on(mounted, actor)
    until(lambda: not any(calls(mounted.server, tid) in READV for tid in threads(mounted.server)))

    assert "0" == second.do("nice 0")
    os.kill(heir, signal.SIGKILL)


def test_reused_thread_id(mounted: Mounted, actor: Start, manager: Start) -> None:
    """A child that gets the id of its parent's thread that has ended, and uses its open, is served as that would be."""
    manager(mounted)
    parent = actor(mounted, "open")
    said = "EEXIST"
    while said == "EEXIST":  # it has not ended yet, or somebody else was quicker
        tid = parent.do("&tid")
        said = parent.do(f"fork {tid}")

    assert tid == said
    assert "5" == parent.do("call 5")
    others_go_on(mounted, actor)
