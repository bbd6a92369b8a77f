"""What holds for every test: nothing unexpected is logged, and nothing stays mounted."""

import contextlib
import logging
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# In this process the package is its Python source, which coverage can follow and tests can take apart; the servers and
# commands that tests start are what users start, compiled.
os.environ["BINDERFS_FUSE_UNCOMPILED"] = "1"
# A nice value is handed on by every call, and shown: what is expected are those of processes that nobody made nice.
with contextlib.suppress(PermissionError):
    os.setpriority(os.PRIO_PROCESS, 0, 0)
# Shells start what they put into the background with SIGINT ignored, nohup all with SIGHUP: a shell that a test starts
# cannot undo that.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)
from binderfs_fuse import complaints  # noqa: E402 - while the variable is set

del os.environ["BINDERFS_FUSE_UNCOMPILED"]


class LogWatch(logging.Handler):
    """Collects the package's warnings and worse, and knows which of them the test announced."""

    def __init__(self) -> None:
        """Expect nothing."""
        super().__init__(logging.WARNING)
        self._expected: list[re.Pattern[str]] = []
        self._allowed: list[re.Pattern[str]] = []
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record as one line."""
        self._lines.append(f"{record.levelname}: {record.getMessage()}")

    def expect(self, pattern: str) -> None:
        """Announce that lines in which the regular expression is found will be logged, at least one."""
        self._expected.append(re.compile(pattern))

    def allow(self, pattern: str) -> None:
        """Announce that such lines may be logged, or may not: it depends on a race."""
        self._allowed.append(re.compile(pattern))

    def complaints(self) -> list[str]:
        """Return what was logged unannounced, and what was announced and never logged."""
        known = self._expected + self._allowed
        unannounced = [line for line in self._lines if not any(pattern.search(line) for pattern in known)]
        missing = [
            f"never logged: {pattern.pattern}"
            for pattern in self._expected
            if not any(pattern.search(line) for line in self._lines)
        ]
        return unannounced + missing


@pytest.fixture(autouse=True)
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[LogWatch]:
    """Fail the test when the package logs a warning or worse that ``logs.expect()`` did not announce."""
    # What was logged for one test leaves no line out of another's.
    monkeypatch.setattr(complaints, "_complaints", complaints.Complaints(complaints._log.log))
    watch = LogWatch()
    logger = logging.getLogger("binderfs_fuse")
    logger.addHandler(watch)
    yield watch
    logger.removeHandler(watch)

    assert [] == watch.complaints()


def mounts_below(folder: Path) -> list[str]:
    """Return the mount points in and below a folder, the innermost first."""
    points = [line.split(" ")[4] for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]]
    # mountinfo writes blanks and backslashes as octal escapes.
    points = [re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), point) for point in points]
    return sorted((point for point in points if Path(point).is_relative_to(folder)), reverse=True)


@pytest.fixture(autouse=True)
def _no_mounts_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the test when it leaves something mounted below pytest's folder, and unmount that for the next one."""
    yield
    left = mounts_below(tmp_path_factory.getbasetemp().resolve())
    for point in left:
        subprocess.run(["umount", "--lazy", point], check=False)

    assert [] == left
