/* SPDX-License-Identifier: Apache-2.0
 *
 * binder-keeper: keeps open files of clients on their way, sends them, and closes them.
 *
 * Why it is a program of its own. To close a file may take for ever: the file can belong to a FUSE server that a client
 * has written (FLUSH comes with every close, and not even SIGKILL ends the wait). A server with such a descriptor could
 * not even die: the kernel closes a process's descriptors one by one, and closes /dev/fuse, which tells the clients, only
 * after the last. So no client's file is ever in the descriptor table of the server, nor in a socket of the server. The
 * keeper takes files from clients (pidfd_getfd), holds them, sends them to their receivers (SCM_RIGHTS) and closes them.
 * It has none of the server's memory and none of its descriptors. To the server a file is a number.
 *
 * Calls. The server has one socket to the keeper, `control`, and as many *channels* as threads that call at a time. Each
 * channel is a socket pair; its other end comes over `control`, and has a thread here. So a call is one message to and
 * one fro, and a call that is held up holds up only its caller. Control carries what has no answer: channels, and files
 * to close.
 *
 * Closing. A file that is to be closed goes to the *closers*: threads started as needed, up to a limit for all and a
 * smaller one for each user that files are accounted to. Beyond these, files wait in a queue of their user. A user with
 * many waiting files, none of which gets closed, gets EMFILE for further ones, so descriptors cannot pile up. Nor can
 * one user hold more than half of all.
 *
 * Sending. The receiver makes a socket, and says by a number which one. A client chooses what stands under its numbers,
 * at any moment, so nothing is ever sent into a socket because a client says so. The keeper takes the socket and checks
 * that it is fresh: AF_UNIX, SOCK_SEQPACKET, without name, without peer. Then the keeper connects it to a listening
 * socket of its own, and sends from the end that it accepts. A socket has one peer at most, so that the connection was
 * made means that the taken socket has no other peer, and never gets one. The listening socket has a name that nobody
 * can look up: its file is removed once the keeper has a descriptor of it, in a folder that only the keeper could enter.
 * A name in a file system is needed since the taken socket may belong to another network namespace, and the keeper
 * connects by /proc/self/fd, where the kernel finds the socket by its inode.
 *
 * Rights. The keeper is root's only where it must be. Where it can, it takes a user of its own, so that no message ever
 * carries root's credentials, and keeps CAP_SYS_PTRACE alone. That user is not "nobody", whose other processes could
 * then kill this one. A filter of system calls allows what the code below does, and nothing else.
 *
 * Invariants:
 * - A client's file is closed by a closer only, and so is what a client can send into. All else here waits for nothing
 *   that a client can delay, but for pidfd_getfd of a process that is about to execute another program.
 * - `records[fd].user` is set exactly while descriptor fd is a client's file. Such a file is HELD, until a channel has
 *   CLAIMED it to send it or send into it, and at last is WAITING in its user's queue. Only what is held can be claimed,
 *   and control closes only what is held. A record is cleared before its descriptor is closed, for the number may be
 *   another file's a moment later.
 * - `lock` guards records, users and counts, and is not held across a system call but the start of a thread.
 * - While `connecting` is held, the queue of the listening socket has the connection that the holder made, or none.
 *   Otherwise one receiver could be sent what is another's.
 * - A socket that was taken over a channel is used over that channel only, and is given up when the next is taken or the
 *   channel ends.
 * - The keeper outlives its server for as long as it takes to close what it has, which may be for ever: it then holds
 *   those files, and nothing else.
 */
#define _GNU_SOURCE

#include "filter.h"
#include "keeper_protocol.h"
#include "message.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/kcmp.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#define STACK (512 << 10)
#else
#define STACK (64 << 10)
#endif
#define SPARE_CLOSERS 2 /* that stay when there is nothing to close */
#define CONTROL PROGRAM_CONTROL
#define FIRST_FILE (CONTROL + 1)
#define OWN_USER 65533 /* and group: reserved by Debian, left unused by systemd, and within a container's usual 65,536 */
#define MOST_DESCRIPTORS (1 << 20)
#define MOST_CLOSERS 1024
#define MOST_UNREAD 64 /* messages that are removed from a socket; the kernel queues about 10 */

