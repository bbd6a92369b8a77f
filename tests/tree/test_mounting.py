"""The mount table; and mounting, with others who rename what is on the way."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from binderfs_fuse.fuse import mounting
from binderfs_fuse.fuse.mounting import TYPE, Mount, MountError, parse_mountinfo, system_mount
from binderfs_fuse.host import places
from tests.mounts import MOUNT, mount_py, needs_mount

HERE = Path(__file__).parent

MOUNTINFO = rb"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
39 22 0:35 / /mnt/with\040blank rw,nosuid,nodev,noexec - fuse.binder a\134b rw,user_id=0,group_id=0
40 22 0:36 /sub /mnt/other rw shared:2 master:1 - tmpfs tmpfs rw,size=4k
"""


def test_mountinfo_is_read_whatever_optional_fields_there_are() -> None:
    """Octal escapes are undone; the file system's part begins after the lone dash."""
    root, ours, other = parse_mountinfo(MOUNTINFO)

    assert Mount(22, os.makedev(254, 0), "/", Path("/"), "rw,relatime", "ext4", "/dev/vda", 1) == root
    assert (os.makedev(0, 35), Path("/mnt/with blank"), "a\\b") == (ours.device, ours.mountpoint, ours.source)
    assert ("/sub", "tmpfs") == (other.root, other.type)


def test_a_path_may_have_what_looks_like_the_end_of_a_line() -> None:
    """The kernel escapes a newline in a path; a carriage return, a form feed or a Unicode separator it leaves."""
    odd = "/mnt/a\rb\x0bc\x0cd\x1ce\x85f\u2028g"
    (mount,) = parse_mountinfo(f"39 22 0:35 / {odd} rw - fuse.binder binder rw\n".encode())

    assert Path(odd) == mount.mountpoint


def test_ours_are_told_by_their_type() -> None:
    """Only what this package mounts is taken for its own."""
    assert [False, True, False] == [mount.is_ours for mount in parse_mountinfo(MOUNTINFO)]


@pytest.fixture
def flipped() -> Iterator[tuple[Path, Path]]:
    """A name in a folder of user 3000, who has it lead elsewhere by turns; and the folder above, which is root's."""
    with tempfile.TemporaryDirectory(prefix="binderfs-flip-") as made:
        folder = Path(made).resolve()
        folder.chmod(0o755)
        own, elsewhere = folder / "own", folder / "elsewhere"
        for path in (own, elsewhere, own / "mnt"):
            path.mkdir()
        os.chown(own, 3000, 3000)
        os.chown(own / "mnt", 3000, 3000)
        command = [sys.executable, str(HERE / "flip.py"), str(own), str(elsewhere)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as flipper:
            assert flipper.stdin is not None
            assert flipper.stdout is not None
            try:
                assert b"flipping\n" == flipper.stdout.readline()

                yield own / "mnt", folder
            finally:
                flipper.kill()
                for point in _below(folder):
                    subprocess.run(["umount", "--lazy", point], check=False)


def _below(folder: Path) -> list[Path]:
    return [mount.mountpoint for mount in reversed(mounting.mounts()) if mount.mountpoint.is_relative_to(folder)]


@needs_mount
def test_another_user_cannot_choose_where_is_mounted(flipped: tuple[Path, Path]) -> None:
    """Root mounts in another user's folder where it was asked to, or nowhere, and unmounts that and nothing else."""
    name, folder = flipped
    for _ in range(200):
        try:
            connection = mounting.connect("binder", name, allow_other=True)
        except MountError:
            assert [] == _below(folder)
            continue

        assert {name} == {mount.mountpoint for mount in mounting.mounts() if mount.device == connection.device}

        mounting.disconnect(connection)
        os.close(connection.descriptor)

        assert [] == _below(folder)


@needs_mount
def test_commands_in_another_users_folder_leave_nothing_elsewhere(flipped: tuple[Path, Path]) -> None:
    """`mount.py` mounts in the folder, or says why not; `mount.py -u` then finds the mount or says so, too."""
    name, folder = flipped
    for _ in range(10):
        if mount_py(name).returncode:
            assert [] == _below(folder)
            continue

        assert [name] == _below(folder)
        assert 0 == mount_py("-u", name).returncode
        assert [] == _below(folder)


@needs_mount
def test_a_link_of_another_user_is_not_followed(tmp_path: Path) -> None:
    """It is refused with the name of its owner, who may turn it round; a link of root's is followed."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    with mounting.place_at(link) as place:
        assert os.fsencode(target.resolve()) == places.path_of(place)

    os.chown(link, 3000, 3000, follow_symlinks=False)

    assert (
        f"a symbolic link of another user is on the way to {link}, and user 3000 can turn it round"
        in mount_py(link).stderr
    )


@needs_mount
def test_a_mount_is_unmounted_by_what_it_is(tmp_path: Path) -> None:
    """A line of the mount table whose path leads to another mount by now unmounts nothing."""
    connection = mounting.connect("binder", tmp_path, allow_other=True)
    mount = mounting.mount_at(tmp_path)

    assert mount is not None

    system_mount("none", tmp_path, "tmpfs", 0)
    try:
        with pytest.raises(MountError, match="leads to something else now"):
            mounting.unmount(mount)
    finally:
        subprocess.run(["umount", tmp_path], check=True)

    assert mount == mounting.mount_at(tmp_path)

    mounting.unmount(mount)
    os.close(connection.descriptor)

    assert mounting.mount_at(tmp_path) is None


@needs_mount
def test_a_kernel_without_fsopen_has_mount(tmp_path: Path) -> None:
    """Where a filter or an old kernel has no fsopen(2), mount(2) takes its place, and what it made is found."""
    command = [sys.executable, str(HERE / "without_fsopen.py"), sys.executable, str(MOUNT)]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, check=False)

    assert ("", 0) == (done.stderr, done.returncode)
    assert TYPE == getattr(mounting.mount_at(tmp_path), "type", None)
    assert 0 == subprocess.run([*command, "-u", tmp_path], check=False).returncode
    assert mounting.mount_at(tmp_path) is None
