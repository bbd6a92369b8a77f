"""The inodes of a mount: what names lead to, what is open, and what every open needs.

Theory of operation
-------------------
A program that opens a device makes the kernel send LOOKUP, GETATTR and OPEN, and later FLUSH, RELEASE and FORGET.
These are frequent, and somebody waits for most of them. So the channel serves them by what is here, in the thread that
reads requests, as it serves ioctls. The other requests of the tree are pyfuse3's (`tree.py`), which changes what is
here, too.

FUSE gives all opens of an inode one set of pages, but every open of a binder device has a receive region of its own. So
each LOOKUP of a device's name makes a fresh inode, good for one walk (entry timeout 0), and FORGET takes it back. What
chmod changes belongs to the `Device`, and so shows in all of its inodes.

Invariants
----------
- Whoever reads or changes what is here holds `guard`. It is held for moments: never across a system call, nor while a
  lock is waited for that a client can hold up. So `open` lets go of it while the device plane makes an open;
  `Passing.is_open` keeps others out meanwhile. The engine's lock may be taken with `guard` held, and not the other way
  round.
- An inode is in `_inodes` as long as the kernel may name it.
- `Device.opens` counts the opens that are made, or are being made. A device goes when it has neither those nor a name.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import stat
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, TypeAlias, cast

from binderfs_fuse import complaints, uapi
from binderfs_fuse.engine.limits import OWN
from binderfs_fuse.engine.sorted_map import SortedMap
from binderfs_fuse.fuse.settings import MAX_DEVICES
from binderfs_fuse.host.region import SIZE as REGION_SIZE
from binderfs_fuse.host.region import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from binderfs_fuse.engine.context import Context, Engine, Task
    from binderfs_fuse.engine.limits import Pool
    from binderfs_fuse.engine.process import Process
    from binderfs_fuse.fuse.settings import Settings
    from binderfs_fuse.fuse.texts import Texts

    Text: TypeAlias = Callable[[], Iterator[str]]
    Owner: TypeAlias = tuple[int, int]

FEATURES: Final = ("oneway_spam_detection", "extended_error", "freeze_notification", "transaction_report")
"""What the driver says it can, in the order in which the kernel makes the files."""
MAJOR: Final = 254
"""The major number that BINDER_CTL_ADD reports. The kernel takes one as it boots; here nothing has it."""

NAME_MAX: Final = 255
_CONTROL_INODE: Final = 2
_FIRST_STATIC_INODE: Final = MAX_DEVICES + 4
_FIRST_PASSING_INODE: Final = 1 << 21

# Logs of processes that have closed their devices, for those that hold their inodes.
_GONE: Final = 1024

# How long the kernel may keep attributes, in seconds. It changes those of fixed things itself (SETATTR); only a
# directory's times change behind its back.
_FIXED: Final = 3600
_DIRECTORY: Final = 1

BLOCK_SIZE: Final = 4096
NEWEST: Final = (1 << 31) - 1
"""No name has such a number. What is made of it and a number fits into the offset of a directory that has 32 bits."""
_SECOND: Final = 1_000_000_000
# Seconds before 1970 go as 64 bits without a sign.
_ALL: Final = (1 << 64) - 1


class Open(Protocol):
    """One open of a device, as the device plane made it."""

    process: Process


class Devices(Protocol):
    """What inodes ask of the device plane. `kind` is what regions of opens are."""

    kind: Kind

    def open(self, handle: int, inode: int, context: Context, tid: int, uid: int, flags: int) -> Open:
        """Make what belongs to an open; raises `OSError`."""

    def release(self, handle: int) -> None:
        """Learn that the last descriptor and the last mapping of this open are gone."""

    def register_control(self, handle: int, handler: Callable[..., tuple[int, bytes]]) -> None:
        """Send the ioctls of this open of binder-control to `handler`."""


class Node:
    """Something a name leads to: type and permission bits, owner, times in nanoseconds, and how many names it has."""

    def __init__(self, mode: int, owner: Owner, inode: int = 0) -> None:
        self.mode = mode
        self.uid, self.gid = owner
        self.inode = inode
        self.nlink = 1
        self.size = 0
        self.atime = self.mtime = self.ctime = time.time_ns()

    def touch(self) -> None:
        """Say that the contents changed now."""
        self.mtime = self.ctime = time.time_ns()


class Directory(Node):
    """Names, and the order of their making; `fixed` ones cannot be unlinked or moved away from.

    Each name has a number, larger than those of names that were there before. So who lists them keeps nothing but the
    number of the last one.
    """

    def __init__(self, owner: Owner, inode: int, parent: Directory | None, *, fixed: bool = True) -> None:
        super().__init__(stat.S_IFDIR | 0o755, owner, inode)
        self.parent = parent or self
        self.fixed = fixed
        self.names: dict[bytes, Node] = {}
        self._numbers: dict[bytes, int] = {}
        self._order: SortedMap[tuple[int, bytes]] = SortedMap()
        self._next = 1
        self.nlink = 2

    def attach(self, name: bytes, node: Node) -> None:
        """Add a name, which is not there."""
        self.names[name] = node
        number = self._numbers[name] = self._next
        self._next += 1
        self._order.add(number, (number, name))
        self.touch()
        if isinstance(node, Directory):
            node.parent = self
            self.nlink += 1

    def detach(self, name: bytes) -> Node:
        """Take a name away, and return what it led to."""
        node = self.names.pop(name)
        self._order.remove(self._numbers.pop(name))
        self.touch()
        if isinstance(node, Directory):
            self.nlink -= 1
        return node

    def before(self, number: int) -> tuple[int, bytes] | None:
        """Return the newest name that is older than that of a number, with its own; `NEWEST`: of all."""
        return self._order.before(number)


class File(Node):
    """A file whose text is made anew whenever it is read from its start."""

    def __init__(self, owner: Owner, inode: int, text: Text) -> None:
        super().__init__(stat.S_IFREG | 0o444, owner, inode)
        self.text = text


class Control(Node):
    """The file binder-control."""


class Device(Node):
    """A binder device. It goes when it has neither a name nor an open, and its minor number is free only then."""

    def __init__(self, mode: int, owner: Owner, minor: int, context: Context) -> None:
        super().__init__(stat.S_IFREG | mode, owner)
        self.minor = minor
        self.context = context
        self.opens = 0


class Passing:
    """An inode that goes when the kernel lets go of it: one of a device's, or a process log's.

    `uid` is the user that looked a device up, and is charged for it; None where nobody is. `is_open` says that it is a
    device's open now, `was_open` that it is or was; `refused`, that it has been logged that it cannot be another one
    meanwhile.
    """

    __slots__ = ("is_open", "lookups", "node", "refused", "uid", "was_open")

    def __init__(self, node: Node, uid: int | None) -> None:
        self.node = node
        self.uid = uid
        self.lookups = 0
        self.is_open = False
        self.was_open = False
        self.refused = False


class LogOpen:
    """A user's open of a file with text. `Texts` serves its reads."""

    __slots__ = ("uid",)

    def __init__(self, uid: int) -> None:
        self.uid = uid


