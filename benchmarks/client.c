/* client.c - an ordinary binder client that measures.
 *
 *     client DEVICE MEASUREMENT...
 *
 * It knows nothing of what is behind DEVICE: a mount, the floor or the kernel's own driver. Each MEASUREMENT is a kind
 * and options, "call,size=4,seconds=0.5"; each prints one line of JSON. Processes are made for one measurement and ended
 * after it: a context manager, and for each pair a service and a client, which behave on the wire as libbinder does (the
 * read buffer has 256 bytes, a buffer is freed together with the next command, a service replies and reads its
 * BR_TRANSACTION_COMPLETE before it waits again).
 *
 * Kinds
 *   call     synchronous calls; the reply carries a 4-byte status word. Latency, and calls per second of all pairs
 *   nested   as call, and the service calls the client back before it replies
 *   oneway   one-way calls in bursts: sent, and waited for until the service has received the last one
 *   hold     no calls: say that all is ready, and wait for a line on standard input
 *
 * Options
 *   size=BYTES      payload of a call (0)
 *   objects=N       binder objects of the client in each call (0)
 *   fds=N           file descriptors in each call (0)
 *   seconds=S       how long a client measures (0.5)     calls=N    and how many calls at most (200000)
 *   warmup=N        calls before that (100)              burst=N    one-way calls in a burst (500)
 *   pairs=N         clients, each with a service (1)     poll=1     the services wait in epoll instead of in a read
 *   client_cpu=N    pin the clients                      server_cpu=N   pin the services
 *   idle=N          further processes, which only wait (0), started one after the other
 *   together=1      or all at once
 *   nodes=N         objects of the client to which the service holds references meanwhile (0)
 *   deaths=1        and the service asks to be told of the death of each; when the client ends, it is
 *   buffers=N       received calls whose buffers the service keeps (0)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/android/binder.h>

#define REGION_SIZE (1024 * 1024 - 2 * 4096)          /* what libbinder maps */
#define READ_SIZE 256                                 /* what libbinder reads */
#define OBJECTS_PER_CALL 32
#define PAGE 4096

enum code {
    REGISTER = 1,   /* to the manager: index and object of a service */
    FIND,           /* to the manager: index; the reply is the object */
    TAKE_CALLBACK,  /* to a service: an object to call back */
    TAKE_OBJECTS,   /* to a service: objects to hold a reference to */
    TAKE_BUFFER,    /* to a service: a buffer to keep */
    CALL, CALL_NESTED, CALL_ONEWAY, CALL_ONEWAY_LAST,
    CALLED_BACK,    /* to a client */
};

struct options {
    long size, objects, fds, calls, warmup, burst, pairs, poll, client_cpu, server_cpu, idle, together, nodes, deaths,
        buffers;
    double seconds;
};

/* What a pair leaves for the parent, in memory that all processes share. Times are in ns. */
struct result {
    uint64_t begin, end;
    uint64_t calls;
    uint64_t take_ns;                                 /* to have the service take all nodes and buffers */
    uint64_t first_death, last_death;
};

struct connection {
    int fd, epoll;
    uint8_t commands[4096], returns[READ_SIZE];
    size_t commands_size, returns_size, returns_used;
    struct binder_transaction_data data;              /* of the BR_TRANSACTION or BR_REPLY received last */
    void (*serve)(struct connection *);
    void (*bury)(struct connection *, binder_uintptr_t cookie);
};

static const char *device, *kind;
static struct options options;
static struct result *results, *result;               /* of all pairs; of this process's pair */
static uint32_t *latencies;                           /* options.calls of them for each pair */
static int ready_pipe[2], go_pipe[2];

static void fail(const char *what)
{
    fprintf(stderr, "client: %s: %s\n", what, strerror(errno));
    _exit(1);
}

static void fail_because(const char *what)
{
    fprintf(stderr, "client: %s\n", what);
    _exit(1);
}

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void *share(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (p == MAP_FAILED)
        fail("mmap");
    return p;
}

/* ---- the wire ---- */

