"""The arithmetic of shares: who may take one more of what there are only so many of.

Theory of operation
-------------------
A client can hold up a thread of the server for as long as it likes. Fixed limits of each user add up to anything: where
one is half of all threads, two users have them all. So a share shrinks with what is used. A user may take one more only
while it holds less than what is still free. One user gets to a half that way, two get to a third each, and k users
always leave one share of k + 1 to the next. Many users can still use up all of that. Therefore a *reserve* is kept
back, for users that hold nothing: it gives each of them one. The numbers are in limits.py.

Invariants
----------
- `used` is the sum of what users hold, and never above `total` where `has_room` was asked first.
- A user that holds nothing is in no table.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable


class Shares:
    """What users hold of `total` things, of which `reserve` are only for those who hold none."""

    def __init__(self, total: int, reserve: int) -> None:
        self.total = total
        self.reserve = reserve
        self.used = 0
        self.held: Counter[Hashable] = Counter()

    @property
    def free(self) -> int:
        """How many there still are beyond the reserve; less than 0 where some of that is used."""
        return self.total - self.reserve - self.used

    def is_exhausted(self, who: Hashable) -> bool:
        """Tell whether a user has what it may have, beside the reserve: as much as there still is, or more."""
        return self.held[who] >= self.free

    def has_room(self, who: Hashable) -> bool:
        """Tell whether a user may take one more."""
        mine = self.held[who]
        return mine < self.free or (not mine and self.used < self.total)

    def take(self, who: Hashable) -> None:
        """Give one to a user."""
        self.held[who] += 1
        self.used += 1

    def give_back(self, who: Hashable) -> None:
        """Take one back."""
        self.used -= 1
        self.held[who] -= 1
        if not self.held[who]:
            del self.held[who]
