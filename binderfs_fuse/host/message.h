/* SPDX-License-Identifier: Apache-2.0
 *
 * Messages between a server and the programs that it starts: see message.c.
 */
#ifndef BINDERFS_FUSE_HOST_MESSAGE_H
#define BINDERFS_FUSE_HOST_MESSAGE_H

#include <stddef.h>
#include <sys/types.h>

#define PROGRAM_CONTROL 3     /* the descriptor of a program's end of its control socket */
#define MESSAGE_DESCRIPTORS 32 /* of one message */

/*
 * The socket is one of type SOCK_SEQPACKET, so a message arrives whole. Each goes on after a signal.
 *
 * send_message          returns `size`, or -1 with errno; EPIPE, without a signal: the other end is closed.
 * receive_message       returns the bytes received, 0 at the end, -1 with errno.
 * send_descriptors      sends `data`, `count` descriptors along with it; `flags` as of sendmsg(2). Returns 0 or a
 *                       negative errno; -EINVAL: more than MESSAGE_DESCRIPTORS.
 * receive_descriptors   as receive_message; stores up to `*count` descriptors, close-on-exec, and how many came.
 * open_channel          sends a new socket over `control`, with one byte, and returns its other end, or a negative errno.
 * start_program         executes the file at `path` as `name`, with an empty environment, every signal blocked, /dev/null
 *                       as descriptors 0 to 2 and its end of a control socket as 3, and no other descriptor. It has
 *                       the effective capabilities of the calling thread. It finds a message of `size` bytes in control, unless
 *                       that is 0. Waits for the program's first message, an int: 0, or the negative errno that it
 *                       ended with. Returns the other end of the control socket, or a negative
 *                       errno; -ECHILD: the program ended without a word. Any thread may call it.
 */
ssize_t send_message(int socket, const void *data, size_t size);
ssize_t receive_message(int socket, void *data, size_t size);
int send_descriptors(int socket, const void *data, size_t size, const int *fds, int count, int flags);
ssize_t receive_descriptors(int socket, void *data, size_t size, int *fds, int *count);
int open_channel(int control);
int start_program(const char *path, const char *name, const void *message, size_t size, int *pid);

#endif
