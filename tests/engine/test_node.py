"""Nodes and the references to them: who is told what, when they go, and who is told of a death."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import CopyToBuffer
from binderfs_fuse.limits import Limits
from tests.engine.machine import Machine
from tests.engine.wire import command, parcel

if TYPE_CHECKING:
    from binderfs_fuse.engine.effects import Effect
    from binderfs_fuse.engine.node import Node
    from tests.engine.machine import Call, Client

PTR, COOKIE = 0x1000, 0x2000


def node_of(client: Client, ptr: int = PTR) -> Node:
    """The node of an object."""
    return client.process.nodes[ptr]


def counts(client: Client, handle: int) -> tuple[int, int]:
    """What user space holds under a handle, strongly and weakly."""
    ref = client.process.refs_by_desc[handle]
    return ref.strong, ref.weak


# -- the owner is told


def test_the_owner_is_told_of_the_first_reference(manager: Client, client: Client) -> None:
    """BR_INCREFS and BR_ACQUIRE, with ptr and cookie, once; user space's answers end the node's own holds."""
    assert manager.open
    call = client.tell(0, parcel().binder(PTR, COOKIE))
    node = node_of(client)
    assert ["BR_NOOP", "BR_INCREFS", "BR_ACQUIRE", "BR_TRANSACTION_COMPLETE"] == call.names
    assert [(PTR, COOKIE), (PTR, COOKIE)] == [item.values for item in call.returns[1:3]]
    assert (1, 1) == (node.local_weak_refs, node.local_strong_refs)
    client.do(uapi.BC_INCREFS_DONE, PTR, COOKIE)
    client.do(uapi.BC_ACQUIRE_DONE, PTR, COOKIE)

    assert (0, 0) == (node.local_weak_refs, node.local_strong_refs)
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE"] == client.tell(0, parcel().binder(PTR, COOKIE)).names


def test_the_owner_is_told_of_a_weak_reference(manager: Client, client: Client) -> None:
    """BR_INCREFS alone; a strong one that follows adds BR_ACQUIRE."""
    assert manager.open
    weak = client.tell(0, parcel().binder(PTR, COOKIE, weak=True))
    strong = client.tell(0, parcel().binder(PTR, COOKIE))

    assert ["BR_INCREFS"] == weak.names[1:-1]
    assert ["BR_ACQUIRE"] == strong.names[1:-1]


def test_the_owner_is_told_of_both_at_once(manager: Client, client: Client) -> None:
    """A strong reference takes the place of a weak one that it was not told of yet."""
    assert manager.open
    client.send(0, parcel().binder(PTR, COOKIE, weak=True).binder(PTR, COOKIE), flags=uapi.TF_ONE_WAY)

    assert ["BR_INCREFS", "BR_ACQUIRE", "BR_TRANSACTION_COMPLETE"] == client.news()


def test_a_weak_reference_does_not_queue_twice(manager: Client, client: Client) -> None:
    """Two weak references before the owner has looked make one item of work."""
    assert manager.open
    client.send(0, parcel().binder(PTR, weak=True).binder(PTR, weak=True), flags=uapi.TF_ONE_WAY)

    assert ["BR_INCREFS", "BR_TRANSACTION_COMPLETE"] == client.news()


def test_the_owner_is_told_of_the_last_reference(machine: Machine, manager: Client, client: Client) -> None:
    """BR_RELEASE and BR_DECREFS; then the node is gone, and the same ptr makes a new one."""
    handle = machine.share(client, manager, PTR, COOKIE)
    first = node_of(client)
    manager.do(uapi.BC_RELEASE, handle)
    call = client.read()
    assert ["BR_NOOP", "BR_RELEASE", "BR_DECREFS"] == call.names
    assert {(PTR, COOKIE)} == {item.values for item in call.returns[1:]}
    assert [] == list(client.process.nodes)
    client.tell(0, parcel().binder(PTR, 7))

    assert first is not node_of(client)
    assert 7 == node_of(client).cookie


def test_a_weak_reference_outlives_the_strong_one(machine: Machine, manager: Client, client: Client) -> None:
    """First BR_RELEASE alone, and BR_DECREFS when the weak one goes too."""
    handle = machine.share(client, manager, PTR, COOKIE)
    manager.do(uapi.BC_INCREFS, handle)
    manager.do(uapi.BC_RELEASE, handle)
    assert ["BR_RELEASE"] == client.news()
    node = node_of(client)
    assert (False, True) == (node.has_strong_ref, node.has_weak_ref)
    manager.do(uapi.BC_DECREFS, handle)

    assert ["BR_DECREFS"] == client.news()
    assert [] == list(client.process.nodes)


def test_references_within_what_is_held_are_the_drivers_own(machine: Machine, manager: Client, client: Client) -> None:
    """Counting up and down on a handle tells the owner nothing."""
    handle = machine.share(client, manager, PTR, COOKIE)
    for number in (uapi.BC_ACQUIRE, uapi.BC_INCREFS, uapi.BC_INCREFS, uapi.BC_DECREFS, uapi.BC_RELEASE):
        manager.do(number, handle)

    assert (1, 1) == counts(manager, handle)
    assert [] == client.news()


def test_a_waiting_thread_is_woken_for_the_last_reference(machine: Machine, manager: Client, client: Client) -> None:
    """Any thread of the owner may read it."""
    handle = machine.share(client, manager, PTR, COOKIE)
    reading = client.thread().read()
    manager.do(uapi.BC_RELEASE, handle)

    assert ["BR_NOOP", "BR_RELEASE", "BR_DECREFS"] == reading.names


def test_the_first_reference_is_told_to_the_sending_thread(manager: Client, client: Client) -> None:
    """The thread that sent the object reads it, before the reply at the latest; others do not."""
    assert manager.open
    waiting = client.thread().read()
    client.send(0, parcel().binder(PTR))

    assert waiting.parked
    assert [] == client.news()


def test_a_node_nobody_was_told_of_goes_silently(manager: Client, client: Client) -> None:
    """A reference that came and went before the owner looked leaves nothing to say."""
    assert manager.open
    client.send(0, parcel().binder(PTR), flags=uapi.TF_ONE_WAY)
    manager.free(manager.read().received)

    assert [] == list(client.process.nodes)
    assert ["BR_TRANSACTION_COMPLETE"] == client.news()


def test_a_reference_that_goes_before_the_answer(manager: Client, client: Client) -> None:
    """The owner was told, and its answer comes after the last reference went: then it is told of the end."""
    client.tell(0, parcel().binder(PTR, COOKIE))
    manager.free(manager.read().received)
    assert [] == client.news()
    client.do(uapi.BC_ACQUIRE_DONE, PTR, COOKIE)
    assert ["BR_RELEASE"] == client.news()
    client.do(uapi.BC_INCREFS_DONE, PTR, COOKIE)

    assert ["BR_DECREFS"] == client.news()
    assert [] == list(client.process.nodes)


@pytest.mark.parametrize(
    ("number", "ptr", "cookie"),
    [
        (uapi.BC_ACQUIRE_DONE, PTR + 1, COOKIE),
        (uapi.BC_ACQUIRE_DONE, PTR, COOKIE + 1),
        (uapi.BC_INCREFS_DONE, PTR, COOKIE + 1),
    ],
)
def test_wrong_answers_are_ignored(manager: Client, client: Client, number: int, ptr: int, cookie: int) -> None:
    """An answer for another ptr or with another cookie changes nothing."""
    assert manager.open
    client.tell(0, parcel().binder(PTR, COOKIE))
    client.do(number, ptr, cookie)
    node = node_of(client)

    assert (True, True, 1, 1) == (
        node.pending_strong_ref,
        node.pending_weak_ref,
        node.local_strong_refs,
        node.local_weak_refs,
    )


def test_answers_that_were_not_asked_for_are_ignored(machine: Machine, manager: Client, client: Client) -> None:
    """A second answer does not take another reference away."""
    machine.share(client, manager, PTR, COOKIE)
    client.do(uapi.BC_ACQUIRE_DONE, PTR, COOKIE)
    client.do(uapi.BC_INCREFS_DONE, PTR, COOKIE)
    node = node_of(client)

    assert (0, 0, 1) == (node.local_strong_refs, node.local_weak_refs, node.internal_strong_refs)


def test_an_object_that_comes_home_before_its_owner_looked(manager: Client, client: Client) -> None:
    """What the objects in the reply hold, and what the owner is to acquire, count separately."""
    client.send(0, parcel().binder(0x10).binder(0x20, weak=True).binder(0x30))
    manager.read()
    manager.reply(parcel().handle(1).handle(1, weak=True).handle(1, weak=True).handle(2, weak=True))
    call = client.read()

    assert ["BR_INCREFS", "BR_ACQUIRE", "BR_INCREFS", "BR_INCREFS", "BR_ACQUIRE"] == call.names[1:6]
    assert (1 + 1, 2 + 1) == (node_of(client, 0x10).local_strong_refs, node_of(client, 0x10).local_weak_refs)
    assert (0, 1 + 1) == (node_of(client, 0x20).local_strong_refs, node_of(client, 0x20).local_weak_refs)
    assert (1, 1) == (node_of(client, 0x30).local_strong_refs, node_of(client, 0x30).local_weak_refs)


def test_the_managers_own_object_is_handle_0(machine: Machine, manager: Client, client: Client) -> None:
    """Where the manager sends the node that it manages by."""
    assert 0 == machine.pass_on(manager, client, parcel().binder(0))

    assert (1, 0) == counts(client, 0)


def test_a_new_reference_is_told_by_the_thread_that_sends_it(machine: Machine, manager: Client, client: Client) -> None:
    """Work that waits in the process for the end of the references moves to the thread that makes a new one."""
    handle = machine.share(client, manager, PTR, COOKIE)
    manager.do(uapi.BC_INCREFS, handle)
    manager.do(uapi.BC_RELEASE, handle)
    assert ["BR_RELEASE"] == client.news()
    manager.do(uapi.BC_DECREFS, handle)
    thread = client.thread()
    thread.send(0, parcel().binder(PTR, COOKIE), flags=uapi.TF_ONE_WAY)

    assert [] == client.news()
    assert ["BR_ACQUIRE", "BR_TRANSACTION_COMPLETE"] == thread.news()


# -- counting by hand


def test_too_many_releases_are_ignored(machine: Machine, manager: Client, client: Client) -> None:
    """A count that is zero stays so; the other count is not touched."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_INCREFS, handle)
    manager.do(uapi.BC_RELEASE, handle)
    manager.do(uapi.BC_RELEASE, handle)
    assert (0, 1) == counts(manager, handle)
    manager.do(uapi.BC_DECREFS, handle)

    assert {} == manager.process.refs_by_desc


