"""Files that cannot be closed, and those who pass them on: they hold up nobody but themselves."""

import os
import re
import resource
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from binderfs_fuse.limits import Limits
from tests.hostile.conftest import PATIENCE, Actor, files_of, injector_of, keeper_of, until
from tests.hostile.test_blocking import hung, others_go_on
from tests.hostile.test_faults import ENDED
from tests.mounts import Mounted, mount_py

__all__ = ["hung"]

Start = Callable[..., Actor]
Mount = Callable[..., Mounted]
Hung = tuple[Path, subprocess.Popen[str]]

GIVEN = "BR_TRANSACTION_COMPLETE"
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21


def hang_closes(server: subprocess.Popen[str]) -> None:
    """Have the file system hang that a descriptor of its file is closed on."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write("flush\n")
    server.stdin.flush()

    assert "flush\n" == server.stdout.readline()


def wait_for_end(*pidfds: int) -> None:
    """Wait until processes have ended."""
    for pidfd in pidfds:
        ended, _, _ = select.select([pidfd], [], [], PATIENCE)
        os.close(pidfd)

        assert ended


@pytest.mark.parametrize("options", [(), ("noseccomp",)], ids=["", "noseccomp"])
def test_server_killed_while_a_file_cannot_be_closed(
    options: tuple[str, ...], mount_binderfs: Mount, actor: Start, hung: Hung
) -> None:
    """A server that is killed while a client's file system holds up a close dies, and its clients get an error."""
    file, server = hung
    assert server.stdin is not None
    assert server.stdout is not None
    mounted = mount_binderfs(*options)
    service = actor(mounted, "open", "manager")
    giving = actor(mounted, "open", wrapper=("sh", "-c", f'exec "$@" 7<"{file}"', "sh"))
    waiting = actor(mounted, "open")
    hang_closes(server)
    assert GIVEN == giving.do("give 7")
    service.tell("take")
    # Who received it reads from it, and what passed it on closes it.
    assert ["flush\n", "read\n"] == sorted(server.stdout.readline() for _ in range(2))
    waiting.tell("call 1")
    pids = mounted.server, keeper_of(mounted.server)
    processes = [os.pidfd_open(pid) for pid in pids]
    os.kill(pids[0], signal.SIGKILL)
    said = waiting.line().split(" ")[1]
    late = actor(mounted).do("open")
    wait_for_end(processes[0])
    server.stdin.close()
    wait_for_end(processes[1])
    remounted = mount_py(mounted.path, "-o", f"log={mounted.log}")

    assert said in ENDED
    assert late in ENDED
    assert ("", 0) == (remounted.stderr, remounted.returncode)


def test_files_that_cannot_be_closed(mounted: Mounted, actor: Start, hung: Hung) -> None:
    """Who passes on many of them can pass on no more until they are closed; others can."""
    file, server = hung
    assert server.stdin is not None
    (mounted.path / "binder").chmod(0o666)
    (mounted.path / "hwbinder").chmod(0o666)
    service = actor(mounted, "open", "manager")
    sink = actor(mounted, "open", "manager", device="hwbinder")
    wrapper = ("sh", "-c", f'exec "$@" 7<"{file}"', "sh")
    flooding = actor(mounted, "as 1000", "open", device="hwbinder", wrapper=wrapper)
    related = actor(mounted, "as 1000", "open")
    client = actor(mounted, "open")
    hang_closes(server)
    for _ in range(Limits.user_closers + Limits.user_unclosed):
        assert GIVEN == flooding.do("give 7")
    assert GIVEN == related.do("give pipe")
    assert "1 hello" == service.do("take")
    sink.kill()
    until(lambda: related.do("give pipe") == "BR_FAILED_REPLY -24" or service.do("take") != "1 hello")
    keeper = keeper_of(mounted.server)
    held = files_of(keeper)
    for _ in range(20):
        assert GIVEN == client.do("give pipe")
        assert "1 hello" == service.do("take")
    until(lambda: files_of(keeper) <= held)
    refused = related.do("give pipe")
    server.stdin.close()
    until(lambda: related.do("give pipe") == GIVEN)

    assert "BR_FAILED_REPLY -24" == refused
    assert "1 hello" == service.do("take")
    service.tell("serve 0")
    others_go_on(mounted, actor)


@pytest.mark.parametrize("options", [(), ("noseccomp",)], ids=["", "noseccomp"])
def test_keeper_has_what_it_needs(options: tuple[str, ...], mount_binderfs: Mount, actor: Start) -> None:
    """What holds files has one capability, can get no other, and has no descriptor of the server, or who started it."""
    mounted = mount_binderfs("mode=666", *options)
    service = actor(mounted, "open", "manager")
    assert GIVEN == actor(mounted, "as 1000", "open").do("give pipe")
    assert "1 hello" == service.do("take")
    keeper = keeper_of(mounted.server)
    until(lambda: len(list(Path(f"/proc/{keeper}/fd").iterdir())) == 8)
    links = [str(link.readlink()) for link in Path(f"/proc/{keeper}/fd").iterdir()]
    kinds = sorted(re.sub(r"\d+|/run/binder-keeper\.\w+", "", link) for link in links)
    for task in Path(f"/proc/{keeper}/task").iterdir():
        status = dict(re.findall(r"^(\w+):\s*(.*)$", (task / "status").read_text(), re.MULTILINE))
        only = f"{1 << CAP_SYS_PTRACE:016x}"

        assert [only, only] == [status[name] for name in ("CapPrm", "CapEff")]
        assert ["0" * 16, "0" * 16] == [status[name] for name in ("CapInh", "CapAmb")]
        assert "1" == status["NoNewPrivs"]
        assert "2" == status["Seccomp"]
    # Control, the server's channel, the injector's, and what it accepts the connections of receivers by.
    assert ["/dev/null", "/dev/null", "/dev/null", "/socket (deleted)", *["socket:[]"] * 4] == kinds


