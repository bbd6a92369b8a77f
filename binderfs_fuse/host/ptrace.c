/* SPDX-License-Identifier: Apache-2.0
 *
 * Puts descriptors into another task, and closes them there.
 *
 * No system call installs a descriptor in somebody else's table, so the task is made to do it. It sits in its ioctl,
 * which we are about to answer. PTRACE_SEIZE and PTRACE_INTERRUPT make sure that it stops on its way out, before any
 * code of its own; other threads of its process run on. There it is given registers that make it run the `syscall`
 * instruction it came in by once more, for each of
 *
 *     rt_sigprocmask (m);   its stack grows as far as it is going to be used
 *     socket () = a
 *     fcntl (F_DUPFD) = b;  the same socket, out of the way of the files; the keeper takes it with pidfd_getfd
 *     close (a);            the lowest free number is free again, for the first file
 *     recvmsg (b);          the kernel installs what the keeper sends there with SCM_RIGHTS
 *     close (b)
 *
 * and at last its own registers again. A transferred descriptor is never closed in the task to shift it: that would drop the process's record locks on the
 * file.
 *
 * Invariants:
 * - The task runs none of its own code between tracee_seize and tracee_release, and no signal handler: all signals that
 *   can be blocked are, by us. They stay pending and act after the release. SIGSTOP is passed on, and does not keep us
 *   from going on: the kernel stops the task again when it is released. SIGKILL wins at any point.
 * - Its memory is touched only below its stack's red zone, where a signal frame may land at any time, and restored. The
 *   footprint is small, since some run-times (Go) have small stacks.
 * - Its other threads can write to that memory meanwhile. What is read back is their own process's numbers, used for
 *   nothing but their own process.
 * - One stop is waited for at a time, of one task. Only tracee_stopped can take long: a task may fault on memory that
 *   its owner withholds.
 *
 * Should this process die in between, the kernel lets the task go as it stands: its ioctl then seems to have returned
 * what the last of our calls did, and the sockets stay. Its mount is dead by then as well.
 *
 * System calls are stepped over with PTRACE_SYSCALL: single steps would halve the stops, but raise SIGTRAP, and the
 * kernel resets a SIGTRAP that the task ignores.
 */
#define _GNU_SOURCE

#include "ptrace.h"

#include "keeper.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- machines ---- */

/* Each says which words of its general registers (NT_PRSTATUS) hold what, and how a system call is made. */

#if defined(__x86_64__) && defined(__LP64__)

enum { REGISTERS = 27, STACK = 19, PC = 16, NUMBER = 10, RESULT = 10, ORIGINAL_NUMBER = 15, RESULT_32 = 6 };
static const int arguments[] = {14, 13, 12, 7};          /* rdi, rsi, rdx, r10 */
static const unsigned char system_call[] = {0x0f, 0x05}; /* syscall */

#elif defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

enum { REGISTERS = 34, STACK = 31, PC = 32, NUMBER = 8, RESULT = 0, RESULT_32 = 0 };
static const int arguments[] = {0, 1, 2, 3};
static const unsigned char system_call[] = {0x01, 0, 0, 0xd4}; /* svc #0 */

#else /* tracee_seize refuses */

enum { REGISTERS = 0, STACK = 0, PC = 0, NUMBER = 0, RESULT = 0, RESULT_32 = 0 };
static const int arguments[4];
static const unsigned char system_call[1];

#endif

_Static_assert(REGISTERS <= MAX_REGISTERS, "struct tracee is too small");

static void set_call(uint64_t *registers, long number, const uint64_t values[4])
{
    int i;

#ifdef __x86_64__
    registers[ORIGINAL_NUMBER] = -1; /* not on its way out of a system call: the kernel must not restart one */
#endif
    registers[NUMBER] = number;
    for (i = 0; i < 4; i++)
        registers[arguments[i]] = values[i];
    registers[PC] -= sizeof system_call;
}

