"""Mounting and unmounting: whole commands, as a person types them."""

import contextlib
import errno
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.command import servers
from binderfs_fuse.command.options import TABLE
from binderfs_fuse.fuse import mounting
from tests.mounts import CHECKOUT, MOUNT, Mounted, is_there, mount_py, needs_mount

pytestmark = needs_mount


# Opens the device, enters the loop, waits for work, and says with which errno that ended.
LOOPER = """
import ctypes, fcntl, mmap, os, struct, sys
device = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(device, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
commands = ctypes.create_string_buffer(struct.pack("=I", 0x630C))
answer = ctypes.create_string_buffer(256)
argument = struct.pack("=6Q", 4, 0, ctypes.addressof(commands), 256, 0, ctypes.addressof(answer))
print("ready", flush=True)
try:
    # The first ioctl of a thread does not wait.
    for _ in range(2):
        fcntl.ioctl(device, int(sys.argv[2]), bytearray(argument))
except OSError as error:
    print(error.errno)
"""


def version(device: Path) -> int:
    """Ask a device for its protocol version."""
    with device.open("rb+", buffering=0) as file:
        argument = bytearray(uapi.binder_version.size)
        fcntl.ioctl(file, uapi.BINDER_VERSION, argument)
        (number,) = uapi.binder_version.unpack(argument)
        assert isinstance(number, int)
        return number


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    """An empty folder."""
    path = tmp_path / "mountpoint"
    path.mkdir()
    return path


@contextlib.contextmanager
def foreground(path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Mount with -f; give the process when it serves, and its standard error. It is killed where the test fails."""
    process = subprocess.Popen(
        [sys.executable, MOUNT, path, "-f", "-o", ",".join(("log_level=info", *arguments))],
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        try:
            assert "serving" in process.stderr.readline()

            yield process, process.stderr
        except BaseException:
            process.kill()
            subprocess.run(["umount", "--lazy", path], check=False)
            raise


def refused(*arguments: str | Path) -> str:
    """Run a command that fails; return the one line that it says."""
    done = mount_py(*arguments)

    assert ("", 1) == (done.stdout, done.returncode)
    assert 1 == done.stderr.count("\n")
    assert done.stderr.startswith("mount.py: ")

    return done.stderr.removeprefix("mount.py: ").removesuffix("\n")


def test_the_devices_answer_when_the_command_returns(mounted: Mounted) -> None:
    """All three are there and speak the protocol."""
    assert [8] * 3 == [version(mounted.path / name) for name in ("binder", "hwbinder", "vndbinder")]


def test_the_mount_table_names_source_and_type(mountpoint: Path) -> None:
    """SOURCE is a name for the table; the type is FUSE's."""
    assert 0 == mount_py("some name, with a comma", mountpoint).returncode
    try:
        mount = next(mount for mount in mounting.mounts() if mount.mountpoint == mountpoint)

        assert ("some name, with a comma", "fuse.binder") == (mount.source, mount.type)
    finally:
        mount_py("-u", mountpoint)


def test_the_server_stands_alone(mount_binderfs: Callable[..., Mounted]) -> None:
    """It has its own session, / as its folder, and nothing of the command's descriptors."""
    mounted = mount_binderfs()
    process = Path(f"/proc/{mounted.server}")

    assert mounted.server == os.getsid(mounted.server)
    assert Path("/") == (process / "cwd").readlink()
    assert {"/dev/null"} == {str((process / f"fd/{number}").readlink()) for number in range(3)}

    inherited = {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.exists()}
    theirs = {str(path.readlink()) for path in (process / "fd").iterdir()}

    assert set() == {name for name in inherited & theirs if name.startswith(("pipe:", "socket:"))}


def test_whoever_reads_the_commands_output_is_not_kept(mountpoint: Path) -> None:
    """A pipe ends with the command, though the server goes on."""
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, MOUNT, mountpoint], stdout=write, stderr=write) as process:
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
    try:
        assert (b"", 0) == (said, process.returncode)
        assert is_there(mountpoint)
    finally:
        mount_py("-u", mountpoint)


