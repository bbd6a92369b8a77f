/* SPDX-License-Identifier: Apache-2.0
 *
 * A process that installs descriptors in clients: see injector.c. Rules of form: see uapi/binder.h.
 */
#ifndef BINDERFS_FUSE_HOST_INJECTOR_H
#define BINDERFS_FUSE_HOST_INJECTOR_H

#include <stddef.h>
#include <stdint.h>

/* What a task's system call will return once it is released. */
#define INJECTOR_KEEP 0    /* what was answered */
#define INJECTOR_RETURN 1  /* `result` */
#define INJECTOR_RESTART 2 /* nothing: it is made again, or ends with EINTR where a signal handler runs first */

#define INJECTOR_NUMBERS 32768 /* of descriptors, in one call */

/*
 * Each returns 0 (injector_start, injector_open: a descriptor) or a negative errno. -EPIPE: the injector is gone.
 *
 * injector_start    starts an injector, the program at `program`, which ends when the returned control socket is closed.
 *                   It gets a copy of `keeper`, the control socket of a keeper. Its process id is stored. `filters` is
 *                   the number of system call filters that clients have beyond the caller's, and that let pass what is
 *                   injected.
 * injector_open     opens a channel, for one task at a time. -EMFILE, -EAGAIN: there is no room for another.
 *
 * The following are for one task, in this order, over a channel of its own. After an error of injector_seize the channel
 * is good for another task. After -ESRCH, from any of them, it is of no more use. If the channel is closed, the injector
 * lets the task go.
 *
 * injector_seize    begins: see tracee_seize in ptrace.h. The task must be blocked in a request that nobody answers
 *                   before this returns.
 * injector_stopped  waits until the task has stopped, after the request has been answered.
 * injector_shut     closes `count` descriptors in the task. Numbers that are not open are passed over.
 * injector_install  installs `count` files of the keeper: see tracee_install. -E2BIG: more than INJECTOR_NUMBERS.
 * injector_store    writes to the memory of the task. -EFAULT.
 * injector_release  lets the task go on; `outcome` is INJECTOR_KEEP, INJECTOR_RETURN or INJECTOR_RESTART.
 */
int injector_start(const char *program, int keeper, int filters, int *pid);
int injector_open(int control);

int injector_seize(int channel, int tid);
int injector_stopped(int channel);
int injector_shut(int channel, const int *fds, int count);
int injector_install(int channel, uint32_t user, const int *files, int count, int above, int *numbers, int *sent);
int injector_store(int channel, uint64_t address, const void *data, size_t size);
int injector_release(int channel, int outcome, long result);

#endif
