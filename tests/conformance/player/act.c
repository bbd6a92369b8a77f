/* SPDX-License-Identifier: Apache-2.0
 *
 * One step, done in the process and thread that it names.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "player.h"

struct self self;
_Thread_local int me;

/* ---- values ---- */

/* Without a name: the one called binder, or else the first device. */
static struct descriptor *descriptor_named(const char *name)
{
    struct descriptor *first = NULL;

    for (int i = 0; i < MAX_DESCRIPTORS; i++) {
        struct descriptor *d = &self.descriptor[i];

        if (d->fd < 0)
            continue;
        if (!strcmp(d->name, name ? name : "binder"))
            return d;
        if (!name && !d->file && !first)
            first = d;
    }
    return first;
}

/* A descriptor that is closed may still be mapped. */
static struct descriptor *mapping_named(const char *name)
{
    struct descriptor *first = NULL;

    for (int i = 0; i < MAX_DESCRIPTORS; i++) {
        struct descriptor *d = &self.descriptor[i];

        if (!d->map)
            continue;
        if (!strcmp(d->name, name ? name : "binder"))
            return d;
        if (!name && !first)
            first = d;
    }
    return first;
}

static const struct label *label_named(const char *name)
{
    if (!strcmp(name, "last"))
        return &play.stage->last[me];
    for (int i = 0; i < play.stage->labels; i++)
        if (!strcmp(play.stage->label[i].name, name))
            return &play.stage->label[i];
    return NULL;
}

/* LABEL.buffer, .ptr, .cookie, .handle, .handle2 ..., .fd, .fd2 ... */
static uint64_t label_part(const struct label *label, const char *part)
{
    int n = 0;

    if (!label)
        return 0;
    if (!strcmp(part, "buffer"))
        return label->buffer;
    if (!strcmp(part, "ptr"))
        return label->ptr;
    if (!strcmp(part, "cookie"))
        return label->cookie;
    if (!strncmp(part, "handle", 6)) {
        n = part[6] ? atoi(part + 6) - 1 : 0;
        return n >= 0 && n < label->handles ? label->handle[n] : 0;
    }
    if (!strncmp(part, "fd", 2)) {
        n = part[2] ? atoi(part + 2) - 1 : 0;
        return n >= 0 && n < label->fds ? label->fd[n] : UINT32_MAX;
    }
    return 0;
}

static uint64_t term(const char *word)
{
    uint64_t value;
    const char *dot;
    const struct word *named;

    if (number(word, &value))
        return value;
    for (int i = 0; i < play.scenario->lets; i++)
        if (!strcmp(play.scenario->let[i].name, word))
            return play.scenario->let[i].value;
    if ((named = word_named(flag_words, word)) || (named = word_named(command_words, word)) ||
        (named = word_named(return_words, word)))
        return named->value;
    if (!strcmp(word, "bad"))
        return (uintptr_t)self.forbidden;
    if (!strncmp(word, "map", 3) && (!word[3] || word[3] == ':')) {
        struct descriptor *d = mapping_named(word[3] ? word + 4 : NULL);

        return d ? (uintptr_t)d->map : 0;
    }
    dot = strchr(word, '.');
    if (dot) {
        char name[NAME_SIZE] = "";

        memcpy(name, word, dot - word < NAME_SIZE ? dot - word : NAME_SIZE - 1);
        if (!strcmp(name, "pid")) {
            int process = scenario_process(play.scenario, dot + 1);

            return process < 0 ? 0 : (uint64_t)play.stage->process[process].pid;
        }
        if (!strcmp(name, "fd")) {
            struct descriptor *d = descriptor_named(dot + 1);

            return d ? (uint64_t)d->fd : UINT32_MAX;
        }
        return label_part(label_named(name), dot + 1);
    }
    if (!strcmp(word, "buffer"))
        return play.stage->last[me].buffer;
    fprintf(stderr, "%s: what is that?\n", word);
    play.stage->actor[me].broken = true;
    return 0;
}

