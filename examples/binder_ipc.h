/* The little that every binder program needs: open the device, send commands, act on what comes back.
 *
 * A process talks to the driver by one ioctl, BINDER_WRITE_READ. It carries two byte streams: commands (BC_...) that go
 * to the driver, and returns (BR_...) that come from it. Each is a 32-bit code followed by an argument whose size is
 * part of the code. Nothing of a call happens between two processes directly: the caller writes BC_TRANSACTION, the
 * driver copies the data into the callee's receive region and the callee reads BR_TRANSACTION, whose pointers lead
 * there. The way back is BC_REPLY and BR_REPLY.
 *
 * Every command and return is printed as it passes, "->" to the driver and "<-" from it. */
#ifndef BINDER_IPC_H
#define BINDER_IPC_H

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/android/binder.h>

#define DEFAULT_DEVICE "/dev/binderfs/binder"
#define REGION_SIZE (128 * 1024)

struct binder {
    const char *program;                              /* printed before every line */
    int fd;
    uint8_t commands[1024], returns[1024];
    size_t commands_size;                             /* BC_ bytes that wait to be sent */
    size_t returns_size, returns_used;                /* BR_ bytes read, and how many of them were acted on */

    /* What the program does when it is called, and when an object that it watches dies. */
    void (*on_transaction)(struct binder *, const struct binder_transaction_data *);
    void (*on_death)(struct binder *, binder_uintptr_t cookie);
};

static inline void say(const struct binder *binder, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    printf("%-16s", binder->program);
    vprintf(format, arguments);
    putchar('\n');
    va_end(arguments);
}

static inline void fail_because(const struct binder *binder, const char *what)
{
    fprintf(stderr, "%s: %s\n", binder->program, what);
    exit(1);
}

static inline void fail(const struct binder *binder, const char *what)
{
    fprintf(stderr, "%s: %s: %s\n", binder->program, what, strerror(errno));
    exit(1);
}

/* What a code is called, and which of the few shapes its argument has. */
enum argument { NOTHING, NUMBER, HANDLE, POINTER, OBJECT, HANDLE_COOKIE, TRANSACTION };

static const struct {
    uint32_t code;
    enum argument argument;
    const char *name;
} binder_codes[] = {
    { BC_TRANSACTION, TRANSACTION, "BC_TRANSACTION" },
    { BC_REPLY, TRANSACTION, "BC_REPLY" },
    { BC_FREE_BUFFER, NOTHING, "BC_FREE_BUFFER" },    /* its address is another one in every run: not printed */
    { BC_INCREFS, HANDLE, "BC_INCREFS" },
    { BC_ACQUIRE, HANDLE, "BC_ACQUIRE" },
    { BC_RELEASE, HANDLE, "BC_RELEASE" },
    { BC_DECREFS, HANDLE, "BC_DECREFS" },
    { BC_INCREFS_DONE, OBJECT, "BC_INCREFS_DONE" },
    { BC_ACQUIRE_DONE, OBJECT, "BC_ACQUIRE_DONE" },
    { BC_ENTER_LOOPER, NOTHING, "BC_ENTER_LOOPER" },
    { BC_REQUEST_DEATH_NOTIFICATION, HANDLE_COOKIE, "BC_REQUEST_DEATH_NOTIFICATION" },
    { BC_DEAD_BINDER_DONE, POINTER, "BC_DEAD_BINDER_DONE" },
    { BR_ERROR, NUMBER, "BR_ERROR" },
    { BR_OK, NOTHING, "BR_OK" },
    { BR_TRANSACTION, TRANSACTION, "BR_TRANSACTION" },
    { BR_REPLY, TRANSACTION, "BR_REPLY" },
    { BR_DEAD_REPLY, NOTHING, "BR_DEAD_REPLY" },
    { BR_FAILED_REPLY, NOTHING, "BR_FAILED_REPLY" },
    { BR_TRANSACTION_COMPLETE, NOTHING, "BR_TRANSACTION_COMPLETE" },
    { BR_INCREFS, OBJECT, "BR_INCREFS" },
    { BR_ACQUIRE, OBJECT, "BR_ACQUIRE" },
    { BR_RELEASE, OBJECT, "BR_RELEASE" },
    { BR_DECREFS, OBJECT, "BR_DECREFS" },
    { BR_NOOP, NOTHING, "BR_NOOP" },
    { BR_SPAWN_LOOPER, NOTHING, "BR_SPAWN_LOOPER" },
    { BR_DEAD_BINDER, POINTER, "BR_DEAD_BINDER" },
};

