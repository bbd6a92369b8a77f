"""Threads: what a client's thread writes to the driver and reads from it.

Theory of operation
-------------------
`write_read` is BINDER_WRITE_READ: first every command of the write buffer, in order, until one faults or leaves a
`return_error`; then one read. A read takes items of work from the thread's own `todo`, and from the process's where
the thread has nothing else to do (no transaction under way, nothing of its own); if there is none it parks in `Wait`.
A read ends with a transaction, a reply, a death or a freeze notification, with no room for another item, or with
nothing more to do.

Work of the thread's own does not by itself end a wait: only `process_todo` does. That is how BR_TRANSACTION_COMPLETE
of a synchronous call stays behind until the reply (`enqueue_deferred`).

A read is put together in the engine and stored in the client's memory at once, after the fact; a long one in parts,
before each turn. Should the memory turn out not to be writable, `undeliver` puts the state back to what the driver,
which stores item by item, would have left: the item at which the fault occurred is lost (its caller, if any, is told),
those behind it were never taken. Other threads may have gone on with an item meanwhile, as far as they can know of it;
then it stays as they left it.

What it takes to take a part back is in the read's outcome. So it ends with that, and is never more than one part: no
thread keeps what it has read.
A fault at the very start must be known *before* parking: the first read into a buffer stores its BR_NOOP right away;
later ones into the same address are taken to be as good.

A write buffer may hold thousands of commands, and a list thousands of items. So write, read and whatever undoes a read
give turns: the commands done, and the items read, stay so whatever others do then, as between the driver's own locks.

Sources: Linux 7.3 binder.c `binder_thread_write`, `binder_thread_read`, `binder_thread_release`,
`binder_ioctl_write_read`.

Invariants
----------
- `thread.tid` is the key in `process.threads` until the thread is dead.
- `thread in process.waiting_threads` only while it is parked for process work.
- The top of `transaction_stack` has this thread as `from_thread` or `to_thread`.
- A thread that is dead and still has work is in `engine.dying_threads`.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from errno import EAGAIN, EFAULT, EINTR, EINVAL, ENOMEM
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse import uapi
from binderfs_fuse.engine import freeze, stats
from binderfs_fuse.engine.effects import (
    TURN,
    CopyIn,
    CopyOut,
    FindRoom,
    Outcome,
    Pace,
    SetNice,
    SetScheduling,
    Wait,
)
from binderfs_fuse.engine.limits import THREAD, UNREAD
from binderfs_fuse.engine.node import CLEAR_DEATH_NOTIFICATION, DEAD_BINDER, DEAD_BINDER_AND_CLEAR, Death
from binderfs_fuse.engine.priority import NORMAL, scheduling_to_serve
from binderfs_fuse.engine.transaction import Transaction, transact
from binderfs_fuse.engine.work import ReturnError, TransactionComplete, Work, WorkList
from binderfs_fuse.uapi import (
    BC_ACQUIRE,
    BC_ACQUIRE_DONE,
    BC_FREE_BUFFER,
    BC_RELEASE,
    BC_REPLY,
    BC_REPLY_SG,
    BC_TRANSACTION,
    BC_TRANSACTION_SG,
    BR_DEAD_REPLY,
    BR_ERROR,
    BR_FAILED_REPLY,
    BR_NOOP,
    BR_OK,
    BR_REPLY,
    BR_SPAWN_LOOPER,
    BR_TRANSACTION,
    BR_TRANSACTION_SEC_CTX,
    TF_ONE_WAY,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from binderfs_fuse.engine.effects import Effect, Region, Step, Turns
    from binderfs_fuse.engine.objects import Translation
    from binderfs_fuse.engine.priority import Scheduling
    from binderfs_fuse.engine.process import Process
    from binderfs_fuse.engine.range_alloc import Buffer

# Bits of `thread.looper`, as the logs show them.
REGISTERED: Final = 0x01
ENTERED: Final = 0x02
EXITED: Final = 0x04
INVALID: Final = 0x08
WAITING: Final = 0x10
POLL: Final = 0x20

U64: Final = 0xFFFF_FFFF_FFFF_FFFF
# A read goes on while there is room for the largest item: a command and a binder_transaction_data_secctx.
_ROOM: Final = 4 + uapi.binder_transaction_data_secctx.size
# How much of a write buffer is fetched at once: a call that waits for its turn keeps it.
_CHUNK: Final = 4096
# What a transaction counts for, where another command counts for 1 of the elements between two turns.
_TRANSACTION_WEIGHT: Final = 16

_NOOP: Final = BR_NOOP.to_bytes(4, "little")
_SPAWN_LOOPER: Final = BR_SPAWN_LOOPER.to_bytes(4, "little")
_unpack_write_read: Final = uapi.binder_write_read.unpack
_pack_write_read: Final = uapi.binder_write_read.pack
_unpack_transaction: Final = uapi.binder_transaction_data.unpack
_pack_received: Final = uapi.framed(uapi.binder_transaction_data_received).pack
_pack_received_secctx: Final = uapi.framed(uapi.binder_transaction_data_secctx).pack
_unpack_u64: Final = struct.Struct("=Q").unpack
# Numbers up to here are machine words to compiled code; U64 itself is not.
_SMALL: Final = (1 << 61) - 1


class Thread:
    """A thread of a process that has used the device, known by its `tid`."""

    __slots__ = (
        "cleared",
        "closes",
        "euid",
        "extended_error",
        "failed_buffer",
        "files_handed_over",
        "good_buffer",
        "is_dead",
        "left",
        "looper",
        "looper_need_return",
        "nice",
        "pid",
        "process",
        "process_todo",
        "releasing",
        "reply_error",
        "return_error",
        "scheduling",
        "spawned",
        "tid",
        "todo",
        "transaction_stack",
        "translation",
        "undoing",
        "unread",
        "wait",
        "waited",
    )

    process: Process
    tid: int
    pid: int
    euid: int
    nice: int

    def __init__(self, process: Process, tid: int) -> None:
        process.engine.stats.created[stats.THREAD] += 1
        process.account.objects += THREAD
        self.process = process
        self.tid = tid
        # The thread group's, which is not the process's where that has handed on its descriptor.
        self.pid = 0
        self.euid = 0
        self.nice = 0
        self.scheduling: Scheduling = (NORMAL, 120)
        self.looper = 0
        self.looper_need_return = True
        self.is_dead = False
        self.todo = WorkList()
        self.process_todo = False
        # How many TransactionCompletes it has to read, with the one that a step of it has not queued yet.
        self.unread = 0
        self.transaction_stack: Transaction | None = None
        self.return_error = ReturnError()
        self.reply_error = ReturnError()
        # (id, command, parameter) as BINDER_GET_EXTENDED_ERROR gives them.
        self.extended_error: tuple[int, int, int] = (0, BR_OK, 0)
        self.wait = Wait()
        # Whether its last read said BR_SPAWN_LOOPER, and had to wait.
        self.spawned = False
        self.waited = False
        # How many more elements it touches before it gives a turn, and what is left of the release of a buffer.
        self.left = 0
        self.releasing: Turns | None = None
        # What is known of the objects of the transaction that it sends; kept for the next one.
        self.translation: Translation | None = None
        # While a read is undone: the list that the present item came from.
        self.undoing: WorkList | None = None
        # And the buffer of a transaction that cannot be delivered any more.
        self.failed_buffer: Buffer | None = None
        # Where a BR_NOOP could be stored last.
        self.good_buffer: int | None = None
        # The last read ended with a transaction whose files are the shell's now; they may not be installed yet.
        self.files_handed_over = False
        # Descriptors to be closed in the client when this ioctl returns, and buffers that it has cleared.
        self.closes: list[int] = []
        self.cleared: list[tuple[Region, int, int]] = []

    # -- work

    def enqueue(self, work: Work) -> None:
        """Add work, and let a read of this thread see it."""
        self.todo.append(work)
        if self.looper & POLL and not self.process_todo:
            self.process.engine.poll_ready[self.process] = None
        self.process_todo = True

    def count_unread(self) -> None:
        """Count a TransactionComplete that it has to read again."""
        self.unread += 1
        if not self.unread % UNREAD:
            self.process.account.objects += 1

    def discount_unread(self) -> None:
        """Count one no more, which it has read or never will."""
        if not self.unread % UNREAD:
            self.process.account.objects -= 1
        self.unread -= 1

    def enqueue_deferred(self, work: Work) -> None:
        """Add work that waits for some other work to be read with."""
        self.todo.append(work)

    def requeue(self, work: Work) -> None:
        """Put work back where the read took it that is being undone."""
        queue = self.undoing
        assert queue is not None  # it is called by what `undeliver` calls
        queue.appendleft(work)
        if queue is self.todo:
            self.process_todo = True

    def wake_up(self) -> None:
        """Let a parked read of this thread go on, and its pollers look again."""
        wait = self.wait
        if wait.parked:
            wait.parked = False
            self.process.engine.ready.append(wait)
        if self.looper & POLL:
            self.process.engine.poll_ready[self.process] = None

    def has_work(self, *, for_process: bool) -> bool:
        """Whether a read would return something."""
        return self.process_todo or self.looper_need_return or (for_process and self.process.todo.first is not None)

    def available_for_process_work(self) -> bool:
        """Whether a read may take the process's work."""
        return self.transaction_stack is None and self.todo.first is None

    def pop(self, transaction: Transaction) -> None:
        """Take the transaction that this thread waits for off its stack."""
        assert self.transaction_stack is transaction and transaction.from_thread is self  # noqa: PT018
        self.transaction_stack = transaction.from_parent
        if transaction.from_parent is None:
            self.process.busy_threads -= 1
        transaction.from_thread = None

    def set_scheduling(self, scheduling: Scheduling, *, verify: bool = False) -> Generator[Effect, Any, None]:
        """Change the thread's own scheduler policy and priority, with Android's rules."""
        if scheduling != self.scheduling:
            self.scheduling = yield SetScheduling(scheduling, verify=verify)

    # -- the ioctl

    def write_read(self, argument: bytes, commands: bytes | None, *, nonblock: bool) -> Step:
        """BINDER_WRITE_READ: `argument` is a `struct binder_write_read`.

        -EFAULT for unreadable commands or an unwritable read buffer, -EINVAL for an unknown command, -EAGAIN and
        -EINTR for a read without result; what was consumed is in the argument in any case.
        """
        # Declared, or mypyc takes them for objects, and their arithmetic for Python's.
        write_size: int
        write_consumed: int
        write_buffer: int
        read_size: int
        read_consumed: int
        read_buffer: int
        write_size, write_consumed, write_buffer, read_size, read_consumed, read_buffer = _unpack_write_read(argument)
        process = self.process
        error = 0
        self.left = process.engine.chunk
        if write_size:
            stream = _CommandStream(write_buffer, commands)
            while self.return_error.command == BR_OK and _is_before(write_buffer, write_consumed, write_size):
                stream.position = write_consumed
                # Fast where the command is there already, as it nearly always is.
                if stream.start <= write_consumed and write_consumed + 4 <= stream.end:
                    start = write_consumed - stream.start
                    word = stream.data[start : start + 4]
                    stream.position += 4
                else:
                    taken = yield from stream.take(4, write_size)
                    if taken is None:
                        error = -EFAULT
                        break
                    word = taken
                handler = _COMMANDS.get(word)
                if handler is None:
                    process.count_command(int.from_bytes(word, "little"))
                    error = -EINVAL
                    break
                command, size, carry_out = handler
                process.count_command(command)
                payload = b""
                if size:
                    start = stream.position - stream.start
                    if stream.position + size <= stream.end:
                        payload = stream.data[start : start + size]
                        stream.position += size
                    else:
                        taken = yield from stream.take(size, write_size)
                        if taken is None:
                            error = -EFAULT
                            break
                        payload = taken
                self.left -= 1
                if command == BC_TRANSACTION or command == BC_REPLY:  # noqa: PLR1714, SIM109 - the hot path; a tuple costs more
                    self.left -= _TRANSACTION_WEIGHT
                    yield from transact(
                        self, _unpack_transaction(payload), reply=command == BC_REPLY, extra_buffers_size=0
                    )
                elif command == BC_TRANSACTION_SG or command == BC_REPLY_SG:  # noqa: PLR1714, SIM109
                    self.left -= _TRANSACTION_WEIGHT
                    fields = uapi.binder_transaction_data_sg.unpack(payload)
                    yield from transact(self, fields[:-1], reply=command == BC_REPLY_SG, extra_buffers_size=fields[-1])
                elif command == BC_FREE_BUFFER:
                    if self._free_buffer(payload):
                        yield from self._go_on_releasing()
                else:
                    error = carry_out(self, command, payload)
                    if error:
                        break
                write_consumed = _wrapped(stream.position)
                if self.left <= 0:
                    self.left = process.engine.chunk
                    if (yield TURN):
                        error = -EINTR
                        break
            if error:
                read_consumed = 0
        data: bytearray | bytes = b""
        outcome = Outcome()
        if not error and read_size:
            outcome.address = _wrapped(read_buffer + read_consumed)
            data = bytearray()
            if not read_consumed:
                data += _NOOP
            error = yield from self._read(read_buffer, read_consumed, read_size, data, outcome, nonblock=nonblock)
            if error:
                data = b""
            else:
                spawned = self.spawned = self._wants_looper()
                if spawned and not read_consumed and not outcome.stored:
                    data[0:4] = _SPAWN_LOOPER
                elif spawned:
                    copied = yield CopyOut(read_buffer, _SPAWN_LOOPER)
                    if copied != 4:
                        error = -EFAULT
                        self.process.count_return(BR_SPAWN_LOOPER, -1)
                read_consumed += outcome.stored + len(data)
            if process.todo.first is not None:
                process.wake_up()
        self.looper_need_return = False
        outcome.error = error
        outcome.argument = _pack_write_read(
            write_size, write_consumed, write_buffer, read_size, _wrapped(read_consumed), read_buffer
        )
        outcome.data = data
        if self.closes:
            outcome.closes = self.closes
            self.closes = []
        if self.cleared:
            # As many as there were commands: not to be copied.
            self.cleared += outcome.buffers
            outcome.buffers = self.cleared
            self.cleared = []
        yield outcome

    def _read(
        self,
        buffer: int,
        consumed: int,
        size: int,
        out: bytearray,
        outcome: Outcome,
        *,
        nonblock: bool,
    ) -> Generator[Effect, Any, int]:
        """Fill `out` with work; 0 or a negative errno. What `outcome` says is stored is in `out` no more."""
        process = self.process
        if not consumed and buffer != self.good_buffer:
            copied = yield CopyOut(buffer, _NOOP)
            if copied != 4:
                return -EFAULT
            self.good_buffer = buffer
        self.left = process.engine.chunk
        delivered: list[tuple[int, Work, WorkList]] = []
        outcome.delivered = delivered
        self.waited = False
        while True:
            for_process = self.transaction_stack is None and self.todo.first is None
            self.looper |= WAITING
            if for_process:
                if process.engine.android_priority:
                    yield from self.set_scheduling(process.default_scheduling)
                elif self.nice != process.default_priority:
                    self.nice = yield SetNice(process.default_priority)
            error = 0
            if nonblock:
                if not self.has_work(for_process=for_process):
                    error = -EAGAIN
            else:
                wait = self.wait
                while not (
                    self.process_todo or self.looper_need_return or (for_process and process.todo.first is not None)
                ):
                    if for_process:
                        process.waiting_threads[self] = None
                    self.waited = wait.parked = True
                    error = yield wait
                    wait.parked = False
                    if for_process:
                        process.waiting_threads.pop(self, None)
                    if error:
                        break
            self.looper &= ~WAITING
            if error:
                return error
            while True:
                if self.todo.first is not None:
                    queue = self.todo
                elif for_process and process.todo.first is not None:
                    queue = process.todo
                else:
                    if consumed + len(out) == 4 and not self.looper_need_return:
                        # These had nothing to say.
                        delivered.clear()
                        break
                    return 0
                # The driver's subtraction of unsigned numbers; a large enough difference needs no wrapping around.
                room = size - consumed - len(out)
                if room < _ROOM and room & U64 < _ROOM:
                    return 0
                work = queue.popleft()
                if self.todo.first is None:
                    self.process_todo = False
                if type(work) is not Transaction:
                    if work.deliver(self, out):
                        delivered.append((len(out), work, queue))
                        return 0
                    if delivered:
                        delivered.append((len(out), work, queue))
                    else:
                        # A list that is made with its item has no room to spare, as one has that grows.
                        delivered = outcome.delivered = [(len(out), work, queue)]
                    self.left -= 1
                    if self.left <= 0:
                        self.left = process.engine.chunk
                        copied = yield CopyOut(outcome.address, bytes(out))
                        if copied != len(out):
                            process.tmp_ref += 1
                            yield from self._take_back_rest(delivered, out, copied, faulty=True)
                            process.drop_tmp_ref()
                            return -EFAULT
                        delivered.clear()
                        outcome.address = _wrapped(outcome.address + copied)
                        outcome.stored += copied
                        consumed += copied
                        out.clear()
                        yield TURN
                    continue
                received = work.buffer
                assert received is not None  # user space has not seen it yet
                node = received.target_node
                if node is None:
                    pass
                elif process.engine.android_priority:
                    work.saved_scheduling = self.scheduling
                    yield from self.set_scheduling(
                        scheduling_to_serve(work.scheduling, node.scheduling, inherit_rt=node.inherit_rt), verify=True
                    )
                else:
                    nice = self._serving_nice(work, node.min_priority)
                    if nice != self.nice:
                        self.nice = yield SetNice(nice)
                if work.files is not None:
                    error = yield FindRoom(len(work.files))
                    if error:
                        work.cleanup(process.engine, BR_FAILED_REPLY)
                        if process.release_buffer(self, received, is_failure=True):
                            yield from self._go_on_releasing()
                        if node is not None:
                            continue
                        out += BR_FAILED_REPLY.to_bytes(4, "little")
                        process.count_return(BR_FAILED_REPLY)
                        return 0
                self._receive(work, received, out, outcome)
                delivered.append((len(out), work, queue))
                return 0

    def _free_buffer(self, payload: bytes) -> bool:
        """BC_FREE_BUFFER: addresses that are no delivered buffer are ignored. Returns as `Process.release_buffer`."""
        process = self.process
        allocation = process.allocation
        if allocation is None:
            return False
        address: int = _unpack_u64(payload)[0]
        buffer = allocation.allocated.get(address - process.address)
        if buffer is None or not buffer.allow_user_free:
            return False
        buffer.allow_user_free = False
        return process.release_buffer(self, buffer, is_failure=False)

    def _go_on_releasing(self) -> Turns:
        """Do what `Process.release_buffer` has left."""
        rest, self.releasing = self.releasing, None
        assert rest is not None  # it said that there is something
        yield from rest

    def _serving_nice(self, transaction: Transaction, minimum: int) -> int:
        """The nice value to serve a transaction with; remembers the present one."""
        transaction.saved_priority = self.nice
        one_way = transaction.flags & TF_ONE_WAY
        if transaction.priority < minimum and not one_way:
            return transaction.priority
        if not one_way or self.nice > minimum:
            return minimum
        return self.nice

    def _receive(self, transaction: Transaction, buffer: Buffer, out: bytearray, outcome: Outcome) -> None:
        """Hand a transaction or reply over: BR_TRANSACTION, BR_TRANSACTION_SEC_CTX or BR_REPLY."""
        process = self.process
        node = buffer.target_node
        sender = transaction.from_thread
        address = process.address + buffer.offset
        offsets = address + ((buffer.data_size + 7) & ~7)
        sender_pid = sender.process.pid_in(process) if sender is not None else 0
        sender_euid = transaction.sender_euid
        if process.user_ids is not None:
            sender_euid = process.user_id(sender_euid)
        if node is None:
            command = BR_REPLY
            ptr = cookie = 0
        else:
            command = BR_TRANSACTION
            ptr = node.ptr
            cookie = node.cookie
        if transaction.security_context is None:
            out += _pack_received(
                command,
                ptr,
                cookie,
                transaction.code,
                transaction.flags,
                sender_pid,
                sender_euid,
                buffer.data_size,
                buffer.offsets_size,
                address,
                offsets,
            )
        else:
            command = BR_TRANSACTION_SEC_CTX
            out += _pack_received_secctx(
                command,
                ptr,
                cookie,
                transaction.code,
                transaction.flags,
                sender_pid,
                sender_euid,
                buffer.data_size,
                buffer.offsets_size,
                address,
                offsets,
                address + transaction.security_context,
            )
        process.count_return(command)
        outcome.buffers = [(process.region, buffer.offset, buffer.size)]
        files = transaction.files
        if files is not None:
            outcome.files = files
            transaction.files = None
            self.files_handed_over = True
        # Not before the numbers of its descriptors are in it: `Process.installed`.
        buffer.allow_user_free = files is None
        if command != BR_REPLY and not transaction.flags & TF_ONE_WAY:
            transaction.to_parent = self.transaction_stack
            if self.transaction_stack is None:
                process.busy_threads += 1
            transaction.to_thread = self
            self.transaction_stack = transaction
        else:
            transaction.free(process.engine)

    def _wants_looper(self) -> bool:
        """Whether this thread is to tell its process to start another one."""
        process = self.process
        if (
            process.requested_threads == 0
            and not process.waiting_threads
            and process.requested_threads_started < process.max_threads
            and self.looper & (REGISTERED | ENTERED)
        ):
            process.requested_threads += 1
            process.count_return(BR_SPAWN_LOOPER)
            return True
        return False

    def undeliver(self, outcome: Outcome, copied: int) -> Step:
        """The read's data could be stored only up to `copied` bytes: -EFAULT, and the state that the driver leaves.

        What the files and `closes` of its `outcome` are does not change. If the process is released at one of the
        turns, as that of a caller that is killed may be, the rest of the read counts as arrived.
        """
        process = self.process
        process.tmp_ref += 1
        fields = list(_unpack_write_read(outcome.argument))
        fields[4] = (fields[4] - outcome.stored - len(outcome.data)) & U64
        if self.spawned:
            process.count_return(BR_SPAWN_LOOPER, -1)
            process.requested_threads = 0
        # Or the driver would have met the fault with its BR_NOOP, before it looked for work.
        faulty = bool(fields[4] or outcome.stored or self.waited or copied >= len(_NOOP))
        yield from self._take_back_rest(outcome.delivered, outcome.data, copied, faulty=faulty)
        self.files_handed_over = False
        if process.todo.first is not None:
            process.wake_up()
        process.drop_tmp_ref()
        yield Outcome(-EFAULT, _pack_write_read(*fields))

    def _take_back_rest(
        self, delivered: list[tuple[int, Work, WorkList]], data: bytes | bytearray, copied: int, *, faulty: bool
    ) -> Turns:
        """Take back of a part of a read what does not end before `copied`; the caller has a reference to the process.

        With `faulty` the fault was at an item, and that is lost.
        """
        process = self.process
        pace = Pace(process.engine.chunk)
        self.good_buffer = None
        # How many items could be stored whole, and where the last of these ends.
        stored = bisect_right(delivered, copied, key=_end_of_item)
        end = delivered[stored - 1][0] if stored else 0
        yield from self._uncount(data, end, copied, pace)
        # What the driver would have taken from its list: all that could be stored and one more, or nothing.
        taken = stored + 1 if faulty else 0
        lost = delivered[taken - 1][1] if 0 < taken <= len(delivered) else None
        while len(delivered) > taken and not process.is_dead:
            _, work, self.undoing = delivered.pop()
            work.undo(self)
            buffer, self.failed_buffer = self.failed_buffer, None
            if buffer is not None and process.release_buffer(self, buffer, is_failure=True):
                yield from self._go_on_releasing()
            if pace.spend():
                yield TURN
        self.undoing = None
        if lost is not None and not process.is_dead:
            lost.lose(self)
        delivered.clear()

    def _uncount(self, data: bytes | bytearray, position: int, start: int, pace: Pace) -> Turns:
        """Count the returns in `data` no more that do not end before `start`; one begins at `position`, before it."""
        while position < len(data):
            command = int.from_bytes(data[position : position + 4], "little")
            position += 4 + uapi.ioctl_size(command)
            if position > start and command not in (BR_NOOP, BR_SPAWN_LOOPER):
                self.process.count_return(command, -1)
            if pace.spend():
                yield TURN

    def take_back(self, transaction: Transaction) -> bool:
        """Undo `_receive`; false where that is too late.

        It is where the files have gone to the shell, or another thread of the process, guessing, has freed the buffer.
        Then it fails: a caller that waits reads BR_FAILED_REPLY, and so does this thread in place of a reply. Its
        buffer is left in `failed_buffer`, to be released.
        """
        process = self.process
        buffer = transaction.held_buffer()
        is_call = self._pop_incoming(transaction)
        if buffer is None or self.files_handed_over:
            if is_call:
                transaction.send_failed_reply(process.engine, BR_FAILED_REPLY)
            elif transaction.is_reply and self.reply_error.command == BR_OK:
                self.reply_error.command = BR_FAILED_REPLY
                self.enqueue(self.reply_error)
            self.failed_buffer = buffer
            return False
        if not is_call:
            # It had been freed.
            process.engine.stats.deleted[stats.TRANSACTION] -= 1
            process.outstanding_transactions += 1
            buffer.transaction = transaction
        buffer.allow_user_free = False
        return True

    def give_up(self, transaction: Transaction) -> None:
        """A transaction was handed over and got lost: a caller that waits reads BR_FAILED_REPLY; the buffer stays."""
        buffer = transaction.held_buffer()
        if buffer is not None:
            buffer.allow_user_free = False
        if self._pop_incoming(transaction):
            transaction.send_failed_reply(self.process.engine, BR_FAILED_REPLY)

    def _pop_incoming(self, transaction: Transaction) -> bool:
        """Take a call off the stack that was handed over a moment ago; false if it was none."""
        if self.transaction_stack is not transaction:
            return False
        self.transaction_stack = transaction.to_parent
        if transaction.to_parent is None:
            self.process.busy_threads -= 1
        transaction.to_parent = None
        transaction.to_thread = None
        return True

    def install_failed(self, outcome: Outcome) -> Step:
        """The descriptors of the transaction that ended this read could not be installed, though there was room.

        Its caller gets BR_FAILED_REPLY, a reader of a reply too; the buffer is freed. The driver would read on for
        more work; here the read ends with what it had.
        """
        process = self.process
        process.tmp_ref += 1
        self.files_handed_over = False
        data = outcome.data
        delivered = outcome.delivered
        fields = list(_unpack_write_read(outcome.argument))
        _, transaction, _ = delivered.pop()
        assert isinstance(transaction, Transaction)  # nothing else has descriptors
        start = delivered[-1][0] if delivered else (4 if fields[4] == len(data) else 0)
        kept = bytearray(data[:start])
        buffer = transaction.held_buffer()
        assert buffer is not None  # it cannot be freed before its descriptors are installed
        self.give_up(transaction)
        if process.release_buffer(self, buffer, is_failure=True):
            yield from self._go_on_releasing()
        yield from self._uncount(data, start, start, Pace(process.engine.chunk))
        if transaction.is_reply:
            kept += BR_FAILED_REPLY.to_bytes(4, "little")
            process.count_return(BR_FAILED_REPLY)
        fields[4] += len(kept) - len(data)
        process.drop_tmp_ref()
        instead = Outcome(0, _pack_write_read(*fields), (fields[5] + fields[4] - len(kept)) & U64, kept)
        instead.stored = outcome.stored
        yield instead

    # -- the end

    def release(self, pace: Pace) -> Turns:
        """The thread is gone: who waits for it is told (`binder_thread_release`)."""
        process = self.process
        engine = process.engine
        process.tmp_ref += 1
        del process.threads[self.tid]
        process.tids.remove(self.tid)
        if self.looper & POLL:
            process.pollers.remove(self.tid)
        engine.dying_threads[self] = None
        self.is_dead = True
        transaction = self.transaction_stack
        touched = 1
        if transaction is not None:
            self.transaction_stack = None
            process.busy_threads -= 1
            # What the walk meets, and whoever else waits for a reply that does not come.
            touched += 2 * (transaction.depth + 1)
        reply_to = transaction if transaction is not None and transaction.to_thread is self else None
        while transaction is not None:
            if transaction.to_thread is self:
                process.outstanding_transactions -= 1
                transaction.to_process = None
                transaction.to_thread = None
                if transaction.buffer is not None:
                    transaction.buffer.transaction = None
                    transaction.buffer = None
                transaction = transaction.to_parent
            else:
                transaction.from_thread = None
                transaction = transaction.from_parent
        if self.looper & POLL:
            engine.poll_ready[process] = None
        if reply_to is not None:
            reply_to.send_failed_reply(engine, BR_DEAD_REPLY)
        todo = self.todo
        while todo.first is not None:
            work = todo.popleft()
            if type(work) is TransactionComplete:
                self.discount_unread()
            if pace.spend(work.cancel(engine)):
                yield TURN
        del engine.dying_threads[self]
        engine.stats.deleted[stats.THREAD] += 1
        process.account.objects -= THREAD
        process.drop_tmp_ref()
        if pace.spend(touched):
            yield TURN