def test_unmounting_waits_for_the_server(mount_binderfs: Callable[..., Mounted]) -> None:
    """When -u returns, there is neither mount nor server."""
    mounted = mount_binderfs()
    server = os.pidfd_open(mounted.server)
    mounted.unmount()

    assert not is_there(mounted.path)
    assert [server] == select.select([server], [], [], 0)[0]

    os.close(server)


def test_umount_ends_the_server_too(mount_binderfs: Callable[..., Mounted]) -> None:
    """The server does not need to be told by mount.py."""
    mounted = mount_binderfs()
    server = os.pidfd_open(mounted.server)
    subprocess.run(["umount", mounted.path], check=True)
    select.select([server], [], [])
    os.close(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(mountpoint: Path, number: int) -> None:
    """In the foreground the server ends with status 0, and says nothing but what it does."""
    with foreground(mountpoint) as (process, said):
        assert 8 == version(mountpoint / "binder")

        process.send_signal(number)
        rest = said.read()

    assert 0 == process.returncode
    assert not is_there(mountpoint)
    assert [f"INFO: {signal.Signals(number).name}: unmounting"] == [
        line.partition("]: ")[2] for line in rest.splitlines()
    ]


# Opens a device a thousand times, says so, and waits.
HOLDER = """
import os, resource, sys
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
held = [os.open(sys.argv[1], os.O_RDWR) for _ in range(1000)]
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_signal_ends_a_server_that_has_much_to_do(mountpoint: Path) -> None:
    """A server whose threads are still at work, of a client that was killed, ends with status 0 and without a word."""
    with foreground(mountpoint) as (process, said):
        command = [sys.executable, "-c", HOLDER, str(mountpoint / "binder")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert b"ready\n" == holder.stdout.readline()
            holder.kill()
        process.terminate()
        rest = said.read()

    assert 0 == process.returncode
    assert ["INFO: SIGTERM: unmounting"] == [line.partition("]: ")[2] for line in rest.splitlines()]


def test_a_signal_unmounts_what_is_in_use(mountpoint: Path) -> None:
    """The mount goes at once; those who have a device open get an error."""
    with foreground(mountpoint) as (process, _):
        device = os.open(mountpoint / "binder", os.O_RDWR)
        process.terminate()
        process.wait()

        assert not is_there(mountpoint)

        with pytest.raises(OSError, match="connect"):
            fcntl.ioctl(device, uapi.BINDER_VERSION, bytes(4))
        with pytest.raises(OSError, match="connect"):
            os.close(device)


def test_the_foreground_ends_with_the_mount(mountpoint: Path) -> None:
    """Unmounted from elsewhere, it is done."""
    with foreground(mountpoint) as (process, _):
        assert 0 == mount_py("-u", mountpoint).returncode

    assert 0 == process.returncode


def test_a_mount_point_that_does_not_exist(tmp_path: Path) -> None:
    """It says how to make one."""
    path = tmp_path / "nothing"

    assert f"{path} does not exist: make it with `mkdir -p {path}`" == refused(path)


def test_a_mount_point_that_is_a_file(tmp_path: Path) -> None:
    """It says that it is no directory."""
    path = tmp_path / "file"
    path.touch()

    assert f"{path} is not a directory, and only on one can be mounted" == refused(path)


def test_a_mount_point_that_is_one_already(mount_binderfs: Callable[..., Mounted]) -> None:
    """It says how to unmount it, and leaves it alone."""
    mounted = mount_binderfs()
    path = mounted.path

    assert f"{path} is mounted already: unmount it first with `mount.py -u {path}`" == refused(path)
    assert 8 == version(path / "binder")


def test_a_mount_point_of_something_else() -> None:
    """It is not mounted over."""
    assert "/proc is a mount point already (proc): take a directory in it, or unmount it" == refused("/proc")


def test_relative_paths_and_links_are_where_they_lead(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mount is found by either name, from wherever."""
    link = mountpoint.parent / "link"
    link.symlink_to("mountpoint")
    monkeypatch.chdir(mountpoint.parent)

    assert 0 == mount_py("link").returncode
    assert is_there(mountpoint)
    assert 0 == mount_py("-u", link).returncode
    assert not is_there(mountpoint)


@pytest.mark.parametrize("name", [b"with blank\nand \\ line", b"\xff\xfe", "täst".encode(), b"\r\f\x1c\xe2\x80\xa8"])
def test_any_name_can_be_mounted_on(tmp_path: Path, name: bytes) -> None:
    """Whatever bytes it has."""
    path = tmp_path / os.fsdecode(name)
    path.mkdir()

    assert ("", 0) == ((done := mount_py(path)).stderr, done.returncode)
    assert 8 == version(path / "binder")
    assert ("", 0) == ((done := mount_py("-u", path)).stderr, done.returncode)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("foo", "Unknown parameter 'foo'"),
        ("max=many", "Bad value for 'max': it is a number up to 1048576"),
        ("limit_threads=0", "Bad value for 'limit_threads': it is at least 1"),
        ("limit_user_pages=1,limit_opens=+", "Bad value for 'limit_opens': it is a number up to 4294967295"),
        ("max=2", "max=2 leaves no room for 3 devices"),
        ("log=/nowhere/log", "cannot log to /nowhere/log: No such file or directory"),
    ],
)
def test_bad_options_leave_nothing_mounted(mountpoint: Path, options: str, said: str) -> None:
    """One line says what is wrong, before or after there was a mount."""
    assert said == refused(mountpoint, "-o", options)
    assert not is_there(mountpoint)