/* TERM, TERM+TERM, TERM-TERM or TERM|TERM|... */
uint64_t evaluate(const char *expression)
{
    char text[256];
    uint64_t value = 0;
    char *word = text, operation = '+';

    snprintf(text, sizeof text, "%s", expression);
    if (number(text, &value))
        return value;
    while (word) {
        /* A name may contain '-', so that only a digit after it makes it a minus. */
        char *end = word, next;
        uint64_t v;

        while (*end && *end != '+' && *end != '|' && !(*end == '-' && end > word && end[1] >= '0' && end[1] <= '9'))
            end++;
        next = *end;
        *end = 0;
        v = term(word);
        value = operation == '+' ? value + v : operation == '-' ? value - v : (value | v);
        operation = next;
        word = next ? end + 1 : NULL;
    }
    return value;
}

const char *process_name(pid_t pid)
{
    if (!pid)
        return "0";
    for (int i = 0; i < play.scenario->processes; i++)
        if (play.stage->process[i].pid == pid)
            return play.scenario->process[i];
    return "?";
}

static uint64_t option(const struct line *line, const char *key, uint64_t otherwise)
{
    const char *value = line_option(line, key);

    return value ? evaluate(value) : otherwise;
}

/* The step's n-th word after ACTOR VERB. */
static const char *word(const struct line *line, int n)
{
    return line_word(line, 2, n);
}

static uint64_t operand(const struct line *line, int n)
{
    const char *w = word(line, n);

    return w ? evaluate(w) : 0;
}

static void outcome(long result)
{
    say("    %s\n", result < 0 ? error_name(errno) : "0");
}

/* ---- descriptors ---- */

static struct descriptor *new_descriptor(const char *name, int fd)
{
    for (int i = 0; i < MAX_DESCRIPTORS; i++) {
        struct descriptor *d = &self.descriptor[i];

        if (d->fd >= 0 || d->map)
            continue;
        memset(d, 0, sizeof *d);
        snprintf(d->name, sizeof d->name, "%s", name);
        d->fd = fd;
        return d;
    }
    play.stage->actor[me].broken = true;
    return NULL;
}

static _Atomic int *holds(const struct descriptor *d)
{
    return &play.stage->process[self.process].holds[d - self.descriptor];
}

static long open_device(const struct line *line, const char *device)
{
    char path[512];
    const char *name = line_option(line, "as");
    int fd;
    struct descriptor *d;

    snprintf(path, sizeof path, "%s/%s", play.root, device);
    fd = open(path, O_RDWR | O_CLOEXEC | (line_option(line, "nonblock") ? O_NONBLOCK : 0));
    if (fd < 0)
        return -1;
    d = new_descriptor(name ? name : device, fd);
    if (d)
        *holds(d) = ++play.stage->opens;
    return 0;
}

static long map_device(struct descriptor *d, const struct line *line, uint64_t size)
{
    const char *protection = line_option(line, "prot");
    int flags = MAP_NORESERVE | (line_option(line, "shared") ? MAP_SHARED : MAP_PRIVATE);
    int bits = PROT_READ;
    void *at;

    if (protection)
        bits = !strcmp(protection, "none") ? PROT_NONE : !strcmp(protection, "rw") ? PROT_READ | PROT_WRITE : PROT_READ;
    at = mmap(NULL, size, bits, flags, d->fd, option(line, "offset", 0));
    if (at == MAP_FAILED)
        return -1;
    /* A second success must not hide the first mapping. */
    if (!d->map) {
        d->map = at;
        d->map_size = size;
    }
    return 0;
}

static void do_close(const struct line *line)
{
    struct descriptor *d = descriptor_named(word(line, 0));

    if (!d) {
        say("    no descriptor\n");
        return;
    }
    outcome(close(d->fd));
    d->fd = -1;
    *holds(d) = 0;
}

static void do_dup(const struct line *line)
{
    struct descriptor *from = descriptor_named(line_option(line, "on"));
    struct descriptor *to = new_descriptor(word(line, 0), fcntl(from->fd, F_DUPFD_CLOEXEC, 0));

    *holds(to) = *holds(from);
    outcome(to->fd);
}

