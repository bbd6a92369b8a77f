/* SPDX-License-Identifier: Apache-2.0
 *
 * The text of a scenario: a tree of lines by indentation, and the list of steps (lines that are not indented).
 *
 * Results of an earlier play (lines that begin with '|') are dropped on reading; everything else is kept to be said
 * again, so that the output of a play is the scenario with its results.
 */
#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "player.h"

static const char *const coordinator_verbs[] = { "processes", "let", "show", "kill", "signal", NULL };

static int complain(const char *path, int line, const char *format, ...)
{
    va_list arguments;

    fprintf(stderr, "%s:%d: ", path, line);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    return -1;
}

static char *slurp(const char *path)
{
    FILE *file = fopen(path, "r");
    size_t size = 0, room = 1 << 16, got;
    char *text = malloc(room);

    if (!file) {
        perror(path);
        free(text);
        return NULL;
    }
    while ((got = fread(text + size, 1, room - size - 1, file)) > 0) {
        size += got;
        if (room - size < 2)
            text = realloc(text, room *= 2);
    }
    text[size] = 0;
    fclose(file);
    return text;
}

/* Splits at blanks, but not within double quotes. Returns NULL when a quote is left open. */
static struct line *split(const char *text)
{
    struct line *line = calloc(1, sizeof *line);
    const char *p = text;

    line->word = calloc(strlen(text) + 1, sizeof *line->word);
    while (*p == ' ')
        p++;
    line->indent = p - text;
    while (*p) {
        const char *start = p;
        bool quote = false;

        for (; *p && (quote || *p != ' '); p++) {
            if (*p == '\\' && quote && p[1])
                p++;
            else if (*p == '"')
                quote = !quote;
        }
        if (quote)
            return NULL;
        line->word[line->words++] = strndup(start, p - start);
        while (*p == ' ')
            p++;
    }
    return line;
}

static void add_line(struct line *parent, struct line *line)
{
    struct line **at = &parent->child;

    while (*at)
        at = &(*at)->next;
    *at = line;
}

int scenario_process(const struct scenario *s, const char *name)
{
    for (int i = 0; i < s->processes; i++)
        if (!strcmp(s->process[i], name))
            return i;
    return -1;
}

int scenario_actor(const struct scenario *s, const char *name)
{
    for (int i = 0; i < s->actors; i++)
        if (!strcmp(s->actor[i].name, name))
            return i;
    return -1;
}

const char *line_option(const struct line *line, const char *key)
{
    size_t length = strlen(key);

    for (int i = 1; i < line->words; i++)
        if (!strncmp(line->word[i], key, length) && line->word[i][length] == '=')
            return line->word[i] + length + 1;
    return NULL;
}

const char *line_word(const struct line *line, int skip, int n)
{
    for (int i = skip; i < line->words; i++)
        if ((line->word[i][0] == '"' || !strchr(line->word[i], '=')) && n-- == 0)
            return line->word[i];
    return NULL;
}

static int add_actor(struct scenario *s, const char *name, int process)
{
    if (s->actors == MAX_ACTORS || strlen(name) >= NAME_SIZE)
        return -1;
    strcpy(s->actor[s->actors].name, name);
    s->actor[s->actors].process = process;
    return s->actors++;
}

/* The actor that a step's first word names: a process's first thread, or PROCESS.THREAD, made on first mention. */
static int find_actor(struct scenario *s, const char *name)
{
    int actor = scenario_actor(s, name), process;
    char of[NAME_SIZE];
    size_t length = strcspn(name, ".");

    if (actor >= 0)
        return actor;
    if (!name[length] || length >= sizeof of)
        return -1;
    memcpy(of, name, length);
    of[length] = 0;
    process = scenario_process(s, of);
    return process < 0 ? -1 : add_actor(s, name, process);
}