static void connect_to_device(struct connection *c)
{
    memset(c, 0, sizeof *c);
    c->epoll = -1;
    c->fd = open(device, O_RDWR | O_CLOEXEC);
    if (c->fd < 0)
        fail(device);
    if (mmap(NULL, REGION_SIZE, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, c->fd, 0) == MAP_FAILED)
        fail("mmap of the device");
}

static void put(struct connection *c, uint32_t code, const void *argument)
{
    size_t size = _IOC_SIZE(code);

    if (c->commands_size + sizeof code + size > sizeof c->commands)
        fail_because("too many commands at once");
    memcpy(c->commands + c->commands_size, &code, sizeof code);
    memcpy(c->commands + c->commands_size + sizeof code, argument, size);
    c->commands_size += sizeof code + size;
}

static void write_read(struct connection *c, size_t read_size)
{
    struct binder_write_read request = {
        .write_buffer = (uintptr_t)c->commands,
        .write_size = c->commands_size,
        .read_buffer = (uintptr_t)c->returns,
        .read_size = read_size,
    };

    while (ioctl(c->fd, BINDER_WRITE_READ, &request) < 0)
        if (errno != EINTR)
            fail("BINDER_WRITE_READ");
    c->commands_size = 0;
    if (read_size) {
        c->returns_size = request.read_consumed;
        c->returns_used = 0;
    }
}

static void wait_in_epoll(struct connection *c)
{
    struct epoll_event event = { .events = EPOLLIN };

    if (c->epoll < 0) {
        c->epoll = epoll_create1(EPOLL_CLOEXEC);
        if (c->epoll < 0 || epoll_ctl(c->epoll, EPOLL_CTL_ADD, c->fd, &event))
            fail("epoll");
    }
    if (c->commands_size)
        write_read(c, 0);
    while (epoll_wait(c->epoll, &event, 1, -1) < 0)
        if (errno != EINTR)
            fail("epoll_wait");
}

/* Act on what the driver returns until WANTED has come; blocks. */
static void wait_for(struct connection *c, uint32_t wanted)
{
    for (;;) {
        const uint8_t *argument;
        struct binder_ptr_cookie object;
        binder_uintptr_t cookie;
        uint32_t code;

        while (c->returns_used == c->returns_size)
            write_read(c, sizeof c->returns);
        memcpy(&code, c->returns + c->returns_used, sizeof code);
        argument = c->returns + c->returns_used + sizeof code;
        c->returns_used += sizeof code + _IOC_SIZE(code);
        switch (code) {
        case BR_NOOP:
        case BR_TRANSACTION_COMPLETE:
        case BR_RELEASE:
        case BR_DECREFS:
            break;
        case BR_TRANSACTION:
            memcpy(&c->data, argument, sizeof c->data);
            c->serve(c);
            break;
        case BR_REPLY:
            memcpy(&c->data, argument, sizeof c->data);
            break;
        case BR_INCREFS:
        case BR_ACQUIRE:
            memcpy(&object, argument, sizeof object);
            put(c, code == BR_INCREFS ? BC_INCREFS_DONE : BC_ACQUIRE_DONE, &object);
            break;
        case BR_DEAD_BINDER:
            memcpy(&cookie, argument, sizeof cookie);
            put(c, BC_DEAD_BINDER_DONE, &cookie);
            c->bury(c, cookie);
            break;
        default:
            fprintf(stderr, "client: %s: unexpected return %#x\n", kind, code);
            _exit(1);
        }
        if (code == wanted)
            return;
    }
}

static void free_buffer(struct connection *c, binder_uintptr_t buffer)
{
    put(c, BC_FREE_BUFFER, &buffer);
}

static void send(struct connection *c, uint32_t command, uint32_t handle, uint32_t code, uint32_t flags,
                 const void *data, size_t size, const binder_size_t *offsets, size_t objects)
{
    struct binder_transaction_data transaction = {
        .target.handle = handle,
        .code = code,
        .flags = flags,
        .data_size = size,
        .offsets_size = objects * sizeof *offsets,
        .data.ptr = { .buffer = (uintptr_t)data, .offsets = (uintptr_t)offsets },
    };

    put(c, command, &transaction);
}

