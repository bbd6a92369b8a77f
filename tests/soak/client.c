/* client.c - a process of the soak: real work whose results are known, or garbage.
 *
 *     client DEVICE FIGURES SLOT SEED ROLE [ARGUMENT]
 *
 * FIGURES is a file that all of them map; this one writes to the struct at SLOT, and the supervisor reads (soak.py). What must
 * never happen is also said on standard error, as "WRONG: ...". SEED decides everything else.
 *
 * Roles
 *   manager        context manager: services register an object under a number, clients get a handle to it
 *   service N      registers as number N, and serves with a pool of threads:
 *                    CALL      answers with the data, each byte inverted
 *                    NESTED    calls back the object in the call first, and answers with what that said
 *                    FILE      reads the file that came along, answers with what is in it, and a file of its own
 *                    NOTE      one-way: counts, per client, and wants them in their order
 *                    NOTED     one-way: the last of these; tells the object that came along how many there were
 *   client N       does all of that with N services, for ever, and checks every answer; waits for the death of services
 *   garbage        ioctls and command streams that make no sense, from all the numbers there are
 *   forker         forks children that use the descriptor they have inherited, and end in every way
 *   zero N         freezes and thaws the processes that the first N slots name
 *
 * Errors that others' deaths explain (BR_DEAD_REPLY, BR_FROZEN_REPLY, a full region) are counted and not held against anybody.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "binder.h"

#define REGION (1024 * 1024 - 2 * 4096)
#define PAGE 4096
#define MAX_SERVICES 64
#define MAX_DATA 20000
#define MAX_CLIENTS 1024
#define OBJECT 0x1000 /* the one object that each process has; its cookie is the process's id */

/* soak.py reads this: twenty 64-bit numbers. */
struct figures {
    uint64_t pid, progress, calls, nested, files, notes, acknowledged, deaths;
    uint64_t dead, frozen, full, failed, interrupted, garbage, forks, wrong, lost, reserved[3];
};

enum code { REGISTER = 1, FIND, CALL, NESTED, FILES, NOTE, NOTED, BACK, ACKNOWLEDGE };

#define MAGIC 0x6b616f73
struct message {
    uint32_t magic, client, number, size, sum;
    uint8_t data[];
};

static int device;
static struct figures *figures;
static uint64_t seed;
static char role;
static int slot, role_argument;

/* ---- small things ---- */

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, ": %s\n", strerror(errno));
    _exit(3);
}

__attribute__((format(printf, 1, 2))) static void wrong(const char *format, ...)
{
    va_list arguments;
    char text[200];

    figures->wrong++;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    fprintf(stderr, "WRONG: pid %d: %s\n", getpid(), text);
}

static __thread uint64_t state;

static uint32_t number(uint32_t limit)
{
    if (!state)
        state = seed * 0x9E3779B97F4A7C15u + (uint64_t)gettid() + 1;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 20) % limit;
}

static uint32_t sum_of(const uint8_t *data, size_t size)
{
    uint32_t sum = 2166136261u;

    for (size_t i = 0; i < size; i++)
        sum = (sum ^ data[i]) * 16777619u;
    return sum;
}

static void on_signal(int signal)
{
    (void)signal;
}

/* ---- a thread's conversation with the driver ---- */

struct talk {
    size_t size;
    uint32_t outcome; /* of the call under way: BR_REPLY, or an error; BR_TRANSACTION_COMPLETE for a one-way call */
    struct binder_transaction_data reply;
    bool acknowledged;
    uint64_t acknowledged_count;
    uint8_t commands[8192];
    uint8_t returns[512];
};

struct known {
    uint32_t handle;
    bool alive;
    uint64_t generation;
};

static struct known services[MAX_SERVICES]; /* a client's */
static void serve(struct talk *talk, struct binder_transaction_data *call);
static void *loop_as_spawned(void *unused);

static void put(struct talk *talk, uint32_t command, const void *payload)
{
    size_t size = _IOC_SIZE(command);

    if (talk->size + 4 + size > sizeof(talk->commands))
        fail("too many commands at once");
    memcpy(talk->commands + talk->size, &command, 4);
    memcpy(talk->commands + talk->size + 4, payload, size);
    talk->size += 4 + size;
}

static void put_handle(struct talk *talk, uint32_t command, uint32_t handle)
{
    put(talk, command, &handle);
}

static void put_free(struct talk *talk, binder_uintptr_t buffer)
{
    put(talk, BC_FREE_BUFFER, &buffer);
}

static void put_death(struct talk *talk, uint32_t command, uint32_t handle, binder_uintptr_t cookie)
{
    struct binder_handle_cookie payload = {handle, cookie};
    put(talk, command, &payload);
}

