import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from binderfs_fuse._host import ffi, lib
from binderfs_fuse.host import files as host_files
from binderfs_fuse.host import tasks
from binderfs_fuse.host.files import RESTART, File, FileInstaller, get_file, injector_pid, is_keeper, keeper_pid
from tests.conftest import LogWatch
from tests.host.parking import Parked, ParkingDevice

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="mounts a file system, traces other processes"
)

HERE = Path(__file__).parent
LIBC = ctypes.CDLL(None, use_errno=True)
FUTEX = {"x86_64": b"202", "aarch64": b"98"}[platform.machine()]
FUTEX_CLOCK_REALTIME = 256
KCMP = {"x86_64": 312, "aarch64": 272}[platform.machine()]
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21
PATIENCE = 60
"""Seconds after which something that must come is given up: no behaviour is measured by it."""


# ---- clients ----


def _build(source: str, program: Path, *options: str) -> Path:
    subprocess.run(["cc", "-O1", "-Wall", *options, HERE / source, "-o", program], check=True, capture_output=True)
    return program


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the client program, linked in both ways."""
    folder = tmp_path_factory.mktemp("clients")
    return {
        "dynamic": _build("client.c", folder / "dynamic", "-pthread"),
        "static": _build("client.c", folder / "static", "-pthread", "-static"),
    }


class Client:
    """A running client, whose output is read line by line."""

    def __init__(self, program: Path, *words: str | Path) -> None:
        """Start it."""
        self.process = subprocess.Popen([program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.pid = self.process.pid

    def line(self) -> str:
        """Return its next line; "" when it has ended."""
        assert self.process.stdout
        return self.process.stdout.readline().decode().rstrip("\n")

    def descriptors(self) -> set[int]:
        """Return the descriptors that it has open."""
        return {int(entry.name) for entry in Path(f"/proc/{self.pid}/fd").iterdir()}

    def state(self, fd: int) -> dict[str, int]:
        """Return position and flags of a descriptor."""
        lines = Path(f"/proc/{self.pid}/fdinfo/{fd}").read_text().splitlines()
        values = dict(line.split(":\t") for line in lines if line.startswith(("pos:", "flags:")))
        return {"pos": int(values["pos"]), "flags": int(values["flags"], 8)}

    def status(self, key: str) -> str:
        """Return a value of its ``/proc/PID/status``."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split()[1] for line in lines if line.startswith(f"{key}:"))


@pytest.fixture
def device(tmp_path: Path) -> Iterator[ParkingDevice]:
    """Mount the device that clients wait in."""
    device = ParkingDevice(tmp_path)
    yield device
    device.close()


@pytest.fixture
def start(programs: dict[str, Path], device: ParkingDevice) -> Iterator[Callable[..., Client]]:
    """Start clients of the device, in the state that words of ``client.c`` say."""
    clients = []

    def start(*words: str | Path, linked: str = "dynamic", program: Path | None = None) -> Client:
        clients.append(Client(program or programs[linked], device.path, *words))
        return clients[-1]

    yield start
    for client in clients:
        client.process.kill()
    device.close()  # until which a client cannot end
    for client in clients:
        client.process.communicate()


# ---- transfers ----


@pytest.fixture
def installer() -> Iterator[FileInstaller]:
    """Make an installer, whose threads end with the test."""
    installer = FileInstaller()
    yield installer
    installer.close()
    _join("binderfs tracer")
    assert not [thread for thread in threading.enumerate() if thread.name == "binderfs tracer"]


