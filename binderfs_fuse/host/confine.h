/* SPDX-License-Identifier: Apache-2.0
 *
 * The system calls of a server: see confine.c. Rules of form: see uapi/binder.h.
 */
#ifndef BINDERFS_FUSE_HOST_CONFINE_H
#define BINDERFS_FUSE_HOST_CONFINE_H

/*
 * confine_server   lets the calling thread, and those that it starts, make only the system calls that a server needs,
 *                  for good; with `syslog` also those for another connection to the system's log. Returns 0 or a
 *                  negative errno; -EOPNOTSUPP: there are no filters on this kernel or machine.
 */
int confine_server(int syslog);

#endif
