/* SPDX-License-Identifier: Apache-2.0
 *
 * What came back from the driver, as text.
 *
 * Received memory is read with process_vm_readv() on ourselves, so that an address that cannot be read is said so and
 * does not end the player.
 */
#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "player.h"

void say(const char *format, ...)
{
    struct mailbox *box = &play.stage->actor[me];
    va_list arguments;

    va_start(arguments, format);
    box->length +=
        vsnprintf(box->report + box->length, REPORT_SIZE - box->length, format, arguments);
    va_end(arguments);
    if (box->length >= REPORT_SIZE)
        box->length = REPORT_SIZE - 1;
}

const char *error_name(int error)
{
    return error ? strerrorname_np(error) : "0";
}

const char *flag_names(uint32_t flags)
{
    static _Thread_local char text[160];
    size_t n = 0;

    if (!flags)
        return "0";
    for (const struct word *flag = flag_words; flag->name && *flag->shape == 't'; flag++)
        if (flags & flag->value) {
            n += sprintf(text + n, "%s%s", n ? "|" : "", flag->name);
            flags &= ~flag->value;
        }
    if (flags)
        sprintf(text + n, "%s0x%x", n ? "|" : "", flags);
    return text;
}

const char *quoted(const void *data, size_t size)
{
    static _Thread_local char text[1024];
    const uint8_t *p = data;
    size_t n = 0;

    text[n++] = '"';
    for (size_t i = 0; i < size && n < sizeof text - 8; i++) {
        if (p[i] == '"' || p[i] == '\\')
            n += sprintf(text + n, "\\%c", p[i]);
        else if (isprint(p[i]))
            text[n++] = p[i];
        else
            n += sprintf(text + n, "\\x%02x", p[i]);
    }
    text[n++] = '"';
    text[n] = 0;
    return text;
}

/* An address in one of this process's mappings as map+N (map:NAME+N for one that is not called binder). */
const char *address_name(uint64_t address)
{
    static _Thread_local char text[4][64];
    static _Thread_local int turn;
    char *out = text[turn++ % 4];

    for (int i = 0; i < MAX_DESCRIPTORS; i++) {
        const struct descriptor *d = &self.descriptor[i];

        if (!d->map || address < (uintptr_t)d->map || address >= (uintptr_t)d->map + d->map_size)
            continue;
        if (!strcmp(d->name, "binder"))
            sprintf(out, "map+0x%llx", (unsigned long long)(address - (uintptr_t)d->map));
        else
            sprintf(out, "map:%s+0x%llx", d->name, (unsigned long long)(address - (uintptr_t)d->map));
        return out;
    }
    if (address)
        strcpy(out, "nowhere");
    else
        strcpy(out, "0");
    return out;
}

static size_t fetch(void *to, uint64_t from, size_t size)
{
    struct iovec here = { to, size }, there = { (void *)(uintptr_t)from, size };
    ssize_t got = process_vm_readv(getpid(), &here, 1, &there, 1, 0);

    return got < 0 ? 0 : got;
}

static uint32_t checksum(const uint8_t *p, size_t size)
{
    uint32_t sum = 2166136261u;

    while (size--)
        sum = (sum ^ *p++) * 16777619u;
    return sum;
}

static void say_bytes(const char *indent, const uint8_t *p, size_t size)
{
    bool zero = true;

    if (!size)
        return;
    for (size_t i = 0; i < size; i++)
        zero &= !p[i];
    if (zero)
        say("%szero %zu\n", indent, size);
    else if (size > 96)
        say("%s%zu bytes, checksum %08x\n", indent, size, checksum(p, size));
    else
        say("%s%s\n", indent, quoted(p, size));
}

/* ---- payloads ---- */

struct received {
    uint64_t address;
    uint8_t *data;
    size_t size, offsets;
    uint64_t *offset;
    struct label *label;
};

/* Descriptors get numbers in the order of their arrival in this process. */
static int received_fd(struct received *r, uint32_t fd)
{
    if (self.received_fds < (int)(sizeof self.received_fd / sizeof *self.received_fd))
        self.received_fd[self.received_fds++] = fd;
    if (r->label && r->label->fds < MAX_RECEIVED)
        r->label->fd[r->label->fds++] = fd;
    return self.received_fds;
}

