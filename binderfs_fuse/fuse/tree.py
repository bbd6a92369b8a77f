"""The tree of a binderfs: its names, their attributes, and what reading a file of it gives, as pyfuse3 operations.

What is there, and each errno, is that of the kernel's binderfs (Linux 7.3, ``drivers/android/binderfs.c``),
which allows less than most file systems: devices come by BINDER_CTL_ADD, go by unlink and move by rename; nothing
else is made or removed. `tests/tree` holds all of it against the real one.

The inodes are in `inodes.py`. What every open of a device needs never comes here: the channel serves LOOKUP, FORGET,
GETATTR, OPEN, FLUSH and RELEASE, and reads of logs, in the thread that reads requests. What is left is rare.

Everything here runs on trio's thread. An operation holds the guard of the inodes from its beginning to its end, for it
never awaits anything that takes time.
"""

from __future__ import annotations

import errno
import functools
import inspect
import stat
import time
from typing import TYPE_CHECKING, Any, Protocol

import pyfuse3
from pyfuse3 import FUSEError

from binderfs_fuse import complaints
from binderfs_fuse.fuse import inodes
from binderfs_fuse.fuse.inodes import Directory, File, Inodes
from binderfs_fuse.fuse.texts import Rests, Texts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from binderfs_fuse.engine.context import Engine
    from binderfs_fuse.fuse.inodes import Node, Owner, Text
    from binderfs_fuse.fuse.settings import Settings
    from binderfs_fuse.fuse.texts import Source


class Devices(inodes.Devices, Protocol):
    """What the tree asks of the device plane, beside what inodes do."""

    def find_mappings(self) -> None:
        """Look up where processes have mapped their device, for the logs."""

    def wake(self) -> None:
        """Resume, and let poll again, whom the engine has made ready outside of a request: a look at the logs may."""


