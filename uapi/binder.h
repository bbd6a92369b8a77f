/* SPDX-License-Identifier: Apache-2.0
 *
 * The binder device, protocol version 8, as of Linux 7.3.
 *
 * One constant a line, as a macro, so that the cffi builder can list the names without evaluating them
 * (binderfs_fuse/_uapi_build.py has the rules). Integers are always 64 bits wide where the protocol has a pointer or a
 * size, for 32-bit clients too.
 */
#ifndef BINDERFS_FUSE_UAPI_BINDER_H
#define BINDERFS_FUSE_UAPI_BINDER_H

#include <stdint.h>
#include <sys/ioctl.h>

#define BINDER_CURRENT_PROTOCOL_VERSION 8

typedef uint64_t binder_size_t;
typedef uint64_t binder_uintptr_t;

/* ---- objects inside a transaction's data ---- */

#define UAPI_OBJECT_TYPE(a, b, c) ((uint32_t)(a) << 24 | (b) << 16 | (c) << 8 | 0x85)

#define BINDER_TYPE_BINDER UAPI_OBJECT_TYPE('s', 'b', '*')
#define BINDER_TYPE_HANDLE UAPI_OBJECT_TYPE('s', 'h', '*')
#define BINDER_TYPE_WEAK_BINDER UAPI_OBJECT_TYPE('w', 'b', '*')
#define BINDER_TYPE_WEAK_HANDLE UAPI_OBJECT_TYPE('w', 'h', '*')
#define BINDER_TYPE_PTR UAPI_OBJECT_TYPE('p', 't', '*')
#define BINDER_TYPE_FD UAPI_OBJECT_TYPE('f', 'd', '*')
#define BINDER_TYPE_FDA UAPI_OBJECT_TYPE('f', 'd', 'a')

#define FLAT_BINDER_FLAG_PRIORITY_MASK 0xff
#define FLAT_BINDER_FLAG_ACCEPTS_FDS 0x100
#define FLAT_BINDER_FLAG_TXN_SECURITY_CTX 0x1000
/* Android's common kernel alone: a node's scheduler policy, and whether real-time callers lend theirs. */
#define FLAT_BINDER_FLAG_SCHED_POLICY_SHIFT 9
#define FLAT_BINDER_FLAG_SCHED_POLICY_MASK 0x600
#define FLAT_BINDER_FLAG_INHERIT_RT 0x800

#define BINDER_BUFFER_FLAG_HAS_PARENT 0x1

struct binder_object_header {
    uint32_t type;
};

struct flat_binder_object {
    struct binder_object_header hdr;
    uint32_t flags;
    union {
        binder_uintptr_t binder;
        uint32_t handle;
    };
    binder_uintptr_t cookie;
};

struct binder_fd_object {
    struct binder_object_header hdr;
    uint32_t pad_flags;
    union {
        binder_uintptr_t pad_binder;
        uint32_t fd;
    };
    binder_uintptr_t cookie;
};

struct binder_fd_array_object {
    struct binder_object_header hdr;
    uint32_t pad;
    binder_size_t num_fds;
    binder_size_t parent;
    binder_size_t parent_offset;
};

struct binder_buffer_object {
    struct binder_object_header hdr;
    uint32_t flags;
    binder_uintptr_t buffer;
    binder_size_t length;
    binder_size_t parent;
    binder_size_t parent_offset;
};

/* ---- what commands and returns carry ---- */

#define TF_ONE_WAY 0x01
#define TF_ROOT_OBJECT 0x04
#define TF_STATUS_CODE 0x08
#define TF_ACCEPT_FDS 0x10
#define TF_CLEAR_BUF 0x20
#define TF_UPDATE_TXN 0x40