static void bury(struct talk *talk, binder_uintptr_t cookie)
{
    struct known *service = &services[cookie % MAX_SERVICES];

    put(talk, BC_DEAD_BINDER_DONE, &cookie);
    figures->deaths++;
    if (role == 's')
        _exit(0); /* the manager is gone, and with it the way to find us */
    if (service->alive && service->generation == cookie / MAX_SERVICES) {
        service->alive = false;
        put_handle(talk, BC_RELEASE, service->handle);
    }
}

static void take_apart(struct talk *talk, const uint8_t *next, const uint8_t *end)
{
    while (next < end) {
        uint32_t command;
        struct binder_transaction_data transaction;
        binder_uintptr_t cookie;

        memcpy(&command, next, 4);
        next += 4;
        switch (command) {
        case BR_NOOP:
        case BR_TRANSACTION_PENDING_FROZEN:
        case BR_ONEWAY_SPAM_SUSPECT:
        case BR_TRANSACTION_COMPLETE:
            if (command != BR_NOOP && !talk->outcome)
                talk->outcome = BR_TRANSACTION_COMPLETE;
            break;
        case BR_SPAWN_LOOPER: {
            pthread_t thread;
            if (pthread_create(&thread, NULL, loop_as_spawned, NULL) == 0)
                pthread_detach(thread);
            break;
        }
        case BR_INCREFS:
            put(talk, BC_INCREFS_DONE, next);
            break;
        case BR_ACQUIRE:
            put(talk, BC_ACQUIRE_DONE, next);
            break;
        case BR_RELEASE:
        case BR_DECREFS:
        case BR_CLEAR_DEATH_NOTIFICATION_DONE:
            break;
        case BR_DEAD_BINDER:
            memcpy(&cookie, next, sizeof(cookie));
            bury(talk, cookie);
            break;
        case BR_TRANSACTION:
            memcpy(&transaction, next, sizeof(transaction));
            serve(talk, &transaction);
            break;
        case BR_REPLY:
            memcpy(&talk->reply, next, sizeof(talk->reply));
            talk->outcome = command;
            break;
        case BR_DEAD_REPLY:
        case BR_FAILED_REPLY:
        case BR_FROZEN_REPLY:
            talk->outcome = command;
            break;
        default:
            wrong("a return that nobody asked for: %x", command);
            return;
        }
        next += _IOC_SIZE(command);
    }
    if (next != end)
        wrong("returns that are cut off");
}

/* One BINDER_WRITE_READ; a signal is no reason to give up. */
static void exchange(struct talk *talk, bool reads)
{
    for (;;) {
        struct binder_write_read request = {
            .write_size = talk->size,
            .write_buffer = (uintptr_t)talk->commands,
            .read_size = reads ? sizeof(talk->returns) : 0,
            .read_buffer = (uintptr_t)talk->returns,
        };
        int result = ioctl(device, BINDER_WRITE_READ, &request);
        int error = errno;

        figures->progress++;
        if (request.write_consumed < talk->size) {
            memmove(talk->commands, talk->commands + request.write_consumed, talk->size - request.write_consumed);
            talk->size -= request.write_consumed;
        } else {
            talk->size = 0;
        }
        if (result == 0) {
            if (reads)
                take_apart(talk, talk->returns, talk->returns + request.read_consumed);
            return;
        }
        if (error != EINTR) {
            errno = error;
            fail("BINDER_WRITE_READ as pid %d", getpid());
        }
        figures->interrupted++;
    }
}

static int extended_error(void)
{
    struct binder_extended_error error = {0};

    return ioctl(device, BINDER_GET_EXTENDED_ERROR, &error) < 0 ? 0 : error.param;
}

/* What is to be sent, with one object at most, which comes before the message. */
struct parcel {
    union {
        struct flat_binder_object object;
        struct binder_fd_object fd;
    };
    struct message message;
    uint8_t room[MAX_DATA];
};

static const binder_size_t parcel_offsets[1] = {0};

static void put_parcel(struct talk *talk, uint32_t command, uint32_t handle, uint32_t code, uint32_t flags,
                       struct parcel *parcel, bool has_object)
{
    struct binder_transaction_data transaction = {
        .target.handle = handle,
        .code = code,
        .flags = flags,
        .data_size = sizeof(parcel->object) + sizeof(parcel->message) + parcel->message.size,
        .offsets_size = has_object ? sizeof(parcel_offsets) : 0,
        .data.ptr = {(uintptr_t)parcel, (uintptr_t)parcel_offsets},
    };
    put(talk, command, &transaction);
}

static const struct parcel *received(const struct binder_transaction_data *transaction)
{
    static const struct parcel empty;
    const struct parcel *parcel = (const struct parcel *)(uintptr_t)transaction->data.ptr.buffer;
    size_t head = sizeof(parcel->object) + sizeof(parcel->message);

    if (transaction->data_size < head || transaction->data_size != head + parcel->message.size || parcel->message.magic != MAGIC) {
        if (role != 'm')
            wrong("a message of %llu bytes", (unsigned long long)transaction->data_size);
        return &empty;
    }
    return parcel;
}

