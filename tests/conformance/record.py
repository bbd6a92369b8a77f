"""Plays scenarios on the real driver and writes its results into them.

    python -m tests.conformance.record [--check] [FILE...]

Without files: all. A scenario is played three times, once with two processors, and kept only if every play gave the
same: what differs depends on time, not on the driver. With --check nothing is written; exit 1 where a recorded
result is no longer the real driver's.
"""
# ruff: noqa: T201 - a command that prints

import argparse
import difflib
import re
import sys
from collections import defaultdict
from pathlib import Path

from tests.conformance.building import SCENARIOS, find_oracle
from tests.conformance.oracle import boot_options, judge

_JUDGE = re.compile(r"\A# judged by .*\n")
_RESULT = re.compile(r"^ *\|.*\n", re.MULTILINE)
_PLAYS = (1, 1, 2)  # processors


def without_results(text: str) -> str:
    """Return the scenario alone, as its author wrote it."""
    return _RESULT.sub("", _JUDGE.sub("", text))


def record(files: list[Path], oracle: Path, *, check: bool) -> int:
    """Record, or check, the files; return how many could not be, or differ."""
    bad = 0
    groups: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for file in files:
        groups[boot_options(file.read_text())].append(file)
    for group in groups.values():
        texts = [without_results(file.read_text()) for file in group]
        plays = [judge(oracle, texts, processors=processors) for processors in _PLAYS]
        for number, file in enumerate(group):
            results = {play.transcripts[number] for play in plays}
            text = f"# judged by {plays[0].kernel}\n{plays[0].transcripts[number]}"
            if without_results(text).rstrip() != texts[number].rstrip():
                print(f"{file}: not played to its end")
                bad += 1
            elif len(results) > 1:
                print(f"{file}: differs from play to play")
                one, other, *_ = sorted(results)
                print("".join(difflib.unified_diff(one.splitlines(keepends=True), other.splitlines(keepends=True))))
                bad += 1
            elif file.read_text() != text:
                print(f"{file}: {'differs' if check else 'recorded'}")
                bad += check
                if not check:
                    file.write_text(text)
    return bad


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("file", nargs="*", type=Path)
    arguments = parser.parse_args()
    oracle = find_oracle()
    if oracle is None:
        print("record: skipped: no run-oracle ($BINDER_ORACLE), or no qemu-system-x86_64")
        return 0
    files = arguments.file or sorted(SCENARIOS.rglob("*.scenario"))
    bad = record(files, oracle, check=arguments.check)
    print(f"{len(files)} scenarios, {bad} {'differ' if arguments.check else 'not recorded'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
