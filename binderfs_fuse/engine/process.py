"""Processes: one for each open of a device (binder_internal.h `struct binder_proc`).

A process owns threads, nodes, refs to other processes' nodes, and the buffers in its receive region. Lists keep the
driver's order: newest first where it adds at the head, by key where it has a tree.

Lifetime: from `Context.open` to `release`; what other steps are still using (`tmp_ref`) stays until they are done, and
then `engine.freed` names the process so that the shell can let go of its region.

Sources: Linux 7.3 binder.c `binder_open`, `binder_ioctl`, `binder_deferred_flush`, `binder_deferred_release`,
`binder_poll`.

The end of a process is piecewise, as in the driver: `release` gives turns. From its beginning the process is dead and
not listed. Then go its threads, its nodes, its refs, and the work that nobody reads. Others may meet nodes that are
still alive, of a process that is dead. A call to one fails as to a dead node, and what it took is undone. No thread of
the process itself calls any more.

Invariants
----------
- `tids` holds the threads of `threads` in order; `pollers` those of them that have polled.
- `busy_threads` is the number of threads with a transaction on their stack.
- `refs_by_desc` and `refs_by_node` hold the same refs; `_next_desc` is above every desc in use, and what is free below
  it is in `_free_descs`.
- `allocation` is None until the mapping is known; then `address` is where the client has it.
"""

from __future__ import annotations

import heapq
from errno import EBUSY, EINVAL, ENOMEM, EPERM
from typing import TYPE_CHECKING, Final

from binderfs_fuse import uapi
from binderfs_fuse.engine import freeze, stats
from binderfs_fuse.engine.effects import TURN, Outcome, Pace
from binderfs_fuse.engine.limits import THREAD
from binderfs_fuse.engine.node import Node, Ref
from binderfs_fuse.engine.objects import release_few_objects, release_objects
from binderfs_fuse.engine.range_alloc import PAGE_SIZE, Buffer, RangeAllocator
from binderfs_fuse.engine.sorted_map import SortedMap
from binderfs_fuse.engine.stats import Stats
from binderfs_fuse.engine.thread import POLL, WAITING, Thread
from binderfs_fuse.engine.work import IndexedList, WorkList

if TYPE_CHECKING:
    from collections.abc import Callable

    from binderfs_fuse.engine.context import Context, Task
    from binderfs_fuse.engine.effects import Region, Step, Turns, Wait
    from binderfs_fuse.engine.limits import Account
    from binderfs_fuse.engine.priority import Scheduling
    from binderfs_fuse.engine.work import Work

# A larger mapping is used only up to here (binder_alloc.c).
MAX_REGION: Final = 4 << 20
_NO_USER: Final = 0xFFFF_FFFF
# Threads that have polled, and are looked at whether one is free: behind them one is taken to be.
_POLLERS: Final = 64
# Bytes that are cleared before it is time for others; a buffer with fewer is cleared at once.
_CLEARED: Final = 65536
POLLIN: Final = 0x001
POLLERR: Final = 0x008


