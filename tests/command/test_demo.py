"""The programs of `examples/`: what they say on the mount is what they say on the real driver."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
EXAMPLES = CHECKOUT / "examples"
MOUNT = CHECKOUT / "mount.py"
# What the real driver made of them (Linux 7.3, see tests/conformance); `test_transcript` holds it against the driver.
TRANSCRIPT = HERE / "demo-transcript.txt"

needs_mount = pytest.mark.skipif(
    not os.access("/dev/fuse", os.W_OK) or os.geteuid() != 0, reason="mounting needs root and /dev/fuse"
)


def normalized(output: str) -> str:
    """Replace what differs from run to run: pids by letters in order of appearance, times and pointers by signs."""
    letters: dict[str, str] = {}

    def letter(match: re.Match[str]) -> str:
        return re.sub(r"\d+", lambda pid: letters.setdefault(pid[0], chr(ord("A") + len(letters))), match[0])

    output = re.sub(r"elapsed \d+ms", "elapsed TIME", output)
    output = re.sub(r"(transaction \d+:) [0-9a-f]{16}", r"\1 POINTER", output)
    output = re.sub(r"( d) (?!0{16})[0-9a-f]{16}", r"\1 POINTER", output)
    return re.sub(
        r"by process \d+|^proc \d+|^  thread \d+|(?<=from )\d+:\d+ to \d+:\d+|(?<= proc )[\d ]+$",
        letter,
        output,
        flags=re.MULTILINE,
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the compiled programs and the script that runs them."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("service_manager", "service", "client"):
        flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-static"]
        subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", folder / name, EXAMPLES / f"{name}.c"], check=True)
    shutil.copy(EXAMPLES / "run.sh", folder)
    return folder


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """Return the binder device of a mount."""
    mountpoint = tmp_path / "binderfs"
    mountpoint.mkdir()
    subprocess.run([MOUNT, mountpoint], check=True, timeout=30)
    yield mountpoint / "binder"
    subprocess.run([MOUNT, "-u", mountpoint], check=True, timeout=30)


@needs_mount
def test_same_as_the_driver(programs: Path, device: Path) -> None:
    """On the mount every program receives what it receives from the real driver, and the state file says the same."""
    done = subprocess.run([programs / "run.sh", device], capture_output=True, text=True, timeout=60, check=False)

    assert (TRANSCRIPT.read_text(), "", 0) == (normalized(done.stdout), done.stderr, done.returncode)


def test_transcript(programs: Path) -> None:
    """The transcript is what the real driver does now."""
    oracle = find_oracle()
    if oracle is None:
        pytest.skip("no run-oracle ($BINDER_ORACLE), or no qemu-system-x86_64: the transcript is taken on trust")
    command: list[str | Path] = [oracle, "--timeout", "60", "--dir", programs, "sh", "run.sh", "/dev/binderfs/binder"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (TRANSCRIPT.read_text(), 0) == (normalized(done.stdout), done.returncode)


@needs_mount
def test_demo(tmp_path: Path) -> None:
    """The demo mounts, shows the state in the middle of a call, unmounts, and leaves nothing behind."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [EXAMPLES / "demo.sh"], capture_output=True, text=True, timeout=60, env=environment, check=False
    )

    assert ("", 0) == (done.stderr, done.returncode)
    assert "incoming transaction" in done.stdout
    assert "the service is dead" in done.stdout
    assert [] == list(tmp_path.iterdir())


@needs_mount
def test_demo_that_fails(tmp_path: Path) -> None:
    """A demo that fails halfway unmounts all the same, and says that it failed."""
    commands = tmp_path / "commands"
    commands.mkdir()
    broken = commands / "timeout"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    folder = tmp_path / "folder"
    folder.mkdir()
    environment = os.environ | {"TMPDIR": str(folder), "PATH": f"{commands}:{os.environ['PATH']}"}
    done = subprocess.run(
        [EXAMPLES / "demo.sh"], capture_output=True, text=True, timeout=60, env=environment, check=False
    )

    assert done.returncode == 3
    assert [] == list(folder.iterdir())


def find_oracle() -> Path | None:
    """Return the oracle's program, or None where it or the emulator is not installed."""
    named = os.environ.get("BINDER_ORACLE")
    oracle = Path(named) if named else CHECKOUT.parent / "shared" / "oracle" / "run-oracle"
    return oracle if os.access(oracle, os.X_OK) and shutil.which("qemu-system-x86_64") else None
