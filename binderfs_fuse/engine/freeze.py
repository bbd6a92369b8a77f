"""Freezing a process, and telling those who hold references to its nodes.

A frozen process gets no synchronous transactions (BR_FROZEN_REPLY) and its one-way ones wait
(BR_TRANSACTION_PENDING_FROZEN). A ref may ask to be told: `Freeze` is that notification. Once delivered it stands in
`process.delivered_freeze` until BC_FREEZE_NOTIFICATION_DONE; a change in between sets `resend`.

Steps that wait until a process has nothing outstanding stand in its `freeze_waits`. The end of its last transaction
wakes the first of them; each wakes the next as it goes on. So that end touches one step, however many wait.

Sources: Linux 7.3 binder.c `binder_ioctl_freeze`, `binder_add_freeze_work`, `binder_*_freeze_notification`.
"""

from __future__ import annotations

from errno import EAGAIN, EINTR, EINVAL, ETIMEDOUT
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse import uapi
from binderfs_fuse.engine import stats
from binderfs_fuse.engine.effects import TURN, Outcome, Pace, Wait
from binderfs_fuse.engine.work import Work

if TYPE_CHECKING:
    from collections.abc import Generator

    from binderfs_fuse.engine.context import Engine
    from binderfs_fuse.engine.effects import Effect, Turns
    from binderfs_fuse.engine.process import Process
    from binderfs_fuse.engine.thread import Thread


_MILLISECOND: Final = 1_000_000  # in nanoseconds
# <linux/errno.h>: the kernel keeps it to itself.
ERESTARTSYS: Final = 512


class Freeze(Work):
    """A freeze notification of a ref in `process`; `cleared` once user space has asked for its end."""

    __slots__ = ("cleared", "cookie", "is_frozen", "process", "reader", "resend", "sent")

    def __init__(self, process: Process, cookie: int) -> None:
        self.queue = None
        self.process = process
        self.cookie = cookie
        self.cleared = False
        self.is_frozen = False
        self.sent = False
        self.resend = False
        # Who was told last.
        self.reader: Thread | None = None
        process.engine.stats.created[stats.FREEZE] += 1
        process.account.objects += 1

    def key(self) -> int:
        return self.cookie

    def deliver(self, thread: Thread, out: bytearray) -> bool:
        process = thread.process
        self.reader = thread
        if self.cleared:
            process.engine.stats.deleted[stats.FREEZE] += 1
            process.account.objects -= 1
            command = uapi.BR_CLEAR_FREEZE_NOTIFICATION_DONE
            out += command.to_bytes(4, "little")
            out += self.cookie.to_bytes(8, "little")
        else:
            self.sent = True
            process.delivered_freeze.append(self)
            command = uapi.BR_FROZEN_BINDER
            out += command.to_bytes(4, "little")
            out += uapi.binder_frozen_state_info.pack(self.cookie, self.is_frozen, 0)
        process.count_return(command)
        # The recipient of a change may want to send a transaction: let it.
        return not self.cleared

    def undo(self, thread: Thread) -> None:
        if self.reader is not thread:
            return
        if self.queue is self.process.delivered_freeze:
            self.sent = self.resend = False
            self.dequeue()
        elif self.cleared and self.queue is None:
            self.process.engine.stats.deleted[stats.FREEZE] -= 1
            self.process.account.objects += 1
        else:
            return
        thread.requeue(self)

    def cancel(self, engine: Engine) -> int:
        assert self.cleared  # else its ref has taken it off the list
        engine.stats.deleted[stats.FREEZE] += 1
        self.process.account.objects -= 1
        return 1


def request_notification(process: Process, handle: int, cookie: int) -> int:
    """BC_REQUEST_FREEZE_NOTIFICATION: 0, or -EINVAL for an unknown handle or a second request."""
    ref = process.ref(handle, strong=False)
    if ref is None or ref.freeze is not None:
        return -EINVAL
    freeze = ref.freeze = Freeze(process, cookie)
    if ref.node.process is not None:
        freeze.is_frozen = ref.node.process.is_frozen
        process.enqueue(freeze)
        process.wake_up()
    return 0


def clear_notification(process: Process, handle: int, cookie: int) -> int:
    """BC_CLEAR_FREEZE_NOTIFICATION: 0, or -EINVAL for an unknown handle, no notification, or another cookie."""
    ref = process.ref(handle, strong=False)
    if ref is None or ref.freeze is None or ref.freeze.cookie != cookie:
        return -EINVAL
    freeze = ref.freeze
    ref.freeze = None
    freeze.cleared = True
    if freeze.queue is None:
        process.enqueue(freeze)
        process.wake_up()
    elif freeze.sent:
        freeze.resend = True
    return 0