def _surviving(operation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    async def survivor(tree: Tree, *arguments: Any) -> Any:
        try:
            with tree.inodes.guard:
                return await operation(tree, *arguments)
        except FUSEError:
            raise
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from error
        except Exception as error:
            complaints.mistake(f"{operation.__name__} failed")
            raise FUSEError(errno.EIO) from error

    return survivor


def survive_mistakes(operations: type[Tree]) -> type[Tree]:
    """Make the operations of a class answer EIO, and log it, where one raises what it must not, which ends pyfuse3.

    An `OSError` is the answer of its number. Each operation holds the guard of the inodes.
    """
    for name, operation in list(vars(operations).items()):
        if inspect.iscoroutinefunction(operation):
            setattr(operations, name, _surviving(operation))
    return operations


@survive_mistakes
class Tree(pyfuse3.Operations):  # type: ignore[misc] # pyfuse3 is untyped to mypy, see pyproject.toml
    """The operations of one mounted binderfs; see `Inodes` for `settings` and `owner`.

    Raises `OSError` as `Inodes` does.
    """

    supports_dot_lookup = False

    def __init__(self, engine: Engine, plane: Devices, settings: Settings, owner: Owner = (0, 0)) -> None:
        super().__init__()
        self._engine = engine
        self._plane = plane
        self.texts = Texts(engine.quota, self._take_source)
        """What serves reads of logs. They do not come here, but from the channel."""
        self.inodes = Inodes(engine, plane, settings, self.texts, owner)

    def _attributes(self, node: Node, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = node.mode
        entry.st_nlink = node.nlink
        entry.st_uid = node.uid
        entry.st_gid = node.gid
        entry.st_size = self.inodes.size(node, inode)
        entry.st_blksize = inodes.BLOCK_SIZE
        entry.st_blocks = 0
        entry.st_atime_ns = node.atime
        entry.st_mtime_ns = node.mtime
        entry.st_ctime_ns = node.ctime
        entry.attr_timeout = inodes.attribute_timeout(node, inode)
        entry.entry_timeout = inodes.entry_timeout(inode)
        return entry

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
        node = self.inodes.node(inode)
        if fields.update_size and (fh is not None or not isinstance(node, File)):
            raise FUSEError(errno.EINVAL)
        self.inodes.want_write()
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
        data.f_namemax = inodes.NAME_MAX
        return data

    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """Say that there are no extended attributes; reading or setting one is not supported at all."""
        del inode, ctx
        return ()

    # Changing the tree

    async def unlink(self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a device. EPERM: anything else."""
        del ctx
        self.inodes.want_write()
        directory, node = self.inodes.child(parent_inode, name)
        if directory.fixed or node is self.inodes.control:
            raise FUSEError(errno.EPERM)
        self.inodes.drop(directory.detach(name))

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
        self.inodes.want_write()
        old, node = self.inodes.child(parent_inode_old, name_old)
        new = self.inodes.directory(parent_inode_new)
        target = new.names.get(name_new)
        if old.fixed or self.inodes.control in (node, target):
            raise FUSEError(errno.EPERM)
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE):
            raise FUSEError(errno.EINVAL)
        if node is target:
            # The kernel makes nothing of this itself only where both have one inode, which a device's have not.
            return
        if flags & pyfuse3.RENAME_EXCHANGE:
            if target is None:
                raise FUSEError(errno.ENOENT)
            old.detach(name_old)
            new.detach(name_new)
            old.attach(name_old, target)
            new.attach(name_new, node)
            return
        if target is not None:
            if flags & pyfuse3.RENAME_NOREPLACE:
                raise FUSEError(errno.EEXIST)
            if isinstance(target, Directory) and target.names:
                raise FUSEError(errno.ENOTEMPTY)
            self.inodes.drop(new.detach(name_new))
        old.detach(name_old)
        new.attach(name_new, node)

    async def mkdir(
        self, parent_inode: pyfuse3.InodeT, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse with EPERM."""
        del parent_inode, name, mode, ctx
        self.inodes.want_write()
        raise FUSEError(errno.EPERM)

    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Refuse with EPERM."""
        del parent_inode, name, ctx
        self.inodes.want_write()
        raise FUSEError(errno.EPERM)

    async def symlink(
        self, parent_inode: pyfuse3.InodeT, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse with EPERM."""
        del parent_inode, name, target, ctx
        self.inodes.want_write()
        raise FUSEError(errno.EPERM)

    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Refuse with EPERM."""
        del inode, new_parent_inode, new_name, ctx
        self.inodes.want_write()
        raise FUSEError(errno.EPERM)

    async def mknod(
        self, parent_inode: pyfuse3.InodeT, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse: a regular file with EACCES, as where there is no create operation, the rest with EPERM."""
        del parent_inode, name, rdev, ctx
        self.inodes.want_write()
        raise FUSEError(errno.EACCES if stat.S_ISREG(mode) else errno.EPERM)

    async def create(
        self, parent_inode: pyfuse3.InodeT, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Refuse with EACCES."""
        del parent_inode, name, mode, flags, ctx
        self.inodes.want_write()
        raise FUSEError(errno.EACCES)

    # Open files

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Refuse with EINVAL what is no log, as where there is no read operation."""
        del fh, off, size
        raise FUSEError(errno.EINVAL)

    def _take_source(self, source: Source, check: Callable[[int], None]) -> bytes:
        return self.take(source.text, check)

    def take(self, text: Text, check: Callable[[int], None] | None = None) -> bytes:
        """Collect a text, with the engine locked for one piece at a time: what is long must not stop it for long.

        `check` is called with the length after each piece, and may raise.
        """
        self._plane.find_mappings()
        chunks: list[bytes] = []
        length = 0
        with self._engine.lock:
            source = text()
        rests = Rests()
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
            rests.rest()

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Refuse with EINVAL, as where there is no write operation."""
        del fh, off, buf
        raise FUSEError(errno.EINVAL)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Refuse with EINVAL, as where there is no fsync operation."""
        del fh, datasync
        raise FUSEError(errno.EINVAL)

    # Open directories

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """Open a directory. EMFILE, ENFILE: the user, or all users, have too many opens."""
        return self.inodes.open_directory(inode, ctx.uid)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List names, the newest first, without those that are made after reading began.

        `start_id` is 0 for the first, 1 behind the dot, 2 behind both dots, and behind a name `NEWEST` less its number.
        """
        lister = self.inodes.lister(fh)
        directory = lister.directory
        place = start_id
        while True:
            node: Node
            if not place:
                name, node, following = b".", directory, 1
            elif place == 1:
                name, node, following = b"..", directory.parent, 2
            else:
                found = directory.before(inodes.NEWEST if place == 2 else inodes.NEWEST - place)
                if found is None:
                    return
                number, name = found
                node, following = directory.names[name], inodes.NEWEST - number
            try:
                inode = self.inodes.enter(node, lister.uid)
            except OSError:
                if place > start_id:
                    # The kernel has inodes of this answer already, which an error would not tell it of.
                    return
                raise
            if not pyfuse3.readdir_reply(token, name, self._attributes(node, inode), following):
                self.inodes.forget(inode, 1)
                return
            place = following

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Forget an open directory."""
        self.inodes.release(fh)
