/* SPDX-License-Identifier: Apache-2.0
 *
 * A keeper's rights, tried out by itself: tells the name of each system call that is not refused with EPERM, by a message
 * to the socket that is its standard output. It cannot write.
 */
#define main keeper_main
#include "keeper.c"
#undef main

#include <arpa/inet.h>
#include <signal.h>
#include <sys/wait.h>

static void tell(const char *text)
{
    send_message(1, text, strlen(text));
}

static void expect_refusal(const char *name, long result)
{
    if (result >= 0 || errno != EPERM)
        tell(name);
}

#define TRY(name, ...) expect_refusal(#name, syscall(SYS_##name, __VA_ARGS__))

#ifdef __x86_64__
/* Asks for its process id as a 32-bit program does. */
static long call_as_32_bit(void)
{
    long result = 20; /* getpid there */

    __asm__ volatile("int $0x80" : "+a"(result) : : "memory", "r8", "r9", "r10", "r11");
    return result;
}

/* Tells whether this kernel has such calls: without, they are a fault. */
static int has_32_bit_calls(void)
{
    int status, child = fork();

    if (child == 0)
        _exit(call_as_32_bit() != getpid());
    return waitpid(child, &status, 0) == child && status == 0;
}

/* Calls as on another machine, or with another machine's numbers. */
static void try_other_machines(int has_32_bit)
{
    if (has_32_bit && call_as_32_bit() != -EPERM)
        tell("32-bit getpid");
    expect_refusal("x32 getpid", syscall(0x40000000 | SYS_getpid));
}
#else
static int has_32_bit_calls(void)
{
    return 0;
}

static void try_other_machines(int has_32_bit)
{
    (void)has_32_bit;
}
#endif

static void *nothing(void *argument)
{
    return argument;
}

int main(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(9)};
    char *arguments[] = {"/bin/true", NULL};
    int pair[2], error, has_32_bit = has_32_bit_calls();

    socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair);
    limits.descriptors = 1024;
    error = settle();
    if (error < 0)
        tell(strerror(-error));
    TRY(execve, arguments[0], arguments, NULL);
    TRY(clone, SIGCHLD, 0, 0, 0, 0);
    TRY(socket, AF_UNIX, SOCK_STREAM, 0);
    TRY(socket, AF_INET, SOCK_STREAM, 0);
    TRY(bind, pair[0], &address, sizeof address);
    TRY(listen, pair[0], 1);
    TRY(accept4, pair[0], NULL, NULL, 0);
    TRY(sendto, pair[0], "", 1, 0, &address, sizeof address);
    TRY(openat, AT_FDCWD, "/dev/null", O_WRONLY);
    TRY(openat, AT_FDCWD, "/dev/null", O_RDWR);
    TRY(openat, AT_FDCWD, "/nowhere/binder-confined", O_RDONLY | O_CREAT, 0600);
    TRY(unlinkat, AT_FDCWD, "/nowhere/binder-confined", 0);
    TRY(write, 1, "", 0);
    TRY(ioctl, 1, 0, 0);
    TRY(dup, 1);
    TRY(fcntl, 1, F_DUPFD, 0);
    TRY(fcntl, 1, F_SETFL, 0);
    TRY(kill, getpid(), 0);
    TRY(tgkill, getpid(), getpid(), 0);
    TRY(ptrace, 16, getpid(), 0, 0);
    TRY(process_vm_readv, getpid(), NULL, 0, NULL, 0, 0);
    TRY(process_vm_writev, getpid(), NULL, 0, NULL, 0, 0);
    TRY(kcmp, getpid(), getpid(), KCMP_VM, 0, 0);
    TRY(prctl, PR_SET_DUMPABLE, 1, 0, 0, 0);
    TRY(mmap, NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TRY(mprotect, (long)&main & ~4095L, 4096, PROT_READ | PROT_EXEC);
    TRY(setuid, getuid());
    TRY(capset, NULL, NULL);
    TRY(setns, pair[0], 0);
    TRY(unshare, 0);
    TRY(mount, "none", "/", "none", 0, NULL);
    TRY(io_uring_setup, 1, NULL);
    TRY(memfd_create, "x", 0);
    TRY(setrlimit, RLIMIT_NOFILE, NULL);
    try_other_machines(has_32_bit);
    /* What it needs is there. */
    if (start_thread(nothing, NULL) != 0 || open("/proc/self/status", O_RDONLY) < 0)
        tell("less than it needs");
    tell("done");
    _exit(0);
}
