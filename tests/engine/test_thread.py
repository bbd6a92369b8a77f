"""BINDER_WRITE_READ: commands in, returns out, waiting in between; loopers; what a thread leaves behind."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from binderfs_fuse import uapi
from binderfs_fuse.engine import CopyIn, CopyOut, FindRoom, Outcome, SetNice, Wait, stats
from binderfs_fuse.engine.thread import ENTERED, EXITED, INVALID, POLL, REGISTERED, WAITING, _is_before, _wrapped
from tests.engine.wire import command, fds, parcel

if TYPE_CHECKING:
    from binderfs_fuse.engine.stats import Stats
    from binderfs_fuse.engine.thread import Thread
    from tests.engine.machine import Caller, Client, Machine
    from tests.engine.wire import Parcel

U64 = (1 << 64) - 1
ENTER = command(uapi.BC_ENTER_LOOPER)
EXIT = command(uapi.BC_EXIT_LOOPER)


def thread_of(caller: Caller) -> Thread:
    """The engine's thread."""
    return caller.client.process.threads[caller.tid]


def counted(counters: Stats) -> dict[str, int]:
    """Commands and returns by name, where there were any."""
    named = {
        **dict(zip(stats.COMMANDS, counters.bc, strict=True)),
        **dict(zip(stats.RETURNS, counters.br, strict=True)),
    }
    return {name: count for name, count in named.items() if count}


# -- writing


def test_all_commands_are_carried_out(client: Client) -> None:
    """In one write, one after the other; all is consumed."""
    call = client.write(ENTER, EXIT)

    assert (0, 8) == (call.error, call.write_consumed)
    assert ENTERED | EXITED == thread_of(client).looper


def test_what_was_consumed_is_skipped(client: Client) -> None:
    """A write goes on where `write_consumed` says."""
    call = client.write(ENTER, EXIT, write_consumed=4)

    assert 8 == call.write_consumed
    assert EXITED == thread_of(client).looper


@pytest.mark.parametrize("consumed", [4, 5, 1 << 40])
def test_more_consumed_than_there_is_writes_nothing(client: Client, consumed: int) -> None:
    """Nothing is read, and the number is handed back."""
    call = client.write(ENTER, write_consumed=consumed)

    assert (0, consumed) == (call.error, call.write_consumed)
    assert 0 == thread_of(client).looper


def test_an_unknown_command_ends_the_write(client: Client) -> None:
    """EINVAL; what came before is done and consumed, the read does not happen and says 0."""
    call = client.exchange(ENTER, b"\xff\x63\x00\x00", EXIT, read_consumed=12)

    assert (-errno.EINVAL, 4, 0) == (call.error, call.write_consumed, call.read_consumed)
    assert b"" == call.data
    assert ENTERED == thread_of(client).looper


@pytest.mark.parametrize("number", [uapi.BC_ATTEMPT_ACQUIRE, uapi.BC_ACQUIRE_RESULT])
def test_commands_that_never_worked_are_invalid(client: Client, number: int) -> None:
    """EINVAL, whatever follows."""
    assert -errno.EINVAL == client.write(command(number), bytes(8)).error


@pytest.mark.parametrize("accessible", [0, 2, 4, 7])
def test_an_unreadable_command_is_a_fault(client: Client, accessible: int) -> None:
    """EFAULT at the command whose number cannot be read; those before it are done and consumed."""
    address = client.memory.place(ENTER + EXIT, accessible=accessible)
    call = client.write(ENTER + EXIT, fetched=False, write_address=address)
    done = accessible // 4 * 4

    assert (-errno.EFAULT, done, 0) == (call.error, call.write_consumed, call.read_consumed)
    assert (ENTERED if done else 0) == thread_of(client).looper


@pytest.mark.parametrize("fetched", [False, True])
def test_an_unreadable_payload_is_a_fault(client: Client, fetched: bool) -> None:
    """EFAULT, and the command is counted all the same."""
    stream = ENTER + command(uapi.BC_INCREFS, 5)[:6]
    call = client.write(stream, fetched=fetched)

    assert (-errno.EFAULT, 4) == (call.error, call.write_consumed)
    assert {"BC_ENTER_LOOPER": 1, "BC_INCREFS": 1} == counted(client.process.stats)


@pytest.mark.parametrize("fetched", [False, True])
def test_a_command_cut_off_by_the_size_is_read_on(manager: Client, client: Client, fetched: bool) -> None:
    """The driver looks at the size between commands only: a payload behind the end is used."""
    assert manager.open
    stream = ENTER + command(uapi.BC_INCREFS, 0)
    address = client.memory.place(stream)
    call = client.write(stream[:5] if fetched else stream, fetched=fetched, write_address=address, write_size=5)

    assert (0, 12) == (call.error, call.write_consumed)
    assert [0] == list(client.process.refs_by_desc)


def test_long_writes_are_read_in_chunks(client: Client) -> None:
    """4 KiB at a time, and from the beginning of a command that a chunk cuts off."""
    stream = command(uapi.BC_INCREFS, 5) * 512 + ENTER + command(uapi.BC_INCREFS, 5)
    call = client.begin(stream, fetched=False).drive()

    assert (0, len(stream)) == (call.error, call.write_consumed)
    assert [4096, 12] == [effect.size for effect in call.effects if isinstance(effect, CopyIn)]


def test_a_payload_that_a_chunk_cuts_off_is_read_again(client: Client) -> None:
    """A chunk that ends behind a command's number: the next begins with the payload."""
    stream = ENTER + command(uapi.BC_INCREFS, 5) * 512
    call = client.begin(stream, fetched=False).drive()

    assert (0, len(stream)) == (call.error, call.write_consumed)
    assert [4096, 4] == [effect.size for effect in call.effects if isinstance(effect, CopyIn)]
    assert 512 == counted(client.process.stats)["BC_INCREFS"]


def test_fetched_commands_may_be_a_part(client: Client) -> None:
    """What the shell has not fetched is read from memory, no more."""
    stream = ENTER + command(uapi.BC_INCREFS, 5) + EXIT
    address = client.memory.place(stream)
    call = client.write(stream[:8], write_address=address, write_size=len(stream))

    assert (0, len(stream)) == (call.error, call.write_consumed)
    assert [8] == [effect.size for effect in call.effects if isinstance(effect, CopyIn)]
    assert ENTERED | EXITED == thread_of(client).looper


@pytest.mark.parametrize(
    ("address", "size", "consumed"),
    [(U64 - 2, 8, 0), (U64 - 2, 2, U64 - 1), (8, 16, U64 - 2), (U64, U64, U64), (0, U64, 5), (U64 - 100, 50, U64)],
)
def test_addresses_wrap_around(client: Client, address: int, size: int, consumed: int) -> None:
    """Sums beyond 64 bits wrap, as in the driver: nothing to write, or a fault."""
    client.memory.place(bytes(64))
    call = client.write(ENTER, write_address=address, write_size=size, write_consumed=consumed, fetched=False)

    assert call.error in (0, -errno.EFAULT)
    assert consumed == call.write_consumed