class _CommandStream:
    """The client's write buffer: `data` is what of it has been fetched, the bytes `start` to `end`.

    The driver never looks at the size once it has begun a command: one that is cut off by the end of the buffer is
    read on into whatever follows it in memory. So is it here.
    """

    __slots__ = ("address", "data", "end", "position", "start")

    def __init__(self, address: int, commands: bytes | None) -> None:
        self.address = address
        self.data = commands or b""
        self.start = 0
        self.end = len(self.data)
        self.position = 0

    def take(self, size: int, limit: int) -> Generator[Effect, Any, bytes | None]:
        """Fetch the next `size` bytes and what else there is up to `limit`; None where they cannot be read."""
        start = self.position
        self.data = yield CopyIn((self.address + start) & U64, max(size, min(_CHUNK, limit - start)))
        self.start = start
        self.end = start + len(self.data)
        self.position = start + size
        return self.data[:size] if size <= len(self.data) else None


def _end_of_item(item: tuple[int, Work, WorkList]) -> int:
    """Return where an item that was read ends in the data."""
    return item[0]


def _wrapped(number: int) -> int:
    """Return what is left of a number in 64 bits."""
    return number if 0 <= number <= _SMALL else number & U64


def _is_before(address: int, position: int, size: int) -> bool:
    """Tell whether `position` is before the end of `size` bytes at `address`, as unsigned 64-bit pointers compare."""
    if address <= _SMALL and size <= _SMALL and position <= _SMALL:
        return position < size
    return (address + position) & U64 < (address + size) & U64


