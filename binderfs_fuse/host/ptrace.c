/* SPDX-License-Identifier: Apache-2.0
 *
 * Puts descriptors into another task, and closes them there.
 *
 * Theory of operation
 * -------------------
 * No system call installs a descriptor in somebody else's table, so the task itself makes the calls. The task is blocked
 * in an ioctl that the server is about to answer. PTRACE_SEIZE and PTRACE_INTERRUPT make it stop on its way out, before
 * it runs code of its own. Other threads of its process run on. The stopped task is given registers that make it run
 * the `syscall` instruction it came in by once more, for each of
 *
 *     socket              a fresh socket, at the lowest free number
 *     fcntl (F_DUPFD)     moves it up, so that the files get the lowest numbers
 *     close               the lowest number is free again
 *     recvmsg             the kernel installs the files
 *     close               the socket goes
 *     prlimit             where the table is full, or the stack has yet to grow
 *
 * In between, the keeper takes the socket with pidfd_getfd, checks what it is, connects it to a socket of its own, and
 * sends the files into that. At last the task gets its own registers back. A transferred descriptor is never closed in
 * the task to shift it: that would drop the record locks of the process on the file.
 *
 * A task is in one of these states. Another thread of its process may at any time end it (SIGKILL, exit_group), execute
 * another program, change its memory, change its descriptors, or send it signals.
 *
 *     PINNED      blocked in its ioctl. Its thread id cannot name another task.
 *                 The task is seized here, and everything that goes by number happens here.
 *     LEAVING     the request has been answered, our interrupt is pending.
 *                 -> STOPPED, or -> GONE.
 *     STOPPED     stopped by us. Nobody else can make it run.
 *                 -> ENTERING by inject(); -> released by tracee_release(); -> GONE.
 *     ENTERING    it is to run one instruction of the client's memory, but another thread may have changed that.
 *                 -> CALLING, if it stops at the entry of our call with our number and arguments.
 *                 -> OUT OF STEP, if it stops at the entry of any other call, which is then made none, or at a signal.
 *                 It may also run code of the client's for as long as that likes. It makes no system call meanwhile, for
 *                 each of them stops it. It can be killed.
 *     CALLING     the kernel carries out our call.
 *                 -> STOPPED, at the exit of the call; -> GONE.
 *     OUT OF STEP stopped, but nothing is injected any more: the task gets its registers back.
 *     GONE        it died. Its thread id may already name another program: execve() by any thread gives the id of the
 *                 leader to the new image, although the leader is traced.
 *
 * Invariants
 * ----------
 * - After PINNED nothing goes by thread id but ptrace() and waitid(). Both find a task only while this very thread
 *   traces it, so they cannot reach a new image. Memory is read and written by PTRACE_PEEKDATA and PTRACE_POKEDATA, and
 *   limits are changed by calls of the task's own. The keeper takes one socket by number: what it took counts only if
 *   the task is found stopped afterwards, for then the number was still the task's.
 * - The kernel carries out no call but the one that was injected. Each entry is checked against number, arguments,
 *   instruction pointer and architecture.
 * - No result is believed beyond what it can mean. What is read back from memory is the client's word, and is used for
 *   nothing but the client's own process.
 * - No signal handler runs between tracee_seize and tracee_release: all signals are blocked that can be. They stay
 *   pending and act after the release. SIGSTOP is passed on, and does not keep us from going on: the kernel stops the
 *   task again when it is released. SIGKILL wins at any point.
 * - Where the filter cannot be suspended, nothing is injected into a task whose filter may object. SIGSYS is then left
 *   unblocked: the kernel resets a handler when it forces a blocked signal.
 * - Memory is touched only below the stack's red zone, where a signal frame may land at any time, and restored. The
 *   footprint is small, since some run-times (Go) have small stacks.
 * - One stop is waited for at a time, of one task.
 *
 * Should this process die in between, the kernel lets the task go as it stands: its ioctl then seems to have returned
 * what the last of our calls did, and the socket stays.
 *
 * System calls are stepped over with PTRACE_SYSCALL. Single steps would halve the stops, but raise SIGTRAP, and the
 * kernel resets a SIGTRAP that the task ignores.
 */
#define _GNU_SOURCE

#include "ptrace.h"

#include "keeper.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- machines ---- */

/* Each says which words of its general registers (NT_PRSTATUS) hold what, and how a system call is made. */

#if defined(__x86_64__) && defined(__LP64__)

