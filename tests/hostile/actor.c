/* actor.c - binder clients, good ones and bad ones, told line by line what to do.
 *
 *     actor DEVICE
 *
 * Each line on standard input is one thing to do; one line on standard output says what came of it: "0", the name of an
 * errno, or what is said below. An action that blocks says nothing until it is over. With "&" in front it is done by a thread
 * of its own, and the next line is read at once.
 *
 * The device
 *   open [DEVICE]        open it and map 1 MiB
 *   close
 *   open-many N          open it N times more, unmapped; says "N", or how often that went well and an errno
 *   open-files N PATH    open a file or folder beside the device N times to read; likewise
 *   look-up N PATH       the same with O_PATH
 *   manager              become context manager, who takes descriptors
 *   version              BINDER_VERSION
 *   threads N            the same by N threads, one after the other; says "N", or how often that went well and an errno
 *
 * Conversation; calls are to handle 0, with a payload that depends on sender and number, to be answered with the same
 *   serve N              answer N calls (0: for ever); says the sum of all their code words
 *   call N               call N times and check the answers; says "N", or where it went wrong: "3 BR_FAILED_REPLY -28"
 *   tell N               N one-way calls; likewise
 *   tell-unread N        N one-way calls whose returns are read only in the end; says how many of them went well
 *   receive N            read N calls without answering; says "N"
 *   free                 free the buffer received last
 *   answer SIZE          answer calls for ever, each with SIZE bytes
 *   hoard N              open the device N times more, map 4 MiB each, make one call over each, and keep the answer; says "N", or
 *                        where it went wrong, as call does
 *   publish N            pass on N objects of its own, 1,000 in each one-way call; says "N", or where it went wrong, as call does
 *   give pipe|FD         a one-way call with a descriptor: one end of a pipe with "hello" in it, or that number; says the BR_
 *                        names that came back
 *   take                 read one call; says how many descriptors it carried, and what can be read from the first
 *
 * Blocking: PART of an ioctl in memory that is not there yet
 *   block PART absent    the memory's faults are ours to serve: says "fault" when somebody touches it, and what the ioctl came
 *                        to (BR_ names, or an errno) after "serve-fault". PART is commands, data, offsets, buffer (that a PTR
 *                        object points to), read, or reply (read, but only once the reply comes)
 *                        apart (commands, with data at an address that every process can have memory at)
 *   watch-apart          have memory at that address; says "fault" when somebody touches it
 *   block PART FILE [N]  the memory is a mapping of page N of that file
 *   serve-fault          let it be memory after all
 *   stuck N PART         the same in N threads, with faults that nobody serves; says "0", and nothing ever after
 *   vanish N             N threads wait in a read, lose the memory that they read into, and are all woken up; says "0"
 *   linger N             N threads wait in a read, and lose the memory of their ioctl's argument, as they find out when it is
 *                        answered; says "0"
 *   hand N               make calls with a descriptor in N threads; says "0"
 *
 * Oddities
 *   scribble             write over the whole region through a shared, writable mapping of it
 *   limit-fds N          set RLIMIT_NOFILE
 *   fill-fds N           open descriptors until only N more can be
 *   read-nonblocking     read, with O_NONBLOCK set by fcntl
 *   receive-sender       read one call, and answer it; says who sent it, "pid N euid N"
 *   forge                call with somebody else's identity in all fields that there are for one
 *   fsuid UID            be another user as far as files go
 *   peek-region          the sum of the first page of the own region
 *   nice N
 *   fork [PID]           a child, whose pid is said, does what is told from now on; this process waits for its end. With PID
 *                        it is to have that pid, which must be free
 *   extremes             ioctls with each length, count, offset and pointer in turn at its extremes; says how many, and how
 *                        many of them went through
 *   tid                  the id of the thread that does this
 *   device               the number of the device's descriptor
 *   use FD               take a descriptor for the device, and map it
 *   as UID               become another user, for good, with no right but the one that userfaultfd takes (CAP_SYS_PTRACE)
 *   exit
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/sched.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/fsuid.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/android/binder.h>

#define PAGE 4096
#define REGION (1024 * 1024)
#define LARGE_REGION (4 * 1024 * 1024)
#define LINE 512

static char *device_path;
static int device = -1;
static uint8_t *region;
static int fault_fd = -1;
static void *fault_page;
static pthread_mutex_t saying = PTHREAD_MUTEX_INITIALIZER;

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    va_list arguments;

    pthread_mutex_lock(&saying);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
    pthread_mutex_unlock(&saying);
}

static void say_result(int result)
{
    if (result < 0)
        say("%s", strerrorname_np(errno));
    else
        say("%d", result);
}

static void need(bool fine, const char *what)
{
    if (!fine) {
        say("%s: %s", what, strerror(errno));
        exit(1);
    }
}

/* ---- the wire ---- */

static const char *return_name(uint32_t command)
{
    static const struct {
        uint32_t command;
        const char *name;
    } names[] = {
        {BR_NOOP, "BR_NOOP"},
        {BR_TRANSACTION, "BR_TRANSACTION"},
        {BR_REPLY, "BR_REPLY"},
        {BR_TRANSACTION_COMPLETE, "BR_TRANSACTION_COMPLETE"},
        {BR_FAILED_REPLY, "BR_FAILED_REPLY"},
        {BR_DEAD_REPLY, "BR_DEAD_REPLY"},
        {BR_FROZEN_REPLY, "BR_FROZEN_REPLY"},
        {BR_INCREFS, "BR_INCREFS"},
        {BR_ACQUIRE, "BR_ACQUIRE"},
        {BR_RELEASE, "BR_RELEASE"},
        {BR_DECREFS, "BR_DECREFS"},
        {BR_SPAWN_LOOPER, "BR_SPAWN_LOOPER"},
        {BR_ERROR, "BR_ERROR"},
        {BR_ONEWAY_SPAM_SUSPECT, "BR_ONEWAY_SPAM_SUSPECT"},
    };
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (names[i].command == command)
            return names[i].name;
    return "BR_?";
}