# -- commands that need nothing of the machine: (thread, command, payload) -> 0 or negative errno


def _change_ref(thread: Thread, command: int, payload: bytes) -> int:
    """BC_INCREFS, BC_ACQUIRE, BC_RELEASE, BC_DECREFS: mistakes are the client's own, and not reported to it."""
    process = thread.process
    handle = int.from_bytes(payload, "little")
    strong = command in (BC_ACQUIRE, BC_RELEASE)
    increment = command in (BC_ACQUIRE, uapi.BC_INCREFS)
    if increment and not handle:
        manager = process.context.manager
        if manager is not None:
            if manager.process is process:
                return -EINVAL
            if process.increment_ref_for_node(manager, strong=strong, target=None) >= 0:
                return 0
    ref = process.ref(handle, strong=strong)
    if ref is not None:
        if increment:
            ref.increment(strong=strong, target=None)
        else:
            ref.decrement(strong=strong)
    return 0


def _ref_done(thread: Thread, command: int, payload: bytes) -> int:
    """BC_INCREFS_DONE and BC_ACQUIRE_DONE: the process has taken the reference that it was asked to take."""
    ptr, cookie = uapi.binder_ptr_cookie.unpack(payload)
    node = thread.process.nodes.get(ptr)
    if node is None:
        return 0
    node.tmp_refs += 1
    if cookie == node.cookie:
        strong = command == BC_ACQUIRE_DONE
        if strong and node.pending_strong_ref:
            node.pending_strong_ref = False
            node.decrement(strong=True, internal=False)
        elif not strong and node.pending_weak_ref:
            node.pending_weak_ref = False
            node.decrement(strong=False, internal=False)
    node.put()
    return 0


