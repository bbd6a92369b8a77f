"""A map in the order of its integer keys: find, add, remove, and step to the next or previous in O(log n).

Theory of operation
-------------------
The driver keeps nodes, threads and refs in red-black trees, by numbers that clients choose. Here they are in a treap:
a binary search tree that is also a heap of random priorities. These keep it balanced, whatever the keys are. A hash
table would not do: it has no order, it is moved as a whole when it grows, and a client that chooses its keys can make
each look-up a walk.

A walk that gives turns keeps its last key, and goes on with `after` or `before` it. Whatever is added or removed
meanwhile, it meets no entry twice, and leaves none out that stays.

Invariants
----------
- Keys to the left of an entry are smaller than its own, keys to its right are larger.
- No entry has a larger priority than the one that it hangs on.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, final

if TYPE_CHECKING:
    from collections.abc import Iterator

V = TypeVar("V")

# Seeded by the system, and never shown: no client can tell what shape a tree takes.
_random_bits: Final = random.Random().getrandbits  # noqa: S311 - no secret is made of it
_PRIORITY_BITS: Final = 30


@final
class _Entry:
    """A key with its value; `left` and `right` are the subtrees of smaller and larger keys."""

    __slots__ = ("key", "left", "priority", "right", "value")

    def __init__(self, key: int, value: Any, priority: int) -> None:
        self.key = key
        self.value = value
        self.priority = priority
        self.left: _Entry | None = None
        self.right: _Entry | None = None


@final
class SortedMap(Generic[V]):
    """Values by integer keys of any size."""

    __slots__ = ("_root", "count")

    def __init__(self) -> None:
        self._root: _Entry | None = None
        self.count = 0

    def get(self, key: int) -> V | None:
        """The value of a key, or None."""
        place = self._root
        while place is not None:
            if key < place.key:
                place = place.left
            elif key == place.key:
                value: V = place.value
                return value
            else:
                place = place.right
        return None

    def after(self, key: int) -> V | None:
        """The value of the smallest key that is larger, or None."""
        best: _Entry | None = None
        place = self._root
        while place is not None:
            if key < place.key:
                best = place
                place = place.left
            else:
                place = place.right
        return None if best is None else best.value

    def before(self, key: int) -> V | None:
        """The value of the largest key that is smaller, or None."""
        best: _Entry | None = None
        place = self._root
        while place is not None:
            if place.key < key:
                best = place
                place = place.right
            else:
                place = place.left
        return None if best is None else best.value

    def first(self) -> V | None:
        """The value of the smallest key, or None."""
        place = self._root
        if place is None:
            return None
        while place.left is not None:
            place = place.left
        value: V = place.value
        return value

    def last(self) -> V | None:
        """The value of the largest key, or None."""
        place = self._root
        if place is None:
            return None
        while place.right is not None:
            place = place.right
        value: V = place.value
        return value

    def add(self, key: int, value: V) -> None:
        """Add a key that is not there."""
        self.count += 1
        entry = _Entry(key, value, _random_bits(_PRIORITY_BITS))
        above: _Entry | None = None
        place = self._root
        while place is not None and place.priority >= entry.priority:
            above = place
            place = place.left if key < place.key else place.right
        self._hang(above, key, entry)
        # What was there is split: smaller keys go to the left of the new entry, larger ones to its right. `smaller` and
        # `larger` are the entries whose right and left sides are open.
        smaller: _Entry | None = None
        larger: _Entry | None = None
        while place is not None:
            if place.key < key:
                if smaller is None:
                    entry.left = place
                else:
                    smaller.right = place
                smaller = place
                place = place.right
            else:
                if larger is None:
                    entry.right = place
                else:
                    larger.left = place
                larger = place
                place = place.left
        if smaller is not None:
            smaller.right = None
        if larger is not None:
            larger.left = None

    def remove(self, key: int) -> None:
        """Remove a key that is there."""
        above: _Entry | None = None
        place = self._root
        while place is not None and place.key != key:
            above = place
            place = place.left if key < place.key else place.right
        assert place is not None  # the caller knows that it is there
        self.count -= 1
        # The two sides are merged into its place, the larger priority on top.
        left = place.left
        right = place.right
        while left is not None and right is not None:
            if left.priority >= right.priority:
                self._hang(above, key, left)
                above = left
                left = left.right
            else:
                self._hang(above, key, right)
                above = right
                right = right.left
        self._hang(above, key, right if left is None else left)

    def _hang(self, above: _Entry | None, key: int, entry: _Entry | None) -> None:
        """Hang a subtree on the side of `above` where `key` belongs; on top where `above` is None."""
        if above is None:
            self._root = entry
        elif key < above.key:
            above.left = entry
        else:
            above.right = entry

    def __getitem__(self, key: int) -> V:
        """The value of a key. Raises KeyError."""
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __contains__(self, key: int) -> bool:
        """Whether there is this key."""
        return self.get(key) is not None

    def __len__(self) -> int:
        """How many there are."""
        return self.count

    def __iter__(self) -> Iterator[int]:
        """All keys, the smallest first; for whoever need not give turns."""
        for entry in self._entries():
            yield entry.key

    def values(self) -> Iterator[V]:
        """All values in the order of their keys."""
        for entry in self._entries():
            yield entry.value

    def items(self) -> Iterator[tuple[int, V]]:
        """All keys with their values, in order."""
        for entry in self._entries():
            yield entry.key, entry.value

    def _entries(self) -> list[_Entry]:
        entries: list[_Entry] = []
        stack: list[_Entry] = []
        place = self._root
        while stack or place is not None:
            while place is not None:
                stack.append(place)
                place = place.left
            place = stack.pop()
            entries.append(place)
            place = place.right
        return entries
