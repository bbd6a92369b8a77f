/* SPDX-License-Identifier: Apache-2.0
 *
 * player [-d BINDERFS] [-t SECONDS] [-m] SCENARIO... | @LIST
 *
 * Plays scenarios one after the other, each with processes of its own, and prints each with its results. With more than
 * one, or -m, a line "=== FILE" stands before each. @LIST is a file that names one scenario a line.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "player.h"

static int play_one(const char *path, bool titled)
{
    if (titled)
        printf("=== %s\n", path);
    return stage_play(path);
}

static int play_list(const char *path)
{
    FILE *list = fopen(path, "r");
    char line[512];
    int failed = 0;

    if (!list) {
        perror(path);
        return 1;
    }
    while (fgets(line, sizeof line, list)) {
        line[strcspn(line, "\n")] = 0;
        if (*line)
            failed |= play_one(line, true);
    }
    fclose(list);
    return failed;
}

int main(int argc, char **argv)
{
    bool titled = false;
    int option, failed = 0;

    setpriority(PRIO_PROCESS, 0, 0); /* where it may: transcripts show nice values */
    play.root = "/dev/binderfs";
    play.seconds = 20;
    while ((option = getopt(argc, argv, "d:t:m")) != -1) {
        if (option == 'd')
            play.root = optarg;
        else if (option == 't')
            play.seconds = atoi(optarg);
        else if (option == 'm')
            titled = true;
        else
            return 2;
    }
    if (optind == argc) {
        fprintf(stderr, "usage: %s [-d BINDERFS] [-t SECONDS] [-m] SCENARIO... | @LIST\n", argv[0]);
        return 2;
    }
    titled |= argc - optind > 1;
    for (int i = optind; i < argc; i++)
        failed |= argv[i][0] == '@' ? play_list(argv[i] + 1) : play_one(argv[i], titled);
    return failed;
}
