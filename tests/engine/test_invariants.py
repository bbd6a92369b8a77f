"""The checker bites: each thing that must hold is broken once, and named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import stats
from binderfs_fuse.engine.invariants import check, check_allocator
from binderfs_fuse.engine.node import CLEAR_DEATH_NOTIFICATION
from binderfs_fuse.engine.range_alloc import ACTIVE, LRU, PAGE_SIZE, Buffer, RangeAllocator
from binderfs_fuse.engine.thread import POLL
from binderfs_fuse.engine.transaction import Transaction
from binderfs_fuse.engine.work import TransactionComplete
from tests.engine.machine import Machine
from tests.engine.wire import parcel

if TYPE_CHECKING:
    from collections.abc import Callable

    from binderfs_fuse.engine import Engine, Process
    from binderfs_fuse.engine.node import Node, Ref
    from binderfs_fuse.engine.thread import Thread


class Scene:
    """A mount with something of everything in it."""

    def __init__(self) -> None:
        """Let two processes talk."""
        machine = Machine()
        self.engine: Engine = machine.engine
        manager, client, gone = machine.manager(), machine.client(), machine.client()
        handle = machine.share(client, manager)
        gone_handle = machine.share(gone, manager, 0x500)
        manager.do(uapi.BC_RELEASE, machine.share(machine.client(), manager, 0x600))
        manager.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, handle, 1)
        manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, 2)
        assert manager.news() == ["BR_FROZEN_BINDER"]
        manager.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, gone_handle, 3)
        gone.die()
        assert manager.news() == ["BR_DEAD_BINDER"]
        client.send(0, parcel().binder(0x1000, 0x2000).binder(0x1000, 0x2000, weak=True))
        manager.read(nonblock=True)
        manager.send(handle, parcel().handle(handle).handle(handle, weak=True))
        client.thread().tell()
        client.thread().tell()
        self.waiting = manager.thread()
        manager.thread().news()
        assert self.waiting.read().parked
        self.manager: Process = manager.process
        self.client: Process = client.process
        self.thread: Thread = manager.process.threads[manager.tid]
        self.caller: Thread = client.process.threads[client.tid]
        self.sleeper: Thread = manager.process.threads[self.waiting.tid]
        self.node: Node = client.process.nodes[0x1000]
        self.zero: Node = manager.process.nodes[0]
        (self.dead,) = self.engine.dead_nodes
        self.ref: Ref = manager.process.refs_by_desc[handle]
        assert self.thread.transaction_stack is not None
        assert manager.process.allocation is not None
        self.transaction: Transaction = self.thread.transaction_stack
        self.allocation: RangeAllocator = manager.process.allocation
        check(self.engine, quiet=True)


Broken = tuple[str, "Callable[[Scene], object]", str]


def _set(path: str, value: object) -> Callable[[Scene], object]:
    """Set an attribute of the scene, by its path."""

    def apply(scene: Scene) -> None:
        *objects, name = path.split(".")
        thing: object = scene
        for part in objects:
            thing = getattr(thing, part)
        setattr(thing, name, value)

    return apply


def _add(path: str, difference: int) -> Callable[[Scene], object]:
    """Change a number of the scene, by its path."""

    def apply(scene: Scene) -> None:
        *objects, name = path.split(".")
        thing: object = scene
        for part in objects:
            thing = getattr(thing, part)
        setattr(thing, name, getattr(thing, name) + difference)

    return apply


def _pending(scene: Scene) -> Transaction:
    """A call that nobody has read."""
    transaction = scene.caller.todo.last
    assert isinstance(transaction, Transaction)
    return transaction


BROKEN: list[Broken] = [
    ("a dead process is listed", _set("client.is_dead", True), "is dead, and listed"),
    ("a dead thread is listed", _set("caller.is_dead", True), "thread 101 is dead or another one"),
    ("a process is not in order", lambda s: s.engine.opens_in_order.remove(s.client.serial), "processes in order"),
    ("a process is not by its pid", lambda s: s.engine.opens_by_pid.clear(), "processes by pid"),
    ("a dead node is not in order", lambda s: s.engine.dead_in_order.remove(s.dead.died), "dead nodes in order"),
    ("the opens are miscounted", lambda s: setattr(s.engine.quota.opens, "held", 7), "opens: 7"),
    ("a thread is not in order", lambda s: s.manager.tids.remove(s.thread.tid), "threads in order"),
    ("a thread polls unnoticed", lambda s: setattr(s.thread, "looper", s.thread.looper | POLL), "have polled"),
    ("too few threads are busy", _add("manager.busy_threads", -1), "busy threads"),
    ("a list does not lead back", lambda s: setattr(s.caller.todo.last, "previous", None), "does not lead back"),
    ("a list ends elsewhere", lambda s: setattr(s.caller.todo, "last", None), "ends elsewhere"),
    ("a list is miscounted", _add("caller.todo.count", 1), "length of a list"),
    ("a list is out of order", lambda s: setattr(s.caller.todo.last, "serial", -1), "serial numbers"),
    ("an index is short", lambda s: s.manager.delivered_death._index.remove(3 << 64), "index of a list"),
    ("a thread has another number", _set("caller.tid", 5), "is dead or another one"),
    ("a node has another ptr", _set("node.ptr", 5), "node 0x1000 is another one"),
    ("a ref is in one map only", lambda s: s.manager.refs_by_node.pop(s.node), "refs by node"),
    ("a desc is lost", _add("manager._next_desc", 1), "descs"),
    ("a desc is free and used", lambda s: s.manager._free_descs.append(1), "descs are free and used"),
    ("a desc is free twice", lambda s: s.manager._free_descs.append(3), "free descs"),
    (
        "the free descs are no heap",
        lambda s: (_set("manager._free_descs", [4, 3])(s), _add("manager._next_desc", 1)(s)),
        "no heap",
    ),
    ("a thread sleeps that does not wait", _set("sleeper.looper", 0), "is not waiting"),
    ("two threads are requested", _set("manager.requested_threads", 2), "2 threads are requested"),
    ("a process is in use by less than nobody", _set("client.tmp_ref", -1), "tmp_ref -1"),
    ("a process is in use by nobody known", _set("client.tmp_ref", 1), "tmp_ref 1"),
    ("work waits, and so does a thread", lambda s: s.manager.enqueue(s.zero), "threads sleep, and there is work"),
    ("a buffer holds more than it can", _set("transaction.buffer.data_size", 1 << 20), "holds 1048"),
    ("a buffer has another's transaction", lambda s: setattr(_pending(s), "buffer", None), "or none"),
    ("a buffer has another's node", _set("transaction.buffer.target_node", None), "local strong refs"),
    (
        "a buffer has a stranger's node",
        lambda s: setattr(served(s).buffer, "target_node", s.node),
        "another process",
    ),
    ("too few transactions are outstanding", _add("manager.outstanding_transactions", -1), "outstanding transactions"),
    ("too many transactions are outstanding", _add("manager.outstanding_transactions", 1), "outstanding transactions"),
    (
        "work is on a wrong list",
        lambda s: s.client.enqueue(TransactionComplete(uapi.BR_TRANSACTION_COMPLETE)),
        "wrong kind of list",
    ),
    ("work does not know its list", lambda s: setattr(_pending(s), "queue", None), "does not know of"),
    ("work is on a list twice", lambda s: s.caller.todo.append(_pending(s)), "on two lists, or twice"),
    (
        "work names a list that it is not on",
        lambda s: setattr(s.node, "queue", s.client.todo),
        "the list that it names",
    ),
    ("a node is another's work", lambda s: s.client.enqueue(s.zero), "another process's work"),
    ("a dead node has work", lambda s: s.dead.async_todo.append(served(s)), "a dead node has work"),
    ("a call goes elsewhere", lambda s: setattr(_pending(s), "to_process", s.manager), "another process's work"),
    (
        "an unread buffer may be freed",
        lambda s: setattr(_pending(s).buffer, "allow_user_free", True),
        "waits without a buffer of its own",
    ),
    ("a one-way call has a caller", lambda s: setattr(_pending(s), "flags", 1), "has a caller that waits"),
    ("a told state was not sent", lambda s: setattr(s.ref.freeze, "sent", False), "was not sent"),
    ("an empty error is queued", lambda s: s.caller.enqueue(s.caller.return_error), "is queued and empty"),
    ("an error is nowhere", _set("caller.return_error.queue", ()), "the list that it names"),
    ("a stack is a ring", lambda s: setattr(s.transaction, "from_parent", s.transaction), "its stack is a ring"),
    ("a stack holds another's call", _set("transaction.from_thread", None), "is on its stack, and another's"),
    ("a served call goes elsewhere", lambda s: setattr(served(s), "to_process", s.client), "goes to another process"),
    (
        "a served call has another's buffer",
        lambda s: setattr(served(s).buffer, "transaction", None),
        "another's buffer",
    ),
    ("a thread sleeps on its work", _set("sleeper.process_todo", True), "sleeps, and has work"),
    ("descriptors are forgotten", lambda s: s.caller.closes.append(3), "left to close"),
    ("a strong ref is not counted", _add("node.internal_strong_refs", 1), "internal strong refs"),
    (
        "a ref is another node's",
        lambda s: s.zero.refs.add(s.ref.debug_id, s.ref),
        "internal strong refs|another node's",
    ),
    ("a node is in use by less than nobody", _set("node.tmp_refs", -1), "tmp_refs -1"),
    ("a node is in use by nobody known", _set("node.tmp_refs", 1), "tmp_refs 1"),
    ("a dead node is held by its process", _set("dead.local_strong_refs", 1), "local refs"),
    ("a dead node is held weakly by its process", _set("dead.local_weak_refs", -1), "local refs"),
    ("a strong hold is not counted", _add("node.local_strong_refs", -1), "local strong refs"),
    ("a weak hold is not counted", _add("node.local_weak_refs", -1), "local weak refs"),
    ("a strong hold is nobody's", _add("zero.local_strong_refs", 1), "local strong refs"),
    ("a weak hold is nobody's", _add("zero.local_weak_refs", 1), "local weak refs"),
    ("a pending hold is not counted", _set("node.pending_strong_ref", True), "local strong refs"),
    ("a pending weak hold is not counted", _set("node.pending_weak_ref", True), "local weak refs"),
    ("one-way calls wait for none", _set("zero.has_async_transaction", False), "wait for none"),
    ("a one-way call is nowhere", lambda s: s.zero.async_todo.popleft(), "one-way buffers|outstanding"),
    ("a ref is not its process's", lambda s: s.manager.refs_by_desc.pop(1), "refs by node|does not know it"),
    ("a ref has no count", _set("ref.strong", 0), "internal strong refs"),
    ("a ref has a negative count", _set("ref.weak", -1), "s [0-9]+ w -1"),
    (
        "a notification is another's",
        lambda s: setattr(s.ref.death, "process", s.client),
        "death notification is another",
    ),
    ("a notification is of another kind", lambda s: setattr(s.ref.death, "kind", CLEAR_DEATH_NOTIFICATION), "kind of"),
    ("a notification is nowhere", lambda s: setattr(s.ref.death, "queue", s.manager.todo), "the list that it names"),
    ("a state is another's", lambda s: setattr(s.ref.freeze, "process", s.client), "freeze notification is another"),
    ("a state is cleared", lambda s: setattr(s.ref.freeze, "cleared", True), "is cleared"),
    (
        "a state is nowhere",
        lambda s: setattr(s.manager.delivered_freeze.popleft(), "queue", s.manager.delivered_freeze),
        "the list that it names",
    ),
    ("a manager is dead", lambda s: setattr(s.engine.contexts["binder"], "manager", s.dead), "its manager is dead"),
    ("a wait is ready twice", lambda s: s.engine.ready.extend([s.thread.wait] * 2), "waits that are ready"),
    ("a wait is ready and parked", lambda s: s.engine.ready.append(s.sleeper.wait), "ready and parked"),
    ("a thread is miscounted", lambda s: count(s, stats.THREAD, 1), "stats: threads"),
    ("a node is miscounted", lambda s: count(s, stats.NODE, -1), "stats: nodes"),
    ("a ref is miscounted", lambda s: count(s, stats.REF, 1), "stats: refs"),
    ("a death is miscounted", lambda s: count(s, stats.DEATH, 1), "stats: deaths"),
    ("a freeze is miscounted", lambda s: count(s, stats.FREEZE, -1), "stats: freezes"),
    ("a process is miscounted", lambda s: count(s, stats.PROC, -1), "stats: procs"),
    ("a transaction is miscounted", lambda s: count(s, stats.TRANSACTION, 1), "stats: transactions"),
    ("a completion is miscounted", lambda s: count(s, stats.TRANSACTION_COMPLETE, 1), "stats: transaction_completes"),
    ("an open is miscounted", lambda s: account(s, "opens", 1), "opens"),
    ("an object is miscounted", lambda s: account(s, "objects", 1), "objects"),
    ("a page is miscounted", lambda s: account(s, "pages", -1), "pages"),
    ("a region is inconsistent", _set("allocation.free_async_space", 0), "free asynchronous space"),
]


def served(scene: Scene) -> Transaction:
    """The call that the manager serves."""
    assert scene.transaction.from_parent is not None
    return scene.transaction.from_parent


def count(scene: Scene, kind: int, difference: int) -> None:
    """Miscount a kind of object."""
    scene.engine.stats.created[kind] += difference


def account(scene: Scene, name: str, difference: int) -> None:
    """Miscount what a user holds."""
    held = scene.engine.accounts[0]
    setattr(held, name, getattr(held, name) + difference)


@pytest.mark.parametrize(("break_it", "complaint"), [item[1:] for item in BROKEN], ids=[item[0] for item in BROKEN])
def test_the_checker_bites(break_it: Callable[[Scene], object], complaint: str) -> None:
    """Something that cannot be is complained of, and nothing is changed by looking."""
    scene = Scene()
    break_it(scene)

    with pytest.raises(AssertionError, match=complaint):
        check(scene.engine, quiet=True)


@pytest.mark.parametrize("path", ["manager.outstanding_transactions", "node.local_strong_refs", "node.local_weak_refs"])
def test_steps_under_way_may_hold_more(path: str) -> None:
    """Unless all is quiet a count may be above its holders', never below."""
    scene = Scene()
    _add(path, 1)(scene)
    check(scene.engine)
    _add(path, -2)(scene)

    with pytest.raises(AssertionError, match="its holders say"):
        check(scene.engine)


