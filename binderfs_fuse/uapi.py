"""The wire definitions of ``uapi/*.h`` in Python: constants by their C names, and a codec for each structure.

Values come from the compiler by way of ``_uapi``; here are only names. A codec packs and unpacks one structure as the
flat tuple of its ``fields``, in the machine's byte order: ``binder_write_read.unpack(data)``. The ``..._NAMES`` tables
turn numbers back into names, for logs and messages.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from binderfs_fuse._uapi import ffi, lib

# binder - protocol version
BINDER_CURRENT_PROTOCOL_VERSION: Final[int] = lib.BINDER_CURRENT_PROTOCOL_VERSION

# binder - objects inside a transaction's data
BINDER_TYPE_BINDER: Final[int] = lib.BINDER_TYPE_BINDER
BINDER_TYPE_HANDLE: Final[int] = lib.BINDER_TYPE_HANDLE
BINDER_TYPE_WEAK_BINDER: Final[int] = lib.BINDER_TYPE_WEAK_BINDER
BINDER_TYPE_WEAK_HANDLE: Final[int] = lib.BINDER_TYPE_WEAK_HANDLE
BINDER_TYPE_PTR: Final[int] = lib.BINDER_TYPE_PTR
BINDER_TYPE_FD: Final[int] = lib.BINDER_TYPE_FD
BINDER_TYPE_FDA: Final[int] = lib.BINDER_TYPE_FDA
FLAT_BINDER_FLAG_PRIORITY_MASK: Final[int] = lib.FLAT_BINDER_FLAG_PRIORITY_MASK
FLAT_BINDER_FLAG_ACCEPTS_FDS: Final[int] = lib.FLAT_BINDER_FLAG_ACCEPTS_FDS
FLAT_BINDER_FLAG_TXN_SECURITY_CTX: Final[int] = lib.FLAT_BINDER_FLAG_TXN_SECURITY_CTX
FLAT_BINDER_FLAG_SCHED_POLICY_SHIFT: Final[int] = lib.FLAT_BINDER_FLAG_SCHED_POLICY_SHIFT
FLAT_BINDER_FLAG_SCHED_POLICY_MASK: Final[int] = lib.FLAT_BINDER_FLAG_SCHED_POLICY_MASK
FLAT_BINDER_FLAG_INHERIT_RT: Final[int] = lib.FLAT_BINDER_FLAG_INHERIT_RT
BINDER_BUFFER_FLAG_HAS_PARENT: Final[int] = lib.BINDER_BUFFER_FLAG_HAS_PARENT

# binder - what commands and returns carry
TF_ONE_WAY: Final[int] = lib.TF_ONE_WAY
TF_ROOT_OBJECT: Final[int] = lib.TF_ROOT_OBJECT
TF_STATUS_CODE: Final[int] = lib.TF_STATUS_CODE
TF_ACCEPT_FDS: Final[int] = lib.TF_ACCEPT_FDS
TF_CLEAR_BUF: Final[int] = lib.TF_CLEAR_BUF
TF_UPDATE_TXN: Final[int] = lib.TF_UPDATE_TXN

# binder - commands: client to driver
BC_TRANSACTION: Final[int] = lib.BC_TRANSACTION
BC_REPLY: Final[int] = lib.BC_REPLY
BC_TRANSACTION_SG: Final[int] = lib.BC_TRANSACTION_SG
BC_REPLY_SG: Final[int] = lib.BC_REPLY_SG
BC_FREE_BUFFER: Final[int] = lib.BC_FREE_BUFFER
BC_INCREFS: Final[int] = lib.BC_INCREFS
BC_ACQUIRE: Final[int] = lib.BC_ACQUIRE
BC_RELEASE: Final[int] = lib.BC_RELEASE
BC_DECREFS: Final[int] = lib.BC_DECREFS
BC_INCREFS_DONE: Final[int] = lib.BC_INCREFS_DONE
BC_ACQUIRE_DONE: Final[int] = lib.BC_ACQUIRE_DONE
BC_ACQUIRE_RESULT: Final[int] = lib.BC_ACQUIRE_RESULT
BC_ATTEMPT_ACQUIRE: Final[int] = lib.BC_ATTEMPT_ACQUIRE
BC_REGISTER_LOOPER: Final[int] = lib.BC_REGISTER_LOOPER
BC_ENTER_LOOPER: Final[int] = lib.BC_ENTER_LOOPER
BC_EXIT_LOOPER: Final[int] = lib.BC_EXIT_LOOPER
BC_REQUEST_DEATH_NOTIFICATION: Final[int] = lib.BC_REQUEST_DEATH_NOTIFICATION
BC_CLEAR_DEATH_NOTIFICATION: Final[int] = lib.BC_CLEAR_DEATH_NOTIFICATION
BC_DEAD_BINDER_DONE: Final[int] = lib.BC_DEAD_BINDER_DONE
BC_REQUEST_FREEZE_NOTIFICATION: Final[int] = lib.BC_REQUEST_FREEZE_NOTIFICATION
BC_CLEAR_FREEZE_NOTIFICATION: Final[int] = lib.BC_CLEAR_FREEZE_NOTIFICATION
BC_FREEZE_NOTIFICATION_DONE: Final[int] = lib.BC_FREEZE_NOTIFICATION_DONE

# binder - returns: driver to client
BR_TRANSACTION: Final[int] = lib.BR_TRANSACTION
BR_TRANSACTION_SEC_CTX: Final[int] = lib.BR_TRANSACTION_SEC_CTX
BR_REPLY: Final[int] = lib.BR_REPLY
BR_NOOP: Final[int] = lib.BR_NOOP
BR_OK: Final[int] = lib.BR_OK
BR_SPAWN_LOOPER: Final[int] = lib.BR_SPAWN_LOOPER
BR_FINISHED: Final[int] = lib.BR_FINISHED
BR_TRANSACTION_COMPLETE: Final[int] = lib.BR_TRANSACTION_COMPLETE
BR_TRANSACTION_PENDING_FROZEN: Final[int] = lib.BR_TRANSACTION_PENDING_FROZEN
BR_ONEWAY_SPAM_SUSPECT: Final[int] = lib.BR_ONEWAY_SPAM_SUSPECT
BR_ERROR: Final[int] = lib.BR_ERROR
BR_DEAD_REPLY: Final[int] = lib.BR_DEAD_REPLY
BR_FAILED_REPLY: Final[int] = lib.BR_FAILED_REPLY
BR_FROZEN_REPLY: Final[int] = lib.BR_FROZEN_REPLY
BR_INCREFS: Final[int] = lib.BR_INCREFS
BR_ACQUIRE: Final[int] = lib.BR_ACQUIRE
BR_RELEASE: Final[int] = lib.BR_RELEASE
BR_DECREFS: Final[int] = lib.BR_DECREFS
BR_ACQUIRE_RESULT: Final[int] = lib.BR_ACQUIRE_RESULT
BR_ATTEMPT_ACQUIRE: Final[int] = lib.BR_ATTEMPT_ACQUIRE
BR_DEAD_BINDER: Final[int] = lib.BR_DEAD_BINDER
BR_CLEAR_DEATH_NOTIFICATION_DONE: Final[int] = lib.BR_CLEAR_DEATH_NOTIFICATION_DONE
BR_FROZEN_BINDER: Final[int] = lib.BR_FROZEN_BINDER
BR_CLEAR_FREEZE_NOTIFICATION_DONE: Final[int] = lib.BR_CLEAR_FREEZE_NOTIFICATION_DONE

# binder - ioctls
BINDER_WRITE_READ: Final[int] = lib.BINDER_WRITE_READ
BINDER_VERSION: Final[int] = lib.BINDER_VERSION
BINDER_SET_CONTEXT_MGR: Final[int] = lib.BINDER_SET_CONTEXT_MGR
BINDER_SET_CONTEXT_MGR_EXT: Final[int] = lib.BINDER_SET_CONTEXT_MGR_EXT
BINDER_SET_MAX_THREADS: Final[int] = lib.BINDER_SET_MAX_THREADS
BINDER_THREAD_EXIT: Final[int] = lib.BINDER_THREAD_EXIT
BINDER_FREEZE: Final[int] = lib.BINDER_FREEZE
BINDER_GET_FROZEN_INFO: Final[int] = lib.BINDER_GET_FROZEN_INFO
BINDER_ENABLE_ONEWAY_SPAM_DETECTION: Final[int] = lib.BINDER_ENABLE_ONEWAY_SPAM_DETECTION
BINDER_GET_EXTENDED_ERROR: Final[int] = lib.BINDER_GET_EXTENDED_ERROR
BINDER_GET_NODE_DEBUG_INFO: Final[int] = lib.BINDER_GET_NODE_DEBUG_INFO
BINDER_GET_NODE_INFO_FOR_REF: Final[int] = lib.BINDER_GET_NODE_INFO_FOR_REF
BINDER_SET_IDLE_TIMEOUT: Final[int] = lib.BINDER_SET_IDLE_TIMEOUT
BINDER_SET_IDLE_PRIORITY: Final[int] = lib.BINDER_SET_IDLE_PRIORITY

# binderfs - the control file
BINDERFS_MAX_NAME: Final[int] = lib.BINDERFS_MAX_NAME
BINDER_CTL_ADD: Final[int] = lib.BINDER_CTL_ADD

# FUSE - protocol version
FUSE_KERNEL_VERSION: Final[int] = lib.FUSE_KERNEL_VERSION
FUSE_KERNEL_MINOR_VERSION: Final[int] = lib.FUSE_KERNEL_MINOR_VERSION
FUSE_ROOT_ID: Final[int] = lib.FUSE_ROOT_ID
FUSE_MIN_READ_BUFFER: Final[int] = lib.FUSE_MIN_READ_BUFFER
FUSE_UNIQUE_RESEND: Final[int] = lib.FUSE_UNIQUE_RESEND

# FUSE - opcodes
FUSE_LOOKUP: Final[int] = lib.FUSE_LOOKUP
FUSE_FORGET: Final[int] = lib.FUSE_FORGET
FUSE_GETATTR: Final[int] = lib.FUSE_GETATTR
FUSE_SETATTR: Final[int] = lib.FUSE_SETATTR
FUSE_READLINK: Final[int] = lib.FUSE_READLINK
FUSE_SYMLINK: Final[int] = lib.FUSE_SYMLINK
FUSE_MKNOD: Final[int] = lib.FUSE_MKNOD
FUSE_MKDIR: Final[int] = lib.FUSE_MKDIR
FUSE_UNLINK: Final[int] = lib.FUSE_UNLINK
FUSE_RMDIR: Final[int] = lib.FUSE_RMDIR
FUSE_RENAME: Final[int] = lib.FUSE_RENAME
FUSE_LINK: Final[int] = lib.FUSE_LINK
FUSE_OPEN: Final[int] = lib.FUSE_OPEN
FUSE_READ: Final[int] = lib.FUSE_READ
FUSE_WRITE: Final[int] = lib.FUSE_WRITE
FUSE_STATFS: Final[int] = lib.FUSE_STATFS
FUSE_RELEASE: Final[int] = lib.FUSE_RELEASE
FUSE_FSYNC: Final[int] = lib.FUSE_FSYNC
FUSE_SETXATTR: Final[int] = lib.FUSE_SETXATTR
FUSE_GETXATTR: Final[int] = lib.FUSE_GETXATTR
FUSE_LISTXATTR: Final[int] = lib.FUSE_LISTXATTR
FUSE_REMOVEXATTR: Final[int] = lib.FUSE_REMOVEXATTR
FUSE_FLUSH: Final[int] = lib.FUSE_FLUSH
FUSE_INIT: Final[int] = lib.FUSE_INIT
FUSE_OPENDIR: Final[int] = lib.FUSE_OPENDIR
FUSE_READDIR: Final[int] = lib.FUSE_READDIR
FUSE_RELEASEDIR: Final[int] = lib.FUSE_RELEASEDIR
FUSE_FSYNCDIR: Final[int] = lib.FUSE_FSYNCDIR
FUSE_GETLK: Final[int] = lib.FUSE_GETLK
FUSE_SETLK: Final[int] = lib.FUSE_SETLK
FUSE_SETLKW: Final[int] = lib.FUSE_SETLKW
FUSE_ACCESS: Final[int] = lib.FUSE_ACCESS
FUSE_CREATE: Final[int] = lib.FUSE_CREATE
FUSE_INTERRUPT: Final[int] = lib.FUSE_INTERRUPT
FUSE_BMAP: Final[int] = lib.FUSE_BMAP
FUSE_DESTROY: Final[int] = lib.FUSE_DESTROY
FUSE_IOCTL: Final[int] = lib.FUSE_IOCTL
FUSE_POLL: Final[int] = lib.FUSE_POLL
FUSE_NOTIFY_REPLY: Final[int] = lib.FUSE_NOTIFY_REPLY
FUSE_BATCH_FORGET: Final[int] = lib.FUSE_BATCH_FORGET
FUSE_FALLOCATE: Final[int] = lib.FUSE_FALLOCATE
FUSE_READDIRPLUS: Final[int] = lib.FUSE_READDIRPLUS
FUSE_RENAME2: Final[int] = lib.FUSE_RENAME2
FUSE_LSEEK: Final[int] = lib.FUSE_LSEEK
FUSE_COPY_FILE_RANGE: Final[int] = lib.FUSE_COPY_FILE_RANGE
FUSE_SETUPMAPPING: Final[int] = lib.FUSE_SETUPMAPPING
FUSE_REMOVEMAPPING: Final[int] = lib.FUSE_REMOVEMAPPING
FUSE_SYNCFS: Final[int] = lib.FUSE_SYNCFS
FUSE_TMPFILE: Final[int] = lib.FUSE_TMPFILE
FUSE_STATX: Final[int] = lib.FUSE_STATX
FUSE_COPY_FILE_RANGE_64: Final[int] = lib.FUSE_COPY_FILE_RANGE_64

# FUSE - notifications: fuse_out_header.error with unique 0
FUSE_NOTIFY_POLL: Final[int] = lib.FUSE_NOTIFY_POLL
FUSE_NOTIFY_INVAL_INODE: Final[int] = lib.FUSE_NOTIFY_INVAL_INODE
FUSE_NOTIFY_INVAL_ENTRY: Final[int] = lib.FUSE_NOTIFY_INVAL_ENTRY
FUSE_NOTIFY_STORE: Final[int] = lib.FUSE_NOTIFY_STORE
FUSE_NOTIFY_RETRIEVE: Final[int] = lib.FUSE_NOTIFY_RETRIEVE
FUSE_NOTIFY_DELETE: Final[int] = lib.FUSE_NOTIFY_DELETE
FUSE_NOTIFY_RESEND: Final[int] = lib.FUSE_NOTIFY_RESEND
FUSE_NOTIFY_INC_EPOCH: Final[int] = lib.FUSE_NOTIFY_INC_EPOCH
FUSE_NOTIFY_PRUNE: Final[int] = lib.FUSE_NOTIFY_PRUNE
FUSE_EXPIRE_ONLY: Final[int] = lib.FUSE_EXPIRE_ONLY

# FUSE - INIT; flags from bit 32 on travel in flags2, shifted down
FUSE_ASYNC_READ: Final[int] = lib.FUSE_ASYNC_READ
FUSE_POSIX_LOCKS: Final[int] = lib.FUSE_POSIX_LOCKS
FUSE_FILE_OPS: Final[int] = lib.FUSE_FILE_OPS
FUSE_ATOMIC_O_TRUNC: Final[int] = lib.FUSE_ATOMIC_O_TRUNC
FUSE_EXPORT_SUPPORT: Final[int] = lib.FUSE_EXPORT_SUPPORT
FUSE_BIG_WRITES: Final[int] = lib.FUSE_BIG_WRITES
FUSE_DONT_MASK: Final[int] = lib.FUSE_DONT_MASK
FUSE_SPLICE_WRITE: Final[int] = lib.FUSE_SPLICE_WRITE
FUSE_SPLICE_MOVE: Final[int] = lib.FUSE_SPLICE_MOVE
FUSE_SPLICE_READ: Final[int] = lib.FUSE_SPLICE_READ
FUSE_FLOCK_LOCKS: Final[int] = lib.FUSE_FLOCK_LOCKS
FUSE_HAS_IOCTL_DIR: Final[int] = lib.FUSE_HAS_IOCTL_DIR
FUSE_AUTO_INVAL_DATA: Final[int] = lib.FUSE_AUTO_INVAL_DATA
FUSE_DO_READDIRPLUS: Final[int] = lib.FUSE_DO_READDIRPLUS
FUSE_READDIRPLUS_AUTO: Final[int] = lib.FUSE_READDIRPLUS_AUTO
FUSE_ASYNC_DIO: Final[int] = lib.FUSE_ASYNC_DIO
FUSE_WRITEBACK_CACHE: Final[int] = lib.FUSE_WRITEBACK_CACHE
FUSE_NO_OPEN_SUPPORT: Final[int] = lib.FUSE_NO_OPEN_SUPPORT
FUSE_PARALLEL_DIROPS: Final[int] = lib.FUSE_PARALLEL_DIROPS
FUSE_HANDLE_KILLPRIV: Final[int] = lib.FUSE_HANDLE_KILLPRIV
FUSE_POSIX_ACL: Final[int] = lib.FUSE_POSIX_ACL
FUSE_ABORT_ERROR: Final[int] = lib.FUSE_ABORT_ERROR
FUSE_MAX_PAGES: Final[int] = lib.FUSE_MAX_PAGES
FUSE_CACHE_SYMLINKS: Final[int] = lib.FUSE_CACHE_SYMLINKS
FUSE_NO_OPENDIR_SUPPORT: Final[int] = lib.FUSE_NO_OPENDIR_SUPPORT
FUSE_EXPLICIT_INVAL_DATA: Final[int] = lib.FUSE_EXPLICIT_INVAL_DATA
FUSE_MAP_ALIGNMENT: Final[int] = lib.FUSE_MAP_ALIGNMENT
FUSE_SUBMOUNTS: Final[int] = lib.FUSE_SUBMOUNTS
FUSE_HANDLE_KILLPRIV_V2: Final[int] = lib.FUSE_HANDLE_KILLPRIV_V2
FUSE_SETXATTR_EXT: Final[int] = lib.FUSE_SETXATTR_EXT
FUSE_INIT_EXT: Final[int] = lib.FUSE_INIT_EXT
FUSE_SECURITY_CTX: Final[int] = lib.FUSE_SECURITY_CTX
FUSE_HAS_INODE_DAX: Final[int] = lib.FUSE_HAS_INODE_DAX
FUSE_CREATE_SUPP_GROUP: Final[int] = lib.FUSE_CREATE_SUPP_GROUP
FUSE_HAS_EXPIRE_ONLY: Final[int] = lib.FUSE_HAS_EXPIRE_ONLY
FUSE_DIRECT_IO_ALLOW_MMAP: Final[int] = lib.FUSE_DIRECT_IO_ALLOW_MMAP
FUSE_PASSTHROUGH: Final[int] = lib.FUSE_PASSTHROUGH
FUSE_NO_EXPORT_SUPPORT: Final[int] = lib.FUSE_NO_EXPORT_SUPPORT
FUSE_HAS_RESEND: Final[int] = lib.FUSE_HAS_RESEND
FUSE_ALLOW_IDMAP: Final[int] = lib.FUSE_ALLOW_IDMAP
FUSE_OVER_IO_URING: Final[int] = lib.FUSE_OVER_IO_URING
FUSE_REQUEST_TIMEOUT: Final[int] = lib.FUSE_REQUEST_TIMEOUT
FUSE_HAS_IO_URING_BUFPOOL: Final[int] = lib.FUSE_HAS_IO_URING_BUFPOOL

# FUSE - ioctl, poll, interrupt
FUSE_IOCTL_COMPAT: Final[int] = lib.FUSE_IOCTL_COMPAT
FUSE_IOCTL_UNRESTRICTED: Final[int] = lib.FUSE_IOCTL_UNRESTRICTED
FUSE_IOCTL_RETRY: Final[int] = lib.FUSE_IOCTL_RETRY
FUSE_IOCTL_32BIT: Final[int] = lib.FUSE_IOCTL_32BIT
FUSE_IOCTL_DIR: Final[int] = lib.FUSE_IOCTL_DIR
FUSE_IOCTL_COMPAT_X32: Final[int] = lib.FUSE_IOCTL_COMPAT_X32
FUSE_IOCTL_MAX_IOV: Final[int] = lib.FUSE_IOCTL_MAX_IOV
FUSE_POLL_SCHEDULE_NOTIFY: Final[int] = lib.FUSE_POLL_SCHEDULE_NOTIFY

# FUSE - names and attributes
FUSE_GETATTR_FH: Final[int] = lib.FUSE_GETATTR_FH
FATTR_MODE: Final[int] = lib.FATTR_MODE
FATTR_UID: Final[int] = lib.FATTR_UID
FATTR_GID: Final[int] = lib.FATTR_GID
FATTR_SIZE: Final[int] = lib.FATTR_SIZE
FATTR_ATIME: Final[int] = lib.FATTR_ATIME
FATTR_MTIME: Final[int] = lib.FATTR_MTIME
FATTR_FH: Final[int] = lib.FATTR_FH
FATTR_ATIME_NOW: Final[int] = lib.FATTR_ATIME_NOW
FATTR_MTIME_NOW: Final[int] = lib.FATTR_MTIME_NOW
FATTR_LOCKOWNER: Final[int] = lib.FATTR_LOCKOWNER
FATTR_CTIME: Final[int] = lib.FATTR_CTIME
FATTR_KILL_SUIDGID: Final[int] = lib.FATTR_KILL_SUIDGID

# FUSE - open files
FOPEN_DIRECT_IO: Final[int] = lib.FOPEN_DIRECT_IO
FOPEN_KEEP_CACHE: Final[int] = lib.FOPEN_KEEP_CACHE
FOPEN_NONSEEKABLE: Final[int] = lib.FOPEN_NONSEEKABLE
FOPEN_CACHE_DIR: Final[int] = lib.FOPEN_CACHE_DIR
FOPEN_STREAM: Final[int] = lib.FOPEN_STREAM
FOPEN_NOFLUSH: Final[int] = lib.FOPEN_NOFLUSH
FOPEN_PARALLEL_DIRECT_WRITES: Final[int] = lib.FOPEN_PARALLEL_DIRECT_WRITES
FOPEN_PASSTHROUGH: Final[int] = lib.FOPEN_PASSTHROUGH
FOPEN_IO_URING_ZERO_COPY: Final[int] = lib.FOPEN_IO_URING_ZERO_COPY
FUSE_OPEN_KILL_SUIDGID: Final[int] = lib.FUSE_OPEN_KILL_SUIDGID
FUSE_RELEASE_FLUSH: Final[int] = lib.FUSE_RELEASE_FLUSH
FUSE_RELEASE_FLOCK_UNLOCK: Final[int] = lib.FUSE_RELEASE_FLOCK_UNLOCK
FUSE_READ_LOCKOWNER: Final[int] = lib.FUSE_READ_LOCKOWNER
FUSE_WRITE_CACHE: Final[int] = lib.FUSE_WRITE_CACHE
FUSE_WRITE_LOCKOWNER: Final[int] = lib.FUSE_WRITE_LOCKOWNER
FUSE_WRITE_KILL_SUIDGID: Final[int] = lib.FUSE_WRITE_KILL_SUIDGID

# FUSE - ioctls of /dev/fuse itself
FUSE_DEV_IOC_MAGIC: Final[int] = lib.FUSE_DEV_IOC_MAGIC
FUSE_DEV_IOC_CLONE: Final[int] = lib.FUSE_DEV_IOC_CLONE
FUSE_DEV_IOC_BACKING_OPEN: Final[int] = lib.FUSE_DEV_IOC_BACKING_OPEN
FUSE_DEV_IOC_BACKING_CLOSE: Final[int] = lib.FUSE_DEV_IOC_BACKING_CLOSE
FUSE_DEV_IOC_SYNC_INIT: Final[int] = lib.FUSE_DEV_IOC_SYNC_INIT


def ioctl_size(command: int) -> int:
    """Return the bytes of an ioctl's, command's or return's argument (``_IOC_SIZE``)."""
    return command >> 16 & 0x3FFF


