"""Work that any kind of list may hold: what it is to be delivered, taken back, lost and cancelled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import stats
from binderfs_fuse.engine.effects import Pace
from binderfs_fuse.engine.work import IndexedList, ReturnError, TransactionComplete, Work, WorkList

if TYPE_CHECKING:
    from tests.engine.machine import Client, Machine


def plain() -> Work:
    """Make work of no kind, on no list."""
    work = Work()
    work.queue = None
    return work


def test_work_knows_its_list(client: Client) -> None:
    """It leaves the list that it is on, wherever in it, and may be told to leave again."""
    first, second = plain(), plain()
    for work in (first, second):
        client.process.enqueue(work)
    first.dequeue()
    assert [second] == list(client.process.todo)
    first.dequeue()
    second.dequeue()

    assert [] == list(client.process.todo)
    assert (None, None) == (first.queue, second.queue)


def test_a_kind_must_say_how_it_is_delivered(client: Client) -> None:
    """Work of no kind can be cancelled and lost, which does nothing, but not delivered."""
    thread = client.process.threads[client.tid]
    work = plain()
    work.cancel(client.process.engine)
    work.lose(thread)
    with pytest.raises(NotImplementedError):
        work.deliver(thread, bytearray())
    with pytest.raises(NotImplementedError):
        work.undo(thread)


def test_a_cancelled_completion_is_deleted(machine: Machine, client: Client) -> None:
    """It counts as deleted, as one that was read."""
    pace = Pace(64)
    assert [] == list(machine.engine.cancel_all(client.process.todo, pace))
    before = machine.engine.stats.deleted[stats.TRANSACTION_COMPLETE]
    client.process.enqueue(TransactionComplete(uapi.BR_TRANSACTION_COMPLETE))
    assert [] == list(machine.engine.cancel_all(client.process.todo, pace))
    machine.engine.stats.created[stats.TRANSACTION_COMPLETE] += 1

    assert before + 1 == machine.engine.stats.deleted[stats.TRANSACTION_COMPLETE]
    assert [] == list(client.process.todo)


def test_a_failure_that_stands_is_not_put_back_or_stuck(client: Client) -> None:
    """An error's slot that has been filled again since its delivery keeps the new error."""
    thread = client.process.threads[client.tid]
    error = ReturnError()
    error.command = uapi.BR_FAILED_REPLY
    error.deliver(thread, bytearray())
    assert uapi.BR_OK == error.command
    error.command = uapi.BR_DEAD_REPLY
    thread.enqueue(error)
    error.undo(thread)
    error.lose(thread)

    assert uapi.BR_DEAD_REPLY == error.command
    assert 1 == len(thread.todo)
    error.dequeue()


class Named(Work):
    """Work with a key."""

    def __init__(self, number: int) -> None:
        """Have this key."""
        self.queue = None
        self.number = number

    def key(self) -> int:
        """Return the key."""
        return self.number


def test_a_list_is_linked_both_ways() -> None:
    """Items come and go at both ends and in between, and serial numbers grow along it."""
    queue = WorkList()
    one, two, three, four = (plain() for _ in range(4))
    queue.appendleft(two)
    queue.append(three)
    queue.appendleft(one)
    queue.append(four)
    order = list(queue)
    serials = [work.serial for work in queue]
    queue.remove(three)
    queue.remove(four)
    popped = [queue.popleft(), queue.popleft()]

    assert [one, two, three, four] == order
    assert sorted(set(serials)) == serials
    assert [one, two] == popped
    assert (None, None, 0) == (queue.first, queue.last, len(queue))


def test_the_first_with_a_key_is_found() -> None:
    """It is the first in the list of several with one key, and none once they have left."""
    queue = IndexedList()
    works: list[Work] = [*(Named(number) for number in (7, 8, 7)), plain()]
    for work in works:
        queue.append(work)
    found = [queue.find(7), queue.find(8), queue.find(9)]
    works[0].dequeue()
    found.append(queue.find(7))
    popped = queue.popleft()
    found.append(queue.find(8))

    assert [works[0], works[1], None, works[2], None] == found
    assert works[1] is popped
    assert [works[2], works[3]] == list(queue)
