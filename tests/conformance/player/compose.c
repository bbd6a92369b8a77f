/* SPDX-License-Identifier: Apache-2.0
 *
 * The bytes of commands and of the payloads of transactions.
 *
 * Blocks are laid out anew for each step and released after it: the driver has copied what it wants by then.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "player.h"

struct placed {
    void *start;
    size_t size; /* 0: of malloc() */
    struct placed *next;
};

static _Thread_local struct placed *placed;

void append(struct bytes *out, const void *data, size_t size)
{
    if (out->size + size > out->room) {
        out->room = (out->size + size) * 2;
        out->data = realloc(out->data, out->room);
    }
    if (data)
        memcpy(out->data + out->size, data, size);
    else
        memset(out->data + out->size, 0, size);
    out->size += size;
}

static void append_number(struct bytes *out, uint64_t value, size_t size)
{
    append(out, &value, size); /* little-endian machines only, as the whole language is */
}

static void align(struct bytes *out, size_t to)
{
    append(out, NULL, -out->size % to);
}

static void keep(void *start, size_t size)
{
    struct placed *p = malloc(sizeof *p);

    *p = (struct placed){ start, size, placed };
    placed = p;
}

void *place(const void *data, size_t size, int64_t reach)
{
    const size_t page = 4096;
    size_t whole;
    uint8_t *block, *at;

    if (reach < 0 || (size_t)reach > size) {
        block = calloc(1, size + 8); /* what a cut command reads on into is always the same */
        memcpy(block, data, size);
        keep(block, 0);
        return block;
    }
    whole = (reach + page - 1) / page * page;
    block = mmap(NULL, whole + page + size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole)
        mprotect(block, whole, PROT_READ | PROT_WRITE);
    at = block + whole - reach;
    memcpy(at, data, reach);
    keep(block, whole + page + size);
    return at;
}

void release_placed(void)
{
    while (placed) {
        struct placed *next = placed->next;

        if (placed->size)
            munmap(placed->start, placed->size);
        else
            free(placed->start);
        free(placed);
        placed = next;
    }
}

/* ---- payloads ---- */

struct payload {
    struct bytes data, offsets;
    uint64_t buffers; /* what the pointed-to buffers take, each rounded up to 8 */
};

static uint64_t option(const struct line *line, const char *key, uint64_t otherwise)
{
    const char *value = line_option(line, key);

    return value ? evaluate(value) : otherwise;
}

static uint64_t operand(const struct line *line, int n)
{
    const char *word = line_word(line, 1, n);

    return word ? evaluate(word) : 0;
}

static void append_text(struct bytes *out, const char *p)
{
    for (p++; *p && *p != '"'; p++) {
        char c = *p;

        if (c == '\\') {
            switch (*++p) {
            case 'n':
                c = '\n';
                break;
            case '0':
                c = 0;
                break;
            case 'x': {
                char digits[3] = { p[1], p[1] ? p[2] : 0, 0 };

                c = strtoul(digits, NULL, 16);
                p += 2;
                break;
            }
            default:
                c = *p;
            }
        }
        append(out, &c, 1);
    }
}

/* One line that stands for plain bytes; false when it is none. */
static bool compose_plain(struct bytes *out, const struct line *line)
{
    const char *kind = line->word[0];

    if (*kind == '"') {
        append_text(out, kind);
    } else if (!strcmp(kind, "zero")) {
        append(out, NULL, operand(line, 0));
    } else if (!strcmp(kind, "fill")) {
        for (uint64_t i = 0, n = operand(line, 0); i < n; i++)
            append_number(out, i * 7 + 1, 1);
    } else if (!strcmp(kind, "align")) {
        align(out, operand(line, 0));
    } else if (!strcmp(kind, "u8") || !strcmp(kind, "u32") || !strcmp(kind, "u64")) {
        size_t size = strtoul(kind + 1, NULL, 10) / 8;

        for (int i = 1; i < line->words; i++)
            append_number(out, evaluate(line->word[i]), size);
    } else {
        return false;
    }
    return true;
}

void compose_items(struct bytes *out, struct line *line)
{
    for (; line; line = line->next)
        compose_plain(out, line);
}