def test_without_the_device_of_fuse(mountpoint: Path) -> None:
    """It says what to do, on a machine and in a container."""
    script = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$@"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", sys.executable, str(MOUNT)]
    done = subprocess.run([*command, mountpoint], capture_output=True, text=True, check=False)

    assert (
        "mount.py: there is no /dev/fuse: load the kernel's module with `modprobe fuse`, "
        "or start the container with `--device /dev/fuse`\n"
    ) == done.stderr
    assert 1 == done.returncode


def test_without_the_right(mountpoint: Path) -> None:
    """Root that may not mount, as in a container, is told what it lacks."""
    command = ["capsh", "--drop=cap_sys_admin", "--", "-c", f"{sys.executable} {MOUNT} {mountpoint}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert f"mount.py: no right to mount at {mountpoint} (Operation not permitted)" in done.stderr
    assert 1 == done.stderr.count("\n")
    assert 1 == done.returncode


def test_a_dead_servers_mount_is_replaced(mount_binderfs: Callable[..., Mounted]) -> None:
    """What it leaves answers ENOTCONN, and the next mount.py clears it away."""
    mounted = mount_binderfs()
    pid = mounted.server
    server = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([server], [], [])
    os.close(server)

    with pytest.raises(OSError, match="Transport endpoint is not connected"):
        os.statvfs(mounted.path)
    done = mount_py(mounted.path, "-o", f"log={mounted.log}")

    assert ("", 0) == (done.stderr, done.returncode)
    assert 8 == version(mounted.path / "binder")
    assert pid != mounted.server


def test_a_dead_servers_mount_can_be_unmounted(mount_binderfs: Callable[..., Mounted]) -> None:
    """There is nobody to wait for."""
    mounted = mount_binderfs()
    os.kill(mounted.server, signal.SIGKILL)
    mounted.unmount()

    assert not is_there(mounted.path)


def test_a_client_of_a_server_that_dies_gets_an_error(mount_binderfs: Callable[..., Mounted]) -> None:
    """It neither hangs nor is killed: one that waits in a read has that aborted."""
    mounted = mount_binderfs()
    command = [sys.executable, "-c", LOOPER, str(mounted.path / "binder"), str(uapi.BINDER_WRITE_READ)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        try:
            client.stdout.readline()
            # Until it says that a looper waits.
            while ": l 12 " not in (mounted.path / "binder_logs/state").read_text():
                assert client.poll() is None
            os.kill(mounted.server, signal.SIGKILL)
            said = client.stdout.read()
        except BaseException:
            client.kill()
            raise

    mounted.unmount()

    assert errno.ECONNABORTED == int(said)


def test_a_part_can_be_unmounted(mount_binderfs: Callable[..., Mounted], tmp_path: Path) -> None:
    """What shows a single device, for those who look for it elsewhere, goes without the mount."""
    mounted = mount_binderfs()
    device = tmp_path / "device"
    device.touch()
    subprocess.run(["mount", "--bind", mounted.path / "binder", device], check=True)

    assert 8 == version(device)

    done = mount_py("-u", device)

    assert ("", 0) == (done.stderr, done.returncode)
    assert not is_there(device)
    assert 8 == version(mounted.path / "binder")


def test_a_mount_that_is_seen_twice(mount_binderfs: Callable[..., Mounted], tmp_path: Path) -> None:
    """-u says, without waiting for the server, where it still is."""
    mounted = mount_binderfs()
    bound = tmp_path / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", mounted.path, bound], check=True)
    try:
        assert (f"{mounted.path} is unmounted, but its server goes on: it is also mounted at {bound}") == refused(
            "-u", mounted.path
        )
    finally:
        done = mount_py("-u", bound)

    assert ("", 0) == (done.stderr, done.returncode)


def test_what_is_in_use_stays_mounted(mount_binderfs: Callable[..., Mounted]) -> None:
    """-u refuses, with what to do; -l takes it away, and the server goes with the last user."""
    mounted = mount_binderfs()
    path = mounted.path
    server = os.pidfd_open(mounted.server)
    with (path / "binder").open("rb+", buffering=0) as device:
        assert refused("-u", path).startswith(f"{path} is in use: ")
        assert 8 == version(path / "binder")

        done = mount_py("-u", "-l", path)

        assert ("", 0) == (done.stderr, done.returncode)
        assert not is_there(path)

        fcntl.ioctl(device, uapi.BINDER_VERSION, bytes(4))
    select.select([server], [], [])
    os.close(server)


def test_a_server_that_does_not_answer_is_not_waited_for(mount_binderfs: Callable[..., Mounted]) -> None:
    """Its mount is still there, and can be unmounted."""
    mounted = mount_binderfs()
    server = mounted.server
    os.kill(server, signal.SIGSTOP)
    try:
        assert refused(mounted.path).startswith(f"{mounted.path} is mounted already: ")

        mounted.unmount()
    finally:
        os.kill(server, signal.SIGCONT)


def test_the_source_may_be_empty(mountpoint: Path) -> None:
    """As with the kernel's; FUSE knows it as none."""
    assert ("", 0) == ((done := mount_py("", mountpoint)).stderr, done.returncode)
    try:
        assert "none" == next(mount.source for mount in mounting.mounts() if mount.mountpoint == mountpoint)
    finally:
        mount_py("-u", mountpoint)


def test_an_empty_name_is_no_mount_point() -> None:
    """It does not stand for the folder that one is in."""
    assert "the mount point's name is empty" == refused("")


def test_without_standard_descriptors(mountpoint: Path) -> None:
    """Nothing that is opened is taken for one, where the caller has closed them."""
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, str(MOUNT)]

    assert 0 == subprocess.run([*closed, mountpoint], check=False).returncode
    assert 8 == version(mountpoint / "binder")
    assert 0 == subprocess.run([*closed, "status", mountpoint, "--interval", "0"], check=False).returncode
    assert 0 == subprocess.run([*closed, "-u", mountpoint], check=False).returncode
    assert not is_there(mountpoint)
    assert 7 == subprocess.run([*closed, "run", "sh", "-c", "exit 7"], check=False).returncode


def test_a_loop_of_links(tmp_path: Path) -> None:
    """It is no mount point."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")

    assert f"{tmp_path}/a leads nowhere: it is a loop of symbolic links" == refused(tmp_path / "a")


def test_where_it_has_not_been_set_up(tmp_path: Path) -> None:
    """It says what to do."""
    copy = tmp_path / "mount.py"
    copy.write_bytes(MOUNT.read_bytes())
    done = subprocess.run([sys.executable, "-S", copy, tmp_path], capture_output=True, text=True, check=False)

    assert f"mount.py: not set up: run `make -C {tmp_path} setup`\n" == done.stderr
    assert 1 == done.returncode


@pytest.mark.parametrize("program", ["keeper", "injector"])
@pytest.mark.parametrize("trouble", ["missing", "not executable", "no program"])
def test_a_program_beside_the_server_that_cannot_be_started(
    mountpoint: Path, tmp_path: Path, program: str, trouble: str
) -> None:
    """One line names its file and the reason, and nothing is mounted."""
    installed = tmp_path / "installed"
    shutil.copytree(CHECKOUT / "binderfs_fuse", installed / "binderfs_fuse")
    shutil.copy(MOUNT, installed)
    file = installed / "binderfs_fuse/host" / program
    if trouble == "missing":
        file.unlink()
        reason = errno.ENOENT
    elif trouble == "not executable":
        file.chmod(0o644)
        reason = errno.EACCES
    else:
        file.write_bytes(b"nothing that can be executed")
        reason = errno.ENOEXEC
    done = subprocess.run(
        [sys.executable, installed / "mount.py", mountpoint], capture_output=True, text=True, check=False
    )

    assert f"mount.py: cannot start {file}: {os.strerror(reason)}\n" == done.stderr
    assert 1 == done.returncode
    assert not is_there(mountpoint)


def test_limits_are_options(mount_binderfs: Callable[..., Mounted]) -> None:
    """What goes beyond one is refused."""
    mounted = mount_binderfs("limit_user_opens=2")
    device = mounted.path / "binder"
    with (
        device.open("rb+", buffering=0),
        device.open("rb+", buffering=0),
        pytest.raises(OSError, match="Too many open files"),
    ):
        device.open("rb+", buffering=0)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("folder",), "folder"),
        ((".",), "."),
        (("-u", "folder"), "folder"),
        (("status", "folder"), "folder"),
        (("graph", "folder"), "folder"),
        (("-o", "log=file", "/nowhere"), "file"),
    ],
)
def test_where_the_working_directory_is_gone(tmp_path: Path, arguments: tuple[str, ...], name: str) -> None:
    """Nothing leads anywhere from there, and one line says so."""
    folder = tmp_path / "folder"
    folder.mkdir()
    command = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", sys.executable, str(MOUNT), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    assert f"mount.py: {name} is nowhere: the folder that this is run in has been deleted\n" == done.stderr
    assert 1 == done.returncode


@pytest.mark.parametrize(
    ("name", "shown", "quoted"),
    [
        ("a b", "a b", "'{}/a b'"),
        ("it's", "it's", "'{}/it'\"'\"'s'"),
        ("\udcff\n'", r"\xff\n'", r"$'{}/\xff\n\''"),
    ],
)
def test_commands_to_type_are_quoted(tmp_path: Path, name: str, shown: str, quoted: str) -> None:
    """What one is told to do can be pasted into a shell, and does what it says."""
    path = tmp_path / name
    said = refused(path)
    command = f"mkdir -p {quoted.format(tmp_path)}"

    assert f"{tmp_path}/{shown} does not exist: make it with `{command}`" == said

    subprocess.run(["bash", "-c", command], check=True)

    assert path.is_dir()


def test_a_python_that_cannot_be_reached(tmp_path: Path) -> None:
    """It is another user's, and the one who set it up has to choose another one."""
    checkout = tmp_path / "checkout"
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / "mount.py").write_bytes(MOUNT.read_bytes())
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (checkout / ".venv/bin/python").symlink_to(tmp_path / "python")
    done = subprocess.run(
        [sys.executable, "-S", checkout / "mount.py", tmp_path], capture_output=True, text=True, check=False
    )
    reason = f"{tmp_path}/python cannot be executed by this user (Permission denied)"

    assert done.stderr.startswith(f"mount.py: {reason}: it has to be set up with one that all can reach (`make clean ")
    assert 1 == done.stderr.count("\n")
    assert 1 == done.returncode


