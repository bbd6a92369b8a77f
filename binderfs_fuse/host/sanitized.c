/* SPDX-License-Identifier: Apache-2.0
 *
 * For programs that are built with sanitizers: where they report to, since a program has no environment and /dev/null
 * for standard error. Not part of any other build: see tools/sanitize.
 */
const char *__asan_default_options(void)
{
    return "detect_leaks=0:log_path=" REPORTS;
}

const char *__ubsan_default_options(void)
{
    return "halt_on_error=1:print_stacktrace=1:log_path=" REPORTS;
}
