"""``mount.py graph [MOUNTPOINT]``: processes, their nodes, and who holds references to them, as a picture."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from binderfs_fuse.command.program import printable, program, say
from binderfs_fuse.command.servers import ask_exactly, explain, information_of, whole_at
from binderfs_fuse.command.snapshot import Process, parse_state
from binderfs_fuse.fuse import mounting
from binderfs_fuse.fuse.mounting import MountError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from binderfs_fuse.fuse.mounting import Mount


def graph(arguments: Sequence[str]) -> int:
    """Write the picture. Raises `MountError`."""
    parser = argparse.ArgumentParser(
        prog=f"{program()} graph", description="Draw who holds references to whose nodes, with Graphviz."
    )
    parser.add_argument("mountpoint", nargs="?", type=Path, metavar="MOUNTPOINT", help="needed where there are several")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to, if not to standard output")
    parser.add_argument("--dot", action="store_true", help="write Graphviz's own language, which takes no Graphviz")
    parsed = parser.parse_args(arguments)
    mount = whole_at(parsed.mountpoint) if parsed.mountpoint else the_only_one()
    try:
        managers = information_of(mount)["managers"] or ()
        processes = parse_state(os.fsdecode(ask_exactly(mount, "state")), managers)
    except OSError as error:
        raise MountError(f"{mount.mountpoint}: {explain(error)}") from error
    text = dot(str(mount.mountpoint), processes).encode()
    picture = text if parsed.dot else draw(text)
    if not parsed.output:
        say(picture)
        return 0
    try:
        parsed.output.write_bytes(picture)
    except OSError as error:
        raise MountError(f"cannot write {parsed.output}: {error.strerror}") from error
    return 0


def the_only_one() -> Mount:
    """Return the only mount there is. Raises `MountError`."""
    places = {mount.device: mount for mount in mounting.mounts() if mount.is_ours and mount.shows_root}
    if not places:
        raise MountError("nothing is mounted")
    if len(places) > 1:
        raise MountError(f"which one? There are {', '.join(str(mount.mountpoint) for mount in places.values())}")
    return next(iter(places.values()))


def draw(text: bytes) -> bytes:
    """Turn Graphviz's language into SVG. Raises `MountError`."""
    try:
        done = subprocess.run(["dot", "-Tsvg"], input=text, capture_output=True, check=True)  # noqa: S607 - from PATH
    except FileNotFoundError as error:
        raise MountError("drawing takes Graphviz: install the package graphviz, or use --dot") from error
    except subprocess.CalledProcessError as error:
        raise MountError(f"Graphviz failed: {' '.join(error.stderr.decode(errors='replace').split())}") from error
    return done.stdout


def dot(title: str, processes: Sequence[Process]) -> str:
    """Describe the picture: a box for each process, in it its nodes, an arrow for each hold on one from another box.

    A thick box is a context's manager. An arrow says which handle it is, and is dashed where the hold is weak; a red
    one goes from who waits for a reply to who is to give it.
    """
    lines = ["digraph binder {", f"  label={_quote(title)}; rankdir=LR; compound=true; fontname=sans;"]
    lines += ["  node [fontname=sans, fontsize=10]; edge [fontname=sans, fontsize=9];"]
    owner: dict[int, int] = {}
    by_context: dict[str, list[int]] = {}
    for index, process in enumerate(processes):
        by_context.setdefault(process.context, []).append(index)
        owner |= {node.number: index for node in process.nodes}
    for context, indices in by_context.items():
        lines.append(f"  subgraph {_quote('cluster context ' + context)} {{ label={_quote(context)}; style=dotted;")
        lines += [line for index in indices for line in _process(index, processes[index])]
        lines.append("  }")
    for index, process in enumerate(processes):
        for reference in process.references:
            if reference.node in owner:
                style = "" if reference.strong else ", style=dashed"
                lines.append(f'  p{index} -> n{reference.node} [label="handle {reference.handle}"{style}];')
        places = {other.pid: place for place, other in enumerate(processes) if other.context == process.context}
        lines += [
            f"  p{index} -> p{places[pid]} [style=bold, color=red, label=calls];"
            for pid in sorted(set(process.calling) & places.keys())
        ]
    return "\n".join([*lines, "}"]) + "\n"


def _process(index: int, process: Process) -> list[str]:
    manager = any(node.manager for node in process.nodes)
    head = _quote(process.name, str(process.pid))
    lines = [
        f'    subgraph cluster_p{index} {{ label=""; style=solid; penwidth={3 if manager else 1};',
        f"      p{index} [shape=plaintext, label={head}];",
    ]
    for node in process.nodes:
        label = "manager" if node.manager else f"{node.pointer:#x}"
        lines.append(f"      n{node.number} [shape=ellipse, label={_quote(label)}];")
    return [*lines, "    }"]


def _quote(*lines: str) -> str:
    """Return a string of Graphviz's language that shows these lines; names in them are somebody else's choice."""
    escaped = (printable(line).replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'
