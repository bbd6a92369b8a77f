"""What the server may do, and what clients may: docs/security.md has the claims."""

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.host import privileges
from tests.hostile.conftest import Actor, until
from tests.mounts import CHECKOUT, MOUNT, Mounted, is_there, mount_py, needs_mount

Start = Callable[..., Actor]
Mount = Callable[..., Mounted]


def status(pid: int, thread: int | None = None) -> dict[str, str]:
    """Return the lines of a task's status, by name."""
    text = Path(f"/proc/{pid}/task/{thread or pid}/status").read_text()
    return dict(re.findall(r"^(\w+):\s*(.*)$", text, re.MULTILINE))


def everything_works(mounted: Mounted, actor: Start, manager: Start) -> None:
    """Do all that takes a right of the server: call, pass files, be stopped in the middle, belong to another user."""
    service = actor(mounted, "open", "manager")
    client = actor(mounted, "as 1000", "open")
    assert "BR_TRANSACTION_COMPLETE" == client.do("give pipe")
    assert "1 hello" == service.do("take")
    service.tell("serve 0")
    assert "20" == client.do("call 20")
    assert "EAGAIN" == client.do("read-nonblocking")
    assert "fault" == client.do("&block data absent")
    client.kill()
    assert "20" == actor(mounted, "open").do("call 20")
    manager(mounted, device="hwbinder")
    assert "5" == actor(mounted, "open", "nice 5", device="hwbinder").do("call 5")


@pytest.mark.parametrize("options", [(), ("noseccomp",)], ids=["", "noseccomp"])
@pytest.mark.parametrize("region", ["passthrough", "pagecache"])
def test_server_keeps_what_it_needs(
    region: str, options: tuple[str, ...], mount_binderfs: Mount, actor: Start, manager: Start
) -> None:
    """Every thread of a server has four capabilities, can get no others, and all that a client can ask for works."""
    mounted = mount_binderfs("mode=666", *options, region=region)
    everything_works(mounted, actor, manager)
    server = mounted.server
    # Of those that there are: containers may lack some.
    ours = int(status(os.getpid(), os.getpid())["CapEff"], 16)
    kept = f"{ours & sum(1 << capability for capability in privileges.KEPT):016x}"
    threads = []
    for task in Path(f"/proc/{server}/task").iterdir():
        # One that had nothing more to do may have ended.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            threads.append(status(server, int(task.name)))

    assert threads
    for thread in threads:
        assert [kept, kept, kept] == [thread[name] for name in ("CapPrm", "CapEff", "CapBnd")]
        assert ["0" * 16, "0" * 16] == [thread[name] for name in ("CapInh", "CapAmb")]
        assert "1" == thread["NoNewPrivs"]
        assert ("0" if options else "2") == thread["Seccomp"]


@pytest.mark.parametrize("options", [(), ("noseccomp",)], ids=["", "noseccomp"])
def test_server_can_still_be_managed(options: tuple[str, ...], mount_binderfs: Mount) -> None:
    """Without its other rights a server still makes and removes devices, is remounted, and unmounts at a signal."""
    mounted = mount_binderfs(*options)
    server = os.pidfd_open(mounted.server)
    with (mounted.path / "binder-control").open("rb") as control:
        fcntl.ioctl(control, uapi.BINDER_CTL_ADD, b"another".ljust(256, b"\0") + bytes(8))
    (mounted.path / "another").unlink()
    remounted = mount_py(mounted.path, "-o", "remount,max=10")
    os.kill(mounted.server, signal.SIGTERM)
    select.select([server], [], [])
    os.close(server)

    assert ("", 0) == (remounted.stderr, remounted.returncode)
    assert not is_there(mounted.path)


@pytest.fixture
def inherited() -> Iterator[str]:
    """What a pipe is called in /proc, both of whose ends are passed on to whatever is executed."""
    ends = os.pipe()
    for end in ends:
        os.set_inheritable(end, True)
    yield f"pipe:[{os.fstat(ends[0]).st_ino}]"
    for end in ends:
        os.close(end)