class ControlOpen:
    """An open of binder-control; `snapshot` is for whoever serves an ioctl of it to keep something until the next."""

    __slots__ = ("inodes", "snapshot", "uid")

    def __init__(self, inodes: Inodes, uid: int) -> None:
        self.inodes = inodes
        self.uid = uid
        self.snapshot = b""

    def ioctl(self, task: Task, command: int, argument: bytes) -> tuple[int, bytes]:
        """Serve an ioctl. EINVAL: there is no such command."""
        serve = self.inodes.controls.get(command)
        return serve(self, task, argument) if serve else (-errno.EINVAL, b"")


class Lister:
    """A user's open directory."""

    __slots__ = ("directory", "uid")

    def __init__(self, directory: Directory, uid: int) -> None:
        self.directory = directory
        self.uid = uid


class _Shares:
    """What each user holds of a pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._held: Counter[int] = Counter()

    def take(self, uid: int) -> None:
        """Take one more. EMFILE: the user has too many; ENFILE: all users have."""
        lack = self._pool.lacks(self._held[uid])
        if lack:
            _refuse(errno.EMFILE if lack == OWN else errno.ENFILE)
        self._held[uid] += 1
        self._pool.held += 1

    def give_back(self, uid: int) -> None:
        """Give one back."""
        self._held[uid] -= 1
        if not self._held[uid]:
            del self._held[uid]
        self._pool.held -= 1


def attribute_timeout(node: Node, inode: int) -> int:
    """Return how many seconds the kernel may keep the attributes of a node's inode."""
    if inode >= _FIRST_PASSING_INODE:
        return 0
    return _DIRECTORY if isinstance(node, Directory) else _FIXED