struct talk {
    uint8_t commands[512];
    size_t size;
    uint8_t returns[512];
    struct binder_transaction_data received; /* the last BR_TRANSACTION or BR_REPLY */
    uint32_t last;                           /* the last return that says something about a call */
    long completed;                          /* BR_TRANSACTION_COMPLETE so far */
    char names[256];                         /* all returns */
};

static void put(struct talk *talk, uint32_t command, const void *payload, size_t size)
{
    memcpy(talk->commands + talk->size, &command, sizeof(command));
    memcpy(talk->commands + talk->size + sizeof(command), payload, size);
    talk->size += sizeof(command) + size;
}

static void put_free(struct talk *talk, binder_uintptr_t buffer)
{
    put(talk, BC_FREE_BUFFER, &buffer, sizeof(buffer));
}

static void put_transaction(struct talk *talk, uint32_t command, uint32_t code, uint32_t flags, const void *data, size_t size,
                            const void *offsets, size_t offsets_size)
{
    struct binder_transaction_data transaction = {
        .code = code,
        .flags = flags,
        .data_size = size,
        .offsets_size = offsets_size,
        .data.ptr = {(uintptr_t)data, (uintptr_t)offsets},
    };
    put(talk, command, &transaction, sizeof(transaction));
}

/* One ioctl; takes the returns apart. Returns 0 or -1 with errno. */
static int exchange(struct talk *talk, void *commands, void *returns, size_t returns_size)
{
    struct binder_write_read request = {
        .write_size = talk->size,
        .write_buffer = (uintptr_t)(commands ? commands : talk->commands),
        .read_size = returns_size,
        .read_buffer = (uintptr_t)(returns ? returns : talk->returns),
    };
    int result = ioctl(device, BINDER_WRITE_READ, &request);

    talk->size = 0;
    talk->names[0] = '\0';
    if (result < 0)
        return result;
    const uint8_t *next = (uint8_t *)(uintptr_t)request.read_buffer;
    const uint8_t *end = next + request.read_consumed;
    while (next < end) {
        uint32_t command;
        memcpy(&command, next, sizeof(command));
        next += sizeof(command);
        if (command == BR_TRANSACTION || command == BR_REPLY)
            memcpy(&talk->received, next, sizeof(talk->received));
        if (command == BR_ACQUIRE || command == BR_INCREFS)
            put(talk, command == BR_ACQUIRE ? BC_ACQUIRE_DONE : BC_INCREFS_DONE, next, _IOC_SIZE(command));
        if (command != BR_NOOP && command != BR_SPAWN_LOOPER && command != BR_TRANSACTION_COMPLETE)
            talk->last = command;
        talk->completed += command == BR_TRANSACTION_COMPLETE;
        if (command != BR_NOOP && strlen(talk->names) < sizeof(talk->names) - 40) {
            if (talk->names[0])
                strcat(talk->names, " ");
            strcat(talk->names, return_name(command));
        }
        next += command == BR_ERROR ? 0 : _IOC_SIZE(command);
    }
    return 0;
}

/* Exchange until something is said about a call; signals (a stop is one) do not end it. */
static int converse(struct talk *talk)
{
    talk->last = 0;
    do {
        if (exchange(talk, NULL, NULL, sizeof(talk->returns)) < 0 && errno != EINTR)
            return -1;
    } while (talk->last != BR_TRANSACTION && talk->last != BR_REPLY && talk->last != BR_FAILED_REPLY &&
             talk->last != BR_DEAD_REPLY && talk->last != BR_FROZEN_REPLY && talk->last != BR_ERROR);
    return 0;
}

static void fill(uint32_t *payload, uint32_t number)
{
    for (int i = 0; i < 8; i++)
        payload[i] = (uint32_t)getpid() * 2654435761u ^ number << i;
}

static int extended_error(void)
{
    struct binder_extended_error error;

    return ioctl(device, BINDER_GET_EXTENDED_ERROR, &error) < 0 ? 0 : error.param;
}

/* ---- conversation ---- */

static void do_call(long count)
{
    struct talk talk = {0};

    for (long i = 0; i < count; i++) {
        uint32_t payload[8];
        fill(payload, (uint32_t)i);
        put_transaction(&talk, BC_TRANSACTION, (uint32_t)i, 0, payload, sizeof(payload), NULL, 0);
        if (converse(&talk) < 0) {
            say("%ld %s", i, strerrorname_np(errno));
            return;
        }
        if (talk.last != BR_REPLY) {
            say("%ld %s %d", i, return_name(talk.last), extended_error());
            return;
        }
        if (talk.received.data_size != sizeof(payload) ||
            memcmp((void *)(uintptr_t)talk.received.data.ptr.buffer, payload, sizeof(payload)) != 0) {
            say("%ld another answer", i);
            return;
        }
        put_free(&talk, talk.received.data.ptr.buffer);
    }
    exchange(&talk, NULL, NULL, 0);
    say("%ld", count);
}

