/* SPDX-License-Identifier: Apache-2.0
 *
 * All that a server asks of the kernel once it serves.
 *
 * The list was found by tracing servers under the tests, and by reading what Python, trio and libfuse call. A server
 * reads and writes what it has open, reads files by name, maps memory, starts threads, copies to and from its clients'
 * memory, sets their priority, registers backing files, makes memory files and pairs of sockets, and unmounts.
 *
 * What is not here it cannot do: execute, fork, trace, take descriptors of others, open for writing, make or remove
 * names, send signals to others, mount, change user, connect to anybody, be connected to, or make memory executable.
 * What injects and what keeps files are programs of their own, started before.
 */
#define _GNU_SOURCE

#include "confine.h"

#include "filter.h"

#include <asm/ioctls.h>
#include <fcntl.h>
#include <linux/nsfs.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* <linux/fuse.h>; the headers of older systems lack them. */
#define FUSE_DEV_IOC_BACKING_OPEN 0x4010e501
#define FUSE_DEV_IOC_BACKING_CLOSE 0x4004e502

#define SOCKET_TYPE 15

int confine_server(int syslog)
{
    const struct call_rule rules[] = {
        /* What serving a call takes, by how often. */
        ALLOW(futex),
        ALLOW(read),
        ALLOW(writev),
        ALLOW(write),
        ALLOW(process_vm_readv),
        ALLOW(process_vm_writev),
        ALLOW(getpriority),
        ALLOW(clock_nanosleep),
        ALLOW(close),
        ALLOW(recvfrom),
        ALLOW_IF(sendto, CHECK(5, WHOLE, 0)), /* to no address */
        ALLOW(gettid),
        ALLOW(getpid),
        /* Other descriptors. */
        ALLOW_IF(openat, CHECK(2, O_ACCMODE | O_CREAT | O_TRUNC, O_RDONLY)),
        ALLOW(readv),
        ALLOW(pread64),
        ALLOW(preadv),
        ALLOW(pwrite64),
        ALLOW(pwritev),
        ALLOW(lseek),
        ALLOW(splice),
        ALLOW(vmsplice),
        ALLOW(dup),
        ALLOW(dup3),
        ALLOW(pipe2),
        ALLOW(eventfd2),
        ALLOW(memfd_create),
        ALLOW(ftruncate),
        ALLOW(fallocate),
        ALLOW_IF(fcntl, CHECK(1, WHOLE, F_GETFD)),
        ALLOW_IF(fcntl, CHECK(1, WHOLE, F_SETFD)),
        ALLOW_IF(fcntl, CHECK(1, WHOLE, F_GETFL)),
        ALLOW_IF(fcntl, CHECK(1, WHOLE, F_SETFL)),
        ALLOW_IF(fcntl, CHECK(1, WHOLE, F_DUPFD)),
        ALLOW_IF(fcntl, CHECK(1, WHOLE, F_DUPFD_CLOEXEC)),
        ALLOW_IF(fcntl, CHECK(1, WHOLE, F_ADD_SEALS)),
        ALLOW_IF(fcntl, CHECK(1, WHOLE, F_GET_SEALS)),
        ALLOW_IF(fcntl, CHECK(1, WHOLE, F_SETPIPE_SZ)),
        ALLOW_IF(fcntl, CHECK(1, WHOLE, F_GETPIPE_SZ)),
        ALLOW_IF(ioctl, CHECK(1, WHOLE, FUSE_DEV_IOC_BACKING_OPEN)),
        ALLOW_IF(ioctl, CHECK(1, WHOLE, FUSE_DEV_IOC_BACKING_CLOSE)),
        ALLOW_IF(ioctl, CHECK(1, WHOLE, NS_GET_PARENT)),
        ALLOW_IF(ioctl, CHECK(1, WHOLE, FIONBIO)),
        ALLOW_IF(ioctl, CHECK(1, WHOLE, FIOCLEX)),
        ALLOW_IF(ioctl, CHECK(1, WHOLE, FIONCLEX)),
        ALLOW_IF(ioctl, CHECK(1, WHOLE, TCGETS)),
        /* Reading names. */
        ALLOW(newfstatat),
        ALLOW(fstat),
        ALLOW(statx),
        ALLOW(statfs),
        ALLOW(fstatfs),
        ALLOW(readlinkat),
        ALLOW(faccessat),
#ifdef SYS_faccessat2
        ALLOW(faccessat2),
#endif
        ALLOW(getdents64),
        ALLOW(getcwd),
        /* Waiting. */
        ALLOW(epoll_create1),
        ALLOW(epoll_ctl),
        ALLOW(epoll_pwait),
        ALLOW(ppoll),
        ALLOW(pselect6),
        ALLOW(nanosleep),
        ALLOW(sched_yield),
        ALLOW(restart_syscall),
        /* Sockets: pairs, and those of its programs. To send a datagram it would take no connection. */
        ALLOW_IF(socketpair, CHECK(0, WHOLE, AF_UNIX), CHECK(1, SOCKET_TYPE, SOCK_STREAM)),
        ALLOW_IF(socketpair, CHECK(0, WHOLE, AF_UNIX), CHECK(1, SOCKET_TYPE, SOCK_SEQPACKET)),
        ALLOW(sendmsg),
        ALLOW(recvmsg),
        ALLOW(shutdown),
        ALLOW(getsockname),
        ALLOW(getpeername),
        ALLOW(getsockopt),
        ALLOW(setsockopt),
        /* Clients, and what is known of this process. */
        ALLOW(setpriority),
        ALLOW(sched_getscheduler),
        ALLOW(sched_getparam),
        ALLOW(sched_setscheduler),
        ALLOW(sched_getaffinity),
        ALLOW_IF(prlimit64, CHECK(2, WHOLE, 0), CHECK(HIGH(2), WHOLE, 0)), /* only to ask */
        ALLOW(getuid),
        ALLOW(geteuid),
        ALLOW(getgid),
        ALLOW(getegid),
        ALLOW(getppid),
        ALLOW(capget),
        ALLOW(uname),
        ALLOW(sysinfo),
        ALLOW(getrusage),
        ALLOW(times),
        ALLOW(clock_gettime),
        ALLOW(clock_getres),
        ALLOW(gettimeofday),
        ALLOW(getrandom),
        ALLOW_IF(prctl, CHECK(0, WHOLE, PR_SET_NAME)),
        ALLOW_IF(prctl, CHECK(0, WHOLE, PR_GET_NAME)),
        /* Threads and memory. */
        ALLOW_IF(clone, CHECK(0, CLONE_VM | CLONE_THREAD, CLONE_VM | CLONE_THREAD)),
        ALLOW(set_robust_list),
        ALLOW(rseq),
        ALLOW_IF(mmap, CHECK(2, PROT_EXEC, 0)),
        ALLOW_IF(mprotect, CHECK(2, PROT_EXEC, 0)),
        ALLOW(munmap),
        ALLOW(mremap),
        ALLOW(madvise),
        ALLOW(brk),
        ALLOW(membarrier),
        ALLOW(rt_sigaction),
        ALLOW(rt_sigprocmask),
        ALLOW(rt_sigreturn),
        ALLOW(sigaltstack),
        ALLOW_IF(tgkill, CHECK(0, WHOLE, (uint32_t)getpid())), /* abort(3) */
        ALLOW(exit),
        ALLOW(exit_group),
        /* The end. */
        ALLOW_IF(umount2, CHECK(1, WHOLE, MNT_DETACH)),
        /* What older machines have beside the calls above. */
#ifdef SYS_epoll_wait
        ALLOW(epoll_wait),
        ALLOW(poll),
        ALLOW(select),
        ALLOW(pipe),
        ALLOW(dup2),
        ALLOW(stat),
        ALLOW(lstat),
        ALLOW(access),
        ALLOW(readlink),
        ALLOW(time),
#endif
        /* Last, and left out without `syslog`. */
        ALLOW_IF(socket, CHECK(0, WHOLE, AF_UNIX), CHECK(1, SOCKET_TYPE, SOCK_DGRAM)),
        ALLOW(connect),
    };
    size_t count = sizeof rules / sizeof *rules;

    return filter_calls(rules, syslog ? count : count - 2);
}