static void do_munmap(const struct line *line)
{
    struct descriptor *d = mapping_named(line_option(line, "on"));
    uint64_t start = word(line, 1) ? operand(line, 0) : 0;
    uint64_t size = word(line, 1) ? operand(line, 1) : d ? d->map_size : 0;

    if (!d) {
        say("    no mapping\n");
        return;
    }
    outcome(munmap(d->map + start, size));
    if (size == d->map_size)
        d->map = NULL;
}

static void do_memfd(const struct line *line)
{
    struct bytes content = { NULL, 0, 0 };
    const char *text = word(line, 1);
    char *words[] = { (char *)text };
    struct line item = { .words = 1, .word = words };
    int fd = memfd_create("conformance", MFD_CLOEXEC);
    struct descriptor *d = new_descriptor(word(line, 0), fd);

    compose_items(&content, &item);
    if (d)
        d->file = true;
    outcome(write(fd, content.data, content.size));
    free(content.data);
}

static void do_content(const struct line *line)
{
    char text[256];
    ssize_t got = pread(operand(line, 0), text, sizeof text, 0);

    if (got < 0)
        outcome(-1);
    else
        say("    %s\n", quoted(text, got));
}

static void do_isopen(const struct line *line)
{
    int flags = fcntl(operand(line, 0), F_GETFD);

    say("    %s\n", flags < 0 ? "closed" : flags & FD_CLOEXEC ? "open, close-on-exec" : "open");
}

/* Leaves room for so many descriptors more. */
static void do_nofile(const struct line *line)
{
    struct rlimit limit;
    int lowest;

    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    lowest = dup(0);
    close(lowest);
    limit.rlim_cur = lowest + operand(line, 0);
    outcome(setrlimit(RLIMIT_NOFILE, &limit));
}

static void do_nonblock(const struct line *line)
{
    struct descriptor *d = descriptor_named(line_option(line, "on"));
    int flags = fcntl(d->fd, F_GETFL);

    outcome(fcntl(d->fd, F_SETFL, strcmp(word(line, 0), "on") ? flags & ~O_NONBLOCK : flags | O_NONBLOCK));
}

static void do_peek(const struct line *line)
{
    char text[256];
    uint64_t size = operand(line, 1);
    struct iovec here = { text, size < sizeof text ? size : sizeof text };
    struct iovec there = { (void *)(uintptr_t)operand(line, 0), here.iov_len };
    ssize_t got = process_vm_readv(getpid(), &here, 1, &there, 1, 0);

    if (got < 0)
        outcome(-1);
    else
        say("    %s\n", quoted(text, got));
}

/* ---- ioctls ---- */

static void write_read(const struct line *line, const char *device, struct line *commands, uint64_t read_size, bool writes,
                       bool reads)
{
    struct descriptor *d = descriptor_named(device);
    struct bytes out = { NULL, 0, 0 };
    struct binder_write_read b;
    uint64_t room = read_size < 1 << 20 ? read_size : 1 << 20, read_start, write_size;
    uint8_t *blank = malloc(room + 8);
    int result, error;
    uint32_t first;

    memset(&b, 0, sizeof b);
    memset(blank, 0xee, room + 8);
    if (writes) {
        compose_commands(&out, commands);
        b.write_size = option(line, "size", out.size);
        b.write_consumed = option(line, "wrote", 0);
        b.write_buffer = option(line, "address", (uintptr_t)place(out.data, out.size, option(line, "reach", -1)));
    }
    if (reads) {
        b.read_size = read_size;
        b.read_consumed = option(line, "read", 0);
        b.read_buffer = option(line, "into", (uintptr_t)place(blank, room, option(line, "room", -1)));
    }
    write_size = b.write_size;
    read_start = b.read_consumed;
    result = ioctl(d ? d->fd : -1, BINDER_WRITE_READ, &b);
    error = errno;
    say("    %s", result < 0 ? error_name(error) : "0");
    if (writes && b.write_consumed == write_size)
        say(" wrote %llu", (unsigned long long)b.write_consumed);
    else if (writes)
        say(" wrote %llu of %llu", (unsigned long long)b.write_consumed, (unsigned long long)write_size);
    if (reads)
        say(" read %llu", (unsigned long long)b.read_consumed);
    say("\n");
    if (reads && !line_option(line, "into") && b.read_consumed <= room) {
        if (read_start >= 4 && b.read_consumed >= 4) {
            memcpy(&first, (void *)(uintptr_t)b.read_buffer, 4);
            if (first != 0xeeeeeeee)
                report_returns((uint8_t *)(uintptr_t)b.read_buffer, 4, NULL);
        }
        if (b.read_consumed > read_start)
            report_returns((uint8_t *)(uintptr_t)b.read_buffer + read_start, b.read_consumed - read_start,
                           line_option(line, "as"));
    }
    free(blank);
    free(out.data);
    release_placed();
}

