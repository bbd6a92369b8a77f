"""The texts of logs, and the reads that wait for them.

Theory of operation
-------------------
A log is made anew whenever it is read from its start, and kept for its reader until that has read it to the end. To
make one takes long where there is much to tell. A READ that needs a text therefore waits here, and nowhere else: it
holds no thread. The channel asks `read` for each READ of a log, in the thread that received it; what is there is
answered at once.

Each user has a queue of texts to be made, and users take turns. `Limits.makers` texts are made at a time, one at most
for each user and of each file. All reads that wait for the same file share one text: it is begun after they were, so it
tells each of them what it should. So 120 readers cost two texts: the one that was begun before they came, and the
next one.

INTERRUPT takes a read back (`withdraw`), which is answered with EINTR. A text that nobody waits for any more is not
begun, and not made to its end.

A text is charged once to each user that keeps it, and once to all users together, however many readers share it.

The worst that clients can do here: a user with any number of readers of any files keeps one of the makers busy. The
reads of others wait for one text of that user at most, then it is their turn. Waiting reads and kept texts have
limits (`engine.limits`).

Invariants
----------
- `_guard` is held for moments: never across a system call, nor while a text is made.
- Each read that waits is in `_waits`, and in the `reads` of exactly one `_Making`, until it is answered once.
- A making in `_begun_next` has not begun, and stands in the queue of each user in its `users`.
- `pool.held` of log bytes is the length of all texts that a reader keeps.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, Protocol

from binderfs_fuse import complaints
from binderfs_fuse.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from binderfs_fuse.engine.limits import Quota


# How long somebody makes texts, or answers with them, until others have a turn, and how long that is at least, in s.
_TURN: Final = 0.0003
_PAUSE: Final = 0.0005


class Rests:
    """The rests of a thread that does much, bit by bit, while others are served.

    Neither lock nor interpreter goes to who has waited longest, but to who asks next, and that would be this thread
    again, before anybody else has woken up. So it sleeps.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()

    def rest(self) -> None:
        """Sleep for a moment if the last rest was some time ago."""
        if time.monotonic() - self._began > _TURN:
            time.sleep(_PAUSE)
            self._began = time.monotonic()


class Unwanted(Exception):  # noqa: N818 - it is nobody's mistake
    """A text is not made to its end: nobody waits for it any more, or it is too long."""

    def __init__(self, error: int) -> None:
        """`error` is for those who wait, if any do."""
        super().__init__(error)
        self.error = error


class Source(Protocol):
    """A file whose text can be made."""

    text: Callable[[], Iterator[str]]


class Kept:
    """A text, and how many readers of each user keep it."""

    __slots__ = ("data", "users")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.users: Counter[int] = Counter()


class Reader:
    """A user's open file, the text that its reads are served from, and how long it was if it was read to its end."""

    __slots__ = ("kept", "length", "source", "uid")

    def __init__(self, source: Source, uid: int) -> None:
        self.source = source
        self.uid = uid
        self.kept: Kept | None = None
        self.length: int | None = None


class _Read:
    """A READ that waits: its request, and the part of the text that it is for."""

    __slots__ = ("making", "offset", "reader", "size", "unique")

    def __init__(self, unique: int, reader: Reader, offset: int, size: int, making: _Making) -> None:
        self.unique = unique
        self.reader = reader
        self.offset = offset
        self.size = size
        self.making = making


class _Making:
    """A text that is to be made, or is being made, and who waits for it."""

    __slots__ = ("begun", "reads", "source", "users")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.begun = False
        self.reads: dict[int, _Read] = {}
        self.users: set[int] = set()


