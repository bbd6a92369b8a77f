/* SPDX-License-Identifier: Apache-2.0
 *
 * The protocol's names, and the shape of what each carries.
 */
#include <stdlib.h>
#include <string.h>

#include "player.h"

#define WORD(name, shape) { #name, shape, name }
#define LAST { NULL, NULL, 0 }

const struct word command_words[] = {
    WORD(BC_TRANSACTION, "t"),
    WORD(BC_REPLY, "t"),
    WORD(BC_TRANSACTION_SG, "T"),
    WORD(BC_REPLY_SG, "T"),
    WORD(BC_ACQUIRE_RESULT, "4"),
    WORD(BC_FREE_BUFFER, "8"),
    WORD(BC_INCREFS, "4"),
    WORD(BC_ACQUIRE, "4"),
    WORD(BC_RELEASE, "4"),
    WORD(BC_DECREFS, "4"),
    WORD(BC_INCREFS_DONE, "88"),
    WORD(BC_ACQUIRE_DONE, "88"),
    WORD(BC_ATTEMPT_ACQUIRE, "44"),
    WORD(BC_REGISTER_LOOPER, ""),
    WORD(BC_ENTER_LOOPER, ""),
    WORD(BC_EXIT_LOOPER, ""),
    WORD(BC_REQUEST_DEATH_NOTIFICATION, "48"),
    WORD(BC_CLEAR_DEATH_NOTIFICATION, "48"),
    WORD(BC_DEAD_BINDER_DONE, "8"),
    WORD(BC_REQUEST_FREEZE_NOTIFICATION, "48"),
    WORD(BC_CLEAR_FREEZE_NOTIFICATION, "48"),
    WORD(BC_FREEZE_NOTIFICATION_DONE, "8"),
    LAST,
};

const struct word return_words[] = {
    WORD(BR_ERROR, "i"),
    WORD(BR_OK, ""),
    WORD(BR_TRANSACTION_SEC_CTX, "C"),
    WORD(BR_TRANSACTION, "t"),
    WORD(BR_REPLY, "t"),
    WORD(BR_ACQUIRE_RESULT, "i"),
    WORD(BR_DEAD_REPLY, ""),
    WORD(BR_TRANSACTION_COMPLETE, ""),
    WORD(BR_INCREFS, "88"),
    WORD(BR_ACQUIRE, "88"),
    WORD(BR_RELEASE, "88"),
    WORD(BR_DECREFS, "88"),
    WORD(BR_NOOP, ""),
    WORD(BR_SPAWN_LOOPER, ""),
    WORD(BR_FINISHED, ""),
    WORD(BR_DEAD_BINDER, "8"),
    WORD(BR_CLEAR_DEATH_NOTIFICATION_DONE, "8"),
    WORD(BR_FAILED_REPLY, ""),
    WORD(BR_FROZEN_REPLY, ""),
    WORD(BR_ONEWAY_SPAM_SUSPECT, ""),
    WORD(BR_TRANSACTION_PENDING_FROZEN, ""),
    WORD(BR_FROZEN_BINDER, "f"),
    WORD(BR_CLEAR_FREEZE_NOTIFICATION_DONE, "8"),
    LAST,
};

/* The shape is what a step gives; act.c knows what comes back. */
const struct word ioctl_words[] = {
    WORD(BINDER_WRITE_READ, ""),
    WORD(BINDER_SET_IDLE_TIMEOUT, "8"),
    WORD(BINDER_SET_MAX_THREADS, "4"),
    WORD(BINDER_SET_IDLE_PRIORITY, "4"),
    WORD(BINDER_SET_CONTEXT_MGR, "4"),
    WORD(BINDER_THREAD_EXIT, "4"),
    WORD(BINDER_VERSION, ""),
    WORD(BINDER_GET_NODE_DEBUG_INFO, "8"),
    WORD(BINDER_GET_NODE_INFO_FOR_REF, "44444"),
    WORD(BINDER_SET_CONTEXT_MGR_EXT, "4488"),
    WORD(BINDER_FREEZE, "444"),
    WORD(BINDER_GET_FROZEN_INFO, "4"),
    WORD(BINDER_ENABLE_ONEWAY_SPAM_DETECTION, "4"),
    WORD(BINDER_GET_EXTENDED_ERROR, ""),
    LAST,
};

const struct word object_words[] = {
    { "binder", "", BINDER_TYPE_BINDER },
    { "weak-binder", "", BINDER_TYPE_WEAK_BINDER },
    { "handle", "", BINDER_TYPE_HANDLE },
    { "weak-handle", "", BINDER_TYPE_WEAK_HANDLE },
    { "fd", "", BINDER_TYPE_FD },
    { "fda", "", BINDER_TYPE_FDA },
    { "ptr", "", BINDER_TYPE_PTR },
    LAST,
};

/* Transaction flags first: report.c names only those. */
const struct word flag_words[] = {
    WORD(TF_ONE_WAY, "t"),
    WORD(TF_ROOT_OBJECT, "t"),
    WORD(TF_STATUS_CODE, "t"),
    WORD(TF_ACCEPT_FDS, "t"),
    WORD(TF_CLEAR_BUF, "t"),
    WORD(TF_UPDATE_TXN, "t"),
    WORD(FLAT_BINDER_FLAG_ACCEPTS_FDS, "o"),
    WORD(FLAT_BINDER_FLAG_TXN_SECURITY_CTX, "o"),
    WORD(BINDER_BUFFER_FLAG_HAS_PARENT, "p"),
    LAST,
};

const struct word log_words[] = {
    { "state", "", 0 },
    { "stats", "", 0 },
    { "transactions", "", 0 },
    { "transaction_log", "", 0 },
    { "failed_transaction_log", "", 0 },
    { "proc", "", 0 },
    LAST,
};

const struct word *word_named(const struct word *table, const char *name)
{
    for (; table->name; table++)
        if (!strcmp(table->name, name))
            return table;
    return NULL;
}

const struct word *word_valued(const struct word *table, uint32_t value)
{
    for (; table->name; table++)
        if (table->value == value)
            return table;
    return NULL;
}

/* A number, with K or M after it for kibi and mebi. */
bool number(const char *text, uint64_t *value)
{
    char *end;

    if (*text == '-')
        *value = strtoll(text, &end, 0);
    else
        *value = strtoull(text, &end, 0);
    if (end == text)
        return false;
    if (*end == 'K' || *end == 'M')
        *value <<= *end++ == 'K' ? 10 : 20;
    return !*end;
}
