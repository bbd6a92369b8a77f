/* floor.c - what a binder device over FUSE costs when there is no driver in it.
 *
 *     floor MOUNTPOINT        as root; prints "ready" when it serves; SIGTERM unmounts
 *
 * It serves the FUSE requests that any such file system gets, with the fewest system calls that the protocol leaves:
 *
 *   for each BINDER_WRITE_READ   read(/dev/fuse), and the reply's write(/dev/fuse), which wakes the caller
 *   if it carries commands       process_vm_readv of them: FUSE hands over struct binder_write_read, not what it points to
 *   for each transaction         process_vm_readv of the data, from the sender's memory straight into the receive region
 *   for each non-empty answer    process_vm_writev of the BR_ codes into the receiver's read buffer
 *
 * A synchronous call of benchmarks/client.c is three requests (the caller's, the service's reply, the service's next
 * wait): 3 reads, 3 replies, 4 copies in, 3 copies out - 13 system calls, and no lock, since there is one thread.
 *
 * What is left out is the driver: there are no checks, no reference counts, no thread pool, no death, no priorities, no
 * logs, no security, no allocator (a region is filled from its beginning, and again when all in it is free). What is kept
 * is as much routing as makes client.c work unchanged: a call goes to the process that owns the object, or back to the
 * thread that waits in the same chain of calls; a reply to the caller; one-way calls one at a time; objects become
 * handles (one numbering for all processes). Transactions that carry objects are copied by way of this process: no server
 * may act on what it reads in a region, since the receiver can write there.
 *
 * File descriptors are not transferred. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <linux/android/binder.h>

#include "../uapi/fuse.h"

#define REGION_SIZE (1024 * 1024)
#define PAGE 4096
#define OPENS 8192
#define NODES (1 << 16)

struct task;

/* A call or a reply, from when it is sent until its buffer is freed (one-way) or it is replied to. */
struct transaction {
    struct transaction *next;                         /* in a queue */
    struct task *from;
    struct transaction *from_parent, *to_parent;      /* what the sender, and the receiver, was in before */
    uint32_t command;                                 /* BR_TRANSACTION or BR_REPLY */
    struct binder_transaction_data data;              /* as the receiver will see it; pointers are offsets */
};

struct queue {
    struct transaction *head, **tail;
};

/* One open() of the device: a process. */
struct binder_proc {
    uint64_t nodeid;
    pid_t pid;
    int used, memfd, backing;
    uint8_t *region;
    uint64_t address;                                 /* where the process has mapped it; 0: not looked up yet */
    size_t fill;                                      /* the region is free from here on */
    long buffers;                                     /* not freed */
    uint8_t oneway[REGION_SIZE / 8];                  /* by offset / 8: is this a one-way call's buffer? */
    struct queue todo;                                /* calls that any thread may take */
    struct queue oneway_todo;
    int oneway_busy;                                  /* a one-way call is out, its buffer not freed */
    struct task *tasks;
    struct task *waiting;                             /* those that are parked and in no call */
    uint64_t poll_handle;
    int poll_armed;
};

/* A thread of a process, on one open file. */
struct task {
    struct binder_proc *proc;
    pid_t tid;
    struct transaction *stack;                        /* the call it is in */
    struct transaction *todo;                         /* a call or a reply for this thread alone */
    int complete;                                     /* it is owed this many BR_TRANSACTION_COMPLETE */
    int complete_later;                               /* and one more, with whatever comes next */
    int failed;                                       /* and a BR_FAILED_REPLY */
    uint64_t parked;                                  /* its unanswered FUSE request; 0: not parked */
    struct binder_write_read request;
    struct task *next, *next_waiting, **previous_waiting;
};

struct node {
    struct binder_proc *owner;
    binder_uintptr_t pointer, cookie;
};

static const char *mountpoint;
static int fuse;
static struct binder_proc procs[OPENS];
static struct binder_proc nobody;                     /* whose tasks those of ended processes are */
static struct node nodes[NODES];                      /* by handle; 0 is the context manager */
static uint32_t nodes_hash[NODES * 2], nodes_used = 1;
static struct transaction *spare;
static volatile sig_atomic_t ending;

