"""``mount.py run``: a command in a mount namespace of its own, with binder in it."""

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from binderfs_fuse.command import attendant
from tests.conformance.building import find_oracle
from tests.mounts import MOUNT, needs_mount

HERE = Path(__file__).parent
TRANSCRIPT = HERE / "guest.txt"

# The kernel's FUSE refuses NULL before anybody can say that it is invalid.
DIFFERENCES = {
    f"ioctl(fd, {command}, NULL) -> -1 EINVAL": f"ioctl(fd, {command}, NULL) -> -1 EFAULT"
    for command in ("BINDER_VERSION", "BINDER_SET_MAX_THREADS")
}

pytestmark = needs_mount


def run(*command: str | Path, options: str = "", **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a namespace with binder in it."""
    return subprocess.run(
        [sys.executable, MOUNT, "run", "-o", options, "--", *command],
        **({"stdin": subprocess.DEVNULL} | keywords),
        capture_output=True,
        text=True,
        check=False,
    )


@contextlib.contextmanager
def running(script: str, **keywords: Any) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """Run a shell script; give the process, and what goes in and comes out. It is killed where the test fails."""
    process = subprocess.Popen(
        [sys.executable, MOUNT, "run", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        **keywords,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process, process.stdin, process.stdout
        except BaseException:
            process.kill()
            raise


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which temporary files are the test's, to see what is left of them."""
    return os.environ | {"TMPDIR": str(tmp_path)}


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that does what only binder in the kernel allows, or the supervisor (guest.c)."""
    program = tmp_path_factory.mktemp("guest") / "guest"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-static"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", program, HERE / "guest.c"], check=True)
    return program


def test_calls_that_fuse_cannot_serve_are_served(guest: Path) -> None:
    """NULL arguments and mounts of one's own, in namespaces of one's own too, are answered as by the real driver."""
    done = run(guest)

    assert [DIFFERENCES.get(line, line) for line in TRANSCRIPT.read_text().splitlines()] == done.stdout.splitlines()
    assert ("", 0) == (done.stderr, done.returncode)


def test_the_transcript_is_the_drivers(guest: Path) -> None:
    """The real driver says now what was recorded."""
    oracle = find_oracle()
    if oracle is None:
        pytest.skip("no run-oracle ($BINDER_ORACLE), or no qemu-system-x86_64: the transcript is taken on trust")

    assert (
        TRANSCRIPT.read_text() == subprocess.run([oracle, guest], stdout=subprocess.PIPE, text=True, check=True).stdout
    )


def test_the_command_has_devices_where_android_has_them() -> None:
    """/dev/binder and its like lead into /dev/binderfs; the rest of /dev is as it was."""
    names = "binder hwbinder vndbinder"
    done = run(
        "sh", "-c", f"for n in {names}; do readlink /dev/$n; done; ls /dev/binderfs; echo x > /dev/null; ls /dev"
    )

    assert "" == done.stderr

    lines = done.stdout.splitlines()

    assert [f"binderfs/{name}" for name in names.split()] == lines[:3]
    assert ["binder", "binder-control", "binder_logs", "features", "hwbinder", "vndbinder"] == lines[3:9]
    assert {*_names("/dev"), *names.split(), "binderfs"} == set(lines[9:])


def test_options_are_the_mounts() -> None:
    """What -o says goes for /dev/binderfs."""
    done = run("ls", "/dev/binderfs", "/dev/mine", options="devices=mine,stats=unset")

    assert ["/dev/mine", "", "/dev/binderfs:", "binder-control", "features", "mine"] == done.stdout.splitlines()


def test_nothing_is_seen_outside_and_nothing_is_left(tmp_path: Path, environment: dict[str, str]) -> None:
    """The machine's /dev and mount table stay as they are, meanwhile and afterwards."""
    before = _names("/dev"), _own_mounts()
    with running("readlink /proc/self/ns/mnt; read line", env=environment) as (_, given, said):
        namespace = said.readline().strip()

        assert before == (_names("/dev"), _own_mounts())

        given.write("go\n")

    assert [] == _members(namespace)
    assert [] == list(tmp_path.iterdir())


def _names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def _own_mounts() -> set[str]:
    """Return where there are mounts that this test may have made."""
    return {
        line.split(" ")[4]
        for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")
        if "/dev" in line
    }


def _members(namespace: str) -> list[int]:
    """Return the ids of the processes in a mount namespace."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if namespace == str((process / "ns/mnt").readlink()):
                found.append(int(process.name))
    return found


@pytest.mark.parametrize("status", [0, 1, 77, 255])
def test_the_exit_status_is_the_commands(status: int) -> None:
    """Whatever it is."""
    assert status == run("sh", "-c", f"exit {status}").returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGINT])
def test_it_ends_by_the_signal_that_the_command_ended_by(number: int) -> None:
    """So that a shell sees the one as the other."""
    assert -number == run("sh", "-c", f"ulimit -c 0; kill -{number} $$").returncode


@pytest.mark.parametrize(
    ("command", "shown", "status"),
    [
        ("no-such-command", "no-such-command", 127),
        ("/etc/passwd", "/etc/passwd", 126),
        ("", "''", 127),
        ("a\nb", r"'a\nb'", 127),
    ],
)
def test_what_cannot_be_executed_is_said(command: str, shown: str, status: int) -> None:
    """In one line, with the status that shells have for it."""
    done = run(command)

    assert status == done.returncode
    assert done.stderr.startswith(f"mount.py run: {shown}: ")
    assert 1 == done.stderr.count("\n")


@pytest.mark.parametrize(
    "number",
    [*sorted(set(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}), signal.SIGRTMIN, signal.SIGRTMAX],
)
def test_signals_are_passed_on(number: int) -> None:
    """A signal to mount.py, whatever it is, reaches the command, which may go on after it."""
    script = f"trap 'echo got it' {int(number)}; echo ready; read line; read line; exit 5"
    with running(script) as (process, given, said):
        assert "ready\n" == said.readline()

        process.send_signal(number)

        assert "got it\n" == said.readline()

        given.write("go\n" * 2)

    assert 5 == process.returncode


def test_it_stops_and_goes_on_with_the_command() -> None:
    """As a shell's job that is put aside and taken up again; the shell, or what it is, knows of mount.py alone."""
    script = "trap 'echo on' CONT; echo $$; while :; do read line && echo $line; done"
    # A process group of its own, as of a job: nothing stops in one that no shell has in its care.
    with running(script, process_group=0) as (process, given, said):
        command = int(said.readline())
        process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)

        assert os.WIFSTOPPED(status)
        assert signal.SIGTSTP == os.WSTOPSIG(status)
        assert b"T" == Path(f"/proc/{command}/stat").read_bytes().rpartition(b")")[2].split()[0]

        process.send_signal(signal.SIGCONT)

        assert "on\n" == said.readline()

        given.write("still here\n")

        assert "still here\n" == said.readline()

        os.kill(command, signal.SIGKILL)

    assert -signal.SIGKILL == process.returncode


