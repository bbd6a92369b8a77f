"""Measure everything and print the report: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import calls, engine, growth, systems
from benchmarks.building import BUILD
from benchmarks.calls import complain
from benchmarks.report import Report, as_markdown, plot, write_into

if TYPE_CHECKING:
    from collections.abc import Callable


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast the mount is.")
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        choices=[*PARTS, []],
        help=f"of {', '.join(PARTS)}; without any, all of them",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each call is measured on each system (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=0.15, help="how long each time (%(default)s)")
    parser.add_argument("--without", action="append", default=[], choices=["floor", "mount", "oracle"])
    parser.add_argument("--output", type=Path, default=BUILD, metavar="FOLDER", help="for JSON and plot (%(default)s)")
    parser.add_argument("--document", type=Path, metavar="FILE", help="write the report into this document as well")
    return parser.parse_args()


def _measure_calls(report: Report, arguments: argparse.Namespace) -> None:
    oracle = None if "oracle" in arguments.without else systems.find_oracle()
    if oracle is None and "oracle" not in arguments.without:
        complain("without the real driver: no run-oracle ($BINDER_ORACLE), or no qemu-system-x86_64")
    with ExitStack() as stack:
        served = [
            stack.enter_context(serve())
            for serve in (systems.floor, systems.mount)
            if serve.__name__ not in arguments.without
        ]
        report.results = calls.run(served, oracle, rounds=arguments.rounds, seconds=arguments.seconds, say=complain)


def _measure_engine(report: Report, _: argparse.Namespace) -> None:
    complain("the engine alone")
    report.engine = engine.measure()


def _measure_growth(report: Report, _: argparse.Namespace) -> None:
    with systems.mount() as mount:
        report.curves = growth.run(mount, calls.placements()[1], complain)
    if len(report.curves) < len(growth.CURVES):
        raise RuntimeError("some curves are missing")


def _measure_memory(report: Report, _: argparse.Namespace) -> None:
    complain("memory for idle processes")
    with systems.mount() as mount:
        report.memory = growth.memory(mount)


def _measure_ready(report: Report, _: argparse.Namespace) -> None:
    complain("how long mounting takes")
    report.ready_seconds = statistics.median(systems.ready_seconds() for _ in range(5))


PARTS: Final[dict[str, Callable[[Report, argparse.Namespace], None]]] = {
    "calls": _measure_calls,
    "engine": _measure_engine,
    "growth": _measure_growth,
    "memory": _measure_memory,
    "ready": _measure_ready,
}


def main() -> int:
    """Measure, print the tables, keep JSON and plot; 1 where something is missing."""
    arguments = _arguments()
    if os.geteuid():
        complain("benchmarks: the floor mounts a file system, which takes root")
        return 1
    report = Report()
    status = 0
    begin = time.monotonic()
    for part in arguments.parts or PARTS:
        try:
            PARTS[part](report, arguments)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            # What the other parts have found is worth keeping.
            complain(f"benchmarks: {part}: {error}")
            status = 1
    report.seconds = time.monotonic() - begin
    print(as_markdown(report))
    if arguments.document:
        write_into(arguments.document, as_markdown(report))
    arguments.output.mkdir(parents=True, exist_ok=True)
    kept = arguments.output / "results.json"
    kept.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    drawing = arguments.output / "results.svg"
    if plot(report, drawing):
        complain(f"kept in {kept} and {drawing}")
    else:
        complain(f"kept in {kept}; no plot without matplotlib (pip install -e '.[bench]')")
    return status


if __name__ == "__main__":
    sys.exit(main())
