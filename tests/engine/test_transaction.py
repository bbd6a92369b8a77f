"""Calls, one-way calls and replies: where they go, what fails, and who is told."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import CopyIn, CopyToBuffer, FindMapping, Populate, stats
from binderfs_fuse.engine.context import LOG_ENTRIES
from binderfs_fuse.engine.transaction import TransactionError
from tests.engine.machine import MIB, PAGE, Client, Machine
from tests.engine.wire import Received, command, parcel

if TYPE_CHECKING:
    from binderfs_fuse.engine.effects import Effect
    from tests.engine.machine import Call, Caller

U32 = (1 << 32) - 1
U64 = (1 << 64) - 1
COMPLETE = ["BR_NOOP", "BR_TRANSACTION_COMPLETE"]


def test_a_failure_says_what_why_and_where() -> None:
    """What is raised inside names the return, its parameter and the driver's line."""
    assert (uapi.BR_FAILED_REPLY, -5, 7) == TransactionError(uapi.BR_FAILED_REPLY, -5, 7).args


# -- the fields of what arrives


def test_a_call_says_what_its_sender_said(machine: Machine) -> None:
    """The receiver reads code, flags, sizes, the node's ptr and cookie, and where its data and offsets are."""
    manager = machine.client()
    object_ = uapi.flat_binder_object.pack(uapi.BINDER_TYPE_BINDER, 0, 0x1234, 0x5678)
    manager.ioctl(uapi.BINDER_SET_CONTEXT_MGR_EXT, object_)
    client = machine.client(euid=1000)
    client.send(0, b"abcde", code=7, flags=uapi.TF_ACCEPT_FDS)
    received = manager.read(nonblock=True).received
    assert manager.mapping is not None
    start = manager.mapping[0]

    assert Received(0x1234, 0x5678, 7, uapi.TF_ACCEPT_FDS, client.pid, 1000, 5, 0, start, start + 8) == received


def test_a_reply_has_no_sender(manager: Client, client: Client) -> None:
    """A BR_REPLY carries neither node nor pid, but the euid and what the replier said."""
    call = client.call()
    manager.euid = 77
    manager.read()
    manager.reply(b"abc", code=9, flags=uapi.TF_STATUS_CODE)
    received = call.received

    assert "BR_REPLY" == call.names[-1]
    assert (0, 0, 9, uapi.TF_STATUS_CODE, 0, 77, 3, 0) == (
        received.ptr,
        received.cookie,
        received.code,
        received.flags,
        received.sender_pid,
        received.sender_euid,
        received.data_size,
        received.offsets_size,
    )


def test_a_one_way_call_has_no_sender(manager: Client, client: Client) -> None:
    """Nobody waits for it, so the pid is 0."""
    client.tell(0, b"x")
    received = manager.read().received

    assert 0 == received.sender_pid
    assert uapi.TF_ONE_WAY == received.flags


def test_the_senders_pid_is_in_the_receivers_namespace(machine: Machine) -> None:
    """A receiver in an inner pid namespace is not told a pid that it cannot see; one outside is."""
    manager = machine.manager(pid=100, pid_namespace=2, pids={1: 100, 2: 1})
    outside = machine.client(pid=101, pid_namespace=1, pids={1: 101})
    inside = machine.client(pid=102, pid_namespace=2, pids={1: 102, 2: 5})
    pids = []
    for client in (outside, inside):
        client.send()
        pids.append(manager.serve().received.sender_pid)

    assert [0, 5] == pids


def test_the_senders_user_is_in_the_receivers_namespace(machine: Machine) -> None:
    """A receiver in a user namespace of its own is told its numbers, and 2^32 - 1 for users that it does not know."""
    manager = machine.manager(user_ids=[(0, 100000, 10), (77, 1000, 2)])
    users = []
    for euid in (1001, 100009, 1002, 0):
        machine.client(euid=euid).send()
        users.append(manager.serve().received.sender_euid)

    assert [78, 9, U32, U32] == users


def test_without_namespaces_pids_are_what_they_are(manager: Client, client: Client) -> None:
    """Processes of one namespace are known by their own pids."""
    client.send()

    assert client.pid == manager.read().received.sender_pid


def test_an_empty_call_has_a_buffer_of_its_own(manager: Client, client: Client) -> None:
    """Two empty one-way calls differ in their addresses, by eight bytes."""
    client.tell()
    client.tell()
    first = manager.read().received
    manager.free(first)
    second = manager.read().received

    assert first.buffer + 8 == second.buffer
    assert (0, 0) == (second.data_size, second.offsets_size)


# -- completion


def test_completion_of_a_call_waits_for_the_reply(manager: Client, client: Client) -> None:
    """A caller that looks finds nothing until the reply is there; then both come at once."""
    client.send()
    assert -errno.EAGAIN == client.read(nonblock=True).error
    assert 0 == client.poll()
    manager.serve()

    assert ["BR_TRANSACTION_COMPLETE", "BR_REPLY"] == client.news()


def test_completion_of_a_one_way_call_comes_at_once(manager: Client, client: Client) -> None:
    """A one-way call is complete when it is queued."""
    assert COMPLETE == client.tell().names
    assert ["BR_TRANSACTION"] == manager.news()


def test_completion_of_a_reply_comes_at_once(manager: Client, client: Client) -> None:
    """A reply is complete when it is queued."""
    client.send()
    manager.read()

    assert COMPLETE == manager.reply().names


