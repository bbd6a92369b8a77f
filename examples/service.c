/* service.c - a service: registers an object, and is called.
 *
 *     service [DEVICE]
 *
 * Its object, the greeter, knows one call: GREET. It comes with an object of the caller, which is called back before the
 * greeting goes out: the caller's thread, waiting for its reply, serves that call. */
#include <stddef.h>

#include "binder_ipc.h"
#include "greeter.h"

/* What the driver hands back with every call, so that a process knows which of its objects is meant. Any two 64-bit
 * numbers will do; most programs take the addresses of something of theirs. */
#define GREETER_POINTER 0x6000
#define GREETER_COOKIE 0x6001

static void on_transaction(struct binder *binder, const struct binder_transaction_data *call)
{
    struct flat_binder_object callback;
    struct binder_transaction_data answer;
    char name[NAME_SIZE] = "", greeting[GREETING_SIZE] = "";

    if (call->target.ptr != GREETER_POINTER || call->code != GREET || call->data_size != sizeof callback ||
        call->offsets_size != sizeof(binder_size_t))
        fail_because(binder, "called for something else than GREET with a callback");

    /* The caller sent an object of its own; what arrived is a handle to it. */
    memcpy(&callback, (const void *)(uintptr_t)call->data.ptr.buffer, sizeof callback);
    say(binder, "is called by process %d, with a callback: handle %u here", call->sender_pid, callback.handle);

    answer = binder_call(binder, callback.handle, WHO_ARE_YOU, NULL, 0, NULL, 0);
    if (answer.data_size == sizeof name)
        memcpy(name, (const void *)(uintptr_t)answer.data.ptr.buffer, sizeof name - 1);
    binder_free_buffer(binder, &answer);

    snprintf(greeting, sizeof greeting, "Hello, %s!", name);
    say(binder, "replies \"%s\"", greeting);
    binder_reply(binder, call, greeting, sizeof greeting, NULL, 0);
}

int main(int argc, char **argv)
{
    struct named_object entry = {
        .name = SERVICE_NAME,
        .object = {
            .hdr.type = BINDER_TYPE_BINDER,           /* an object of this process */
            .binder = GREETER_POINTER,
            .cookie = GREETER_COOKIE,
        },
    };
    const binder_size_t offset = offsetof(struct named_object, object);
    struct binder_transaction_data reply;
    struct binder binder;

    binder_open(&binder, "service", argc > 1 ? argv[1] : DEFAULT_DEVICE);
    binder.on_transaction = on_transaction;

    say(&binder, "registers itself as %s", SERVICE_NAME);
    reply = binder_call(&binder, SERVICE_MANAGER_HANDLE, ADD_SERVICE, &entry, sizeof entry, &offset, 1);
    binder_free_buffer(&binder, &reply);
    say(&binder, "is registered");
    binder_loop(&binder);
    return 0;
}