static void call(struct connection *c, uint32_t handle, uint32_t code, const void *data, size_t size,
                 const binder_size_t *offsets, size_t objects)
{
    send(c, BC_TRANSACTION, handle, code, TF_ACCEPT_FDS, data, size, offsets, objects);
    wait_for(c, BR_REPLY);
}

static void reply(struct connection *c, const void *data, size_t size, const binder_size_t *offsets, size_t objects)
{
    send(c, BC_REPLY, 0, 0, 0, data, size, offsets, objects);
    wait_for(c, BR_TRANSACTION_COMPLETE);
}

static const void *received(const struct connection *c)
{
    return (const void *)(uintptr_t)c->data.data.ptr.buffer;
}

static struct flat_binder_object own_object(binder_uintptr_t pointer)
{
    return (struct flat_binder_object){
        .hdr.type = BINDER_TYPE_BINDER,
        .flags = FLAT_BINDER_FLAG_ACCEPTS_FDS,
        .binder = pointer,
        .cookie = pointer,
    };
}

/* ---- the manager ---- */

struct registration {
    uint64_t index;
    struct flat_binder_object object;
};

static uint32_t *registered;                          /* handles by index */

static void manage(struct connection *c)
{
    struct registration entry = { 0 };
    const binder_size_t offset = 0;
    uint32_t code = c->data.code;

    memcpy(&entry, received(c), code == REGISTER ? sizeof entry : sizeof entry.index);
    if (code == REGISTER) {
        registered[entry.index] = entry.object.handle;
        put(c, BC_ACQUIRE, &entry.object.handle);
        free_buffer(c, c->data.data.ptr.buffer);
        reply(c, NULL, 0, NULL, 0);
        return;
    }
    entry.object.hdr.type = BINDER_TYPE_HANDLE;
    entry.object.handle = registered[entry.index];
    free_buffer(c, c->data.data.ptr.buffer);
    reply(c, &entry.object, sizeof entry.object, &offset, 1);
}

static void say_ready(void)
{
    if (write(ready_pipe[1], "", 1) != 1)
        fail("write");
}

static void serve_for_ever(struct connection *c)
{
    for (;;) {
        if (options.poll)
            wait_in_epoll(c);
        wait_for(c, BR_TRANSACTION);
    }
}

static void run_manager(long index)
{
    struct connection c;
    int unused = 0;

    (void)index;
    registered = calloc(options.pairs, sizeof *registered);
    connect_to_device(&c);
    c.serve = manage;
    /* The driver cleans up after a dead process when it gets to it: the manager of the measurement before may still be
     * in office. */
    while (ioctl(c.fd, BINDER_SET_CONTEXT_MGR, &unused) < 0) {
        if (errno != EBUSY)
            fail("BINDER_SET_CONTEXT_MGR");
        usleep(1000);
    }
    put(&c, BC_ENTER_LOOPER, NULL);
    say_ready();
    serve_for_ever(&c);
}

/* ---- a service ---- */

static uint32_t callback;

/* Look at all that came: one byte of each page, so that its cost is in the figure, and the last word, which is answered. */
static uint32_t look_at(const uint8_t *data, size_t size)
{
    volatile uint8_t sink = 0;
    uint32_t word = 0;

    for (size_t i = 0; i < size; i += PAGE)
        sink += data[i];
    if (size >= sizeof word)
        memcpy(&word, data + size - sizeof word, sizeof word);
    return word;
}

static void take_objects(struct connection *c)
{
    for (size_t i = 0; i < c->data.offsets_size / sizeof(binder_size_t); i++) {
        struct flat_binder_object object;
        struct binder_handle_cookie death;

        memcpy(&object, (const uint8_t *)received(c) + i * sizeof object, sizeof object);
        callback = object.handle;
        put(c, BC_ACQUIRE, &object.handle);
        if (options.deaths && c->data.code == TAKE_OBJECTS) {
            death.handle = object.handle;
            death.cookie = object.handle;
            put(c, BC_REQUEST_DEATH_NOTIFICATION, &death);
        }
    }
}

