"""The threads that serve a mount.

Theory of operation
-------------------
Python runs one thread at a time, so spreading requests over threads gains nothing and costs a hand-over each. One
thread, the **leader**, does everything: it reads a request, steps the engine, stores the result, answers, and answers
and reads again in a single call (`lane_exchange`). Others are there for when it does not come back. Whatever a client
can delay - its memory under userfaultfd, a page of this very mount, a lock of its address space - delays the thread
that touches it; the **watcher** notices a leader that sleeps and for one to two milliseconds has not come to its next
request, for whatever reason, takes its place, and finds itself a new watcher. (A leader that runs, or would if it had
a processor, gets on by itself.) The old one finishes what it has in hand, if ever, and then, being demoted, leaves.
Nothing is taken from it: steps are guarded by the engine's lock, which is never held across such a call. Only the
deliveries that it had still to make (`Lane.work`) go to the new leader.

A watcher costs nothing while no requests come (system.c), and a thousandth of a processor while they do.

Who is stuck occupies a thread, so there are limits. A handle with `STUCK_PER_HANDLE` threads stuck over it is
*shunned*: its requests wait in the `backlog` for one of them. So is a user over whose memory `STUCK_PER_USER` are.
With `MAX_LANES` threads in all the mount is *austere*: every request that would touch a client's memory waits
there, while everything else - polls, signals, closing, the tree, and so the death of the client at fault - goes on.
At fault is whose memory it is, which need not be who made the request: a reply is stored by whoever gives it.

**Workers** do what no reader should: what comes from the tree's side or from a timer. Of two kinds: jobs that touch no
client's memory (`post`) are soon done, and have threads of their own; those that do (`post_for`) may be stuck, and so
have the same limits as lanes, by handle and by user (workers.py).

Invariants
----------
- At most one lane reads (system.c), and it is watched, or the mount is austere.
- A lane's buffers and its `work` belong to its thread; others only take from `work`, and set `interrupted`.
- `_guard` is held for moments, never across a system call.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from binderfs_fuse import complaints
from binderfs_fuse._system import ffi, lib
from binderfs_fuse.fuse.workers import Pool

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_LANES: Final = 128
"""Threads that read or have read requests, at most."""
STUCK_PER_HANDLE: Final = 4
"""Threads that may be stuck over one open before its requests have to wait."""
STUCK_PER_USER: Final = MAX_LANES // 2
"""Threads that may be stuck over one user's memory before all of the user's requests have to wait."""
MAX_WORKERS: Final = 64
"""Threads for everything else, at most, of each kind."""
Answer: TypeAlias = tuple[Any, ...]
"""What `lib.channel_deliver` takes: unique, kind, result, payload and its size; tid, address, data and its size.

Not spelled out: compiled code would take it apart and put it together at each turn, 5,700 instructions a call.
"""

_STACK_SIZE: Final = 512 << 10
_stack_size_guard = threading.Lock()
_STUCK_SECONDS: Final = 1.0
_EVERYTHING: Final = (1 << 64) - 1
_USER: Final[int] = lib.SHUN_USER
"""With a user's id, what stands for all handles of the user."""


class Lane:
    """What a thread serves requests with.

    `pointer`      the lane, for `lib`
    `fields`       its record, by name (system.h)
    `record`, `message`, `commands`, `data`   its buffers, as bytes
    `work`         what is to be done next: (call, value) to resume, (None, (answer, delivery)) to answer; what a stuck
                   thread leaves is taken over
    `call`         the call that `record` was read for, which alone may use the data fetched with it
    `serving`      the call whose step was resumed last, and whose answer is given next
    `delivery`     (call, outcome) of the last answer made here that stores data
    `interrupted`  the `unique` of a request being served here that was interrupted before it could be parked
    `leads`        it reads, and so should not wait; `nested` it is at its `work` in the middle of a request
    `left`         it was demoted, and is done with what it had in hand
    """

    __slots__ = (
        "call",
        "commands",
        "data",
        "delivery",
        "fields",
        "interrupted",
        "leads",
        "left",
        "message",
        "nested",
        "pointer",
        "record",
        "serving",
        "work",
    )

    def __init__(self, channel: Any) -> None:
        pointer = lib.lane_create(channel)
        if pointer == ffi.NULL:
            raise MemoryError
        self.pointer: Any = ffi.gc(pointer, lib.lane_free)
        self.fields: Any = lib.lane_record(pointer)
        self.record: Any = ffi.buffer(self.fields, ffi.sizeof("struct record"))
        self.message: Any = ffi.buffer(lib.lane_message(pointer), lib.MESSAGE_MAX)
        self.commands: Any = ffi.buffer(lib.lane_commands(pointer), lib.COMMANDS_MAX)
        self.data: Any = ffi.buffer(lib.lane_data(pointer), lib.DATA_MAX)
        self.work: deque[tuple[Any, Any]] = deque()
        self.call: Any = None
        self.serving: Any = None
        self.delivery: Any = None
        self.interrupted = 0
        self.leads = False
        self.left = False
        self.nested = False


