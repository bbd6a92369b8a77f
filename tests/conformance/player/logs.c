/* SPDX-License-Identifier: Apache-2.0
 *
 * The binder_logs files, with what differs from run to run turned into names: process and thread numbers, kernel
 * addresses, times, line numbers. Debug ids count from the scenario's start, and so do the counters of `stats`;
 * entries of the two rings that are older than that are left out.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "player.h"

static struct {
    char name[64];
    int active, total; /* a plain counter: total alone */
} before[80];
static int befores;

static char *slurp(const char *name)
{
    char path[512];
    size_t size = 0, room = 1 << 16;
    char *text = malloc(room);
    ssize_t got;
    int fd;

    snprintf(path, sizeof path, "%s/binder_logs/%s", play.root, name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        free(text);
        return NULL;
    }
    while ((got = read(fd, text + size, room - size - 1)) > 0) {
        size += got;
        if (room - size < 4096)
            text = realloc(text, room *= 2);
    }
    text[size] = 0;
    close(fd);
    return text;
}

/* One line `NAME: active A total T` or `NAME: N` of the global part of stats. */
static bool counter(const char *line, char *name, int *active, int *total)
{
    if (*line == ' ' || !strncmp(line, "proc ", 5))
        return false;
    *active = 0;
    return sscanf(line, "%63[^:]: active %d total %d", name, active, total) == 3 ||
           sscanf(line, "%63[^:]: %d", name, total) == 2;
}

void logs_begin(void)
{
    char *text = slurp("stats"), *rest = text, *line;

    befores = 0;
    if (!text)
        return;
    while ((line = strsep(&rest, "\n")) && befores < (int)(sizeof before / sizeof *before)) {
        if (!strncmp(line, "proc ", 5))
            break;
        if (counter(line, before[befores].name, &before[befores].active, &before[befores].total))
            befores++;
    }
    free(text);
}

static void subtract(const char *name, int *active, int *total)
{
    for (int i = 0; i < befores; i++)
        if (!strcmp(before[i].name, name)) {
            *active -= before[i].active;
            *total -= before[i].total;
        }
}

/* How many opens the driver knows of, over those at the scenario's start; -1 when stats cannot be read. */
int logs_live_processes(void)
{
    char *text = slurp("stats"), *at;
    int active = 0, total = 0;

    if (!text)
        return -1;
    at = strstr(text, "\nproc: active ");
    if (at)
        sscanf(at, "\nproc: active %d total %d", &active, &total);
    free(text);
    subtract("proc", &active, &total);
    return active;
}

bool logs_thread_waits(pid_t pid, pid_t tid)
{
    char name[32], start[32], *text, *rest, *line;
    bool waits = false;

    snprintf(name, sizeof name, "proc/%d", pid);
    snprintf(start, sizeof start, "  thread %d: l %%x", tid);
    rest = text = slurp(name);
    while (text && (line = strsep(&rest, "\n"))) {
        unsigned int looper;

        if (sscanf(line, start, &looper) == 1)
            waits |= !!(looper & 0x10);
    }
    free(text);
    return waits;
}

const char *thread_name(pid_t tid)
{
    if (!tid)
        return "0";
    for (int i = 0; i < play.scenario->actors; i++)
        if (play.stage->actor[i].tid == tid)
            return play.scenario->actor[i].name;
    return "?";
}

static int relative(int id)
{
    return id > play.debug_id_base ? id - play.debug_id_base : id ? -1 : 0;
}

/* PREFIX transaction ID: ADDRESS from P:T to P:T code ... elapsed Nms[ node ID size ...] */
static bool show_transaction(const char *line)
{
    const char *at = strstr(line, "transaction ");
    int id, from, from_thread, to, to_thread, length, code_end, node;
    char *elapsed, code[128];

    if (!at || sscanf(at, "transaction %d: %*s from %d:%d to %d:%d code %n", &id, &from, &from_thread, &to, &to_thread, &length) < 5)
        return false;
    elapsed = strstr(at, " elapsed ");
    if (!elapsed)
        return false;
    code_end = elapsed - (at + length);
    snprintf(code, sizeof code, "%.*s", code_end, at + length);
    printf("    | %.*stransaction %d: from %s:%s to %s:%s code %s", (int)(at - line), line, relative(id), process_name(from),
           thread_name(from_thread), process_name(to), thread_name(to_thread), code);
    elapsed = strstr(elapsed, "ms");
    if (sscanf(elapsed, "ms node %d%n", &node, &length) == 1)
        printf(" node %d%s\n", relative(node), elapsed + length);
    else
        printf("%s\n", elapsed + 2);
    return true;
}