static void own_object(struct parcel *parcel)
{
    parcel->object = (struct flat_binder_object){
        .hdr.type = BINDER_TYPE_BINDER,
        .flags = FLAT_BINDER_FLAG_ACCEPTS_FDS,
        .binder = OBJECT,
        .cookie = (binder_uintptr_t)getpid(),
    };
}

/* Call, and serve what comes in the meantime. Returns the BR_ of the answer; then `talk->reply` is to be freed. */
static uint32_t call(struct talk *talk, uint32_t handle, uint32_t code, struct parcel *parcel, bool has_object)
{
    uint32_t outcome;

    talk->outcome = 0;
    put_parcel(talk, BC_TRANSACTION, handle, code, TF_ACCEPT_FDS, parcel, has_object);
    do {
        talk->outcome = 0;
        exchange(talk, true);
    } while (talk->outcome == 0 || talk->outcome == BR_TRANSACTION_COMPLETE);
    outcome = talk->outcome;
    if (outcome == BR_DEAD_REPLY)
        figures->dead++;
    else if (outcome == BR_FROZEN_REPLY)
        figures->frozen++;
    else if (outcome == BR_FAILED_REPLY) {
        int error = extended_error();
        if (error == -ENOSPC)
            figures->full++;
        else if (figures->failed++ < 20)
            fprintf(stderr, "note: pid %d: code %u failed with %d\n", getpid(), code, error);
    }
    return outcome;
}

/* Make a one-way call; true if it is on its way. */
static bool tell(struct talk *talk, uint32_t handle, uint32_t code, struct parcel *parcel, bool has_object)
{
    talk->outcome = 0;
    put_parcel(talk, BC_TRANSACTION, handle, code, TF_ONE_WAY, parcel, has_object);
    do
        exchange(talk, true);
    while (!talk->outcome);
    if (talk->outcome == BR_TRANSACTION_COMPLETE)
        return true;
    if (talk->outcome == BR_DEAD_REPLY)
        figures->dead++;
    else if (extended_error() == -ENOSPC)
        figures->full++;
    else
        figures->failed++;
    return false;
}

static void compose(struct parcel *parcel, uint32_t size)
{
    static uint32_t count;

    parcel->message.magic = MAGIC;
    parcel->message.client = (uint32_t)seed;
    parcel->message.number = __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED);
    parcel->message.size = size;
    for (uint32_t i = 0; i < size; i++)
        parcel->message.data[i] = (uint8_t)(parcel->message.number * 31 + i * 7 + (i >> 8));
    parcel->message.sum = sum_of(parcel->message.data, size);
}

/* ---- the manager ---- */

static uint32_t registered[MAX_SERVICES];
static uint64_t generations[MAX_SERVICES];

static void reply_status(struct talk *talk, uint32_t status)
{
    /* It must be there until the driver has read it: with the next exchange. */
    static __thread struct parcel parcel;

    memset(&parcel.object, 0, sizeof(parcel.object));
    parcel.message = (struct message){MAGIC, 0, status, 0, 0};
    put_parcel(talk, BC_REPLY, 0, 0, 0, &parcel, false);
}

static void manage(struct talk *talk, struct binder_transaction_data *transaction)
{
    static struct parcel answer;
    const struct parcel *parcel = received(transaction);
    uint32_t index = parcel->message.number;

    if (transaction->flags & TF_ONE_WAY) {
        ;
    } else if (index >= MAX_SERVICES || parcel->message.magic != MAGIC) {
        reply_status(talk, EINVAL);
    } else if (transaction->code == REGISTER && parcel->object.hdr.type == BINDER_TYPE_HANDLE) {
        /* The death of the one before may still be on its way: its generation tells. */
        if (registered[index])
            put_handle(talk, BC_RELEASE, registered[index]);
        registered[index] = parcel->object.handle;
        put_handle(talk, BC_ACQUIRE, registered[index]);
        generations[index]++;
        services[index] = (struct known){registered[index], true, generations[index]};
        put_death(talk, BC_REQUEST_DEATH_NOTIFICATION, registered[index], index + MAX_SERVICES * generations[index]);
        reply_status(talk, 0);
    } else if (transaction->code == FIND && services[index].alive) {
        memset(&answer.object, 0, sizeof(answer.object));
        answer.object.hdr.type = BINDER_TYPE_HANDLE;
        answer.object.handle = services[index].handle;
        answer.message = (struct message){.magic = MAGIC};
        put_parcel(talk, BC_REPLY, 0, 0, 0, &answer, true);
    } else {
        reply_status(talk, ENOENT);
    }
    put_free(talk, transaction->data.ptr.buffer);
}

