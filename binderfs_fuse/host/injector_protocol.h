/* SPDX-License-Identifier: Apache-2.0
 *
 * What injector.c and injector_client.c say to each other. The first message over control is a number of filters, with
 * the keeper's control socket. Each further one over control is one byte, with the end of a new channel. Over a channel
 * go orders, each followed by `size` bytes, and answers, each followed by `count` numbers.
 */
#ifndef BINDERFS_FUSE_HOST_INJECTOR_PROTOCOL_H
#define BINDERFS_FUSE_HOST_INJECTOR_PROTOCOL_H

#include "injector.h"

enum injector_operation {
    INJECTOR_DO_SEIZE,
    INJECTOR_DO_STOPPED,
    INJECTOR_DO_SHUT,
    INJECTOR_DO_INSTALL,
    INJECTOR_DO_STORE,
    INJECTOR_DO_RELEASE,
};

struct injector_order {
    int32_t operation;
    int32_t tid;     /* of SEIZE */
    uint32_t user;   /* of INSTALL */
    int32_t above;   /* of INSTALL */
    int32_t outcome; /* of RELEASE */
    uint32_t size;   /* of the payload, in bytes: numbers of SHUT and INSTALL, data of STORE */
    uint64_t value;  /* of STORE: the address; of RELEASE: the result */
};

struct injector_answer {
    int32_t result;
    int32_t sent;  /* of INSTALL */
    int32_t count; /* of the numbers that follow */
};

#define INJECTOR_PAYLOAD (INJECTOR_NUMBERS * sizeof(int32_t))

#endif