@pytest.mark.parametrize("victim", ["run", "warden"])
def test_killing_it_leaves_nothing(victim: str) -> None:
    """All goes with a mount.py that is killed, and the namespace with it: server, command, and what this has left."""
    script = "readlink /proc/self/ns/mnt; sh -c 'setsid sleep 1000 &'; echo; exec sleep 1000"
    with running(f"echo $PPID; {script}") as (process, _, said):
        warden = int(said.readline())
        namespace = said.readline().strip()
        said.readline()
        members = _members(namespace)
        descriptors = [os.pidfd_open(member) for member in members]
        os.kill({"run": process.pid, "warden": warden}[victim], signal.SIGKILL)

    assert 7 == len(members)
    assert {warden, process.pid} < {*members}

    for descriptor in descriptors:
        select.select([descriptor], [], [])
        os.close(descriptor)

    assert [] == _members(namespace)


def test_what_the_command_leaves_running_is_killed() -> None:
    """It would go on with devices that nobody serves any more; also what it has left in turn, whoever its parent is."""
    left = "sh -c 'sleep 1000 & echo $!; setsid sleep 1000 & echo $!' </dev/null 2>/dev/null & wait; exit 3"
    done = run("sh", "-c", left.replace("sleep 1000", "sleep 1000 >/dev/null"))
    pids = done.stdout.split()

    assert (2, 3) == (len(pids), done.returncode)
    assert not [pid for pid in pids if Path("/proc", pid).exists()]


