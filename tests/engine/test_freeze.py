"""Freezing and thawing processes, what they missed, and who is told."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import Wait
from binderfs_fuse.engine.freeze import ERESTARTSYS
from binderfs_fuse.engine.invariants import check
from tests.engine.wire import command, parcel

if TYPE_CHECKING:
    from tests.engine.machine import Caller, Client, Machine

MILLISECOND = 1_000_000


def frozen_info(caller: Caller, pid: int) -> tuple[int, int]:
    """What a process has missed: (sync_recv, async_recv)."""
    call = caller.ioctl(uapi.BINDER_GET_FROZEN_INFO, uapi.binder_frozen_status_info.pack(pid, 9, 9))
    assert call.error == 0
    again, sync, asynchronous = uapi.binder_frozen_status_info.unpack(call.argument)
    assert again == pid
    return sync, asynchronous


def watch(client: Client, handle: int, cookie: int = 7) -> list[tuple[int, ...]]:
    """Ask for a freeze notification; what its first one says."""
    client.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, cookie)
    return told(client)


def told(client: Client) -> list[tuple[int, ...]]:
    """Cookie and state of a freeze notification, if there is one."""
    call = client.read(nonblock=True)
    if call.error:
        return []
    assert ["BR_NOOP", "BR_FROZEN_BINDER"] == call.names
    return [call.returns[1].values]


# -- freezing


def test_one_kind_of_call_that_was_missed_does_not_hide_the_other(manager: Client, client: Client) -> None:
    """A synchronous call after a one-way one: both have been missed."""
    client.freeze(manager.pid)
    client.tell()
    client.call()

    assert (3, 1) == frozen_info(client, manager.pid)


def test_a_process_that_is_not_there_cannot_be_frozen(client: Client) -> None:
    """EINVAL for a pid without an open, for freezing, thawing and asking."""
    assert -errno.EINVAL == client.freeze(4711).error
    assert -errno.EINVAL == client.freeze(4711, enable=False).error
    asked = client.ioctl(uapi.BINDER_GET_FROZEN_INFO, uapi.binder_frozen_status_info.pack(4711, 0, 0))
    assert -errno.EINVAL == asked.error


def test_a_frozen_process_misses_calls(manager: Client, client: Client) -> None:
    """What came is remembered until it is frozen or thawed again."""
    client.freeze(manager.pid)
    assert (0, 0) == frozen_info(client, manager.pid)
    client.call()
    assert (1, 0) == frozen_info(client, manager.pid)
    client.tell()
    assert (3, 1) == frozen_info(client, manager.pid)
    client.freeze(manager.pid, enable=False)

    assert (2, 0) == frozen_info(client, manager.pid)
    manager.free(manager.read().received)
    client.freeze(manager.pid)
    assert (0, 0) == frozen_info(client, manager.pid)


def test_all_opens_of_a_process_are_frozen(machine: Machine, manager: Client, client: Client) -> None:
    """Also those of other contexts, and what they have missed is shown together."""
    other = machine.client(pid=manager.pid, context=machine.engine.add_context("hwbinder"))
    client.freeze(manager.pid)
    assert [True, True] == [manager.process.is_frozen, other.process.is_frozen]
    client.tell()
    assert (2, 1) == frozen_info(client, manager.pid)
    client.freeze(manager.pid, enable=False)

    assert [False, False] == [manager.process.is_frozen, other.process.is_frozen]


def test_others_are_not_frozen(machine: Machine, manager: Client, client: Client) -> None:
    """Only opens of that pid are."""
    other = machine.client()
    client.freeze(manager.pid)

    assert [True, False] == [manager.process.is_frozen, other.process.is_frozen]


@pytest.mark.parametrize("kind", ["queued", "served", "calling"])
def test_a_busy_process_is_not_frozen(machine: Machine, manager: Client, client: Client, kind: str) -> None:
    """EAGAIN while it has a call to serve, serves one, or waits for a reply; it goes on as before."""
    if kind == "calling":
        handle = machine.share(client, manager)
        manager.send(handle)
    else:
        client.send()
    if kind == "served":
        manager.read()
    caller = machine.client()

    assert -errno.EAGAIN == caller.freeze(manager.pid).error
    assert not manager.process.is_frozen


def test_freezing_waits_for_what_is_under_way(machine: Machine, manager: Client, client: Client) -> None:
    """With a timeout it waits until all transactions are done, and nothing new comes meanwhile."""
    client.send()
    manager.read()
    freezing = machine.client().freeze(manager.pid, timeout_ms=100)
    assert freezing.parked
    assert ["BR_FROZEN_REPLY"] == client.thread().call().names[1:]
    manager.reply()

    assert 0 == freezing.error
    assert manager.process.is_frozen


def test_freezing_gives_up_after_its_timeout(machine: Machine, manager: Client, client: Client) -> None:
    """Still busy by then: EAGAIN."""
    client.send()
    freezing = machine.client().freeze(manager.pid, timeout_ms=100)
    (wait,) = manager.process.freeze_waits.values()
    assert 100 == wait.timeout_ms
    freezing.wake(-errno.ETIMEDOUT)

    assert -errno.EAGAIN == freezing.error
    assert not manager.process.is_frozen
    assert [] == list(manager.process.freeze_waits)


def test_a_call_that_waits_for_a_reply_is_seen_at_the_end_only(
    machine: Machine, manager: Client, client: Client
) -> None:
    """A process that calls has nothing outstanding to wait for: EAGAIN at once."""
    manager.send(machine.share(client, manager))

    assert -errno.EAGAIN == machine.client().freeze(manager.pid, timeout_ms=100).error


def test_freezing_can_be_interrupted(machine: Machine, manager: Client, client: Client) -> None:
    """The kernel is told to try again or say EINTR, and the process is not frozen; newer opens that came first are."""
    client.send()
    other = machine.client(pid=manager.pid)
    freezing = machine.client().freeze(manager.pid, timeout_ms=100)
    freezing.wake(-errno.EINTR)

    assert -ERESTARTSYS == freezing.error
    assert not manager.process.is_frozen
    assert other.process.is_frozen


def test_what_comes_between_is_waited_for_too(machine: Machine, manager: Client, client: Client) -> None:
    """A one-way call that is queued after the wake-up is waited for, for the rest of the time."""
    client.send()
    manager.read()
    freezer, other = machine.client(), client.thread()
    freezing = freezer.begin_ioctl(uapi.BINDER_FREEZE, uapi.binder_freeze_info.pack(manager.pid, 1, 100))
    freezing.advance()
    machine.now += 30 * MILLISECOND
    reply = manager.begin(manager.transaction(reply=True))
    while reply.advance():
        pass
    one_way = other.begin(client.transaction(flags=uapi.TF_ONE_WAY))
    while one_way.advance():
        pass
    machine.resume()
    (wait,) = manager.process.freeze_waits.values()
    assert freezing.parked
    assert "70" == str(wait.timeout_ms)
    machine.now += 200 * MILLISECOND
    assert ["BR_TRANSACTION_COMPLETE"] == manager.news()
    manager.free(manager.read().received)

    assert 0 == freezing.error


def test_no_time_is_left_after_the_timeout(machine: Machine, manager: Client, client: Client) -> None:
    """A wake-up that comes too late, with something still outstanding, leaves nothing to wait."""
    client.send()
    freezing = machine.client().freeze(manager.pid, timeout_ms=100)
    machine.now += 200 * MILLISECOND
    freezing.wake(0)
    (wait,) = manager.process.freeze_waits.values()

    assert freezing.parked
    assert 0 == wait.timeout_ms


def test_two_may_wait_to_freeze_one_process(machine: Machine, manager: Client, client: Client) -> None:
    """Both are woken."""
    client.send()
    manager.read()
    freezings = [machine.client().freeze(manager.pid, timeout_ms=100) for _ in range(2)]
    manager.reply()

    assert [0, 0] == [freezing.error for freezing in freezings]


def test_a_process_that_dies_while_it_is_frozen(machine: Machine, manager: Client, client: Client) -> None:
    """The freezer finds nothing outstanding when its time is over; the process is freed only then."""
    client.send()
    freezing = machine.client().freeze(manager.pid, timeout_ms=100)
    manager.die()
    assert [] == machine.freed
    freezing.wake(-errno.ETIMEDOUT)

    assert 0 == freezing.error
    assert [manager.process] == machine.freed


def test_a_second_open_is_frozen_after_the_first(machine: Machine, manager: Client, client: Client) -> None:
    """The newest open comes first; each one's transactions are waited for."""
    newer = machine.client(pid=manager.pid)
    client.send()
    freezing = machine.client().freeze(manager.pid, timeout_ms=100)

    assert freezing.parked
    assert [True, True] == [newer.process.is_frozen, manager.process.is_frozen]
    check(machine.engine)
    freezing.wake(-errno.ETIMEDOUT)
    assert [True, False] == [newer.process.is_frozen, manager.process.is_frozen]


