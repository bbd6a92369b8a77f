"""What goes on in a mount at one moment, read off the driver's own logs.

The texts are those of ``binder_logs/state`` and ``binder_logs/stats``, whose format is the kernel's; so this is as
far from the engine's insides as any other reader of them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse.command.program import printable

if TYPE_CHECKING:
    from collections.abc import Collection

_PROCESS: Final = re.compile(r"^proc (?P<pid>\d+)\ncontext (?P<context>.*)\n(?P<body>(?:  .*\n)*)", re.MULTILINE)
_THREAD: Final = re.compile(r"^  thread (\d+): l (\d+)", re.MULTILINE)
_NODE: Final = re.compile(r"^  node (\d+): u([0-9a-f]{16}) c([0-9a-f]{16})", re.MULTILINE)
_REF: Final = re.compile(r"^  ref \d+: desc (\d+) (dead )?node (\d+) s (\d+) w (\d+)", re.MULTILINE)
_BUFFER: Final = re.compile(r"^  buffer \d+: \S+ size (\d+):(\d+):(\d+)", re.MULTILINE)
_CALL: Final = re.compile(r"^    outgoing transaction \d+: \S+ from \d+:\d+ to (\d+):", re.MULTILINE)
_CALLS: Final = re.compile(r"^(?:BC_TRANSACTION|BC_TRANSACTION_SG): (-?\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Node:
    """An object that a process offers; `manager` says that it is a context's."""

    number: int
    pointer: int
    manager: bool


@dataclass(frozen=True, slots=True)
class Reference:
    """A hold on a node, by `handle`; `node` is its number, that of a dead one if `dead`."""

    handle: int
    node: int
    strong: int
    weak: int
    dead: bool


@dataclass(slots=True)
class Process:
    """One open of a device.

    `threads` are thread ids, `buffers` and `bytes` the buffers that it has not freed and their size, `calling` the pids
    of the processes that it waits for a reply of.
    """

    pid: int
    context: str
    name: str
    threads: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    buffers: int = 0
    bytes: int = 0
    calling: list[int] = field(default_factory=list)


def process_name(pid: int) -> str:
    """Return what the kernel calls a process, which it chooses itself; a question mark where it is not to be seen."""
    try:
        name = os.fsdecode(Path(f"/proc/{pid}/comm").read_bytes()).rstrip("\n")
    except OSError:
        return "?"
    return printable(name)


def parse_state(text: str, managers: Collection[int] = ()) -> list[Process]:
    """Read ``binder_logs/state``; the order is its: the newest open comes first. `managers` are numbers of nodes."""
    processes = []
    for found in _PROCESS.finditer(text):
        pid, body = int(found["pid"]), found["body"]
        buffers = _BUFFER.findall(body)
        processes.append(
            Process(
                pid,
                found["context"],
                process_name(pid),
                [int(tid) for tid, _ in _THREAD.findall(body)],
                [Node(int(number), int(ptr, 16), int(number) in managers) for number, ptr, _ in _NODE.findall(body)],
                [
                    Reference(int(handle), int(node), int(strong), int(weak), bool(dead))
                    for handle, dead, node, strong, weak in _REF.findall(body)
                ],
                len(buffers),
                sum(map(int, (size for sizes in buffers for size in sizes))),
                [int(pid) for pid in _CALL.findall(body)],
            )
        )
    return processes


def parse_calls(text: str) -> int:
    """Read from ``binder_logs/stats`` how many transactions have been sent since the mount was made."""
    # The counters of the whole mount come first, and only they begin a line.
    return sum(map(int, _CALLS.findall(text)))