def test_what_is_consumed_wraps_around(client: Client) -> None:
    """A write that begins before the buffer, by a consumed size of almost 64 bits, ends at a small one."""
    address = client.memory.place(ENTER + EXIT)
    call = client.write(write_address=address + 4, write_size=4, write_consumed=U64 - 3, fetched=False)

    assert (0, 4) == (call.error, call.write_consumed)
    assert ENTERED | EXITED == thread_of(client).looper


@given(*[st.sampled_from([0, 1, 8, (1 << 61) - 1, 1 << 61, U64 - 8, U64]) | st.integers(0, U64)] * 3)
def test_pointers_compare_as_in_the_driver(address: int, position: int, size: int) -> None:
    """Unsigned, after the sums have wrapped around."""
    assert (address + position) % (U64 + 1) < (address + size) % (U64 + 1) or not _is_before(address, position, size)
    assert (address + position) % (U64 + 1) >= (address + size) % (U64 + 1) or _is_before(address, position, size)


@given(st.sampled_from([-1, 0, 1, 1 << 61, U64, U64 + 1, 2 * U64]) | st.integers(-U64, 2 * U64))
def test_numbers_wrap_around(number: int) -> None:
    """What is more or less than 64 bits is not."""
    assert number % (U64 + 1) == _wrapped(number)


# -- loopers


def test_entering_and_registering_exclude_each_other(client: Client) -> None:
    """Either after the other is an error that only the logs show."""
    entered, registered = client.thread(), client.thread()
    entered.do(uapi.BC_ENTER_LOOPER)
    entered.do(uapi.BC_REGISTER_LOOPER)
    registered.do(uapi.BC_REGISTER_LOOPER)
    assert REGISTERED | INVALID == thread_of(registered).looper
    client.process.requested_threads = 1
    third = client.thread()
    third.do(uapi.BC_REGISTER_LOOPER)
    assert REGISTERED == thread_of(third).looper
    third.do(uapi.BC_ENTER_LOOPER)

    assert ENTERED | REGISTERED | INVALID == thread_of(entered).looper
    assert ENTERED | REGISTERED | INVALID == thread_of(third).looper
    assert (0, 1) == (client.process.requested_threads, client.process.requested_threads_started)


def allow_threads(client: Client, count: int) -> None:
    """Set the number of threads that the driver may ask for."""
    assert client.ioctl(uapi.BINDER_SET_MAX_THREADS, count.to_bytes(4, "little")).error == 0


def test_a_busy_process_is_asked_for_threads(manager: Client, client: Client) -> None:
    """A looper that takes work while no other waits reads BR_SPAWN_LOOPER in place of BR_NOOP, up to the maximum."""
    allow_threads(manager, 2)
    first = []
    loopers: list[Caller] = [manager]
    for _ in range(4):
        client.tell()
        call = loopers[-1].read()
        first.append(call.names)
        manager.free(call.received)
        loopers.append(manager.thread())
        loopers[-1].do(uapi.BC_REGISTER_LOOPER)

    spawn, plain = ["BR_SPAWN_LOOPER", "BR_TRANSACTION"], ["BR_NOOP", "BR_TRANSACTION"]
    assert [spawn, spawn, plain, plain] == first
    assert (0, 2) == (manager.process.requested_threads, manager.process.requested_threads_started)
    assert 2 == counted(manager.process.stats)["BR_SPAWN_LOOPER"]
    assert "BR_NOOP" not in counted(manager.process.stats)


def test_a_read_that_goes_on_behind_something_overwrites_the_start_of_the_buffer(
    manager: Client, client: Client
) -> None:
    """BR_SPAWN_LOOPER stands where the buffer begins, what was read where the read began."""
    allow_threads(manager, 1)
    client.tell()
    into = manager.memory.room(256)
    call = manager.read(into=into, read_consumed=8)

    assert (0, ["BR_TRANSACTION"]) == (call.error, call.names)
    assert uapi.BR_SPAWN_LOOPER.to_bytes(4, "little") + bytes([0xEE]) * 4 == manager.memory.read(into, 8)
    assert 1 == counted(manager.process.stats)["BR_SPAWN_LOOPER"]


def test_a_thread_that_was_asked_for_is_waited_for(manager: Client, client: Client) -> None:
    """While one has been asked for and not come, no other is."""
    allow_threads(manager, 2)
    client.tell()
    call = manager.read()
    manager.free(call.received)
    client.tell()

    assert "BR_NOOP" == manager.read().names[0]
    assert 1 == manager.process.requested_threads


def test_no_thread_is_asked_for_while_one_waits(manager: Client, client: Client) -> None:
    """Another thread that waits for work is enough."""
    allow_threads(manager, 2)
    waiting = manager.thread().read()
    reading = manager.read()
    client.tell()

    assert waiting.parked
    assert "BR_NOOP" == reading.names[0]


def test_only_loopers_are_asked_for_threads(manager: Client, client: Client) -> None:
    """A thread that has neither entered nor registered is not."""
    allow_threads(manager, 2)
    client.tell()

    assert "BR_NOOP" == manager.thread().read().names[0]


def test_the_maximum_is_unsigned(manager: Client, client: Client) -> None:
    """-1 allows any number."""
    allow_threads(manager, 0xFFFF_FFFF)
    client.tell()

    assert "BR_SPAWN_LOOPER" == manager.read().names[0]


def test_a_looper_is_asked_at_the_start_of_the_buffer(manager: Client, client: Client) -> None:
    """A read that goes on behind something has BR_SPAWN_LOOPER written over the first word of the buffer."""
    allow_threads(manager, 1)
    client.tell()
    into = manager.memory.room(256)
    call = manager.read(256, into=into, read_consumed=8)

    assert ["BR_TRANSACTION"] == call.names
    assert command(uapi.BR_SPAWN_LOOPER) == manager.memory.read(into, 4)
    assert 8 + 68 == call.read_consumed


def test_a_looper_that_cannot_be_asked_is_a_fault(manager: Client, client: Client) -> None:
    """EFAULT where the first word cannot be written, though the rest could; the request stands."""
    allow_threads(manager, 1)
    client.tell()
    into = manager.memory.room(256)
    call = manager.begin(read=256, into=into - 8, read_consumed=8).drive()

    assert (-errno.EFAULT, 8 + 68) == (call.error, call.read_consumed)
    assert "BR_SPAWN_LOOPER" not in counted(manager.process.stats)
    assert 1 == manager.process.requested_threads


# -- reading


def test_the_first_ioctl_of_a_thread_does_not_wait(machine: Machine) -> None:
    """A new thread returns to user space once, with nothing, also where it polls first."""
    client = machine.client(fresh=True)
    assert 1 == client.poll()
    call = client.read()

    assert ["BR_NOOP"] == call.names
    assert 0 == client.poll()
    assert client.read().parked