def test_a_weak_release_of_a_strong_handle_is_ignored(machine: Machine, manager: Client, client: Client) -> None:
    """BC_DECREFS without a weak count does nothing."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_DECREFS, handle)

    assert (1, 0) == counts(manager, handle)


def test_a_strong_count_of_zero_stays_zero(machine: Machine, manager: Client, client: Client) -> None:
    """Also where the driver itself counts down; the ref stays for its weak count."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_INCREFS, handle)
    manager.do(uapi.BC_RELEASE, handle)
    manager.process.refs_by_desc[handle].decrement(strong=True)

    assert (0, 1) == counts(manager, handle)


def test_a_weak_handle_cannot_be_acquired(machine: Machine, manager: Client, client: Client) -> None:
    """BC_ACQUIRE on a handle that is held weakly only does nothing."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_INCREFS, handle)
    manager.do(uapi.BC_RELEASE, handle)
    manager.do(uapi.BC_ACQUIRE, handle)

    assert (0, 1) == counts(manager, handle)


@pytest.mark.parametrize("number", [uapi.BC_INCREFS, uapi.BC_ACQUIRE, uapi.BC_RELEASE, uapi.BC_DECREFS])
def test_counting_on_unknown_handles_is_ignored(manager: Client, client: Client, number: int) -> None:
    """There is no error, and no handle."""
    assert manager.open
    client.do(number, 9)

    assert {} == client.process.refs_by_desc


# -- handle 0


def test_handle_0_can_be_held(machine: Machine, manager: Client, client: Client) -> None:
    """BC_INCREFS and BC_ACQUIRE of 0 make the reference to the manager, under that number."""
    client.do(uapi.BC_INCREFS, 0)
    client.do(uapi.BC_ACQUIRE, 0)
    client.do(uapi.BC_ACQUIRE, 0)

    assert (2, 1) == counts(client, 0)
    assert machine.binder.manager is client.process.refs_by_desc[0].node
    assert [] == manager.news()


def test_handle_0_that_cannot_be_made_can_still_be_counted() -> None:
    """Where there is no room for another reference, one that is there under that number is counted."""
    machine = Machine(limits=Limits(refs=1))
    first = machine.manager()
    client = machine.client()
    client.do(uapi.BC_ACQUIRE, 0)
    first.die()
    machine.manager()
    client.do(uapi.BC_ACQUIRE, 0)
    client.do(uapi.BC_INCREFS, 0)

    assert (2, 1) == counts(client, 0)
    machine.shut_down()


def test_the_manager_cannot_hold_itself(manager: Client) -> None:
    """EINVAL, for a weak reference as for a strong one."""
    for number in (uapi.BC_INCREFS, uapi.BC_ACQUIRE):
        call = manager.write(command(number, 0))

        assert (-errno.EINVAL, 0) == (call.error, call.write_consumed)


def test_releasing_handle_0_is_for_those_who_hold_it(manager: Client, client: Client) -> None:
    """BC_RELEASE of 0 by the manager itself, or by nobody who holds it, is ignored."""
    manager.do(uapi.BC_RELEASE, 0)
    client.do(uapi.BC_RELEASE, 0)

    assert {} == client.process.refs_by_desc


def test_without_a_manager_handle_0_is_unknown(machine: Machine) -> None:
    """Nothing is made; what is held from before can still be counted."""
    client = machine.client()
    client.do(uapi.BC_ACQUIRE, 0)
    assert {} == client.process.refs_by_desc
    manager = machine.manager()
    client.do(uapi.BC_ACQUIRE, 0)
    manager.die()
    client.do(uapi.BC_ACQUIRE, 0)

    assert (2, 0) == counts(client, 0)


def test_a_new_managers_handle_is_0_where_that_is_free(machine: Machine, manager: Client, client: Client) -> None:
    """Who still holds the dead one under 0 gets the new one under another number."""
    other = machine.client()
    client.do(uapi.BC_ACQUIRE, 0)
    manager.die()
    machine.manager()
    for holder in (client, other):
        holder.do(uapi.BC_ACQUIRE, 0)

    assert [0, 1] == sorted(client.process.refs_by_desc)
    assert client.process.refs_by_desc[0].node.process is None
    assert [0] == list(other.process.refs_by_desc)


def test_the_smallest_free_handle_is_taken(machine: Machine, manager: Client, client: Client) -> None:
    """Numbers that were given up are used again, the smallest first; 0 is for the manager alone."""
    handles = [machine.share(client, manager, 0x1000 * number) for number in range(1, 6)]
    for handle in (4, 2):
        manager.do(uapi.BC_RELEASE, handle)
    again = [machine.share(client, manager, 0x1000 * number) for number in range(6, 9)]

    assert [1, 2, 3, 4, 5] == handles
    assert [2, 4, 6] == again


def test_a_strong_reference_out_of_nothing_is_refused(machine: Machine, manager: Client, client: Client) -> None:
    """With nobody to tell, a first strong reference is EINVAL, and a ref that was made for it is gone again."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_INCREFS, handle)
    manager.do(uapi.BC_RELEASE, handle)
    node = node_of(client)
    third = machine.client().process
    before = (machine.engine.stats.created[3], machine.engine.stats.deleted[3])

    assert -errno.EINVAL == manager.process.increment_ref_for_node(node, strong=True, target=None)
    assert -errno.EINVAL == third.increment_ref_for_node(node, strong=True, target=None)
    assert {} == third.refs_by_desc
    assert (before[0] + 1, before[1] + 1) == (machine.engine.stats.created[3], machine.engine.stats.deleted[3])
    assert (0, 1) == counts(manager, handle)