static void be_manager(void)
{
    struct flat_binder_object object = {.hdr.type = BINDER_TYPE_BINDER};
    struct talk talk = {0};

    while (ioctl(device, BINDER_SET_CONTEXT_MGR_EXT, &object) < 0) {
        if (errno != EBUSY)
            fail("BINDER_SET_CONTEXT_MGR_EXT");
        usleep(10000);
    }
    put(&talk, BC_ENTER_LOOPER, NULL);
    for (;;) {
        exchange(&talk, true);
        for (int i = 0; i < MAX_SERVICES; i++)
            if (registered[i] && !services[i].alive)
                registered[i] = 0;
    }
}

/* ---- services ---- */

static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;
static struct count {
    uint32_t client, count, last;
} counts[MAX_CLIENTS];

static struct count *count_of(uint32_t client)
{
    struct count *count = &counts[client % MAX_CLIENTS];

    if (count->client != client)
        *count = (struct count){client, 0, 0};
    return count;
}

static struct parcel *spare_parcel(void)
{
    struct parcel *parcel = calloc(1, sizeof(*parcel));

    if (!parcel)
        fail("calloc");
    return parcel;
}

static int file_with(const uint8_t *data, size_t size)
{
    int fd = memfd_create("soak", MFD_CLOEXEC);

    if (fd < 0 || pwrite(fd, data, size, 0) != (ssize_t)size)
        fail("memfd");
    return fd;
}

static void answer_file(struct talk *talk, struct binder_transaction_data *transaction, const struct parcel *parcel,
                        struct parcel *answer)
{
    int fd = (int)parcel->fd.fd;
    ssize_t got = pread(fd, answer->message.data, 256, 0);

    close(fd);
    answer->message.magic = MAGIC;
    answer->message.size = got < 0 ? 0 : (uint32_t)got;
    answer->message.number = parcel->message.number;
    answer->message.sum = sum_of(answer->message.data, answer->message.size);
    fd = file_with(answer->message.data, answer->message.size);
    answer->fd = (struct binder_fd_object){.hdr.type = BINDER_TYPE_FD, .fd = (uint32_t)fd};
    put_parcel(talk, BC_REPLY, 0, 0, 0, answer, true);
    put_free(talk, transaction->data.ptr.buffer);
    exchange(talk, false);
    close(fd);
}

static void answer_nested(struct talk *talk, struct binder_transaction_data *transaction, const struct parcel *parcel,
                          struct parcel *answer)
{
    struct talk inner = {0};
    uint32_t handle = parcel->object.handle;
    uint32_t number_there = parcel->message.number;

    if (parcel->object.hdr.type != BINDER_TYPE_HANDLE) {
        wrong("an object of type %x", parcel->object.hdr.type);
        reply_status(talk, EINVAL);
        return;
    }
    /* What waits in `talk` must not wait for what follows. */
    exchange(talk, false);
    compose(answer, 16);
    answer->message.number = number_there;
    uint32_t outcome = call(&inner, handle, BACK, answer, false);
    answer->message.size = 0;
    answer->message.number = 0;
    if (outcome == BR_REPLY) {
        answer->message.number = received(&inner.reply)->message.number;
        put_free(&inner, inner.reply.data.ptr.buffer);
    }
    memset(&answer->object, 0, sizeof(answer->object));
    put_parcel(&inner, BC_REPLY, 0, 0, 0, answer, false);
    put_free(&inner, transaction->data.ptr.buffer);
    exchange(&inner, false);
}

static void take_note(struct talk *talk, struct binder_transaction_data *transaction, const struct parcel *parcel)
{
    struct parcel *answer = spare_parcel();
    uint32_t handle = 0, total;

    pthread_mutex_lock(&counting);
    struct count *count = count_of(parcel->message.client);
    if (parcel->message.number <= count->last)
        wrong("one-way call %u after %u", parcel->message.number, count->last);
    count->last = parcel->message.number;
    total = ++count->count;
    if (transaction->code == NOTED)
        count->count = 0;
    pthread_mutex_unlock(&counting);
    if (transaction->code == NOTED && parcel->object.hdr.type == BINDER_TYPE_HANDLE) {
        handle = parcel->object.handle;
        compose(answer, 0);
        answer->message.number = total;
        put_handle(talk, BC_ACQUIRE, handle);
    }
    put_free(talk, transaction->data.ptr.buffer);
    exchange(talk, false);
    if (handle) {
        struct talk inner = {0};
        while (!tell(&inner, handle, ACKNOWLEDGE, answer, false) && inner.outcome != BR_DEAD_REPLY)
            usleep(1000);
        put_handle(&inner, BC_RELEASE, handle);
        exchange(&inner, false);
    }
    free(answer);
}

