"""Without root's rights: in a user namespace, and through fusermount3."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounts import CHECKOUT, MOUNT, mount_py, needs_mount

pytestmark = needs_mount

NOBODY = 65534
# As nobody, but able to get at this Python, wherever it is installed.
AS_NOBODY = (
    "setpriv",
    *("--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"),
    *("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
)
ASK = """
import fcntl, json, sys
from pathlib import Path
with Path(sys.argv[1], "binder").open("rb+", buffering=0) as device:
    argument = bytearray(4)
    fcntl.ioctl(device, 0xC0046209, argument)
    print(argument[0])
"""


def _shell(*command: str, script: str, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHON": sys.executable, "MOUNT": MOUNT, "ASK": ASK} | variables
    return subprocess.run(
        [*command, "sh", "-eu"],
        input=script,
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def mountpoint() -> Iterator[Path]:
    """A folder of nobody's, to which there is a way for him: pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="binderfs-nobody-") as name:
        path = Path(name)
        os.chown(path, NOBODY, NOBODY)
        yield path


needs_fusermount = pytest.mark.skipif(
    not shutil.which("fusermount3") or pwd.getpwuid(NOBODY).pw_name != "nobody", reason="there is no fusermount3"
)

# A device of FUSE that everybody may open, as most machines have it.
_OPEN_TO_ALL = """
mount -t tmpfs none "$DEVICES"
mknod -m 666 "$DEVICES/fuse" c 10 229
mount --bind "$DEVICES/fuse" /dev/fuse
"""


