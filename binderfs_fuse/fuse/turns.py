"""Long steps, one slice at a time.

Theory of operation
-------------------
A step whose work is long yields `Turn` after each slice of about 100 us (engine/effects.py). Its call leaves the thread
that drove it, and waits here. One worker does one slice after the other, only while there are any. The users take
turns, and so do the calls of one user. So a user with many long calls delays mainly its own.

A slice holds the engine's lock and, where it is compiled, the interpreter too. Neither is fair: a thread that gives one
back and takes it again at once gets it before those that wait. So the worker sleeps before each slice, without either.
It sleeps again if requests were served meanwhile, a few times at most (`lib.channel_give_way`). So all others wait for
at most one slice each time, and a long step gets a slice a millisecond or more, however busy the mount is.

Steps that ask for nothing but turns are driven by threads that wait for their end. Each goes through a `Passage`: the
worker lets it do a slice, and waits until that is done.

Invariants
----------
- At most one slice is under way, in the worker's thread or in that of a passage. A slice touches no client's memory and
  makes no system call that a client can delay: whatever else a step asks for is done by another thread.
- The worker has a thread of its own. Were it one of many, those could all be waiting for it.
- `_guard` is held for moments, never while a slice runs, and never together with the engine's lock.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    Slice: TypeAlias = tuple[Callable[..., object], Any]


class Turns:
    """Slices that wait; `post` has a worker call something, `give_way` sleeps as said above.

    `alone` says that there is one thread, and so nobody to wait for in a passage.
    """

    def __init__(self, post: Callable[..., object], give_way: Callable[[], object]) -> None:
        self._post = post
        self._give_way = give_way
        self._guard = threading.Lock()
        self._waiting: OrderedDict[int, deque[Slice]] = OrderedDict()
        self._running = False
        self.alone = False

    def __len__(self) -> int:
        """Return how many slices wait."""
        with self._guard:
            return sum(len(slices) for slices in self._waiting.values())

    def put(self, user: int, job: Callable[..., object], argument: Any) -> None:
        """Have `job(argument)` called, a slice of a step of `user`, when its turn comes; never waits."""
        with self._guard:
            self._waiting.setdefault(user, deque()).append((job, argument))
            if self._running:
                return
            self._running = True
        self._post(self._run)

    def _take(self) -> Slice | None:
        with self._guard:
            if not self._waiting:
                self._running = False
                return None
            user, slices = self._waiting.popitem(last=False)
            taken = slices.popleft()
            if slices:
                self._waiting[user] = slices
            return taken

    def _run(self) -> None:
        while True:
            self._give_way()
            taken = self._take()
            if taken is None:
                return
            job, argument = taken
            try:
                job(argument)
            except Exception:
                # The pool says what went wrong; the others go on.
                self._post(self._run)
                raise


class Passage:
    """The way of one thread through a step of `user` that asks for nothing but turns."""

    def __init__(self, turns: Turns, user: int) -> None:
        self._turns = turns
        self._user = user
        self._slice: threading.Lock | None = None

    def wait(self) -> None:
        """End the slice that was let in, if any, and wait for the next one; the engine is not locked."""
        self.leave()
        if self._turns.alone:
            return
        admitted, done = threading.Lock(), threading.Lock()
        admitted.acquire()
        done.acquire()
        self._turns.put(self._user, self._admit, (admitted, done))
        admitted.acquire()
        self._slice = done

    def leave(self) -> None:
        """End the slice, the last one; without one, do nothing."""
        if self._slice is not None:
            self._slice.release()
            self._slice = None

    @staticmethod
    def _admit(locks: tuple[threading.Lock, threading.Lock]) -> None:
        admitted, done = locks
        admitted.release()
        done.acquire()
