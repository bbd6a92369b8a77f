"""What bystanders notice of a flood: `python -m benchmarks.bystanders`.

Theory of operation
-------------------
Three bystanders of one user measure how long things take: a client that calls every 0.3 ms, a process that opens a
device every 3 ms, and, as a control, a process that asks another one over a pipe. They run alone, then beside four
processes that only compute, then beside each flood of another user. A busy machine makes everybody slower, so a flood
is held against the four computing processes of the same run, and not against an idle machine. The control is not held
against anything: it never comes near the mount, and shows what any crowd of processes that sleep and wake up does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.building import compile_program
from benchmarks.systems import MOUNT_COMMAND

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTROL: Final = "piper"
BYSTANDERS: Final = ("caller", "opener", CONTROL)
COMPUTING: Final = "compute=4"
FLOODS: Final = (
    "deaths=4096",
    "deaths=16384",
    "freeze=65536",
    "debug=65536",
    "pointers=400",
    "writes=16,65536",
    "state=120",
    "version=390",
    "lines=4",
)
LIMIT: Final = 5.0
"""How many times as long as beside computing processes a bystander may take beside a flood, at the 99th percentile."""
_READY_SECONDS: Final = 120
_ATTACKER: Final = 3000
_BYSTANDER: Final = 3001

Figures = dict[str, Any]
"""What crowd.c says of one bystander: count, p50_us, p99_us, max_us."""


class Mount:
    """A mount that everybody may use, served by `process`."""

    def __init__(self, path: Path, command: Path) -> None:
        self.path = path
        arguments = [sys.executable, str(command), str(path), "-f", "-o", "mode=666,allow_other"]
        self.process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        program = "import os, sys, time\nwhile not os.access(sys.argv[1], os.F_OK): time.sleep(0.01)"
        try:
            subprocess.run([sys.executable, "-c", program, path / "binder"], check=True, timeout=30)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Unmount, and wait for the server's end."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        subprocess.run(["umount", "--lazy", self.path], check=False, stderr=subprocess.DEVNULL)


class Crowd:
    """A running crowd.c, in a process group of its own."""

    def __init__(self, mount: Mount, device: str, uid: int, *action: str) -> None:
        program = compile_program("crowd", static=True)
        command = [program, mount.path / device, mount.path / "binder_logs", str(uid), *action]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def line(self) -> str:
        """Wait for the next line."""
        assert self.process.stdout is not None  # it is a pipe
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        """Let a bystander begin to measure."""
        assert self.process.stdin is not None  # it is a pipe
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """Kill it and its children, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=_READY_SECONDS)


@contextlib.contextmanager
def mounted(command: Path) -> Iterator[Mount]:
    """Mount in a folder of its own, and unmount in the end."""
    with tempfile.TemporaryDirectory(prefix="bench-crowd-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        place = folder / "mount"
        place.mkdir()
        mount = Mount(place, command)
        try:
            yield mount
        finally:
            mount.end()


@contextlib.contextmanager
def started(mount: Mount, device: str, uid: int, *action: str) -> Iterator[Crowd]:
    """Run a crowd.c, and kill it in the end."""
    crowd = Crowd(mount, device, uid, *action)
    try:
        yield crowd
    finally:
        crowd.end()


def measure(command: Path, flood: str, seconds: float) -> dict[str, Figures]:
    """Run the bystanders beside a flood, "NAME=ARGUMENT,...", or beside nothing (""), on a mount of their own."""
    with contextlib.ExitStack() as stack:
        mount = stack.enter_context(mounted(command))
        bystanders = []
        for name in BYSTANDERS:
            crowd = stack.enter_context(started(mount, "hwbinder", _BYSTANDER, name, str(seconds)))
            if crowd.line() != "ready":
                raise RuntimeError(f"the bystander {name} did not start")
            bystanders.append(crowd)
        if flood:
            action, _, arguments = flood.partition("=")
            attacker = stack.enter_context(started(mount, "binder", _ATTACKER, action, *arguments.split(",")))
            if attacker.line() != "ready":
                raise RuntimeError(f"the flood {flood} did not start")
        for crowd in bystanders:
            crowd.go()
        return {name: json.loads(crowd.line()) for name, crowd in zip(BYSTANDERS, bystanders, strict=True)}


def table(results: dict[str, dict[str, Figures]]) -> str:
    """Return the results as a table in Markdown; times in ms, and the ratio of the 99th percentiles to computing."""
    lines = [
        "| beside | bystander | count | p50 ms | p99 ms | max ms | p99 / computing |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    base = results.get(COMPUTING, {})
    for flood, figures in results.items():
        for name, found in figures.items():
            p50, p99, most = (found[key] / 1000 for key in ("p50_us", "p99_us", "max_us"))
            ratio = found["p99_us"] / max(1, base[name]["p99_us"]) if name in base else float("nan")
            beside = flood or "nothing"
            lines.append(f"| {beside} | {name} | {found['count']} | {p50:.2f} | {p99:.2f} | {most:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table; 1 where a bystander waits for more than `LIMIT` times as long as beside computing processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bystanders", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "floods", nargs="*", metavar="FLOOD", help=f"NAME=ARGUMENT,...; {' '.join(FLOODS)} if none is named"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each flood is measured (%(default)s)")
    parser.add_argument("--mount", type=Path, default=MOUNT_COMMAND, metavar="FILE", help="the mount.py to measure")
    arguments = parser.parse_args()
    if os.geteuid():
        print("bystanders: mounting for others takes root", file=sys.stderr)
        return 1
    results: dict[str, dict[str, Figures]] = {}
    status = 0
    for flood in ("", COMPUTING, *(arguments.floods or FLOODS)):
        print(f"beside {flood or 'nothing'}", file=sys.stderr, flush=True)
        try:
            results[flood] = measure(arguments.mount, flood, arguments.seconds)
        except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"bystanders: {flood}: {error}", file=sys.stderr)
            status = 1
    print(table(results))
    base = results.get(COMPUTING, {})
    for flood, figures in results.items():
        for name, found in figures.items():
            if flood and name in base and name != CONTROL and found["p99_us"] > LIMIT * base[name]["p99_us"]:
                print(f"bystanders: {name} beside {flood} is above {LIMIT:g} times", file=sys.stderr)
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