# -- deaths


def watch(client: Client, handle: int, cookie: int) -> None:
    """Ask to be told of a death."""
    client.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, handle, cookie)


def test_a_death_is_told(machine: Machine, manager: Client, client: Client) -> None:
    """Who asked reads BR_DEAD_BINDER with the cookie; who did not ask reads nothing."""
    handle = machine.share(client, manager, PTR)
    machine.share(client, manager, 0x3000)
    watch(manager, handle, 77)
    reading = manager.read()
    client.die()

    assert [("BR_NOOP", ()), ("BR_DEAD_BINDER", (77,))] == [(item.name, item.values) for item in reading.returns]
    manager.do(uapi.BC_DEAD_BINDER_DONE, 77)
    assert [] == manager.news()


def test_a_death_ends_a_read(machine: Machine, manager: Client, client: Client) -> None:
    """One death a read: its reader may want to act on it."""
    for ptr in (0x1000, 0x3000):
        watch(manager, machine.share(client, manager, ptr), ptr)
    client.die()

    assert ["BR_DEAD_BINDER"] == manager.news()
    assert ["BR_DEAD_BINDER"] == manager.news()


def test_all_who_asked_are_told(machine: Machine, manager: Client, client: Client) -> None:
    """Each process that holds the node, whose handle need not be strong."""
    handle = machine.share(client, manager)
    other = machine.client()
    other_handle = machine.pass_on(manager, other, parcel().handle(handle))
    other.do(uapi.BC_INCREFS, other_handle)
    other.do(uapi.BC_RELEASE, other_handle)
    watch(manager, handle, 1)
    watch(other, other_handle, 2)
    client.die()

    assert [["BR_DEAD_BINDER"], ["BR_DEAD_BINDER"]] == [manager.news(), other.news()]


