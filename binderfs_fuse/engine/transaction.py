"""Transactions: from one thread's BC_TRANSACTION or BC_REPLY to another thread's BR_TRANSACTION or BR_REPLY.

Theory of operation
-------------------
`transact` is the sender's half. It finds the target (the node behind a handle, or for a reply the thread that waits
for it), allocates a buffer in the target's region, has the data copied there once, translates the objects in it
(objects.py), and queues the `Transaction` as work: to the target's thread where there is one, to a waiting thread of
the process, to the process, or behind an unfinished one-way transaction of the same node. The receiver's half is
`Thread.read`.

A synchronous transaction is on two stacks from its delivery to its reply: of its sender (`from_parent` links it to what
that thread called before) and of the thread that serves it (`to_parent`). A nested call finds its way back to a waiting
thread by walking them.

An error is never an errno to the sender: it is a return (BR_FAILED_REPLY, BR_DEAD_REPLY or BR_FROZEN_REPLY) in
the thread's `return_error`, with details in its `extended_error` and in `failed_transaction_log`.

The `line` of a `TransactionError` is the line at which Linux 7.3.4's drivers/android/binder.c gives up: the logs show
it as `l=`, and who knows the driver can look it up.

Sources: Linux 7.3 binder.c `binder_transaction`, `binder_proc_transaction`, `binder_send_failed_reply`,
`binder_free_transaction`.

Invariants
----------
- `transaction.buffer.transaction is transaction` until either of them is freed.
- `to_process.outstanding_transactions` counts what is queued to or served by a process.
- While a step is between its effects, its target process has a `tmp_ref` and its target node a tmp reference.
- A call's `depth` is one more than that of the call that its sender serves, and less than `MAX_DEPTH`. So a walk up a
  stack meets at most `MAX_DEPTH` calls.
"""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOMEM, EPROTO, ESRCH
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse.engine import stats
from binderfs_fuse.engine.effects import CopyIn, CopyToBuffer, FindMapping, GetSecurityContext, Pace, Populate, SetNice
from binderfs_fuse.engine.limits import UNREAD
from binderfs_fuse.engine.objects import Translation, release_objects, translate_objects
from binderfs_fuse.engine.priority import scheduling_of_call
from binderfs_fuse.engine.range_alloc import PAGE_SHIFT, Buffer
from binderfs_fuse.engine.work import TransactionComplete, Work
from binderfs_fuse.uapi import (
    BR_DEAD_REPLY,
    BR_FAILED_REPLY,
    BR_FROZEN_REPLY,
    BR_OK,
    BR_ONEWAY_SPAM_SUSPECT,
    BR_TRANSACTION_COMPLETE,
    BR_TRANSACTION_PENDING_FROZEN,
    TF_CLEAR_BUF,
    TF_ONE_WAY,
    TF_UPDATE_TXN,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from binderfs_fuse.engine.context import Engine
    from binderfs_fuse.engine.effects import Effect, File, Region, Turns
    from binderfs_fuse.engine.node import Node
    from binderfs_fuse.engine.process import Process
    from binderfs_fuse.engine.thread import Thread

U64 = 0xFFFF_FFFF_FFFF_FFFF
# Calls inside of each other. The driver sets no bound, and pays for each with memory; a deeper one fails with -ENOMEM.
MAX_DEPTH: Final = 256


class TransactionError(Exception):
    """A transaction fails with a return (BR_...), a parameter (0 or a negative errno) and the driver's source line."""

    def __init__(self, command: int, parameter: int, line: int) -> None:
        super().__init__(command, parameter, line)
        self.command = command
        self.parameter = parameter
        self.line = line


class LogEntry:
    """One line of `transaction_log` and `failed_transaction_log` (binder.c `struct binder_transaction_log_entry`)."""

    __slots__ = (
        "call_type",
        "context_name",
        "data_size",
        "debug_id",
        "done",
        "from_process",
        "from_thread",
        "offsets_size",
        "return_error",
        "return_error_line",
        "return_error_parameter",
        "target_handle",
        "to_node",
        "to_process",
        "to_thread",
    )

    def __init__(
        self, debug_id: int, call_type: int, thread: Thread, target_handle: int, data_size: int, offsets_size: int
    ) -> None:
        process = thread.process
        self.debug_id = debug_id
        self.call_type = call_type
        self.from_process = process.pid
        self.from_thread = thread.tid
        self.context_name = process.context.name
        self.target_handle = target_handle
        self.data_size = data_size
        self.offsets_size = offsets_size
        self.to_process = 0
        self.to_thread = 0
        self.to_node = 0
        self.return_error = 0
        self.return_error_parameter = 0
        self.return_error_line = 0
        self.done = False


class Transaction(Work):
    """A call, a one-way call or a reply under way (binder_internal.h `struct binder_transaction`)."""

    __slots__ = (
        "buffer",
        "code",
        "debug_id",
        "depth",
        "files",
        "flags",
        "from_parent",
        "from_pid",
        "from_thread",
        "from_tid",
        "is_reply",
        "priority",
        "saved_priority",
        "saved_scheduling",
        "scheduling",
        "security_context",
        "sender_euid",
        "start_time",
        "to_parent",
        "to_process",
        "to_thread",
    )

    def __init__(self, thread: Thread, debug_id: int, code: int, flags: int, *, is_reply: bool) -> None:
        process = thread.process
        engine = process.engine
        engine.stats.created[stats.TRANSACTION] += 1
        self.queue = None
        self.debug_id = debug_id
        self.start_time = engine.clock()
        self.from_pid = process.pid
        self.from_tid = thread.tid
        self.sender_euid = thread.euid
        self.code = code
        self.flags = flags
        self.priority = thread.nice
        self.saved_priority = 0
        self.scheduling = thread.scheduling
        self.saved_scheduling = thread.scheduling
        self.is_reply = is_reply
        self.from_thread: Thread | None = None if is_reply or flags & TF_ONE_WAY else thread
        self.from_parent: Transaction | None = None
        self.depth = 0
        self.to_process: Process | None = None
        self.to_thread: Thread | None = None
        self.to_parent: Transaction | None = None
        self.buffer: Buffer | None = None
        # Descriptors to install in the receiver: (file, its region, offset of the number there).
        self.files: list[tuple[File, Region, int]] | None = None
        # Where in the buffer the sender's label stands, or None.
        self.security_context: int | None = None

    def held_buffer(self) -> Buffer | None:
        """The buffer that was delivered with it a moment ago; None where another thread has freed it since."""
        buffer = self.buffer
        if buffer is None or buffer.free or buffer.debug_id != self.debug_id:
            return None
        return buffer

    def undo(self, thread: Thread) -> None:
        if thread.take_back(self):
            thread.requeue(self)

    def lose(self, thread: Thread) -> None:
        thread.give_up(self)

    def key(self) -> int:
        """Sender, code and flags: with TF_UPDATE_TXN, a later one with the same makes it outdated in a node's list."""
        if not self.flags & TF_UPDATE_TXN:
            return -1
        buffer = self.buffer
        assert buffer is not None  # not delivered yet
        return buffer.pid << 64 | self.code << 32 | self.flags

    def cancel(self, engine: Engine) -> int:
        return self.cleanup(engine, BR_DEAD_REPLY)

    def cleanup(self, engine: Engine, command: int) -> int:
        """Give up before the delivery: a caller that waits reads `command` (binder.c `binder_cleanup_transaction`).

        Returns the number of transactions that this freed.
        """
        buffer = self.buffer
        if buffer is not None and buffer.target_node is not None and not self.flags & TF_ONE_WAY:
            return self.send_failed_reply(engine, command)
        self.free(engine)
        return 1

    def send_failed_reply(self, engine: Engine, command: int) -> int:
        """Tell whoever waits for the reply, up the stack to the first thread that still lives.

        Returns the number of transactions that this freed.
        """
        freed = 0
        transaction: Transaction | None = self
        while transaction is not None:
            freed += 1
            target = transaction.from_thread
            if target is not None:
                target.pop(transaction)
                if target.reply_error.command == BR_OK:
                    target.reply_error.command = command
                    target.enqueue(target.reply_error)
                    target.wake_up()
                transaction.free(engine)
                return freed
            following = transaction.from_parent
            transaction.free(engine)
            transaction = following
        return freed

    def free(self, engine: Engine) -> None:
        """Forget the transaction; its buffer stays until user space frees it."""
        process = self.to_process
        if process is not None:
            process.finish_transaction()
            if self.buffer is not None:
                self.buffer.transaction = None
        if self.files is not None:
            self.close_files()
        engine.stats.deleted[stats.TRANSACTION] += 1

    def close_files(self) -> None:
        """Drop the descriptors that were not installed."""
        if self.files is not None:
            for file, _, _ in self.files:
                file.close()
            self.files = None


def transact(
    thread: Thread, fields: tuple[int, ...], *, reply: bool, extra_buffers_size: int
) -> Generator[Effect, Any, None]:
    """Carry out BC_TRANSACTION, BC_REPLY and their _SG forms.

    `fields` are those of `struct binder_transaction_data`; `extra_buffers_size` is in bytes, 0 without _SG. Errors go
    to `thread.return_error`.
    """
    handle, _, code, flags, _, _, data_size, offsets_size, data_address, offsets_address = fields
    process = thread.process
    engine = process.engine
    one_way = flags & TF_ONE_WAY
    debug_id = engine.next_debug_id()
    entry = LogEntry(debug_id, 2 if reply else one_way, thread, handle, data_size, offsets_size)
    engine.transaction_log.append(entry)
    thread.extended_error = (debug_id, BR_OK, 0)
    transaction = Transaction(thread, debug_id, code, flags, is_reply=reply)
    in_reply_to: Transaction | None = None
    target_process: Process | None = None
    target_thread: Thread | None = None
    target_node: Node | None = None
    complete: TransactionComplete | None = None
    try:
        if reply:
            in_reply_to = thread.transaction_stack
            if in_reply_to is None:
                raise TransactionError(BR_FAILED_REPLY, -EPROTO, 3156)
            if in_reply_to.to_thread is not thread:
                in_reply_to = None
                raise TransactionError(BR_FAILED_REPLY, -EPROTO, 3171)
            thread.transaction_stack = in_reply_to.to_parent
            if in_reply_to.to_parent is None:
                process.busy_threads -= 1
            if engine.android_priority:
                yield from thread.set_scheduling(in_reply_to.saved_scheduling)
            elif in_reply_to.saved_priority != thread.nice:
                thread.nice = yield SetNice(in_reply_to.saved_priority)
            target_thread = in_reply_to.from_thread
            if target_thread is None:
                raise TransactionError(BR_DEAD_REPLY, 0, 3185)
            if target_thread.transaction_stack is not in_reply_to:
                in_reply_to = None
                target_thread = None
                raise TransactionError(BR_FAILED_REPLY, -EPROTO, 3197)
            target_process = target_thread.process
            target_process.tmp_ref += 1
        else:
            if handle:
                ref = process.ref(handle, strong=True)
                if ref is None:
                    raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3253)
                node = ref.node
            else:
                manager = process.context.manager
                if manager is None:
                    raise TransactionError(BR_DEAD_REPLY, -EINVAL, 3253)
                node = manager
            target_process = node.process
            if target_process is None:
                raise TransactionError(BR_DEAD_REPLY, -EINVAL, 3253)
            target_node = node
            target_node.local_strong_refs += 1
            target_node.tmp_refs += 1
            target_process.tmp_ref += 1
            if not handle and target_process.pid == process.pid:
                raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3244)
            entry.to_node = target_node.debug_id
            if process is target_process:
                raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3262)
            if not one_way:
                if type(thread.todo.first) is Transaction:
                    raise TransactionError(BR_FAILED_REPLY, -EPROTO, 3294)
                outer = thread.transaction_stack
                if outer is not None:
                    if outer.to_thread is not thread:
                        raise TransactionError(BR_FAILED_REPLY, -EPROTO, 3313)
                    transaction.depth = outer.depth + 1
                    if transaction.depth >= MAX_DEPTH:
                        raise TransactionError(BR_FAILED_REPLY, -ENOMEM, 3346)
                    while outer is not None:
                        if outer.from_thread is not None and outer.from_thread.process is target_process:
                            target_thread = outer.from_thread
                            break
                        outer = outer.from_parent

        transaction.to_process = target_process
        transaction.to_thread = target_thread
        if engine.android_priority:
            transaction.scheduling = scheduling_of_call(
                thread.scheduling, target_process.default_scheduling, one_way=bool(one_way)
            )
        if target_thread is not None:
            entry.to_thread = target_thread.tid
        entry.to_process = target_process.pid

        unread = thread.unread + 1
        if thread.todo.count >= engine.limits.unread:
            raise TransactionError(BR_FAILED_REPLY, -ENOMEM, 3346)
        if not unread % UNREAD:
            account = thread.process.account
            if account.objects >= account.object_lease and not account.has_objects(1):
                raise TransactionError(BR_FAILED_REPLY, -ENOMEM, 3346)
            account.objects += 1
        thread.unread = unread
        complete = TransactionComplete(BR_TRANSACTION_COMPLETE)
        engine.stats.created[stats.TRANSACTION_COMPLETE] += 1

        label = b""
        label_size = 0
        if target_node is not None and target_node.txn_security_ctx:
            answer = yield GetSecurityContext()
            if isinstance(answer, int):
                raise TransactionError(BR_FAILED_REPLY, answer, 3376)
            label = answer + b"\0"
            label_size = (len(label) + 7) & ~7
            extra_buffers_size += label_size
            if extra_buffers_size > U64:
                raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3386)

        allocation = target_process.allocation
        if allocation is None:
            mapping = yield FindMapping(target_process)
            if mapping is None:
                raise TransactionError(BR_DEAD_REPLY, -ESRCH, 3409)
            target_process.map(*mapping)
            allocation = target_process.allocation
            assert allocation is not None  # `map` has made it
        size = ((data_size + 7) & ~7) + ((offsets_size + 7) & ~7) + ((extra_buffers_size + 7) & ~7)
        if size > U64:
            raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3409)
        account = target_process.account
        # The buffer, and a record of each object in it.
        if account.objects + (offsets_size >> 3) >= account.object_lease and not account.has_objects(
            1 + (offsets_size >> 3)
        ):
            raise TransactionError(BR_FAILED_REPLY, -ENOMEM, 3409)
        buffer = allocation.allocate(
            size or 8, thread.pid, is_async=bool(one_way and not reply), records=offsets_size >> 3
        )
        if isinstance(buffer, int):
            raise TransactionError(BR_FAILED_REPLY, buffer, 3409)
        buffer.debug_id = debug_id
        buffer.data_size = data_size
        buffer.offsets_size = offsets_size
        buffer.extra_buffers_size = extra_buffers_size
        missing = allocation.missing_pages(buffer)
        if missing is not None:
            first, end = missing
            error = -ENOMEM
            if account.has_pages(end - first):
                # Another step may ask for pages before these are there.
                account.populating += end - first
                error = yield Populate(target_process.region, first << PAGE_SHIFT, (end - first) << PAGE_SHIFT)
                account.populating -= end - first
            if error:
                allocation.release(buffer)
                raise TransactionError(BR_FAILED_REPLY, error, 3409)
            allocation.installed(first, end)
        transaction.buffer = buffer
        buffer.transaction = transaction
        buffer.target_node = target_node
        buffer.clear_on_free = bool(flags & TF_CLEAR_BUF)
        if label:
            transaction.security_context = size - label_size
            target_process.region.store(buffer.offset + size - label_size, label)

        # The common case has no objects, and one copy.
        if offsets_size or extra_buffers_size:
            offsets = yield from _copy_offsets(offsets_address, offsets_size, extra_buffers_size)
            if thread.translation is None:
                thread.translation = Translation(Pace(engine.chunk))
            elif thread.translation.path:
                yield from _drop_translation(thread)
            yield from translate_objects(
                thread,
                transaction,
                in_reply_to,
                offsets,
                data_address,
                extra_buffers_size - label_size,
                thread.translation,
            )
        elif data_size:
            copied = yield CopyToBuffer(data_address, data_size, target_process.region, buffer.offset)
            if copied != data_size:
                raise TransactionError(BR_FAILED_REPLY, -EFAULT, 3743)

        if buffer.oneway_spam_suspect:
            complete.command = BR_ONEWAY_SPAM_SUSPECT
        if in_reply_to is not None:
            assert target_thread is not None  # found above
            thread.enqueue(complete)
            if target_thread.is_dead:
                raise TransactionError(BR_DEAD_REPLY, 0, 3846)
            target_thread.pop(in_reply_to)
            target_thread.enqueue(transaction)
            target_process.outstanding_transactions += 1
            target_thread.wake_up()
            in_reply_to.free(engine)
        elif not one_way:
            thread.enqueue_deferred(complete)
            transaction.from_parent = thread.transaction_stack
            if thread.transaction_stack is None:
                process.busy_threads += 1
            thread.transaction_stack = transaction
            error = queue_transaction(transaction, target_process, target_thread)
            if error:
                thread.pop(transaction)
                raise TransactionError(error, 0, 3846)
        else:
            outdated = take_outdated(transaction, target_process) if flags & TF_UPDATE_TXN else None
            error = queue_transaction(transaction, target_process, None)
            if error == BR_TRANSACTION_PENDING_FROZEN:
                complete.command = error
            thread.enqueue(complete)
            if outdated is not None:
                yield from _discard(outdated, target_process)
            if error and error != BR_TRANSACTION_PENDING_FROZEN:
                raise TransactionError(error, 0, 3846)
    except TransactionError as failure:
        yield from _fail(thread, failure, entry, transaction, complete, in_reply_to, target_process, target_node)
        if offsets_size or extra_buffers_size:
            yield from _drop_translation(thread)
        return
    # An object without a parent leaves itself, and that costs less to keep.
    if thread.translation is not None and len(thread.translation.path) > 1:
        yield from _drop_translation(thread)
    target_process.drop_tmp_ref()
    if target_node is not None:
        target_node.put()
    entry.done = True


