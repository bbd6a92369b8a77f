"""Counts the elements that the engine touches while it holds its lock.

Theory of operation
-------------------
Time says little on a busy machine, so work is counted. One part is each line of the engine that is executed, as the
interpreter traces it. The other is each element that is passed over inside of the interpreter, where no line shows.
Those are seen in two places. Functions that loop in C (`sorted`, `min`, `list` and so on) are shadowed in the engine's
modules by ones that count. Lists, dicts and deques that the engine's objects hold are exchanged for subclasses that
count what walks them: iteration, slices, searches, insertions in the middle, copies.

A `Meter` drives a step and keeps the largest count between two of its yields.

What it does not see: that memory is freed, that a hash table grows, and bytes that are copied.
"""

from __future__ import annotations

import builtins
import gc
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import binderfs_fuse.engine
from binderfs_fuse.engine import Outcome
from binderfs_fuse.engine.effects import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType
    from typing import Self

_ENGINE: Final = str(Path(binderfs_fuse.engine.__file__).parent)
# So many slices of a step are counted, and then one of so many.
_COUNTED: Final = 32
_SELDOM: Final = 61
_SHADOWED: Final = (
    "all", "any", "dict", "enumerate", "filter", "frozenset", "list", "map", "max", "min", "reversed", "set", "sorted",
    "sum", "tuple", "zip",
)  # fmt: skip


class _Count:
    """Elements touched so far."""

    def __init__(self) -> None:
        self.touched = 0


_count: Final = _Count()


def _passed(elements: Iterable[Any]) -> Iterator[Any]:
    for element in elements:
        _count.touched += 1
        yield element


class _List(list):  # type: ignore[type-arg]
    """A list that counts what walks it."""

    def __iter__(self) -> Iterator[Any]:
        return _passed(super().__iter__())

    def __reversed__(self) -> Iterator[Any]:
        return _passed(super().__reversed__())

    def __contains__(self, key: object) -> bool:
        _count.touched += len(self)
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            _count.touched += len(range(*key.indices(len(self))))
        return super().__getitem__(key)

    def __delitem__(self, key: Any) -> None:
        start = key.indices(len(self))[0] if isinstance(key, slice) else key % len(self)
        _count.touched += len(self) - start
        super().__delitem__(key)

    def insert(self, index: Any, element: Any) -> None:
        _count.touched += len(self) - index
        super().insert(index, element)

    def _walks(self, name: str, *arguments: Any) -> Any:
        _count.touched += len(self)
        return getattr(super(), name)(*arguments)

    def remove(self, element: Any) -> None:
        self._walks("remove", element)

    def index(self, *arguments: Any) -> int:
        return self._walks("index", *arguments)  # type: ignore[no-any-return]

    def count(self, element: Any) -> int:
        return self._walks("count", element)  # type: ignore[no-any-return]

    def copy(self) -> list[Any]:
        return self._walks("copy")  # type: ignore[no-any-return]

    def clear(self) -> None:
        self._walks("clear")

    def pop(self, index: Any = -1) -> Any:
        _count.touched += 1 if index == -1 else len(self) - index
        return super().pop(index)


class _Deque(deque):  # type: ignore[type-arg]
    """A deque that counts what walks it."""

    def __iter__(self) -> Iterator[Any]:
        return _passed(super().__iter__())

    def __reversed__(self) -> Iterator[Any]:
        return _passed(super().__reversed__())

    def __contains__(self, key: object) -> bool:
        _count.touched += len(self)
        return super().__contains__(key)

    def remove(self, element: Any) -> None:
        _count.touched += self.index(element) + 1
        super().remove(element)