static void close_received(struct connection *c)
{
    for (size_t i = 0; i < c->data.offsets_size / sizeof(binder_size_t); i++) {
        struct binder_fd_object object;

        memcpy(&object, (const uint8_t *)received(c) + i * sizeof object, sizeof object);
        if (object.hdr.type == BINDER_TYPE_FD && close(object.fd))
            fail("a received descriptor");
    }
}

static void serve(struct connection *c)
{
    struct binder_transaction_data got = c->data;
    uint32_t status = look_at(received(c), got.data_size);

    if (got.code == TAKE_CALLBACK || got.code == TAKE_OBJECTS)
        take_objects(c);
    if (got.code == CALL && options.fds)
        close_received(c);
    if (got.code == CALL_NESTED) {
        call(c, callback, CALLED_BACK, &status, sizeof status, NULL, 0);
        free_buffer(c, c->data.data.ptr.buffer);
    }
    if (got.code != TAKE_BUFFER)
        free_buffer(c, got.data.ptr.buffer);
    if (!(got.flags & TF_ONE_WAY))
        reply(c, &status, sizeof status, NULL, 0);
    if (got.code == CALL_ONEWAY_LAST) {
        send(c, BC_TRANSACTION, callback, CALLED_BACK, TF_ONE_WAY, &status, sizeof status, NULL, 0);
        wait_for(c, BR_TRANSACTION_COMPLETE);
    }
}

static void bury(struct connection *c, binder_uintptr_t cookie)
{
    static long dead;
    uint32_t handle = cookie;

    put(c, BC_RELEASE, &handle);
    result->last_death = now();
    if (!dead++)
        result->first_death = result->last_death;
    if (dead == options.nodes)
        _exit(0);
}

static void run_service(long index)
{
    struct registration entry = { .index = index, .object = own_object(0x1000) };
    const binder_size_t offset = offsetof(struct registration, object);
    struct connection c;

    connect_to_device(&c);
    c.serve = serve;
    c.bury = bury;
    call(&c, 0, REGISTER, &entry, sizeof entry, &offset, 1);
    free_buffer(&c, c.data.data.ptr.buffer);
    put(&c, BC_ENTER_LOOPER, NULL);
    say_ready();
    serve_for_ever(&c);
}

/* A process of which nothing is wanted but that it is there. */
static void run_idle(long index)
{
    struct connection c;

    (void)index;
    connect_to_device(&c);
    put(&c, BC_ENTER_LOOPER, NULL);
    say_ready();
    wait_for(&c, BR_TRANSACTION);
}

/* ---- a client ---- */

static struct {
    uint8_t *data;
    size_t size, objects;
    binder_size_t offsets[OBJECTS_PER_CALL];
} message;

static void make_message(void)
{
    struct flat_binder_object object;
    struct binder_fd_object fd = { .hdr.type = BINDER_TYPE_FD };

    message.objects = options.objects + options.fds;
    message.size = message.objects * sizeof object + options.size;
    message.data = calloc(1, message.size + 1);
    for (size_t i = 0; i < message.objects; i++) {
        message.offsets[i] = i * sizeof object;
        if ((long)i < options.objects) {
            object = own_object(0x10000 + i);
            memcpy(message.data + message.offsets[i], &object, sizeof object);
        } else {
            fd.fd = open("/dev/null", O_RDWR | O_CLOEXEC);
            memcpy(message.data + message.offsets[i], &fd, sizeof fd);
        }
    }
}

static void called_back(struct connection *c)
{
    uint32_t status = look_at(received(c), c->data.data_size);
    int oneway = c->data.flags & TF_ONE_WAY;

    free_buffer(c, c->data.data.ptr.buffer);
    if (!oneway)
        reply(c, &status, sizeof status, NULL, 0);
}

