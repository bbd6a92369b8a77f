"""What always holds of an engine, checked from outside: counts against holders, lists against states.

`check` walks everything once and raises AssertionError, with a line that names the object and what is wrong with it.
It takes time in proportion to what there is, keeps nothing and changes nothing, so that a test can run it after every
step and a long-running server once in a while (with the lock held).

Between two effects of a step some counts are ahead of their holders: the step has its references already, and has not
handed them over yet. They can then only be bounded from one side. With `quiet=True` the caller says that no step is
under way except in a `Wait`, and that none of these has been woken: every count must be exact then, and nobody may
sleep while there is work for it.

What cannot be derived is left alone: user space's own counts on a ref (BC_ACQUIRE and BC_INCREFS).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from binderfs_fuse.engine import stats
from binderfs_fuse.engine.freeze import Freeze
from binderfs_fuse.engine.limits import THREAD, UNREAD
from binderfs_fuse.engine.node import DEAD_BINDER, Death, Node, Ref
from binderfs_fuse.engine.range_alloc import ACTIVE, LRU, PAGE_SHIFT, PAGE_SIZE, Buffer, FreeTree, RangeAllocator
from binderfs_fuse.engine.thread import POLL, WAITING, Thread
from binderfs_fuse.engine.transaction import Transaction
from binderfs_fuse.engine.work import IndexedList, ReturnError, TransactionComplete, Work, WorkList
from binderfs_fuse.uapi import BINDER_TYPE_BINDER, BINDER_TYPE_WEAK_BINDER, BR_OK, TF_ONE_WAY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from binderfs_fuse.engine.context import Engine
    from binderfs_fuse.engine.process import Process


_UNUSED_IS_NONE = bytes(0 if state == LRU else state for state in range(256))


def check(engine: Engine, *, quiet: bool = False) -> None:
    """Raise AssertionError if anything in `engine` contradicts anything else."""
    _Check(engine, quiet=quiet).run()


def check_allocator(allocation: RangeAllocator, *, quiet: bool = True) -> None:
    """Raise AssertionError if a region's buffers, free tree, pages or asynchronous space do not fit together.

    Unless `quiet`, pages under an allocated buffer may still be missing: a step is making them present.
    """
    buffers = list(_tiles(allocation))
    allocated = {buffer.offset: buffer for buffer in buffers if not buffer.free}
    _same("allocated buffers", allocated, allocation.allocated)
    free = [buffer for buffer in buffers if buffer.free]
    _check_tree(allocation.free_buffers)
    in_tree = list(allocation.free_buffers)
    _true(
        sorted(map(id, in_tree)) == sorted(map(id, free)), f"the free tree holds {len(in_tree)} of {len(free)} buffers"
    )
    usage: dict[int, list[int]] = {}
    for buffer in allocated.values():
        if buffer.async_transaction:
            entry = usage.setdefault(buffer.pid, [0, 0])
            entry[0] += 1
            entry[1] += buffer.size
    _same("asynchronous buffers by pid", usage, allocation.async_by_pid)
    used = sum(size for _, size in usage.values())
    _same("free asynchronous space", allocation.size // 2 - used, allocation.free_async_space)
    _check_pages(allocation, list(allocated.values()), quiet=quiet)


def _tiles(allocation: RangeAllocator) -> Iterator[Buffer]:
    """All buffers in the order of their addresses, having looked at how they touch."""
    buffer: Buffer | None = allocation.first
    previous: Buffer | None = None
    offset = 0
    while buffer is not None:
        name = f"buffer at {buffer.offset:#x}"
        _same(f"{name}: offset", offset, buffer.offset)
        _true(buffer.size > 0, f"{name} has size {buffer.size}")
        _true(buffer.previous is previous, f"{name}: previous is not the one before it")
        _true(not (buffer.free and previous is not None and previous.free), f"{name}: free beside a free one")
        yield buffer
        offset += buffer.size
        previous = buffer
        buffer = buffer.next
    _same("end of the last buffer", allocation.size, offset)


def _black_height(node: Buffer | None) -> int:
    if node is None:
        return 1
    name = f"free tree at {node.offset:#x}"
    for child in (node.left, node.right):
        if child is not None:
            _true(child.parent is node, f"{name}: a child does not know its parent")
            _true(not (node.red and child.red), f"{name}: red under red")
    left = _black_height(node.left)
    _same(f"{name}: black height", left, _black_height(node.right))
    return left + (not node.red)


def _check_tree(tree: FreeTree) -> None:
    """Look at order, links and colours of the red-black tree."""
    root = tree.root
    _true(root is None or (root.parent is None and not root.red), "the free tree's root is red or has a parent")
    _black_height(root)
    sizes = [buffer.size for buffer in tree]
    _same("order of the free tree", sorted(sizes), sizes)


def _check_pages(allocation: RangeAllocator, allocated: list[Buffer], *, quiet: bool) -> None:
    """Look at the states of pages: active exactly where a buffer in use reaches."""
    pages = allocation.pages
    _same("size in pages", allocation.size, len(pages) * PAGE_SIZE)
    used = bytearray(len(pages))
    for buffer in allocated:
        first, last = buffer.offset >> PAGE_SHIFT, buffer.offset + buffer.size - 1 >> PAGE_SHIFT
        used[first : last + 1] = bytes([ACTIVE]) * (last + 1 - first)
    # All at once, since there are many and they are nearly always as they should be.
    if pages.translate(_UNUSED_IS_NONE) != used:
        for index, (state, wanted) in enumerate(zip(pages, used, strict=True)):
            if wanted:
                fine = state == ACTIVE or (not quiet and not state)
                _true(fine, f"page {index} is in use, and its state {state}")
            else:
                _true(state != ACTIVE, f"page {index} is active without a buffer")
    _true(not any(pages[allocation.pages_high :]), f"a page is above the high watermark {allocation.pages_high}")


def _items(queue: WorkList) -> list[Work]:
    """All items of a list, having looked at its links."""
    items: list[Work] = []
    seen = set()
    work = queue.first
    while work is not None:
        _true(id(work) not in seen, f"{_name(work)} is on two lists, or twice on one")
        seen.add(id(work))
        items.append(work)
        work = work.next
    _true([work.previous for work in items] == [None, *items[:-1]][: len(items)], "a list does not lead back")
    _true(queue.last is (items[-1] if items else None), "a list ends elsewhere")
    _same("length of a list", len(items), queue.count)
    serials = [work.serial for work in items]
    _same("serial numbers of a list", sorted(set(serials)), serials)
    return items


def _true(condition: bool, complaint: str) -> None:
    if not condition:
        raise AssertionError(complaint)


def _same(name: str, expected: object, actual: object) -> None:
    if expected != actual:
        raise AssertionError(f"{name}: {actual!r}, not {expected!r}")


def _name(thing: Process | Thread | Node | Ref | Work) -> str:
    """What to call an object in a complaint."""
    match thing:
        case Node():
            return f"node {thing.debug_id}"
        case Ref():
            return f"ref {thing.debug_id} (desc {thing.desc})"
        case Transaction():
            return f"transaction {thing.debug_id}"
        case Work():
            return type(thing).__name__
        case Thread():
            return f"thread {thing.process.pid}:{thing.tid}"
        case _:
            return f"process {thing.pid} of {thing.context.name}"


class _Check:
    """One walk over one engine."""

    def __init__(self, engine: Engine, *, quiet: bool) -> None:
        self.engine = engine
        self.quiet = quiet
        self.processes: list[Process] = [*engine.processes, *engine.dying]
        self.threads: list[Thread] = [thread for process in self.processes for thread in process.threads.values()]
        self.threads += engine.dying_threads
        self.nodes: list[Node] = [node for process in self.processes for node in process.nodes.values()]
        self.nodes += engine.dead_nodes
        self.refs: list[Ref] = [ref for node in self.nodes for ref in node.refs.values()]
        # What is on some list, and what the walks come across; by id, since work compares by identity anyway.
        self.queued: dict[int, Work] = {}
        self.transactions: dict[int, Transaction] = {}
        self.deaths: dict[int, Death] = {}
        self.freezes: dict[int, Freeze] = {}
        # Dead processes that are not freed yet.
        self.lingering = 0
        # What holds nodes and counts transactions, by the holder's id.
        self.outstanding: Counter[int] = Counter()
        self.strong: Counter[int] = Counter()
        self.weak: Counter[int] = Counter()
        self.one_way: Counter[int] = Counter()

    def run(self) -> None:
        """Look at everything."""
        for context in self.engine.contexts.values():
            manager = context.manager
            _true(
                manager is None or (manager.process in self.engine.processes and manager.process.context is context),
                f"context {context.name}: its manager is dead or of another context",
            )
        self._lists()
        for process in self.processes:
            self._process(process)
            self._queue(process.todo, process, (Transaction, Node, Death, Freeze))
            self._queue(process.delivered_death, process, (Death,))
            self._queue(process.delivered_freeze, process, (Freeze,))
        for thread in self.threads:
            kinds = (Transaction, TransactionComplete, ReturnError, Node, Death)
            self._queue(thread.todo, thread.process, kinds)
        for node in self.nodes:
            self._queue(node.async_todo, node.process, (Transaction,))
        for process in self.processes:
            for freeze in process.delivered_freeze:
                _true(
                    isinstance(freeze, Freeze) and freeze.sent,
                    f"{_name(process)}: a delivered freeze notification was not sent",
                )
        for thread in self.threads:
            self._thread(thread)
        for node in self.nodes:
            self._node(node)
        for ref in self.refs:
            self._ref(ref)
        for process in self.processes:
            self._outstanding(process)
        self._stats()
        self._accounts()
        ready = self.engine.ready
        _same("waits that are ready", len(set(map(id, ready))), len(ready))
        _true(not any(wait.parked for wait in ready), "a wait is ready and parked")

    def _exact(self, name: str, expected: int, actual: int) -> None:
        """A count must be what its holders say; with steps under way it may be more."""
        _true(
            actual == expected or (actual > expected and not self.quiet),
            f"{name}: {actual}, its holders say {expected}",
        )

    # -- processes

    def _lists(self) -> None:
        """Look at what finds processes and dead nodes in order, and what counts opens."""
        engine = self.engine
        _same("opens", sum(account.opens for account in engine.accounts.values()), engine.quota.opens.held)
        _same("processes in order", list(engine.processes), list(engine.opens_in_order.values()))
        by_pid: dict[int, list[Process]] = {}
        for process in engine.processes:
            by_pid.setdefault(process.pid, []).append(process)
        _same("processes by pid", by_pid, {pid: list(opens.values()) for pid, opens in engine.opens_by_pid.items()})
        _same("dead nodes in order", list(engine.dead_nodes), list(engine.dead_in_order.values()))

    def _process(self, process: Process) -> None:
        name = _name(process)
        _true(not process.is_dead or process in self.engine.dying, f"{name} is dead, and listed")
        _same(f"{name}: threads in order", sorted(process.threads), list(process.tids))
        polling = [tid for tid, thread in sorted(process.threads.items()) if thread.looper & POLL]
        _same(f"{name}: threads that have polled", polling, list(process.pollers))
        busy = sum(thread.transaction_stack is not None for thread in process.threads.values())
        _same(f"{name}: busy threads", busy, process.busy_threads)
        for tid, thread in process.threads.items():
            _true(
                thread.tid == tid and thread.process is process and not thread.is_dead,
                f"{name}: thread {tid} is dead or another one",
            )
        for ptr, node in process.nodes.items():
            _true(node.ptr == ptr and node.process is process, f"{name}: node {ptr:#x} is another one")
        _same(
            f"{name}: refs by node",
            {id(ref) for ref in process.refs_by_desc.values()},
            {id(ref) for ref in process.refs_by_node.values()},
        )
        self._descs(process)
        for thread in process.waiting_threads:
            _true(
                process.threads.get(thread.tid) is thread and bool(thread.looper & WAITING),
                f"{name}: {_name(thread)} is not waiting",
            )
        _true(0 <= process.requested_threads <= 1, f"{name}: {process.requested_threads} threads are requested")
        _true(process.tmp_ref >= 0, f"{name}: tmp_ref {process.tmp_ref}")
        if self.quiet:
            _true(
                not process.tmp_ref or any(other.freeze_waits for other in self.processes),
                f"{name}: tmp_ref {process.tmp_ref}",
            )
            _true(not (process.waiting_threads and process.todo.count), f"{name}: threads sleep, and there is work")
        if process.allocation is not None:
            check_allocator(process.allocation, quiet=self.quiet)
            for buffer in process.allocation.allocated.values():
                self._buffer(process, buffer)

    def _descs(self, process: Process) -> None:
        name = _name(process)
        free = process._free_descs  # noqa: SLF001 - it is the checker's business
        used = set(process.refs_by_desc) - {0}
        _same(f"{name}: free descs", len(set(free)), len(free))
        _same(f"{name}: descs", set(range(1, process._next_desc)), used | set(free))  # noqa: SLF001
        _true(not used & set(free), f"{name}: descs are free and used")
        _true(
            all(free[(index - 1) // 2] < desc for index, desc in enumerate(free) if index),
            f"{name}: free descs: no heap",
        )

    def _buffer(self, process: Process, buffer: Buffer) -> None:
        name = f"{_name(process)}: buffer {buffer.debug_id}"
        size = sum((part + 7) & ~7 for part in (buffer.data_size, buffer.offsets_size, buffer.extra_buffers_size))
        _true(size <= buffer.size, f"{name} holds {size} bytes in {buffer.size}")
        transaction = buffer.transaction
        _true(
            transaction is None or transaction.buffer is buffer, f"{name}: its transaction has another buffer, or none"
        )
        node = buffer.target_node
        # The buffers of a process that is being released stay until the end, and some of its nodes have died.
        if node is not None and not (process.is_dead and node.process is None):
            _true(node.process is process, f"{name}: its node belongs to another process")
            self.strong[id(node)] += 1
            self.one_way[id(node)] += buffer.async_transaction
        for record in buffer.objects or ():
            if record.type in (BINDER_TYPE_BINDER, BINDER_TYPE_WEAK_BINDER):
                count = self.strong if record.type == BINDER_TYPE_BINDER else self.weak
                count[id(process.nodes.get(record.value))] += 1

    def _outstanding(self, process: Process) -> None:
        name = f"{_name(process)}: outstanding transactions"
        self._exact(name, self.outstanding[id(process)], process.outstanding_transactions)

    # -- work

    def _queue(self, queue: WorkList, owner: Process | None, kinds: tuple[type[Work], ...]) -> None:
        """Look at a list of work that `owner` reads (None for that of a dead node, which is empty)."""
        _true(owner is not None or not queue.count, "a dead node has work")
        items = _items(queue)
        if isinstance(queue, IndexedList):
            indexed = sorted((work.key(), work.serial, id(work)) for work in items if work.key() >= 0)
            found = [(work.key(), work.serial, id(work)) for work in queue._index.values()]  # noqa: SLF001 - as above
            _same("index of a list", indexed, found)
        for work in items:
            _true(isinstance(work, kinds), f"{_name(work)} is on the wrong kind of list")
            _true(work.queue is queue, f"{_name(work)} is on a list that it does not know of")
            _true(id(work) not in self.queued, f"{_name(work)} is on two lists, or twice on one")
            self.queued[id(work)] = work
            match work:
                case Transaction():
                    self._queued_transaction(work, owner)
                case Node():
                    _true(work.process is owner, f"{_name(work)} is another process's work")
                case Death():
                    self.deaths[id(work)] = work
                case Freeze():
                    self.freezes[id(work)] = work

    def _unqueued(self, work: Work) -> None:
        """Work that says it is on a list must have been found on one."""
        _true(work.queue is None or id(work) in self.queued, f"{_name(work)} is not on the list that it names")

    # -- transactions

    def _queued_transaction(self, transaction: Transaction, owner: Process | None) -> None:
        name = _name(transaction)
        buffer = transaction.buffer
        _true(transaction.to_process is owner, f"{name} is another process's work")
        _true(
            buffer is not None and not buffer.free and buffer.transaction is transaction and not buffer.allow_user_free,
            f"{name} waits without a buffer of its own",
        )
        one_way = bool(transaction.flags & TF_ONE_WAY)
        _true(
            not (transaction.is_reply or one_way) or transaction.from_thread is None, f"{name} has a caller that waits"
        )
        self.outstanding[id(owner)] += 1
        self._found(transaction)

    def _found(self, transaction: Transaction | None) -> None:
        """Remember a transaction and all that are linked to it."""
        pending = [transaction]
        while pending:
            found = pending.pop()
            if found is not None and id(found) not in self.transactions:
                self.transactions[id(found)] = found
                pending += found.from_parent, found.to_parent

    # -- threads

    def _thread(self, thread: Thread) -> None:
        name = _name(thread)
        for error in (thread.return_error, thread.reply_error):
            self._unqueued(error)
            _true(error.queue is None or error.command != BR_OK, f"{name}: an error is queued and empty")
        transaction = thread.transaction_stack
        seen = set()
        while transaction is not None:
            _true(id(transaction) not in seen, f"{name}: its stack is a ring")
            seen.add(id(transaction))
            self._found(transaction)
            if transaction.from_thread is thread:
                transaction = transaction.from_parent
                continue
            _true(transaction.to_thread is thread, f"{name}: {_name(transaction)} is on its stack, and another's")
            _true(transaction.to_process is thread.process, f"{name}: {_name(transaction)} goes to another process")
            buffer = transaction.buffer
            _true(
                buffer is None or buffer.transaction is transaction,
                f"{name}: {_name(transaction)} has another's buffer",
            )
            self.outstanding[id(thread.process)] += 1
            transaction = transaction.to_parent
        wait = thread.wait
        if self.quiet and wait.parked:
            for_process = thread in thread.process.waiting_threads
            _true(not thread.has_work(for_process=for_process), f"{name} sleeps, and has work")
        _true(not (thread.closes and self.quiet), f"{name}: descriptors are left to close")
        # A step of its own may hold one on its way.
        completions = sum(type(work) is TransactionComplete for work in thread.todo)
        self._exact(f"{name}: unread completions", completions, thread.unread)

    # -- nodes and refs

    def _node(self, node: Node) -> None:
        name = _name(node)
        process = node.process
        self._unqueued(node)
        strong_refs = sum(ref.strong > 0 for ref in node.refs.values())
        _same(f"{name}: internal strong refs", strong_refs, node.internal_strong_refs)
        for ref in node.refs.values():
            _true(ref.node is node, f"{name}: {_name(ref)} is another node's")
        _true(node.tmp_refs >= 0 and not (self.quiet and node.tmp_refs), f"{name}: tmp_refs {node.tmp_refs}")
        if process is None:
            _same(f"{name} is dead: local refs", (0, 0), (node.local_strong_refs, node.local_weak_refs))
            _true(bool(node.refs.count or node.tmp_refs), f"{name} is dead, and nobody holds it")
            _true(node in self.engine.dead_nodes, f"{name} has no process, and is not listed as dead")
            return
        manages = node is process.context.manager
        strong = self.strong[id(node)] + node.pending_strong_ref + manages
        weak = self.weak[id(node)] + node.pending_weak_ref + manages
        self._exact(f"{name}: local strong refs", strong, node.local_strong_refs)
        self._exact(f"{name}: local weak refs", weak, node.local_weak_refs)
        _true(
            bool(
                node.refs.count
                or node.local_strong_refs
                or node.local_weak_refs
                or node.tmp_refs
                or node.queue is not None
                # It is to die next, and the thread that was to tell of it has gone already.
                or process.is_dead
            ),
            f"{name}: nobody holds it, and it is not told so",
        )
        if not node.has_async_transaction:
            _true(not node.async_todo, f"{name}: one-way calls wait for none")
        elif self.quiet:
            _same(f"{name}: one-way buffers", self.one_way[id(node)], 1 + node.async_todo.count)

    def _ref(self, ref: Ref) -> None:
        name = _name(ref)
        process = ref.process
        _true(
            process.refs_by_desc.get(ref.desc) is ref and process.refs_by_node.get(ref.node) is ref,
            f"{name}: its process does not know it",
        )
        _true(process in self.processes or not self.quiet, f"{name}: its process is dead")
        _true(ref.strong >= 0 and ref.weak >= 0 and ref.strong + ref.weak > 0, f"{name}: s {ref.strong} w {ref.weak}")
        if ref.death is not None:
            self._unqueued(ref.death)
            self.deaths[id(ref.death)] = ref.death
            _true(ref.death.process is process, f"{name}: its death notification is another process's")
            _same(f"{name}: kind of its death notification", DEAD_BINDER, ref.death.kind)
        if ref.freeze is not None:
            self._unqueued(ref.freeze)
            self.freezes[id(ref.freeze)] = ref.freeze
            _true(ref.freeze.process is process, f"{name}: its freeze notification is another process's")
            _true(not ref.freeze.cleared, f"{name}: its freeze notification is cleared")

    # -- counters

    def _stats(self) -> None:
        completions = sum(isinstance(work, TransactionComplete) for work in self.queued.values())
        living = (
            (stats.THREAD, len(self.threads)),
            (stats.NODE, len(self.nodes)),
            (stats.REF, len(self.refs)),
            (stats.DEATH, len(self.deaths)),
            (stats.FREEZE, len(self.freezes)),
        )
        counters = self.engine.stats
        alive = [created - deleted for created, deleted in zip(counters.created, counters.deleted, strict=True)]
        for kind, count in living:
            _same(f"stats: {stats.OBJECTS[kind]}s", count, alive[kind])
        # A step holds these on its way.
        self._exact("stats: transactions", len(self.transactions), alive[stats.TRANSACTION])
        self._exact("stats: transaction_completes", completions, alive[stats.TRANSACTION_COMPLETE])
        # A process that is dead, but in use by a step, if only by one that waits to freeze it, is still in its account.
        self.lingering = alive[stats.PROC] - len(self.processes)
        _true(self.lingering >= 0, f"stats: procs: {alive[stats.PROC]}, and {len(self.processes)} are there")

    # -- what users hold

    def _accounts(self) -> None:
        objects: Counter[int] = Counter()
        for thread in self.threads:
            objects[id(thread.process.account)] += THREAD + thread.unread // UNREAD
        objects.update(id(node.account) for node in self.nodes)
        for holder in (self.refs, self.deaths.values(), self.freezes.values()):
            objects.update(id(item.process.account) for item in holder)
        opens = Counter(id(process.account) for process in self.processes)
        pages: Counter[int] = Counter()
        for process in self.processes:
            if process.allocation is not None:
                allocated = process.allocation.allocated
                objects[id(process.account)] += len(allocated) + sum(buffer.records for buffer in allocated.values())
                pages[id(process.account)] += len(process.allocation.pages) - process.allocation.pages.count(0)
        for euid, account in self.engine.accounts.items():
            for name, count, held in (
                ("opens", opens, account.opens),
                ("objects", objects, account.objects),
                ("pages", pages, account.pages),
            ):
                fine = held >= count[id(account)] if self.lingering else held == count[id(account)]
                _true(fine, f"user {euid}: {name}: {held}, of which {count[id(account)]} are there")
