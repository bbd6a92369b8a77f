"""The report: tables in Markdown, the targets, JSON and a plot."""

from __future__ import annotations

import datetime as dt
import importlib
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import calls, growth

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SERVED: Final = ("floor", "mount")
MARKS: Final = ("<!-- figures -->", "<!-- end of figures -->")


@dataclass
class Report:
    """Everything that a run has found; what it left out is empty or None."""

    results: calls.Results = field(default_factory=dict)
    engine: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: growth.Points = field(default_factory=dict)
    memory: dict[int, float] = field(default_factory=dict)
    ready_seconds: float | None = None
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return all of it, the machine and the targets."""
        return {"machine": machine(), **asdict(self), "targets": [asdict(target) for target in targets(self)]}


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    return {
        "processor": f"{len(os.sched_getaffinity(0))} x {model}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


@dataclass(frozen=True)
class Target:
    """One thing that was promised: its bound, the figure and whether that is within it; None: not measured."""

    title: str
    bound: str
    figure: str
    met: bool | None


def _target(
    title: str, bound: str, figures: dict[str, float | None], limit: float, unit: str = "", *, least: bool = False
) -> Target:
    """Hold figures to one limit: a greatest value, or the `least` one. The worst of them decides."""
    known = {name: figure for name, figure in figures.items() if figure is not None}
    if not known:
        return Target(title, bound, "not measured", None)
    text = ", ".join(f"{figure:.3g}{unit}{' ' if name else ''}{name}" for name, figure in known.items())
    met = all(figure >= limit if least else figure <= limit for figure in known.values())
    return Target(title, bound, text, met)


def targets(report: Report) -> list[Target]:
    """Return every target of the project with the figure of this run."""
    results = report.results
    places = [placement.name for placement in calls.placements()]

    def per_place(title: str) -> dict[str, float | None]:
        return {place: calls.ratio(results, place, title) for place in places}

    def ahead() -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for place in places:
            margins = [
                driver / mount
                for measurement in calls.LATENCY
                if (driver := calls.median(results, "emulated", "driver", measurement.title, "p50_us"))
                and (mount := calls.median(results, place, "mount", measurement.title, "p50_us"))
            ]
            found[place] = min(margins) if margins else None
        return found

    def over(numerator: tuple[str, str], denominator: tuple[str, str]) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for place in places:
            above = calls.median(results, place, "mount", *numerator)
            below = calls.median(results, place, "mount", *denominator)
            found[place] = above / below if above and below else None
        return found

    small = "call of 4 bytes"
    return [
        _target("call of 4 bytes, over the floor", "at most 1.5 (hoped for: 1.2)", per_place(small), 1.5),
        _target("call of 512 KiB, over the floor", "at most 1.2", per_place("call of 524288 bytes"), 1.2),
        _target("emulated driver over the mount, worst size", "at least 1.5", ahead(), 1.5, least=True),
        _target(
            "calls a second, 64 pairs over 4",
            "at least 0.85",
            over(("64 pairs", "rate"), ("4 pairs", "rate")),
            0.85,
            least=True,
        ),
        _target("p99 over p50, one pair", "at most 3", over((small, "p99_us"), (small, "p50_us")), 3),
        *(
            _target(
                f"growth: {curve.title}, last point over first",
                "at most 1.15",
                {"": growth.rise(points) if (points := report.curves.get(curve.title)) else None},
                growth.FLAT,
            )
            for curve in growth.CURVES
        ),
        _target(
            "server memory for an idle process",
            "at most 200 KiB",
            {f"of {n}": size / 1024 for n, size in report.memory.items() if n == max(report.memory)},
            200,
            " KiB",
        ),
        _target("mount.py until the device answers", "less than 0.5 s", {"": report.ready_seconds}, 0.5, " s"),
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Lay out a Markdown table: the first columns, as many as are `words`, to the left, figures to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(row[:words], widths, strict=False)]
        padded += [cell.rjust(width) for cell, width in zip(row[words:], widths[words:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = line(["-" * width for width in widths[:words]] + ["-" * (width - 1) + ":" for width in widths[words:]])
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _latency_table(results: calls.Results, place: str) -> str:
    def row(title: str) -> list[str]:
        figures = [calls.median(results, place, system, title, "p50_us") for system in SERVED]
        driver = calls.median(results, "emulated", "driver", title, "p50_us")
        return [
            title,
            *map(_number, figures),
            _number(calls.ratio(results, place, title), 2),
            _number(calls.median(results, place, "mount", title, "p99_us")),
            _number(calls.median(results, place, "mount", title, "max_us"), 0),
            _number(driver),
            _number(driver / figures[1] if driver and figures[1] else None, 2),
        ]

    head = ["µs", "floor p50", "mount p50", "mount / floor", "mount p99", "mount max", "driver p50", "driver / mount"]
    return _table(head, (row(m.title) for m in (*calls.LATENCY, *calls.OTHERS)))


def _throughput_table(results: calls.Results, place: str) -> str:
    def row(title: str) -> list[str]:
        return [
            title,
            *(_number(calls.median(results, place, system, title, "rate"), 0) for system in SERVED),
            _number(calls.ratio(results, place, title, "rate"), 2),
            _number(calls.median(results, "emulated", "driver", title, "rate"), 0),
        ]

    head = ["calls a second", "floor", "mount", "mount / floor", "driver"]
    return _table(head, [*(row(m.title) for m in calls.THROUGHPUT), row("one-way call")])


def as_markdown(report: Report) -> str:
    """Return the whole report."""
    parts = [", ".join(f"{name} {value}" for name, value in machine().items())]
    for place in [placement.name for placement in calls.placements()]:
        if place in report.results:
            parts += [f"### {place}", _latency_table(report.results, place), _throughput_table(report.results, place)]
    if report.engine:
        rows = (
            [
                title,
                f"{figures['us_per_call']:.1f}",
                f"{figures['calls_per_second']:.0f}",
                f"{figures['steps_per_second']:.0f}",
            ]
            for title, figures in report.engine.items()
        )
        parts += ["### The engine alone", _table(["", "µs a call", "calls a second", "steps a second"], rows)]
    if report.curves:
        rows = (
            [title, ", ".join(f"{n}: {us:.1f}" for n, us in points.items()), f"{growth.rise(points):.2f}"]
            for title, points in report.curves.items()
        )
        parts += ["### Growth", _table(["µs", "by number", "last / first"], rows, words=2)]
    if report.memory:
        rows = ([str(n), f"{size / 1024:.1f}"] for n, size in report.memory.items())
        parts += ["### Memory of the server", _table(["idle processes", "KiB each"], rows)]
    met = {True: "met", False: "NOT MET", None: ""}
    rows = ([target.title, target.bound, target.figure, met[target.met]] for target in targets(report))
    parts += ["### Targets", _table(["", "target", "figure", ""], rows, words=4), f"Taken in {report.seconds:.0f} s."]
    return "\n\n".join(parts)


def write_into(document: Path, markdown: str) -> None:
    """Put the report into a document, between its two marks. Raises `ValueError` where those are missing."""
    text = document.read_text()
    begin, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    document.write_text(f"{text[:begin]}\n\n{markdown}\n\n{text[end:]}")


def plot(report: Report, path: Path) -> bool:
    """Draw latency by size, throughput by pairs and the growth curves; false where matplotlib is not installed."""
    try:
        matplotlib_figure: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        return False
    figure = matplotlib_figure.Figure(figsize=(15, 5), layout="constrained")
    latency, throughput, curves = figure.subplots(1, 3)
    lines = [(place, system) for place in report.results for system in report.results[place]]
    styles = dict(zip(report.results, ("-", "--", ":", "-."), strict=False))
    colours = {"floor": "tab:green", "mount": "tab:blue", "driver": "tab:red"}
    for place, system in lines:
        label = f"{system}, {place}"
        look = {"linestyle": styles[place], "color": colours[system], "marker": ".", "label": label}
        sizes = [calls.median(report.results, place, system, m.title, "p50_us") for m in calls.LATENCY]
        latency.plot([max(size, 1) for size in calls.SIZES], sizes, **look)
        rates = [calls.median(report.results, place, system, m.title, "rate") for m in calls.THROUGHPUT]
        throughput.plot(calls.PAIRS, rates, **look)
    for title, points in report.curves.items():
        first = points[min(points)]
        curves.plot(list(points), [us / first for us in points.values()], marker=".", label=title)
    latency.set(title="latency of a call (p50)", xlabel="bytes", ylabel="µs", xscale="log", yscale="log")
    throughput.set(
        title="throughput of 4-byte calls", xlabel="pairs", ylabel="calls a second", xscale="log", ylim=(0, None)
    )
    curves.set(title="growth, over the first point", xlabel="how many", xscale="log", ylim=(0, None))
    for axes in (latency, throughput, curves):
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path)
    return True