/* Have the service take COUNT objects of this process, at POINTER and after it. */
static void give_objects(struct connection *c, uint32_t service, enum code code, binder_uintptr_t pointer, long count)
{
    struct flat_binder_object objects[OBJECTS_PER_CALL];
    binder_size_t offsets[OBJECTS_PER_CALL];

    while (count > 0) {
        long some = count < OBJECTS_PER_CALL ? count : OBJECTS_PER_CALL;

        for (long i = 0; i < some; i++) {
            objects[i] = own_object(pointer++);
            offsets[i] = i * sizeof *objects;
        }
        call(c, service, code, objects, some * sizeof *objects, offsets, some);
        free_buffer(c, c->data.data.ptr.buffer);
        count -= some;
    }
}

static uint32_t find_service(struct connection *c, uint64_t index)
{
    struct flat_binder_object object;

    call(c, 0, FIND, &index, sizeof index, NULL, 0);
    memcpy(&object, received(c), sizeof object);
    put(c, BC_ACQUIRE, &object.handle);
    free_buffer(c, c->data.data.ptr.buffer);
    return object.handle;
}

static void call_once(struct connection *c, uint32_t service, enum code code)
{
    static uint32_t number;
    uint32_t status;

    number++;
    if (options.size >= (long)sizeof number)
        memcpy(message.data + message.size - sizeof number, &number, sizeof number);
    call(c, service, code, message.data, message.size, message.offsets, message.objects);
    if (options.size >= (long)sizeof number) {
        memcpy(&status, received(c), sizeof status);
        if (c->data.data_size != sizeof status || status != number)
            fail_because("the service received something else than was sent");
    }
    free_buffer(c, c->data.data.ptr.buffer);
}

static void measure_calls(struct connection *c, uint32_t service, enum code code, uint32_t *latency)
{
    uint64_t before = now(), after, deadline = before + options.seconds * 1e9;
    long n = 0;

    result->begin = before;
    do {
        call_once(c, service, code);
        after = now();
        latency[n++] = after - before;
        before = after;
    } while (n < options.calls && after < deadline);
    result->end = after;
    result->calls = n;
}

/* A one-way call is sent when its BR_TRANSACTION_COMPLETE is here: that is its latency. The rate counts a burst as done
 * when the service has received the last one of it. */
static void measure_oneway(struct connection *c, uint32_t service, uint32_t *latency)
{
    uint64_t before = now(), after, deadline = before + options.seconds * 1e9;
    long n = 0;

    result->begin = before;
    do {
        for (long i = 1; i <= options.burst && n < options.calls; i++) {
            send(c, BC_TRANSACTION, service, i == options.burst || n == options.calls - 1 ? CALL_ONEWAY_LAST : CALL_ONEWAY,
                 TF_ONE_WAY, message.data, message.size, message.offsets, message.objects);
            before = now();
            wait_for(c, BR_TRANSACTION_COMPLETE);
            latency[n++] = now() - before;
        }
        wait_for(c, BR_TRANSACTION);
        after = now();
    } while (n < options.calls && after < deadline);
    result->end = after;
    result->calls = n;
}

static void run_client(long index)
{
    uint32_t *latency = latencies + index * options.calls, service;
    enum code code = strcmp(kind, "nested") ? CALL : CALL_NESTED;
    struct connection c;
    uint64_t before;
    char byte;

    connect_to_device(&c);
    c.serve = called_back;
    put(&c, BC_ENTER_LOOPER, NULL);
    service = find_service(&c, index);
    make_message();
    give_objects(&c, service, TAKE_CALLBACK, 0x2000, 1);
    give_objects(&c, service, TAKE_CALLBACK, 0x10000, options.objects);
    before = now();
    give_objects(&c, service, TAKE_OBJECTS, 0x1000000, options.nodes);
    for (long i = 0; i < options.buffers; i++) {
        call(&c, service, TAKE_BUFFER, &before, sizeof before, NULL, 0);
        free_buffer(&c, c.data.data.ptr.buffer);
    }
    result->take_ns = now() - before;
    if (options.objects)
        give_objects(&c, service, TAKE_CALLBACK, 0x2000, 1);
    for (long i = 0; i < options.warmup; i++)
        call_once(&c, service, code);
    say_ready();
    if (read(go_pipe[0], &byte, 1) != 1)
        fail("read");
    if (!strcmp(kind, "oneway"))
        measure_oneway(&c, service, latency);
    else if (strcmp(kind, "hold"))
        measure_calls(&c, service, code, latency);
    _exit(0);
}