# -- one-way calls


def test_one_way_calls_to_a_node_come_one_after_the_other(machine: Machine, manager: Client, client: Client) -> None:
    """The next one is delivered only once the buffer of the one before is freed."""
    for data in (b"1", b"2", b"3"):
        client.tell(0, data)
    seen = []
    call = manager.read()
    while call.done:
        assert [] == manager.news()
        seen.append(call.body)
        manager.free(call.received)
        call = manager.read()

    assert [b"1", b"2", b"3"] == seen
    node = machine.binder.manager
    assert node is not None
    assert not node.has_async_transaction


def test_a_freed_call_lets_no_one_way_call_pass(manager: Client, client: Client) -> None:
    """Only the buffer of the one-way call before does, not that of a call to the same node."""
    client.tell(0, b"1")
    client.tell(0, b"2")
    client.thread().send(0, b"a call")
    manager.read()
    call = manager.read()
    assert b"a call" == call.body
    manager.free(call.received)
    manager.reply()

    assert [] == manager.news()


def test_a_freed_one_way_call_wakes_a_reader_for_the_next(manager: Client, client: Client) -> None:
    """A second thread that waits gets the next one-way call when the first thread frees its buffer."""
    client.tell(0, b"1")
    client.tell(0, b"2")
    first = manager.read()
    second = manager.thread().read()
    assert second.parked
    manager.free(first.received)

    assert b"2" == second.body


def test_one_way_calls_to_other_nodes_do_not_wait(machine: Machine, manager: Client, client: Client) -> None:
    """Only calls to the same node wait for each other."""
    handle = machine.grant(manager, client)
    client.tell(0)
    client.tell(handle)

    assert ["BR_TRANSACTION"] == manager.news()
    assert ["BR_TRANSACTION"] == manager.news()


# -- whom a call cannot reach


def test_without_a_manager_a_call_is_dead(machine: Machine) -> None:
    """Handle 0 of a context without a manager: BR_DEAD_REPLY, EINVAL."""
    client = machine.client()

    assert ["BR_NOOP", "BR_DEAD_REPLY"] == client.call().names
    assert ("BR_DEAD_REPLY", -errno.EINVAL, 3253) == machine.failure()
    assert ("BR_DEAD_REPLY", -errno.EINVAL) == client.extended_error()
    assert ("BR_OK", 0) == client.extended_error()


def test_an_unknown_handle_fails(machine: Machine, manager: Client, client: Client) -> None:
    """A handle that the caller does not hold: BR_FAILED_REPLY, EINVAL."""
    assert ["BR_NOOP", "BR_FAILED_REPLY"] == client.call(5).names
    assert ("BR_FAILED_REPLY", -errno.EINVAL, 3253) == machine.failure()
    assert [] == manager.news()


def test_a_weak_handle_cannot_be_called(machine: Machine, manager: Client, client: Client) -> None:
    """A handle that is held weakly only is as good as unknown."""
    handle = machine.share(client, manager)
    manager.do(uapi.BC_INCREFS, handle)
    manager.do(uapi.BC_RELEASE, handle)

    assert ["BR_NOOP", "BR_FAILED_REPLY"] == manager.call(handle).names
    assert ("BR_FAILED_REPLY", -errno.EINVAL, 3253) == machine.failure()


def test_a_dead_object_cannot_be_called(machine: Machine, manager: Client, client: Client) -> None:
    """A handle whose process is gone: BR_DEAD_REPLY, EINVAL."""
    handle = machine.share(client, manager)
    client.die()

    assert ["BR_NOOP", "BR_DEAD_REPLY"] == manager.call(handle).names
    assert ("BR_DEAD_REPLY", -errno.EINVAL, 3253) == machine.failure()


def test_a_manager_cannot_call_itself(machine: Machine, manager: Client) -> None:
    """Handle 0 from the manager's own process fails, by this or another open of it; its node is left as it was."""
    again = machine.client(pid=manager.pid)
    for caller in (manager, again):
        assert ["BR_NOOP", "BR_FAILED_REPLY"] == caller.call().names
        assert ("BR_FAILED_REPLY", -errno.EINVAL, 3244) == machine.failure()
    entry = machine.engine.failed_transaction_log[-1]

    assert (0, 0) == (entry.to_node, entry.to_process)


def test_an_object_cannot_be_called_by_its_own_process(machine: Machine, manager: Client, client: Client) -> None:
    """A reference to an own object, which no protocol gives, fails all the same."""
    machine.share(client, manager)
    node = client.process.nodes[0x1000]
    thread = client.process.threads[client.tid]
    handle = client.process.increment_ref_for_node(node, strong=True, target=thread)

    assert "BR_FAILED_REPLY" in client.call(handle).names
    assert ("BR_FAILED_REPLY", -errno.EINVAL, 3262) == machine.failure()
    assert node.debug_id == machine.engine.failed_transaction_log[-1].to_node


@pytest.mark.parametrize("answer", [(0x7000_0000, MIB), None])
def test_a_mapping_is_looked_up_when_it_is_needed(
    machine: Machine, client: Client, manager: Client, answer: tuple[int, int] | None
) -> None:
    """The first call to a process asks where it has mapped its region; without one the call is dead."""
    manager.mapping = answer
    call = client.begin(client.transaction())
    call.drive()
    again = client.begin(client.transaction(flags=uapi.TF_ONE_WAY)).drive()

    assert 1 == sum(isinstance(effect, FindMapping) for effect in call.effects)
    if answer is None:
        assert ("BR_DEAD_REPLY", -errno.ESRCH, 3409) == machine.failure()
        assert manager.process.allocation is None
    else:
        assert not any(isinstance(effect, FindMapping) for effect in again.effects)
        assert answer[0] == manager.read(nonblock=True).received.buffer
        assert manager.process.allocation is not None


