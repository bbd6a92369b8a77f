"""Where the real driver and this project differ, and the shortest scenario that shows it.

A **play** is a way to play scenarios here: on the engine alone, or on a mount.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.conformance import engine_player
from tests.conformance.oracle import judge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    # Plays scenarios, and returns their transcripts.
    Play = Callable[[Sequence[str]], list[str]]

# Scenarios of one boot of the emulator while shrinking.
_CANDIDATES = 120


@dataclass(frozen=True)
class Difference:
    """A scenario, and what either side made of it: the real driver, and a play of ours."""

    scenario: str
    expected: str
    actual: str
    play: Play


@dataclass(frozen=True)
class Comparison:
    """What came out differently, and how many scenarios came out differently on the real driver from play to play."""

    differences: list[Difference]
    unsteady: int = 0


def _play_on_engine(scenario: str) -> str:
    """Play on the engine; what it raises is its transcript's end."""
    try:
        return engine_player.play(scenario)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a difference
        return f"{type(error).__name__}: {error}\n"


def play_on_engine(scenarios: Sequence[str]) -> list[str]:
    """Play on the engine."""
    return [_play_on_engine(scenario) for scenario in scenarios]


def blocks(scenario: str) -> list[str]:
    """Cut a scenario into its declarations and steps, each with the lines that belong to it."""
    parts: list[str] = []
    for line in scenario.splitlines(keepends=True):
        if line.startswith((" ", "\n")) and parts:
            parts[-1] += line
        else:
            parts.append(line)
    return parts


def compare(oracle: Path, scenarios: Sequence[str], plays: Sequence[Play], times: int = 1) -> Comparison:
    """Hold each of our plays of the scenarios against the real driver's; what differs is played there so many times."""
    expected = judge(oracle, scenarios).transcripts
    found = [
        Difference(scenario, judgement, actual, play)
        for play in plays
        for scenario, judgement, actual in zip(scenarios, expected, play(scenarios), strict=True)
        if judgement != actual
    ]
    if not found:
        return Comparison(found)
    suspects = list(dict.fromkeys(difference.scenario for difference in found))
    again = [judge(oracle, suspects, processors=1 + number % 2).transcripts for number in range(1, times)]
    judgements = {scenario: {one[number] for one in again} for number, scenario in enumerate(suspects)}
    steady = [difference for difference in found if judgements[difference.scenario] <= {difference.expected}]
    return Comparison(steady, len(suspects) - len({difference.scenario for difference in steady}))


def _until_difference(difference: Difference) -> str:
    """Return the scenario up to the first step that came out differently."""
    expected, actual = blocks(difference.expected), blocks(difference.actual)
    steps = blocks(difference.scenario)
    for number, (left, right) in enumerate(itertools.zip_longest(expected, actual, fillvalue="")):
        if left != right:
            return "".join(steps[: number + 1])
    return difference.scenario


def _payload_lines(part: str) -> list[str]:
    """Return the variants of a step with one of its lines left out."""
    lines = part.splitlines(keepends=True)
    if len(lines) < 3:
        return []
    return ["".join(lines[:index] + lines[index + 1 :]) for index in range(1, len(lines))]


def _smaller(scenario: str) -> list[str]:
    """Return variants with some steps left out, the boldest first, and with single lines of steps left out."""
    head, *steps = blocks(scenario)
    variants = []
    size = len(steps) // 2
    while size:
        variants += ["".join([head, *steps[:at], *steps[at + size :]]) for at in range(0, len(steps), size)]
        size //= 2
    for index, step in enumerate(steps):
        variants += ["".join([head, *steps[:index], part, *steps[index + 1 :]]) for part in _payload_lines(step)]
    return variants[:_CANDIDATES]


def shrink(oracle: Path, difference: Difference) -> Difference:
    """Leave out what is not needed for the difference, many variants in each boot of the emulator."""
    while True:
        candidates = [_until_difference(difference), *_smaller(_until_difference(difference))]
        found = compare(oracle, candidates, [difference.play]).differences
        still = [smaller for smaller in found if len(smaller.scenario) < len(difference.scenario)]
        if not still:
            return difference
        difference = min(still, key=lambda smaller: len(smaller.scenario))
