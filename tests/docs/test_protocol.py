"""docs/protocol.md is complete, and what it refers to is there."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from binderfs_fuse import uapi
from tests.docs.references import SCENARIOS, TESTS, check, scenario

TEXT = (TESTS.parent / "docs" / "protocol.md").read_text()
# What scenarios say in place of a name; of what is not here nor in KINDS they do not speak.
WORDS = {
    "BINDER_TYPE_BINDER": r"^ +binder ",
    "BINDER_TYPE_HANDLE": r"^ +handle ",
    "BINDER_TYPE_WEAK_BINDER": r"^ +weak-binder ",
    "BINDER_TYPE_WEAK_HANDLE": r"^ +weak-handle ",
    "BINDER_TYPE_PTR": r"^ +ptr\b",
    "BINDER_TYPE_FD": r"^ +fd ",
    "BINDER_TYPE_FDA": r"^ +fda ",
    "BINDER_WRITE_READ": r" (write|read|exchange)\b",
}
KINDS = ("BC_", "BR_", "TF_")
NEVER_SAID = ("BR_FINISHED", "BR_ACQUIRE_RESULT", "BR_ATTEMPT_ACQUIRE")


@dataclass(frozen=True)
class Row:
    """What the tables say of one name."""

    name: str
    does: str
    shown_by: tuple[str, ...]
    differs: tuple[int, ...]


def _rows() -> Iterator[Row]:
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and re.match(r"[A-Z]+_", cells[0]):
            numbers = [int(number) for number in cells[3].split(",") if number]
            yield Row(cells[0], cells[1], tuple(re.findall(r"`([^`]+)`", cells[2])), tuple(numbers))


ROWS = list(_rows())
NAMES = [row.name for row in ROWS]
REFERENCES = sorted({reference for row in ROWS for reference in row.shown_by})


def test_every_name_has_a_row() -> None:
    """Each command, return, object, flag and ioctl that is defined for binder has one row, and nothing else has."""
    prefixes = ("BC_", "BR_", "TF_", "BINDER", "FLAT_BINDER_")
    names = [name for name, value in vars(uapi).items() if isinstance(value, int) and name.startswith(prefixes)]

    assert sorted(names) == sorted(NAMES)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_row_says_something_and_what_shows_it(row: Row) -> None:
    """No cell is left for later."""
    assert row.does.endswith(".")
    assert row.shown_by


@pytest.mark.parametrize("reference", REFERENCES)
def test_what_is_referred_to_exists(reference: str) -> None:
    """A reference is a recorded scenario or a test function."""
    check(reference)


def _word(name: str) -> str | None:
    if name in WORDS:
        return WORDS[name]
    return rf"\b{name}\b" if name.startswith(KINDS) or name in uapi.IOCTL_NAMES.values() else None


@pytest.mark.parametrize(
    ("word", "name"),
    [
        (word, reference)
        for row in ROWS
        if (word := _word(row.name))
        for reference in row.shown_by
        if "::" not in reference
    ],
)
def test_a_scenario_is_about_what_it_shows(word: str, name: str) -> None:
    """A scenario that shows something speaks of it."""
    assert re.search(word, scenario(name), re.MULTILINE)


@pytest.mark.parametrize("name", NEVER_SAID)
def test_what_is_never_said(name: str) -> None:
    """Some returns are defined, and the real driver has said them in no transcript."""
    said = re.compile(rf"^ *\|.*\b{name}\b", re.MULTILINE)

    assert [] == [file.name for file in SCENARIOS.rglob("*.scenario") if said.search(file.read_text())]
