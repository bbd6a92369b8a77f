/* SPDX-License-Identifier: Apache-2.0
 *
 * Keeps open files of clients on their way, and closes them, in a process of its own.
 *
 * To close a file may take for ever: it can be a request to a FUSE server that a client has written (FLUSH, for every
 * descriptor that is closed, and not even SIGKILL ends the wait). A server with such a descriptor could not even die:
 * the kernel closes a process's descriptors one by one, and lets go of /dev/fuse, which is what tells the clients, only
 * after the last. So no client's file is ever in the descriptor table of the server, nor in a socket of it. What takes
 * files from clients (pidfd_getfd), holds them, sends them to their receivers (SCM_RIGHTS) and closes them is the
 * keeper, which is forked before there is a second thread, and has none of the server's descriptors. To the server a
 * file is a number.
 *
 * The server has one socket to it, `control`, and as many *channels* as it has threads that call at a time, each a
 * socket pair whose other end was sent over `control`. Each channel has a thread here, so a call is one message to and
 * one fro, and one that is held up holds up only its caller. Control carries what has no answer: channels, and files to
 * close. Whatever is to be closed goes to the *closers*: threads started as needed, up to a limit, and a smaller one for
 * each user whose files they are; what is beyond waits in a queue of that user. Who has many that wait, and none that
 * gets closed, gets EMFILE for further ones, so descriptors cannot pile up; nor can one user hold more than half of all.
 *
 * Invariants:
 * - A client's file is closed by a closer only. All else here waits for nothing that a client can delay, but for
 *   pidfd_getfd of a process that is about to execute another program.
 * - `records[fd].user` is set exactly while descriptor fd is a client's file; `waits` while it is in its user's queue.
 *   A record is cleared before its descriptor is closed, for the number may be another file's a moment later.
 * - `lock` guards records, users and counts, and is not held across a system call but the start of a thread.
 * - The keeper outlives its server for as long as it takes to close what it has, which may be for ever: it then holds
 *   those files, and nothing else.
 */
#define _GNU_SOURCE

#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum operation { TAKE, SEND };

struct request {
    int32_t operation;
    int32_t tid;
    int32_t fd;
    uint32_t user;
    int32_t socket; /* of SEND, as are the rest */
    int32_t more;
    int32_t count;
    int32_t files[KEEPER_BATCH];
};

#define CLOSED_AT_ONCE 256 /* files of one control message */
#define STACK (64 << 10)
#define SPARE_CLOSERS 2 /* that stay when there is nothing to close */
#define CONTROL 3       /* the keeper's end */
#define FIRST_FILE 4

/* ---- both sides ---- */