static void say_ioctl_result(uint32_t code, const void *argument)
{
    switch (code) {
    case BINDER_VERSION:
        say(" protocol_version=%d", ((const struct binder_version *)argument)->protocol_version);
        break;
    case BINDER_GET_NODE_DEBUG_INFO: {
        const struct binder_node_debug_info *info = argument;

        say(" ptr=0x%llx cookie=0x%llx has_strong_ref=%u has_weak_ref=%u", (unsigned long long)info->ptr,
            (unsigned long long)info->cookie, info->has_strong_ref, info->has_weak_ref);
        break;
    }
    case BINDER_GET_NODE_INFO_FOR_REF: {
        const struct binder_node_info_for_ref *info = argument;

        say(" handle=%u strong_count=%u weak_count=%u", info->handle, info->strong_count, info->weak_count);
        break;
    }
    case BINDER_GET_FROZEN_INFO: {
        const struct binder_frozen_status_info *info = argument;

        say(" pid=%s sync_recv=%u async_recv=%u", process_name(info->pid), info->sync_recv, info->async_recv);
        break;
    }
    case BINDER_GET_EXTENDED_ERROR: {
        const struct binder_extended_error *error = argument;
        const struct word *name = word_valued(return_words, error->command);

        say(" id=%d command=%s param=%s", error->id ? (int)error->id - play.debug_id_base : 0,
            name ? name->name : "?", error->param < 0 ? strerrorname_np(-error->param) : "0");
        break;
    }
    }
}

static void do_ioctl(const struct line *line)
{
    struct descriptor *d = descriptor_named(line_option(line, "on"));
    const char *name = word(line, 0);
    const struct word *known = word_named(ioctl_words, name);
    uint32_t code = known ? known->value : (uint32_t)evaluate(name);
    struct bytes argument = { NULL, 0, 0 };
    size_t size = _IOC_SIZE(code);
    int result, error, n = 1;
    uint8_t *at;

    for (const char *s = known ? known->shape : ""; *s; s++, n++) {
        uint64_t v = operand(line, n);

        append(&argument, &v, *s - '0');
    }
    compose_items(&argument, line->child);
    if (argument.size < size)
        append(&argument, NULL, size - argument.size);
    if (line_option(line, "argument")) {
        at = (uint8_t *)(uintptr_t)option(line, "argument", 0);
    } else {
        at = place(argument.data, argument.size, option(line, "reach", -1));
    }
    result = ioctl(d ? d->fd : -1, code, at);
    error = errno;
    say("    %s", result < 0 ? error_name(error) : "0");
    if (!result && !line_option(line, "argument"))
        say_ioctl_result(code, at);
    say("\n");
    free(argument.data);
    release_placed();
}

/* ---- poll ---- */

