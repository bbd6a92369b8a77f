"""docs/differences.md is complete: every scenario that differs is there, and what is there is shown by something."""

import re

import pytest

from tests.docs.references import SCENARIOS, TESTS, check, references

TEXT = (TESTS.parent / "docs" / "differences.md").read_text()
LIST, RUST = TEXT.split("\n## The driver in Rust\n")
ENTRIES = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^## |^$)", LIST, re.MULTILINE | re.DOTALL)
ROWS = [line for line in RUST.splitlines() if line.startswith("| ")][2:]
MARK = re.compile(r"^# (?:may differ|differs) on FUSE: ", re.MULTILINE)


def _marked() -> list[str]:
    return [
        str(file.relative_to(SCENARIOS).with_suffix(""))
        for file in sorted(SCENARIOS.rglob("*.scenario"))
        if MARK.search(file.read_text())
    ]


@pytest.mark.parametrize("reference", references(TEXT))
def test_what_is_referred_to_exists(reference: str) -> None:
    """A reference is a recorded scenario or a test function."""
    check(reference)


def test_the_scenarios_that_differ_are_those_of_the_list() -> None:
    """Each scenario that is marked to differ is accounted for, and none is named that does not."""
    named = [reference for reference in references("".join(text for _, text in ENTRIES)) if "::" not in reference]

    assert _marked() == named


def test_entries_are_numbered() -> None:
    """From one, so that the protocol's table can refer to them."""
    assert list(range(1, len(ENTRIES) + 1)) == [int(number) for number, _ in ENTRIES]


@pytest.mark.parametrize(("number", "text"), ENTRIES)
def test_an_entry_is_shown_by_something(number: str, text: str) -> None:
    """By a scenario or a test."""
    assert references(text), number


def test_the_protocols_table_refers_to_entries() -> None:
    """Every number in its last column is one of the list."""
    table = (TESTS.parent / "docs" / "protocol.md").read_text()
    cells = re.findall(r"^\| [A-Z]+_.*\| ([\d, ]+) \|$", table, re.MULTILINE)

    assert cells
    assert {number for cell in cells for number in cell.split(", ")} <= {number for number, _ in ENTRIES}


@pytest.mark.parametrize("row", ROWS)
def test_what_the_driver_in_rust_does_otherwise_is_shown(row: str) -> None:
    """Each row has a scenario that a mount plays as the driver in C does."""
    (name,) = references(row)

    assert name not in _marked()