struct binder_transaction_data {
    union {
        uint32_t handle;
        binder_uintptr_t ptr;
    } target;
    binder_uintptr_t cookie;
    uint32_t code;
    uint32_t flags;
    int32_t sender_pid;
    uint32_t sender_euid;
    binder_size_t data_size;
    binder_size_t offsets_size;
    union {
        struct {
            binder_uintptr_t buffer;
            binder_uintptr_t offsets;
        } ptr;
        uint8_t buf[8];
    } data;
};

struct binder_transaction_data_sg {
    struct binder_transaction_data transaction_data;
    binder_size_t buffers_size;
};

struct binder_transaction_data_secctx {
    struct binder_transaction_data transaction_data;
    binder_uintptr_t secctx;
};

struct binder_ptr_cookie {
    binder_uintptr_t ptr;
    binder_uintptr_t cookie;
};

struct binder_handle_cookie {
    uint32_t handle;
    binder_uintptr_t cookie;
} __attribute__((packed));

struct binder_frozen_state_info {
    binder_uintptr_t cookie;
    uint32_t is_frozen;
    uint32_t reserved;
};

/* Only for commands that the driver has never served; their sizes are part of the numbers. */
struct binder_pri_desc {
    int32_t priority;
    uint32_t desc;
};

struct binder_pri_ptr_cookie {
    int32_t priority;
    binder_uintptr_t ptr;
    binder_uintptr_t cookie;
};

/* ---- commands: client to driver ---- */

#define BC_TRANSACTION _IOW('c', 0, struct binder_transaction_data)
#define BC_REPLY _IOW('c', 1, struct binder_transaction_data)
#define BC_TRANSACTION_SG _IOW('c', 17, struct binder_transaction_data_sg)
#define BC_REPLY_SG _IOW('c', 18, struct binder_transaction_data_sg)
#define BC_FREE_BUFFER _IOW('c', 3, binder_uintptr_t)

#define BC_INCREFS _IOW('c', 4, uint32_t)
#define BC_ACQUIRE _IOW('c', 5, uint32_t)
#define BC_RELEASE _IOW('c', 6, uint32_t)
#define BC_DECREFS _IOW('c', 7, uint32_t)
#define BC_INCREFS_DONE _IOW('c', 8, struct binder_ptr_cookie)
#define BC_ACQUIRE_DONE _IOW('c', 9, struct binder_ptr_cookie)
#define BC_ACQUIRE_RESULT _IOW('c', 2, int32_t)
#define BC_ATTEMPT_ACQUIRE _IOW('c', 10, struct binder_pri_desc)

#define BC_REGISTER_LOOPER _IO('c', 11)
#define BC_ENTER_LOOPER _IO('c', 12)
#define BC_EXIT_LOOPER _IO('c', 13)

#define BC_REQUEST_DEATH_NOTIFICATION _IOW('c', 14, struct binder_handle_cookie)
#define BC_CLEAR_DEATH_NOTIFICATION _IOW('c', 15, struct binder_handle_cookie)
#define BC_DEAD_BINDER_DONE _IOW('c', 16, binder_uintptr_t)

#define BC_REQUEST_FREEZE_NOTIFICATION _IOW('c', 19, struct binder_handle_cookie)
#define BC_CLEAR_FREEZE_NOTIFICATION _IOW('c', 20, struct binder_handle_cookie)
#define BC_FREEZE_NOTIFICATION_DONE _IOW('c', 21, binder_uintptr_t)

/* ---- returns: driver to client ---- */

#define BR_TRANSACTION _IOR('r', 2, struct binder_transaction_data)
#define BR_TRANSACTION_SEC_CTX _IOR('r', 2, struct binder_transaction_data_secctx)
#define BR_REPLY _IOR('r', 3, struct binder_transaction_data)

#define BR_NOOP _IO('r', 12)
#define BR_OK _IO('r', 1)
#define BR_SPAWN_LOOPER _IO('r', 13)
#define BR_FINISHED _IO('r', 14)
#define BR_TRANSACTION_COMPLETE _IO('r', 6)
#define BR_TRANSACTION_PENDING_FROZEN _IO('r', 20)
#define BR_ONEWAY_SPAM_SUSPECT _IO('r', 19)

