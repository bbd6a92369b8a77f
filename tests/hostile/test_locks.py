"""No lock is held across a system call that a client can delay.

A server is traced while clients have it do everything that reaches outside of it. While one of its threads has a lock,
that thread may make only system calls that concern nobody but the server: `OWN`.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.hostile.conftest import PATIENCE, Actor, until
from tests.hostile.traced import GIVEN_BACK, TAKEN
from tests.mounts import CHECKOUT, Mounted, is_there, needs_mount

pytestmark = needs_mount

Start = Callable[..., Actor]

# For memory and threads of its own, and to wait for another lock or for the interpreter.
OWN = {
    *("futex", "brk", "mmap", "munmap", "mremap", "mprotect", "madvise"),
    *("clone", "clone3", "set_robust_list", "rseq", "rt_sigprocmask", "sched_yield", "gettid", "getpid"),
    "restart_syscall",  # one of these, or a sleep, that was interrupted as strace attached
}
DELAYABLE = {
    *("process_vm_readv", "process_vm_writev", "ptrace", "pidfd_open", "pidfd_getfd", "sendmsg", "wait4"),
    *("openat", "read", "write", "writev", "close", "ioctl", "setpriority", "getpriority"),
}


@dataclass
class Trace:
    """What threads of a server did: how often a lock was taken, what was called without one, and with one."""

    taken: int = 0
    free: Counter[str] = field(default_factory=Counter)
    locked: Counter[str] = field(default_factory=Counter)

    def add(self, lines: Iterator[str]) -> None:
        """Go through one thread's system calls."""
        depth = 0
        for line in lines:
            called = re.match(r"(\w+)\(", line)
            if called is None:  # a signal, or the end
                continue
            name = called[1]
            if name == TAKEN:
                depth += 1
                self.taken += 1
            elif name == GIVEN_BACK:
                depth -= 1
            elif depth:
                self.locked[name] += 1
            else:
                self.free[name] += 1
        # Who was ended with a lock had better not wait.
        assert depth in (0, 1)


def everything(mounted: Mounted, actor: Start) -> None:
    """Have clients call, pass files, wait or not, be stuck, look into the logs, and be killed."""
    service = actor(mounted, "open", "manager")
    client = actor(mounted, "open", "nice 5")
    assert "BR_TRANSACTION_COMPLETE" == client.do("give pipe")
    assert "1 hello" == service.do("take")
    service.tell("serve 0")
    assert "50" == client.do("call 50")
    assert "50" == client.do("tell 50")
    assert "EAGAIN" == client.do("read-nonblocking")
    stuck = []
    for part in ("commands", "data", "offsets", "buffer", "read", "reply"):
        stuck.append(actor(mounted, "open"))
        assert "fault" == stuck[-1].do(f"&block {part} absent")
        assert "20" == client.do("call 20")
    assert f"proc {client.pid}\n" in (mounted.path / "binder_logs/state").read_text()
    for one in (*stuck, client, service):
        one.kill()
    gone = [f"proc {one.pid}\n" for one in (*stuck, client, service)]
    until(lambda: not any(line in (mounted.path / "binder_logs/state").read_text() for line in gone))


@pytest.mark.parametrize("region", ["passthrough", "pagecache"])
def test_no_lock_is_held_across_what_a_client_can_delay(region: str, tmp_path: Path, actor: Start) -> None:
    """A thread that has a lock makes no system call but for memory, threads and locks of the server's own."""
    mounted = Mounted(tmp_path / "mountpoint", tmp_path / "log")
    mounted.path.mkdir()
    folder = tmp_path / "trace"
    folder.mkdir()
    # The filter would refuse the calls that say when a lock is taken.
    tracing = ["strace", "--quiet=all", "-ff", "-s", "0", "-o", str(folder / "thread")]
    server = [sys.executable, "-m", "tests.hostile.traced", str(mounted.path), "-f", "-o"]
    with subprocess.Popen([*tracing, *server, f"log={mounted.log},region={region},noseccomp"], cwd=CHECKOUT) as process:
        try:
            until(lambda: is_there(mounted.path))
            everything(mounted, actor)
            mounted.unmount()
            process.wait(PATIENCE)
        finally:
            if process.poll() is None:
                os.kill(mounted.server, 9)
    trace = Trace()
    for file in folder.iterdir():
        with file.open() as lines:
            trace.add(iter(lines))

    assert not set(trace.locked) - OWN, trace.locked
    # It would have been noticed: there were locks, and such calls.
    assert trace.taken > 1000
    assert set() == DELAYABLE - set(trace.free)
    assert [] == mounted.complaints()
