"""Opens of a device: their ioctls, their context, polling, and what happens when the last descriptor is closed."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import stats
from binderfs_fuse.engine.process import POLLIN
from binderfs_fuse.engine.thread import ENTERED, POLL
from tests.engine.machine import MIB
from tests.engine.wire import parcel

if TYPE_CHECKING:
    from tests.engine.machine import Caller, Client, Machine


def node_info(caller: Caller, *fields: int) -> tuple[int, tuple[int, ...]]:
    """Do BINDER_GET_NODE_INFO_FOR_REF: the result, and handle, strong and weak count (the rest is zero)."""
    fields += (0,) * (6 - len(fields))
    call = caller.ioctl(uapi.BINDER_GET_NODE_INFO_FOR_REF, uapi.binder_node_info_for_ref.pack(*fields))
    info: tuple[int, ...] = uapi.binder_node_info_for_ref.unpack(call.argument) if call.argument else ()
    assert not any(info[3:])
    return call.error, info[:3]


def debug_info(caller: Caller, ptr: int) -> tuple[int, ...]:
    """Do BINDER_GET_NODE_DEBUG_INFO: ptr, cookie and flags of the next node."""
    call = caller.ioctl(uapi.BINDER_GET_NODE_DEBUG_INFO, uapi.binder_node_debug_info.pack(ptr, 9, 9, 9))
    assert call.error == 0
    return tuple(uapi.binder_node_debug_info.unpack(call.argument))


# -- ioctls


def test_the_version_is_eight(client: Client) -> None:
    """BINDER_VERSION."""
    call = client.ioctl(uapi.BINDER_VERSION)

    assert (0, (8,)) == (call.error, uapi.binder_version.unpack(call.argument))


@pytest.mark.parametrize("number", [0, uapi.BINDER_SET_IDLE_TIMEOUT, uapi.BINDER_SET_IDLE_PRIORITY, 0xFFFF_FFFF])
def test_unknown_ioctls_are_invalid(client: Client, number: int) -> None:
    """EINVAL, with nothing to copy out."""
    call = client.ioctl(number)

    assert (-errno.EINVAL, b"") == (call.error, call.argument)


def test_any_ioctl_makes_a_thread(machine: Machine) -> None:
    """Also one that is unknown; after it the thread may wait."""
    client = machine.client(fresh=True)
    client.ioctl(0)

    assert [client.tid] == list(client.process.threads)
    assert client.read().parked


def test_an_extended_error_is_read_once(machine: Machine, client: Client) -> None:
    """Number, command and parameter of the thread's last transaction; then nothing, until the next one."""
    client.write(client.transaction(99))
    call = client.ioctl(uapi.BINDER_GET_EXTENDED_ERROR)
    again = client.ioctl(uapi.BINDER_GET_EXTENDED_ERROR)
    number = machine.engine.failed_transaction_log[-1].debug_id

    assert (0, 0) == (call.error, again.error)
    assert (number, uapi.BR_FAILED_REPLY, -errno.EINVAL) == uapi.binder_extended_error.unpack(call.argument)
    assert (0, uapi.BR_OK, 0) == uapi.binder_extended_error.unpack(again.argument)


def test_a_transaction_that_works_clears_the_extended_error(machine: Machine, manager: Client, client: Client) -> None:
    """Its number is there, with BR_OK."""
    assert manager.open
    client.write(client.transaction(99))
    client.news()
    client.tell()
    call = client.ioctl(uapi.BINDER_GET_EXTENDED_ERROR)

    number = machine.engine.transaction_log[-1].debug_id
    assert (number, uapi.BR_OK, 0) == uapi.binder_extended_error.unpack(call.argument)


def test_extended_errors_are_the_threads_own(client: Client) -> None:
    """Another thread knows nothing of it."""
    client.write(client.transaction(99))

    assert ("BR_OK", 0) == client.thread().extended_error()


@pytest.mark.parametrize(("value", "enabled"), [(0, False), (1, True), (1 << 31, True)])
def test_spam_detection_is_on_or_off(client: Client, value: int, enabled: bool) -> None:
    """Any bit turns it on."""
    client.ioctl(uapi.BINDER_ENABLE_ONEWAY_SPAM_DETECTION, value.to_bytes(4, "little"))

    assert enabled == client.process.oneway_spam_detection_enabled