class Process:
    """An open of a device by the process `pid` (thread group id in the mount's pid namespace)."""

    __slots__ = (
        "_all_bc",
        "_all_br",
        "_bc",
        "_br",
        "_free_descs",
        "_next_desc",
        "account",
        "address",
        "allocation",
        "async_recv",
        "busy_threads",
        "context",
        "default_priority",
        "default_scheduling",
        "delivered_death",
        "delivered_freeze",
        "engine",
        "euid",
        "freeze_waits",
        "freezings",
        "is_dead",
        "is_frozen",
        "max_threads",
        "nodes",
        "oneway_spam_detection_enabled",
        "outstanding_transactions",
        "pid",
        "pid_namespace",
        "pids",
        "pollers",
        "refs_by_desc",
        "refs_by_node",
        "region",
        "requested_threads",
        "requested_threads_started",
        "serial",
        "stats",
        "sync_recv",
        "threads",
        "tids",
        "tmp_ref",
        "todo",
        "user_ids",
        "waiting_threads",
    )

    def __init__(
        self,
        context: Context,
        pid: int,
        euid: int,
        region: Region,
        nice: int,
        pid_namespace: int,
        pids: dict[int, int],
        user_ids: list[tuple[int, int, int]] | None,
        scheduling: Scheduling,
        account: Account,
    ) -> None:
        self.account = account
        account.opens += 1
        account.quota.opens.held += 1
        self.context = context
        self.engine = context.engine
        self.serial = self.engine.next_serial()
        self.pid = pid
        self.euid = euid
        self.region = region
        self.default_priority = nice
        self.default_scheduling = scheduling
        self.pid_namespace = pid_namespace
        self.pids = pids
        self.user_ids = user_ids
        self.threads: dict[int, Thread] = {}
        self.tids: SortedMap[Thread] = SortedMap()
        self.pollers: SortedMap[Thread] = SortedMap()
        self.busy_threads = 0
        # The thread that waits last is woken first: a dict is a stack with removal.
        self.waiting_threads: dict[Thread, None] = {}
        self.nodes: SortedMap[Node] = SortedMap()
        self.refs_by_desc: dict[int, Ref] = {}
        self.refs_by_node: dict[Node, Ref] = {}
        self._next_desc = 1
        self._free_descs: list[int] = []
        self.todo = WorkList()
        self.delivered_death = IndexedList()
        self.delivered_freeze = IndexedList()
        self.allocation: RangeAllocator | None = None
        self.address = 0
        self.stats = Stats()
        self._bc = self.stats.bc
        self._br = self.stats.br
        self._all_bc = self.engine.stats.bc
        self._all_br = self.engine.stats.br
        self.max_threads = 0
        self.requested_threads = 0
        self.requested_threads_started = 0
        self.tmp_ref = 0
        self.outstanding_transactions = 0
        self.is_dead = False
        self.is_frozen = False
        self.sync_recv = False
        self.async_recv = False
        self.freeze_waits: SortedMap[Wait] = SortedMap()
        # How often its refs have been told that it is frozen or thawed.
        self.freezings = 0
        self.oneway_spam_detection_enabled = False

    # -- counters

    def count_command(self, command: int) -> None:
        """Count a BC_ command, known or not, by its number."""
        number = command & 0xFF
        bc = self._bc
        if number < len(bc):
            # Not `+=`, which mypyc leaves to Python's numbers: a tenth of the engine's time, by these four lines.
            bc[number] = bc[number] + 1
            all_bc = self._all_bc
            all_bc[number] = all_bc[number] + 1

    def count_return(self, command: int, count: int = 1) -> None:
        """Count a BR_ return by its number."""
        number = command & 0xFF
        br = self._br
        br[number] = br[number] + count
        all_br = self._all_br
        all_br[number] = all_br[number] + count

    # -- threads and work

    def is_full(self, count: int, limit: int, cost: int = 1) -> bool:
        """Whether there may not be one more of what there are `count` of here, or `cost` objects more for this user."""
        account = self.account
        return count >= limit or (account.objects + cost > account.object_lease and not account.has_objects(cost))

    def thread(self, task: Task) -> Thread | None:
        """The thread of the calling task, made on its first call; None where there are too many."""
        thread = self.threads.get(task.tid)
        if thread is None:
            if self.is_full(len(self.threads), self.engine.limits.threads, THREAD):
                return None
            thread = self.threads[task.tid] = Thread(self, task.tid)
            self.tids.add(task.tid, thread)
        thread.pid = task.pid
        thread.euid = task.euid
        thread.nice = task.nice
        thread.scheduling = task.scheduling
        return thread

    def enqueue(self, work: Work) -> None:
        """Add work for any thread."""
        self.todo.append(work)

    def select_thread(self) -> Thread | None:
        """Take the thread that began to wait last, if any: the caller must wake it up."""
        if self.waiting_threads:
            return self.waiting_threads.popitem()[0]
        return None

    def wake_up(self) -> None:
        """Let some thread look at the process's work."""
        thread = self.select_thread()
        if thread is not None:
            thread.wake_up()
        else:
            self.wake_up_pollers()

    def wake_up_pollers(self) -> None:
        """Let the threads that poll and have nothing else to do look again."""
        thread = self.pollers.first()
        looked = 0
        while thread is not None:
            # The rest of many are not looked at: to let them poll in vain costs nobody but themselves.
            looked += 1
            if looked > _POLLERS or thread.available_for_process_work():
                self.engine.poll_ready[self] = None
                return
            thread = self.pollers.after(thread.tid)

    def finish_transaction(self) -> None:
        """One of the transactions to this process has ended."""
        self.outstanding_transactions -= 1
        if not self.outstanding_transactions and self.is_frozen:
            self.wake_up_freezer()

    def wake_up_freezer(self) -> None:
        """Let the first of those go on who wait to freeze this process; it wakes the next."""
        wait = self.freeze_waits.first()
        if wait is not None and wait.parked:
            wait.parked = False
            self.engine.ready.append(wait)

    def has_pending_transactions(self) -> bool:
        """Whether any transaction is queued, served or waited for."""
        return self.outstanding_transactions > 0 or self.busy_threads > 0

    def pid_in(self, receiver: Process) -> int:
        """This process's pid as `receiver` sees it; 0 if it cannot."""
        if self.pid_namespace == receiver.pid_namespace:
            return self.pids.get(receiver.pid_namespace, self.pid)
        return self.pids.get(receiver.pid_namespace, 0)

    def user_id(self, euid: int) -> int:
        """A user's number in the process's own user namespace; 2^32 - 1 where it has none there."""
        if self.user_ids is None:
            return euid
        for inside, outside, count in self.user_ids:
            if outside <= euid < outside + count:
                return inside + euid - outside
        return _NO_USER

    # -- nodes and refs

    def get_or_create_node(self, ptr: int, cookie: int, flags: int) -> Node | None:
        """The node for `ptr`, with a temporary reference more; a new one gets `cookie` and `flags`.

        None where there are too many.
        """
        node = self.nodes.get(ptr)
        if node is None:
            if self.is_full(self.nodes.count, self.engine.limits.nodes):
                return None
            node = Node(self, ptr, cookie, flags)
            self.nodes.add(ptr, node)
        else:
            node.tmp_refs += 1
        return node

    def ref(self, desc: int, *, strong: bool) -> Ref | None:
        """The ref under `desc`; with `strong` only if it has a strong count."""
        ref = self.refs_by_desc.get(desc)
        if ref is not None and strong and not ref.strong:
            return None
        return ref

    def increment_ref_for_node(self, node: Node, *, strong: bool, target: Thread | None) -> int:
        """Count a reference to `node`, making the ref at need; its desc, or -EINVAL, or -ENOMEM for one too many."""
        ref = self.refs_by_node.get(node)
        if ref is None:
            if self.is_full(len(self.refs_by_node), self.engine.limits.refs):
                return -ENOMEM
            ref = Ref(self, node, self._take_desc(node))
            error = ref.increment(strong=strong, target=target)
            if error:
                ref.cleanup()
                return error
        else:
            error = ref.increment(strong=strong, target=target)
            if error:
                return error
        return ref.desc

    def _take_desc(self, node: Node) -> int:
        """The smallest free desc: 0 is for the context manager alone."""
        if node is self.context.manager and 0 not in self.refs_by_desc:
            return 0
        if self._free_descs:
            return heapq.heappop(self._free_descs)
        desc = self._next_desc
        self._next_desc += 1
        return desc

    def free_desc(self, desc: int) -> None:
        """Let a desc be used again."""
        if desc:
            heapq.heappush(self._free_descs, desc)

    def descs(self) -> int:
        """The number that all descs are below: at most one more than there ever were refs at once."""
        return self._next_desc

    def has_room_to_notify(self, thread: Thread) -> bool:
        """Whether `thread` may ask for another notification, however many it has not read or not acknowledged."""
        waiting = self.todo.count + self.delivered_death.count + self.delivered_freeze.count
        return not self.is_full(max(waiting, thread.todo.count), self.engine.limits.notifications)

    # -- buffers

    def map(self, address: int, size: int) -> None:
        """The client has mapped `size` bytes (whole pages) at `address`; at most 4 MiB of them are used."""
        if self.allocation is None:
            self.address = address
            self.allocation = RangeAllocator(
                min(size, MAX_REGION) & ~(PAGE_SIZE - 1), self.account, self.engine.limits.buffers
            )

    def release_buffer(self, thread: Thread, buffer: Buffer, *, is_failure: bool) -> bool:
        """Free a buffer and what it holds; the node's next one-way call may come now (binder.c `binder_free_buf`).

        True where that is to take turns: `thread.releasing` is what is left to do. Until then nobody else can free it.
        """
        transaction = buffer.transaction
        if transaction is not None:
            transaction.buffer = None
            buffer.transaction = None
        node = buffer.target_node
        if node is not None and buffer.async_transaction:
            if node.async_todo.first is not None:
                self.enqueue(node.async_todo.popleft())
                self.wake_up()
            else:
                node.has_async_transaction = False
        if (buffer.objects is not None and buffer.is_large(self.engine.chunk)) or (
            buffer.clear_on_free and buffer.size > _CLEARED
        ):
            thread.releasing = self._release_large(thread, buffer, is_failure=is_failure)
            return True
        if node is not None or buffer.objects:
            release_few_objects(self, thread, buffer, is_failure=is_failure)
        if buffer.clear_on_free:
            thread.cleared.append((self.region, buffer.offset, buffer.size))
            self.region.store(buffer.offset, bytes(buffer.size))
        self.free_buffer(buffer)
        return False

    def _release_large(self, thread: Thread, buffer: Buffer, *, is_failure: bool) -> Turns:
        pace = Pace(self.engine.chunk)
        # A process that is freed at one of the turns would have its buffers counted as gone.
        self.tmp_ref += 1
        buffer.allow_user_free = False
        yield from release_objects(self, thread, buffer, pace, is_failure=is_failure)
        if buffer.clear_on_free:
            thread.cleared.append((self.region, buffer.offset, buffer.size))
        yield from self.discard_buffer(buffer)
        self.drop_tmp_ref()

    def discard_buffer(self, buffer: Buffer) -> Turns:
        """Give a buffer's bytes back that may be many, cleared if the sender wished so."""
        if buffer.clear_on_free:
            for start in range(0, buffer.size, _CLEARED):
                self.region.store(buffer.offset + start, bytes(min(_CLEARED, buffer.size - start)))
                if start + _CLEARED < buffer.size:
                    yield TURN
        self.free_buffer(buffer)

    def free_buffer(self, buffer: Buffer) -> None:
        """Give a buffer's bytes back, which are cleared already if the sender wished so."""
        assert self.allocation is not None  # a buffer came from it
        buffer.clear_on_free = False
        self.allocation.release(buffer)

    # -- the file

    def ioctl(
        self, task: Task, command: int, argument: bytes, commands: bytes | None = None, *, nonblock: bool = False
    ) -> Step:
        """Carry out an ioctl of `task`; `argument` is what its command says that it carries.

        `commands` is the write buffer of a BINDER_WRITE_READ, as far as the shell has fetched it already. -EINVAL for
        an unknown command, -ENOMEM for a thread too many.
        """
        thread = self.thread(task)
        if thread is None:
            return _refuse()
        if command == uapi.BINDER_WRITE_READ:
            return thread.write_read(argument, commands, nonblock=nonblock)
        return _ioctl(thread, command, argument)

    def undeliver(self, task: Task, outcome: Outcome, copied: int) -> Step:
        """The data of the last outcome was stored only up to `copied` bytes; what to answer instead.

        Its files stay the shell's to close, and its `closes` are to be closed. Asks for nothing but turns.
        """
        return self.threads[task.tid].undeliver(outcome, copied)

    def installed(self, task: Task, numbers: list[int], outcome: Outcome) -> None:
        """The descriptors of the last outcome have these numbers in the client."""
        assert self.allocation is not None  # there was a buffer to put the numbers in
        assert len(numbers) == len(outcome.files)
        self.threads[task.tid].files_handed_over = False
        _, offset, _ = outcome.buffers[-1]
        buffer = self.allocation.allocated[offset]
        buffer.fds = numbers
        buffer.allow_user_free = True

    def install_failed(self, task: Task, outcome: Outcome) -> Step:
        """The descriptors of the last outcome could not be installed; what to answer instead, after turns alone."""
        return self.threads[task.tid].install_failed(outcome)

    def poll(self, task: Task) -> int:
        """POLLIN if a read of this thread would find something; its wake-ups go to `engine.poll_ready` from now on.

        POLLERR for a thread too many.
        """
        thread = self.thread(task)
        if thread is None:
            return POLLERR
        if not thread.looper & POLL:
            thread.looper |= POLL
            self.pollers.add(thread.tid, thread)
        if thread.has_work(for_process=thread.available_for_process_work()):
            return POLLIN
        return 0

    def flush(self) -> Step:
        """A descriptor was closed: threads that wait return to user space. Asks for nothing but turns."""
        pace = Pace(self.engine.chunk)
        thread = self.tids.first()
        while thread is not None:
            thread.looper_need_return = True
            if thread.looper & WAITING:
                thread.wake_up()
            if pace.spend():
                yield TURN
            thread = self.tids.after(thread.tid)
        yield Outcome()

    def release(self) -> Step:
        """The last descriptor is gone: everything that others wait for is answered, everything they hold is dead.

        Asks for nothing but turns.
        """
        engine = self.engine
        pace = Pace(engine.chunk)
        engine.remove_process(self)
        engine.dying[self] = None
        context = self.context
        if context.manager is not None and context.manager.process is self:
            context.manager = None
        self.tmp_ref += 1
        self.is_dead = True
        self.is_frozen = False
        self.sync_recv = False
        self.async_recv = False
        thread = self.tids.first()
        while thread is not None:
            yield from thread.release(pace)
            thread = self.tids.first()
        node = self.nodes.first()
        while node is not None:
            yield from node.release(pace)
            if pace.spend():
                yield TURN
            node = self.nodes.first()
        desc = 0
        while desc < self._next_desc:
            ref = self.refs_by_desc.get(desc)
            if ref is not None:
                ref.cleanup()
            desc += 1
            if pace.spend():
                yield TURN
        yield from engine.cancel_all(self.todo, pace)
        yield from engine.cancel_all(self.delivered_death, pace)
        yield from engine.cancel_all(self.delivered_freeze, pace)
        del engine.dying[self]
        self.drop_tmp_ref()
        yield Outcome()

    def forget(self) -> None:
        """Let go of everything; for who takes it out of `engine.freed`. Takes as long as there are buffers left."""
        if self.allocation is not None:
            self.allocation.forget()

    def drop_tmp_ref(self) -> None:
        """A step no longer uses the process; a dead one that nobody uses is freed."""
        self.tmp_ref -= 1
        if self.is_dead and not self.tmp_ref and not self.threads:
            self.engine.stats.deleted[stats.PROC] += 1
            self.engine.freed.append(self)
            account = self.account
            account.opens -= 1
            account.quota.opens.held -= 1
            if self.allocation is not None:
                # The buffers that nobody has freed go with the region.
                account.objects -= len(self.allocation.allocated) + self.allocation.records
                account.pages -= self.allocation.present
            account.quota.forget(account)


