/* SPDX-License-Identifier: Apache-2.0
 *
 * FUSE as spoken over /dev/fuse, protocol 7.46 (Linux 7.3): what the channel answers itself, amends or sends unasked, and
 * what it needs to know to relay the rest. Rules of form: see binder.h.
 */
#ifndef BINDERFS_FUSE_UAPI_FUSE_H
#define BINDERFS_FUSE_UAPI_FUSE_H

#include <stdint.h>
#include <sys/ioctl.h>

#define FUSE_KERNEL_VERSION 7
#define FUSE_KERNEL_MINOR_VERSION 46
#define FUSE_ROOT_ID 1
#define FUSE_MIN_READ_BUFFER 8192
#define FUSE_UNIQUE_RESEND (1ULL << 63)

/* ---- headers ---- */

struct fuse_in_header {
    uint32_t len;
    uint32_t opcode;
    uint64_t unique;
    uint64_t nodeid;
    uint32_t uid;
    uint32_t gid;
    uint32_t pid;
    uint16_t total_extlen;
    uint16_t padding;
};

struct fuse_out_header {
    uint32_t len;
    int32_t error;
    uint64_t unique;
};

/* ---- opcodes ---- */

#define FUSE_LOOKUP 1
#define FUSE_FORGET 2
#define FUSE_GETATTR 3
#define FUSE_SETATTR 4
#define FUSE_READLINK 5
#define FUSE_SYMLINK 6
#define FUSE_MKNOD 8
#define FUSE_MKDIR 9
#define FUSE_UNLINK 10
#define FUSE_RMDIR 11
#define FUSE_RENAME 12
#define FUSE_LINK 13
#define FUSE_OPEN 14
#define FUSE_READ 15
#define FUSE_WRITE 16
#define FUSE_STATFS 17
#define FUSE_RELEASE 18
#define FUSE_FSYNC 20
#define FUSE_SETXATTR 21
#define FUSE_GETXATTR 22
#define FUSE_LISTXATTR 23
#define FUSE_REMOVEXATTR 24
#define FUSE_FLUSH 25
#define FUSE_INIT 26
#define FUSE_OPENDIR 27
#define FUSE_READDIR 28
#define FUSE_RELEASEDIR 29
#define FUSE_FSYNCDIR 30
#define FUSE_GETLK 31
#define FUSE_SETLK 32
#define FUSE_SETLKW 33
#define FUSE_ACCESS 34
#define FUSE_CREATE 35
#define FUSE_INTERRUPT 36
#define FUSE_BMAP 37
#define FUSE_DESTROY 38
#define FUSE_IOCTL 39
#define FUSE_POLL 40
#define FUSE_NOTIFY_REPLY 41
#define FUSE_BATCH_FORGET 42
#define FUSE_FALLOCATE 43
#define FUSE_READDIRPLUS 44
#define FUSE_RENAME2 45
#define FUSE_LSEEK 46
#define FUSE_COPY_FILE_RANGE 47
#define FUSE_SETUPMAPPING 48
#define FUSE_REMOVEMAPPING 49
#define FUSE_SYNCFS 50
#define FUSE_TMPFILE 51
#define FUSE_STATX 52
#define FUSE_COPY_FILE_RANGE_64 53

/* ---- notifications: fuse_out_header.error with unique 0 ---- */

#define FUSE_NOTIFY_POLL 1
#define FUSE_NOTIFY_INVAL_INODE 2
#define FUSE_NOTIFY_INVAL_ENTRY 3
#define FUSE_NOTIFY_STORE 4
#define FUSE_NOTIFY_RETRIEVE 5
#define FUSE_NOTIFY_DELETE 6
#define FUSE_NOTIFY_RESEND 7
#define FUSE_NOTIFY_INC_EPOCH 8
#define FUSE_NOTIFY_PRUNE 9

#define FUSE_EXPIRE_ONLY (1 << 0)

struct fuse_notify_poll_wakeup_out {
    uint64_t kh;
};

struct fuse_notify_inval_inode_out {
    uint64_t ino;
    int64_t off;
    int64_t len;
};

struct fuse_notify_inval_entry_out {
    uint64_t parent;
    uint32_t namelen;
    uint32_t flags;
};

struct fuse_notify_delete_out {
    uint64_t parent;
    uint64_t child;
    uint32_t namelen;
    uint32_t padding;
};

struct fuse_notify_store_out {
    uint64_t nodeid;
    uint64_t offset;
    uint32_t size;
    uint32_t padding;
};

/* ---- INIT; flags from bit 32 on travel in flags2, shifted down ---- */

