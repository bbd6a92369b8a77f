"""Whose turn it is: by order, never by time."""

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from binderfs_fuse import uapi
from binderfs_fuse._system import lib
from binderfs_fuse.engine.context import Task
from binderfs_fuse.engine.effects import Outcome, Turn
from binderfs_fuse.fuse.device import Call
from binderfs_fuse.fuse.lane import Lane
from binderfs_fuse.fuse.turns import Passage, Turns
from binderfs_fuse.fuse.workers import Pool
from binderfs_fuse.host import tasks
from tests.fuse.conftest import Client, Served, until

Serve = Callable[..., Served]
ATTACKER, BYSTANDER = 1000, 1001
FLOOD = 200


class Kernel:
    """The kernel's end of a channel, with a lane that reads at the other one."""

    def __init__(self) -> None:
        self._kernel, self._server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._kernel, self._server):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.descriptor = self._server.fileno()
        self.channel = lib.channel_create(self.descriptor)
        self.lane = Lane(self.channel)
        lib.lane_lead(self.lane.pointer)

    def close(self) -> None:
        """Close both ends."""
        self._kernel.close()
        self._server.close()

    def send(self, opcode: int, unique: int, uid: int = 0, body: bytes = b"", inode: int = 1) -> None:
        """Make a request."""
        size = uapi.fuse_in_header.size + len(body)
        self._kernel.send(uapi.fuse_in_header.pack(size, opcode, unique, inode, uid, uid, 0, 0) + body)

    def ioctl(self, unique: int, uid: int, command: int = uapi.BINDER_VERSION, size: int = 4) -> None:
        """Make an ioctl."""
        body = uapi.fuse_ioctl_in.pack(1, 0, command, 0, size, size) + bytes(size)
        self.send(uapi.FUSE_IOCTL, unique, uid, body)

    def interrupt(self, unique: int) -> None:
        """Interrupt a request."""
        self.send(uapi.FUSE_INTERRUPT, unique | 1, body=uapi.fuse_interrupt_in.pack(unique))

    def serve(self) -> int:
        """Have the lane take the next request; return its `unique`."""
        assert lib.lane_receive(self.lane.pointer) > 0
        unique: int = self.lane.fields.unique
        return unique

    def answer(self) -> tuple[int, int, bytes]:
        """Take what was answered: which request, its error, and the rest."""
        message = self._kernel.recv(1 << 16, socket.MSG_DONTWAIT)
        _, error, unique = uapi.fuse_out_header.unpack_from(message)
        return unique, error, message[uapi.fuse_out_header.size :]

    def is_nonblocking(self) -> bool:
        """Tell whether reads do not block."""
        return bool(fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & os.O_NONBLOCK)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """A kernel whose mount is crowded."""
    made = Kernel()
    lib.channel_crowd(made.channel)
    yield made
    made.close()


def test_one_request_comes_before_many_of_another_user(kernel: Kernel) -> None:
    """A request that comes behind those of a flood is served after one of them."""
    for number in range(FLOOD):
        kernel.ioctl(2 * number + 2, ATTACKER)
    kernel.ioctl(9000, BYSTANDER)
    served = [kernel.serve(), kernel.serve()]

    assert 9000 in served


def test_who_comes_during_a_flood_is_served_soon(kernel: Kernel) -> None:
    """Each request of a bystander waits for a few of the flood, whose own go on in their order."""
    for number in range(FLOOD):
        kernel.ioctl(2 * number + 2, ATTACKER)
    order = []
    for number in range(10):
        kernel.ioctl(9000 + 2 * number, BYSTANDER)
        order += [kernel.serve() for _ in range(8)]

    assert [9000 + 2 * number for number in range(10)] == [unique for unique in order if unique >= 9000]
    assert [2 * number + 2 for number in range(70)] == [unique for unique in order if unique < 9000]


