"""Each limit answers with the driver's own error, and what is given back can be had again."""

import errno
import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import CopyIn, Task, Turn, stats
from binderfs_fuse.engine.limits import THREAD, UNREAD, Quota
from binderfs_fuse.engine.node import Node
from binderfs_fuse.engine.process import POLLERR
from binderfs_fuse.engine.work import TransactionComplete
from binderfs_fuse.limits import _COSTS, Limits
from tests.engine.machine import PAGE, Caller, Client, Machine
from tests.engine.wire import command, parcel

FAILED = ["BR_NOOP", "BR_FAILED_REPLY"]
SENT = ["BR_NOOP", "BR_TRANSACTION_COMPLETE"]


@contextmanager
def limited(**limits: int) -> Iterator[Machine]:
    """Make a machine with other limits, which must leave nothing in anybody's account."""
    machine = Machine(limits=Limits(**limits))
    yield machine
    machine.shut_down()

    assert {} == machine.engine.accounts


def told(caller: Caller, **options: int) -> tuple[list[str], tuple[str, int]]:
    """Make a one-way call; what is read then, and the extended error."""
    names = [name for name in caller.tell(0, b"12345678", **options).names if "REFS" not in name]
    return names, caller.extended_error()


def test_opens() -> None:
    """One open too many of the mount fails with ENFILE, of a user with EMFILE; others go on meanwhile."""
    with limited(opens=5, user_opens=2) as machine:
        first = machine.client(euid=1000)
        machine.client(euid=1000)
        with pytest.raises(OSError, match="of this user") as of_user:
            machine.client(euid=1000)
        machine.client(euid=2000)
        with pytest.raises(OSError, match="too many opens") as of_mount:
            machine.client(euid=2000)
        first.die()
        machine.client(euid=1000)

        assert (errno.EMFILE, errno.ENFILE) == (of_user.value.errno, of_mount.value.errno)


def test_opens_that_fail_hold_nothing() -> None:
    """A refused open leaves no trace in the engine."""
    with limited(user_opens=1) as machine:
        machine.client()
        with pytest.raises(OSError, match="of this user"):
            machine.client()

        assert 1 == len(machine.engine.processes)


def test_threads() -> None:
    """A thread too many gets ENOMEM and POLLERR, until another one exits."""
    with limited(threads=2) as machine:
        client = machine.client()
        second = client.thread()
        third = client.thread(fresh=True)
        refused = third.ioctl(uapi.BINDER_VERSION).error, third.exchange().error, third.poll()
        second.exit()
        served = third.ioctl(uapi.BINDER_VERSION).error

        assert (-errno.ENOMEM, -errno.ENOMEM, POLLERR) == refused
        assert 0 == served


def test_nodes() -> None:
    """A call with an object too many fails, and leaves those alone that are known."""
    with limited(nodes=2) as machine:
        machine.manager()
        client = machine.client()
        one, two, three = (client.tell(0, parcel().binder(ptr)).names[-1] for ptr in (0x10, 0x20, 0x30))
        again = client.tell(0, parcel().binder(0x20)).names[-1]
        client.tell(0, parcel().binder(0x10).binder(0x40))
        error = client.extended_error()

        assert [SENT[-1], SENT[-1], FAILED[-1], SENT[-1]] == [one, two, three, again]
        assert ("BR_FAILED_REPLY", -errno.ENOMEM) == error


def test_a_manager_without_room() -> None:
    """Becoming context manager is a node too, and fails with ENOMEM."""
    with limited(nodes=0) as machine:
        client = machine.client()
        error = client.ioctl(uapi.BINDER_SET_CONTEXT_MGR).error

        assert -errno.ENOMEM == error


def test_refs() -> None:
    """A call fails if its receiver would hold a reference too many; BC_ACQUIRE then does nothing."""
    with limited(refs=1) as machine:
        manager = machine.manager()
        client = machine.client()
        names = [client.tell(0, parcel().binder(ptr)).names[-1] for ptr in (0x10, 0x20)]
        error = client.extended_error()
        machine.share(client, manager, 0x10, 0)
        client.do(uapi.BC_ACQUIRE, 0)
        full = machine.client()
        handle = full.process.refs_by_desc

        assert [SENT[-1], FAILED[-1]] == names
        assert ("BR_FAILED_REPLY", -errno.ENOMEM) == error
        assert {} == handle


