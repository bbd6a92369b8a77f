/* client.c - a binder client that does one odd thing and says what came of it.
 *
 *     client DEVICE ACTION [ARGUMENT...]
 *
 * It prints a line for each step, results as "0" or the name of the error. Before it goes where it may not return from, it
 * prints "going".
 *
 *   version COUNT          BINDER_VERSION that often; the last answer
 *   version-as UID COUNT   the same as another user, without end if COUNT is 0; prints "going" first
 *   strangers COUNT        BINDER_VERSION by that many threads, one after the other, of which each then leaves the driver; waits
 *                          for a line on stdin before it ends
 *   unknown SIZE           an ioctl that no driver has, with an argument of SIZE bytes
 *   plain                  read(2), write(2), ftruncate(2) and fallocate(2) of the device
 *   wait                   enter the looper and read
 *   wait-nonblocking       the same, with O_NONBLOCK from open on
 *   wait-fcntl             the same three times with O_NONBLOCK set by fcntl, then, with it cleared, once more
 *   wait-fcntl-late        wait many times until a signal comes, then with O_NONBLOCK set by fcntl
 *   signalled              wait, and be sent a signal after 50 ms
 *   manage                 be context manager, and do nothing
 *   freeze PID             call the context manager without waiting, and freeze that process twice, for 300 ms each, with a
 *                          signal after 50 ms: its action ends what is under way, the second time it lets that go on
 *   poll                   be context manager, poll, and read what comes
 *   send COUNT             one-way calls of 4 bytes to the context manager
 *   serve COUNT            be context manager and answer calls; prints the data of each, or how much of it is right
 *   call SIZE              call the context manager with that many bytes 'a', 'b', ... ; prints the reply as text
 *   pass                   call the context manager with a descriptor; prints the reply as text
 *   stuck COMMANDS|DATA|READ THREADS
 *                          ioctls of that many threads, with that part in memory whose faults nobody serves
 *   stuck-shared ...       likewise, with the faults to be served by a child that never does
 *   long-commands          more commands than a page, without a read
 *   own-page               the command stream in a page of the device itself
 *   blind                  a read into memory that is not there
 *   region                 map, print "going", and print the first byte of each of 8 pages for each line on stdin
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include <linux/android/binder.h>

#define PAGE 4096
#define REGION (1024 * 1024)

static int device;

static const char *name(int result)
{
    return result < 0 ? strerrorname_np(errno) : "0";
}

static void say(const char *step, int result)
{
    printf("%s %s\n", step, name(result));
    fflush(stdout);
}

static void going(void)
{
    puts("going");
    fflush(stdout);
}

static int write_read(const void *commands, size_t write_size, void *buffer, size_t read_size, size_t *consumed)
{
    struct binder_write_read request = {
        .write_size = write_size,
        .write_buffer = (uintptr_t)commands,
        .read_size = read_size,
        .read_buffer = (uintptr_t)buffer,
    };
    int result = ioctl(device, BINDER_WRITE_READ, &request);
    if (consumed)
        *consumed = request.read_consumed;
    return result;
}

static int enter_and_read(void *buffer, size_t size)
{
    uint32_t command = BC_ENTER_LOOPER;
    return write_read(&command, sizeof(command), buffer, size, NULL);
}

static void wait_once(const char *step)
{
    uint8_t buffer[256];
    say(step, enter_and_read(buffer, sizeof(buffer)));
}

static void on_alarm(int number)
{
    (void)number;
}

static void alarm_in_50_ms(void)
{
    struct itimerval timer = {.it_value = {.tv_usec = 50000}};
    struct sigaction action = {.sa_handler = on_alarm};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
}

static void become_manager(void)
{
    struct flat_binder_object object = {.hdr.type = BINDER_TYPE_BINDER, .flags = FLAT_BINDER_FLAG_ACCEPTS_FDS};
    say("manager", ioctl(device, BINDER_SET_CONTEXT_MGR_EXT, &object));
}

struct command {
    uint32_t code;
    struct binder_transaction_data data;
} __attribute__((packed));

static struct command transaction(uint32_t code, uint32_t flags, const void *data, size_t size)
{
    struct command command = {code, {.flags = flags, .data_size = size}};
    command.data.data.ptr.buffer = (uintptr_t)data;
    return command;
}

/* Wait for a transaction or reply; other returns are passed over. */
static struct binder_transaction_data await(const void *commands, size_t size)
{
    for (;;) {
        uint8_t buffer[256];
        size_t consumed;
        if (write_read(commands, size, buffer, sizeof(buffer), &consumed) < 0) {
            say("await", -1);
            exit(1);
        }
        size = 0;
        for (size_t at = 0; at < consumed;) {
            uint32_t code;
            memcpy(&code, buffer + at, 4);
            at += 4;
            if (code == BR_TRANSACTION || code == BR_REPLY) {
                struct binder_transaction_data data;
                memcpy(&data, buffer + at, sizeof(data));
                return data;
            }
            if (code == BR_DEAD_REPLY || code == BR_FAILED_REPLY) {
                puts(code == BR_DEAD_REPLY ? "BR_DEAD_REPLY" : "BR_FAILED_REPLY");
                exit(1);
            }
            at += _IOC_SIZE(code);
        }
    }
}

