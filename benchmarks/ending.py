"""How long it takes until clients know that their server was killed: `python -m benchmarks.ending`.

Theory of operation
-------------------
Some clients wait: a third each in a read, in poll(2), and for the answer to a call. Then the server is killed by
SIGKILL. The kernel ends the connection of FUSE when the server's last thread is gone, and each client gets an error.
All times are by one clock, from just before the signal is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from benchmarks.bystanders import mounted, started
from benchmarks.systems import MOUNT_COMMAND

_CLIENT: Final = 3001
# So long may it take until a client that has said that it waits does, on a busy machine.
_SETTLING_SECONDS: Final = 0.5


def measure(command: Path, clients: int) -> tuple[float, float]:
    """Kill a server with so many clients waiting; return after how many ms the first and the last of them knew."""
    with mounted(command) as mount, started(mount, "binder", _CLIENT, "waiters", str(clients)) as crowd:
        if crowd.line() != "ready":
            raise RuntimeError("the clients did not start")
        time.sleep(_SETTLING_SECONDS)
        killed = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        mount.process.kill()
        found = json.loads(crowd.line())
    return (found["first_ns"] - killed) / 1e6, (found["last_ns"] - killed) / 1e6


def main() -> int:
    """Print when the first and the last client knew, each time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ending", description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=90, help="how many clients wait (%(default)s)")
    parser.add_argument("--times", type=int, default=10, help="how many servers are killed (%(default)s)")
    parser.add_argument("--mount", type=Path, default=MOUNT_COMMAND, metavar="FILE", help="the mount.py to measure")
    arguments = parser.parse_args()
    if os.geteuid():
        print("ending: mounting for others takes root", file=sys.stderr)
        return 1
    print("| clients | first ms | last ms |\n|--:|--:|--:|")
    for _ in range(arguments.times):
        try:
            first, last = measure(arguments.mount, arguments.clients)
        except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"ending: {error}", file=sys.stderr)
            return 1
        print(f"| {arguments.clients} | {first:.1f} | {last:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
