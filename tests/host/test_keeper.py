"""The keeper by its own calls: what it sends into, and nothing else."""

import array
import contextlib
import errno
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from binderfs_fuse._host import ffi, lib
from binderfs_fuse.host.files import keeper_limits
from binderfs_fuse.limits import Limits
from tests.mounts import CHECKOUT

HERE = Path(__file__).parent
CAP_SYS_PTRACE = 19
CREDENTIALS = struct.Struct("=iII")
PROGRAM = os.fsencode(CHECKOUT / "binderfs_fuse/host/keeper")
KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)


class Keeper:
    """A keeper of the test's own, and one channel to it."""

    def __init__(self, limits: Any = None) -> None:
        """Start it, with these limits or the usual ones."""
        pid = ffi.new("int *")
        self.control: int = lib.keeper_start(PROGRAM, limits or keeper_limits(), pid)
        assert self.control >= 0
        self.pid: int = pid[0]
        self.channel: int = lib.keeper_open(self.control)
        assert self.channel >= 0

    def take(self, fd: int) -> int:
        """Have it take what a descriptor of this process is."""
        number: int = lib.keeper_take(self.channel, os.getpid(), fd, 0)
        return number

    def take_socket(self, fd: int) -> int:
        """Have it take a socket, to send into it."""
        number: int = lib.keeper_take_socket(self.channel, os.getpid(), fd, 0)
        return number

    def send(self, number: int, *files: int, more: bool = False) -> int:
        """Have it send files into the socket that it has taken."""
        error: int = lib.keeper_send(self.channel, number, 0, list(files) or ffi.NULL, len(files), more)
        return error

    def held(self) -> set[str]:
        """Return which descriptors it has."""
        return set(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208 - a set of names

    def close(self) -> None:
        """Let it end."""
        os.close(self.channel)
        os.close(self.control)
        os.waitpid(self.pid, 0)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    """Start a keeper, which ends with the test."""
    keeper = Keeper()
    yield keeper
    keeper.close()


@pytest.fixture
def opened() -> Iterator[Callable[[socket.socket], socket.socket]]:
    """Have sockets closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


def receive(end: socket.socket) -> tuple[list[int], int]:
    """Receive one message without waiting; return its descriptors, and the user that the kernel says has sent it."""
    _, messages, _, _ = end.recvmsg(1, 4096, socket.MSG_DONTWAIT)
    fds = array.array("i")
    user = -1
    for _, kind, data in messages:
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(data)
        else:
            _, user, _ = CREDENTIALS.unpack(data)
    return list(fds), user


def test_files_arrive_in_a_fresh_socket(keeper: Keeper, opened: Callable[[socket.socket], socket.socket]) -> None:
    """What is sent into a socket that was just made can be received there, from a sender that is not root."""
    receiver = opened(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    read, write = os.pipe()
    number = keeper.take_socket(receiver.fileno())
    assert 0 == keeper.send(number, keeper.take(read), more=True)
    assert 0 == keeper.send(number, keeper.take(write), more=True)
    (first,), user = receive(receiver)
    (second,), _ = receive(receiver)

    assert 0 == keeper.send(number)
    assert os.path.sameopenfile(read, first)
    assert os.path.sameopenfile(write, second)
    assert 65533 == user
    for fd in (read, write, first, second):
        os.close(fd)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_nothing_is_sent_to_a_third_party(
    kind: socket.SocketKind, keeper: Keeper, opened: Callable[[socket.socket], socket.socket]
) -> None:
    """A socket that leads to somebody else, put under the number that a client says, gets nothing."""
    ours, theirs = map(opened, socket.socketpair(socket.AF_UNIX, kind))
    taken = keeper.take_socket(ours.fileno())
    sent = keeper.send(taken, keeper.take(0))

    assert -errno.ENOTSOCK == taken
    assert -errno.EBADF == sent
    with pytest.raises(BlockingIOError):
        receive(theirs)


def _named(folder: Path) -> socket.socket:
    named = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    named.bind(os.fsencode(folder / "socket"))
    return named


def _listening(folder: Path) -> socket.socket:
    listening = _named(folder)
    listening.listen()
    return listening


@pytest.mark.parametrize(
    "make",
    [
        _named,
        _listening,
        lambda _: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
        lambda _: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        lambda _: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    ],
    ids=["named", "listening", "stream", "datagram", "internet"],
)
def test_only_a_fresh_socket_is_taken(
    make: Callable[[Path], socket.socket],
    keeper: Keeper,
    opened: Callable[[socket.socket], socket.socket],
    tmp_path: Path,
) -> None:
    """Any other socket is refused, and given back."""
    other = opened(make(tmp_path))

    assert -errno.ENOTSOCK == keeper.take_socket(other.fileno())


def test_a_socket_that_is_connected_meanwhile_gets_nothing(
    keeper: Keeper, opened: Callable[[socket.socket], socket.socket], tmp_path: Path
) -> None:
    """When the client connects its socket to a third party after it was taken, nothing is sent."""
    third = opened(_listening(tmp_path))
    receiver = opened(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    number = keeper.take_socket(receiver.fileno())
    receiver.connect(os.fsencode(tmp_path / "socket"))
    accepted = opened(third.accept()[0])

    assert -errno.EISCONN == keeper.send(number, keeper.take(0))
    with pytest.raises(BlockingIOError):
        receive(accepted)
    with pytest.raises(BlockingIOError):
        receive(receiver)


def test_a_socket_cannot_be_led_elsewhere_once_it_is_connected(
    keeper: Keeper, opened: Callable[[socket.socket], socket.socket], tmp_path: Path
) -> None:
    """After the first files a client can connect its socket to nothing else, nor see where it leads to."""
    opened(_listening(tmp_path))
    receiver = opened(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    number = keeper.take_socket(receiver.fileno())
    assert 0 == keeper.send(number, keeper.take(0), more=True)
    with pytest.raises(OSError, match=r"endpoint|argument"):
        receiver.connect(os.fsencode(tmp_path / "socket"))
    another = opened(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))

    assert 0 != another.connect_ex(receiver.getpeername())
    assert 0 == keeper.send(number)


def test_a_keeper_is_its_own_user_with_one_right(keeper: Keeper) -> None:
    """Every thread of it has one capability, can get no other, is filtered, and nobody else's process can kill it."""
    expected = {
        "Uid": "\t".join(["65533"] * 4),
        "Gid": "\t".join(["65533"] * 4),
        "Groups": "",
        "CapPrm": f"{1 << CAP_SYS_PTRACE:016x}",
        "CapEff": f"{1 << CAP_SYS_PTRACE:016x}",
        "CapInh": "0" * 16,
        "CapAmb": "0" * 16,
        "NoNewPrivs": "1",
        "Seccomp": "2",
    }
    for task in Path(f"/proc/{keeper.pid}/task").iterdir():
        status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())

        assert expected == {name: status[name].strip() for name in expected}