class _Dict(dict):  # type: ignore[type-arg]
    """A dict that counts what walks it."""

    def __iter__(self) -> Iterator[Any]:
        return _passed(super().__iter__())

    def __reversed__(self) -> Iterator[Any]:
        return _passed(super().__reversed__())

    def values(self) -> Any:
        return _passed(super().values())

    def items(self) -> Any:
        return _passed(super().items())

    def keys(self) -> Any:
        return _passed(super().keys())

    def copy(self) -> dict[Any, Any]:
        _count.touched += len(self)
        return super().copy()

    def clear(self) -> None:
        _count.touched += len(self)
        super().clear()


_COUNTING: Final[dict[type, Callable[[Any], Any]]] = {
    list: _List,
    dict: _Dict,
    deque: lambda items: _Deque(items, items.maxlen),
}


def _shadow(name: str) -> Callable[..., Any]:
    """Make a function that does the same, and counts what it takes from its arguments that are iterated over."""
    function = getattr(builtins, name)

    def counting(*arguments: Any, **options: Any) -> Any:
        if name == "reversed":
            return _passed(function(*arguments))
        return function(*(_passed(each) if hasattr(each, "__iter__") else each for each in arguments), **options)

    return counting


class Meter:
    """Within it, the engine's work is counted: `most` is what was touched between two yields, at most."""

    def __init__(self) -> None:
        self.most = 0
        self._shadows = {name: _shadow(name) for name in _SHADOWED}

    def __enter__(self) -> Self:
        """Shadow what loops in C."""
        for module in self._modules():
            vars(module).update(self._shadows)
        return self

    def __exit__(self, *_: object) -> None:
        """Let the engine have the interpreter's own again."""
        for module in self._modules():
            for name in _SHADOWED:
                del vars(module)[name]

    @staticmethod
    def _modules() -> list[Any]:
        prefix = binderfs_fuse.engine.__name__ + "."
        return [
            module
            for name, module in sys.modules.items()
            if name.startswith(prefix) and not name.endswith(".invariants")
        ]

    def instrument(self) -> None:
        """Exchange the containers that the engine's objects hold now; each is exchanged in all places."""
        exchanged: dict[int, Any] = {}
        kept = []
        for thing in gc.get_objects():
            kind = type(thing)
            if not kind.__module__.startswith(binderfs_fuse.engine.__name__):
                continue
            slots = [name for each in kind.__mro__ for name in getattr(each, "__slots__", ())]
            for name in [*slots, *getattr(thing, "__dict__", ())]:
                value: Any = getattr(thing, name, None)
                make = _COUNTING.get(type(value))
                if make is not None and len(value) > 1:
                    if id(value) not in exchanged:
                        exchanged[id(value)] = make(value)
                        kept.append(value)
                    setattr(thing, name, exchanged[id(value)])

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call something of the engine's, and count as between two yields."""
        _count.touched = 0
        before = sys.gettrace()
        sys.settrace(_begin)
        try:
            return function(*arguments)
        finally:
            sys.settrace(before)
            self.most = max(self.most, _count.touched)

    def drive(self, step: Any, perform: Callable[[Any], Any] | None = None) -> Outcome | None:
        """Drive a step to its outcome; what it asks for is done by `perform`, uncounted.

        Of very many slices the first are counted, and then one of a few: a walk is the same all along.
        """
        answer: Any = None
        slices = 0
        while True:
            counted = slices < _COUNTED or not slices % _SELDOM
            effect = self.run(step.send, answer) if counted else step.send(answer)
            slices += 1
            if isinstance(effect, Outcome):
                return effect
            if isinstance(effect, Turn):
                answer = None
                continue
            assert perform is not None
            answer = perform(effect)

    def read(self, pieces: Iterator[str]) -> None:
        """Read a log as far as its pieces are counted."""
        for _ in range(_COUNTED):
            if self.run(next, pieces, None) is None:
                return


def _begin(frame: FrameType, event: str, argument: object) -> Any:
    del event, argument
    return _line if frame.f_code.co_filename.startswith(_ENGINE) else None


def _line(frame: FrameType, event: str, argument: object) -> Any:
    del frame, argument
    if event == "line":
        _count.touched += 1
    return _line