#define BR_ERROR _IOR('r', 0, int32_t)
#define BR_DEAD_REPLY _IO('r', 5)
#define BR_FAILED_REPLY _IO('r', 17)
#define BR_FROZEN_REPLY _IO('r', 18)

#define BR_INCREFS _IOR('r', 7, struct binder_ptr_cookie)
#define BR_ACQUIRE _IOR('r', 8, struct binder_ptr_cookie)
#define BR_RELEASE _IOR('r', 9, struct binder_ptr_cookie)
#define BR_DECREFS _IOR('r', 10, struct binder_ptr_cookie)
#define BR_ACQUIRE_RESULT _IOR('r', 4, int32_t)
#define BR_ATTEMPT_ACQUIRE _IOR('r', 11, struct binder_pri_ptr_cookie)

#define BR_DEAD_BINDER _IOR('r', 15, binder_uintptr_t)
#define BR_CLEAR_DEATH_NOTIFICATION_DONE _IOR('r', 16, binder_uintptr_t)

#define BR_FROZEN_BINDER _IOR('r', 21, struct binder_frozen_state_info)
#define BR_CLEAR_FREEZE_NOTIFICATION_DONE _IOR('r', 22, binder_uintptr_t)

/* ---- ioctls ---- */

struct binder_write_read {
    binder_size_t write_size;
    binder_size_t write_consumed;
    binder_uintptr_t write_buffer;
    binder_size_t read_size;
    binder_size_t read_consumed;
    binder_uintptr_t read_buffer;
};

struct binder_version {
    int32_t protocol_version;
};

struct binder_node_debug_info {
    binder_uintptr_t ptr;
    binder_uintptr_t cookie;
    uint32_t has_strong_ref;
    uint32_t has_weak_ref;
};

struct binder_node_info_for_ref {
    uint32_t handle;
    uint32_t strong_count;
    uint32_t weak_count;
    uint32_t reserved1;
    uint32_t reserved2;
    uint32_t reserved3;
};

struct binder_freeze_info {
    uint32_t pid;
    uint32_t enable;
    uint32_t timeout_ms;
};

struct binder_frozen_status_info {
    uint32_t pid;
    uint32_t sync_recv;
    uint32_t async_recv;
};

struct binder_extended_error {
    uint32_t id;
    uint32_t command;
    int32_t param;
};

#define BINDER_WRITE_READ _IOWR('b', 1, struct binder_write_read)
#define BINDER_VERSION _IOWR('b', 9, struct binder_version)
#define BINDER_SET_CONTEXT_MGR _IOW('b', 7, int32_t)
#define BINDER_SET_CONTEXT_MGR_EXT _IOW('b', 13, struct flat_binder_object)
#define BINDER_SET_MAX_THREADS _IOW('b', 5, uint32_t)
#define BINDER_THREAD_EXIT _IOW('b', 8, int32_t)
#define BINDER_FREEZE _IOW('b', 14, struct binder_freeze_info)
#define BINDER_GET_FROZEN_INFO _IOWR('b', 15, struct binder_frozen_status_info)
#define BINDER_ENABLE_ONEWAY_SPAM_DETECTION _IOW('b', 16, uint32_t)
#define BINDER_GET_EXTENDED_ERROR _IOWR('b', 17, struct binder_extended_error)
#define BINDER_GET_NODE_DEBUG_INFO _IOWR('b', 11, struct binder_node_debug_info)
#define BINDER_GET_NODE_INFO_FOR_REF _IOWR('b', 12, struct binder_node_info_for_ref)
#define BINDER_SET_IDLE_TIMEOUT _IOW('b', 3, int64_t)
#define BINDER_SET_IDLE_PRIORITY _IOW('b', 6, int32_t)

#endif