def test_a_keeper_has_nothing_of_who_starts_it(opened: Callable[[socket.socket], socket.socket]) -> None:
    """It has none of the descriptors, nor of the environment, of the process that starts it, whatever they are."""
    inherited = opened(socket.socket(socket.AF_UNIX))
    inherited.set_inheritable(True)
    keeper = Keeper()
    # The answer comes over the channel, which is there by then.
    assert -errno.EBADF == keeper.take(-1)
    links = sorted(re.sub(r"\d+", "", str(link.readlink())) for link in Path(f"/proc/{keeper.pid}/fd").iterdir())
    environment = Path(f"/proc/{keeper.pid}/environ").read_bytes()
    command = Path(f"/proc/{keeper.pid}/cmdline").read_bytes()
    keeper.close()
    # The control socket, the listening one and its name, and the channel.
    named = [link for link in links if not re.fullmatch(r"/dev/null|socket:\[\]", link)]

    assert b"" == environment
    assert b"binder-keeper\0" == command
    assert ["/dev/null"] * 3 == links[:3]
    assert 7 == len(links)
    assert 1 == len(named)
    assert named[0].endswith("/socket (deleted)")


def test_a_keeper_refuses_all_else(tmp_path: Path, opened: Callable[[socket.socket], socket.socket]) -> None:
    """Under its filter a keeper makes its own system calls only, and none as on another machine."""
    host = CHECKOUT / "binderfs_fuse/host"
    sources = [HERE / "confined.c", host / "filter.c", host / "message.c"]
    program = tmp_path / "confined"
    subprocess.run(["cc", "-Wall", f"-I{host}", *sources, "-o", program, "-pthread"], check=True, capture_output=True)
    ours, theirs = map(opened, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    subprocess.run([program], stdout=theirs.fileno(), check=True)
    theirs.close()
    told = [text.decode() for text in iter(lambda: ours.recv(100), b"")]

    assert ["done"] == told


def children() -> set[int]:
    """Return the processes that this one has started, ended ones too."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(process.name))
    return found


def test_a_program_that_is_not_there_is_an_error() -> None:
    """Where there is no program, or one that ends at once, the start fails, and leaves no process."""
    pid = ffi.new("int *")
    before = children()

    assert -errno.ENOENT == lib.keeper_start(b"/nowhere", keeper_limits(), pid)
    assert -errno.EACCES == lib.keeper_start(b"/dev/null", keeper_limits(), pid)
    assert -errno.ECHILD == lib.keeper_start(b"/bin/true", keeper_limits(), pid)
    assert before == children()


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("descriptors", 0),
        ("descriptors", (1 << 20) + 1),
        ("reserve", 1),
        ("closers", 0),
        ("closers", 1025),
        ("user_closers", 0),
        ("user_closers", Limits.closers + 1),
        ("user_unclosed", -1),
    ],
)
def test_limits_that_cannot_be_kept_to_are_an_error(name: str, number: int) -> None:
    """A keeper that is given a number out of its range does not start."""
    limits = keeper_limits()
    setattr(limits, name, number)

    assert -errno.EINVAL == lib.keeper_start(PROGRAM, limits, ffi.new("int *"))


def test_a_keeper_takes_its_limits_from_who_starts_it() -> None:
    """It has room for as many files as it is told, less the part that is reserved."""
    limits = keeper_limits()
    limits.descriptors = 100
    limits.reserve = 2
    keeper = Keeper(limits)
    taken = 0
    while keeper.take(0) >= 0:
        taken += 1

    # A user may take one more only while it has fewer than are free.
    assert 25 == taken
    keeper.close()


def test_files_that_are_not_received_do_not_add_up(
    keeper: Keeper, opened: Callable[[socket.socket], socket.socket]
) -> None:
    """What a receiver leaves in its socket is removed from there, though the receiver keeps the socket."""
    for _ in range(40):
        receiver = opened(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        read, write = os.pipe()
        number = keeper.take_socket(receiver.fileno())
        assert 0 == keeper.send(number, keeper.take(write), more=True)
        assert 0 == keeper.send(number)
        os.close(write)

        assert b"" == os.read(read, 1)
        os.close(read)


def test_only_held_files_are_sent(keeper: Keeper, opened: Callable[[socket.socket], socket.socket]) -> None:
    """A number that is no file of a client, or one that is on its way already, is not sent."""
    receiver = opened(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    file = keeper.take(0)
    for wrong in ([-1], [3], [4], [70000], [file, file]):
        number = keeper.take_socket(receiver.fileno())

        assert -errno.EBADF == keeper.send(number, *wrong)
    number = keeper.take_socket(receiver.fileno())

    assert -errno.EBADF == keeper.send(number, number)
    number = keeper.take_socket(receiver.fileno())
    assert 0 == keeper.send(number, file)


def test_users_leave_a_share_of_files_to_the_next() -> None:
    """However many files some users have on their way, the next one has room for some, though for fewer."""
    program = f"""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from binderfs_fuse._host import ffi, lib
from binderfs_fuse.host.files import keeper_limits
control = lib.keeper_start({PROGRAM!r}, keeper_limits(), ffi.new("int *"))
channel = lib.keeper_open(control)
for user in range(1, 5):
    count = 0
    while lib.keeper_take(channel, os.getpid(), 0, user) >= 0:
        count += 1
    print(count)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, stdin=subprocess.DEVNULL, capture_output=True, check=True
    )
    counts = [int(line) for line in done.stdout.split()]

    assert 4 == len(counts)
    assert sorted(counts, reverse=True) == counts
    assert counts[-1] > 0
