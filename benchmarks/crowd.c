/* crowd.c - a client that floods a mount, and bystanders that only want to get on.
 *
 *     crowd DEVICE LOGS UID ACTION [ARGUMENT...]
 *
 * It becomes user UID, without a right, and then does one thing until it is killed, or until its seconds are over.
 * LOGS is the mount's directory of logs. A flood says "ready" once it begins.
 *
 * Bystanders: SECONDS; each prints one line of JSON with the times of what it did, in us. What is still under way at
 * the end counts with the time that it has taken so far.
 *   caller SECONDS     is context manager of DEVICE and, in another process, calls it every 0.3 ms
 *   opener SECONDS     opens, maps and closes DEVICE every 3 ms
 *   piper SECONDS      asks a process over a pipe every 0.3 ms: what the machine alone costs
 *
 * Floods
 *   compute N          N processes that only compute
 *   deaths N           a client with N objects dies, and the holder acknowledges all deaths in one write; over and over
 *   freeze N           a process with N objects freezes and thaws itself
 *   debug N            a process with N objects asks for the next one, BINDER_GET_NODE_DEBUG_INFO
 *   pointers N         one-way calls with N PTR objects, each with a parent
 *   writes N BYTES     N threads write command buffers of BYTES bytes
 *   state N            N processes read LOGS/state
 *   version N          N processes ask for BINDER_VERSION
 *   lines N            N processes open an open device once more, which is refused with a line in the log
 *
 * Clients of a server that is to be killed
 *   waiters N          N processes wait: a third each in a read, in poll(2), and for the answer to a call. When all have
 *                      got an error, it prints one line of JSON: when the first and the last did, CLOCK_MONOTONIC in ns,
 *                      and how many it was.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/android/binder.h>

#ifndef BINDER_FREEZE
#error "the headers are older than Linux 5.12"
#endif

#define REGION_SIZE (4u << 20)
#define OBJECTS_PER_CALL 2048
#define SAMPLES_MAX (1 << 18)

static const char *device, *logs;

static void fail(const char *what)
{
    fprintf(stderr, "crowd: %s: %s\n", what, strerror(errno));
    _exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void pause_for(long ns)
{
    struct timespec t = {0, ns};
    clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL);
}

/* A child that does not outlive its parent. */
static pid_t spawn(void)
{
    pid_t parent = getpid();
    pid_t pid = fork();
    if (pid < 0)
        fail("fork");
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(0);
    }
    return pid;
}

static void say_ready(void)
{
    puts("ready");
    fflush(stdout);
}

/* ---- the wire ---- */

struct command {
    uint32_t code;
    struct binder_transaction_data data;
} __attribute__((packed));

