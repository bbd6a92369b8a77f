"""The measuring itself: client.c runs on the floor, and the report says what the figures say."""

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import calls, engine, report, systems

needs_mount = pytest.mark.skipif(
    not os.access("/dev/fuse", os.W_OK) or os.geteuid() != 0, reason="mounting needs root and /dev/fuse"
)


@needs_mount
@pytest.mark.parametrize(
    "measurement", [m.options for m in calls.MEASUREMENTS if m.floor_has_it], ids=lambda options: options
)
def test_client_on_the_floor(measurement: str) -> None:
    """Every kind of call arrives and is answered; client.c compares what was sent with what the service received."""
    with systems.floor() as floor:
        (figures,) = floor.measure([measurement + ",seconds=5,calls=20,warmup=5,burst=10"])

    pairs = next(m.pairs for m in calls.MEASUREMENTS if m.options == measurement)

    assert 20 * pairs == figures["calls"]
    assert 0 < figures["p50_us"] <= figures["p99_us"] <= figures["max_us"]


@needs_mount
def test_memory_is_held() -> None:
    """Idle processes are there while they are held."""
    with systems.floor() as floor:
        before = floor.memory()
        with floor.holding("hold,idle=50"):
            during = floor.memory()

    assert during > before


def test_engine_alone() -> None:
    """A synchronous call is three steps: the caller's, the reply's and the service's next wait; a one-way call two."""
    figures = engine.measure(0.01)
    steps = {title: round(figure["steps_per_second"] / figure["calls_per_second"]) for title, figure in figures.items()}

    assert {
        "call of 4 bytes": 3,
        "call of 4 KiB": 3,
        "call with an object": 3,
        "one-way call": 2,
    } == steps


def results(mount_us: float, floor_us: float) -> calls.Results:
    """Make the results of two rounds, the second twice as slow as the first on both systems."""

    def rounds(us: float) -> list[dict[str, Any]]:
        return [{"p50_us": us * n, "p99_us": us * n * 2, "max_us": us * n * 9, "rate": 1e6 / us / n} for n in (1, 2)]

    titles = [measurement.title for measurement in calls.MEASUREMENTS]
    return {
        placement.name: {
            "mount": {title: rounds(mount_us) for title in titles},
            "floor": {title: rounds(floor_us) for title in titles},
        }
        for placement in calls.placements()
    }


def test_ratio_is_taken_within_rounds() -> None:
    """A slow round slows both systems, and does not change their ratio."""
    found = calls.ratio(results(45.0, 30.0), "unpinned", "call of 4 bytes")

    assert found == pytest.approx(1.5)


@pytest.mark.parametrize(("mount_us", "met"), [(35.0, True), (46.0, False)])
def test_targets(mount_us: float, met: bool) -> None:
    """A target is met when every placement is within its bound."""
    (target, *_) = report.targets(report.Report(results=results(mount_us, 30.0)))

    assert ("call of 4 bytes, over the floor", met) == (target.title, target.met)


def test_report_without_figures() -> None:
    """What was not measured is said to be that, and is neither met nor missed."""
    targets = report.targets(report.Report())

    assert {("not measured", None)} == {(target.figure, target.met) for target in targets}


def test_report_in_a_document(tmp_path: Path) -> None:
    """A document's figures are replaced, and the text around them is not."""
    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n")
    report.write_into(document, "new")

    assert document.read_text() == "before\n<!-- figures -->\n\nnew\n\n<!-- end of figures -->\nafter\n"


def test_tables() -> None:
    """The report has a table for each placement, in Markdown, and every line of a table is equally long."""
    text = report.as_markdown(report.Report(results=results(35.0, 30.0)))
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]

    assert 2 * len(calls.placements()) + 1 == len(tables)
    assert all(len({len(line) for line in lines}) == 1 for lines in tables)
