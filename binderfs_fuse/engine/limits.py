"""What clients hold of a server's memory: bounds that the driver does not need, where each client pays for its own.

Theory of operation
-------------------
Here one server holds everything for everybody. The table (`binderfs_fuse.limits.Limits`) says how much of that there
may be. A limit is of one of three kinds:

- *of an open, a region or a thread*: the engine compares a number with it.
- *of one user*: the fields whose names begin with ``user_``.
- *of all users together*: the field of the same name without ``user_``. The two make a `Pool`.

A pool gives a user more only if the user then holds no more than what is still free. So one user gets half of a
pool at most, two users a third each, and k users leave a share of 1 / (k + 1) to the next one. No user can use up
what a newcomer needs.

Each user has an `Account` in a mount. Objects and pages come and go too often to be counted twice, for the user and
for all. So an account takes them from the pools in *leases*, a step at a time, and compares with its lease alone. A
lease that is larger than what its account holds is cut when a process of the user ends, and bit by bit when a lease
is refused.

A client that goes beyond a limit gets the error that the driver gives when memory is short. A process that goes below
a limit again is served again.

Invariants
----------
- `account.opens`, `.objects` and `.pages` are what the user's processes hold at this time: opens that are not freed;
  threads (`THREAD` each), what these have to read (one for each `UNREAD` returns of a thread), nodes, refs, death and
  freeze notifications, and buffers with the objects in them; pages made present in their regions.
- A node that outlives its process stays in its user's account.
- `pool.held` is the sum of what the users hold, or have leased.
- `pool.held` exceeds `pool.total` only when `resize` made the total smaller.
"""

from __future__ import annotations

from typing import Final

from binderfs_fuse.limits import Limits

OWN: Final = 1
"""A user has as much as one user may have."""
ALL: Final = 2
"""All users together have so much that this one cannot have more."""

_STEP: Final = 256
# So many accounts give back what they do not need when a lease is refused.
_CUTS: Final = 64

# A thread counts for so many objects: while a long write waits for its turn, it keeps up to 4 KiB of commands.
THREAD: Final = 4
# So many returns that a thread has to read, of some 80 bytes each, count for one object. Its own cover fewer than that.
UNREAD: Final = 16


class Pool:
    """What all users hold of one thing: at most `total`, and `most` by one user. `held` is how much it is now."""

    __slots__ = ("held", "most", "total")

    def __init__(self, total: int, most: int) -> None:
        self.total = total
        self.most = most
        self.held = 0

    def room(self, own: int) -> int:
        """Return how much more a user may have who has `own`; 0 or less: nothing."""
        share = (self.total - self.held - own) >> 1
        if not self.held and share < 1:
            # Half of one is nothing.
            share = 1
        return min(self.most - own, share)

    def lacks(self, own: int, more: int = 1) -> int:
        """Return `OWN` or `ALL` where a user who has `own` cannot have so much `more`, and 0 where that may be."""
        if more <= self.room(own):
            return 0
        return OWN if own + more > self.most else ALL


class Quota:
    """The pools of a mount, and the accounts of its users, by user id; one that holds nothing is forgotten."""

    def __init__(self, limits: Limits) -> None:
        self.accounts: dict[int, Account] = {}
        self.opens = Pool(limits.opens, limits.user_opens)
        self.files = Pool(limits.files, limits.user_files)
        self.inodes = Pool(limits.inodes, limits.user_inodes)
        self.readers = Pool(limits.readers, limits.user_readers)
        self.log_bytes = Pool(limits.log_bytes, limits.user_log_bytes)
        self.objects = Pool(limits.objects, limits.user_objects)
        self.pages = Pool(limits.pages, limits.user_pages)

    def resize(self, limits: Limits) -> None:
        """Take other totals, since there is more or less memory than there was. Nobody loses what is held."""
        self.opens.total = limits.opens
        self.files.total = limits.files
        self.inodes.total = limits.inodes
        self.readers.total = limits.readers
        self.log_bytes.total = limits.log_bytes
        self.objects.total = limits.objects
        self.pages.total = limits.pages

    def forget(self, account: Account) -> None:
        """Have an account give back what it does not need, and drop it where nothing is held."""
        account.cut()
        if account.is_empty() and self.accounts.get(account.uid) is account:
            del self.accounts[account.uid]

    def account(self, uid: int) -> Account:
        """Return the account of a user."""
        account = self.accounts.get(uid)
        if account is None:
            account = self.accounts[uid] = Account(self, uid)
        return account

    def cut_some(self) -> None:
        """Have some accounts, other ones each time, give back what they do not need."""
        for _ in range(min(_CUTS, len(self.accounts))):
            uid = next(iter(self.accounts))
            # It goes to the end, where the next turn does not find it.
            account = self.accounts.pop(uid)
            self.accounts[uid] = account
            self.forget(account)


class Account:
    """What one user holds in a mount, and has leased.

    `populating` are pages that are being made present just now.
    """

    __slots__ = ("object_lease", "objects", "opens", "page_lease", "pages", "populating", "quota", "uid")

    def __init__(self, quota: Quota | None = None, uid: int = 0) -> None:
        self.quota = quota or Quota(Limits())
        self.uid = uid
        self.opens = 0
        self.objects = 0
        self.object_lease = 0
        self.pages = 0
        self.populating = 0
        self.page_lease = 0

    def has_objects(self, more: int) -> bool:
        """Whether the user may have so many more objects."""
        need = self.objects + more
        if need <= self.object_lease:
            return True
        pool = self.quota.objects
        grown = self._grow(pool, self.object_lease, need)
        pool.held += grown - self.object_lease
        self.object_lease = grown
        return need <= grown

    def has_pages(self, more: int) -> bool:
        """Whether the user's regions may have so many more pages."""
        need = self.pages + self.populating + more
        if need <= self.page_lease:
            return True
        pool = self.quota.pages
        grown = self._grow(pool, self.page_lease, need)
        pool.held += grown - self.page_lease
        self.page_lease = grown
        return need <= grown

    def _grow(self, pool: Pool, lease: int, need: int) -> int:
        """Return the lease that holds `need` and some more, or the old one where `need` is too much."""
        missing = need - lease
        room = pool.room(lease)
        if room < missing:
            self.quota.cut_some()
            room = pool.room(lease)
            if room < missing:
                return lease
        # A small pool is given out in small steps.
        return lease + min(room, max(missing, min(_STEP, pool.total >> 6)))

    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not (self.opens or self.objects)

    def cut(self) -> None:
        """Give back what is leased and not held."""
        quota = self.quota
        quota.objects.held -= self.object_lease - self.objects
        self.object_lease = self.objects
        pages = self.pages + self.populating
        quota.pages.held -= self.page_lease - pages
        self.page_lease = pages
