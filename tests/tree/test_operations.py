"""The tree's operations, called as pyfuse3 calls them, with an engine and without a mount."""

import errno
import itertools
import os
import resource
import stat
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import trio
from pyfuse3 import RENAME_EXCHANGE, RENAME_NOREPLACE, ROOT_INODE, EntryAttributes, FUSEError

from binderfs_fuse import uapi
from binderfs_fuse.engine.context import Context, Engine
from binderfs_fuse.fuse import texts
from binderfs_fuse.fuse.inodes import FEATURES, MAJOR
from binderfs_fuse.fuse.settings import Settings
from binderfs_fuse.fuse.tree import Tree
from binderfs_fuse.host.region import SIZE, Kind
from binderfs_fuse.limits import Limits

CTX: Any = SimpleNamespace(pid=100, uid=0, gid=0)


class Plane:
    """A device plane that opens engine processes, and records what else it is told."""

    def __init__(self) -> None:
        """Begin with nothing open."""
        self.kind = Kind.PASSTHROUGH
        self.processes: dict[int, Any] = {}
        self.controls: dict[int, Callable[..., tuple[int, bytes]]] = {}

    def open(self, handle: int, inode: int, context: Context, tid: int, uid: int, flags: int) -> Any:
        """Open for a process whose id is the thread's."""
        del inode, flags
        if tid == 0:
            raise OSError(errno.EPERM, "no such caller")
        process = context.open(tid, uid, SimpleNamespace())
        self.processes[handle] = process
        return SimpleNamespace(process=process)

    def find_mappings(self) -> None:
        """Nothing is mapped."""

    def wake(self) -> None:
        """Nobody waits."""

    def release(self, handle: int) -> None:
        """Drop the process, as the end of its release step would."""
        process = self.processes.pop(handle, None)
        if process is not None:
            del process.engine.processes[process]
        self.controls.pop(handle, None)

    def register_control(self, handle: int, handler: Callable[..., tuple[int, bytes]]) -> None:
        """Record it."""
        self.controls[handle] = handler


class Entry(NamedTuple):
    """What LOOKUP answers."""

    st_ino: int
    generation: int
    entry_timeout: int
    attr_timeout: int
    entry_timeout_ns: int
    attr_timeout_ns: int
    attr_ino: int
    st_size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    st_mode: int
    st_nlink: int
    st_uid: int
    st_gid: int
    rdev: int
    st_blksize: int
    flags: int


class Mounted:
    """A tree and what it is used with."""

    def __init__(self, **settings: Any) -> None:
        """Make one with these settings."""
        self.engine = Engine(time.monotonic_ns, limits=Limits(**settings.pop("limits", {})))
        self.plane = Plane()
        self.tree = Tree(self.engine, self.plane, Settings(**settings))
        self.inodes = self.tree.inodes
        self._reads = itertools.count(1)
        self._answers: dict[int, tuple[int, bytes]] = {}
        # A text is made at once, by whoever asks for it.
        self.tree.texts.attach(lambda job, *arguments: job(*arguments), self._answer)

    def _answer(self, unique: int, error: int, data: bytes) -> None:
        self._answers[unique] = error, data

    def read_part(self, handle: int, offset: int, size: int) -> bytes:
        """Read a part of an open log, as the channel does; raises `OSError`."""
        unique = next(self._reads)
        error, data = self.tree.texts.read(unique, handle, offset, size) or self._answers.pop(unique)
        if error:
            raise OSError(-error, os.strerror(-error))
        return data

    def look_up(self, parent: int, name: bytes, uid: int = 0) -> Entry:
        """Find a name in a directory, as the channel does."""
        return Entry(*uapi.fuse_entry_out.unpack_from(self.inodes.look_up(parent, name, uid)))

    def attributes(self, inode: int) -> Entry:
        """Return what stat shows of an inode."""
        timeout, _, *attributes = uapi.fuse_attr_out.unpack_from(self.inodes.attributes(inode))
        return Entry(inode, 0, 0, timeout, 0, 0, *attributes)

    def find(self, path: str) -> Entry:
        """Look a path up, name by name."""
        entry = self.attributes(ROOT_INODE)
        for name in filter(None, path.split("/")):
            entry = self.look_up(entry.st_ino, os.fsencode(name))
        return entry

    def open(self, path: str, pid: int = 100, flags: int = os.O_RDWR, uid: int = 0) -> int:
        """Look a path up and open it as this process; return the handle."""
        return self.inodes.open(self.find(path).st_ino, flags, pid, uid)[0]

    def read(self, path: str) -> str:
        """Return all of a file's text, read in pieces of 100 bytes."""
        handle = self.open(path)
        text = b""
        while part := self.read_part(handle, len(text), 100):
            text += part
        self.inodes.release(handle)
        return text.decode()

    async def names(self, path: str, monkeypatch: pytest.MonkeyPatch, room: int = 1 << 20) -> list[str]:
        """List a directory, getting `room` entries at a time."""
        names: list[str] = []
        handle = await self.tree.opendir(self.find(path).st_ino, CTX)
        offset = 0
        while True:
            taken: list[tuple[bytes, int]] = []

            def reply(_token: object, name: bytes, _entry: object, offset: int, taken: Any = taken) -> bool:
                if len(taken) == room:
                    return False
                taken.append((name, offset))
                return True

            monkeypatch.setattr("pyfuse3.readdir_reply", reply)
            await self.tree.readdir(handle, offset, SimpleNamespace())  # type: ignore[arg-type]
            if not taken:
                await self.tree.releasedir(handle)
                return names
            names += [name.decode() for name, _ in taken]
            offset = taken[-1][1]

    def add(self, name: bytes) -> tuple[int, int, int]:
        """Add a device; return errno, major and minor number, the latter 0 where nothing was copied out."""
        error, answer = self.inodes.add(uapi.binderfs_device.pack(name, 0, 0))
        _, major, minor = uapi.binderfs_device.unpack(answer) if answer else (b"", 0, 0)
        return -error, major, minor


