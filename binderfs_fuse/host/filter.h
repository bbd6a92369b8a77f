/* SPDX-License-Identifier: Apache-2.0
 *
 * Filters of system calls that are lists of what is allowed: see filter.c.
 */
#ifndef BINDERFS_FUSE_HOST_FILTER_H
#define BINDERFS_FUSE_HOST_FILTER_H

#include <stddef.h>
#include <stdint.h>

/*
 * Allows a system call, where its checks hold: the low 32 bits of an argument are `value`, as far as `mask` says. A call
 * may have several rules: one of them has to hold. Where the kernel takes an argument for more than an int, its upper
 * half is an argument of its own, HIGH(argument). What a pointer points to cannot be looked at.
 */
struct call_rule {
    int number; /* SYS_ */
    struct argument_check {
        int argument;
        uint32_t mask; /* 0: no check */
        uint32_t value;
    } checks[2];
};

#define ALLOW(call) {.number = SYS_##call}
#define ALLOW_IF(call, ...) {.number = SYS_##call, .checks = {__VA_ARGS__}}
#define CHECK(argument, mask, value) {argument, mask, value}
#define HIGH(argument) ((argument) + 6)
#define WHOLE UINT32_MAX

#define CALL_RULES 256 /* as many as there may be in a list */

/*
 * filter_calls   puts a list of rules in force, for the calling thread and those that it starts, for good. What no rule
 *                allows fails with EPERM. clone3 fails with ENOSYS, so that the C library uses clone, whose flags a
 *                rule can see. Needs no rights: nothing that is executed gets new privileges any more. Returns 0 or a
 *                negative errno; -EOPNOTSUPP: this kernel has no such filters, or this machine's name for itself is
 *                unknown here.
 */
int filter_calls(const struct call_rule *rules, size_t count);

#endif
