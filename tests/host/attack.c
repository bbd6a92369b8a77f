/* Clients that race against the transfer of files to them: see main(). x86-64 alone. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PARK _IOWR('t', 1, uint64_t)

static const char *device;
static uint64_t value = 42;

static void fail(const char *what)
{
    perror(what);
    _exit(2);
}

static void start(void *(*function)(void *), void *argument)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, function, argument) != 0)
        fail("pthread_create");
}

static int open_device(void)
{
    int fd = open(device, O_RDWR | O_CLOEXEC);

    if (fd < 0)
        fail(device);
    return fd;
}

/* ---- exec: another thread executes a program while the leader gets a file ---- */

/* Waits in the device with a stack that lies where the other program has its data. */
static long park_on(uint64_t stack, int fd)
{
    register long result __asm__("rax") = SYS_ioctl;

    __asm__ volatile("mov %%rsp, %%r12\n mov %[stack], %%rsp\n syscall\n mov %%r12, %%rsp\n"
                     : "+r"(result)
                     : "D"((long)fd), "S"((long)PARK), "d"(&value), [stack] "r"(stack)
                     : "r12", "rcx", "r11", "memory");
    return result;
}

struct execution {
    const char *program;
    int number;
    unsigned spins;
};

static void *execute_later(void *argument)
{
    const struct execution *execution = argument;
    volatile unsigned left;

    /* Once some of the files are there, the transfer is half done. */
    while (fcntl(execution->number, F_GETFD) < 0)
        ;
    for (left = execution->spins; left > 0; left--)
        ;
    execl(execution->program, execution->program, (char *)NULL);
    fail(execution->program);
    return NULL;
}

static int race_execution(const char *program, uint64_t address, size_t size, int count)
{
    int changed = 0, executed = 0, i;

    srand(1);
    for (i = 0; i < count; i++) {
        struct execution execution = {program, 4 + rand() % 2, (unsigned)rand() % 6000};
        int child = fork(), status;

        if (child == 0) {
            int fd = open_device();

            if (mmap((void *)address, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
                == MAP_FAILED)
                fail("mmap");
            memset((void *)address, 'A', size);
            start(execute_later, &execution);
            park_on(address + size / 2, fd);
            for (;;)
                pause();
        }
        if (child < 0 || waitpid(child, &status, 0) != child)
            fail("fork");
        executed += WIFEXITED(status) && WEXITSTATUS(status) != 2;
        changed += WIFEXITED(status) && WEXITSTATUS(status) == 1;
    }
    printf("%d executed, %d changed\n", executed, changed);
    return 0;
}

/* ---- rewrite: another thread changes the instruction ---- */

static volatile uint16_t *instruction;
static const char *folder;

static void *rewrite(void *unused)
{
    const uint16_t call = 0x050f, jump = 0x00eb + (14 << 8);
    volatile int left;

    for (;;) {
        *instruction = call;
        for (left = 0; left < 3000; left++)
            ;
        *instruction = jump;
        for (left = 0; left < 300; left++)
            ;
    }
    return unused;
}

static int park_in_changing_code(int count)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mkdir, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    unsigned char *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t path = (uint64_t)folder;
    long (*park)(long, long, void *) = (long (*)(long, long, void *))code;
    int fd = open_device(), i;

    /* mov eax, SYS_ioctl; nops; syscall or jmp to 48; ret; ...; at 48: mov rdi, path; mov esi, 0700; mov eax, SYS_mkdir;
     * syscall; ret */
    memset(code, 0x90, 64);
    code[0] = 0xb8;
    memcpy(code + 1, &(uint32_t){SYS_ioctl}, 4);
    instruction = (volatile uint16_t *)(void *)(code + 32);
    *instruction = 0x050f;
    code[34] = 0xc3;
    code[48] = 0x48, code[49] = 0xbf;
    memcpy(code + 50, &path, 8);
    code[58] = 0xbe;
    memcpy(code + 59, &(uint32_t){0700}, 4);
    code[63] = 0xb8;
    memcpy(code + 64, &(uint32_t){SYS_mkdir}, 4);
    code[68] = 0x0f, code[69] = 0x05, code[70] = 0xc3;
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
        fail("PR_SET_SECCOMP");
    start(rewrite, NULL);
    for (i = 0; i < count; i++)
        park(fd, PARK, &value);
    printf("%s\n", access(folder, F_OK) == 0 ? "made" : "refused");
    return 0;
}

/* ---- swap: another thread puts its own socket under every number ---- */

static int foreign;