static void *object_at(const struct received *r, size_t index, uint32_t type, size_t size)
{
    struct binder_object_header *header;

    if (index >= r->offsets || r->offset[index] + size > r->size)
        return NULL;
    header = (void *)(r->data + r->offset[index]);
    return header->type == type ? header : NULL;
}

/* A buffer that an object points to: what the driver wrote into it is said as what it means. */
static void say_buffer(struct received *r, size_t index, const struct binder_buffer_object *buffer)
{
    uint8_t *content = malloc(buffer->length + 1);
    uint64_t at = 0;

    if (fetch(content, buffer->buffer, buffer->length) != buffer->length) {
        say("            not readable\n");
        free(content);
        return;
    }
    while (at < buffer->length) {
        uint64_t next = buffer->length;
        size_t found = r->offsets;

        for (size_t i = index + 1; i < r->offsets; i++) {
            const struct binder_buffer_object *child = object_at(r, i, BINDER_TYPE_PTR, sizeof *child);
            const struct binder_fd_array_object *fds = object_at(r, i, BINDER_TYPE_FDA, sizeof *fds);
            uint64_t where = UINT64_MAX;

            if (child && child->flags & BINDER_BUFFER_FLAG_HAS_PARENT && child->parent == index)
                where = child->parent_offset;
            else if (fds && fds->parent == index && fds->num_fds)
                where = fds->parent_offset;
            if (where >= at && where < next) {
                next = where;
                found = i;
            }
        }
        say_bytes("            ", content + at, next - at);
        at = next;
        if (found < r->offsets) {
            const struct binder_fd_array_object *fds = object_at(r, found, BINDER_TYPE_FDA, sizeof *fds);

            if (fds) {
                say("            fds");
                for (uint64_t i = 0; i < fds->num_fds; i++, at += 4)
                    say(" fd#%d", received_fd(r, *(uint32_t *)(content + at)));
                say("\n");
            } else {
                say("            address %s\n", address_name(*(uint64_t *)(content + at)));
                at += 8;
            }
        }
    }
    free(content);
}

static size_t say_object(struct received *r, size_t index)
{
    const union {
        struct flat_binder_object flat;
        struct binder_fd_object fd;
        struct binder_fd_array_object array;
        struct binder_buffer_object buffer;
    } *object = (void *)(r->data + r->offset[index]);
    const struct word *kind = word_valued(object_words, object->flat.hdr.type);

    switch (kind ? kind->value : 0) {
    case BINDER_TYPE_BINDER:
    case BINDER_TYPE_WEAK_BINDER:
        say("        %s 0x%llx 0x%llx flags=0x%x\n", kind->name, (unsigned long long)object->flat.binder,
            (unsigned long long)object->flat.cookie, object->flat.flags);
        return sizeof object->flat;
    case BINDER_TYPE_HANDLE:
    case BINDER_TYPE_WEAK_HANDLE:
        say("        %s %u flags=0x%x cookie=0x%llx\n", kind->name, object->flat.handle, object->flat.flags,
            (unsigned long long)object->flat.cookie);
        if (r->label && r->label->handles < MAX_RECEIVED)
            r->label->handle[r->label->handles++] = object->flat.handle;
        return sizeof object->flat;
    case BINDER_TYPE_FD:
        say("        fd fd#%d cookie=0x%llx\n", received_fd(r, object->fd.fd), (unsigned long long)object->fd.cookie);
        return sizeof object->fd;
    case BINDER_TYPE_FDA:
        say("        fda %llu parent=%llu at=%llu\n", (unsigned long long)object->array.num_fds,
            (unsigned long long)object->array.parent, (unsigned long long)object->array.parent_offset);
        return sizeof object->array;
    case BINDER_TYPE_PTR:
        say("        ptr %s length=%llu flags=0x%x parent=%llu at=%llu\n", address_name(object->buffer.buffer),
            (unsigned long long)object->buffer.length, object->buffer.flags, (unsigned long long)object->buffer.parent,
            (unsigned long long)object->buffer.parent_offset);
        say_buffer(r, index, &object->buffer);
        return sizeof object->buffer;
    }
    say("        object 0x%x\n", object->flat.hdr.type);
    return sizeof object->flat.hdr;
}

