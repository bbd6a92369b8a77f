"""Pools of threads, with real threads."""

import threading
import weakref
from collections.abc import Iterator

import pytest

from binderfs_fuse.fuse.lane import Clock
from binderfs_fuse.fuse.workers import Pool
from tests.fuse.conftest import until


@pytest.fixture
def threads() -> Iterator[list[threading.Thread]]:
    """Collect the threads of a test's pools, which have ended when it is over."""
    started: list[threading.Thread] = []
    yield started
    for thread in started:
        thread.join(20)
        assert not thread.is_alive()


def pool_of(most: int, threads: list[threading.Thread], reserve: int = 0) -> Pool:
    """Make a pool that starts its threads into this list."""

    def start(work: object) -> None:
        thread = threading.Thread(target=work)  # type: ignore[arg-type]
        threads.append(thread)
        thread.start()

    return Pool(most, start, reserve)


def test_a_job_that_is_stuck_keeps_no_other_waiting(threads: list[threading.Thread]) -> None:
    """There is a thread for each job under way, up to the limit; then a job waits for the first that is free."""
    pool = pool_of(2, threads)
    release, done = threading.Event(), threading.Semaphore(0)
    for _ in range(2):
        pool.post(release.wait)
    pool.post(done.release)
    until(lambda: pool._threads == 2)
    assert not done.acquire(blocking=False)
    release.set()

    assert done.acquire(timeout=20)
    assert 2 == len(threads)
    pool.stop()


def test_nobody_has_more_than_a_share(threads: list[threading.Thread]) -> None:
    """Jobs beyond the share of one of their accounts are set aside, while those of others are done."""
    pool = pool_of(8, threads)
    release, done = threading.Event(), threading.Semaphore(0)
    for client in (1, 1, 1, 2, 2, 2):
        pool.post(release.wait, accounts=((client, 2), ("user", 3)))
    pool.post(done.release, accounts=((3, 2), ("other user", 3)))
    assert done.acquire(timeout=20)
    assert {1: 2, 2: 1, "user": 3} == dict(pool._running)
    release.set()
    until(lambda: not pool._running)

    assert not pool._aside
    pool.stop()


def test_what_was_set_aside_is_done(threads: list[threading.Thread]) -> None:
    """A job that had to wait for one account, and then for another, comes in the end."""
    pool = pool_of(8, threads)
    first, second, done = threading.Event(), threading.Event(), threading.Semaphore(0)
    pool.post(first.wait, accounts=(("a", 1),))
    pool.post(second.wait, accounts=(("b", 1),))
    pool.post(done.release, accounts=(("a", 1), ("b", 1)))
    first.set()
    until(lambda: "a" not in pool._running)
    assert not done.acquire(blocking=False)
    second.set()

    assert done.acquire(timeout=20)
    pool.stop()


def test_users_leave_each_other_shares(threads: list[threading.Thread]) -> None:
    """Two users whose jobs are all stuck leave threads to a third, and the last ones to who has none."""
    pool = pool_of(8, threads, reserve=2)
    release, done = threading.Event(), threading.Semaphore(0)
    for user in (1, 2) * 8:
        pool.post(release.wait, user=user)
    assert {1: 2, 2: 2} == dict(pool.shares.held)
    for user in range(3, 7):
        pool.post(release.wait, user=user)
    pool.post(done.release, user=7)
    assert not done.acquire(blocking=False)
    release.set()

    assert done.acquire(timeout=20)
    until(lambda: not pool.shares.used)
    assert not pool._users_aside
    pool.stop()


def test_users_jobs_that_were_set_aside_are_let_in_in_turn(threads: list[threading.Thread]) -> None:
    """Who has one job set aside need not wait for all those of another user; and each user's stay in order."""
    pool = pool_of(1, threads)
    release = threading.Event()
    order: list[tuple[int, int]] = []
    pool.post(release.wait, user=1)
    for number in range(10):
        pool.post(order.append, (2, number), user=2)
    pool.post(order.append, (3, 0), user=3)
    release.set()
    until(lambda: not pool.shares.used)

    assert [(2, number) for number in range(10)] == [entry for entry in order if entry[0] == 2]
    assert (3, 0) in order[:2]
    pool.stop()


def test_what_is_let_in_has_threads(threads: list[threading.Thread]) -> None:
    """Where a job's end makes room for two, and the first of these is stuck, the other one is done all the same."""
    pool = pool_of(4, threads)
    first, second, done = threading.Event(), threading.Event(), threading.Semaphore(0)
    pool.post(first.wait, accounts=(("a", 1), ("b", 1)))
    pool.post(second.wait, accounts=(("a", 1),))
    pool.post(done.release, accounts=(("b", 1),))
    first.set()

    assert done.acquire(timeout=20)
    second.set()
    pool.stop()


def test_a_job_that_fails_costs_nobody_a_thread(threads: list[threading.Thread], logs: object) -> None:
    """An exception is logged, and the thread goes on."""
    logs.expect("a worker's job failed")  # type: ignore[attr-defined]
    pool = pool_of(1, threads)
    done = threading.Semaphore(0)
    pool.post(int, "no number", accounts=(("a", 1),))
    pool.post(done.release, accounts=(("a", 1),))

    assert done.acquire(timeout=20)
    assert 1 == len(threads)
    pool.stop()


def test_a_cancelled_timer_keeps_nothing() -> None:
    """A job that is dropped before its time is not done, and what it was to be given is let go of at once."""

    class Held:
        pass

    clock = Clock(lambda *_: None)
    held = Held()
    gone = weakref.ref(held)
    timers = [clock.after(1e6, print, held) for _ in range(1000)]
    del held
    for timer in timers:
        timer.cancel()
        timer.cancel()

    assert gone() is None
    assert len(clock._entries) <= 1
    clock.stop()