static void do_poll(const struct line *line)
{
    struct pollfd p = { .fd = descriptor_named(line_option(line, "on"))->fd, .events = POLLIN | POLLOUT | POLLPRI };
    const char *how = word(line, 0);
    int n = poll(&p, 1, !how ? 0 : !strcmp(how, "forever") ? -1 : (int)operand(line, 0));

    if (n < 0)
        outcome(-1);
    else if (!n)
        say("    nothing\n");
    else
        say("    %s%s%s%s%s\n", p.revents & POLLIN ? "POLLIN" : "", p.revents & POLLOUT ? "POLLOUT" : "",
            p.revents & POLLERR ? "POLLERR" : "", p.revents & POLLHUP ? "POLLHUP" : "", p.revents & POLLNVAL ? "POLLNVAL" : "");
}

/* epoll add | epoll wait [forever]: one epoll set for each process */
static void do_epoll(const struct line *line)
{
    static int set = -1;
    struct epoll_event event = { .events = EPOLLIN };
    const char *how = word(line, 1);
    int n;

    if (set < 0)
        set = epoll_create1(EPOLL_CLOEXEC);
    if (!strcmp(word(line, 0), "add")) {
        if (line_option(line, "edge"))
            event.events |= EPOLLET;
        outcome(epoll_ctl(set, EPOLL_CTL_ADD, descriptor_named(line_option(line, "on"))->fd, &event));
        return;
    }
    n = epoll_wait(set, &event, 1, how ? -1 : 0);
    if (n < 0)
        outcome(-1);
    else
        say("    %s\n", n ? "EPOLLIN" : "nothing");
}

/* ---- the process itself ---- */

static void do_fork(const struct line *line)
{
    int child = scenario_process(play.scenario, word(line, 0)), actor = scenario_actor(play.scenario, word(line, 0));
    /* A sibling, so that the coordinator can wait for it. */
    pid_t pid = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);

    if (pid) {
        for (int i = 0; i < MAX_DESCRIPTORS; i++)
            play.stage->process[child].holds[i] = (int)play.stage->process[self.process].holds[i];
        play.stage->process[child].pid = pid;
        play.stage->process[child].present = pid > 0;
        outcome(pid);
        return;
    }
    self.process = child;
    for (int i = 0; i < MAX_DESCRIPTORS; i++)
        self.descriptor[i].map = NULL; /* a mapping of the device is not inherited */
    act_threads(child, actor);
}

static void do_seteuid(const struct line *line)
{
    outcome(syscall(SYS_setresuid, -1, operand(line, 0), -1)); /* this thread only: glibc's own would tell the others */
}

static void join(const struct line *line, bool serve)
{
    const char *device = word(line, 0) ? word(line, 0) : "binder";
    uint32_t enter = BC_ENTER_LOOPER;
    struct binder_write_read b = { .write_size = 4, .write_buffer = (uintptr_t)&enter };
    struct descriptor *d;
    int zero = 0;

    if (open_device(line, device)) {
        outcome(-1);
        return;
    }
    d = descriptor_named(line_option(line, "as") ? line_option(line, "as") : device);
    if (map_device(d, line, option(line, "map", 1 << 20)) || (serve && ioctl(d->fd, BINDER_SET_CONTEXT_MGR, &zero)) ||
        (serve && ioctl(d->fd, BINDER_WRITE_READ, &b)))
        outcome(-1);
    else
        outcome(0);
}