def notification_done(process: Process, cookie: int) -> int:
    """BC_FREEZE_NOTIFICATION_DONE: 0, or -EINVAL if nothing delivered has this cookie."""
    freeze = process.delivered_freeze.find(cookie)
    if freeze is None:
        return -EINVAL
    assert isinstance(freeze, Freeze)  # nothing else is on this list
    freeze.dequeue()
    freeze.sent = False
    if freeze.resend:
        freeze.resend = False
        process.enqueue(freeze)
        process.wake_up()
    return 0


def tell_refs(process: Process, pace: Pace, *, is_frozen: bool) -> Turns:
    """Queue a notification for every ref to a node of `process` that asked (`binder_add_freeze_work`).

    It ends early where the process is frozen or thawed once more at one of its turns: that one tells them all.
    """
    process.freezings += 1
    freezing = process.freezings
    node = process.nodes.first()
    while node is not None:
        # Taking the node and letting go of it, as the driver does on its walk, can make work of its own.
        node.tmp_refs += 1
        ref = node.refs.last()
        while ref is not None:
            freeze = ref.freeze
            if freeze is not None:
                if freeze.queue is None:
                    freeze.is_frozen = is_frozen
                    ref.process.enqueue(freeze)
                    ref.process.wake_up()
                else:
                    if freeze.sent and freeze.is_frozen != is_frozen:
                        freeze.resend = True
                    freeze.is_frozen = is_frozen
            key = ref.debug_id
            if pace.spend():
                yield TURN
                if process.freezings != freezing:
                    break
            ref = node.refs.before(key)
        node.put()
        if pace.spend():
            yield TURN
        if process.freezings != freezing:
            return
        node = process.nodes.after(node.ptr)


def ioctl_freeze(thread: Thread, argument: bytes) -> Generator[Effect, Any, Outcome]:
    """BINDER_FREEZE: freeze or thaw every open of a process.

    0; -EINVAL for a pid without an open; -EAGAIN if transactions are pending after `timeout_ms`; for a signal
    -ERESTARTSYS (-512), of which the kernel makes EINTR, or the same ioctl anew, as the signal's action says.
    """
    pid, enable, timeout_ms = uapi.binder_freeze_info.unpack(argument)
    engine = thread.process.engine
    opens = engine.opens_by_pid.get(pid)
    if opens is None:
        return Outcome(-EINVAL)
    pace = Pace(engine.chunk)
    targets: list[Process] = []
    target = opens.last()
    while target is not None:
        target.tmp_ref += 1
        targets.append(target)
        if pace.spend():
            yield TURN
        target = opens.before(target.serial)
    error = 0
    for target in targets:
        if not error:
            error = yield from _freeze(target, pace, enable=bool(enable), timeout_ms=timeout_ms)
        target.drop_tmp_ref()
        if pace.spend():
            yield TURN
    return Outcome(error)


def _freeze(target: Process, pace: Pace, *, enable: bool, timeout_ms: int) -> Generator[Effect, Any, int]:
    target.sync_recv = False
    target.async_recv = False
    target.is_frozen = enable
    if not enable:
        yield from tell_refs(target, pace, is_frozen=False)
        return 0
    error = 0
    if timeout_ms and target.outstanding_transactions:
        clock = target.engine.clock
        end = clock() + timeout_ms * _MILLISECOND
        wait = Wait()
        place = target.engine.next_serial()
        target.freeze_waits.add(place, wait)
        while target.outstanding_transactions:
            # A one-way call may have come between the wake-up and now.
            wait.timeout_ms = max(0, end - clock()) // _MILLISECOND
            wait.parked = True
            error = yield wait
            wait.parked = False
            if error:
                break
        target.freeze_waits.remove(place)
        if not target.outstanding_transactions:
            target.wake_up_freezer()
        if error == -ETIMEDOUT:
            error = 0
        elif error == -EINTR:
            error = -ERESTARTSYS
    if not error and target.has_pending_transactions():
        error = -EAGAIN
    if error:
        target.is_frozen = False
    else:
        yield from tell_refs(target, pace, is_frozen=True)
    return error


def get_frozen_info(thread: Thread, argument: bytes) -> Generator[Effect, Any, Outcome]:
    """BINDER_GET_FROZEN_INFO: what a frozen process has missed, over all its opens; -EINVAL for an unknown pid."""
    pid, _, _ = uapi.binder_frozen_status_info.unpack(argument)
    engine = thread.process.engine
    sync_recv = async_recv = 0
    opens = engine.opens_by_pid.get(pid)
    if opens is None:
        return Outcome(-EINVAL)
    pace = Pace(engine.chunk)
    process = opens.first()
    while process is not None:
        sync_recv |= process.sync_recv | process.has_pending_transactions() << 1
        async_recv |= process.async_recv
        if pace.spend():
            yield TURN
        process = opens.after(process.serial)
    return Outcome(0, uapi.binder_frozen_status_info.pack(pid, sync_recv, async_recv))