static struct keeper_limits limits;
static int listening, listening_name; /* the socket, and an O_PATH descriptor of its file */

/* ---- what it holds ---- */

struct user {
    struct user *next;
    uint32_t id;
    int files;    /* held, whether they wait to be closed or not */
    int unclosed; /* of these, those that wait or are being closed */
    int closing;  /* closers at it */
    int first, last; /* of the queue; -1: none */
    time_t closed;   /* when the last of them was, or the first was to be */
};

enum state { HELD, CLAIMED, WAITING };

struct record {
    struct user *user;
    int next; /* in the queue */
    enum state state;
    int unread; /* a socket with messages that nobody may have received */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER, all_closed = PTHREAD_COND_INITIALIZER;
static struct record *records;
static int records_count;
static struct user *users; /* that have files; the first is next to have one closed */
static int unclosed, claimed;
static int held; /* by all users */
static int closers, idle_closers, wakes; /* a closer that has been woken is not idle any more */

static time_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
    return time.tv_sec;
}

/* Tells whether a user has too many files that cannot be closed, or as many as are still free, or more; the lock is held.
 * The reserve is for users that hold none, and for the sockets by which files leave. */
static int has_too_many(const struct user *user)
{
    return (user->unclosed >= limits.user_unclosed && now() - user->closed > 1)
           || user->files >= records_count - records_count / limits.reserve - held;
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
    if (user != NULL) {
        user->files++;
        held++;
    }
    pthread_mutex_unlock(&lock);
    return user;
}

