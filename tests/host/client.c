/* A client that waits in an ioctl, over and over, and checks what it finds on the way out: see main(). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PARK _IOWR('t', 1, uint64_t)

static void say(const char *format, ...)
{
    char line[200];
    va_list list;
    int length;

    va_start(list, format);
    length = vsnprintf(line, sizeof line, format, list);
    va_end(list);
    if (write(1, line, length) != length)
        _exit(2);
}

/* ---- one system call, with every register and the red zone under watch ---- */

#ifdef __x86_64__

enum { WATCHED = 12, VECTORS = 16, RED_ZONE = 16 };
uint64_t before[WATCHED + VECTORS], after[WATCHED + VECTORS], red_zone[RED_ZONE];
uint64_t call_number, call_stack, own_stack;

/* Makes system call `call_number` on stack `call_stack`, or on its own if that is 0: then its red zone is in use. */
long watched_call(void);
__asm__(".text\n.globl watched_call\nwatched_call:\n"
        "push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, own_stack(%rip)\n"
        "lea before(%rip), %rax\n"
        "mov 0(%rax), %rdi\n mov 8(%rax), %rsi\n mov 16(%rax), %rdx\n mov 24(%rax), %r10\n mov 32(%rax), %r8\n"
        "mov 40(%rax), %r9\n mov 48(%rax), %rbx\n mov 56(%rax), %rbp\n mov 64(%rax), %r12\n mov 72(%rax), %r13\n"
        "mov 80(%rax), %r14\n mov 88(%rax), %r15\n"
        "movq 96(%rax), %xmm0\n movq 104(%rax), %xmm1\n movq 112(%rax), %xmm2\n movq 120(%rax), %xmm3\n"
        "movq 128(%rax), %xmm4\n movq 136(%rax), %xmm5\n movq 144(%rax), %xmm6\n movq 152(%rax), %xmm7\n"
        "movq 160(%rax), %xmm8\n movq 168(%rax), %xmm9\n movq 176(%rax), %xmm10\n movq 184(%rax), %xmm11\n"
        "movq 192(%rax), %xmm12\n movq 200(%rax), %xmm13\n movq 208(%rax), %xmm14\n movq 216(%rax), %xmm15\n"
        "cmpq $0, call_stack(%rip)\n jne 2f\n"
        "mov $-16, %rcx\n 1: mov %rcx, (%rsp, %rcx, 8)\n inc %rcx\n jnz 1b\n"
        "jmp 3f\n 2: mov call_stack(%rip), %rsp\n 3:\n"
        "mov call_number(%rip), %rax\n"
        "syscall\n"
        "mov %rax, %rcx\n"
        "lea after(%rip), %rax\n"
        "mov %rdi, 0(%rax)\n mov %rsi, 8(%rax)\n mov %rdx, 16(%rax)\n mov %r10, 24(%rax)\n mov %r8, 32(%rax)\n"
        "mov %r9, 40(%rax)\n mov %rbx, 48(%rax)\n mov %rbp, 56(%rax)\n mov %r12, 64(%rax)\n mov %r13, 72(%rax)\n"
        "mov %r14, 80(%rax)\n mov %r15, 88(%rax)\n"
        "movq %xmm0, 96(%rax)\n movq %xmm1, 104(%rax)\n movq %xmm2, 112(%rax)\n movq %xmm3, 120(%rax)\n"
        "movq %xmm4, 128(%rax)\n movq %xmm5, 136(%rax)\n movq %xmm6, 144(%rax)\n movq %xmm7, 152(%rax)\n"
        "movq %xmm8, 160(%rax)\n movq %xmm9, 168(%rax)\n movq %xmm10, 176(%rax)\n movq %xmm11, 184(%rax)\n"
        "movq %xmm12, 192(%rax)\n movq %xmm13, 200(%rax)\n movq %xmm14, 208(%rax)\n movq %xmm15, 216(%rax)\n"
        "cmpq $0, call_stack(%rip)\n jne 5f\n"
        "lea red_zone(%rip), %rdx\n"
        "mov $-16, %r8\n 4: mov (%rsp, %r8, 8), %rax\n mov %rax, 128(%rdx, %r8, 8)\n inc %r8\n jnz 4b\n"
        "5: mov own_stack(%rip), %rax\n"
        "cmpq $0, call_stack(%rip)\n je 6f\n"
        "cmp call_stack(%rip), %rsp\n je 6f\n"
        "movq $0, own_stack(%rip)\n"
        "6: mov %rax, %rsp\n"
        "mov %rcx, %rax\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n"
        "ret\n");