def test_after_a_failure_no_other_open_is_tried(machine: Machine, manager: Client, client: Client) -> None:
    """A busy newer open fails it for all; the older one stays as it is, and both are let go."""
    newer = machine.client(pid=client.pid)
    newer.send()

    assert -errno.EAGAIN == manager.freeze(client.pid).error
    assert [False, False] == [newer.process.is_frozen, client.process.is_frozen]
    client.die()
    assert [client.process] == machine.freed


def test_a_freezer_that_has_been_woken_is_not_woken_again(
    machine: Machine, manager: Client, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is done, something comes and is done, before it goes on: it is ready once."""
    client.send()
    manager.read()
    other = client.thread()
    freezing = machine.client().freeze(manager.pid, timeout_ms=100)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "resume", lambda: None)
        manager.write(manager.transaction(reply=True))
        other.write(other.transaction(flags=uapi.TF_ONE_WAY))
        manager.news()
        manager.read(nonblock=True)
        assert 1 == sum(wait.owner is freezing for wait in machine.engine.ready)
    machine.resume()

    assert 0 == freezing.error


def test_thawing_does_not_wait(machine: Machine, manager: Client, client: Client) -> None:
    """Whatever is under way."""
    client.freeze(manager.pid)
    client.tell()

    assert 0 == machine.client().freeze(manager.pid, enable=False, timeout_ms=100).error


def test_without_a_timeout_nothing_is_waited_for(machine: Machine, manager: Client, client: Client) -> None:
    """A timeout of 0 decides at once."""
    client.send()
    call = machine.client().freeze(manager.pid)

    assert not any(isinstance(effect, Wait) for effect in call.effects)


# -- who is told


def test_the_state_is_told_at_once(machine: Machine, manager: Client, client: Client) -> None:
    """Who asks is told of the present state, and of each change after its acknowledgement."""
    handle = machine.share(client, manager)
    assert [(7, 0, 0)] == watch(manager, handle)
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)
    reading = manager.read()
    manager.thread().freeze(client.pid)
    assert (7, 1, 0) == reading.returns[1].values
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)
    manager.freeze(client.pid, enable=False)

    assert [(7, 0, 0)] == told(manager)


def test_the_state_of_a_frozen_process_is_told_as_it_is(machine: Machine, manager: Client, client: Client) -> None:
    """A process that is frozen already."""
    handle = machine.share(client, manager)
    manager.freeze(client.pid)

    assert [(7, 1, 0)] == watch(manager, handle)


def test_a_state_ends_a_read(machine: Machine, manager: Client, client: Client) -> None:
    """One notification a read."""
    handles = [machine.share(client, manager, ptr) for ptr in (0x1000, 0x3000)]
    for handle in handles:
        manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, handle)

    assert [[(1, 0, 0)], [(2, 0, 0)]] == [told(manager), told(manager)]


def test_all_objects_of_a_process_tell(machine: Machine, manager: Client, client: Client) -> None:
    """In the order of their ptr, and for one object the newest reference first."""
    other = machine.client()
    handles = [machine.share(client, manager, ptr) for ptr in (0x3000, 0x1000)]
    other_handle = machine.pass_on(manager, other, parcel().handle(handles[1]))
    for handle in handles:
        watch(manager, handle, handle)
        manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, handle)
    watch(other, other_handle, 9)
    other.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 9)
    manager.freeze(client.pid)

    assert [(9, 1, 0)] == told(other)
    assert [(2, 1, 0)] == told(manager)
    assert [(1, 1, 0)] == told(manager)


def test_a_state_that_is_not_acknowledged_waits(machine: Machine, manager: Client, client: Client) -> None:
    """A change before the acknowledgement is told after it; a change and back again as well, with the last state."""
    handle = machine.share(client, manager)
    watch(manager, handle)
    manager.freeze(client.pid)
    assert [] == told(manager)
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)
    assert [(7, 1, 0)] == told(manager)
    manager.freeze(client.pid, enable=False)
    manager.freeze(client.pid)
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)
    assert [(7, 1, 0)] == told(manager)
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)

    assert [] == told(manager)


def test_a_change_that_was_never_read_is_forgotten(machine: Machine, manager: Client, client: Client) -> None:
    """Frozen and thawed again before anybody looked: the last state is told, once."""
    handle = machine.share(client, manager)
    watch(manager, handle)
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)
    manager.freeze(client.pid)
    manager.freeze(client.pid, enable=False)
    assert [(7, 0, 0)] == told(manager)
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)

    assert [] == told(manager)


def test_those_who_did_not_ask_do_not_hinder(machine: Machine, manager: Client, client: Client) -> None:
    """A newer reference without a notification comes before the one that has asked."""
    handle = machine.share(client, manager)
    machine.pass_on(manager, machine.client(), parcel().handle(handle))
    watch(manager, handle)
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)
    manager.freeze(client.pid)

    assert [(7, 1, 0)] == told(manager)


def test_a_weak_handle_is_enough(machine: Machine, manager: Client, client: Client) -> None:
    """To ask, and to clear."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_INCREFS, handle)
    manager.do(uapi.BC_RELEASE, handle)
    assert [(7, 0, 0)] == watch(manager, handle)
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)
    manager.do(uapi.BC_CLEAR_FREEZE_NOTIFICATION, handle, 7)

    assert ["BR_CLEAR_FREEZE_NOTIFICATION_DONE"] == manager.news()


