"""What other threads do between two effects of a step, or before its outcome is stored, breaks nothing."""

import errno

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import CopyIn
from binderfs_fuse.engine.effects import Effect, Outcome
from tests.engine.machine import Call, Client, Machine
from tests.engine.wire import parcel


def test_target_dies_under_a_call(machine: Machine, manager: Client, client: Client) -> None:
    """A node that dies while a call to it is under way is freed when the call has failed."""

    def die(_call: Call, effect: Effect) -> None:
        if isinstance(effect, CopyIn):
            manager.die()

    machine.before_effect = die
    call = client.tell(0, parcel().binder(0x10))

    assert ["BR_NOOP", "BR_DEAD_REPLY"] == call.names
    assert {} == machine.engine.dead_nodes


def begin_read(client: Client, *commands: bytes) -> Outcome:
    """Read to the end of the step, without storing what was read."""
    call = client.begin(*commands, read=256)
    value = None
    while True:
        effect = call._step.send(value)
        if isinstance(effect, Outcome):
            return effect
        value = client.machine.perform(call, effect)


def fail(client: Client, outcome: Outcome, copied: int) -> int:
    """Have only part of the data stored; the error."""
    instead = client.machine.conclude(client.process.undeliver(client.task(), outcome, copied))
    client.machine.resume()
    return instead.error


def test_buffer_freed_before_it_is_known(manager: Client, client: Client) -> None:
    """A process that frees a call's buffer before it was told of the call loses the call, and the caller is told."""
    waiting = client.call(0, b"hello")
    thread = manager.thread()
    outcome = begin_read(manager)
    assert manager.process.allocation is not None
    (offset,) = manager.process.allocation.allocated
    thread.do(uapi.BC_FREE_BUFFER, manager.process.address + offset)
    error = fail(manager, outcome, 4)

    assert -errno.EFAULT == error
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"] == waiting.names
    assert {} == manager.process.allocation.allocated


def test_one_way_buffer_freed_before_it_is_known(machine: Machine, manager: Client, client: Client) -> None:
    """So does a one-way call, and the next one to that node comes."""
    client.tell(0, b"one")
    client.tell(0, b"two")
    thread = manager.thread()
    outcome = begin_read(manager)
    assert manager.process.allocation is not None
    thread.do(uapi.BC_FREE_BUFFER, manager.process.address + min(manager.process.allocation.allocated))
    fail(manager, outcome, 4)
    call = manager.read()

    assert b"two" == call.body
    assert not machine.engine.dead_nodes


def test_buffer_with_descriptors_cannot_be_freed_early(machine: Machine, manager: Client, client: Client) -> None:
    """Where descriptors are still to be written into a buffer, it stays allocated until they are."""
    client.tell(0, parcel().fd(client.open_fd("a file")))
    thread = manager.thread()
    outcome = begin_read(manager)
    assert manager.process.allocation is not None
    (offset,) = manager.process.allocation.allocated
    thread.do(uapi.BC_FREE_BUFFER, manager.process.address + offset)
    still_there = list(manager.process.allocation.allocated)
    numbers = manager.install(outcome)
    assert numbers is not None
    manager.process.installed(manager.task(), numbers, outcome)
    machine.look()
    thread.do(uapi.BC_FREE_BUFFER, manager.process.address + offset)

    assert [offset] == still_there
    assert {} == manager.process.allocation.allocated


@pytest.mark.parametrize("chunk", [1, 64])
def test_call_is_not_read_again_without_its_descriptors(
    machine: Machine, manager: Client, client: Client, chunk: int
) -> None:
    """If something before a call cannot be stored, and the call's files are gone already, the call fails."""
    other = machine.client()
    handle = machine.share(other, manager)
    manager.tell(handle, parcel().binder(0x30))
    manager.do(uapi.BC_INCREFS_DONE, 0x30, 0)
    manager.do(uapi.BC_ACQUIRE_DONE, 0x30, 0)
    # Now the manager is to be told that nobody refers to its object any more.
    other.free(other.read().received)
    waiting = client.call(0, parcel().fd(client.open_fd("a file")))
    outcome = begin_read(manager)
    machine.engine.chunk = chunk
    for file, _, _ in outcome.files:
        file.close()
    fail(manager, outcome, 4)

    assert 1 == len(outcome.files)
    assert "BR_FAILED_REPLY" in waiting.names
    assert "BR_TRANSACTION" not in manager.read(nonblock=True).names


def test_reference_acknowledged_before_it_is_known(machine: Machine, client: Client) -> None:
    """Who answers BR_INCREFS and BR_ACQUIRE before they could be stored is not asked again, nor counted twice."""
    outcome = begin_read(client, client.transaction(0, parcel().binder(0x10), flags=uapi.TF_ONE_WAY))
    node = client.process.nodes[0x10]
    thread = client.thread()
    thread.do(uapi.BC_INCREFS_DONE, 0x10, 0)
    thread.do(uapi.BC_ACQUIRE_DONE, 0x10, 0)
    fail(client, outcome, 0)

    assert (0, 0) == (node.local_weak_refs, node.local_strong_refs)
    assert (True, True) == (node.has_weak_ref, node.has_strong_ref)
    assert not machine.engine.ready