/* Takes room back; the lock is held. */
static void dismiss(struct user *user)
{
    struct user **link;

    held--;
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
        if (user->first >= 0 && user->closing < limits.user_closers)
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

/* Removes what is unread in a socket. Files in messages count against their sender until somebody receives them. */
static void empty(int socket)
{
    struct msghdr message = {0};
    int i;

    for (i = 0; i < MOST_UNREAD && recvmsg(socket, &message, MSG_DONTWAIT) >= 0; i++)
        message = (struct msghdr){0};
}

static void *work_as_closer(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        struct user *user = next_user();

        if (user != NULL) {
            int fd = user->first, unread = records[fd].unread;

            user->first = records[fd].next;
            records[fd] = (struct record){0};
            user->closing++;
            pthread_mutex_unlock(&lock);
            if (unread)
                empty(fd);
            /* An error is about what was written before; the descriptor is gone all the same. */
            close(fd);
            pthread_mutex_lock(&lock);
            user->closing--;
            user->unclosed--;
            user->closed = now();
            dismiss(user);
            if (--unclosed == 0 && claimed == 0)
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

/* Returns the record of a number that is a client's file in that state, or NULL; the lock is held. */
static struct record *find(int fd, enum state state)
{
    struct record *record = fd >= 0 && fd < records_count ? &records[fd] : NULL;

    return record != NULL && record->user != NULL && record->state == state ? record : NULL;
}

/* Claims files for the calling thread: all of them, or none. Returns 0, or -EBADF where one is not held. */
static int claim(const int *files, int count)
{
    struct record *record;
    int i;

    pthread_mutex_lock(&lock);
    for (i = 0; i < count && (record = find(files[i], HELD)) != NULL; i++)
        record->state = CLAIMED;
    if (i < count) {
        while (i-- > 0)
            records[files[i]].state = HELD;
        pthread_mutex_unlock(&lock);
        return -EBADF;
    }
    claimed += count;
    pthread_mutex_unlock(&lock);
    return 0;
}

/* Has a closer close a client's file that is in that state. Other numbers are passed over. */
static void give_up(int fd, enum state state)
{
    struct record *record;
    struct user *user;

    pthread_mutex_lock(&lock);
    record = find(fd, state);
    if (record != NULL) {
        user = record->user;
        claimed -= state == CLAIMED;
        record->state = WAITING;
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
        if (user->closing < limits.user_closers && idle_closers > 0) {
            idle_closers--;
            wakes++;
            pthread_cond_signal(&wanted);
        } else if (user->closing < limits.user_closers && closers < limits.closers) {
            closers += start_thread(work_as_closer, NULL) == 0;
        }
    }
    pthread_mutex_unlock(&lock);
}

/* Enters a descriptor as a file of a user who was admitted, and returns its number; or a negative errno. */
static int enter(int fd, struct user *user, enum state state)
{
    pthread_mutex_lock(&lock);
    if (fd >= records_count) { /* hardly ever: the limit is as many */
        close(fd);
        fd = -EMFILE;
    }
    if (fd >= 0) {
        records[fd] = (struct record){.user = user, .state = state};
        claimed += state == CLAIMED;
    } else {
        dismiss(user);
    }
    pthread_mutex_unlock(&lock);
    return fd;
}

/* ---- open files of others ---- */

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
    int group, pidfd = (int)syscall(SYS_pidfd_open, tid, pidfd_thread);

    if (pidfd >= 0 || errno != EINVAL)
        return pidfd >= 0 ? pidfd : -errno;
    /* Before Linux 6.9 only the group's leader can be had, which does for as long as the thread shares its table. */
    group = thread_group(tid);
    if (group < 0)
        return group;
    if (group != tid && syscall(SYS_kcmp, tid, group, KCMP_FILES, 0, 0) > 0)
        return -EOPNOTSUPP;
    pidfd = (int)syscall(SYS_pidfd_open, group, 0);
    return pidfd >= 0 ? pidfd : -errno;
}

/* Takes a reference to what `fd` is to task `tid`; returns its number or a negative errno. */
static int take(int tid, int fd, uint32_t id, enum state state)
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
    return enter(file, user, state);
}

static int take_file(const struct keeper_request *request)
{
    int file = take(request->tid, request->fd, request->user, HELD);

    /* The driver takes a file with fget(), which does not know O_PATH descriptors; pidfd_getfd does. */
    if (file < 0 || !(fcntl(file, F_GETFL) & O_PATH))
        return file;
    give_up(file, HELD);
    return -EBADF;
}

/* ---- channels ---- */

static pthread_mutex_t connecting = PTHREAD_MUTEX_INITIALIZER;

struct channel {
    int socket;
    int taken; /* the receiver's socket; -1: none */
    int own;   /* what it is connected to; -1: not yet */
    uint32_t user;
};

/* Gives up what files are sent by. */
static void end_sending(struct channel *channel)
{
    if (channel->own >= 0) {
        pthread_mutex_lock(&lock);
        records[channel->taken].unread = 1;
        pthread_mutex_unlock(&lock);
    }
    /* This end first: nothing is put into a socket that is being emptied. */
    give_up(channel->own, CLAIMED);
    give_up(channel->taken, CLAIMED);
    channel->own = channel->taken = -1;
}

static int has_option(int socket, int option, int expected)
{
    int value = -1;

    return getsockopt(socket, SOL_SOCKET, option, &value, &(socklen_t){sizeof value}) == 0 && value == expected;
}

/* Tells whether a descriptor is a socket that has just been made. A client can undo that at once: see connect_taken. */
static int is_fresh(int socket)
{
    struct sockaddr_un name;
    socklen_t size = sizeof name;

    return has_option(socket, SO_DOMAIN, AF_UNIX) && has_option(socket, SO_TYPE, SOCK_SEQPACKET)
           && has_option(socket, SO_ACCEPTCONN, 0) && getsockname(socket, (struct sockaddr *)&name, &size) == 0
           && size == sizeof(sa_family_t) && getpeername(socket, (struct sockaddr *)&name, &(socklen_t){sizeof name}) < 0
           && errno == ENOTCONN;
}

static int take_socket(struct channel *channel, const struct keeper_request *request)
{
    int socket;

    end_sending(channel);
    socket = take(request->tid, request->fd, request->user, CLAIMED);
    if (socket < 0)
        return socket;
    if (!is_fresh(socket)) {
        give_up(socket, CLAIMED);
        return -ENOTSOCK;
    }
    channel->taken = socket;
    channel->user = request->user;
    return socket;
}

/* Accepts a connection, which its user's client may have sent into already. Returns it, or a negative errno. */
static int accept_one(uint32_t id)
{
    struct user *user = admit(id);
    int socket;

    if (user == NULL)
        return -EMFILE;
    socket = accept4(listening, NULL, NULL, SOCK_CLOEXEC);
    return enter(socket < 0 ? -errno : socket, user, CLAIMED);
}

/* Tells whether this process has made the connection of which this is the accepted end. */
static int is_own(int socket)
{
    struct ucred peer = {0};

    return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &(socklen_t){sizeof peer}) == 0 && peer.pid == getpid();
}