static void fail(const char *what)
{
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* ---- FUSE ---- */

static void answer(uint64_t unique, int error, const void *data, size_t size)
{
    struct fuse_out_header header = { .len = sizeof header + size, .error = error, .unique = unique };
    struct iovec parts[] = { { &header, sizeof header }, { (void *)data, size } };

    /* ENOENT: the request was interrupted, and nobody waits for it any more. */
    if (writev(fuse, parts, 2) < 0 && errno != ENOENT && errno != ENODEV)
        fail("write to /dev/fuse");
}

static void answer_ioctl(uint64_t unique, int result, const void *data, size_t size)
{
    struct {
        struct fuse_out_header header;
        struct fuse_ioctl_out out;
        uint8_t data[64];
    } reply = {
        .header = { .len = offsetof(__typeof__(reply), data) + size, .unique = unique },
        .out = { .result = result },
    };

    memcpy(reply.data, data, size);
    if (write(fuse, &reply, reply.header.len) < 0 && errno != ENOENT && errno != ENODEV)
        fail("write to /dev/fuse");
}

static void notify_poll(struct binder_proc *proc)
{
    struct {
        struct fuse_out_header header;
        struct fuse_notify_poll_wakeup_out out;
    } notice = { { sizeof notice, FUSE_NOTIFY_POLL, 0 }, { proc->poll_handle } };

    proc->poll_armed = 0;
    if (write(fuse, &notice, sizeof notice) < 0 && errno != ENOENT)
        fail("FUSE_NOTIFY_POLL");
}

/* ---- queues ---- */

static void push(struct queue *queue, struct transaction *t)
{
    t->next = NULL;
    if (!queue->head)
        queue->tail = &queue->head;
    *queue->tail = t;
    queue->tail = &t->next;
}

static struct transaction *pop(struct queue *queue)
{
    struct transaction *t = queue->head;

    if (t)
        queue->head = t->next;
    return t;
}

static struct transaction *new_transaction(void)
{
    struct transaction *t = spare;

    if (t)
        spare = t->next;
    else if (!(t = malloc(sizeof *t)))
        fail("malloc");
    return t;
}

static void free_transaction(struct transaction *t)
{
    t->next = spare;
    spare = t;
}

static void stop_waiting(struct task *task)
{
    if (task->previous_waiting) {
        *task->previous_waiting = task->next_waiting;
        if (task->next_waiting)
            task->next_waiting->previous_waiting = task->previous_waiting;
        task->previous_waiting = NULL;
    }
}

static void start_waiting(struct task *task)
{
    struct task **first = &task->proc->waiting;

    task->next_waiting = *first;
    if (*first)
        (*first)->previous_waiting = &task->next_waiting;
    *first = task;
    task->previous_waiting = first;
}

/* ---- processes, threads, objects ---- */

static void find_mapping(struct binder_proc *proc)
{
    char path[64], line[512];
    unsigned long start, inode;
    FILE *maps;

    snprintf(path, sizeof path, "/proc/%d/maps", proc->pid);
    maps = fopen(path, "re");
    while (maps && fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%*x %*s %*x %*s %lu", &start, &inode) == 2 && inode == proc->nodeid)
            proc->address = start;
    if (maps)
        fclose(maps);
}

static struct task *find_task(struct binder_proc *proc, pid_t tid)
{
    struct task *task = proc->tasks;

    while (task && task->tid != tid)
        task = task->next;
    if (!task) {
        task = calloc(1, sizeof *task);
        if (!task)
            fail("calloc");
        task->proc = proc;
        task->tid = tid;
        task->next = proc->tasks;
        proc->tasks = task;
    }
    return task;
}

static uint32_t find_handle(struct binder_proc *owner, const struct flat_binder_object *object)
{
    size_t i = (object->binder * 2654435761u + (owner - procs) * 40503u) % (2 * NODES);
    uint32_t handle;

    while ((handle = nodes_hash[i])) {
        if (nodes[handle].owner == owner && nodes[handle].pointer == object->binder)
            return handle;
        i = (i + 1) % (2 * NODES);
    }
    if (nodes_used == NODES)
        return 0;
    handle = nodes_hash[i] = nodes_used++;
    nodes[handle] = (struct node){ owner, object->binder, object->cookie };
    return handle;
}

/* ---- the way to the receiver ---- */

/* Write what the task is owed and T, if there is one, into its read buffer, and let its ioctl return. */
static void deliver(struct task *task, uint64_t unique, struct transaction *t)
{
    struct binder_write_read *request = &task->request;
    struct binder_proc *proc = task->proc;
    uint8_t bytes[256];
    struct iovec from = { bytes, 0 }, to = { (void *)(uintptr_t)request->read_buffer, 0 };
    const uint32_t noop = BR_NOOP, complete = BR_TRANSACTION_COMPLETE, failed = BR_FAILED_REPLY;

    memcpy(bytes, &noop, 4);
    from.iov_len = 4;
    for (task->complete += task->complete_later; task->complete; task->complete--, from.iov_len += 4)
        memcpy(bytes + from.iov_len, &complete, 4);
    for (task->complete_later = 0; task->failed; task->failed--, from.iov_len += 4)
        memcpy(bytes + from.iov_len, &failed, 4);
    if (t) {
        struct binder_transaction_data data = t->data;

        if (!proc->address)
            find_mapping(proc);
        data.data.ptr.buffer += proc->address;
        data.data.ptr.offsets += proc->address;
        memcpy(bytes + from.iov_len, &t->command, 4);
        memcpy(bytes + from.iov_len + 4, &data, sizeof data);
        from.iov_len += 4 + sizeof data;
        if (t->command == BR_REPLY || t->data.flags & TF_ONE_WAY) {
            free_transaction(t);
        } else {
            t->to_parent = task->stack;
            task->stack = t;
        }
    }
    to.iov_len = from.iov_len;
    request->read_consumed = from.iov_len;
    if (process_vm_writev(task->tid, &from, 1, &to, 1, 0) != (ssize_t)from.iov_len)
        answer_ioctl(unique, -EFAULT, request, sizeof *request);
    else
        answer_ioctl(unique, 0, request, sizeof *request);
}

static void send_to_task(struct task *task, struct transaction *t)
{
    uint64_t unique = task->parked;

    if (unique) {
        task->parked = 0;
        stop_waiting(task);
        deliver(task, unique, t);
    } else {
        task->todo = t;
    }
}

static void send_to_proc(struct binder_proc *proc, struct transaction *t)
{
    if (proc->waiting) {
        send_to_task(proc->waiting, t);
        return;
    }
    push(&proc->todo, t);
    if (proc->poll_armed)
        notify_poll(proc);
}

/* ---- commands ---- */

/* Copy a transaction's data and offsets into the region of PROC; returns the offset, or -1. */
static int64_t copy(struct task *from, struct binder_proc *proc, const struct binder_transaction_data *data)
{
    size_t aligned = (data->data_size + 7) & ~(size_t)7;
    size_t size = aligned + data->offsets_size, offset = proc->fill;
    struct iovec remote[] = {
        { (void *)(uintptr_t)data->data.ptr.buffer, data->data_size },
        { (void *)(uintptr_t)data->data.ptr.offsets, data->offsets_size },
    };
    static uint8_t scratch[REGION_SIZE];
    uint8_t *to = data->offsets_size ? scratch : proc->region + offset;
    struct iovec local[] = { { to, data->data_size }, { to + aligned, data->offsets_size } };

    if (size < 8)
        size = 8;                                     /* so that no two buffers have one address */
    if (!proc->region || size > REGION_SIZE - offset)
        return -1;
    if (data->data_size + data->offsets_size &&
        process_vm_readv(from->tid, local, 2, remote, 2, 0) != (ssize_t)(data->data_size + data->offsets_size))
        return -1;
    for (size_t i = 0; i < data->offsets_size; i += sizeof(binder_size_t)) {
        struct flat_binder_object object;
        binder_size_t at;

        memcpy(&at, scratch + aligned + i, sizeof at);
        if (at + sizeof object > data->data_size)
            return -1;
        memcpy(&object, scratch + at, sizeof object);
        if (object.hdr.type == BINDER_TYPE_BINDER) {
            object.hdr.type = BINDER_TYPE_HANDLE;
            object.handle = find_handle(from->proc, &object);
        } else if (object.hdr.type != BINDER_TYPE_HANDLE) {
            return -1;
        }
        memcpy(scratch + at, &object, sizeof object);
    }
    if (data->offsets_size)
        memcpy(proc->region + offset, scratch, aligned + data->offsets_size);
    proc->fill += (size + 7) & ~(size_t)7;
    proc->buffers++;
    return offset;
}

static struct transaction *make(struct task *from, struct binder_proc *to, uint32_t command,
                                const struct binder_transaction_data *data, uint32_t uid)
{
    int64_t offset = copy(from, to, data);
    struct transaction *t;

    if (offset < 0)
        return NULL;
    t = new_transaction();
    t->from = from;
    t->command = command;
    t->data = (struct binder_transaction_data){
        .code = data->code,
        .flags = data->flags,
        .sender_pid = data->flags & TF_ONE_WAY || command == BR_REPLY ? 0 : from->proc->pid,
        .sender_euid = uid,
        .data_size = data->data_size,
        .offsets_size = data->offsets_size,
        .data.ptr = { .buffer = offset, .offsets = offset + ((data->data_size + 7) & ~7ull) },
    };
    return t;
}

static void transact(struct task *task, const struct binder_transaction_data *data, uint32_t uid)
{
    struct node *node = &nodes[data->target.handle % NODES];
    struct transaction *t, *link;

    if (!node->owner || !node->owner->used || !(t = make(task, node->owner, BR_TRANSACTION, data, uid))) {
        task->failed++;
        return;
    }
    t->data.target.ptr = node->pointer;
    t->data.cookie = node->cookie;
    if (data->flags & TF_ONE_WAY) {
        task->complete++;
        node->owner->oneway[t->data.data.ptr.buffer / 8] = 1;
        if (node->owner->oneway_busy) {
            push(&node->owner->oneway_todo, t);
        } else {
            node->owner->oneway_busy = 1;
            send_to_proc(node->owner, t);
        }
        return;
    }
    task->complete_later = 1;
    t->from_parent = task->stack;
    task->stack = t;
    /* A thread of the target that waits in this very chain of calls takes it. */
    for (link = t->from_parent; link; link = link->from_parent)
        if (link->from->proc == node->owner) {
            send_to_task(link->from, t);
            return;
        }
    send_to_proc(node->owner, t);
}

static void reply(struct task *task, const struct binder_transaction_data *data, uint32_t uid)
{
    struct transaction *call = task->stack, *t;
    struct task *caller;

    if (!call || call->from == task) {
        task->failed++;
        return;
    }
    caller = call->from;
    task->stack = call->to_parent;
    caller->stack = call->from_parent;
    free_transaction(call);
    t = make(task, caller->proc, BR_REPLY, data, uid);
    if (!t) {
        task->failed++;
        return;
    }
    task->complete++;
    send_to_task(caller, t);
}

static void free_buffer(struct binder_proc *proc, uint64_t address)
{
    uint64_t offset = address - proc->address;
    struct transaction *t;

    if (offset >= REGION_SIZE || !proc->buffers)
        return;
    if (!--proc->buffers)
        proc->fill = 0;
    if (proc->oneway[offset / 8]) {
        proc->oneway[offset / 8] = 0;
        t = pop(&proc->oneway_todo);
        if (t)
            send_to_proc(proc, t);
        else
            proc->oneway_busy = 0;
    }
}

static void obey(struct task *task, const uint8_t *commands, size_t size, uint32_t uid)
{
    for (size_t at = 0; at + 4 <= size;) {
        struct binder_transaction_data data;
        uint32_t command;
        uint64_t address;

        memcpy(&command, commands + at, 4);
        at += 4;
        if (at + _IOC_SIZE(command) > size)
            return;
        if (command == BC_TRANSACTION || command == BC_REPLY) {
            memcpy(&data, commands + at, sizeof data);
            (command == BC_TRANSACTION ? transact : reply)(task, &data, uid);
        } else if (command == BC_FREE_BUFFER) {
            memcpy(&address, commands + at, sizeof address);
            free_buffer(task->proc, address);
        }
        at += _IOC_SIZE(command);
    }
}

static void write_read(struct task *task, uint64_t unique, const struct binder_write_read *request, uint32_t uid)
{
    uint8_t commands[8192];
    size_t size = request->write_size - request->write_consumed;
    struct iovec remote = { (void *)(uintptr_t)(request->write_buffer + request->write_consumed), size };
    struct iovec local = { commands, size };
    struct transaction *t;

    task->request = *request;
    if (size) {
        if (size > sizeof commands || process_vm_readv(task->tid, &local, 1, &remote, 1, 0) != (ssize_t)size) {
            answer_ioctl(unique, -EFAULT, request, sizeof *request);
            return;
        }
        task->request.write_consumed = request->write_size;
        obey(task, commands, size, uid);
    }
    if (!request->read_size) {
        answer_ioctl(unique, 0, &task->request, sizeof task->request);
    } else if (task->complete || task->failed || task->todo) {
        t = task->todo;
        task->todo = NULL;
        deliver(task, unique, t);
    } else if (!task->stack && (t = pop(&task->proc->todo))) {
        deliver(task, unique, t);
    } else {
        task->parked = unique;
        if (!task->stack)
            start_waiting(task);
    }
}

/* ---- requests ---- */

static void device_ioctl(const struct fuse_in_header *header, const struct fuse_ioctl_in *in)
{
    struct binder_proc *proc = &procs[in->fh];
    struct binder_version version = { BINDER_CURRENT_PROTOCOL_VERSION };
    struct binder_write_read request;

    switch (in->cmd) {
    case BINDER_WRITE_READ:
        memcpy(&request, in + 1, sizeof request);
        write_read(find_task(proc, header->pid), header->unique, &request, header->uid);
        return;
    case BINDER_VERSION:
        answer_ioctl(header->unique, 0, &version, sizeof version);
        return;
    case BINDER_SET_CONTEXT_MGR:
        if (nodes[0].owner) {
            answer_ioctl(header->unique, -EBUSY, NULL, 0);
            return;
        }
        nodes[0].owner = proc;
        answer_ioctl(header->unique, 0, NULL, 0);
        return;
    case BINDER_SET_MAX_THREADS:
    case BINDER_THREAD_EXIT:
        answer_ioctl(header->unique, 0, NULL, 0);
        return;
    default:
        answer_ioctl(header->unique, -EINVAL, NULL, 0);
    }
}

static void device_poll(const struct fuse_in_header *header, const struct fuse_poll_in *in)
{
    struct binder_proc *proc = &procs[in->fh];
    struct task *task = find_task(proc, header->pid);
    int ready = task->complete || task->failed || task->todo || (!task->stack && proc->todo.head);
    struct fuse_poll_out out = { .revents = ready ? POLLIN : 0 };

    if (in->flags & FUSE_POLL_SCHEDULE_NOTIFY) {
        proc->poll_handle = in->kh;
        proc->poll_armed = !ready;
    }
    answer(header->unique, 0, &out, sizeof out);
}

static pid_t process_of(pid_t tid)
{
    char path[64], line[128];
    pid_t pid = tid;
    FILE *status;

    snprintf(path, sizeof path, "/proc/%d/status", tid);
    status = fopen(path, "re");
    while (status && fgets(line, sizeof line, status))
        if (sscanf(line, "Tgid: %d", &pid) == 1)
            break;
    if (status)
        fclose(status);
    return pid;
}

static void device_open(const struct fuse_in_header *header)
{
    struct fuse_backing_map map = { 0 };
    struct fuse_open_out out = { .open_flags = FOPEN_PASSTHROUGH };
    struct binder_proc *proc = procs;

    while (proc < procs + OPENS && proc->used)
        proc++;
    if (proc == procs + OPENS) {
        answer(header->unique, -ENFILE, NULL, 0);
        return;
    }
    proc->used = 1;
    proc->nodeid = header->nodeid;
    proc->pid = process_of(header->pid);
    proc->memfd = memfd_create("floor", MFD_CLOEXEC);
    if (proc->memfd < 0 || ftruncate(proc->memfd, REGION_SIZE))
        fail("memfd");
    proc->region = mmap(NULL, REGION_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, proc->memfd, 0);
    if (proc->region == MAP_FAILED)
        fail("mmap");
    map.fd = proc->memfd;
    proc->backing = ioctl(fuse, FUSE_DEV_IOC_BACKING_OPEN, &map);
    if (proc->backing < 0)
        fail("FUSE_DEV_IOC_BACKING_OPEN");
    out.fh = proc - procs;
    out.backing_id = proc->backing;
    answer(header->unique, 0, &out, sizeof out);
}

static void device_release(const struct fuse_in_header *header, const struct fuse_release_in *in)
{
    struct binder_proc *proc = &procs[in->fh];
    uint32_t backing = proc->backing;

    ioctl(fuse, FUSE_DEV_IOC_BACKING_CLOSE, &backing);
    munmap(proc->region, REGION_SIZE);
    close(proc->memfd);
    if (nodes[0].owner == proc) {
        /* The end of one measurement, all of whose processes end now: nothing of it can be asked for again. */
        memset(nodes, 0, sizeof nodes);
        memset(nodes_hash, 0, sizeof nodes_hash);
        nodes_used = 1;
    }
    /* Transactions may still lead to its tasks. */
    for (struct task *task = proc->tasks; task; task = task->next)
        task->proc = &nobody;
    memset(proc, 0, sizeof *proc);
    answer(header->unique, 0, NULL, 0);
}

static void interrupt(const struct fuse_interrupt_in *in)
{
    for (struct binder_proc *proc = procs; proc < procs + OPENS; proc++)
        for (struct task *task = proc->tasks; task; task = task->next)
            if (task->parked == in->unique) {
                task->parked = 0;
                stop_waiting(task);
                answer_ioctl(in->unique, -EINTR, &task->request, sizeof task->request);
                return;
            }
}

static struct fuse_attr attributes(uint64_t nodeid)
{
    return (struct fuse_attr){
        .ino = nodeid,
        .mode = nodeid == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0666,
        .nlink = 1,
        .blksize = PAGE,
    };
}

static void init(const struct fuse_in_header *header, const struct fuse_init_in *in)
{
    struct fuse_init_out out = {
        .major = FUSE_KERNEL_VERSION,
        .minor = in->minor < FUSE_KERNEL_MINOR_VERSION ? in->minor : FUSE_KERNEL_MINOR_VERSION,
        .max_readahead = in->max_readahead,
        .flags = FUSE_INIT_EXT,
        .flags2 = FUSE_PASSTHROUGH >> 32,
        .max_write = PAGE,
        .time_gran = 1,
        .max_stack_depth = 1,
    };

    if (!(in->flags & FUSE_INIT_EXT) || !(in->flags2 & (FUSE_PASSTHROUGH >> 32))) {
        fprintf(stderr, "floor: this kernel has no FUSE passthrough\n");
        exit(1);
    }
    answer(header->unique, 0, &out, sizeof out);
    printf("ready\n");
    fflush(stdout);
}

static void serve(const struct fuse_in_header *header)
{
    static uint64_t last_nodeid = 1ull << 32;         /* as inode numbers, in /proc/PID/maps: like no other file's */
    const void *in = header + 1;

    switch (header->opcode) {
    case FUSE_IOCTL:
        device_ioctl(header, in);
        return;
    case FUSE_POLL:
        device_poll(header, in);
        return;
    case FUSE_INTERRUPT:
        interrupt(in);
        return;
    case FUSE_INIT:
        init(header, in);
        return;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
        return;
    case FUSE_LOOKUP: {
        /* A fresh inode for each open, so that each has a mapping of its own. */
        struct fuse_entry_out out = { 0 };

        if (strcmp(in, "binder")) {
            answer(header->unique, -ENOENT, NULL, 0);
            return;
        }
        out.nodeid = ++last_nodeid;
        out.attr = attributes(out.nodeid);
        answer(header->unique, 0, &out, sizeof out);
        return;
    }
    case FUSE_GETATTR: {
        struct fuse_attr_out out = { .attr = attributes(header->nodeid) };

        answer(header->unique, 0, &out, sizeof out);
        return;
    }
    case FUSE_OPEN:
        device_open(header);
        return;
    case FUSE_RELEASE:
        device_release(header, in);
        return;
    default:
        answer(header->unique, -ENOSYS, NULL, 0);
    }
}

static void on_signal(int signal)
{
    (void)signal;
    ending = 1;
}

int main(int argc, char **argv)
{
    static union {
        struct fuse_in_header header;
        uint8_t bytes[FUSE_MIN_READ_BUFFER + PAGE];
    } request;
    struct sigaction action = { .sa_handler = on_signal };
    char options[128];

    if (argc != 2) {
        fprintf(stderr, "usage: floor MOUNTPOINT\n");
        return 2;
    }
    mountpoint = argv[1];
    fuse = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (fuse < 0)
        fail("/dev/fuse");
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fuse);
    if (mount("floor", mountpoint, "fuse", MS_NOSUID | MS_NODEV, options))
        fail("mount");
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    while (!ending) {
        if (read(fuse, &request, sizeof request) > 0)
            serve(&request.header);
        else if (errno == ENODEV)                     /* unmounted by somebody else */
            return 0;
        else if (errno != EINTR && errno != ENOENT && errno != EAGAIN)
            fail("read of /dev/fuse");
    }
    umount2(mountpoint, MNT_DETACH);
    return 0;
}