def _join(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join()


def duplicate(fd: int) -> File:
    """Return another reference to one's own open file."""
    file = get_file(os.getpid(), fd, 0)

    assert isinstance(file, File)
    return file


def moved(fd: int) -> File:
    """Return a reference to one's own open file in place of the descriptor."""
    file = duplicate(fd)
    os.close(fd)
    return file


def nothing(*_: Any) -> None:
    """Do nothing in a callback."""


def install(
    installer: FileInstaller,
    parked: Parked,
    files: list[File],
    *,
    reply: Callable[[], bool] | None = None,
    patch: Callable[[list[int]], int | None] = nothing,
    failed: Callable[[int], int | None] = nothing,
    closes: tuple[int, ...] = (),
) -> list[int] | int:
    """Install files and wait for what comes of it: their numbers, or a negative errno."""
    outcome: SimpleQueue[list[int] | int] = SimpleQueue()

    def patched(numbers: list[int]) -> int | None:
        result = patch(numbers)
        outcome.put(numbers)
        return result

    def gave_up(error: int) -> int | None:
        result = failed(error)
        outcome.put(error)
        return result

    installer.install(
        parked.tid, files, reply=reply or (lambda: parked.reply(7)), patch=patched, failed=gave_up, closes=closes
    )
    return outcome.get()


def own_descriptors() -> set[Path]:
    """Return the descriptors that this process has open, but for idle channels to the keeper and the injector."""
    programs = (host_files._keeper_of_all(), host_files._injector_of_all())
    channels = {channel for program in programs for channel in program._channels}
    # The listing shows its own descriptor, which is closed by now.
    return {path for path in Path("/proc/self/fd").iterdir() if int(path.name) not in channels and path.is_symlink()}


def kept() -> int:
    """Return how many descriptors the keeper has open, but for its ends of channels."""
    channels = len(host_files._keeper_of_all()._channels)
    injector = injector_pid()
    # Each thread of a channel has that, and one to the keeper once it has installed files.
    threads = len(list(Path(f"/proc/{injector}/task").iterdir())) - 1
    links = [str(link.readlink()) for link in Path(f"/proc/{injector}/fd").iterdir() if link.is_symlink()]
    channels += sum(link.startswith("socket:") for link in links) - 2 - threads
    return len(list(Path(f"/proc/{keeper_pid()}/fd").iterdir())) - channels


def until(condition: Callable[[], object]) -> None:
    """Wait for something that nobody announces."""
    never = threading.Event()
    while not condition():
        never.wait(0.001)


def same_file(pid: int, fd: int, own: int, owner: int | None = None) -> bool:
    """Tell whether a descriptor there and one here, or in another process, are the same open file."""
    result: int = LIBC.syscall(KCMP, owner or os.getpid(), pid, 0, own, fd)
    return result == 0


def in_thread(work: Callable[[], None]) -> None:
    """Run something in a thread that ends afterwards."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def end(program: host_files._Program | None) -> None:
    """Hang up on a program that was started for one test, and wait for its end."""
    assert program is not None
    for fd in (program._control, *program._channels):
        os.close(fd)
    os.waitpid(program.pid, 0)


@pytest.fixture
def another_keeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have files taken by a keeper that is started, by the thread that first takes one, for this test alone."""
    monkeypatch.setattr(host_files, "_keeper", None)
    yield
    end(host_files._keeper)


@pytest.fixture
def another_injector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have files installed by an injector that is started, by the thread that first needs it, for this test alone."""
    keeper_pid()
    monkeypatch.setattr(host_files, "_injector", None)
    yield
    end(host_files._injector)


def without_capability(capability: int, work: Callable[[], None]) -> None:
    """Run something in a thread without a capability, which threads that it starts lack too."""

    def run() -> None:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        data = (ctypes.c_uint32 * 6)()
        assert LIBC.capget(header, data) == 0
        data[0] &= ~(1 << capability)
        assert LIBC.capset(header, data) == 0
        work()

    in_thread(run)


# ---- taking files ----


def test_a_taken_file_is_the_same_open_file(device: ParkingDevice, start: Callable[..., Client]) -> None:
    """What `get_file` returns shares its offset with the client's descriptor."""
    client = start()
    parked = device.parked.get()
    file = get_file(parked.tid, 1, 0)

    assert isinstance(file, File)
    assert same_file(client.pid, 1, file.number, keeper_pid())
    file.close()


def test_a_number_that_is_not_open_is_not_taken(device: ParkingDevice, start: Callable[..., Client]) -> None:
    """A closed descriptor's number gives EBADF."""
    start()

    assert -errno.EBADF == get_file(device.parked.get().tid, 77, 0)


def test_a_path_only_descriptor_is_not_taken() -> None:
    """An O_PATH descriptor gives EBADF, as it does in the kernel's driver."""
    fd = os.open("/", os.O_PATH)

    assert -errno.EBADF == get_file(os.getpid(), fd, 0)
    os.close(fd)


def test_nothing_is_taken_from_a_task_that_is_gone() -> None:
    """A thread id that nobody has gives ESRCH."""
    process = subprocess.Popen(["true"])
    process.wait()

    assert -errno.ESRCH == get_file(process.pid, 0, 0)


def test_a_file_is_taken_from_the_table_of_the_thread(device: ParkingDevice, start: Callable[..., Client]) -> None:
    """A thread that has unshared its descriptors, and closed one, does not have that of its process."""
    client = start("unshared")
    parked = device.parked.get()
    taken = get_file(client.pid, 9, 0)

    assert -errno.EBADF == get_file(parked.tid, 9, 0)
    assert isinstance(taken, File)
    taken.close()


@pytest.mark.usefixtures("another_keeper")
def test_without_the_right_nothing_is_taken(
    device: ParkingDevice, start: Callable[..., Client], logs: LogWatch
) -> None:
    """A server that may not trace the client has EPERM, and says so in the log."""
    start("user")
    parked = device.parked.get()
    logs.expect(rf"cannot take a file descriptor from task {parked.tid} \(dynamic\): no right to trace it")
    taken: list[File | int] = []
    without_capability(CAP_SYS_PTRACE, lambda: taken.append(get_file(parked.tid, 1, 0)))

    assert [-errno.EPERM] == taken


def test_a_file_is_closed_once() -> None:
    """Closing gives the descriptor back, and a second time is an error."""
    read, write = os.pipe()
    file = moved(write)
    file.close()

    assert b"" == os.read(read, 1)  # the end: the only writer is gone
    with pytest.raises(ValueError, match="closed"):
        file.close()
    os.close(read)


def test_a_forgotten_file_is_closed_and_named() -> None:
    """A file that nobody closed is closed when it is collected, with a warning."""
    read, write = os.pipe()
    with pytest.warns(ResourceWarning, match=r"unclosed file \d+"):
        moved(write)

    assert b"" == os.read(read, 1)
    os.close(read)


def test_no_file_of_a_client_is_in_this_process() -> None:
    """A file that was taken is held by another process alone."""
    read, write = os.pipe()
    file = duplicate(write)
    here = [fd for fd in own_descriptors() if fd.exists() and fd.stat().st_ino == os.fstat(read).st_ino]
    file.close()
    os.close(read)
    os.close(write)

    assert {f"/proc/self/fd/{fd}" for fd in (read, write)} == {str(fd) for fd in here}


def test_only_threads_of_the_keeper_are_the_keeper() -> None:
    """Its first thread and those of its channels are, this process's are not."""
    duplicate(0).close()
    threads = [int(task.name) for task in Path(f"/proc/{keeper_pid()}/task").iterdir()]

    assert len(threads) > 1
    assert all(is_keeper(tid) for tid in threads)
    assert not is_keeper(os.getpid())


@pytest.mark.usefixtures("another_keeper")
def test_without_a_keeper_nothing_is_taken(logs: LogWatch) -> None:
    """When the process that holds files is killed, taking one is an error, and one line in the log."""
    file = duplicate(0)
    pid = keeper_pid()
    logs.expect(f"process {pid}, which holds files for this one, is gone")
    os.kill(pid, signal.SIGKILL)
    until(lambda: isinstance(get_file(os.getpid(), 0, 0), int))

    assert -errno.EIO == get_file(os.getpid(), 0, 0)
    file.close()


def test_a_keeper_ends_with_its_process() -> None:
    """A killed process's files are closed, and who held them is gone."""
    read, write = os.pipe()
    program = f"""
import os
from binderfs_fuse.host import files
file = files.get_file(os.getpid(), {write}, 0)
os.close({write})
print(files.keeper_pid(), flush=True)
os.read(0, 1)
"""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[write])
    os.close(write)
    assert process.stdout
    keeper = os.pidfd_open(int(process.stdout.readline()))
    process.kill()
    select.select([keeper], [], [])

    assert b"" == os.read(read, 1)
    process.communicate()
    os.close(keeper)
    os.close(read)


