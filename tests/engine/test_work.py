"""Work that any kind of list may hold: what it is to be delivered, taken back, lost and cancelled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import stats
from binderfs_fuse.engine.work import ReturnError, TransactionComplete, Work

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
    machine.engine.cancel_all(client.process.todo)
    before = machine.engine.stats.deleted[stats.TRANSACTION_COMPLETE]
    client.process.enqueue(TransactionComplete(uapi.BR_TRANSACTION_COMPLETE))
    machine.engine.cancel_all(client.process.todo)
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
