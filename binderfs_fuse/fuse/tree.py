"""The tree of a binderfs: its names, their attributes, and what reading a file of it gives, as pyfuse3 operations.

What is there, and each errno, is that of the kernel's binderfs (Linux 7.3, ``drivers/android/binderfs.c``),
which allows less than most file systems: devices come by BINDER_CTL_ADD, go by unlink and move by rename; nothing
else is made or removed. `tests/tree` holds all of it against the real one.

One thing differs by necessity. FUSE gives all opens of an inode one set of pages, but every open of a binder device
has a receive region of its own. So each LOOKUP of a device's name makes a fresh inode, good for one walk (entry
timeout 0), and FORGET takes it back. What chmod changes belongs to the `Device`, and so shows in all of its inodes.

Everything here runs on trio's thread, and that is what guards it. The device plane calls `ControlOpen.ioctl` from other
threads; what is then to be done to the tree changes over.
"""

from __future__ import annotations

import errno
import functools
import heapq
import inspect
import itertools
import os
import stat
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeAlias, cast

import pyfuse3
import trio
from pyfuse3 import FUSEError

from binderfs_fuse import complaints, uapi
from binderfs_fuse.engine.limits import OWN
from binderfs_fuse.fuse.settings import MAX_DEVICES
from binderfs_fuse.fuse.texts import Texts
from binderfs_fuse.host.region import SIZE as REGION_SIZE
from binderfs_fuse.host.region import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from binderfs_fuse.engine.context import Context, Engine, Task
    from binderfs_fuse.engine.limits import Pool
    from binderfs_fuse.engine.process import Process
    from binderfs_fuse.fuse.settings import Settings
    from binderfs_fuse.fuse.texts import Source

    Text: TypeAlias = Callable[[], Iterator[str]]
    Owner: TypeAlias = tuple[int, int]

FEATURES: Final = ("oneway_spam_detection", "extended_error", "freeze_notification", "transaction_report")
"""What the driver says it can, in the order in which the kernel makes the files."""
MAJOR: Final = 254
"""The major number that BINDER_CTL_ADD reports. The kernel takes one as it boots; here nothing has it."""

_NAME_MAX: Final = 255
_CONTROL_INODE: Final = 2
_FIRST_STATIC_INODE: Final = MAX_DEVICES + 4
_FIRST_PASSING_INODE: Final = 1 << 21

# Logs of processes that have closed their devices, for those that hold their inodes.
_GONE: Final = 1024

# How long it takes to make a log until others have a turn, and how long that is at least, in seconds.
_TURN: Final = 0.0003
_PAUSE: Final = 0.0005

# How long the kernel may keep attributes, in seconds. It changes those of fixed things itself (SETATTR); only a
# directory's times change behind its back.
_FIXED: Final = 3600
_DIRECTORY: Final = 1


class Open(Protocol):
    """One open of a device, as the device plane made it."""

    process: Process


class Devices(Protocol):
    """What the tree asks of the device plane. `kind` is what regions of opens are."""

    kind: Kind

    def open(self, handle: int, inode: int, context: Context, tid: int, uid: int, flags: int) -> Open:
        """Make what belongs to an open; raises `OSError`."""

    def flush(self, handle: int) -> None:
        """Learn that somebody closed a descriptor of this open."""

    def release(self, handle: int) -> None:
        """Learn that the last descriptor and the last mapping of this open are gone."""

    def find_mappings(self) -> None:
        """Look up where processes have mapped their device, for the logs."""

    def wake(self) -> None:
        """Resume, and let poll again, whom the engine has made ready outside of a request: a look at the logs may."""

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
    """Names in the order of their making; `fixed` ones cannot be unlinked or moved away from."""

    def __init__(self, owner: Owner, inode: int, parent: Directory | None, *, fixed: bool = True) -> None:
        super().__init__(stat.S_IFDIR | 0o755, owner, inode)
        self.parent = parent or self
        self.fixed = fixed
        self.names: dict[bytes, Node] = {}
        self.nlink = 2

    def attach(self, name: bytes, node: Node) -> None:
        """Add a name."""
        self.names[name] = node
        self.touch()
        if isinstance(node, Directory):
            node.parent = self
            self.nlink += 1

    def detach(self, name: bytes) -> Node:
        """Take a name away, and return what it led to."""
        node = self.names.pop(name)
        self.touch()
        if isinstance(node, Directory):
            self.nlink -= 1
        return node


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

    __slots__ = ("snapshot", "tree", "uid")

    def __init__(self, tree: Tree, uid: int) -> None:
        self.tree = tree
        self.uid = uid
        self.snapshot = b""

    def ioctl(self, task: Task, command: int, argument: bytes) -> tuple[int, bytes]:
        """Serve an ioctl. EINVAL: there is no such command."""
        serve = self.tree.controls.get(command)
        return serve(self, task, argument) if serve else (-errno.EINVAL, b"")