def test_what_is_not_mounted_cannot_be_unmounted(mountpoint: Path) -> None:
    """Nor what is of another type."""
    assert f"nothing is mounted at {mountpoint}: `mount.py status` lists what is" == refused("-u", mountpoint)
    assert "what is mounted at /proc is of type proc, not one of this program's" == refused("-u", "/proc")


def test_mounts_are_separate(mount_binderfs: Callable[..., Mounted]) -> None:
    """Devices, opens and logs of one mount are not seen in another."""
    one, other = mount_binderfs(), mount_binderfs()
    with (one.path / "binder-control").open("rb", buffering=0) as control:
        fcntl.ioctl(control, uapi.BINDER_CTL_ADD, bytearray(uapi.binderfs_device.pack(b"mine", 0, 0)))
    with (one.path / "mine").open("rb+", buffering=0):
        assert f"proc {os.getpid()}\ncontext mine\n" in (one.path / "binder_logs/state").read_text()
        assert "binder state:\n" == (other.path / "binder_logs/state").read_text()
    assert not (other.path / "mine").exists()
    assert one.server != other.server


def test_a_remount_sets_max_and_nothing_else(mount_binderfs: Callable[..., Mounted]) -> None:
    """What is not said stays; what cannot change is refused."""
    mounted = mount_binderfs("max=3")
    path = mounted.path

    assert 3 == servers.information(path)["max"]
    assert 0 == mount_py(path, "-o", "remount,max=4").returncode
    assert 4 == servers.information(path)["max"]
    assert "Binderfs stats mode cannot be changed during a remount" == refused(path, "-o", "remount,stats=unset,max=9")
    assert 0 == mount_py(path, "-o", "remount,stats=global").returncode
    assert 4 == servers.information(path)["max"]


