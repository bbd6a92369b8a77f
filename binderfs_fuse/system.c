/* SPDX-License-Identifier: Apache-2.0
 *
 * See system.h for what this offers, fuse/lane.py for why.
 *
 * Who leads. `channel.state` holds the leading lane's address, and in its lowest bit whether that lane waits in
 * read(). Every change of who leads goes through a compare-and-swap of that one word, so at no time do two lanes read,
 * and none reads unwatched:
 *
 *     the leader    (lane, 0) -> (lane, 1)    before read(); fails if it was demoted
 *                   (lane, 1) -> (lane, 0)    after read(); nobody else touches a state with the bit set
 *     the watcher   (lane, 0) -> (self, 0)    when it found the same lane at the same turn, busy, twice in a row, and
 *                                             asleep, or RUNNING_TICKS in a row. A thread that only has to wait for a
 *                                             processor or a lock is not helped by another one that has to wait for it,
 *                                             too.
 *
 * Since one lane reads at a time, an INTERRUPT, which the kernel queues behind the request it names, is never seen
 * before that request is in its lane's record.
 *
 * The watcher ticks only while requests come. When none came for DOZE_TICKS it sets `dozing`, looks once more whether
 * the turn is still the same, and sleeps on it. The leader counts its turn before it looks at `dozing`. One of them
 * sees the other, so the leader's system call to wake the watcher is paid once after each silence.
 *
 * Who is served next. The kernel's queue is first in, first out, so one user with hundreds of processes would be served
 * hundreds of times between two requests of another user. While the mount is *crowded*, the leader therefore reads ahead:
 * it takes all requests out of the kernel, without blocking, into queues by user, and serves the users in turn, one
 * request each. A request that stands alone has one user's request before it for each busy user.
 *
 *     detection     The leader notes when the user changes from one request to the next: two instructions, no system
 *                   call. The watcher sets `crowded` when the leader is busy and /dev/fuse readable at two ticks, and the
 *                   user changed lately. Where there is one user, there is nothing to be fair about.
 *     reading       O_NONBLOCK is set on /dev/fuse while the mount is crowded, and at no other time. Only read() heeds it.
 *     the end       After CALM_READS times with at most one request at hand, `crowded` is cleared. They are many: each time
 *                   that a crowd is found anew, its first requests have not been fair. Where nothing but LOOKUPs made it
 *                   crowded (see below), it is cleared after CALM_LOOKUPS other requests: reading ahead costs system calls.
 *
 * Lookups. Each open of a device has an inode of its own, so of N processes that open at once each finds that the answer
 * under way names another one's file, and asks again. In the order of their coming that makes some N * N of them, 25 s for
 * 1,000 processes. The newest one's process finds nothing to doubt. So the newest LOOKUP of a user in a directory is served
 * first. So that none waits for ever, each eighth turn is that of the oldest one. A LOOKUP behind which there are more
 * requests makes the mount crowded.
 *
 * Directories. Who looks something up in a directory, or reads it, holds a lock of the kernel's that others may need. So
 * such a request is not to wait for all else that its user asks for: a user has a turn of its own for each directory.
 *
 * The kernel. What it sends by itself gives back what clients held, and follows from requests that were served: a RELEASE
 * from an OPEN, a FORGET from a LOOKUP. So every second turn is the kernel's, however many users there are. Were it fewer,
 * users who open and close would be refused for what they have closed.
 *
 * Order. Other requests of one user, and those in one directory, stay in order. What the kernel sends by itself (RELEASE, FORGET, INTERRUPT) is a user of
 * its own: the kernel sends a RELEASE after the last answer of its file, and a FORGET after the answer to its RELEASE, so
 * neither can pass what it must follow. An INTERRUPT may name a request that was read ahead: a BINDER_WRITE_READ is then
 * answered with EINTR. Where it names any other request, it waits behind that, but for a LOOKUP, which is never stuck.
 *
 * Memory. A user's requests take at most as much of AHEAD_MAX as is still free; a first request is always kept. A
 * request that finds no room fails with ENOMEM. Nothing is read beyond twice AHEAD_MAX, which bounds many users, too.
 * What is read ahead belongs to the lane that has the bit READING set.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "system.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U /* Linux 6.3 */
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010 /* Linux 5.1 */
#endif

#define TICK_NS 1000000L
#define REPORT_TICKS 16 /* at most so often does the watcher return WATCH_TICK */
#define IDLE_TICKS 4
#define DOZE_TICKS 64
#define RUNNING_TICKS 100
#define NAP_NS 50000L

#define READING ((uintptr_t)1)