/* Connects the taken socket to the listening one; returns 0 or a negative errno. */
static int connect_taken(struct channel *channel)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int socket;

    snprintf(name.sun_path, sizeof name.sun_path, "/proc/self/fd/%d", listening_name);
    pthread_mutex_lock(&connecting);
    /* A connection stays in the queue where there was no room to accept it. */
    while ((socket = accept_one(channel->user)) >= 0)
        give_up(socket, CLAIMED);
    if (socket == -EAGAIN)
        socket = connect(channel->taken, (struct sockaddr *)&name, sizeof name) == 0 ? accept_one(channel->user) : -errno;
    pthread_mutex_unlock(&connecting);
    if (socket < 0)
        return socket;
    channel->own = socket;
    return is_own(socket) ? 0 : -ECONNABORTED;
}

/* Sends the files, which are claimed; returns 0 or a negative errno. */
static int send_files(struct channel *channel, const struct keeper_request *request)
{
    int error;

    if (request->count == 0)
        return 0;
    error = channel->own < 0 ? connect_taken(channel) : 0;
    return error < 0 ? error : send_descriptors(channel->own, "", 1, request->files, request->count, MSG_DONTWAIT);
}

/* Answers a request to send, and only then gives the files up: the caller need not wait for it. */
static void serve_sending(struct channel *channel, const struct keeper_request *request)
{
    int count = request->count, result = count < 0 || count > KEEPER_BATCH ? -EINVAL : claim(request->files, count), i;
    int is_claimed = result == 0;

    if (is_claimed)
        result = request->socket >= 0 && request->socket == channel->taken ? send_files(channel, request) : -EBADF;
    send_message(channel->socket, &result, sizeof result);
    for (i = 0; is_claimed && i < count; i++)
        give_up(request->files[i], CLAIMED);
    if (result < 0 || !request->more)
        end_sending(channel);
}

static void *serve_channel(void *argument)
{
    struct channel channel = {.socket = (int)(intptr_t)argument, .taken = -1, .own = -1};
    struct keeper_request request;

    while (receive_message(channel.socket, &request, sizeof request) == sizeof request) {
        int result = -EINVAL;

        if (request.operation == KEEPER_SEND) {
            serve_sending(&channel, &request);
            continue;
        }
        if (request.operation == KEEPER_TAKE)
            result = take_file(&request);
        else if (request.operation == KEEPER_TAKE_SOCKET)
            result = take_socket(&channel, &request);
        send_message(channel.socket, &result, sizeof result);
    }
    end_sending(&channel);
    close(channel.socket);
    return NULL;
}

/* ---- its life ---- */