@pytest.fixture(name="notified")
def _notified() -> Iterator[tuple[Machine, Client]]:
    with limited(notifications=3) as machine:
        machine.manager()
        client = machine.client()
        client.do(uapi.BC_ACQUIRE, 0)
        yield machine, client


def test_death_notifications(notified: tuple[Machine, Client]) -> None:
    """Who asks and clears without reading is told BR_ERROR in the end, and is served again once it has read."""
    _, client = notified
    for cookie in range(3):
        client.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, 0, cookie)
        client.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, 0, cookie)
    call = client.exchange(command(uapi.BC_REQUEST_DEATH_NOTIFICATION, 0, 7), read=80, nonblock=True)
    read = call.data
    while not call.error:
        call = client.read(80, nonblock=True)
        read += call.data
    client.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, 0, 7)

    # The driver leaves out what the number says that it carries.
    assert uapi.BR_ERROR.to_bytes(4, "little") in read
    assert -errno.EAGAIN == call.error
    assert client.process.refs_by_desc[0].death is not None


def test_freeze_notifications(notified: tuple[Machine, Client]) -> None:
    """Who asks and clears without reading gets ENOMEM in the end."""
    _, client = notified
    errors = []
    for cookie in range(4):
        errors.append(client.write(command(uapi.BC_REQUEST_FREEZE_NOTIFICATION, 0, cookie)).error)
        client.thread().news()
        client.write(command(uapi.BC_CLEAR_FREEZE_NOTIFICATION, 0, cookie))

    assert [0, 0, 0, -errno.ENOMEM] == errors


def test_notifications_that_were_read_and_not_acknowledged() -> None:
    """They count like those that were not read, deaths and freezes together."""
    with limited(notifications=2) as machine:
        manager, other = machine.manager(), machine.client()
        handles = [machine.share(other, manager, ptr) for ptr in (0x100, 0x200, 0x300)]
        manager.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, handles[0], 1)
        manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handles[1], 2)
        other.die()
        manager.read(nonblock=True)
        manager.read(nonblock=True)
        full = manager.write(command(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handles[2], 3)).error
        manager.do(uapi.BC_DEAD_BINDER_DONE, 1)

        assert (1, 0) == (len(manager.process.delivered_freeze), len(manager.process.delivered_death))
        assert (-errno.ENOMEM, 0) == (
            full,
            manager.write(command(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handles[2], 3)).error,
        )


def test_buffers() -> None:
    """One-way calls that nobody reads fail with ENOSPC, as where the space is used up; a buffer freed is had again."""
    with limited(buffers=3) as machine:
        manager = machine.manager()
        client = machine.client()
        results = [told(client) for _ in range(4)]
        manager.free(manager.read().received)
        again, _ = told(client)

        assert [(SENT, ("BR_OK", 0))] * 3 == results[:3]
        assert (FAILED, ("BR_FAILED_REPLY", -errno.ENOSPC)) == results[3]
        assert SENT == again


def test_objects_in_a_buffer() -> None:
    """Each object that a buffer may hold counts for the receiver's user until the buffer is freed."""
    with limited(user_objects=40) as machine:
        manager = machine.manager()
        account = manager.process.account
        client = machine.client(euid=1000)
        before = account.objects
        few, many = parcel(), parcel()
        for ptr in range(50):
            many.binder(ptr)
        for ptr in range(5):
            few.binder(ptr)
        sent = client.tell(0, few).names
        held = account.objects - before
        refused = client.tell(0, many).names[-1]
        error = client.extended_error()
        manager.free(manager.read().received)

        # The buffer, its objects, and the refs to them.
        assert FAILED[-1] not in sent
        assert 1 + 5 + 5 == held
        assert FAILED[-1] == refused
        assert ("BR_FAILED_REPLY", -errno.ENOMEM) == error
        assert before == account.objects


