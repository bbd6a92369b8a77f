"""What clients may hold: bounds that the kernel's driver does not need, where each client pays for its own memory.

Here one server holds everything for everybody. A `Limits` says how much of that there may be; who asks for more gets
the errors that the driver gives when memory is short. Each user has an `Account` in a mount, for what all of its opens
hold together, so that nobody can use up what others need. A process that goes below a limit again is served again.

Invariants
----------
- `account.opens`, `.objects` and `.pages` are what the user's processes hold at this time: opens that are not freed;
  threads, nodes, refs, death and freeze notifications, and buffers; pages made present in their regions.
- A node that outlives its process stays in its user's account.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """How much clients may hold.

    `opens`         opens of devices in the mount: open(2) fails with ENFILE
    `user_opens`    those of one user: EMFILE
    `user_objects`  threads, nodes, refs, notifications and buffers of one user: as the next four
    `user_pages`    pages present in one user's receive regions: BR_FAILED_REPLY (-ENOMEM)
    `threads`       threads of one open: its calls fail with ENOMEM, poll with POLLERR
    `nodes`         nodes of one open: BR_FAILED_REPLY (-ENOMEM), or ENOMEM for who would be context manager
    `refs`          refs of one open: BR_FAILED_REPLY (-ENOMEM); BC_INCREFS and BC_ACQUIRE do nothing
    `notifications` notifications of one open that are to be read: BR_ERROR for a death, ENOMEM for a freeze
    `buffers`       buffers in one region, whether queued, delivered or forgotten: BR_FAILED_REPLY (-ENOSPC)
    `unread`        work that one thread has to read before it may send more: BR_FAILED_REPLY (-ENOMEM)
    `user_log_bytes` text of logs that one user has begun to read, beyond the first: read(2) fails with ENOMEM (the
                    tree's business)
    """

    opens: int = 16384
    user_opens: int = 4096
    user_objects: int = 1 << 20
    user_pages: int = 1 << 17
    threads: int = 4096
    nodes: int = 1 << 18
    refs: int = 1 << 18
    notifications: int = 1 << 18
    buffers: int = 1 << 14
    unread: int = 4096
    user_log_bytes: int = 64 << 20


class Account:
    """What one user holds in a mount."""

    __slots__ = ("objects", "opens", "pages")

    def __init__(self) -> None:
        self.opens = 0
        self.objects = 0
        self.pages = 0