static void serve_call(struct talk *talk, struct binder_transaction_data *transaction)
{
    const struct parcel *parcel = received(transaction);
    struct parcel *answer;

    if (transaction->flags & TF_ONE_WAY) {
        take_note(talk, transaction, parcel);
        return;
    }
    answer = spare_parcel();
    if (transaction->code == FILES) {
        answer_file(talk, transaction, parcel, answer);
    } else if (transaction->code == NESTED) {
        answer_nested(talk, transaction, parcel, answer);
    } else if (parcel->message.size > MAX_DATA || parcel->message.sum != sum_of(parcel->message.data, parcel->message.size)) {
        wrong("a call with another sum");
        reply_status(talk, EINVAL);
        put_free(talk, transaction->data.ptr.buffer);
        exchange(talk, false);
    } else {
        answer->message = parcel->message;
        for (uint32_t i = 0; i < parcel->message.size; i++)
            answer->message.data[i] = (uint8_t)~parcel->message.data[i];
        answer->message.sum = sum_of(answer->message.data, answer->message.size);
        put_parcel(talk, BC_REPLY, 0, 0, 0, answer, false);
        put_free(talk, transaction->data.ptr.buffer);
        exchange(talk, false);
    }
    free(answer);
}

static void *loop(uint32_t command)
{
    struct talk *talk = calloc(1, sizeof(*talk));

    put(talk, command, NULL);
    for (;;)
        exchange(talk, true);
    return NULL;
}

static void *loop_as_spawned(void *unused)
{
    (void)unused;
    return loop(BC_REGISTER_LOOPER);
}

static void be_service(int index)
{
    struct talk talk = {0};
    struct parcel *parcel = spare_parcel();
    uint32_t threads = 3, outcome;

    ioctl(device, BINDER_SET_MAX_THREADS, &threads);
    for (;;) {
        own_object(parcel);
        parcel->message = (struct message){.magic = MAGIC, .number = (uint32_t)index};
        outcome = call(&talk, 0, REGISTER, parcel, true);
        if (outcome == BR_REPLY)
            break;
        usleep(10000);
    }
    put_free(&talk, talk.reply.data.ptr.buffer);
    exchange(&talk, false);
    /* Should the manager end, so does this one. */
    put_handle(&talk, BC_ACQUIRE, 0);
    put_death(&talk, BC_REQUEST_DEATH_NOTIFICATION, 0, MAX_SERVICES);
    put(&talk, BC_ENTER_LOOPER, NULL);
    for (;;)
        exchange(&talk, true);
}

/* ---- clients ---- */

static bool find(struct talk *talk, int index)
{
    static uint64_t generation;
    struct parcel *parcel = spare_parcel();
    bool found = false;

    parcel->message = (struct message){.magic = MAGIC, .number = (uint32_t)index};
    if (call(talk, 0, FIND, parcel, false) == BR_REPLY) {
        const struct parcel *answer = received(&talk->reply);
        if (talk->reply.offsets_size) {
            generation++;
            services[index] = (struct known){answer->object.handle, true, generation};
            put_handle(talk, BC_ACQUIRE, answer->object.handle);
            put_death(talk, BC_REQUEST_DEATH_NOTIFICATION, answer->object.handle, (binder_uintptr_t)index + MAX_SERVICES * generation);
            found = true;
        }
        put_free(talk, talk->reply.data.ptr.buffer);
        exchange(talk, false);
    }
    free(parcel);
    return found;
}

static void forget(struct talk *talk, int index)
{
    struct known *service = &services[index];

    if (!service->alive)
        return;
    service->alive = false;
    put_death(talk, BC_CLEAR_DEATH_NOTIFICATION, service->handle, (binder_uintptr_t)index + MAX_SERVICES * service->generation);
    put_handle(talk, BC_RELEASE, service->handle);
    exchange(talk, false);
}

static void check_call(struct talk *talk, uint32_t handle, struct parcel *parcel)
{
    static const uint32_t sizes[] = {0, 4, 60, 300, 4000, 4096, 9000, MAX_DATA};

    compose(parcel, sizes[number(8)]);
    if (call(talk, handle, CALL, parcel, false) != BR_REPLY)
        return;
    const struct message *answer = &received(&talk->reply)->message;
    if (answer->number != parcel->message.number || answer->client != parcel->message.client || answer->size != parcel->message.size ||
        answer->sum != sum_of(answer->data, answer->size))
        wrong("another reply: number %u of client %u, not %u of %u", answer->number, answer->client, parcel->message.number,
              parcel->message.client);
    for (uint32_t i = 0; i < answer->size && i < parcel->message.size; i++)
        if ((answer->data[i] ^ parcel->message.data[i]) != 0xff) {
            wrong("byte %u of a reply", i);
            break;
        }
    put_free(talk, talk->reply.data.ptr.buffer);
    figures->calls++;
}

