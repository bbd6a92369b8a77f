/* SPDX-License-Identifier: Apache-2.0
 *
 * The conformance player: plays scenarios (../README.md has the language) against a binder device.
 *
 * main.c      reads the command line, plays one file after the other
 * scenario.c  the text of a scenario as a tree of lines and a list of steps
 * words.c     the protocol's names and the shape of what they carry
 * stage.c     the coordinator: makes processes and threads, gives them one step at a time, sees who is blocked
 * act.c       one step, done in the process and thread that it names
 * compose.c   the bytes of commands and payloads
 * report.c    what came back, as text
 * logs.c      the binder_logs files, with numbers that differ from run to run turned into names
 *
 * Coordinator and actors share the scenario (parsed before any fork) and one page range of shared memory (struct stage).
 */
#ifndef CONFORMANCE_PLAYER_H
#define CONFORMANCE_PLAYER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "binder.h"

enum {
    MAX_PROCESSES = 12,
    MAX_ACTORS = 32,
    MAX_LABELS = 96,
    MAX_OPENS = 64,
    MAX_DESCRIPTORS = 16,
    MAX_RECEIVED = 8,
    NAME_SIZE = 32,
    REPORT_SIZE = 1 << 17,
};

/* ---- scenario.c ---- */

struct line {
    int indent, words;
    char **word;
    struct line *next, *child;
};

struct step {
    int actor; /* -1: the coordinator's own */
    struct line *line;
    int first, last; /* its text: scenario.text[first .. last) */
};

struct scenario {
    int lines, steps, processes, actors, lets;
    char **text; /* every line but results */
    struct step *step;
    char process[MAX_PROCESSES][NAME_SIZE];
    struct {
        char name[NAME_SIZE];
        int process;
    } actor[MAX_ACTORS];
    struct {
        char name[NAME_SIZE];
        uint64_t value;
    } let[MAX_LABELS];
};

/* NULL, after a message to stderr, when the text is not a scenario. */
struct scenario *scenario_read(const char *path);
void scenario_free(struct scenario *);
int scenario_process(const struct scenario *, const char *name);
int scenario_actor(const struct scenario *, const char *name);
/* The value of word `key=value` in a line, or NULL. */
const char *line_option(const struct line *, const char *key);
/* The line's n-th word after the first `skip` that is not an option, or NULL. */
const char *line_word(const struct line *, int skip, int n);

/* ---- words.c ---- */

/* shape: 4 = u32, i = s32, 8 = u64, t/T/C = transaction data plain/with buffers size/with security context, f = frozen state */
struct word {
    const char *name, *shape;
    uint32_t value;
};

extern const struct word command_words[], return_words[], ioctl_words[], object_words[], flag_words[], log_words[];
const struct word *word_named(const struct word *table, const char *name);
const struct word *word_valued(const struct word *table, uint32_t value);
bool number(const char *text, uint64_t *value);

/* ---- shared between coordinator and actors ---- */

struct label {
    char name[NAME_SIZE];
    uint64_t buffer, ptr, cookie, handle[MAX_RECEIVED], fd[MAX_RECEIVED];
    int handles, fds;
};

struct mailbox {
    _Atomic uint32_t asked, answered; /* step numbers, counted from 1 */
    int step;
    _Atomic pid_t tid;
    _Atomic bool broken; /* a step could not be done at all */
    size_t length;
    char report[REPORT_SIZE];
};

struct stage {
    struct mailbox actor[MAX_ACTORS];
    struct {
        _Atomic pid_t pid;
        _Atomic bool present;
        _Atomic int holds[MAX_DESCRIPTORS]; /* for each of its descriptors: which open, counted from 1; 0: none */
    } process[MAX_PROCESSES];
    _Atomic int opens;
    struct label label[MAX_LABELS], last[MAX_ACTORS];
    int labels;
};

struct play {
    struct scenario *scenario;
    struct stage *stage;
    const char *root; /* the binderfs */
    bool character_device;
    int debug_id_base;
    int seconds; /* how long a step may take */
};

extern struct play play;

/* ---- act.c ---- */

/* What a process knows of itself; copied by its forks. */
struct descriptor {
    char name[NAME_SIZE];
    int fd; /* -1: free */
    bool file; /* no device, but what memfd made */
    uint8_t *map;
    size_t map_size;
};

struct self {
    int process;
    struct descriptor descriptor[MAX_DESCRIPTORS];
    int received_fds, received_fd[64];
    uint8_t *forbidden; /* a page that cannot be accessed */
};

extern struct self self;
extern _Thread_local int me; /* the actor that this thread is */

void act(int step);
void act_threads(int process, int first_actor);
uint64_t evaluate(const char *expression);
const char *process_name(pid_t pid);

/* ---- compose.c ---- */

struct bytes {
    uint8_t *data;
    size_t size, room;
};

void append(struct bytes *, const void *, size_t);
/* Puts bytes where this process can read (or write) only the first `reach` of them; < 0: all. Freed by release_placed(). */
void *place(const void *data, size_t size, int64_t reach);
void release_placed(void);
void compose_commands(struct bytes *out, struct line *first);
void compose_items(struct bytes *out, struct line *first);

/* ---- report.c ---- */

void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
const char *flag_names(uint32_t flags);
const char *error_name(int error);
const char *quoted(const void *data, size_t size);
/* Prints the returns in [data, data + size) and keeps what they carry under `label` (may be NULL). */
void report_returns(const uint8_t *data, size_t size, const char *label);
const char *address_name(uint64_t address);

/* ---- logs.c ---- */

void logs_begin(void);
void logs_show(const char *name, const char *process);
int logs_live_processes(void);
bool logs_thread_waits(pid_t pid, pid_t tid);
const char *thread_name(pid_t tid);

/* ---- stage.c ---- */

/* 0, or 1 when the scenario could not be played to its end. */
int stage_play(const char *path);

#endif