class Texts:
    """The open logs of a mount, by handle.

    `take` makes the text of a source; it calls its second argument, which raises `Unwanted`, with the length that the
    text has so far, once for each piece.
    """

    def __init__(self, quota: Quota, take: Callable[[Source, Callable[[int], None]], bytes]) -> None:
        self._quota = quota
        self._take = take
        self._post: Callable[..., None] | None = None
        self._answer: Callable[[int, int, bytes], object] = _nowhere
        self._guard = threading.Lock()
        self._readers: dict[int, Reader] = {}
        self._waits: dict[int, _Read] = {}
        self._begun_next: dict[Source, _Making] = {}
        # By user, those first whose turn comes first.
        self._queues: dict[int, dict[_Making, None]] = {}
        # Whose turn it is, and what is being made.
        self._served: set[int] = set()
        self._under_way: set[Source] = set()
        # By user: bytes that are kept, and reads that wait.
        self.bytes_of: Counter[int] = Counter()
        self.waits_of: Counter[int] = Counter()

    def attach(self, post: Callable[..., None], answer: Callable[[int, int, bytes], object]) -> None:
        """Take what calls a function in a thread, and what answers a read: unique, 0 or a negative errno, data."""
        self._post = post
        self._answer = answer

    def open(self, handle: int, source: Source, uid: int) -> None:
        """Have reads of this handle served."""
        with self._guard:
            self._readers[handle] = Reader(source, uid)

    def close(self, handle: int) -> None:
        """Let go of what a handle keeps. The kernel says so after the last read of it."""
        with self._guard:
            self._drop(self._readers.pop(handle))

    def has(self, handle: int) -> bool:
        """Tell whether this is the handle of a log."""
        return handle in self._readers

    def read(self, unique: int, handle: int, offset: int, size: int) -> tuple[int, bytes] | None:
        """Read part of a text: 0 or a negative errno, and the data; None: it is answered later.

        The text is taken when it is read from the start, and kept until its end. ENOMEM: too many reads of the user's
        wait, or of all users' (and see `_keep`).
        """
        with self._guard:
            reader = self._readers[handle]
            if offset and (reader.kept is not None or (reader.length is not None and offset >= reader.length)):
                return 0, self._part(reader, offset, size)
            uid = reader.uid
            if self._quota.readers.lacks(self.waits_of[uid]):
                return -errno.ENOMEM, b""
            making = self._begun_next.get(reader.source)
            if making is None:
                making = self._begun_next[reader.source] = _Making(reader.source)
            if uid not in making.users:
                making.users.add(uid)
                self._queues.setdefault(uid, {})[making] = None
            self._waits[unique] = making.reads[unique] = _Read(unique, reader, offset, size, making)
            self.waits_of[uid] += 1
            self._quota.readers.held += 1
            begin = self._next()
        self._begin(begin)
        return None

    def withdraw(self, unique: int) -> bool:
        """Take back a read that waits, which its caller answers; tell whether there was such a one."""
        with self._guard:
            read = self._waits.get(unique)
            if read is None:
                return False
            self._forget(read)
            making = read.making
            if not making.reads and not making.begun:
                self._unqueue(making)
            return True

    # Whose turn it is; all with `_guard` held.

    def _next(self) -> tuple[int, _Making] | None:
        """Choose the next text to be made, if one may be begun now, and say whose turn it is."""
        if len(self._served) == Limits.makers:
            return None
        found = None
        for uid, queue in self._queues.items():
            if uid not in self._served:
                found = next(((uid, making) for making in queue if making.source not in self._under_way), None)
                if found is not None:
                    break
        if found is None:
            return None
        uid, making = found
        making.begun = True
        self._under_way.add(making.source)
        self._unqueue(making)
        # Whose turn it was goes to the end.
        if uid in self._queues:
            self._queues[uid] = self._queues.pop(uid)
        self._served.add(uid)
        return found

    def _unqueue(self, making: _Making) -> None:
        del self._begun_next[making.source]
        for uid in making.users:
            queue = self._queues[uid]
            del queue[making]
            if not queue:
                del self._queues[uid]

    def _forget(self, read: _Read) -> None:
        del self._waits[read.unique]
        del read.making.reads[read.unique]
        uid = read.reader.uid
        self.waits_of[uid] -= 1
        if not self.waits_of[uid]:
            del self.waits_of[uid]
        self._quota.readers.held -= 1

    # Making

    def _begin(self, begin: tuple[int, _Making] | None) -> None:
        if begin is not None:
            assert self._post is not None  # reads come over a channel, which has attached
            self._post(self._make, *begin)

    def _make(self, uid: int, making: _Making) -> None:
        """Make a text, and answer those that wait for it; in a thread that may take its time."""
        longest = self._quota.log_bytes.total >> 2

        def check(length: int) -> None:
            if not making.reads:
                raise Unwanted(errno.EINTR)
            if length > longest:
                raise Unwanted(errno.ENOMEM)

        error, data = 0, b""
        try:
            data = self._take(making.source, check)
        except Unwanted as unwanted:
            error = -unwanted.error
        except Exception:  # noqa: BLE001 - whoever waits has to be answered
            complaints.mistake("a log could not be made")
            error = -errno.EIO
        kept = Kept(data)
        # One by one, each with its own part of the text: there may be thousands, and all of them go on at once.
        rests = Rests()
        for unique in list(making.reads):
            with self._guard:
                read = making.reads.get(unique)
                if read is None:
                    continue
                self._forget(read)
                if error:
                    answer = error, b""
                elif self._keep(read.reader, kept):
                    answer = 0, self._part(read.reader, read.offset, read.size)
                else:
                    answer = -errno.ENOMEM, b""
            self._answer(unique, *answer)
            rests.rest()
        with self._guard:
            self._served.discard(uid)
            self._under_way.discard(making.source)
            begin = self._next()
        self._begin(begin)

    def _part(self, reader: Reader, offset: int, size: int) -> bytes:
        """Cut out what a read is for. Who reads to the end keeps nothing."""
        if reader.kept is None:
            return b""
        text = reader.kept.data
        data = text[offset : offset + size]
        if len(data) < size:
            reader.length = len(text)
            self._drop(reader)
        return data

    def _keep(self, reader: Reader, kept: Kept) -> bool:
        """Let a reader have this text instead of its last one; false where there is no room for more of them.

        The first text of a user needs room among those of all users only.
        """
        self._drop(reader)
        uid = reader.uid
        size = len(kept.data)
        pool = self._quota.log_bytes
        own = self.bytes_of[uid]
        if not kept.users[uid]:
            fits = pool.held + size <= pool.total if not own else not pool.lacks(own, size)
            if not fits:
                return False
            self.bytes_of[uid] += size
        if not kept.users.total():
            pool.held += size
        kept.users[uid] += 1
        reader.kept = kept
        return True

    def _drop(self, reader: Reader) -> None:
        """Have a reader keep no text."""
        kept = reader.kept
        if kept is None:
            return
        uid = reader.uid
        reader.kept = None
        kept.users[uid] -= 1
        if not kept.users[uid]:
            del kept.users[uid]
            self.bytes_of[uid] -= len(kept.data)
            if not self.bytes_of[uid]:
                del self.bytes_of[uid]
        if not kept.users:
            self._quota.log_bytes.held -= len(kept.data)


def _nowhere(unique: int, error: int, data: bytes) -> None:
    raise AssertionError(unique, error, data)