def _refuse(thread: Thread, command: int, payload: bytes) -> int:  # noqa: ARG001 - one signature for all
    """BC_ATTEMPT_ACQUIRE and BC_ACQUIRE_RESULT never were supported; others do not come here."""
    return -EINVAL


def _register_looper(thread: Thread, command: int, payload: bytes) -> int:  # noqa: ARG001 - one signature for all
    process = thread.process
    if thread.looper & ENTERED or process.requested_threads == 0:
        thread.looper |= INVALID
    else:
        process.requested_threads -= 1
        process.requested_threads_started += 1
    thread.looper |= REGISTERED
    return 0


def _enter_looper(thread: Thread, command: int, payload: bytes) -> int:  # noqa: ARG001 - one signature for all
    if thread.looper & REGISTERED:
        thread.looper |= INVALID
    thread.looper |= ENTERED
    return 0


def _exit_looper(thread: Thread, command: int, payload: bytes) -> int:  # noqa: ARG001 - one signature for all
    thread.looper |= EXITED
    return 0


def _enqueue_death(thread: Thread, death: Death) -> None:
    """Queue a notification where the thread that asked, if it is a looper, or else any of its process, reads it."""
    if thread.looper & (REGISTERED | ENTERED):
        thread.enqueue(death)
    else:
        thread.process.enqueue(death)
        thread.process.wake_up()