# -- the context manager


def test_there_is_one_manager(machine: Machine, manager: Client, client: Client) -> None:
    """A second one is EBUSY, also where it is the same process; the node stays."""
    node = machine.binder.manager
    for caller in (manager, client):
        assert -errno.EBUSY == caller.ioctl(uapi.BINDER_SET_CONTEXT_MGR).error
        assert -errno.EBUSY == caller.ioctl(uapi.BINDER_SET_CONTEXT_MGR_EXT).error

    assert node is machine.binder.manager


@pytest.mark.parametrize(
    ("number", "argument", "expected"),
    [
        (
            uapi.BINDER_SET_CONTEXT_MGR_EXT,
            uapi.flat_binder_object.pack(0, 0x1105, 0x10, 0x20),
            (0x10, 0x20, 5, True, True),
        ),
        (uapi.BINDER_SET_CONTEXT_MGR, b"\1\2\3\4", (0, 0, 0, False, False)),
    ],
)
def test_a_managers_node_is_what_it_says(
    machine: Machine, number: int, argument: bytes, expected: tuple[int, ...]
) -> None:
    """BINDER_SET_CONTEXT_MGR_EXT gives ptr, cookie and flags, BINDER_SET_CONTEXT_MGR zeros; it is held for good."""
    manager = machine.client()
    assert 0 == manager.ioctl(number, argument).error
    node = machine.binder.manager
    assert node is not None

    assert expected == (node.ptr, node.cookie, node.min_priority, node.accept_fds, node.txn_security_ctx)
    assert (1, 1, True, True) == (
        node.local_strong_refs,
        node.local_weak_refs,
        node.has_strong_ref,
        node.has_weak_ref,
    )
    assert [] == manager.news()


def test_an_object_can_become_the_managers_node(machine: Machine, manager: Client) -> None:
    """A process that becomes manager with the ptr of an object it has sent makes that the manager's node."""
    client = machine.client()
    machine.share(client, manager, 0x10, 0x20)
    node = client.process.nodes[0x10]
    manager.die()
    client.ioctl(uapi.BINDER_SET_CONTEXT_MGR_EXT, uapi.flat_binder_object.pack(0, 0, 0x10, 0x99))

    assert node is machine.binder.manager
    assert 0x20 == node.cookie


def test_only_the_first_managers_user_may_follow(machine: Machine) -> None:
    """EPERM for another effective user, even when the first manager has gone."""
    first = machine.client(euid=1000)
    assert 0 == first.ioctl(uapi.BINDER_SET_CONTEXT_MGR).error
    first.die()
    other = machine.client(euid=1001)

    assert -errno.EPERM == other.ioctl(uapi.BINDER_SET_CONTEXT_MGR).error
    assert machine.binder.manager is None
    other.euid = 1000
    assert 0 == other.ioctl(uapi.BINDER_SET_CONTEXT_MGR).error


def test_each_context_has_its_own_manager(machine: Machine, manager: Client) -> None:
    """Processes of different devices do not see each other; users are counted by context, too."""
    context = machine.engine.add_context("hwbinder")
    other = machine.client(context=context, euid=5)
    assert "BR_DEAD_REPLY" in other.call().names
    assert 0 == other.ioctl(uapi.BINDER_SET_CONTEXT_MGR).error
    client = machine.client(context=context)
    client.send(0, b"x")

    assert b"x" == other.read(nonblock=True).body
    assert [] == manager.news()


def test_a_context_goes_on_without_its_device(machine: Machine, manager: Client, client: Client) -> None:
    """Who has a removed device open does not notice; another of that name is a new one."""
    machine.engine.remove_context(machine.binder)
    assert {} == machine.engine.contexts
    client.send(0, b"x")
    assert b"x" == manager.read(nonblock=True).body
    again = machine.engine.add_context("binder")

    assert "BR_DEAD_REPLY" in machine.client(context=again).call().names


# -- what the manager may ask


