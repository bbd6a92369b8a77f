"""Turns the bytes that a fuzzer gives into decisions, so that similar bytes make similar runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

EXTREMES: Final = tuple(
    sorted(
        {
            (base + delta) & 0xFFFF_FFFF_FFFF_FFFF
            for base in (0, 8, 4096, 1 << 31, 1 << 32, 1 << 63, 1 << 64)
            for delta in (-8, -1, 0, 1, 4)
        }
    )
)
"""Numbers at which arithmetic in 31, 32, 63 or 64 bits goes wrong, or nearly."""


class Choices:
    """Decisions read from `data`, a byte each where that is enough; zeros when it is used up."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        """Tell whether there is something left to decide by."""
        return self._position < len(self._data)

    def below(self, limit: int) -> int:
        """Return a number from 0 to `limit` - 1, which is at most 255."""
        if self._position >= len(self._data):
            return 0
        value = self._data[self._position]
        self._position += 1
        return value % limit

    def rarely(self, one_in: int) -> bool:
        """Say yes about once in so many times; never without data."""
        return self.below(one_in) == one_in - 1

    def pick(self, options: Sequence[T]) -> T:
        """Return one of at most 255 options."""
        return options[self.below(len(options))]

    def bytes(self, size: int) -> bytes:
        """Return so many bytes."""
        start = self._position
        self._position += size
        return self._data[start : start + size].ljust(size, b"\0")

    def number(self, *usual: int) -> int:
        """Return one of the usual numbers, a small one, an extreme one, or any of 64 bits."""
        kind = self.below(64)
        if kind < 56 and usual:
            return usual[kind % len(usual)]
        if kind < 60:
            return self.below(32)
        if kind < 63:
            return self.pick(EXTREMES)
        return int.from_bytes(self.bytes(8), "little")
