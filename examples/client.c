/* client.c - a client: finds the service, calls it, is called back, and is told when it dies.
 *
 *     client [-w] [DEVICE]
 *
 *   -w  in the middle of the call, wait for a line on standard input (so that somebody can look at binder_logs/state)
 */
#include "binder_ipc.h"
#include "greeter.h"

#define CALLBACK_POINTER 0x7000
#define CALLBACK_COOKIE 0x7001
#define DEATH_COOKIE 0x7002

static int wait_in_callback;
static int service_is_dead;

/* This thread is waiting for the reply to GREET, and is called in the meantime. */
static void on_transaction(struct binder *binder, const struct binder_transaction_data *call)
{
    char name[NAME_SIZE] = "Ada";

    if (call->target.ptr != CALLBACK_POINTER || call->code != WHO_ARE_YOU)
        fail_because(binder, "called for something else than WHO_ARE_YOU");
    say(binder, "is called back while it waits, by process %d", call->sender_pid);
    if (wait_in_callback && getchar() == EOF)
        fail_because(binder, "nobody there to say go on");
    binder_reply(binder, call, name, sizeof name, NULL, 0);
}

static void on_death(struct binder *binder, binder_uintptr_t cookie)
{
    if (cookie != DEATH_COOKIE)
        fail_because(binder, "told of a death that it did not ask for");
    say(binder, "is told that the service is dead");
    service_is_dead = 1;
}

static uint32_t find_service(struct binder *binder)
{
    const char name[NAME_SIZE] = SERVICE_NAME;
    struct flat_binder_object object;
    struct binder_transaction_data reply;

    reply = binder_call(binder, SERVICE_MANAGER_HANDLE, GET_SERVICE, name, sizeof name, NULL, 0);
    if (reply.data_size != sizeof object)
        fail_because(binder, "there is no service of this name");
    memcpy(&object, (const void *)(uintptr_t)reply.data.ptr.buffer, sizeof object);

    /* A reference of our own, before the one that the reply's buffer holds goes away with it. */
    binder_put(binder, BC_ACQUIRE, &object.handle);
    binder_free_buffer(binder, &reply);
    say(binder, "has found %s: handle %u here", SERVICE_NAME, object.handle);
    return object.handle;
}

int main(int argc, char **argv)
{
    struct flat_binder_object callback = {
        .hdr.type = BINDER_TYPE_BINDER,
        .binder = CALLBACK_POINTER,
        .cookie = CALLBACK_COOKIE,
    };
    const binder_size_t offset = 0;
    struct binder_handle_cookie death = { .cookie = DEATH_COOKIE };
    struct binder_transaction_data reply;
    union binder_argument argument;
    struct binder binder;
    char greeting[GREETING_SIZE] = "";
    uint32_t greeter;

    if (argc > 1 && !strcmp(argv[1], "-w")) {
        wait_in_callback = 1;
        argc--, argv++;
    }
    binder_open(&binder, "client", argc > 1 ? argv[1] : DEFAULT_DEVICE);
    binder.on_transaction = on_transaction;
    binder.on_death = on_death;

    greeter = find_service(&binder);
    death.handle = greeter;
    binder_put(&binder, BC_REQUEST_DEATH_NOTIFICATION, &death);

    say(&binder, "calls GREET, with a callback");
    reply = binder_call(&binder, greeter, GREET, &callback, sizeof callback, &offset, 1);
    if (reply.data_size == sizeof greeting)
        memcpy(greeting, (const void *)(uintptr_t)reply.data.ptr.buffer, sizeof greeting - 1);
    say(&binder, "is greeted: \"%s\"", greeting);
    binder_free_buffer(&binder, &reply);

    say(&binder, "waits for the service to die");
    while (!service_is_dead)
        binder_wait_for(&binder, BR_DEAD_BINDER, &argument);

    binder_put(&binder, BC_RELEASE, &greeter);
    binder_write_read(&binder, 0);
    return 0;
}