# Names, for logs.


def _named(prefix: str, kind: str) -> dict[int, str]:
    """Name the constants with this prefix whose ioctl number is of this kind (``_IOC_TYPE``)."""
    return {
        value: name for name, value in globals().items() if name.startswith(prefix) and value >> 8 & 0xFF == ord(kind)
    }


def _between(first: str, last: str) -> dict[int, str]:
    """Name a run of constants that no prefix of their own tells apart, by the order in which they stand above."""
    names = list(globals())
    return {globals()[name]: name for name in names[names.index(first) : names.index(last) + 1]}


BC_NAMES: Final = _named("BC_", "c")
BR_NAMES: Final = _named("BR_", "r")
IOCTL_NAMES: Final = _named("BINDER_", "b")
TYPE_NAMES: Final = _between("BINDER_TYPE_BINDER", "BINDER_TYPE_FDA")
OPCODE_NAMES: Final = _between("FUSE_LOOKUP", "FUSE_COPY_FILE_RANGE_64")
NOTIFY_NAMES: Final = _between("FUSE_NOTIFY_POLL", "FUSE_NOTIFY_PRUNE")


# Structures.

_FORMATS: Final = {
    "char": "c",
    "uint8_t": "B",
    "uint16_t": "H",
    "int32_t": "i",
    "uint32_t": "I",
    "int64_t": "q",
    "uint64_t": "Q",
}
# What FUSE leaves unused is written as zeros and not read. Binder's pad and reserved fields are values like any other:
# the driver checks some and hands others on.
_UNUSED: Final = ("padding", "unused", "dummy")