#define FUSE_ASYNC_READ (1U << 0)
#define FUSE_POSIX_LOCKS (1U << 1)
#define FUSE_FILE_OPS (1U << 2)
#define FUSE_ATOMIC_O_TRUNC (1U << 3)
#define FUSE_EXPORT_SUPPORT (1U << 4)
#define FUSE_BIG_WRITES (1U << 5)
#define FUSE_DONT_MASK (1U << 6)
#define FUSE_SPLICE_WRITE (1U << 7)
#define FUSE_SPLICE_MOVE (1U << 8)
#define FUSE_SPLICE_READ (1U << 9)
#define FUSE_FLOCK_LOCKS (1U << 10)
#define FUSE_HAS_IOCTL_DIR (1U << 11)
#define FUSE_AUTO_INVAL_DATA (1U << 12)
#define FUSE_DO_READDIRPLUS (1U << 13)
#define FUSE_READDIRPLUS_AUTO (1U << 14)
#define FUSE_ASYNC_DIO (1U << 15)
#define FUSE_WRITEBACK_CACHE (1U << 16)
#define FUSE_NO_OPEN_SUPPORT (1U << 17)
#define FUSE_PARALLEL_DIROPS (1U << 18)
#define FUSE_HANDLE_KILLPRIV (1U << 19)
#define FUSE_POSIX_ACL (1U << 20)
#define FUSE_ABORT_ERROR (1U << 21)
#define FUSE_MAX_PAGES (1U << 22)
#define FUSE_CACHE_SYMLINKS (1U << 23)
#define FUSE_NO_OPENDIR_SUPPORT (1U << 24)
#define FUSE_EXPLICIT_INVAL_DATA (1U << 25)
#define FUSE_MAP_ALIGNMENT (1U << 26)
#define FUSE_SUBMOUNTS (1U << 27)
#define FUSE_HANDLE_KILLPRIV_V2 (1U << 28)
#define FUSE_SETXATTR_EXT (1U << 29)
#define FUSE_INIT_EXT (1U << 30)
#define FUSE_SECURITY_CTX (1ULL << 32)
#define FUSE_HAS_INODE_DAX (1ULL << 33)
#define FUSE_CREATE_SUPP_GROUP (1ULL << 34)
#define FUSE_HAS_EXPIRE_ONLY (1ULL << 35)
#define FUSE_DIRECT_IO_ALLOW_MMAP (1ULL << 36)
#define FUSE_PASSTHROUGH (1ULL << 37)
#define FUSE_NO_EXPORT_SUPPORT (1ULL << 38)
#define FUSE_HAS_RESEND (1ULL << 39)
#define FUSE_ALLOW_IDMAP (1ULL << 40)
#define FUSE_OVER_IO_URING (1ULL << 41)
#define FUSE_REQUEST_TIMEOUT (1ULL << 42)
#define FUSE_HAS_IO_URING_BUFPOOL (1ULL << 43)

struct fuse_init_in {
    uint32_t major;
    uint32_t minor;
    uint32_t max_readahead;
    uint32_t flags;
    uint32_t flags2;
    uint32_t unused[11];
};

struct fuse_init_out {
    uint32_t major;
    uint32_t minor;
    uint32_t max_readahead;
    uint32_t flags;
    uint16_t max_background;
    uint16_t congestion_threshold;
    uint32_t max_write;
    uint32_t time_gran;
    uint16_t max_pages;
    uint16_t map_alignment;
    uint32_t flags2;
    uint32_t max_stack_depth;
    uint16_t request_timeout;
    uint16_t unused[11];
};

/* ---- ioctl, poll, interrupt ---- */

#define FUSE_IOCTL_COMPAT (1 << 0)
#define FUSE_IOCTL_UNRESTRICTED (1 << 1)
#define FUSE_IOCTL_RETRY (1 << 2)
#define FUSE_IOCTL_32BIT (1 << 3)
#define FUSE_IOCTL_DIR (1 << 4)
#define FUSE_IOCTL_COMPAT_X32 (1 << 5)
#define FUSE_IOCTL_MAX_IOV 256

struct fuse_ioctl_in {
    uint64_t fh;
    uint32_t flags;
    uint32_t cmd;
    uint64_t arg;
    uint32_t in_size;
    uint32_t out_size;
};

struct fuse_ioctl_out {
    int32_t result;
    uint32_t flags;
    uint32_t in_iovs;
    uint32_t out_iovs;
};

#define FUSE_POLL_SCHEDULE_NOTIFY (1 << 0)

struct fuse_poll_in {
    uint64_t fh;
    uint64_t kh;
    uint32_t flags;
    uint32_t events;
};

struct fuse_poll_out {
    uint32_t revents;
    uint32_t padding;
};

struct fuse_interrupt_in {
    uint64_t unique;
};

/* ---- names and attributes ---- */

#define FUSE_GETATTR_FH (1 << 0)

#define FATTR_MODE (1 << 0)
#define FATTR_UID (1 << 1)
#define FATTR_GID (1 << 2)
#define FATTR_SIZE (1 << 3)
#define FATTR_ATIME (1 << 4)
#define FATTR_MTIME (1 << 5)
#define FATTR_FH (1 << 6)
#define FATTR_ATIME_NOW (1 << 7)
#define FATTR_MTIME_NOW (1 << 8)
#define FATTR_LOCKOWNER (1 << 9)
#define FATTR_CTIME (1 << 10)
#define FATTR_KILL_SUIDGID (1 << 11)