/* Serves the control socket until its other end is closed. */
static void serve_control(void)
{
    int files[KEEPER_CLOSED_AT_ONCE], channel, count, i;
    ssize_t received;

    for (;;) {
        count = 1;
        received = receive_descriptors(CONTROL, files, sizeof files, &channel, &count);
        if (received <= 0)
            return;
        if (count > 0) {
            if (start_thread(serve_channel, (void *)(intptr_t)channel) != 0)
                close(channel);
        } else {
            for (i = 0; i < received / (ssize_t)sizeof *files; i++)
                give_up(files[i], HELD);
        }
    }
}

/* Makes a socket that only who has a descriptor of its file can reach, in a folder under `place`; or fails. */
static int listen_under(const char *place)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    char path[64];
    struct stat status;
    int folder, error = -EPERM;

    snprintf(path, sizeof path, "%s/binder-keeper.XXXXXX", place);
    if (mkdtemp(path) == NULL)
        return -errno;
    folder = open(path, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    /* Where others may rename what is in `place`, this could be another folder, which they can enter. */
    if (folder >= 0 && fstat(folder, &status) == 0 && status.st_uid == geteuid() && (status.st_mode & 077) == 0) {
        snprintf(name.sun_path, sizeof name.sun_path, "/proc/self/fd/%d/socket", folder);
        listening = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (listening < 0 || bind(listening, (struct sockaddr *)&name, sizeof name) != 0 || listen(listening, 1) != 0) {
            error = -errno;
        } else {
            listening_name = openat(folder, "socket", O_PATH | O_NOFOLLOW | O_CLOEXEC);
            error = listening_name < 0 ? -errno : 0;
        }
        unlinkat(folder, "socket", 0);
        if (error < 0 && listening >= 0)
            close(listening);
    }
    if (folder >= 0)
        close(folder);
    rmdir(path);
    return error;
}

static int start_listening(void)
{
    static const char *const places[] = {"/run", "/dev/shm", "/tmp", "/var/tmp"};
    int error = -ENOENT;
    size_t i;

    /* It is made by root, and connected to by another user. */
    umask(0);
    for (i = 0; i < sizeof places / sizeof *places; i++) {
        error = listen_under(places[i]);
        if (error == 0)
            break;
    }
    return error;
}

/* Becomes a user of its own, where it may; where such a user is not mapped it stays what it is. */
static void change_user(void)
{
    prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0);
    if (setgroups(0, NULL) != 0 || setresgid(OWN_USER, OWN_USER, OWN_USER) != 0
        || setresuid(OWN_USER, OWN_USER, OWN_USER) != 0)
        return;
}

/* Keeps of the capabilities only the one for taking files. */
static int drop_capabilities(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    uint32_t kept;

    if (syscall(SYS_capget, &header, data) != 0)
        return -errno;
    kept = data[0].permitted & 1U << CAP_SYS_PTRACE;
    memset(data, 0, sizeof data);
    data[0].permitted = data[0].effective = kept;
    return syscall(SYS_capset, &header, data) == 0 ? 0 : -errno;
}

static int is_between(int least, int number, int most)
{
    return least <= number && number <= most;
}

/* Hears what users may hold. Returns -EINVAL for numbers that it could not keep to. */
static int receive_limits(void)
{
    if (receive_message(CONTROL, &limits, sizeof limits) != sizeof limits)
        return -EINVAL;
    return is_between(1, limits.descriptors, MOST_DESCRIPTORS) && is_between(2, limits.reserve, MOST_DESCRIPTORS)
                   && is_between(1, limits.closers, MOST_CLOSERS) && is_between(1, limits.user_closers, limits.closers)
                   && is_between(1, limits.user_unclosed, MOST_DESCRIPTORS)
               ? 0
               : -EINVAL;
}

