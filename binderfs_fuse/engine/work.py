"""Work: what waits in a todo list until a thread reads it (binder_internal.h `struct binder_work`).

A process, a thread and a node (for one-way calls) each have a list of work. An item is on one list at most, and knows
which: `item.queue` is that list, or None. Each kind of work says how it is delivered to a thread that reads, and what
becomes of it when the list is released because its process or thread is gone.

A list is linked through its items, as the driver's `list_head` is: an item leaves from anywhere in O(1). Each has a
serial number in its list, so that a walk that gave a turn finds the way on when the item that it stood at has left.
Where a client names items by a number of its own, the list has an index by that: O(log n).

The kinds are TransactionComplete and ReturnError (here), Transaction (transaction.py), Node and Death (node.py), and
Freeze (freeze.py).

Invariants
----------
- `item.queue` is the list whose links lead to the item; off every list it is None.
- Serial numbers grow along a list.
- An `IndexedList` has exactly those of its items in `_index` whose key is not negative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from binderfs_fuse.engine import stats
from binderfs_fuse.engine.limits import UNREAD
from binderfs_fuse.engine.sorted_map import SortedMap
from binderfs_fuse.uapi import BR_OK, BR_ONEWAY_SPAM_SUSPECT, BR_TRANSACTION_COMPLETE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from binderfs_fuse.engine.context import Engine
    from binderfs_fuse.engine.thread import Thread


# Serial numbers stay below this, however long a list lives: at a million items a second, for 500,000 years.
_SERIAL_BITS: Final = 64
_COMPLETE: Final = BR_TRANSACTION_COMPLETE.to_bytes(4, "little")


class Work:
    """One item of work; `queue` is the list that it is on. The other three are the list's."""

    __slots__ = ("next", "previous", "queue", "serial")

    queue: WorkList | None
    next: Work | None
    previous: Work | None
    serial: int

    def dequeue(self) -> None:
        """Leave the list, if on one."""
        queue = self.queue
        if queue is not None:
            queue.remove(self)

    def key(self) -> int:
        """The number by which an `IndexedList` finds it, or -1. It stays the same for as long as it is on the list."""
        return -1

    def deliver(self, thread: Thread, out: bytearray) -> bool:
        """Append the BR_ commands to `out`; true if this must be the last item of the read.

        The item is off its list already. `undo` takes back what this did, should the client's memory turn out not to
        be writable.
        """
        raise NotImplementedError

    def undo(self, thread: Thread) -> None:
        """Take back `deliver`, and stand at the head of the list again.

        Between the two, other threads may have done whatever they like, such as acknowledging what they were never
        told: what they have gone on with is left as it is.
        """
        raise NotImplementedError

    def lose(self, thread: Thread) -> None:
        """Do what there is to do because `deliver` did not arrive, nor will."""

    def cancel(self, engine: Engine) -> int:
        """The list was released before a thread read this (binder.c `binder_release_work`); the elements touched."""
        del engine
        return 1


class WorkList:
    """Work in order, linked; `first` and `last` are its ends, `count` how many there are."""

    __slots__ = ("count", "first", "last")

    def __init__(self) -> None:
        self.count = 0
        self.first: Work | None = None
        self.last: Work | None = None

    def append(self, work: Work) -> None:
        """Add work that is on no list at the end."""
        last = self.last
        work.queue = self
        work.next = None
        work.previous = last
        if last is None:
            work.serial = 0
            self.first = work
        else:
            work.serial = last.serial + 1
            last.next = work
        self.last = work
        self.count += 1

    def appendleft(self, work: Work) -> None:
        """Add work that is on no list at the head."""
        first = self.first
        work.queue = self
        work.previous = None
        work.next = first
        if first is None:
            work.serial = 0
            self.last = work
        else:
            work.serial = first.serial - 1
            first.previous = work
        self.first = work
        self.count += 1

    def popleft(self) -> Work:
        """Take the first item off the list, which is not empty."""
        work = self.first
        assert work is not None  # the caller has looked
        following = work.next
        self.first = following
        if following is None:
            self.last = None
        else:
            following.previous = None
            # Or what has left would keep what has not.
            work.next = None
        work.queue = None
        self.count -= 1
        return work

    def remove(self, work: Work) -> None:
        """Take an item of this list off it."""
        previous = work.previous
        following = work.next
        if previous is None:
            self.first = following
        else:
            previous.next = following
        if following is None:
            self.last = previous
        else:
            following.previous = previous
        work.next = work.previous = work.queue = None
        self.count -= 1

    def __len__(self) -> int:
        """How many there are."""
        return self.count

    def __iter__(self) -> Iterator[Work]:
        """All items, for whoever need not give turns."""
        work = self.first
        while work is not None:
            following = work.next
            yield work
            work = following