static void do_tell(long count)
{
    struct talk talk = {0};

    for (long i = 0; i < count; i++) {
        uint32_t payload[8];
        fill(payload, (uint32_t)i);
        put_transaction(&talk, BC_TRANSACTION, 1, TF_ONE_WAY, payload, sizeof(payload), NULL, 0);
        talk.last = 0;
        if (exchange(&talk, NULL, NULL, sizeof(talk.returns)) < 0) {
            say("%ld %s", i, strerrorname_np(errno));
            return;
        }
        if (talk.last && talk.last != BR_ONEWAY_SPAM_SUSPECT) {
            say("%ld %s %d", i, return_name(talk.last), extended_error());
            return;
        }
    }
    say("%ld", count);
}

static void do_tell_unread(long count)
{
    struct talk talk = {0};

    for (long i = 0; i < count; i++) {
        put_transaction(&talk, BC_TRANSACTION, 1, TF_ONE_WAY, NULL, 0, NULL, 0);
        if (exchange(&talk, NULL, NULL, 0) < 0)
            break;
    }
    do {
        if (exchange(&talk, NULL, NULL, sizeof(talk.returns)) < 0)
            break;
    } while (!talk.last);
    say("%ld %s", talk.completed, talk.last ? return_name(talk.last) : strerrorname_np(errno));
}

static void do_serve(long count)
{
    struct talk talk = {0};
    uint64_t sum = 0;

    put(&talk, BC_ENTER_LOOPER, NULL, 0);
    for (long i = 0; !count || i < count; i++) {
        if (converse(&talk) < 0) {
            say("%s", strerrorname_np(errno));
            return;
        }
        if (talk.last != BR_TRANSACTION) {
            say("%s", return_name(talk.last));
            return;
        }
        sum += talk.received.code;
        if (talk.received.flags & TF_ONE_WAY) {
            put_free(&talk, talk.received.data.ptr.buffer);
            continue;
        }
        uint8_t answer[256];
        size_t size = talk.received.data_size < sizeof(answer) ? talk.received.data_size : sizeof(answer);
        memcpy(answer, (void *)(uintptr_t)talk.received.data.ptr.buffer, size);
        put_free(&talk, talk.received.data.ptr.buffer);
        put_transaction(&talk, BC_REPLY, 0, 0, answer, size, NULL, 0);
        /* So that the reply has left before this says that it is over. */
        exchange(&talk, NULL, NULL, 0);
    }
    say("%llu", (unsigned long long)sum);
}

static void do_answer(size_t size)
{
    struct talk talk = {0};
    uint8_t *answer = malloc(size);

    need(answer != NULL, "malloc");
    memset(answer, 1, size);
    put(&talk, BC_ENTER_LOOPER, NULL, 0);
    while (converse(&talk) == 0 && talk.last == BR_TRANSACTION) {
        put_free(&talk, talk.received.data.ptr.buffer);
        put_transaction(&talk, BC_REPLY, 0, 0, answer, size, NULL, 0);
        exchange(&talk, NULL, NULL, 0);
    }
    say("%s", talk.last ? return_name(talk.last) : strerrorname_np(errno));
}

static void do_hoard(long count)
{
    for (long i = 0; i < count; i++) {
        struct talk talk = {0};

        device = open(device_path, O_RDWR | O_CLOEXEC);
        if (device < 0 || mmap(NULL, LARGE_REGION, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, device, 0) == MAP_FAILED) {
            say("%ld %s", i, strerrorname_np(errno));
            return;
        }
        put_transaction(&talk, BC_TRANSACTION, 1, 0, NULL, 0, NULL, 0);
        if (converse(&talk) < 0) {
            say("%ld %s", i, strerrorname_np(errno));
            return;
        }
        if (talk.last != BR_REPLY) {
            say("%ld %s %d", i, return_name(talk.last), extended_error());
            return;
        }
    }
    say("%ld", count);
}

static void do_publish(long count)
{
    enum { EACH = 1000 };
    static struct flat_binder_object objects[EACH];
    static binder_size_t offsets[EACH];

    for (long i = 0; i < count; i += EACH) {
        struct talk talk = {0};
        uint32_t last = 0;

        for (long j = 0; j < EACH; j++) {
            objects[j] = (struct flat_binder_object){
                .hdr.type = BINDER_TYPE_BINDER, .binder = (uintptr_t)(8 * (i + j + 1)), .cookie = 1};
            offsets[j] = (uintptr_t)j * sizeof(objects[0]);
        }
        put_transaction(&talk, BC_TRANSACTION, 1, TF_ONE_WAY, objects, sizeof(objects), offsets, sizeof(offsets));
        /* The counts of references that come back are not acknowledged: the kernel's driver would not forget it either. */
        do {
            if (exchange(&talk, NULL, NULL, sizeof(talk.returns)) < 0) {
                say("%ld %s", i, strerrorname_np(errno));
                return;
            }
            talk.size = 0;
            last = talk.last ? talk.last : last;
        } while (!talk.completed && last != BR_FAILED_REPLY && last != BR_DEAD_REPLY);
        if (!talk.completed) {
            say("%ld %s %d", i, return_name(last), extended_error());
            return;
        }
    }
    say("%ld", count);
}

static binder_uintptr_t held;