/* One argument buffer big enough for every code above. The stream is not aligned (a code takes four bytes and its
 * argument often begins with a 64-bit number), so arguments are copied out of it and never read in place. */
union binder_argument {
    int32_t number;
    uint32_t handle;
    binder_uintptr_t pointer;
    struct binder_ptr_cookie object;
    struct binder_handle_cookie handle_cookie;
    struct binder_transaction_data transaction;
};

static inline void print_code(const struct binder *binder, const char *arrow, uint32_t code,
                              const union binder_argument *argument)
{
    const char *name = "a code that these examples do not know";
    enum argument shape = NOTHING;
    char text[128] = "";

    for (size_t i = 0; i < sizeof binder_codes / sizeof *binder_codes; i++)
        if (binder_codes[i].code == code) {
            name = binder_codes[i].name;
            shape = binder_codes[i].argument;
        }
    switch (shape) {
    case NOTHING:
        break;
    case NUMBER:
        snprintf(text, sizeof text, " %d", argument->number);
        break;
    case HANDLE:
        snprintf(text, sizeof text, " handle %u", argument->handle);
        break;
    case POINTER:
        snprintf(text, sizeof text, " cookie %#llx", argument->pointer);
        break;
    case OBJECT:
        snprintf(text, sizeof text, " object %#llx", argument->object.ptr);
        break;
    case HANDLE_COOKIE:
        snprintf(text, sizeof text, " handle %u cookie %#llx", argument->handle_cookie.handle,
                 argument->handle_cookie.cookie);
        break;
    case TRANSACTION: {
        const struct binder_transaction_data *data = &argument->transaction;

        if (code == BC_TRANSACTION)
            snprintf(text, sizeof text, " to handle %u, code %u", data->target.handle, data->code);
        else if (code == BR_TRANSACTION)
            snprintf(text, sizeof text, " for object %#llx, code %u", data->target.ptr, data->code);
        snprintf(text + strlen(text), sizeof text - strlen(text), ", %llu bytes%s", data->data_size,
                 data->offsets_size ? " with an object" : "");
        break;
    }
    }
    say(binder, "  %s %s%s", arrow, name, text);
}

/* Open the device, and map the region that the driver puts received data into. The mapping is read-only: only the
 * driver writes there. How big it is limits what can be received at one time. */
static inline void binder_open(struct binder *binder, const char *program, const char *device)
{
    struct binder_version version = { 0 };

    memset(binder, 0, sizeof *binder);
    binder->program = program;
    setvbuf(stdout, NULL, _IOLBF, 0);
    binder->fd = open(device, O_RDWR | O_CLOEXEC);
    if (binder->fd < 0)
        fail(binder, device);
    if (ioctl(binder->fd, BINDER_VERSION, &version) < 0)
        fail(binder, "BINDER_VERSION");
    if (version.protocol_version != BINDER_CURRENT_PROTOCOL_VERSION) {
        fprintf(stderr, "%s: the driver speaks protocol %d, this program %d\n", program, version.protocol_version,
                BINDER_CURRENT_PROTOCOL_VERSION);
        exit(1);
    }
    if (mmap(NULL, REGION_SIZE, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, binder->fd, 0) == MAP_FAILED)
        fail(binder, "mmap");
}

/* Queue a command. It goes to the driver with the next BINDER_WRITE_READ; ARGUMENT may be NULL if it has none. */
static inline void binder_put(struct binder *binder, uint32_t code, const void *argument)
{
    union binder_argument copy = { 0 };
    size_t size = _IOC_SIZE(code);

    if (binder->commands_size + sizeof code + size > sizeof binder->commands) {
        fprintf(stderr, "%s: too many commands at once\n", binder->program);
        exit(1);
    }
    memcpy(binder->commands + binder->commands_size, &code, sizeof code);
    binder->commands_size += sizeof code;
    if (size) {
        memcpy(&copy, argument, size);
        memcpy(binder->commands + binder->commands_size, argument, size);
        binder->commands_size += size;
    }
    print_code(binder, "->", code, &copy);
}