static void print_data(const struct binder_transaction_data *data)
{
    const char *text = (const char *)(uintptr_t)data->data.ptr.buffer;
    size_t good = 0;

    if (data->data_size <= 32) {
        printf("%.*s\n", (int)data->data_size, text);
    } else {
        while (good < data->data_size && text[good] == (char)('a' + good % 26))
            good++;
        printf("%zu of %zu letters\n", good, (size_t)data->data_size);
    }
    fflush(stdout);
}

static void serve(int count)
{
    uint32_t enter = BC_ENTER_LOOPER;
    struct binder_transaction_data data = await(&enter, sizeof(enter));

    while (count--) {
        struct {
            uint32_t free;
            binder_uintptr_t buffer;
            struct command reply;
        } __attribute__((packed)) answer = {BC_FREE_BUFFER, data.data.ptr.buffer, transaction(BC_REPLY, 0, "done", 4)};

        print_data(&data);
        if (data.flags & TF_ONE_WAY)
            write_read(&answer, sizeof(answer) - sizeof(answer.reply), NULL, 0, NULL);
        else
            write_read(&answer, sizeof(answer), NULL, 0, NULL);
        if (count)
            data = await(NULL, 0);
    }
}

/* ---- memory whose faults nobody serves ---- */

static int register_page(void *page)
{
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {{(uintptr_t)page, PAGE}, UFFDIO_REGISTER_MODE_MISSING, 0};
    int fd = (int)syscall(SYS_userfaultfd, 0);
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range)) {
        say("userfaultfd", -1);
        exit(77);
    }
    return fd;
}

static const char *part;

static void *go_in(void *page)
{
    uint8_t buffer[256];
    int result;

    if (!strcmp(part, "COMMANDS")) {
        result = write_read(page, 8, NULL, 0, NULL);
    } else if (!strcmp(part, "DATA")) {
        struct command command = transaction(BC_TRANSACTION, TF_ONE_WAY, page, 64);
        result = write_read(&command, sizeof(command), buffer, sizeof(buffer), NULL);
    } else {
        result = enter_and_read(page, 256);
    }
    say("stuck", result);
    return NULL;
}

static void stuck(int threads, int shared)
{
    pthread_t thread;
    int fd = -1;

    for (int i = 0; i < threads; i++) {
        void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        fd = register_page(page);
        if (shared && fork() == 0) {
            close(device);
            pause();
        }
        if (shared)
            close(fd);
        if (i == threads - 1)
            going();
        pthread_create(&thread, NULL, go_in, page);
    }
    pthread_join(thread, NULL);
}

static void *come_and_go(void *unused)
{
    struct binder_version version = {0};
    int32_t zero = 0;

    (void)unused;
    return (void *)(intptr_t)(ioctl(device, BINDER_VERSION, &version) || ioctl(device, BINDER_THREAD_EXIT, &zero));
}