def test_a_death_that_has_been_is_told_at_once(machine: Machine, manager: Client, client: Client) -> None:
    """To ask about a dead object is to be told."""
    handle = machine.share(client, manager)
    client.die()
    reading = manager.thread().read()
    watch(manager, handle, 5)

    assert ["BR_NOOP", "BR_DEAD_BINDER"] == reading.names


def test_asking_twice_is_ignored(machine: Machine, manager: Client, client: Client) -> None:
    """The first cookie counts; an unknown handle cannot be asked about."""
    handle = machine.share(client, manager)
    watch(manager, handle, 1)
    watch(manager, handle, 2)
    watch(manager, 99, 3)
    client.die()
    call = manager.read()

    assert (1,) == call.returns[1].values
    assert 1 == machine.engine.stats.created[4]


def test_no_more_to_be_told(machine: Machine, manager: Client, client: Client) -> None:
    """BC_CLEAR_DEATH_NOTIFICATION is answered, and the death is not told any more."""
    handle = machine.share(client, manager)
    watch(manager, handle, 7)
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 7)
    call = manager.read()
    assert [("BR_CLEAR_DEATH_NOTIFICATION_DONE", (7,))] == [(item.name, item.values) for item in call.returns[1:]]
    client.die()

    assert [] == manager.news()