def test_unread_work() -> None:
    """A thread that sends and never reads is stopped; when it has read, it is served."""
    with limited(unread=3) as machine:
        machine.manager()
        client = machine.client()
        for _ in range(4):
            client.send(0, flags=uapi.TF_ONE_WAY)
        error = client.extended_error()
        names = client.read().names
        again, _ = told(client)

        assert ("BR_FAILED_REPLY", -errno.ENOMEM) == error
        assert ["BR_NOOP", *SENT[1:] * 3, "BR_FAILED_REPLY"] == names
        assert SENT == again


def send_unread(machine: Machine, manager: Client, caller: Caller, most: int) -> int:
    """Have a thread send up to so many one-way calls, and read nothing; how many were accepted."""
    machine.careful = False
    for sent in range(most):
        caller.send(0, flags=uapi.TF_ONE_WAY)
        if caller.extended_error() != ("BR_OK", 0):
            assert FAILED[-1] == uapi.BR_NAMES[caller.client.process.threads[caller.tid].return_error.command]
            return sent
        manager.free(manager.read().received)
    machine.careful = True
    return most


def test_unread_returns_of_many_threads() -> None:
    """They count for their threads' user, who is refused in the end, loses none, and holds up nobody else."""
    with limited(user_objects=100) as machine:
        manager = machine.manager(euid=1)
        hostile = machine.client(euid=1000)
        account = hostile.process.account
        callers, accepted = [], []
        while hostile.thread(fresh=True).ioctl(uapi.BINDER_VERSION).error == 0:
            caller = hostile.thread(machine._last_pid)
            callers.append(caller)
            accepted.append(send_unread(machine, manager, caller, 20 * UNREAD))
        machine.look()
        held = account.objects
        other = machine.client(euid=2000)
        of_other = [told(other) for _ in range(3)]
        read = [caller.read(1 << 16).names.count("BR_TRANSACTION_COMPLETE") for caller in callers]
        # One that is told of the refusal may send again.
        again, _ = told(callers[0])

        assert 100 == held
        assert sum(accepted) < 100 * UNREAD
        assert [(SENT, ("BR_OK", 0))] * 3 == of_other
        assert accepted == read
        assert SENT == again
        assert THREAD * len(hostile.process.threads) == account.objects


@pytest.mark.parametrize("end", ["exit", "die"])
def test_unread_returns_are_given_back(end: str) -> None:
    """A thread that exits, or whose process ends, leaves nothing of what it has not read in its user's account."""
    with limited() as machine:
        manager = machine.manager(euid=1)
        client = machine.client(euid=1000)
        account = client.process.account
        before = account.objects
        send_unread(machine, manager, client, 3 * UNREAD)
        full = account.objects
        client.exit() if end == "exit" else client.die()

        assert (THREAD, THREAD + 3) == (before, full)
        assert 0 == account.objects


def test_a_return_that_cannot_be_stored_counts_again() -> None:
    """Returns that are put back, since they did not arrive, count for their user until they do."""
    with limited() as machine:
        manager = machine.manager(euid=1)
        client = machine.client(euid=1000)
        account = client.process.account
        send_unread(machine, manager, client, 3 * UNREAD)
        # One is lost, at which the fault was.
        failed = client.read(4096, into=client.memory.room(4096, accessible=4)).error
        full = account.objects
        names = client.read(4096).names

        assert (-errno.EFAULT, THREAD + 2) == (failed, full)
        assert 3 * UNREAD - 1 == names.count("BR_TRANSACTION_COMPLETE")
        assert THREAD == account.objects