static int open_device(void)
{
    int fd = open(device, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fail(device);
    if (mmap(NULL, REGION_SIZE, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, fd, 0) == MAP_FAILED)
        fail("mmap");
    return fd;
}

static int write_read(int fd, const void *commands, size_t size, void *returns, size_t room, size_t *consumed)
{
    struct binder_write_read request = {
        .write_size = size,
        .write_buffer = (uintptr_t)commands,
        .read_size = room,
        .read_buffer = (uintptr_t)returns,
    };
    int result = ioctl(fd, BINDER_WRITE_READ, &request);
    if (consumed)
        *consumed = request.read_consumed;
    return result;
}

static struct command transaction(uint32_t code, uint32_t flags, const void *data, size_t size, const void *offsets,
                                  size_t offsets_size)
{
    struct command command = {code, {.flags = flags, .data_size = size, .offsets_size = offsets_size}};
    command.data.data.ptr.buffer = (uintptr_t)data;
    command.data.data.ptr.offsets = (uintptr_t)offsets;
    return command;
}

static void become_manager(int fd)
{
    int zero = 0;
    if (ioctl(fd, BINDER_SET_CONTEXT_MGR, &zero) < 0)
        fail("BINDER_SET_CONTEXT_MGR");
}

/* Commands that are still to be sent with the next ioctl. */
struct pending {
    size_t size;
    uint8_t bytes[1 << 19];
};

static void put(struct pending *pending, uint32_t code, const void *argument, size_t size)
{
    if (pending->size + 4 + size > sizeof(pending->bytes))
        return;
    memcpy(pending->bytes + pending->size, &code, 4);
    memcpy(pending->bytes + pending->size + 4, argument, size);
    pending->size += 4 + size;
}

/* A context manager that answers calls, lets one-way ones be, and holds what objects it is given if `hold`: then it asks
 * to be told of their deaths, and acknowledges those only when `deaths` of them have been read. */
static void manage(int fd, bool hold, long deaths)
{
    static struct pending pending;
    static uint8_t returns[1 << 16];
    static binder_uintptr_t dead[1 << 17];
    long died = 0;
    uint32_t enter = BC_ENTER_LOOPER;

    memcpy(pending.bytes, &enter, pending.size = 4);
    for (;;) {
        size_t consumed = 0;
        if (write_read(fd, pending.bytes, pending.size, returns, sizeof(returns), &consumed) < 0 && errno != EINTR)
            fail("the manager's read");
        pending.size = 0;
        for (size_t at = 0; at < consumed;) {
            uint32_t code;
            struct binder_transaction_data data;
            memcpy(&code, returns + at, 4);
            if (code == BR_DEAD_BINDER) {
                memcpy(&dead[died++], returns + at + 4, 8);
            } else if (code == BR_TRANSACTION) {
                memcpy(&data, returns + at + 4, sizeof(data));
                const binder_size_t *offsets = (const void *)(uintptr_t)data.data.ptr.offsets;
                for (size_t i = 0; hold && i < data.offsets_size / 8; i++) {
                    const struct flat_binder_object *object =
                        (const void *)(uintptr_t)(data.data.ptr.buffer + offsets[i]);
                    struct binder_handle_cookie watch = {object->handle, object->handle};
                    put(&pending, BC_ACQUIRE, &object->handle, 4);
                    if (deaths)
                        put(&pending, BC_REQUEST_DEATH_NOTIFICATION, &watch, sizeof(watch));
                }
                put(&pending, BC_FREE_BUFFER, &data.data.ptr.buffer, 8);
                if (!(data.flags & TF_ONE_WAY)) {
                    struct command reply = transaction(BC_REPLY, 0, NULL, 0, NULL, 0);
                    put(&pending, BC_REPLY, &reply.data, sizeof(reply.data));
                }
            }
            at += 4 + _IOC_SIZE(code);
        }
        if (deaths && died >= deaths) {
            /* The last one first: the longest way for who looks for it from the other end. */
            while (died) {
                died--;
                put(&pending, BC_DEAD_BINDER_DONE, &dead[died], 8);
                uint32_t handle = (uint32_t)dead[died];
                put(&pending, BC_RELEASE, &handle, 4);
            }
        }
    }
}

/* Call handle 0, and wait for its answer. */
static int call(int fd, const void *data, size_t size, const void *offsets, size_t offsets_size)
{
    struct {
        struct command command;
        uint32_t free;
        binder_uintptr_t buffer;
    } __attribute__((packed)) out = {transaction(BC_TRANSACTION, 0, data, size, offsets, offsets_size), 0, 0};
    size_t used = sizeof(out.command);

    for (;;) {
        static uint8_t returns[1 << 16];
        size_t consumed = 0;
        if (write_read(fd, &out, used, returns, sizeof(returns), &consumed) < 0)
            return -1;
        used = 0;
        for (size_t at = 0; at < consumed;) {
            uint32_t code;
            memcpy(&code, returns + at, 4);
            if (code == BR_REPLY) {
                struct binder_transaction_data reply;
                memcpy(&reply, returns + at + 4, sizeof(reply));
                uint32_t free = BC_FREE_BUFFER;
                uint8_t commands[12];
                memcpy(commands, &free, 4);
                memcpy(commands + 4, &reply.data.ptr.buffer, 8);
                return write_read(fd, commands, sizeof(commands), NULL, 0, NULL);
            }
            if (code == BR_DEAD_REPLY || code == BR_FAILED_REPLY) {
                errno = EPIPE;
                return -1;
            }
            at += 4 + _IOC_SIZE(code);
        }
    }
}

/* Call until there is a manager. */
static void await_manager(int fd)
{
    while (call(fd, NULL, 0, NULL, 0) < 0)
        pause_for(10000000);
}

/* Have the manager know `count` objects of this process. */
static void give_objects(int fd, long count)
{
    static struct flat_binder_object objects[OBJECTS_PER_CALL];
    static binder_size_t offsets[OBJECTS_PER_CALL];
    static uint64_t next = 1;

    while (count > 0) {
        long some = count < OBJECTS_PER_CALL ? count : OBJECTS_PER_CALL;
        for (long i = 0; i < some; i++, next++) {
            objects[i] = (struct flat_binder_object){
                .hdr.type = BINDER_TYPE_BINDER, .flags = 0x7f, .binder = next * 8, .cookie = next * 8};
            offsets[i] = i * sizeof(objects[0]);
        }
        if (call(fd, objects, some * sizeof(objects[0]), offsets, some * sizeof(offsets[0])) < 0)
            fail("giving objects");
        count -= some;
    }
}

static void start_manager(bool hold, long deaths)
{
    if (spawn() == 0) {
        int fd = open_device();
        become_manager(fd);
        manage(fd, hold, deaths);
    }
}

/* ---- floods ---- */

static void flood_compute(long count)
{
    for (long i = 0; i < count; i++)
        if (spawn() == 0)
            for (volatile unsigned long n = 0;; n++)
                ;
    say_ready();
}

static void flood_deaths(long count)
{
    bool said = false;
    start_manager(true, count);
    for (;;) {
        pid_t victim = spawn();
        if (victim == 0) {
            int fd = open_device();
            await_manager(fd);
            give_objects(fd, count);
            _exit(0);
        }
        waitpid(victim, NULL, 0);
        if (!said)
            say_ready();
        said = true;
    }
}

static int with_objects(long count)
{
    start_manager(true, 0);
    int fd = open_device();
    await_manager(fd);
    give_objects(fd, count);
    say_ready();
    return fd;
}

static void flood_freeze(long count)
{
    int fd = with_objects(count);
    for (;;) {
        struct binder_freeze_info info = {.pid = getpid(), .enable = 1};
        ioctl(fd, BINDER_FREEZE, &info);
        info.enable = 0;
        ioctl(fd, BINDER_FREEZE, &info);
    }
}

static void flood_debug(long count)
{
    int fd = with_objects(count);
    struct binder_node_debug_info info = {0};
    for (;;)
        if (ioctl(fd, BINDER_GET_NODE_DEBUG_INFO, &info) < 0)
            fail("BINDER_GET_NODE_DEBUG_INFO");
}

static void flood_pointers(long count)
{
    start_manager(false, 0);
    int fd = open_device();
    await_manager(fd);
    say_ready();
    /* Object 0 has the room that each other one is pointed to from. */
    struct binder_buffer_object *objects = calloc(count + 1, sizeof(*objects));
    binder_size_t *offsets = calloc(count + 1, sizeof(*offsets));
    uint8_t *data = calloc(1, 8 + (count + 1) * sizeof(*objects));
    uint8_t *room = calloc(count + 1, 8);
    struct {
        uint32_t code;
        struct binder_transaction_data_sg sg;
    } __attribute__((packed)) command = {BC_TRANSACTION_SG, {.buffers_size = (count + 1) * 16}};
    for (long i = 0; i <= count; i++) {
        objects[i] = (struct binder_buffer_object){
            .hdr.type = BINDER_TYPE_PTR, .buffer = (uintptr_t)(i ? room + 8 * i : room), .length = i ? 8 : 8 * count};
        if (i) {
            objects[i].flags = BINDER_BUFFER_FLAG_HAS_PARENT;
            objects[i].parent = 0;
            objects[i].parent_offset = 8 * (i - 1);
        }
        offsets[i] = 8 + i * sizeof(*objects);
    }
    memcpy(data + 8, objects, (count + 1) * sizeof(*objects));
    command.sg.transaction_data.flags = TF_ONE_WAY;
    command.sg.transaction_data.data_size = 8 + (count + 1) * sizeof(*objects);
    command.sg.transaction_data.data.ptr.buffer = (uintptr_t)data;
    command.sg.transaction_data.offsets_size = (count + 1) * 8;
    command.sg.transaction_data.data.ptr.offsets = (uintptr_t)offsets;
    for (;;) {
        uint8_t returns[256];
        write_read(fd, &command, sizeof(command), returns, sizeof(returns), NULL);
    }
}

struct writing {
    int fd;
    size_t size;
};

static void *write_for_ever(void *argument)
{
    const struct writing *writing = argument;
    uint8_t *commands = malloc(writing->size);
    uint32_t some[4] = {BC_INCREFS, 0, BC_DECREFS, 0};
    size_t size = writing->size & ~(sizeof(some) - 1);
    for (size_t at = 0; at < size; at += sizeof(some))
        memcpy(commands + at, some, sizeof(some));
    for (;;)
        if (write_read(writing->fd, commands, size, NULL, 0, NULL) < 0)
            fail("a long write");
    return NULL;
}

static void flood_writes(long threads, long size)
{
    start_manager(false, 0);
    static struct writing writing;
    writing = (struct writing){open_device(), size};
    await_manager(writing.fd);
    for (long i = 0; i < threads; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, write_for_ever, &writing))
            fail("a thread");
    }
    say_ready();
}

