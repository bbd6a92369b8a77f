/* A program that looks for a while whether anybody writes to its memory; exits with 1 if so. It is linked so that `data`
 * lies at an address that is known before it runs. */
#include <stddef.h>
#include <time.h>

__attribute__((section(".watched"))) volatile unsigned char data[WATCHED_SIZE] = {1};

int main(void)
{
    struct timespec begin, now;
    size_t i;

    clock_gettime(CLOCK_MONOTONIC, &begin);
    do {
        for (i = 0; i < sizeof data; i++)
            if (data[i] != (i == 0))
                return 1;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - begin.tv_sec) * 1000000000L + now.tv_nsec - begin.tv_nsec < 500000);
    return 0;
}