static void check_nested(struct talk *talk, uint32_t handle, struct parcel *parcel)
{
    own_object(parcel);
    compose(parcel, 8);
    if (call(talk, handle, NESTED, parcel, true) != BR_REPLY)
        return;
    uint32_t answer = received(&talk->reply)->message.number;
    /* 0: we could not be called back, for which there are reasons. */
    if (answer && answer != parcel->message.number + 1)
        wrong("called back with %u, not %u", answer, parcel->message.number + 1);
    put_free(talk, talk->reply.data.ptr.buffer);
    figures->nested += answer != 0;
}

static void check_files(struct talk *talk, uint32_t handle, struct parcel *parcel)
{
    uint8_t content[200], found[256];
    int fd;

    compose(parcel, 0);
    for (size_t i = 0; i < sizeof(content); i++)
        content[i] = (uint8_t)(parcel->message.number + i);
    fd = file_with(content, sizeof(content));
    parcel->fd = (struct binder_fd_object){.hdr.type = BINDER_TYPE_FD, .fd = (uint32_t)fd};
    uint32_t outcome = call(talk, handle, FILES, parcel, true);
    close(fd);
    if (outcome != BR_REPLY)
        return;
    const struct parcel *answer = received(&talk->reply);
    if (answer->message.size != sizeof(content) || memcmp(answer->message.data, content, sizeof(content)) != 0)
        wrong("another file arrived");
    fd = (int)answer->fd.fd;
    if (pread(fd, found, sizeof(found), 0) != sizeof(content) || memcmp(found, content, sizeof(content)) != 0)
        wrong("another file came back");
    close(fd);
    put_free(talk, talk->reply.data.ptr.buffer);
    figures->files++;
}

static void check_notes(struct talk *talk, int index, struct parcel *parcel)
{
    uint32_t count = 1 + number(40), sent = 0;
    uint32_t handle = services[index].handle;

    memset(&parcel->object, 0, sizeof(parcel->object));
    for (uint32_t i = 0; i < count; i++) {
        compose(parcel, number(64));
        sent += tell(talk, handle, NOTE, parcel, false);
    }
    own_object(parcel);
    compose(parcel, 0);
    talk->acknowledged = false;
    while (!tell(talk, handle, NOTED, parcel, true)) {
        if (!services[index].alive || talk->outcome == BR_DEAD_REPLY)
            return;
        usleep(1000);
    }
    figures->notes += sent + 1;
    while (!talk->acknowledged && services[index].alive)
        exchange(talk, true);
    if (!talk->acknowledged)
        return;
    figures->acknowledged += sent + 1;
    if (talk->acknowledged_count != sent + 1) {
        figures->lost += talk->acknowledged_count < sent + 1 ? sent + 1 - talk->acknowledged_count : 1;
        wrong("%u one-way calls, and %llu arrived", sent + 1, (unsigned long long)talk->acknowledged_count);
    }
}

/* What others call a client's own object for. */
static void serve_back(struct talk *talk, struct binder_transaction_data *transaction)
{
    uint32_t there = received(transaction)->message.number;

    if (transaction->cookie != (binder_uintptr_t)getpid())
        wrong("an object of process %llu", (unsigned long long)transaction->cookie);
    if (transaction->code == ACKNOWLEDGE) {
        talk->acknowledged = true;
        talk->acknowledged_count = there;
    } else {
        reply_status(talk, there + 1);
    }
    put_free(talk, transaction->data.ptr.buffer);
    exchange(talk, false);
}

static void be_client(int count)
{
    struct talk talk = {0};
    struct parcel *parcel = spare_parcel();

    put(&talk, BC_ENTER_LOOPER, NULL);
    for (;;) {
        int index = (int)number((uint32_t)count);
        if (!services[index].alive && !find(&talk, index)) {
            usleep(2000);
            figures->progress++;
            continue;
        }
        memset(&parcel->object, 0, sizeof(parcel->object));
        switch (number(16)) {
        case 0:
            check_nested(&talk, services[index].handle, parcel);
            break;
        case 1:
            check_files(&talk, services[index].handle, parcel);
            break;
        case 2:
            check_notes(&talk, index, parcel);
            break;
        case 3:
            if (number(8) == 0)
                forget(&talk, index);
            break;
        default:
            check_call(&talk, services[index].handle, parcel);
        }
    }
}

static void serve(struct talk *talk, struct binder_transaction_data *transaction)
{
    figures->progress++;
    if (role == 'm')
        manage(talk, transaction);
    else if (role == 's')
        serve_call(talk, transaction);
    else
        serve_back(talk, transaction);
}

/* ---- garbage ---- */

static uint64_t odd_number(void)
{
    static const uint64_t odd[] = {0, 1, 3, 4, 8, 24, 64, 4095, 4096, 1u << 20, INT32_MAX, 1u << 31, UINT32_MAX, 1ull << 32,
                                   INT64_MAX, 1ull << 63, UINT64_MAX, UINT64_MAX - 7, UINT64_MAX - 4095};
    return number(3) ? odd[number(sizeof(odd) / sizeof(odd[0]))] : ((uint64_t)number(1u << 31) << 32 | number(1u << 31));
}