enum { REGISTERS = 27, STACK = 19, PC = 16, NUMBER = 10, RESULT = 10, ORIGINAL_NUMBER = 15, RESULT_32 = 6 };
static const int arguments[] = {14, 13, 12, 7};          /* rdi, rsi, rdx, r10 */
static const unsigned char system_call[] = {0x0f, 0x05}; /* syscall */
static const uint32_t architecture = 0xC000003E;         /* AUDIT_ARCH_X86_64 */

#elif defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

enum { REGISTERS = 34, STACK = 31, PC = 32, NUMBER = 8, RESULT = 0, RESULT_32 = 0 };
static const int arguments[] = {0, 1, 2, 3};
static const unsigned char system_call[] = {0x01, 0, 0, 0xd4}; /* svc #0 */
static const uint32_t architecture = 0xC00000B7;               /* AUDIT_ARCH_AARCH64 */

#else /* tracee_seize refuses */

enum { REGISTERS = 0, STACK = 0, PC = 0, NUMBER = 0, RESULT = 0, RESULT_32 = 0 };
static const int arguments[4];
static const unsigned char system_call[1];
static const uint32_t architecture;

#endif

_Static_assert(REGISTERS <= MAX_REGISTERS, "struct tracee is too small");

#define NONE (-1) /* the number of a system call that the kernel skips */

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

static int out_of_step(struct tracee *tracee)
{
    tracee->out_of_step = 1;
    return -EPROTO;
}

/* Waits for the next stop; returns signal | event << 8, or -ESRCH. */
static int next_stop(struct tracee *tracee)
{
    siginfo_t info;
    int result;

    /* Without WEXITED a dead task is an error at once, even a leader that is not reaped before its last thread goes.
     * With __WNOTHREAD a stop of another thread's tracee, whose id this may be by now, is not taken for ours. */
    do
        result = waitid(P_PID, tracee->tid, &info, WSTOPPED | __WALL | __WNOTHREAD);
    while (result != 0 && errno == EINTR);
    return result == 0 ? info.si_status : lost(tracee);
}