@pytest.mark.parametrize("path", ["node.tmp_refs", "client.tmp_ref"])
def test_steps_under_way_may_use_things(path: str) -> None:
    """Temporary references are fine while steps are under way."""
    scene = Scene()
    _add(path, 1)(scene)
    check(scene.engine)

    with pytest.raises(AssertionError, match="tmp_ref"):
        check(scene.engine, quiet=True)


# -- regions


def region(*, free: int = 1) -> RangeAllocator:
    """A region of four pages with three buffers of 64 bytes, of which one is free, and one asynchronous."""
    allocation = RangeAllocator(4 * PAGE_SIZE)
    buffers = []
    for index in range(3):
        buffer = allocation.allocate(64, 1, is_async=index == 2)
        assert isinstance(buffer, Buffer)
        buffers.append(buffer)
        missing = allocation.missing_pages(buffer)
        if missing is not None:
            allocation.installed(*missing)
    allocation.release(buffers[free])
    check_allocator(allocation)
    return allocation


def buffers_of(allocation: RangeAllocator) -> list[Buffer]:
    """All buffers by their addresses."""
    buffers = [allocation.first]
    while buffers[-1].next is not None:
        buffers.append(buffers[-1].next)
    return buffers


def _break_link(allocation: RangeAllocator) -> None:
    buffers_of(allocation)[1].previous = None