/* Keeps what the task's registers will not tell once it has stopped. */
static void before_stop(struct tracee *tracee)
{
#ifdef __x86_64__
    (void)tracee;
#else
    /* The result takes the place of the first argument, and no register set shows what that was. */
    char path[32];
    unsigned long long argument = 0;
    FILE *call;

    snprintf(path, sizeof path, "/proc/%d/syscall", tracee->tid);
    call = fopen(path, "re");
    if (call != NULL) {
        if (fscanf(call, "%*d %llx", &argument) != 1)
            argument = 0;
        fclose(call);
    }
    tracee->argument = argument;
#endif
}

static int is_32_bit(const struct tracee *tracee)
{
    return tracee->size != REGISTERS * sizeof *tracee->registers;
}

void tracee_return(struct tracee *tracee, long result)
{
    if (is_32_bit(tracee))
        tracee->registers_32[RESULT_32] = (uint32_t)result;
    else
        tracee->registers[RESULT] = result;
}

void tracee_restart(struct tracee *tracee)
{
#ifdef __x86_64__
    const int erestartnohand = 514; /* again, but EINTR if a signal handler runs first */

    tracee_return(tracee, -erestartnohand);
#else
    /* The kernel decides on restarts before it stops for us, so this one is ours, and no handler makes it EINTR. */
    const int pc_32 = 15, status_32 = 16, thumb = 1 << 5;

    tracee_return(tracee, (long)tracee->argument);
    if (is_32_bit(tracee))
        tracee->registers_32[pc_32] -= tracee->registers_32[status_32] & thumb ? 2 : 4;
    else
        tracee->registers[PC] -= sizeof system_call;
#endif
}

/* ---- stops ---- */

#define BOUNDARY (SIGTRAP | 0x80) /* PTRACE_O_TRACESYSGOOD */

static int lost(struct tracee *tracee)
{
    tracee->dead = 1;
    return -ESRCH;
}

/* Waits for the next stop; returns signal | event << 8, or -ESRCH. */
static int next_stop(struct tracee *tracee)
{
    siginfo_t info;
    int result;

    /* Without WEXITED a dead task is an error at once, even a leader that is not reaped before its last thread goes. */
    do
        result = waitid(P_PID, tracee->tid, &info, WSTOPPED | __WALL);
    while (result != 0 && errno == EINTR);
    return result == 0 ? info.si_status : lost(tracee);
}

/* Lets the task run to the beginning or end of its next system call; -EFAULT: it faulted on the way. */
static int run(struct tracee *tracee)
{
    int stop, signal = 0;

    for (;;) {
        if (ptrace(PTRACE_SYSCALL, tracee->tid, 0, (long)signal) != 0)
            return lost(tracee);
        stop = next_stop(tracee);
        if (stop < 0)
            return stop;
        if (stop == BOUNDARY)
            return 0;
        /* Stops with an event come of SIGSTOP and SIGCONT; of plain signals only SIGSTOP cannot be blocked. */
        signal = stop >> 8 == 0 ? stop : 0;
        if (signal != 0 && signal != SIGSTOP)
            return -EFAULT;
    }
}

static int get_registers(struct tracee *tracee, uint64_t *registers, size_t *size)
{
    struct iovec set = {registers, REGISTERS * sizeof *registers};

    if (ptrace(PTRACE_GETREGSET, tracee->tid, NT_PRSTATUS, &set) != 0)
        return lost(tracee);
    *size = set.iov_len;
    return 0;
}

static int set_registers(struct tracee *tracee, uint64_t *registers)
{
    struct iovec set = {registers, tracee->size};

    return ptrace(PTRACE_SETREGSET, tracee->tid, NT_PRSTATUS, &set) == 0 ? 0 : lost(tracee);
}

static int set_blocked(struct tracee *tracee, uint64_t mask)
{
    return ptrace(PTRACE_SETSIGMASK, tracee->tid, sizeof mask, &mask) == 0 ? 0 : lost(tracee);
}