@dataclass(frozen=True, slots=True)
class Codec:
    """Packs and unpacks one C structure; as ``struct.Struct``, whose errors it raises.

    ``fields`` names the values of the tuple, nested ones with dots; ``offsets`` says at which byte each lies.
    """

    name: str
    format: str
    fields: tuple[str, ...]
    offsets: dict[str, int]
    size: int
    pack: Callable[..., bytes]
    pack_into: Callable[..., None]
    unpack: Callable[[Any], tuple[Any, ...]]
    unpack_from: Callable[..., tuple[Any, ...]]
    iter_unpack: Callable[[Any], Iterator[tuple[Any, ...]]]

    def __repr__(self) -> str:
        """Show the structure's name and size."""
        return f"<Codec {self.name}: {self.size} bytes>"


def _codec(name: str, layout: str, offsets: dict[str, int]) -> Codec:
    compiled = struct.Struct(layout)
    return Codec(
        name,
        layout,
        tuple(offsets),
        offsets,
        compiled.size,
        compiled.pack,
        compiled.pack_into,
        compiled.unpack,
        compiled.unpack_from,
        compiled.iter_unpack,
    )


def _leaves(ctype: Any, prefix: str, base: int, members: set[str]) -> Iterator[tuple[str, int, Any]]:
    """Yield path, offset and type of each scalar or array in a structure, of overlapping ones those in ``members``."""
    fields = [(prefix + name, base + field.offset, field.type) for name, field in ctype.fields]
    for path, offset, field_type in fields:
        end = offset + ffi.sizeof(field_type)
        rivals = {
            other for other, start, other_type in fields if start < end and offset < start + ffi.sizeof(other_type)
        }
        if len(rivals) > 1:
            chosen = rivals & members
            if len(chosen) != 1:
                message = f"{ctype.cname}: which one of {sorted(rivals)}?"
                raise ValueError(message)
            if path not in chosen:
                continue
        if field_type.kind in ("struct", "union"):
            yield from _leaves(field_type, path + ".", offset, members)
        else:
            yield path, offset, field_type


