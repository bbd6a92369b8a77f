"""Scheduler policies, as Android's kernels carry them with calls, and mainline's does not."""

from collections.abc import Iterator

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import SetScheduling
from binderfs_fuse.engine.priority import BATCH, FIFO, NORMAL, RR, scheduling_of_node
from tests.engine.machine import Client, Machine

INHERIT = uapi.FLAT_BINDER_FLAG_INHERIT_RT


def asks(policy: int, priority: int) -> int:
    """Return a node's flags."""
    return policy << uapi.FLAT_BINDER_FLAG_SCHED_POLICY_SHIFT | priority & uapi.FLAT_BINDER_FLAG_PRIORITY_MASK


@pytest.fixture
def android() -> Iterator[Machine]:
    """Make a machine whose mount has priority=android."""
    machine = Machine(android_priority=True)
    yield machine
    machine.shut_down()


def served(machine: Machine, flags: int, caller: tuple[int, int], *, one_way: bool = False) -> tuple[Client, Client]:
    """Have a manager with these flags read a call of a thread with this scheduling; both."""
    manager = machine.manager(flags=flags, scheduling=(NORMAL, 110))
    client = machine.client()
    client.scheduling = caller
    if one_way:
        client.tell(0)
    else:
        client.send(0)
    assert "BR_TRANSACTION" == manager.read().names[-1]
    return manager, client


@pytest.mark.parametrize(
    ("flags", "scheduling"),
    [
        (asks(NORMAL, 0), (NORMAL, 120)),
        (asks(NORMAL, 19), (NORMAL, 139)),
        (asks(NORMAL, -20), (NORMAL, 100)),
        (asks(FIFO, 1), (FIFO, 98)),
        (asks(RR, 99), (RR, 0)),
        (asks(BATCH, 5), (BATCH, 125)),
    ],
)
def test_a_node_asks_for_a_policy(flags: int, scheduling: tuple[int, int]) -> None:
    """Two bits of its flags are a policy, and the priority is a signed nice value or a real-time priority."""
    assert scheduling == scheduling_of_node(flags)
    assert flags & ~uapi.FLAT_BINDER_FLAG_PRIORITY_MASK == flags & uapi.FLAT_BINDER_FLAG_SCHED_POLICY_MASK


@pytest.mark.parametrize(("flags", "scheduling"), [(INHERIT, (FIFO, 89)), (0, (NORMAL, 120))])
def test_a_real_time_caller_lends_its_policy_where_the_node_says_so(
    android: Machine, flags: int, scheduling: tuple[int, int]
) -> None:
    """A call of a real-time thread is served real-time with INHERIT_RT, and with nice 0 without it."""
    manager, _ = served(android, flags, (FIFO, 89))

    assert scheduling == manager.scheduling


@pytest.mark.parametrize(
    ("minimum", "caller", "scheduling"),
    [
        (asks(RR, 7), (NORMAL, 120), (RR, 92)),
        (asks(NORMAL, 5), (NORMAL, 110), (NORMAL, 110)),
        (asks(NORMAL, -5), (NORMAL, 130), (NORMAL, 115)),
        (asks(FIFO, 10) | INHERIT, (RR, 89), (FIFO, 89)),
        (asks(RR, 10) | INHERIT, (FIFO, 89), (FIFO, 89)),
    ],
)
def test_the_better_of_node_and_caller_counts(
    android: Machine, minimum: int, caller: tuple[int, int], scheduling: tuple[int, int]
) -> None:
    """A node's minimum is for callers that are worse; of equals, FIFO is better."""
    manager, _ = served(android, minimum, caller)

    assert scheduling == manager.scheduling


def test_a_one_way_call_is_served_as_the_process_was_when_it_opened(android: Machine) -> None:
    """Nobody waits for it, so its caller's policy does not matter."""
    manager, _ = served(android, INHERIT, (FIFO, 10), one_way=True)

    assert (NORMAL, 110) == manager.scheduling


def test_a_policy_nobody_can_lend_is_left_out(android: Machine) -> None:
    """A caller with another policy (SCHED_DEADLINE) is served as the process was when it opened."""
    manager, _ = served(android, 0, (6, 0))

    assert (NORMAL, 110) == manager.scheduling


def test_the_reply_gives_the_servers_own_back(android: Machine) -> None:
    """What it had before the call."""
    manager, _ = served(android, INHERIT, (FIFO, 89))
    manager.reply()

    assert (NORMAL, 110) == manager.scheduling


def test_rights_are_asked_for_what_is_new(android: Machine) -> None:
    """What a thread serves with is as far as its own rights go; what it had before it gets back in any case."""
    manager = android.manager(scheduling=(NORMAL, 110))
    client = android.client()
    client.scheduling = (NORMAL, 100)
    client.send(0)
    manager.scheduling = (NORMAL, 130)
    read, reply = manager.read(), manager.reply()
    effects = [effect for call in (read, reply) for effect in call.effects if isinstance(effect, SetScheduling)]

    assert [((NORMAL, 110), False), ((NORMAL, 100), True), ((NORMAL, 110), False)] == [
        (effect.scheduling, effect.verify) for effect in effects
    ]


def test_policies_are_for_those_who_ask(machine: Machine) -> None:
    """Without priority=android there are nice values alone."""
    manager = machine.manager(flags=asks(RR, 7) | INHERIT)
    client = machine.client()
    client.scheduling = (FIFO, 89)
    client.send(0)
    call = manager.read()

    assert "BR_TRANSACTION" == call.names[-1]
    assert not [effect for effect in call.effects if isinstance(effect, SetScheduling)]
    assert (NORMAL, 120) == manager.scheduling
