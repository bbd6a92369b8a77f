"""The text of a scenario, as the player in C reads it too (README.md has the language)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

COORDINATOR_VERBS = ("show", "kill", "signal")

_WORD = re.compile(r'(?:[^ "]|"(?:\\.|[^"\\])*")+')
_NUMBER = re.compile(r"(-?(?:0[xX][0-9a-fA-F]+|[0-9]+))([KM]?)")


class ScenarioError(Exception):
    """The text is no scenario."""


def number(text: str) -> int | None:
    """Read a number, with K or M after it for kibi and mebi; None where it is none."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    return int(match[1], 0) << {"": 0, "K": 10, "M": 20}[match[2]]


@dataclass
class Line:
    """One line and the deeper lines below it. `words` are split at blanks, but not within double quotes."""

    indent: int
    words: list[str]
    children: list[Line] = field(default_factory=list)

    def option(self, key: str) -> str | None:
        """Return the value of `key=value`, or None."""
        for word in self.words[1:]:
            if word.startswith(key + "="):
                return word[len(key) + 1 :]
        return None

    def positional(self, skip: int) -> list[str]:
        """Return the words after the first `skip` that are not options."""
        return [word for word in self.words[skip:] if word.startswith('"') or "=" not in word]


@dataclass
class Step:
    """Something that `actor` does, or the coordinator (None); its text is lines[first:last]."""

    actor: str | None
    line: Line
    first: int
    last: int


@dataclass
class Scenario:
    """A scenario: its lines without results, and what they mean. `actors` are threads, with their process."""

    lines: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    actors: dict[str, str] = field(default_factory=dict)
    lets: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> Scenario:
    """Read a scenario; lines of results are dropped."""
    scenario = Scenario()
    path: list[Line] = []
    for raw in text.removesuffix("\n").split("\n"):
        stripped = raw.strip(" ")
        if stripped.startswith("|"):
            continue
        scenario.lines.append(raw)
        if not stripped or stripped.startswith("#"):
            continue
        line = Line(len(raw) - len(raw.lstrip(" ")), _WORD.findall(raw))
        if line.indent:
            if not path:
                raise ScenarioError(f"an indented line before the first step: {raw}")
            while len(path) > 1 and path[-1].indent >= line.indent:
                path.pop()
            path[-1].children.append(line)
            path.append(line)
            scenario.steps[-1].last = len(scenario.lines)
        elif line.words[0] == "processes":
            scenario.processes += line.words[1:]
            scenario.actors.update({name: name for name in line.words[1:]})
        elif line.words[0] == "let":
            scenario.lets[line.words[1]] = int(line.words[2], 0)
        else:
            actor = None if line.words[0] in COORDINATOR_VERBS else line.words[0]
            if actor is not None and actor not in scenario.actors:
                process = actor.partition(".")[0]
                if process not in scenario.processes:
                    raise ScenarioError(f"no such process: {raw}")
                scenario.actors[actor] = process
            scenario.steps.append(Step(actor, line, len(scenario.lines) - 1, len(scenario.lines)))
            path = [line]
    return scenario
