"""Threads that do jobs: as many as there are jobs under way, up to a limit, and none while there is nothing to do.

Theory of operation
-------------------
A job may be stuck, for as long as a client likes, if it touches that client's memory. So it is on **accounts**: of a
client, with a fixed limit, and of a user, with a share that shrinks with what all users have (quotas.py). A job that
would be one too many is set aside, and let in when another job ends. So a user that is stuck in all the threads of its
share waits for itself, while others go on. Jobs that touch nobody's memory are on no account, and better in a pool of
their own: then they need not even wait for the many shares of many users.

Invariants
----------
- `_running[account]` counts the jobs let in, waiting for a thread or in one, that are on the account; it is never above
  the limit that they came with. `shares` counts the same for users.
- A job that is set aside is so with one account, or with its user, which had no room when that was looked at last.
  A job that ends lets in one job of each of its accounts and one of a user's, as far as there is room now.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, Any, TypeAlias

from binderfs_fuse import complaints
from binderfs_fuse.quotas import Shares

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    Account: TypeAlias = tuple[Hashable, int]
    """Who, and how many threads at a time."""
    _Job: TypeAlias = tuple[tuple[Account, ...], Hashable, Callable[..., object], tuple[Any, ...]]

_PATIENCE = 10.0
"""Seconds that a thread waits for another job."""


class Pool:
    """At most `most` threads, which `start` starts: it is called with what a thread is to run.

    `reserve` of them are only for users that have none.
    """

    def __init__(self, most: int, start: Callable[[Callable[[], None]], None], reserve: int = 0) -> None:
        self.most = most
        self.shares = Shares(most, reserve)
        self._start = start
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._threads = 0
        self._idle = 0
        self._running: Counter[Hashable] = Counter()
        self._aside: dict[Hashable, deque[_Job]] = {}
        self._users_aside: OrderedDict[Hashable, deque[_Job]] = OrderedDict()
        self._stopping = False

    def post(
        self, job: Callable[..., object], *arguments: Any, accounts: tuple[Account, ...] = (), user: Hashable = None
    ) -> None:
        """Have a thread call `job`, on these accounts and that of `user`, if it is not None; never waits."""
        with self._changed:
            if not self._let_in((accounts, user, job, arguments)):
                return
            self._changed.notify()
            if len(self._jobs) <= self._idle or self._threads >= self.most or self._stopping:
                return
            self._threads += 1
        self._start(self._work)

    @property
    def aside(self) -> int:
        """How many jobs are set aside."""
        with self._changed:
            return sum(map(len, self._aside.values())) + sum(map(len, self._users_aside.values()))

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
            accounts, user, job, arguments = self._jobs.popleft()
        try:
            job(*arguments)
        except Exception:  # noqa: BLE001 - the thread is for all jobs
            complaints.mistake("a worker's job failed")
        finally:
            self._end(accounts, user)
        return True

    def _let_in(self, entry: _Job) -> bool:
        for who, share in entry[0]:
            if self._running[who] >= share:
                self._aside.setdefault(who, deque()).append(entry)
                return False
        user = entry[1]
        if user is not None:
            # Its jobs that came before go before.
            if user in self._users_aside or not self.shares.has_room(user):
                self._users_aside.setdefault(user, deque()).append(entry)
                return False
            self.shares.take(user)
        self._running.update(who for who, _ in entry[0])
        self._jobs.append(entry)
        return True

    def _end(self, accounts: tuple[Account, ...], user: Hashable) -> None:
        with self._changed:
            for who, _ in accounts:
                self._running[who] -= 1
                if not self._running[who]:
                    del self._running[who]
            if user is not None:
                self.shares.give_back(user)
            let_in = sum(self._let_in_one(who) for who, _ in accounts)
            if user is not None:
                let_in += self._let_in_one_user()
            # The thread that ends this job takes one, and those that wait the others.
            self._changed.notify(let_in)
            more = min(len(self._jobs) - 1 - self._idle, self.most - self._threads)
            if more <= 0 or self._stopping:
                return
            self._threads += more
        for _ in range(more):
            self._start(self._work)

    def _let_in_one(self, who: Hashable) -> bool:
        """Let in a job that was set aside with an account, which has room for one."""
        aside = self._aside.get(who)
        if aside is None:
            return False
        entry = aside.popleft()
        if not aside:
            del self._aside[who]
        return self._let_in(entry)

    def _let_in_one_user(self) -> bool:
        """Let in a job of the next user that has room for one.

        A user without room holds something, so that no more are passed over than there are threads.
        """
        for _ in range(len(self._users_aside)):
            if self.shares.used >= self.shares.total:
                break
            user, aside = self._users_aside.popitem(last=False)
            if not self.shares.has_room(user):
                self._users_aside[user] = aside
                continue
            entry = aside.popleft()
            # Its turn comes again after those of others.
            let_in = self._let_in(entry)
            if aside:
                aside.extend(self._users_aside.pop(user, ()))
                self._users_aside[user] = aside
            if let_in:
                return True
        return False

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