def test_a_read_without_work_waits(client: Client) -> None:
    """It is parked, and the logs' waiting bit is set for as long."""
    call = client.read()
    assert call.parked
    assert WAITING == thread_of(client).looper
    assert [thread_of(client)] == list(client.process.waiting_threads)
    call.wake(-errno.EINTR)

    assert (-errno.EINTR, 0, b"") == (call.error, call.read_consumed, call.data)
    assert 0 == thread_of(client).looper
    assert [] == list(client.process.waiting_threads)


def test_a_read_that_may_not_wait_says_so(client: Client) -> None:
    """EAGAIN with O_NONBLOCK, at once or when the shell finds out later; consumed is as it was."""
    call = client.read(nonblock=True, read_consumed=8)
    assert (-errno.EAGAIN, 8) == (call.error, call.read_consumed)
    late = client.read()
    late.wake(-errno.EAGAIN)

    assert -errno.EAGAIN == late.error


def test_a_spurious_wake_up_waits_on(client: Client) -> None:
    """A reader that finds nothing parks again."""
    call = client.read()
    call.wake(0)

    assert call.parked
    assert 2 == sum(isinstance(effect, Wait) for effect in call.effects)


def test_closing_a_descriptor_sends_readers_back(manager: Client, client: Client) -> None:
    """After a flush reads return once with nothing new, those that wait and the next ones of other threads."""
    for_reply = client.call()
    manager.thread().read()
    waiting = manager.read()
    other = manager.thread()
    manager.flush()
    client.flush()

    assert ["BR_NOOP"] == waiting.names
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE"] == for_reply.names
    assert ["BR_NOOP"] == other.read().names
    assert other.read().parked


def test_a_read_goes_on_behind_what_was_consumed(manager: Client, client: Client) -> None:
    """Without BR_NOOP, and the new count includes the old."""
    client.tell()
    into = manager.memory.room(256)
    call = manager.read(256, into=into, read_consumed=8)

    assert ["BR_TRANSACTION"] == call.names
    assert (76, bytes([0xEE]) * 8) == (call.read_consumed, manager.memory.read(into, 8))


@pytest.mark.parametrize(("size", "names"), [(79, ["BR_NOOP"]), (80, ["BR_NOOP", "BR_TRANSACTION"])])
def test_a_read_needs_room_for_the_largest_item(manager: Client, client: Client, size: int, names: list[str]) -> None:
    """76 bytes behind BR_NOOP, whatever comes; else the read returns empty-handed."""
    client.tell()

    assert names == manager.read(size).names


def test_a_consumed_size_beyond_the_buffer_leaves_room(manager: Client, client: Client) -> None:
    """The driver compares unsigned: more consumed than there is counts as endless room."""
    client.tell()
    into = manager.memory.room(256)

    assert ["BR_TRANSACTION"] == manager.read(16, into=into, read_consumed=32).names


def test_items_are_read_as_long_as_there_is_room(manager: Client, client: Client) -> None:
    """Three completions in one read, and the rest in the next."""
    assert manager.open
    for _ in range(4):
        client.send(0, flags=uapi.TF_ONE_WAY)

    assert ["BR_TRANSACTION_COMPLETE"] * 3 == client.read(4 + 8 + 76).names[1:]
    assert ["BR_TRANSACTION_COMPLETE"] == client.news()


def test_a_transaction_ends_a_read(manager: Client, client: Client) -> None:
    """What comes behind it is for another read."""
    client.send(0, b"1")
    client.thread().send(0, b"2")

    assert ["BR_TRANSACTION"] == manager.news()
    assert ["BR_TRANSACTION"] == manager.thread().news()


def test_own_work_comes_before_the_processs(machine: Machine, manager: Client, client: Client) -> None:
    """A thread with work of its own takes that, and leaves the process's to others."""
    handle = machine.share(client, manager)
    manager.tell(handle)
    client.send(0, flags=uapi.TF_ONE_WAY)

    assert ["BR_TRANSACTION_COMPLETE"] == client.news()
    assert ["BR_TRANSACTION"] == client.news()


def test_what_is_left_in_the_process_wakes_another(manager: Client, client: Client) -> None:
    """A read that leaves work behind wakes the next thread that waits."""
    for _ in range(2):
        client.thread().send()
    manager.thread().read(nonblock=True)
    waiting = manager.thread()
    call = waiting.read()

    assert "BR_TRANSACTION" in call.names


