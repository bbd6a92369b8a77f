"""The text of `binder_logs`, as the driver prints it.

Each log is an iterator of pieces of text, so that whoever writes it out need not hold the engine's lock for longer than
one piece takes to make: some hundred lines, however much a process has. What appears or goes in between is in the text
or not, as with the driver.

To look is to take part, as with the driver: a node is held while it is shown, and let go of. Where nobody else refers
to it any more, but its owner still has it, that makes work for the owner - once more, if it has read that already and
owes an answer. So whoever reads a log has to see to `engine.ready` and `engine.poll_ready` afterwards. What the driver
does not have, as the command line's status, looks `unnoticed`.

Sources: Linux 7.3 binder.c `print_binder_*`, `*_show`; binder_alloc.c `binder_alloc_print_*`.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from binderfs_fuse.engine.freeze import Freeze
from binderfs_fuse.engine.node import CLEAR_DEATH_NOTIFICATION, DEAD_BINDER, Death, Node
from binderfs_fuse.engine.stats import COMMANDS, OBJECTS, RETURNS, Stats
from binderfs_fuse.engine.transaction import Transaction
from binderfs_fuse.engine.work import ReturnError, TransactionComplete
from binderfs_fuse.uapi import BR_TRANSACTION_COMPLETE, BR_TRANSACTION_PENDING_FROZEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from binderfs_fuse.engine.context import Engine
    from binderfs_fuse.engine.process import Process
    from binderfs_fuse.engine.range_alloc import Buffer, RangeAllocator
    from binderfs_fuse.engine.thread import Thread
    from binderfs_fuse.engine.transaction import LogEntry
    from binderfs_fuse.engine.work import Work, WorkList

# What the driver prints for work that its printer does not know, by the numbers of its enumeration.
_UNKNOWN_PENDING = 3
_UNKNOWN_SPAM_SUSPECT = 4
# Lines in one piece of text.
_PIECE = 64
# How much is counted before it is time for others.
_SHARE = 256
# Serial numbers of work are larger.
_BEFORE_ALL = -(1 << 62)


class Logs:
    """The logs of one engine.

    Pointers are shown as 16 hexadecimal digits, hashed ones differently for each mount.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._secret = os.urandom(16)

    def _hashed(self, value: int) -> str:
        if not value:
            return f"{0:016x}"
        digest = hashlib.blake2b(value.to_bytes(8, "little"), digest_size=4, key=self._secret).hexdigest()
        return f"{digest:0>16}"

    def state(self, *, hashed: bool = False, unnoticed: bool = False) -> Iterator[str]:
        """`state` and `state_hashed`: everything there is."""
        text = "binder state:\n"
        show = self._hashed if hashed else _plain
        engine = self._engine
        if engine.dead_nodes:
            text += "dead nodes:\n"
        yield text
        node = engine.dead_in_order.last()
        while node is not None:
            died = node.died
            yield from filter(None, self._node(node, show, unnoticed=unnoticed))
            node = engine.dead_in_order.before(died)
        for process in self._processes():
            if process is None:
                yield ""
            else:
                yield from self._process(process, show, everything=True, unnoticed=unnoticed)

    def transactions(self, *, hashed: bool = False) -> Iterator[str]:
        """`transactions` and `transactions_hashed`: what is under way."""
        yield "binder transactions:\n"
        show = self._hashed if hashed else _plain
        for process in self._processes():
            if process is None:
                yield ""
            else:
                yield from self._process(process, show, everything=False)

    def proc(self, pid: int) -> Iterator[str]:
        """`proc/PID`: every open of one process."""
        for process in self._processes(pid):
            if process is None:
                yield ""
            else:
                yield "binder proc state:\n"
                yield from self._process(process, _plain, everything=True)

    def stats(self) -> Iterator[str]:
        """`stats`: counters, of the mount and of each process."""
        yield "binder stats:\n" + _stats("", self._engine.stats)
        for process in self._processes():
            if process is None:
                yield ""
            else:
                yield from self._process_stats(process)

    def transaction_log(self, *, failed: bool = False) -> Iterator[str]:
        """`transaction_log` and `failed_transaction_log`: the last 32, the oldest first."""
        entries = self._engine.failed_transaction_log if failed else self._engine.transaction_log
        yield "".join(map(_log_entry, entries))

    def _processes(self, pid: int | None = None) -> Iterator[Process | None]:
        """Give all processes, or the opens of one, the newest first, and None where it is time for others.

        What is opened meanwhile is left out.
        """
        engine = self._engine
        serial = engine.next_serial()
        count = 0
        while True:
            opens = engine.opens_in_order if pid is None else engine.opens_by_pid.get(pid)
            process = opens.before(serial) if opens is not None else None
            if process is None:
                return
            serial = process.serial
            yield process
            count += 1
            if not count % _PIECE:
                yield None

    def _process(
        self, process: Process, show: Callable[[int], str], *, everything: bool, unnoticed: bool = False
    ) -> Iterator[str]:
        header = f"proc {process.pid}\ncontext {process.context.name}\n"
        text = ""
        if everything:
            text = header
            header = ""
        lines = self._lines(process, show, everything=everything, unnoticed=unnoticed)
        for count, line in enumerate(lines, 1):
            if line:
                text += header + line
                header = ""
            if line is None or not count % _PIECE:
                yield text
                text = ""
        yield text

    def _lines(
        self, process: Process, show: Callable[[int], str], *, everything: bool, unnoticed: bool
    ) -> Iterator[str | None]:
        """Show a process line by line: empty ones for what is left out, None where it is time for others.

        What is gone when its turn comes is not shown.
        """
        thread = process.tids.first()
        while thread is not None:
            yield from self._thread(thread, show, everything=everything)
            thread = process.tids.after(thread.tid)
        node = process.nodes.first()
        while node is not None:
            ptr = node.ptr
            if everything or node.has_async_transaction:
                yield from self._node(node, show, unnoticed=unnoticed)
            else:
                yield ""
            node = process.nodes.after(ptr)
        if everything:
            yield from self._refs(process)
        if process.allocation is not None:
            yield from _buffers(process.allocation)
        # Not before the nodes: to show these may have made work.
        for work in _works(process.todo):
            yield "" if work is None else self._work(process, work, "  ", "  pending transaction", show)
        if process.delivered_death.count:
            yield "  has delivered dead binder\n"
        if process.delivered_freeze.count:
            yield "  has delivered freeze binder\n"

    def _refs(self, process: Process) -> Iterator[str]:
        for desc in range(process.descs()):
            ref = process.refs_by_desc.get(desc)
            if ref is None:
                yield ""
                continue
            death = self._hashed(id(ref.death)) if ref.death is not None else self._hashed(0)
            yield (
                f"  ref {ref.debug_id}: desc {ref.desc} {'' if ref.node.process is not None else 'dead '}"
                f"node {ref.node.debug_id} s {ref.strong} w {ref.weak} d {death}\n"
            )

    def _thread(self, thread: Thread, show: Callable[[int], str], *, everything: bool) -> Iterator[str]:
        header = f"  thread {thread.tid}: l {thread.looper:02x} need_return {thread.looper_need_return:d} tr 0\n"
        if everything:
            yield header
            header = ""
        # The stack as it is now: when this goes on, others may have been at it.
        stack = []
        transaction = thread.transaction_stack
        while transaction is not None:
            if transaction.from_thread is thread:
                stack.append(("    outgoing transaction", transaction))
                transaction = transaction.from_parent
            else:
                stack.append(("    incoming transaction", transaction))
                transaction = transaction.to_parent
        for prefix, transaction in stack:
            yield header + self._transaction(thread.process, prefix, transaction)
            header = ""
        for work in _works(thread.todo):
            if work is None:
                yield ""
                continue
            yield header + self._work(thread.process, work, "    ", "    pending transaction", show)
            header = ""

    def _transaction(self, process: Process, prefix: str, transaction: Transaction) -> str:
        to_process = transaction.to_process
        to_thread = transaction.to_thread
        elapsed = (self._engine.clock() - transaction.start_time) // 1_000_000
        text = (
            f"{prefix} {transaction.debug_id}: {self._hashed(id(transaction))}"
            f" from {transaction.from_pid}:{transaction.from_tid}"
            f" to {to_process.pid if to_process is not None else 0}:{to_thread.tid if to_thread is not None else 0}"
            f" code {transaction.code:x} flags {transaction.flags:x} pri {transaction.priority}"
            f" a{not transaction.is_reply and transaction.flags & 1:d} r{transaction.is_reply:d} elapsed {elapsed}ms"
        )
        if process is not to_process:
            return text + "\n"
        buffer = transaction.buffer
        if buffer is None:
            return text + " buffer free\n"
        if buffer.target_node is not None:
            text += f" node {buffer.target_node.debug_id}"
        return text + f" size {buffer.data_size}:{buffer.offsets_size} offset {buffer.offset:x}\n"

    def _work(
        self, process: Process, work: Work, prefix: str, transaction_prefix: str, show: Callable[[int], str]
    ) -> str:
        if isinstance(work, Transaction):
            return self._transaction(process, transaction_prefix, work)
        return prefix + _describe(work, show) + "\n"

    def _node(self, node: Node, show: Callable[[int], str], *, unnoticed: bool) -> Iterator[str | None]:
        text = (
            f"  node {node.debug_id}: u{show(node.ptr)} c{show(node.cookie)}"
            f" hs {node.has_strong_ref:d} hw {node.has_weak_ref:d} ls {node.local_strong_refs}"
            f" lw {node.local_weak_refs} is {node.internal_strong_refs} iw {len(node.refs)} tr {node.tmp_refs + 1}"
        )
        process = node.process
        works = _works(node.async_todo)
        ref = node.refs.last()
        if not unnoticed:
            node.tmp_refs += 1
            node.put()
        if ref is not None:
            text += " proc"
        count = 0
        while ref is not None:
            text += f" {ref.process.pid}"
            key = ref.debug_id
            count += 1
            if not count % _PIECE:
                yield text
                yield None
                text = ""
            ref = node.refs.before(key)
        yield text + "\n"
        if process is None:
            return
        for work in works:
            yield "" if work is None else self._work(process, work, "    ", "    pending async transaction", show)

    def _process_stats(self, process: Process) -> Iterator[str]:
        strong = weak = pending = 0
        for desc in range(process.descs()):
            ref = process.refs_by_desc.get(desc)
            if ref is not None:
                strong += ref.strong
                weak += ref.weak
            if not desc % _SHARE:
                yield ""
        for count, work in enumerate(_works(process.todo)):
            pending += isinstance(work, Transaction)
            if not count % _SHARE:
                yield ""
        allocation = process.allocation
        free_async_space = allocation.free_async_space if allocation is not None else 0
        active, unused, untouched = allocation.page_counts() if allocation is not None else (0, 0, 0)
        yield (
            f"proc {process.pid}\n"
            f"context {process.context.name}\n"
            f"  threads: {len(process.threads)}\n"
            f"  requested threads: {process.requested_threads}+{process.requested_threads_started}"
            f"/{_signed(process.max_threads)}\n"
            f"  ready threads {len(process.waiting_threads)}\n"
            f"  free async space {free_async_space}\n"
            f"  nodes: {len(process.nodes)}\n"
            f"  refs: {len(process.refs_by_desc)} s {strong} w {weak}\n"
            f"  buffers: {len(allocation.allocated) if allocation is not None else 0}\n"
            f"  pages: {active}:{unused}:{untouched}\n"
            f"  pages high watermark: {allocation.pages_high if allocation is not None else 0}\n"
            f"  pending transactions: {pending}\n"
        ) + _stats("  ", process.stats)