@pytest.fixture
def mounted() -> Mounted:
    """A tree with the usual settings."""
    return Mounted()


def _refused(function: Callable[..., object], *arguments: object) -> int:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its number is looked at
        function(*arguments)
    assert caught.value.errno is not None
    return caught.value.errno


async def _error(operation: Any) -> int:
    with pytest.raises(FUSEError) as caught:
        await operation
    return caught.value.errno


@pytest.mark.trio
async def test_the_first_names_come_newest_first(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing has the order of the kernel's: dots, then what was made last."""
    assert [".", "..", "binder_logs", "features", "vndbinder", "hwbinder", "binder", "binder-control"] == (
        await mounted.names("", monkeypatch)
    )


@pytest.mark.trio
async def test_a_listing_in_parts_is_the_whole(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an answer has room for few entries, the next goes on after them."""
    assert await mounted.names("binder_logs", monkeypatch) == await mounted.names("binder_logs", monkeypatch, room=3)


@pytest.mark.trio
async def test_a_listing_goes_on_where_it_was(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that come while a directory is read are not listed, and those that go are not either; nothing is kept."""
    handle = await mounted.tree.opendir(ROOT_INODE, CTX)
    names: list[str] = []
    offset = 0

    def reply(_token: object, name: bytes, _entry: object, following: int) -> bool:
        nonlocal offset
        if len(names) == room:
            return False
        names.append(name.decode())
        offset = following
        return True

    monkeypatch.setattr("pyfuse3.readdir_reply", reply)
    room = 4
    await mounted.tree.readdir(handle, offset, SimpleNamespace())  # type: ignore[arg-type]
    mounted.add(b"new")
    await mounted.tree.unlink(ROOT_INODE, b"hwbinder", CTX)
    room = 100
    await mounted.tree.readdir(handle, offset, SimpleNamespace())  # type: ignore[arg-type]
    await mounted.tree.releasedir(handle)

    assert [".", "..", "binder_logs", "features", "vndbinder", "binder", "binder-control"] == names


@pytest.mark.trio
async def test_listing_takes_back_the_inode_that_did_not_fit(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel holds an inode for each entry it got, and none besides."""
    before = len(mounted.inodes._inodes)
    await mounted.names("", monkeypatch, room=4)

    assert before + 3 == len(mounted.inodes._inodes)


def test_every_lookup_of_a_device_gives_a_fresh_inode(mounted: Mounted) -> None:
    """Two walks to a device end at different inodes, which are not to be kept for a third."""
    first, second = mounted.find("binder"), mounted.find("binder")

    assert first.st_ino != second.st_ino
    assert (0, 0) == (first.entry_timeout, first.attr_timeout)
    assert stat.S_IFREG | 0o600 == first.st_mode


def test_an_inode_is_one_open_at_a_time(mounted: Mounted, logs: Any) -> None:
    """A device that is reached by an inode that is open, as by a bind mount of it alone, is busy until it is closed."""
    logs.expect("binder was opened once more by a way that is good for one open at a time.*EBUSY")
    inode = mounted.find("binder").st_ino
    first, _ = mounted.inodes.open(inode, os.O_RDWR, 100, 0)
    for _ in range(2):
        assert errno.EBUSY == _refused(mounted.inodes.open, inode, os.O_RDWR, 100, 0)
    assert mounted.open("binder")

    mounted.inodes.release(first)
    assert first < mounted.inodes.open(inode, os.O_RDWR, 100, 0)[0]


def test_other_things_keep_their_inodes(mounted: Mounted) -> None:
    """What is no device has one inode, with the number that it has in the kernel's first mount."""
    numbers = [mounted.find(path).st_ino for path in ("", "binder-control", "features", "binder_logs/state")]

    assert [1, 2, 1048580, 1048586] == numbers
    assert 0 < mounted.find("features").entry_timeout


def test_forget_takes_a_devices_inode_back(mounted: Mounted) -> None:
    """When the kernel's last hold is gone, the number means nothing any more."""
    inode = mounted.find("binder").st_ino
    mounted.inodes.forget(inode, 1)
    mounted.inodes.forget(ROOT_INODE, 5)

    assert errno.ESTALE == _refused(mounted.attributes, inode)


def test_a_region_in_the_page_cache_has_a_size(mounted: Mounted) -> None:
    """There, what is mapped ends with the file."""
    mounted.plane.kind = Kind.PAGE_CACHE

    assert SIZE == mounted.find("binder").st_size


def test_a_device_has_a_size_while_it_is_open(mounted: Mounted) -> None:
    """By its name it shows none, as the driver's does; but some look at an open file's size before they map it."""
    entry = mounted.find("binder")

    assert 0 == entry.st_size

    mounted.inodes.open(entry.st_ino, os.O_RDWR, 100, 0)

    assert SIZE == mounted.attributes(entry.st_ino).st_size
    assert 0 == mounted.find("binder").st_size


@pytest.mark.trio
async def test_attributes_belong_to_the_device(mounted: Mounted) -> None:
    """What setattr does to one inode of a device shows in the others, those that are there and those to come."""
    one, other = mounted.find("binder"), mounted.find("binder")
    change = EntryAttributes()
    change.st_mode, change.st_uid, change.st_gid = 0o100666, 7, 8
    fields: Any = SimpleNamespace(
        update_size=False,
        update_mode=True,
        update_uid=True,
        update_gid=True,
        update_atime=False,
        update_mtime=False,
        update_ctime=False,
    )
    await mounted.tree.setattr(one.st_ino, change, fields, None, CTX)

    for entry in (mounted.attributes(other.st_ino), mounted.find("binder")):
        assert (0o100666, 7, 8) == (entry.st_mode, entry.st_uid, entry.st_gid)
    assert 0o100600 == mounted.find("hwbinder").st_mode


def test_everything_belongs_to_who_mounted() -> None:
    """But for devices that the options give to others."""
    plain = Tree(Engine(time.monotonic_ns), Plane(), Settings(), (1000, 1001))
    given = Tree(Engine(time.monotonic_ns), Plane(), Settings(gid=7), (1000, 1001))

    assert {(1000, 1001)} == {(node.uid, node.gid) for node in (plain.inodes.root, *plain.inodes.root.names.values())}
    assert (1000, 7) == (given.inodes.root.names[b"binder"].uid, given.inodes.root.names[b"binder"].gid)


@pytest.mark.trio
async def test_an_added_device_has_the_lowest_free_minor(mounted: Mounted) -> None:
    """Numbers go up from those of the first devices, and one that was given back comes first."""
    assert [(0, MAJOR, 4), (0, MAJOR, 5)] == [mounted.add(b"a"), mounted.add(b"b")]
    await mounted.tree.unlink(ROOT_INODE, b"a", CTX)

    assert (0, MAJOR, 4) == mounted.add(b"c")


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/"])
def test_names_that_no_file_can_have(mounted: Mounted, name: bytes) -> None:
    """They are refused with EACCES, after numbers have been written, and no number is used up."""
    assert (errno.EACCES, MAJOR, 4) == mounted.add(name)
    assert (0, MAJOR, 4) == mounted.add(b"fine")


@pytest.mark.parametrize("name", [b"binder", b"binder-control", b"features", b"binder_logs"])
def test_names_that_are_taken(mounted: Mounted, name: bytes) -> None:
    """A name that is there, whatever it is, is refused with EEXIST."""
    assert (errno.EEXIST, MAJOR, 4) == mounted.add(name)


@pytest.mark.parametrize("name", [b"n" * 255, b"\xff\xfe", b"a b\n", b"..."])
def test_names_are_bytes(mounted: Mounted, name: bytes) -> None:
    """Any other bytes make a name, found again as they are."""
    assert 0 == mounted.add(name)[0]
    assert 0o100600 == mounted.look_up(ROOT_INODE, name).st_mode


def test_a_name_ends_at_the_first_nul_or_after_255_bytes(mounted: Mounted) -> None:
    """What is behind is not looked at."""
    assert 0 == mounted.add(b"one\0two")[0]
    assert 0 == mounted.add(b"n" * 256)[0]
    assert {b"one", b"n" * 255} <= mounted.inodes.root.names.keys()


@pytest.mark.trio
async def test_max_limits_devices_that_exist_or_are_open() -> None:
    """An unlinked device counts until it is closed, as it keeps its minor number."""
    mounted = Mounted(maximum=4)

    assert 0 == mounted.add(b"a")[0]
    assert (errno.ENOSPC, 0, 0) == mounted.add(b"b")

    handle = mounted.open("a")
    await mounted.tree.unlink(ROOT_INODE, b"a", CTX)

    assert errno.ENOSPC == mounted.add(b"b")[0]

    mounted.inodes.release(handle)

    assert (0, MAJOR, 4) == mounted.add(b"b")


def test_a_lowered_max_takes_nothing_away() -> None:
    """A remount may go below what there is; only new devices are refused."""
    mounted = Mounted()
    mounted.inodes.maximum = 1

    assert b"vndbinder" in mounted.inodes.root.names
    assert errno.ENOSPC == mounted.add(b"a")[0]


def test_max_must_have_room_for_the_first_devices() -> None:
    """A mount with fewer is refused with ENOSPC."""
    with pytest.raises(OSError, match="No space left") as caught:
        Tree(Engine(time.monotonic_ns), Plane(), Settings(maximum=2))

    assert errno.ENOSPC == caught.value.errno


@pytest.mark.trio
async def test_a_device_gone_between_lookup_and_open_is_stale(mounted: Mounted) -> None:
    """The kernel then walks anew, and finds no name."""
    inode = mounted.find("hwbinder").st_ino
    await mounted.tree.unlink(ROOT_INODE, b"hwbinder", CTX)

    assert 0 == mounted.attributes(inode).st_nlink
    assert errno.ESTALE == _refused(mounted.inodes.open, inode, os.O_RDWR, 100, 0)


@pytest.mark.trio
async def test_an_unlinked_device_serves_those_who_have_it_open(mounted: Mounted) -> None:
    """Its context stays, and it is another one than that of a new device of the name."""
    handle = mounted.open("hwbinder")
    await mounted.tree.unlink(ROOT_INODE, b"hwbinder", CTX)
    mounted.add(b"hwbinder")
    other = mounted.open("hwbinder")
    old, new = (mounted.plane.processes[number].context for number in (handle, other))

    assert old is not new

    mounted.inodes.release(handle)

    assert new is mounted.engine.contexts["hwbinder"]


def test_an_error_of_the_device_plane_is_the_opens(mounted: Mounted) -> None:
    """What cannot be opened is not open."""
    inode = mounted.find("binder").st_ino

    assert errno.EPERM == _refused(mounted.inodes.open, inode, os.O_RDWR, 0, 0)
    assert {} == mounted.inodes._open
    assert mounted.inodes.open(inode, os.O_RDWR, 100, 0)


def test_a_device_goes_when_its_last_open_cannot_be_made(mounted: Mounted) -> None:
    """While an open is being made, it keeps an unlinked device and its minor number; when that fails, both are gone."""
    inode = mounted.find("binder").st_ino
    inodes = mounted.inodes

    def fail(*_: object) -> Any:
        inodes.drop(inodes.root.detach(b"binder"))
        assert (0, MAJOR, 4) == mounted.add(b"during")
        raise OSError(errno.ENOMEM, "no memory")

    mounted.plane.open = fail  # type: ignore[assignment, method-assign]

    assert errno.ENOMEM == _refused(inodes.open, inode, os.O_RDWR, 100, 0)
    assert (0, MAJOR, 1) == mounted.add(b"after")


@pytest.mark.trio
async def test_a_process_log_belongs_to_a_process_first_open(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with it and goes with it, though there be another one, as in the kernel."""
    first = mounted.open("binder", 45)
    second = mounted.open("hwbinder", 45)
    mounted.open("binder", 46)

    assert [".", "..", "46", "45"] == await mounted.names("binder_logs/proc", monkeypatch)

    mounted.inodes.release(first)

    assert [".", "..", "46"] == await mounted.names("binder_logs/proc", monkeypatch)

    third = mounted.open("binder", 45)
    mounted.inodes.release(second)
    mounted.inodes.release(third)
    mounted.open("binder", 45)

    assert [".", "..", "45", "46"] == await mounted.names("binder_logs/proc", monkeypatch)


@pytest.mark.trio
async def test_a_process_log_takes_nobodys_name(mounted: Mounted) -> None:
    """Where a device was moved to the name of a process's log, it stays, and there is no such log."""
    proc = mounted.find("binder_logs/proc").st_ino
    mounted.add(b"moved")
    await mounted.tree.rename(ROOT_INODE, b"moved", proc, b"45", 0, CTX)
    handle = mounted.open("binder", 45)
    device = mounted.look_up(proc, b"45")
    mounted.inodes.release(handle)

    assert stat.S_IFREG | 0o600 == device.st_mode
    assert device.st_mode == mounted.look_up(proc, b"45").st_mode


def test_a_process_logs_attributes_are_not_kept(mounted: Mounted) -> None:
    """The kernel asks anew each time, since it is not told when the process goes."""
    mounted.open("binder", 45)

    assert 0 == mounted.find("binder_logs/proc/45").attr_timeout
    assert 0 < mounted.find("binder_logs/state").attr_timeout


def test_a_process_log_can_be_read_on_when_its_process_is_gone(mounted: Mounted) -> None:
    """Who has it open keeps the text and an inode without names."""
    device = mounted.open("binder", 45)
    inode = mounted.find("binder_logs/proc/45").st_ino
    log = mounted.open("binder_logs/proc/45")
    start = mounted.read_part(log, 0, 18)
    mounted.inodes.release(device)

    assert b"binder proc state:" == start
    assert b"\nproc 45\ncontext binder\n" == mounted.read_part(log, 18, 100)
    assert 0 == mounted.attributes(inode).st_nlink


def test_a_text_is_kept_until_it_has_been_read(mounted: Mounted) -> None:
    """After the end there is nothing more, nothing is kept for that, and what was there before can be read again."""
    log = mounted.open("binder_logs/state")
    mounted.read_part(log, 0, 8)
    assert {0: 14} == mounted.tree.texts.bytes_of
    assert b"state:\n" == mounted.read_part(log, 7, 100)
    assert not mounted.tree.texts.bytes_of

    assert b"" == mounted.read_part(log, 14, 100)
    assert b"state" == mounted.read_part(log, 7, 5)
    mounted.inodes.release(log)
    assert not mounted.tree.texts.bytes_of


def test_nobody_keeps_too_many_texts() -> None:
    """One text a user may have always, more only up to a limit: ENOMEM; other users have their own."""
    mounted = Mounted(limits={"user_log_bytes": 30})
    logs = [mounted.open("binder_logs/state") for _ in range(3)]
    logs.append(mounted.open("binder_logs/state", uid=7))
    for log in (logs[0], logs[1], logs[3]):
        assert b"binder" == mounted.read_part(log, 0, 6)
    with pytest.raises(OSError, match="memory") as refused:
        mounted.read_part(logs[2], 0, 6)
    mounted.engine.quota.log_bytes.most = 1
    mounted.inodes.release(logs[0])
    mounted.inodes.release(logs[1])

    assert errno.ENOMEM == refused.value.errno
    assert b"binder" == mounted.read_part(logs[2], 0, 6)


def test_all_users_keep_no_more_than_a_total() -> None:
    """Where all have so much that nothing is left, even the first text of a user is refused; nor is one too long."""
    mounted = Mounted(limits={"log_bytes": 60})
    readers = [mounted.open("binder_logs/state", uid=uid) for uid in range(5)]
    for handle in readers[:4]:
        assert b"binder" == mounted.read_part(handle, 0, 6)
    with pytest.raises(OSError, match="memory"):
        mounted.read_part(readers[4], 0, 6)
    mounted.inodes.release(readers[0])

    assert b"binder" == mounted.read_part(readers[4], 0, 6)

    for handle in readers[1:]:
        mounted.inodes.release(handle)

    assert (0, {}) == (mounted.engine.quota.log_bytes.held, mounted.tree.texts.bytes_of)
    mounted.open("binder", 45)
    with pytest.raises(OSError, match="memory"):
        mounted.read_part(mounted.open("binder_logs/state"), 0, 6)


def test_a_text_is_taken_anew_from_the_start_only(mounted: Mounted) -> None:
    """Reads that go on are served from the text that the first one saw."""
    log = mounted.open("binder_logs/state")
    assert b"bin" == mounted.read_part(log, 0, 3)
    mounted.open("binder", 45)

    assert b"der state:\n" == mounted.read_part(log, 3, 1000)
    assert b"binder state:\nproc 45\ncontext binder\n" == mounted.read_part(log, 0, 1000)


def test_every_log_has_its_own_text(mounted: Mounted) -> None:
    """Each file is the engine's log of that name."""
    mounted.open("binder", 45)
    texts = {
        "state": "binder state:\nproc 45\ncontext binder\n",
        "state_hashed": "binder state:\nproc 45\ncontext binder\n",
        "transactions": "binder transactions:\n",
        "transactions_hashed": "binder transactions:\n",
        "transaction_log": "",
        "failed_transaction_log": "",
        "proc/45": "binder proc state:\nproc 45\ncontext binder\n",
    }

    assert texts == {name: mounted.read(f"binder_logs/{name}") for name in texts}
    assert (mounted.read("binder_logs/stats")).startswith("binder stats:\nproc: active 1 total 1\n")


def test_a_long_text_does_not_keep_the_engine_locked(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two pieces of a text the engine is free."""
    free = []

    def pieces() -> Iterator[str]:
        yield from ("x" * 1000 for _ in range(3))

    lock = mounted.engine.lock

    class Watched:
        def __enter__(self) -> None:
            free.append(not lock.locked())
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    monkeypatch.setattr(mounted.engine, "lock", Watched())

    assert 3000 == len(mounted.tree.take(pieces))
    assert [True] * 5 == free


def test_a_long_text_lets_others_have_a_turn(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between pieces that took long it sleeps: to let go of the lock is not enough for those who wait to wake up."""
    monkeypatch.setattr(texts, "_TURN", 0)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    mounted.tree.take(lambda: iter("x" * 50))

    assert resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw >= before + 50


def test_features_are_on(mounted: Mounted) -> None:
    """Each is a file that says 1."""
    assert ["1\n"] * 4 == [mounted.read(f"features/{name}") for name in FEATURES]


@pytest.mark.trio
async def test_without_stats_there_are_no_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the kernel, binder_logs comes with stats=global only."""
    mounted = Mounted(stats=False)
    mounted.open("binder")

    assert "binder_logs" not in await mounted.names("", monkeypatch)


@pytest.mark.trio
async def test_only_devices_can_be_unlinked(mounted: Mounted) -> None:
    """Neither binder-control nor anything in a directory goes."""
    features = mounted.find("features").st_ino

    assert errno.EPERM == await _error(mounted.tree.unlink(ROOT_INODE, b"binder-control", CTX))
    assert errno.EPERM == await _error(mounted.tree.unlink(features, b"extended_error", CTX))
    assert errno.ENOENT == await _error(mounted.tree.unlink(ROOT_INODE, b"nothing", CTX))


@pytest.mark.trio
async def test_a_rename_replaces_a_device(mounted: Mounted) -> None:
    """The one in the way is gone, and its number free."""
    await mounted.tree.rename(ROOT_INODE, b"binder", ROOT_INODE, b"hwbinder", 0, CTX)

    assert errno.ENOENT == _refused(mounted.look_up, ROOT_INODE, b"binder")
    assert 2 == mounted.add(b"x")[2]


@pytest.mark.trio
async def test_rename_flags(mounted: Mounted) -> None:
    """NOREPLACE keeps what is there, EXCHANGE needs something there, and there are no others."""

    async def rename(to: bytes, flags: int) -> int:
        return await _error(mounted.tree.rename(ROOT_INODE, b"binder", ROOT_INODE, to, flags, CTX))

    assert errno.EEXIST == await rename(b"hwbinder", RENAME_NOREPLACE)
    assert errno.ENOENT == await rename(b"nothing", RENAME_EXCHANGE)
    assert errno.EINVAL == await rename(b"nothing", 4)
    assert errno.EPERM == await rename(b"binder-control", RENAME_EXCHANGE)


@pytest.mark.trio
async def test_exchange_keeps_both(mounted: Mounted) -> None:
    """Each has the other's name then."""
    devices = [mounted.inodes.root.names[name] for name in (b"binder", b"hwbinder")]
    await mounted.tree.rename(ROOT_INODE, b"binder", ROOT_INODE, b"hwbinder", RENAME_EXCHANGE, CTX)

    assert devices == [mounted.inodes.root.names[name] for name in (b"hwbinder", b"binder")]


@pytest.mark.trio
async def test_directories_count_their_directories(mounted: Mounted) -> None:
    """A directory has two links, and one for each directory in it, wherever that came from."""
    await mounted.tree.rename(ROOT_INODE, b"features", mounted.find("binder_logs").st_ino, b"f", 0, CTX)

    assert [3, 4, 2] == [mounted.find(path).st_nlink for path in ("", "binder_logs", "binder_logs/f")]


@pytest.mark.trio
async def test_a_read_only_tree_can_be_used(mounted: Mounted) -> None:
    """With ro, names and attributes stay; devices are opened and made all the same."""
    mounted = Mounted(read_only=True)

    assert errno.EROFS == await _error(mounted.tree.unlink(ROOT_INODE, b"binder", CTX))
    assert errno.EROFS == await _error(mounted.tree.rename(ROOT_INODE, b"binder", ROOT_INODE, b"b", 0, CTX))
    assert errno.EROFS == await _error(mounted.tree.unlink(ROOT_INODE, b"binder-control", CTX))
    assert errno.EROFS == await _error(mounted.tree.mkdir(ROOT_INODE, b"x", 0o755, CTX))
    assert mounted.open("binder")
    assert 0 == mounted.add(b"new")[0]


@pytest.mark.trio
async def test_a_remount_makes_read_only(mounted: Mounted) -> None:
    """With ro it is, and without again it is not; whether there are logs stays, or nothing changes."""
    tree = mounted.tree

    assert -errno.EINVAL == tree.inodes.reconfigure(9, stats=False, read_only=True)
    assert not tree.inodes.read_only
    assert 0 == tree.inodes.reconfigure(9, stats=True, read_only=True)
    assert (9, True) == (tree.inodes.maximum, tree.inodes.read_only)
    assert 0 == tree.inodes.reconfigure(9, stats=True, read_only=False)

    handle = mounted.open("binder")
    await tree.unlink(ROOT_INODE, b"binder", CTX)

    assert -errno.EBUSY == tree.inodes.reconfigure(9, stats=True, read_only=True)

    tree.inodes.release(handle)

    assert 0 == tree.inodes.reconfigure(9, stats=True, read_only=True)


@pytest.mark.trio
async def test_nothing_else_can_be_made(mounted: Mounted) -> None:
    """Each way of making something has the errno it has where a file system lacks it."""
    tree, root = mounted.tree, ROOT_INODE
    attempts = [
        tree.mkdir(root, b"x", 0o755, CTX),
        tree.rmdir(root, b"features", CTX),
        tree.symlink(root, b"x", b"y", CTX),
        tree.link(2, root, b"x", CTX),
        tree.mknod(root, b"x", stat.S_IFCHR | 0o600, 0, CTX),
        tree.mknod(root, b"x", stat.S_IFREG | 0o600, 0, CTX),
        tree.create(root, b"x", 0o600, os.O_RDWR, CTX),
    ]

    assert [*["EPERM"] * 5, "EACCES", "EACCES"] == [errno.errorcode[await _error(attempt)] for attempt in attempts]


def test_names_have_at_most_255_bytes(mounted: Mounted) -> None:
    """A longer one is refused, though FUSE passes it on."""
    assert errno.ENOENT == _refused(mounted.look_up, ROOT_INODE, b"n" * 255)
    assert errno.ENAMETOOLONG == _refused(mounted.look_up, ROOT_INODE, b"n" * 256)


@pytest.mark.trio
async def test_devices_are_not_read_or_written(mounted: Mounted) -> None:
    """There are no such operations."""
    for path, operation in itertools.product(["binder", "binder-control"], ["read", "write", "fsync"]):
        handle = mounted.open(path)
        arguments: Any = {"read": (handle, 0, 1), "write": (handle, 0, b"x"), "fsync": (handle, False)}[operation]

        assert errno.EINVAL == await _error(getattr(mounted.tree, operation)(*arguments))


@pytest.mark.trio
async def test_control_serves_its_commands_from_another_thread(mounted: Mounted) -> None:
    """BINDER_CTL_ADD makes a device whichever thread it comes from; no other command is known."""
    handler = mounted.plane.controls[mounted.open("binder-control")]
    argument = uapi.binderfs_device.pack(b"new", 0, 0)
    error, answer = await trio.to_thread.run_sync(handler, None, uapi.BINDER_CTL_ADD, argument)

    assert 0 == error
    assert (b"new", MAJOR, 4) == (answer[:3], *uapi.binderfs_device.unpack(answer)[1:])
    assert (-errno.EINVAL, b"") == handler(None, uapi.BINDER_VERSION, b"")


@pytest.mark.trio
async def test_statfs_is_that_of_an_empty_file_system(mounted: Mounted) -> None:
    """Names may have 255 bytes; there are no blocks."""
    data = await mounted.tree.statfs(CTX)

    assert (4096, 255, 0) == (data.f_bsize, data.f_namemax, data.f_blocks)


@pytest.mark.trio
async def test_renaming_something_to_what_it_is_called_does_nothing(mounted: Mounted) -> None:
    """The kernel passes that on, since the two lookups gave two inodes."""
    await mounted.tree.rename(ROOT_INODE, b"binder", ROOT_INODE, b"binder", 0, CTX)

    assert 1 == mounted.find("binder").st_nlink


@pytest.mark.trio
async def test_a_mistake_costs_one_request(mounted: Mounted, logs: Any) -> None:
    """An exception that an operation must not raise is logged, and answered with EIO."""
    logs.expect("unlink failed")

    assert errno.EIO == await _error(mounted.tree.unlink(ROOT_INODE, b"binder"))  # type: ignore[call-arg]


def test_logs_of_closed_devices_are_kept_for_few(mounted: Mounted) -> None:
    """However often somebody looks up a process's log, holds it, and closes the device: the oldest ones are stale."""
    inodes = []
    for _ in range(1100):
        device = mounted.open("binder", 45)
        inodes.append(mounted.find("binder_logs/proc/45").st_ino)
        mounted.inodes.release(device)
        # What the device's own lookup held.
        mounted.inodes.forget(inodes[-1] - 1, 1)

    assert errno.ESTALE == _refused(mounted.attributes, inodes[0])
    assert 0 == mounted.attributes(inodes[-1]).st_nlink

    for inode in inodes:
        mounted.inodes.forget(inode, 1)

    assert {} == mounted.inodes._gone


@pytest.mark.trio
async def test_a_listing_beyond_what_may_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends early, with what it has, and fails with the next part; the kernel knows of each inode that is held."""
    mounted = Mounted(limits={"user_inodes": 2})
    with pytest.raises(FUSEError) as refused:
        await mounted.names("", monkeypatch)
    held = mounted.engine.quota.inodes.held
    for inode in list(mounted.inodes._inodes):
        mounted.inodes.forget(inode, 1)

    assert (errno.EMFILE, 2, 0) == (refused.value.errno, held, mounted.engine.quota.inodes.held)


@pytest.mark.trio
async def test_what_is_opened_is_given_back(mounted: Mounted) -> None:
    """Each kind of open counts for its user until it is released."""
    tree, files = mounted.tree, mounted.engine.quota.files
    handles = [mounted.open(path) for path in ("binder_logs/state", "binder-control")]
    folder = await tree.opendir(ROOT_INODE, CTX)
    most = files.held
    for handle in handles:
        tree.inodes.release(handle)
    await tree.releasedir(folder)

    assert (3, 0) == (most, files.held)