def test_a_remount_makes_read_only_and_back(mount_binderfs: Callable[..., Mounted]) -> None:
    """Names and attributes stay then, and devices are used and made as ever."""
    path = mount_binderfs().path
    device, other = path / "binder", path / "other"
    changes: list[Callable[[], object]] = [device.unlink, lambda: device.rename(other), lambda: device.chmod(0o666)]

    assert ("", 0) == ((done := mount_py(path, "-o", "remount,ro")).stderr, done.returncode)

    for change in changes:
        with pytest.raises(OSError, match="Read-only file system"):
            change()
    with (path / "binder-control").open("rb", buffering=0) as control:
        fcntl.ioctl(control, uapi.BINDER_CTL_ADD, bytearray(uapi.binderfs_device.pack(b"mine", 0, 0)))

    assert 8 == version(device)
    assert 0 == mount_py(path, "-o", "remount,max=9").returncode
    with pytest.raises(OSError, match="Read-only file system"):
        device.unlink()
    assert 0 == mount_py(path, "-o", "remount,rw").returncode

    with device.open("rb+", buffering=0):
        device.unlink()

        assert f"{path} cannot become read-only: a device that was removed is still open" == refused(
            path, "-o", "remount,ro"
        )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("mode=0666", "mode"),
        ("max=9,log=/elsewhere,uid=7,ro", "uid, log"),
        ("noallow_other,limit_opens=3", "allow_other, limit_opens"),
        ("noseccomp", "seccomp"),
    ],
)
def test_a_remount_refuses_what_it_cannot_change(
    mount_binderfs: Callable[..., Mounted], options: str, names: str
) -> None:
    """Nothing is changed then; what is as it is may be said again, as fstab does."""
    mounted = mount_binderfs("mode=0640,limit_opens=4")
    path = mounted.path
    said = f"a remount changes max, ro and rw, but not {names}: mount it anew for that"

    assert said == refused(path, "-o", f"remount,{options}")
    assert (1048576, False) == tuple(servers.information(path)[key] for key in ("max", "read_only"))

    same = f"mode=0640,limit_opens=4,gid=0,allow_other,log={mounted.log}"

    assert 0 == mount_py(path, "-o", f"remount,max=5,{same}").returncode
    assert 5 == servers.information(path)["max"]


