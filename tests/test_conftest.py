"""The suite's own watchdogs bite."""

import logging
from pathlib import Path

from tests.conftest import LogWatch, mounts_below


def _logged(watch: LogWatch, level: int, text: str) -> None:
    watch.handle(logging.LogRecord("binderfs_fuse.x", level, "", 0, text, None, None))


def test_an_unannounced_warning_is_a_complaint() -> None:
    """A line that no pattern announced is handed back as it was logged."""
    watch = LogWatch()
    watch.expect("region")
    _logged(watch, logging.WARNING, "no passthrough: region from the page cache")
    _logged(watch, logging.ERROR, "lost a reply")

    assert ["ERROR: lost a reply"] == watch.complaints()


def test_an_announced_line_that_never_comes_is_a_complaint() -> None:
    """A test cannot announce what does not happen."""
    watch = LogWatch()
    watch.expect("region")

    assert ["never logged: region"] == watch.complaints()


def test_mounts_are_found_below_a_folder_only() -> None:
    """The root holds every mount, ``/proc`` among them; an ordinary folder holds none."""
    assert "/proc" in mounts_below(Path("/"))
    assert [] == mounts_below(Path(__file__).parent)