# -- ioctls other than BINDER_WRITE_READ: (thread, argument) -> outcome, or a step


def _set_max_threads(thread: Thread, argument: bytes) -> Outcome:
    thread.process.max_threads = int.from_bytes(argument, "little")
    return Outcome()


def _set_context_manager(thread: Thread, argument: bytes) -> Outcome:
    """BINDER_SET_CONTEXT_MGR: -EBUSY if there is one, -EPERM for another user than the first one's, -ENOMEM."""
    del argument
    return _become_context_manager(thread, 0, 0, 0)


def _set_context_manager_ext(thread: Thread, argument: bytes) -> Outcome:
    _, flags, ptr, cookie = uapi.flat_binder_object.unpack(argument)
    return _become_context_manager(thread, ptr, cookie, flags)


def _become_context_manager(thread: Thread, ptr: int, cookie: int, flags: int) -> Outcome:
    context = thread.process.context
    if context.manager is not None:
        return Outcome(-EBUSY)
    if context.manager_euid is None:
        context.manager_euid = thread.euid
    elif context.manager_euid != thread.euid:
        return Outcome(-EPERM)
    node = thread.process.get_or_create_node(ptr, cookie, flags)
    if node is None:
        return Outcome(-ENOMEM)
    node.local_weak_refs += 1
    node.local_strong_refs += 1
    node.has_strong_ref = True
    node.has_weak_ref = True
    context.manager = node
    node.put()
    return Outcome()