def test_a_weak_handle_is_enough_to_clear(machine: Machine, manager: Client, client: Client) -> None:
    """As it is to ask."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_INCREFS, handle)
    manager.do(uapi.BC_RELEASE, handle)
    watch(manager, handle, 7)
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 7)

    assert ["BR_CLEAR_DEATH_NOTIFICATION_DONE"] == manager.news()


@pytest.mark.parametrize(("handle", "cookie"), [(1, 8), (2, 7), (99, 7)])
def test_clearing_what_was_not_asked_for_is_ignored(
    machine: Machine, manager: Client, client: Client, handle: int, cookie: int
) -> None:
    """Another cookie, a handle without a notification, an unknown handle: nothing happens."""
    machine.share(client, manager, 0x1000)
    machine.share(client, manager, 0x3000)
    watch(manager, 1, 7)
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, cookie)

    assert [] == manager.news()
    assert manager.process.refs_by_desc[1].death is not None


def test_the_answer_to_a_looper_comes_to_itself(machine: Machine, manager: Client, client: Client) -> None:
    """A thread that loops reads its own clearing; that of another thread goes to any."""
    handle = machine.share(client, manager)
    waiting = manager.thread().read()
    watch(manager, handle, 7)
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 7)
    assert waiting.parked
    assert ["BR_CLEAR_DEATH_NOTIFICATION_DONE"] == manager.news()
    watch(manager, handle, 8)
    manager.thread().do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 8)

    assert ["BR_NOOP", "BR_CLEAR_DEATH_NOTIFICATION_DONE"] == waiting.names


def test_a_registered_looper_counts_too(machine: Machine, manager: Client, client: Client) -> None:
    """BC_REGISTER_LOOPER makes a looper as BC_ENTER_LOOPER does."""
    handle = machine.share(client, manager)
    looper = manager.thread()
    looper.do(uapi.BC_REGISTER_LOOPER)
    waiting = manager.read()
    looper.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, handle, 7)
    looper.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 7)

    assert waiting.parked
    assert ["BR_CLEAR_DEATH_NOTIFICATION_DONE"] == looper.news()


def test_clearing_a_death_that_is_on_its_way(machine: Machine, manager: Client, client: Client) -> None:
    """The death is told all the same; its acknowledgement is answered by the clearing's."""
    handle = machine.share(client, manager)
    watch(manager, handle, 7)
    client.die()
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 7)
    assert ["BR_DEAD_BINDER"] == manager.news()
    assert [] == manager.news()
    manager.do(uapi.BC_DEAD_BINDER_DONE, 7)

    assert ["BR_CLEAR_DEATH_NOTIFICATION_DONE"] == manager.news()
    assert machine.engine.stats.created[4] == machine.engine.stats.deleted[4]