static void flood_state(long count)
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/state", logs);
    for (long i = 0; i < count; i++) {
        if (spawn())
            continue;
        for (;;) {
            static char text[1 << 16];
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            while (fd >= 0 && read(fd, text, sizeof(text)) > 0)
                ;
            if (fd >= 0)
                close(fd);
        }
    }
    say_ready();
}

static void flood_version(long count)
{
    int opened[2];
    if (pipe(opened))
        fail("pipe");
    for (long i = 0; i < count; i++) {
        if (spawn())
            continue;
        int fd = open_device();
        struct binder_version version;
        if (write(opened[1], "", 1) != 1)
            fail("write");
        for (;;)
            ioctl(fd, BINDER_VERSION, &version);
    }
    char byte;
    for (long i = 0; i < count; i++)
        if (read(opened[0], &byte, 1) != 1)
            fail("read");
    say_ready();
}

static void flood_lines(long count)
{
    for (long i = 0; i < count; i++) {
        if (spawn())
            continue;
        for (;;) {
            char path[64];
            int fd = open(device, O_RDWR | O_CLOEXEC);
            if (fd < 0)
                continue;
            snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
            int again = open(path, O_RDWR | O_CLOEXEC);
            if (again >= 0)
                close(again);
            close(fd);
        }
    }
    say_ready();
}