def test_injector_has_what_it_needs(mount_binderfs: Mount, actor: Start) -> None:
    """What installs files has two capabilities, can get no other, and has no descriptor but sockets to its own."""
    mounted = mount_binderfs("mode=666")
    service = actor(mounted, "open", "manager")
    assert GIVEN == actor(mounted, "as 1000", "open").do("give pipe")
    assert "1 hello" == service.do("take")
    injector = injector_of(mounted.server)
    links = {re.sub(r"\d+", "", str(link.readlink())) for link in Path(f"/proc/{injector}/fd").iterdir()}
    for task in Path(f"/proc/{injector}/task").iterdir():
        status = dict(re.findall(r"^(\w+):\s*(.*)$", (task / "status").read_text(), re.MULTILINE))
        both = f"{1 << CAP_SYS_PTRACE | 1 << CAP_SYS_ADMIN:016x}"

        assert [both, both] == [status[name] for name in ("CapPrm", "CapEff")]
        assert ["0" * 16, "0" * 16] == [status[name] for name in ("CapInh", "CapAmb")]
        assert "1" == status["NoNewPrivs"]
        # The kernel lets no filtered process suspend the filter of another one.
        assert "0" == status["Seccomp"]
    assert {"/dev/null", "socket:[]"} == links


def test_dropped_device_tells_nobody_to_return(mounted: Mounted, actor: Start) -> None:
    """A client's own device, passed on and dropped on the way, is closed without its threads' being told to return."""
    keeper = keeper_of(mounted.server)
    sink = actor(mounted, "open", "manager")
    client = actor(mounted, "open")
    device = next(fd.name for fd in Path(f"/proc/{client.pid}/fd").iterdir() if fd.readlink().name == "binder")
    before = files_of(keeper)
    assert GIVEN == client.do(f"give {device}")
    until(lambda: files_of(keeper) > before)
    held = files_of(keeper)
    sink.kill()
    until(lambda: files_of(keeper) < held)

    state = (mounted.path / "binder_logs/state").read_text()
    assert f"proc {client.pid}\n" in state
    assert "need_return 0" in state
    assert "need_return 1" not in state


def test_descriptors_that_nobody_takes(mount_binderfs: Mount, actor: Start) -> None:
    """Two users that have as many descriptors wait as they can leave another one enough to pass some on."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    mounted = mount_binderfs("mode=666", preexec_fn=limit)
    service = actor(mounted, "as 3000", "open", "manager")
    client = actor(mounted, "as 3000", "open")
    actor(mounted, "as 1000", "open", "manager", device="hwbinder")
    counts = []
    for user in (1000, 1001):
        flooding = actor(mounted, f"as {user}", "open", device="hwbinder")
        count = 0
        while (said := flooding.do("give 0")) == GIVEN:
            count += 1
        assert "BR_FAILED_REPLY -24" == said
        counts.append(count)
    for _ in range(20):
        assert GIVEN == client.do("give pipe")
        assert "1 hello" == service.do("take")

    assert counts[0] > counts[1] > 0


def traced(pid: int) -> int:
    """Return how many threads of a process the server has seized."""
    statuses = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum("TracerPid:\t0\n" not in status for status in statuses)


def test_receivers_that_do_not_come(mounted: Mounted, actor: Start) -> None:
    """One open holds its share of the tracers, others get their files; and who waits behind it can be killed."""
    service = actor(mounted, "open", "manager")
    client = actor(mounted, "open")
    lingering = actor(mounted, "open", "manager", f"linger {Limits.tracers + 6}", device="hwbinder")
    calling = actor(mounted, "open", f"hand {Limits.tracers + 5}", device="hwbinder")
    until(lambda: traced(lingering.pid) == Limits.tracers_per_handle)
    for _ in range(20):
        assert GIVEN == client.do("give pipe")
        assert "1 hello" == service.do("take")
    assert Limits.tracers_per_handle == traced(lingering.pid)
    # One more receiver on the same open, in a process of its own.
    child = int(lingering.do("fork"))
    ended = os.pidfd_open(child)
    lingering.tell("take")
    calling.need("hand 2")
    state = mounted.path / "binder_logs/state"
    until(lambda: re.search(rf"transaction .* to \d+:{child} ", state.read_text()))
    os.kill(child, signal.SIGKILL)
    wait_for_end(ended)


def test_receivers_of_two_users_that_do_not_come(mount_binderfs: Mount, actor: Start) -> None:
    """Two users whose receivers hold as many tracers as they can leave others enough to get their files."""
    opens = Limits.tracers // Limits.tracers_per_handle
    devices = [f"flood{number}" for number in range(opens)]
    mounted = mount_binderfs("mode=666", f"devices={':'.join(['binder', *devices])}")
    service = actor(mounted, "as 3000", "open", "manager")
    client = actor(mounted, "as 3000", "open")
    receivers: dict[int, list[int]] = {1000: [], 1001: []}
    for number, device in enumerate(devices):
        user = 1000 + number % 2
        linger = f"linger {Limits.tracers_per_handle}"
        receivers[user].append(actor(mounted, f"as {user}", "open", "manager", linger, device=device).pid)
        actor(mounted, f"as {user}", "open", f"hand {Limits.tracers_per_handle}", device=device)

    def are_exhausted() -> bool:
        held = [sum(map(traced, pids)) for pids in receivers.values()]
        return min(held) >= Limits.tracers - Limits.tracer_reserve - sum(held)

    until(are_exhausted)
    for _ in range(20):
        assert GIVEN == client.do("give pipe")
        assert "1 hello" == service.do("take")
    assert are_exhausted()
