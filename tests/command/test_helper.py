"""``mount -t binder``, fstab and ``umount``, as with binder in the kernel, once ``make install`` has been there.

mount(8) looks for helpers in /sbin only. So each test has a mount namespace of its own, where /sbin is an overlay.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from binderfs_fuse.command.main import main
from tests.mounts import CHECKOUT, MOUNT, needs_mount

pytestmark = needs_mount

_PREPARE = """
set -eu
mount -t tmpfs none "$FOLDER"
mkdir "$FOLDER/upper" "$FOLDER/work" "$FOLDER/binderfs" "$FOLDER/prefix"
sbin=$(readlink -f /sbin)
mount -t overlay -o "lowerdir=$sbin,upperdir=$FOLDER/upper,workdir=$FOLDER/work" none "$sbin"
cd "$FOLDER"
"""
_HELPERS = """
ln -s "$MOUNT" /sbin/mount.binder
ln -s "$MOUNT" /sbin/mount.fuse.binder
"""


@pytest.fixture
def shell(tmp_path: Path) -> "Shell":
    """A shell in a mount namespace of its own."""
    return Shell(tmp_path)


class Shell:
    """Runs scripts that may do with /sbin what they like, in a folder with an empty folder binderfs in it."""

    def __init__(self, folder: Path) -> None:
        """Keep things in this folder."""
        self.folder = folder

    def run(self, script: str, *, helpers: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, or to its first command that fails."""
        environment = os.environ | {"FOLDER": str(self.folder), "MOUNT": str(MOUNT), "PYTHON": sys.executable}
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh"],
            input=_PREPARE + (_HELPERS if helpers else "") + script,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def lines(self, script: str) -> list[str]:
        """Return what a script prints that succeeds and does not complain."""
        done = self.run(script)

        assert ("", 0) == (done.stderr, done.returncode)

        return done.stdout.splitlines()


def said_of_this_python(line: str) -> bool:
    """Tell whether this is what installing says where other users cannot reach this Python."""
    return "tools/install: only root, or whoever it belongs to, can use what is installed" in line


def test_mount_of_type_binder(shell: Shell) -> None:
    """It is mounted as the kernel's would be, logs and all; umount ends the server."""
    said = shell.lines("""
        mount -t binder binder binderfs -o max=1024,stats=global
        cat binderfs/binder_logs/state
        grep -c "$PWD/binderfs .* fuse[.]binder binder " /proc/self/mountinfo
        "$PYTHON" "$MOUNT" status --json --interval 0 binderfs >status
        grep '"max"' status
        server=$(sed -n 's/^    "pid": \\([0-9]*\\),$/\\1/p' status)
        umount binderfs
        ls binderfs
        tail --pid="$server" -f /dev/null
    """)

    assert ["binder state:", "1", '    "max": 1024,'] == said


def test_without_stats_there_are_no_logs(shell: Shell) -> None:
    """Here the kernel's default holds."""
    assert ["binder", "binder-control", "features", "hwbinder", "vndbinder"] == shell.lines("""
        mount -t binder binder binderfs -o sync,dirsync,mand,iversion,lazytime,nosymfollow,silent,noatime,nofail
        ls binderfs
        umount binderfs
    """)


def test_remount_sets_max(shell: Shell) -> None:
    """With the type or without, by the mount point alone; what cannot be is refused, with mount's status."""
    said = shell.lines("""
        status() { "$PYTHON" "$MOUNT" status --json --interval 0 binderfs | grep '"max"'; }
        mount -t binder binder binderfs -o stats=global
        mount -o remount,max=7 binderfs
        status
        mount -t binder -o remount,max=8,stats=global binder binderfs
        status
        mount -o remount,stats=unset binderfs 2>&1 || echo "status $?"
        umount binderfs
    """)

    assert ['    "max": 7,', '    "max": 8,'] == said[:2]
    assert ["mount.fuse.binder: Binderfs stats mode cannot be changed during a remount", "status 32"] == said[2:]


