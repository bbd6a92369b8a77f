"""Scenarios are read as README.md says, and recorded ones are complete."""

import re
from pathlib import Path

import pytest

from tests.conformance import engine_player
from tests.conformance.building import SCENARIOS
from tests.conformance.differences import blocks
from tests.conformance.record import without_results
from tests.conformance.scenario import ScenarioError, number, parse

TEXT = """\
# judged by nobody
# What this shows.
processes mgr a
let magic 0x10

mgr.2 write BC_TRANSACTION handle=0
    "text with \\" and blanks"
    ptr
        zero 8
    | 0 wrote 68
show state
"""


def test_steps_have_their_lines() -> None:
    """Deeper lines belong to the line above them that is less deep, and results to none."""
    scenario = parse(TEXT)

    write, show = scenario.steps
    assert ["mgr.2", None] == [write.actor, show.actor]
    assert [['"text with \\" and blanks"'], ["ptr"]] == [line.words for line in write.line.children]
    assert [["zero", "8"]] == [line.words for line in write.line.children[1].children]
    assert {"mgr": "mgr", "a": "a", "mgr.2": "mgr"} == scenario.actors
    assert {"magic": 16} == scenario.lets


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("0x10", 16), ("4K", 4096), ("1M", 1 << 20), ("-1", -1), ("x", None), ("", None)]
)
def test_numbers(text: str, value: int | None) -> None:
    """Numbers may be hexadecimal, negative, and followed by K or M."""
    assert value == number(text)


@pytest.mark.parametrize("text", ["b open\n", "processes a\nb open\n", "    indented\n"])
def test_what_is_none(text: str) -> None:
    """A step of nobody, or an indented line without a step, is an error."""
    with pytest.raises(ScenarioError):
        parse(text)


def test_unknown_names_are_errors() -> None:
    """A word that means nothing is an error, not a zero."""
    with pytest.raises(ValueError, match="nonsense"):
        engine_player.play("processes a\na join\na write BC_ACQUIRE nonsense\n")


def test_results_are_dropped() -> None:
    """What is left without results is what the author wrote."""
    text = without_results(TEXT)

    assert "|" not in text
    assert "judged" not in text
    assert text == without_results(text)


def test_blocks() -> None:
    """A scenario is cut before every line that is not indented."""
    parts = blocks(TEXT)

    assert TEXT == "".join(parts)
    assert ["show state\n"] == [part for part in parts if part.startswith("show")]


@pytest.mark.parametrize(
    "file", sorted(SCENARIOS.rglob("*.scenario")), ids=lambda file: f"{file.parent.name}/{file.stem}"
)
def test_recorded_scenarios_are_complete(file: Path) -> None:
    """Each says who judged it and what it shows, and has a result for every step."""
    judge, *lines = file.read_text().splitlines()
    steps = parse(file.read_text()).steps

    assert judge.startswith("# judged by Linux ")
    assert any(
        line.startswith("# ") and not re.match(r"# (boot|open|(may )?differs? on FUSE): ", line) for line in lines
    )
    text = "\n".join(lines)
    empty_logs = text.count("\nshow ")
    assert len(steps) <= sum(part.count("\n    |") > 0 for part in blocks(text)) + empty_logs