static ssize_t send_message(int socket, const void *data, size_t size)
{
    ssize_t sent;

    do
        sent = send(socket, data, size, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent;
}

static ssize_t receive_message(int socket, void *data, size_t size)
{
    ssize_t received;

    do
        received = recv(socket, data, size, 0);
    while (received < 0 && errno == EINTR);
    return received;
}

/* Sends `count` descriptors along with one byte, or with nothing. */
static int send_descriptors(int socket, const int *fds, int count, size_t byte, int flags)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(KEEPER_BATCH * sizeof(int))];
    } control = {.header = {CMSG_LEN(count * sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    struct iovec data = {&(char){0}, byte};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = control.header.cmsg_len};
    ssize_t sent;

    memcpy(CMSG_DATA(&control.header), fds, count * sizeof(int));
    do
        sent = sendmsg(socket, &message, flags | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : 0;
}

/* ---- the keeper: what it holds ---- */

struct user {
    struct user *next;
    uint32_t id;
    int files;    /* held, whether they wait to be closed or not */
    int unclosed; /* of these, those that wait or are being closed */
    int closing;  /* closers at it */
    int first, last; /* of the queue; -1: none */
    time_t closed;   /* when the last of them was, or the first was to be */
};

struct record {
    struct user *user;
    int next; /* in the queue */
    int waits;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER, all_closed = PTHREAD_COND_INITIALIZER;
static struct record *records;
static int records_count;
static struct user *users; /* that have files; the first is next to have one closed */
static int unclosed;
static int closers, idle_closers, wakes; /* a closer that has been woken is not idle any more */

static time_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
    return time.tv_sec;
}

/* Tells whether a user has too many files that cannot be closed, or just too many; the lock is held. */
static int has_too_many(const struct user *user)
{
    return (user->unclosed >= KEEPER_USER_UNCLOSED && now() - user->closed > 1) || user->files >= records_count / 2;
}

/* Gives room for one more file of a user; NULL if there is none. */
static struct user *admit(uint32_t id)
{
    struct user *user;

    pthread_mutex_lock(&lock);
    for (user = users; user != NULL && user->id != id; user = user->next)
        ;
    if (user == NULL) {
        user = calloc(1, sizeof *user);
        if (user != NULL) {
            *user = (struct user){.next = users, .id = id, .first = -1, .last = -1};
            users = user;
        }
    } else if (has_too_many(user)) {
        user = NULL;
    }
    if (user != NULL)
        user->files++;
    pthread_mutex_unlock(&lock);
    return user;
}

/* Takes room back; the lock is held. */
static void dismiss(struct user *user)
{
    struct user **link;

    if (--user->files > 0)
        return;
    for (link = &users; *link != user; link = &(*link)->next)
        ;
    *link = user->next;
    free(user);
}

/* Finds a user with a file that may be closed now, and puts them behind all others; the lock is held. */
static struct user *next_user(void)
{
    struct user **link, *user;

    for (link = &users; (user = *link) != NULL; link = &user->next)
        if (user->first >= 0 && user->closing < KEEPER_USER_CLOSERS)
            break;
    if (user == NULL || user->next == NULL)
        return user;
    *link = user->next;
    while (*link != NULL)
        link = &(*link)->next;
    *link = user;
    user->next = NULL;
    return user;
}

static void *work_as_closer(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        struct user *user = next_user();

        if (user != NULL) {
            int fd = user->first;

            user->first = records[fd].next;
            records[fd] = (struct record){0};
            user->closing++;
            pthread_mutex_unlock(&lock);
            /* An error is about what was written before; the descriptor is gone all the same. */
            close(fd);
            pthread_mutex_lock(&lock);
            user->closing--;
            user->unclosed--;
            user->closed = now();
            dismiss(user);
            if (--unclosed == 0)
                pthread_cond_broadcast(&all_closed);
        } else if (idle_closers >= SPARE_CLOSERS) {
            break;
        } else {
            idle_closers++;
            while (wakes == 0)
                pthread_cond_wait(&wanted, &lock);
            wakes--;
        }
    }
    closers--;
    pthread_mutex_unlock(&lock);
    return NULL;
}

static int start_thread(void *(*work)(void *), void *argument)
{
    pthread_attr_t attributes;
    pthread_t thread;
    int error;

    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK);
    error = pthread_create(&thread, &attributes, work, argument);
    pthread_attr_destroy(&attributes);
    return -error;
}

/* Has a closer close a client's file. Other numbers are passed over. */
static void give_up(int fd)
{
    struct record *record;
    struct user *user;

    pthread_mutex_lock(&lock);
    record = fd >= 0 && fd < records_count ? &records[fd] : NULL;
    if (record != NULL && record->user != NULL && !record->waits) {
        user = record->user;
        record->waits = 1;
        record->next = -1;
        if (user->first < 0)
            user->first = fd;
        else
            records[user->last].next = fd;
        user->last = fd;
        if (user->unclosed++ == 0)
            user->closed = now();
        unclosed++;
        /* A closer at its user's limit, or one of all when there are too many, looks again when it is through. */
        if (user->closing < KEEPER_USER_CLOSERS && idle_closers > 0) {
            idle_closers--;
            wakes++;
            pthread_cond_signal(&wanted);
        } else if (user->closing < KEEPER_USER_CLOSERS && closers < KEEPER_CLOSERS) {
            closers += start_thread(work_as_closer, NULL) == 0;
        }
    }
    pthread_mutex_unlock(&lock);
}

/* ---- the keeper: open files of others ---- */

/* Returns the thread group that a task belongs to, or a negative errno. */
static int thread_group(int tid)
{
    char path[32], line[128];
    int group = -ESRCH;
    FILE *status;

    snprintf(path, sizeof path, "/proc/%d/status", tid);
    status = fopen(path, "re");
    if (status == NULL)
        return errno == ENOENT ? -ESRCH : -errno;
    while (fgets(line, sizeof line, status) != NULL)
        if (sscanf(line, "Tgid: %d", &group) == 1)
            break;
    fclose(status);
    return group;
}

