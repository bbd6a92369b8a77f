"""Threads that do jobs: as many as there are jobs under way, up to a limit, and none while there is nothing to do.

Theory of operation
-------------------
A job may be stuck, for as long as a client likes, if it touches that client's memory. So it is on **accounts**: of a
client, of a user. No account has more than its share of threads; a job that would be one too many is set aside with
that account, and let in when one of its jobs ends. So whoever is stuck in all the threads of his share waits for
himself, while others go on. Jobs that touch nobody's memory are on no account, and better in a pool of their own: then
they need not even wait for the many shares of many users.

Invariants
----------
- `_running[account]` counts the jobs let in, waiting for a thread or in one, that are on the account; it is never above
  the share that they came with.
- A job that is set aside is so with one account, which was full when it was looked at last; each job that ends lets in
  as many as it made room for.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, TypeAlias

from binderfs_fuse import complaints

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    Account: TypeAlias = tuple[Hashable, int]
    """Who, and how many threads at a time."""
    _Job: TypeAlias = tuple[tuple[Account, ...], Callable[..., object], tuple[Any, ...]]

_PATIENCE = 10.0
"""Seconds that a thread waits for another job."""


class Pool:
    """At most `most` threads, which `start` starts: it is called with what a thread is to run."""

    def __init__(self, most: int, start: Callable[[Callable[[], None]], None]) -> None:
        self.most = most
        self._start = start
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._threads = 0
        self._idle = 0
        self._running: Counter[Hashable] = Counter()
        self._aside: dict[Hashable, deque[_Job]] = {}
        self._stopping = False

    def post(self, job: Callable[..., object], *arguments: Any, accounts: tuple[Account, ...] = ()) -> None:
        """Have a thread call `job`; never waits."""
        with self._changed:
            if not self._let_in((accounts, job, arguments)):
                return
            self._changed.notify()
            if len(self._jobs) <= self._idle or self._threads >= self.most or self._stopping:
                return
            self._threads += 1
        self._start(self._work)

    def stop(self) -> None:
        """Let the threads end when there are no more jobs."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def do_one(self) -> bool:
        """Do the next job here and now, if there is one; tell whether there was."""
        with self._changed:
            if not self._jobs:
                return False
            accounts, job, arguments = self._jobs.popleft()
        try:
            job(*arguments)
        except Exception:  # noqa: BLE001 - the thread is for all jobs
            complaints.mistake("a worker's job failed")
        finally:
            self._end(accounts)
        return True

    def _let_in(self, entry: _Job) -> bool:
        for who, share in entry[0]:
            if self._running[who] >= share:
                self._aside.setdefault(who, deque()).append(entry)
                return False
        self._running.update(who for who, _ in entry[0])
        self._jobs.append(entry)
        return True

    def _end(self, accounts: tuple[Account, ...]) -> None:
        with self._changed:
            for who, _ in accounts:
                self._running[who] -= 1
                if not self._running[who]:
                    del self._running[who]
                aside = self._aside.get(who)
                if aside is not None:
                    entry = aside.popleft()
                    if not aside:
                        del self._aside[who]
                    # The thread that ends this job takes it, or one that waits.
                    if self._let_in(entry):
                        self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs and not self._stopping:
                    self._idle += 1
                    self._changed.wait(_PATIENCE)
                    self._idle -= 1
                if not self._jobs:
                    self._threads -= 1
                    return
            self.do_one()