class IndexedList(WorkList):
    """Work in order, of which the first item with a key is found in O(log n). Nothing is added at its head."""

    __slots__ = ("_index",)

    def __init__(self) -> None:
        super().__init__()
        self._index: SortedMap[Work] = SortedMap()

    def append(self, work: Work) -> None:
        super().append(work)
        key = work.key()
        if key >= 0:
            self._index.add(key << _SERIAL_BITS | work.serial, work)

    def popleft(self) -> Work:
        work = self.first
        assert work is not None  # the caller has looked
        self.remove(work)
        return work

    def remove(self, work: Work) -> None:
        key = work.key()
        if key >= 0:
            self._index.remove(key << _SERIAL_BITS | work.serial)
        super().remove(work)

    def find(self, key: int) -> Work | None:
        """The first item with this key, or None."""
        work = self._index.after((key << _SERIAL_BITS) - 1)
        return work if work is not None and work.key() == key else None


class TransactionComplete(Work):
    """Tells a sender that its transaction is on its way.

    `command` is BR_TRANSACTION_COMPLETE, BR_TRANSACTION_PENDING_FROZEN or BR_ONEWAY_SPAM_SUSPECT.
    """

    __slots__ = ("command",)

    def __init__(self, command: int) -> None:
        self.queue = None
        self.command = command

    def deliver(self, thread: Thread, out: bytearray) -> bool:
        command = self.command
        process = thread.process
        if command == BR_ONEWAY_SPAM_SUSPECT and not process.oneway_spam_detection_enabled:
            command = BR_TRANSACTION_COMPLETE
        process.engine.stats.deleted[stats.TRANSACTION_COMPLETE] += 1
        # As `discount_unread` does, in the midst of each call.
        if not thread.unread % UNREAD:
            process.account.objects -= 1
        thread.unread -= 1
        out += _COMPLETE if command == BR_TRANSACTION_COMPLETE else command.to_bytes(4, "little")
        process.count_return(command)
        return False

    def undo(self, thread: Thread) -> None:
        thread.process.engine.stats.deleted[stats.TRANSACTION_COMPLETE] -= 1
        thread.count_unread()
        thread.requeue(self)

    def cancel(self, engine: Engine) -> int:
        engine.stats.deleted[stats.TRANSACTION_COMPLETE] += 1
        return 1


class ReturnError(Work):
    """A thread's own slot for an error to be read; `command` is BR_OK while it is empty."""

    __slots__ = ("command", "delivered")

    def __init__(self) -> None:
        self.queue = None
        self.command = BR_OK
        self.delivered = BR_OK

    def deliver(self, thread: Thread, out: bytearray) -> bool:
        command = self.command
        out += command.to_bytes(4, "little")
        self.delivered = command
        self.command = BR_OK
        thread.process.count_return(command)
        return False

    def undo(self, thread: Thread) -> None:
        # Another failure may stand in the slot already.
        if self.queue is None:
            self.command = self.delivered
            thread.requeue(self)

    def lose(self, thread: Thread) -> None:
        del thread
        # The driver clears the slot only once it has been stored: the thread is stuck with it.
        if self.queue is None:
            self.command = self.delivered
