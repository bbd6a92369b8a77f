"""However much there is of anything, no step touches more than a bounded number of elements while it has the lock.

For each kind of thing a world is made with 10, 1,000 and 100,000 of it, or as many as the limits allow. There every
command and ioctl is done, and all else that a shell can ask of the engine. What is counted are elements touched between
two yields (see meter.py), not time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import (
    CopyIn,
    CopyOut,
    CopyToBuffer,
    Engine,
    GetFile,
    Outcome,
    Populate,
    SetNice,
    Task,
    Wait,
    freeze,
)
from binderfs_fuse.engine.freeze import Freeze
from binderfs_fuse.engine.node import DEAD_BINDER_AND_CLEAR, Death, Node
from binderfs_fuse.engine.range_alloc import PAGE_SIZE, Buffer
from binderfs_fuse.engine.transaction import Transaction
from binderfs_fuse.engine.work import TransactionComplete
from binderfs_fuse.limits import Limits
from tests.engine.meter import Meter
from tests.engine.wire import command

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from binderfs_fuse.engine import Process
    from binderfs_fuse.engine.thread import Thread

FEW: Final = 10
SOME: Final = 1_000
MANY: Final = 100_000
# There are no more opens, by the limits, and no more buffers in one region.
LIMIT: Final = 16_384
# Lines and elements between two yields: 64 elements of the dearest kind, a whole transaction among them.
MOST: Final = 20_000
# From 1,000 to 100,000 the logarithm grows by two thirds; the depth of a random tree varies.
GROWTH: Final = 2.0
SLACK: Final = 200
FAR: Final = 1 << 40
REGION: Final = (0x7F00_0000_0000, 4 << 20)
UNLIMITED: Final = Limits(
    opens=FAR,
    user_opens=FAR,
    user_objects=FAR,
    user_pages=FAR,
    threads=FAR,
    nodes=FAR,
    refs=FAR,
    notifications=FAR,
    buffers=FAR,
    unread=FAR,
)


class _Region:
    def store(self, offset: int, data: bytes | bytearray) -> None:
        """Have no bytes."""


class World:
    """A context manager, a process with much of something, and a third one."""

    def __init__(self) -> None:
        """Let all have an object, a reference and a buffer."""
        self.engine = Engine(lambda: 0, limits=UNLIMITED)
        self.context = self.engine.add_context("binder")
        self.data: dict[int, bytes] = {}
        self.manager, self.much, self.third = (self.open(pid) for pid in (1, 2, 3))
        self.meter = Meter()
        self.measured: dict[str, int] = {}
        self.waiting: list[Generator[object, object, object]] = []
        # That of the last step.
        self.outcome: Outcome | None = None
        self.finish(self.manager.ioctl(Task(1, 1), uapi.BINDER_SET_CONTEXT_MGR, bytes(4)))

    def open(self, pid: int, euid: int = 0) -> Process:
        """Open the device and map it, with all of its pages present."""
        process = self.context.open(pid, euid, _Region())
        process.map(*REGION)
        assert process.allocation is not None
        process.allocation.pages = bytearray([2]) * (REGION[1] // PAGE_SIZE)
        return process

    def thread(self, process: Process) -> Thread:
        """The first thread of a process."""
        thread = process.thread(Task(process.pid, process.pid))
        assert thread is not None
        return thread

    def perform(self, effect: object) -> object:
        """Do what a step asks for."""
        match effect:
            case CopyIn():
                data = self.data.get(effect.address, b"")
                return data[: effect.size]
            case CopyOut():
                return len(effect.data)
            case CopyToBuffer():
                return effect.size
            case Wait():
                effect.parked = False
                return -4
            case GetFile():
                return -9
            case SetNice():
                return effect.nice
        assert isinstance(effect, Populate)
        return 0

    def finish(self, step: Generator[object, object, None]) -> None:
        """Drive a step to its end, uncounted."""
        Meter.drive(self.uncounted, step, self.perform)

    @property
    def uncounted(self) -> Meter:
        """A meter that does not measure."""
        meter = Meter()
        meter.run = lambda function, *arguments: function(*arguments)  # type: ignore[method-assign]
        return meter

    # -- measured

    def measure(self, name: str, do: Callable[[], object]) -> None:
        """Keep what was touched between two yields, at most."""
        self.meter.most = 0
        with self.meter:
            do()
        self.measured[name] = max(self.meter.most, self.measured.get(name, 0))
        for wait in self.engine.ready:
            wait.owner = None
        self.engine.ready.clear()
        self.engine.poll_ready.clear()
        self.engine.freed.clear()

    def read(self, pieces: Iterator[str]) -> None:
        """Read a log, measured."""
        self.meter.read(pieces)

    def step(self, name: str, step: Generator[object, object, None]) -> None:
        """Measure a step."""

        def drive() -> None:
            self.outcome = self.meter.drive(step, self.perform)

        self.measure(name, drive)

    def ioctl(self, name: str, process: Process, argument: bytes = b"", *, tid: int = 0) -> None:
        """Measure an ioctl by its name."""
        number = getattr(uapi, name)
        argument += bytes(uapi.ioctl_size(number) - len(argument))
        self.step(name, process.ioctl(Task(tid or process.pid, process.pid), number, argument))

    def write(self, name: str, process: Process, *commands: bytes, read: int = 0) -> None:
        """Measure a write of commands, and a read."""
        stream = b"".join(commands)
        argument = uapi.binder_write_read.pack(len(stream), 0, 0x4000, read, 0, 0x3000)
        task = Task(process.pid, process.pid)
        self.step(name, process.ioctl(task, uapi.BINDER_WRITE_READ, argument, stream, nonblock=True))

    def do(self, name: str, process: Process, *values: int) -> None:
        """Measure one command by its name."""
        self.write(name, process, command(getattr(uapi, name), *values))

    def transaction(self, name: str, process: Process, data: bytes, offsets: bytes, flags: int = 0) -> None:
        """Measure a call to the object that handle 0 means, or a reply."""
        number = getattr(uapi, name)
        self.data[0x5000], self.data[0x6000] = data, offsets
        fields = (0, 0, 0, flags, 0, 0, len(data), len(offsets), 0x5000, 0x6000)
        payload = uapi.binder_transaction_data.pack(*fields)
        if name.endswith("_SG"):
            payload += (64).to_bytes(8, "little")
        self.write(name, process, number.to_bytes(4, "little") + payload)


# -- much of something: (world, how many)


def nodes(world: World, count: int) -> None:
    """Objects of one process."""
    for number in range(count):
        node = world.much.get_or_create_node(0x1_0000 + 16 * number, number, 0)
        assert node is not None
        node.local_strong_refs = node.local_weak_refs = 1
        node.has_strong_ref = node.has_weak_ref = True
        node.put()


def _refs(process: Process, owner: Process, count: int) -> None:
    for number in range(count):
        node = owner.get_or_create_node(0x1_0000 + 16 * number, number, 0)
        assert node is not None
        assert process.increment_ref_for_node(node, strong=False, target=None) > 0
        node.put()


def refs(world: World, count: int) -> None:
    """References of one process, each of which is to be told of a death and of a freeze."""
    _refs(world.much, world.third, count)
    for ref in list(world.much.refs_by_desc.values()):
        ref.death = Death(world.much, 7)
        ref.freeze = Freeze(world.much, 7)


def references_to_one(world: World, count: int) -> None:
    """Processes with a reference to one object, each of which is to be told of a death and of a freeze."""
    node = world.much.get_or_create_node(0x10, 0, 0)
    assert node is not None
    for number in range(count):
        other = world.context.open(1000 + number, 0, _Region())
        other.increment_ref_for_node(node, strong=False, target=None)
        ref = other.refs_by_desc[1]
        ref.death = Death(other, 7)
        ref.freeze = Freeze(other, 7)
    node.put()


def deaths(world: World, count: int) -> None:
    """Deaths that have been told, with one cookie."""
    for _ in range(count):
        death = Death(world.much, 7)
        death.kind = DEAD_BINDER_AND_CLEAR
        death.deliver(world.thread(world.much), bytearray())


def deaths_with_cookies(world: World, count: int) -> None:
    """Deaths that have been told, each with its own cookie; the one that is acknowledged was told last."""
    for number in range(count):
        death = Death(world.much, 7 + count - 1 - number)
        death.kind = DEAD_BINDER_AND_CLEAR
        death.deliver(world.thread(world.much), bytearray())


def freezes(world: World, count: int) -> None:
    """Freezes that have been told, each with its own cookie; the one that is acknowledged was told last."""
    for number in range(count):
        freeze = Freeze(world.much, 7 + count - 1 - number)
        freeze.deliver(world.thread(world.much), bytearray())
        freeze.cleared = True


def _buffer(process: Process, pid: int, node: Node | None = None, *, is_async: bool = False) -> Buffer:
    assert process.allocation is not None
    buffer = process.allocation.allocate(8, pid, is_async=is_async)
    assert isinstance(buffer, Buffer)
    buffer.target_node = node
    return buffer


def buffers(world: World, count: int) -> None:
    """Buffers that have been received and not freed."""
    for _ in range(count):
        _buffer(world.much, 1).allow_user_free = True


def holes(world: World, count: int) -> None:
    """Buffers of which every other one has been freed."""
    assert world.much.allocation is not None
    for buffer in [_buffer(world.much, 1) for _ in range(2 * count)][::2]:
        world.much.allocation.release(buffer)


def threads(world: World, count: int) -> None:
    """Threads that poll, and have something else to do."""
    for number in range(count):
        task = Task(1000 + number, 2)
        world.much.poll(task)
        world.engine.stats.created[6] += 1
        world.much.threads[task.tid].enqueue_deferred(TransactionComplete(uapi.BR_TRANSACTION_COMPLETE))


def processes(world: World, count: int) -> None:
    """Opens of other processes."""
    for number in range(count):
        world.context.open(1000 + number, 0, _Region())


def opens(world: World, count: int) -> None:
    """Opens of one process."""
    for _ in range(count):
        world.context.open(2, 0, _Region())


def users(world: World, count: int) -> None:
    """Opens of other users."""
    for number in range(count):
        world.context.open(1000 + number, 1000 + number, _Region())


def process_work(world: World, count: int) -> None:
    """Work that a process has not read."""
    for _ in range(count):
        world.much.enqueue(_complete(world))


def thread_work(world: World, count: int) -> None:
    """Work that a thread has not read."""
    for _ in range(count):
        thread = world.thread(world.much)
        thread.count_unread()
        thread.enqueue(_complete(world))


def _complete(world: World) -> TransactionComplete:
    world.engine.stats.created[6] += 1
    return TransactionComplete(uapi.BR_TRANSACTION_COMPLETE)


def one_way_calls(world: World, count: int) -> None:
    """One-way calls that wait behind another of their node, in a frozen process."""
    node = world.context.manager
    assert node is not None
    manager = world.manager
    sender = world.thread(world.third)
    node.has_async_transaction = True
    manager.is_frozen = True
    for _ in range(count):
        call = Transaction(
            sender, world.engine.next_debug_id(), 0, uapi.TF_ONE_WAY | uapi.TF_UPDATE_TXN, is_reply=False
        )
        call.to_process = manager
        manager.outstanding_transactions += 1
        node.local_strong_refs += 1
        call.buffer = _buffer(manager, 9, node, is_async=True)
        call.buffer.transaction = call
        node.async_todo.append(call)
        call.queue = node.async_todo


def freezers(world: World, count: int) -> None:
    """Steps that wait until a process can be frozen."""
    world.much.outstanding_transactions = 1
    argument = uapi.binder_freeze_info.pack(2, 1, 1000)
    world.waiting += [freeze.ioctl_freeze(world.thread(world.third), argument) for _ in range(count)]
    for step in world.waiting:
        assert isinstance(next(step), Wait)


def contexts(world: World, count: int) -> None:
    """Devices."""
    for number in range(count):
        world.engine.add_context(str(number))


def objects(world: World, count: int) -> None:
    """Objects in one transaction, which has been received."""
    thing = uapi.flat_binder_object.pack(uapi.BINDER_TYPE_BINDER, 0, 0x10, 0)
    offsets = b"".join((24 * number).to_bytes(8, "little") for number in range(count))
    world.data[0x5000] = thing * count
    world.transaction("BC_TRANSACTION", world.third, thing * count, offsets, uapi.TF_ONE_WAY)


KINDS: Final = [
    nodes,
    refs,
    references_to_one,
    deaths,
    deaths_with_cookies,
    freezes,
    buffers,
    holes,
    threads,
    processes,
    opens,
    users,
    process_work,
    thread_work,
    one_way_calls,
    freezers,
    contexts,
]


LIMITED: Final = [references_to_one, buffers, holes, threads, processes, opens, users, one_way_calls, freezers]


def everything(world: World) -> None:
    """Do all that can be asked of the engine, what destroys last."""
    much, third, manager = world.much, world.third, world.manager
    object_ = uapi.flat_binder_object.pack(uapi.BINDER_TYPE_BINDER, 0, 0x99_0000, 0)
    world.measure("open", lambda: world.meter.run(world.context.open, 4, 0, _Region()))
    world.measure("add_context", lambda: world.meter.run(world.engine.add_context, "other"))
    world.measure("poll", lambda: world.meter.run(much.poll, Task(2, 2)))
    for name in ("BINDER_VERSION", "BINDER_SET_MAX_THREADS", "BINDER_ENABLE_ONEWAY_SPAM_DETECTION"):
        world.ioctl(name, much)
    world.ioctl("BINDER_SET_CONTEXT_MGR", much)
    world.ioctl("BINDER_SET_CONTEXT_MGR_EXT", much, object_)
    world.ioctl("BINDER_GET_EXTENDED_ERROR", much)
    world.ioctl("BINDER_GET_NODE_DEBUG_INFO", much, (0x1_0000 + 16 * 5).to_bytes(8, "little"))
    world.ioctl("BINDER_GET_NODE_INFO_FOR_REF", manager, (1).to_bytes(4, "little"))
    world.ioctl("BINDER_GET_FROZEN_INFO", third, uapi.binder_frozen_status_info.pack(2, 0, 0))
    world.measure("finish_transaction", lambda: world.meter.run(_end_a_transaction, much))
    for enable in (1, 0):
        world.ioctl("BINDER_FREEZE", third, uapi.binder_freeze_info.pack(2, enable, 0))
    for name in ("BC_INCREFS", "BC_ACQUIRE", "BC_RELEASE", "BC_DECREFS"):
        world.do(name, much, 0)
        world.do(name, much, 1)
    for name in ("BC_INCREFS_DONE", "BC_ACQUIRE_DONE"):
        world.do(name, much, 0x1_0000 + 16 * 5, 5)
    world.do("BC_FREE_BUFFER", much, REGION[0] + 8 * 5)
    for name in ("BC_REQUEST_DEATH_NOTIFICATION", "BC_REQUEST_FREEZE_NOTIFICATION"):
        world.do(name, much, 0, 0x77)
    for name in ("BC_CLEAR_DEATH_NOTIFICATION", "BC_CLEAR_FREEZE_NOTIFICATION"):
        world.do(name, much, 1, 7)
        world.do(name, much, 0, 0x77)
    for name in ("BC_DEAD_BINDER_DONE", "BC_FREEZE_NOTIFICATION_DONE"):
        world.do(name, much, 0xDEAD)
        world.do(name, much, 7)
    for name in ("BC_REGISTER_LOOPER", "BC_ENTER_LOOPER", "BC_EXIT_LOOPER", "BC_ATTEMPT_ACQUIRE", "BC_ACQUIRE_RESULT"):
        world.do(name, much)
    for name in ("BC_TRANSACTION", "BC_TRANSACTION_SG", "BC_REPLY", "BC_REPLY_SG"):
        for process in (much, third):
            for flags in (uapi.TF_ONE_WAY, uapi.TF_ONE_WAY | uapi.TF_UPDATE_TXN, 0):
                world.transaction(name, process, object_, bytes(8), flags)
    logs = world.engine.logs
    for name, log in (("state", logs.state), ("stats", logs.stats), ("transactions", logs.transactions)):
        world.measure(name, functools.partial(world.read, log()))
    for pid in (1, 2):
        world.measure("proc", functools.partial(world.read, logs.proc(pid)))
    many = command(uapi.BC_DEAD_BINDER_DONE, 0xDEAD) * 4096
    world.write("4,096 commands", much, many)
    world.write("read", much, read=FAR)
    assert world.outcome is not None
    world.step("undeliver", much.undeliver(Task(2, 2), world.outcome, 4))
    world.write("read again", much, read=FAR)
    world.write("read", manager, read=FAR)
    world.meter.instrument()
    for process in (much, manager, third):
        world.step("flush", process.flush())
    world.ioctl("BINDER_THREAD_EXIT", much)
    for process in (much, manager, third):
        world.step("release", process.release())


def _end_a_transaction(process: Process) -> None:
    process.is_frozen = True
    process.outstanding_transactions = 1
    process.finish_transaction()


def measured(make: Callable[[World, int], None], count: int) -> dict[str, int]:
    """What each thing that can be asked for touches at most between two yields, with so many of something."""
    world = World()
    make(world, count)
    world.meter.instrument()
    everything(world)
    return world.measured


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_step_touches_more_where_there_is_more(kind: Callable[[World, int], None]) -> None:
    """A hundred times as many cost a constant more, or the logarithm."""
    most = LIMIT if kind in LIMITED else MANY
    few, some, many = (measured(kind, count) for count in (FEW, SOME, most))

    assert {} == {name: touched for name, touched in many.items() if touched > MOST}
    assert {} == {
        name: (few[name], some[name], touched)
        for name, touched in many.items()
        if touched > GROWTH * some[name] + SLACK
    }