def test_users_have_one_turn_each(kernel: Kernel) -> None:
    """Requests of several users are served in turn, one each."""
    for user in range(4):
        for number in range(5):
            kernel.ioctl(1000 * (user + 1) + 2 * number, user)
    order = [kernel.serve() // 1000 for _ in range(20)]

    assert [1, 2, 3, 4] * 5 == order


def test_a_wait_that_was_read_ahead_can_be_interrupted(kernel: Kernel) -> None:
    """A BINDER_WRITE_READ is answered with EINTR before it is served, and is served no more."""
    for number in range(10):
        kernel.ioctl(2 * number + 2, ATTACKER, uapi.BINDER_WRITE_READ, 48)
    first = kernel.serve()
    kernel.interrupt(18)
    rest = [kernel.serve() for _ in range(8)]

    assert [2, 4, 6, 8, 10, 12, 14, 16, 20] == [first, *rest]
    assert (18, 0, uapi.fuse_ioctl_out.pack(-errno.EINTR, 0, 0, 0)) == kernel.answer()


def test_an_interrupt_waits_behind_what_it_names(kernel: Kernel) -> None:
    """Another request that was read ahead is served first, and then the INTERRUPT; one for nobody comes in its turn."""
    kernel.ioctl(2, ATTACKER, uapi.BINDER_FREEZE, 12)
    kernel.ioctl(4, ATTACKER, uapi.BINDER_FREEZE, 12)
    kernel.interrupt(4)
    kernel.interrupt(700)

    assert [2, 701, 4, 5] == [kernel.serve() for _ in range(4)]


def test_what_the_kernel_sends_by_itself_has_its_turn(kernel: Kernel) -> None:
    """A RELEASE and a FORGET wait for no flood, and stay in order: every second turn is theirs, whoever else waits."""
    for number in range(20):
        for user in range(4):
            kernel.ioctl(100 * user + 2 * number + 2, 1000 + user)
    for number in range(4):
        kernel.send(uapi.FUSE_RELEASE, 9000 + 4 * number, body=bytes(24))
        kernel.send(uapi.FUSE_FORGET, 9002 + 4 * number, body=bytes(8))
    order = [kernel.serve() for _ in range(16)]

    assert [2, 102, 202, 302, 4, 104, 204, 304] == order[::2]
    assert list(range(9000, 9016, 2)) == order[1::2]


def test_the_newest_lookup_of_a_user_is_served_first(kernel: Kernel) -> None:
    """A user's LOOKUPs in a directory are served the newest first; each eighth turn is the oldest one's."""
    for number in range(20):
        kernel.send(uapi.FUSE_LOOKUP, 2 * number + 2, ATTACKER, body=b"binder\0")
    order = [kernel.serve() for _ in range(20)]

    assert [*range(40, 26, -2), 2, *range(26, 12, -2), 4, *range(12, 4, -2)] == order


def test_who_holds_a_directory_does_not_wait_for_the_own_flood(kernel: Kernel) -> None:
    """A LOOKUP or READDIR, for which others may wait, comes after one request of its user's and of each directory's."""
    for number in range(FLOOD // 2):
        kernel.ioctl(2 * number + 2, ATTACKER)
        kernel.send(uapi.FUSE_LOOKUP, 2000 + 2 * number, ATTACKER, body=b"x\0", inode=7)
    kernel.send(uapi.FUSE_READDIR, 9000, ATTACKER, body=bytes(40))
    kernel.send(uapi.FUSE_LOOKUP, 9002, ATTACKER, body=b"binder\0")

    assert {9000, 9002} <= {kernel.serve() for _ in range(6)}


def test_lookups_that_queue_up_make_a_mount_crowded() -> None:
    """Where more requests follow a LOOKUP, they are read ahead to choose the newest one, and soon no more."""
    kernel = Kernel()
    try:
        kernel.send(uapi.FUSE_LOOKUP, 2, ATTACKER, body=b"binder\0")
        assert 2 == kernel.serve()
        for number in range(2, 5):
            kernel.send(uapi.FUSE_LOOKUP, 2 * number, ATTACKER, body=b"binder\0")

        assert [4, 8, 6] == [kernel.serve() for _ in range(3)]
        for number in range(50):
            kernel.ioctl(100 + 2 * number, ATTACKER)
            assert 100 + 2 * number == kernel.serve()
        assert not kernel.is_nonblocking()
    finally:
        kernel.close()


def test_one_users_requests_are_bounded(kernel: Kernel) -> None:
    """Requests beyond what a user may have waiting fail with ENOMEM, and others' are kept."""
    kept, size = 0, 16 << 10
    for number in range(3000):
        kernel.ioctl(2 * number + 4, ATTACKER, uapi.BINDER_VERSION, size)
        if not number % 8:
            # What is served makes the lane read all of these.
            kernel.ioctl(100000 + 2 * number, BYSTANDER)
            kept += kernel.serve() < 100000
        if lib.channel_waiting(kernel.channel) > 1100:
            break
    refused = []
    with suppress(BlockingIOError):
        while True:
            refused.append(kernel.answer())

    assert refused
    assert {(0, uapi.fuse_ioctl_out.pack(-errno.ENOMEM, 0, 0, 0))} == {answer[1:] for answer in refused}
    assert all(unique < 100000 for unique, _, _ in refused)


def test_reading_ahead_is_bounded(kernel: Kernel) -> None:
    """However many requests the kernel has, one is served after some of them have been read."""
    for number in range(600):
        kernel.ioctl(2 * number + 2, ATTACKER)

    assert 2 == kernel.serve()
    assert 256 == lib.channel_waiting(kernel.channel)


def test_a_mount_is_crowded_only_while_requests_queue_up(kernel: Kernel) -> None:
    """Reads do not block while users are served in turn, and block again when there is nothing to choose from."""
    kernel.ioctl(2, ATTACKER)
    kernel.ioctl(4, BYSTANDER)
    assert [2, 4] == [kernel.serve(), kernel.serve()]
    assert kernel.is_nonblocking()
    for number in range(2100):
        kernel.ioctl(10 + 2 * number, ATTACKER)
        assert 10 + 2 * number == kernel.serve()

    assert not kernel.is_nonblocking()


def test_a_flood_makes_a_mount_crowded(serve: Serve) -> None:
    """Where requests of several users queue up the watcher notices, and afterwards all is as before."""
    served = serve()
    core = served.channel.core
    flood = [served.start("version-as", str(ATTACKER), "0") for _ in range(30)]
    for client in flood:
        assert "going" == client.line()
    bystander = served.start("version-as", str(BYSTANDER), "0")
    assert "going" == bystander.line()
    until(lambda: lib.channel_waiting(core) > len(flood) // 2)

    assert ["going", "version 0"] == served.run("version-as", str(BYSTANDER), "200")
    for client in (*flood, bystander):
        client.kill()
    assert ["going", "version 0"] == served.run("version-as", str(ATTACKER), "5000")
    assert not fcntl.fcntl(served.channel._fuse_fd, fcntl.F_GETFL) & os.O_NONBLOCK


# Long steps.


class Long:
    """A call whose step takes turns until it is told to end."""

    def __init__(self, served: Served, client: Client, unique: int, user: int = 0) -> None:
        (opened,) = (opened for opened in served.plane.opens.values() if opened.identity.pid == client.pid)
        self.call = Call(unique, opened, Task(client.pid, client.pid, user, 0), 0, 0)
        self.call.send = self._send
        self.end = threading.Event()
        self.slices = 0
        self.is_over = False
        self.order: list[int] = []
        plane = served.plane
        lane = Lane(served.channel.core)
        served.engine.lock.acquire()

        assert plane._drive(lane, self.call, None) is None

    def _send(self, value: object) -> Turn | Outcome:
        assert value is None or (value is True and self.call.let_go)
        self.slices += 1
        self.order.append(self.call.task.euid)
        if self.end.is_set():
            self.is_over = True
            return Outcome()
        return Turn()


@pytest.fixture
def waiting(served: Served) -> Client:
    """A client that waits, for whom long calls are made up."""
    client = served.start("wait")
    assert ["first 0", "going"] == [client.line(), client.line()]
    return client


def test_a_long_step_lets_others_through(served: Served, waiting: Client) -> None:
    """A step that ends only after thousands of others' calls is no obstacle to them."""
    long = Long(served, waiting, 1 << 60)

    assert ["version 0", "8"] == served.run("version", "2000")
    assert not long.is_over
    assert long.slices > 1
    long.end.set()
    until(lambda: long.is_over and not served.plane._parked.get(1 << 60))
    assert not len(served.plane.turns)


def test_long_steps_get_on_while_others_are_served(served: Served, waiting: Client) -> None:
    """A long step comes to its end while others call without a pause."""
    flood = [served.start("version-as", str(ATTACKER), "0") for _ in range(4)]
    for client in flood:
        assert "going" == client.line()
    long = Long(served, waiting, 1 << 60)
    until(lambda: long.slices > 100)
    long.end.set()

    until(lambda: long.is_over)


def test_users_take_turns_with_their_long_steps(served: Served, waiting: Client) -> None:
    """Among slices, too, each user has one turn, however many steps are under way."""
    order: list[int] = []
    longs = []
    with served.engine.lock:
        pass
    for number, user in enumerate([ATTACKER] * 6 + [BYSTANDER]):
        longs.append(Long(served, waiting, (1 << 60) + number, user))
    for long in longs:
        long.order = order
    until(lambda: len(order) > 200)
    taken = order[:200]
    for long in longs:
        long.end.set()
    until(lambda: all(long.is_over for long in longs))

    assert taken.count(BYSTANDER) >= 99


def test_a_client_that_is_killed_in_a_long_step_is_let_go(
    served: Served, waiting: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long step of a client that is being killed is answered between two slices, and its open goes when it ends."""
    long = Long(served, waiting, 1 << 60)
    with monkeypatch.context() as patch:
        # The kernel knows nothing of this call, and would not let the client wait for its answer.
        patch.setattr(tasks, "is_being_killed", lambda tid: tid == waiting.pid)
        served.plane._let_go(1 << 60)
    assert long.call.let_go
    waiting.kill()
    until(lambda: not served.plane.opens)
    assert served.plane._by_process
    assert not long.is_over
    long.end.set()

    until(lambda: long.is_over and not served.plane._by_process)


def test_a_slice_that_fails_stops_no_other(logs: object) -> None:
    """An exception is the pool's to log, and the next slice comes."""
    del logs
    jobs: list[Callable[[], object]] = []
    turns = Turns(jobs.append, lambda: None)
    done: list[int] = []
    turns.put(1, int, "no number")
    turns.put(2, done.append, 2)
    with pytest.raises(ValueError, match="no number"):
        jobs.pop()()
    jobs.pop()()

    assert [2] == done
    assert not jobs
    assert not len(turns)


def test_threads_go_through_their_steps_one_slice_at_a_time() -> None:
    """Threads that wait for the end of long steps have slices that never overlap, and users have their turns."""
    threads: list[threading.Thread] = []

    def start(target: Callable[[], None]) -> None:
        threads.append(threading.Thread(target=target))
        threads[-1].start()

    pool = Pool(1, start)
    turns = Turns(pool.post, lambda: None)
    inside = threading.Lock()
    order: list[int] = []
    overlaps: list[int] = []

    def go(user: int) -> None:
        passage = Passage(turns, user)
        for _ in range(50):
            passage.wait()
            if not inside.acquire(blocking=False):
                overlaps.append(user)
                continue
            order.append(user)
            inside.release()
        passage.leave()

    for user in (1, 1, 1, 1, 2):
        start(lambda user=user: go(user))  # type: ignore[misc]
    until(lambda: len(order) + len(overlaps) == 250)
    pool.stop()
    for thread in threads:
        thread.join(20)

    assert not overlaps
    assert 200 == order.count(1)
    assert not len(turns)


def test_a_long_write_lets_others_through(served: Served) -> None:
    """Between two slices of one write of thousands of commands other clients call, and then it goes on."""
    going, go_on = threading.Event(), threading.Event()

    def give_way() -> None:
        going.set()
        go_on.wait(20)

    served.plane.turns._give_way = give_way
    client = served.start("long-commands")
    assert going.wait(20)

    assert ["version 0", "8"] == served.run("version", "200")
    assert client.process.poll() is None
    go_on.set()
    assert ["long-commands 0"] == client.rest()
