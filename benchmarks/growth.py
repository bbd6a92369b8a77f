"""What becomes of a call, and of the server's memory, as there is more and more of everything.

A point of a curve is the latency of a 4-byte call while N idle processes, nodes and so on are there, all on one CPU,
where the figures are steadiest. The points of a curve are measured in turn, several times over. A curve is flat when
its last point is not more than 15 % above its first one.
"""

from __future__ import annotations

import statistics
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.calls import Placement
    from benchmarks.systems import Figures, Mounted

FLAT: Final = 1.15
IDLE: Final = (10, 100, 1000)


@dataclass(frozen=True)
class Curve:
    """`options` of client.c with {n} for the number; `figure` is what is drawn, per item where `each` is set."""

    title: str
    unit: str
    options: str
    points: tuple[int, ...]
    figure: str = "p50_us"
    each: bool = False
    rounds: int = 3


_CALL: Final = "call,size=4,seconds=0.3"
CURVES: Final = (
    Curve("call, with idle processes", "processes", _CALL + ",idle={n}", (1, 10, 100, 1000)),
    Curve("opening, one after the other", "processes", _CALL + ",idle={n}", (10, 100, 1000), "idle_us", each=True),
    Curve("opening, all at once", "processes", _CALL + ",together=1,idle={n}", (10, 100, 300), "idle_us", each=True),
    Curve("call, with nodes and references", "nodes", _CALL + ",nodes={n}", (100, 1000, 10_000, 100_000), rounds=1),
    Curve("taking a node", "nodes", _CALL + ",nodes={n}", (100, 1000, 10_000, 100_000), "take_us", each=True, rounds=1),
    Curve("call, with live buffers", "buffers", _CALL + ",buffers={n}", (100, 1000, 10_000)),
    Curve(
        "call that leaves a live buffer", "buffers", _CALL + ",buffers={n}", (100, 1000, 10_000), "take_us", each=True
    ),
    Curve("call, with death notifications", "notifications", _CALL + ",deaths=1,nodes={n}", (100, 1000, 10_000)),
    Curve(
        "a death notification",
        "notifications",
        _CALL + ",deaths=1,nodes={n}",
        (100, 1000, 10_000),
        "deaths_us",
        each=True,
    ),
)

Points = dict[str, dict[int, float]]
"""By title of the curve and number: microseconds."""


def run(system: Mounted, placement: Placement, say: Callable[[str], None]) -> Points:
    """Measure every curve; one of which a point fails is left out. Curves of the same measurements share them."""
    if placement.server is not None:
        system.pin({placement.server})
    found: dict[str, list[Figures]] = {}
    points: Points = {}
    for curve in CURVES:
        say(f"growth: {curve.title}")
        specifications = {n: curve.options.format(n=n) + placement.options() for n in curve.points}
        try:
            for _ in range(curve.rounds):
                for specification in specifications.values():
                    if len(found.setdefault(specification, [])) < curve.rounds:
                        found[specification] += system.measure([specification])
        except subprocess.CalledProcessError as error:
            say(f"growth: {curve.title}: {error}")
            continue
        points[curve.title] = {
            n: statistics.median(figures[curve.figure] for figures in found[specification]) / (n if curve.each else 1)
            for n, specification in specifications.items()
        }
    return points


def rise(points: dict[int, float]) -> float:
    """Return the last point of a curve over its first."""
    return points[max(points)] / points[min(points)]


def memory(system: Mounted) -> dict[int, float]:
    """Return, by number of idle processes that have the device open and mapped, a fresh server's bytes for each."""
    with system.holding("hold"):
        before = system.memory()
    found = {}
    for n in IDLE:
        with system.holding(f"hold,idle={n}"):
            found[n] = (system.memory() - before) / n
    return found
