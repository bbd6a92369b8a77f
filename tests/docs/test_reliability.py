"""docs/reliability.md speaks of what there is: files, commands and kinds of faults."""

import re
from pathlib import Path

from fuzz.__main__ import TARGETS
from tests.soak.__main__ import FAULTS

CHECKOUT = Path(__file__).parent.parent.parent
TEXT = (CHECKOUT / "docs" / "reliability.md").read_text()


def test_each_kind_of_fault_has_its_figure() -> None:
    """What the soak injects is in the table, and nothing else is."""
    assert {f"fault: {name}" for name in FAULTS} == set(re.findall(r"fault: [a-z ]+[a-z]", TEXT))


def test_each_target_of_fuzzing_has_its_figures() -> None:
    """Each is in the table."""
    assert set(TARGETS) == set(re.findall(r"^\| `(\w+)`[^|]* \| [\d,]+ \|", TEXT, re.MULTILINE))


def test_commands_are_targets_of_make() -> None:
    """The commands that give the figures exist."""
    targets = re.findall(r"^(\w+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)

    assert {"soak", "fuzz", "sanitize"} == set(re.findall(r"`make (\w+) DURATION=\d+`", TEXT)) <= set(targets)