static bool show_node(const char *line)
{
    char *processes;
    int id, length;

    if (sscanf(line, "  node %d:%n", &id, &length) != 1)
        return false;
    processes = strstr(line, " proc ");
    if (!processes) {
        printf("    |   node %d:%s\n", relative(id), line + length);
        return true;
    }
    printf("    |   node %d:%.*s proc", relative(id), (int)(processes - line - length), line + length);
    for (char *p = processes + 5; *p;)
        printf(" %s", process_name(strtol(p, &p, 10)));
    printf("\n");
    return true;
}

/* ID: KIND from P:T to P:T context NAME node ID handle N size A:B ret A/B l=N */
static bool show_ring_entry(const char *line)
{
    int id, from, from_thread, to, to_thread, node, length, line_number = 0, first, second;
    char kind[16], context[300];
    const char *result;

    if (sscanf(line, "%d: %15s from %d:%d to %d:%d context %299s node %d%n", &id, kind, &from, &from_thread, &to, &to_thread,
               context, &node, &length) != 8)
        return false;
    if (id <= play.debug_id_base)
        return true;
    result = strstr(line, " ret ");
    sscanf(result, " ret %d/%d l=%d", &first, &second, &line_number);
    printf("    | %d: %s from %s:%s to %s:%s context %s node %d%.*s ret %d/%d%s%s\n", relative(id), kind, process_name(from),
           thread_name(from_thread), process_name(to), thread_name(to_thread), context, relative(node),
           (int)(result - line - length), line + length, first, second, line_number ? " at a line" : "",
           strstr(line, "(incomplete)") ? " (incomplete)" : "");
    return true;
}

static void show_line(const char *line, bool ring, bool counters)
{
    char name[64], dead[16] = "", pointer[40];
    int id, node, active, total, length, strong, weak;
    unsigned int description;

    if (ring && show_ring_entry(line))
        return;
    if (counters && counter(line, name, &active, &total)) {
        bool pair = strstr(line, ": active ") != NULL;

        subtract(name, &active, &total);
        if (pair && (active || total))
            printf("    | %s: active %d total %d\n", name, active, total);
        else if (!pair && total)
            printf("    | %s: %d\n", name, total);
        return;
    }
    if (show_transaction(line) || show_node(line))
        return;
    if (sscanf(line, "proc %d", &id) == 1)
        printf("    | proc %s\n", process_name(id));
    else if (sscanf(line, "  thread %d:%n", &id, &length) == 1)
        printf("    |   thread %s:%s\n", thread_name(id), line + length);
    else if (sscanf(line, "  ref %d: desc %u %15[d ea]node %d s %d w %d d %39s", &id, &description, dead, &node, &strong, &weak,
                    pointer) == 7)
        printf("    |   ref %d: desc %u dead node %d s %d w %d d %s\n", relative(id), description, relative(node), strong, weak,
               strspn(pointer, "0x") == strlen(pointer) ? "0" : "set");
    else if (sscanf(line, "  ref %d: desc %u node %d s %d w %d d %39s", &id, &description, &node, &strong, &weak, pointer) == 6)
        printf("    |   ref %d: desc %u node %d s %d w %d d %s\n", relative(id), description, relative(node), strong, weak,
               strspn(pointer, "0x") == strlen(pointer) ? "0" : "set");
    else if (sscanf(line, "  buffer %d:%n", &id, &length) == 1)
        printf("    |   buffer %d:%s\n", relative(id), line + length);
    else if (strstr(line, "node work ") && sscanf(strstr(line, "node work "), "node work %d:%n", &id, &length) == 1)
        printf("    | %.*snode work %d:%s\n", (int)(strstr(line, "node work ") - line), line, relative(id),
               strstr(line, "node work ") + length);
    else
        printf("    | %s\n", line);
}

void logs_show(const char *name, const char *process)
{
    char path[64];
    char *text, *rest, *line;
    bool counters = !strcmp(name, "stats");

    snprintf(path, sizeof path, "%s", name);
    if (!strcmp(name, "proc")) {
        int index = process ? scenario_process(play.scenario, process) : -1;

        snprintf(path, sizeof path, "proc/%d", index < 0 ? 0 : play.stage->process[index].pid);
    }
    rest = text = slurp(path);
    if (!text) {
        printf("    | not there\n");
        return;
    }
    while ((line = strsep(&rest, "\n"))) {
        if (!strncmp(line, "proc ", 5))
            counters = false;
        if (*line)
            show_line(line, strstr(name, "transaction_log") != NULL, counters);
    }
    free(text);
}
