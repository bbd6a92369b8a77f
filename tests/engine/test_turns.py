"""Long steps give turns: what they leave when others do not interfere, and when they do just then."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import FindRoom, Outcome, Turn, logs, stats
from binderfs_fuse.engine.transaction import MAX_DEPTH
from tests.engine.machine import MIB, Machine
from tests.engine.wire import command, fds, parcel

if TYPE_CHECKING:
    from tests.engine.machine import Call, Client

MANY = 200


def turns_of(call: Call) -> int:
    """How many turns a call has given."""
    return sum(isinstance(effect, Turn) for effect in call.effects)


def test_a_long_write_gives_turns(client: Client) -> None:
    """One for each 64 commands, and each command is carried out."""
    call = client.write(command(uapi.BC_ENTER_LOOPER) * MANY)

    assert 0 == call.error
    assert MANY * 4 == call.write_consumed
    assert MANY // 64 == turns_of(call)


def test_a_long_write_ends_where_its_caller_is_killed(client: Client) -> None:
    """At a turn it can be told so: it ends with EINTR behind the last command, and the rest is not carried out."""
    call = client.begin(command(uapi.BC_ENTER_LOOPER) * MANY)
    while call.advance() and not isinstance(call.effect, Turn):
        pass
    call.advance(answer=True)

    assert -errno.EINTR == call.error
    assert 64 * 4 == call.write_consumed


def test_a_short_write_gives_none(client: Client) -> None:
    """A call with what usually goes before it is done without."""
    call = client.write(command(uapi.BC_FREE_BUFFER, 0), client.transaction())

    assert 0 == turns_of(call)


def test_transactions_count_for_more(manager: Client, client: Client) -> None:
    """A turn comes after some of them already."""
    stream = client.transaction(flags=uapi.TF_ONE_WAY) * 8
    call = client.write(stream)

    assert 8 == manager.process.outstanding_transactions
    assert turns_of(call) >= 2


def test_a_long_read_gives_turns(client: Client) -> None:
    """One for each 64 items; all of them are read."""
    client.write(*(client.transaction(0, flags=uapi.TF_ONE_WAY) for _ in range(MANY)))
    call = client.read(4096)

    assert MANY == call.names.count("BR_TRANSACTION_COMPLETE")
    assert MANY // 64 == turns_of(call)


@pytest.mark.parametrize("accessible", [0, 4, 8, 100, 260, 404, 10_000])
def test_a_long_read_that_cannot_be_stored(client: Client, accessible: int) -> None:
    """Each part is stored before the next is taken: what is behind a fault is read later, but for the item there."""
    client.write(*(client.transaction(0, flags=uapi.TF_ONE_WAY) for _ in range(MANY)))
    thread = client.process.threads[client.tid]
    call = client.read(4096, into=client.memory.room(4096, accessible=accessible))
    stored = min(MANY, max(0, accessible - 4) // 4)
    counted = client.process.stats.br[uapi.BR_TRANSACTION_COMPLETE & 0xFF]

    assert (0 if stored == MANY else -errno.EFAULT) == call.error
    assert (4 + 4 * MANY if stored == MANY else 0) == call.read_consumed
    assert stored == counted
    assert max(0, MANY - stored - (accessible >= 4)) == thread.todo.count == thread.unread


def test_a_long_read_of_a_looper(client: Client) -> None:
    """BR_SPAWN_LOOPER stands in place of the BR_NOOP that was stored long before."""
    client.write(*(client.transaction(0, flags=uapi.TF_ONE_WAY) for _ in range(MANY)))
    client.ioctl(uapi.BINDER_SET_MAX_THREADS, (1).to_bytes(4, "little"))
    call = client.exchange(command(uapi.BC_ENTER_LOOPER), read=4096)

    assert ["BR_SPAWN_LOOPER", *["BR_TRANSACTION_COMPLETE"] * MANY] == call.names


def test_a_process_that_is_released_while_a_read_is_undone(machine: Machine, manager: Client, client: Client) -> None:
    """As where a caller was killed, and answered for: the rest counts as read, and nothing is left."""
    client.write(*(client.transaction(0, flags=uapi.TF_ONE_WAY) for _ in range(3)))
    call = client.begin(read=4096)
    answer = None
    while not isinstance(effect := call._step.send(answer), Outcome):
        answer = machine.perform(call, effect)
    machine.under_way.clear()
    machine.engine.chunk = 1

    def die() -> None:
        if client.open:
            client.die()

    machine.before_turn = die
    outcome = machine.conclude(client.process.undeliver(client.task(), effect, 4))
    machine.before_turn = None

    assert -errno.EFAULT == outcome.error
    assert [client.process] == machine.freed
    assert manager.process.outstanding_transactions == 3


@pytest.mark.parametrize("flags", [0, uapi.TF_CLEAR_BUF])
def test_many_objects_are_let_go_of_in_turns(machine: Machine, manager: Client, client: Client, flags: int) -> None:
    """A buffer with many objects is freed as one with few is: all references are dropped, and its bytes cleared."""
    content = parcel()
    for number in range(MANY):
        content.binder(0x1000 + 16 * number)
    client.tell(0, content, flags=flags)
    received = manager.read(4096).received
    held = manager.process.refs_by_desc.copy()
    call = manager.write(command(uapi.BC_FREE_BUFFER, received.buffer))

    assert MANY == len(held)
    assert turns_of(call) >= MANY // 64
    assert {} == manager.process.refs_by_desc
    assert manager.process.allocation is not None
    assert {} == manager.process.allocation.allocated
    assert bool(flags) == (bytes(received.data_size) == manager.see(received.buffer, received.data_size))
    assert {} == machine.engine.dying


def test_many_bytes_are_cleared_in_turns(manager: Client, client: Client) -> None:
    """A large buffer without objects, too."""
    client.tell(0, bytes([7]) * 200_000, flags=uapi.TF_CLEAR_BUF)
    received = manager.read().received
    before = manager.see(received.buffer, 200_000)
    call = manager.write(command(uapi.BC_FREE_BUFFER, received.buffer))

    assert bytes([7]) * 200_000 == before
    assert bytes(200_000) == manager.see(received.buffer, 200_000)
    assert turns_of(call) >= 3


def test_many_descriptors_are_closed_in_turns(manager: Client, client: Client) -> None:
    """An array of descriptors that is longer than a slice is closed whole, in its order."""
    files = [client.open_fd(str(number)) for number in range(MANY)]
    client.tell(0, parcel().raw(bytes(8)).ptr(fds(*files)).fda(MANY, parent=0))
    call = manager.read(4096)
    installed = call.installed
    freed = manager.write(command(uapi.BC_FREE_BUFFER, call.received.buffer))

    assert MANY == len(installed)
    assert freed.outcome is not None
    assert installed == list(freed.outcome.closes)
    assert {} == manager.fds


def test_many_objects_that_are_refused_are_let_go_of(machine: Machine, manager: Client, client: Client) -> None:
    """A transaction that fails at its last object leaves no reference, however many came before."""
    content = parcel()
    for number in range(MANY):
        content.binder(0x1000 + 16 * number)
    content.handle(99)
    call = client.tell(0, content)

    assert ["BR_NOOP", "BR_FAILED_REPLY"] == call.names
    assert {} == manager.process.refs_by_desc
    assert turns_of(call) >= 2 * (MANY // 64)
    assert not machine.engine.dead_nodes


def test_many_offsets_are_stored_in_turns(machine: Machine) -> None:
    """More than 64 KiB of them arrive whole."""
    manager, client = machine.manager(size=4 * MIB), machine.client()
    machine.careful = False
    content = parcel()
    for _ in range(9000):
        content.binder(0x1000)
    client.tell(0, content)
    received = manager.read(4096).received
    offsets = manager.see(received.offsets, 8 * 9000)

    assert [24 * number for number in range(9000)] == [
        int.from_bytes(offsets[start : start + 8], "little") for start in range(0, len(offsets), 8)
    ]


def test_a_chain_of_parents_is_left_in_turns(machine: Machine, manager: Client, client: Client) -> None:
    """A PTR whose parent stands far below the last one is fixed up there, and no other is any more."""
    machine.engine.chunk = 8
    content = parcel().raw(bytes(8)).ptr(bytes(24))
    for number in range(50):
        content.ptr(bytes(24), parent=number, at=0)
    content.ptr(bytes(24), parent=0, at=8)
    client.tell(0, content)
    fine = manager.read(8192, nonblock=True).names
    content.ptr(bytes(24), parent=30, at=8)
    refused = client.tell(0, content)

    assert "BR_TRANSACTION" in fine
    assert "BR_FAILED_REPLY" in refused.names


def test_a_process_is_thawed_while_it_is_frozen(machine: Machine, manager: Client, client: Client) -> None:
    """Who is told by both is told the last state last: the first walk ends where the second begins."""
    other = machine.client()
    for ptr in (0x10, 0x20, 0x30):
        handle = machine.grant(manager, client, ptr)
        client.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, ptr)
        client.do(uapi.BC_FREEZE_NOTIFICATION_DONE, ptr) if client.news() else None
    machine.engine.chunk = 1
    thread = other.thread()
    freezing = other.begin_ioctl(uapi.BINDER_FREEZE, uapi.binder_freeze_info.pack(manager.pid, 1, 0))

    def thaw(call: Call, effect: object) -> None:
        if call is freezing and isinstance(effect, Turn) and manager.process.is_frozen and client.process.todo.count:
            thread.freeze(manager.pid, enable=False)

    machine.before_effect = thaw
    freezing.drive()
    machine.before_effect = None
    states = [ref.freeze.is_frozen for ref in client.process.refs_by_desc.values() if ref.freeze is not None]

    assert 0 == freezing.error
    assert [False] * 3 == states


def test_many_wait_to_freeze_a_process(machine: Machine, manager: Client, client: Client) -> None:
    """The end of its last transaction lets all of them go on, each by the one before."""
    client.call()
    waiting = [
        machine.client().begin_ioctl(uapi.BINDER_FREEZE, uapi.binder_freeze_info.pack(manager.pid, 1, 1000)).drive()
        for _ in range(5)
    ]
    assert all(call.parked for call in waiting)
    manager.read()
    manager.reply()

    assert [0] * 5 == [call.error for call in waiting]


def test_calls_inside_of_each_other_have_an_end(machine: Machine) -> None:
    """Beyond some depth a call fails, as for want of memory; the others end as ever."""
    machine.careful = False
    manager, client = machine.pair()
    handle = machine.share(client, manager)
    sides = [(client, 0), (manager, handle)]
    depth = 0
    while True:
        caller, target = sides[depth % 2]
        caller.send(target)
        if machine.engine.failed_transaction_log:
            break
        other = sides[(depth + 1) % 2][0]
        received = other.read(nonblock=True).received
        other.free(received)
        depth += 1

    assert MAX_DEPTH == depth
    assert ("BR_FAILED_REPLY", -errno.ENOMEM, 3346) == machine.failure()


def test_many_threads_that_poll_are_not_all_looked_at(machine: Machine, manager: Client, client: Client) -> None:
    """Where none of the first is free, the process's pollers are told all the same."""
    for _ in range(70):
        thread = manager.thread()
        thread.poll()
        manager.process.threads[thread.tid].enqueue_deferred(manager.process.threads[thread.tid].return_error)
        manager.process.threads[thread.tid].return_error.command = uapi.BR_ERROR
    machine.poll.woken.clear()
    client.send(flags=uapi.TF_ONE_WAY)

    assert [manager.process] == machine.poll.woken


