/* SPDX-License-Identifier: Apache-2.0
 *
 * Work in another task's descriptor table, done by that task itself: see ptrace.c. Rules of form: see uapi/binder.h.
 */
#ifndef BINDERFS_FUSE_HOST_PTRACE_H
#define BINDERFS_FUSE_HOST_PTRACE_H

#include <stddef.h>
#include <stdint.h>

#define MAX_REGISTERS 34

/* A task that the calling thread traces. All functions belong to the thread that seized. */
struct tracee {
    int tid;
    uint32_t user;     /* whom what is taken from it is accounted to; set by who seizes */
    int dead;          /* it died or vanished: nothing more can be done, and nothing is left to undo in it */
    uint64_t blocked;  /* its signal mask */
    uint64_t argument; /* the first argument of its system call, where its registers no longer tell */
    size_t size;       /* of the registers that it will go on with, in bytes */
    union {
        uint64_t registers[MAX_REGISTERS];
        uint32_t registers_32[MAX_REGISTERS];
    };
};

/*
 * Each returns 0 or a negative errno; -ESRCH: the task is gone.
 *
 * tracee_seize   begins: whatever ends the task's system call from now on, it stops before it runs its own code again.
 *                -EPERM: traced by another, or no right to; -ENOSYS: this machine's registers are unknown here.
 *                The thread may end instead of releasing: the kernel then detaches.
 * tracee_stopped waits for that stop and readies the task for what follows. -EOPNOTSUPP: a 32-bit task, or one whose
 *                system call was made in a way unknown here.
 * tracee_close   closes `count` descriptors in the stopped task; those that are not open are passed over.
 * tracee_install installs `count` files of the keeper in the stopped task, close-on-exec, at the lowest numbers that are
 *                free, which it stores in `numbers`; `channel` is to be this call's alone. After an error none is
 *                installed. The first `sent` of the files are given up, whatever came of it. -EMFILE: too few numbers
 *                are free, or the keeper's limits (keeper.h); -EFAULT: no stack; -EPIPE: no keeper; others as
 *                socketpair(2), recvmsg(2) or a system call filter give them.
 * tracee_release lets the task go on, its registers and signal mask as they were.
 */
int tracee_seize(struct tracee *tracee, int tid);
int tracee_stopped(struct tracee *tracee);
int tracee_close(struct tracee *tracee, const int *fds, int count);
int tracee_install(struct tracee *tracee, int channel, const int *files, int count, int *numbers, int *sent);
int tracee_release(struct tracee *tracee);

/* Before tracee_release: the result that the interrupted system call will have, or that it will be made again. */
void tracee_return(struct tracee *tracee, long result);
void tracee_restart(struct tracee *tracee);

#endif