def _drop_translation(thread: Thread) -> Turns:
    """Let go of what is known of the objects of the last transaction that `thread` sent."""
    if thread.translation is not None:
        yield from thread.translation.drop()


def _copy_offsets(address: int, size: int, extra_buffers_size: int) -> Generator[Effect, Any, bytes]:
    offsets: bytes = b""
    if size:
        offsets = yield CopyIn(address, size)
        if len(offsets) != size:
            raise TransactionError(BR_FAILED_REPLY, -EFAULT, 3448)
    if size & 7:
        raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3456)
    if extra_buffers_size & 7:
        raise TransactionError(BR_FAILED_REPLY, -EINVAL, 3465)
    return offsets


def _fail(
    thread: Thread,
    failure: TransactionError,
    entry: LogEntry,
    transaction: Transaction,
    complete: TransactionComplete | None,
    in_reply_to: Transaction | None,
    target_process: Process | None,
    target_node: Node | None,
) -> Turns:
    """Undo a transaction that was not queued, and leave the error where the sender reads it."""
    engine = thread.process.engine
    buffer = transaction.buffer
    if buffer is not None:
        assert target_process is not None  # the buffer is in its region
        assert complete is not None  # made before it
        complete.dequeue()
        pace = Pace(engine.chunk)
        transaction.close_files()
        yield from release_objects(target_process, None, buffer, pace, is_failure=True)
        if target_node is not None:
            target_node.put()
            target_node = None
        buffer.transaction = None
        if buffer.clear_on_free:
            thread.cleared.append((target_process.region, buffer.offset, buffer.size))
        yield from target_process.discard_buffer(buffer)
    if complete is not None:
        thread.discount_unread()
        engine.stats.deleted[stats.TRANSACTION_COMPLETE] += 1
    if target_node is not None:
        target_node.decrement(strong=True, internal=False)
        target_node.put()
    engine.stats.deleted[stats.TRANSACTION] += 1
    if target_process is not None:
        target_process.drop_tmp_ref()
    entry.return_error = failure.command
    entry.return_error_parameter = failure.parameter
    entry.return_error_line = failure.line
    entry.done = True
    engine.failed_transaction_log.append(entry)
    if in_reply_to is not None:
        waiting = in_reply_to.from_thread
        if waiting is not None and waiting.extended_error[1] == BR_OK:
            waiting.extended_error = (entry.debug_id, failure.command, failure.parameter)
        thread.return_error.command = BR_TRANSACTION_COMPLETE
        thread.enqueue(thread.return_error)
        in_reply_to.send_failed_reply(engine, failure.command)
    else:
        thread.extended_error = (entry.debug_id, failure.command, failure.parameter)
        thread.return_error.command = failure.command
        thread.enqueue(thread.return_error)