def _works(queue: WorkList) -> Iterator[Work | None]:
    """Give all items of a list that changes between two of them, and None for what is passed once more.

    Where an item has left that this stood at, its serial number says which are behind it.
    """
    shown = _BEFORE_ALL
    work = queue.first
    while work is not None:
        serial = work.serial
        if serial > shown:
            shown = serial
            yield work
        else:
            yield None
        work = work.next if work.queue is queue and work.serial == serial else queue.first


def _buffers(allocation: RangeAllocator) -> Iterator[str]:
    """Show the allocated buffers in the order of their addresses; empty lines for others."""
    buffer: Buffer | None = allocation.first
    while buffer is not None:
        if buffer.free:
            yield ""
        else:
            yield (
                f"  buffer {buffer.debug_id}: {buffer.offset:x} size {buffer.data_size}:{buffer.offsets_size}:"
                f"{buffer.extra_buffers_size} {'active' if buffer.transaction is not None else 'delivered'}\n"
            )
        while not buffer.size and buffer.previous is not None:
            # It has become a part of the one before it.
            buffer = buffer.previous
            yield ""
        buffer = buffer.next


def _plain(value: int) -> str:
    return f"{value:016x}"


def _signed(value: int) -> int:
    """A 32-bit number as C's %d shows it."""
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value


