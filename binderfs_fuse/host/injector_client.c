/* SPDX-License-Identifier: Apache-2.0
 *
 * How to ask an injector: see injector.h. A call is one message to and one fro.
 */
#define _GNU_SOURCE

#include "injector_protocol.h"

#include "message.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

int injector_start(const char *program, int keeper, int filters, int *pid)
{
    int control = start_program(program, "binder-injector", NULL, 0, pid), error;

    if (control < 0)
        return control;
    error = send_descriptors(control, &filters, sizeof filters, &keeper, 1, 0);
    if (error == 0)
        return control;
    close(control);
    return error;
}

int injector_open(int control)
{
    return open_channel(control);
}

/* Sends an order with its payload, receives the answer with its numbers. */
static int call(int channel, struct injector_order order, const void *payload, struct injector_answer *answer,
                int *numbers)
{
    struct iovec parts[] = {{&order, sizeof order}, {(void *)payload, order.size}};
    struct iovec back[] = {{answer, sizeof *answer}, {numbers, answer->count * sizeof *numbers}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2}, reply = {.msg_iov = back, .msg_iovlen = 2};
    ssize_t done;

    do
        done = sendmsg(channel, &message, MSG_NOSIGNAL);
    while (done < 0 && errno == EINTR);
    if (done < 0)
        return errno == EMSGSIZE ? -E2BIG : -EPIPE;
    do
        done = recvmsg(channel, &reply, 0);
    while (done < 0 && errno == EINTR);
    return done < (ssize_t)sizeof *answer ? -EPIPE : answer->result;
}

static int give_order(int channel, struct injector_order order, const void *payload)
{
    struct injector_answer answer = {0};

    return call(channel, order, payload, &answer, NULL);
}

int injector_seize(int channel, int tid)
{
    return give_order(channel, (struct injector_order){.operation = INJECTOR_DO_SEIZE, .tid = tid}, NULL);
}

int injector_stopped(int channel)
{
    return give_order(channel, (struct injector_order){.operation = INJECTOR_DO_STOPPED}, NULL);
}

int injector_shut(int channel, const int *fds, int count)
{
    int error = 0;

    while (count > 0 && error == 0) {
        int now = count < INJECTOR_NUMBERS ? count : INJECTOR_NUMBERS;

        error = give_order(
            channel, (struct injector_order){.operation = INJECTOR_DO_SHUT, .size = now * sizeof *fds}, fds);
        fds += now;
        count -= now;
    }
    return error;
}

int injector_install(int channel, uint32_t user, const int *files, int count, int above, int *numbers, int *sent)
{
    struct injector_answer answer = {.count = count};
    struct injector_order order = {
        .operation = INJECTOR_DO_INSTALL, .user = user, .above = above, .size = count * sizeof *files};
    int error;

    *sent = 0;
    if (count < 0 || count > INJECTOR_NUMBERS)
        return -E2BIG;
    error = call(channel, order, files, &answer, numbers);
    /* Of an injector that is gone nobody knows how far it came: the keeper passes over what it has given up. */
    *sent = error == -EPIPE ? 0 : answer.sent;
    return error;
}

int injector_store(int channel, uint64_t address, const void *data, size_t size)
{
    const char *from = data;
    int error = 0;

    while (size > 0 && error == 0) {
        size_t now = size < INJECTOR_PAYLOAD ? size : INJECTOR_PAYLOAD;

        error = give_order(
            channel,
            (struct injector_order){.operation = INJECTOR_DO_STORE, .size = (uint32_t)now, .value = address}, from);
        address += now;
        from += now;
        size -= now;
    }
    return error;
}

int injector_release(int channel, int outcome, long result)
{
    return give_order(channel,
                      (struct injector_order){
                          .operation = INJECTOR_DO_RELEASE, .outcome = outcome, .value = (uint64_t)result},
                      NULL);
}