def _request_death(thread: Thread, command: int, payload: bytes) -> int:  # noqa: ARG001 - one signature for all
    handle, cookie = uapi.binder_handle_cookie.unpack(payload)
    process = thread.process
    if not process.has_room_to_notify(thread):
        thread.return_error.command = BR_ERROR
        thread.enqueue(thread.return_error)
        return 0
    ref = process.ref(handle, strong=False)
    if ref is not None and ref.death is None:
        ref.death = Death(process, cookie)
        if ref.node.process is None:
            ref.death.tell(process)
    return 0


def _clear_death(thread: Thread, command: int, payload: bytes) -> int:  # noqa: ARG001 - one signature for all
    handle, cookie = uapi.binder_handle_cookie.unpack(payload)
    ref = thread.process.ref(handle, strong=False)
    if ref is None or ref.death is None or ref.death.cookie != cookie:
        return 0
    death = ref.death
    ref.death = None
    if death.queue is None:
        death.kind = CLEAR_DEATH_NOTIFICATION
        _enqueue_death(thread, death)
    else:
        assert death.kind == DEAD_BINDER  # it can be cleared once
        death.kind = DEAD_BINDER_AND_CLEAR
    return 0


def _dead_binder_done(thread: Thread, command: int, payload: bytes) -> int:  # noqa: ARG001 - one signature for all
    cookie = int.from_bytes(payload, "little")
    death = thread.process.delivered_death.find(cookie)
    if death is not None:
        assert isinstance(death, Death)  # nothing else is on this list
        death.dequeue()
        if death.kind == DEAD_BINDER_AND_CLEAR:
            death.kind = CLEAR_DEATH_NOTIFICATION
            _enqueue_death(thread, death)
    return 0