static int declare(struct scenario *s, const char *path, int at, const struct line *line)
{
    if (!strcmp(line->word[0], "processes")) {
        for (int i = 1; i < line->words; i++) {
            if (s->processes == MAX_PROCESSES || strlen(line->word[i]) >= NAME_SIZE)
                return complain(path, at, "too many processes, or too long a name");
            strcpy(s->process[s->processes], line->word[i]);
            if (add_actor(s, line->word[i], s->processes++) < 0)
                return complain(path, at, "too many threads");
        }
        return 0;
    }
    if (line->words != 3 || s->lets == MAX_LABELS || strlen(line->word[1]) >= NAME_SIZE ||
        !number(line->word[2], &s->let[s->lets].value))
        return complain(path, at, "let NAME NUMBER");
    strcpy(s->let[s->lets++].name, line->word[1]);
    return 0;
}

static bool is_coordinators(const char *word)
{
    for (const char *const *verb = coordinator_verbs; *verb; verb++)
        if (!strcmp(*verb, word))
            return true;
    return false;
}

static int parse(struct scenario *s, const char *path, char *text)
{
    struct line *open[16] = { NULL }; /* the lines that a deeper one may belong to */
    int depth = 0, at = 0;

    for (char *raw = strtok(text, "\n"); raw; raw = strtok(NULL, "\n")) {
        struct line *line;
        char *p = raw + strspn(raw, " ");

        if (*p == '|')
            continue;
        s->text[s->lines++] = strcmp(raw, "\1") ? strdup(raw) : strdup("");
        at = s->lines;
        if (!*p || *p == '#' || *p == '\1')
            continue;
        line = split(raw);
        if (!line)
            return complain(path, at, "a quote is left open");
        if (line->indent == 0) {
            struct step *step = &s->step[s->steps];

            if (!strcmp(line->word[0], "processes") || !strcmp(line->word[0], "let")) {
                if (declare(s, path, at, line))
                    return -1;
                continue;
            }
            step->actor = is_coordinators(line->word[0]) ? -1 : find_actor(s, line->word[0]);
            if (step->actor < 0 && !is_coordinators(line->word[0]))
                return complain(path, at, "no such process: %s", line->word[0]);
            if (line->words < 2)
                return complain(path, at, "do what?");
            step->line = line;
            step->first = at - 1;
            step->last = at;
            s->steps++;
            open[0] = line;
            depth = 0;
            continue;
        }
        if (!open[0])
            return complain(path, at, "an indented line before the first step");
        while (depth > 0 && line->indent <= open[depth]->indent)
            depth--;
        add_line(open[depth], line);
        if (depth + 1 == sizeof open / sizeof *open)
            return complain(path, at, "too deep");
        open[++depth] = line;
        s->step[s->steps - 1].last = at;
    }
    return 0;
}

struct scenario *scenario_read(const char *path)
{
    char *text = slurp(path), *marked;
    struct scenario *s;
    size_t lines = 1, n = 0;
    int failed;

    if (!text)
        return NULL;
    s = calloc(1, sizeof *s);
    for (const char *p = text; *p; p++)
        lines += *p == '\n';
    s->text = calloc(lines + 1, sizeof *s->text);
    s->step = calloc(lines + 1, sizeof *s->step);
    /* strtok() joins empty lines; give each a mark. */
    marked = malloc(2 * strlen(text) + 2);
    for (const char *p = text; *p; p++) {
        if (*p == '\n' && (p == text || p[-1] == '\n'))
            marked[n++] = '\1';
        marked[n++] = *p;
    }
    marked[n] = 0;
    failed = parse(s, path, marked);
    free(marked);
    free(text);
    if (failed) {
        scenario_free(s);
        return NULL;
    }
    return s;
}

static void line_free(struct line *line)
{
    while (line) {
        struct line *next = line->next;

        line_free(line->child);
        for (int i = 0; i < line->words; i++)
            free(line->word[i]);
        free(line->word);
        free(line);
        line = next;
    }
}

void scenario_free(struct scenario *s)
{
    for (int i = 0; i < s->lines; i++)
        free(s->text[i]);
    for (int i = 0; i < s->steps; i++)
        line_free(s->step[i].line);
    free(s->text);
    free(s->step);
    free(s);
}
