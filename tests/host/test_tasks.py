import errno
import fcntl
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from binderfs_fuse.host import tasks

PAGE = mmap.PAGESIZE
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="this takes root")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python programs, which are ended with the test; each says a line when it is ready."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, *command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_process_is_identified() -> None:
    """A task of this process has its pid, user and nice value, and lives in the namespace that needs no number."""
    assert tasks.identify(os.getpid()) == tasks.Identity(os.getpid(), os.geteuid(), os.nice(0))


@needs_root
def test_a_process_in_a_user_namespace_is_identified(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A task of another user namespace has the users that are known there, by their numbers there and here."""
    process = start("print(flush=True); input()", "unshare", "--user", "--map-root-user")
    _line(process)

    assert [(0, 0, 1)] == tasks.identify(process.pid).user_ids
    assert tasks.identify(os.getpid()).user_ids is None


def test_a_caller_is_a_process_and_a_user() -> None:
    """A thread calls for its process and its effective user."""
    found = []
    thread = threading.Thread(target=lambda: found.append(tasks.caller(threading.get_native_id())))
    thread.start()
    thread.join()

    assert [(os.getpid(), os.geteuid())] == found


def test_a_thread_belongs_to_its_process() -> None:
    """The identity of a thread has the pid of its process."""
    found = []
    thread = threading.Thread(target=lambda: found.append(tasks.identify(threading.get_native_id())))
    thread.start()
    thread.join()

    assert [os.getpid()] == [identity.pid for identity in found]


def test_a_name_cannot_pass_for_a_field(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A task may have a carriage return in its name, and what follows may look like a line of /proc/TID/status."""
    forged = b"\rCapEff:\t200000"
    program = f"import ctypes; ctypes.CDLL(None).prctl(15, {forged!r}, 0, 0, 0); print(); input()"
    process = start(program)
    _line(process)
    fields = tasks.status(process.pid)

    assert forged == fields[b"Name"]
    assert fields[b"CapEff"] == tasks.status(os.getpid())[b"CapEff"]


@needs_root
def test_the_effective_user_counts(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A process that has changed its effective user is that user."""
    process = start("import os; os.seteuid(1234); print(); input()")
    _line(process)

    assert tasks.identify(process.pid).euid == 1234


@needs_root
def test_nested_pid_namespaces_are_told_apart(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A process in pid namespaces of its own has a pid in each, by the namespace's inode number."""
    program = "import os; print(os.getpid(), os.stat('/proc/self/ns/pid').st_ino, flush=True); input()"
    unshare = ("unshare", "--pid", "--fork", "--kill-child")
    process = start(program, *unshare, *unshare)
    pid, namespace = map(int, _line(process).split())
    descendants = [process.pid]
    for parent in descendants:
        descendants += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())

    identity = tasks.identify(descendants[-1])
    assert pid == 1
    assert (descendants[-1], namespace) == (identity.pid, identity.pid_namespace)
    assert {0: descendants[-1], namespace: 1} == {
        key: identity.pids[key] for key in identity.pids if key in (0, namespace)
    }
    (between,) = set(identity.pids) - {0, namespace}
    # The inner unshare is number 1 of its namespace, so what it started is number 2.
    assert identity.pids[between] == 2


def test_nobody_is_no_task() -> None:
    """A number that is no task's is an error."""
    with pytest.raises(FileNotFoundError):
        tasks.identify(0x7FFFFFFF)
    assert tasks.find_mapping(tasks.maps(0x7FFFFFFF), 1, None) is None
    assert tasks.is_nonblocking(0x7FFFFFFF, 1) is None
    assert tasks.is_being_killed(0x7FFFFFFF)


def test_a_label_is_bytes_or_an_error() -> None:
    """A task has a label without a NUL, or there is a negative errno where no security module gives one."""
    label = tasks.label(os.getpid())

    assert (isinstance(label, bytes) and label and b"\0" not in label) or (isinstance(label, int) and label < 0)
    assert isinstance(tasks.label(0x7FFFFFFF), int)


def test_nice_values_are_set(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A thread has the nice value that it is given."""
    process = start("print(flush=True); input()")
    _line(process)

    assert tasks.set_nice(process.pid, 7) == 7
    assert tasks.nice(process.pid) == 7
    assert tasks.scheduling(process.pid) == (os.SCHED_OTHER, 127)


LIMITED = """
import os, resource, sys
try:
    resource.setrlimit(resource.RLIMIT_NICE, ({nice}, {nice}))
    resource.setrlimit(resource.RLIMIT_RTPRIO, ({rtprio}, {rtprio}))
except ValueError:
    print("no", flush=True)
os.setresuid(65534, 65534, 65534)
print(flush=True)
input()
"""


def limited(start: Callable[..., subprocess.Popen[str]], **limits: int) -> int:
    """Start a process with these limits and without rights; its pid."""
    process = start(LIMITED.format(**limits))
    if _line(process):
        pytest.skip("to raise limits takes CAP_SYS_RESOURCE")
    return process.pid


@needs_root
@pytest.mark.parametrize(
    ("limit", "wanted", "found"), [(0, -10, 0), (0, 15, 0), (25, -10, -5), (25, 3, 3), (1, 0, 19), (40, -20, -20)]
)
def test_nice_values_are_as_good_as_a_threads_own_rights(
    start: Callable[..., subprocess.Popen[str]], limit: int, wanted: int, found: int
) -> None:
    """Who lacks CAP_SYS_NICE gets nothing better than RLIMIT_NICE allows, and nothing at all where that is 0."""
    pid = limited(start, nice=limit, rtprio=0)

    assert found == tasks.set_nice(pid, wanted)
    assert found == tasks.nice(pid)


@needs_root
@pytest.mark.parametrize(
    ("nice", "rtprio", "verify", "found"),
    [
        (0, 0, True, (os.SCHED_OTHER, 120)),
        (25, 0, True, (os.SCHED_OTHER, 115)),
        (0, 7, True, (os.SCHED_FIFO, 99 - 7)),
        (0, 90, True, (os.SCHED_FIFO, 99 - 50)),
        (0, 0, False, (os.SCHED_FIFO, 99 - 50)),
    ],
)
def test_policies_are_as_good_as_a_threads_own_rights(
    start: Callable[..., subprocess.Popen[str]], nice: int, rtprio: int, verify: bool, found: tuple[int, int]
) -> None:
    """Who lacks CAP_SYS_NICE is real-time as far as RLIMIT_RTPRIO goes, but for what it gets back."""
    pid = limited(start, nice=nice, rtprio=rtprio)

    assert found == tasks.set_scheduling(pid, (os.SCHED_FIFO, 99 - 50), verify=verify)
    assert found == tasks.scheduling(pid)


@needs_root
def test_rights_in_a_user_namespace_do_not_count(start: Callable[..., subprocess.Popen[str]]) -> None:
    """Root of a user namespace has CAP_SYS_NICE there, and no better nice values for that."""
    process = start("print(flush=True); input()", "unshare", "--user", "--map-root-user")
    _line(process)

    assert 0 == tasks.set_nice(process.pid, -5)


@needs_root
def test_policies_are_set(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A thread has the policy and priority that it is given, on the kernel's scale."""
    process = start("print(flush=True); input()")
    _line(process)

    assert tasks.set_scheduling(process.pid, (os.SCHED_RR, 99 - 3), verify=True) == (os.SCHED_RR, 96)
    assert os.sched_getparam(process.pid).sched_priority == 3
    assert tasks.scheduling(process.pid) == (os.SCHED_RR, 96)
    assert tasks.set_scheduling(process.pid, (os.SCHED_OTHER, 125), verify=False) == (os.SCHED_OTHER, 125)
    assert tasks.nice(process.pid) == 5


def test_what_cannot_be_set_is_told(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A policy that does not exist leaves the thread as it is, and what that is is returned."""
    process = start("print(flush=True); input()")
    _line(process)
    before = tasks.scheduling(process.pid)

    assert before == tasks.set_scheduling(process.pid, (17, 120), verify=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of four pages."""
    path = tmp_path / "a file"
    path.write_bytes(bytes(4 * PAGE))
    return path


def test_a_mapping_is_found(file: Path) -> None:
    """A file that a process has mapped is found by inode and device."""
    status = file.stat()
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 3 * PAGE) as mapped:
        found = tasks.find_mapping(tasks.maps(os.getpid()), status.st_ino, status.st_dev)
        mapped[:4] = b"here"

        assert found is not None
        address, size = found
        assert size == 3 * PAGE
        with open("/proc/self/mem", "rb", buffering=0) as memory:  # noqa: PTH123
            memory.seek(address)
            assert memory.read(4) == b"here"


def test_a_mapping_is_from_the_start(file: Path) -> None:
    """A mapping of a later part of the file is none: what is stored at the start would not be in it."""
    status = file.stat()
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), PAGE, offset=PAGE):
        assert tasks.find_mapping(tasks.maps(os.getpid()), status.st_ino, status.st_dev) is None


