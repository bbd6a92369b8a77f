/* SPDX-License-Identifier: Apache-2.0
 *
 * A process that keeps the open files of clients, and closes them: see keeper.c. Rules of form: see uapi/binder.h.
 */
#ifndef BINDERFS_FUSE_HOST_KEEPER_H
#define BINDERFS_FUSE_HOST_KEEPER_H

#include <stddef.h>
#include <stdint.h>

#define KEEPER_CLOSERS 128       /* threads that may be in close() at a time */
#define KEEPER_USER_CLOSERS 4    /* those with files of one user */
#define KEEPER_USER_UNCLOSED 256 /* of one user that may wait, with none closed for a second, before it gets EMFILE */
#define KEEPER_FILES 65536       /* descriptors, where the limit of the process allows as many */

#define KEEPER_BATCH 32          /* files of one keeper_send; SCM_MAX_FD is 253, but the receiver's stack may be small */

/*
 * Each returns 0 (keeper_start, keeper_open: a descriptor; keeper_take: a file) or a negative errno. -EPIPE: there is
 * no keeper any more.
 *
 * keeper_start   starts a keeper, which ends when the returned control socket is closed; its process id is stored. The
 *                `size` bytes at `filter` are a filter of system calls for it, in classic BPF; none if 0.
 * keeper_open    opens a channel, for one call at a time. -EMFILE, -EAGAIN: there is no room for another.
 * keeper_take    takes a reference to what `fd` is to task `tid`, and returns its number in the keeper; `user` is whom
 *                it is accounted to. -EBADF also for an O_PATH descriptor; -EPERM; -EMFILE, also where the user has too
 *                many files; -ESRCH: the task is gone.
 * keeper_send    sends files into the socket that `fd` is to task `tid`, and gives them up, whatever comes of it. If
 *                there will be `more` it returns the socket, to be used instead (a `socket` of -1 stands for none yet).
 *                -ENOTSOCK: it is not a socket of the kind that one is sent by.
 * keeper_close   gives files up. Waits for nothing that a client can delay.
 */
int keeper_start(const void *filter, size_t size, int *pid);
int keeper_open(int control);
int keeper_take(int channel, int tid, int fd, uint32_t user);
int keeper_send(int channel, int tid, int fd, int socket, uint32_t user, const int *files, int count, int more);
int keeper_close(int control, const int *files, int count);

#endif
