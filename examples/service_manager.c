/* service_manager.c - the context manager: knows the services by name.
 *
 *     service_manager [DEVICE]
 *
 * It makes itself handle 0 of the device and then serves two calls. ADD_SERVICE brings an object; the driver turns it
 * into a handle of this process on the way. GET_SERVICE gives that handle to somebody else; the driver turns it into
 * a handle of theirs. When a service dies, its name is forgotten. */
#include "binder_ipc.h"
#include "greeter.h"

#define SERVICES 16

static struct {
    char name[NAME_SIZE];                             /* empty: a free place */
    uint32_t handle;
} services[SERVICES];

static void add_service(struct binder *binder, const struct binder_transaction_data *call)
{
    struct named_object entry;
    struct binder_handle_cookie death;

    if (call->data_size != sizeof entry || call->offsets_size != sizeof(binder_size_t))
        fail_because(binder, "ADD_SERVICE with something else than a name and an object");
    memcpy(&entry, (const void *)(uintptr_t)call->data.ptr.buffer, sizeof entry);
    for (size_t i = 0; i < SERVICES; i++)
        if (!services[i].name[0]) {
            snprintf(services[i].name, NAME_SIZE, "%s", entry.name);
            services[i].handle = entry.object.handle;
            say(binder, "%s is added, it is handle %u here", services[i].name, services[i].handle);

            /* The handle is only sure to exist until the call's buffer is freed. A reference of our own keeps it. */
            binder_put(binder, BC_ACQUIRE, &entry.object.handle);

            /* The cookie is ours to choose; it comes back with BR_DEAD_BINDER. */
            death.handle = entry.object.handle;
            death.cookie = i;
            binder_put(binder, BC_REQUEST_DEATH_NOTIFICATION, &death);
            binder_reply(binder, call, NULL, 0, NULL, 0);
            return;
        }
    fail_because(binder, "too many services");
}

static void get_service(struct binder *binder, const struct binder_transaction_data *call)
{
    struct flat_binder_object object = { .hdr.type = BINDER_TYPE_HANDLE };
    const binder_size_t offset = 0;
    char name[NAME_SIZE];

    if (call->data_size != sizeof name)
        fail_because(binder, "GET_SERVICE with something else than a name");
    memcpy(name, (const void *)(uintptr_t)call->data.ptr.buffer, sizeof name);
    name[sizeof name - 1] = 0;
    for (size_t i = 0; i < SERVICES; i++)
        if (services[i].name[0] && !strcmp(services[i].name, name)) {
            say(binder, "%s is asked for by process %d", name, call->sender_pid);
            object.handle = services[i].handle;
            binder_reply(binder, call, &object, sizeof object, &offset, 1);
            return;
        }
    say(binder, "%s is asked for, and not here", name);
    binder_reply(binder, call, NULL, 0, NULL, 0);
}

static void on_transaction(struct binder *binder, const struct binder_transaction_data *call)
{
    if (call->code == ADD_SERVICE)
        add_service(binder, call);
    else if (call->code == GET_SERVICE)
        get_service(binder, call);
    else
        binder_reply(binder, call, NULL, 0, NULL, 0);
}

static void on_death(struct binder *binder, binder_uintptr_t cookie)
{
    say(binder, "%s is dead", services[cookie].name);
    services[cookie].name[0] = 0;
    binder_put(binder, BC_RELEASE, &services[cookie].handle);
}

int main(int argc, char **argv)
{
    struct binder binder;
    int unused = 0;

    binder_open(&binder, "service_manager", argc > 1 ? argv[1] : DEFAULT_DEVICE);
    binder.on_transaction = on_transaction;
    binder.on_death = on_death;

    /* There is one context manager for each device: a second one gets EBUSY. */
    if (ioctl(binder.fd, BINDER_SET_CONTEXT_MGR, &unused) < 0)
        fail(&binder, "BINDER_SET_CONTEXT_MGR");
    say(&binder, "is the context manager");
    binder_loop(&binder);
    return 0;
}