def _free_beside_free(allocation: RangeAllocator) -> None:
    allocation.free_buffers.insert(buffers_of(allocation)[2])
    buffers_of(allocation)[2].free = True
    allocation.allocated.pop(128)


def _wrong_order(allocation: RangeAllocator) -> None:
    root = allocation.free_buffers.root
    assert root is not None
    root.left, root.right = root.right, root.left


def _lost_parent(allocation: RangeAllocator) -> None:
    root = allocation.free_buffers.root
    assert root is not None
    child = root.left or root.right
    assert child is not None
    child.parent = None


def _red_root(allocation: RangeAllocator) -> None:
    root = allocation.free_buffers.root
    assert root is not None
    root.red = True


def _black_child(allocation: RangeAllocator) -> None:
    root = allocation.free_buffers.root
    assert root is not None
    child = root.left or root.right
    assert child is not None
    child.red = False


def _red_under_red(allocation: RangeAllocator) -> None:
    root = allocation.free_buffers.root
    assert root is not None
    child = root.left or root.right
    assert child is not None
    child.left = Buffer(0, 1)
    child.left.parent = child
    child.left.red = True


REGIONS: list[tuple[str, Callable[[RangeAllocator], object], str]] = [
    ("a gap", lambda a: setattr(buffers_of(a)[1], "offset", 72), "offset"),
    ("nothing", lambda a: setattr(buffers_of(a)[0], "size", 0), "has size 0"),
    ("a broken link", _break_link, "previous is not the one before it"),
    ("two free neighbours", _free_beside_free, "free beside a free one"),
    ("an early end", lambda a: setattr(a, "size", 5 * PAGE_SIZE), "end of the last buffer"),
    ("a forgotten buffer", lambda a: a.allocated.pop(0), "allocated buffers"),
    ("a free buffer outside the tree", lambda a: a.free_buffers.remove(buffers_of(a)[1]), "the free tree holds"),
    ("a tree out of order", _wrong_order, "order of the free tree"),
    ("a child without a parent", _lost_parent, "does not know its parent"),
    ("a red root", _red_root, "root is red"),
    ("a black child too many", _black_child, "black height"),
    ("red under red", _red_under_red, "red under red"),
    ("an unknown sender", lambda a: a.async_by_pid.clear(), "asynchronous buffers by pid"),
    ("a wrong count of a sender's", lambda a: a.async_by_pid.update({1: [2, 64]}), "asynchronous buffers by pid"),
    ("asynchronous space", lambda a: setattr(a, "free_async_space", 0), "free asynchronous space"),
    ("an unused page in use", lambda a: a.pages.__setitem__(0, LRU), "page 0 is in use, and its state 2"),
    ("a missing page in use", lambda a: a.pages.__setitem__(0, 0), "page 0 is in use, and its state 0"),
    ("an active page without a buffer", lambda a: a.pages.__setitem__(1, ACTIVE), "page 1 is active without"),
    ("a page above the watermark", lambda a: a.pages.__setitem__(3, LRU), "above the high watermark 1"),
    ("a page too many", lambda a: a.pages.append(0), "size in pages"),
]


@pytest.mark.parametrize(("break_it", "complaint"), [item[1:] for item in REGIONS], ids=[item[0] for item in REGIONS])
def test_the_allocators_checker_bites(break_it: Callable[[RangeAllocator], object], complaint: str) -> None:
    """A region that cannot be so is complained of."""
    allocation = region()
    break_it(allocation)

    with pytest.raises(AssertionError, match=complaint):
        check_allocator(allocation)


def test_pages_may_be_missing_while_they_are_made_present() -> None:
    """That is what a step may be about."""
    allocation = region()
    allocation.pages[0] = 0

    check_allocator(allocation, quiet=False)