def test_work_without_a_word_is_waited_on(machine: Machine, manager: Client, client: Client) -> None:
    """A node whose reference went and came back has nothing to say: the reader waits on for something to say."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_RELEASE, handle)
    client.send(0, parcel().binder(0x1000, 0x2000), flags=uapi.TF_ONE_WAY)
    assert ["BR_TRANSACTION_COMPLETE"] == client.news()
    assert client.process.todo
    assert -errno.EAGAIN == client.read(nonblock=True).error
    assert not client.process.todo

    node = client.process.nodes[0x1000]
    assert (1, True, True) == (node.internal_strong_refs, node.has_strong_ref, node.has_weak_ref)
    assert "BR_TRANSACTION" in manager.news()


def test_a_failure_does_not_end_a_read(machine: Machine, manager: Client, client: Client) -> None:
    """What comes behind it in the list is read along."""
    handle = machine.share(client, manager)
    client.send()
    client.write(client.transaction(99, flags=uapi.TF_ONE_WAY))
    manager.read()
    manager.send(handle)

    assert ["BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY", "BR_TRANSACTION"] == client.news()


# -- unwritable buffers


@pytest.mark.parametrize("accessible", [0, 3])
def test_a_buffer_that_takes_no_word_is_a_fault(manager: Client, client: Client, accessible: int) -> None:
    """EFAULT before anything is taken or waited for; the work is still there."""
    into = manager.memory.room(256, accessible=accessible)
    assert (-errno.EFAULT, 0) == (manager.read(into=into).error, manager.read(into=into).read_consumed)
    client.tell(0, b"still there")
    assert -errno.EFAULT == manager.read(into=into).error

    assert b"still there" == manager.read().body


def test_a_null_buffer_is_a_fault(manager: Client) -> None:
    """EFAULT, rather than to wait."""
    assert -errno.EFAULT == manager.read(into=0).error


def test_a_buffer_is_tried_once(manager: Client, client: Client) -> None:
    """The first read into an address stores BR_NOOP at once, the next ones only with the rest."""
    into = manager.memory.room(256)
    tried = []
    for _ in range(2):
        client.tell()
        call = manager.read(into=into)
        tried.append([effect.data for effect in call.effects if isinstance(effect, CopyOut)])
        manager.free(call.received)

    assert [[command(uapi.BR_NOOP)], []] == tried


def test_a_buffer_that_has_gone_is_a_fault(manager: Client, client: Client) -> None:
    """A buffer that was good before and takes no word now: EFAULT, and the work is still there."""
    into = manager.memory.room(256)
    manager.read(into=into, nonblock=True)
    manager.memory.protect(into)
    client.tell(0, b"still there")
    call = manager.read(into=into)

    assert (-errno.EFAULT, 0) == (call.error, call.read_consumed)
    assert {"BC_ENTER_LOOPER": 1} == counted(manager.process.stats)
    assert b"still there" == manager.read().body


def test_a_buffer_that_goes_while_a_reader_waits_loses_what_comes(manager: Client, client: Client) -> None:
    """The driver has stored BR_NOOP by then, and taken the call when the fault shows: its caller is told."""
    into = manager.memory.room(256)
    reading = manager.read(into=into)
    manager.memory.protect(into)
    call = client.call()

    assert (-errno.EFAULT, 0) == (reading.error, reading.read_consumed)
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"] == call.names
    assert thread_of(manager).transaction_stack is None


def spoil(caller: Caller, accessible: int, read_consumed: int = 0) -> None:
    """Read into a buffer of which only so many bytes can be written: EFAULT, and nothing is said to be consumed."""
    into = caller.client.memory.room(512, accessible=accessible)
    call = caller.read(512, into=into, read_consumed=read_consumed)
    assert (-errno.EFAULT, read_consumed) == (call.error, call.read_consumed)


def test_a_lost_call_is_told_to_its_caller(manager: Client, client: Client) -> None:
    """BR_FAILED_REPLY; the buffer stays, and its receiver cannot free it."""
    call = client.call(0, b"lost")
    spoil(manager, 70)
    allocation = manager.process.allocation
    assert allocation is not None
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"] == call.names
    (buffer,) = allocation.allocated.values()
    manager.do(uapi.BC_FREE_BUFFER, manager.process.address + buffer.offset)

    assert [buffer] == list(allocation.allocated.values())
    assert "BR_TRANSACTION" not in counted(manager.process.stats)
    assert (0, None) == (manager.process.outstanding_transactions, thread_of(manager).transaction_stack)


def test_a_lost_nested_call_leaves_its_reader_waiting(machine: Machine, manager: Client, client: Client) -> None:
    """The reader goes on to wait for the reply to its own call."""
    handle = machine.share(client, manager)
    client.send()
    manager.read()
    back = manager.call(handle, b"lost")
    spoil(client, 4 + 4 + 10)
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"] == back.names
    manager.reply(b"at last")

    assert ["BR_REPLY"] == client.news()


def test_a_lost_one_way_call_blocks_its_node(manager: Client, client: Client) -> None:
    """Nobody can free its buffer, so the next one-way call to the node never comes."""
    client.tell(0, b"lost")
    client.tell(0, b"waits for ever")
    spoil(manager, 70)

    assert [] == manager.news()
    assert 1 == manager.process.outstanding_transactions
    assert not any(buffer.allow_user_free for buffer in manager.process.allocation.allocated.values())  # type: ignore[union-attr]


def test_a_lost_reply_is_lost(manager: Client, client: Client) -> None:
    """Its reader has no call any more, and is told nothing."""
    client.send()
    manager.serve()
    spoil(client, 4 + 4 + 10)

    assert [] == client.news()
    assert thread_of(client).transaction_stack is None
    assert {"BC_TRANSACTION": 1, "BR_TRANSACTION_COMPLETE": 1} == counted(client.process.stats)


def test_items_behind_a_fault_were_never_taken(machine: Machine, manager: Client, client: Client) -> None:
    """The node's work is lost, the completion and the reply come again, in their order and counted once."""
    client.send(0, parcel().binder(0x10, 0x20))
    manager.read()
    manager.reply(b"the reply")
    before = counted(client.process.stats)
    spoil(client, 4 + 3)
    assert before == counted(client.process.stats)
    again = client.read(512)

    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_REPLY"] == again.names
    assert b"the reply" == again.body
    assert (2, 2) == (machine.engine.stats.created[stats.TRANSACTION], machine.engine.stats.deleted[stats.TRANSACTION])


def test_a_node_behind_a_fault_tells_again(manager: Client, client: Client) -> None:
    """A completion is lost; the node behind it was not told, and is not held for its process yet."""
    assert manager.open
    client.send(0, flags=uapi.TF_ONE_WAY)
    client.send(0, parcel().binder(0x10, 0x20), flags=uapi.TF_ONE_WAY)
    node = client.process.nodes[0x10]
    spoil(client, 4 + 3)
    assert (0, 0, False, False) == (
        node.local_strong_refs,
        node.local_weak_refs,
        node.pending_strong_ref,
        node.pending_weak_ref,
    )
    call = client.read()

    assert ["BR_NOOP", "BR_INCREFS", "BR_ACQUIRE", "BR_TRANSACTION_COMPLETE"] == call.names
    assert (0x10, 0x20) == call.returns[1].values


def test_a_lost_node_was_told(manager: Client, client: Client) -> None:
    """A fault in the node's own item: the driver takes it to be told, what was stored of it counts."""
    assert manager.open
    client.send(0, parcel().binder(0x10, 0x20), flags=uapi.TF_ONE_WAY)
    node = client.process.nodes[0x10]
    spoil(client, 4 + 20 + 5)

    assert (True, True) == (node.pending_strong_ref, node.pending_weak_ref)
    assert {"BC_TRANSACTION": 1, "BR_INCREFS": 1} == counted(client.process.stats)
    assert ["BR_TRANSACTION_COMPLETE"] == client.news()


def test_a_deleted_node_behind_a_fault_is_still_there(machine: Machine, manager: Client, client: Client) -> None:
    """A node that was to be told of its end is told so again."""
    for ptr in (0x5000, 0x6000):
        manager.do(uapi.BC_RELEASE, machine.share(client, manager, ptr))
    client.news()
    handle = machine.share(client, manager)
    handle_2 = machine.share(client, manager, 0x3000, 0x4000)
    manager.do(uapi.BC_RELEASE, handle)
    manager.do(uapi.BC_RELEASE, handle_2)
    spoil(client, 4 + 3)
    assert [0x3000] == list(client.process.nodes)

    assert ["BR_RELEASE", "BR_DECREFS"] == client.news()
    assert [] == list(client.process.nodes)


def test_an_error_that_cannot_be_stored_stays(manager: Client, client: Client) -> None:
    """The driver clears a thread's error once it is stored: a lost one stops all further commands for good."""
    assert manager.open
    client.write(client.transaction(99))
    spoil(client, 7)
    call = client.write(ENTER)

    assert (0, 0) == (call.error, call.write_consumed)
    assert [] == client.news()
    assert uapi.BR_FAILED_REPLY == thread_of(client).return_error.command


