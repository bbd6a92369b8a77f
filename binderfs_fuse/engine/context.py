"""The engine of a mount, its contexts, and the tasks that call it.

A **context** is one device: processes that opened different devices do not see each other. The **engine** is what the
contexts of one mount share: the numbering of everything (`debug_id`), the counters, the list of processes, the rings
of the transaction logs.

Invariants
----------
- `engine.lock` is held by whoever calls anything in this package.
- `processes`, `opens_in_order` and, by pid, `opens_by_pid` hold the same processes; `dying` those whose release gives
  turns, and `dying_threads` such threads.
- `opens` is the sum of all accounts' opens.
"""

from __future__ import annotations

import threading
from collections import deque
from errno import EMFILE, ENFILE
from typing import TYPE_CHECKING

from binderfs_fuse.engine import stats
from binderfs_fuse.engine.effects import CHUNK, TURN
from binderfs_fuse.engine.limits import OWN, Quota
from binderfs_fuse.engine.logs import Logs
from binderfs_fuse.engine.priority import NORMAL
from binderfs_fuse.engine.process import Process
from binderfs_fuse.engine.sorted_map import SortedMap
from binderfs_fuse.engine.stats import Stats
from binderfs_fuse.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from binderfs_fuse.engine.effects import Pace, Region, Turns, Wait
    from binderfs_fuse.engine.node import Node
    from binderfs_fuse.engine.priority import Scheduling
    from binderfs_fuse.engine.thread import Thread
    from binderfs_fuse.engine.transaction import LogEntry
    from binderfs_fuse.engine.work import WorkList

# Entries that each transaction log keeps.
LOG_ENTRIES = 32


class Task:
    """Who calls: thread `tid` of process `pid`, with effective user `euid` and the `nice` value it has now.

    `scheduling` is its policy and priority; only an engine with Android's priorities looks at it.
    """

    __slots__ = ("euid", "nice", "pid", "scheduling", "tid")

    def __init__(
        self, tid: int, pid: int, euid: int = 0, nice: int = 0, scheduling: Scheduling = (NORMAL, 120)
    ) -> None:
        self.tid = tid
        self.pid = pid
        self.euid = euid
        self.nice = nice
        self.scheduling = scheduling


class Context:
    """One device, called `name`; `manager` is the node that handle 0 means, or None."""

    __slots__ = ("engine", "manager", "manager_euid", "name")

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.manager: Node | None = None
        # The first context manager's user: no other one's may follow it.
        self.manager_euid: int | None = None

    def open(
        self,
        pid: int,
        euid: int,
        region: Region,
        *,
        nice: int = 0,
        pid_namespace: int = 0,
        pids: dict[int, int] | None = None,
        user_ids: list[tuple[int, int, int]] | None = None,
        scheduling: Scheduling = (NORMAL, 120),
    ) -> Process:
        """Open the device for process `pid`.

        `pids` are its pids by pid namespace, as far as it is nested; left out, all processes share one namespace.
        `user_ids` are the users of its user namespace, [(first there, first here, count)], unless that is everybody's.
        Raises `OSError`: EMFILE or ENFILE, see limits.py.
        """
        engine = self.engine
        account = engine.quota.account(euid)
        lack = engine.quota.opens.lacks(account.opens)
        if lack:
            engine.quota.forget(account)
            if lack == OWN:
                raise OSError(EMFILE, "too many opens of this user")
            raise OSError(ENFILE, "too many opens")
        process = Process(self, pid, euid, region, nice, pid_namespace, pids or {}, user_ids, scheduling, account)
        engine.add_process(process)
        engine.stats.created[stats.PROC] += 1
        return process


class Engine:
    """The driver of one mount; `clock` gives nanoseconds that only grow.

    With `android_priority`, calls carry scheduler policies as in Android's common kernel, not only nice values.
    """

    def __init__(
        self, clock: Callable[[], int], *, android_priority: bool = False, limits: Limits | None = None
    ) -> None:
        self.android_priority = android_priority
        self.limits = limits or Limits()
        self.quota = Quota(self.limits)
        # By euid; one that holds nothing is forgotten.
        self.accounts = self.quota.accounts
        self.lock = threading.Lock()
        self.clock = clock
        self.stats = Stats()
        # How many elements a step touches before it gives a turn; at least 1.
        self.chunk = CHUNK
        # By serial numbers, for their order: the driver lists the newest process, and the newest dead node, first.
        self.processes: dict[Process, None] = {}
        self.opens_in_order: SortedMap[Process] = SortedMap()
        self.opens_by_pid: dict[int, SortedMap[Process]] = {}
        self.dead_nodes: dict[Node, None] = {}
        self.dead_in_order: SortedMap[Node] = SortedMap()
        # What is being released, and not listed any more.
        self.dying: dict[Process, None] = {}
        self.dying_threads: dict[Thread, None] = {}
        self.contexts: dict[str, Context] = {}
        self.transaction_log: deque[LogEntry] = deque(maxlen=LOG_ENTRIES)
        self.failed_transaction_log: deque[LogEntry] = deque(maxlen=LOG_ENTRIES)
        # For the shell: waits to resume, processes whose pollers are to look again, processes that are over.
        self.ready: list[Wait] = []
        self.poll_ready: dict[Process, None] = {}
        self.freed: list[Process] = []
        self.logs = Logs(self)
        self._last_id = 0
        self._last_serial = 0

    def next_debug_id(self) -> int:
        """The next number; nodes, refs and transactions share them."""
        self._last_id += 1
        return self._last_id

    def add_context(self, name: str) -> Context:
        """Make a device; `name` is up to 255 bytes."""
        context = self.contexts[name] = Context(self, name)
        return context

    def remove_context(self, context: Context) -> None:
        """The device is gone; those who have it open go on."""
        del self.contexts[context.name]

    def next_serial(self) -> int:
        """The next of the numbers that order things, and that nobody sees."""
        self._last_serial += 1
        return self._last_serial

    def add_process(self, process: Process) -> None:
        """List a process that has opened a device."""
        self.processes[process] = None
        self.opens_in_order.add(process.serial, process)
        opens = self.opens_by_pid.get(process.pid)
        if opens is None:
            opens = self.opens_by_pid[process.pid] = SortedMap()
        opens.add(process.serial, process)

    def remove_process(self, process: Process) -> None:
        """List it no more."""
        del self.processes[process]
        self.opens_in_order.remove(process.serial)
        opens = self.opens_by_pid[process.pid]
        opens.remove(process.serial)
        if not opens.count:
            del self.opens_by_pid[process.pid]

    def cancel_all(self, queue: WorkList, pace: Pace) -> Turns:
        """Release a list of work that nobody will read."""
        while queue.first is not None:
            if pace.spend(queue.popleft().cancel(self)):
                yield TURN