static void do_receive(long count)
{
    struct talk talk = {0};

    put(&talk, BC_ENTER_LOOPER, NULL, 0);
    for (long i = 0; i < count; i++) {
        if (converse(&talk) < 0) {
            say("%s", strerrorname_np(errno));
            return;
        }
        held = talk.received.data.ptr.buffer;
    }
    say("%ld", count);
}

static void do_free(void)
{
    struct talk talk = {0};

    put_free(&talk, held);
    say_result(exchange(&talk, NULL, NULL, 0));
}

static void do_give(const char *what)
{
    int ends[2] = {-1, -1};
    struct talk talk = {0};
    struct binder_fd_object object = {.hdr.type = BINDER_TYPE_FD};
    binder_size_t offset = 0;

    if (strcmp(what, "pipe") == 0) {
        need(pipe(ends) == 0, "pipe");
        need(write(ends[1], "hello", 5) == 5, "write");
        object.fd = (uint32_t)ends[0];
    } else {
        object.fd = (uint32_t)atoi(what);
    }
    put_transaction(&talk, BC_TRANSACTION, 1, TF_ONE_WAY, &object, sizeof(object), &offset, sizeof(offset));
    if (exchange(&talk, NULL, NULL, sizeof(talk.returns)) < 0)
        say("%s", strerrorname_np(errno));
    else if (strstr(talk.names, "FAILED"))
        say("%s %d", talk.names, extended_error());
    else
        say("%s", talk.names);
    if (ends[0] >= 0) {
        close(ends[0]);
        close(ends[1]);
    }
}

static void do_take(void)
{
    struct talk talk = {0};
    char text[16] = "";
    int count = 0;

    put(&talk, BC_ENTER_LOOPER, NULL, 0);
    if (converse(&talk) < 0 || talk.last != BR_TRANSACTION) {
        say("%s", talk.last ? return_name(talk.last) : strerrorname_np(errno));
        return;
    }
    const uint8_t *data = (uint8_t *)(uintptr_t)talk.received.data.ptr.buffer;
    const binder_size_t *offsets = (binder_size_t *)(uintptr_t)talk.received.data.ptr.offsets;
    for (size_t i = 0; i < talk.received.offsets_size / sizeof(*offsets); i++) {
        struct binder_fd_object object;
        memcpy(&object, data + offsets[i], sizeof(object));
        if (object.hdr.type != BINDER_TYPE_FD)
            continue;
        if (!count++) {
            ssize_t got = read((int)object.fd, text, sizeof(text) - 1);
            text[got > 0 ? got : 0] = '\0';
        }
        close((int)object.fd);
    }
    put_free(&talk, talk.received.data.ptr.buffer);
    exchange(&talk, NULL, NULL, 0);
    say("%d %s", count, text);
}

/* ---- blocking ---- */

#define APART ((void *)UINT64_C(0x300000000000))

static void *memory_apart(void)
{
    const int fixed = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    void *page = mmap(APART, PAGE, PROT_READ | PROT_WRITE, fixed, -1, 0);

    need(page == APART, "mmap");
    return page;
}

static void watch_page(void *page, int *fd)
{
    struct uffdio_api api = {.api = UFFD_API};

    *fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    need(*fd >= 0, "userfaultfd");
    need(ioctl(*fd, UFFDIO_API, &api) == 0, "UFFDIO_API");
    struct uffdio_register area = {{(uintptr_t)page, PAGE}, UFFDIO_REGISTER_MODE_MISSING, 0};
    need(ioctl(*fd, UFFDIO_REGISTER, &area) == 0, "UFFDIO_REGISTER");
}

static void *absent_page(int *fd)
{
    void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    need(page != MAP_FAILED, "mmap");
    watch_page(page, fd);
    return page;
}

static uint8_t contents[PAGE]; /* what the absent page has once it is served */

static void *watch_faults(void *unused)
{
    struct uffd_msg message;

    (void)unused;
    while (read(fault_fd, &message, sizeof(message)) == (ssize_t)sizeof(message))
        if (message.event == UFFD_EVENT_PAGEFAULT)
            say("fault");
    return NULL;
}

static void do_watch_apart(void)
{
    pthread_t watcher;

    watch_page(memory_apart(), &fault_fd);
    need(pthread_create(&watcher, NULL, watch_faults, NULL) == 0, "pthread_create");
    say("0");
}