/* Fails with -EOPNOTSUPP unless the task is a 64-bit one, and the instruction before its program counter the one that
 * system calls are made with. */
static int check_way_in(struct tracee *tracee)
{
    const uint64_t page = ~UINT64_C(4095);
    uint64_t at = tracee->registers[PC] - sizeof system_call;
    uint64_t from = at + sizeof system_call - sizeof(long);
    long word;

    if (is_32_bit(tracee))
        return -EOPNOTSUPP;
    /* A whole word is read, also where code may not be read otherwise; it must not begin on the page before. */
    if (from < (at & page))
        from = at & page;
    errno = 0;
    word = ptrace(PTRACE_PEEKTEXT, tracee->tid, from, 0);
    /* A task that is killed leaves its stop. */
    if (errno == ESRCH)
        return lost(tracee);
    return errno == 0 && memcmp((char *)&word + (at - from), system_call, sizeof system_call) == 0 ? 0 : -EOPNOTSUPP;
}

/* Makes the stopped task run one system call; returns the call's result, or -ESRCH or -EFAULT as run() does. */
static long inject(struct tracee *tracee, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    uint64_t registers[MAX_REGISTERS];
    size_t size;
    int error;

    memcpy(registers, tracee->registers, sizeof registers);
    set_call(registers, number, (uint64_t[]){a, b, c, d});
    error = set_registers(tracee, registers);
    if (error == 0)
        error = run(tracee);
    if (error == 0)
        error = run(tracee);
    if (error == 0)
        error = get_registers(tracee, registers, &size);
    return error == 0 ? (long)registers[RESULT] : error;
}

int tracee_seize(struct tracee *tracee, int tid)
{
    if (REGISTERS == 0)
        return -ENOSYS;
    tracee->tid = tid;
    tracee->dead = 0;
    before_stop(tracee);
    /* A system call filter is meant for the task's own calls. To suspend it takes CAP_SYS_ADMIN and a kernel option. */
    if (ptrace(PTRACE_SEIZE, tid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_SUSPEND_SECCOMP) != 0
        && ptrace(PTRACE_SEIZE, tid, 0, PTRACE_O_TRACESYSGOOD) != 0)
        return errno == ESRCH ? lost(tracee) : -errno;
    return ptrace(PTRACE_INTERRUPT, tid, 0, 0) == 0 ? 0 : lost(tracee);
}

int tracee_stopped(struct tracee *tracee)
{
    /* The kernel looks at our interrupt before it looks at signals, so this is the first stop, whatever is pending. */
    int error = next_stop(tracee);

    if (error < 0)
        return error;
    if (ptrace(PTRACE_GETSIGMASK, tracee->tid, sizeof tracee->blocked, &tracee->blocked) != 0)
        return lost(tracee);
    error = get_registers(tracee, tracee->registers, &tracee->size);
    if (error != 0)
        return error;
    error = check_way_in(tracee);
    if (error != 0)
        return error;
    return set_blocked(tracee, ~UINT64_C(0));
}

int tracee_release(struct tracee *tracee)
{
    int error = set_registers(tracee, tracee->registers);

    if (error == 0)
        error = set_blocked(tracee, tracee->blocked);
    if (error == 0 && ptrace(PTRACE_DETACH, tracee->tid, 0, 0) != 0)
        error = lost(tracee);
    return error;
}

/* ---- the transfer ---- */

#define RED_ZONE 128
#define BATCH KEEPER_BATCH

/* What lies below the task's red zone meanwhile. */
struct scratch {
    struct msghdr header;
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(BATCH * sizeof(int))];
    } control;
};

static uint64_t scratch_address(struct tracee *tracee)
{
    return (tracee->registers[STACK] - RED_ZONE - sizeof(struct scratch)) & ~UINT64_C(15);
}

