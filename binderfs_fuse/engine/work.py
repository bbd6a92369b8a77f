"""Work: what waits in a todo list until a thread reads it (binder_internal.h `struct binder_work`).

A process, a thread and a node (for one-way calls) each have a list of work. An item is on one list at most, and knows
which: `item.queue` is that deque, or None. Each kind of work says how it is delivered to a thread that reads, and what
becomes of it when the list is released because its process or thread is gone.

The kinds are TransactionComplete and ReturnError (here), Transaction (transaction.py), Node and Death (node.py), and
Freeze (freeze.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse.engine import stats
from binderfs_fuse.uapi import BR_OK, BR_ONEWAY_SPAM_SUSPECT, BR_TRANSACTION_COMPLETE

if TYPE_CHECKING:
    from collections import deque

    from binderfs_fuse.engine.context import Engine
    from binderfs_fuse.engine.thread import Thread


_COMPLETE: Final = BR_TRANSACTION_COMPLETE.to_bytes(4, "little")


class Work:
    """One item of work; `queue` is the list that it is on."""

    __slots__ = ("queue",)

    # Any kind of list: a deque of one kind of work is not a deque of all.
    queue: deque[Any] | None

    def dequeue(self) -> None:
        """Leave the list, if on one."""
        if self.queue is not None:
            self.queue.remove(self)
            self.queue = None

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

    def cancel(self, engine: Engine) -> None:
        """The list was released before a thread read this (binder.c `binder_release_work`)."""


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
        out += _COMPLETE if command == BR_TRANSACTION_COMPLETE else command.to_bytes(4, "little")
        process.count_return(command)
        return False

    def undo(self, thread: Thread) -> None:
        thread.process.engine.stats.deleted[stats.TRANSACTION_COMPLETE] -= 1
        thread.requeue(self)

    def cancel(self, engine: Engine) -> None:
        engine.stats.deleted[stats.TRANSACTION_COMPLETE] += 1


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