def test_the_manager_may_ask_how_a_handle_is_held(machine: Machine, manager: Client, client: Client) -> None:
    """Strong references of handles, calls and objects under way, and the weak ones of its own process."""
    handle = machine.share(client, manager)
    machine.pass_on(manager, machine.client(), parcel().handle(handle))
    assert (0, (handle, 2, 0)) == node_info(manager, handle)
    objects = parcel().handle(handle).handle(handle).handle(handle, weak=True)
    manager.send(handle, objects, flags=uapi.TF_ONE_WAY)

    assert (0, (handle, 2 + 2 + 1, 1)) == node_info(manager, handle)


def test_others_may_not_ask(machine: Machine, manager: Client, client: Client) -> None:
    """EPERM for who is not the manager; EINVAL comes first for fields that should be zero."""
    handle = machine.grant(manager, client)
    assert (-errno.EPERM, ()) == node_info(client, handle)
    for place in range(1, 6):
        fields = [handle, 0, 0, 0, 0, 0]
        fields[place] = 1
        assert (-errno.EINVAL, ()) == node_info(client, *fields)
        assert (-errno.EINVAL, ()) == node_info(manager, *fields)
    manager.die()

    assert (-errno.EPERM, ()) == node_info(client, handle)


def test_the_manager_may_ask_about_strong_handles_only(machine: Machine, manager: Client, client: Client) -> None:
    """EINVAL for a weak or unknown one."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_INCREFS, handle)
    manager.do(uapi.BC_RELEASE, handle)

    assert (-errno.EINVAL, ()) == node_info(manager, handle)
    assert (-errno.EINVAL, ()) == node_info(manager, 99)


def test_own_nodes_can_be_walked(machine: Machine, manager: Client, client: Client) -> None:
    """Each call gives the node with the next larger ptr, then zeros."""
    assert manager.open
    client.tell(0, parcel().binder(0x30, 3).binder(0x10, 1, weak=True).binder(0x20, 2))
    seen = []
    ptr = 0
    while (info := debug_info(client, ptr))[0]:
        seen.append(info)
        ptr = info[0]

    assert [(0x10, 1, 0, 1), (0x20, 2, 1, 1), (0x30, 3, 1, 1)] == seen
    assert (0, 0, 0, 0) == info
    assert (0, 0, 0, 0) == debug_info(machine.client(), 0)


# -- mapping


def test_a_mapping_counts_once(client: Client) -> None:
    """The first one stays; whole pages of it are used."""
    client.process.map(0x1000, 3 * 4096 + 100)
    client.process.map(0x9000, MIB)
    allocation = client.process.allocation
    assert allocation is not None

    assert (0x1000, 3 * 4096) == (client.process.address, allocation.size)


@pytest.mark.parametrize("address", [0, 1, 0x7000_0000])
def test_freeing_what_is_no_buffer_is_ignored(machine: Machine, manager: Client, address: int) -> None:
    """An address outside, in the middle of a buffer or without a mapping at all: nothing happens."""
    machine.client(size=0).do(uapi.BC_FREE_BUFFER, address)
    machine.client().send(0, b"12345678")
    received = manager.read(nonblock=True).received
    manager.do(uapi.BC_FREE_BUFFER, received.buffer + address if address < 8 else address)
    if address == 0:
        manager.do(uapi.BC_FREE_BUFFER, received.buffer)
    allocation = manager.process.allocation
    assert allocation is not None

    assert (0 if address == 0 else 1) == len(allocation.allocated)


def test_a_buffer_that_was_not_received_cannot_be_freed(manager: Client, client: Client) -> None:
    """Guessing its address does not help."""
    client.send(0, b"x")
    manager.do(uapi.BC_FREE_BUFFER, manager.process.address)

    assert b"x" == manager.read(nonblock=True).body


def test_a_call_can_be_served_without_its_buffer(manager: Client, client: Client) -> None:
    """A server that frees the buffer first may reply all the same."""
    call = client.call()
    manager.free(manager.read().received)
    manager.reply(b"done")

    assert b"done" == call.body


def test_an_empty_reply_can_be_freed(manager: Client, client: Client) -> None:
    """Its buffer holds nothing, and is gone."""
    call = client.call()
    manager.serve()
    client.free(call.received)

    assert {} == client.process.allocation.allocated  # type: ignore[union-attr]


# -- polling


def test_polling_finds_what_a_read_would(machine: Machine, manager: Client, client: Client) -> None:
    """Work of the process for a thread that has nothing else to do, work of the thread's own in any case."""
    handle = machine.share(client, manager)
    busy = manager.thread()
    busy.send(handle)
    client.send()
    busy.do(uapi.BC_ENTER_LOOPER)
    assert [POLLIN, POLLIN, 0] == [manager.poll(), manager.thread().poll(), busy.poll()]
    busy.send(handle, flags=uapi.TF_ONE_WAY)

    assert POLLIN == busy.poll()
    assert ENTERED | POLL == manager.process.threads[busy.tid].looper


