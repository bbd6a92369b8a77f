/* SPDX-License-Identifier: Apache-2.0
 *
 * The binder file system's control file, as of Linux 7.3. Rules of form: see binder.h.
 */
#ifndef BINDERFS_FUSE_UAPI_BINDERFS_H
#define BINDERFS_FUSE_UAPI_BINDERFS_H

#include <stdint.h>
#include <sys/ioctl.h>

#define BINDERFS_MAX_NAME 255

struct binderfs_device {
    char name[BINDERFS_MAX_NAME + 1];
    uint32_t major;
    uint32_t minor;
};

#define BINDER_CTL_ADD _IOWR('b', 1, struct binderfs_device)

#endif
