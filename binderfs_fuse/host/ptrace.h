/* SPDX-License-Identifier: Apache-2.0
 *
 * Work in another task's descriptor table, done by that task itself: see ptrace.c.
 */
#ifndef BINDERFS_FUSE_HOST_PTRACE_H
#define BINDERFS_FUSE_HOST_PTRACE_H

#include <stddef.h>
#include <stdint.h>

#define MAX_REGISTERS 34

/* A task that the calling thread traces. All functions belong to the thread that seized. */
struct tracee {
    int tid;
    int suspended;     /* its system call filter is suspended while we trace it */
    int dead;          /* it died or vanished: nothing more can be done, and nothing is left to undo in it */
    int out_of_step;   /* it did something other than our call: nothing more is injected */
    uint64_t blocked;  /* its signal mask */
    uint64_t argument; /* the first argument of its system call, where its registers no longer tell */
    size_t size;       /* of the registers that it will go on with, in bytes */
    union {
        uint64_t registers[MAX_REGISTERS];
        uint32_t registers_32[MAX_REGISTERS];
    };
};

/*
 * Each returns 0 or a negative errno. -ESRCH: the task is gone.
 *
 * tracee_prepare finds out once, before any thread starts, whether this process can suspend a task's filter, and
 *                whether the calls that are injected pass its own filter. `filters` is the number of further filters
 *                that are known to let these calls pass.
 * tracee_seize   begins. The task must be blocked in a system call that nobody has answered yet. It stops before it
 *                runs code of its own again.
 *                -EPERM: traced by another, or no right to trace it. -ENOSYS: the registers of this machine are
 *                unknown here. -EACCES: its filter may object to the calls, and cannot be suspended.
 *                The thread may end instead of releasing: the kernel then detaches.
 * tracee_stopped waits for that stop, and readies the task for what follows. -EOPNOTSUPP: a 32-bit task, or one that
 *                made its system call in a way unknown here.
 * tracee_close   closes `count` descriptors in the stopped task. Numbers that are not open are passed over.
 * tracee_install installs `count` files of the keeper in the stopped task, close-on-exec, at the lowest free numbers,
 *                which it stores in `numbers`. All of these are below `above`, if that is known, else 0. `channel` leads to the keeper and is this call's alone. After an error
 *                none is installed. The keeper has given up the first `sent` of the files, whatever came of it.
 *                -EMFILE: too few numbers are free, or a limit of keeper.h. -EFAULT: no stack. -EPIPE: no keeper.
 *                -EPROTO: the task did something other than the call that was injected.
 * tracee_store   writes to the stopped task's memory.
 * tracee_release lets the task go on, its registers and signal mask as they were.
 */
void tracee_prepare(int filters);
int tracee_seize(struct tracee *tracee, int tid);
int tracee_stopped(struct tracee *tracee);
int tracee_close(struct tracee *tracee, const int *fds, int count);
int tracee_install(struct tracee *tracee, int channel, uint32_t user, const int *files, int count, int above,
                   int *numbers, int *sent);
int tracee_store(struct tracee *tracee, uint64_t address, const void *data, size_t size);
int tracee_release(struct tracee *tracee);

/* Before tracee_release: the result that the interrupted system call will have, or that it will be made again. */
void tracee_return(struct tracee *tracee, long result);
void tracee_restart(struct tracee *tracee);

#endif