static void odd_bytes(uint8_t *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++)
        bytes[i] = number(2) ? 0 : (uint8_t)number(256);
    for (size_t i = 0; i + 8 <= size; i += 8)
        if (number(2)) {
            uint64_t word = odd_number();
            memcpy(bytes + i, &word, sizeof(word));
        }
}

/* `area` has AREA bytes, of which the last may not be accessible. */
#define AREA 600
static size_t odd_commands(uint8_t *stream, size_t room, uint8_t *area, size_t accessible)
{
    uint8_t data[AREA];
    static const uint32_t commands[] = {
        BC_TRANSACTION, BC_REPLY, BC_TRANSACTION_SG, BC_REPLY_SG, BC_FREE_BUFFER, BC_INCREFS, BC_ACQUIRE, BC_RELEASE, BC_DECREFS,
        BC_INCREFS_DONE, BC_ACQUIRE_DONE, BC_ACQUIRE_RESULT, BC_ATTEMPT_ACQUIRE, BC_REGISTER_LOOPER, BC_ENTER_LOOPER,
        BC_EXIT_LOOPER, BC_REQUEST_DEATH_NOTIFICATION, BC_CLEAR_DEATH_NOTIFICATION, BC_DEAD_BINDER_DONE,
        BC_REQUEST_FREEZE_NOTIFICATION, BC_CLEAR_FREEZE_NOTIFICATION, BC_FREEZE_NOTIFICATION_DONE};
    static const uint32_t types[] = {BINDER_TYPE_BINDER, BINDER_TYPE_WEAK_BINDER, BINDER_TYPE_HANDLE, BINDER_TYPE_WEAK_HANDLE,
                                     BINDER_TYPE_FD, BINDER_TYPE_FDA, BINDER_TYPE_PTR};
    size_t size = 0;

    for (uint32_t left = 1 + number(4); left; left--) {
        uint32_t command = number(20) ? commands[number(sizeof(commands) / 4)] : number(UINT32_MAX);
        size_t payload = _IOC_SIZE(command) % 256;

        if (size + 4 + payload > room)
            break;
        memcpy(stream + size, &command, 4);
        odd_bytes(stream + size + 4, payload);
        if (command == BC_TRANSACTION || command == BC_REPLY || command == BC_TRANSACTION_SG || command == BC_REPLY_SG) {
            struct binder_transaction_data *transaction = (void *)(stream + size + 4);
            odd_bytes(data, sizeof(data));
            for (int i = 0; i < 4; i++)
                memcpy(data + 40 * i, &types[number(7)], 4);
            for (uint64_t i = 0; i < 4; i++) {
                uint64_t offset = number(6) ? 40 * i : odd_number();
                memcpy(data + 512 + 8 * i, &offset, 8);
            }
            memcpy(area, data, accessible);
            if (number(4)) {
                transaction->target.handle = number(4);
                transaction->flags = number(2) ? TF_ONE_WAY : 0;
                transaction->data_size = number(3) ? 160 : odd_number();
                transaction->offsets_size = number(3) ? 8 * number(5) : odd_number();
                transaction->data.ptr.buffer = (uintptr_t)area;
                transaction->data.ptr.offsets = (uintptr_t)area + 512;
            }
        }
        size += 4 + payload;
    }
    return size;
}

