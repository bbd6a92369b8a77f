"""``mount.py status`` and ``mount.py graph``: who uses a mount, and who holds what of whom."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.command.graph import dot
from binderfs_fuse.command.snapshot import Node, Process, Reference, parse_calls, parse_state
from binderfs_fuse.command.status import collect
from binderfs_fuse.fuse import mounting
from tests.command.talk import Talk
from tests.mounts import MOUNT, Mounted, mount_py

STATE = """binder state:
dead nodes:
  node 9: u0000000000007000 c0000000000008000 hs 0 hw 0 ls 0 lw 0 is 0 iw 1 tr 1 proc 47
proc 47
context binder
  thread 47: l 00 need_return 0 tr 0
    outgoing transaction 2: 00000000d225c29e from 47:47 to 46:0 code 54455354 flags 10 pri 0 a0 r0 elapsed 8ms
    node work 3: u0000000001111000 c0000000002222000
    transaction complete
  thread 48: l 12 need_return 0 tr 0
  node 3: u0000000001111000 c0000000002222000 hs 0 hw 0 ls 0 lw 0 is 1 iw 1 tr 1 proc 46
  ref 10: desc 0 node 1 s 1 w 1 d 0000000000000000
  ref 11: desc 1 dead node 9 s 0 w 1 d 00000000f00dfeed
proc 46
context binder
  thread 46: l 02 need_return 0 tr 0
  node 1: u0000000000000000 c0000000000000000 hs 1 hw 1 ls 2 lw 1 is 0 iw 0 tr 1
  ref 4: desc 1 node 3 s 1 w 0 d 0000000000000000
  buffer 2: 0 size 32:8:0 active
  buffer 12: 38 size 100:0:4 delivered
  pending transaction 2: 00000000d225c29e from 47:47 to 46:0 code 54455354 flags 10 pri 0 a0 r0 elapsed 9ms node 1 size 32:8 offset 0
proc 46
context with blanks
"""  # noqa: E501 - the driver's


def test_the_state_file_is_read() -> None:
    """Processes with their threads, nodes, references, buffers and open calls, in the file's order."""
    caller, manager, other = parse_state(STATE, managers=[1])

    assert (47, "binder", [47, 48], [46]) == (caller.pid, caller.context, caller.threads, caller.calling)
    assert [Node(3, 0x1111000, manager=False)] == caller.nodes
    assert [Reference(0, 1, 1, 1, dead=False), Reference(1, 9, 0, 1, dead=True)] == caller.references
    assert [Node(1, 0, manager=True)] == manager.nodes
    assert (2, 32 + 8 + 100 + 4, []) == (manager.buffers, manager.bytes, manager.calling)
    assert (46, "with blanks", []) == (other.pid, other.context, other.threads)


def test_transactions_are_those_of_the_whole_mount() -> None:
    """Processes have counters of their own, which are not counted again."""
    assert 7 == parse_calls(
        "binder stats:\nBC_TRANSACTION: 4\nBC_REPLY: 9\nBC_TRANSACTION_SG: 3\nproc 4\n  BC_TRANSACTION: 4\n"
    )


def test_a_picture_has_an_arrow_for_each_hold() -> None:
    """From the holder's box to the node in its owner's; weak ones are dashed, dead ones are left out."""
    owner = Process(1, "binder", 'a "name"', nodes=[Node(5, 0x10, manager=True), Node(6, 0x20, manager=False)])
    holds = [Reference(1, 5, 1, 0, dead=False), Reference(2, 6, 0, 1, dead=False), Reference(3, 7, 1, 0, dead=True)]
    holder = Process(2, "binder", "b", references=holds, calling=[1])
    elsewhere = Process(1, "hwbinder", "a", nodes=[])
    lines = [line.strip() for line in dot("t", [holder, owner, elsewhere]).splitlines() if "->" in line]

    assert [
        'p0 -> n5 [label="handle 1"];',
        'p0 -> n6 [label="handle 2", style=dashed];',
        "p0 -> p1 [style=bold, color=red, label=calls];",
    ] == lines
    assert r'label="a \"name\"\n1"' in dot("t", [owner])


@pytest.fixture
def talk(mounted: Mounted) -> Iterator[Talk]:
    """Two processes that are in the middle of a call."""
    talk = Talk(mounted.path / "binder")
    yield talk
    talk.end()


def _reports(*arguments: str | Path) -> list[dict[str, Any]]:
    done = mount_py("status", "--json", *arguments)

    assert "" == done.stderr

    reports: list[dict[str, Any]] = json.loads(done.stdout)
    return reports


