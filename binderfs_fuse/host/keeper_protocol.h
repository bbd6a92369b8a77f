/* SPDX-License-Identifier: Apache-2.0
 *
 * What keeper.c and keeper_client.c say to each other over a channel: a request, and an int in answer. Over control go
 * the end of a new channel, with one byte, or the numbers of files to be closed; and before anything else
 * `struct keeper_limits`.
 */
#ifndef BINDERFS_FUSE_HOST_KEEPER_PROTOCOL_H
#define BINDERFS_FUSE_HOST_KEEPER_PROTOCOL_H

#include "keeper.h"

enum keeper_operation { KEEPER_TAKE, KEEPER_TAKE_SOCKET, KEEPER_SEND };

struct keeper_request {
    int32_t operation;
    int32_t tid;
    int32_t fd;
    uint32_t user;
    int32_t socket; /* of KEEPER_SEND, as are the rest */
    int32_t more;
    int32_t count;
    int32_t files[KEEPER_BATCH];
};

#define KEEPER_CLOSED_AT_ONCE 256 /* files of one control message */

#endif