static void be_garbage(const char *path)
{
    /* Without BINDER_SET_CONTEXT_MGR: when the manager is dead, it would make this one the manager, whom services give
     * their handles. They could not tell the garbage that they would get then from an answer that went wrong. */
    static const uint32_t ioctls[] = {BINDER_VERSION, BINDER_SET_MAX_THREADS, BINDER_GET_FROZEN_INFO, BINDER_GET_EXTENDED_ERROR,
                                      BINDER_ENABLE_ONEWAY_SPAM_DETECTION, BINDER_GET_NODE_DEBUG_INFO, BINDER_GET_NODE_INFO_FOR_REF,
                                      BINDER_SET_IDLE_TIMEOUT, BINDER_SET_IDLE_PRIORITY, BINDER_THREAD_EXIT};
    uint8_t *area = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t stream[1024], argument[16384];

    /* Nobody can be waited for. */
    fcntl(device, F_SETFL, O_NONBLOCK);
    close(device);
    device = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    size_t mapped = REGION;
    void *region = mmap(NULL, mapped, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, device, 0);
    mprotect(area + PAGE, PAGE, PROT_NONE);
    for (;;) {
        figures->progress++;
        figures->garbage++;
        uint32_t kind = number(100);
        if (kind < 70) {
            struct binder_write_read request = {
                .write_buffer = (uintptr_t)stream,
                .read_size = number(2) ? 256 : number(2) ? 0 : odd_number() % 100000,
                .read_buffer = number(10) ? (uintptr_t)argument : (uintptr_t)odd_number(),
            };
            size_t accessible = number(8) ? AREA : number(AREA);
            request.write_size = odd_commands(stream, sizeof(stream), area + PAGE - accessible, accessible);
            if (!number(20))
                request.write_buffer = odd_number();
            if (!number(20))
                request.write_size = odd_number();
            if (!number(20))
                request.write_consumed = odd_number();
            if (!number(20))
                request.read_consumed = odd_number();
            if (request.read_buffer == (uintptr_t)argument && request.read_size > sizeof(argument))
                request.read_size = sizeof(argument);
            ioctl(device, BINDER_WRITE_READ, &request);
        } else if (kind < 85) {
            odd_bytes(argument, 64);
            ioctl(device, ioctls[number(sizeof(ioctls) / 4)], argument);
        } else if (kind < 90) {
            odd_bytes(argument, 64);
            ioctl(device, (unsigned long)number(UINT32_MAX), argument);
        } else if (kind < 94) {
            struct pollfd poller = {device, (short)number(65536), 0};
            poll(&poller, 1, 0);
        } else if (kind < 96) {
            uint8_t bytes[64];
            if (read(device, bytes, sizeof(bytes)) < 0 || write(device, bytes, sizeof(bytes)) < 0)
                errno = 0;
        } else if (kind < 98) {
            if (region != MAP_FAILED)
                munmap(region, mapped);
            mapped = (number(16) + 1) * PAGE * 64;
            region = mmap(NULL, mapped, PROT_READ | (number(4) ? 0 : PROT_WRITE),
                          number(2) ? MAP_PRIVATE : MAP_SHARED, device, 0);
        } else {
            close(device);
            device = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
            if (device < 0)
                fail("open");
        }
    }
}

/* ---- forks ---- */

static void be_forker(void)
{
    struct talk talk = {0};

    for (;;) {
        pid_t child = fork();
        if (child == 0) {
            struct binder_version version;
            struct parcel *parcel = spare_parcel();
            state = 0;
            ioctl(device, BINDER_VERSION, &version);
            parcel->message = (struct message){.magic = MAGIC, .number = MAX_SERVICES};
            put_parcel(&talk, BC_TRANSACTION, 0, FIND, number(2) ? TF_ONE_WAY : 0, parcel, false);
            switch (number(4)) {
            case 0:
                _exit(0);
            case 1:
                exchange(&talk, false);
                raise(SIGKILL);
                break;
            case 2:
                exchange(&talk, false);
                ioctl(device, BINDER_THREAD_EXIT, &version);
                _exit(0);
            default:
                exchange(&talk, true);
                _exit(0);
            }
        }
        if (child > 0)
            waitpid(child, NULL, 0);
        figures->forks++;
        figures->progress++;
        usleep(5000);
    }
}

/* ---- freezing ---- */

static void be_freezer(int slots)
{
    struct figures *all = figures - slot;

    for (;;) {
        struct binder_freeze_info info = {(uint32_t)all[number((uint32_t)slots)].pid, 1, 20};
        if (info.pid && ioctl(device, BINDER_FREEZE, &info) == 0) {
            figures->calls++;
            usleep(2000);
        }
        info.enable = 0;
        info.timeout_ms = 0;
        if (info.pid)
            ioctl(device, BINDER_FREEZE, &info);
        figures->progress++;
        usleep(20000);
    }
}

int main(int argc, char **argv)
{
    struct sigaction action = {.sa_handler = on_signal};
    struct binder_version version;

    if (argc < 6)
        return 2;
    const char *path = argv[1];
    int fd = open(argv[2], O_RDWR | O_CLOEXEC);
    struct figures *all = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (all == MAP_FAILED)
        fail("%s", argv[2]);
    figures = all + atoi(argv[3]);
    figures->pid = (uint64_t)getpid();
    seed = strtoull(argv[4], NULL, 10);
    role = argv[5][0];
    slot = atoi(argv[3]);
    role_argument = argc > 6 ? atoi(argv[6]) : 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    sigaction(SIGUSR1, &action, NULL);
    device = open(path, O_RDWR | O_CLOEXEC);
    if (device < 0)
        fail("%s", path);
    if (mmap(NULL, REGION, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, device, 0) == MAP_FAILED)
        fail("mmap");
    ioctl(device, BINDER_VERSION, &version);
    switch (role) {
    case 'm':
        be_manager();
        break;
    case 's':
        be_service(role_argument);
        break;
    case 'c':
        be_client(role_argument);
        break;
    case 'g':
        be_garbage(path);
        break;
    case 'f':
        be_forker();
        break;
    case 'z':
        be_freezer(role_argument);
        break;
    }
    return 2;
}