/* Send the queued commands and, with READ, wait until the driver has something for this thread. */
static inline void binder_write_read(struct binder *binder, int read)
{
    struct binder_write_read request = {
        .write_buffer = (uintptr_t)binder->commands,
        .write_size = binder->commands_size,
        .read_buffer = (uintptr_t)binder->returns,
        .read_size = read ? sizeof binder->returns : 0,
    };

    /* A signal ends the wait with EINTR. The driver has kept count of what it consumed: simply ask again. */
    while (ioctl(binder->fd, BINDER_WRITE_READ, &request) < 0)
        if (errno != EINTR)
            fail(binder, "BINDER_WRITE_READ");
    binder->commands_size = 0;
    if (read) {
        binder->returns_size = request.read_consumed;
        binder->returns_used = 0;
    }
}

/* The next return of the driver; blocks when there is none. */
static inline uint32_t binder_next(struct binder *binder, union binder_argument *argument)
{
    uint32_t code;

    while (binder->returns_used == binder->returns_size)
        binder_write_read(binder, 1);
    memcpy(&code, binder->returns + binder->returns_used, sizeof code);
    memcpy(argument, binder->returns + binder->returns_used + sizeof code, _IOC_SIZE(code));
    binder->returns_used += sizeof code + _IOC_SIZE(code);
    if (code != BR_NOOP)                              /* the driver begins every answer with one: noise */
        print_code(binder, "<-", code, argument);
    return code;
}

/* Received data stays in the region until it is given back. */
static inline void binder_free_buffer(struct binder *binder, const struct binder_transaction_data *data)
{
    binder_put(binder, BC_FREE_BUFFER, &data->data.ptr.buffer);
}

/* Act on returns until the one that is waited for has come. While it waits for a reply, a thread may be called itself:
 * the driver sends a call that belongs to the same chain of calls to the thread that waits in it. */
static inline void binder_wait_for(struct binder *binder, uint32_t wanted, union binder_argument *argument)
{
    for (;;) {
        uint32_t code = binder_next(binder, argument);

        switch (code) {
        case BR_TRANSACTION:
            binder->on_transaction(binder, &argument->transaction);
            break;
        case BR_INCREFS:                              /* somebody holds a reference to an object of this process now */
            binder_put(binder, BC_INCREFS_DONE, &argument->object);
            break;
        case BR_ACQUIRE:
            binder_put(binder, BC_ACQUIRE_DONE, &argument->object);
            break;
        case BR_DEAD_BINDER:
            binder->on_death(binder, argument->pointer);
            binder_put(binder, BC_DEAD_BINDER_DONE, &argument->pointer);
            break;
        case BR_DEAD_REPLY:
        case BR_FAILED_REPLY:
        case BR_ERROR:
            fprintf(stderr, "%s: a call failed\n", binder->program);
            exit(1);
        }
        if (code == wanted)
            return;
    }
}

/* Call CODE of the object behind HANDLE, and wait for the reply. The caller frees the reply's buffer.
 *
 * OFFSETS says where in the data objects are (struct flat_binder_object): the driver translates those, and leaves
 * every other byte alone. */
static inline struct binder_transaction_data binder_call(struct binder *binder, uint32_t handle, uint32_t code,
                                                         const void *data, size_t size, const binder_size_t *offsets,
                                                         size_t objects)
{
    struct binder_transaction_data transaction = {
        .target.handle = handle,
        .code = code,
        .data_size = size,
        .offsets_size = objects * sizeof *offsets,
        .data.ptr = { .buffer = (uintptr_t)data, .offsets = (uintptr_t)offsets },
    };
    union binder_argument argument;

    binder_put(binder, BC_TRANSACTION, &transaction);
    binder_wait_for(binder, BR_REPLY, &argument);
    return argument.transaction;
}

/* Answer the call that this thread received last and has not answered yet, and free its buffer. */
static inline void binder_reply(struct binder *binder, const struct binder_transaction_data *call, const void *data,
                                size_t size, const binder_size_t *offsets, size_t objects)
{
    struct binder_transaction_data reply = {
        .data_size = size,
        .offsets_size = objects * sizeof *offsets,
        .data.ptr = { .buffer = (uintptr_t)data, .offsets = (uintptr_t)offsets },
    };

    union binder_argument argument;

    binder_free_buffer(binder, call);
    binder_put(binder, BC_REPLY, &reply);
    binder_wait_for(binder, BR_TRANSACTION_COMPLETE, &argument);
}

/* Serve calls for ever. */
static inline void binder_loop(struct binder *binder)
{
    const uint32_t never = 0;                         /* no return has this code */
    union binder_argument argument;

    binder_put(binder, BC_ENTER_LOOPER, NULL);
    binder_wait_for(binder, never, &argument);
}

#endif
