"""The binder_logs files with what differs from run to run turned into names, as the player in C shows them.

Debug ids and counters count from the scenario's start as they are: the engine that wrote these was made for it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_TRANSACTION: Final = re.compile(
    r"(?P<prefix>.*)transaction (?P<id>\d+): \S+ from (?P<from>\d+):(?P<from_thread>\d+)"
    r" to (?P<to>\d+):(?P<to_thread>\d+) (?P<code>code .*) elapsed -?\d+ms(?P<rest>.*)"
)
_ENTRY: Final = re.compile(
    r"(?P<id>\d+): (?P<kind>\S+) +from (?P<from>\d+):(?P<from_thread>\d+) to (?P<to>\d+):(?P<to_thread>\d+)"
    r" (?P<context>.*) ret (?P<result>\S+) l=(?P<line>\d+)(?P<rest>.*)"
)
_NODE: Final = re.compile(r"(?P<node>  node \d+: .*? tr \d+)(?: proc (?P<processes>.*))?")
_REF: Final = re.compile(r"(?P<ref>  ref \d+: .* d )(?P<pointer>\S+)")


def normalised(line: str, process_name: Callable[[int], str], thread_name: Callable[[int], str]) -> str:
    """Return one line of a log with names for numbers."""

    def ends(match: re.Match[str]) -> str:
        return (
            f"from {process_name(int(match['from']))}:{thread_name(int(match['from_thread']))}"
            f" to {process_name(int(match['to']))}:{thread_name(int(match['to_thread']))}"
        )

    if match := _ENTRY.fullmatch(line):
        where = " at a line" if int(match["line"]) else ""
        result = f" ret {match['result']}{where}{match['rest']}"
        return f"{match['id']}: {match['kind']} {ends(match)} {match['context']}{result}"
    if match := _TRANSACTION.fullmatch(line):
        return f"{match['prefix']}transaction {match['id']}: {ends(match)} {match['code']}{match['rest']}"
    if match := _NODE.fullmatch(line):
        names = [process_name(int(pid)) for pid in (match["processes"] or "").split()]
        return match["node"] + (" proc " + " ".join(names) if names else "")
    if match := _REF.fullmatch(line):
        return match["ref"] + ("set" if match["pointer"].strip("0x") else "0")
    if match := re.fullmatch(r"proc (\d+)", line):
        return f"proc {process_name(int(match[1]))}"
    if match := re.fullmatch(r"  thread (\d+)(:.*)", line):
        return f"  thread {thread_name(int(match[1]))}{match[2]}"
    return line