def _version(thread: Thread, argument: bytes) -> Outcome:
    del thread, argument
    return Outcome(0, uapi.binder_version.pack(uapi.BINDER_CURRENT_PROTOCOL_VERSION))


def _node_info_for_ref(thread: Thread, argument: bytes) -> Outcome:
    """BINDER_GET_NODE_INFO_FOR_REF: -EPERM unless context manager, -EINVAL unless a handle with a strong count."""
    handle, *rest = uapi.binder_node_info_for_ref.unpack(argument)
    process = thread.process
    if any(rest):
        return Outcome(-EINVAL)
    manager = process.context.manager
    if manager is None or manager.process is not process:
        return Outcome(-EPERM)
    ref = process.ref(handle, strong=True)
    if ref is None:
        return Outcome(-EINVAL)
    node = ref.node
    strong = node.local_strong_refs + node.internal_strong_refs
    weak = node.local_weak_refs
    node.tmp_refs += 1
    node.put()
    return Outcome(0, uapi.binder_node_info_for_ref.pack(handle, strong, weak, 0, 0, 0))


def _node_debug_info(thread: Thread, argument: bytes) -> Outcome:
    """BINDER_GET_NODE_DEBUG_INFO: the node with the next larger ptr, or zeros."""
    ptr, _, _, _ = uapi.binder_node_debug_info.unpack(argument)
    node = thread.process.nodes.after(ptr)
    if node is None:
        return Outcome(0, bytes(uapi.binder_node_debug_info.size))
    return Outcome(
        0,
        uapi.binder_node_debug_info.pack(node.ptr, node.cookie, node.has_strong_ref, node.has_weak_ref),
    )