def test_four_mebibytes_of_a_mapping_are_used(machine: Machine) -> None:
    """A larger mapping is cut to that, and half of it is for one-way calls."""
    machine.manager(size=5 * MIB)
    client = machine.client()
    too_large = client.transaction(data_size=4 * MIB + 8)
    assert ["BR_NOOP", "BR_FAILED_REPLY"] == client.exchange(too_large).names
    assert ("BR_FAILED_REPLY", -errno.ENOSPC, 3409) == machine.failure()
    call = client.transaction(0, bytes(2 * MIB + 8), flags=uapi.TF_ONE_WAY)
    assert ["BR_NOOP", "BR_FAILED_REPLY"] == client.exchange(call).names

    assert COMPLETE == client.tell(0, bytes(2 * MIB)).names


@pytest.mark.parametrize(
    ("data", "offsets", "buffers"),
    [(U64, 0, 0), (U64 - 7, 0, 8), (0, U64 - 7, 8), (1 << 63, 1 << 63, 0), (8, 0, U64 - 15), (8, 0, U64)],
)
def test_sizes_that_overflow_are_refused(
    machine: Machine, client: Client, data: int, offsets: int, buffers: int
) -> None:
    """A sum of more than 64 bits is EINVAL, just below it there is no space."""
    call = client.transaction(number=uapi.BC_TRANSACTION_SG, data_size=data, offsets_size=offsets, buffers_size=buffers)
    client.exchange(call)
    fits = sum(size + 7 & ~7 for size in (data, offsets, buffers)) <= U64

    assert ("BR_FAILED_REPLY", -(errno.ENOSPC if fits else errno.EINVAL), 3409) == machine.failure()


def test_pages_that_cannot_be_had_fail_the_call(machine: Machine, manager: Client, client: Client) -> None:
    """When the region's pages cannot be made present the error is passed on, and nothing is left of the call."""
    machine.answer(Populate, -errno.ENOMEM)

    assert ["BR_NOOP", "BR_FAILED_REPLY"] == client.call(0, b"x").names
    assert ("BR_FAILED_REPLY", -errno.ENOMEM, 3409) == machine.failure()
    allocation = manager.process.allocation
    assert allocation is not None
    assert {} == allocation.allocated
    assert client.call(0, b"x").parked


def test_pages_are_made_present_once(client: Client) -> None:
    """Only pages that were never touched are asked for, as a range."""
    effects = []
    for size in (PAGE + 8, 8, PAGE):
        call = client.begin(client.transaction(0, bytes(size), flags=uapi.TF_ONE_WAY)).drive()
        effects.append([(e.offset, e.size) for e in call.effects if isinstance(e, Populate)])

    assert [[(0, 2 * PAGE)], [], [(2 * PAGE, PAGE)]] == effects


# -- what cannot be copied


def test_unreadable_data_fails_the_call(machine: Machine, manager: Client, client: Client) -> None:
    """Data that ends early: BR_FAILED_REPLY, EFAULT, and the buffer is free again."""
    call = client.transaction(0, bytes(16), data_address=client.memory.place(bytes(16), accessible=8))
    assert ["BR_NOOP", "BR_FAILED_REPLY"] == client.exchange(call).names
    allocation = manager.process.allocation
    assert allocation is not None

    assert ("BR_FAILED_REPLY", -errno.EFAULT, 3743) == machine.failure()
    assert {} == allocation.allocated


@pytest.mark.parametrize(
    ("offsets_size", "accessible", "buffers", "expected"),
    [
        (16, 8, 0, (-errno.EFAULT, 3448)),
        (12, 12, 0, (-errno.EINVAL, 3456)),
        (12, 4, 0, (-errno.EFAULT, 3448)),
        (0, 0, 12, (-errno.EINVAL, 3465)),
        (12, 12, 12, (-errno.EINVAL, 3456)),
    ],
)
def test_bad_offsets_fail_the_call(
    machine: Machine,
    manager: Client,
    client: Client,
    offsets_size: int,
    accessible: int,
    buffers: int,
    expected: tuple[int, int],
) -> None:
    """Offsets must be readable, then of a size that is a multiple of eight, then so must the buffers' size."""
    call = client.transaction(
        number=uapi.BC_TRANSACTION_SG,
        offsets_size=offsets_size,
        offsets_address=client.memory.place(bytes(16), accessible=accessible),
        buffers_size=buffers,
    )
    client.exchange(call)

    assert ("BR_FAILED_REPLY", *expected) == machine.failure()
    assert [] == manager.news()


def test_clear_buf_clears_the_buffer(manager: Client, client: Client) -> None:
    """A buffer sent with TF_CLEAR_BUF is zeroes once it is freed, to its last byte; another one keeps its bytes."""
    contents = []
    for flags in (uapi.TF_CLEAR_BUF, 0):
        client.send(0, b"secret!", flags=flags | uapi.TF_ONE_WAY)
        received = manager.read().received
        manager.free(received)
        contents.append(manager.see(received.buffer, 8))

    assert bytes(8) == contents[0]
    assert b"secret!" == contents[1][:7]