/* ---- waiting ---- */

static void tell(int pipe, uint64_t what)
{
    if (write(pipe, &what, sizeof(what)) != sizeof(what))
        fail("write");
}

static uint64_t hear(int pipe)
{
    uint64_t what;
    if (read(pipe, &what, sizeof(what)) != sizeof(what))
        fail("read");
    return what;
}

/* A context manager that takes calls and answers none. */
static void take_calls(int fd, int told)
{
    static uint8_t returns[1 << 16];
    uint32_t enter = BC_ENTER_LOOPER;

    become_manager(fd);
    write_read(fd, &enter, sizeof(enter), NULL, 0, NULL);
    tell(told, 0);
    while (write_read(fd, NULL, 0, returns, sizeof(returns), NULL) == 0)
        ;
}

/* Wait for what never comes, and return when that has failed. */
static void wait_for_ever(int fd, int kind)
{
    static uint8_t returns[4096];
    uint32_t enter = BC_ENTER_LOOPER;
    struct pollfd readable = {fd, POLLIN, 0};

    if (kind == 2) {
        call(fd, NULL, 0, NULL, 0);
        return;
    }
    write_read(fd, &enter, sizeof(enter), NULL, 0, NULL);
    if (kind == 1)
        poll(&readable, 1, -1);
    else
        while (write_read(fd, NULL, 0, returns, sizeof(returns), NULL) == 0)
            ;
}

static void wait_all(long count)
{
    int told[2];
    if (pipe(told))
        fail("pipe");
    if (spawn() == 0) {
        take_calls(open_device(), told[1]);
        _exit(0);
    }
    hear(told[0]);
    for (long i = 0; i < count; i++)
        if (spawn() == 0) {
            int fd = open_device();
            tell(told[1], 0);
            wait_for_ever(fd, (int)(i % 3));
            tell(told[1], now());
            _exit(0);
        }
    for (long i = 0; i < count; i++)
        hear(told[0]);
    say_ready();
    uint64_t first = UINT64_MAX, last = 0;
    for (long i = 0; i < count; i++) {
        uint64_t at = hear(told[0]);
        first = at < first ? at : first;
        last = at > last ? at : last;
    }
    printf("{\"count\": %ld, \"first_ns\": %llu, \"last_ns\": %llu}\n", count, (unsigned long long)first,
           (unsigned long long)last);
    fflush(stdout);
}

/* ---- bystanders ---- */

