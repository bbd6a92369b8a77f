"""A simulated machine for each test, which must leave nothing behind."""

from collections.abc import Iterator

import pytest

from tests.engine.machine import Client, Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Make a machine; at the end everybody closes everything."""
    machine = Machine()
    yield machine
    machine.before_effect = None
    machine.shut_down()


@pytest.fixture
def manager(machine: Machine) -> Client:
    """Make a context manager that loops."""
    return machine.manager()


@pytest.fixture
def client(machine: Machine, manager: Client) -> Client:
    """Make a client."""
    assert manager.process.context.manager is not None
    return machine.client()