static void compose_object(struct payload *p, const struct line *line, const struct word *kind)
{
    union {
        struct flat_binder_object flat;
        struct binder_fd_object fd;
        struct binder_fd_array_object array;
        struct binder_buffer_object buffer;
    } object;
    size_t size = sizeof object.flat;

    memset(&object, 0, sizeof object);
    object.flat.hdr.type = kind->value;
    object.flat.flags = option(line, "flags", 0);
    switch (kind->value) {
    case BINDER_TYPE_BINDER:
    case BINDER_TYPE_WEAK_BINDER:
        object.flat.binder = operand(line, 0);
        object.flat.cookie = operand(line, 1);
        break;
    case BINDER_TYPE_HANDLE:
    case BINDER_TYPE_WEAK_HANDLE:
        object.flat.handle = operand(line, 0);
        object.flat.cookie = option(line, "cookie", 0);
        break;
    case BINDER_TYPE_FD:
        object.fd.fd = operand(line, 0);
        object.fd.cookie = option(line, "cookie", 0);
        break;
    case BINDER_TYPE_FDA:
        size = sizeof object.array;
        object.array.num_fds = operand(line, 0);
        object.array.parent = option(line, "parent", 0);
        object.array.parent_offset = option(line, "at", 0);
        break;
    case BINDER_TYPE_PTR: {
        struct bytes content = { NULL, 0, 0 };
        uint64_t shift = option(line, "misalign", 0);

        size = sizeof object.buffer;
        append(&content, NULL, shift);
        compose_items(&content, line->child);
        object.buffer.length = option(line, "length", content.size - shift);
        object.buffer.buffer =
            option(line, "address", (uintptr_t)place(content.data, content.size, option(line, "reach", -1)) + shift);
        if (line_option(line, "parent")) {
            object.buffer.flags |= BINDER_BUFFER_FLAG_HAS_PARENT;
            object.buffer.parent = option(line, "parent", 0);
            object.buffer.parent_offset = option(line, "at", 0);
        }
        p->buffers += (object.buffer.length + 7) & ~7ULL;
        free(content.data);
        break;
    }
    }
    if (!line_option(line, "unaligned"))
        align(&p->data, 8);
    append_number(&p->offsets, p->data.size, 8);
    append(&p->data, &object, option(line, "cut", size));
}

static void compose_payload(struct payload *p, struct line *line)
{
    for (; line; line = line->next) {
        const struct word *kind = word_named(object_words, line->word[0]);

        if (kind) {
            compose_object(p, line, kind);
        } else if (!strcmp(line->word[0], "object")) {
            append_number(&p->offsets, p->data.size, 8);
            append_number(&p->data, operand(line, 0), 4);
        } else {
            compose_plain(&p->data, line);
        }
    }
}

/* ---- commands ---- */

static void replace_offsets(struct bytes *offsets, const char *list)
{
    char *copy = strdup(list), *rest = copy, *word;

    offsets->size = 0;
    while ((word = strsep(&rest, ",")))
        append_number(offsets, evaluate(word), 8);
    free(copy);
}

static void compose_transaction(struct bytes *out, const struct line *line, const struct word *command)
{
    struct payload p;
    struct binder_transaction_data_sg t;

    memset(&p, 0, sizeof p);
    memset(&t, 0, sizeof t);
    compose_payload(&p, line->child);
    if (line_option(line, "offsets"))
        replace_offsets(&p.offsets, line_option(line, "offsets"));
    if (line_option(line, "ptr"))
        t.transaction_data.target.ptr = option(line, "ptr", 0);
    else
        t.transaction_data.target.handle = option(line, "handle", 0);
    t.transaction_data.cookie = option(line, "cookie", 0);
    t.transaction_data.code = option(line, "code", 0);
    t.transaction_data.flags = option(line, "flags", 0);
    t.transaction_data.sender_pid = option(line, "pid", 0);
    t.transaction_data.sender_euid = option(line, "euid", 0);
    t.transaction_data.data_size = option(line, "size", p.data.size);
    t.transaction_data.offsets_size = option(line, "offsets-size", p.offsets.size);
    t.transaction_data.data.ptr.buffer =
        option(line, "address", (uintptr_t)place(p.data.data, p.data.size, option(line, "reach", -1)));
    t.transaction_data.data.ptr.offsets = option(
        line, "offsets-address", (uintptr_t)place(p.offsets.data, p.offsets.size, option(line, "offsets-reach", -1)));
    t.buffers_size = option(line, "buffers", p.buffers);
    append(out, &t, *command->shape == 'T' ? sizeof t : sizeof t.transaction_data);
    free(p.data.data);
    free(p.offsets.data);
}

void compose_commands(struct bytes *out, struct line *line)
{
    for (; line; line = line->next) {
        const struct word *command = word_named(command_words, line->word[0]);
        int n = 0;

        if (!command) {
            compose_plain(out, line);
            continue;
        }
        append_number(out, command->value, 4);
        if (*command->shape == 't' || *command->shape == 'T')
            compose_transaction(out, line, command);
        else
            for (const char *s = command->shape; *s; s++, n++)
                append_number(out, operand(line, n), *s - '0');
    }
}
