"""Plays generated scenarios on the real driver and here, and keeps what comes out differently.

    python -m tests.conformance [--count N] [--seed S] [--region KIND]... [--batch B] [--keep DIRECTORY]

They are played on the engine alone, and on a mount with each --region, passthrough or pagecache.

What differs from play to play on the real driver itself is left out. A difference is shrunk and written as a recorded
scenario (with the real driver's results) to scenarios/found, which the ordinary tests then play. Exit 1 when there are
any.
"""
# ruff: noqa: T201 - a command that prints

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conformance.building import SCENARIOS, find_oracle
from tests.conformance.differences import Difference, compare, play_on_engine, shrink
from tests.conformance.generate import scenarios
from tests.conformance.oracle import judge, play_on_mount
from tests.mounts import mount_py

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.conformance.differences import Play


def keep(oracle: Path, difference: Difference, directory: Path) -> None:
    """Write a difference as a recorded scenario, and say it."""
    name = hashlib.sha256(difference.scenario.encode()).hexdigest()[:8]
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{name}.scenario"
    file.write_text(f"# judged by {judge(oracle, [difference.scenario]).kernel}\n{difference.expected}")
    print(f"--- {file}")
    lines = difflib.unified_diff(
        difference.expected.splitlines(), difference.actual.splitlines(), "driver", "here", lineterm="", n=1000
    )
    print("\n".join(lines))


@contextlib.contextmanager
def mounted(region: str) -> Iterator[Path]:
    """Mount a binderfs for as long as it is wanted."""
    with tempfile.TemporaryDirectory(prefix="conformance-") as name:
        path = Path(name) / "mount"
        path.mkdir()
        # The label is that of recorded scenarios which need one.
        done = mount_py(path, "-o", f"log={name}/log,region={region},secctx=kernel")
        if done.returncode:
            raise SystemExit(done.stderr)
        try:
            yield path
        finally:
            mount_py("-u", path)


def play_all(oracle: Path, plays: Sequence[Play], arguments: argparse.Namespace) -> int:
    """Play as many as was asked for, and keep what differs; 1 if there is any, else 0."""
    played = kept = unsteady = 0
    began = time.monotonic()
    while played < arguments.count:
        size = min(arguments.batch, arguments.count - played)
        batch = scenarios(size, arguments.seed + played)
        comparison = compare(oracle, batch, plays, times=3)
        unsteady += comparison.unsteady
        for difference in comparison.differences:
            keep(oracle, shrink(oracle, difference), arguments.keep)
            kept += 1
        played += len(batch)
        seconds = time.monotonic() - began
        print(f"{played} scenarios, {kept} differences, {unsteady} left out, {seconds:.0f} s", flush=True)
    return 1 if kept else 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--region", choices=["passthrough", "pagecache"], action="append", default=[])
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--keep", type=Path, default=SCENARIOS / "found")
    arguments = parser.parse_args()
    oracle = find_oracle()
    if oracle is None:
        print("conformance: skipped: no run-oracle ($BINDER_ORACLE), or no qemu-system-x86_64")
        return 0
    with contextlib.ExitStack() as mounts:
        paths = [mounts.enter_context(mounted(region)) for region in arguments.region]
        plays: list[Play] = [play_on_engine, *(partial(play_on_mount, path) for path in paths)]
        return play_all(oracle, plays, arguments)


if __name__ == "__main__":
    sys.exit(main())