@needs_mount
@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
def test_server_holds_no_descriptors_of_others(tmp_path: Path, inherited: str, *, foreground: bool) -> None:
    """A server has none of the descriptors of who mounted, and of regions none once an open is answered."""
    mounted = Mounted(tmp_path / "mountpoint", tmp_path / "log")
    mounted.path.mkdir()
    command = [sys.executable, str(MOUNT), str(mounted.path), "-o", f"log={mounted.log}"]
    if foreground:
        command.append("-f")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False):
        until(lambda: is_there(mounted.path))
        with (mounted.path / "binder").open("rb"):
            found = []
            for link in Path(f"/proc/{mounted.server}/fd").iterdir():
                # One that the server had open for a moment may be closed by now.
                with contextlib.suppress(FileNotFoundError):
                    found.append(str(link.readlink()))
        mounted.unmount()
    # Its standard output and error are ours where it is in the foreground.
    standard = {str(Path(f"/proc/self/fd/{descriptor}").readlink()) for descriptor in (1, 2)}
    own = re.compile(r"/dev/null|/dev/fuse|socket:.*|anon_inode:.*|pipe:.*|" + re.escape(str(mounted.log)))

    assert [] == [link for link in found if not own.fullmatch(link) and not (foreground and link in standard)]
    assert inherited not in found


# What is allowed, against expectation, does no harm: it is about nothing that there is.
CONFINED = """
import ctypes, fcntl, mmap, os, resource, socket, sys
from binderfs_fuse.host import privileges
libc = ctypes.CDLL(None, use_errno=True)
nowhere = "/nowhere/binder-confined"
pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
privileges.drop()
assert privileges.confine() is None
import json, threading
thread = threading.Thread(target=os.getpid)
thread.start()
thread.join()

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

allowed = []
for name, attempt in {
    "execve": lambda: os.execv(sys.executable, ["python"]),
    "posix_spawn": lambda: os.posix_spawn(sys.executable, ["python"], {}),
    "fork": os.fork,
    "kill": lambda: os.kill(os.getpid(), 0),
    "tgkill": lambda: call("tgkill", os.getppid(), os.getppid(), 0),
    "pidfd_open": lambda: os.pidfd_open(os.getpid()),
    "setuid": lambda: os.setuid(0),
    "chroot": lambda: os.chroot("/"),
    "chdir": lambda: os.chdir("/"),
    "socket": lambda: socket.socket(socket.AF_UNIX),
    "internet": lambda: socket.socket(socket.AF_INET),
    "socketpair": lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
    "connect": lambda: pair[0].connect("/dev/log"),
    "bind": lambda: pair[0].bind("\\0x"),
    "listen": lambda: pair[0].listen(),
    "accept": lambda: pair[0].accept(),
    "write": lambda: os.open("/dev/null", os.O_WRONLY),
    "update": lambda: os.open("/dev/null", os.O_RDWR),
    "create": lambda: os.open(nowhere, os.O_CREAT),
    "mkdir": lambda: os.mkdir(nowhere),
    "unlink": lambda: os.unlink(nowhere),
    "rename": lambda: os.rename(nowhere, nowhere),
    "symlink": lambda: os.symlink("/", nowhere),
    "chmod": lambda: os.chmod(nowhere, 0o777),
    "chown": lambda: os.chown(nowhere, 0, 0),
    "mount": lambda: call("mount", b"none", b"/", b"none", 0, None),
    "umount": lambda: call("umount2", b"/nowhere", 0),
    "unshare": lambda: call("unshare", 0),
    "setns": lambda: call("setns", 0, 0),
    "execmem": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "mprotect": lambda: call("mprotect", None, 4096, mmap.PROT_EXEC),
    "ioctl": lambda: os.tcgetpgrp(0),
    "owner": lambda: fcntl.fcntl(0, 8, os.getppid()),
    "prctl": lambda: call("prctl", 4, 1, 0, 0, 0),
    "ptrace": lambda: call("ptrace", 0, 0, None, None),
    "prlimit": lambda: resource.prlimit(0, resource.RLIMIT_CORE, (0, 0)),
}.items():
    try:
        attempt()
    except PermissionError:
        continue
    except OSError as error:
        name += f": {error}"
    allowed.append(name)
print(json.dumps(allowed))
"""