/* ---- the parent ---- */

static uint64_t idle_ns;                              /* until all idle processes had the device open */
static pid_t *children;
static size_t children_count;

static void end_children(void)
{
    for (size_t i = 0; i < children_count; i++)
        if (children[i])
            kill(children[i], SIGKILL);
    for (size_t i = 0; i < children_count; i++)
        if (children[i])
            waitpid(children[i], NULL, 0);
    children_count = 0;
}

static void give_up(const char *what)
{
    fprintf(stderr, "client: %s: %s\n", kind, what);
    end_children();
    exit(1);
}

static void start(void (*run)(long), long index, long cpu)
{
    pid_t pid = fork();

    if (pid < 0)
        give_up(strerror(errno));
    if (pid) {
        children[children_count++] = pid;
        return;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (cpu >= 0) {
        cpu_set_t set;

        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        if (sched_setaffinity(0, sizeof set, &set))
            fail("sched_setaffinity");
    }
    result = results + index;
    run(index);
    _exit(1);
}

/* Notice the children that have ended. All is over when one of them failed. */
static long reap(void)
{
    long reaped = 0;
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        for (size_t i = 0; i < children_count; i++)
            if (children[i] == pid)
                children[i] = 0;
        if (status)
            give_up("a process of it has failed");
        reaped++;
    }
    return reaped;
}

static void wait_until_ready(long count)
{
    struct pollfd pipe = { .fd = ready_pipe[0], .events = POLLIN };
    char bytes[64];

    while (count > 0) {
        if (poll(&pipe, 1, 100) > 0)
            count -= read(pipe.fd, bytes, sizeof bytes);
        reap();
    }
}

static void wait_until_ended(long count)
{
    while (count > 0) {
        siginfo_t info;

        waitid(P_ALL, 0, &info, WEXITED | WNOWAIT);
        count -= reap();
    }
}

static int ascending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

static void print_results(const char *measurement)
{
    uint64_t begin = UINT64_MAX, end = 0, calls = 0, take = 0, dying = 0, sum = 0;
    uint32_t *all;

    for (long i = 0; i < options.pairs; i++) {
        begin = results[i].begin < begin ? results[i].begin : begin;
        end = results[i].end > end ? results[i].end : end;
        take = results[i].take_ns > take ? results[i].take_ns : take;
        dying = results[i].last_death - results[i].first_death;
        calls += results[i].calls;
    }
    all = malloc((calls + 1) * sizeof *all);
    calls = 0;
    for (long i = 0; i < options.pairs; i++) {
        memcpy(all + calls, latencies + i * options.calls, results[i].calls * sizeof *all);
        calls += results[i].calls;
    }
    qsort(all, calls, sizeof *all, ascending);
    for (uint64_t i = 0; i < calls; i++)
        sum += all[i];
    printf("{\"measurement\": \"%s\", \"kind\": \"%s\"", measurement, kind);
    if (calls)
        printf(", \"calls\": %llu, \"seconds\": %.6f, \"rate\": %.1f, \"mean_us\": %.3f, \"p50_us\": %.3f"
               ", \"p90_us\": %.3f, \"p99_us\": %.3f, \"max_us\": %.3f",
               (unsigned long long)calls, (end - begin) / 1e9, calls * 1e9 / (end - begin), sum / 1e3 / calls,
               all[calls / 2] / 1e3, all[calls * 9 / 10] / 1e3, all[calls * 99 / 100] / 1e3, all[calls - 1] / 1e3);
    if (options.idle)
        printf(", \"idle_us\": %.3f", idle_ns / 1e3);
    if (options.nodes || options.buffers)
        printf(", \"take_us\": %.3f", take / 1e3);
    if (options.deaths)
        printf(", \"deaths_us\": %.3f", dying / 1e3);
    printf("}\n");
    fflush(stdout);
    free(all);
}

