import errno
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from binderfs_fuse import uapi
from binderfs_fuse.fuse import mounting
from binderfs_fuse.fuse.channel import plain
from binderfs_fuse.fuse.lane import Lane
from binderfs_fuse.host.region import SIZE, Kind
from tests.fuse.conftest import Served, descriptors, until

Serve = Callable[..., Served]


def _statfs(served: Served) -> str:
    """Ask for the figures of the file system; return what that failed with."""
    found = subprocess.run(["stat", "-f", served.mountpoint], capture_output=True, text=True, check=False)
    return found.stderr


def test_what_no_open_needs_reaches_the_tree(served: Served) -> None:
    """STATFS goes to the tree, and its answers to the client."""
    assert os.strerror(errno.ENOSYS) in _statfs(served)
    assert uapi.FUSE_STATFS in served.tree.opcodes


def test_what_every_open_needs_does_not_reach_the_tree(served: Served) -> None:
    """A device is looked up, opened, called and closed, and an error is told, without another thread's help."""
    assert ["first 0", "second EINTR"] == served.run("signalled")
    assert served.size() is not None
    assert served.size("no such") is None
    assert "No such file or directory" in served.complaint
    assert [uapi.FUSE_INIT] == served.tree.opcodes


def test_directories_are_not_for_one_at_a_time(served: Served) -> None:
    """The kernel lets many processes look something up in a directory at once, and waits for all of their answers."""
    asked: dict[int, bytes] = {}

    def serve_later(lane: Lane) -> None:
        asked[lane.fields.unique] = lane.message[uapi.fuse_in_header.size : lane.fields.length]

    served.size()
    handlers = served.channel._handlers
    serve = handlers[uapi.FUSE_LOOKUP]
    handlers[uapi.FUSE_LOOKUP] = serve_later
    names = [f"nobody{number}" for number in range(3)]
    askers = [
        subprocess.Popen(["stat", served.mountpoint / name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in names
    ]
    try:
        until(lambda: len(asked) == len(names))
    finally:
        handlers[uapi.FUSE_LOOKUP] = serve
        for unique in asked:
            served.channel.answer(plain(unique, -errno.ENOENT))
        for asker in askers:
            asker.wait(20)

    assert {f"{name}\0".encode() for name in names} == set(asked.values())


def test_splicing_is_not_offered(served: Served) -> None:
    """The tree's end is a socket, and so it hears nothing of splicing, of a write-back cache, or of longer messages."""
    served.size()

    assert served.tree.offered is not None
    flags, _ = served.tree.offered
    assert not flags & (uapi.FUSE_SPLICE_READ | uapi.FUSE_SPLICE_WRITE | uapi.FUSE_SPLICE_MOVE)
    assert not flags & (uapi.FUSE_WRITEBACK_CACHE | uapi.FUSE_MAX_PAGES)
    assert flags & uapi.FUSE_ASYNC_READ


def test_the_kind_of_region_follows_the_kernel(serve: Serve) -> None:
    """With no wish of the user, memory is passed through where the kernel does that, which is tried at INIT."""
    served = serve()
    served.size()

    assert served.plane.kind is Kind.PASSTHROUGH


def test_what_comes_before_the_kind_of_region_is_known_waits(served: Served) -> None:
    """The kernel looks things up as soon as INIT is answered; what can be passed through is tried only then."""
    channel = served.channel
    served.run("version", "1")
    until(lambda: not served.engine.processes)
    channel._settled.clear()
    leader = channel.crew.leader
    assert leader is not None
    before = leader.fields.unique
    with subprocess.Popen(["stat", served.mountpoint / "binder"], stdout=subprocess.DEVNULL) as asker:
        until(lambda: leader.fields.unique != before and leader.fields.opcode == uapi.FUSE_LOOKUP)
        assert asker.poll() is None
        channel._settled.set()
        assert 0 == asker.wait(20)


def test_a_page_cache_can_be_asked_for(serve: Serve) -> None:
    """The user's wish for the page cache is heeded though the kernel could do better."""
    served = serve(region="pagecache")

    assert served.size() == SIZE
    assert served.plane.kind is Kind.PAGE_CACHE


def test_a_client_sees_what_is_stored_in_its_region(served: Served) -> None:
    """What is stored, and published where it has to be, is in the client's memory; the rest of it is zeros."""
    client = served.start("region")
    assert client.line() == "going"
    (opened,) = served.plane.opens.values()

    for page in (0, 3, 7):
        opened.region.populate(page * 4096, 1)
        opened.region.store(page * 4096, bytes([page + 1]))
        if opened.region.kind is Kind.PAGE_CACHE:
            assert opened.region.publish(served.channel.core, page * 4096, 1) == 0

    assert client.ask() == "0100000400000008"
    assert client.ask() == "0100000400000008"


def test_a_page_that_is_stored_anew_is_seen_anew(served: Served) -> None:
    """A page that the client has touched already shows later contents too."""
    client = served.start("region")
    assert client.line() == "going"
    (opened,) = served.plane.opens.values()
    assert client.ask() == "0000000000000000"

    opened.region.populate(4096, 1)
    opened.region.store(4096, b"\x77")
    if opened.region.kind is Kind.PAGE_CACHE:
        opened.region.publish(served.channel.core, 4096, 1)

    assert client.ask() == "0077000000000000"


def test_each_open_has_a_region_of_its_own(served: Served) -> None:
    """Two opens of one name do not share pages."""
    first, second = served.start("region"), served.start("region")
    assert [first.line(), second.line()] == ["going", "going"]
    opened = next(opened for opened in served.plane.opens.values() if opened.identity.pid == first.pid)

    opened.region.populate(0, 1)
    opened.region.store(0, b"\x11")
    if opened.region.kind is Kind.PAGE_CACHE:
        opened.region.publish(served.channel.core, 0, 1)

    assert first.ask() == "1100000000000000"
    assert second.ask() == "0000000000000000"


def test_the_descriptor_of_a_region_is_not_kept(served: Served) -> None:
    """An open costs no descriptor once it has been answered."""
    before = descriptors()
    clients = [served.start("region") for _ in range(4)]
    assert [client.line() for client in clients] == ["going"] * 4
    own = 2 * len(clients)  # the pipes to them

    until(lambda: descriptors() == before + own)


def test_a_notification_of_the_tree_reaches_the_kernel(served: Served, logs: object) -> None:
    """What the tree says unasked is passed on, and the kernel's refusal of it harms nobody."""
    del logs
    payload = uapi.fuse_notify_inval_inode_out.pack(12345, 0, 0)
    served.tree.send(uapi.fuse_out_header.pack(16 + len(payload), uapi.FUSE_NOTIFY_INVAL_INODE, 0) + payload)

    assert served.run("version", "1") == ["version 0", "8"]


def test_unmounting_ends_it(serve: Serve) -> None:
    """When the mount is gone, so are the channel's threads, and the tree hears the end."""
    served = serve()
    served.size()
    mounting.system_umount(served.mountpoint)

    assert served.channel.closed.wait(20)
    served.channel.stop()
    served.tree.join()
    names = {thread.name for thread in threading.enumerate()}
    assert not {name for name in names if name.startswith("binder-")}


def test_a_dead_connection_is_an_error_for_its_clients(serve: Serve) -> None:
    """When the server aborts, a client that waits gets an error at once, and so does whoever comes later."""
    served = serve()
    client = served.start("wait")
    assert [client.line(), client.line()] == ["first 0", "going"]
    until(lambda: served.plane._parked)

    mounting.system_umount(served.mountpoint, 1 | mounting.MNT_DETACH)

    assert client.line() in ("second ECONNABORTED", "second ENOTCONN", "second ENODEV", "second EIO")


def test_a_tree_that_has_left_is_an_error_for_its_clients(serve: Serve) -> None:
    """Requests for a tree that has hung up fail; devices go on."""
    served = serve()
    client = served.start("wait")
    assert [client.line(), client.line()] == ["first 0", "going"]
    served.tree.leave()

    assert os.strerror(errno.ENODEV) in _statfs(served)
    assert ["version 0", "8"] == served.run("version", "1")


def test_the_idle_watcher_sleeps(serve: Serve) -> None:
    """With no requests, no thread of the server wakes up: all context switches come to an end."""
    served = serve()
    served.size()

    def switches() -> int:
        others = [task for task in Path("/proc/self/task").iterdir() if task.name != str(threading.get_native_id())]
        lines = [line for task in others for line in (task / "status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

    pause = threading.Event()

    def settled() -> bool:
        before = switches()
        pause.wait(0.1)
        return before == switches()

    until(settled)