def queue_transaction(transaction: Transaction, process: Process, thread: Thread | None) -> int:
    """Queue a call or one-way call to a process, or to `thread` of it (binder.c `binder_proc_transaction`).

    Returns 0, BR_DEAD_REPLY, BR_FROZEN_REPLY (not queued), or BR_TRANSACTION_PENDING_FROZEN (queued).
    """
    buffer = transaction.buffer
    assert buffer is not None  # just allocated
    node = buffer.target_node
    assert node is not None  # replies do not come here
    one_way = transaction.flags & TF_ONE_WAY
    pending_async = False
    if one_way:
        if node.has_async_transaction:
            pending_async = True
        else:
            node.has_async_transaction = True
    frozen = process.is_frozen
    if frozen:
        process.sync_recv |= not one_way
        process.async_recv |= bool(one_way)
    if (frozen and not one_way) or process.is_dead or (thread is not None and thread.is_dead):
        return BR_FROZEN_REPLY if frozen else BR_DEAD_REPLY
    if thread is None and not pending_async:
        thread = process.select_thread()
    if thread is not None:
        thread.enqueue(transaction)
        thread.wake_up()
    elif not pending_async:
        process.enqueue(transaction)
        process.wake_up_pollers()
    else:
        node.async_todo.append(transaction)
    process.outstanding_transactions += 1
    if one_way and frozen:
        return BR_TRANSACTION_PENDING_FROZEN
    return 0