static void parse(const char *measurement)
{
    static const struct { const char *name; size_t offset; long fallback; } names[] = {
        { "size", offsetof(struct options, size), 0 },
        { "objects", offsetof(struct options, objects), 0 },
        { "fds", offsetof(struct options, fds), 0 },
        { "calls", offsetof(struct options, calls), 200000 },
        { "warmup", offsetof(struct options, warmup), 100 },
        { "burst", offsetof(struct options, burst), 500 },
        { "pairs", offsetof(struct options, pairs), 1 },
        { "poll", offsetof(struct options, poll), 0 },
        { "client_cpu", offsetof(struct options, client_cpu), -1 },
        { "server_cpu", offsetof(struct options, server_cpu), -1 },
        { "idle", offsetof(struct options, idle), 0 },
        { "together", offsetof(struct options, together), 0 },
        { "nodes", offsetof(struct options, nodes), 0 },
        { "deaths", offsetof(struct options, deaths), 0 },
        { "buffers", offsetof(struct options, buffers), 0 },
    };
    static char text[256];
    char *rest = text, *word;

    snprintf(text, sizeof text, "%s", measurement);
    kind = strsep(&rest, ",");
    options.seconds = 0.5;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        *(long *)((char *)&options + names[i].offset) = names[i].fallback;
    while ((word = strsep(&rest, ","))) {
        char *value = strchr(word, '=');
        int known = 0;

        if (!value)
            fail_because(word);
        *value++ = 0;
        if (!strcmp(word, "seconds")) {
            options.seconds = atof(value);
            known = 1;
        }
        for (size_t i = 0; i < sizeof names / sizeof *names; i++)
            if (!strcmp(word, names[i].name)) {
                *(long *)((char *)&options + names[i].offset) = atol(value);
                known = 1;
            }
        if (!known)
            fail_because(word);
    }
    if (strcmp(kind, "call") && strcmp(kind, "nested") && strcmp(kind, "oneway") && strcmp(kind, "hold"))
        fail_because(kind);
    if (options.objects + options.fds > OBJECTS_PER_CALL)
        fail_because("too many objects in a call");
}

static void measure(const char *measurement)
{
    size_t results_size, latencies_size;

    parse(measurement);
    results_size = options.pairs * sizeof *results;
    latencies_size = options.pairs * options.calls * sizeof *latencies;
    results = share(results_size);
    latencies = share(latencies_size);
    children = calloc(1 + 2 * options.pairs + options.idle, sizeof *children);
    if (pipe2(ready_pipe, O_CLOEXEC) || pipe2(go_pipe, O_CLOEXEC))
        fail("pipe");

    start(run_manager, 0, -1);
    wait_until_ready(1);
    for (long i = 0; i < options.pairs; i++) {
        start(run_service, i, options.server_cpu);
        wait_until_ready(1);
    }
    idle_ns = now();
    for (long i = 0; i < options.idle; i++) {
        start(run_idle, 0, -1);
        if (!options.together)
            wait_until_ready(1);
    }
    if (options.together)
        wait_until_ready(options.idle);
    idle_ns = now() - idle_ns;
    for (long i = 0; i < options.pairs; i++)
        start(run_client, i, options.client_cpu);
    wait_until_ready(options.pairs);

    if (!strcmp(kind, "hold")) {
        printf("{\"measurement\": \"%s\", \"kind\": \"hold\", \"ready\": true}\n", measurement);
        fflush(stdout);
        getchar();
    }
    for (long i = 0; i < options.pairs; i++)
        if (write(go_pipe[1], "", 1) != 1)
            fail("write");
    wait_until_ended(options.pairs + (options.deaths ? options.pairs : 0));
    if (strcmp(kind, "hold"))
        print_results(measurement);
    end_children();

    free(children);
    munmap(results, results_size);
    munmap(latencies, latencies_size);
    close(ready_pipe[0]), close(ready_pipe[1]), close(go_pipe[0]), close(go_pipe[1]);
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: client DEVICE MEASUREMENT...\n");
        return 2;
    }
    device = argv[1];
    for (int i = 2; i < argc; i++)
        measure(argv[i]);
    return 0;
}