def _as_nobody(tmp_path: Path, script: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a script as nobody where everybody may use FUSE."""
    devices = tmp_path / "devices"
    devices.mkdir()
    return _shell(
        *("unshare", "--mount", "--propagation", "private"),
        script=f'{_OPEN_TO_ALL}\nexec {" ".join(AS_NOBODY)} sh -eu -c "$SCRIPT"',
        DEVICES=devices,
        SCRIPT=script,
        **variables,
    )


def test_in_a_user_namespace(mountpoint: Path) -> None:
    """Whoever is root there can mount; regions are in the page cache, since passing through is for the real root."""
    done = _shell(
        *("unshare", "--user", "--map-root-user", "--mount"),
        script="""
            "$PYTHON" "$MOUNT" "$AT"
            "$PYTHON" -c "$ASK" "$AT"
            "$PYTHON" "$MOUNT" status --interval 0 "$AT" | grep -o 'regions [a-z]*'
            stat -c '%u %g' "$AT" "$AT/binder" "$AT/binder-control"
            "$PYTHON" "$MOUNT" -u "$AT"
        """,
        AT=mountpoint,
    )

    assert ("", 0) == (done.stderr, done.returncode)
    assert ["8", "regions pagecache", *["0 0"] * 3] == done.stdout.splitlines()


@needs_fusermount
def test_through_fusermount(mountpoint: Path, tmp_path: Path) -> None:
    """A user mounts for himself, and owns what is there; nobody else, not even root, gets in."""
    done = _as_nobody(
        tmp_path,
        """
            "$PYTHON" "$MOUNT" "$AT"
            "$PYTHON" -c "$ASK" "$AT"
            stat -c '%U' "$AT" "$AT/binder" "$AT/binder-control" "$AT/features"
            grep -o ' fuse[.]binder binder .*' /proc/self/mountinfo | grep "user_id=65534"
            "$PYTHON" "$MOUNT" -u "$AT"
            ls "$AT"
        """,
        AT=mountpoint,
    )

    assert ("", 0) == (done.stderr, done.returncode)
    assert [
        "8",
        *["nobody"] * 4,
        " fuse.binder binder rw,user_id=65534,group_id=65534,default_permissions",
    ] == done.stdout.splitlines()


@needs_fusermount
def test_fusermount_says_what_is_missing(mountpoint: Path, tmp_path: Path) -> None:
    """What it refuses is passed on, in the one line."""
    done = _as_nobody(tmp_path, '"$PYTHON" "$MOUNT" "$AT" -o allow_other', AT=mountpoint)

    assert 1 == done.returncode
    assert 1 == done.stderr.count("\n")
    assert f"mount.py: no right to mount at {mountpoint}, and fusermount3 refused: " in done.stderr
    assert "user_allow_other" in done.stderr


# Started as root, who can get at this Python, wherever it is installed.
_MOUNT_AS_NOBODY = """
import ctypes, os, sys
from pathlib import Path
from binderfs_fuse.command import calls
from binderfs_fuse.command.main import main
nobody = 65534
os.setgroups([])
os.setresgid(nobody, nobody, nobody)
os.setresuid(nobody, nobody, nobody)
if sys.argv[2] == "root":
    # PR_SET_DUMPABLE, for /proc/self to be his.
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
    calls.unshare(calls.CLONE_NEWUSER | calls.CLONE_NEWNS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {nobody} 1"), ("gid_map", f"0 {nobody} 1")):
        Path("/proc/self", name).write_text(text)
sys.exit(main(["mount.py", sys.argv[1]]))
"""


@needs_fusermount
@pytest.mark.parametrize("who", ["root", "nobody"])
def test_a_closed_device_of_fuse_is_said_to_be_that(mountpoint: Path, tmp_path: Path, who: str) -> None:
    """No right to mount helps where /dev/fuse lets nobody in: neither root's in a user namespace, nor fusermount3's."""
    devices = tmp_path / "devices"
    devices.mkdir()
    done = _shell(
        *("unshare", "--mount", "--propagation", "private"),
        script=_OPEN_TO_ALL.replace("666", "600") + 'exec "$PYTHON" -c "$MOUNT_AS_NOBODY" "$AT" "$WHO"',
        DEVICES=devices,
        MOUNT_AS_NOBODY=_MOUNT_AS_NOBODY,
        AT=mountpoint,
        WHO=who,
        PYTHONPATH=CHECKOUT,
    )

    assert 1 == done.stderr.count("\n")
    assert "/dev/fuse cannot be opened (Permission denied): its mode is 0600; `chmod 666 /dev/fuse`" in done.stderr
    assert "unshare" not in done.stderr
    assert 1 == done.returncode


def test_without_fusermount(mountpoint: Path) -> None:
    """It says what to install."""
    command = [*AS_NOBODY, sys.executable, str(MOUNT), str(mountpoint)]
    environment = os.environ | {"PATH": str(mountpoint)}
    done = subprocess.run(
        command, executable=shutil.which("setpriv"), env=environment, capture_output=True, text=True, check=False
    )

    assert "mount.py: mounting without root takes fusermount3: install the package fuse3, or use `unshare -Urm`\n" == (
        done.stderr
    )
    assert 1 == done.returncode


@needs_fusermount
def test_a_dead_servers_mount_is_its_users_to_replace(mountpoint: Path, tmp_path: Path) -> None:
    """Neither does that take root."""
    done = _as_nobody(
        tmp_path,
        """
            "$PYTHON" "$MOUNT" "$AT"
            kill -9 $("$PYTHON" "$MOUNT" status --json --interval 0 "$AT" | sed -n 's/^    "pid": \\([0-9]*\\),$/\\1/p')
            while stat -f "$AT" >/dev/null 2>&1; do :; done
            "$PYTHON" "$MOUNT" "$AT"
            "$PYTHON" -c "$ASK" "$AT"
            "$PYTHON" "$MOUNT" -u "$AT"
        """,
        AT=mountpoint,
    )

    assert ("8\n", "", 0) == (done.stdout, done.stderr, done.returncode)


def test_the_filter_in_a_user_namespace(mountpoint: Path) -> None:
    """Who is root there can have it as well, and unmounts by a signal under it."""
    done = _shell(
        *("unshare", "--user", "--map-root-user", "--mount"),
        script="""
            "$PYTHON" "$MOUNT" "$AT" -o "seccomp,log=$AT.log"
            "$PYTHON" -c "$ASK" "$AT"
            server=$("$PYTHON" "$MOUNT" status --json --interval 0 "$AT" | sed -n 's/^    "pid": \\([0-9]*\\),$/\\1/p')
            grep Seccomp: /proc/$server/status
            kill $server
            while grep -q "$AT" /proc/self/mountinfo; do :; done
            cat "$AT.log"; rm -f "$AT.log"
        """,
        AT=mountpoint,
    )

    assert ("8\nSeccomp:\t2\n", "", 0) == (done.stdout, done.stderr, done.returncode)


@needs_fusermount
def test_no_filter_where_fusermount_unmounts(mountpoint: Path, tmp_path: Path) -> None:
    """Without the right to unmount the server says that it has no filter, and executes what unmounts at a signal."""
    done = _as_nobody(
        tmp_path,
        """
            "$PYTHON" "$MOUNT" "$AT" -o "seccomp,log=$AT/../$LOG"
            "$PYTHON" -c "$ASK" "$AT"
            server=$("$PYTHON" "$MOUNT" status --json --interval 0 "$AT" | sed -n 's/^    "pid": \\([0-9]*\\),$/\\1/p')
            kill $server
            while grep -q "$AT" /proc/self/mountinfo; do :; done
            grep -o 'there is no filter.*' "$AT/../$LOG"
            rm "$AT/../$LOG"
        """,
        AT=mountpoint,
        LOG=f"{mountpoint.name}.log",
    )
    reason = "without CAP_SYS_ADMIN, fusermount3 has to be executed to unmount"

    assert ("", 0) == (done.stderr, done.returncode)
    assert f"8\nthere is no filter of system calls: {reason}\n" == done.stdout


@needs_fusermount
def test_status_of_another_users_mount(mountpoint: Path, tmp_path: Path) -> None:
    """Who is not let in, as root into a user's mount, is told so; the mount is well, and not to be removed."""
    devices = tmp_path / "devices"
    devices.mkdir()
    done = _shell(
        *("unshare", "--mount", "--propagation", "private"),
        script=f"""
            {_OPEN_TO_ALL}
            {" ".join(AS_NOBODY)} "$PYTHON" "$MOUNT" "$AT"
            "$PYTHON" "$MOUNT" status "$AT"
            "$PYTHON" "$MOUNT" graph --dot "$AT" 2>&1 || echo "status $?"
            umount "$AT"
        """,
        AT=mountpoint,
        DEVICES=devices,
    )
    said = f"{mountpoint}: another user's to ask (Permission denied)"

    assert ("", 0) == (done.stderr, done.returncode)
    assert [said, f"mount.py: {said}", "status 1"] == done.stdout.splitlines()


def test_run_makes_a_user_namespace_where_it_has_to() -> None:
    """The command then is who it was, without rights, and may use the devices."""
    done = _shell(
        *("capsh", "--drop=cap_sys_admin", "--", "-c", 'exec "$0" "$@"'),
        script="""
            "$PYTHON" "$MOUNT" run sh -c '
                id -u
                "$PYTHON" -c "$ASK" /dev/binderfs
                readlink /dev/binder
                readlink /proc/self/ns/user'
            readlink /proc/self/ns/user
        """,
    )
    *said, inside, outside = done.stdout.splitlines()

    assert ("", 0) == (done.stderr, done.returncode)
    assert ["0", "8", "binderfs/binder"] == said
    assert inside != outside


def test_another_users_mount_is_left_alone(mountpoint: Path) -> None:
    """Without the right to, it is not unmounted."""
    assert 0 == mount_py(mountpoint).returncode
    try:
        done = subprocess.run(
            [*AS_NOBODY, sys.executable, MOUNT, "-u", mountpoint], capture_output=True, text=True, check=False
        )

        assert 1 == done.returncode
        assert f"mount.py: no right to unmount {mountpoint}" in done.stderr
    finally:
        assert 0 == mount_py("-u", mountpoint).returncode
