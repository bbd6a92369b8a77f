/* SPDX-License-Identifier: Apache-2.0
 *
 * The coordinator: makes the scenario's processes and threads, gives them one step at a time, and says what came of it.
 *
 * A step that blocks is not waited for: it is said to block, and its result is said under the later step that ended it.
 * Blocking is seen, not timed. On the real driver a thread that sleeps within an ioctl or a poll is blocked, since the
 * driver sleeps interruptibly nowhere else. On a FUSE mount a thread sleeps also while the server works for it; there, a
 * reading thread is blocked when the log says so besides (looper bit 0x10), and one that polls or freezes when it has
 * slept for a while. That while is short where the kernel says that a thread sleeps in poll itself and not in a request:
 * who is to poll again is woken before the step that is behind it ends, except where the server has work left to do then.
 *
 * Closing a device is finished by the driver in the background; the coordinator waits until the count of open devices is
 * what it should be.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "player.h"

struct play play;

static int blocked_step[MAX_ACTORS]; /* the step an actor is blocked in, or -1 */
static bool closing;                  /* the last step closed a device, which is finished in the background */

static int64_t milliseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static char task_state(pid_t pid, pid_t tid)
{
    char path[64], text[512], *at;
    ssize_t got;
    int fd;

    snprintf(path, sizeof path, "/proc/%d/task/%d/stat", pid, tid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 'X';
    got = read(fd, text, sizeof text - 1);
    close(fd);
    if (got <= 0)
        return 'X';
    text[got] = 0;
    at = strrchr(text, ')');
    return at && at[1] ? at[2] : '?';
}

/* Where a polling thread sleeps: in poll itself, elsewhere (its request is with the server), or the kernel does not say. */
enum place { IN_POLL, ELSEWHERE, UNKNOWN };

static enum place place_of_poll(pid_t pid, pid_t tid)
{
    char path[64], text[64] = "";
    int fd;

    snprintf(path, sizeof path, "/proc/%d/task/%d/wchan", pid, tid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return UNKNOWN;
    if (read(fd, text, sizeof text - 1) < 0)
        text[0] = 0;
    close(fd);
    if (!strncmp(text, "poll_schedule_timeout", 21) || !strncmp(text, "ep_poll", 7))
        return IN_POLL;
    return !strncmp(text, "request_wait_answer", 19) ? ELSEWHERE : UNKNOWN;
}

static int actor_process(int actor)
{
    return play.scenario->actor[actor].process;
}

static bool answered(int actor)
{
    struct mailbox *box = &play.stage->actor[actor];

    return box->asked == box->answered;
}

static bool reads(const struct line *line)
{
    return !strcmp(line->word[1], "read") || !strcmp(line->word[1], "exchange");
}

/* Steps that may wait for what other steps do: reads, polls without a time limit, freezes with a long one. */
static bool may_block(const struct line *line)
{
    const char *verb = line->word[1], *last = line_word(line, 2, 3);
    uint64_t limit;

    if (!strcmp(verb, "ioctl") && line->words > 2 && !strcmp(line->word[2], "BINDER_FREEZE"))
        return last && number(last, &limit) && limit >= 1000;
    if (!strcmp(verb, "poll") || !strcmp(verb, "epoll"))
        return !strcmp(line->word[line->words - 1], "forever");
    return reads(line);
}

static bool is_blocked(int actor, const struct step *step, int64_t *asleep_since)
{
    pid_t pid = play.stage->process[actor_process(actor)].pid, tid = play.stage->actor[actor].tid;
    /* A server may be about to answer a thread that its log shows waiting, while it changes that thread's priority. */
    int long_enough = reads(step->line) ? 5 : 250, shortly = 10;

    if (!may_block(step->line))
        return false;
    if (task_state(pid, tid) != 'S' || answered(actor)) {
        *asleep_since = 0;
        return false;
    }
    if (play.character_device)
        return true;
    if (reads(step->line) && !logs_thread_waits(pid, tid)) {
        *asleep_since = 0;
        return false;
    }
    if (!*asleep_since)
        *asleep_since = milliseconds();
    if (!reads(step->line) && strcmp(step->line->word[1], "ioctl")) {
        enum place place = place_of_poll(pid, tid);

        if (place == ELSEWHERE) {
            *asleep_since = 0;
            return false;
        }
        if (place == IN_POLL && !closing)
            long_enough = shortly;
    }
    return milliseconds() - *asleep_since > long_enough && !answered(actor);
}

/* True when the actor has answered, false when it is blocked or its process is gone. */
static bool wait_for_actor(int actor, const struct step *step)
{
    struct mailbox *box = &play.stage->actor[actor];
    int64_t limit = milliseconds() + play.seconds * 1000, asleep_since = 0;

    for (;;) {
        uint32_t seen = box->answered;
        struct timespec a_little = { 0, 1000000 };

        if (seen == box->asked)
            return true;
        syscall(SYS_futex, &box->answered, FUTEX_WAIT, seen, &a_little, NULL, 0);
        if (answered(actor))
            return true;
        if (task_state(play.stage->process[actor_process(actor)].pid, box->tid) == 'X')
            return false;
        if (is_blocked(actor, step, &asleep_since))
            return false;
        if (milliseconds() > limit) {
            printf("    | (no answer in %d s)\n", play.seconds);
            box->broken = true;
            return false;
        }
    }
}

static void say_report(int actor, const char *indent)
{
    struct mailbox *box = &play.stage->actor[actor];
    char *rest, *line;

    box->report[box->length] = 0;
    rest = box->report;
    while ((line = strsep(&rest, "\n")))
        if (*line)
            printf("    | %s%s\n", indent, line + 4);
    box->length = 0;
}

static void say_text(int from, int to)
{
    for (int i = from; i < to; i++)
        printf("%s\n", play.scenario->text[i]);
}

/* ---- processes ---- */

static bool comes_by_fork(int process)
{
    for (int i = 0; i < play.scenario->steps; i++) {
        const struct line *line = play.scenario->step[i].line;

        if (play.scenario->step[i].actor >= 0 && !strcmp(line->word[1], "fork") && line->words > 2 &&
            !strcmp(line->word[2], play.scenario->process[process]))
            return true;
    }
    return false;
}

static void wait_for_threads(int process)
{
    for (int i = 0; i < play.scenario->actors; i++)
        while (actor_process(i) == process && !play.stage->actor[i].tid)
            usleep(200);
}

static void start_process(int process)
{
    pid_t pid;

    fflush(NULL);
    pid = fork();
    if (!pid) {
        syscall(SYS_close_range, 3, ~0U, 0); /* descriptor numbers are the same wherever the player runs */
        for (int i = 0; i < MAX_DESCRIPTORS; i++)
            self.descriptor[i].fd = -1;
        act_threads(process, scenario_actor(play.scenario, play.scenario->process[process]));
    }
    play.stage->process[process].pid = pid;
    play.stage->process[process].present = true;
    wait_for_threads(process);
}

/* How many opens of a device the processes hold. */
static int held_opens(void)
{
    bool seen[MAX_OPENS + 1] = { false };
    int count = 0;

    for (int p = 0; p < play.scenario->processes; p++)
        for (int i = 0; i < MAX_DESCRIPTORS; i++) {
            int open = play.stage->process[p].holds[i];

            if (open > 0 && open <= MAX_OPENS && !seen[open]) {
                seen[open] = true;
                count++;
            }
        }
    return count;
}

/* Waits until the driver has let go of what was closed; `before` is what held_opens() was then. */
static void wait_for_closed(int before, int wait)
{
    int64_t limit = milliseconds() + wait;
    int held = held_opens(), live;

    while ((live = logs_live_processes()) >= 0 && live > held && milliseconds() < limit)
        usleep(300);
    if (held == before)
        usleep(20000); /* a flush that frees nothing leaves no trace to wait for */
}

static void bury(int process)
{
    int status;

    waitpid(play.stage->process[process].pid, &status, 0);
    play.stage->process[process].present = false;
    for (int i = 0; i < MAX_DESCRIPTORS; i++)
        play.stage->process[process].holds[i] = 0;
    for (int i = 0; i < play.scenario->actors; i++)
        if (actor_process(i) == process)
            blocked_step[i] = -1;
}

/* ---- steps ---- */

/* What earlier, blocked steps have come to. */
static void say_finished(void)
{
    for (int i = 0; i < play.scenario->actors; i++) {
        const struct step *step;

        if (blocked_step[i] < 0 || !play.stage->process[actor_process(i)].present)
            continue;
        step = &play.scenario->step[blocked_step[i]];
        if (!wait_for_actor(i, step))
            continue;
        printf("    | %s goes on:\n", play.scenario->actor[i].name);
        say_report(i, "    ");
        blocked_step[i] = -1;
    }
}

static void coordinate(const struct step *step)
{
    const struct line *line = step->line;
    const char *verb = line->word[0], *name = line->word[1];

    if (!strcmp(verb, "show")) {
        logs_show(name, line->words > 2 ? line->word[2] : NULL);
    } else if (!strcmp(verb, "kill")) {
        int process = scenario_process(play.scenario, name), before = held_opens();

        if (process < 0 || !play.stage->process[process].present) {
            printf("    | not there\n");
            return;
        }
        kill(play.stage->process[process].pid, SIGKILL);
        closing = true;
        bury(process);
        wait_for_closed(before, 1000);
        printf("    | 0\n");
    } else if (!strcmp(verb, "signal")) {
        int actor = scenario_actor(play.scenario, name);
        int result = actor < 0 ? -1
                               : (int)syscall(SYS_tgkill, play.stage->process[actor_process(actor)].pid,
                                              play.stage->actor[actor].tid, SIGUSR1);

        printf("    | %s\n", result ? "not there" : "0");
    }
}

static bool play_step(int number)
{
    const struct step *step = &play.scenario->step[number];
    const char *verb = step->line->word[1];
    int actor = step->actor, process, before = held_opens();
    struct mailbox *box;

    closing = actor >= 0 && (!strcmp(verb, "exit") || !strcmp(verb, "close") || !strcmp(verb, "closefd") ||
                             !strcmp(verb, "munmap"));
    if (actor < 0) {
        coordinate(step);
        say_finished();
        return true;
    }
    process = actor_process(actor);
    box = &play.stage->actor[actor];
    if (!play.stage->process[process].present) {
        printf("    | not there\n");
        return true;
    }
    if (blocked_step[actor] >= 0) {
        printf("    | busy\n");
        return true;
    }
    box->step = number;
    box->asked++;
    syscall(SYS_futex, &box->asked, FUTEX_WAKE, 1, NULL, NULL, 0);
    if (!strcmp(verb, "exit")) {
        bury(process);
        wait_for_closed(before, 1000);
        printf("    | 0\n");
    } else if (wait_for_actor(actor, step)) {
        if (!strcmp(verb, "fork"))
            wait_for_threads(scenario_process(play.scenario, step->line->word[2]));
        if (!strcmp(verb, "close"))
            wait_for_closed(before, 500);
        else if (!strcmp(verb, "closefd"))
            wait_for_closed(-1, 500);
        say_report(actor, "");
    } else if (!box->broken) {
        printf("    | blocks\n");
        blocked_step[actor] = number;
    }
    say_finished();
    return !box->broken;
}

/* ---- a whole scenario ---- */

/* Takes the place of the devices that the scenario uses by new ones of the same name, where the mount lets us. */
static void renew_devices(void)
{
    static const char *const names[] = { "binder", "hwbinder", "vndbinder" };
    char path[512];
    struct device {
        char name[256];
        uint32_t major, minor;
    } device;
    int control;

    snprintf(path, sizeof path, "%s/binder-control", play.root);
    control = open(path, O_RDONLY | O_CLOEXEC);
    if (control < 0)
        return;
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", play.root, names[i]);
        memset(&device, 0, sizeof device);
        strcpy(device.name, names[i]);
        if (!unlink(path))
            ioctl(control, _IOWR('b', 1, struct device), &device);
    }
    close(control);
}

/* The driver's count of debug ids: a call that cannot succeed uses one, and the extended error tells it. */
static int probe_debug_id(void)
{
    struct {
        uint32_t command;
        struct binder_transaction_data t;
    } __attribute__((packed)) call = { BC_TRANSACTION, { .target.handle = 0x7fffffff } };
    struct binder_write_read b = { .write_size = sizeof call, .write_buffer = (uintptr_t)&call };
    struct binder_extended_error error = { 0, 0, 0 };
    char path[512];
    struct stat status;
    int fd;

    snprintf(path, sizeof path, "%s/binder", play.root);
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -1;
    fstat(fd, &status);
    play.character_device = S_ISCHR(status.st_mode);
    ioctl(fd, BINDER_WRITE_READ, &b);
    ioctl(fd, BINDER_GET_EXTENDED_ERROR, &error);
    close(fd);
    return error.id;
}

/* The probe's open is no part of what the scenario counts. */
static void wait_for_probe_gone(int before)
{
    int64_t limit = milliseconds() + 1000;

    while (logs_live_processes() > before && milliseconds() < limit)
        usleep(300);
}

int stage_play(const char *path)
{
    int shown = 0, failed = 0, before;

    play.scenario = scenario_read(path);
    if (!play.scenario)
        return 1;
    renew_devices();
    logs_begin();
    before = logs_live_processes();
    play.debug_id_base = probe_debug_id();
    if (play.debug_id_base < 0) {
        fprintf(stderr, "%s/binder: %s\n", play.root, strerror(errno));
        scenario_free(play.scenario);
        return 1;
    }
    wait_for_probe_gone(before);
    logs_begin();
    play.stage = mmap(NULL, sizeof *play.stage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < MAX_ACTORS; i++)
        blocked_step[i] = -1;
    for (int i = 0; i < play.scenario->processes; i++)
        if (!comes_by_fork(i))
            start_process(i);
    for (int i = 0; i < play.scenario->steps && !failed; i++) {
        say_text(shown, play.scenario->step[i].last);
        shown = play.scenario->step[i].last;
        failed = !play_step(i);
        fflush(stdout);
    }
    say_text(shown, play.scenario->lines);
    for (int i = 0; i < play.scenario->processes; i++)
        if (play.stage->process[i].present) {
            kill(play.stage->process[i].pid, SIGKILL);
            bury(i);
        }
    wait_for_closed(-1, 2000);
    munmap(play.stage, sizeof *play.stage);
    scenario_free(play.scenario);
    fflush(stdout);
    return failed;
}
