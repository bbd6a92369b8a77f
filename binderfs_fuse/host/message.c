/* SPDX-License-Identifier: Apache-2.0
 *
 * Messages, descriptors, and the start of a program that is talked to by them.
 *
 * A server starts its programs while it has all its rights, and perhaps other threads: a test starts one when it first
 * needs it. So the child calls nothing between fork and exec but system calls. A program of its own has nothing of its
 * server's memory, which a mere fork would have: regions, and what clients said.
 *
 * exec takes the capabilities of a process that is not root's, unless they are ambient. A program drops what it does not
 * need, ambient ones included, as one of the first things that it does.
 */
#define _GNU_SOURCE

#include "message.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

ssize_t send_message(int socket, const void *data, size_t size)
{
    ssize_t sent;

    do
        sent = send(socket, data, size, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent;
}

ssize_t receive_message(int socket, void *data, size_t size)
{
    ssize_t received;

    do
        received = recv(socket, data, size, 0);
    while (received < 0 && errno == EINTR);
    return received;
}

int send_descriptors(int socket, const void *data, size_t size, const int *fds, int count, int flags)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(MESSAGE_DESCRIPTORS * sizeof(int))];
    } control;
    struct iovec text = {(void *)data, size};
    struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1};
    ssize_t sent;

    if (count < 0 || count > MESSAGE_DESCRIPTORS)
        return -EINVAL;
    if (count > 0) {
        memset(&control, 0, sizeof control);
        control.header = (struct cmsghdr){CMSG_LEN(count * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), fds, count * sizeof(int));
        message.msg_control = &control;
        message.msg_controllen = control.header.cmsg_len;
    }
    do
        sent = sendmsg(socket, &message, flags | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : 0;
}

ssize_t receive_descriptors(int socket, void *data, size_t size, int *fds, int *count)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(MESSAGE_DESCRIPTORS * sizeof(int))];
    } control;
    struct iovec text = {data, size};
    struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1, .msg_control = &control};
    int room = *count < MESSAGE_DESCRIPTORS ? *count : MESSAGE_DESCRIPTORS;
    ssize_t received;

    *count = 0;
    do {
        /* Exactly as long as there is room: what does not fit is not installed, and nothing leaks. */
        message.msg_controllen = CMSG_LEN(room * sizeof(int));
        received = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    } while (received < 0 && errno == EINTR);
    if (received < 0 || message.msg_controllen < CMSG_LEN(sizeof(int)) || control.header.cmsg_level != SOL_SOCKET
        || control.header.cmsg_type != SCM_RIGHTS || control.header.cmsg_len < CMSG_LEN(sizeof(int)))
        return received;
    *count = (int)((control.header.cmsg_len - CMSG_LEN(0)) / sizeof(int));
    if (*count > room)
        *count = room;
    memcpy(fds, CMSG_DATA(&control.header), *count * sizeof(int));
    return received;
}

int open_channel(int control)
{
    int pair[2], error;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        return -errno;
    error = send_descriptors(control, "", 1, &pair[1], 1, 0);
    close(pair[1]);
    if (error == 0)
        return pair[0];
    close(pair[0]);
    return error;
}

/* ---- the start of a program; the child's part ---- */

/*
 * Lets the capabilities be the same after exec. Without SECBIT_NOROOT, root would get those that it has dropped; without
 * ambient ones, who is not root would lose all. Where either may not be set, the program has to do with what it gets.
 */
static void keep_capabilities(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    unsigned int capability;
    int i;

    if (syscall(SYS_capget, &header, data) != 0)
        return;
    for (i = 0; i < 2; i++)
        data[i].permitted = data[i].inheritable = data[i].effective;
    if (syscall(SYS_capset, &header, data) != 0)
        return;
    prctl(PR_SET_SECUREBITS, prctl(PR_GET_SECUREBITS, 0, 0, 0, 0) | SECBIT_NOROOT, 0, 0, 0);
    for (capability = 0; capability < 64; capability++)
        if (data[capability / 32].permitted & 1U << capability % 32)
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0);
}

/* Leaves the program the descriptors that it is to have, and no other. */
static int give_descriptors(int control)
{
    int null, i;

    /* Out of the way of the numbers that are given out. */
    control = fcntl(control, F_DUPFD_CLOEXEC, PROGRAM_CONTROL + 1);
    null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (control < 0 || null < 0 || (null <= PROGRAM_CONTROL && (null = fcntl(null, F_DUPFD, PROGRAM_CONTROL + 1)) < 0))
        return -1;
    for (i = 0; i < PROGRAM_CONTROL; i++)
        if (dup2(null, i) < 0)
            return -1;
    return dup2(control, PROGRAM_CONTROL) < 0 ? -1 : close_range(PROGRAM_CONTROL + 1, ~0U, 0);
}

static void become_program(const char *path, const char *name, int control)
{
    int error;

    if (give_descriptors(control) == 0) {
        keep_capabilities();
        execve(path, (char *[]){(char *)name, NULL}, (char *[]){NULL});
        control = PROGRAM_CONTROL;
    }
    error = -errno;
    send_message(control, &error, sizeof error);
    _exit(127);
}

/* ---- the start of a program; the caller's part ---- */

int start_program(const char *path, const char *name, const void *message, size_t size, int *pid)
{
    int pair[2], child, error = 0, status;
    sigset_t all, before;
    ssize_t received;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        return -errno;
    if (size > 0 && send_message(pair[0], message, size) < 0) {
        error = -errno;
        close(pair[0]);
        close(pair[1]);
        return error;
    }
    /* A handler of the caller's must not run in the child; and exec keeps the mask. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    child = fork();
    if (child == 0)
        become_program(path, name, pair[1]);
    if (child < 0)
        error = -errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    close(pair[1]);
    if (error == 0) {
        received = receive_message(pair[0], &error, sizeof error);
        if (received != sizeof error)
            error = -ECHILD;
    }
    if (error == 0) {
        *pid = child;
        return pair[0];
    }
    close(pair[0]);
    if (child > 0)
        while (waitpid(child, &status, 0) < 0 && errno == EINTR)
            ;
    return error;
}