def entry_timeout(inode: int) -> int:
    """Return for how many seconds a name leads to this inode."""
    return 0 if inode >= _FIRST_PASSING_INODE else _FIXED


def _refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


class Inodes:
    """The inodes of one mount.

    `owner` is the user and group that everything belongs to, devices unless the settings give them to others.
    `maximum` and `read_only` begin as the settings of these names, and may be changed at any time. `texts` serves what
    is read of logs.

    Raises `OSError` (ENOSPC) where `maximum` leaves no room for the first devices, as mount(2) does. All methods raise
    `OSError`.
    """

    def __init__(self, engine: Engine, plane: Devices, settings: Settings, texts: Texts, owner: Owner = (0, 0)) -> None:
        self.guard = threading.RLock()
        self._owner = owner
        self._device_owner = (
            owner[0] if settings.uid is None else settings.uid,
            owner[1] if settings.gid is None else settings.gid,
        )
        self.maximum = settings.maximum
        self.read_only = settings.read_only
        self._engine = engine
        self._plane = plane
        self._settings = settings
        self._free_minors: list[int] = []
        self._minors = itertools.count(1)  # 0 is binder-control's
        self._device_count = 0
        self._static = itertools.count(_FIRST_STATIC_INODE)
        self._passing = itertools.count(_FIRST_PASSING_INODE)
        self._handles = itertools.count(1)
        self._inodes: dict[int, Node | Passing] = {}
        self.texts = texts
        self._open: dict[int, LogOpen | Lister | ControlOpen | tuple[Device, Open, Passing]] = {}
        self._files = _Shares(engine.quota.files)
        self._looked_up = _Shares(engine.quota.inodes)
        # Process logs that are gone and that somebody still holds, the oldest first.
        self._gone: dict[int, None] = {}

        self.root = Directory(owner, uapi.FUSE_ROOT_ID, None, fixed=False)
        self._inodes[uapi.FUSE_ROOT_ID] = self.root
        self.control = Control(stat.S_IFREG | 0o600, owner, _CONTROL_INODE)
        self._inodes[_CONTROL_INODE] = self.control
        self.root.attach(b"binder-control", self.control)
        for name in settings.devices:
            if self._reserve_minor() < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._make_device(name, self._device_count)
        features = self._make_directory(self.root, b"features")
        for feature in FEATURES:
            self._make_file(features, feature.encode(), lambda: iter(["1\n"]))
        # A process log belongs to the open that it was made for, and goes with it even where the process has others.
        self._process_logs: dict[int, File] = {}
        self._opens_of: Counter[int] = Counter()
        self._process_directory: Directory | None = self._make_logs() if settings.stats else None
        self.controls: dict[int, Callable[[ControlOpen, Task, bytes], tuple[int, bytes]]] = {
            uapi.BINDER_CTL_ADD: self._control_add
        }
        """The ioctls of binder-control. Each is given the open, the caller and the argument, in a worker, and returns 0
        or a negative errno, and the bytes to copy out."""

    # Making the tree

    def _make_directory(self, parent: Directory, name: bytes) -> Directory:
        directory = Directory(self._owner, next(self._static), parent)
        self._inodes[directory.inode] = directory
        parent.attach(name, directory)
        return directory

    def _make_file(self, parent: Directory, name: bytes, text: Text) -> None:
        file = File(self._owner, next(self._static), text)
        self._inodes[file.inode] = file
        parent.attach(name, file)

    def _make_logs(self) -> Directory:
        logs = self._engine.logs
        files: dict[bytes, Text] = {
            b"state": lambda: logs.state(hashed=False),
            b"state_hashed": lambda: logs.state(hashed=True),
            b"stats": logs.stats,
            b"transactions": lambda: logs.transactions(hashed=False),
            b"transactions_hashed": lambda: logs.transactions(hashed=True),
            b"transaction_log": lambda: logs.transaction_log(failed=False),
            b"failed_transaction_log": lambda: logs.transaction_log(failed=True),
        }
        directory = self._make_directory(self.root, b"binder_logs")
        for name, text in files.items():
            self._make_file(directory, name, text)
        return self._make_directory(directory, b"proc")

    def _reserve_minor(self) -> int:
        if self._device_count >= self.maximum:
            return -errno.ENOSPC
        self._device_count += 1
        return heapq.heappop(self._free_minors) if self._free_minors else next(self._minors)

    def _release_minor(self, minor: int) -> None:
        self._device_count -= 1
        heapq.heappush(self._free_minors, minor)

    def _make_device(self, name: bytes, minor: int) -> None:
        with self._engine.lock:
            context = self._engine.add_context(os.fsdecode(name))
        self.root.attach(name, Device(self._settings.mode, self._device_owner, minor, context))

    def drop(self, node: Node) -> None:
        """Take away one of a node's names; with the last one a device may go."""
        node.nlink -= 1
        node.ctime = time.time_ns()
        if isinstance(node, Device):
            self._evict(node)

    def _evict(self, device: Device) -> None:
        if not device.nlink and not device.opens:
            self._release_minor(device.minor)
            with self._engine.lock:
                # One of the same name may have come since.
                if self._engine.contexts.get(device.context.name) is device.context:
                    self._engine.remove_context(device.context)

    # binder-control

    def _control_add(self, _opened: ControlOpen, _task: Task, argument: bytes) -> tuple[int, bytes]:
        """Serve BINDER_CTL_ADD."""
        return self.add(argument)

    def add(self, argument: bytes) -> tuple[int, bytes]:
        """Make the device that a ``struct binderfs_device`` names; return 0 or a negative errno, and that filled in.

        ENOSPC: there are `maximum`. EACCES: the name is empty, ``.``, ``..`` or has a slash. EEXIST: it is there. As in
        the kernel, the last two come with the major and minor numbers that the device would have had.
        """
        with self.guard:
            if self._device_count >= self.maximum:
                return -errno.ENOSPC, b""
            name: bytes = uapi.binderfs_device.unpack(argument)[0][: uapi.BINDERFS_MAX_NAME]
            minor = self._reserve_minor()
            answer = uapi.binderfs_device.pack(name, MAJOR, minor)
            name = name.partition(b"\0")[0]
            error = 0
            if name in (b"", b".", b"..") or b"/" in name:
                error = -errno.EACCES
            elif name in self.root.names:
                error = -errno.EEXIST
            if error:
                self._release_minor(minor)
            else:
                self._make_device(name, minor)
            return error, answer

    def reconfigure(self, maximum: int, *, stats: bool, read_only: bool) -> int:
        """Remount: set `maximum` and `read_only`, return 0 or a negative errno.

        EINVAL: whether there are logs cannot change. EBUSY: a device without a name is open, which the kernel does not
        have in what it makes read-only.
        """
        with self.guard:
            if read_only and not self.read_only:
                opened = [each[0] for each in self._open.values() if isinstance(each, tuple)]
                if not all(device.nlink for device in opened):
                    return -errno.EBUSY
            if stats != self._settings.stats:
                return -errno.EINVAL
            self.maximum = maximum
            self.read_only = read_only
            return 0

    # Names and inodes

    def directory(self, inode: int) -> Directory:
        """Return the directory that an inode is. ESTALE. ENOTDIR."""
        node = self.node(inode)
        if not isinstance(node, Directory):
            _refuse(errno.ENOTDIR)
        return node

    def child(self, inode: int, name: bytes) -> tuple[Directory, Node]:
        """Return a directory, and what a name in it leads to. ESTALE. ENOTDIR. ENOENT."""
        directory = self.directory(inode)
        node = directory.names.get(name)
        if node is None:
            _refuse(errno.ENOENT)
        return directory, node

    def _attributes(self, node: Node, inode: int) -> tuple[int, ...]:
        """Return the fields of a ``struct fuse_attr``."""
        atime, atime_ns = divmod(node.atime, _SECOND)
        mtime, mtime_ns = divmod(node.mtime, _SECOND)
        ctime, ctime_ns = divmod(node.ctime, _SECOND)
        return (
            inode, self.size(node, inode), 0, atime & _ALL, mtime & _ALL, ctime & _ALL, atime_ns, mtime_ns, ctime_ns,
            node.mode, node.nlink, node.uid, node.gid, 0, BLOCK_SIZE, 0,
        )  # fmt: skip

    def attributes(self, inode: int) -> bytes:
        """Return the answer to GETATTR, a ``struct fuse_attr_out``; a device without a name has nlink 0.

        ESTALE: there is no such inode.
        """
        with self.guard:
            node = self.node(inode)
            return uapi.fuse_attr_out.pack(attribute_timeout(node, inode), 0, *self._attributes(node, inode))

    def size(self, node: Node, inode: int) -> int:
        """Return what stat shows for a size.

        A device has none, in the kernel. But here it is a regular file, of which Python's mmap, for one, maps no more
        than there is; so one that is open has that of its region. And where regions are in the page cache, that ends
        with the file.
        """
        if not isinstance(node, Device):
            return node.size
        passing = self._inodes.get(inode)
        was_open = isinstance(passing, Passing) and passing.was_open
        return REGION_SIZE if was_open or self._plane.kind is Kind.PAGE_CACHE else 0

    def enter(self, node: Node, uid: int) -> int:
        """Give the kernel one more hold on a node, and return its inode; a device gets a new one, at the cost of `uid`.

        EMFILE, ENFILE: the user, or all users, hold too many. A process log's inode costs nobody: there are no more of
        them than opens.
        """
        inode = node.inode
        if isinstance(node, Device):
            self._looked_up.take(uid)
            inode = next(self._passing)
        if inode >= _FIRST_PASSING_INODE:
            passing = self._inodes.get(inode)
            if not isinstance(passing, Passing):
                passing = self._inodes[inode] = Passing(node, uid if isinstance(node, Device) else None)
            passing.lookups += 1
        return inode

    def node(self, inode: int) -> Node:
        """Return the node of an inode. ESTALE: there is no such inode."""
        try:
            found = self._inodes[inode]
        except KeyError:
            _refuse(errno.ESTALE)
        return found.node if isinstance(found, Passing) else found

    def look_up(self, parent: int, name: bytes, uid: int) -> bytes:
        """Find a name; return the answer to LOOKUP, a ``struct fuse_entry_out``.

        ENOENT. ENAMETOOLONG: more than 255 bytes, of which FUSE alone would pass on 1024. EMFILE, ENFILE: a device's,
        where the user, or all users, hold too many.
        """
        if len(name) > NAME_MAX:
            _refuse(errno.ENAMETOOLONG)
        with self.guard:
            node = self.child(parent, name)[1]
            inode = self.enter(node, uid)
            timeouts = entry_timeout(inode), attribute_timeout(node, inode)
            return uapi.fuse_entry_out.pack(inode, 0, *timeouts, 0, 0, *self._attributes(node, inode))

    def forget(self, inode: int, lookups: int) -> None:
        """Let go of an inode that passes; the others stay as long as the mount."""
        with self.guard:
            found = self._inodes.get(inode)
            if isinstance(found, Passing):
                found.lookups -= lookups
                if not found.lookups:
                    self._let_go(inode, found)

    def _let_go(self, inode: int, passing: Passing) -> None:
        del self._inodes[inode]
        self._gone.pop(inode, None)
        if passing.uid is not None:
            self._looked_up.give_back(passing.uid)

    def want_write(self) -> None:
        """Refuse what would change the tree while it is read-only, before anything else is looked at, as the VFS does.

        The server has to: were the mount read-only, FUSE's kernel side would refuse to open devices to write as well,
        as it does with files.
        """
        if self.read_only:
            _refuse(errno.EROFS)

    # Open files

    def open(self, inode: int, flags: int, tid: int, uid: int) -> tuple[int, int]:
        """Open a file, binder-control or a device for a task of a user; return the handle, and the FOPEN flags.

        ESTALE: a device that has gone since its name was looked up. EMFILE, ENFILE: the user, or all users, have too
        many opens. EBUSY: the inode is open already. EROFS. And what the device plane raises.
        """
        with self.guard:
            node = self.node(inode)
            handle = next(self._handles)
        if isinstance(node, Device):
            self._open_device(node, inode, handle, flags, tid, uid)
            return handle, uapi.FOPEN_NONSEEKABLE
        return handle, self._open_file(node, handle, flags, uid)

    def _open_file(self, node: Node, handle: int, flags: int, uid: int) -> int:
        is_log = isinstance(node, File)
        with self.guard:
            if is_log and flags & os.O_ACCMODE != os.O_RDONLY:
                self.want_write()
            self._files.take(uid)
            if is_log:
                if flags & os.O_TRUNC:
                    node.size = 0
                self._open[handle] = LogOpen(uid)
            else:
                self._open[handle] = opened = ControlOpen(self, uid)
                self._plane.register_control(handle, opened.ioctl)
                return uapi.FOPEN_DIRECT_IO | uapi.FOPEN_NONSEEKABLE | uapi.FOPEN_NOFLUSH
        self.texts.open(handle, cast("File", node), uid)
        return uapi.FOPEN_DIRECT_IO | uapi.FOPEN_NOFLUSH

    def _open_device(self, device: Device, inode: int, handle: int, flags: int, tid: int, uid: int) -> None:
        with self.guard:
            if not device.nlink and not device.opens:
                _refuse(errno.ESTALE)
            passing = cast("Passing", self._inodes[inode])
            # Nobody looked the name up: it is a bind mount of the device alone, or /proc/PID/fd. What two opens of one
            # inode map is the same pages, and neither is to see the other's.
            is_busy = passing.is_open
            is_news = is_busy and not passing.refused
            if is_busy:
                passing.refused = True
            else:
                passing.is_open = True
                device.opens += 1
        if is_news:
            complaints.say(
                uid,
                f"{device.context.name} was opened once more by a way that is good for one open at a time, such as"
                " a bind mount of it alone: EBUSY; bind its directory",
            )
        if is_busy:
            _refuse(errno.EBUSY)
        try:
            opened = self._plane.open(handle, inode, device.context, tid, uid, flags)
        except BaseException:
            with self.guard:
                self._give_up_open(device, passing)
            raise
        with self.guard:
            self._enter_open(handle, device, opened, passing)

    def _give_up_open(self, device: Device, passing: Passing) -> None:
        passing.is_open = False
        device.opens -= 1
        self._evict(device)

    def _enter_open(self, handle: int, device: Device, opened: Open, passing: Passing) -> None:
        passing.was_open = True
        self._open[handle] = (device, opened, passing)
        pid = opened.process.pid
        name = b"%d" % pid
        directory = self._process_directory
        # Something else may have been moved there.
        if directory and not self._opens_of[pid] and name not in directory.names:
            log = File(self._owner, next(self._passing), lambda: self._engine.logs.proc(pid))
            self._process_logs[handle] = log
            directory.attach(name, log)
        self._opens_of[pid] += 1

    def open_directory(self, inode: int, uid: int) -> int:
        """Open a directory; return the handle. EMFILE, ENFILE: the user, or all users, have too many opens."""
        directory = self.directory(inode)
        self._files.take(uid)
        handle = next(self._handles)
        self._open[handle] = Lister(directory, uid)
        return handle

    def lister(self, handle: int) -> Lister:
        """Return an open directory."""
        return cast("Lister", self._open[handle])

    def release(self, handle: int) -> None:
        """Forget an open file or directory."""
        with self.guard:
            opened = self._open.pop(handle)
            if isinstance(opened, tuple):
                device, made, passing = opened
                self._close_device(handle, device, made, passing)
            else:
                self._files.give_back(opened.uid)
        if isinstance(opened, LogOpen):
            self.texts.close(handle)
        elif not isinstance(opened, Lister):
            self._plane.release(handle)

    def _close_device(self, handle: int, device: Device, opened: Open, passing: Passing) -> None:
        self._give_up_open(device, passing)
        pid = opened.process.pid
        self._opens_of[pid] -= 1
        if not self._opens_of[pid]:
            del self._opens_of[pid]
        log = self._process_logs.pop(handle, None)
        if log is not None and log.inode in self._inodes:
            self._gone[log.inode] = None
            if len(self._gone) > _GONE:
                # Whoever holds it gets ESTALE for it, but from a descriptor that is open.
                oldest = next(iter(self._gone))
                self._let_go(oldest, cast("Passing", self._inodes[oldest]))
        directory = self._process_directory
        # Something else may have been moved there, or this elsewhere.
        if log and directory and directory.names.get(b"%d" % pid) is log:
            self.drop(directory.detach(b"%d" % pid))