def test_filter_refuses() -> None:
    """Under the filter threads start, and nothing else is allowed: to execute, signal, write, connect, mount, ..."""
    done = subprocess.run(
        [sys.executable, "-c", CONFINED], cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=60
    )

    assert "" == done.stderr
    assert [] == json.loads(done.stdout)


# Has a thread end as Python ends those that are left when it ends itself.
ENDING = """
import ctypes, os, threading
from binderfs_fuse.host import privileges
libc = ctypes.CDLL(None)
privileges.settle()
privileges.drop()
assert privileges.confine() is None
thread = threading.Thread(target=libc.pthread_exit, args=(None,), daemon=True)
thread.start()
while str(thread.native_id) in os.listdir("/proc/self/task"):
    pass
print("ended", flush=True)
os._exit(0)
"""


def test_threads_can_end_under_the_filter() -> None:
    """What the C library needs to end a thread in the midst of its work is loaded before the filter refuses that."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING], cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=60
    )

    assert ("ended\n", "", 0) == (done.stdout, done.stderr, done.returncode)


def test_modes_and_owners_are_enforced(mount_binderfs: Mount, actor: Start) -> None:
    """The kernel checks who opens a device against its mode and owner, before the server is asked."""
    mounted = mount_binderfs("mode=600,uid=1000,gid=1000")
    other = mount_binderfs()

    assert "0" == actor(mounted, "as 1000").do("open")
    assert "EACCES" == actor(mounted, "as 1001").do("open")
    assert "EACCES" == actor(other, "as 1000").do("open")
    assert "EACCES" == actor(other, "as 1000").do("open binder-control")
    assert 0o600 == stat.S_IMODE((mounted.path / "binder").stat().st_mode)


def test_other_users_are_kept_out(mount_binderfs: Mount, actor: Start) -> None:
    """Without allow_other, even root's other users do not get as far as the modes."""
    mounted = mount_binderfs("noallow_other", "mode=666")

    assert "EACCES" == actor(mounted, "as 1000").do("open")


def test_sender_cannot_be_forged(mount_binderfs: Mount, actor: Start) -> None:
    """A receiver is told which user called and which process opened, whatever the sender writes into its fields."""
    mounted = mount_binderfs("mode=666")
    service = actor(mounted, "open", "manager")
    service.tell("receive-sender")
    client = actor(mounted, "as 1000", "open")
    client.tell("forge")

    assert f"pid {client.pid} euid 1000" == service.line()


def test_sender_is_its_effective_user(mounted: Mounted, actor: Start) -> None:
    """Who is another user as far as files go, as servers of files are, calls as who he is; and so afterwards."""
    service = actor(mounted, "open", "manager")
    client = actor(mounted, "open")
    for change in ("fsuid 1234", "fsuid 0"):
        client.do(change)
        service.tell("receive-sender")
        client.tell("forge")
        assert client.line()

        assert f"pid {client.pid} euid 0" == service.line()


def test_region_cannot_be_reached_by_others(mounted: Mounted, actor: Start) -> None:
    """A region is its open's alone: another open, of the same device and by the same user, maps other pages."""
    service = actor(mounted, "open", "manager")
    client = actor(mounted, "open")
    assert "1" == client.do("tell 1")
    assert "1" == service.do("receive 1")

    assert "0" == client.do("peek-region")
    assert "0" != service.do("peek-region")