def test_an_error_behind_a_fault_comes_again(manager: Client, client: Client) -> None:
    """A failure that was not reached is read by the next read."""
    assert manager.open
    client.send(0, flags=uapi.TF_ONE_WAY)
    client.write(client.transaction(99))
    spoil(client, 7)

    assert ["BR_FAILED_REPLY"] == client.news()
    assert 4 == client.write(ENTER).write_consumed


@pytest.mark.parametrize(("accessible", "left"), [(4, 2), (7, 2), (8, 1), (11, 1), (12, 0)])
def test_a_completion_behind_a_fault_comes_again(
    machine: Machine, manager: Client, client: Client, accessible: int, left: int
) -> None:
    """Of three, those that were stored and the one at the fault do not; none is counted twice as deleted."""
    assert manager.open
    for _ in range(3):
        client.send(0, flags=uapi.TF_ONE_WAY)
    spoil(client, accessible)
    stored = 2 - left

    assert stored == counted(client.process.stats).get("BR_TRANSACTION_COMPLETE", 0)
    assert ["BR_TRANSACTION_COMPLETE"] * left == client.news()
    assert 3 == machine.engine.stats.deleted[stats.TRANSACTION_COMPLETE]


def read_unstored(caller: Caller, *commands: bytes, size: int = 256) -> Outcome:
    """Read to the end of the step; what it read is not stored yet."""
    call = caller.begin(*commands, read=size)
    answer = None
    while True:
        effect = call._step.send(answer)
        if isinstance(effect, Outcome):
            return effect
        answer = caller.client.machine.perform(call, effect)


def fail_to_store(caller: Caller, outcome: Outcome, copied: int) -> None:
    """Let only so many bytes be stored: EFAULT, and nothing consumed."""
    instead = caller.client.machine.conclude(caller.client.process.undeliver(caller.task(), outcome, copied))
    caller.client.machine.look()
    caller.client.machine.resume()
    assert -errno.EFAULT == instead.error
    assert 0 == uapi.binder_write_read.unpack(instead.argument)[4]


def test_a_call_behind_a_fault_is_served_by_another(machine: Machine, manager: Client, client: Client) -> None:
    """A call that was not reached stands first in its list again, and a thread that waits is woken for it."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_RELEASE, handle)
    caller = manager.call(machine.share(client, manager, 0x3000), b"patience")
    outcome = read_unstored(client)
    assert 1 == len(outcome.buffers)
    other = client.thread().read()
    fail_to_store(client, outcome, 7)

    assert b"patience" == other.body
    assert caller.parked
    assert 1 == client.process.outstanding_transactions


def test_a_one_way_call_behind_a_fault_is_served_later(machine: Machine, manager: Client, client: Client) -> None:
    """It counts as outstanding again until it is read."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_RELEASE, handle)
    handle = machine.share(client, manager, 0x3000)
    manager.tell(handle, b"patience")
    manager.tell(handle, b"one more")
    fail_to_store(client, read_unstored(client), 7)
    assert 2 == client.process.outstanding_transactions
    call = client.read()
    client.free(call.received)

    assert b"patience" == call.body
    assert 1 == client.process.outstanding_transactions


def queue_node_work(machine: Machine, manager: Client) -> None:
    """Let the manager have an object to hear of, in the process's list."""
    holder = machine.client()
    holder.do(uapi.BC_RELEASE, machine.grant(manager, holder, 0x99))


def test_a_death_behind_a_fault_is_told_later(machine: Machine, manager: Client, client: Client) -> None:
    """It was not told, so it need not be acknowledged."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, handle, 7)
    queue_node_work(machine, manager)
    client.die()
    fail_to_store(manager, read_unstored(manager), 7)

    assert [] == list(manager.process.delivered_death)
    assert ["BR_DEAD_BINDER"] == manager.news()
    assert {"BR_DEAD_BINDER": 1}.items() <= counted(manager.process.stats).items()


def test_a_cleared_death_behind_a_fault_is_told_later(machine: Machine, manager: Client, client: Client) -> None:
    """BR_CLEAR_DEATH_NOTIFICATION_DONE comes once, and the notification is freed once."""
    handle = machine.share(client, manager)
    queue_node_work(machine, manager)
    other = manager.thread()
    other.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, handle, 7)
    other.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 7)
    fail_to_store(manager, read_unstored(manager), 7)

    assert ["BR_CLEAR_DEATH_NOTIFICATION_DONE"] == manager.news()
    assert machine.engine.stats.created[stats.DEATH] == machine.engine.stats.deleted[stats.DEATH]


@pytest.mark.parametrize("clear", [False, True])
def test_a_death_that_was_acknowledged_by_guess_stays_so(
    machine: Machine, manager: Client, client: Client, clear: bool
) -> None:
    """Who acknowledges a death between its delivery and the fault is not told again."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, handle, 7)
    queue_node_work(machine, manager)
    client.die()
    if clear:
        manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 7)
    outcome = read_unstored(manager)
    other = manager.thread()
    other.do(uapi.BC_DEAD_BINDER_DONE, 7)
    fail_to_store(manager, outcome, 7)
    names = ["BR_CLEAR_DEATH_NOTIFICATION_DONE"] if clear else []

    assert names == manager.news()