def test_a_mapping_is_found_without_the_main_thread(file: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """A process whose main thread has ended has mapped what its other threads see."""
    program = f"""
import ctypes, mmap, os, threading
opened = open({str(file)!r}, "r+b")
mapped = mmap.mmap(opened.fileno(), {PAGE})
main = threading.main_thread().native_id
def go_on():
    while open(f"/proc/self/task/{{main}}/stat").read().rpartition(")")[2].split()[0] != "Z":
        pass
    print(flush=True)
    input()
threading.Thread(target=go_on).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    process = start(program)
    _line(process)
    status = file.stat()
    found = tasks.find_mapping(tasks.maps(process.pid), status.st_ino, status.st_dev)

    assert found is not None
    assert PAGE == found[1]


def test_other_mappings_may_have_any_name(file: Path) -> None:
    """A name with a carriage return is no line of its own, whatever follows."""
    inode = file.stat().st_ino
    misleading = file.with_name(f"a\rb {inode} c")
    misleading.write_bytes(bytes(PAGE))
    with misleading.open("r+b") as opened, mmap.mmap(opened.fileno(), PAGE):
        assert tasks.find_mapping(tasks.maps(os.getpid()), inode, file.stat().st_dev) is None


def test_a_mapping_in_pieces_is_one(file: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """A mapping whose protection was changed in the middle is found whole; one with a hole up to the hole."""
    program = f"""
import ctypes, mmap
opened = open({str(file)!r}, "r+b")
mapped = mmap.mmap(opened.fileno(), 4 * {PAGE})
start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
libc = ctypes.CDLL(None)
libc.mprotect(ctypes.c_void_p(start + {PAGE}), {PAGE}, mmap.PROT_READ)
print(start, flush=True)
input()
libc.munmap(ctypes.c_void_p(start + 2 * {PAGE}), {PAGE})
print(flush=True)
input()
"""
    process = start(program)
    address = int(_line(process))
    status = file.stat()

    assert (address, 4 * PAGE) == tasks.find_mapping(tasks.maps(process.pid), status.st_ino, status.st_dev)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    _line(process)
    assert (address, 2 * PAGE) == tasks.find_mapping(tasks.maps(process.pid), status.st_ino, status.st_dev)


def test_a_mapping_cannot_be_made_up(file: Path) -> None:
    """The name of a mapped file, which its owner chooses, says nothing of another file, whatever is in it."""
    status = file.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    for line in (f"1000-3000 r--p 00000000 {device} {status.st_ino} a", f"an {status.st_ino} b"):
        forger = file.with_name(f"a\r{line}\rb")
        forger.write_bytes(bytes(PAGE))
        with forger.open("r+b") as opened, mmap.mmap(opened.fileno(), PAGE):
            found = tasks.find_mapping(tasks.maps(os.getpid()), status.st_ino, status.st_dev)

        assert found is None


def test_what_is_not_mapped_is_not_found(file: Path) -> None:
    """Neither a file that is not mapped is found, nor one of the same number on another device."""
    status = file.stat()
    assert tasks.find_mapping(tasks.maps(os.getpid()), status.st_ino, status.st_dev) is None

    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), PAGE):
        assert tasks.find_mapping(tasks.maps(os.getpid()), status.st_ino, os.makedev(0, 1)) is None
        assert tasks.find_mapping(tasks.maps(os.getpid()), status.st_ino + (1 << 40), status.st_dev) is None


@pytest.mark.parametrize("nonblocking", [True, False])
def test_the_flags_of_a_descriptor_that_is_waited_on(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], nonblocking: bool
) -> None:
    """The descriptor that a blocked task's system call is about has O_NONBLOCK or not."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # flock(2) waits though its descriptor does not.
    program = f"""
import fcntl, os
descriptor = os.open({str(fifo)!r}, os.O_RDWR | {os.O_NONBLOCK if nonblocking else 0})
print(flush=True)
fcntl.flock(descriptor, fcntl.LOCK_EX)
"""
    held = os.open(fifo, os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    process = start(program)
    _line(process)
    inode = fifo.stat().st_ino
    found = None
    while found is None:
        found = tasks.is_nonblocking(process.pid, inode)
        assert process.poll() is None
    os.close(held)

    assert nonblocking == found
    assert tasks.is_nonblocking(process.pid, inode + 1) is None


@pytest.mark.parametrize("above", [False, True])
def test_room_for_descriptors_is_up_to_the_limit(start: Callable[..., subprocess.Popen[str]], *, above: bool) -> None:
    """As many as are free below a process's limit; those that it has above, from before the limit, do not matter."""
    program = f"""
import os, resource
if {above}:
    os.dup2(0, 300)
resource.setrlimit(resource.RLIMIT_NOFILE, (10, 20))
while (last := os.dup(0)) < 6:
    pass
print(last, flush=True)
input()
"""
    process = start(program)

    assert "6" == _line(process)
    assert tasks.has_room(process.pid, 3)
    assert not tasks.has_room(process.pid, 4)


def test_a_small_table_has_room(start: Callable[..., subprocess.Popen[str]]) -> None:
    """Up to the limit, and not only up to the table's present size."""
    process = start("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000)); print(); input()")
    _line(process)

    assert tasks.has_room(process.pid, 700)
    assert not tasks.has_room(process.pid, 1000)


def test_who_is_gone_has_room() -> None:
    """What cannot be seen is not in the way: what comes of it is seen when it is tried."""
    assert tasks.has_room(0x7FFFFFFF, 1)


def test_who_lives_is_not_being_killed(start: Callable[..., subprocess.Popen[str]]) -> None:
    """A process with other signals pending, or none, is not being killed; one that is gone is."""
    process = start("print(flush=True); input()")
    _line(process)
    assert not tasks.is_being_killed(process.pid)

    process.kill()
    process.wait()
    assert tasks.is_being_killed(process.pid)


def test_set_nice_without_the_right_to(start: Callable[..., subprocess.Popen[str]]) -> None:
    """Where a nice value cannot be set, the one that the thread has is returned."""
    program = """
import os
from binderfs_fuse.host import tasks
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
print(tasks.set_nice(os.getpid(), -3), flush=True)
print(-tasks.label(0x7fffffff), flush=True)
"""
    if os.geteuid():
        pytest.skip("this takes root")
    process = start(program)

    assert _line(process) == "0"
    assert str(errno.ENOENT) == _line(process)