# ---- installing files ----


def _regular(folder: Path) -> int:
    fd = os.open(folder / "regular", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"contents")
    return fd


KINDS: dict[str, Callable[[Path], int]] = {
    "regular": _regular,
    "directory": lambda folder: os.open(folder, os.O_DIRECTORY),
    "pipe": lambda _: _keep_first(os.pipe()),
    "socket": lambda _: socket.socket(socket.AF_INET).detach(),
    "memfd": lambda _: os.memfd_create("x"),
    "eventfd": lambda _: os.eventfd(3),
    "device": lambda _: os.open("/dev/null", os.O_RDWR),
}


def _keep_first(pair: tuple[int, int]) -> int:
    os.close(pair[1])
    return pair[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_arrives(
    kind: str,
    device: ParkingDevice,
    start: Callable[..., Client],
    installer: FileInstaller,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The client has the same open file, close-on-exec, at the lowest free number; its ioctl returns as replied."""
    client = start()
    parked = device.parked.get()
    before = client.descriptors()
    fd = KINDS[kind](tmp_path_factory.mktemp("files"))
    numbers = install(installer, parked, [duplicate(fd)])

    assert [min(set(range(64)) - before)] == numbers
    assert client.line() == "0 7"
    assert before | {numbers[0]} == client.descriptors()
    assert same_file(client.pid, numbers[0], fd)
    assert client.state(numbers[0])["flags"] & os.O_CLOEXEC
    os.close(fd)


def test_the_offset_is_shared(
    device: ParkingDevice,
    start: Callable[..., Client],
    installer: FileInstaller,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What one side reads, the other does not read again."""
    client = start()
    fd = _regular(tmp_path_factory.mktemp("files"))
    numbers = install(installer, device.parked.get(), [duplicate(fd)])
    assert isinstance(numbers, list)
    os.lseek(fd, 5, os.SEEK_SET)

    assert 5 == client.state(numbers[0])["pos"]
    os.close(fd)


@pytest.mark.parametrize("linked", ["dynamic", "static"])
@pytest.mark.parametrize(
    "words", [(), ("thread",), ("unshared",), ("vfork",), ("echo",), ("edge",), ("block", "ignore")]
)
def test_any_client_gets_a_file_and_notices_nothing(
    words: tuple[str, ...],
    linked: str,
    device: ParkingDevice,
    start: Callable[..., Client],
    installer: FileInstaller,
) -> None:
    """However it is linked, whichever thread waits, on whatever stack: registers and red zone stay as they were."""
    client = start(*words, linked=linked)
    read, write = os.pipe()
    for _ in range(3):
        parked = device.parked.get()
        numbers = install(installer, parked, [duplicate(read), duplicate(write)])

        assert isinstance(numbers, list)
        assert client.line() == "0 7"
        assert stat.S_ISFIFO(Path(f"/proc/{parked.tid}/fd/{numbers[1]}").stat().st_mode)
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("count", [2, 3, 32, 33, 254, 600])
def test_many_files_arrive_in_order_at_the_lowest_numbers(
    count: int, device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """Files get ascending numbers that were free, none left out, in the order in which they were given."""
    client = start()
    parked = device.parked.get()
    free = sorted(set(range(count + 64)) - client.descriptors())
    pipes = os.pipe()
    numbers = install(installer, parked, [duplicate(pipes[index % 2]) for index in range(count)])

    assert free[:count] == numbers
    assert all(same_file(client.pid, number, pipes[index % 2]) for index, number in enumerate(numbers))
    os.close(pipes[0])
    os.close(pipes[1])


def test_numbers_are_known_before_the_client_runs(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """While the numbers are stored, other threads of the client run, and the one that waits does not."""
    client = start("echo")
    assert client.process.stdin
    assert client.process.stdout
    stdin, stdout = client.process.stdin, client.process.stdout
    heard: list[bytes] = []

    def patch(_numbers: list[int]) -> None:
        stdin.write(b"x")
        heard.append(stdout.read(1))

    install(installer, device.parked.get(), [duplicate(0)], patch=patch)

    assert [b"x"] == heard
    assert client.line() == "0 7"


def test_the_request_is_interrupted_on_the_way(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """The server sees a FUSE_INTERRUPT for the request that it is about to answer."""
    start()
    parked = device.parked.get()

    def reply() -> bool:
        assert device.interrupted.get() == parked.unique
        return parked.reply(7)

    assert isinstance(install(installer, parked, [duplicate(0)], reply=reply), list)


def test_a_call_that_restarts_itself_still_does(
    programs: dict[str, Path], tmp_path: Path, installer: FileInstaller
) -> None:
    """A client in read(2), which tracing interrupts, reads what comes afterwards."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    client = Client(programs["dynamic"], fifo, "read")
    with fifo.open("wb", buffering=0) as pipe:
        outcome: SimpleQueue[list[int] | int] = SimpleQueue()
        installer.install(client.pid, [duplicate(0)], reply=lambda: True, patch=outcome.put, failed=outcome.put)
        numbers = outcome.get()
        pipe.write((5).to_bytes(8, "little"))

        assert isinstance(numbers, list)
        assert client.line() == "8 5"
    client.process.communicate()


def test_a_thousand_transfers_leave_nothing_behind(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """No side has a descriptor more than it should."""
    client = start()
    parked = device.parked.get()
    before, own, held = client.descriptors(), own_descriptors(), kept()
    numbers: list[int] = []
    for _ in range(1000):
        outcome = install(installer, parked, [duplicate(0)], closes=tuple(numbers))
        assert isinstance(outcome, list)
        numbers = outcome
        parked = device.parked.get()
        assert client.line() == "0 7"

    assert before | set(numbers) == client.descriptors()
    installer.close()
    _join("binderfs tracer")
    assert own == own_descriptors()
    until(lambda: held == kept())


def test_record_locks_survive(
    device: ParkingDevice,
    start: Callable[..., Client],
    installer: FileInstaller,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A client that holds a record lock on a file keeps it when it gets another descriptor of that file."""
    fd = _regular(tmp_path_factory.mktemp("files"))
    start("lock", Path(f"/proc/self/fd/{fd}").readlink())
    assert isinstance(install(installer, device.parked.get(), [duplicate(fd), duplicate(fd)]), list)

    with pytest.raises(BlockingIOError):
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


# ---- closing descriptors ----


def test_descriptors_are_closed_in_the_client(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """Those named go, those that are not open are passed over, and the ioctl returns as replied."""
    client = start()
    numbers = install(installer, device.parked.get(), [duplicate(0), duplicate(0), duplicate(0)])
    assert isinstance(numbers, list)
    assert client.line() == "0 7"
    parked = device.parked.get()
    before = client.descriptors()
    outcome: SimpleQueue[int | None] = SimpleQueue()
    installer.install(
        parked.tid,
        [],
        reply=lambda: parked.reply(8),
        patch=lambda _: outcome.put(None),
        failed=outcome.put,
        closes=[numbers[0], 4000, numbers[2], -1],
    )

    assert outcome.get() is None
    assert client.line() == "0 8"
    assert before - {numbers[0], numbers[2]} == client.descriptors()


def test_what_is_closed_makes_room_for_what_is_installed(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """Closing comes first, so its numbers are used again."""
    start()
    first = install(installer, device.parked.get(), [duplicate(0), duplicate(0)])
    assert isinstance(first, list)
    second = install(installer, device.parked.get(), [duplicate(0), duplicate(0)], closes=tuple(first))

    assert first == second


# ---- signals ----


def test_a_signal_waits_until_the_files_are_there(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """A handler runs once, after the transfer, before the client goes on."""
    client = start("handle")
    parked = device.parked.get()

    def reply() -> bool:
        os.kill(client.pid, signal.SIGUSR1)
        return parked.reply(7)

    assert isinstance(install(installer, parked, [duplicate(0)], reply=reply), list)
    assert [client.line(), client.line()] == ["signal 10 after 0", "0 7"]


def test_no_signal_is_lost(device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller) -> None:
    """Signals that queue, sent at every stage of many transfers, are all handled."""
    client = start("handle")
    stages = 0

    def send() -> None:
        nonlocal stages
        stages += 1
        os.kill(client.pid, signal.SIGRTMIN)

    for _ in range(50):
        parked = device.parked.get()
        send()

        def reply(parked: Parked = parked) -> bool:
            send()
            return parked.reply(7)

        assert isinstance(install(installer, parked, [duplicate(0)], reply=reply, patch=lambda _: send()), list)
        assert client.line() == "0 7"
    parked = device.parked.get()
    os.kill(client.pid, signal.SIGUSR1)
    parked.reply(7)

    assert client.line() == f"signal 10 after {stages}"


def test_signals_stay_blocked_pending_and_ignored(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """Mask, pending signals and dispositions are what they were."""
    client = start("block", "ignore", "handle")
    parked = device.parked.get()
    os.kill(client.pid, signal.SIGUSR1)
    os.kill(client.pid, signal.SIGTERM)
    keys = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")
    before = [client.status(key) for key in keys]
    assert isinstance(install(installer, parked, [duplicate(0)]), list)
    assert client.line() == "0 7"
    device.parked.get()

    assert before == [client.status(key) for key in keys]


def _wait_stopped(client: Client) -> None:
    _join("binderfs tracer")
    os.waitid(os.P_PID, client.pid, os.WSTOPPED)


def test_a_stopped_client_gets_its_files_and_stays_stopped(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """SIGSTOP during a transfer takes effect after it, and lasts until SIGCONT."""
    client = start()
    parked = device.parked.get()

    def reply() -> bool:
        os.kill(client.pid, signal.SIGSTOP)
        return parked.reply(7)

    numbers = install(installer, parked, [duplicate(0)], reply=reply)
    installer.close()
    _wait_stopped(client)

    assert isinstance(numbers, list)
    assert device.parked.empty()
    os.kill(client.pid, signal.SIGCONT)
    assert client.line() == "0 7"
    device.parked.get()


class Tracing:
    """The steps of a transfer by hand."""

    def __init__(self, parked: Parked) -> None:
        """Seize the task, answer it, and wait until it has stopped."""
        self.channel = host_files._injector_of_all().acquire()
        assert lib.injector_seize(self.channel, parked.tid) == 0
        parked.reply(7)
        assert lib.injector_stopped(self.channel) == 0

    def install(self, *fds: int) -> list[int] | int:
        """Install copies of one's own descriptors."""
        files = [duplicate(fd).detach() for fd in fds]
        numbers = ffi.new("int[]", len(files))
        sent = ffi.new("int *")
        error: int = lib.injector_install(self.channel, 0, files, len(files), 0, numbers, sent)
        host_files._keeper_of_all().give_up(files[sent[0] :])
        return error or list(numbers)

    def release(self) -> int:
        """Let the task go on."""
        error: int = lib.injector_release(self.channel, lib.INJECTOR_KEEP, 0)
        os.close(self.channel)
        return error


def test_a_stop_in_the_midst_of_a_transfer_does_not_stop_it(
    device: ParkingDevice, start: Callable[..., Client]
) -> None:
    """SIGSTOP between the client's stop and its first system call for us is kept for later; SIGCONT takes it back."""
    client = start()
    tracing = Tracing(device.parked.get())
    os.kill(client.pid, signal.SIGSTOP)

    assert isinstance(tracing.install(0), list)
    os.kill(client.pid, signal.SIGCONT)
    assert isinstance(tracing.install(0), list)
    assert tracing.release() == 0
    assert client.line() == "0 7"


def test_a_client_goes_on_when_its_transfer_is_abandoned(device: ParkingDevice, start: Callable[..., Client]) -> None:
    """Where the server ends in the midst of a transfer, its client has its registers and signals back."""
    client = start("handle")
    tracing = Tracing(device.parked.get())
    before = client.status("SigBlk")
    assert isinstance(tracing.install(0), list)
    os.close(tracing.channel)

    assert client.line() == "0 7"
    assert before != client.status("SigBlk")
    device.parked.get().reply(8)
    assert client.line() == "0 8"


@pytest.mark.usefixtures("another_injector")
def test_without_an_injector_nothing_is_installed(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller, logs: LogWatch
) -> None:
    """When the process that installs files is killed, its client goes on, and later transfers fail, with one line."""
    client = start()
    tracing = Tracing(device.parked.get())
    pid = injector_pid()
    logs.expect(f"process {pid}, which installs files for this one, is gone")
    os.kill(pid, signal.SIGKILL)

    assert client.line() == "0 7"
    os.close(tracing.channel)
    for _ in range(2):
        parked = device.parked.get()

        def failed(_error: int, parked: Parked = parked) -> None:
            parked.reply(9)

        assert -errno.EIO == install(installer, parked, [duplicate(0)], failed=failed)
        assert client.line() == "0 9"


def test_no_step_of_the_clock_changes_how_long_an_injector_waits_at_its_end() -> None:
    """It waits for its threads by a clock that nobody sets: the kernel is not asked to go by the time of day."""
    pid = ffi.new("int *")
    operation = None
    # The wait has an end, before which it has to be seen.
    while operation is None:
        program = os.fsencode(Path(host_files.__file__).parent / "injector")
        control = lib.injector_start(program, host_files._keeper_of_all().control, 0, pid)
        channel = lib.injector_open(control)
        # A thread serves the channel, and does not end while that is open here.
        os.close(control)
        while operation is None and os.waitid(os.P_PID, pid[0], os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            call = tasks.system_call(pid[0], pid[0])
            # The one with a time.
            if call and call[0] == FUTEX and int(call[4], 16):
                operation = int(call[2], 16)
        os.close(channel)
        os.waitpid(pid[0], 0)

    assert 0 == operation & FUTEX_CLOCK_REALTIME


# ---- what can go wrong ----


def test_a_full_table_installs_nothing(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """With one number too few the error is EMFILE, no file is there, and the limit is as it was."""
    client = start()
    parked = device.parked.get()
    before = client.descriptors()
    limit = (len(before) + 2, len(before) + 2)
    resource.prlimit(client.pid, resource.RLIMIT_NOFILE, limit)
    outcome = install(installer, parked, [duplicate(0), duplicate(0), duplicate(0)])

    assert -errno.EMFILE == outcome
    assert client.line() == "0 7"
    assert before == client.descriptors()
    assert limit == resource.prlimit(client.pid, resource.RLIMIT_NOFILE)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_table_may_be_filled_to_the_last_number(
    count: int, device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """As many files can be installed as there are numbers, for the work itself needs none of them."""
    client = start()
    parked = device.parked.get()
    soft, hard = len(client.descriptors()) + count, resource.prlimit(client.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (soft, hard))
    numbers = install(installer, parked, [duplicate(0) for _ in range(count)])

    assert isinstance(numbers, list)
    assert set(range(soft)) == client.descriptors()
    assert (soft, hard) == resource.prlimit(client.pid, resource.RLIMIT_NOFILE)
    device.parked.get()
    assert client.line() == "0 7"


def test_a_limit_that_is_set_meanwhile_stays(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """A limit that the client sets while it is lifted for the transfer is not set back to what it was before."""
    client = start()
    parked = device.parked.get()
    count, hard = len(client.descriptors()), resource.prlimit(client.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (count + 1, hard))
    file = duplicate(0)

    def reply() -> bool:
        os.kill(keeper_pid(), signal.SIGSTOP)
        return parked.reply(7)

    def meddle() -> None:
        until(lambda: resource.prlimit(client.pid, resource.RLIMIT_NOFILE)[0] > count + 1)
        resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (count + 50, hard))
        os.kill(keeper_pid(), signal.SIGCONT)

    meddling = threading.Thread(target=meddle)
    meddling.start()
    numbers = install(installer, parked, [file], reply=reply)
    meddling.join()

    assert isinstance(numbers, list)
    assert (count + 50, hard) == resource.prlimit(client.pid, resource.RLIMIT_NOFILE)


def test_no_stack_is_an_error(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller, logs: LogWatch
) -> None:
    """A client whose stack pointer points nowhere has EFAULT, and lives on."""
    logs.expect("a call that has to be made in it fails: Bad address")
    client = start("nostack")
    parked = device.parked.get()
    before = client.descriptors()

    assert -errno.EFAULT == install(installer, parked, [duplicate(0)])
    assert client.line() == "0 7"
    assert before == client.descriptors()


def test_a_system_call_filter_does_not_matter(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """A client that forbids itself to make sockets gets its files: the filter is suspended meanwhile."""
    client = start("filter")

    assert isinstance(install(installer, device.parked.get(), [duplicate(0)]), list)
    assert client.line() == "0 7"


@pytest.mark.parametrize("word", ["filter", "trap", "kill"])
@pytest.mark.usefixtures("another_injector")
def test_a_system_call_filter_that_cannot_be_suspended_says_no(
    word: str, device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller, logs: LogWatch
) -> None:
    """Without CAP_SYS_ADMIN a client whose filter might object is refused before the reply, unharmed, with a line."""
    client = start(word)
    parked = device.parked.get()
    logs.expect(rf"task {parked.tid} \(dynamic\): its system call filter may refuse what has to be done")
    outcome: list[list[int] | int] = []

    def failed(_error: int) -> None:
        parked.reply(9)

    without_capability(CAP_SYS_ADMIN, lambda: outcome.append(install(installer, parked, [duplicate(0)], failed=failed)))

    assert [-errno.EACCES] == outcome
    assert client.line() == "0 9"


@pytest.mark.parametrize(("word", "error"), [("filter", errno.EACCES), ("trap", errno.EACCES)])
@pytest.mark.usefixtures("another_injector")
def test_a_filter_that_comes_too_late_to_be_seen_does_no_harm(
    word: str, error: int, device: ParkingDevice, start: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a filter makes of a call is no descriptor, and a handler of SIGSYS neither runs nor is lost."""
    monkeypatch.setattr(host_files, "_INHERITED_FILTERS", 1)
    client = start(word)
    parked = device.parked.get()
    outcome: list[list[int] | int] = []

    def transfer() -> None:
        tracing = Tracing(parked)
        outcome.append(tracing.install(0))
        tracing.release()

    without_capability(CAP_SYS_ADMIN, transfer)

    assert [-error] == outcome
    assert client.line() == "0 7"
    device.parked.get().reply(8)
    assert client.line() == "0 8"
    assert bool(int(client.status("SigCgt"), 16) & 1 << signal.SIGSYS - 1) == (word == "trap")


@pytest.mark.usefixtures("another_injector")
def test_a_client_that_may_not_be_traced_is_refused_before_the_reply(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller, logs: LogWatch
) -> None:
    """Without CAP_SYS_PTRACE the error is EPERM; the request still waits, and can be answered in another way."""
    client = start("user")
    parked = device.parked.get()
    logs.expect(rf"task {parked.tid} \(dynamic\): no right to trace it \(CAP_SYS_PTRACE\)")
    outcome: list[list[int] | int] = []

    def failed(_error: int) -> None:
        parked.reply(9)

    without_capability(
        CAP_SYS_PTRACE, lambda: outcome.append(install(installer, parked, [duplicate(0)], failed=failed))
    )

    assert [-errno.EPERM] == outcome
    assert client.line() == "0 9"


def test_a_complaint_is_made_of_a_client_with_any_name(
    device: ParkingDevice,
    start: Callable[..., Client],
    programs: dict[str, Path],
    installer: FileInstaller,
    logs: LogWatch,
) -> None:
    """A program whose name is no text has its error, and the line in the log shows what can be shown."""
    program = programs["static"].with_name(os.fsdecode(b"\xff\rname"))
    program.hardlink_to(programs["static"])
    start("nostack", program=program)
    parked = device.parked.get()
    program.unlink()
    logs.expect(r"task \d+ \(.*Bad address")

    assert -errno.EFAULT == install(installer, parked, [duplicate(0)])


@contextlib.contextmanager
def debugger(tid: int) -> Iterator[int]:
    """Have a process seize a task; it lets go when it ends."""
    program = f"""
import ctypes, os
assert ctypes.CDLL(None).ptrace(0x4206, {tid}, 0, 0) == 0
os.write(1, b".")
os.read(0, 1)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.read(1) == b"."
    yield process.pid
    process.communicate()


def test_a_client_that_is_traced_is_refused(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller, logs: LogWatch
) -> None:
    """Under a debugger the error is EPERM, and the log names the debugger."""
    client = start()
    parked = device.parked.get()
    with debugger(parked.tid) as pid:
        logs.expect(rf"task {parked.tid} \(dynamic\): task {pid} \(\S+\) traces it")
        outcome = install(installer, parked, [duplicate(0)], failed=lambda _: nothing(parked.reply(9)))

        assert -errno.EPERM == outcome
    assert client.line() == "0 9"


def test_a_32_bit_client_is_refused_and_unharmed(
    device: ParkingDevice,
    start: Callable[..., Client],
    installer: FileInstaller,
    logs: LogWatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A 32-bit client gets no files; its call can be given another result, or be made again."""
    program = tmp_path_factory.mktemp("clients") / "client32"
    options = ("-m32", "-ffreestanding", "-nostdlib", "-static", "-fno-pie", "-no-pie", "-fno-stack-protector")
    try:
        _build("client32.c", program, *options)
    except subprocess.CalledProcessError:
        pytest.skip("the compiler makes no 32-bit programs")
    logs.expect("32-bit")
    client = start(program=program)
    outcome = install(installer, device.parked.get(), [duplicate(0)], failed=lambda _: RESTART)

    assert -errno.EOPNOTSUPP == outcome
    assert -errno.EOPNOTSUPP == install(installer, device.parked.get(), [duplicate(0)], failed=lambda _: -errno.EIO)
    assert client.line() == "-05"
    assert -errno.EOPNOTSUPP == install(installer, device.parked.get(), [duplicate(0)])
    assert client.line() == "+00"


def test_an_aborted_connection_is_an_error(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """When nobody takes the reply any more, nothing is installed and the client goes on."""
    client = start()
    parked = device.parked.get()

    def reply() -> bool:
        device.abort()
        return parked.reply(7)

    assert -errno.ECONNABORTED == install(installer, parked, [duplicate(0)], reply=reply)
    assert client.process.wait() == 0


# ---- results ----


def test_a_failure_after_the_reply_can_change_the_result(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """The client's ioctl returns what `failed` said in place of what was replied."""
    client = start()
    parked = device.parked.get()
    resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (len(client.descriptors()),) * 2)

    assert -errno.EMFILE == install(installer, parked, [duplicate(0)], failed=lambda _: -errno.EAGAIN)
    assert client.line() == f"{-errno.EAGAIN} 7"


def test_a_call_can_be_made_again(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """The client's ioctl comes once more, with what the first reply left in its argument."""
    client = start()
    first = device.parked.get()
    numbers = install(installer, first, [duplicate(0)], patch=lambda _: RESTART)
    second = device.parked.get()

    assert isinstance(numbers, list)
    assert (first.tid, first.command, (7).to_bytes(8, "little")) == (second.tid, second.command, second.argument)
    assert second.reply(8)
    assert client.line() == "0 8"


def test_a_signal_ends_a_call_that_would_be_made_again(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """Where a handler has run the client finds EINTR, as if the call had been waiting all the time."""
    client = start("handle")

    def patch(_numbers: list[int]) -> int:
        os.kill(client.pid, signal.SIGUSR1)
        return RESTART

    assert isinstance(install(installer, device.parked.get(), [duplicate(0)], patch=patch), list)
    assert [client.line(), client.line()] == ["signal 10 after 0", f"{-errno.EINTR} 7"]


# ---- death ----


def _reply_and_kill(client: Client, parked: Parked) -> bool:
    client.process.kill()
    return parked.reply(7)


def test_a_client_killed_while_it_waits_is_gone(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """The error is ESRCH, the parent learns of the signal, and the next transfer works."""
    client = start()
    parked = device.parked.get()
    outcome = install(installer, parked, [duplicate(0)], reply=lambda: _reply_and_kill(client, parked))

    assert -errno.ESRCH == outcome
    assert -signal.SIGKILL == client.process.wait()
    start()
    assert isinstance(install(installer, device.parked.get(), [duplicate(0)]), list)


def test_a_client_killed_after_it_stopped_is_gone(device: ParkingDevice, start: Callable[..., Client]) -> None:
    """Whatever is tried then says so."""
    client = start("thread")

    tracing = Tracing(device.parked.get())
    client.process.kill()

    assert -errno.ESRCH == tracing.install(0, 0)
    assert -errno.EPIPE == tracing.release()
    assert -signal.SIGKILL == client.process.wait()


def test_a_client_killed_before_it_goes_on_is_gone(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """A kill while the numbers are stored ends the client, and nothing else."""
    client = start()
    outcome = install(installer, device.parked.get(), [duplicate(0)], patch=lambda _: client.process.kill())

    assert isinstance(outcome, list)
    assert -signal.SIGKILL == client.process.wait()
    start("thread")
    assert isinstance(install(installer, device.parked.get(), [duplicate(0)]), list)


def _until_end(client: Client, _numbers: list[int]) -> None:
    assert client.line() == ""


@pytest.mark.parametrize("words", [(), ("thread",)])
def test_a_client_that_dies_in_the_midst_leaks_nothing(
    words: tuple[str, ...], device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """A client that ends itself on the arrival of its first file leaves the server as it was, and free for others."""
    duplicate(0).close()
    own, held = own_descriptors(), kept()
    for _ in range(20):
        client = start("end", "4", *words)
        files = [duplicate(0) for _ in range(300)]
        # Should the files be there before it ends, it still ends before it runs.
        outcome = install(installer, device.parked.get(), files, patch=partial(_until_end, client))

        assert -errno.ESRCH == outcome or isinstance(outcome, list)
        assert -signal.SIGKILL == client.process.wait()
        client.process.communicate()
    installer.close()
    _join("binderfs tracer")
    assert own == own_descriptors()
    until(lambda: kept() <= held)


# ---- tracers ----


def test_one_client_does_not_hold_up_another(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """While one transfer waits for its reply, another goes through."""
    start()
    start()
    first, second = device.parked.get(), device.parked.get()

    def reply() -> bool:
        assert isinstance(install(installer, second, [duplicate(0)]), list)
        return first.reply(7)

    assert isinstance(install(installer, first, [duplicate(0)], reply=reply), list)


def test_beyond_the_limit_transfers_wait_their_turn(device: ParkingDevice, start: Callable[..., Client]) -> None:
    """One tracer does three clients' transfers one after the other, though the first one's client dies."""
    installer = FileInstaller(tracers=1)
    clients = {client.pid: client for client in (start(), start(), start())}
    parked = [device.parked.get() for _ in clients]
    outcomes: SimpleQueue[list[int] | int] = SimpleQueue()
    queued = threading.Event()

    def reply_first() -> bool:
        queued.wait()
        return _reply_and_kill(clients[parked[0].tid], parked[0])

    for waiting in parked:
        installer.install(
            waiting.tid,
            [duplicate(0)],
            reply=reply_first if waiting is parked[0] else partial(waiting.reply, 7),
            patch=outcomes.put,
            failed=outcomes.put,
        )
    queued.set()

    assert -errno.ESRCH == outcomes.get()
    assert [list, list] == [type(outcomes.get()), type(outcomes.get())]
    installer.close()
    _join("binderfs tracer")
    with pytest.raises(RuntimeError, match="no tracer threads"):
        installer.install(parked[0].tid, [], reply=bool, patch=nothing, failed=nothing)


class Held:
    """A transfer whose tracer is held up until it is let go; it then says what came of it."""

    def __init__(self, installer: FileInstaller, parked: Parked, handle: int, user: int) -> None:
        """Begin it."""
        self.tid = parked.tid
        self.begun = threading.Event()
        self.let_go = threading.Event()
        self.outcome: SimpleQueue[list[int] | int] = SimpleQueue()

        def reply() -> bool:
            self.begun.set()
            self.let_go.wait()
            return parked.reply(7)

        def put(outcome: list[int] | int) -> None:
            self.outcome.put(outcome)

        installer.install(parked.tid, [duplicate(0)], reply=reply, patch=put, failed=put, handle=handle, user=user)


@pytest.mark.parametrize(
    ("first", "second", "behind", "other"),
    [((1, 7), (2, 8), (2, 8), (3, 9)), ((1, 7), (2, 7), (3, 7), (4, 8))],
    ids=["handle", "user"],
)
def test_who_holds_tracers_waits_behind_others(
    first: tuple[int, int],
    second: tuple[int, int],
    behind: tuple[int, int],
    other: tuple[int, int],
    device: ParkingDevice,
    start: Callable[..., Client],
) -> None:
    """One open has its limit of tracers, and one user half of all; the next transfer waits, and others' pass it."""
    installer = FileInstaller(tracers=4, per_handle=1, reserve=0)
    for _ in range(4):
        start()
    parked = [device.parked.get() for _ in range(4)]
    held = [Held(installer, parked[0], *first), Held(installer, parked[1], *second)]
    for one in held:
        one.begun.wait()
    waiting = Held(installer, parked[2], *behind)
    waiting.let_go.set()
    passing = Held(installer, parked[3], *other)
    passing.let_go.set()

    assert isinstance(passing.outcome.get(), list)
    assert not waiting.begun.is_set()
    for one in reversed(held):
        one.let_go.set()
        assert isinstance(one.outcome.get(), list)
    assert isinstance(waiting.outcome.get(), list)
    installer.close()
    _join("binderfs tracer")


def _hold(
    installer: FileInstaller, device: ParkingDevice, start: Callable[..., Client], users: list[int]
) -> list[Held]:
    """Begin a transfer to a new client of each of these users, over an open of its own."""
    for _ in users:
        start()
    parked = [device.parked.get() for _ in users]
    return [Held(installer, parked[index], index, user) for index, user in enumerate(users)]


def _let_go(installer: FileInstaller, held: list[Held]) -> None:
    """Let all transfers go through, and end the installer."""
    for one in held:
        one.let_go.set()
    for one in held:
        assert isinstance(one.outcome.get(timeout=PATIENCE), list)
    installer.close()
    _join("binderfs tracer")


def test_many_users_leave_a_tracer_to_the_next(device: ParkingDevice, start: Callable[..., Client]) -> None:
    """However many transfers some users hold up, the next user's goes through; and theirs do in the end."""
    installer = FileInstaller(tracers=6, per_handle=6, reserve=2)
    *held, passing = _hold(installer, device, start, [1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5])
    begun = [0, 1, 3, 6, 8]
    for index in begun:
        assert held[index].begun.wait(PATIENCE)
    passing.let_go.set()

    assert isinstance(passing.outcome.get(timeout=PATIENCE), list)
    assert begun == [index for index, one in enumerate(held) if one.begun.is_set()]
    _let_go(installer, held)


def test_one_end_can_let_two_transfers_go_on(device: ParkingDevice, start: Callable[..., Client]) -> None:
    """Where two users have as many as are free, and one of them has one less, both run another."""
    installer = FileInstaller(tracers=6, per_handle=6, reserve=0)
    held = _hold(installer, device, start, [1, 1, 2, 2, 2, 1])
    held[0].let_go.set()

    for one in held:
        assert one.begun.wait(PATIENCE)
    _let_go(installer, held)


def test_where_no_thread_can_be_started_a_transfer_waits(device: ParkingDevice, start: Callable[..., Client]) -> None:
    """Where the machine has no thread for a transfer that may run now, it runs when another has ended."""
    installer = FileInstaller(tracers=6, per_handle=6, reserve=0)
    held = _hold(installer, device, start, [1, 1, 2, 2, 2, 1])
    before = threading.stack_size(1 << 46)
    try:
        held[0].let_go.set()
        assert held[4].begun.wait(PATIENCE)
        assert 1 == sum(map(len, installer._tracers._waiting.values()))
        with pytest.raises(RuntimeError, match="start new thread"):
            installer.install(held[0].tid, [], reply=bool, patch=nothing, failed=nothing, user=3)
    finally:
        threading.stack_size(before)
    _let_go(installer, held)


def test_a_transfer_that_waits_can_be_withdrawn(device: ParkingDevice, start: Callable[..., Client]) -> None:
    """A client that is killed while others hold the tracers need not wait for them."""
    installer = FileInstaller(tracers=1)
    start()
    start()
    parked = [device.parked.get() for _ in range(2)]
    held, waiting = (Held(installer, one, 0, 0) for one in parked)
    held.begun.wait()

    assert installer.withdraw(parked[1].tid)
    assert -errno.ESRCH == waiting.outcome.get()
    assert not installer.withdraw(parked[1].tid)
    assert not installer.withdraw(parked[0].tid)
    held.let_go.set()
    assert isinstance(held.outcome.get(), list)
    installer.close()
    _join("binderfs tracer")
    parked[1].reply()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exception_in_a_callback_frees_the_client(
    device: ParkingDevice, start: Callable[..., Client], installer: FileInstaller
) -> None:
    """The client goes on, the files are closed, and the next transfer works."""
    client = start()
    parked = device.parked.get()
    read, write = os.pipe()

    def patch(_numbers: list[int]) -> None:
        raise LookupError

    installer.install(parked.tid, [moved(write)], reply=lambda: parked.reply(7), patch=patch, failed=nothing)

    assert client.line() == "0 7"
    again = device.parked.get()
    assert isinstance(install(installer, again, [], reply=lambda: _reply_and_kill(client, again)), int)
    assert os.read(read, 1) == b""
    os.close(read)