def _request_freeze(thread: Thread, command: int, payload: bytes) -> int:  # noqa: ARG001 - one signature for all
    if not thread.process.has_room_to_notify(thread):
        return -ENOMEM
    return freeze.request_notification(thread.process, *uapi.binder_handle_cookie.unpack(payload))


def _clear_freeze(thread: Thread, command: int, payload: bytes) -> int:  # noqa: ARG001 - one signature for all
    return freeze.clear_notification(thread.process, *uapi.binder_handle_cookie.unpack(payload))


def _freeze_done(thread: Thread, command: int, payload: bytes) -> int:  # noqa: ARG001 - one signature for all
    return freeze.notification_done(thread.process, int.from_bytes(payload, "little"))


# Command: (bytes that follow it, what carries it out). Transactions and buffers are `write_read`'s own business.
_SERVED: Final[dict[int, tuple[int, Callable[[Thread, int, bytes], int]]]] = {
    BC_TRANSACTION: (uapi.binder_transaction_data.size, _refuse),
    BC_REPLY: (uapi.binder_transaction_data.size, _refuse),
    BC_TRANSACTION_SG: (uapi.binder_transaction_data_sg.size, _refuse),
    BC_REPLY_SG: (uapi.binder_transaction_data_sg.size, _refuse),
    BC_FREE_BUFFER: (8, _refuse),
    uapi.BC_INCREFS: (4, _change_ref),
    BC_ACQUIRE: (4, _change_ref),
    BC_RELEASE: (4, _change_ref),
    uapi.BC_DECREFS: (4, _change_ref),
    uapi.BC_INCREFS_DONE: (16, _ref_done),
    BC_ACQUIRE_DONE: (16, _ref_done),
    uapi.BC_ATTEMPT_ACQUIRE: (0, _refuse),
    uapi.BC_ACQUIRE_RESULT: (0, _refuse),
    uapi.BC_REGISTER_LOOPER: (0, _register_looper),
    uapi.BC_ENTER_LOOPER: (0, _enter_looper),
    uapi.BC_EXIT_LOOPER: (0, _exit_looper),
    uapi.BC_REQUEST_DEATH_NOTIFICATION: (12, _request_death),
    uapi.BC_CLEAR_DEATH_NOTIFICATION: (12, _clear_death),
    uapi.BC_DEAD_BINDER_DONE: (8, _dead_binder_done),
    uapi.BC_REQUEST_FREEZE_NOTIFICATION: (12, _request_freeze),
    uapi.BC_CLEAR_FREEZE_NOTIFICATION: (12, _clear_freeze),
    uapi.BC_FREEZE_NOTIFICATION_DONE: (8, _freeze_done),
}
# As they stand in the stream: to look these up is quicker than to make numbers of them first.
_COMMANDS: Final = {
    command.to_bytes(4, "little"): (command, size, carry_out) for command, (size, carry_out) in _SERVED.items()
}