static void *swap(void *unused)
{
    int from = 3, to = 16;

    for (;;) {
        int fd;

        for (fd = from; fd < to; fd++)
            if (fd != foreign)
                dup3(foreign, fd, O_CLOEXEC);
        for (fd = from; fd < to; fd++)
            if (fd != foreign)
                close(fd);
    }
    return unused;
}

static int park_with_swapped_numbers(const char *socket_path, int count)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = fcntl(open_device(), F_DUPFD, 100), i;

    foreign = fcntl(socket(AF_UNIX, SOCK_DGRAM, 0), F_DUPFD, 101);
    strncpy(address.sun_path, socket_path, sizeof address.sun_path - 1);
    if (connect(foreign, (struct sockaddr *)&address, sizeof address) != 0)
        fail(socket_path);
    start(swap, NULL);
    for (i = 0; i < count; i++)
        ioctl(fd, PARK, &value);
    printf("done\n");
    return 0;
}

/* ---- end, stop, scribble: what else another thread, or another process, can do meanwhile ---- */

struct ending {
    int number;
    unsigned spins;
    int by_signal;
};

static void *end_later(void *argument)
{
    const struct ending *ending = argument;
    volatile unsigned left;

    while (fcntl(ending->number, F_GETFD) < 0)
        ;
    for (left = ending->spins; left > 0; left--)
        ;
    if (ending->by_signal)
        kill(getpid(), SIGKILL);
    syscall(SYS_exit_group, 0);
    return NULL;
}

static int race_end(int by_signal, int count)
{
    int i;

    srand(1);
    for (i = 0; i < count; i++) {
        struct ending ending = {4 + rand() % 40, (unsigned)rand() % 6000, by_signal};
        int child = fork(), status;

        if (child == 0) {
            int fd = open_device();

            start(end_later, &ending);
            ioctl(fd, PARK, &value);
            for (;;)
                pause();
        }
        if (child < 0 || waitpid(child, &status, 0) != child)
            fail("fork");
        if (by_signal ? !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL : status != 0) {
            printf("%#x\n", status);
            return 1;
        }
    }
    printf("%d ended\n", count);
    return 0;
}

static int park_while_stopped(int count)
{
    int child = fork(), status, fd, i;

    if (child == 0) {
        fd = open_device();
        for (i = 0; i < count; i++) {
            if (ioctl(fd, PARK, &value) != 0)
                fail("PARK");
            close_range(4, ~0U, 0);
        }
        _exit(0);
    }
    while (waitpid(child, &status, WNOHANG) == 0) {
        kill(child, SIGSTOP);
        kill(child, SIGCONT);
    }
    printf("%#x\n", status);
    return 0;
}

static volatile char *below;

static void *scribble(void *unused)
{
    unsigned i = 0;

    for (;; i++)
        below[-(int)(i % 1024)] = (char)(i * 2654435761u >> 24);
    return unused;
}

static int park_while_scribbling(int count)
{
    int fd = open_device(), i;
    char *stack = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    below = stack + (1 << 15) - 128;
    start(scribble, NULL);
    for (i = 0; i < count; i++) {
        park_on((uint64_t)stack + (1 << 15), fd);
        close_range(4, ~0U, 0);
    }
    printf("done\n");
    return 0;
}

/* attack DEVICE exec PROGRAM ADDRESS SIZE COUNT | rewrite FOLDER COUNT | swap SOCKET COUNT |
 * end exit|kill COUNT | stop COUNT | scribble COUNT */
int main(int argc, char **argv)
{
    device = argv[1];
    if (argc == 7 && strcmp(argv[2], "exec") == 0)
        return race_execution(argv[3], strtoull(argv[4], NULL, 0), strtoull(argv[5], NULL, 0), atoi(argv[6]));
    if (argc == 5 && strcmp(argv[2], "end") == 0)
        return race_end(strcmp(argv[3], "kill") == 0, atoi(argv[4]));
    if (argc == 4 && strcmp(argv[2], "stop") == 0)
        return park_while_stopped(atoi(argv[3]));
    if (argc == 4 && strcmp(argv[2], "scribble") == 0)
        return park_while_scribbling(atoi(argv[3]));
    folder = argv[3];
    if (argc == 5 && strcmp(argv[2], "rewrite") == 0)
        return park_in_changing_code(atoi(argv[4]));
    if (argc == 5 && strcmp(argv[2], "swap") == 0)
        return park_with_swapped_numbers(argv[3], atoi(argv[4]));
    return 2;
}