/* Returns a pidfd whose descriptor table is the task's own, or a negative errno. */
static int open_task(int tid)
{
    const int pidfd_thread = O_EXCL;
    const int kcmp_files = 2;
    int group, pidfd = (int)syscall(SYS_pidfd_open, tid, pidfd_thread);

    if (pidfd >= 0 || errno != EINVAL)
        return pidfd >= 0 ? pidfd : -errno;
    /* Before Linux 6.9 only the group's leader can be had, which does for as long as the thread shares its table. */
    group = thread_group(tid);
    if (group < 0)
        return group;
    if (group != tid && syscall(SYS_kcmp, tid, group, kcmp_files, 0, 0) > 0)
        return -EOPNOTSUPP;
    pidfd = (int)syscall(SYS_pidfd_open, group, 0);
    return pidfd >= 0 ? pidfd : -errno;
}

/* Takes a reference to what `fd` is to task `tid`; returns its number or a negative errno. */
static int take(int tid, int fd, uint32_t id)
{
    struct user *user = admit(id);
    int file, pidfd;

    if (user == NULL)
        return -EMFILE;
    file = pidfd = open_task(tid);
    if (pidfd >= 0) {
        file = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);
        if (file < 0)
            file = -errno;
        close(pidfd);
    }
    pthread_mutex_lock(&lock);
    if (file >= 0 && file < records_count)
        records[file] = (struct record){.user = user};
    else
        dismiss(user);
    pthread_mutex_unlock(&lock);
    return file;
}

static int take_file(const struct request *request)
{
    int file = take(request->tid, request->fd, request->user);

    /* The driver takes a file with fget(), which does not know O_PATH descriptors; pidfd_getfd does. */
    if (file < 0 || !(fcntl(file, F_GETFL) & O_PATH))
        return file;
    give_up(file);
    return -EBADF;
}

/* The socket's number is read from its process's memory, where other threads can write: it might be any file. */
static int is_channel(int socket)
{
    int domain = -1, type = -1;

    return getsockopt(socket, SOL_SOCKET, SO_DOMAIN, &domain, &(socklen_t){sizeof domain}) == 0 && domain == AF_UNIX
           && getsockopt(socket, SOL_SOCKET, SO_TYPE, &type, &(socklen_t){sizeof type}) == 0 && type == SOCK_DGRAM;
}

/* Sends the files; returns a negative errno, or the socket, which is open on. */
static int send_files(struct request *request)
{
    int error;

    if (request->count < 0 || request->count > KEEPER_BATCH)
        return -EINVAL;
    if (request->socket < 0) {
        request->socket = take(request->tid, request->fd, request->user);
        if (request->socket < 0)
            return request->socket;
        if (!is_channel(request->socket))
            return -ENOTSOCK;
    }
    error = request->count ? send_descriptors(request->socket, request->files, request->count, 0, MSG_DONTWAIT) : 0;
    return error < 0 ? error : request->socket;
}

static void *serve_channel(void *argument)
{
    int channel = (int)(intptr_t)argument, i;
    struct request request;

    while (receive_message(channel, &request, sizeof request) == sizeof request) {
        int result = request.operation == TAKE ? take_file(&request) : send_files(&request);

        send_message(channel, &result, sizeof result);
        /* Only now: the caller need not wait for it. */
        if (request.operation == SEND) {
            for (i = 0; i < request.count && i < KEEPER_BATCH; i++)
                give_up(request.files[i]);
            if (result < 0 || !request.more)
                give_up(request.socket);
        }
    }
    close(channel);
    return NULL;
}

/* ---- the keeper: its life ---- */

/* Serves the control socket until its other end is closed. */
static void serve_control(void)
{
    int files[CLOSED_AT_ONCE], channel, i;
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec data = {files, sizeof files};
    ssize_t received;

    for (;;) {
        struct msghdr message = {
            .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};

        received = recvmsg(CONTROL, &message, MSG_CMSG_CLOEXEC);
        if (received < 0 && errno == EINTR)
            continue;
        if (received <= 0)
            return;
        if (message.msg_controllen >= CMSG_LEN(sizeof channel)) {
            memcpy(&channel, CMSG_DATA(&control.header), sizeof channel);
            if (start_thread(serve_channel, (void *)(intptr_t)channel) != 0)
                close(channel);
        } else {
            for (i = 0; i < received / (ssize_t)sizeof *files; i++)
                give_up(files[i]);
        }
    }
}

