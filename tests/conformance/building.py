"""Where the parts of the suite are, and the player built from its sources."""

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
SCENARIOS = HERE / "scenarios"

_FLAGS = ["-O1", "-Wall", "-Wextra", "-D_GNU_SOURCE", "-pthread", "-fno-strict-aliasing", "-static"]


def build_player() -> Path:
    """Compile the player, unless one newer than its sources is there, and return its path."""
    player = CHECKOUT / "build" / "conformance-player"
    sources = sorted((HERE / "player").glob("*.c"))
    parts = [*sources, HERE / "player" / "player.h", CHECKOUT / "uapi" / "binder.h"]
    if player.exists() and player.stat().st_mtime > max(part.stat().st_mtime for part in parts):
        return player
    player.parent.mkdir(exist_ok=True)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *_FLAGS, f"-I{CHECKOUT / 'uapi'}", "-o", player, *sources], check=True)
    return player


def find_oracle() -> Path | None:
    """`run-oracle`, the real driver in an emulator; None where that, or the emulator, is not installed."""
    named = os.environ.get("BINDER_ORACLE")
    oracle = Path(named) if named else CHECKOUT.parent / "shared" / "oracle" / "run-oracle"
    if not os.access(oracle, os.X_OK) or not shutil.which("qemu-system-x86_64"):
        return None
    return oracle