def alive(kind: type) -> int:
    """How many objects of a kind there are."""
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def test_a_thread_that_has_read_keeps_nothing() -> None:
    """Neither what it was told, nor objects that nobody refers to any more, once the answer is out."""
    with limited() as machine:
        manager = machine.manager(euid=1)
        client = machine.client(euid=1000)
        send_unread(machine, manager, client, 500)
        client.read(1 << 16)
        handles = [machine.share(client, manager, 16 * number) for number in range(1, 100)]
        for handle in handles:
            manager.do(uapi.BC_RELEASE, handle)
        before = alive(TransactionComplete), alive(Node)
        call = client.thread().read(1 << 16, nonblock=True)
        assert call.outcome is not None
        most = len(call.outcome.delivered)
        names = call.names
        del call

        assert (0, 100) == before
        assert 99 == names.count("BR_RELEASE")
        assert most <= machine.engine.chunk
        assert (0, 1) == (alive(TransactionComplete), alive(Node))


def test_a_thread_counts_for_what_it_may_keep() -> None:
    """A thread with much to read, amid a long write, holds less than what it counts for in the sum of all limits."""
    with limited() as machine:
        client = machine.client(euid=1000)
        process, engine = client.process, machine.engine
        tasks = [Task(tid, client.pid, 1000) for tid in range(1000, 1200)]
        stream = command(uapi.BC_ENTER_LOOPER) * 2048
        argument = uapi.binder_write_read.pack(len(stream), 0, 0, 0, 0, 0)
        steps = []
        gc.collect()
        tracemalloc.start()
        for task in tasks:
            thread = process.thread(task)
            assert thread is not None
            for _ in range(UNREAD - 1):
                thread.count_unread()
                thread.enqueue(TransactionComplete(uapi.BR_TRANSACTION_COMPLETE))
            step = process.ioctl(task, uapi.BINDER_WRITE_READ, argument)
            fetch = step.send(None)
            assert isinstance(fetch, CopyIn)
            assert isinstance(step.send(stream[: fetch.size]), Turn)
            steps.append(step)
        del fetch, step, thread
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        for waiting in steps:
            waiting.send(True)
        engine.stats.created[stats.TRANSACTION_COMPLETE] += (UNREAD - 1) * len(tasks)

        # That of the client itself is another one.
        assert THREAD * (1 + len(tasks)) == process.account.objects
        assert kept < THREAD * _COSTS["objects"] * len(tasks)


def test_threads_of_a_user() -> None:
    """A thread counts for several objects; who has room for fewer gets none, and may have something smaller."""
    with limited(user_objects=2 * THREAD + 3) as machine:
        client = machine.manager(euid=1000)
        # The object that it manages.
        assert THREAD + 1 == client.process.account.objects
        second = client.thread(fresh=True).ioctl(uapi.BINDER_VERSION).error
        third = client.thread(fresh=True).ioctl(uapi.BINDER_VERSION).error
        smaller = machine.client(euid=2000).tell(0).names

        assert (0, -errno.ENOMEM) == (second, third)
        assert SENT == smaller


def test_pages_of_a_user() -> None:
    """A user's regions take so many pages together; other users have their own."""
    with limited(user_pages=2) as machine:
        machine.manager(euid=1000)
        hardware = machine.engine.add_context("hwbinder")
        other = machine.manager(context=hardware, euid=1000)
        client = machine.client(euid=2000)
        results = [client.tell(0, bytes(size)).names for size in (2 * PAGE, 8, PAGE)]
        error = client.extended_error()
        second = machine.client(context=hardware, euid=2000)
        of_other = second.tell(0, b"1").names

        assert other.process.account is not client.process.account
        assert [SENT, FAILED, FAILED] == results
        assert ("BR_FAILED_REPLY", -errno.ENOMEM) == error
        assert FAILED == of_other


def context(machine: Machine, euid: int, name: str) -> tuple[Client, Client]:
    """Make a manager and a client of one user in a context of their own."""
    made = machine.engine.add_context(name)
    return machine.manager(context=made, euid=euid), machine.client(context=made, euid=euid)