def test_status_for_programs(mounted: Mounted, talk: Talk) -> None:
    """All that is known of a mount, with what each client holds."""
    (report,) = _reports(mounted.path)

    assert str(mounted.path) == report["mountpoint"]
    assert mounted.server == report["pid"]
    assert mounted.region == report["region"]
    assert ["binder", "hwbinder", "vndbinder"] == report["devices"]
    assert (1048576, True, 1) == (report["max"], report["stats"], report["transactions"])
    assert 0.0 == report["transactions_per_second"]

    client, manager = report["clients"]

    assert (talk.client.pid, "binder", 1, 1, 0, False) == tuple(
        client[key] for key in ("pid", "context", "threads", "nodes", "references", "manager")
    )
    assert [talk.manager.pid] == client["calling"]
    assert (talk.manager.pid, 1, 1, 1, True) == tuple(
        manager[key] for key in ("pid", "nodes", "references", "buffers", "manager")
    )


def test_status_for_people(mounted: Mounted, talk: Talk) -> None:
    """A line for the mount, and a table of those who use it."""
    done = mount_py("status", mounted.path, "--interval", "0")
    first, heads, *rows = done.stdout.splitlines()

    assert ("", 0) == (done.stderr, done.returncode)
    assert first.startswith(f"{mounted.path}: served by process {mounted.server} for 0:00:")
    assert first.endswith(f"regions {mounted.region}, devices binder hwbinder vndbinder, 1 transactions")
    assert ["PID", "NAME", "CONTEXT", "THREADS", "NODES", "REFS", "BUFFERS", "BYTES"] == heads.split()
    assert [str(talk.client.pid), str(talk.manager.pid)] == [row.split()[0] for row in rows]
    assert {len(heads)} == {len(row) for row in rows}


def test_status_of_a_mount_that_shows_no_logs(mount_binderfs: Callable[..., Mounted]) -> None:
    """The server is asked, not the mount."""
    mounted = mount_binderfs("stats=unset")
    with (mounted.path / "binder").open("rb+", buffering=0):
        (report,) = _reports(mounted.path)

    assert [os.getpid()] == [client["pid"] for client in report["clients"]]


def test_status_shows_every_mount(mount_binderfs: Callable[..., Mounted]) -> None:
    """Without a mount point, all there are, each once."""
    one, other = mount_binderfs(), mount_binderfs()
    bound = one.path.parent / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", one.path, bound], check=True)
    try:
        servers = [report["pid"] for report in _reports() if "pid" in report]
    finally:
        subprocess.run(["umount", bound], check=True)

    assert [1, 1] == [servers.count(mounted.server) for mounted in (one, other)]


def test_a_part_of_a_mount_leads_to_the_whole(mount_binderfs: Callable[..., Mounted], tmp_path: Path) -> None:
    """A device that is bound elsewhere has no server of its own: the mount's is asked, and shown once."""
    mounted = mount_binderfs()
    device = tmp_path / "device"
    device.touch()
    subprocess.run(["mount", "--bind", mounted.path / "binder", device], check=True)
    try:
        assert [mounted.server] == [report["pid"] for report in _reports(device)]
        assert [str(mounted.path)] == [
            report["mountpoint"] for report in _reports() if report["mountpoint"].startswith(str(tmp_path))
        ]
    finally:
        subprocess.run(["umount", device], check=True)


@pytest.mark.parametrize("command", [("status", "--interval", "0"), ("status", "--json"), ("graph", "--dot")])
def test_what_cannot_be_written_is_one_line(mount_binderfs: Callable[..., Mounted], command: tuple[str, ...]) -> None:
    """A full disk is an error as any other; who reads no further ends the command without a word."""
    mounted = mount_binderfs()
    arguments = [sys.executable, str(MOUNT), *command, str(mounted.path)]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert "mount.py: cannot write to standard output: No space left on device\n" == done.stderr
    assert 1 == done.returncode

    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)

    assert ("", -signal.SIGPIPE) == (done.stderr, done.returncode)


def test_a_picture_that_cannot_be_written_is_one_line(mount_binderfs: Callable[..., Mounted]) -> None:
    """It names the file."""
    mounted = mount_binderfs()
    done = mount_py("graph", "--dot", mounted.path, "--output", mounted.path)

    assert f"mount.py: cannot write {mounted.path}: Is a directory\n" == done.stderr
    assert 1 == done.returncode


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "1e9", "soon"])
def test_an_interval_is_a_time_to_wait(seconds: str) -> None:
    """What is none is a mistake in the command line."""
    done = mount_py("status", "--interval", seconds)

    assert 2 == done.returncode
    assert "argument --interval: invalid" in done.stderr


def test_names_need_not_be_text(mount_binderfs: Callable[..., Mounted]) -> None:
    """Devices may be called anything; a byte of a name that is no text comes out as its number."""
    mounted = mount_binderfs()
    with (mounted.path / "binder-control").open("rb", buffering=0) as control:
        fcntl.ioctl(control, uapi.BINDER_CTL_ADD, bytearray(uapi.binderfs_device.pack(b"\xff", 0, 0)))
    with Path(os.fsdecode(os.fsencode(mounted.path) + b"/\xff")).open("rb+", buffering=0):
        done = mount_py("status", mounted.path)

        assert ("", 0) == (done.stderr, done.returncode)
        assert r"\xff" in done.stdout.splitlines()[-1]
        assert r'label="\\xff"' in mount_py("graph", "--dot", mounted.path).stdout