def test_clearing_a_death_that_was_told(machine: Machine, manager: Client, client: Client) -> None:
    """Between BR_DEAD_BINDER and its acknowledgement the clearing waits; other cookies do not acknowledge it."""
    handle = machine.share(client, manager)
    watch(manager, handle, 7)
    client.die()
    assert ["BR_DEAD_BINDER"] == manager.news()
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 7)
    manager.do(uapi.BC_DEAD_BINDER_DONE, 8)
    assert [] == manager.news()
    thread = manager.thread()
    thread.do(uapi.BC_DEAD_BINDER_DONE, 7)

    assert ["BR_CLEAR_DEATH_NOTIFICATION_DONE"] == thread.news()


def test_clearing_a_death_that_was_acknowledged(machine: Machine, manager: Client, client: Client) -> None:
    """Then there is nothing to wait for."""
    handle = machine.share(client, manager)
    watch(manager, handle, 7)
    client.die()
    manager.news()
    manager.do(uapi.BC_DEAD_BINDER_DONE, 7)
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 7)

    assert ["BR_CLEAR_DEATH_NOTIFICATION_DONE"] == manager.news()


def test_acknowledgements_go_by_their_cookie(machine: Machine, manager: Client, client: Client) -> None:
    """Of two deaths with one cookie the first one is acknowledged first."""
    handles = [machine.share(client, manager, ptr) for ptr in (0x1000, 0x3000)]
    for handle in handles:
        watch(manager, handle, 7)
    client.die()
    manager.news()
    manager.news()
    first, second = manager.process.delivered_death
    manager.do(uapi.BC_DEAD_BINDER_DONE, 7)

    assert [second] == list(manager.process.delivered_death)
    assert first.queue is None