#define CROWDED_TICKS 2
#define MIXED_TICKS 64 /* the user has changed lately: within so many ticks */
#define CALM_READS 2048
#define CALM_LOOKUPS 32
#define LOOKUP_TURNS 8 /* so often is it the turn of a user's oldest LOOKUP */
#define SERVED_PER_READ 4 /* requests served before the kernel's queue is looked at again */
#define READS_AT_ONCE 256 /* a client whose requests are refused makes new ones at once, without end */
#define AHEAD_MAX ((size_t)32 << 20)
#define AHEAD_BUCKETS 1024
#define KERNEL ((uint64_t)1 << 32) /* no uid: who sends RELEASE, FORGET and INTERRUPT */
#define IN_DIRECTORY(inode, uid) ((uint64_t)(inode) << 34 | (uint64_t)1 << 33 | (uid)) /* a user in a directory */

/* A request that was read ahead. */
struct request {
    struct request *previous, *next; /* of its queue */
    struct request *below;           /* in its bucket */
    struct user *user;
    uint64_t unique;
    uint32_t opcode;
    uint32_t length;
    uint8_t message[];
};

/* Requests in the order of their coming. */
struct queue {
    struct request *first, *last;
};

/* A user, or one in a directory, with requests that were read ahead; there is none without. */
struct user {
    struct user *previous, *next; /* whose turns are before and after */
    struct user *below;           /* in its bucket */
    uint64_t id;
    size_t bytes;
    unsigned turns;
    struct queue lookups, others;
};

struct ahead {
    struct request *requests[AHEAD_BUCKETS]; /* by unique */
    struct user *users[AHEAD_BUCKETS];       /* by id */
    struct user *first, *last;               /* in the order of their turns */
    size_t bytes;
    size_t count;
    unsigned served; /* since the kernel's queue was looked at */
    bool served_user; /* the last turn was a user's, and not the kernel's */
    unsigned calm; /* so often in a row there was at most one request at hand */
    unsigned others; /* requests served since the last LOOKUP */
    bool nonblocking;
};

struct channel {
    int fuse_fd;
    _Atomic uintptr_t state;
    _Atomic uint32_t turn; /* requests read, by whichever lane */
    _Atomic int32_t leader; /* the leader's thread id, as of when it last went to read */
    _Atomic int32_t aside;  /* a leader's thread id while it waits as `channel_set_aside` says */
    _Atomic uint32_t dozing; /* 1: the watcher sleeps on this */
    _Atomic bool stopping;
    _Atomic bool rung;       /* somebody wants a WATCH_IDLE though no request came */
    uint32_t reported_turn;  /* the watcher's: the turn at its last WATCH_TICK or WATCH_IDLE */
    _Atomic uint32_t shunned_count;
    _Atomic uint64_t shunned[SHUNNED_MAX];
    uint32_t last_user;      /* the leader's: of the last request */
    _Atomic uint32_t mixed;  /* how often the user changed */
    _Atomic bool crowded;    /* read ahead */
    _Atomic bool flooded;    /* and not for LOOKUPs alone */
    _Atomic size_t waiting;  /* requests read ahead, as of the last look */
    struct ahead ahead;      /* whose READING bit is set */
};

struct lane {
    struct channel *channel;
    _Atomic uint64_t let_go; /* a request: what its task is called by may be another task's by now */
    int32_t thread; /* the id of the one that reads or watches with it; 0 before it does */
    struct record record;
    _Alignas(8) uint8_t message[MESSAGE_MAX];
    _Alignas(8) uint8_t commands[COMMANDS_MAX];
    _Alignas(8) uint8_t data[DATA_MAX];
};

struct channel *channel_create(int fuse_fd)
{
    struct channel *channel = calloc(1, sizeof(*channel));
    if (channel)
        channel->fuse_fd = fuse_fd;
    return channel;
}

struct lane *lane_create(struct channel *channel)
{
    struct lane *lane = calloc(1, sizeof(*lane));
    if (lane)
        lane->channel = channel;
    return lane;
}

void lane_free(struct lane *lane)
{
    free(lane);
}

struct record *lane_record(struct lane *lane)
{
    return &lane->record;
}

uint8_t *lane_message(struct lane *lane)
{
    return lane->message;
}

uint8_t *lane_commands(struct lane *lane)
{
    return lane->commands;
}

uint8_t *lane_data(struct lane *lane)
{
    return lane->data;
}

void lane_let_go(struct lane *lane, uint64_t unique)
{
    atomic_store(&lane->let_go, unique);
}

/* ---- memory of other tasks ---- */

static ssize_t transfer(bool write, uint32_t tid, const struct iovec *local, const struct iovec *remote, size_t count)
{
    ssize_t done = write ? process_vm_writev((pid_t)tid, local, 1, remote, count, 0)
                         : process_vm_readv((pid_t)tid, local, 1, remote, count, 0);
    return done < 0 ? -errno : done;
}

long memory_read(uint32_t tid, uint64_t address, void *buffer, size_t size)
{
    struct iovec local = {buffer, size};
    struct iovec remote = {(void *)(uintptr_t)address, size};
    return transfer(false, tid, &local, &remote, 1);
}

