"""Nodes, and the references to them.

A **node** is an object that a process offers; a **ref** is another process's hold on it, known there by a small
number, the desc (what user space calls a handle). A node counts four things: strong references by refs
(`internal_strong_refs`), strong and weak ones that transactions and its own process hold (`local_strong_refs`,
`local_weak_refs`), and `tmp_refs` of steps that are using it right now. When the first reference appears or the last
goes, the node itself becomes work: its process reads BR_INCREFS, BR_ACQUIRE, BR_RELEASE or BR_DECREFS, and answers the
first two with BC_INCREFS_DONE and BC_ACQUIRE_DONE.

Lifetime. A node lives in `process.nodes` while its process does, and in `engine.dead_nodes` after that, until nobody
refers to it. A ref lives from the first increment to the last decrement, or to the end of its process.

Sources: Linux 7.3 binder.c `binder_inc_node_nilocked`, `binder_dec_node_nilocked`, `binder_inc_ref_olocked`,
`binder_dec_ref_olocked`, `binder_cleanup_ref_olocked`, `binder_node_release`.

Invariants
----------
- `node.process` is None exactly for a dead node, which is in `engine.dead_nodes` and, by `died`, in
  `engine.dead_in_order`.
- `ref.node.refs[ref.debug_id] is ref`, `ref.process.refs_by_desc[ref.desc] is ref`,
  `ref.process.refs_by_node[ref.node] is ref`.
- `internal_strong_refs` of a node is the number of its refs with `strong > 0`.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from binderfs_fuse import uapi
from binderfs_fuse.engine import stats
from binderfs_fuse.engine.effects import TURN
from binderfs_fuse.engine.priority import scheduling_of_node
from binderfs_fuse.engine.sorted_map import SortedMap
from binderfs_fuse.engine.work import IndexedList, Work

if TYPE_CHECKING:
    from binderfs_fuse.engine.context import Engine
    from binderfs_fuse.engine.effects import Pace, Turns
    from binderfs_fuse.engine.freeze import Freeze
    from binderfs_fuse.engine.process import Process
    from binderfs_fuse.engine.thread import Thread

_PTR_COOKIE = uapi.binder_ptr_cookie


class Node(Work):
    """An object of `process`, which knows it by `ptr` and `cookie` (64 bits each)."""

    __slots__ = (
        "accept_fds",
        "account",
        "async_todo",
        "cookie",
        "debug_id",
        "delivered",
        "died",
        "engine",
        "has_async_transaction",
        "has_strong_ref",
        "has_weak_ref",
        "inherit_rt",
        "internal_strong_refs",
        "local_strong_refs",
        "local_weak_refs",
        "min_priority",
        "pending_strong_ref",
        "pending_weak_ref",
        "process",
        "ptr",
        "refs",
        "scheduling",
        "tmp_refs",
        "txn_security_ctx",
    )

    def __init__(self, process: Process, ptr: int, cookie: int, flags: int) -> None:
        self.queue = None
        self.engine = process.engine
        self.process: Process | None = process
        self.account = process.account
        self.account.objects += 1
        self.debug_id = self.engine.next_debug_id()
        self.engine.stats.created[stats.NODE] += 1
        self.ptr = ptr
        self.cookie = cookie
        self.min_priority = flags & uapi.FLAT_BINDER_FLAG_PRIORITY_MASK
        self.accept_fds = bool(flags & uapi.FLAT_BINDER_FLAG_ACCEPTS_FDS)
        self.txn_security_ctx = bool(flags & uapi.FLAT_BINDER_FLAG_TXN_SECURITY_CTX)
        self.scheduling = scheduling_of_node(flags)
        self.inherit_rt = bool(flags & uapi.FLAT_BINDER_FLAG_INHERIT_RT)
        self.internal_strong_refs = 0
        self.local_strong_refs = 0
        self.local_weak_refs = 0
        self.tmp_refs = 1
        self.has_strong_ref = False
        self.has_weak_ref = False
        self.pending_strong_ref = False
        self.pending_weak_ref = False
        self.has_async_transaction = False
        self.async_todo = IndexedList()
        # By debug_id, for their order: the driver shows and notifies the newest ref first.
        self.refs: SortedMap[Ref] = SortedMap()
        # When it died, by a number that grows.
        self.died = 0
        # The last delivery: to which thread, by its tid, and what it was about. A thread that is gone is not kept.
        self.delivered: tuple[int, bool, bool, bool, bool] | None = None

    def increment(self, *, strong: bool, internal: bool, target: Thread | None = None) -> int:
        """Count a reference; tell `target`'s todo list if user space does not know of one yet.

        Returns 0, or -EINVAL for a first strong reference with nobody to tell.
        """
        if strong:
            if internal:
                if (
                    target is None
                    and self.internal_strong_refs == 0
                    and not (self.process is not None and self is self.process.context.manager and self.has_strong_ref)
                ):
                    return -EINVAL
                self.internal_strong_refs += 1
            else:
                self.local_strong_refs += 1
            if not self.has_strong_ref and target is not None:
                self.dequeue()
                target.enqueue_deferred(self)
        else:
            if not internal:
                self.local_weak_refs += 1
            if not self.has_weak_ref and target is not None and self.queue is None:
                target.enqueue_deferred(self)
        return 0

    def decrement(self, *, strong: bool, internal: bool) -> None:
        """Drop a reference; the last one makes work for the process, or frees the node.

        What a dead node's process or calls under way to it held was forgotten as it died (the driver counts below zero
        then, and so never frees the node).
        """
        if strong:
            if internal:
                self.internal_strong_refs -= 1
            elif self.process is not None:
                self.local_strong_refs -= 1
            if self.local_strong_refs or self.internal_strong_refs:
                return
        else:
            if not internal and self.process is not None:
                self.local_weak_refs -= 1
            if self.local_weak_refs or self.tmp_refs or self.refs.count:
                return
        process = self.process
        if process is not None and (self.has_strong_ref or self.has_weak_ref):
            if self.queue is None:
                process.enqueue(self)
                process.wake_up()
        elif not (self.refs.count or self.local_strong_refs or self.local_weak_refs or self.tmp_refs):
            if process is not None:
                self.dequeue()
                process.nodes.remove(self.ptr)
            else:
                del self.engine.dead_nodes[self]
                self.engine.dead_in_order.remove(self.died)
            self.engine.stats.deleted[stats.NODE] += 1
            self.account.objects -= 1

    def put(self) -> None:
        """Drop a temporary reference (binder.c `binder_put_node`)."""
        self.tmp_refs -= 1
        self.decrement(strong=False, internal=True)

    def deliver(self, thread: Thread, out: bytearray) -> bool:
        process = thread.process
        strong = bool(self.internal_strong_refs or self.local_strong_refs)
        weak = strong or bool(self.refs.count or self.local_weak_refs or self.tmp_refs)
        had_strong = self.has_strong_ref
        had_weak = self.has_weak_ref
        self.delivered = (thread.tid, had_strong, had_weak, strong, weak)
        if weak and not had_weak:
            self.has_weak_ref = self.pending_weak_ref = True
            self.local_weak_refs += 1
        if strong and not had_strong:
            self.has_strong_ref = self.pending_strong_ref = True
            self.local_strong_refs += 1
        if had_strong and not strong:
            self.has_strong_ref = False
        if had_weak and not weak:
            self.has_weak_ref = False
        if not weak and not strong:
            process.nodes.remove(self.ptr)
            process.engine.stats.deleted[stats.NODE] += 1
            self.account.objects -= 1
        for wanted, command in (
            (weak and not had_weak, uapi.BR_INCREFS),
            (strong and not had_strong, uapi.BR_ACQUIRE),
            (had_strong and not strong, uapi.BR_RELEASE),
            (had_weak and not weak, uapi.BR_DECREFS),
        ):
            if wanted:
                out += command.to_bytes(4, "little")
                out += _PTR_COOKIE.pack(self.ptr, self.cookie)
                process.count_return(command)
        return False

    def undo(self, thread: Thread) -> None:
        assert self.delivered is not None  # that is what is undone
        process = thread.process
        reader, had_strong, had_weak, strong, weak = self.delivered
        there = process.nodes.get(self.ptr)
        if reader != thread.tid or there is not (self if weak else None):
            return
        if had_weak and not weak:
            self.has_weak_ref = True
        elif self.pending_weak_ref and not had_weak:
            self.has_weak_ref = self.pending_weak_ref = False
            self.local_weak_refs -= 1
        if had_strong and not strong:
            self.has_strong_ref = True
        elif self.pending_strong_ref and not had_strong:
            self.has_strong_ref = self.pending_strong_ref = False
            self.local_strong_refs -= 1
        if not weak:
            process.nodes.add(self.ptr, self)
            process.engine.stats.deleted[stats.NODE] -= 1
            self.account.objects += 1
        if self.queue is None:
            thread.requeue(self)

    def release(self, pace: Pace) -> Turns:
        """The process is going: the node dies, and who asked for it is told (`binder_node_release`)."""
        process = self.process
        assert process is not None  # a node is released by its process, once
        engine = process.engine
        # Others may drop their references at every turn: the node stays.
        self.tmp_refs += 1
        yield from engine.cancel_all(self.async_todo, pace)
        process.nodes.remove(self.ptr)
        self.dequeue()
        if not self.refs.count and self.tmp_refs == 1:
            self.tmp_refs = 0
            engine.stats.deleted[stats.NODE] += 1
            self.account.objects -= 1
            return
        self.process = None
        self.local_strong_refs = 0
        self.local_weak_refs = 0
        self.died = engine.next_serial()
        engine.dead_nodes[self] = None
        engine.dead_in_order.add(self.died, self)
        ref = self.refs.last()
        while ref is not None:
            key = ref.debug_id
            death = ref.death
            if death is not None and not death.told:
                death.tell(ref.process)
            if pace.spend():
                yield TURN
            ref = self.refs.before(key)
        self.put()


# What a Death item stands for, in the driver's words (BINDER_WORK_...).
DEAD_BINDER, DEAD_BINDER_AND_CLEAR, CLEAR_DEATH_NOTIFICATION = range(3)


class Death(Work):
    """A death notification that a ref asked for, with the `cookie` (64 bits) to be told by.

    `told` says that it has been queued as the node died: a ref may ask while its node's end is being told.
    """

    __slots__ = ("cookie", "kind", "process", "reader", "told")

    def __init__(self, process: Process, cookie: int) -> None:
        self.queue = None
        self.process = process
        self.cookie = cookie
        self.kind = DEAD_BINDER
        self.told = False
        # Who was told last.
        self.reader: Thread | None = None
        process.engine.stats.created[stats.DEATH] += 1
        process.account.objects += 1

    def key(self) -> int:
        return self.cookie

    def tell(self, process: Process) -> None:
        """The node is dead: queue it where any thread reads it."""
        self.told = True
        process.enqueue(self)
        process.wake_up()

    def deliver(self, thread: Thread, out: bytearray) -> bool:
        process = thread.process
        self.reader = thread
        cleared = self.kind == CLEAR_DEATH_NOTIFICATION
        command = uapi.BR_CLEAR_DEATH_NOTIFICATION_DONE if cleared else uapi.BR_DEAD_BINDER
        if cleared:
            process.engine.stats.deleted[stats.DEATH] += 1
            process.account.objects -= 1
        else:
            process.delivered_death.append(self)
        out += command.to_bytes(4, "little")
        out += self.cookie.to_bytes(8, "little")
        process.count_return(command)
        # The recipient of a death may want to send a transaction: let it.
        return not cleared

    def undo(self, thread: Thread) -> None:
        if self.reader is not thread:
            return
        if self.queue is self.process.delivered_death:
            self.dequeue()
        elif self.kind == CLEAR_DEATH_NOTIFICATION and self.queue is None:
            self.process.engine.stats.deleted[stats.DEATH] -= 1
            self.process.account.objects += 1
        else:
            return
        thread.requeue(self)

    def cancel(self, engine: Engine) -> int:
        assert self.kind != DEAD_BINDER  # else its ref has taken it off the list
        engine.stats.deleted[stats.DEATH] += 1
        self.process.account.objects -= 1
        return 1


class Ref:
    """The hold of `process` on `node`, under the number `desc`; `strong` and `weak` are user space's counts."""

    __slots__ = ("death", "debug_id", "desc", "freeze", "node", "process", "strong", "weak")

    def __init__(self, process: Process, node: Node, desc: int) -> None:
        engine = process.engine
        engine.stats.created[stats.REF] += 1
        process.account.objects += 1
        self.debug_id = engine.next_debug_id()
        self.process = process
        self.node = node
        self.desc = desc
        self.strong = 0
        self.weak = 0
        self.death: Death | None = None
        self.freeze: Freeze | None = None
        process.refs_by_desc[desc] = self
        process.refs_by_node[node] = self
        node.refs.add(self.debug_id, self)

    def increment(self, *, strong: bool, target: Thread | None) -> int:
        """Count one more; 0 or -EINVAL (see `Node.increment`)."""
        if strong:
            if self.strong == 0:
                error = self.node.increment(strong=True, internal=True, target=target)
                if error:
                    return error
            self.strong += 1
        else:
            if self.weak == 0:
                self.node.increment(strong=False, internal=True, target=target)
            self.weak += 1
        return 0

    def decrement(self, *, strong: bool) -> None:
        """Count one less; a count that is zero already stays so (user space's error)."""
        if strong:
            if self.strong == 0:
                return
            self.strong -= 1
            if self.strong == 0:
                self.node.decrement(strong=True, internal=True)
        else:
            if self.weak == 0:
                return
            self.weak -= 1
        if self.strong == 0 and self.weak == 0:
            self.cleanup()

    def cleanup(self) -> None:
        """Forget the node, with the notifications that were asked for."""
        process = self.process
        node = self.node
        engine = process.engine
        del process.refs_by_desc[self.desc]
        del process.refs_by_node[node]
        process.free_desc(self.desc)
        if self.strong:
            node.decrement(strong=True, internal=True)
        node.refs.remove(self.debug_id)
        node.decrement(strong=False, internal=True)
        if self.death is not None:
            self.death.dequeue()
            engine.stats.deleted[stats.DEATH] += 1
            process.account.objects -= 1
        if self.freeze is not None:
            self.freeze.dequeue()
            engine.stats.deleted[stats.FREEZE] += 1
            process.account.objects -= 1
        engine.stats.deleted[stats.REF] += 1
        process.account.objects -= 1
