"""What clients may hold, or hold up: the one table of all numbers of which there is one for each user, or for all.

Theory of operation
-------------------
In the kernel's driver each client pays for what it does. Here a few processes do everything for everybody, so there is
a limit to each thing of which they have only so much. `Limits` has all of them. Most come in three: for all users, for
one of them, and a *reserve*.

No limits of single users could be right: they add up to anything. So a share shrinks with what is used. A user gets
more only while it holds less than what is still free. One user gets to a half that way, two get to a third each, and k
users leave a share of 1 / (k + 1) to the next one. Where that is not so, the row says it. The arithmetic is in
quotas.py for what is counted one by one, and in engine/limits.py for memory.

A reserve is what is not shared out that way. Where there is none, the row says it. Of threads, descriptors and log
lines it is for users that hold none, one for each. Of memory no client can use it: `Limits.within` makes the totals fit
into an amount of memory, `_SHARES` says which part of that each total may use, and `_COSTS` what one of each thing
costs. The parts sum up to 29 / 32.

Limits of memory can be set for each mount (``-o limit_NAME=``). All others are the same for every mount.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final


@dataclass(frozen=True, slots=True)
class Limits:
    """How much clients may hold, and what they see beyond that. What begins with ``user_`` is of one user.

    Memory, of a mount; these can be set:

    `opens`         opens of devices in the mount: open(2) fails with ENFILE
    `user_opens`    those of one user: EMFILE
    `files`         opens of logs, directories and binder-control: ENFILE (the tree's business, as the next seven)
    `user_files`    those of one user: EMFILE
    `inodes`        names of devices that lookups hold, with O_PATH for one: open(2) and stat(2) fail with ENFILE
    `user_inodes`   those that one user looked up: EMFILE
    `readers`       reads of logs that wait: read(2) fails with ENOMEM
    `user_readers`  those of one user: ENOMEM
    `log_bytes`     text of logs that is kept until it has been read: read(2) fails with ENOMEM; one text is a quarter
                    of it at most
    `user_log_bytes` text of logs that one user has begun to read, beyond the first: ENOMEM
    `objects`       threads, what they have to read, nodes, refs, notifications, buffers and the objects in them, at
                    the rates of engine/limits.py: as `threads` to `unread`
    `user_objects`  those of one user
    `pages`         pages present in receive regions: BR_FAILED_REPLY (-ENOMEM)
    `user_pages`    those of one user's regions: the same
    `threads`       threads of one open: its calls fail with ENOMEM, poll with POLLERR
    `nodes`         nodes of one open: BR_FAILED_REPLY (-ENOMEM), or ENOMEM for who would be context manager
    `refs`          refs of one open: BR_FAILED_REPLY (-ENOMEM); BC_INCREFS and BC_ACQUIRE do nothing
    `notifications` notifications of one open that are to be read: BR_ERROR for a death, ENOMEM for a freeze
    `buffers`       buffers in one region, whether queued, delivered or forgotten: BR_FAILED_REPLY (-ENOSPC)
    `unread`        work that one thread has to read before it may send more: BR_FAILED_REPLY (-ENOMEM)

    Threads of a server; what is beyond a limit waits, and what others do passes it:

    `lanes`         threads that read, or have read, requests (fuse/lane.py): the user's requests wait
    `lane_reserve`  so many of them are only for users that hold up none
    `lanes_per_handle` those that may be stuck over one open before its requests have to wait
    `workers`       threads for everything else, of each kind (fuse/workers.py): the user's jobs wait
    `worker_reserve` so many of those that may be stuck are only for users that hold up none
    `workers_per_handle` such threads that one open may have
    `ends_per_user` closes of descriptors and ends of opens that are under way for one user at a time, without shares
    `makers`        threads that make texts of logs, of which a user has one: its reads wait (fuse/texts.py)
    `tracers`       tasks that are traced, as they receive descriptors (host/files.py): the user's receivers wait
    `tracer_reserve` so many of them are only for users of whom none is traced
    `tracers_per_handle` tasks that may be traced at once over one open

    Descriptors that clients pass on, in the keeper (host/keeper.c):

    `descriptors`   how many it may have, where its RLIMIT_NOFILE allows as many: BR_FAILED_REPLY (-EMFILE)
    `descriptor_reserve` one part of so many is only for users that hold none, and for sockets that files are sent into
    `closers`       threads that may be in close(2) at a time, without a reserve: what is to be closed waits
    `user_closers`  those with files of one user, without shares
    `user_unclosed` files of one user that may wait, with none closed for a second: BR_FAILED_REPLY (-EMFILE)

    Lines of the log that clients cause, of a process (complaints.py); what is left out is counted, and told later:

    `lines`         at once
    `line_seconds`  after so many seconds there may be one more
    `line_reserve`  so many of all are only for users that have said nothing for long
    `user_lines`    lines of one user at once, without shares
    `user_line_seconds` after so many seconds it may have one more
    `repeat_seconds` after so many seconds a line is logged that repeats the user's last one
    `line_users`    users that are remembered

    System calls that the filter of ``mount.py run`` hands over, of all mounts (command/supervisor.py):

    `attendants`    processes that look at such calls, without a reserve: the user's calls wait
    `user_calls`    calls of one user that wait for one of these, without shares: ENOMEM

    Of an open:

    `tasks`         callers that the server remembers, beside two for each of its threads: it asks /proc for the others
    """

    opens: int = 16384
    user_opens: int = 4096
    files: int = 65536
    user_files: int = 4096
    inodes: int = 1 << 18
    user_inodes: int = 16384
    readers: int = 65536
    user_readers: int = 4096
    log_bytes: int = 1 << 30
    user_log_bytes: int = 64 << 20
    objects: int = 1 << 23
    user_objects: int = 1 << 20
    pages: int = 1 << 21
    user_pages: int = 1 << 17
    threads: int = 4096
    nodes: int = 1 << 18
    refs: int = 1 << 18
    notifications: int = 1 << 18
    buffers: int = 1 << 14
    unread: int = 4096

    lanes: ClassVar[int] = 128
    lane_reserve: ClassVar[int] = 16
    lanes_per_handle: ClassVar[int] = 4
    workers: ClassVar[int] = 64
    worker_reserve: ClassVar[int] = 8
    workers_per_handle: ClassVar[int] = 4
    ends_per_user: ClassVar[int] = 2
    makers: ClassVar[int] = 2
    tracers: ClassVar[int] = 64
    tracer_reserve: ClassVar[int] = 8
    tracers_per_handle: ClassVar[int] = 8

    descriptors: ClassVar[int] = 65536
    descriptor_reserve: ClassVar[int] = 8
    closers: ClassVar[int] = 128
    user_closers: ClassVar[int] = 4
    user_unclosed: ClassVar[int] = 256

    lines: ClassVar[int] = 100
    line_seconds: ClassVar[float] = 1.0
    line_reserve: ClassVar[int] = 20
    user_lines: ClassVar[int] = 10
    user_line_seconds: ClassVar[float] = 10.0
    repeat_seconds: ClassVar[float] = 600.0
    line_users: ClassVar[int] = 1024

    attendants: ClassVar[int] = 64
    user_calls: ClassVar[int] = 1024

    tasks: ClassVar[int] = 64

    def within(self, memory: int) -> Limits:
        """Return these limits with the totals lowered so far that what they stand for fits into `memory` bytes."""
        totals = {name: max(1, memory * part // 32 // _COSTS[name]) for name, part in _SHARES.items()}
        return replace(self, **{name: min(getattr(self, name), total) for name, total in totals.items()})


# Parts of 32, of the memory. Texts that are made take as much again as those that are kept: hence the 2 below.
_SHARES: Final = {"pages": 12, "objects": 10, "log_bytes": 2, "opens": 2, "files": 1, "inodes": 1, "readers": 1}
# Bytes that one of each costs the server, and the kernel on its behalf, at most.
_COSTS: Final = {
    "pages": 4096,
    "objects": 2048,
    "log_bytes": 2,
    "opens": 16384,
    "files": 1024,
    "inodes": 512,
    "readers": 1024,
}