def test_missed_calls_of_many_opens(machine: Machine, manager: Client, client: Client) -> None:
    """Whether a process has missed anything is asked of each of its opens, in turns."""
    machine.engine.chunk = 1
    again = machine.client(pid=manager.pid)
    call = client.ioctl(uapi.BINDER_GET_FROZEN_INFO, uapi.binder_frozen_status_info.pack(manager.pid, 0, 0))

    assert again.process.serial > manager.process.serial
    assert (manager.pid, 0, 0) == uapi.binder_frozen_status_info.unpack(call.argument)
    assert 2 == turns_of(call)


def test_a_call_without_room_for_its_descriptors(machine: Machine, manager: Client, client: Client) -> None:
    """What it holds is let go of in turns before the read goes on, where there was no room from the first."""
    machine.engine.chunk = 1
    manager.fd_limit = 0
    client.tell(0, parcel().binder(0x10).fd(client.open_fd("a")))
    client.tell(0, b"next")
    call = manager.read()

    assert b"next" == call.body
    assert {} == manager.process.refs_by_desc


def test_a_call_whose_descriptors_cannot_be_installed(machine: Machine, manager: Client, client: Client) -> None:
    """And where the room was gone when it came to that."""
    machine.engine.chunk = 1
    manager.fd_limit = 0
    machine.answer(FindRoom, 0)
    waiting = client.call(0, parcel().binder(0x10).fd(client.open_fd("a")))
    call = manager.read()

    assert ["BR_NOOP"] == call.names
    assert "BR_FAILED_REPLY" in waiting.names
    assert {} == manager.process.refs_by_desc


def test_work_that_is_read_while_a_thread_is_shown(
    machine: Machine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log goes on with what is left."""
    client.write(*(client.transaction(0, flags=uapi.TF_ONE_WAY) for _ in range(3)))
    queue = client.process.threads[client.tid].todo
    monkeypatch.setattr(logs, "_PIECE", 1)
    pieces = machine.engine.logs.proc(client.pid)
    text = ""
    while text.count("transaction complete") < 2:
        text += next(pieces)
    second = queue.first
    assert second is not None
    assert second.next is not None
    queue.remove(second.next)
    client.process.threads[client.tid].discount_unread()
    machine.engine.stats.deleted[stats.TRANSACTION_COMPLETE] += 1
    text += "".join(pieces)

    assert 3 == text.count("transaction complete")