static void say_payload(const struct binder_transaction_data *t, struct label *label)
{
    struct received r = { t->data.ptr.buffer, malloc(t->data_size + 64), t->data_size, t->offsets_size / 8,
                          malloc(t->offsets_size + 8), label };
    size_t at = 0;

    if (fetch(r.data, r.address, r.size) != r.size || fetch(r.offset, t->data.ptr.offsets, t->offsets_size) != t->offsets_size) {
        say("        not readable\n");
    } else {
        for (size_t i = 0; i < r.offsets; i++) {
            say_bytes("        ", r.data + at, r.offset[i] - at);
            at = r.offset[i] + say_object(&r, i);
        }
        say_bytes("        ", r.data + at, r.size - at);
    }
    free(r.data);
    free(r.offset);
}

static void say_transaction(const struct word *word, const struct binder_transaction_data_secctx *secctx, struct label *label)
{
    const struct binder_transaction_data *t = &secctx->transaction_data;

    say("    %s ptr=0x%llx cookie=0x%llx code=0x%x flags=%s pid=%s euid=%u size=%llu offsets=%llu at %s %s\n", word->name,
        (unsigned long long)t->target.ptr, (unsigned long long)t->cookie, t->code, flag_names(t->flags),
        process_name(t->sender_pid), t->sender_euid, (unsigned long long)t->data_size, (unsigned long long)t->offsets_size,
        address_name(t->data.ptr.buffer), address_name(t->data.ptr.offsets));
    label->buffer = t->data.ptr.buffer;
    label->ptr = t->target.ptr;
    label->cookie = t->cookie;
    label->handles = label->fds = 0;
    say_payload(t, label);
    if (*word->shape == 'C') {
        char context[256] = "";

        fetch(context, secctx->secctx, sizeof context - 1);
        say("        security context %s at %s\n", quoted(context, strlen(context)), address_name(secctx->secctx));
    }
}

static struct label *find_label(const char *name)
{
    struct stage *stage = play.stage;

    for (int i = 0; i < stage->labels; i++)
        if (!strcmp(stage->label[i].name, name))
            return &stage->label[i];
    if (stage->labels == MAX_LABELS)
        return NULL;
    snprintf(stage->label[stage->labels].name, NAME_SIZE, "%s", name);
    return &stage->label[stage->labels++];
}

void report_returns(const uint8_t *p, size_t size, const char *label_name)
{
    const uint8_t *end = p + size;
    struct label *last = &play.stage->last[me];

    while (end - p >= 4) {
        uint32_t code;
        const struct word *word;
        uint64_t v[2] = { 0, 0 };

        memcpy(&code, p, 4);
        word = word_valued(return_words, code);
        if (!word || end - p < 4 + (ssize_t)_IOC_SIZE(code)) {
            say("    0x%08x, and %zd bytes more\n", code, end - p - 4);
            return;
        }
        p += 4;
        memcpy(v, p, _IOC_SIZE(code) < sizeof v ? _IOC_SIZE(code) : sizeof v);
        switch (*word->shape) {
        case 0:
            say("    %s\n", word->name);
            break;
        case 'i':
            say("    %s %d\n", word->name, (int)v[0]);
            break;
        case '8':
            if (word->shape[1])
                say("    %s 0x%llx 0x%llx\n", word->name, (unsigned long long)v[0], (unsigned long long)v[1]);
            else
                say("    %s 0x%llx\n", word->name, (unsigned long long)v[0]);
            break;
        case 'f': {
            struct binder_frozen_state_info info;

            memcpy(&info, p, sizeof info);
            say("    %s 0x%llx is_frozen=%u reserved=%u\n", word->name, (unsigned long long)info.cookie, info.is_frozen,
                info.reserved);
            break;
        }
        default: {
            struct binder_transaction_data_secctx t;

            memset(&t, 0, sizeof t);
            memcpy(&t, p, _IOC_SIZE(code));
            say_transaction(word, &t, last);
            if (label_name) {
                struct label *label = find_label(label_name);
                char name[NAME_SIZE];

                if (label) {
                    memcpy(name, label->name, sizeof name);
                    *label = *last;
                    memcpy(label->name, name, sizeof name);
                }
            }
        }
        }
        p += _IOC_SIZE(code);
    }
    if (p != end)
        say("    %zd bytes more\n", end - p);
}
