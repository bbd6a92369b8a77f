"""Lines in the log that clients cause: one place says how many there may be.

Theory of operation
-------------------
A client decides how often it does what is worth a line. So each user has a bucket of lines: ten at once, and one more
in each ten seconds. All users together have one of a hundred, and one more in each second. The last of it are for
users that have said nothing for long: others cannot take these from them. The numbers are in limits.py.

A line that a user's last one repeats is left out, too, for ten minutes. What was left out is counted, and said as soon
as a line of that user's comes again, or in the end (`end`).

What a mistake of this package makes it log (`mistake`) is limited as well: a client may know how to bring it about.
The server's own lines do not come here, so that nobody can silence it.

No timer is needed: a bucket fills up when it is looked at.

Invariants
----------
- Each line is either logged or counted as left out, and no count is lost, unless it has been said.
- `_guard` is never held while a line is written: whatever the log goes to may make wait.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final

from binderfs_fuse.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)


class _Bucket:
    """At most `most` lines at once, and one more after each `seconds`."""

    __slots__ = ("_at", "_most", "_seconds", "lines")

    def __init__(self, most: int, seconds: float, now: float) -> None:
        self._most = most
        self._seconds = seconds
        self._at = now
        self.lines = float(most)

    def look(self, now: float) -> bool:
        """Fill up to what there is by now; tell whether it is full."""
        self.lines = min(float(self._most), self.lines + max(0.0, now - self._at) / self._seconds)
        self._at = now
        return self.lines >= self._most


class _User:
    """A user's bucket, last line and when that was, and how many lines were left out since one was logged."""

    __slots__ = ("at", "bucket", "last", "omitted")

    def __init__(self, now: float) -> None:
        self.bucket = _Bucket(Limits.user_lines, Limits.user_line_seconds, now)
        self.last = ""
        self.at = now
        self.omitted = 0


class Complaints:
    """Takes lines, and hands those that may be logged to `log`, as `Logger.log` takes them. `clock` gives seconds."""

    def __init__(self, log: Callable[..., object], clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._guard = threading.Lock()
        self._all = _Bucket(Limits.lines, Limits.line_seconds, clock())
        # In the order in which they were last heard of.
        self._users: dict[int | None, _User] = {}
        # Left out, of users that are not remembered.
        self._lost = 0

    def say(self, uid: int | None, line: str, level: int = logging.WARNING, *, exc_info: bool = False) -> None:
        """Log a line that a client of this user has caused, or count it. `uid` is None where nobody knows whose.

        With `exc_info` the exception that is being handled is logged with it.
        """
        now = self._clock()
        with self._guard:
            user = self._users.pop(uid, None) or _User(now)
            self._users[uid] = user
            if len(self._users) > Limits.line_users:
                self._lost += self._users.pop(next(iter(self._users))).omitted
            fresh = user.bucket.look(now)
            self._all.look(now)
            repeated = line == user.last and now - user.at < Limits.repeat_seconds
            if repeated or user.bucket.lines < 1 or self._all.lines < (1 if fresh else 1 + Limits.line_reserve):
                user.omitted += 1
                return
            user.bucket.lines -= 1
            self._all.lines -= 1
            user.last = line
            user.at = now
            omitted, user.omitted = user.omitted, 0
        if omitted:
            self._log(logging.WARNING, f"{omitted} lines about clients of {_name(uid)} were left out")
        self._log(level, line, exc_info=exc_info)

    def end(self) -> None:
        """Say what was left out and has not been said: there will be no more lines."""
        with self._guard:
            users = sum(1 for user in self._users.values() if user.omitted)
            omitted = self._lost + sum(user.omitted for user in self._users.values())
            self._lost = 0
            for user in self._users.values():
                user.omitted = 0
        if omitted:
            self._log(logging.WARNING, f"{omitted} lines about clients of {users} users were left out")


def _name(uid: int | None) -> str:
    return f"user {uid}" if uid is not None else "some user"


_complaints: Final = Complaints(_log.log)


def say(uid: int | None, line: str, level: int = logging.WARNING) -> None:
    """Log a line that a client of this user has caused, or count it. `uid` is None where nobody knows whose."""
    _complaints.say(uid, line, level)


def mistake(line: str) -> None:
    """Log an exception that is being handled and should not have been raised, or count it."""
    _complaints.say(None, line, logging.ERROR, exc_info=True)


def end() -> None:
    """Say what was left out and has not been said: there will be no more lines."""
    _complaints.end()
