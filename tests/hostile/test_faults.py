"""What happens to a mount: its server killed, memory, descriptors or /proc gone, clients traced or out of sight."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.conftest import PATIENCE, Actor, descriptors_of, keeper_of, until
from tests.hostile.test_blocking import PARTS, others_go_on
from tests.mounts import CHECKOUT, MOUNT, Mounted, mount_py

Start = Callable[..., Actor]
Mount = Callable[..., Mounted]

PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
ENDED = ("ENOTCONN", "ECONNABORTED", "ENODEV")


@pytest.mark.parametrize("calls", [0, 1, 40])
def test_server_killed(calls: int, mounted: Mounted, actor: Start, manager: Start) -> None:
    """With the server killed, whoever waits, calls or is stuck gets an error, and the place can be mounted again."""
    manager(mounted)
    serving = actor(mounted, "open", "manager", device="hwbinder")
    serving.tell("serve 0")
    calling = actor(mounted, "open", device="hwbinder")
    calling.tell("call 1000000")
    telling = actor(mounted, "open")
    giving = actor(mounted, "open")
    stuck = [actor(mounted, "open") for _ in PARTS]
    for part, one in zip(PARTS, stuck, strict=True):
        assert "fault" == one.do(f"&block {part} absent")
    assert str(calls) == telling.do(f"call {calls}")
    telling.tell("tell 1000000")
    giving.tell("give pipe")
    os.kill(mounted.server, signal.SIGKILL)
    ends = [serving.line(), calling.line().split(" ")[1], telling.line().split(" ")[1]]
    ends += [one.line() for one in stuck]
    late = actor(mounted).do("open")
    remounted = mount_py(mounted.path, "-o", f"log={mounted.log},region={mounted.region}")

    assert not set(ends) - set(ENDED), ends
    assert late in ENDED
    assert ("", 0) == (remounted.stderr, remounted.returncode)
    manager(mounted)
    others_go_on(mounted, actor)


def test_traced_client(mounted: Mounted, actor: Start, manager: Start) -> None:
    """A client stopped by a debugger holds up its callers alone; while it is traced no files can be given to it."""
    mounted.expect("cannot install file descriptors in task .* traces it")
    manager(mounted, device="hwbinder")
    traced = actor(mounted, "open", "manager")
    traced.tell("take")
    libc = ctypes.CDLL(None)
    assert 0 == libc.ptrace(PTRACE_SEIZE, traced.pid, None, None)
    assert 0 == libc.ptrace(PTRACE_INTERRUPT, traced.pid, None, None)
    assert traced.pid == os.waitpid(traced.pid, 0)[0]
    client = actor(mounted, "open")
    assert "BR_TRANSACTION_COMPLETE" == client.do("give pipe")
    others_go_on(mounted, actor, device="hwbinder")
    assert "1" == client.do("tell 1")
    # It goes on, but is still traced as it reads the first call.
    assert 0 == libc.ptrace(0x7, traced.pid, None, None)
    assert traced.line().startswith("0")
    assert 0 == libc.ptrace(PTRACE_INTERRUPT, traced.pid, None, None)
    assert traced.pid == os.waitpid(traced.pid, 0)[0]
    assert 0 == libc.ptrace(PTRACE_DETACH, traced.pid, None, None)
    assert "BR_TRANSACTION_COMPLETE" == client.do("give pipe")

    assert "1 hello" == traced.do("take")


def _prlimit(pid: int, *arguments: str) -> str:
    """Run prlimit(1) as that process's user: without CAP_SYS_RESOURCE even root has to be, and a keeper has its own."""
    owner = Path(f"/proc/{pid}").stat()
    command = ["prlimit", "--pid", str(pid), *arguments]
    return subprocess.run(
        command, user=owner.st_uid, group=owner.st_gid, extra_groups=[], capture_output=True, text=True, check=True
    ).stdout


@contextlib.contextmanager
def limited(pid: int, what: str, most: int) -> Iterator[None]:
    """Set a limit of a process for a while; what for is said in prlimit(1)'s words."""
    soft = _prlimit(pid, f"--{what}", "--output=SOFT", "--raw", "--noheadings").strip()
    _prlimit(pid, f"--{what}={most}:")
    try:
        yield
    finally:
        _prlimit(pid, f"--{what}={soft}:")


def test_no_memory_for_a_region(mounted: Mounted, actor: Start, manager: Start) -> None:
    """Where there is no memory for another region an open fails with ENOMEM, and who is there goes on."""
    manager(mounted)
    client = actor(mounted, "open")
    late = actor(mounted)
    assert "20" == client.do("call 20")
    status = Path(f"/proc/{mounted.server}/status").read_text()
    used = int(status.partition("VmSize:")[2].split()[0]) << 10
    with limited(mounted.server, "as", used + (1 << 20)):
        said = late.do("open")
        assert "20" == client.do("call 20")

    assert "ENOMEM" == said
    late.need("open")
    assert "20" == late.do("call 20")