def test_fstab(shell: Shell) -> None:
    """An entry of type binder is mounted by its mount point, or with all the others."""
    assert ["binder", "mounted", "binder", "again"] == shell.lines("""
        echo "binder $PWD/binderfs binder max=5,stats=global,nofail,x-systemd.requires=x 0 0" >fstab
        mount -T fstab "$PWD/binderfs"
        ls -d binderfs/binder | xargs basename
        umount binderfs
        mount -T fstab -a && echo mounted
        ls -d binderfs/binder | xargs basename
        mount -T fstab -a && echo again
        umount binderfs
    """)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("binderfs -o max=2", "max=2 leaves no room for 3 devices"),
        ("binderfs -o foo", "Unknown parameter 'foo'"),
        ("nothing", "nothing does not exist: make it with `mkdir -p nothing`"),
    ],
)
def test_what_fails_has_mounts_status(shell: Shell, arguments: str, said: str) -> None:
    """One line says what it is, and the status is that of a mount that failed."""
    done = shell.run(f"mount -t binder binder {arguments}")

    assert f"mount.binder: {said}\n" == done.stderr
    assert 32 == done.returncode


def test_what_it_says_to_type_is_installed(shell: Shell) -> None:
    """Whoever has mount.binder has binderfs-fuse, and not mount.py."""
    done = shell.run("mount -t binder binder binderfs; /sbin/mount.binder binder binderfs || umount binderfs")

    assert "unmount it first with `binderfs-fuse -u binderfs`\n" in done.stderr


def test_a_dry_run_mounts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Options are looked at all the same."""
    assert 0 == main(["/sbin/mount.binder", "binder", "/nowhere", "-f", "-n", "-s", "-v", "-o", "rw,max=8"])
    assert 32 == main(["/sbin/mount.binder", "binder", "/nowhere", "-f", "-o", "max=x"])
    assert "mount.binder: Bad value for 'max': it is a number up to 1048576\n" == capsys.readouterr().err


def test_installing_and_uninstalling(shell: Shell) -> None:
    """What is installed works without the checkout; nothing of it is left when it is uninstalled."""
    done = shell.run(
        f"""
        export PREFIX=$PWD/prefix
        cd {CHECKOUT}
        tools/install
        cd "$FOLDER"
        mount -t tmpfs none {CHECKOUT}
        mount -t binder binder binderfs
        ls binderfs
        umount binderfs
        prefix/bin/binderfs-fuse binderfs
        prefix/bin/binderfs-fuse -u binderfs
        umount {CHECKOUT}
        {CHECKOUT}/tools/install -u
        find prefix /sbin ! -type d -name "*binder*"
        """,
        helpers=False,
    )

    assert "" == "".join(line for line in done.stderr.splitlines() if not said_of_this_python(line))
    assert ["binder", "binder-control", "features", "hwbinder", "vndbinder"] == done.stdout.splitlines()


def test_installing_for_a_package(shell: Shell) -> None:
    """With DESTDIR nothing is written elsewhere, and it works once it is moved to where it belongs."""
    done = shell.run(
        f"""
        mkdir usr
        touch before
        DESTDIR=stage PREFIX="$PWD/usr" {CHECKOUT}/tools/install
        find prefix usr /sbin/ -newer before
        ls stage
        rmdir usr
        mv "stage$PWD/usr" usr
        mv stage/sbin/* /sbin
        mount -t binder binder binderfs
        ls -d binderfs/binder
        usr/bin/binderfs-fuse -u binderfs
        readlink usr/bin/binderfs-fuse /sbin/mount.binder
        """,
        helpers=False,
    )
    link = f"{shell.folder}/usr/lib/binderfs-fuse/mount.py"
    complaints = [line for line in done.stderr.splitlines() if not said_of_this_python(line)]

    assert [] == complaints
    assert ["sbin", "tmp", "binderfs/binder", link, link] == done.stdout.splitlines()


def test_installing_below_a_relative_folder(shell: Shell) -> None:
    """Links lead there from wherever; and it is said if others than root cannot reach the Python that is used."""
    done = shell.run(
        f"""
        PREFIX=prefix {CHECKOUT}/tools/install
        cd /
        "$FOLDER/prefix/bin/binderfs-fuse" --version
        mount.binder --help >/dev/null
        """,
        helpers=False,
    )

    python = Path(sys.executable).resolve()
    is_reached = all(path.stat().st_mode & 0o001 for path in (python, *python.parents))

    assert done.stdout.startswith("binderfs-fuse ")
    assert 0 == done.returncode
    assert is_reached != any(map(said_of_this_python, done.stderr.splitlines()))


def test_installing_takes_a_right(shell: Shell) -> None:
    """One line says where it may not write."""
    done = shell.run(
        f"""
        capsh --drop=cap_dac_override,cap_dac_read_search --user=nobody -- -c '
            PREFIX=/nowhere {CHECKOUT}/tools/install'
        """
    )

    assert done.returncode
    assert "run `sudo make install`" in done.stderr
