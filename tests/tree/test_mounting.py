"""The mount table, without a mount."""

import os
from pathlib import Path

from binderfs_fuse.fuse.mounting import Mount, parse_mountinfo

MOUNTINFO = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
39 22 0:35 / /mnt/with\040blank rw,nosuid,nodev,noexec - fuse.binder a\134b rw,user_id=0,group_id=0
40 22 0:36 /sub /mnt/other rw shared:2 master:1 - tmpfs tmpfs rw,size=4k
"""


def test_mountinfo_is_read_whatever_optional_fields_there_are() -> None:
    """Octal escapes are undone; the file system's part begins after the lone dash."""
    root, ours, other = parse_mountinfo(MOUNTINFO)

    assert Mount(22, os.makedev(254, 0), "/", Path("/"), "rw,relatime", "ext4", "/dev/vda") == root
    assert (os.makedev(0, 35), Path("/mnt/with blank"), "a\\b") == (ours.device, ours.mountpoint, ours.source)
    assert ("/sub", "tmpfs") == (other.root, other.type)


def test_a_path_may_have_what_looks_like_the_end_of_a_line() -> None:
    """The kernel escapes a newline in a path; a carriage return, a form feed or a Unicode separator it leaves."""
    odd = "/mnt/a\rb\x0bc\x0cd\x1ce\x85f\u2028g"
    (mount,) = parse_mountinfo(f"39 22 0:35 / {odd} rw - fuse.binder binder rw\n")

    assert Path(odd) == mount.mountpoint


def test_ours_are_told_by_their_type() -> None:
    """Only what this package mounts is taken for its own."""
    assert [False, True, False] == [mount.is_ours for mount in parse_mountinfo(MOUNTINFO)]
