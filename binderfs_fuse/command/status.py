"""``mount.py status [MOUNTPOINT] [--json]``: what is mounted, who serves it, and who uses it."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse.command.program import program, say
from binderfs_fuse.command.servers import ask, information, whole_at
from binderfs_fuse.command.snapshot import Process, parse_calls, parse_state
from binderfs_fuse.fuse import mounting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from binderfs_fuse.fuse.mounting import Mount


# A day.
_LONGEST: Final = 86400


def status(arguments: Sequence[str]) -> int:
    """Print the status of one mount, or of all; return 1 where one of them has no server. Raises `MountError`."""
    parser = argparse.ArgumentParser(prog=f"{program()} status", description="Show what is mounted, and who uses it.")
    parser.add_argument("mountpoint", nargs="?", type=Path, metavar="MOUNTPOINT", help="only this one")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--interval", type=_seconds, default=0.5, metavar="SECONDS", help="how long to count transactions (0.5)"
    )
    parsed = parser.parse_args(arguments)
    wanted = whole_at(parsed.mountpoint) if parsed.mountpoint else None
    # A mount may be seen at several places; the last one tells.
    mounts = {
        mount.device: mount
        for mount in mounting.mounts()
        if mount.is_ours and mount.shows_root and wanted in (None, mount.mountpoint)
    }
    reports = collect(list(mounts.values()), parsed.interval)
    if parsed.json:
        say(json.dumps(reports, indent=2) + "\n")
    elif not reports:
        say("nothing is mounted\n")
    else:
        say("\n".join(map(describe, reports)))
    return int(any("error" in report for report in reports))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= _LONGEST:
        raise argparse.ArgumentTypeError(f"invalid number of seconds: {text!r}")
    return value


def collect(mounts: Sequence[Mount], interval: float) -> list[dict[str, Any]]:
    """Ask the server of each mount; one that does not answer has an ``error`` instead."""
    began = time.monotonic()
    reports = [_ask(mount) for mount in mounts]
    if interval > 0 and any("calls" in report for report in reports):
        time.sleep(max(0.0, began + interval - time.monotonic()))
    for report in reports:
        before, when = report.pop("calls", (0, 0.0))
        if "error" in report:
            continue
        report["transactions"] = before
        report["transactions_per_second"] = None
        if interval > 0:
            try:
                now = parse_calls(os.fsdecode(ask(Path(report["mountpoint"]), "stats")))
            except OSError:
                continue
            report["transactions"] = now
            report["transactions_per_second"] = round((now - before) / (time.monotonic() - when), 1)
    return reports


def _ask(mount: Mount) -> dict[str, Any]:
    report: dict[str, Any] = {"mountpoint": str(mount.mountpoint), "source": mount.source}
    try:
        said = information(mount.mountpoint)
        calls = parse_calls(os.fsdecode(ask(mount.mountpoint, "stats")))
        report["calls"] = calls, time.monotonic()
        state = os.fsdecode(ask(mount.mountpoint, "state"))
    except OSError as error:
        report["error"] = error.strerror or str(error)
        return report
    # A server may be of an older version than this.
    report |= {key: said.get(key) for key in ("pid", "version", "uptime", "region", "max", "stats", "devices")}
    report["clients"] = [_client(process) for process in parse_state(state, said.get("managers", ()))]
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
    if "error" in report:
        place = report["mountpoint"]
        return f"{place}: no answer ({report['error']}); `{program()} -u {place}` takes it away\n"
    uptime = dt.timedelta(seconds=int(report["uptime"]))
    rate = report["transactions_per_second"]
    lines = [
        f"{report['mountpoint']}: served by process {report['pid']} for {uptime}, regions {report['region']}, "
        f"devices {' '.join(report['devices'] or ['?'])}, "
        + (f"{report['transactions']} transactions" if rate is None else f"{rate} transactions/s")
    ]
    clients = report["clients"]
    columns = []
    for key, head in _COLUMNS.items():
        cells = [head, *(str(client[key]) for client in clients)]
        width = max(map(len, cells))
        columns.append([f"{cell:<{width}}" if key in ("name", "context") else f"{cell:>{width}}" for cell in cells])
    lines += ["  " + "  ".join(row) for row in zip(*columns, strict=True)] if clients else ["  no clients"]
    return "\n".join(lines) + "\n"