def test_what_was_cleared_is_to_be_seen(manager: Client, client: Client) -> None:
    """The outcome names the buffers that were cleared, freed ones and those of calls that fail: pages may be copies."""
    client.send(0, b"secret!", flags=uapi.TF_CLEAR_BUF | uapi.TF_ONE_WAY)
    received = manager.read().received
    freeing = manager.exchange(command(uapi.BC_FREE_BUFFER, received.buffer), nonblock=True)
    failing = client.write(client.transaction(0, parcel().handle(77), flags=uapi.TF_CLEAR_BUF))

    assert freeing.outcome is not None
    assert [(manager.region, received.buffer - manager.process.address, 8)] == freeing.outcome.buffers
    assert failing.outcome is not None
    assert [(manager.region, 0, 32)] == failing.outcome.buffers


# -- replies that cannot be


def test_a_reply_without_a_call_fails(machine: Machine, manager: Client) -> None:
    """Nothing to reply to: BR_FAILED_REPLY, EPROTO."""
    assert ["BR_NOOP", "BR_FAILED_REPLY"] == manager.reply().names
    assert ("BR_FAILED_REPLY", -errno.EPROTO, 3156) == machine.failure()
    assert ("BR_FAILED_REPLY", -errno.EPROTO) == manager.extended_error()


def test_a_caller_cannot_reply_to_its_own_call(machine: Machine, manager: Client, client: Client) -> None:
    """The call on top of the stack must be one that the thread serves; the waiting call is not disturbed."""
    client.send()
    assert "BR_FAILED_REPLY" in client.reply().names
    assert ("BR_FAILED_REPLY", -errno.EPROTO, 3171) == machine.failure()
    manager.serve()

    assert "BR_REPLY" in client.news()


def test_a_reply_to_a_dead_caller_is_complete_for_the_replier(
    machine: Machine, manager: Client, client: Client
) -> None:
    """Its caller died, which the replier is not told: it reads BR_TRANSACTION_COMPLETE."""
    client.call()
    manager.read()
    client.die()

    assert COMPLETE == manager.reply().names
    assert ("BR_DEAD_REPLY", 0, 3185) == machine.failure()
    assert [] == list(manager.process.threads[manager.tid].todo)
    assert manager.process.threads[manager.tid].transaction_stack is None


