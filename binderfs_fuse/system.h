/* SPDX-License-Identifier: Apache-2.0
 *
 * What the Python of host/ and fuse/ asks of C: system calls that Python does not offer, and the three sequences of
 * them that every binder call goes through, each in one call that holds no lock and not the GIL.
 *
 *     receive   read(/dev/fuse), and fetch what a BINDER_WRITE_READ points to
 *     deliver   store what it asked to read in the caller's memory, then answer it on /dev/fuse
 *     exchange  deliver, then receive
 *
 * A `lane` is what one reader thread owns: the buffers of the request that it serves. A `channel` is what all lanes of
 * a mount share: the descriptor of /dev/fuse, and which of them leads, that is, reads from it (fuse/lane.py has the
 * theory).
 *
 * Every function returns a negative errno where it fails, unless it says otherwise.
 */
#ifndef BINDERFS_FUSE_SYSTEM_H
#define BINDERFS_FUSE_SYSTEM_H

#include <stddef.h>
#include <stdbool.h>
#include <stdint.h>

#include "binder.h"
#include "fuse.h"

/* ---- lanes ---- */

/* The longest request that fits: an ioctl with the largest argument there is. (The kernel demands 8 KiB with max_write
 * 4096.) */
#define MESSAGE_MAX 20480
/* Command streams and transaction data up to these sizes are fetched by `receive`. */
#define COMMANDS_MAX 4096
#define DATA_MAX 4096

/* What `receive` and `exchange` return instead of an opcode. */
#define EVENT_CLOSED (-1)  /* the connection is gone: unmounted or aborted */
#define EVENT_DEMOTED (-2) /* another lane leads now */
#define EVENT_SHORT (-3)   /* nothing was answered: only `record.copied` bytes could be stored */

/* What `watch` returns. */
#define WATCH_STOPPED 0
#define WATCH_PROMOTED 1 /* the leader did not come back: this lane leads now */
#define WATCH_TICK 2     /* requests came in since the last one of these; about every 16 ms while they do */
#define WATCH_IDLE 3     /* once after requests came in: none did in the last few milliseconds */

/* The kinds of answer. */
#define ANSWER_PLAIN 0 /* `result` is the header's error, `payload` what follows it */
#define ANSWER_IOCTL 1 /* `result` is the ioctl's result, `payload` what is copied over its argument */

/* The request at hand, taken apart. */
struct record {
    uint64_t unique;
    uint64_t fh;       /* of an IOCTL or POLL */
    uint64_t argument; /* the address of the ioctl's argument */
    uint32_t tid;
    uint32_t uid;
    uint32_t command;
    uint32_t in_size;
    uint32_t out_size;
    int32_t nice;          /* of who calls IOCTL or POLL, -20..19 */
    int32_t commands_size; /* of the command stream fetched; -1: not fetched, the step has to ask for it */
    uint32_t data_size;    /* of the first transaction's data, fetched from data_address; 0: not fetched */
    uint64_t data_address;
    uint64_t offsets_address;
    uint32_t offsets_size; /* likewise its offsets, which follow the data in `lane_data` */
    uint32_t length;       /* of the whole message */
    uint32_t opcode;
    int32_t copied; /* EVENT_SHORT: bytes stored */
    int32_t error;  /* EVENT_SHORT: the errno of it; EVENT_CLOSED: of read */
};

struct channel;
struct lane;

struct channel *channel_create(int fuse_fd);
struct lane *lane_create(struct channel *channel);
void lane_free(struct lane *lane);

struct record *lane_record(struct lane *lane);
uint8_t *lane_message(struct lane *lane);
uint8_t *lane_commands(struct lane *lane);
uint8_t *lane_data(struct lane *lane);

/* Copy `size` bytes at `address` of the caller's memory to `offset` of `region`, if `receive` has fetched all of them with
 * the data of the transaction. Returns whether it has. */
int lane_copy(struct lane *lane, uint64_t address, size_t size, uint8_t *region, size_t offset);

/* Make the lane the leader, at the start or when it is known that nobody leads. */
void lane_lead(struct lane *lane);

