"""The arithmetic of shares."""

import pytest

from binderfs_fuse.quotas import Shares

TOTAL, RESERVE = 128, 16
ROOM = TOTAL - RESERVE


def take_all(shares: Shares, users: int) -> None:
    """Have users take what they can get, in turn."""
    took = True
    while took:
        took = False
        for user in range(users):
            if shares.has_room(user):
                shares.take(user)
                took = True


@pytest.mark.parametrize("users", [1, 2, 3, 7, 20, 50])
def test_users_leave_a_share_to_the_next(users: int) -> None:
    """However greedy k users are, they leave as much as each of them has, beside the reserve."""
    shares = Shares(TOTAL, RESERVE)
    take_all(shares, users)

    assert max(shares.held.values()) <= -(-ROOM // (users + 1))
    assert shares.free >= ROOM // (users + 1) - 1
    assert sum(shares.held.values()) == shares.used <= ROOM


def test_the_reserve_is_for_those_who_hold_nothing() -> None:
    """A thousand users get one each as long as there are any, and nobody gets a second one out of the reserve."""
    shares = Shares(TOTAL, RESERVE)
    take_all(shares, 1000)

    assert TOTAL == shares.used
    assert {1} == set(shares.held.values())
    assert not shares.has_room("late")


def test_what_is_given_back_is_there_for_others() -> None:
    """A user that holds nothing any more is forgotten, and what it had can be taken."""
    shares = Shares(4, 1)
    for user in range(4):
        assert shares.has_room(user)
        shares.take(user)
    assert shares.is_exhausted(0)
    shares.give_back(2)

    assert shares.has_room("late")
    assert not shares.has_room(0)
    assert {0, 1, 3} == set(shares.held)