class Crew:
    """The threads of a mount.

    `leader` is the lane that reads, and is watched.
    `lead` serves requests on a lane until it is demoted (returns true) or the connection is gone (false).
    `look` is called by the watcher some milliseconds after requests came in; its argument says whether no more came
    since.
    `restore` serves, on a lane that does not lead, a request that had to wait.
    `blame` says whose memory a stuck lane is at: (handle, user id).
    """

    def __init__(
        self,
        channel: Any,
        lead: Callable[[Lane], bool],
        look: Callable[[bool], None],
        restore: Callable[[Lane, bytes], None],
        blame: Callable[[Lane], tuple[int, int]],
    ) -> None:
        self._channel = channel
        self._lead = lead
        self._look = look
        self._restore = restore
        self._blame = blame
        self._guard = threading.Lock()
        self.leader: Lane | None = None
        self._watched = False
        self.max_lanes = MAX_LANES
        self._threads: set[threading.Thread] = set()
        self.lanes: set[Lane] = set()
        self.stuck: set[Lane] = set()
        # What each was stuck over, to be forgiven when it comes back: a handle, and a user.
        self._stuck_over: dict[Lane, tuple[int, int]] = {}
        self._shunned: set[int] = set()
        self.austere = False
        self.backlog: OrderedDict[int, tuple[int, int, bytes]] = OrderedDict()
        self._stopping = False
        self.workers = Pool(MAX_WORKERS, self._start_worker)
        self.client_workers = Pool(MAX_WORKERS, self._start_worker)
        self._clock = Clock(self.post)

    def start(self) -> None:
        """Start to read and to watch."""
        leader = Lane(self._channel)
        with self._guard:
            self.lanes.add(leader)
            self.leader = leader
        lib.lane_lead(leader.pointer)
        self._start(self._serve, leader, name="leader")
        self._find_watcher()

    def stop(self) -> bool:
        """End all threads but those that are stuck; the connection is gone. Return whether none was."""
        with self._guard:
            self._stopping = True
            # One that is about to be started finds at once that it is not wanted.
            threads = [thread for thread in self._threads if thread.ident is not None]
        lib.channel_stop(self._channel)
        self._clock.stop()
        self.workers.stop()
        self.client_workers.stop()
        deadline = time.monotonic() + _STUCK_SECONDS
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def post(self, job: Callable[..., object], *arguments: Any) -> None:
        """Have a worker call `job`, which touches no client's memory; never waits."""
        self.workers.post(job, *arguments)

    def post_for(self, handle: int, uid: int, job: Callable[..., object], *arguments: Any) -> None:
        """Have a worker call `job`, which may be stuck in the memory of this handle's client, a user's; never waits."""
        accounts = (handle, STUCK_PER_HANDLE), (_USER | uid, MAX_WORKERS // 2)
        self.client_workers.post(job, *arguments, accounts=accounts)

    def after(self, seconds: float, job: Callable[..., object], *arguments: Any) -> None:
        """Have a worker call `job` in a while."""
        self._clock.after(seconds, job, *arguments)

    def put_off(self, lane: Lane) -> bool:
        """Keep the request at hand for later if it is one that has to wait; tell whether it was."""
        fields = lane.fields
        with self._guard:
            handle = fields.fh
            user = _USER | fields.uid
            if not (self.austere or handle in self._shunned or user in self._shunned):
                return False
            self.backlog[fields.unique] = (handle, user, lane.message[: fields.length])
            return True

    def withdraw(self, unique: int) -> bool:
        """Drop a request that had to wait; tell whether there was such a one."""
        with self._guard:
            return self.backlog.pop(unique, None) is not None

    def lanes_serving(self, unique: int) -> list[Lane]:
        """Return the lanes whose last request this was; one that leads or is stuck may still be serving it."""
        with self._guard:
            return [lane for lane in self.lanes if lane.fields.unique == unique]

    # Readers.

    def _start(self, target: Callable[..., None], *arguments: Any, name: str) -> None:
        thread = threading.Thread(target=self._run, args=(target, *arguments), name=f"binder-{name}", daemon=True)
        with self._guard:
            self._threads.add(thread)
        # The size is a global setting. What is not touched of a stack costs address space, of which there may be
        # little.
        with _stack_size_guard:
            previous = threading.stack_size(_STACK_SIZE)
            try:
                thread.start()
            finally:
                threading.stack_size(previous)

    def _start_worker(self, work: Callable[[], None]) -> None:
        self._start(work, name="worker")

    def _run(self, target: Callable[..., None], *arguments: Any) -> None:
        try:
            target(*arguments)
        finally:
            with self._guard:
                self._threads.discard(threading.current_thread())

    def _find_watcher(self) -> None:
        """See that there is a watcher, unless there are too many threads already."""
        lane = None
        with self._guard:
            if self._watched or self._stopping:
                return
            if len(self.lanes) < self.max_lanes:
                self._watched = True
                lane = Lane(self._channel)
                self.lanes.add(lane)
            elif self.austere:
                return
            else:
                self.austere = True
                lib.channel_shun(self._channel, _EVERYTHING)
        if lane is not None:
            self._start(self._watch, lane, name="reader")
        else:
            line = f"{self.max_lanes} threads wait for memory of clients: whatever needs it has to wait"
            complaints.say(None, line)

    def _watch(self, lane: Lane) -> None:
        while True:
            found = lib.lane_watch(lane.pointer)
            if found == lib.WATCH_PROMOTED:
                break
            if found == lib.WATCH_STOPPED:
                self._forget(lane)
                return
            self._look(found == lib.WATCH_IDLE)
        with self._guard:
            self._watched = False
            stuck, self.leader = self.leader, lane
            assert stuck is not None  # there is a leader from the start
            shunned = self._mark_stuck(stuck)
        self._find_watcher()
        if shunned is not None:
            complaints.say(shunned, f"many threads wait for memory of user {shunned}: its clients have to wait")
        # Its deliveries are none of its client's business.
        while True:
            try:
                lane.work.append(stuck.work.popleft())
            except IndexError:
                break
        self._serve(lane)

    def _mark_stuck(self, lane: Lane) -> int | None:
        """Note whom a stuck lane is to be blamed on; return the user whose clients have to wait from now on, if any."""
        shunned = None
        if lane.left:  # by now; nobody would take it back
            return None
        self.stuck.add(lane)
        handle, uid = self._blame(lane)
        self._stuck_over[lane] = handle, _USER | uid
        for whom in self._stuck_over[lane]:
            # Some room is for users, and the last for everything.
            room = lib.SHUNNED_MAX - (1 if whom & _USER else 5)
            if whom not in self._shunned and self._is_stuck_too_often(whom) and len(self._shunned) < room:
                self._shunned.add(whom)
                lib.channel_shun(self._channel, whom)
                if whom & _USER:
                    shunned = uid
        return shunned

    def _is_stuck_too_often(self, whom: int) -> bool:
        limit = STUCK_PER_USER if whom & _USER else STUCK_PER_HANDLE
        return sum(whom in over for over in self._stuck_over.values()) >= limit

    def _forgive(self, lane: Lane) -> None:
        self.stuck.discard(lane)
        for whom in self._stuck_over.pop(lane, ()):
            if whom in self._shunned and not self._is_stuck_too_often(whom):
                self._shunned.discard(whom)
                lib.channel_pardon(self._channel, whom)

    def _serve(self, lane: Lane) -> None:
        try:
            if not self._lead(lane):
                return
            with self._guard:
                lane.left = True
                self._forgive(lane)
            self._catch_up(lane)
        finally:
            self._forget(lane)

    def _catch_up(self, lane: Lane) -> None:
        """Serve requests that had to wait, as far as they need not wait on."""
        while True:
            with self._guard:
                unique = next(
                    (
                        unique
                        for unique, (handle, user, _) in self.backlog.items()
                        if handle not in self._shunned and user not in self._shunned
                    ),
                    None,
                )
                if unique is None:
                    return
                _, _, message = self.backlog.pop(unique)
            self._restore(lane, message)

    def _forget(self, lane: Lane) -> None:
        with self._guard:
            self.lanes.discard(lane)
            if not self.austere or self._stopping:
                return
            self.austere = False
            lib.channel_pardon(self._channel, _EVERYTHING)
        self._find_watcher()


class Clock:
    """Hands jobs over when their time has come; has a thread only while there are any."""

    def __init__(self, post: Callable[..., None]) -> None:
        self._post = post
        self._changed = threading.Condition()
        self._entries: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._ids = itertools.count()
        self._running = False

    def after(self, seconds: float, job: Callable[..., object], *arguments: Any) -> None:
        """Post `job` in a while."""
        with self._changed:
            heapq.heappush(self._entries, (time.monotonic() + seconds, next(self._ids), job, arguments))
            self._changed.notify()
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._run, name="binder-clock", daemon=True).start()

    def stop(self) -> None:
        """Forget all jobs."""
        with self._changed:
            self._entries.clear()
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while self._entries:
                due = self._entries[0][0] - time.monotonic()
                if due > 0:
                    self._changed.wait(due)
                    continue
                _, _, job, arguments = heapq.heappop(self._entries)
                self._post(job, *arguments)
            self._running = False