def test_objects_of_a_user() -> None:
    """A user who holds all that one may hold gets nothing more of any kind; another user does."""
    with limited(user_objects=15) as machine:
        _, client = context(machine, 1000, "one")
        _, other = context(machine, 2000, "two")
        account = client.process.account
        pointers = iter(range(0x10, 0x1000))
        while "BR_FAILED_REPLY" not in client.tell(0, parcel().binder(next(pointers))).names:
            pass
        while client.tell(0).names == SENT:
            pass
        held = account.objects
        nothing = client.tell(0).names
        thread = client.thread(fresh=True).ioctl(uapi.BINDER_VERSION).error
        of_other = other.tell(0, parcel().binder(0x10)).names[-1]

        assert 15 == held
        assert FAILED == nothing
        assert -errno.ENOMEM == thread
        assert SENT[-1] == of_other


def test_a_flood_leaves_others_their_share() -> None:
    """One client sends until it is refused for good; another user's call goes through, and is answered."""
    with limited(user_objects=300, buffers=64, unread=50) as machine:
        machine.manager(euid=1)
        hostile = machine.client(euid=1000)
        while hostile.extended_error()[1] == 0:
            hostile.tell(0, parcel().binder(hostile.process.engine.next_debug_id()))
        manager, client = context(machine, 2000, "other")
        call = client.call(0, b"hello")
        manager.serve()

        assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_REPLY"] == call.names


def test_pages_of_all() -> None:
    """One user gets half of all pages at most, however many one user may have, and another user a share of the rest."""
    with limited(pages=12, user_pages=100) as machine:
        taken = []
        for euid in (1000, 2000):
            manager, client = context(machine, euid, str(euid))
            while client.tell(0, bytes(PAGE)).names == SENT:
                pass
            taken.append(manager.process.account.pages)
        error = client.extended_error()

        assert [6, 3] == taken
        assert ("BR_FAILED_REPLY", -errno.ENOMEM) == error


def test_pages_that_are_being_made_present_count() -> None:
    """While a step waits for its pages another one cannot have them, too."""
    account = Quota(Limits(pages=1000, user_pages=10)).account(0)

    assert account.has_pages(6)

    account.populating += 6

    assert not account.has_pages(6)
    assert account.has_pages(4)


def test_shares_shrink_with_the_number_of_users() -> None:
    """Of k users each leaves a share of 1 / (k + 1), which no client can use up, to the next one."""
    quota = Quota(Limits(objects=1200, user_objects=1200))
    shares = []
    for uid in range(3):
        account = quota.account(uid)
        while account.has_objects(1):
            account.objects += 1
        shares.append(account.objects)

    assert [600, 300, 150] == shares
    assert 1050 == quota.objects.held


def test_leases_are_given_back() -> None:
    """What accounts have leased and do not hold goes to others, also where its user has no open that could end."""
    quota = Quota(Limits(objects=1 << 16, user_objects=1 << 16))
    for uid in range(1000):
        account = quota.account(uid)
        account.opens = 1
        assert account.has_objects(60)
    needy = quota.account(5000)
    needy.opens = 1
    tries = 0
    while not needy.has_objects(1 << 15):
        tries += 1
        assert tries < 1000

    assert quota.objects.held == sum(account.object_lease for account in quota.accounts.values())


@pytest.mark.parametrize("memory", [1 << 20, 64 << 20, 1 << 30, 1 << 34])
def test_the_sum_is_below_the_memory(memory: int) -> None:
    """What all limits of all users stand for, at what one of each costs, takes no more than there is."""
    limits = Limits().within(memory)

    assert sum(getattr(limits, name) * cost for name, cost in _COSTS.items()) <= memory * 29 // 32


def test_a_lowered_total_takes_nothing_away() -> None:
    """With less memory than before what is held stays, and nothing more can be had until less is held."""
    quota = Quota(Limits())
    account = quota.account(0)
    assert account.has_pages(1000)
    account.pages = 1000
    quota.resize(Limits().within(1 << 20))

    assert not account.has_pages(1)

    account.pages = 10
    account.cut()

    assert account.has_pages(1)


def test_the_first_one_is_never_refused() -> None:
    """A limit of one is one, though half of it is nothing."""
    with limited(opens=1) as machine:
        machine.client()
        with pytest.raises(OSError, match="too many opens"):
            machine.client()
