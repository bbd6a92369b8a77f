/* SPDX-License-Identifier: Apache-2.0
 *
 * How to ask a keeper: see keeper.h. A call is one message to and one fro.
 */
#define _GNU_SOURCE

#include "keeper_protocol.h"

#include "message.h"

#include <errno.h>
#include <string.h>

_Static_assert(KEEPER_BATCH <= MESSAGE_DESCRIPTORS, "a batch is one message");

int keeper_start(const char *program, const struct keeper_limits *limits, int *pid)
{
    return start_program(program, "binder-keeper", limits, sizeof *limits, pid);
}

int keeper_open(int control)
{
    return open_channel(control);
}

static int call(int channel, const struct keeper_request *request)
{
    int result;

    if (send_message(channel, request, sizeof *request) != sizeof *request
        || receive_message(channel, &result, sizeof result) != sizeof result)
        return -EPIPE;
    return result;
}

int keeper_take(int channel, int tid, int fd, uint32_t user)
{
    return call(channel, &(struct keeper_request){.operation = KEEPER_TAKE, .tid = tid, .fd = fd, .user = user});
}

int keeper_take_socket(int channel, int tid, int fd, uint32_t user)
{
    return call(channel, &(struct keeper_request){.operation = KEEPER_TAKE_SOCKET, .tid = tid, .fd = fd, .user = user});
}

int keeper_send(int channel, int socket, uint32_t user, const int *files, int count, int more)
{
    struct keeper_request request = {
        .operation = KEEPER_SEND, .user = user, .socket = socket, .more = more, .count = count};

    if (count < 0 || count > KEEPER_BATCH)
        return -EINVAL;
    if (count > 0)
        memcpy(request.files, files, count * sizeof *files);
    return call(channel, &request);
}

int keeper_close(int control, const int *files, int count)
{
    while (count > 0) {
        int now = count < KEEPER_CLOSED_AT_ONCE ? count : KEEPER_CLOSED_AT_ONCE;

        if (send_message(control, files, now * sizeof *files) < 0)
            return -EPIPE;
        files += now;
        count -= now;
    }
    return 0;
}
