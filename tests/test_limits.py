"""The table of limits: its rows, and what the manual says of it."""

import re
from dataclasses import fields
from pathlib import Path

from binderfs_fuse.limits import Limits

MANUAL = (Path(__file__).parent.parent / "docs" / "manual.md").read_text()


def test_each_number_has_its_row() -> None:
    """What a limit is, and what a client beyond it sees, is said of each, and of nothing that is no limit."""
    assert Limits.__doc__

    assert list(Limits.__annotations__) == re.findall(r"^    `(\w+)`", Limits.__doc__, re.MULTILINE)


def test_the_manual_has_the_numbers_that_can_be_set() -> None:
    """It says what each is where nothing is chosen, and names no other."""
    section = MANUAL[MANUAL.index("**limit_opens=") : MANUAL.index("**log=")]
    settable = {field.name: field.default for field in fields(Limits)}

    assert set(map(str, settable.values())) <= set(re.findall(r"\d+", section))
    assert set(re.findall(r"limit_(\w+)=", section)) <= settable.keys()


def test_what_is_reserved_leaves_some_for_all() -> None:
    """Each reserve is a part of what it is a reserve of."""
    assert 0 < Limits.lane_reserve < Limits.lanes
    assert 0 < Limits.worker_reserve < Limits.workers
    assert 0 < Limits.tracer_reserve < Limits.tracers
    assert 0 < Limits.line_reserve < Limits.lines
    assert 0 < Limits.descriptors // Limits.descriptor_reserve < Limits.descriptors
