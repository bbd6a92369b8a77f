"""Python's collector of garbage, which a server runs itself.

Theory of operation
-------------------
Python frees an object when nobody holds it any more. Objects that hold each other take a collector, which walks through
all that there are, while nothing else runs: 75 ms where a client has 16,384 objects, and seconds at the limits. Python
runs it by itself, whenever enough has been made. A client could have all others wait for it.

So it is off. The engine leaves no objects that hold each other (`tests/conformance/test_garbage.py`). What other code
leaves, as an exception that holds the code that caught it, is little. It is collected after some work, and only while
clients hold so little that it takes no longer than a slice of a long step, or some of them.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from binderfs_fuse.engine.context import Engine

_OFTEN: Final = 1024
_FEW: Final = 4096


def take_over() -> None:
    """Have Python run no collector by itself, nor a later one look at what there is by now."""
    gc.collect()
    gc.freeze()
    gc.disable()


class Collector:
    """Has garbage collected at times, where clients hold few objects, by `post`, which has a thread call something."""

    def __init__(self, engine: Engine, post: Callable[[Callable[[], object]], object]) -> None:
        self._engine = engine
        self._post = post
        self._count = 0

    def count(self) -> None:
        """Count something done that may have left garbage, and have it collected if that has been done often."""
        self._count += 1
        if self._count >= _OFTEN and self._engine.quota.objects.held < _FEW:
            self._count = 0
            self._post(gc.collect)