struct fuse_attr {
    uint64_t ino;
    uint64_t size;
    uint64_t blocks;
    uint64_t atime;
    uint64_t mtime;
    uint64_t ctime;
    uint32_t atimensec;
    uint32_t mtimensec;
    uint32_t ctimensec;
    uint32_t mode;
    uint32_t nlink;
    uint32_t uid;
    uint32_t gid;
    uint32_t rdev;
    uint32_t blksize;
    uint32_t flags;
};

struct fuse_entry_out {
    uint64_t nodeid;
    uint64_t generation;
    uint64_t entry_valid;
    uint64_t attr_valid;
    uint32_t entry_valid_nsec;
    uint32_t attr_valid_nsec;
    struct fuse_attr attr;
};

struct fuse_getattr_in {
    uint32_t getattr_flags;
    uint32_t dummy;
    uint64_t fh;
};

struct fuse_attr_out {
    uint64_t attr_valid;
    uint32_t attr_valid_nsec;
    uint32_t dummy;
    struct fuse_attr attr;
};

struct fuse_setattr_in {
    uint32_t valid;
    uint32_t padding;
    uint64_t fh;
    uint64_t size;
    uint64_t lock_owner;
    uint64_t atime;
    uint64_t mtime;
    uint64_t ctime;
    uint32_t atimensec;
    uint32_t mtimensec;
    uint32_t ctimensec;
    uint32_t mode;
    uint32_t unused4;
    uint32_t uid;
    uint32_t gid;
    uint32_t unused5;
};

struct fuse_forget_in {
    uint64_t nlookup;
};

struct fuse_forget_one {
    uint64_t nodeid;
    uint64_t nlookup;
};

struct fuse_batch_forget_in {
    uint32_t count;
    uint32_t dummy;
};

/* ---- open files ---- */

#define FOPEN_DIRECT_IO (1 << 0)
#define FOPEN_KEEP_CACHE (1 << 1)
#define FOPEN_NONSEEKABLE (1 << 2)
#define FOPEN_CACHE_DIR (1 << 3)
#define FOPEN_STREAM (1 << 4)
#define FOPEN_NOFLUSH (1 << 5)
#define FOPEN_PARALLEL_DIRECT_WRITES (1 << 6)
#define FOPEN_PASSTHROUGH (1 << 7)
#define FOPEN_IO_URING_ZERO_COPY (1 << 8)

#define FUSE_OPEN_KILL_SUIDGID (1 << 0)
#define FUSE_RELEASE_FLUSH (1 << 0)
#define FUSE_RELEASE_FLOCK_UNLOCK (1 << 1)
#define FUSE_READ_LOCKOWNER (1 << 1)
#define FUSE_WRITE_CACHE (1 << 0)
#define FUSE_WRITE_LOCKOWNER (1 << 1)
#define FUSE_WRITE_KILL_SUIDGID (1 << 2)

struct fuse_open_in {
    uint32_t flags;
    uint32_t open_flags;
};

struct fuse_create_in {
    uint32_t flags;
    uint32_t mode;
    uint32_t umask;
    uint32_t open_flags;
};

struct fuse_open_out {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};

struct fuse_release_in {
    uint64_t fh;
    uint32_t flags;
    uint32_t release_flags;
    uint64_t lock_owner;
};

struct fuse_flush_in {
    uint64_t fh;
    uint32_t unused;
    uint32_t padding;
    uint64_t lock_owner;
};

struct fuse_read_in {
    uint64_t fh;
    uint64_t offset;
    uint32_t size;
    uint32_t read_flags;
    uint64_t lock_owner;
    uint32_t flags;
    uint32_t padding;
};

struct fuse_write_in {
    uint64_t fh;
    uint64_t offset;
    uint32_t size;
    uint32_t write_flags;
    uint64_t lock_owner;
    uint32_t flags;
    uint32_t padding;
};

struct fuse_write_out {
    uint32_t size;
    uint32_t padding;
};

/* ---- ioctls of /dev/fuse itself ---- */

struct fuse_backing_map {
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};

#define FUSE_DEV_IOC_MAGIC 229
#define FUSE_DEV_IOC_CLONE _IOR(FUSE_DEV_IOC_MAGIC, 0, uint32_t)
#define FUSE_DEV_IOC_BACKING_OPEN _IOW(FUSE_DEV_IOC_MAGIC, 1, struct fuse_backing_map)
#define FUSE_DEV_IOC_BACKING_CLOSE _IOW(FUSE_DEV_IOC_MAGIC, 2, uint32_t)
#define FUSE_DEV_IOC_SYNC_INIT _IO(FUSE_DEV_IOC_MAGIC, 3)

#endif
