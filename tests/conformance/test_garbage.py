"""What scenarios leave for Python's collector, which a server runs seldom: nothing."""

from __future__ import annotations

import gc
from collections import Counter
from typing import TYPE_CHECKING

from tests.conformance import engine_player
from tests.conformance.building import SCENARIOS
from tests.conformance.engine_player import World
from tests.conformance.test_replay import reason

if TYPE_CHECKING:
    import pytest

    from binderfs_fuse.engine import Engine

FILES = [file for file in sorted(SCENARIOS.rglob("*.scenario")) if not reason(file, "(?:may )?differs? on FUSE")]


def test_processes_that_are_gone_leave_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each scenario all that its processes had is freed at once, while the engine stays."""
    engines: list[Engine] = []

    class Kept(World):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            engines.append(self.engine)

    monkeypatch.setattr(engine_player, "World", Kept)
    left: Counter[str] = Counter()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for file in FILES:
            engine_player.play(file.read_text())
            while engines[0].freed:
                engines[0].freed.pop().forget()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            gc.set_debug(0)
            left.update(type(found).__name__ for found in gc.garbage if type(found).__module__.startswith("binderfs"))
            gc.garbage.clear()
            engines.clear()
            gc.collect()
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.unfreeze()

    assert {} == left