int main(int argc, char **argv)
{
    const char *action = argv[2];
    long number = argc > 3 ? atol(argv[3]) : 0;
    uint8_t buffer[256];

    alarm(60);
    device = open(argv[1], O_RDWR | O_CLOEXEC | (strcmp(action, "wait-nonblocking") ? 0 : O_NONBLOCK));
    if (device < 0) {
        say("open", -1);
        return 1;
    }
    uint8_t *region = mmap(NULL, REGION, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, device, 0);
    if (region == MAP_FAILED) {
        say("mmap", -1);
        return 1;
    }

    if (!strcmp(action, "version")) {
        struct binder_version version = {0};
        int result = 0;
        while (number-- && !result)
            result = ioctl(device, BINDER_VERSION, &version);
        say("version", result);
        printf("%d\n", version.protocol_version);
    } else if (!strcmp(action, "version-as")) {
        struct binder_version version = {0};
        long count = argc > 4 ? atol(argv[4]) : 0;
        int result = setresuid(number, number, number);
        /* Else the server, of another user, could not say who this is. */
        prctl(PR_SET_DUMPABLE, 1);
        going();
        for (long done = 0; !result && (!count || done < count); done++)
            result = ioctl(device, BINDER_VERSION, &version);
        say("version", result);
    } else if (!strcmp(action, "strangers")) {
        void *result = NULL;
        pthread_t thread;
        while (number-- && !result)
            if (pthread_create(&thread, NULL, come_and_go, NULL) || pthread_join(thread, &result))
                result = &result;
        say("strangers", result ? -1 : 0);
        fflush(stdout);
        fgets((char *)buffer, sizeof(buffer), stdin);
    } else if (!strcmp(action, "unknown")) {
        say("unknown", ioctl(device, _IOC(_IOC_READ | _IOC_WRITE, 'b', 99, number), calloc(1, number)));
    } else if (!strcmp(action, "plain")) {
        say("read", (int)read(device, buffer, 8));
        say("write", (int)write(device, buffer, 8));
        say("ftruncate", ftruncate(device, 100));
        say("fallocate", fallocate(device, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE));
    } else if (!strcmp(action, "wait")) {
        wait_once("first"); /* a looper's first read returns at once */
        going();
        wait_once("second");
    } else if (!strcmp(action, "wait-nonblocking")) {
        wait_once("first");
        wait_once("second");
    } else if (!strcmp(action, "wait-fcntl")) {
        fcntl(device, F_SETFL, O_NONBLOCK);
        wait_once("first");
        wait_once("second");
        wait_once("third");
        wait_once("fourth");
        fcntl(device, F_SETFL, 0);
        alarm_in_50_ms();
        wait_once("fifth");
    } else if (!strcmp(action, "wait-fcntl-late")) {
        wait_once("first");
        for (int i = 0; i < 6; i++) {
            alarm_in_50_ms();
            wait_once("again");
        }
        fcntl(device, F_SETFL, O_NONBLOCK);
        wait_once("late");
    } else if (!strcmp(action, "signalled")) {
        wait_once("first");
        alarm_in_50_ms();
        wait_once("second");
    } else if (!strcmp(action, "manage")) {
        become_manager();
        going();
        pause();
    } else if (!strcmp(action, "freeze")) {
        struct binder_freeze_info info = {.pid = (uint32_t)number, .enable = 1, .timeout_ms = 300};
        struct command command = transaction(BC_TRANSACTION, 0, "data", 4);
        say("call", write_read(&command, sizeof(command), NULL, 0, NULL));
        alarm_in_50_ms();
        say("ended", ioctl(device, BINDER_FREEZE, &info));
        struct sigaction action_to_go_on = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
        alarm_in_50_ms();
        sigaction(SIGALRM, &action_to_go_on, NULL);
        say("gone on", ioctl(device, BINDER_FREEZE, &info));
    } else if (!strcmp(action, "poll")) {
        struct pollfd waiting = {device, POLLIN, 0};
        uint32_t enter = BC_ENTER_LOOPER;
        become_manager();
        write_read(&enter, sizeof(enter), NULL, 0, NULL);
        going();
        while (number--) {
            say("poll", poll(&waiting, 1, 10000) == 1 && waiting.revents == POLLIN ? 0 : -1);
            struct binder_transaction_data data = await(NULL, 0);
            struct {
                uint32_t free;
                binder_uintptr_t buffer;
            } __attribute__((packed)) done = {BC_FREE_BUFFER, data.data.ptr.buffer};
            print_data(&data);
            write_read(&done, sizeof(done), NULL, 0, NULL);
        }
        say("idle", poll(&waiting, 1, 0) == 0 ? 0 : -1);
    } else if (!strcmp(action, "send")) {
        while (number--) {
            struct command command = transaction(BC_TRANSACTION, TF_ONE_WAY, "data", 4);
            say("send", write_read(&command, sizeof(command), buffer, sizeof(buffer), NULL));
        }
    } else if (!strcmp(action, "serve")) {
        become_manager();
        going();
        serve((int)number);
    } else if (!strcmp(action, "call")) {
        char *data = malloc(number);
        for (long i = 0; i < number; i++)
            data[i] = 'a' + i % 26;
        struct command command = transaction(BC_TRANSACTION, 0, data, number);
        struct binder_transaction_data reply = await(&command, sizeof(command));
        print_data(&reply);
    } else if (!strcmp(action, "pass")) {
        struct binder_fd_object object = {.hdr.type = BINDER_TYPE_FD, .fd = STDIN_FILENO};
        binder_size_t offset = 0;
        struct command command = transaction(BC_TRANSACTION, 0, &object, sizeof(object));
        command.data.offsets_size = sizeof(offset);
        command.data.data.ptr.offsets = (uintptr_t)&offset;
        struct binder_transaction_data reply = await(&command, sizeof(command));
        print_data(&reply);
    } else if (!strcmp(action, "stuck") || !strcmp(action, "stuck-shared")) {
        part = argv[3];
        stuck(atoi(argv[4]), strcmp(action, "stuck"));
    } else if (!strcmp(action, "long-commands")) {
        uint32_t commands[2 * PAGE / 4];
        for (size_t i = 0; i < sizeof(commands) / 4; i++)
            commands[i] = BC_EXIT_LOOPER;
        say("long-commands", write_read(commands, sizeof(commands), NULL, 0, NULL));
    } else if (!strcmp(action, "own-page")) {
        say("own-page", write_read(region, 8, NULL, 0, NULL));
    } else if (!strcmp(action, "blind")) {
        wait_once("first");
        say("blind", enter_and_read((void *)16, 256));
    } else if (!strcmp(action, "region")) {
        going();
        while (fgets((char *)buffer, sizeof(buffer), stdin)) {
            for (int i = 0; i < 8; i++)
                printf("%02x", region[i * PAGE]);
            putchar('\n');
            fflush(stdout);
        }
    } else {
        return 2;
    }
    return 0;
}