long memory_write(uint32_t tid, uint64_t address, const void *data, size_t size)
{
    struct iovec local = {(void *)(uintptr_t)data, size};
    struct iovec remote = {(void *)(uintptr_t)address, size};
    return transfer(true, tid, &local, &remote, 1);
}

/* ---- receive ---- */

static bool is_transaction(uint32_t command)
{
    return command == BC_TRANSACTION || command == BC_REPLY || command == BC_TRANSACTION_SG || command == BC_REPLY_SG;
}

/* Fetch data and offsets of the first transaction in the command stream, in one system call, if they are small. They
 * only serve to save the step that system call; whatever is odd about them is left to it. */
static void fetch_transaction(struct lane *lane)
{
    struct record *record = &lane->record;
    const uint8_t *next = lane->commands;
    const uint8_t *end = next + record->commands_size;

    while (end - next >= (ptrdiff_t)sizeof(uint32_t)) {
        uint32_t command;
        struct binder_transaction_data transaction;

        memcpy(&command, next, sizeof(command));
        next += sizeof(command);
        if (_IOC_TYPE(command) != 'c' || end - next < (ptrdiff_t)_IOC_SIZE(command))
            return;
        if (!is_transaction(command)) {
            next += _IOC_SIZE(command);
            continue;
        }
        memcpy(&transaction, next, sizeof(transaction));
        if (transaction.data_size > DATA_MAX || transaction.offsets_size > DATA_MAX - transaction.data_size)
            return;

        size_t data_size = transaction.data_size;
        size_t offsets_size = transaction.offsets_size;
        struct iovec local = {lane->data, data_size + offsets_size};
        struct iovec remote[2] = {
            {(void *)(uintptr_t)transaction.data.ptr.buffer, data_size},
            {(void *)(uintptr_t)transaction.data.ptr.offsets, offsets_size},
        };
        /* The read before this one may have waited while the client was killed, and its request answered for it. */
        if (local.iov_len == 0 || atomic_load(&lane->let_go) == record->unique)
            return;
        ssize_t done = transfer(false, record->tid, &local, remote, offsets_size ? 2 : 1);
        if (done < (ssize_t)data_size)
            return;
        record->data_address = transaction.data.ptr.buffer;
        record->data_size = (uint32_t)data_size;
        if (done == (ssize_t)local.iov_len) {
            record->offsets_address = transaction.data.ptr.offsets;
            record->offsets_size = (uint32_t)offsets_size;
        }
        return;
    }
}

static bool is_shunned(struct channel *channel, uint64_t fh, uint32_t uid)
{
    uint64_t user = SHUN_USER | uid;
    uint32_t left = atomic_load_explicit(&channel->shunned_count, memory_order_relaxed);
    for (uint32_t i = 0; left && i < SHUNNED_MAX; i++) {
        uint64_t shunned = atomic_load_explicit(&channel->shunned[i], memory_order_relaxed);
        if (shunned == 0)
            continue;
        if (shunned == fh || shunned == user || shunned >= SHUN_SOME)
            return true;
        left--;
    }
    return false;
}

/* Fetch what an ioctl points to. `record` has been filled from the headers. */
static void gather(struct lane *lane)
{
    struct record *record = &lane->record;
    struct binder_write_read request;

    if (atomic_load(&lane->let_go) == record->unique)
        return;
    if (record->tid == 0 || record->command != BINDER_WRITE_READ || record->in_size != sizeof(request) ||
        is_shunned(lane->channel, record->fh, record->uid))
        return;
    memcpy(&request, lane->message + sizeof(struct fuse_in_header) + sizeof(struct fuse_ioctl_in), sizeof(request));
    if (request.write_size <= request.write_consumed) {
        record->commands_size = 0;
        return;
    }
    size_t size = request.write_size;
    /* The engine counts from the buffer's first byte; one that is begun in its middle is rare, and left to it. */
    if (size > COMMANDS_MAX || request.write_consumed)
        return;
    if (memory_read(record->tid, request.write_buffer, lane->commands, size) != (long)size)
        return;
    record->commands_size = (int32_t)size;
    fetch_transaction(lane);
}

/* Take the message in the lane apart; returns its opcode. */
static int dissect(struct lane *lane, size_t length)
{
    struct record *record = &lane->record;
    struct fuse_in_header header;
    struct fuse_ioctl_in ioctl;

    memcpy(&header, lane->message, sizeof(header));
    record->length = (uint32_t)length;
    record->opcode = header.opcode;
    record->unique = header.unique;
    record->tid = header.pid;
    record->uid = header.uid;
    if (header.opcode == FUSE_IOCTL || header.opcode == FUSE_POLL) {
        memcpy(&record->fh, lane->message + sizeof(header), sizeof(record->fh));
        /* The raw system call: glibc's getpriority() cannot tell -1 from an error. */
        record->nice = 20 - (int)syscall(SYS_getpriority, PRIO_PROCESS, record->tid);
    }
    if (header.opcode == FUSE_IOCTL) {
        memcpy(&ioctl, lane->message + sizeof(header), sizeof(ioctl));
        record->argument = ioctl.arg;
        record->command = ioctl.cmd;
        record->in_size = ioctl.in_size;
        record->out_size = ioctl.out_size;
        record->commands_size = -1;
        record->data_size = 0;
        record->offsets_size = 0;
        gather(lane);
    }
    return (int)header.opcode;
}

