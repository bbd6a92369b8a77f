"""Waiting for many descriptors at once, without ever spinning on one.

poll(2) tells at once, and for ever, of a peer that is gone; and of one that has something to say until that is taken. A
handler that overlooks either makes a process spin. So each handler says whether it took something. A descriptor that
has hung up, or that was ready `PATIENCE` times in a row with nothing to take, is dropped, and its owner is told.

Invariant: between two wake-ups in which something is taken there are at most `PATIENCE` for each descriptor.
"""

from __future__ import annotations

import select
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE: Final = 16
"""Wake-ups in a row by a descriptor from which nothing can be taken."""


@dataclass(slots=True)
class _Watch:
    take: Callable[[], bool]
    gone: Callable[[], object]
    idle: int = 0


class Loop:
    """A poll(2) whose descriptors each have a handler. `idle` counts handlers that were called for nothing."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._watches: dict[int, _Watch] = {}
        self.idle = 0

    def add(self, descriptor: int, take: Callable[[], bool], gone: Callable[[], object]) -> None:
        """Call `take` when there is something to read, and `gone`, once, when there never will be.

        `take` says whether it took something; it may `drop` its own descriptor, and any other. `gone` is called after
        the descriptor has been dropped.
        """
        self._watches[descriptor] = _Watch(take, gone)
        self._poll.register(descriptor, select.POLLIN)

    def drop(self, descriptor: int) -> None:
        """Forget a descriptor, before it is closed; one that is not there is none to forget."""
        if self._watches.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    def turn(self, seconds: float | None = None) -> None:
        """Wait until a descriptor is ready, or for so long; then call the handlers of all that are."""
        events = self._poll.poll(None if seconds is None else max(0.0, seconds) * 1000)
        ready = [(descriptor, what, self._watches[descriptor]) for descriptor, what in events]
        for descriptor, what, watch in ready:
            # Another one's handler may have dropped it, and its number may be another descriptor's by now.
            if self._watches.get(descriptor) is not watch:
                continue
            if what & select.POLLIN:
                if watch.take():
                    watch.idle = 0
                    continue
                self.idle += 1
                watch.idle += 1
                if watch.idle < PATIENCE:
                    continue
            if self._watches.get(descriptor) is watch:
                self.drop(descriptor)
                watch.gone()
