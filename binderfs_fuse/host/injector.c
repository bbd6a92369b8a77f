/* SPDX-License-Identifier: Apache-2.0
 *
 * Installs descriptors in clients, in a process of its own.
 *
 * Theory of operation
 * -------------------
 * Whatever reaches into a client with ptrace must be free of any system call filter: else the kernel does not let it
 * suspend the client's. The server, which reads what clients say, is better off with one. So this program does the
 * tracing, and nothing else. It is small enough to be read in one sitting: this file, ptrace.c, keeper_client.c and
 * message.c.
 *
 * The server has one socket to it, `control`, and a channel for each task that is traced at a time. Over control come
 * the ends of new channels, over a channel the orders for one task. Each channel has a thread, since ptrace knows
 * threads and not processes: the thread that seizes a task must do the rest. The server answers the task's request
 * between the orders SEIZE and STOPPED. The server decides what its call returns, and what is stored in its memory.
 * Files are numbers of the keeper's (keeper.c), to which each thread has a channel of its own.
 *
 * Invariants
 * ----------
 * - No descriptor of a client's is ever in this process, so it can always end.
 * - A task stays stopped only while its channel is open. When the server ends, each task that can be reached gets its
 *   registers and its signal mask back, and goes on. A thread that loses its task ends, and with it the kernel takes
 *   back what is left: no zombie stays, and no exit status is kept from a parent.
 * - An order is checked before it is carried out: its size, and whether the task is in the state for it.
 * - The process keeps CAP_SYS_PTRACE, and CAP_SYS_ADMIN for the suspension of filters. It can gain no other.
 */
#define _GNU_SOURCE

#include "injector_protocol.h"
#include "keeper.h"
#include "message.h"
#include "ptrace.h"

#include <errno.h>
#include <linux/capability.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define STACK (64 << 10)
#define PATIENCE 1 /* seconds that tasks get at the end of the server */

enum state { IDLE, SEIZED, STOPPED };

/* What a thread works with. */
struct worker {
    int channel;
    int keeper; /* the channel to the keeper; -1: none yet */
    enum state state;
    struct tracee tracee;
    struct injector_order order;
    struct injector_answer answer;
    int numbers[INJECTOR_NUMBERS];
    char payload[INJECTOR_PAYLOAD];
};

static int keeper_control = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ended; /* by CLOCK_MONOTONIC */
static int workers;

/* ---- orders ---- */

static int install(struct worker *worker)
{
    int count = (int)(worker->order.size / sizeof(int)), result;

    if (worker->keeper < 0)
        worker->keeper = keeper_open(keeper_control);
    if (worker->keeper < 0)
        return worker->keeper == -EPIPE ? -EIO : worker->keeper;
    result = tracee_install(&worker->tracee, worker->keeper, worker->order.user, (const int *)(void *)worker->payload,
                            count, worker->order.above, worker->numbers, &worker->answer.sent);
    if (result == 0)
        worker->answer.count = count;
    if (result == -EPIPE) {
        close(worker->keeper);
        worker->keeper = -1;
        return -EIO;
    }
    return result;
}

static int release(struct worker *worker)
{
    worker->state = IDLE;
    if (worker->order.outcome == INJECTOR_RETURN)
        tracee_return(&worker->tracee, (long)worker->order.value);
    else if (worker->order.outcome == INJECTOR_RESTART)
        tracee_restart(&worker->tracee);
    return tracee_release(&worker->tracee);
}

/* Waits until the task stops. A task that cannot be worked in is stopped all the same. */
static int await_stop(struct worker *worker)
{
    int result = tracee_stopped(&worker->tracee);

    if (!worker->tracee.dead)
        worker->state = STOPPED;
    return result;
}

static int carry_out(struct worker *worker)
{
    const struct injector_order *order = &worker->order;
    int result;

    switch (order->operation) {
    case INJECTOR_DO_SEIZE:
        if (worker->state != IDLE)
            return -EINVAL;
        result = tracee_seize(&worker->tracee, order->tid);
        worker->state = result == 0 ? SEIZED : IDLE;
        return result;
    case INJECTOR_DO_STOPPED:
        return worker->state == SEIZED ? await_stop(worker) : -EINVAL;
    case INJECTOR_DO_SHUT:
        if (worker->state != STOPPED || order->size % sizeof(int) != 0)
            return -EINVAL;
        return tracee_close(&worker->tracee, (const int *)(void *)worker->payload, (int)(order->size / sizeof(int)));
    case INJECTOR_DO_INSTALL:
        if (worker->state != STOPPED || order->size % sizeof(int) != 0 || order->size == 0 || order->above < 0)
            return -EINVAL;
        return install(worker);
    case INJECTOR_DO_STORE:
        return worker->state == STOPPED ? tracee_store(&worker->tracee, order->value, worker->payload, order->size)
                                        : -EINVAL;
    case INJECTOR_DO_RELEASE:
        return worker->state == STOPPED ? release(worker) : -EINVAL;
    default:
        return -EINVAL;
    }
}