def codec(name: str, *members: str) -> Codec:
    """Make the codec of ``struct name``; of each union in it, ``members`` names the member to use, by its path.

    Raises ``ValueError`` where a union's member is not named.
    """
    ctype = ffi.typeof("struct " + name)
    layout = "="
    end = 0
    offsets = {}
    for path, offset, field_type in _leaves(ctype, "", 0, set(members)):
        layout += f"{offset - end}x" if offset > end else ""
        end = offset + ffi.sizeof(field_type)
        if path.rpartition(".")[2].startswith(_UNUSED):
            layout += f"{end - offset}x"
            continue
        layout += f"{field_type.length}s" if field_type.kind == "array" else _FORMATS[field_type.cname]
        offsets[path] = offset
    layout += f"{ffi.sizeof(ctype) - end}x" if end < ffi.sizeof(ctype) else ""
    return _codec(name, layout, offsets)


def framed(payload: Codec) -> Codec:
    """Make the codec of a command or return with this payload: the 32-bit number in front, nothing in between."""
    offsets = {"command": 0} | {field: offset + 4 for field, offset in payload.offsets.items()}
    return _codec(payload.name, "=I" + payload.format[1:], offsets)


binder_object_header: Final = codec("binder_object_header")
flat_binder_object: Final = codec("flat_binder_object", "binder")
flat_binder_object_handle: Final = codec("flat_binder_object", "handle")
binder_fd_object: Final = codec("binder_fd_object", "fd")
binder_fd_array_object: Final = codec("binder_fd_array_object")
binder_buffer_object: Final = codec("binder_buffer_object")
binder_transaction_data: Final = codec("binder_transaction_data", "target.handle", "data.ptr")
binder_transaction_data_received: Final = codec("binder_transaction_data", "target.ptr", "data.ptr")
binder_transaction_data_sg: Final = codec(
    "binder_transaction_data_sg", "transaction_data.target.handle", "transaction_data.data.ptr"
)
binder_transaction_data_secctx: Final = codec(
    "binder_transaction_data_secctx", "transaction_data.target.ptr", "transaction_data.data.ptr"
)
binder_ptr_cookie: Final = codec("binder_ptr_cookie")
binder_handle_cookie: Final = codec("binder_handle_cookie")
binder_frozen_state_info: Final = codec("binder_frozen_state_info")
binder_pri_desc: Final = codec("binder_pri_desc")
binder_pri_ptr_cookie: Final = codec("binder_pri_ptr_cookie")
binder_write_read: Final = codec("binder_write_read")
binder_version: Final = codec("binder_version")
binder_node_debug_info: Final = codec("binder_node_debug_info")
binder_node_info_for_ref: Final = codec("binder_node_info_for_ref")
binder_freeze_info: Final = codec("binder_freeze_info")
binder_frozen_status_info: Final = codec("binder_frozen_status_info")
binder_extended_error: Final = codec("binder_extended_error")

