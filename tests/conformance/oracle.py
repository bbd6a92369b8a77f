"""Plays with the player in C: on the real driver, many scenarios in one boot of the emulator, or on a mount."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.building import build_player

_TITLE = re.compile(r"^=== (\d+)\n", re.MULTILINE)


@dataclass(frozen=True)
class Judgement:
    """What the real driver made of a batch: a transcript for each scenario, in order, and the kernel's name."""

    transcripts: list[str]
    kernel: str


def _transcripts(output: str, count: int) -> list[str]:
    """Take the output of a player's list apart; "" for a scenario that was not reached."""
    parts = _TITLE.split(output)
    found = {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True)}
    return [found.get(number, "") for number in range(count)]


def _lay_out(scenarios: Sequence[str], directory: Path) -> None:
    """Write scenarios as files, and the player's list of them."""
    for number, scenario in enumerate(scenarios):
        (directory / str(number)).write_text(scenario)
    (directory / "list").write_text("".join(f"{number}\n" for number in range(len(scenarios))))


def play_on_mount(mount: Path, scenarios: Sequence[str]) -> list[str]:
    """Play the scenarios on a mounted binderfs; their transcripts."""
    with tempfile.TemporaryDirectory() as name:
        _lay_out(scenarios, Path(name))
        done = subprocess.run(
            [build_player(), "-d", mount, "@list"],
            cwd=name,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    return _transcripts(done.stdout, len(scenarios))


def boot_options(scenario: str) -> tuple[str, ...]:
    """What a scenario's `# boot:` line wants added to the kernel's command line."""
    match = re.search(r"^# boot: (.*)$", scenario, re.MULTILINE)
    return tuple(match[1].split()) if match else ()


def judge(oracle: Path, scenarios: Sequence[str], *, processors: int = 1, seconds: int = 600) -> Judgement:
    """Play the scenarios, all with the same boot options, in one boot.

    A play that ended early (the emulator's time was up, or the kernel's) leaves transcripts that are cut or empty.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shutil.copy(build_player(), directory / "player")
        _lay_out(scenarios, directory)
        command = [str(oracle), "--timeout", str(seconds), "--smp", str(processors)]
        for option in boot_options(scenarios[0]):
            command += ["--append", option]
        command += ["--dir", name, "sh", "-c", "uname -rs; ./player @list"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 125 or not done.stdout:
        raise RuntimeError(f"the oracle failed: {done.stderr.strip()}")
    kernel, _, output = done.stdout.partition("\n")
    return Judgement(_transcripts(output, len(scenarios)), kernel)