def test_attributes_of_devices_are_options(mount_binderfs: Callable[..., Mounted]) -> None:
    """mode, uid and gid are those of every device, also of one that is added."""
    mounted = mount_binderfs("mode=0666,uid=1000,gid=1001")
    with (mounted.path / "binder-control").open("rb", buffering=0) as control:
        fcntl.ioctl(control, uapi.BINDER_CTL_ADD, bytearray(uapi.binderfs_device.pack(b"mine", 0, 0)))
    for name in ("binder", "mine"):
        status = (mounted.path / name).stat()

        assert (0o100666, 1000, 1001) == (status.st_mode, status.st_uid, status.st_gid)
    assert 0 == (mounted.path / "binder-control").stat().st_uid


def test_other_users_are_let_in_for_root(mount_binderfs: Callable[..., Mounted]) -> None:
    """The modes decide then, unless the option says otherwise."""
    open_to_all, closed = mount_binderfs("mode=0666"), mount_binderfs("mode=0666,noallow_other")
    for mounted, error in ((open_to_all, ""), (closed, "Permission denied")):
        # In the mount from the start, since the way there may be closed.
        done = subprocess.run(
            ["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups", "cat", "features/extended_error"],
            cwd=mounted.path,
            capture_output=True,
            text=True,
            check=False,
        )

        assert error in done.stderr
        assert ("" if error else "1\n") == done.stdout