def _enable_oneway_spam_detection(thread: Thread, argument: bytes) -> Outcome:
    thread.process.oneway_spam_detection_enabled = any(argument)
    return Outcome()


def _get_extended_error(thread: Thread, argument: bytes) -> Outcome:
    del argument
    error = thread.extended_error
    thread.extended_error = (0, uapi.BR_OK, 0)
    return Outcome(0, uapi.binder_extended_error.pack(*error))


_IOCTLS: Final[dict[int, Callable[[Thread, bytes], Outcome]]] = {
    uapi.BINDER_SET_MAX_THREADS: _set_max_threads,
    uapi.BINDER_SET_CONTEXT_MGR: _set_context_manager,
    uapi.BINDER_SET_CONTEXT_MGR_EXT: _set_context_manager_ext,
    uapi.BINDER_VERSION: _version,
    uapi.BINDER_GET_NODE_INFO_FOR_REF: _node_info_for_ref,
    uapi.BINDER_GET_NODE_DEBUG_INFO: _node_debug_info,
    uapi.BINDER_ENABLE_ONEWAY_SPAM_DETECTION: _enable_oneway_spam_detection,
    uapi.BINDER_GET_EXTENDED_ERROR: _get_extended_error,
}


def _refuse() -> Step:
    yield Outcome(-ENOMEM)


def _ioctl(thread: Thread, command: int, argument: bytes) -> Step:
    if command == uapi.BINDER_FREEZE:
        outcome = yield from freeze.ioctl_freeze(thread, argument)
    elif command == uapi.BINDER_GET_FROZEN_INFO:
        outcome = yield from freeze.get_frozen_info(thread, argument)
    elif command == uapi.BINDER_THREAD_EXIT:
        yield from thread.release(Pace(thread.process.engine.chunk))
        outcome = Outcome()
    else:
        handler = _IOCTLS.get(command)
        outcome = Outcome(-EINVAL) if handler is None else handler(thread, argument)
    thread.looper_need_return = False
    yield outcome
