"""A client whose memory does not answer holds up nobody but itself.

None of this is measured in time: what is blocked is blocked for good, and meanwhile others come to the end of what they
do.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from binderfs_fuse.limits import Limits
from tests.hostile.conftest import PATIENCE, Actor, threads_of, until
from tests.hostile.hung import NAME
from tests.mounts import CHECKOUT, Mounted

Start = Callable[..., Actor]

PARTS = ("commands", "data", "offsets", "buffer", "read", "reply")
ROUNDS = 50
COMPLETED = "BR_TRANSACTION_COMPLETE BR_REPLY"


def others_go_on(mounted: Mounted, actor: Start, device: str = "binder") -> None:
    """Have a client come, make its calls, and leave."""
    client = actor(mounted, "open", device=device)

    assert str(ROUNDS) == client.do(f"call {ROUNDS}")
    assert str(ROUNDS) == client.do(f"tell {ROUNDS}")
    client.tell("exit")
    assert 0 == client.end()


def test_absent_memory(mounted: Mounted, actor: Start, manager: Start) -> None:
    """While clients' memory waits for their userfaultfds, others call and are answered; then so are they."""
    manager(mounted)
    blocked = {part: actor(mounted, "open") for part in PARTS}
    for part, one in blocked.items():
        assert "fault" == one.do(f"&block {part} absent")
        others_go_on(mounted, actor)
    for part, one in blocked.items():
        one.tell("serve-fault")
        said = one.line()
        while said == "fault":
            said = one.line()

        # "offsets" has an object, of which its owner is told with the answer.
        assert said.endswith(COMPLETED), part


def test_killed_while_absent(mounted: Mounted, actor: Start, manager: Start) -> None:
    """A client that is killed while the server waits for its memory can die, and leaves nothing behind."""
    manager(mounted)
    others_go_on(mounted, actor)
    state = mounted.path / "binder_logs/state"
    for part in PARTS:
        blocked = actor(mounted, "open")
        assert "fault" == blocked.do(f"&block {part} absent")
        blocked.kill()
        others_go_on(mounted, actor)
        gone = f"proc {blocked.pid}\n"
        until(lambda: gone not in state.read_text())  # noqa: B023 - it is over before the next