def test_a_handle_given_up_takes_its_notification_along(machine: Machine, manager: Client, client: Client) -> None:
    """Wherever the notification stands by then: asked for, queued, or told."""
    handles = [machine.share(client, manager, ptr) for ptr in (0x1000, 0x3000, 0x5000)]
    for handle in handles:
        watch(manager, handle, handle)
    manager.do(uapi.BC_RELEASE, handles[0])
    client.die()
    assert ["BR_DEAD_BINDER"] == manager.news()
    for handle in handles[1:]:
        manager.do(uapi.BC_RELEASE, handle)

    assert [] == manager.news()
    assert {} == machine.engine.dead_nodes
    assert machine.engine.stats.created[4] == machine.engine.stats.deleted[4]


def test_unread_notifications_go_with_their_process(machine: Machine, manager: Client, client: Client) -> None:
    """Deaths and clearings that nobody reads any more are freed, whether queued, told or to be cleared."""
    for ptr in range(0x1000, 0x6000, 0x1000):
        watch(manager, machine.share(client, manager, ptr), ptr)
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, 1, 0x1000)
    client.die()
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, 2, 0x2000)
    while manager.news():
        pass
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, 3, 0x3000)
    manager.die()

    assert machine.engine.stats.created[4] == machine.engine.stats.deleted[4]


def test_clearings_go_with_their_thread(machine: Machine, manager: Client, client: Client) -> None:
    """A looper that ends takes its unread clearing along."""
    handle = machine.share(client, manager)
    watch(manager, handle, 7)
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 7)
    manager.exit()

    assert machine.engine.stats.created[4] == machine.engine.stats.deleted[4]
    assert [] == manager.thread().news()


# -- dead nodes


def test_a_dead_node_lives_as_long_as_its_handles(machine: Machine, manager: Client, client: Client) -> None:
    """It is listed as dead until the last handle is given up."""
    other = machine.client()
    handle = machine.share(client, manager)
    other_handle = machine.pass_on(manager, other, parcel().handle(handle))
    node = node_of(client)
    client.die()
    assert [node] == list(machine.engine.dead_nodes)
    manager.do(uapi.BC_RELEASE, handle)
    assert [node] == list(machine.engine.dead_nodes)
    other.do(uapi.BC_RELEASE, other_handle)

    assert {} == machine.engine.dead_nodes


def test_a_node_without_handles_dies_at_once(machine: Machine, manager: Client, client: Client) -> None:
    """Whatever its own process held of it."""
    machine.share(client, manager)
    manager.die()
    assert [PTR] == list(client.process.nodes)
    client.die()

    assert {} == machine.engine.dead_nodes


def test_a_node_that_dies_while_it_is_called(machine: Machine, manager: Client, client: Client) -> None:
    """It stays until the call has failed, and goes then."""
    seen = []

    def hook(call: Call, effect: Effect) -> None:
        del call
        if isinstance(effect, CopyToBuffer):
            manager.die()
            seen.append(list(machine.engine.dead_nodes))

    machine.before_effect = hook
    node = machine.binder.manager
    client.tell(0, b"x")

    assert [[node]] == seen
    assert {} == machine.engine.dead_nodes


def test_the_last_reference_to_a_dead_node_tells_nobody(machine: Machine, manager: Client, client: Client) -> None:
    """Its process is gone: weak and strong references just go."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_INCREFS, handle)
    client.die()
    manager.do(uapi.BC_RELEASE, handle)
    assert 1 == len(machine.engine.dead_nodes)
    manager.do(uapi.BC_DECREFS, handle)

    assert {} == machine.engine.dead_nodes