class Lister:
    """A user's open directory and the names that its reads are served from."""

    __slots__ = ("directory", "names", "uid")

    def __init__(self, directory: Directory, uid: int) -> None:
        self.directory = directory
        self.uid = uid
        self.names: list[bytes] = []


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


def _refuse(number: int) -> NoReturn:
    raise FUSEError(number)


def _surviving(operation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    async def survivor(*arguments: Any) -> Any:
        try:
            return await operation(*arguments)
        except FUSEError:
            raise
        except Exception as error:
            complaints.mistake(f"{operation.__name__} failed")
            raise FUSEError(errno.EIO) from error

    return survivor


def survive_mistakes(operations: type[Tree]) -> type[Tree]:
    """Make the operations of a class answer EIO, and log it, where one raises what it must not, which ends pyfuse3."""
    for name, operation in list(vars(operations).items()):
        # FORGET has no answer, so that what goes wrong in it ends pyfuse3 in any case.
        if inspect.iscoroutinefunction(operation) and name != "forget":
            setattr(operations, name, _surviving(operation))
    return operations


@survive_mistakes
class Tree(pyfuse3.Operations):  # type: ignore[misc] # pyfuse3 is untyped to mypy, see pyproject.toml
    """One mounted binderfs.

    `owner` is the user and group that everything belongs to, devices unless the settings give them to others.
    `maximum` and `read_only` begin as the settings of these names, and may be changed at any time.

    Raises `OSError` (ENOSPC) where it leaves no room for the first devices, as mount(2) does.
    """

    supports_dot_lookup = False

    def __init__(self, engine: Engine, plane: Devices, settings: Settings, owner: Owner = (0, 0)) -> None:
        super().__init__()
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
        self._token: trio.lowlevel.TrioToken | None = None
        self._free_minors: list[int] = []
        self._minors = itertools.count(1)  # 0 is binder-control's
        self._device_count = 0
        self._static = itertools.count(_FIRST_STATIC_INODE)
        self._passing = itertools.count(_FIRST_PASSING_INODE)
        self._handles = itertools.count(1)
        self._inodes: dict[int, Node | Passing] = {}
        self.texts = Texts(engine.quota, self._take_source)
        """What serves reads of logs. They do not come here, but from the channel."""
        self._open: dict[int, LogOpen | Lister | ControlOpen | tuple[Device, Open, Passing]] = {}
        self._files = _Shares(engine.quota.files)
        self._looked_up = _Shares(engine.quota.inodes)
        # Process logs that are gone and that somebody still holds, the oldest first.
        self._gone: dict[int, None] = {}

        self.root = Directory(owner, pyfuse3.ROOT_INODE, None, fixed=False)
        self._inodes[pyfuse3.ROOT_INODE] = self.root
        self._control = Control(stat.S_IFREG | 0o600, owner, _CONTROL_INODE)
        self._inodes[_CONTROL_INODE] = self._control
        self.root.attach(b"binder-control", self._control)
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
        """The ioctls of binder-control. Each is given the open, the caller and the argument, in any thread but trio's,
        and returns 0 or a negative errno, and the bytes to copy out."""

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
        context = self._engine.add_context(os.fsdecode(name))
        self.root.attach(name, Device(self._settings.mode, self._device_owner, minor, context))

    def _drop(self, node: Node) -> None:
        """Take away one of a node's names; with the last one a device may go."""
        node.nlink -= 1
        node.ctime = time.time_ns()
        if isinstance(node, Device):
            self._evict(node)

    def _evict(self, device: Device) -> None:
        if not device.nlink and not device.opens:
            self._release_minor(device.minor)
            # One of the same name may have come since.
            if self._engine.contexts.get(device.context.name) is device.context:
                self._engine.remove_context(device.context)

    # binder-control

    def _control_add(self, _opened: ControlOpen, _task: Task, argument: bytes) -> tuple[int, bytes]:
        """Serve BINDER_CTL_ADD. ENODEV: the mount is ending."""
        try:
            return trio.from_thread.run_sync(self.add, argument, trio_token=self._token)
        except trio.RunFinishedError:
            return -errno.ENODEV, b""

    def add(self, argument: bytes) -> tuple[int, bytes]:
        """Make the device that a ``struct binderfs_device`` names; return 0 or a negative errno, and that filled in.

        ENOSPC: there are `maximum`. EACCES: the name is empty, ``.``, ``..`` or has a slash. EEXIST: it is there. As in
        the kernel, the last two come with the major and minor numbers that the device would have had.
        """
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

    def init(self) -> None:
        """Learn which thread is trio's: the FUSE session begins."""
        self._token = trio.lowlevel.current_trio_token()

    def _directory(self, inode: int) -> Directory:
        node = self._node(inode)
        if not isinstance(node, Directory):
            _refuse(errno.ENOTDIR)
        return node

    def _child(self, inode: int, name: bytes) -> tuple[Directory, Node]:
        directory = self._directory(inode)
        node = directory.names.get(name)
        if node is None:
            _refuse(errno.ENOENT)
        return directory, node

    def _attributes(self, node: Node, inode: int) -> pyfuse3.EntryAttributes:
        fixed = _DIRECTORY if isinstance(node, Directory) else _FIXED
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = node.mode
        entry.st_nlink = node.nlink
        entry.st_uid = node.uid
        entry.st_gid = node.gid
        entry.st_size = self._size(node, inode)
        entry.st_blksize = 4096
        entry.st_blocks = 0
        entry.st_atime_ns = node.atime
        entry.st_mtime_ns = node.mtime
        entry.st_ctime_ns = node.ctime
        entry.attr_timeout = 0 if isinstance(node, Device) else fixed
        entry.entry_timeout = 0 if inode >= _FIRST_PASSING_INODE else _FIXED
        return entry

    def _size(self, node: Node, inode: int) -> int:
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

    def _enter(self, node: Node, uid: int) -> pyfuse3.EntryAttributes:
        """Give the kernel one more hold on a node, a device's by an inode of its own, which `uid` is charged for.

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
        return self._attributes(node, inode)

    def _node(self, inode: int) -> Node:
        try:
            found = self._inodes[inode]
        except KeyError:
            _refuse(errno.ESTALE)
        return found.node if isinstance(found, Passing) else found

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name. ENOENT. ENAMETOOLONG: more than 255 bytes, of which FUSE alone would pass on 1024.

        EMFILE, ENFILE: a device's, where the user, or all users, hold too many.
        """
        if len(name) > _NAME_MAX:
            _refuse(errno.ENAMETOOLONG)
        return self._enter(self._child(parent_inode, name)[1], ctx.uid)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Let go of inodes that pass; the others stay as long as the mount."""
        for inode, lookups in inode_list:
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

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return attributes; a device without a name has nlink 0."""
        del ctx
        return self._attributes(self._node(inode), inode)

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Change what the kernel has allowed to be changed. EINVAL: a device's size, a file's through a descriptor."""
        del ctx
        node = self._node(inode)
        if fields.update_size and (fh is not None or not isinstance(node, File)):
            _refuse(errno.EINVAL)
        self._want_write()
        if fields.update_size and isinstance(node, File):
            # The size of such a file means nothing, in the kernel as here, but there it can be set.
            node.size = attr.st_size
        if fields.update_mode:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            node.uid = attr.st_uid
        if fields.update_gid:
            node.gid = attr.st_gid
        if fields.update_atime:
            node.atime = attr.st_atime_ns
        if fields.update_mtime:
            node.mtime = attr.st_mtime_ns
        node.ctime = attr.st_ctime_ns if fields.update_ctime else time.time_ns()
        return self._attributes(node, inode)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Say what an empty file system of pages says."""
        del ctx
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = _NAME_MAX
        return data

    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """Say that there are no extended attributes; reading or setting one is not supported at all."""
        del inode, ctx
        return ()

    # Changing the tree

    def _want_write(self) -> None:
        """Refuse what would change the tree while it is read-only, before anything else is looked at, as the VFS does.

        The server has to: were the mount read-only, FUSE's kernel side would refuse to open devices to write as well,
        as it does with files.
        """
        if self.read_only:
            _refuse(errno.EROFS)

    async def unlink(self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a device. EPERM: anything else."""
        del ctx
        self._want_write()
        directory, node = self._child(parent_inode, name)
        if directory.fixed or node is self._control:
            _refuse(errno.EPERM)
        self._drop(directory.detach(name))

    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: bytes,
        parent_inode_new: pyfuse3.InodeT,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """Move a name of the root, wherever to. EPERM: out of another directory, and to or from binder-control.

        As in the kernel, this goes for the directories in the root too, and whatever is in the way goes. ENOTEMPTY:
        that is a directory with names in it. EINVAL: a flag other than RENAME_NOREPLACE and RENAME_EXCHANGE. EEXIST,
        ENOENT: what these two are about.
        """
        del ctx
        self._want_write()
        old, node = self._child(parent_inode_old, name_old)
        new = self._directory(parent_inode_new)
        target = new.names.get(name_new)
        if old.fixed or self._control in (node, target):
            _refuse(errno.EPERM)
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE):
            _refuse(errno.EINVAL)
        if node is target:
            # The kernel makes nothing of this itself only where both have one inode, which a device's have not.
            return
        if flags & pyfuse3.RENAME_EXCHANGE:
            if target is None:
                _refuse(errno.ENOENT)
            old.detach(name_old)
            new.detach(name_new)
            old.attach(name_old, target)
            new.attach(name_new, node)
            return
        if target is not None:
            if flags & pyfuse3.RENAME_NOREPLACE:
                _refuse(errno.EEXIST)
            if isinstance(target, Directory) and target.names:
                _refuse(errno.ENOTEMPTY)
            self._drop(new.detach(name_new))
        old.detach(name_old)
        new.attach(name_new, node)

    async def mkdir(
        self, parent_inode: pyfuse3.InodeT, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse with EPERM."""
        del parent_inode, name, mode, ctx
        self._want_write()
        _refuse(errno.EPERM)

    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Refuse with EPERM."""
        del parent_inode, name, ctx
        self._want_write()
        _refuse(errno.EPERM)

    async def symlink(
        self, parent_inode: pyfuse3.InodeT, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse with EPERM."""
        del parent_inode, name, target, ctx
        self._want_write()
        _refuse(errno.EPERM)

    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Refuse with EPERM."""
        del inode, new_parent_inode, new_name, ctx
        self._want_write()
        _refuse(errno.EPERM)

    async def mknod(
        self, parent_inode: pyfuse3.InodeT, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse: a regular file with EACCES, as where there is no create operation, the rest with EPERM."""
        del parent_inode, name, rdev, ctx
        self._want_write()
        _refuse(errno.EACCES if stat.S_ISREG(mode) else errno.EPERM)

    async def create(
        self, parent_inode: pyfuse3.InodeT, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Refuse with EACCES."""
        del parent_inode, name, mode, flags, ctx
        self._want_write()
        _refuse(errno.EACCES)

    # Open files

    async def open(self, inode: pyfuse3.InodeT, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file, binder-control or a device. ESTALE: a device that has gone since its name was looked up.

        EMFILE, ENFILE: the user, or all users, have too many opens.
        """
        node = self._node(inode)
        handle = next(self._handles)
        if isinstance(node, Device):
            self._open_device(node, inode, handle, flags, ctx)
            return pyfuse3.FileInfo(fh=handle, nonseekable=True)
        if isinstance(node, File) and flags & os.O_ACCMODE != os.O_RDONLY:
            self._want_write()
        self._files.take(ctx.uid)
        if isinstance(node, File):
            if flags & os.O_TRUNC:
                node.size = 0
            self._open[handle] = LogOpen(ctx.uid)
            self.texts.open(handle, node, ctx.uid)
            return pyfuse3.FileInfo(fh=handle, direct_io=True)
        self._open[handle] = opened = ControlOpen(self, ctx.uid)
        self._plane.register_control(handle, opened.ioctl)
        return pyfuse3.FileInfo(fh=handle, direct_io=True, nonseekable=True)

    def _open_device(self, device: Device, inode: int, handle: int, flags: int, ctx: pyfuse3.RequestContext) -> None:
        if not device.nlink and not device.opens:
            _refuse(errno.ESTALE)
        passing = cast("Passing", self._inodes[inode])
        if passing.is_open:
            # Nobody looked the name up: it is a bind mount of the device alone, or /proc/PID/fd. What two opens of one
            # inode map is the same pages, and neither is to see the other's.
            if not passing.refused:
                passing.refused = True
                complaints.say(
                    ctx.uid,
                    f"{device.context.name} was opened once more by a way that is good for one open at a time, such as"
                    " a bind mount of it alone: EBUSY; bind its directory",
                )
            _refuse(errno.EBUSY)
        try:
            opened = self._plane.open(handle, inode, device.context, ctx.pid, ctx.uid, flags)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from error
        device.opens += 1
        passing.is_open = passing.was_open = True
        self._open[handle] = (device, opened, passing)
        pid = opened.process.pid
        if self._process_directory and not self._opens_of[pid]:
            log = File(self._owner, next(self._passing), lambda: self._engine.logs.proc(pid))
            self._process_logs[handle] = log
            self._process_directory.attach(b"%d" % pid, log)
        self._opens_of[pid] += 1

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Forget an open file."""
        opened = self._open.pop(fh)
        if isinstance(opened, tuple):
            self._plane.release(fh)
            self._close_device(fh, *opened)
            return
        self._files.give_back(opened.uid)
        if isinstance(opened, LogOpen):
            self.texts.close(fh)
        else:
            self._plane.release(fh)

    def _close_device(self, handle: int, device: Device, opened: Open, passing: Passing) -> None:
        device.opens -= 1
        passing.is_open = False
        self._evict(device)
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
            self._drop(directory.detach(b"%d" % pid))

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """Pass a close on to the device."""
        if isinstance(self._open[fh], tuple):
            self._plane.flush(fh)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Refuse with EINVAL what is no log, as where there is no read operation."""
        del fh, off, size
        _refuse(errno.EINVAL)

    def _take_source(self, source: Source, check: Callable[[int], None]) -> bytes:
        return self.take(source.text, check)

    def take(self, text: Text, check: Callable[[int], None] | None = None) -> bytes:
        """Collect a text, with the engine locked for one piece at a time: what is long must not stop it for long.

        `check` is called with the length after each piece, and may raise. Neither lock nor interpreter goes to who has
        waited longest, but to who asks next, and that would be this again, before anybody else has woken up. So
        between pieces it sleeps.
        """
        self._plane.find_mappings()
        chunks: list[bytes] = []
        length = 0
        with self._engine.lock:
            source = text()
        began = time.monotonic()
        while True:
            if check is not None:
                check(length)
            with self._engine.lock:
                chunk = next(source, None)
            self._plane.wake()
            if chunk is None:
                return b"".join(chunks)
            encoded = chunk.encode(errors="surrogateescape")
            length += len(encoded)
            chunks.append(encoded)
            if time.monotonic() - began > _TURN:
                time.sleep(_PAUSE)
                began = time.monotonic()

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Refuse with EINVAL, as where there is no write operation."""
        del fh, off, buf
        _refuse(errno.EINVAL)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Refuse with EINVAL, as where there is no fsync operation."""
        del fh, datasync
        _refuse(errno.EINVAL)

    # Open directories

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """Open a directory. EMFILE, ENFILE: the user, or all users, have too many opens."""
        directory = self._directory(inode)
        self._files.take(ctx.uid)
        handle = next(self._handles)
        self._open[handle] = Lister(directory, ctx.uid)
        return handle

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List names, the newest first, as they were when reading began."""
        lister = cast("Lister", self._open[fh])
        directory = lister.directory
        if not start_id:
            lister.names = [b".", b"..", *reversed(directory.names)]
        for index in range(start_id, len(lister.names)):
            name = lister.names[index]
            if index < 2:
                node: Node | None = directory if not index else directory.parent
            else:
                node = directory.names.get(name)
            if node is None:
                continue
            try:
                entry = self._enter(node, lister.uid)
            except FUSEError:
                if index > start_id:
                    # The kernel has inodes of this answer already, which an error would not tell it of.
                    return
                raise
            if not pyfuse3.readdir_reply(token, name, entry, index + 1):
                await self.forget([(entry.st_ino, 1)])
                return

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Forget an open directory."""
        self._files.give_back(cast("Lister", self._open.pop(fh)).uid)