def test_a_clearing_that_another_has_read_stays_so(machine: Machine, manager: Client, client: Client) -> None:
    """A death that was acknowledged by guess, and its clearing read by another thread, before the fault shows."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, handle, 7)
    queue_node_work(machine, manager)
    client.die()
    manager.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handle, 7)
    outcome = read_unstored(manager)
    other = manager.thread()
    other.do(uapi.BC_DEAD_BINDER_DONE, 7)
    assert ["BR_CLEAR_DEATH_NOTIFICATION_DONE"] == other.news()
    fail_to_store(manager, outcome, 7)

    assert [] == manager.news()
    assert machine.engine.stats.created[stats.DEATH] == machine.engine.stats.deleted[stats.DEATH]


def test_a_freeze_behind_a_fault_is_told_later(machine: Machine, manager: Client, client: Client) -> None:
    """With the state that holds by then."""
    handle = machine.share(client, manager)
    queue_node_work(machine, manager)
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, 7)
    outcome = read_unstored(manager)
    client.freeze(client.pid)
    fail_to_store(manager, outcome, 7)
    assert [] == list(manager.process.delivered_freeze)
    call = manager.read()

    assert ["BR_NOOP", "BR_FROZEN_BINDER"] == call.names
    assert (7, 1, 0) == call.returns[1].values
    manager.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)
    assert [] == manager.news()


def test_a_cleared_freeze_behind_a_fault_is_told_later(machine: Machine, manager: Client, client: Client) -> None:
    """BR_CLEAR_FREEZE_NOTIFICATION_DONE comes once, and the notification is freed once."""
    handle = machine.share(client, manager)
    queue_node_work(machine, manager)
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, 7)
    manager.do(uapi.BC_CLEAR_FREEZE_NOTIFICATION, handle, 7)
    fail_to_store(manager, read_unstored(manager), 7)

    assert ["BR_CLEAR_FREEZE_NOTIFICATION_DONE"] == manager.news()
    assert machine.engine.stats.created[stats.FREEZE] == machine.engine.stats.deleted[stats.FREEZE]


def test_a_freeze_that_was_acknowledged_by_guess_stays_so(machine: Machine, manager: Client, client: Client) -> None:
    """Who acknowledges a state between its delivery and the fault is not told again."""
    handle = machine.share(client, manager)
    queue_node_work(machine, manager)
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, 7)
    outcome = read_unstored(manager)
    manager.thread().do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)
    fail_to_store(manager, outcome, 7)

    assert [] == manager.news()


def test_a_freeze_that_another_has_read_stays_so(machine: Machine, manager: Client, client: Client) -> None:
    """A state that was acknowledged by guess and changed, and read by another thread, before the fault shows."""
    handle = machine.share(client, manager)
    queue_node_work(machine, manager)
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, 7)
    outcome = read_unstored(manager)
    other = manager.thread()
    other.do(uapi.BC_FREEZE_NOTIFICATION_DONE, 7)
    client.freeze(client.pid)
    assert ["BR_FROZEN_BINDER"] == other.news()
    fail_to_store(manager, outcome, 7)

    assert 1 == len(manager.process.delivered_freeze)
    assert [] == manager.news()


def test_a_node_that_was_told_by_another_stays_so(machine: Machine, manager: Client, client: Client) -> None:
    """Its end was read, a new reference came and was read by another thread, before the fault shows."""
    first = machine.share(client, manager, 0x1000)
    handle = machine.share(client, manager, 0x3000)
    for held in (first, handle):
        manager.do(uapi.BC_INCREFS, held)
        manager.do(uapi.BC_RELEASE, held)
    outcome = read_unstored(client)
    other = client.thread()
    told = other.tell(0, parcel().binder(0x3000, 0x2000))
    assert "BR_ACQUIRE" in told.names
    fail_to_store(client, outcome, 7)

    assert [] == client.news()
    assert client.process.nodes[0x3000].has_strong_ref


def test_a_node_made_anew_meanwhile_takes_the_place_of_the_old(
    machine: Machine, manager: Client, client: Client
) -> None:
    """An object that had been told of its end, and is sent again before the fault shows, is a new one."""
    first = machine.share(client, manager, 0x1000)
    handle = machine.share(client, manager, 0x3000)
    for held in (first, handle):
        manager.do(uapi.BC_RELEASE, held)
    old = client.process.nodes[0x3000]
    outcome = read_unstored(client)
    client.thread().tell(0, parcel().binder(0x3000, 0x2000))
    fail_to_store(client, outcome, 7)

    assert old is not client.process.nodes[0x3000]
    assert [] == client.news()


def test_a_node_whose_references_went_meanwhile_says_so(machine: Machine, manager: Client, client: Client) -> None:
    """An object that was to be acquired, and is no longer by the time the fault shows, is told nothing."""
    client.send(0, flags=uapi.TF_ONE_WAY)
    client.send(0, parcel().binder(0x3000), flags=uapi.TF_ONE_WAY)
    outcome = read_unstored(client)
    manager.free(manager.read().received)
    manager.free(manager.read().received)
    fail_to_store(client, outcome, 7)

    assert ["BR_TRANSACTION_COMPLETE"] == client.news()
    assert [] == list(client.process.nodes)
    assert machine.engine.stats.created[stats.NODE] == 2


def test_a_node_answered_by_guess_and_let_go_says_so(machine: Machine, manager: Client, client: Client) -> None:
    """Who answers before the fault shows, while the last reference goes, is told of the end alone."""
    client.send(0, flags=uapi.TF_ONE_WAY)
    client.send(0, parcel().binder(0x3000, 0x2000), flags=uapi.TF_ONE_WAY)
    outcome = read_unstored(client)
    other = client.thread()
    other.do(uapi.BC_INCREFS_DONE, 0x3000, 0x2000)
    other.do(uapi.BC_ACQUIRE_DONE, 0x3000, 0x2000)
    manager.free(manager.read().received)
    manager.free(manager.read().received)
    fail_to_store(client, outcome, 7)

    assert ["BR_TRANSACTION_COMPLETE"] == client.news()
    assert ["BR_RELEASE", "BR_DECREFS"] == client.news()
    assert machine.engine.stats.created[stats.NODE] == 2


def test_a_call_behind_a_fault_freed_by_guess_fails(machine: Machine, manager: Client, client: Client) -> None:
    """Its buffer is gone, so it cannot be read again: its caller is told, and a one-way caller is not."""
    for flags, names in ((0, ["BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"]), (uapi.TF_ONE_WAY, [])):
        queue_node_work(machine, manager)
        caller = client.thread()
        caller.send(0, flags=flags)
        if flags:
            caller.news()
        outcome = read_unstored(manager)
        assert manager.process.allocation is not None
        (offset,) = manager.process.allocation.allocated
        manager.thread().do(uapi.BC_FREE_BUFFER, manager.process.address + offset)
        fail_to_store(manager, outcome, 7)

        assert names == caller.news()
        assert [] == manager.news()
        assert 0 == manager.process.outstanding_transactions


# -- no room for descriptors


def full(client: Client) -> None:
    """Let there be no room for another descriptor."""
    client.fd_limit = len(client.fds)


def test_a_call_that_there_is_no_room_for_fails(manager: Client, client: Client) -> None:
    """Its caller reads BR_FAILED_REPLY, and for the reader it never was: nothing is counted, the buffer is free."""
    full(manager)
    call = client.call(0, parcel().fd(client.open_fd("a file")))
    reading = manager.read(nonblock=True)

    assert (-errno.EAGAIN, 0) == (reading.error, reading.read_consumed)
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"] == call.names
    assert {} == manager.process.allocation.allocated  # type: ignore[union-attr]
    assert {"BC_ENTER_LOOPER": 1} == counted(manager.process.stats)
    assert (None, 0) == (thread_of(manager).transaction_stack, manager.process.outstanding_transactions)
    assert 1 == client.fds[3].holders


def test_a_read_goes_on_waiting_behind_a_call_that_there_is_no_room_for(manager: Client, client: Client) -> None:
    """The next call is what it comes to."""
    full(manager)
    reading = manager.read()
    client.call(0, parcel().fd(client.open_fd("a file")))

    assert not reading.done

    client.call(0, b"next")

    assert b"next" == reading.body


def test_a_one_way_call_that_there_is_no_room_for_is_dropped(manager: Client, client: Client) -> None:
    """Nobody is told, and the same read finds the next one to the node."""
    full(manager)
    client.tell(0, parcel().fd(client.open_fd("a file")))
    client.tell(0, b"next")

    assert b"next" == manager.read().body
    assert 0 == manager.process.outstanding_transactions


def test_a_reply_that_there_is_no_room_for_fails_its_reader(manager: Client, client: Client) -> None:
    """BR_FAILED_REPLY in its place, which ends the read; the replier is not told."""
    full(client)
    call = client.send(flags=uapi.TF_ACCEPT_FDS)
    manager.read()
    answer = manager.reply(parcel().fd(manager.open_fd("a file")))
    reading = client.read()

    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE"] == answer.names
    assert (0, ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"], 12) == (
        reading.error,
        reading.names,
        reading.read_consumed,
    )
    assert call.done
    assert {"BC_TRANSACTION": 1, "BR_TRANSACTION_COMPLETE": 1, "BR_FAILED_REPLY": 1} == counted(client.process.stats)
    assert {} == client.process.allocation.allocated  # type: ignore[union-attr]


def test_there_is_room_for_as_many_as_are_free(manager: Client, client: Client) -> None:
    """Two descriptors of one call: one number is not enough, two are."""
    files = parcel().fd(client.open_fd("a")).fd(client.open_fd("b"))
    manager.fd_limit = len(manager.fds) + 1
    call = client.call(0, files)
    manager.read(nonblock=True)

    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"] == call.names

    manager.fd_limit = len(manager.fds) + 2
    client.call(0, files)

    assert 2 == len(manager.read().installed)


def test_what_came_before_stays_where_there_is_no_room(machine: Machine, manager: Client, client: Client) -> None:
    """A read that has something already ends with that."""
    queue_node_work(machine, manager)
    full(manager)
    client.tell(0, parcel().fd(client.open_fd("a file")))

    assert ["BR_NOOP", "BR_RELEASE", "BR_DECREFS"] == manager.read().names
    assert [] == manager.news()


# -- descriptors that cannot be installed


def fill(client: Client) -> None:
    """Let the room for another descriptor go between the look and the installing."""
    client.machine.answer(FindRoom, 0)
    full(client)


def test_a_call_whose_descriptors_cannot_be_installed_fails(manager: Client, client: Client) -> None:
    """Its caller reads BR_FAILED_REPLY, its reader what came before, and the buffer is free."""
    fill(manager)
    call = client.call(0, parcel().fd(client.open_fd("a file")))
    reading = manager.read()

    assert (0, ["BR_NOOP"], 4) == (reading.error, reading.names, reading.read_consumed)
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"] == call.names
    assert {} == manager.process.allocation.allocated  # type: ignore[union-attr]
    assert {"BC_ENTER_LOOPER": 1} == counted(manager.process.stats)
    assert thread_of(manager).transaction_stack is None
    assert 1 == client.fds[3].holders


def test_a_one_way_call_whose_descriptors_cannot_be_installed_is_dropped(manager: Client, client: Client) -> None:
    """Nobody is told, and the next one to the node comes."""
    fill(manager)
    client.tell(0, parcel().fd(client.open_fd("a file")))
    client.tell(0, b"next")

    assert ["BR_NOOP"] == manager.read().names
    assert b"next" == manager.read().body
    assert 0 == manager.process.outstanding_transactions


def test_a_reply_whose_descriptors_cannot_be_installed_fails_its_reader(manager: Client, client: Client) -> None:
    """BR_FAILED_REPLY in its place, behind what came before; the replier is not told."""
    fill(client)
    call = client.call(flags=uapi.TF_ACCEPT_FDS)
    manager.read()

    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE"] == manager.reply(parcel().fd(manager.open_fd("a file"))).names
    assert (0, ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"], 12) == (
        call.error,
        call.names,
        call.read_consumed,
    )
    assert {"BC_TRANSACTION": 1, "BR_TRANSACTION_COMPLETE": 1, "BR_FAILED_REPLY": 1} == counted(client.process.stats)
    assert {} == client.process.allocation.allocated  # type: ignore[union-attr]


def test_a_read_behind_something_keeps_what_was_there(manager: Client, client: Client) -> None:
    """With consumed bytes on entry the read ends where it began, or behind what it had."""
    fill(manager)
    client.tell(0, parcel().fd(client.open_fd("a file")))
    into = manager.memory.room(256)
    reading = manager.read(into=into, read_consumed=8)

    assert (0, b"", 8) == (reading.error, reading.data, reading.read_consumed)
    assert bytes([0xEE]) * 8 == manager.memory.read(into, 8)


def test_a_looper_is_still_asked_for_another(manager: Client, client: Client) -> None:
    """BR_SPAWN_LOOPER stays in place of BR_NOOP."""
    allow_threads(manager, 1)
    fill(manager)
    client.tell(0, parcel().fd(client.open_fd("a file")))

    assert ["BR_SPAWN_LOOPER"] == manager.read().names
    assert {"BC_ENTER_LOOPER": 1, "BR_SPAWN_LOOPER": 1} == counted(manager.process.stats)


def test_work_before_the_call_stays_delivered(machine: Machine, manager: Client, client: Client) -> None:
    """What the read had already is kept, with its place in the buffer."""
    queue_node_work(machine, manager)
    fill(manager)
    client.tell(0, parcel().fd(client.open_fd("a file")))
    reading = manager.read()

    assert ["BR_NOOP", "BR_RELEASE", "BR_DECREFS"] == reading.names
    assert 4 + 2 * 20 == reading.read_consumed
    assert [] == manager.news()


def test_a_reply_without_its_files_fails_its_reader(machine: Machine, manager: Client, client: Client) -> None:
    """A reply behind a fault, whose files the shell has had: BR_FAILED_REPLY, and its buffer is cleared and free."""
    client.send(0, flags=uapi.TF_ACCEPT_FDS)
    manager.read()
    manager.reply(array_of_one(manager), flags=uapi.TF_CLEAR_BUF)
    outcome = read_unstored(client)
    for file, _, _ in outcome.files:
        file.close()
    fail_to_store(client, outcome, 7)

    assert ["BR_FAILED_REPLY"] == client.news()
    assert {} == client.process.allocation.allocated  # type: ignore[union-attr]
    assert 0 == machine.engine.stats.created[stats.TRANSACTION] - machine.engine.stats.deleted[stats.TRANSACTION]


def test_files_that_were_installed_are_not_missed(machine: Machine, manager: Client, client: Client) -> None:
    """A read that had files, and was stored, does not spoil a call that a later read cannot store."""
    client.send(0, parcel().fd(client.open_fd("a file")))
    manager.serve()
    queue_node_work(machine, manager)
    client.thread().send(0, b"patience")
    fail_to_store(manager, read_unstored(manager), 7)

    assert b"patience" == manager.read().body


def test_files_that_could_not_be_installed_are_not_missed(machine: Machine, manager: Client, client: Client) -> None:
    """Nor does one whose files could not be installed."""
    fill(manager)
    client.send(0, parcel().fd(client.open_fd("a file")))
    manager.read()
    queue_node_work(machine, manager)
    client.thread().send(0, b"patience")
    fail_to_store(manager, read_unstored(manager), 7)

    assert b"patience" == manager.read().body


def test_files_that_were_lost_are_not_missed(machine: Machine, manager: Client, client: Client) -> None:
    """Nor does one that could not be stored itself."""
    client.tell(0, parcel().fd(client.open_fd("a file")))
    lost = read_unstored(manager)
    for file, _, _ in lost.files:
        file.close()
    fail_to_store(manager, lost, 30)
    queue_node_work(machine, manager)
    client.thread().send(0, b"patience")
    fail_to_store(manager, read_unstored(manager), 7)

    assert b"patience" == manager.read().body


def array_of_one(sender: Client) -> Parcel:
    """Compose an array of one descriptor."""
    return parcel().raw(bytes(8)).ptr(fds(sender.open_fd("a file"))).fda(1, parent=0)


def test_an_array_that_cannot_be_installed_closes_nothing(manager: Client, client: Client) -> None:
    """The numbers in it are nobody's; the buffer is cleared and free."""
    manager.open_fd("its own")
    fill(manager)
    client.tell(0, array_of_one(client), flags=uapi.TF_CLEAR_BUF)
    reading = manager.read()
    assert reading.outcome is not None

    assert not reading.outcome.closes
    assert ["its own"] == [file.name for file in manager.fds.values()]
    assert {} == manager.process.allocation.allocated  # type: ignore[union-attr]


