"""Latency and throughput: the same measurements on every system, in turn, several times over, and their medians."""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.systems import Figures, Mounted, Oracle

SIZES: Final = (0, 4, 128, 4096, 65536, 524288)
PAIRS: Final = (1, 2, 4, 16, 64)


@dataclass(frozen=True)
class Placement:
    """Where clients, services and the file system's server may run; None is wherever the scheduler likes."""

    name: str
    clients: int | None = None
    services: int | None = None
    server: int | None = None

    def options(self) -> str:
        """Return what client.c is told of it."""
        pinned = (("client_cpu", self.clients), ("server_cpu", self.services))
        return "".join(f",{option}={cpu}" for option, cpu in pinned if cpu is not None)


def placements() -> list[Placement]:
    """Return unpinned, all on one CPU, and, with two of them, the server on the other one."""
    cpus = sorted(os.sched_getaffinity(0))
    found = [Placement("unpinned"), Placement("one CPU", cpus[0], cpus[0], cpus[0])]
    if len(cpus) > 1:
        found.append(Placement("two CPUs", cpus[0], cpus[0], cpus[1]))
    return found


@dataclass(frozen=True)
class Measurement:
    """A row of the table: what it is called there, and what client.c calls it. Of `pairs` the rate counts."""

    title: str
    options: str
    pairs: int = 1
    floor_has_it: bool = True


LATENCY: Final = tuple(Measurement(f"call of {size} bytes", f"call,size={size}") for size in SIZES)
OTHERS: Final = (
    Measurement("nested call", "nested,size=4"),
    Measurement("call with an object", "call,size=4,objects=1"),
    Measurement("call with a descriptor", "call,size=4,fds=1", floor_has_it=False),
    Measurement("call of a service that polls", "call,size=4,poll=1"),
    Measurement("one-way call", "oneway,size=4"),
)
THROUGHPUT: Final = tuple(Measurement(f"{pairs} pairs", f"call,size=4,pairs={pairs}", pairs) for pairs in PAIRS)
MEASUREMENTS: Final = (*LATENCY, *OTHERS, *THROUGHPUT)

Results = dict[str, dict[str, dict[str, list["Figures"]]]]
"""By placement, system and title: one `Figures` for each round."""


def run(
    systems: Sequence[Mounted], oracle: Oracle | None, *, rounds: int, seconds: float, say: Callable[[str], None]
) -> Results:
    """Measure all, each round on every system and in every placement; `seconds` is for one measurement."""
    results: Results = {}

    def keep(placement: str, system: str, found: list[Figures], measured: Sequence[Measurement]) -> None:
        kept = results.setdefault(placement, {}).setdefault(system, {})
        for measurement, figures in zip(measured, found, strict=True):
            kept.setdefault(measurement.title, []).append(figures)

    everywhere = os.sched_getaffinity(0)
    for number in range(1, rounds + 1):
        for placement in placements():
            for system in systems:
                say(f"round {number} of {rounds}: {system.name}, {placement.name}")
                system.pin(everywhere if placement.server is None else {placement.server})
                measured = [m for m in MEASUREMENTS if m.floor_has_it or system.name != "floor"]
                specifications = [f"{m.options},seconds={seconds}{placement.options()}" for m in measured]
                keep(placement.name, system.name, system.measure(specifications), measured)
                system.pin(everywhere)
        if oracle:
            say(f"round {number} of {rounds}: the real driver, emulated")
            specifications = [f"{m.options},seconds={seconds}" for m in MEASUREMENTS]
            keep("emulated", oracle.name, oracle.measure(specifications), MEASUREMENTS)
    return results


def median(results: Results, placement: str, system: str, title: str, figure: str) -> float | None:
    """Return the median over the rounds; None for what was not measured."""
    rounds = results.get(placement, {}).get(system, {}).get(title)
    return statistics.median(found[figure] for found in rounds) if rounds else None


def ratio(results: Results, placement: str, title: str, figure: str = "p50_us") -> float | None:
    """Return how many times the floor's figure the mount's is: the median of the rounds' ratios.

    A round measures both within seconds, so that what else the machine does then concerns both.
    """
    found = results.get(placement, {})
    mounts, floors = found.get("mount", {}).get(title), found.get("floor", {}).get(title)
    if not mounts or not floors:
        return None
    return statistics.median(float(m[figure]) / float(f[figure]) for m, f in zip(mounts, floors, strict=True))


def complain(text: str) -> None:
    """Say what is going on, beside the report."""
    print(text, file=sys.stderr, flush=True)