def test_input_and_output_are_the_commands() -> None:
    """Nothing is between the command and its standard descriptors."""
    done = subprocess.run(
        [sys.executable, MOUNT, "run", "tr", "a-z", "A-Z"], input="hello\n", capture_output=True, text=True, check=False
    )

    assert ("HELLO\n", "", 0) == (done.stdout, done.stderr, done.returncode)


def test_in_itself_it_does_without_the_filter() -> None:
    """There can be one filter of this kind; a second run says so, and works as far as FUSE does."""
    done = run(sys.executable, MOUNT, "run", "sh", "-c", "cat /dev/binderfs/binder_logs/state; exit 3")

    assert ("binder state:\n", 3) == (done.stdout, done.returncode)
    assert (
        "mount.py run: without help for NULL arguments and mount(2): [Errno 16] Device or resource busy\n"
        == done.stderr
    )


def test_without_a_command_it_says_how_to_use_it() -> None:
    """A mistake in the command line has status 2, as with any command."""
    done = subprocess.run([sys.executable, MOUNT, "run"], capture_output=True, text=True, check=False)

    assert 2 == done.returncode
    assert "what command?" in done.stderr


def test_a_mount_that_fails_is_one_line() -> None:
    """The command is not run then."""
    done = run("echo", "never", options="max=2")

    assert ("", 1) == (done.stdout, done.returncode)
    assert "mount.py: max=2 leaves no room for 3 devices\n" == done.stderr


def test_without_a_folder_for_temporary_files_it_says_so() -> None:
    """It needs one to put its /dev together in."""
    close = "mount --bind $each $each && mount -o remount,bind,ro $each"
    close = f"for each in /tmp /var/tmp /usr/tmp; do [ ! -d $each ] || {{ {close}; }}; done"
    command = ["unshare", "--mount", "sh", "-c", f'{close}; cd /proc; exec "$@"', "sh", sys.executable]
    done = subprocess.run(
        [*command, str(MOUNT), "run", "true"],
        env=os.environ | {"TMPDIR": ""},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (
        "mount.py: there is no folder for temporary files that can be written to: name one in TMPDIR\n" == done.stderr
    )
    assert 1 == done.returncode


def test_root_without_rights_is_told_what_it_takes() -> None:
    """A user namespace in which root is root takes a right of its own."""
    command = f"{sys.executable} {MOUNT} run true"
    done = subprocess.run(
        ["capsh", "--drop=cap_sys_admin,cap_setfcap", "--", "-c", command], capture_output=True, text=True, check=False
    )

    assert done.stderr.startswith("mount.py: no right to be user 0 in a user namespace (Operation not permitted): ")
    assert "CAP_SETFCAP" in done.stderr
    assert (1, 1) == (done.stderr.count("\n"), done.returncode)


def test_in_a_chroot_that_is_no_mount_point_it_says_so(tmp_path: Path) -> None:
    """What it mounts could be seen outside there."""
    script = (
        'mount -t tmpfs none "$0" && cd "$0" && mkdir root && cd root && '
        "for each in /*; do "
        'if [ -L "$each" ]; then cp -P "$each" .; '
        'elif [ -d "$each" ]; then mkdir ".$each" && mount --rbind "$each" ".$each"; fi; done && '
        'exec chroot . "$@"'
    )
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(tmp_path)]
    done = subprocess.run(
        [*command, sys.executable, str(MOUNT), "run", "true"], capture_output=True, text=True, check=False
    )

    assert 1 == done.returncode
    assert done.stderr.startswith("mount.py: the root directory is a chroot's and no mount point, ")
    assert 1 == done.stderr.count("\n")


@pytest.mark.parametrize("option", ["log=log", "limit_opens=1", "mode=0666", "devices=a", "seccomp"])
def test_a_mount_of_the_commands_own_has_the_kernels_options(option: str) -> None:
    """Nobody else's server is told by it where to write, or anything that the kernel's binderfs does not know."""
    with tempfile.TemporaryDirectory() as name:
        # Where the server, which is root's, could write, and a way for all to the place.
        Path(name).chmod(0o755)
        binderfs = Path(name, "binderfs")
        binderfs.mkdir()
        mount = f"mount -i -t binder -o {option.replace('=log', f'={name}/log')} binder {binderfs}"
        nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "unshare", "-Urm", "sh", "-c")
        done = run(*nobody, f"{mount}; mount -i -t binder -o max=4 binder {binderfs} && ls {binderfs}")

        assert "wrong fs type, bad option" in done.stderr
        assert ["binder", "binder-control", "features", "hwbinder", "vndbinder"] == done.stdout.splitlines()
        assert [binderfs] == list(Path(name).iterdir())