def test_a_reply_to_a_caller_that_waits_for_something_else_fails(
    machine: Machine, manager: Client, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller whose stack has another call on top, as no protocol makes it, is left alone."""
    client.send()
    manager.read()
    thread = client.process.threads[client.tid]
    waiting = thread.transaction_stack
    with monkeypatch.context() as patch:
        # What holds here cannot be.
        patch.setattr(machine, "look", lambda: None)
        thread.transaction_stack = None
        assert ["BR_NOOP", "BR_FAILED_REPLY"] == manager.reply().names
        assert ("BR_FAILED_REPLY", -errno.EPROTO, 3197) == machine.failure()
        thread.transaction_stack = waiting
        manager.process.threads[manager.tid].transaction_stack = waiting
        manager.process.busy_threads += 1

    assert COMPLETE == manager.reply().names


def test_a_reply_that_fails_fails_the_call(machine: Machine, manager: Client, client: Client) -> None:
    """A replier whose data cannot be read is told nothing; its caller has BR_FAILED_REPLY and the reason."""
    call = client.call()
    manager.read()
    replied = manager.reply(data_size=8, data_address=1)

    assert COMPLETE == replied.names
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"] == call.names
    assert ("BR_FAILED_REPLY", -errno.EFAULT, 3743) == machine.failure()
    assert ("BR_FAILED_REPLY", -errno.EFAULT) == client.extended_error()
    assert "BR_OK" == manager.extended_error()[0]


def test_an_extended_error_is_not_written_over(machine: Machine, manager: Client, client: Client) -> None:
    """A caller that has failed at something since keeps that error when the reply fails too."""
    client.send()
    client.write(client.transaction(99, flags=uapi.TF_ONE_WAY))
    manager.read()
    manager.reply(data_size=8, data_address=1)

    assert ("BR_FAILED_REPLY", -errno.EFAULT, 3743) == machine.failure()
    assert ("BR_FAILED_REPLY", -errno.EINVAL) == client.extended_error()


# -- calls that a thread may not make


def test_a_second_call_before_the_reply_fails(machine: Machine, manager: Client, client: Client) -> None:
    """A thread that waits for a reply cannot call again; it may call one-way."""
    client.send()

    assert "BR_FAILED_REPLY" in client.exchange(client.transaction(), nonblock=True).names
    assert ("BR_FAILED_REPLY", -errno.EPROTO, 3313) == machine.failure()
    assert ["BR_TRANSACTION_COMPLETE"] == client.tell().names[-1:]
    manager.serve()
    assert ["BR_REPLY"] == client.news()


def test_a_thread_with_a_call_to_serve_cannot_call(machine: Machine, manager: Client, client: Client) -> None:
    """With a nested call first in its list, a thread must read that before it calls anybody; one-way is allowed."""
    handle = machine.share(client, manager)
    client.send()
    manager.read()
    manager.send(handle)
    # Room for the completion of its own call, and no more.
    assert COMPLETE == client.read(80).names
    client.exchange(client.transaction(), read=8)
    assert ("BR_FAILED_REPLY", -errno.EPROTO, 3294) == machine.failure()
    assert 0 == machine.engine.failed_transaction_log[-1].to_process
    assert "BR_TRANSACTION" == client.news()[0]
    assert 1 == len(machine.engine.failed_transaction_log)


# -- nested calls


def test_a_call_back_goes_to_the_thread_that_waits(machine: Machine, manager: Client, client: Client) -> None:
    """A server that calls its caller back reaches the very thread, though others wait for work."""
    handle = machine.share(client, manager)
    other = client.thread().read()
    call = client.call(0, b"1")
    manager.read()
    back = manager.call(handle, b"2")

    assert other.parked
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_TRANSACTION"] == call.names
    assert b"2" == call.body
    client.reply(b"3")
    assert b"3" == back.body
    manager.reply(b"4")
    assert ["BR_REPLY"] == client.news()


def test_a_call_back_through_a_third_process_goes_to_the_thread_that_waits(machine: Machine, manager: Client) -> None:
    """Client calls manager, manager calls middle, middle calls client: all on one chain."""
    client, middle = machine.client(), machine.client()
    to_client = machine.share(client, manager)
    to_middle = machine.share(middle, manager, 0x3000)
    from_middle = machine.pass_on(manager, middle, parcel().handle(to_client))
    call = client.call()
    manager.read()
    manager.send(to_middle)
    middle.read()
    middle.send(from_middle, b"hello")

    assert b"hello" == call.body
    assert client.tid == machine.engine.transaction_log[-1].to_thread


def test_a_one_way_call_back_goes_to_any_thread(machine: Machine, manager: Client, client: Client) -> None:
    """One-way calls do not nest: they are the process's work."""
    handle = machine.share(client, manager)
    other = client.thread().read()
    call = client.call()
    manager.read()
    manager.tell(handle, b"x")

    assert call.parked
    assert b"x" == other.body


def test_a_waiting_thread_does_not_take_the_processs_work(machine: Machine, manager: Client, client: Client) -> None:
    """A thread that waits for a reply leaves calls from strangers to threads that have nothing to do."""
    stranger = machine.client()
    handle = machine.pass_on(manager, stranger, parcel().handle(machine.share(client, manager)))
    call = client.call()
    stranger.send(handle)

    assert call.parked
    assert ["BR_TRANSACTION"] == client.thread().news()


# -- the security label


def test_a_node_that_wants_it_gets_the_senders_label(machine: Machine) -> None:
    """BR_TRANSACTION_SEC_CTX gives the address of the label, with its NUL, behind data, offsets and buffers."""
    manager = machine.manager(flags=uapi.FLAT_BINDER_FLAG_TXN_SECURITY_CTX)
    client = machine.client()
    machine.label = b"u:r:shell:s0"
    client.send(0, parcel().raw(b"abcd").ptr(b"12345678"))
    received = manager.read().received

    assert received.secctx == received.buffer + 48 + 8 + 8
    assert b"u:r:shell:s0\0" == manager.see(received.secctx, 13)
    manager.free(received)
    manager.reply()
    assert ["BR_TRANSACTION_COMPLETE", "BR_REPLY"] == client.news()


def test_a_label_is_padded_to_eight_bytes(machine: Machine) -> None:
    """A label of seven bytes and its NUL takes eight bytes of the buffer, one of eight takes sixteen."""
    manager = machine.manager(flags=uapi.FLAT_BINDER_FLAG_TXN_SECURITY_CTX)
    client = machine.client()
    sizes = []
    for machine.label in (b"1234567", b"12345678"):
        client.tell(0, b"x")
        received = manager.read().received
        buffer = next(iter(manager.process.allocation.allocated.values()))  # type: ignore[union-attr]
        sizes.append((buffer.size, buffer.extra_buffers_size))
        manager.free(received)

    assert [(16, 8), (24, 16)] == sizes


def test_without_a_label_the_call_fails(machine: Machine) -> None:
    """Where the machine knows no labels, a call to such a node fails with the machine's error."""
    machine.manager(flags=uapi.FLAT_BINDER_FLAG_TXN_SECURITY_CTX)
    client = machine.client()

    assert ["BR_NOOP", "BR_FAILED_REPLY"] == client.call().names
    assert ("BR_FAILED_REPLY", -errno.EOPNOTSUPP, 3376) == machine.failure()


def test_a_label_that_makes_the_size_overflow_fails_the_call(machine: Machine) -> None:
    """Buffers of almost 64 bits and a label on top are EINVAL; one label less is a matter of space."""
    machine.manager(flags=uapi.FLAT_BINDER_FLAG_TXN_SECURITY_CTX)
    client = machine.client()
    machine.label = b"1234567"
    for size, expected in ((U64 - 7, (-errno.EINVAL, 3386)), (U64 - 15, (-errno.ENOSPC, 3409))):
        client.exchange(client.transaction(number=uapi.BC_TRANSACTION_SG, buffers_size=size))

        assert ("BR_FAILED_REPLY", *expected) == machine.failure()


# -- spam


def test_a_suspected_spammer_is_told_if_it_wants_to_know(manager: Client, client: Client) -> None:
    """With one-way calls that leave less than a tenth free, who asked reads BR_ONEWAY_SPAM_SUSPECT, others do not."""
    for enable, name in ((0, "BR_TRANSACTION_COMPLETE"), (1, "BR_ONEWAY_SPAM_SUSPECT")):
        client.ioctl(uapi.BINDER_ENABLE_ONEWAY_SPAM_DETECTION, enable.to_bytes(4, "little"))
        client.tell(0, bytes(MIB // 2 - MIB // 10 - 8))

        assert ["BR_NOOP", name] == client.tell(0, b"x").names
        for _ in range(2):
            manager.free(manager.read().received)


def test_spam_is_its_senders_own(manager: Client, client: Client) -> None:
    """What a child sends through its parent's descriptor does not make a spammer of the parent."""
    client.ioctl(uapi.BINDER_ENABLE_ONEWAY_SPAM_DETECTION, (1).to_bytes(4, "little"))
    child = client.thread(is_child=True)
    child.tell(0, bytes(MIB // 2 - MIB // 10 - 8))

    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE"] == client.tell(0, b"x").names
    assert ["BR_NOOP", "BR_ONEWAY_SPAM_SUSPECT"] == child.tell(0, b"x").names
    for _ in range(3):
        manager.free(manager.read().received)


# -- deaths on the way


def at(machine: Machine, kind: type, action: object) -> None:
    """Let something happen once, just before the next effect of a kind is performed."""

    def hook(call: Call, effect: Effect) -> None:
        del call
        if isinstance(effect, kind):
            machine.before_effect = None
            hooks.pop()()  # type: ignore[operator]

    hooks = [action]
    machine.before_effect = hook


def test_a_target_that_dies_while_it_is_called(machine: Machine, manager: Client, client: Client) -> None:
    """Its death during the copying fails the call with BR_DEAD_REPLY, and its region is given up only afterwards."""
    at(machine, CopyToBuffer, manager.die)

    assert ["BR_NOOP", "BR_DEAD_REPLY"] == client.call(0, b"x").names
    assert ("BR_DEAD_REPLY", 0, 3846) == machine.failure()
    assert [manager.process] == machine.freed


def test_a_target_that_dies_while_it_is_told(machine: Machine, manager: Client, client: Client) -> None:
    """The same for a one-way call."""
    at(machine, CopyToBuffer, manager.die)

    assert ["BR_NOOP", "BR_DEAD_REPLY"] == client.tell(0, b"x").names
    assert ("BR_DEAD_REPLY", 0, 3846) == machine.failure()


def test_a_caller_whose_thread_ends_while_it_is_replied_to(machine: Machine, manager: Client, client: Client) -> None:
    """The replier is done; the buffer of its reply is free again."""
    client.send()
    manager.read()
    at(machine, CopyToBuffer, client.exit)

    assert COMPLETE == manager.reply(b"x").names
    assert ("BR_DEAD_REPLY", 0, 3846) == machine.failure()
    assert {} == client.process.allocation.allocated  # type: ignore[union-attr]


def test_a_thread_that_ends_while_it_is_called_back(machine: Machine, manager: Client, client: Client) -> None:
    """A nested call whose thread ends during the copying is dead, and so is the call that it nests in."""
    handle = machine.share(client, manager)
    client.send()
    manager.read()
    at(machine, CopyToBuffer, client.exit)

    assert "BR_DEAD_REPLY" in manager.call(handle, b"x").names
    assert ("BR_DEAD_REPLY", 0, 3846) == machine.failure()
    assert COMPLETE == manager.reply().names


def test_calls_in_the_list_of_a_thread_that_ends_are_dead(machine: Machine, manager: Client, client: Client) -> None:
    """A nested call that waits for a thread which ends without reading it is dead for its caller."""
    handle = machine.share(client, manager)
    client.send()
    manager.read()
    back = manager.call(handle)
    client.exit()

    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_DEAD_REPLY"] == back.names


def test_calls_that_wait_in_a_process_that_dies_are_dead(manager: Client, client: Client) -> None:
    """Who called is told; who called one-way is not."""
    call = client.call()
    one_way = client.thread()
    one_way.tell()
    manager.die()

    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_DEAD_REPLY"] == call.names
    assert [] == one_way.news()


def test_a_call_that_is_being_served_is_dead_with_its_server(manager: Client, client: Client) -> None:
    """The server's process dies: BR_DEAD_REPLY."""
    call = client.call()
    manager.read()
    manager.die()

    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_DEAD_REPLY"] == call.names


def test_a_call_is_dead_when_its_thread_ends(manager: Client, client: Client) -> None:
    """BINDER_THREAD_EXIT of the serving thread is enough."""
    call = client.call()
    manager.read()
    manager.exit()

    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_DEAD_REPLY"] == call.names


def test_a_server_that_waits_for_another_is_not_missed_until_that_one_is_done(
    machine: Machine, manager: Client, client: Client
) -> None:
    """The manager dies while its own call to a third is served: the client is told only when that one replies."""
    third = machine.client()
    handle = machine.share(third, manager)
    call = client.call()
    manager.read()
    manager.send(handle)
    third.read()
    manager.die()
    assert call.parked
    assert COMPLETE == third.reply().names

    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_DEAD_REPLY"] == call.names


def test_all_of_a_chain_dies(machine: Machine, manager: Client) -> None:
    """Client calls manager, manager calls third, third calls client back: whoever dies, nothing is left."""
    for victims in ((0,), (1,), (2,), (0, 1), (1, 2), (2, 0), (2, 1, 0), (0, 2, 1)):
        client, third = machine.client(), machine.client()
        to_client = machine.share(client, manager, 0x100)
        to_third = machine.share(third, manager, 0x200)
        back = machine.pass_on(manager, third, parcel().handle(to_client))
        thread = manager.thread()
        client.call()
        thread.read()
        thread.send(to_third)
        third.read()
        third.send(back)
        for victim in victims:
            (client.die, thread.exit, third.die)[victim]()
        client.die()
        third.die()
        if 1 not in victims:
            thread.reply()
            thread.exit()
        counters = machine.engine.stats

        assert counters.created[stats.TRANSACTION] == counters.deleted[stats.TRANSACTION]


def test_a_second_failure_is_not_told_on_top_of_the_first(machine: Machine, manager: Client, client: Client) -> None:
    """A caller that has not read that its call failed is not told again when an outer call fails too."""
    outer, inner = machine.client(), machine.client()
    to_client = machine.share(client, manager, 0x100)
    to_outer = machine.share(outer, manager, 0x200)
    to_inner = machine.share(inner, manager, 0x300)
    del to_client
    outer_handle = machine.pass_on(manager, client, parcel().handle(to_outer))
    inner_handle = machine.pass_on(manager, client, parcel().handle(to_inner))
    back = machine.pass_on(manager, outer, parcel().handle(machine.share(client, manager, 0x100)))
    client.send(outer_handle)
    outer.read()
    outer.send(back)
    client.read()
    client.send(inner_handle)
    inner.die()
    thread = client.process.threads[client.tid]
    assert uapi.BR_DEAD_REPLY == thread.reply_error.command
    client.write(client.transaction(reply=True, data_size=8, data_address=1))
    outer.die()

    assert uapi.BR_DEAD_REPLY == thread.reply_error.command
    assert 1 == sum(work is thread.reply_error for work in thread.todo)
    assert thread.transaction_stack is None


# -- frozen processes


def test_a_frozen_process_is_not_called(machine: Machine, manager: Client, client: Client) -> None:
    """A call fails with BR_FROZEN_REPLY, and is remembered as missed."""
    assert 0 == client.freeze(manager.pid).error

    assert ["BR_NOOP", "BR_FROZEN_REPLY"] == client.call().names
    assert ("BR_FROZEN_REPLY", 0, 3846) == machine.failure()
    assert (True, False) == (manager.process.sync_recv, manager.process.async_recv)


def test_one_way_calls_to_a_frozen_process_wait(manager: Client, client: Client) -> None:
    """They are queued, the sender reads BR_TRANSACTION_PENDING_FROZEN, and the thawed process reads them."""
    client.freeze(manager.pid)
    names = [client.tell(0, data).names for data in (b"1", b"2")]
    assert (False, True) == (manager.process.sync_recv, manager.process.async_recv)
    client.freeze(manager.pid, enable=False)

    assert [["BR_NOOP", "BR_TRANSACTION_PENDING_FROZEN"]] * 2 == names
    assert b"1" == manager.read().body


def test_an_update_takes_the_place_of_what_waits(machine: Machine, manager: Client, client: Client) -> None:
    """Of one-way calls with TF_UPDATE_TXN to a frozen process, equal ones that wait are dropped with what they hold."""
    update = uapi.TF_UPDATE_TXN
    client.freeze(manager.pid)
    client.tell(0, b"served first", flags=update)
    fd = client.open_fd("dropped")
    file = client.fds[fd]
    client.tell(0, parcel().fd(fd), flags=update, code=1)
    assert 2 == file.holders
    client.tell(0, b"other code", flags=update, code=2)
    client.tell(0, b"other flags", flags=update | uapi.TF_CLEAR_BUF, code=1)
    client.tell(0, b"no update", code=1)
    machine.client().tell(0, b"other sender", flags=update, code=1)
    client.tell(0, b"new", flags=update, code=1)
    assert 1 == file.holders
    client.freeze(manager.pid, enable=False)
    seen = []
    while (call := manager.read(nonblock=True)).error == 0:
        seen.append(call.body)
        manager.free(call.received)

    assert [b"served first", b"other code", b"other flags", b"no update", b"other sender", b"new"] == seen
    assert 0 == manager.process.outstanding_transactions


def test_an_update_takes_the_place_of_its_own_process_only(manager: Client, client: Client) -> None:
    """A child that calls through its parent's descriptor replaces nothing of the parent's."""
    child = client.thread(is_child=True)
    client.freeze(manager.pid)
    client.tell(0, b"served first")
    for data, caller in ((b"parent", client), (b"child", child), (b"child again", child)):
        caller.tell(0, data, flags=uapi.TF_UPDATE_TXN)
    client.freeze(manager.pid, enable=False)
    seen = []
    while (call := manager.read(nonblock=True)).error == 0:
        seen.append(call.body)
        manager.free(call.received)

    assert [b"served first", b"parent", b"child again"] == seen


def test_an_update_to_a_process_that_is_not_frozen_waits_in_line(manager: Client, client: Client) -> None:
    """Only a frozen process has its waiting calls replaced."""
    for data in (b"1", b"2", b"3"):
        client.tell(0, data, flags=uapi.TF_UPDATE_TXN)
    seen = []
    while (call := manager.read(nonblock=True)).error == 0:
        seen.append(call.body)
        manager.free(call.received)

    assert [b"1", b"2", b"3"] == seen


# -- logs of transactions


def test_the_logs_keep_the_last_transactions(machine: Machine, client: Client) -> None:
    """The log has the last 32, whatever became of them; the other one those that failed."""
    handle = 5
    for _ in range(LOG_ENTRIES):
        client.tell()
    client.send(handle, code=1)
    log = machine.engine.transaction_log

    assert LOG_ENTRIES == len(log)
    assert 1 == len(machine.engine.failed_transaction_log)
    assert log[-1] is machine.engine.failed_transaction_log[-1]
    assert all(entry.done for entry in log)


def test_a_log_entry_says_who_called_whom(machine: Machine, manager: Client, client: Client) -> None:
    """Entries of a call, a one-way call and a reply, with node, sizes and the thread where one is known."""
    client.send(0, b"12345")
    manager.read()
    manager.reply(parcel().binder(1))
    client.read()
    client.tell()
    node = machine.binder.manager
    assert node is not None
    entries = [
        (
            entry.call_type,
            entry.from_process,
            entry.from_thread,
            entry.to_process,
            entry.to_thread,
            entry.to_node,
            entry.target_handle,
            entry.data_size,
            entry.offsets_size,
            entry.context_name,
            entry.return_error,
        )
        for entry in machine.engine.transaction_log
    ]
    c, m = client.pid, manager.pid

    assert [
        (0, c, c, m, 0, node.debug_id, 0, 5, 0, "binder", 0),
        (2, m, m, c, c, 0, 0, 24, 8, "binder", 0),
        (1, c, c, m, 0, node.debug_id, 0, 0, 0, "binder", 0),
    ] == entries


def test_a_transaction_under_way_is_incomplete(machine: Machine, client: Client) -> None:
    """Its entry is there from the start, and done only at the end."""
    call = client.begin(client.transaction(0, b"x", flags=uapi.TF_ONE_WAY))
    while not isinstance(call.effect, CopyToBuffer):
        call.advance()
    assert not machine.engine.transaction_log[-1].done
    call.drive()

    assert machine.engine.transaction_log[-1].done


# -- what is copied how


def test_small_data_without_objects_is_one_copy(client: Client) -> None:
    """Data goes from the sender's memory into the region in one effect."""
    client.tell()
    call = client.begin(client.transaction(0, b"x" * 100, flags=uapi.TF_ONE_WAY)).drive()

    assert [CopyToBuffer] == [type(effect) for effect in call.effects]


def test_commands_are_read_from_memory_where_they_were_not_fetched(manager: Client, client: Client) -> None:
    """Without the commands at hand the engine asks for them, and does the same."""
    call = client.begin(client.transaction(0, b"x", flags=uapi.TF_ONE_WAY), fetched=False).drive()

    assert isinstance(call.effects[0], CopyIn)
    assert b"x" == manager.read().body


# -- wake-ups


def test_the_thread_that_waits_last_is_woken_first(manager: Client, client: Client) -> None:
    """Idle threads are a stack."""
    threads = [manager.thread() for _ in range(3)]
    reads = [thread.read() for thread in threads]
    client.tell()

    assert [True, True, False] == [read.parked for read in reads]


def test_one_call_wakes_one_thread(manager: Client, client: Client) -> None:
    """Each of two calls goes to a thread of its own, the third waits in the process."""
    reads = [manager.thread().read() for _ in range(2)]
    for _ in range(3):
        client.thread().call()

    assert ["BR_TRANSACTION", "BR_TRANSACTION"] == [read.names[1] for read in reads]
    assert 1 == len(manager.process.todo)


def test_pollers_are_woken_where_nobody_reads(machine: Machine, manager: Client, client: Client) -> None:
    """A thread that polls and has nothing else to do is to look again; one that serves a call is not."""
    client.tell()
    assert [] == machine.poll.woken
    manager.free(manager.read().received)
    assert 0 == manager.poll()
    client.tell()

    assert [manager.process] == machine.poll.woken
    assert 1 == manager.poll()


def test_the_callers_thread_is_woken_when_it_polls(machine: Machine, manager: Client, client: Client) -> None:
    """A reply wakes the poller of the thread that called."""
    client.send()
    client.poll()
    machine.poll.woken.clear()
    manager.serve()

    assert client.process in machine.poll.woken
    assert 1 == client.poll()


def test_a_death_of_the_callee_wakes_the_callers_poller(machine: Machine, manager: Client, client: Client) -> None:
    """A failed reply is something to read, too."""
    client.send()
    client.poll()
    machine.poll.woken.clear()
    manager.die()

    assert client.process in machine.poll.woken


def other(caller: Caller) -> Caller:
    """Return another thread of the same process."""
    return caller.client.thread()


def test_a_reply_must_come_from_the_thread_that_serves(machine: Machine, manager: Client, client: Client) -> None:
    """Another thread of the same process has nothing to reply to."""
    client.send()
    manager.read()

    assert "BR_FAILED_REPLY" in other(manager).reply().names
    assert ("BR_FAILED_REPLY", -errno.EPROTO, 3156) == machine.failure()
    assert COMPLETE == manager.reply().names


def test_commands_behind_a_failed_call_wait(manager: Client, client: Client) -> None:
    """A failure stops the write buffer until it has been read; what was used up includes the failed call."""
    failing = client.transaction(99)
    call = client.write(failing, command(uapi.BC_ENTER_LOOPER))

    assert len(failing) == call.write_consumed
    assert 0 == client.process.threads[client.tid].looper
    assert manager.open
