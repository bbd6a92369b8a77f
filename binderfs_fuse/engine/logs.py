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
import heapq
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
    from binderfs_fuse.engine.thread import Thread
    from binderfs_fuse.engine.transaction import LogEntry
    from binderfs_fuse.engine.work import Work

# What the driver prints for work that its printer does not know, by the numbers of its enumeration.
_UNKNOWN_PENDING = 3
_UNKNOWN_SPAM_SUSPECT = 4
# Lines in one piece of text.
_PIECE = 64
# How much is sorted, or counted, before it is time for others.
_SHARE = 1024


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
        for node in list(reversed(engine.dead_nodes)):
            if node in engine.dead_nodes:
                yield from self._node(node, show, unnoticed=unnoticed)
        for process in list(reversed(engine.processes)):
            yield from self._process(process, show, everything=True, unnoticed=unnoticed)

    def transactions(self, *, hashed: bool = False) -> Iterator[str]:
        """`transactions` and `transactions_hashed`: what is under way."""
        yield "binder transactions:\n"
        show = self._hashed if hashed else _plain
        for process in list(reversed(self._engine.processes)):
            yield from self._process(process, show, everything=False)

    def proc(self, pid: int) -> Iterator[str]:
        """`proc/PID`: every open of one process."""
        for process in list(reversed(self._engine.processes)):
            if process.pid == pid:
                yield "binder proc state:\n"
                yield from self._process(process, _plain, everything=True)

    def stats(self) -> Iterator[str]:
        """`stats`: counters, of the mount and of each process."""
        yield "binder stats:\n" + _stats("", self._engine.stats)
        for process in list(reversed(self._engine.processes)):
            yield from self._process_stats(process)

    def transaction_log(self, *, failed: bool = False) -> Iterator[str]:
        """`transaction_log` and `failed_transaction_log`: the last 32, the oldest first."""
        entries = self._engine.failed_transaction_log if failed else self._engine.transaction_log
        yield "".join(map(_log_entry, entries))

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
        for tid in sorted(process.threads):
            thread = process.threads.get(tid)
            if thread is not None:
                yield from self._thread(thread, show, everything=everything)
        for ptr in _ascending(list(process.nodes)):
            node = process.nodes.get(ptr) if ptr is not None else None
            if node is not None and (everything or node.has_async_transaction):
                yield from self._node(node, show, unnoticed=unnoticed)
            else:
                yield "" if ptr is not None else None
        for desc in _ascending(list(process.refs_by_desc) if everything else []):
            ref = process.refs_by_desc.get(desc) if desc is not None else None
            if ref is not None:
                death = self._hashed(id(ref.death)) if ref.death is not None else self._hashed(0)
                yield (
                    f"  ref {ref.debug_id}: desc {ref.desc} {'' if ref.node.process is not None else 'dead '}"
                    f"node {ref.node.debug_id} s {ref.strong} w {ref.weak} d {death}\n"
                )
            else:
                yield "" if desc is not None else None
        allocated = process.allocation.allocated if process.allocation is not None else {}
        for offset in _ascending(list(allocated)):
            buffer = allocated.get(offset) if offset is not None else None
            if buffer is not None:
                yield (
                    f"  buffer {buffer.debug_id}: {buffer.offset:x} size {buffer.data_size}:{buffer.offsets_size}:"
                    f"{buffer.extra_buffers_size} {'active' if buffer.transaction is not None else 'delivered'}\n"
                )
            else:
                yield "" if offset is not None else None
        # Not before the nodes: to show these may have made work.
        for work in list(process.todo):
            yield self._work(process, work, "  ", "  pending transaction", show)
        if process.delivered_death:
            yield "  has delivered dead binder\n"
        if process.delivered_freeze:
            yield "  has delivered freeze binder\n"

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
        works = list(thread.todo)
        for prefix, transaction in stack:
            yield header + self._transaction(thread.process, prefix, transaction)
            header = ""
        for work in works:
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

    def _node(self, node: Node, show: Callable[[int], str], *, unnoticed: bool) -> Iterator[str]:
        text = (
            f"  node {node.debug_id}: u{show(node.ptr)} c{show(node.cookie)}"
            f" hs {node.has_strong_ref:d} hw {node.has_weak_ref:d} ls {node.local_strong_refs}"
            f" lw {node.local_weak_refs} is {node.internal_strong_refs} iw {len(node.refs)} tr {node.tmp_refs + 1}"
        )
        if node.refs:
            text += " proc" + "".join([f" {ref.process.pid}" for ref in reversed(node.refs)])
        process = node.process
        works = list(node.async_todo)
        if not unnoticed:
            node.tmp_refs += 1
            node.put()
        yield text + "\n"
        if process is None:
            return
        for work in works:
            yield self._work(process, work, "    ", "    pending async transaction", show)

    def _process_stats(self, process: Process) -> Iterator[str]:
        strong = weak = 0
        refs = list(process.refs_by_desc.values())
        for start in range(0, len(refs), _SHARE):
            for ref in refs[start : start + _SHARE]:
                strong += ref.strong
                weak += ref.weak
            yield ""
        allocation = process.allocation
        free_async_space = allocation.free_async_space if allocation is not None else 0
        active, unused, untouched = allocation.page_counts() if allocation is not None else (0, 0, 0)
        pending = sum([isinstance(work, Transaction) for work in process.todo])
        yield (
            f"proc {process.pid}\n"
            f"context {process.context.name}\n"
            f"  threads: {len(process.threads)}\n"
            f"  requested threads: {process.requested_threads}+{process.requested_threads_started}"
            f"/{_signed(process.max_threads)}\n"
            f"  ready threads {len(process.waiting_threads)}\n"
            f"  free async space {free_async_space}\n"
            f"  nodes: {len(process.nodes)}\n"
            f"  refs: {len(refs)} s {strong} w {weak}\n"
            f"  buffers: {len(allocation.allocated) if allocation is not None else 0}\n"
            f"  pages: {active}:{unused}:{untouched}\n"
            f"  pages high watermark: {allocation.pages_high if allocation is not None else 0}\n"
            f"  pending transactions: {pending}\n"
        ) + _stats("  ", process.stats)


def _ascending(numbers: list[int]) -> Iterator[int | None]:
    """Give numbers in ascending order, and None between shares of the work: to sort 100,000 at once takes too long."""
    shares = []
    for start in range(0, len(numbers), _SHARE):
        if start:
            yield None
        shares.append(sorted(numbers[start : start + _SHARE]))
    yield from heapq.merge(*shares)


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