void act(int number)
{
    struct line *line = play.scenario->step[number].line;
    const char *verb = line->word[1], *on = line_option(line, "on");
    struct descriptor *d = descriptor_named(on);

    if (!strcmp(verb, "open")) {
        outcome(open_device(line, word(line, 0) ? word(line, 0) : "binder"));
    } else if (!strcmp(verb, "join")) {
        join(line, false);
    } else if (!strcmp(verb, "serve")) {
        join(line, true);
    } else if (!strcmp(verb, "memfd")) {
        do_memfd(line);
    } else if (!strcmp(verb, "fork")) {
        do_fork(line);
    } else if (!strcmp(verb, "exit")) {
        _exit(0);
    } else if (!strcmp(verb, "content")) {
        do_content(line);
    } else if (!strcmp(verb, "isopen")) {
        do_isopen(line);
    } else if (!strcmp(verb, "closefd")) {
        outcome(close(operand(line, 0)));
    } else if (!strcmp(verb, "nofile")) {
        do_nofile(line);
    } else if (!strcmp(verb, "peek")) {
        do_peek(line);
    } else if (!strcmp(verb, "seteuid")) {
        do_seteuid(line);
    } else if (!strcmp(verb, "setnice")) {
        outcome(setpriority(PRIO_PROCESS, 0, operand(line, 0)));
    } else if (!strcmp(verb, "nice")) {
        say("    %d\n", getpriority(PRIO_PROCESS, 0));
    } else if (!strcmp(verb, "munmap")) {
        do_munmap(line);
    } else if (!d) {
        say("    no descriptor\n");
    } else if (!strcmp(verb, "mmap")) {
        outcome(map_device(d, line, operand(line, 0)));
    } else if (!strcmp(verb, "mprotect")) {
        outcome(mprotect(d->map, 4096, PROT_READ | PROT_WRITE));
    } else if (!strcmp(verb, "close")) {
        do_close(line);
    } else if (!strcmp(verb, "dup")) {
        do_dup(line);
    } else if (!strcmp(verb, "nonblock")) {
        do_nonblock(line);
    } else if (!strcmp(verb, "write")) {
        /* A single command may stand on the step's own line, and its payload below. */
        int skip = 2;
        struct line command;

        while (skip < line->words && strchr(line->word[skip], '='))
            skip++;
        command = (struct line){ .words = line->words - skip, .word = line->word + skip, .child = line->child };
        write_read(line, on, command.words ? &command : line->child, 0, true, false);
    } else if (!strcmp(verb, "read")) {
        write_read(line, on, NULL, word(line, 0) ? operand(line, 0) : 256, false, true);
    } else if (!strcmp(verb, "exchange")) {
        write_read(line, on, line->child, word(line, 0) ? operand(line, 0) : 256, true, true);
    } else if (!strcmp(verb, "ioctl")) {
        do_ioctl(line);
    } else if (!strcmp(verb, "poll")) {
        do_poll(line);
    } else if (!strcmp(verb, "epoll")) {
        do_epoll(line);
    } else {
        fprintf(stderr, "%s: do what?\n", verb);
        play.stage->actor[me].broken = true;
    }
}

/* ---- threads ---- */

static void interrupted(int signal)
{
    (void)signal;
}

static void wait_for_steps(void)
{
    struct mailbox *box = &play.stage->actor[me];

    box->tid = syscall(SYS_gettid);
    syscall(SYS_futex, &box->tid, FUTEX_WAKE, 1, NULL, NULL, 0);
    for (;;) {
        uint32_t asked = box->asked;

        if (asked == box->answered) {
            syscall(SYS_futex, &box->asked, FUTEX_WAIT, asked, NULL, NULL, 0);
            continue;
        }
        act(box->step);
        box->answered = asked;
        syscall(SYS_futex, &box->answered, FUTEX_WAKE, 1, NULL, NULL, 0);
    }
}

static void *thread(void *actor)
{
    me = (intptr_t)actor;
    wait_for_steps();
    return NULL;
}

/* Makes this process's threads, in the scenario's order, and becomes the first of them. Never returns. */
void act_threads(int process, int first_actor)
{
    struct sigaction action = { .sa_handler = interrupted };

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    sigaction(SIGUSR1, &action, NULL);
    self.process = process;
    if (!self.forbidden)
        self.forbidden = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    me = first_actor;
    for (int i = 0; i < play.scenario->actors; i++) {
        pthread_t handle;
        struct mailbox *box = &play.stage->actor[i];

        if (play.scenario->actor[i].process != process || i == first_actor)
            continue;
        if (pthread_create(&handle, NULL, thread, (void *)(intptr_t)i))
            _exit(97);
        /* Numbers in order of creation: the driver lists threads by number. */
        while (!box->tid)
            syscall(SYS_futex, &box->tid, FUTEX_WAIT, 0, NULL, NULL, 0);
    }
    wait_for_steps();
}
