/* What the three programs agree on: names, codes and the layout of the data. The driver knows nothing of it. */
#ifndef GREETER_H
#define GREETER_H

#include <linux/android/binder.h>

#define NAME_SIZE 32
#define GREETING_SIZE 48
#define SERVICE_NAME "greeter"

/* Handle 0 is always the context manager: the one object that can be called without having been given it. */
#define SERVICE_MANAGER_HANDLE 0

enum {
    ADD_SERVICE = 1,  /* to the service manager: struct named_object; the reply is empty */
    GET_SERVICE = 2,  /* to the service manager: char[NAME_SIZE]; the reply is a struct flat_binder_object, or empty */
    GREET = 3,        /* to the greeter: struct flat_binder_object, a callback; the reply is char[GREETING_SIZE] */
    WHO_ARE_YOU = 4,  /* to the callback: nothing; the reply is char[NAME_SIZE] */
};

struct named_object {
    char name[NAME_SIZE];
    struct flat_binder_object object;
};

#endif
