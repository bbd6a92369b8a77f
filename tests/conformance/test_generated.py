"""Random scenarios give the same on a mount as on the engine, and on the real driver where that is at hand."""

from pathlib import Path

import pytest

from tests.conformance.building import find_oracle
from tests.conformance.differences import compare, play_on_engine
from tests.conformance.generate import scenarios
from tests.conformance.oracle import play_on_mount

COUNT = 12
SEED = 1


def test_mount(place: Path) -> None:
    """Real processes on a mount see what the engine says."""
    batch = scenarios(COUNT, SEED)

    assert play_on_engine(batch) == play_on_mount(place, batch)


def test_driver() -> None:
    """The engine says what the real driver does."""
    oracle = find_oracle()
    if oracle is None:
        pytest.skip("no run-oracle ($BINDER_ORACLE), or no qemu-system-x86_64")

    assert [] == compare(oracle, scenarios(COUNT, SEED), [play_on_engine], times=3).differences