def test_status_of_a_dead_server(mount_binderfs: Callable[..., Mounted]) -> None:
    """It says that nobody answers, and what to do, with status 1."""
    mounted = mount_binderfs()
    os.kill(mounted.server, signal.SIGKILL)
    done = mount_py("status", mounted.path)

    assert 1 == done.returncode
    assert f"{mounted.path}: no answer (" in done.stdout
    assert f"`mount.py -u {mounted.path}`" in done.stdout

    mounted.unmount()


def test_status_of_a_stopped_server(mount_binderfs: Callable[..., Mounted]) -> None:
    """It does not wait for ever."""
    mounted = mount_binderfs()
    server = mounted.server
    os.kill(server, signal.SIGSTOP)
    try:
        done = mount_py("status", mounted.path)
    finally:
        os.kill(server, signal.SIGCONT)

    assert 1 == done.returncode
    assert f"{mounted.path}: no answer (its server does not answer)" in done.stdout


def test_status_of_a_covered_mount(mount_binderfs: Callable[..., Mounted]) -> None:
    """It is said to be that, and nothing is wrong with it; what covers it is not asked in its place."""
    mounted = mount_binderfs()
    path = mounted.path
    said = "covered by another mount (No such file or directory)"
    # In a mount namespace of its own, since others may look for mounts.
    cover = ["unshare", "--mount", "--propagation", "private", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
    for place in (path.parent, path):
        command = [*cover, str(place), sys.executable, str(MOUNT), "status", "--interval", "0", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (report,) = (report for report in json.loads(done.stdout) if report["mountpoint"] == str(path))

        assert (said, False) == (report["error"], report["dead"])

    command = [*cover, str(path.parent), sys.executable, str(MOUNT), "status", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (f"{path}: {said}\n", "", 0) == (done.stdout, done.stderr, done.returncode)

    other = mount_binderfs()
    script = f"mount --move {other.path} {path} && {MOUNT} status --json --interval 0"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False)
    reports = [report for report in json.loads(done.stdout) if report["mountpoint"] == str(path)]

    assert {other.server, None} == {report.get("pid") for report in reports}


def test_a_bound_place_tells_where_the_last_one_is_covered(mount_binderfs: Callable[..., Mounted]) -> None:
    """A mount that can be asked somewhere is asked there."""
    mounted = mount_binderfs()
    bound = mounted.path.parent / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", mounted.path, bound], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", bound], check=True)
    try:
        found = [report for report in _reports("--interval", "0") if report.get("pid") == mounted.server]
    finally:
        subprocess.run(["umount", bound], check=True)
        subprocess.run(["umount", bound], check=True)

    assert [str(mounted.path)] == [report["mountpoint"] for report in found]


def test_what_has_just_been_unmounted_is_left_out(mount_binderfs: Callable[..., Mounted]) -> None:
    """It was there when the table was read, and is nothing to worry about."""
    mounted = mount_binderfs()
    mount = mounting.mount_at(mounted.path)

    assert mount

    mounted.unmount()

    assert [] == collect([[mount]], 0)


def test_the_picture_in_graphvizs_language(mounted: Mounted, talk: Talk) -> None:
    """The manager holds the client's node, and the client calls the manager."""
    done = mount_py("graph", "--dot", mounted.path)

    assert ("", 0) == (done.stderr, done.returncode)
    assert 1 == done.stdout.count('[label="handle 1"]')
    assert 1 == done.stdout.count("label=calls")
    assert f"\\n{talk.client.pid}" in done.stdout
    assert 'label="manager"' in done.stdout


@pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed")
def test_the_picture_is_svg(mounted: Mounted, talk: Talk, tmp_path: Path) -> None:
    """With both processes in it."""
    file = tmp_path / "picture.svg"
    done = mount_py("graph", mounted.path, "--output", file)
    text = " ".join(ET.fromstring(file.read_text()).itertext())

    assert ("", "", 0) == (done.stdout, done.stderr, done.returncode)
    assert str(talk.client.pid) in text
    assert str(talk.manager.pid) in text


def test_drawing_without_graphviz(mount_binderfs: Callable[..., Mounted], tmp_path: Path) -> None:
    """It says what to install, and what goes without."""
    mounted = mount_binderfs()
    done = mount_py("graph", mounted.path, env=os.environ | {"PATH": str(tmp_path)})

    assert "mount.py: drawing takes Graphviz: install the package graphviz, or use --dot\n" == done.stderr
    assert ("", 1) == (done.stdout, done.returncode)


def test_without_a_mount_point_there_must_be_one_mount(mount_binderfs: Callable[..., Mounted]) -> None:
    """Otherwise it is for the user to choose."""
    paths = [mount_binderfs().path for _ in range(2)]
    done = mount_py("graph", "--dot")

    assert 1 == done.returncode
    assert done.stderr.startswith("mount.py: which one? There are ")
    assert all(str(path) in done.stderr for path in paths)