/* Keeps of the capabilities only the one for taking files. */
static int drop_capabilities(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    uint32_t kept;

    if (syscall(SYS_capget, &header, data) != 0)
        return -1;
    kept = data[0].effective & 1U << CAP_SYS_PTRACE;
    memset(data, 0, sizeof data);
    data[0].permitted = data[0].effective = kept;
    return (int)syscall(SYS_capset, &header, data);
}

/* Leaves behind what the server had: signals, descriptors, rights, its folder. */
static int settle(int control, const struct sock_fprog *filter)
{
    struct rlimit limit;
    sigset_t all;
    int i, null;

    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    prctl(PR_SET_NAME, "binder-keeper");
    if (chdir("/") != 0)
        return -1;
    /* Out of the way of those that it is to have. */
    if (control <= CONTROL)
        control = fcntl(control, F_DUPFD, CONTROL + 1);
    if (control < 0 || dup2(control, CONTROL) < 0 || close_range(FIRST_FILE, ~0U, 0) != 0)
        return -1;
    null = open("/dev/null", O_RDWR);
    for (i = 0; i < CONTROL; i++)
        if (null < 0 || dup2(null, i) < 0)
            close(i);
    if (null >= FIRST_FILE)
        close(null);
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return -1;
    limit.rlim_cur = limit.rlim_max < KEEPER_FILES ? limit.rlim_max : KEEPER_FILES;
    records_count = (int)limit.rlim_cur;
    records = calloc(records_count, sizeof *records);
    if (records == NULL || setrlimit(RLIMIT_NOFILE, &limit) != 0 || drop_capabilities() != 0)
        return -1;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return -1;
    return filter->len == 0 ? 0 : prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter);
}

static void keep(void)
{
    int fd;

    closers = start_thread(work_as_closer, NULL) == 0;
    serve_control();
    /* One after the other, as the kernel would, the first that hangs would keep all others open. */
    for (fd = FIRST_FILE; fd < records_count; fd++)
        give_up(fd);
    pthread_mutex_lock(&lock);
    while (unclosed > 0 && closers > 0)
        pthread_cond_wait(&all_closed, &lock);
}

/* ---- the server's side ---- */

int keeper_start(const void *filter, size_t size, int *pid)
{
    struct sock_fprog program = {(unsigned short)(size / sizeof(struct sock_filter)), (struct sock_filter *)filter};
    int pair[2], child;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        return -errno;
    child = fork();
    if (child < 0) {
        int error = -errno;

        close(pair[0]);
        close(pair[1]);
        return error;
    }
    if (child == 0) {
        if (settle(pair[1], &program) == 0)
            keep();
        _exit(0);
    }
    close(pair[1]);
    *pid = child;
    return pair[0];
}

int keeper_open(int control)
{
    int pair[2], error;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        return -errno;
    error = send_descriptors(control, &pair[1], 1, 1, 0);
    close(pair[1]);
    if (error == 0)
        return pair[0];
    close(pair[0]);
    return error;
}

static int call(int channel, const struct request *request)
{
    int result;

    if (send_message(channel, request, sizeof *request) != sizeof *request
        || receive_message(channel, &result, sizeof result) != sizeof result)
        return -EPIPE;
    return result;
}

int keeper_take(int channel, int tid, int fd, uint32_t user)
{
    return call(channel, &(struct request){.operation = TAKE, .tid = tid, .fd = fd, .user = user});
}

int keeper_send(int channel, int tid, int fd, int socket, uint32_t user, const int *files, int count, int more)
{
    struct request request = {
        .operation = SEND, .tid = tid, .fd = fd, .user = user, .socket = socket, .more = more, .count = count};

    memcpy(request.files, files, count * sizeof *files);
    return call(channel, &request);
}

int keeper_close(int control, const int *files, int count)
{
    while (count > 0) {
        int now = count < CLOSED_AT_ONCE ? count : CLOSED_AT_ONCE;

        if (send_message(control, files, now * sizeof *files) < 0)
            return -EPIPE;
        files += now;
        count -= now;
    }
    return 0;
}