def test_many_readers_whose_memory_vanishes(mounted: Mounted, actor: Start) -> None:
    """More of a client's threads than the server has are to be answered and cannot be: others are told of a death."""
    service = actor(mounted, "open", "manager")
    caller = actor(mounted, "open")
    service.tell("receive 1")
    caller.tell("call 1")
    assert "1" == service.line()
    attacker = actor(mounted, "open")
    assert "0" == attacker.do("vanish 90")
    service.kill()

    assert "0 BR_DEAD_REPLY 0" == caller.line()
    attacker.kill()
    state = mounted.path / "binder_logs/state"
    until(lambda: f"proc {attacker.pid}\n" not in state.read_text())


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Mount something that hangs; the path of its file, and its server."""
    mountpoint = tmp_path / "hung"
    mountpoint.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.hostile.hung", mountpoint],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert "mounted\n" == server.stdout.readline()
    yield mountpoint / os.fsdecode(NAME), server
    if not server.stdin.closed:
        server.stdin.close()
    server.wait(PATIENCE)
    server.stdout.close()
    subprocess.run(["umount", "--lazy", mountpoint], check=True)


def test_hung_file_system(
    mounted: Mounted, actor: Start, manager: Start, hung: tuple[Path, subprocess.Popen[str]]
) -> None:
    """Memory mapped from a file system that hangs holds up its owner until that ends; then this gets an error."""
    file, server = hung
    assert server.stdout is not None
    assert server.stdin is not None
    manager(mounted)
    parts = [part for part in PARTS if part != "reply"]
    blocked = [actor(mounted, "open") for _ in parts]
    for index, part in enumerate(parts):
        # Each has a page of its own, or they would all wait for the same one.
        blocked[index].tell(f"&block {part} {file} {index}")
        assert "read\n" == server.stdout.readline()
        others_go_on(mounted, actor)
    server.stdin.close()
    said = [one.line() for one in blocked]

    assert ["EFAULT", *["BR_FAILED_REPLY"] * 3, "EFAULT"] == said


def test_file_of_this_very_mount(mounted: Mounted, actor: Start, manager: Start) -> None:
    """Memory mapped from a file that the server itself has to read is read, by another thread of it."""
    manager(mounted)
    # The size of such a file means nothing to read(2), but mmap goes by it.
    state, stats = (mounted.path / "binder_logs" / name for name in ("state", "stats"))
    for file in (state, stats):
        os.truncate(file, 4096)
    said = actor(mounted, "open").do(f"&block commands {state}"), actor(mounted, "open").do(f"&block data {stats}")
    others_go_on(mounted, actor)

    # As commands, text is none that the driver knows.
    assert ("EINVAL", COMPLETED) == said


def test_page_of_a_device(mounted: Mounted, actor: Start, manager: Start) -> None:
    """A page of a device that is mapped and not there yet is read as well."""
    manager(mounted)
    blocked = actor(mounted, "open")
    said = blocked.do(f"&block data {mounted.path / 'hwbinder'}")

    assert said == COMPLETED


def test_many_at_once(mounted: Mounted, actor: Start, manager: Start) -> None:
    """Many threads of a few clients are stuck for good; others go on, and with the clients all that goes."""
    manager(mounted)
    others_go_on(mounted, actor)
    server = mounted.server
    before = threads_of(server)
    stuck = [actor(mounted, "open", f"stuck 8 {part}") for part in PARTS if part != "reply"]
    until(lambda: threads_of(server) > before + 3 * len(stuck))
    others_go_on(mounted, actor)
    for one in stuck:
        one.kill()
    # A few that wait for something to do stay for a while.
    until(lambda: threads_of(server) < before + 2 * len(stuck))
    others_go_on(mounted, actor)


def test_stopped_receiver(mounted: Mounted, actor: Start, manager: Start) -> None:
    """A stopped process does not read; its callers wait, and others go on."""
    manager(mounted)
    stopped = actor(mounted, "open", "manager", device="hwbinder")
    stopped.tell("serve 0")
    client = actor(mounted, "open", device="hwbinder")
    assert "1" == client.do("call 1")
    os.kill(stopped.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
    client.tell("call 1")
    others_go_on(mounted, actor)
    os.kill(stopped.pid, signal.SIGCONT)

    assert client.line() in ("1", "0 BR_DEAD_REPLY 0")


def test_replies_that_cannot_be_stored(mounted: Mounted, actor: Start, manager: Start) -> None:
    """Clients whose memory does not take the reply hold up themselves, and not the service that gives it."""
    manager(mounted)
    blocked = [actor(mounted, "open") for _ in range(8)]
    for one in blocked:
        assert "fault" == one.do("&block reply absent")
        others_go_on(mounted, actor)
    for one in blocked:
        one.tell("serve-fault")
        said = one.line()
        while said == "fault":
            said = one.line()

        assert COMPLETED == said


def test_user_with_many_stuck_threads(mount_binderfs: Callable[..., Mounted], actor: Start, manager: Start) -> None:
    """However many threads one user lets get stuck, those of others are served."""
    mounted = mount_binderfs("mode=666")
    mounted.expect("many threads wait for memory of user 1000")
    manager(mounted)
    others_go_on(mounted, actor)
    server = mounted.server
    before = threads_of(server)
    stuck = [
        actor(mounted, "as 1000", "open", "stuck 6 commands") for _ in range(Limits.lanes // Limits.lanes_per_handle)
    ]
    until(lambda: mounted.log.exists() and "user 1000" in mounted.log.read_text())
    others_go_on(mounted, actor)
    for one in stuck:
        one.kill()
    until(lambda: threads_of(server) < before + Limits.lanes // 4)
    others_go_on(mounted, actor)


def hold_up(mounted: Mounted, actor: Start, user: int, threads: int) -> list[Actor]:
    """Have clients of a user get so many threads of the server stuck, as far as it lets them; return them."""
    clients = []
    while threads > 0:
        some = min(threads, Limits.lanes_per_handle)
        clients.append(actor(mounted, f"as {user}", "open", f"stuck {some} commands"))
        threads -= some
    return clients


def test_two_users_with_many_stuck_threads(
    mount_binderfs: Callable[..., Mounted], actor: Start, manager: Start
) -> None:
    """Two users that both get as many threads stuck as they can leave others enough to be served."""
    mounted = mount_binderfs("mode=666")
    mounted.expect("many threads wait for memory of user 100")
    manager(mounted)
    others_go_on(mounted, actor)
    before = threads_of(mounted.server)
    stuck = [one for user in (1000, 1001) for one in hold_up(mounted, actor, user, Limits.lanes // 2)]
    until(lambda: threads_of(mounted.server) > before + Limits.lanes // 2)
    others_go_on(mounted, actor)
    for one in stuck:
        one.kill()
    until(lambda: threads_of(mounted.server) < before + Limits.lanes // 4)
    others_go_on(mounted, actor)


def test_many_users_with_stuck_threads(mount_binderfs: Callable[..., Mounted], actor: Start, manager: Start) -> None:
    """Users that get stuck all threads but the reserve cannot use that, and somebody who holds up none is served."""
    mounted = mount_binderfs("mode=666")
    mounted.announced.append("threads wait for memory of")
    manager(mounted)
    others_go_on(mounted, actor)
    before = threads_of(mounted.server)
    users = Limits.lanes - Limits.lane_reserve // 2
    stuck = [one for user in range(users) for one in hold_up(mounted, actor, 2000 + user, 1)]
    until(lambda: threads_of(mounted.server) > before + Limits.lanes - Limits.lane_reserve)
    others_go_on(mounted, actor)
    for one in stuck:
        one.kill()
    until(lambda: threads_of(mounted.server) < before + Limits.lanes // 4)
    others_go_on(mounted, actor)