def test_polling_needs_a_wake_up_for_own_work(machine: Machine, manager: Client, client: Client) -> None:
    """A thread that polls and queues something for itself is to look again, once until it has read."""
    assert manager.open
    client.poll()
    client.send(flags=uapi.TF_ONE_WAY)
    assert [client.process] == machine.poll.woken
    machine.poll.woken.clear()
    client.send(flags=uapi.TF_ONE_WAY)
    assert [] == machine.poll.woken

    assert POLLIN == client.poll()


def test_a_thread_that_does_not_poll_wakes_nobody(machine: Machine, manager: Client, client: Client) -> None:
    """Own work of a thread that never polled, and the process's while only others poll that are busy."""
    client.send(flags=uapi.TF_ONE_WAY)
    assert [] == machine.poll.woken
    manager.free(manager.read().received)
    manager.poll()
    client.thread().send()
    manager.read()
    machine.poll.woken.clear()
    client.thread().send()

    assert [] == machine.poll.woken


def test_a_flush_wakes_pollers_that_wait_in_a_read(machine: Machine, client: Client) -> None:
    """A thread that polled before and waits in a read now is woken both ways; one that waits nowhere is not."""
    client.poll()
    client.thread().poll()
    machine.poll.woken.clear()
    client.flush()
    assert [] == machine.poll.woken
    client.read()
    reading = client.read()
    assert reading.parked
    client.flush()

    assert reading.done
    assert client.process in machine.poll.woken


# -- the end


def test_closing_makes_room(machine: Machine, manager: Client) -> None:
    """The context has no manager any more, and its process is freed."""
    manager.die()

    assert machine.binder.manager is None
    assert [manager.process] == machine.freed
    assert {} == machine.engine.processes


def test_another_process_does_not_take_the_manager_along(machine: Machine, manager: Client, client: Client) -> None:
    """Only the manager's own end leaves the context without."""
    node = machine.binder.manager
    client.die()

    assert node is machine.binder.manager
    assert manager.open


def test_a_frozen_process_dies_like_any_other(machine: Machine, manager: Client, client: Client) -> None:
    """It is not frozen any more, and who called one-way is not told."""
    client.freeze(manager.pid)
    client.tell()
    client.call()
    manager.die()

    assert (False, False, False) == (
        manager.process.is_frozen,
        manager.process.sync_recv,
        manager.process.async_recv,
    )
    assert machine.engine.stats.created[stats.TRANSACTION] == machine.engine.stats.deleted[stats.TRANSACTION]


def test_a_dead_process_is_freed_once_nobody_uses_it(machine: Machine, manager: Client, client: Client) -> None:
    """A call on its way keeps it, not a moment longer."""
    call = client.begin(client.transaction(0, b"x"), read=256)
    call.advance()
    manager.die()
    assert [] == machine.freed
    call.drive()

    assert [manager.process] == machine.freed


def test_a_process_has_what_its_opener_was(machine: Machine) -> None:
    """Its pid, user and nice value."""
    client = machine.client(pid=7, euid=8, nice=9)

    assert (7, 8, 9) == (client.process.pid, client.process.euid, client.process.default_priority)


def test_numbers_are_shared_by_all(machine: Machine, manager: Client, client: Client) -> None:
    """Transactions, nodes and refs are numbered in one order."""
    machine.share(client, manager)
    client.tell()
    node = client.process.nodes[0x1000]
    ref = manager.process.refs_by_desc[1]
    transactions = [entry.debug_id for entry in machine.engine.transaction_log]

    assert [2, 5] == transactions
    assert (3, 4) == (node.debug_id, ref.debug_id)


def test_users_are_everybodys_without_a_namespace(client: Client) -> None:
    """A process that is in no user namespace of its own sees users by the numbers that they have here."""
    assert 5 == client.process.user_id(5)