def test_an_acknowledged_state_wakes_a_reader_for_the_next(machine: Machine, manager: Client, client: Client) -> None:
    """The change that waited for the acknowledgement is read by a thread that waits."""
    handle = machine.share(client, manager)
    watch(manager, handle)
    manager.freeze(client.pid)
    reading = manager.thread().read()
    assert reading.parked
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)

    assert (7, 1, 0) == reading.returns[1].values


def test_the_same_state_again_is_not_told(machine: Machine, manager: Client, client: Client) -> None:
    """Thawing what is not frozen, before the acknowledgement, makes no news."""
    handle = machine.share(client, manager)
    watch(manager, handle)
    manager.freeze(client.pid, enable=False)
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)

    assert [] == told(manager)


def test_an_unread_state_is_brought_up_to_date(machine: Machine, manager: Client, client: Client) -> None:
    """A notification that nobody has read yet carries the state of the moment it is read."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, 7)
    manager.freeze(client.pid)
    assert [(7, 1, 0)] == told(manager)
    assert [] == told(manager)
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)

    assert [] == told(manager)


@pytest.mark.parametrize(
    ("number", "values"),
    [
        (uapi.BC_REQUEST_FREEZE_NOTIFICATION, (99, 7)),
        (uapi.BC_REQUEST_FREEZE_NOTIFICATION, (1, 8)),
        (uapi.BC_CLEAR_FREEZE_NOTIFICATION, (99, 7)),
        (uapi.BC_CLEAR_FREEZE_NOTIFICATION, (1, 8)),
        (uapi.BC_CLEAR_FREEZE_NOTIFICATION, (2, 7)),
        (uapi.BC_FREEZE_NOTIFICATION_DONE, (8,)),
    ],
)
def test_mistakes_are_errors(
    machine: Machine, manager: Client, client: Client, number: int, values: tuple[int, ...]
) -> None:
    """An unknown handle, a second request, another cookie: EINVAL, and the commands behind it are not carried out."""
    machine.share(client, manager, 0x1000)
    machine.share(client, manager, 0x3000)
    watch(manager, 1)
    call = manager.write(command(number, *values), command(uapi.BC_EXIT_LOOPER))

    assert (-errno.EINVAL, 0) == (call.error, call.write_consumed)
    assert 1 == machine.engine.stats.created[7]


def test_acknowledging_before_reading_is_an_error(machine: Machine, manager: Client, client: Client) -> None:
    """EINVAL for a cookie whose notification was not read."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, 7)

    assert -errno.EINVAL == manager.write(command(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)).error