def test_a_failure_is_not_put_over_another(manager: Client, client: Client) -> None:
    """A reader that has another failure to read already is not told of the reply."""
    client.send(0, flags=uapi.TF_ACCEPT_FDS)
    manager.read()
    manager.reply(parcel().fd(manager.open_fd("a file")))
    outcome = read_unstored(client)
    for file, _, _ in outcome.files:
        file.close()
    thread = thread_of(client)
    thread.reply_error.command = uapi.BR_DEAD_REPLY
    thread.enqueue(thread.reply_error)
    fail_to_store(client, outcome, 7)

    assert ["BR_DEAD_REPLY"] == client.news()


def test_a_read_that_faults_asks_for_no_thread(manager: Client, client: Client) -> None:
    """BR_SPAWN_LOOPER would have come last: it is not counted, and comes with the next read."""
    allow_threads(manager, 1)
    client.tell()
    spoil(manager, 70)
    assert 0 == manager.process.requested_threads
    client.thread().send()

    assert "BR_SPAWN_LOOPER" == manager.read().names[0]
    assert 1 == counted(manager.process.stats)["BR_SPAWN_LOOPER"]


def test_a_fault_behind_what_was_consumed_leaves_that(manager: Client, client: Client) -> None:
    """The count is handed back as it came."""
    client.tell()
    spoil(manager, 60, read_consumed=8)


