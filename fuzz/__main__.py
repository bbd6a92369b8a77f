"""Runs the fuzzers: ``python -m fuzz [engine|channel|keeper ...] [--seconds N]``.

Each target runs in a process of its own, under atheris (libFuzzer for Python: `make fuzz` installs it), from the kept
corpus. atheris sees nothing of C. With ``--blind``, which needs no atheris, kept inputs are changed at random instead:
so the C parts are tried under sanitizers (`make sanitize`).

What is found new goes to a folder outside of the checkout. An input that breaks something is left there as
``TARGET-crash-...``, and ``python -m fuzz engine --play FILE`` plays it again. ``--keep FOLDER``, with
BINDERFS_FUSE_UNCOMPILED in the environment, adds to the kept corpus what is worth it in such a folder.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

HERE: Final = Path(__file__).parent
TARGETS: Final = {"engine": "fuzz.world", "channel": "fuzz.mount", "keeper": "fuzz.keeper"}
"""What can be fuzzed, and the module whose `run` takes the bytes."""
MAX_LENGTH: Final = 2048


def corpus(target: str) -> Path:
    """Return the folder of a target's kept inputs."""
    return HERE / "corpus" / target


def player(target: str) -> Callable[[bytes], None]:
    """Return what plays one input."""
    run: Callable[[bytes], None] = importlib.import_module(TARGETS[target]).run
    return run


def fuzz(target: str, arguments: list[str]) -> None:
    """Hand this process over to libFuzzer."""
    import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore] # noqa: PLC0415 - optional

    # First, so that atheris finds what this finds: the source of what is compiled.
    import binderfs_fuse  # noqa: F401, PLC0415

    with atheris.instrument_imports(include=["binderfs_fuse"]):
        run = player(target)
    atheris.Setup([sys.argv[0], *arguments], run)
    atheris.Fuzz()


def _changed(data: bytes, kept: list[bytes], chance: random.Random) -> bytes:
    """Return an input like this one."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 2, 4, 16))):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            changed[at : at + 1] = chance.randbytes(1)
        elif kind == 1:
            changed[at:at] = chance.randbytes(chance.randrange(1, 33))
        elif kind == 2:
            del changed[at : at + chance.randrange(1, 33)]
        else:
            other = chance.choice(kept)
            changed[at:] = other[chance.randrange(len(other) + 1) :]
    return bytes(changed[:MAX_LENGTH])


def walk(target: str, seconds: int, artifact: Path) -> None:
    """Play kept inputs, changed at random, for so long; `artifact` has the current one, should the process die."""
    run = player(target)
    kept = [file.read_bytes() for file in sorted(corpus(target).iterdir())] or [b""]
    chance = random.Random()
    played = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = _changed(chance.choice(kept), kept, chance) if played >= len(kept) else kept[played]
        artifact.write_bytes(data)
        run(data)
        played += 1
    artifact.unlink(missing_ok=True)
    print(f"stat::number_of_executed_units: {played}")


def keep(target: str, folder: Path) -> None:
    """Add to the kept inputs those of a folder that make code go ways that it went by none before, shortest first."""
    import coverage  # noqa: PLC0415 - takes its time

    run = player(target)
    gone: set[tuple[str, int, int]] = set()

    def goes_anew(data: bytes) -> bool:
        measured = coverage.Coverage(data_file=None, branch=True, source=["binderfs_fuse"])
        with measured.collect():
            run(data)
        found = measured.get_data()
        arcs = {(file, *arc) for file in found.measured_files() for arc in found.arcs(file) or ()}
        new = arcs - gone
        gone.update(new)
        return bool(new)

    kept = corpus(target)
    kept.mkdir(parents=True, exist_ok=True)
    for file in sorted(kept.iterdir()):
        goes_anew(file.read_bytes())
    for file in sorted(folder.iterdir(), key=lambda file: (file.stat().st_size, file.name)):
        data = file.read_bytes()
        if goes_anew(data):
            (kept / file.name[:16]).write_bytes(data)


def _start(target: str, seconds: int, work: Path, *, blind: bool) -> subprocess.Popen[str]:
    if blind:
        options = [target, "--walk", str(seconds), str(work / f"{target}-crash")]
        return subprocess.Popen(
            [sys.executable, "-m", "fuzz", *options],
            cwd=HERE.parent,
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
    found = work / target
    found.mkdir(parents=True)
    corpus(target).mkdir(parents=True, exist_ok=True)
    folders = [str(found), str(corpus(target))]
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_LENGTH}",
        "-print_final_stats=1",
        "-timeout=20",
        "-len_control=0",
    ]
    options += [f"-artifact_prefix={work}/{target}-", "-rss_limit_mb=1024"]
    return subprocess.Popen(
        [sys.executable, "-m", "fuzz", target, "--inside", *options, *folders],
        cwd=HERE.parent,
        # Compiled code has no coverage to guide by.
        env={**os.environ, "BINDERFS_FUSE_UNCOMPILED": "1"},
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )


def main() -> int:
    """Run what the command line says; the status is 1 if anything broke."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=600, help="how long (600)")
    parser.add_argument("--work", type=Path, help="where new inputs and crashes go (a new folder in /tmp)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="take over what is worth it of what was found")
    parser.add_argument("--play", type=Path, metavar="FILE", help="play one input, and no more")
    parser.add_argument("--blind", action="store_true", help="change kept inputs at random, without atheris")
    parsed = parser.parse_args()
    targets = parsed.targets or list(TARGETS)
    if parsed.play:
        player(targets[0])(parsed.play.read_bytes())
        return 0
    if parsed.keep:
        keep(targets[0], parsed.keep)
        return 0
    work = parsed.work or Path(tempfile.mkdtemp(prefix="binderfs-fuzz-"))
    status = 0
    for target in targets:
        began = time.monotonic()
        process = _start(target, parsed.seconds, work, blind=parsed.blind)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if "Traceback" in line or "ERROR" in line or "stat::number" in line:
                print(f"{target}: {lines[-1]}", flush=True)
        if process.wait():
            status = 1
            print("\n".join(lines[-40:]))
        print(f"{target}: {'BROKEN' if process.returncode else 'fine'} after {time.monotonic() - began:.0f} s; {work}")
    return status


if __name__ == "__main__":
    if "--inside" in sys.argv:
        fuzz(sys.argv[1], sys.argv[3:])
    elif "--walk" in sys.argv:
        walk(sys.argv[1], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        sys.exit(main())