struct figures {
    _Atomic uint64_t begun; /* of what is under way; 0: nothing is */
    _Atomic uint32_t count;
    uint32_t us[SAMPLES_MAX];
};

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* Let `act` be done every `period` ns by a process of its own, which can be stuck, and say how long it took. */
static void stand_by(const char *name, void (*prepare)(void), void (*act)(void), long period, double seconds)
{
    struct figures *figures = mmap(NULL, sizeof(*figures), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (figures == MAP_FAILED)
        fail("mmap");
    if (spawn() == 0) {
        prepare();
        for (;;) {
            uint64_t begin = now();
            figures->begun = begin;
            act();
            uint32_t us = (uint32_t)((now() - begin) / 1000);
            figures->begun = 0;
            if (figures->count < SAMPLES_MAX)
                figures->us[figures->count++] = us;
            pause_for(period);
        }
    }
    while (!figures->count)
        pause_for(1000000);
    say_ready();
    getchar();
    figures->count = 0;
    pause_for(1);
    for (uint64_t end = now() + (uint64_t)(seconds * 1e9); now() < end;)
        pause_for(10000000);
    uint32_t count = figures->count;
    uint64_t begun = figures->begun;
    if (begun && count < SAMPLES_MAX && now() > begun)
        figures->us[count++] = (uint32_t)((now() - begun) / 1000);
    uint32_t *us = malloc((count + 1) * sizeof(*us));
    memcpy(us, figures->us, count * sizeof(*us));
    qsort(us, count, sizeof(*us), by_value);
    printf("{\"name\": \"%s\", \"count\": %u, \"p50_us\": %u, \"p99_us\": %u, \"max_us\": %u}\n", name, count,
           count ? us[count / 2] : 0, count ? us[(size_t)count * 99 / 100] : 0, count ? us[count - 1] : 0);
    fflush(stdout);
}

static int connection;
static int question[2], answer[2];

static void prepare_caller(void)
{
    connection = open_device();
    await_manager(connection);
}

static void act_call(void)
{
    uint32_t word = 1;
    if (call(connection, &word, sizeof(word), NULL, 0) < 0)
        fail("a bystander's call");
}

static void prepare_opener(void)
{
}

static void act_open(void)
{
    int fd = open(device, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fail("a bystander's open");
    void *memory = mmap(NULL, REGION_SIZE, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
    if (memory != MAP_FAILED)
        munmap(memory, REGION_SIZE);
    close(fd);
}

static void prepare_piper(void)
{
    if (pipe(question) || pipe(answer))
        fail("pipe");
    if (spawn() == 0) {
        char byte;
        while (read(question[0], &byte, 1) == 1)
            if (write(answer[1], &byte, 1) != 1)
                break;
        _exit(0);
    }
}

static void act_pipe(void)
{
    char byte = 0;
    if (write(question[1], &byte, 1) != 1 || read(answer[0], &byte, 1) != 1)
        fail("a pipe");
}

int main(int argc, char **argv)
{
    if (argc < 6) {
        fprintf(stderr, "usage: crowd DEVICE LOGS UID ACTION ARGUMENT...\n");
        return 2;
    }
    device = argv[1];
    logs = argv[2];
    uid_t uid = (uid_t)atol(argv[3]);
    const char *action = argv[4];
    long count = atol(argv[5]);
    double seconds = atof(argv[5]);
    if (setgroups(0, NULL) || setresgid(uid, uid, uid) || setresuid(uid, uid, uid))
        fail("another user");
    /* What has changed its user is not traced by others of it, and could not be served. */
    prctl(PR_SET_DUMPABLE, 1);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGCHLD, SIG_DFL);

    if (strcmp(action, "caller") == 0) {
        start_manager(false, 0);
        stand_by(action, prepare_caller, act_call, 300000, seconds);
        return 0;
    }
    if (strcmp(action, "opener") == 0) {
        stand_by(action, prepare_opener, act_open, 3000000, seconds);
        return 0;
    }
    if (strcmp(action, "piper") == 0) {
        stand_by(action, prepare_piper, act_pipe, 300000, seconds);
        return 0;
    }
    if (strcmp(action, "waiters") == 0)
        wait_all(count);
    else if (strcmp(action, "compute") == 0)
        flood_compute(count);
    else if (strcmp(action, "deaths") == 0)
        flood_deaths(count);
    else if (strcmp(action, "freeze") == 0)
        flood_freeze(count);
    else if (strcmp(action, "debug") == 0)
        flood_debug(count);
    else if (strcmp(action, "pointers") == 0)
        flood_pointers(count);
    else if (strcmp(action, "writes") == 0)
        flood_writes(count, argc > 6 ? atol(argv[6]) : 65536);
    else if (strcmp(action, "state") == 0)
        flood_state(count);
    else if (strcmp(action, "version") == 0)
        flood_version(count);
    else if (strcmp(action, "lines") == 0)
        flood_lines(count);
    else {
        fprintf(stderr, "crowd: what is %s?\n", action);
        return 2;
    }
    for (;;)
        pause();
}