static void do_serve_fault(void)
{
    struct uffdio_copy copy = {(uintptr_t)fault_page, (uintptr_t)contents, PAGE, 0, 0};

    need(ioctl(fault_fd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
}

/* Make the ioctl with `part` in `page`; `prepared` is what the page is to hold, to be written by now or never. */
static int block(struct talk *talk, const char *part, uint8_t *page, uint8_t *prepared)
{
    static const uint8_t data[64];
    static const binder_size_t zero;
    static const struct flat_binder_object object = {.hdr.type = BINDER_TYPE_BINDER};
    struct binder_buffer_object pointer = {.hdr.type = BINDER_TYPE_PTR, .buffer = (uintptr_t)page, .length = 64};

    if (strcmp(part, "commands") == 0) {
        put_transaction(talk, BC_TRANSACTION, 1, 0, data, sizeof(data), NULL, 0);
        memcpy(prepared, talk->commands, talk->size);
        return exchange(talk, page, NULL, sizeof(talk->returns));
    }
    if (strcmp(part, "apart") == 0) {
        put_transaction(talk, BC_TRANSACTION, 1, 0, memory_apart(), 64, NULL, 0);
        memcpy(prepared, talk->commands, talk->size);
        return exchange(talk, page, NULL, sizeof(talk->returns));
    }
    if (strcmp(part, "data") == 0) {
        put_transaction(talk, BC_TRANSACTION, 1, 0, page, 64, NULL, 0);
        return exchange(talk, NULL, NULL, sizeof(talk->returns));
    }
    if (strcmp(part, "offsets") == 0) {
        put_transaction(talk, BC_TRANSACTION, 1, 0, &object, sizeof(object), page, sizeof(zero));
        return exchange(talk, NULL, NULL, sizeof(talk->returns));
    }
    if (strcmp(part, "buffer") == 0) {
        struct binder_transaction_data_sg transaction = {
            .transaction_data = {.code = 1,
                                 .data_size = sizeof(pointer),
                                 .offsets_size = sizeof(zero),
                                 .data.ptr = {(uintptr_t)&pointer, (uintptr_t)&zero}},
            .buffers_size = 64,
        };
        put(talk, BC_TRANSACTION_SG, &transaction, sizeof(transaction));
        return exchange(talk, NULL, NULL, sizeof(talk->returns));
    }
    if (strcmp(part, "read") == 0) {
        put_transaction(talk, BC_TRANSACTION, 1, 0, data, sizeof(data), NULL, 0);
        return exchange(talk, NULL, page, sizeof(talk->returns));
    }
    need(strcmp(part, "reply") == 0, part);
    /* A call that goes well tells the server that this address is fine to write to. */
    put_transaction(talk, BC_TRANSACTION, 1, 0, data, sizeof(data), NULL, 0);
    if (exchange(talk, NULL, page, sizeof(talk->returns)) < 0)
        return -1;
    need(madvise(page, PAGE, MADV_DONTNEED) == 0, "madvise");
    put_transaction(talk, BC_TRANSACTION, 2, 0, data, sizeof(data), NULL, 0);
    return exchange(talk, NULL, page, sizeof(talk->returns));
}

static void do_block(const char *part, const char *memory, long index)
{
    struct talk talk = {0};
    uint8_t *page;

    if (strcmp(memory, "absent") == 0) {
        pthread_t watcher;
        page = fault_page = absent_page(&fault_fd);
        if (strcmp(part, "reply") == 0)
            do_serve_fault();
        need(pthread_create(&watcher, NULL, watch_faults, NULL) == 0, "pthread_create");
        page = fault_page;
    } else {
        int fd = open(memory, O_RDONLY | O_CLOEXEC);
        need(fd >= 0, memory);
        page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, index * PAGE);
        need(page != MAP_FAILED && madvise(page, PAGE, MADV_RANDOM) == 0, "mmap");
        close(fd);
    }
    if (block(&talk, part, page, contents) < 0)
        say("%s", strerrorname_np(errno));
    else
        say("%s", talk.names[0] ? talk.names : "BR_NOOP");
}

static void *be_stuck(void *part)
{
    struct talk talk = {0};
    struct binder_version version;
    uint8_t unused[PAGE];
    int fd;

    ioctl(device, BINDER_VERSION, &version);
    block(&talk, part, absent_page(&fd), unused);
    return NULL;
}

static void do_stuck(long count, const char *part)
{
    char *kept = strdup(part);

    for (long i = 0; i < count; i++) {
        pthread_t thread;
        need(pthread_create(&thread, NULL, be_stuck, kept) == 0, "pthread_create");
    }
    say("0");
}

/* A thread that waits in a read into a page of its own; `tid` is set when it is about to. */
struct reader {
    pthread_t thread;
    uint8_t *page;
    _Atomic int tid;
};

static void *wait_in_read(void *argument)
{
    struct reader *reader = argument;
    struct talk talk = {0};

    exchange(&talk, NULL, reader->page, sizeof(talk.returns)); /* a thread's first one returns at once */
    reader->tid = gettid();
    exchange(&talk, NULL, reader->page, sizeof(talk.returns));
    return NULL;
}

static void *wait_with_argument(void *argument)
{
    struct reader *reader = argument;
    struct binder_write_read *request = (struct binder_write_read *)reader->page;
    struct talk talk = {0};

    put(&talk, BC_ENTER_LOOPER, NULL, 0);
    exchange(&talk, NULL, NULL, sizeof(talk.returns));
    *request = (struct binder_write_read){.read_size = sizeof(talk.returns), .read_buffer = (uintptr_t)talk.returns};
    reader->tid = gettid();
    ioctl(device, BINDER_WRITE_READ, request);
    return NULL;
}

static bool is_asleep(int tid)
{
    char path[64], state = 0;
    FILE *file;

    snprintf(path, sizeof(path), "/proc/self/task/%d/stat", tid);
    file = fopen(path, "r");
    need(file && fscanf(file, "%*d (%*[^)]) %c", &state) == 1, path);
    fclose(file);
    return state == 'S';
}

/* Start threads, and take their pages away once they all wait. */
static void lose_pages(long count, void *(*work)(void *))
{
    struct uffdio_api api = {.api = UFFD_API};
    struct reader *readers = calloc((size_t)count, sizeof(*readers));
    uint8_t *area = mmap(NULL, (size_t)count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);

    need(area != MAP_FAILED && fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0, "userfaultfd");
    for (long i = 0; i < count; i++) {
        readers[i].page = area + i * PAGE;
        need(pthread_create(&readers[i].thread, NULL, work, &readers[i]) == 0, "pthread_create");
    }
    for (long i = 0; i < count; i++)
        while (!readers[i].tid || !is_asleep(readers[i].tid))
            sched_yield();
    struct uffdio_register range = {{(uintptr_t)area, (size_t)count * PAGE}, UFFDIO_REGISTER_MODE_MISSING, 0};
    need(ioctl(fd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");
    need(madvise(area, (size_t)count * PAGE, MADV_DONTNEED) == 0, "madvise");
}

static void do_vanish(long count)
{
    lose_pages(count, wait_in_read);
    close(dup(device)); /* the driver has every thread return at that */
    say("0");
}

static void do_linger(long count)
{
    lose_pages(count, wait_with_argument);
    say("0");
}

static void *call_with_descriptor(void *unused)
{
    struct talk talk = {0};
    struct binder_fd_object object = {.hdr.type = BINDER_TYPE_FD};
    binder_size_t offset = 0;

    (void)unused;
    put_transaction(&talk, BC_TRANSACTION, 1, 0, &object, sizeof(object), &offset, sizeof(offset));
    exchange(&talk, NULL, NULL, sizeof(talk.returns));
    return NULL;
}

static void do_hand(long count)
{
    for (long i = 0; i < count; i++) {
        pthread_t thread;
        need(pthread_create(&thread, NULL, call_with_descriptor, NULL) == 0, "pthread_create");
    }
    say("0");
}

/* ---- oddities ---- */

static void do_scribble(void)
{
    uint8_t *own = mmap(NULL, REGION, PROT_READ | PROT_WRITE, MAP_SHARED, device, 0);

    if (own == MAP_FAILED) {
        say("%s", strerrorname_np(errno));
        return;
    }
    memset(own, 0xff, REGION);
    munmap(own, REGION);
    say("0");
}

static void do_fill_fds(long left)
{
    int before[16] = {0};
    long opened = 0;

    for (int fd; (fd = open("/dev/null", O_RDONLY)) >= 0;)
        before[opened++ % 16] = fd;
    for (long i = 0; i < left; i++)
        close(before[(opened - 1 - i) % 16]);
    say("0");
}

static void *map_device(void)
{
    region = mmap(NULL, REGION, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, device, 0);
    return region;
}

static void do_open(const char *path)
{
    device = open(path, O_RDWR | O_CLOEXEC);
    if (device < 0) {
        say("%s", strerrorname_np(errno));
        return;
    }
    if (map_device() == MAP_FAILED) {
        say("mmap: %s", strerrorname_np(errno));
        return;
    }
    /* The first ioctl of a thread never waits. */
    struct binder_version version;
    ioctl(device, BINDER_VERSION, &version);
    say("0");
}

static void do_open_many(long count)
{
    for (long i = 0; i < count; i++)
        if (open(device_path, O_RDWR | O_CLOEXEC) < 0) {
            say("%ld %s", i, strerrorname_np(errno));
            return;
        }
    say("%ld", count);
}

static void do_open_files(long count, const char *path, int flags)
{
    for (long i = 0; i < count; i++)
        if (open(path, flags | O_CLOEXEC) < 0) {
            say("%ld %s", i, strerrorname_np(errno));
            return;
        }
    say("%ld", count);
}

static void *ask_version(void *error)
{
    struct binder_version version;

    *(int *)error = ioctl(device, BINDER_VERSION, &version) < 0 ? errno : 0;
    return NULL;
}

static void do_threads(long count)
{
    for (long i = 0; i < count; i++) {
        pthread_t thread;
        int error = 0;
        need(pthread_create(&thread, NULL, ask_version, &error) == 0, "pthread_create");
        pthread_join(thread, NULL);
        if (error) {
            say("%ld %s", i, strerrorname_np(error));
            return;
        }
    }
    say("%ld", count);
}

static void do_fork(pid_t pid)
{
    struct clone_args arguments = {.exit_signal = SIGCHLD, .set_tid = pid ? (uintptr_t)&pid : 0, .set_tid_size = pid != 0};
    pid_t child = (pid_t)syscall(SYS_clone3, &arguments, sizeof(arguments));

    if (child < 0) {
        say_result(-1);
        return;
    }
    if (child) {
        waitpid(child, NULL, 0);
        _exit(0);
    }
    say("%d", getpid());
}

static void do_use(int fd)
{
    device = fd;
    if (map_device() == MAP_FAILED)
        say("%s", strerrorname_np(errno));
    else
        say("0");
}

/* ---- lies ---- */

static const uint64_t EXTREMES[] = {
    0,
    1,
    3,
    4,
    7,
    8,
    PAGE - 1,
    PAGE + 1,
    (1ull << 31) - 1,
    1ull << 31,
    (1ull << 32) - 1,
    1ull << 32,
    (1ull << 47) - PAGE,
    1ull << 63,
    (1ull << 63) - 1,
    ~0ull - 7,
    ~0ull,
};

struct lie {
    struct binder_write_read request;
    struct binder_transaction_data_sg sg;
    uint8_t commands[sizeof(uint32_t) + sizeof(struct binder_transaction_data_sg)];
    struct {
        struct binder_buffer_object buffer;
        struct binder_buffer_object child;
        struct binder_fd_array_object array;
        struct flat_binder_object flat;
    } data;
    binder_size_t offsets[4];
    uint8_t buffer[64];
    uint8_t returns[512];
};

/* All is as it should be, or nearly: the number of descriptors may be one that the driver accepts. */
static void tell_truth(struct lie *lie)
{
    memset(lie, 0, sizeof(*lie));
    lie->data.buffer = (struct binder_buffer_object){
        .hdr.type = BINDER_TYPE_PTR, .buffer = (uintptr_t)lie->buffer, .length = sizeof(lie->buffer)};
    lie->data.child = lie->data.buffer;
    lie->data.child.flags = BINDER_BUFFER_FLAG_HAS_PARENT;
    lie->data.child.parent_offset = 8;
    lie->data.array = (struct binder_fd_array_object){.hdr.type = BINDER_TYPE_FDA, .parent_offset = 16};
    lie->data.flat.hdr.type = BINDER_TYPE_BINDER;
    lie->offsets[0] = (uintptr_t)&lie->data.buffer - (uintptr_t)&lie->data;
    lie->offsets[1] = (uintptr_t)&lie->data.child - (uintptr_t)&lie->data;
    lie->offsets[2] = (uintptr_t)&lie->data.array - (uintptr_t)&lie->data;
    lie->offsets[3] = (uintptr_t)&lie->data.flat - (uintptr_t)&lie->data;
    lie->sg.transaction_data.flags = TF_ONE_WAY;
    lie->sg.transaction_data.data_size = sizeof(lie->data);
    lie->sg.transaction_data.offsets_size = sizeof(lie->offsets);
    lie->sg.transaction_data.data.ptr.buffer = (uintptr_t)&lie->data;
    lie->sg.transaction_data.data.ptr.offsets = (uintptr_t)lie->offsets;
    lie->sg.buffers_size = 2 * sizeof(lie->buffer);
    lie->request.write_buffer = (uintptr_t)lie->commands;
    lie->request.write_size = sizeof(lie->commands);
    lie->request.read_buffer = (uintptr_t)lie->returns;
    lie->request.read_size = sizeof(lie->returns);
}

static void do_extremes(void)
{
    static struct lie lie;
    void *const fields[] = {
        &lie.request.write_size,
        &lie.request.write_consumed,
        &lie.request.write_buffer,
        &lie.request.read_size,
        &lie.request.read_consumed,
        &lie.request.read_buffer,
        &lie.sg.transaction_data.target.ptr,
        &lie.sg.transaction_data.data_size,
        &lie.sg.transaction_data.offsets_size,
        &lie.sg.transaction_data.data.ptr.buffer,
        &lie.sg.transaction_data.data.ptr.offsets,
        &lie.sg.buffers_size,
        &lie.data.buffer.buffer,
        &lie.data.buffer.length,
        &lie.data.child.parent,
        &lie.data.child.parent_offset,
        &lie.data.child.length,
        &lie.data.array.num_fds,
        &lie.data.array.parent,
        &lie.data.array.parent_offset,
        &lie.data.flat.binder,
        &lie.data.flat.cookie,
        &lie.offsets[0],
        &lie.offsets[3],
    };
    int made = 0, fine = 0, nothing = 0;

    fcntl(device, F_SETFL, fcntl(device, F_GETFL) | O_NONBLOCK);
    for (size_t field = 0; field < sizeof(fields) / sizeof(fields[0]); field++)
        for (size_t extreme = 0; extreme < sizeof(EXTREMES) / sizeof(EXTREMES[0]); extreme++) {
            tell_truth(&lie);
            memcpy(fields[field], &EXTREMES[extreme], sizeof(EXTREMES[extreme]));
            memcpy(lie.commands, &(uint32_t){BC_TRANSACTION_SG}, sizeof(uint32_t));
            memcpy(lie.commands + sizeof(uint32_t), &lie.sg, sizeof(lie.sg));
            made++;
            fine += ioctl(device, BINDER_WRITE_READ, &lie.request) == 0;
            /* What could not be read would be all that there is to read, for ever. */
            ioctl(device, BINDER_THREAD_EXIT, &nothing);
        }
    say("%d %d", made, fine);
}

static void do_limit(long count)
{
    struct rlimit limit = {(rlim_t)count, (rlim_t)count};

    say_result(setrlimit(RLIMIT_NOFILE, &limit));
}

static void do_read_nonblocking(void)
{
    struct talk talk = {0};
    int flags = fcntl(device, F_GETFL);

    fcntl(device, F_SETFL, flags | O_NONBLOCK);
    int result = exchange(&talk, NULL, NULL, sizeof(talk.returns));
    int error = errno;
    fcntl(device, F_SETFL, flags);
    errno = error;
    say_result(result);
}

static void do_receive_sender(void)
{
    struct talk talk = {0};

    put(&talk, BC_ENTER_LOOPER, NULL, 0);
    if (converse(&talk) < 0 || talk.last != BR_TRANSACTION) {
        say("%s", talk.last ? return_name(talk.last) : strerrorname_np(errno));
        return;
    }
    say("pid %d euid %u", talk.received.sender_pid, talk.received.sender_euid);
    put_free(&talk, talk.received.data.ptr.buffer);
    put_transaction(&talk, BC_REPLY, 0, 0, NULL, 0, NULL, 0);
    exchange(&talk, NULL, NULL, 0);
}

static void do_forge(void)
{
    struct talk talk = {0};
    struct binder_transaction_data transaction = {.cookie = 1, .code = 1, .sender_pid = 1, .sender_euid = 0};

    put(&talk, BC_TRANSACTION, &transaction, sizeof(transaction));
    say_result(converse(&talk));
}

static void do_peek_region(void)
{
    unsigned sum = 0;

    for (int i = 0; i < PAGE; i++)
        sum += region[i];
    say("%u", sum);
}

static void do_become(uid_t uid)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {{1u << CAP_SYS_PTRACE, 1u << CAP_SYS_PTRACE, 0}};

    /* The way there may not be open to everybody. */
    char *slash = strrchr(device_path, '/');
    if (slash) {
        *slash = '\0';
        need(chdir(device_path) == 0, device_path);
        device_path = slash + 1;
    }
    prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0);
    if (setresgid(uid, uid, uid) < 0 || setresuid(uid, uid, uid) < 0)
        say_result(-1);
    else
        say_result((int)syscall(SYS_capset, &header, data));
}

static void act(char *line)
{
    char verb[LINE] = "", first[LINE] = "", second[LINE] = "", third[LINE] = "";

    sscanf(line, "%s %s %s %s", verb, first, second, third);
    if (strcmp(verb, "open") == 0)
        do_open(first[0] ? first : device_path);
    else if (strcmp(verb, "close") == 0)
        say_result(close(device));
    else if (strcmp(verb, "manager") == 0) {
        struct flat_binder_object object = {.hdr.type = BINDER_TYPE_BINDER, .flags = FLAT_BINDER_FLAG_ACCEPTS_FDS};
        say_result(ioctl(device, BINDER_SET_CONTEXT_MGR_EXT, &object));
    } else if (strcmp(verb, "version") == 0) {
        struct binder_version version = {0};
        say_result(ioctl(device, BINDER_VERSION, &version));
    } else if (strcmp(verb, "serve") == 0)
        do_serve(atol(first));
    else if (strcmp(verb, "call") == 0)
        do_call(atol(first));
    else if (strcmp(verb, "tell") == 0)
        do_tell(atol(first));
    else if (strcmp(verb, "tell-unread") == 0)
        do_tell_unread(atol(first));
    else if (strcmp(verb, "open-many") == 0)
        do_open_many(atol(first));
    else if (strcmp(verb, "open-files") == 0)
        do_open_files(atol(first), second, O_RDONLY);
    else if (strcmp(verb, "look-up") == 0)
        do_open_files(atol(first), second, O_PATH);
    else if (strcmp(verb, "threads") == 0)
        do_threads(atol(first));
    else if (strcmp(verb, "receive") == 0)
        do_receive(atol(first));
    else if (strcmp(verb, "free") == 0)
        do_free();
    else if (strcmp(verb, "publish") == 0)
        do_publish(atol(first));
    else if (strcmp(verb, "answer") == 0)
        do_answer((size_t)atol(first));
    else if (strcmp(verb, "hoard") == 0)
        do_hoard(atol(first));
    else if (strcmp(verb, "give") == 0)
        do_give(first);
    else if (strcmp(verb, "take") == 0)
        do_take();
    else if (strcmp(verb, "block") == 0)
        do_block(first, second, atol(third));
    else if (strcmp(verb, "stuck") == 0)
        do_stuck(atol(first), second);
    else if (strcmp(verb, "vanish") == 0)
        do_vanish(atol(first));
    else if (strcmp(verb, "linger") == 0)
        do_linger(atol(first));
    else if (strcmp(verb, "hand") == 0)
        do_hand(atol(first));
    else if (strcmp(verb, "scribble") == 0)
        do_scribble();
    else if (strcmp(verb, "fill-fds") == 0)
        do_fill_fds(atol(first));
    else if (strcmp(verb, "limit-fds") == 0)
        do_limit(atol(first));
    else if (strcmp(verb, "read-nonblocking") == 0)
        do_read_nonblocking();
    else if (strcmp(verb, "receive-sender") == 0)
        do_receive_sender();
    else if (strcmp(verb, "forge") == 0)
        do_forge();
    else if (strcmp(verb, "fsuid") == 0)
        say_result(setfsuid((uid_t)atol(first)));
    else if (strcmp(verb, "peek-region") == 0)
        do_peek_region();
    else if (strcmp(verb, "nice") == 0)
        say_result(setpriority(PRIO_PROCESS, 0, atoi(first)));
    else if (strcmp(verb, "fork") == 0)
        do_fork((pid_t)atol(first));
    else if (strcmp(verb, "watch-apart") == 0)
        do_watch_apart();
    else if (strcmp(verb, "extremes") == 0)
        do_extremes();
    else if (strcmp(verb, "device") == 0)
        say("%d", device);
    else if (strcmp(verb, "tid") == 0)
        say("%d", gettid());
    else if (strcmp(verb, "use") == 0)
        do_use(atoi(first));
    else if (strcmp(verb, "as") == 0)
        do_become((uid_t)atol(first));
    else
        say("%s?", verb);
}

static void *act_aside(void *line)
{
    struct binder_version version;

    ioctl(device, BINDER_VERSION, &version); /* as in do_open() */
    act(line);
    free(line);
    return NULL;
}

int main(int argc, char **argv)
{
    char line[LINE];

    if (argc != 2)
        return 2;
    device_path = argv[1];
    while (fgets(line, sizeof(line), stdin)) {
        line[strcspn(line, "\n")] = '\0';
        if (strcmp(line, "exit") == 0)
            break;
        if (strcmp(line, "serve-fault") == 0)
            do_serve_fault();
        else if (line[0] == '&') {
            pthread_t thread;
            need(pthread_create(&thread, NULL, act_aside, strdup(line + 1)) == 0, "pthread_create");
            pthread_detach(thread);
        } else
            act(line);
    }
    return 0;
}