# -- nice values


def test_a_call_is_served_as_nicely_as_its_caller(machine: Machine, manager: Client) -> None:
    """The serving thread gets the caller's nice value, and its own back with the reply."""
    client = machine.client()
    client.nice = -5
    manager.nice = 3
    object_ = manager.process.context.manager
    assert object_ is not None
    object_.min_priority = 10
    client.send()
    manager.nice = 0
    manager.process.default_priority = 0
    manager.read()
    assert -5 == manager.nice
    manager.reply()

    assert 0 == manager.nice


@pytest.mark.parametrize(
    ("caller", "minimum", "one_way", "served"),
    [
        (5, 10, False, 5),
        (15, 10, False, 10),
        (-5, 10, True, 0),
        (0, -0, True, 0),
        (10, 10, False, 10),
        (5, 10, True, 0),
    ],
)
def test_the_nodes_minimum_bounds_the_nice_value(
    machine: Machine, manager: Client, caller: int, minimum: int, one_way: bool, served: int
) -> None:
    """A call is served with its caller's nice value if better than the node's minimum, else with the minimum."""
    client = machine.client()
    client.nice = caller
    node = machine.binder.manager
    assert node is not None
    node.min_priority = minimum
    client.send(flags=uapi.TF_ONE_WAY if one_way else 0)
    manager.read(nonblock=True)

    assert served == manager.nice


def test_a_one_way_call_is_served_no_worse_than_the_minimum(machine: Machine, manager: Client, client: Client) -> None:
    """A thread nicer than the node's minimum is set to that."""
    node = machine.binder.manager
    assert node is not None
    node.min_priority = 4
    manager.process.default_priority = 7
    client.tell()
    manager.read()

    assert 4 == manager.nice


def test_the_minimum_may_be_any_byte(machine: Machine, manager: Client, client: Client) -> None:
    """With a minimum beyond all nice values a call is served with its caller's, a one-way call as it comes."""
    node = machine.binder.manager
    assert node is not None
    node.min_priority = 255
    client.nice = 19
    client.send(flags=uapi.TF_ONE_WAY)
    client.send()
    first = manager.read()
    assert 0 == manager.nice
    manager.free(first.received)
    manager.read()

    assert 19 == manager.nice


def test_waiting_for_work_restores_the_default(manager: Client, client: Client) -> None:
    """A thread that waits for the process's work gets the open's nice value, one that waits for a reply does not."""
    for caller in (manager, client):
        caller.nice = 8
        caller.process.default_priority = 2
    client.call()
    manager.thread().read()
    assert manager.read().parked

    assert (2, 8) == (manager.nice, client.nice)


def test_a_nice_value_that_cannot_be_had_is_remembered_as_it_is(machine: Machine, manager: Client) -> None:
    """A thread without the right keeps what the machine gives, and returns to its own value afterwards."""
    manager.nice_floor = -2
    client = machine.client()
    client.nice = -10
    node = machine.binder.manager
    assert node is not None
    node.min_priority = 10
    client.send()
    manager.read()
    assert -2 == manager.nice
    manager.nice = 0
    effects = manager.reply().effects

    assert [] == [effect for effect in effects if isinstance(effect, SetNice)]


# -- the end of a thread


def test_a_thread_that_ends_is_forgotten(machine: Machine, manager: Client, client: Client) -> None:
    """It is gone with its unread completions; the same task begins anew."""
    assert manager.open
    client.do(uapi.BC_ENTER_LOOPER)
    client.send(0, flags=uapi.TF_ONE_WAY)
    client.exit()
    assert {} == client.process.threads
    assert 0 == machine.engine.stats.created[6] - machine.engine.stats.deleted[6]
    client.ioctl(uapi.BINDER_VERSION)

    assert 0 == thread_of(client).looper


def test_pollers_hear_of_a_threads_end(machine: Machine, client: Client) -> None:
    """A thread that polled wakes its poller as it ends."""
    client.poll()
    machine.poll.woken.clear()
    client.exit()

    assert [client.process] == machine.poll.woken
    assert POLL == 0x20