binderfs_device: Final = codec("binderfs_device")

fuse_in_header: Final = codec("fuse_in_header")
fuse_out_header: Final = codec("fuse_out_header")
fuse_notify_poll_wakeup_out: Final = codec("fuse_notify_poll_wakeup_out")
fuse_notify_inval_inode_out: Final = codec("fuse_notify_inval_inode_out")
fuse_notify_inval_entry_out: Final = codec("fuse_notify_inval_entry_out")
fuse_notify_delete_out: Final = codec("fuse_notify_delete_out")
fuse_notify_store_out: Final = codec("fuse_notify_store_out")
fuse_init_in: Final = codec("fuse_init_in")
fuse_init_out: Final = codec("fuse_init_out")
fuse_ioctl_in: Final = codec("fuse_ioctl_in")
fuse_ioctl_out: Final = codec("fuse_ioctl_out")
fuse_poll_in: Final = codec("fuse_poll_in")
fuse_poll_out: Final = codec("fuse_poll_out")
fuse_interrupt_in: Final = codec("fuse_interrupt_in")
fuse_attr: Final = codec("fuse_attr")
fuse_entry_out: Final = codec("fuse_entry_out")
fuse_getattr_in: Final = codec("fuse_getattr_in")
fuse_attr_out: Final = codec("fuse_attr_out")
fuse_setattr_in: Final = codec("fuse_setattr_in")
fuse_forget_in: Final = codec("fuse_forget_in")
fuse_forget_one: Final = codec("fuse_forget_one")
fuse_batch_forget_in: Final = codec("fuse_batch_forget_in")
fuse_open_in: Final = codec("fuse_open_in")
fuse_create_in: Final = codec("fuse_create_in")
fuse_open_out: Final = codec("fuse_open_out")
fuse_release_in: Final = codec("fuse_release_in")
fuse_flush_in: Final = codec("fuse_flush_in")
fuse_read_in: Final = codec("fuse_read_in")
fuse_write_in: Final = codec("fuse_write_in")
fuse_write_out: Final = codec("fuse_write_out")
fuse_backing_map: Final = codec("fuse_backing_map")
