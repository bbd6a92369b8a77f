"""Every recorded scenario gives here what it gave on the real driver."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.conformance import engine_player
from tests.conformance.building import SCENARIOS, build_player
from tests.conformance.record import without_results

FILES = sorted(SCENARIOS.rglob("*.scenario"))
NAMES = [str(file.relative_to(SCENARIOS)) for file in FILES]


def judgement(file: Path) -> str:
    """Return what the real driver made of a scenario, without the line that names the driver."""
    text = file.read_text()
    return text[text.index("\n") + 1 :]


def reason(file: Path, key: str) -> str | None:
    """Return the reason that a scenario's `# key: ...` line gives."""
    match = re.search(rf"^# {key}: (.*)$", file.read_text(), re.MULTILINE)
    return match[1] if match else None


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_engine(file: Path, request: pytest.FixtureRequest) -> None:
    """The engine alone gives the real driver's transcript."""
    if why := reason(file, "open"):
        request.applymarker(pytest.mark.xfail(reason=why, strict=True))
    if why := reason(file, "(?:may )?differs? on FUSE"):
        pytest.skip(why)
    expected = judgement(file)

    actual = engine_player.play(without_results(file.read_text()))

    assert expected == actual


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_mount(file: Path, place: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A mount gives the real driver's transcript to real processes, except where FUSE is in the way by its nature."""
    if why := reason(file, "open"):
        request.applymarker(pytest.mark.xfail(reason=why, strict=True))
    if why := reason(file, "may differ on FUSE"):
        pytest.skip(why)
    expected = judgement(file)
    scenario = tmp_path / "scenario"
    scenario.write_text(without_results(file.read_text()))

    played = subprocess.run(
        [build_player(), "-d", place, scenario], capture_output=True, text=True, check=False, timeout=120
    )

    assert "" == played.stderr
    if reason(file, "differs on FUSE"):
        assert expected != played.stdout
    else:
        assert expected == played.stdout