def test_no_more_to_be_told(machine: Machine, manager: Client, client: Client) -> None:
    """BC_CLEAR_FREEZE_NOTIFICATION is answered, the state is not told any more, and one may ask again."""
    handle = machine.share(client, manager)
    watch(manager, handle)
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)
    reading = manager.read()
    manager.thread().do(uapi.BC_CLEAR_FREEZE_NOTIFICATION, handle, 7)
    assert [("BR_CLEAR_FREEZE_NOTIFICATION_DONE", (7,))] == [(item.name, item.values) for item in reading.returns[1:]]
    manager.freeze(client.pid)
    assert [] == told(manager)

    assert [(8, 1, 0)] == watch(manager, handle, 8)
    assert (2, 1) == (machine.engine.stats.created[7], machine.engine.stats.deleted[7])


def test_clearing_an_unread_state(machine: Machine, manager: Client, client: Client) -> None:
    """The notification that was not read becomes the answer, which does not end a read."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, 7)
    manager.do(uapi.BC_CLEAR_FREEZE_NOTIFICATION, handle, 7)
    client.send()

    assert ["BR_CLEAR_FREEZE_NOTIFICATION_DONE", "BR_TRANSACTION"] == manager.news()


def test_clearing_a_state_that_is_not_acknowledged(machine: Machine, manager: Client, client: Client) -> None:
    """The answer comes after the acknowledgement."""
    handle = machine.share(client, manager)
    watch(manager, handle)
    manager.do(uapi.BC_CLEAR_FREEZE_NOTIFICATION, handle, 7)
    assert [] == manager.news()
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)

    assert ["BR_CLEAR_FREEZE_NOTIFICATION_DONE"] == manager.news()


def test_a_dead_process_has_no_state(machine: Machine, manager: Client, client: Client) -> None:
    """To ask about a dead object is no error, and is never answered."""
    handle = machine.share(client, manager)
    client.die()
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, 7)

    assert [] == manager.news()
    manager.do(uapi.BC_CLEAR_FREEZE_NOTIFICATION, handle, 7)
    assert ["BR_CLEAR_FREEZE_NOTIFICATION_DONE"] == manager.news()


def test_a_handle_given_up_takes_its_notification_along(machine: Machine, manager: Client, client: Client) -> None:
    """Whether it waits to be read or acknowledged."""
    handles = [machine.share(client, manager, ptr) for ptr in (0x1000, 0x3000)]
    watch(manager, handles[0], 1)
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handles[1], 2)
    for handle in handles:
        manager.do(uapi.BC_RELEASE, handle)

    assert [] == manager.news()
    assert [] == list(manager.process.delivered_freeze)
    assert machine.engine.stats.created[7] == machine.engine.stats.deleted[7]


def test_clearings_go_with_their_process(machine: Machine, manager: Client, client: Client) -> None:
    """Answers that nobody reads any more are freed, whether queued or waiting for an acknowledgement."""
    handles = [machine.share(client, manager, ptr) for ptr in (0x1000, 0x3000, 0x5000)]
    watch(manager, handles[0], 1)
    watch(manager, handles[2], 3)
    manager.do(uapi.BC_CLEAR_FREEZE_NOTIFICATION, handles[0], 1)
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handles[1], 2)
    manager.do(uapi.BC_CLEAR_FREEZE_NOTIFICATION, handles[1], 2)
    manager.die()

    assert (3, 3) == (machine.engine.stats.created[7], machine.engine.stats.deleted[7])


def test_telling_makes_work_of_a_node_that_nobody_holds(machine: Machine, manager: Client, client: Client) -> None:
    """The driver takes each node on its walk and lets it go: one that has not been told of its end is told again."""
    machine.share(client, manager)
    node = client.process.nodes[0x1000]
    manager.do(uapi.BC_INCREFS, 1)
    manager.do(uapi.BC_RELEASE, 1)
    client.news()
    manager.do(uapi.BC_DECREFS, 1)
    node.dequeue()
    manager.freeze(client.pid, enable=False)

    assert ["BR_DECREFS"] == client.news()