def take_outdated(transaction: Transaction, process: Process) -> Transaction | None:
    """Take the first one-way transaction off its list that this one, which is about to be queued there, supersedes.

    It waits behind another of the same node, whose process is frozen, and has the same flags, code and sender (binder.c
    `binder_can_update_transaction`).
    """
    buffer = transaction.buffer
    assert buffer is not None  # just allocated
    node = buffer.target_node
    assert node is not None  # replies do not come here
    if not process.is_frozen or not node.has_async_transaction:
        return None
    outdated = node.async_todo.find(transaction.key())
    if outdated is None:
        return None
    assert isinstance(outdated, Transaction)  # nothing else is on this list
    outdated.dequeue()
    process.outstanding_transactions -= 1
    return outdated


def _discard(outdated: Transaction, process: Process) -> Turns:
    """Free a transaction that was taken off its list, with its buffer; `process` cannot be freed meanwhile."""
    pace = Pace(process.engine.chunk)
    buffer = outdated.buffer
    assert buffer is not None  # not delivered, so not freed by user space
    outdated.buffer = None
    buffer.transaction = None
    yield from release_objects(process, None, buffer, pace, is_failure=True)
    yield from process.discard_buffer(buffer)
    outdated.close_files()
    process.engine.stats.deleted[stats.TRANSACTION] += 1