static int peek(struct tracee *tracee, uint64_t address, void *data, size_t size)
{
    struct iovec here = {data, size}, there = {(void *)address, size};

    return process_vm_readv(tracee->tid, &here, 1, &there, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

static int poke(struct tracee *tracee, uint64_t address, const void *data, size_t size)
{
    struct iovec here = {(void *)data, size}, there = {(void *)address, size};

    return process_vm_writev(tracee->tid, &here, 1, &there, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

int tracee_close(struct tracee *tracee, const int *fds, int count)
{
    long result = 0;
    int i;

    for (i = 0; i < count && !tracee->dead && result != -EFAULT; i++)
        result = inject(tracee, SYS_close, fds[i], 0, 0, 0);
    return tracee->dead ? -ESRCH : result == -EFAULT ? -EFAULT : 0;
}

/* The task's RLIMIT_NOFILE, which we lift for what stands in its table only meanwhile. */
struct room {
    int made;
    int count; /* of the numbers that may be wanted beyond the limit */
    struct rlimit limit, raised;
};

static struct rlimit raise_limit(struct rlimit limit, int count)
{
    limit.rlim_cur += count;
    if (limit.rlim_max < limit.rlim_cur)
        limit.rlim_max = limit.rlim_cur;
    return limit;
}

/* Makes the task take a number for a descriptor, beyond its limit if need be and if we may. */
static long inject_with_room(struct tracee *tracee, struct room *room, long number, uint64_t a, uint64_t b, uint64_t c,
                             uint64_t d)
{
    long result = inject(tracee, number, a, b, c, d);
    struct rlimit before;

    /* F_DUPFD says EINVAL where even the first number asked for is beyond the limit. */
    if ((result != -EMFILE && result != -EINVAL) || room->made)
        return result;
    if (prlimit(tracee->tid, RLIMIT_NOFILE, NULL, &room->limit) != 0)
        return -EMFILE;
    room->raised = raise_limit(room->limit, room->count);
    if (prlimit(tracee->tid, RLIMIT_NOFILE, &room->raised, &before) != 0)
        return -EMFILE;
    room->made = 1;
    if (before.rlim_cur != room->limit.rlim_cur || before.rlim_max != room->limit.rlim_max) {
        /* Another thread of its process has set it in between. */
        room->limit = before;
        room->raised = raise_limit(before, room->count);
        prlimit(tracee->tid, RLIMIT_NOFILE, &room->raised, NULL);
    }
    return inject(tracee, number, a, b, c, d);
}

/* Lets the task's limit be what it was, as far as nobody has set it meanwhile. */
static void end_room(struct tracee *tracee, const struct room *room)
{
    struct rlimit limit;

    if (!room->made || prlimit(tracee->tid, RLIMIT_NOFILE, NULL, &limit) != 0)
        return;
    if (limit.rlim_max == room->raised.rlim_max)
        limit.rlim_max = room->limit.rlim_max;
    if (limit.rlim_cur == room->raised.rlim_cur)
        limit.rlim_cur = room->limit.rlim_cur;
    if (limit.rlim_cur > limit.rlim_max)
        limit.rlim_cur = limit.rlim_max;
    prlimit(tracee->tid, RLIMIT_NOFILE, &limit, NULL);
}

/* What a task is to get, and where from. */
struct delivery {
    int channel; /* to the keeper */
    int socket;  /* the task's, to the keeper; negative: none */
    const int *files;
    int count;
    int sent;
};

/* Has the keeper send the next batch of files. */
static int send_batch(struct tracee *tracee, struct delivery *delivery)
{
    int left = delivery->count - delivery->sent, batch = left < BATCH ? left : BATCH;
    int result = keeper_send(delivery->channel, delivery->socket, tracee->user, delivery->files + delivery->sent, batch, 1);

    /* They are given up, whatever came of it. */
    delivery->sent += batch;
    return result;
}

/*
 * Makes a socket in the task, which the keeper takes, and sends the first files into. It stays there as `receiver`, out
 * of the way of the files. A table that has room for just the files has it for the socket too. Returns 0 or a negative
 * errno, with nothing left in the task.
 */
static int open_channel(struct tracee *tracee, struct delivery *delivery, int *receiver)
{
    struct room room = {.count = delivery->count + 8};
    long first = inject_with_room(tracee, &room, SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, 0), result = first;

    if (first >= 0) {
        result = inject_with_room(tracee, &room, SYS_fcntl, first, F_DUPFD_CLOEXEC, first + delivery->count, 0);
        *receiver = (int)result;
        if (result >= 0)
            delivery->socket = (int)(result = keeper_take_socket(delivery->channel, tracee->tid, *receiver, tracee->user));
        inject(tracee, SYS_close, first, 0, 0, 0);
        if (result >= 0)
            result = send_batch(tracee, delivery);
        if (result < 0 && *receiver >= 0)
            inject(tracee, SYS_close, *receiver, 0, 0, 0);
    }
    end_room(tracee, &room);
    return result < 0 ? (int)result : 0;
}

/* Makes the task receive one message; returns how many files the kernel installed, their numbers in `numbers`. */
static int receive_files(struct tracee *tracee, uint64_t at, int receiver, int count, int *numbers)
{
    struct scratch scratch = {0};
    size_t received;
    int result;

    scratch.header.msg_control = (void *)(at + offsetof(struct scratch, control));
    scratch.header.msg_controllen = CMSG_LEN(count * sizeof(int));
    result = poke(tracee, at, &scratch, sizeof scratch);
    if (result == 0)
        result = (int)inject(tracee, SYS_recvmsg, receiver, at + offsetof(struct scratch, header),
                             MSG_CMSG_CLOEXEC | MSG_DONTWAIT, 0);
    if (result >= 0)
        result = peek(tracee, at, &scratch, sizeof scratch);
    if (result != 0)
        return result;
    if (scratch.header.msg_controllen < CMSG_LEN(sizeof(int)) || scratch.control.header.cmsg_len < CMSG_LEN(0))
        return 0;
    received = (scratch.control.header.cmsg_len - CMSG_LEN(0)) / sizeof(int);
    result = received < (size_t)count ? (int)received : count;
    memcpy(numbers, CMSG_DATA(&scratch.control.header), result * sizeof(int));
    return result;
}

int tracee_install(struct tracee *tracee, int channel, const int *files, int count, int *numbers, int *sent)
{
    struct delivery delivery = {.channel = channel, .socket = -1, .files = files, .count = count};
    uint64_t at = scratch_address(tracee);
    struct scratch saved;
    int receiver = -1, installed = 0, result;

    /* A stack that has yet to grow this far holds zeros there. */
    memset(&saved, 0, sizeof saved);
    peek(tracee, at, &saved, sizeof saved);
    /* Only a write of its own makes it grow: ours would fail. */
    result = (int)inject(tracee, SYS_rt_sigprocmask, SIG_SETMASK, 0, at, sizeof tracee->blocked);
    if (result == 0)
        result = open_channel(tracee, &delivery, &receiver);
    if (result == 0) {
        for (;;) {
            int batch = delivery.sent - installed;

            result = receive_files(tracee, at, receiver, batch, numbers + installed);
            if (result > 0)
                installed += result;
            if (result != batch || installed == count)
                break;
            result = send_batch(tracee, &delivery);
            if (result < 0)
                break;
        }
        inject(tracee, SYS_close, receiver, 0, 0, 0);
        if (installed < count) {
            tracee_close(tracee, numbers, installed);
            result = result < 0 ? result : -EMFILE;
        }
    }
    if (delivery.socket >= 0)
        keeper_send(channel, delivery.socket, tracee->user, NULL, 0, 0);
    *sent = delivery.sent;
    poke(tracee, at, &saved, sizeof saved);
    /* What failed may have failed because the task died. */
    if (tracee->dead || (result < 0 && set_registers(tracee, tracee->registers) != 0))
        return -ESRCH;
    return result < 0 ? result : 0;
}
