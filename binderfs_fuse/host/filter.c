/* SPDX-License-Identifier: Apache-2.0
 *
 * Turns a list of allowed system calls into a filter in classic BPF (seccomp(2)).
 *
 * The numbers are those that the system's headers give for this machine. Calls as on another machine, such as those of
 * 32-bit programs, have other numbers and are all refused. So are the x32 calls of x86_64: a bit more is set in their
 * numbers, which no rule has.
 *
 * Each rule is compared in turn; a rule that does not hold goes on to the next. The kernel remembers for which numbers
 * a filter allows everything, so those cost nothing (from Linux 5.11 on).
 */
#define _GNU_SOURCE

#include "filter.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#define MACHINE 0 /* no list has the calls of the sanitizers */
#elif defined(__x86_64__) && defined(__LP64__)
#define MACHINE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define MACHINE AUDIT_ARCH_AARCH64
#elif defined(__riscv) && __riscv_xlen == 64
#define MACHINE AUDIT_ARCH_RISCV64
#elif defined(__powerpc64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define MACHINE AUDIT_ARCH_PPC64LE
#elif defined(__s390x__)
#define MACHINE AUDIT_ARCH_S390X
#else
#define MACHINE 0
#endif

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)(field))
#define LEAVE(action) BPF_STMT(BPF_RET | BPF_K, (action))
/* Goes over the next `count` instructions unless the value is equal. */
#define UNLESS_EQUAL(value, count) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(value), 0, (count))
#define ERROR(number) (SECCOMP_RET_ERRNO | (number))
#define LONGEST_RULE 9

/* Returns where half of an argument is. */
static size_t position(int argument)
{
    size_t whole = offsetof(struct seccomp_data, args) + argument % 6 * sizeof(uint64_t);
    int is_second = (argument >= 6) == (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

    return is_second ? whole + sizeof(uint32_t) : whole;
}

/* Stores what a rule becomes; returns how many instructions that are. */
static int compile(const struct call_rule *rule, struct sock_filter *to)
{
    struct sock_filter number = LOAD(offsetof(struct seccomp_data, nr)), allow = LEAVE(SECCOMP_RET_ALLOW);
    int checks = (rule->checks[0].mask != 0) + (rule->checks[1].mask != 0);
    int last = checks ? 3 * checks + 2 : 1; /* where the rule ends, or the number is loaded again */
    int length = 0, i;

    to[length++] = (struct sock_filter)UNLESS_EQUAL(rule->number, last);
    for (i = 0; i < checks; i++) {
        const struct argument_check *check = &rule->checks[i];

        to[length++] = (struct sock_filter)LOAD(position(check->argument));
        to[length++] = (struct sock_filter)BPF_STMT(BPF_ALU | BPF_AND | BPF_K, check->mask);
        length++;
        to[length - 1] = (struct sock_filter)UNLESS_EQUAL(check->value, last - length);
    }
    to[length++] = allow;
    if (checks)
        to[length++] = number;
    return length;
}

int filter_calls(const struct call_rule *rules, size_t count)
{
    const struct sock_filter head[] = {
        LOAD(offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MACHINE, 1, 0),
        LEAVE(ERROR(EPERM)),
        LOAD(offsetof(struct seccomp_data, nr)),
        UNLESS_EQUAL(SYS_clone3, 1),
        LEAVE(ERROR(ENOSYS)),
    };
    struct sock_filter text[sizeof head / sizeof *head + CALL_RULES * LONGEST_RULE + 1];
    struct sock_fprog program = {.filter = text};
    size_t i;

    if (MACHINE == 0)
        return -EOPNOTSUPP;
    if (count > CALL_RULES)
        return -E2BIG;
    for (i = 0; i < sizeof head / sizeof *head; i++)
        text[program.len++] = head[i];
    for (i = 0; i < count; i++)
        program.len += compile(&rules[i], text + program.len);
    text[program.len++] = (struct sock_filter)LEAVE(ERROR(EPERM));
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return -errno;
    /* Nobody else's code runs here: what kernels before 5.16 do against such would only make it slow. */
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program) == 0)
        return 0;
    return errno == EINVAL || errno == ENOSYS ? -EOPNOTSUPP : -errno;
}