def test_only_who_mounted_can_remount() -> None:
    """Who is root in a user namespace below sees the mount, and cannot change it."""
    remount = "mount -i -o remount,max=1,stats=global /dev/binderfs"
    done = run("sh", "-c", f"unshare -Urm {remount}; {remount} && {MOUNT} status --json | grep max")

    assert ["mount: /dev/binderfs: permission denied."] == done.stderr.splitlines()[:1]
    assert 1 == done.stderr.count("/dev/binderfs")
    assert '"max": 1,' == done.stdout.strip()


def test_a_user_namespace_without_root_can_mount() -> None:
    """Devices are its user's then."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
        script = f"mount -i -t binder binder {name} && stat -c %u {name}/binder && head -c 0 {name}/binder-control"
        done = run(*nobody, "unshare", "--user", "--mount", "--map-current-user", "--keep-caps", "sh", "-c", script)

    assert ("65534\n", "", 0) == (done.stdout, done.stderr, done.returncode)


def test_a_name_gives_no_right_to_mount() -> None:
    """Whether a command may mount is told by its capabilities, and not by what it makes of its own name."""
    program = r"printf '\rCapEff:\t200000' > /proc/$$/comm; cat /proc/$$/status; read line"
    nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c", program)
    with subprocess.Popen(nobody, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert b"Name:\t\rCapEff:\t200000\n" == process.stdout.readline()
        may = attendant._may_mount(process.pid)
        process.stdin.close()

    assert not may
    assert attendant._may_mount(os.getpid())


def test_who_is_killed_inside_mount_leaves_it_at_work() -> None:
    """A caller whose memory has come to its end holds up nothing, and a last call is answered."""
    script = f"{sys.executable} {HERE / 'killed.py'} 300 && mkdir $0/b && mount -i -t binder binder $0/b && ls $0/b"
    with tempfile.TemporaryDirectory() as name:
        done = run("sh", "-c", script, name, timeout=300)

    assert ["done", "binder", "binder-control", "features", "hwbinder", "vndbinder"] == done.stdout.splitlines()
    assert ("", 0) == (done.stderr, done.returncode)


def test_a_name_is_no_line_of_fdinfo() -> None:
    """Which open an ioctl acts on cannot be said by the name of a file that the caller has."""
    done = run(sys.executable, HERE / "forge.py")
    if done.stdout.startswith("255"):
        pytest.skip("there is no io_uring")

    assert ([f"{errno.ENOTTY} False"] * 6, "", 0) == (done.stdout.splitlines(), done.stderr, done.returncode)


def test_a_server_that_is_killed_with_questions_holds_up_nobody() -> None:
    """Calls that it has not answered fail, and so do later ones; the command goes on, and a new mount is served."""
    program = f"""
import ctypes, fcntl, json, os, signal, subprocess, sys, threading
sys.path.insert(0, {os.fspath(HERE.parent.parent)!r})
from pathlib import Path
from binderfs_fuse.command import servers
server = servers.information(Path("/dev/binderfs"))["pid"]
device = os.open("/dev/binderfs/binder", os.O_RDWR)
libc = ctypes.CDLL(None, use_errno=True)
os.kill(server, signal.SIGSTOP)
failures = []
def ask():
    libc.ioctl(device, 0x40046207, None)
    failures.append(ctypes.get_errno())
threads = [threading.Thread(target=ask) for _ in range(20)]
for thread in threads:
    thread.start()
place = sys.argv[1] + "/other"
os.mkdir(place)
# Served though the first server does not answer.
print(libc.mount(b"binder", place.encode(), b"binder", 0, None), sorted(os.listdir(place))[0], len(failures))
os.kill(server, signal.SIGKILL)
for thread in threads:
    thread.join()
print(len(failures), 0 in failures)
"""
    with tempfile.TemporaryDirectory() as name:
        done = run(sys.executable, "-c", program, name, timeout=300)

    assert (["0 binder 0", "20 False"], "", 0) == (done.stdout.splitlines(), done.stderr, done.returncode)