def _describe(work: Work, show: Callable[[int], str]) -> str:
    if isinstance(work, TransactionComplete):
        if work.command == BR_TRANSACTION_COMPLETE:
            return "transaction complete"
        pending = work.command == BR_TRANSACTION_PENDING_FROZEN
        return f"unknown work: type {_UNKNOWN_PENDING if pending else _UNKNOWN_SPAM_SUSPECT}"
    if isinstance(work, ReturnError):
        return f"transaction error: {work.command}"
    if isinstance(work, Node):
        return f"node work {work.debug_id}: u{show(work.ptr)} c{show(work.cookie)}"
    if isinstance(work, Death):
        if work.kind == DEAD_BINDER:
            return "has dead binder"
        if work.kind == CLEAR_DEATH_NOTIFICATION:
            return "has cleared death notification"
        return "has cleared dead binder"
    assert isinstance(work, Freeze)  # there is no other kind
    return "has cleared freeze notification" if work.cleared else "has frozen binder"


def _stats(prefix: str, counters: Stats) -> str:
    lines = [
        f"{prefix}{name}: {_signed(count)}\n"
        for names, counts in ((COMMANDS, counters.bc), (RETURNS, counters.br))
        for name, count in zip(names, counts, strict=True)
        if count
    ]
    lines += [
        f"{prefix}{name}: active {created - deleted} total {created}\n"
        for name, created, deleted in zip(OBJECTS, counters.created, counters.deleted, strict=True)
        if created or deleted
    ]
    return "".join(lines)


def _log_entry(entry: LogEntry) -> str:
    kind = ("call ", "async", "reply")[entry.call_type]
    return (
        f"{entry.debug_id}: {kind} from {entry.from_process}:{entry.from_thread}"
        f" to {entry.to_process}:{entry.to_thread} context {entry.context_name} node {entry.to_node}"
        f" handle {_signed(entry.target_handle)} size {_signed(entry.data_size)}:{_signed(entry.offsets_size)}"
        f" ret {entry.return_error}/{entry.return_error_parameter} l={entry.return_error_line}"
        f"{'' if entry.done else ' (incomplete)'}\n"
    )