/* Read the next request as the leader. Returns its opcode, or EVENT_CLOSED or EVENT_DEMOTED. Blocks in
 * read(/dev/fuse), which is what an idle leader does, and in the caller's memory, which is what the watcher is for. */
int lane_receive(struct lane *lane);

/* Begin no further read of memory for this request, which the lane is fetching for. A read that is under way goes on: the
 * kernel has the task by then, and not its number. */
void lane_let_go(struct lane *lane, uint64_t unique);

/* Have the leader read ahead, and serve users in turn, until few requests come (system.c). The watcher does so, too. */
void channel_crowd(struct channel *channel);

/* How many requests are read ahead, as of the leader's last look at the kernel's queue. */
size_t channel_waiting(struct channel *channel);

/* Put back a request that was left for later into a lane that leads nothing, and fetch what it points to. Returns its
 * opcode. */
int lane_restore(struct lane *lane, const void *message, size_t size);

/* Store `size` bytes of `data` at `address` of task `tid`, then answer request `unique`. Returns the bytes stored; if
 * that is less than `size`, nothing was answered. A request that the kernel no longer knows counts as answered. */
long channel_deliver(struct channel *channel, uint64_t unique, int kind, int32_t result, const void *payload,
                     size_t payload_size, uint32_t tid, uint64_t address, const void *data, size_t size);

/* Deliver, then receive. Returns as `lane_receive`, or EVENT_SHORT. */
int lane_exchange(struct lane *lane, uint64_t unique, int kind, int32_t result, const void *payload,
                  size_t payload_size, uint32_t tid, uint64_t address, const void *data, size_t size);

/* Watch the leader, as the one who takes its place. Sleeps without a timer while no requests come. */
int lane_watch(struct lane *lane);

/* Say whether the calling thread waits for what a client may delay, in a lock of this process, and so is to be replaced
 * if it leads. */
void channel_set_aside(struct channel *channel, bool aside);

/* Wake the watcher for a WATCH_IDLE, in case that it sleeps. */
void channel_ring(struct channel *channel);

/* Sleep for about 100 us, and again if requests were served meanwhile, `times` times at most. */
void channel_give_way(struct channel *channel, int times);

/* Make the watcher return WATCH_STOPPED, now and ever after. */
void channel_stop(struct channel *channel);

/* Fetch nothing for requests on this handle; of this user, where it is SHUN_USER | uid; at all when it is SHUN_ALL, or
 * SHUN_SOME, which stands for more than there is room for. At most SHUNNED_MAX, more are not heeded. */
#define SHUNNED_MAX 16
#define SHUN_ALL 0xFFFFFFFFFFFFFFFF
#define SHUN_SOME 0xFFFFFFFFFFFFFFFE
#define SHUN_USER ((uint64_t)1 << 63)
void channel_shun(struct channel *channel, uint64_t fh);
void channel_pardon(struct channel *channel, uint64_t fh);

/* ---- /dev/fuse ---- */

/* Ask whoever polls the file with this kernel handle to poll again. */
int channel_notify_poll(struct channel *channel, uint64_t kh);

/* Put bytes into the page cache of a node. May wait for a READ of the same page. */
int channel_notify_store(struct channel *channel, uint64_t nodeid, uint64_t offset, const void *data, size_t size);

/* Register a file as a backing file; returns its id. */
int channel_backing_open(struct channel *channel, int fd);
int channel_backing_close(struct channel *channel, int backing_id);

/* ---- memory of other tasks ---- */

/* Copy; both return the number of bytes up to the first fault, or a negative errno if that is none. */
long memory_read(uint32_t tid, uint64_t address, void *buffer, size_t size);
long memory_write(uint32_t tid, uint64_t address, const void *data, size_t size);

/* ---- receive regions ---- */

/* Make a memfd; returns it. */
int region_create(size_t size);
/* Map it shared and writable, then seal it, so that its size and its pages stay. Returns NULL with errno. */
uint8_t *region_map(int fd, size_t size);
void region_unmap(uint8_t *memory, size_t size);
/* Make the pages that hold these bytes present, or return -ENOMEM, so that touching them cannot fail. */
int region_populate(uint8_t *memory, size_t size);

#endif