def test_the_server_logs_to_where_it_is_told(mountpoint: Path, tmp_path: Path) -> None:
    """A file gets a line for each event from the level on."""
    log = tmp_path / "log"

    assert 0 == mount_py(mountpoint, "-o", f"log={log},log_level=info").returncode
    assert 0 == mount_py("-u", mountpoint).returncode
    assert f"INFO: serving {mountpoint}\n" in log.read_text()


def test_a_name_makes_no_line_in_the_log(tmp_path: Path) -> None:
    """What is no sign in a mount point's name is escaped, since somebody else may have chosen it."""
    path = tmp_path / "a\nroot: a message\x1b[2J"
    path.mkdir()
    log = tmp_path / "log"

    assert 0 == mount_py(path, "-o", f"log={log},log_level=info").returncode
    assert 0 == mount_py("-u", path).returncode
    assert 1 == log.read_text().count("\n")
    assert r"/a\nroot: a message\x1b[2J" in log.read_text()


def test_help_names_every_option() -> None:
    """What is not in the table of options is not offered, and what is there is."""
    text = mount_py("--help").stdout

    assert [] == [name for name in TABLE if f"{name}=" not in text]


def test_a_wrong_command_line_says_how_to_use_it() -> None:
    """With status 2, as other commands have it."""
    for arguments in ((), ("a", "b", "c"), ("-u", "a", "b"), ("-l", "a"), ("--no-such-option", "a")):
        done = mount_py(*arguments)

        assert 2 == done.returncode
        assert done.stderr.startswith("usage: mount.py ")
