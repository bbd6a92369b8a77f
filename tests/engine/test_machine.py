"""The simulated machine itself, by two conversations from end to end."""

import pytest

from tests.engine.machine import Client, Machine
from tests.engine.wire import parcel


def test_a_call_and_its_reply(manager: Client, client: Client) -> None:
    """A reader that waits gets the call, its caller the reply; both see the data in their regions."""
    reading = manager.read()
    call = client.call(0, b"hello")
    received = reading.received
    manager.free(received)
    replied = manager.reply(b"there")

    assert b"hello" == reading.body
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE"] == replied.names
    assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_REPLY"] == call.names
    assert b"there" == call.body


def test_a_descriptor_arrives(machine: Machine, manager: Client, client: Client) -> None:
    """A file that a transaction carries is installed in its receiver, and nobody else holds it."""
    fd = client.open_fd("a file")
    client.tell(0, parcel().fd(fd))
    client.close_fd(fd)
    call = manager.read()

    assert ["a file"] == [manager.fds[number].name for number in call.installed]
    assert 1 == manager.fds[call.installed[0]].holders
    assert client.process in machine.engine.processes


def test_what_is_left_over_is_noticed() -> None:
    """A node that its counter has forgotten makes the shutdown fail."""
    machine = Machine()
    machine.pair()
    machine.engine.stats.created[2] += 1

    with pytest.raises(AssertionError, match="stats: nodes"):
        machine.shut_down()