/* ---- channels ---- */

static ssize_t receive_order(struct worker *worker)
{
    struct iovec parts[] = {{&worker->order, sizeof worker->order}, {worker->payload, sizeof worker->payload}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t received;

    do
        received = recvmsg(worker->channel, &message, 0);
    while (received < 0 && errno == EINTR);
    return received == (ssize_t)(sizeof worker->order + worker->order.size) ? received : -1;
}

static int answer(struct worker *worker)
{
    struct iovec parts[] = {{&worker->answer, sizeof worker->answer},
                            {worker->numbers, worker->answer.count * sizeof *worker->numbers}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t sent;

    do
        sent = sendmsg(worker->channel, &message, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -1 : 0;
}

static void *serve_channel(void *argument)
{
    struct worker *worker = argument;

    while (!worker->tracee.dead && receive_order(worker) > 0) {
        worker->answer = (struct injector_answer){0};
        worker->answer.result = carry_out(worker);
        if (answer(worker) != 0)
            break;
    }
    /* The server is gone, or has lost its way. What it answered the task before stands. */
    if (worker->state == SEIZED && !worker->tracee.dead)
        await_stop(worker);
    if (worker->state == STOPPED && !worker->tracee.dead)
        tracee_release(&worker->tracee);
    if (worker->keeper >= 0)
        close(worker->keeper);
    close(worker->channel);
    free(worker);
    pthread_mutex_lock(&lock);
    workers--;
    pthread_cond_signal(&ended);
    pthread_mutex_unlock(&lock);
    return NULL;
}

static void start_channel(int channel)
{
    struct worker *worker = calloc(1, sizeof *worker);
    pthread_attr_t attributes;
    pthread_t thread;

    if (worker == NULL) {
        close(channel);
        return;
    }
    worker->channel = channel;
    worker->keeper = -1;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_mutex_lock(&lock);
    if (pthread_create(&thread, &attributes, serve_channel, worker) == 0) {
        workers++;
    } else {
        close(channel);
        free(worker);
    }
    pthread_mutex_unlock(&lock);
    pthread_attr_destroy(&attributes);
}

/* ---- the injector's life ---- */

/* Keeps what it takes to trace, and to suspend a filter. */
static int drop_rights(void)
{
    const uint32_t wanted = 1U << CAP_SYS_PTRACE | 1U << CAP_SYS_ADMIN;
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    uint32_t kept;

    prctl(PR_SET_NAME, "binder-injector");
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    if (syscall(SYS_capget, &header, data) != 0)
        return -errno;
    kept = data[0].permitted & wanted;
    memset(data, 0, sizeof data);
    data[0].permitted = data[0].effective = kept;
    if (syscall(SYS_capset, &header, data) != 0)
        return -errno;
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && chdir("/") == 0 ? 0 : -errno;
}

/* Has the wait for threads go by a clock that nobody sets: else it ends early, or late, when the time is set. */
static void prepare_to_wait(void)
{
    pthread_condattr_t attributes;

    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&ended, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* Gives tasks that are stopped just now the time to be released: their threads find their channels closed. */
static void await_workers(void)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += PATIENCE;
    pthread_mutex_lock(&lock);
    while (workers > 0 && pthread_cond_timedwait(&ended, &lock, &until) == 0)
        ;
}

int main(void)
{
    int error = drop_rights(), filters = 0, descriptor, count = 1;
    char byte;

    if (send_message(PROGRAM_CONTROL, &error, sizeof error) < 0 || error != 0)
        return 1;
    if (receive_descriptors(PROGRAM_CONTROL, &filters, sizeof filters, &keeper_control, &count) != sizeof filters
        || count != 1)
        return 1;
    tracee_prepare(filters);
    prepare_to_wait();
    while (count = 1, receive_descriptors(PROGRAM_CONTROL, &byte, 1, &descriptor, &count) > 0)
        if (count == 1)
            start_channel(descriptor);
    await_workers();
    /* Threads that are held up by a task end with the process. */
    _exit(0);
}