/* Takes as many descriptors and threads as it may have. */
static int set_limits(void)
{
    struct rlimit limit = {RLIM_INFINITY, RLIM_INFINITY};

    /* Root's threads are not counted, another user's are. */
    if (setrlimit(RLIMIT_NPROC, &limit) != 0 && getrlimit(RLIMIT_NPROC, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NPROC, &limit);
    }
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return -errno;
    limit.rlim_cur = limit.rlim_max < (rlim_t)limits.descriptors ? limit.rlim_max : (rlim_t)limits.descriptors;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
        return -errno;
    records_count = (int)limit.rlim_cur;
    records = calloc(records_count, sizeof *records);
    return records == NULL ? -ENOMEM : 0;
}

/* All that the keeper asks of the kernel from now on. It opens only /proc/TID/status, and starts threads only. */
static int allow_calls(void)
{
    const struct call_rule rules[] = {
        ALLOW(recvfrom),
        ALLOW_IF(sendto, CHECK(5, WHOLE, 0)), /* to no address */
        ALLOW(recvmsg),
        ALLOW(sendmsg),
        ALLOW(futex),
        ALLOW(pidfd_open),
        ALLOW(pidfd_getfd),
        ALLOW(close),
        ALLOW_IF(fcntl, CHECK(1, WHOLE, F_GETFL)),
        ALLOW_IF(accept4, CHECK(0, WHOLE, (uint32_t)listening)),
        ALLOW(connect),
        ALLOW(getsockname),
        ALLOW(getpeername),
        ALLOW_IF(getsockopt, CHECK(1, WHOLE, SOL_SOCKET)),
        ALLOW(getpid),
        ALLOW(clock_gettime),
        ALLOW_IF(kcmp, CHECK(2, WHOLE, KCMP_FILES)),
        ALLOW_IF(openat, CHECK(2, O_ACCMODE | O_CREAT | O_TRUNC, O_RDONLY)),
        ALLOW(read),
        ALLOW(fstat),
        ALLOW(newfstatat),
        /* Of the C library, for threads and memory. */
        ALLOW_IF(clone, CHECK(0, CLONE_VM | CLONE_THREAD, CLONE_VM | CLONE_THREAD)),
        ALLOW_IF(mmap, CHECK(2, PROT_EXEC, 0)),
        ALLOW_IF(mprotect, CHECK(2, PROT_EXEC, 0)),
        ALLOW(munmap),
        ALLOW(mremap),
        ALLOW(madvise),
        ALLOW(brk),
        ALLOW(rt_sigaction),
        ALLOW(rt_sigprocmask),
        ALLOW(set_robust_list),
        ALLOW(rseq),
        ALLOW(sched_getaffinity),
        ALLOW(getrandom),
        ALLOW(restart_syscall),
        ALLOW(exit),
        ALLOW(exit_group),
    };
    int error = filter_calls(rules, sizeof rules / sizeof *rules);

    return error == -EOPNOTSUPP ? 0 : error;
}

/* Takes what it needs, and leaves behind all rights that it does not. */
static int settle(void)
{
    int error;

    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    prctl(PR_SET_NAME, "binder-keeper");
    if (chdir("/") != 0)
        return -errno;
    error = set_limits();
    if (error == 0)
        error = start_listening();
    if (error < 0)
        return error;
    change_user();
    error = drop_capabilities();
    if (error < 0)
        return error;
    /* To change user may have made it dumpable. */
    return prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0 ? allow_calls() : -errno;
}

int main(void)
{
    int error = receive_limits(), fd;

    if (error == 0)
        error = settle();
    closers = error == 0 && start_thread(work_as_closer, NULL) == 0;
    send_message(CONTROL, &error, sizeof error);
    if (error < 0)
        return 1;
    serve_control();
    /* One after the other, as the kernel would, the first that hangs would keep all others open. */
    for (fd = FIRST_FILE; fd < records_count; fd++)
        give_up(fd, HELD);
    pthread_mutex_lock(&lock);
    while ((unclosed > 0 || claimed > 0) && closers > 0)
        pthread_cond_wait(&all_closed, &lock);
    _exit(0);
}