def test_no_descriptors_in_the_server(mounted: Mounted, actor: Start) -> None:
    """A server that has no descriptor left refuses opens and files with EMFILE; calls go on, and so do files later."""
    service = actor(mounted, "open", "manager")
    client = actor(mounted, "open")
    late = actor(mounted)
    # From now on it is known where the service has mapped its region.
    assert "1" == client.do("tell 1")
    assert "1" == service.do("receive 1")
    service.need("free")
    server = mounted.server
    with limited(keeper_of(server), "nofile", 3), limited(server, "nofile", 3):
        opened = late.do("open")
        given = client.do("give pipe")
        assert "1" == client.do("tell 1")
        assert "1" == service.do("receive 1")
        service.need("free")

    assert "EMFILE" == opened
    assert given.endswith("BR_FAILED_REPLY -24")
    late.need("open")
    assert "BR_TRANSACTION_COMPLETE" == client.do("give pipe")
    assert "1 hello" == service.do("take")


def test_no_descriptors_in_the_receiver(mounted: Mounted, actor: Start, manager: Start) -> None:
    """A call with files for a process that has no descriptor left is dropped, as the driver does; others go on."""
    manager(mounted, device="hwbinder")
    service = actor(mounted, "open", "manager", "limit-fds 64", "fill-fds 0")
    client = actor(mounted, "open")
    processes = mounted.server, keeper_of(mounted.server)
    before = [descriptors_of(pid) for pid in processes]
    for _ in range(20):
        assert "BR_TRANSACTION_COMPLETE" == client.do("give pipe")
    assert "1" == client.do("tell 1")
    service.tell("take")
    # What carried files is gone; the first that arrives has none.
    said = service.line()
    others_go_on(mounted, actor, device="hwbinder")

    assert "0" == said.strip()
    for pid, most in zip(processes, before, strict=True):
        until(lambda: descriptors_of(pid) <= most + 2)  # noqa: B023 - it is over before the next


def test_client_in_a_pid_namespace(mounted: Mounted, actor: Start, manager: Start) -> None:
    """A client in a pid namespace below the server's is served as any other."""
    manager(mounted)
    inside = actor(mounted, wrapper=("unshare", "--pid", "--fork", "--kill-child"))
    inside.need("open")

    assert "20" == inside.do("call 20")
    assert "BR_TRANSACTION_COMPLETE" == inside.do("give pipe")


def run_in_namespaces(script: str, *unshare: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a mount namespace of its own."""
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *unshare, "sh", "-eu"],
        input=script,
        env=os.environ | {"PYTHON": sys.executable, "MOUNT": str(MOUNT)} | {k: str(v) for k, v in variables.items()},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


# Says why it cannot be opened.
OPEN = "import os, sys\ntry: os.open(sys.argv[1], os.O_RDWR)\nexcept OSError as error: print(error.strerror)"


def test_client_of_another_pid_namespace(tmp_path: Path) -> None:
    """A client that the server's pid namespace does not show gets EPERM, and the log one line."""
    log = tmp_path / "log"
    (tmp_path / "mount").mkdir()
    done = run_in_namespaces(
        """
            mkfifo "$AT/ready" "$AT/done"
            unshare --pid --fork --mount-proc sh -c '
                "$PYTHON" "$MOUNT" "$AT/mount" -o "log=$AT/log"; echo > "$AT/ready"; read line < "$AT/done"
            ' &
            read line < "$AT/ready"
            for i in 1 2 3; do nsenter --mount=/proc/$!/ns/mnt "$PYTHON" -c "$OPEN" "$AT/mount/binder"; done
            echo > "$AT/done"
            wait
        """,
        AT=tmp_path,
        OPEN=OPEN,
    )

    assert ("", 0) == (done.stderr, done.returncode)
    assert ["Operation not permitted"] * 3 == done.stdout.splitlines()
    assert 1 == log.read_text().count("\n")
    assert "pid namespace" in log.read_text()


def test_no_proc(tmp_path: Path) -> None:
    """Without /proc nothing is mounted, which is said; if it goes later, opens get EPERM, and the log one line."""
    (tmp_path / "mount").mkdir()
    done = run_in_namespaces(
        """
            "$PYTHON" "$MOUNT" "$AT/mount" -o "log=$AT/log"
            mount -t tmpfs none /proc
            for i in 1 2 3; do "$PYTHON" -c "$OPEN" "$AT/mount/binder"; done
            umount "$AT/mount"
            "$PYTHON" "$MOUNT" "$AT/mount" 2>&1 || echo $?
        """,
        AT=tmp_path,
        OPEN=OPEN,
    )

    assert ("", 0) == (done.stderr, done.returncode)
    assert [
        *["Operation not permitted"] * 3,
        "mount.py: there is no /proc/self/mountinfo: `mount -t proc proc /proc` first",
        "1",
    ] == done.stdout.splitlines()
    assert ["is not in /proc, which is hidden or not mounted: EPERM"] == [
        line.partition("user 0 ")[2] for line in (tmp_path / "log").read_text().splitlines()
    ]
