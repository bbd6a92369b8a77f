"""What goes on in a mount at one moment, read off the driver's own logs.

The texts are those of ``binder_logs/state`` and ``binder_logs/stats``, whose format is the kernel's; so this is as
far from the engine's insides as any other reader of them. Whoever serves a mount may say anything in them: what has not
the format is left out, and no text takes more time or memory than its length.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse.command.program import printable

if TYPE_CHECKING:
    from collections.abc import Collection

_MOST_PROCESSES: Final = 1 << 17
# Numbers have as many digits as the kernel's can: Python turns no more than some thousands into a number.
_FLAGS: Final = re.MULTILINE | re.ASCII
_PROCESS: Final = re.compile(
    r"^proc (?P<pid>\d{1,10})\ncontext (?P<context>[^\n]*)\n(?P<body>(?:  [^\n]*+\n)*+)", _FLAGS
)
_THREAD: Final = re.compile(r"^  thread (\d{1,20}): l (\d{1,20})", _FLAGS)
_NODE: Final = re.compile(r"^  node (\d{1,20}): u([0-9a-f]{16}) c([0-9a-f]{16})", _FLAGS)
_REF: Final = re.compile(r"^  ref \d{1,20}: desc (\d{1,20}) (dead )?node (\d{1,20}) s (\d{1,20}) w (\d{1,20})", _FLAGS)
_BUFFER: Final = re.compile(r"^  buffer \d{1,20}: [^\s]{1,20} size (\d{1,20}):(\d{1,20}):(\d{1,20})", _FLAGS)
_CALL: Final = re.compile(
    r"^    outgoing transaction \d{1,20}: [^\s]{1,20} from \d{1,20}:\d{1,20} to (\d{1,20}):", _FLAGS
)
_CALLS: Final = re.compile(r"^(?:BC_TRANSACTION|BC_TRANSACTION_SG): (-?\d{1,20})$", _FLAGS)


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
    """Read ``binder_logs/state``; the order is its: the newest open comes first. `managers` are numbers of nodes.

    Raises `OSError`: EMSGSIZE where there are more opens than a machine has processes for.
    """
    processes: list[Process] = []
    for found in _PROCESS.finditer(text):
        if len(processes) == _MOST_PROCESSES:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
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