/* Lets the task run to its next stop at a system call, or at a signal that is not SIGSTOP; returns the stop. */
static int run(struct tracee *tracee)
{
    int stop, signal = 0;

    for (;;) {
        if (ptrace(PTRACE_SYSCALL, tracee->tid, 0, (long)signal) != 0)
            return lost(tracee);
        stop = next_stop(tracee);
        if (stop < 0 || stop == BOUNDARY)
            return stop;
        /* Stops with an event come of SIGSTOP and SIGCONT; of plain signals only SIGSTOP cannot be blocked. */
        signal = stop >> 8 == 0 ? stop : 0;
        if (signal != 0 && signal != SIGSTOP)
            return signal;
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

/* Tells whether the task is stopped, and so not replaced by another of its number; 0 or -ESRCH. */
static int still_there(struct tracee *tracee)
{
    uint64_t mask;

    return ptrace(PTRACE_GETSIGMASK, tracee->tid, sizeof mask, &mask) == 0 ? 0 : lost(tracee);
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

/* ---- one injected call ---- */

/* What PTRACE_GET_SYSCALL_INFO gives (Linux 5.3), under a name that no version of the headers uses. */
struct call_info {
    uint8_t operation;
    uint8_t padding[3];
    uint32_t architecture;
    uint64_t instruction_pointer;
    uint64_t stack_pointer;
    uint64_t number;
    uint64_t arguments[6];
};

enum { ENTRY = 1, EXIT = 2 };
static const enum __ptrace_request get_call_info = 0x420e;

/* Tells what the stop at a system call is: ENTRY, EXIT, or something else. */
static int stopped_at(struct tracee *tracee, struct call_info *info)
{
    memset(info, 0, sizeof *info);
    return ptrace(get_call_info, tracee->tid, sizeof *info, info) < 0 ? 0 : info->operation;
}

/* Tells whether the task enters the call that was injected, as it was injected. */
static int is_ours(struct tracee *tracee, long number, const uint64_t values[4])
{
    struct call_info info;

    return stopped_at(tracee, &info) == ENTRY && info.architecture == architecture
           && info.instruction_pointer == tracee->registers[PC] && info.number == (uint64_t)number
           && memcmp(info.arguments, values, 4 * sizeof *values) == 0;
}

/* Has the kernel skip the call that the task is entering, and waits for its end. */
static void make_none(struct tracee *tracee)
{
    uint64_t registers[MAX_REGISTERS];
    size_t size;

    /* A 32-bit way in shows a 64-bit task's registers all the same. */
    if (get_registers(tracee, registers, &size) != 0)
        return;
#ifdef __x86_64__
    registers[ORIGINAL_NUMBER] = NONE;
    if (set_registers(tracee, registers) != 0)
        return;
#else
    int none = NONE;
    struct iovec set = {&none, sizeof none};
    const int nt_arm_system_call = 0x404;

    if (ptrace(PTRACE_SETREGSET, tracee->tid, nt_arm_system_call, &set) != 0) {
        lost(tracee);
        return;
    }
#endif
    run(tracee);
}

/* Tells whether the filter has made the task a SIGSYS for the call that just ended; if so the signal is taken away. */
static int was_trapped(struct tracee *tracee)
{
    struct __ptrace_peeksiginfo_args from = {0, 0, 1};
    const int by_filter = 1; /* SYS_SECCOMP */
    siginfo_t info;

    for (; ptrace(PTRACE_PEEKSIGINFO, tracee->tid, &from, &info) == 1; from.off++)
        if (info.si_signo == SIGSYS && info.si_code == by_filter)
            return set_registers(tracee, tracee->registers) == 0 && run(tracee) == SIGSYS;
    return 0;
}

/*
 * Makes the stopped task run one system call. Returns the result of the call, which is a negative errno where it failed;
 * or -ESRCH; or -EPROTO where the task did something else; or -EACCES where its filter refused the call.
 */
static long inject(struct tracee *tracee, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    const uint64_t values[4] = {a, b, c, d};
    uint64_t registers[MAX_REGISTERS];
    struct call_info info;
    size_t size;
    int stop;

    if (tracee->dead || tracee->out_of_step)
        return tracee->dead ? -ESRCH : -EPROTO;
    memcpy(registers, tracee->registers, sizeof registers);
    set_call(registers, number, values);
    if (set_registers(tracee, registers) != 0)
        return -ESRCH;
    stop = run(tracee);
    if (stop < 0)
        return stop;
    if (stop != BOUNDARY)
        return out_of_step(tracee);
    if (!is_ours(tracee, number, values)) {
        make_none(tracee);
        return tracee->dead ? -ESRCH : out_of_step(tracee);
    }
    stop = run(tracee);
    if (stop < 0)
        return stop;
    if (stop != BOUNDARY || stopped_at(tracee, &info) != EXIT)
        return out_of_step(tracee);
    if (get_registers(tracee, registers, &size) != 0)
        return -ESRCH;
    if (!tracee->suspended && was_trapped(tracee)) {
        out_of_step(tracee);
        return tracee->dead ? -ESRCH : -EACCES;
    }
    return (long)registers[RESULT];
}

/* ---- system call filters ---- */

static int can_suspend, passes_own, known_filters;
static char own_namespace[64];

/* Returns a number out of /proc/TID/status (of this process: 0), or -1. */
static int status_number(int tid, const char *field)
{
    char path[32], line[256];
    size_t length = strlen(field);
    int number = -1;
    FILE *status;

    snprintf(path, sizeof path, tid ? "/proc/%d/status" : "/proc/self/status", tid);
    status = fopen(path, "re");
    if (status == NULL)
        return -1;
    /* A task chooses its name, in which the kernel escapes newlines, so a line begins with a name of the kernel's. */
    while (fgets(line, sizeof line, status) != NULL)
        if (strncmp(line, field, length) == 0 && sscanf(line + length, ":%d", &number) == 1)
            break;
    fclose(status);
    return number;
}

static void pid_namespace(int tid, char *name, size_t size)
{
    char path[48];
    ssize_t length;

    snprintf(path, sizeof path, tid ? "/proc/%d/ns/pid" : "/proc/self/ns/pid", tid);
    length = readlink(path, name, size - 1);
    name[length > 0 ? length : 0] = '\0';
}

/* Makes the calls that are injected, to see what this process's own filter says to them. */
static int make_the_calls(void)
{
    struct msghdr message = {0};
    struct rlimit limit;
    int first = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    int second = fcntl(first, F_DUPFD_CLOEXEC, first + 1);

    if (first < 0 || second < 0 || close(first) != 0)
        return 0;
    if (prlimit(0, RLIMIT_NOFILE, NULL, &limit) != 0 || prlimit(0, RLIMIT_NOFILE, &limit, NULL) != 0)
        return 0;
    return recvmsg(second, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) < 0 && errno == ENOTCONN && close(second) == 0;
}

void tracee_prepare(int filters)
{
    int child, status, own = status_number(0, "Seccomp_filters");

    pid_namespace(0, own_namespace, sizeof own_namespace);
    known_filters = own < 0 ? 0 : own + filters;
    child = fork();
    if (child == 0)
        _exit(make_the_calls() ? 0 : 1);
    passes_own = child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    /* To suspend a filter takes CAP_SYS_ADMIN in the first user namespace, a kernel option, and having none oneself. */
    can_suspend = child > 0 && ptrace(PTRACE_SEIZE, child, 0, PTRACE_O_SUSPEND_SECCOMP) == 0;
    if (child > 0) {
        kill(child, SIGKILL);
        waitpid(child, &status, __WALL);
    }
}

/*
 * Tells whether a pinned task has a filter that may object to what is injected. That is so unless its filters are none
 * but those that this process has itself, and those that are known: a task inherits filters, and can only add to them.
 */
static int may_object(int tid)
{
    char name[sizeof own_namespace];
    int count;

    if (can_suspend || status_number(tid, "Seccomp") == 0)
        return 0;
    count = status_number(tid, "Seccomp_filters");
    pid_namespace(tid, name, sizeof name);
    return !(passes_own && status_number(tid, "Seccomp") == 2 && count >= 0 && count <= known_filters
             && name[0] != '\0' && strcmp(name, own_namespace) == 0);
}

/* ---- beginning and end ---- */

int tracee_seize(struct tracee *tracee, int tid)
{
    int options = PTRACE_O_TRACESYSGOOD | (can_suspend ? PTRACE_O_SUSPEND_SECCOMP : 0);

    if (REGISTERS == 0)
        return -ENOSYS;
    memset(tracee, 0, sizeof *tracee);
    tracee->tid = tid;
    tracee->suspended = can_suspend;
    if (may_object(tid))
        return -EACCES;
    before_stop(tracee);
    if (ptrace(PTRACE_SEIZE, tid, 0, (long)options) != 0)
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
    return set_blocked(tracee, tracee->suspended ? ~UINT64_C(0) : ~(UINT64_C(1) << (SIGSYS - 1)));
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

/* ---- memory ---- */

#define WORD sizeof(long)

static int peek_word(struct tracee *tracee, uint64_t address, long *word)
{
    errno = 0;
    *word = ptrace(PTRACE_PEEKDATA, tracee->tid, address, 0);
    if (errno == 0)
        return 0;
    return errno == ESRCH ? lost(tracee) : -EFAULT;
}

static int peek(struct tracee *tracee, uint64_t address, void *data, size_t size)
{
    size_t done;

    for (done = 0; done < size; done += WORD) {
        long word;
        int error = peek_word(tracee, address + done, &word);

        if (error != 0)
            return error;
        memcpy((char *)data + done, &word, size - done < WORD ? size - done : WORD);
    }
    return 0;
}

int tracee_store(struct tracee *tracee, uint64_t address, const void *data, size_t size)
{
    const char *from = data;

    while (size > 0) {
        uint64_t at = address & ~(uint64_t)(WORD - 1);
        size_t skipped = address - at, part = WORD - skipped < size ? WORD - skipped : size;
        long word = 0;
        int error = part == WORD ? 0 : peek_word(tracee, at, &word);

        if (error != 0)
            return error;
        memcpy((char *)&word + skipped, from, part);
        if (ptrace(PTRACE_POKEDATA, tracee->tid, at, word) != 0)
            return errno == ESRCH ? lost(tracee) : -EFAULT;
        address += part;
        from += part;
        size -= part;
    }
    return 0;
}

/* ---- the transfer ---- */

#define RED_ZONE 128
#define BATCH KEEPER_BATCH
#define MORE_ROOM 8 /* numbers beyond those of the files, while the limit is raised */

/* What lies below the task's red zone meanwhile. */
union scratch {
    struct {
        struct msghdr header;
        union {
            struct cmsghdr header;
            char bytes[CMSG_SPACE(BATCH * sizeof(int))];
        } control;
    } message;
    struct {
        uint64_t soft, hard;
    } limit;
};

static uint64_t scratch_address(struct tracee *tracee)
{
    return (tracee->registers[STACK] - RED_ZONE - sizeof(union scratch)) & ~UINT64_C(15);
}

int tracee_close(struct tracee *tracee, const int *fds, int count)
{
    int i;

    for (i = 0; i < count && !tracee->dead && !tracee->out_of_step; i++)
        inject(tracee, SYS_close, (uint64_t)fds[i], 0, 0, 0);
    return tracee->dead ? -ESRCH : tracee->out_of_step ? -EPROTO : 0;
}

/* The task's soft RLIMIT_NOFILE, which the task raises for the socket that stands in its table only meanwhile. Its hard
 * limit stays, so this gives the task nothing that it could not take. */
struct room {
    int raised;
    uint64_t before, meanwhile;
};

static int get_limit(struct tracee *tracee, uint64_t at, union scratch *scratch)
{
    long result = inject(tracee, SYS_prlimit64, 0, RLIMIT_NOFILE, 0, at);

    return result != 0 ? (int)result : peek(tracee, at, &scratch->limit, sizeof scratch->limit);
}

static int set_limit(struct tracee *tracee, uint64_t at, union scratch *scratch)
{
    int error = tracee_store(tracee, at, &scratch->limit, sizeof scratch->limit);

    return error != 0 ? error : (int)inject(tracee, SYS_prlimit64, 0, RLIMIT_NOFILE, at, 0);
}

static int make_room(struct tracee *tracee, uint64_t at, struct room *room, uint64_t wanted)
{
    union scratch scratch;
    int error = get_limit(tracee, at, &scratch);

    if (error != 0)
        return error;
    if (scratch.limit.soft >= scratch.limit.hard)
        return -EMFILE;
    room->before = scratch.limit.soft;
    if (wanted < scratch.limit.soft)
        wanted = scratch.limit.soft;
    scratch.limit.soft = wanted + MORE_ROOM < scratch.limit.hard ? wanted + MORE_ROOM : scratch.limit.hard;
    room->meanwhile = scratch.limit.soft;
    error = set_limit(tracee, at, &scratch);
    room->raised = error == 0;
    return error == -EPERM ? -EMFILE : error;
}

/* Has the task set its limit back, unless another thread has set it meanwhile. */
static void end_room(struct tracee *tracee, uint64_t at, const struct room *room)
{
    union scratch scratch;

    if (room->raised && get_limit(tracee, at, &scratch) == 0 && scratch.limit.soft == room->meanwhile) {
        scratch.limit.soft = room->before;
        set_limit(tracee, at, &scratch);
    }
}

/* Makes the task take a number for a descriptor, beyond its soft limit if need be. */
static long inject_with_room(struct tracee *tracee, uint64_t at, struct room *room, uint64_t wanted, long number,
                             uint64_t a, uint64_t b, uint64_t c)
{
    long result = inject(tracee, number, a, b, c, 0);
    int error;

    /* F_DUPFD says EINVAL where even the first number asked for is beyond the limit. */
    if ((result != -EMFILE && result != -EINVAL) || room->raised)
        return result;
    error = make_room(tracee, at, room, wanted);
    return error != 0 ? error : inject(tracee, number, a, b, c, 0);
}

/*
 * Makes a socket in the task, out of the way of the files: at `above` or higher. A table that has room for just the
 * files has it for the socket too. Returns its number, or a negative errno, with nothing left in the task.
 */
static int open_receiver(struct tracee *tracee, uint64_t at, struct room *room, int above)
{
    long lowest, receiver;

    lowest = inject_with_room(tracee, at, room, above, SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    receiver = lowest;
    if (lowest >= 0) {
        uint64_t from = lowest >= above ? (uint64_t)lowest + 1 : (uint64_t)above;

        receiver = inject_with_room(tracee, at, room, from + 1, SYS_fcntl, (uint64_t)lowest, F_DUPFD_CLOEXEC, from);
        inject(tracee, SYS_close, (uint64_t)lowest, 0, 0, 0);
    }
    if (tracee->dead || tracee->out_of_step)
        return tracee->dead ? -ESRCH : receiver == -EACCES ? -EACCES : -EPROTO;
    /* No kernel has numbers beyond these. */
    return receiver <= INT_MAX ? (int)receiver : -EPROTO;
}

/* Makes the stack of the task grow as far as the scratch memory, if it has not yet. */
static int reach_scratch(struct tracee *tracee, uint64_t at, union scratch *saved)
{
    int error = peek(tracee, at, saved, sizeof *saved);

    if (error != -EFAULT)
        return error;
    /* The task's own write makes it grow. What has yet to grow holds zeros. */
    memset(saved, 0, sizeof *saved);
    return (int)inject(tracee, SYS_prlimit64, 0, RLIMIT_NOFILE, 0, at);
}

/* Makes the task receive one message; returns how many files the kernel installed, their numbers in `numbers`. */
static int receive_files(struct tracee *tracee, uint64_t at, int receiver, int count, int *numbers)
{
    const size_t header_size = CMSG_LEN(0);
    union scratch scratch;
    size_t received, i;
    long result;

    memset(&scratch.message.header, 0, sizeof scratch.message.header);
    scratch.message.header.msg_control = (void *)(at + offsetof(union scratch, message.control));
    scratch.message.header.msg_controllen = CMSG_LEN(count * sizeof(int));
    result = tracee_store(tracee, at, &scratch.message.header, sizeof scratch.message.header);
    if (result == 0)
        result = inject(tracee, SYS_recvmsg, (uint64_t)receiver, at, MSG_CMSG_CLOEXEC | MSG_DONTWAIT, 0);
    /* No byte is asked for. */
    if (result == 0)
        result = peek(tracee, at, &scratch, sizeof scratch.message.header + CMSG_SPACE(count * sizeof(int)));
    if (result != 0)
        return result < 0 ? (int)result : -EPROTO;
    if (scratch.message.header.msg_controllen < header_size)
        return 0;
    if (scratch.message.control.header.cmsg_level != SOL_SOCKET
        || scratch.message.control.header.cmsg_type != SCM_RIGHTS
        || scratch.message.control.header.cmsg_len < header_size)
        return -EPROTO;
    received = (scratch.message.control.header.cmsg_len - header_size) / sizeof(int);
    if (received > (size_t)count)
        return -EPROTO;
    memcpy(numbers, CMSG_DATA(&scratch.message.control.header), received * sizeof(int));
    for (i = 0; i < received; i++)
        if (numbers[i] < 0)
            return -EPROTO;
    return (int)received;
}

/* Has the keeper send all files, batch by batch, and the task receive them; returns how many are installed, or an error
 * if fewer are than `count`. */
static int pass_files(struct tracee *tracee, uint64_t at, const struct room *room, int receiver, int channel,
                      uint32_t user, const int *files, int count, int *numbers, int *sent)
{
    int socket = keeper_take_socket(channel, tracee->tid, receiver, user), installed = 0, result;

    /* The files have to do with the limit that the process has set itself. */
    end_room(tracee, at, room);
    if (socket < 0)
        return still_there(tracee) != 0 ? -ESRCH : socket == -EPIPE || socket == -EMFILE ? socket : -EPROTO;
    /* Only now is it known that the number was the task's, and not one of a program that was executed meanwhile. */
    result = still_there(tracee);
    while (result >= 0 && installed < count) {
        int left = count - *sent, batch = left < BATCH ? left : BATCH;

        result = keeper_send(channel, socket, user, files + *sent, batch, 1);
        *sent += batch;
        if (result < 0)
            break;
        result = receive_files(tracee, at, receiver, batch, numbers + installed);
        if (result > 0)
            installed += result;
        if (result != batch)
            break;
    }
    /* What the task has not received must not stay in the socket. */
    keeper_send(channel, socket, user, NULL, 0, 0);
    if (installed == count)
        return count;
    tracee_close(tracee, numbers, installed);
    return tracee->dead ? -ESRCH : result < 0 ? result : -EMFILE;
}

int tracee_install(struct tracee *tracee, int channel, uint32_t user, const int *files, int count, int above,
                   int *numbers, int *sent)
{
    uint64_t at = scratch_address(tracee);
    struct room room = {0};
    union scratch saved;
    int receiver, result;

    *sent = 0;
    result = reach_scratch(tracee, at, &saved);
    if (result == 0) {
        receiver = open_receiver(tracee, at, &room, above);
        result = receiver;
        if (receiver < 0)
            end_room(tracee, at, &room);
        if (receiver >= 0) {
            result = pass_files(tracee, at, &room, receiver, channel, user, files, count, numbers, sent);
            inject(tracee, SYS_close, (uint64_t)receiver, 0, 0, 0);
        }
        if (!tracee->dead)
            tracee_store(tracee, at, &saved, sizeof saved);
    }
    if (tracee->dead || still_there(tracee) != 0)
        return -ESRCH;
    return result < 0 ? result : 0;
}