/* Returns what the call does; reports registers and stack that are not as they were. */
static long call(long number, long a, long b, long c)
{
    long result;
    int i;

    for (i = 0; i < WATCHED + VECTORS; i++)
        before[i] = UINT64_C(0x0123456789abcdef) * (2 * i + 3);
    before[0] = a, before[1] = b, before[2] = c;
    call_number = number;
    result = watched_call();
    for (i = 0; i < WATCHED + VECTORS; i++)
        if (before[i] != after[i])
            say("register %d changed\n", i);
    for (i = 0; i < RED_ZONE && call_stack == 0; i++)
        if (red_zone[i] != (uint64_t)(i - RED_ZONE))
            say("red zone %d changed\n", i);
    if (own_stack == 0)
        say("stack pointer changed\n");
    return result;
}

#else

static uint64_t call_stack;

static long call(long number, long a, long b, long c)
{
    long result = syscall(number, a, b, c);

    return result < 0 ? -errno : result;
}

#endif

static const char *path;
static int use_read, use_user;

static void park_for_ever(void)
{
    int fd = open(path, (use_read ? O_RDONLY : O_RDWR) | O_CLOEXEC);

    if (fd < 0)
        _exit(2);
    if (use_user && setuid(65534) != 0)
        _exit(2);
    for (;;) {
        uint64_t value = 42;
        long result = use_read ? call(SYS_read, fd, (long)&value, sizeof value)
                               : call(SYS_ioctl, fd, PARK, (long)&value);

        if (result == -ENOTCONN || result == -ECONNABORTED || (use_read && result == 0))
            _exit(0);
        say("%ld %llu\n", result, (unsigned long long)value);
    }
}

/* ---- states to be in ---- */

/* Counts SIGRTMIN, of which none is lost that the kernel queued; says how many there were when another signal comes. */
static void handle(int signal)
{
    static int counted;

    if (signal == SIGRTMIN)
        counted++;
    else
        say("signal %d after %d\n", signal, counted);
}

static void *echo(void *unused)
{
    char byte;

    while (read(0, &byte, 1) == 1)
        if (write(1, &byte, 1) != 1)
            break;
    return unused;
}

static void *park_thread(void *unused)
{
    park_for_ever();
    return unused;
}

static void *park_unshared(void *unused)
{
    unshare(CLONE_FILES);
    close(9);
    park_for_ever();
    return unused;
}

/* Ends the process as soon as the descriptor is open. */
static void *end_at(void *fd)
{
    while (fcntl((int)(long)fd, F_GETFD) < 0)
        ;
    kill(getpid(), SIGKILL);
    return NULL;
}

/* Forbids itself what makes and uses sockets: the kernel does `action` instead. */
static void forbid_sockets(unsigned action)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socketpair, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socket, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_recvmsg, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};

    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

static void start(void *(*function)(void *), void *argument)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, function, argument) != 0)
        _exit(2);
}

/* client PATH [WORD...]: each word puts it into a state, the last may say who waits. */
int main(int argc, char **argv)
{
    int i;

    path = argv[1];
    for (i = 2; i < argc; i++) {
        const char *word = argv[i];

        if (strcmp(word, "read") == 0)
            use_read = 1; /* waits in read(2) instead */
        else if (strcmp(word, "handle") == 0) {
            signal(SIGUSR1, handle);
            signal(SIGRTMIN, handle);
        } else if (strcmp(word, "block") == 0) {
            sigset_t all;

            sigfillset(&all);
            sigprocmask(SIG_BLOCK, &all, NULL);
        } else if (strcmp(word, "ignore") == 0)
            signal(SIGTRAP, SIG_IGN);
        else if (strcmp(word, "filter") == 0)
            forbid_sockets(SECCOMP_RET_ERRNO | EACCES);
        else if (strcmp(word, "trap") == 0) {
            signal(SIGSYS, handle);
            forbid_sockets(SECCOMP_RET_TRAP);
        } else if (strcmp(word, "kill") == 0)
            forbid_sockets(SECCOMP_RET_KILL_PROCESS);
        else if (strcmp(word, "user") == 0)
            use_user = 1; /* gives up root once the device is open */
        else if (strcmp(word, "edge") == 0) {
            /* The stack must grow before there is anything below the stack pointer. */
            char *top = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

            munmap(top, 1 << 20);
            top = mmap(top + (1 << 19), 4096, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_GROWSDOWN, -1, 0);
            call_stack = (uint64_t)(top + 64);
        } else if (strcmp(word, "nostack") == 0)
            call_stack = 64;
        else if (strcmp(word, "lock") == 0) {
            struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

            fcntl(open(argv[++i], O_RDWR), F_SETLK, &lock);
        } else if (strcmp(word, "end") == 0)
            start(end_at, (void *)atol(argv[++i]));
        else if (strcmp(word, "echo") == 0)
            start(echo, NULL);
        else if (strcmp(word, "thread") == 0) {
            start(park_thread, NULL);
            for (;;)
                pause();
        } else if (strcmp(word, "unshared") == 0) {
            dup2(1, 9);
            start(park_unshared, NULL);
            for (;;)
                pause();
        } else if (strcmp(word, "vfork") == 0 && vfork() != 0)
            _exit(0);
    }
    park_for_ever();
}
