/* SPDX-License-Identifier: Apache-2.0
 *
 * A program that keeps the open files of clients, sends and closes them: see keeper.c. Rules of form: see uapi/binder.h.
 */
#ifndef BINDERFS_FUSE_HOST_KEEPER_H
#define BINDERFS_FUSE_HOST_KEEPER_H

#include <stddef.h>
#include <stdint.h>

#define KEEPER_BATCH 32 /* files of one keeper_send; SCM_MAX_FD is 253, but the receiver's stack may be small */

/* What users may hold of it. The numbers are those of limits.py; each is at least 1. */
struct keeper_limits {
    int32_t descriptors;   /* where the limit of the process allows as many; at most 1 << 20 */
    int32_t reserve;       /* one part of so many, for users that hold none and for sockets; at least 2 */
    int32_t closers;       /* threads that may be in close() at a time; at most 1024 */
    int32_t user_closers;  /* those with files of one user; not more than all */
    int32_t user_unclosed; /* of one user that may wait, with none closed for a second, before it gets EMFILE */
};

/*
 * Each returns 0 (keeper_start, keeper_open: a descriptor; keeper_take, keeper_take_socket: a file) or a negative errno.
 * -EPIPE: there is no keeper any more.
 *
 * keeper_start        starts the keeper whose program is at that path. It ends when the returned control socket is
 *                     closed in every process; its process id is stored. Errors of execve(2), or of what it needs;
 *                     -ECHILD: it ended at once; -EINVAL: limits out of range.
 * keeper_open         opens a channel, for one call at a time. -EMFILE, -EAGAIN: there is no room for another.
 * keeper_take         takes a reference to what `fd` is to task `tid`, and returns its number in the keeper; `user` is
 *                     whom it is accounted to. -EBADF also for an O_PATH descriptor; -EPERM; -EMFILE, also where the
 *                     user has too many files; -ESRCH: the task is gone.
 * keeper_take_socket  takes a reference to the socket that `fd` is to task `tid`, in which it is to receive files, and
 *                     returns its number, which this channel alone can use. What was taken before over this channel is
 *                     given up. Errors as of keeper_take; -ENOTSOCK: it is not a new socket of AF_UNIX and
 *                     SOCK_SEQPACKET, without name and peer.
 * keeper_send         sends up to KEEPER_BATCH files into that socket, in one message of one byte; the first time, the
 *                     socket is connected before. The files are given up, whatever comes of it. So is the socket,
 *                     after an error or without `more`: then it is emptied, and files that were not received yet may be
 *                     lost. So a sender that waits for its receiver says `more` each time, and ends with a call
 *                     without files. -EBADF: the socket is not what was taken last over this channel; or one of the
 *                     files is none, and then, as after -EINVAL for a wrong count, none is given up. -EISCONN, -EINVAL:
 *                     the client has connected the socket, or listens on it; -EAGAIN: the receiver does not
 *                     receive; -EMFILE; others as of connect(2), accept(2) and sendmsg(2).
 * keeper_close        gives files up. Waits for nothing that a client can delay.
 */
int keeper_start(const char *program, const struct keeper_limits *limits, int *pid);
int keeper_open(int control);
int keeper_take(int channel, int tid, int fd, uint32_t user);
int keeper_take_socket(int channel, int tid, int fd, uint32_t user);
int keeper_send(int channel, int socket, uint32_t user, const int *files, int count, int more);
int keeper_close(int control, const int *files, int count);

#endif