int lane_copy(struct lane *lane, uint64_t address, size_t size, uint8_t *region, size_t offset)
{
    const struct record *record = &lane->record;
    uint64_t start = address - record->data_address;

    if (start > record->data_size || size > record->data_size - start)
        return false;
    memcpy(region + offset, lane->data + start, size);
    return true;
}

static void wake_watcher(struct channel *channel)
{
    if (atomic_load(&channel->dozing) && atomic_exchange(&channel->dozing, 0))
        syscall(SYS_futex, &channel->dozing, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void lane_lead(struct lane *lane)
{
    atomic_store(&lane->channel->state, (uintptr_t)lane);
}

/* ---- reading ahead ---- */

static size_t bucket(uint64_t key)
{
    return (key * 0x9E3779B97F4A7C15u) >> 54; /* 10 bits: AHEAD_BUCKETS */
}

static bool is_the_kernels(uint32_t opcode)
{
    switch (opcode) {
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_INIT:
    case FUSE_DESTROY:
        return true;
    }
    return false;
}

/* Tell whether the kernel holds a lock of the directory that a request names while it waits for the answer. */
static bool holds_directory(uint32_t opcode)
{
    switch (opcode) {
    case FUSE_LOOKUP:
    case FUSE_READDIR:
    case FUSE_READDIRPLUS:
    case FUSE_CREATE:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_SYMLINK:
    case FUSE_LINK:
    case FUSE_UNLINK:
    case FUSE_RMDIR:
    case FUSE_RENAME:
    case FUSE_RENAME2:
        return true;
    }
    return false;
}

static int put(struct channel *channel, struct iovec *parts, int count, int error, uint64_t unique);

/* Answer a request that is not served. */
static void refuse(struct channel *channel, uint32_t opcode, uint64_t unique, int error)
{
    struct fuse_ioctl_out ioctl = {.result = error};
    struct iovec parts[2] = {{0}, {&ioctl, sizeof(ioctl)}};
    if (opcode == FUSE_IOCTL)
        put(channel, parts, 2, 0, unique);
    else
        put(channel, parts, 1, error, unique);
}

static struct user *find_user(struct ahead *ahead, uint64_t id)
{
    struct user *user = ahead->users[bucket(id)];
    while (user && user->id != id)
        user = user->below;
    return user;
}

static struct request *find_request(struct ahead *ahead, uint64_t unique)
{
    struct request *request = ahead->requests[bucket(unique)];
    while (request && request->unique != unique)
        request = request->below;
    return request;
}

static void append_user(struct ahead *ahead, struct user *user)
{
    user->previous = ahead->last;
    user->next = NULL;
    *(ahead->last ? &ahead->last->next : &ahead->first) = user;
    ahead->last = user;
}

static void unlink_user(struct ahead *ahead, struct user *user)
{
    *(user->previous ? &user->previous->next : &ahead->first) = user->next;
    *(user->next ? &user->next->previous : &ahead->last) = user->previous;
}

/* Take a user without requests out. */
static void drop_user(struct ahead *ahead, struct user *user)
{
    struct user **place = &ahead->users[bucket(user->id)];
    while (*place != user)
        place = &(*place)->below;
    *place = user->below;
    unlink_user(ahead, user);
    free(user);
}

static struct queue *queue_of(struct user *user, uint32_t opcode)
{
    return opcode == FUSE_LOOKUP ? &user->lookups : &user->others;
}

/* Take a request out, and its user, where that was the last one. The message stays: who calls this frees it. */
static void take_out(struct ahead *ahead, struct request *request)
{
    struct request **place = &ahead->requests[bucket(request->unique)];
    struct user *user = request->user;
    size_t size = sizeof(*request) + request->length;

    while (*place != request)
        place = &(*place)->below;
    *place = request->below;
    struct queue *queue = queue_of(user, request->opcode);
    *(request->previous ? &request->previous->next : &queue->first) = request->next;
    *(request->next ? &request->next->previous : &queue->last) = request->previous;
    user->bytes -= size;
    ahead->bytes -= size;
    ahead->count--;
    if (!user->lookups.first && !user->others.first)
        drop_user(ahead, user);
}

/* Keep a request until the turn of user `id` comes; tell whether there was room for it. */
static bool keep(struct ahead *ahead, uint64_t id, const uint8_t *message, size_t length)
{
    struct fuse_in_header header;
    struct user *user = find_user(ahead, id);
    size_t size = sizeof(struct request) + length;

    memcpy(&header, message, sizeof(header));
    if (user && !is_the_kernels(header.opcode) && (ahead->bytes >= AHEAD_MAX || user->bytes + size > AHEAD_MAX - ahead->bytes))
        return false;
    struct request *request = malloc(size);
    if (!request)
        return false;
    if (!user) {
        user = calloc(1, sizeof(*user));
        if (!user) {
            free(request);
            return false;
        }
        user->id = id;
        user->below = ahead->users[bucket(id)];
        ahead->users[bucket(id)] = user;
        append_user(ahead, user);
    }
    struct queue *queue = queue_of(user, header.opcode);
    *request = (struct request){.previous = queue->last, .below = ahead->requests[bucket(header.unique)], .user = user,
        .unique = header.unique, .opcode = header.opcode, .length = (uint32_t)length};
    memcpy(request->message, message, length);
    ahead->requests[bucket(header.unique)] = request;
    *(queue->last ? &queue->last->next : &queue->first) = request;
    queue->last = request;
    user->bytes += size;
    ahead->bytes += size;
    ahead->count++;
    return true;
}

/* Tell in whose queue a request belongs: for an INTERRUPT that is where the request waits that it names. */
static uint64_t owner(struct ahead *ahead, const uint8_t *message)
{
    struct fuse_in_header header;
    struct fuse_interrupt_in interrupt;
    const struct request *named = NULL;

    memcpy(&header, message, sizeof(header));
    if (holds_directory(header.opcode))
        return IN_DIRECTORY(header.nodeid, header.uid);
    if (!is_the_kernels(header.opcode))
        return header.uid;
    if (header.opcode == FUSE_INTERRUPT) {
        memcpy(&interrupt, message + sizeof(header), sizeof(interrupt));
        named = find_request(ahead, interrupt.unique);
    }
    return named ? named->user->id : KERNEL;
}

/* Answer a BINDER_WRITE_READ that was read ahead, if this INTERRUPT names one; tell whether it does. */
static bool is_interrupted(struct channel *channel, const uint8_t *message)
{
    struct ahead *ahead = &channel->ahead;
    struct fuse_interrupt_in interrupt;
    struct fuse_ioctl_in ioctl;

    memcpy(&interrupt, message + sizeof(struct fuse_in_header), sizeof(interrupt));
    struct request *request = find_request(ahead, interrupt.unique);
    if (!request || request->opcode != FUSE_IOCTL)
        return false;
    memcpy(&ioctl, request->message + sizeof(struct fuse_in_header), sizeof(ioctl));
    if (ioctl.cmd != BINDER_WRITE_READ)
        return false;
    take_out(ahead, request);
    free(request);
    refuse(channel, FUSE_IOCTL, interrupt.unique, -EINTR);
    return true;
}

static void set_nonblocking(struct channel *channel, bool nonblocking)
{
    int flags = fcntl(channel->fuse_fd, F_GETFL);
    if (flags >= 0 && fcntl(channel->fuse_fd, F_SETFL, nonblocking ? flags | O_NONBLOCK : flags & ~O_NONBLOCK) == 0)
        channel->ahead.nonblocking = nonblocking;
}

static bool is_closed(ssize_t length)
{
    /* ENOENT: the request was withdrawn while it was being read. */
    return length < 0 && errno != EINTR && errno != EAGAIN && errno != ENOENT;
}

/* Read what the kernel has, but not for long. Returns 0, EVENT_CLOSED, or the length of a message in the lane that is to
 * be served at once, since there is no memory to keep it, and the kernel sends it only once. */
static ssize_t read_ahead(struct lane *lane)
{
    struct channel *channel = lane->channel;
    struct ahead *ahead = &channel->ahead;
    ssize_t found = 0;

    ahead->served = 0;
    for (int reads = 0; reads < READS_AT_ONCE && found == 0 && ahead->bytes < 2 * AHEAD_MAX; reads++) {
        struct fuse_in_header header;
        ssize_t length = read(channel->fuse_fd, lane->message, sizeof(lane->message));
        if (length < (ssize_t)sizeof(header)) {
            if (is_closed(length)) {
                lane->record.error = errno;
                return EVENT_CLOSED;
            }
            if (length < 0 && errno != EAGAIN)
                continue;
            break;
        }
        memcpy(&header, lane->message, sizeof(header));
        if (header.opcode == FUSE_INTERRUPT && is_interrupted(channel, lane->message))
            continue;
        if (keep(ahead, owner(ahead, lane->message), lane->message, (size_t)length))
            continue;
        if (is_the_kernels(header.opcode))
            found = length;
        else
            refuse(channel, header.opcode, header.unique, -ENOMEM);
    }
    atomic_store_explicit(&channel->waiting, ahead->count, memory_order_relaxed);
    return found;
}

static struct request *choose(struct user *user)
{
    if (user->lookups.first && ++user->turns % LOOKUP_TURNS == 0)
        return user->lookups.first;
    return user->others.first ? user->others.first : user->lookups.last;
}

/* Put the request whose turn it is into the lane. Returns its length, 0 where there is none any more and the mount is
 * not crowded, or EVENT_CLOSED. */
static ssize_t next_in_turn(struct lane *lane)
{
    struct channel *channel = lane->channel;
    struct ahead *ahead = &channel->ahead;

    if (!ahead->nonblocking)
        set_nonblocking(channel, true);
    for (;;) {
        if (ahead->nonblocking && (!ahead->count || ahead->served >= SERVED_PER_READ)) {
            ssize_t found = read_ahead(lane);
            if (found)
                return found;
            ahead->calm = ahead->count > 1 ? 0 : ahead->calm + 1;
        }
        bool calm = atomic_load_explicit(&channel->flooded, memory_order_relaxed) ? ahead->calm >= CALM_READS
                                                                                  : ahead->others >= CALM_LOOKUPS;
        if (ahead->count <= 1 && (calm || !ahead->nonblocking)) {
            ahead->calm = 0;
            ahead->others = 0;
            atomic_store_explicit(&channel->flooded, false, memory_order_relaxed);
            if (ahead->nonblocking)
                set_nonblocking(channel, false);
            atomic_store(&channel->crowded, ahead->nonblocking);
            if (!ahead->count && !ahead->nonblocking)
                return 0;
        }
        if (ahead->count)
            break;
        struct pollfd ready = {channel->fuse_fd, POLLIN, 0};
        poll(&ready, 1, -1);
    }
    struct user *kernel = find_user(ahead, KERNEL);
    struct user *user = ahead->first;
    if (kernel && ahead->served_user)
        user = kernel;
    else if (user == kernel && user->next)
        user = user->next;
    ahead->served_user = user != kernel;
    struct request *request = choose(user);
    size_t length = request->length;
    /* Its user's next turn comes after those of all others. */
    unlink_user(ahead, user);
    append_user(ahead, user);
    take_out(ahead, request);
    ahead->served++;
    ahead->others = request->opcode == FUSE_LOOKUP ? 0 : ahead->others + 1;
    memcpy(lane->message, request->message, length);
    free(request);
    return (ssize_t)length;
}

/* Tell whether the kernel has more requests, where nothing is read ahead. */
static bool has_requests(struct channel *channel)
{
    struct pollfd ready = {channel->fuse_fd, POLLIN, 0};
    return !atomic_load_explicit(&channel->crowded, memory_order_relaxed) && poll(&ready, 1, 0) == 1;
}

static int begin(struct lane *lane, size_t length)
{
    struct channel *channel = lane->channel;

    atomic_store(&channel->state, (uintptr_t)lane);
    atomic_fetch_add(&channel->turn, 1);
    wake_watcher(channel);
    int opcode = dissect(lane, length);
    if (opcode == FUSE_LOOKUP && has_requests(channel))
        atomic_store(&channel->crowded, true);
    if (lane->record.uid != channel->last_user) {
        channel->last_user = lane->record.uid;
        atomic_fetch_add_explicit(&channel->mixed, 1, memory_order_relaxed);
    }
    return opcode;
}

int lane_receive(struct lane *lane)
{
    struct channel *channel = lane->channel;
    uintptr_t self = (uintptr_t)lane;

    if (!atomic_compare_exchange_strong(&channel->state, &self, self | READING))
        return EVENT_DEMOTED;
    if (!lane->thread)
        lane->thread = gettid();
    atomic_store_explicit(&channel->leader, lane->thread, memory_order_relaxed);
    if (atomic_load_explicit(&channel->crowded, memory_order_relaxed)) {
        ssize_t length = next_in_turn(lane);
        if (length < 0)
            return EVENT_CLOSED;
        if (length > 0)
            return begin(lane, (size_t)length);
    }
    for (;;) {
        ssize_t length = read(channel->fuse_fd, lane->message, sizeof(lane->message));
        if (length >= (ssize_t)sizeof(struct fuse_in_header))
            return begin(lane, (size_t)length);
        if (is_closed(length)) {
            lane->record.error = errno;
            return EVENT_CLOSED;
        }
    }
}

void channel_crowd(struct channel *channel)
{
    atomic_store_explicit(&channel->flooded, true, memory_order_relaxed);
    atomic_store(&channel->crowded, true);
}

size_t channel_waiting(struct channel *channel)
{
    return atomic_load_explicit(&channel->waiting, memory_order_relaxed);
}

int lane_restore(struct lane *lane, const void *message, size_t size)
{
    if (size > sizeof(lane->message))
        return -EMSGSIZE;
    memcpy(lane->message, message, size);
    return dissect(lane, size);
}

/* ---- deliver ---- */

static int put(struct channel *channel, struct iovec *parts, int count, int error, uint64_t unique)
{
    struct fuse_out_header header = {sizeof(header), error, unique};

    for (int i = 1; i < count; i++)
        header.len += (uint32_t)parts[i].iov_len;
    parts[0] = (struct iovec){&header, sizeof(header)};
    return writev(channel->fuse_fd, parts, count) < 0 ? -errno : 0;
}

long channel_deliver(struct channel *channel, uint64_t unique, int kind, int32_t result, const void *payload,
                     size_t payload_size, uint32_t tid, uint64_t address, const void *data, size_t size)
{
    struct fuse_ioctl_out ioctl = {.result = result};
    struct iovec parts[3];
    int count = 1;

    if (size) {
        long done = memory_write(tid, address, data, size);
        if (done != (long)size)
            return done;
    }
    if (kind == ANSWER_IOCTL) {
        parts[count++] = (struct iovec){&ioctl, sizeof(ioctl)};
        result = 0;
    }
    if (payload_size)
        parts[count++] = (struct iovec){(void *)(uintptr_t)payload, payload_size};
    int error = put(channel, parts, count, result, unique);
    /* A malformed answer must not leave the request without one. */
    if (error && error != -ENOENT && error != -ENODEV && error != -EPERM)
        put(channel, parts, 1, -EIO, unique);
    return (long)size;
}

int lane_exchange(struct lane *lane, uint64_t unique, int kind, int32_t result, const void *payload,
                  size_t payload_size, uint32_t tid, uint64_t address, const void *data, size_t size)
{
    long done = channel_deliver(lane->channel, unique, kind, result, payload, payload_size, tid, address, data, size);
    if (done != (long)size) {
        lane->record.copied = done < 0 ? 0 : (int32_t)done;
        lane->record.error = done < 0 ? (int32_t)-done : EFAULT;
        return EVENT_SHORT;
    }
    return lane_receive(lane);
}

/* ---- watch ---- */

void channel_set_aside(struct channel *channel, bool aside)
{
    int32_t self = gettid();
    int32_t other = self;

    if (aside && atomic_load(&channel->leader) == self)
        atomic_store(&channel->aside, self);
    else if (!aside)
        atomic_compare_exchange_strong(&channel->aside, &other, 0);
}

/* Tell whether the leader gets on by itself: it runs, or waits for a processor, or for a lock. Locks are held for moments,
 * never across what a client can delay; another thread would have to wait for the same one. */
static bool gets_on(struct channel *channel)
{
    int32_t thread = atomic_load(&channel->leader);
    char path[64];
    char text[64];

    if (atomic_load(&channel->aside) == thread)
        return false;
    snprintf(path, sizeof(path), "/proc/self/task/%d/syscall", thread);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t length = read(fd, text, sizeof(text) - 1);
    close(fd);
    if (length <= 0)
        return false;
    text[length] = '\0';
    /* "running", or the call's number and its arguments. */
    return text[0] == 'r' || strtol(text, NULL, 10) == SYS_futex;
}

int lane_watch(struct lane *lane)
{
    struct channel *channel = lane->channel;
    const struct timespec tick = {0, TICK_NS};
    uintptr_t last_state = 0;
    uint32_t last_turn = 0;
    unsigned ticks = 0;
    unsigned idle = 0;
    unsigned running = 0;
    uint32_t last_mixed = atomic_load_explicit(&channel->mixed, memory_order_relaxed);
    unsigned unmixed = MIXED_TICKS;
    unsigned waiting = 0;

    lane->thread = gettid();
    while (!atomic_load(&channel->stopping)) {
        clock_nanosleep(CLOCK_MONOTONIC, 0, &tick, NULL);
        uintptr_t state = atomic_load(&channel->state);
        uint32_t turn = atomic_load(&channel->turn);
        bool same = state == last_state && turn == last_turn;
        uint32_t mixed = atomic_load_explicit(&channel->mixed, memory_order_relaxed);

        unmixed = mixed == last_mixed ? unmixed + 1 : 0;
        last_mixed = mixed;
        waiting = !(state & READING) && unmixed < MIXED_TICKS && has_requests(channel) ? waiting + 1 : 0;
        if (waiting >= CROWDED_TICKS)
            channel_crowd(channel);
        if (same && !(state & READING)) {
            if (running < RUNNING_TICKS && gets_on(channel)) {
                running++;
                continue;
            }
            if (atomic_compare_exchange_strong(&channel->state, &state, (uintptr_t)lane)) {
                atomic_store_explicit(&channel->leader, lane->thread, memory_order_relaxed);
                return WATCH_PROMOTED;
            }
            continue;
        }
        running = 0;
        last_state = state;
        last_turn = turn;
        ticks++;
        idle = same ? idle + 1 : 0;
        if (turn != channel->reported_turn || atomic_load(&channel->rung)) {
            if (idle >= IDLE_TICKS) {
                atomic_store(&channel->rung, false);
                channel->reported_turn = turn;
                return WATCH_IDLE;
            }
            /* Whatever it is that came, a WATCH_IDLE follows when nothing does any more. */
            if (ticks >= REPORT_TICKS)
                return WATCH_TICK;
        } else if (idle >= DOZE_TICKS) {
            atomic_store(&channel->dozing, 1);
            if (atomic_load(&channel->turn) == turn && !atomic_load(&channel->rung) && !atomic_load(&channel->stopping))
                syscall(SYS_futex, &channel->dozing, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
            atomic_store(&channel->dozing, 0);
            idle = 0;
        }
    }
    return WATCH_STOPPED;
}

void channel_ring(struct channel *channel)
{
    atomic_store(&channel->rung, true);
    wake_watcher(channel);
}

void channel_give_way(struct channel *channel, int times)
{
    /* The kernel adds its timer slack, 50 us. */
    const struct timespec nap = {0, NAP_NS};
    uint32_t turn;

    do {
        turn = atomic_load(&channel->turn);
        clock_nanosleep(CLOCK_MONOTONIC, 0, &nap, NULL);
    } while (--times > 0 && atomic_load(&channel->turn) != turn && !atomic_load(&channel->stopping));
}

void channel_stop(struct channel *channel)
{
    atomic_store(&channel->stopping, true);
    wake_watcher(channel);
}

void channel_shun(struct channel *channel, uint64_t fh)
{
    for (uint32_t i = 0; i < SHUNNED_MAX; i++) {
        uint64_t none = 0;
        if (atomic_compare_exchange_strong(&channel->shunned[i], &none, fh)) {
            atomic_fetch_add(&channel->shunned_count, 1);
            return;
        }
    }
}

void channel_pardon(struct channel *channel, uint64_t fh)
{
    for (uint32_t i = 0; i < SHUNNED_MAX; i++) {
        uint64_t shunned = fh;
        if (atomic_compare_exchange_strong(&channel->shunned[i], &shunned, 0)) {
            atomic_fetch_sub(&channel->shunned_count, 1);
            return;
        }
    }
}

/* ---- /dev/fuse ---- */

int channel_notify_poll(struct channel *channel, uint64_t kh)
{
    struct fuse_notify_poll_wakeup_out wakeup = {kh};
    struct iovec parts[2] = {{0}, {&wakeup, sizeof(wakeup)}};
    return put(channel, parts, 2, FUSE_NOTIFY_POLL, 0);
}

int channel_notify_store(struct channel *channel, uint64_t nodeid, uint64_t offset, const void *data, size_t size)
{
    struct fuse_notify_store_out store = {.nodeid = nodeid, .offset = offset, .size = (uint32_t)size};
    struct iovec parts[3] = {{0}, {&store, sizeof(store)}, {(void *)(uintptr_t)data, size}};
    return put(channel, parts, 3, FUSE_NOTIFY_STORE, 0);
}

int channel_backing_open(struct channel *channel, int fd)
{
    struct fuse_backing_map map = {.fd = fd};
    int id = ioctl(channel->fuse_fd, FUSE_DEV_IOC_BACKING_OPEN, &map);
    return id < 0 ? -errno : id;
}

int channel_backing_close(struct channel *channel, int backing_id)
{
    uint32_t id = (uint32_t)backing_id;
    return ioctl(channel->fuse_fd, FUSE_DEV_IOC_BACKING_CLOSE, &id) < 0 ? -errno : 0;
}

/* ---- receive regions ---- */

int region_create(size_t size)
{
    int fd = memfd_create("binder", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL)
        fd = memfd_create("binder", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)size) < 0) {
        int error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

uint8_t *region_map(int fd, size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return NULL;
    /* F_SEAL_FUTURE_WRITE keeps everybody from writing to it and from punching holes, but for a writable mapping by way of
     * FUSE passthrough, whose seals the kernel does not look at. */
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) < 0)
        fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL);
    return memory;
}

void region_unmap(uint8_t *memory, size_t size)
{
    munmap(memory, size);
}

int region_populate(uint8_t *memory, size_t size)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t start = (uintptr_t)memory & ~(page - 1);
    uintptr_t end = ((uintptr_t)memory + size + page - 1) & ~(page - 1);

    if (madvise((void *)start, end - start, MADV_POPULATE_WRITE) == 0)
        return 0;
    if (errno != EINVAL)
        return -ENOMEM; /* it says EFAULT where touching the page would end in SIGBUS */
    /* Before Linux 5.14: have the kernel read a byte of each page for us, which allocates it, or fails where our own
     * access would end in SIGBUS. */
    for (uintptr_t at = start; at < end; at += page) {
        uint8_t byte;
        if (memory_read((uint32_t)getpid(), at, &byte, 1) != 1)
            return -ENOMEM;
    }
    return 0;
}
