"""``mount.py status [MOUNTPOINT] [--json]``: what is mounted, who serves it, and who uses it."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse.command.program import printable, program, quoted, say
from binderfs_fuse.command.servers import (
    ask_exactly,
    explain,
    information_of,
    is_death,
    is_elsewhere,
    is_nonsense,
    whole_at,
)
from binderfs_fuse.command.snapshot import Process, parse_calls, parse_state
from binderfs_fuse.fuse import mounting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from binderfs_fuse.fuse.mounting import Mount


# A day.
_LONGEST: Final = 86400


def status(arguments: Sequence[str]) -> int:
    """Print the status of one mount, or of all; return 1 where a server is dead, stuck or none. Raises `MountError`."""
    parser = argparse.ArgumentParser(prog=f"{program()} status", description="Show what is mounted, and who uses it.")
    parser.add_argument("mountpoint", nargs="?", type=Path, metavar="MOUNTPOINT", help="only this one")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--interval", type=_seconds, default=0.5, metavar="SECONDS", help="how long to count transactions (0.5)"
    )
    parsed = parser.parse_args(arguments)
    there = whole_at(parsed.mountpoint) if parsed.mountpoint else None
    places: dict[int, list[Mount]] = {}
    for mount in mounting.mounts():
        if mount.is_ours and mount.shows_root and there in (None, mount):
            places.setdefault(mount.device, []).append(mount)
    reports = collect(list(places.values()), parsed.interval)
    if parsed.json:
        say(json.dumps(reports, indent=2) + "\n")
    elif not reports:
        say("nothing is mounted\n")
    else:
        say("\n".join(map(describe, reports)))
    return int(any(report.get("dead") or report.get("nonsense") for report in reports))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= _LONGEST:
        raise argparse.ArgumentTypeError(f"invalid number of seconds: {text!r}")
    return value


def collect(places: Sequence[Sequence[Mount]], interval: float) -> list[dict[str, Any]]:
    """Ask the server of each mount, all of whose places are given; one that cannot be asked has an ``error`` instead.

    What has been unmounted meanwhile is left out.
    """
    began = time.monotonic()
    asked = [answer for answer in map(_ask, places) if answer]
    if interval > 0 and any("calls" in report for _, report in asked):
        time.sleep(max(0.0, began + interval - time.monotonic()))
    for mount, report in asked:
        before, when = report.pop("calls", (0, 0.0))
        if "error" in report:
            continue
        report["transactions"] = before
        report["transactions_per_second"] = None
        if interval > 0:
            try:
                now = parse_calls(os.fsdecode(ask_exactly(mount, "stats")))
            except OSError:
                continue
            report["transactions"] = now
            report["transactions_per_second"] = round((now - before) / max(time.monotonic() - when, 1e-6), 1)
    return [report for _, report in asked]


def _ask(places: Sequence[Mount]) -> tuple[Mount, dict[str, Any]] | None:
    """Ask at one of the places where a mount is seen, the last one unless that is covered; None: there is no such."""
    for mount in reversed(places):
        try:
            return mount, _report(mount)
        except OSError as error:
            failure = error
            if not is_elsewhere(error):
                break
    # Both, since the kernel soon gives a number to another mount.
    if (mount.number, mount.mountpoint) not in ((other.number, other.mountpoint) for other in mounting.mounts()):
        return None
    report = {"mountpoint": str(mount.mountpoint), "source": mount.source}
    said = {"error": explain(failure), "dead": is_death(failure)}
    return mount, report | said | ({"nonsense": True} if is_nonsense(failure) else {})


def _report(mount: Mount) -> dict[str, Any]:
    report: dict[str, Any] = {"mountpoint": str(mount.mountpoint), "source": mount.source}
    said = information_of(mount)
    calls = parse_calls(os.fsdecode(ask_exactly(mount, "stats")))
    report["calls"] = calls, time.monotonic()
    state = os.fsdecode(ask_exactly(mount, "state"))
    report |= {key: said[key] for key in ("pid", "version", "uptime", "region", "max", "stats", "filter", "devices")}
    report["clients"] = [_client(process) for process in parse_state(state, said["managers"] or ())]
    return report


def _client(process: Process) -> dict[str, Any]:
    return {
        "pid": process.pid,
        "name": process.name,
        "context": process.context,
        "threads": len(process.threads),
        "nodes": len(process.nodes),
        "references": len(process.references),
        "buffers": process.buffers,
        "buffer_bytes": process.bytes,
        "calling": process.calling,
        "manager": any(node.manager for node in process.nodes),
    }


# What is shown of a client, under which head; numbers stand to the right.
_COLUMNS: Final = {
    "pid": "PID",
    "name": "NAME",
    "context": "CONTEXT",
    "threads": "THREADS",
    "nodes": "NODES",
    "references": "REFS",
    "buffers": "BUFFERS",
    "buffer_bytes": "BYTES",
}


def describe(report: dict[str, Any]) -> str:
    """Show a report to a person."""
    place = printable(report["mountpoint"])
    if "error" in report:
        advice = f"; `{program()} -u {quoted(Path(report['mountpoint']))}` takes it away" if report["dead"] else ""
        return f"{place}: {printable(report['error'])}{advice}\n"
    uptime = dt.timedelta(seconds=int(report["uptime"] or 0))
    rate = report["transactions_per_second"]
    lines = [
        f"{place}: served by process {report['pid']} for {uptime}, regions {printable(str(report['region']))}, "
        + ("system calls not filtered, " if report["filter"] is False else "")
        + f"devices {printable(' '.join(report['devices'] or ['?']))}, "
        + (f"{report['transactions']} transactions" if rate is None else f"{rate} transactions/s")
    ]
    clients = report["clients"]
    columns = []
    for key, head in _COLUMNS.items():
        cells = [head, *(printable(str(client[key])) for client in clients)]
        width = max(map(len, cells))
        columns.append([f"{cell:<{width}}" if key in ("name", "context") else f"{cell:>{width}}" for cell in cells])
    lines += ["  " + "  ".join(row) for row in zip(*columns, strict=True)] if clients else ["  no clients"]
    return "\n".join(lines) + "\n"
