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

A stuck thread is charged to the owner of the memory that it waits for, not to the caller: a reply is stored by whoever
gives it. A handle with `Limits.lanes_per_handle` threads stuck over it is *shunned*: its requests wait in the
`backlog` for one of them. So is a user over whose memory as many threads are stuck as are still free (quotas.py). Where
all but the reserve are in use, the mount is *austere*: every request that would touch a client's memory waits in the
backlog, while everything else - polls, signals, closing, the tree, and so the death of the client at fault - goes on.

The **rescuer** is a thread that serves the backlog, users in turn: those that are not shunned any more, or, where the
mount is austere, those over whose memory no thread is stuck. That is what the reserve is for. Where the rescuer gets
stuck itself, it is charged like any other thread, and another one takes its place while there is one.

**Workers** do what no reader should: what comes from the tree's side or from a timer. Of two kinds: jobs that touch no
client's memory (`post`) are soon done, and have threads of their own; those that do (`post_for`) may be stuck, and so
have limits of the same kind as lanes, by handle and by user (workers.py).

Invariants
----------
- At most one lane reads (system.c), and it is watched, or the mount is austere.
- A lane's buffers and its `work` belong to its thread; others only take from `work`, and set `interrupted`.
- `_shunned` is what `_shares` and `_stuck_over` say at any time; `lib` may be told more, and then asks.
- At most one thread is the rescuer, and only while the mount is austere.
- `_guard` is held for moments, never across a system call.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from binderfs_fuse import complaints, uapi
from binderfs_fuse._system import ffi, lib
from binderfs_fuse.fuse.workers import Pool
from binderfs_fuse.limits import Limits
from binderfs_fuse.quotas import Shares

if TYPE_CHECKING:
    from collections.abc import Callable

Answer: TypeAlias = tuple[Any, ...]
"""What `lib.channel_deliver` takes: unique, kind, result, payload and its size; tid, address, data and its size.

Not spelled out: compiled code would take it apart and put it together at each turn, 5,700 instructions a call.
"""

_STACK_SIZE: Final = 512 << 10
_stack_size_guard = threading.Lock()
_STUCK_SECONDS: Final = 1.0
_EVERYTHING: Final[int] = lib.SHUN_ALL
_SOME: Final[int] = lib.SHUN_SOME
_USER: Final[int] = lib.SHUN_USER
"""With a user's id, what stands for all handles of the user."""
# A rescuer that is at the same request after this many seconds is taken for stuck.
_RESCUE_SECONDS: Final = 0.005
# Clients decide how often they have to wait: that is said so often at most.


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


class Backlog:
    """Requests that have to wait, of users in turn. `_guard` of the crew is held by whoever calls this."""

    def __init__(self) -> None:
        self._requests: dict[int, tuple[int, int, bytes]] = {}
        self._by_user: OrderedDict[int, dict[int, OrderedDict[int, None]]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._requests)

    def __contains__(self, unique: int) -> bool:
        """Tell whether a request is there."""
        return unique in self._requests

    def add(self, unique: int, handle: int, user: int, message: bytes) -> None:
        """Add a request."""
        self._requests[unique] = handle, user, message
        self._by_user.setdefault(user, {}).setdefault(handle, OrderedDict())[unique] = None

    def remove(self, unique: int) -> bytes | None:
        """Take a request out; return its message, or None where it is not there."""
        found = self._requests.pop(unique, None)
        if found is None:
            return None
        handle, user, message = found
        handles = self._by_user[user]
        uniques = handles[handle]
        del uniques[unique]
        if not uniques:
            del handles[handle]
            if not handles:
                del self._by_user[user]
        return message

    def find(self, may_go: Callable[[int], bool], shunned: set[int]) -> int | None:
        """Return the first request of the users in turn for whom `may_go`, over a handle that is not shunned."""
        for user, handles in self._by_user.items():
            if may_go(user):
                for handle, uniques in handles.items():
                    if handle not in shunned:
                        return next(iter(uniques))
        return None

    def take(self, may_go: Callable[[int], bool], shunned: set[int]) -> bytes | None:
        """Take that request out; return its message."""
        unique = self.find(may_go, shunned)
        if unique is None:
            return None
        self._by_user.move_to_end(self._requests[unique][1])
        return self.remove(unique)


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
        self._reserve = Limits.lane_reserve
        self.max_lanes = Limits.lanes - Limits.lane_reserve
        self._threads: set[threading.Thread] = set()
        self.lanes: set[Lane] = set()
        self.stuck: set[Lane] = set()
        # What each was stuck over, to be forgiven when it comes back: a handle, and a user.
        self._stuck_over: dict[Lane, tuple[int, int]] = {}
        self._stuck_at: Counter[int] = Counter()
        self._shares = Shares(Limits.lanes, Limits.lane_reserve)
        self._shunned: set[int] = set()
        # As far as `lib` was told; _SOME where there was no room for all of them.
        self._told: set[int] = set()
        self.austere = False
        self.backlog = Backlog()
        self._rescuer: Lane | None = None
        self.rescued = 0
        self._stopping = False
        self.workers = Pool(Limits.workers, self._start_worker)
        self.client_workers = Pool(Limits.workers, self._start_worker, Limits.worker_reserve)
        # One thread, which does slices of long steps (turns.py).
        self.turn_worker = Pool(1, self._start_worker)
        self.end_workers = Pool(Limits.workers, self._start_worker)
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
        self.turn_worker.stop()
        self.end_workers.stop()
        deadline = time.monotonic() + _STUCK_SECONDS
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def post(self, job: Callable[..., object], *arguments: Any) -> None:
        """Have a worker call `job`, which touches no client's memory; never waits."""
        self.workers.post(job, *arguments)

    def post_for(self, handle: int, uid: int, job: Callable[..., object], *arguments: Any) -> None:
        """Have a worker call `job`, which may be stuck in the memory of this handle's client, a user's; never waits."""
        accounts = ((handle, Limits.workers_per_handle),)
        self.client_workers.post(job, *arguments, accounts=accounts, user=_USER | uid)

    def after(self, seconds: float, job: Callable[..., object], *arguments: Any) -> Timer:
        """Have a worker call `job` in a while."""
        return self._clock.after(seconds, job, *arguments)

    def post_end(self, uid: int, job: Callable[..., object], *arguments: Any) -> None:
        """Have a worker call `job`, which takes as many turns as this user has left behind; never waits."""
        accounts = ((_USER | uid, Limits.ends_per_user),)
        self.end_workers.post(job, *arguments, accounts=accounts)

    def put_off(self, lane: Lane) -> bool:
        """Keep the request at hand for later if it is one that has to wait; tell whether it was."""
        fields = lane.fields
        with self._guard:
            handle = fields.fh
            user = _USER | fields.uid
            if not (self.austere or handle in self._shunned or user in self._shunned):
                return False
            self.backlog.add(fields.unique, handle, user, lane.message[: fields.length])
            austere = self.austere
        if austere:
            self._find_rescuer()
        return True

    def withdraw(self, unique: int) -> bool:
        """Drop a request that had to wait; tell whether there was such a one."""
        with self._guard:
            return self.backlog.remove(unique) is not None

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
        self._warn(shunned)
        # Its deliveries are none of its client's business.
        while True:
            try:
                lane.work.append(stuck.work.popleft())
            except IndexError:
                break
        self._serve(lane)

    def _mark_stuck(self, lane: Lane) -> int | None:
        """Charge a stuck lane to the handle and the user at fault; return a user that has to wait now, if any."""
        if lane.left:  # by now; nobody would take it back
            return None
        self.stuck.add(lane)
        handle, uid = self._blame(lane)
        self._stuck_over[lane] = handle, _USER | uid
        self._stuck_at[handle] += 1
        self._shares.take(_USER | uid)
        return self._shun()

    def _forgive(self, lane: Lane) -> None:
        self.stuck.discard(lane)
        over = self._stuck_over.pop(lane, None)
        if over is None:
            return
        handle, user = over
        self._stuck_at[handle] -= 1
        if not self._stuck_at[handle]:
            del self._stuck_at[handle]
        self._shares.give_back(user)
        self._shun()

    def _shun(self) -> int | None:
        """See anew who has to wait, after a change of what is stuck; return a user that has to from now on, if any."""
        # There are no more of either than there are lanes.
        handles = {handle for handle, count in self._stuck_at.items() if count >= Limits.lanes_per_handle}
        users = {user for user in self._shares.held if isinstance(user, int) and self._shares.is_exhausted(user)}
        new = users - self._shunned
        self._shunned = handles | users
        tell = set(self._shunned) if len(self._shunned) < lib.SHUNNED_MAX - 1 else {_SOME}
        for whom in self._told - tell:
            lib.channel_pardon(self._channel, whom)
        for whom in tell - self._told:
            lib.channel_shun(self._channel, whom)
        self._told = tell
        return next(iter(new)) & ~_USER if new else None

    def _warn(self, user: int | None) -> None:
        if user is not None:
            complaints.say(user, f"many threads wait for memory of user {user}: its clients have to wait")

    def _serve(self, lane: Lane) -> None:
        try:
            if not self._lead(lane):
                return
            with self._guard:
                lane.left = True
                self._forgive(lane)
        finally:
            self._forget(lane)
            self._find_rescuer()

    def _forget(self, lane: Lane) -> None:
        with self._guard:
            self.lanes.discard(lane)
            if not self.austere or self._stopping or len(self.lanes) >= self.max_lanes:
                return
            self.austere = False
            lib.channel_pardon(self._channel, _EVERYTHING)
        self._find_watcher()

    # The backlog.

    def _may_be_rescued(self, user: int) -> bool:
        return not self._shares.held[user] if self.austere else user not in self._shunned

    def _find_rescuer(self) -> None:
        """See that there is a rescuer, where there are requests for one."""
        with self._guard:
            if self._rescuer is not None or self._stopping or len(self.lanes) >= self.max_lanes + self._reserve:
                return
            if self.backlog.find(self._may_be_rescued, self._shunned) is None:
                return
            lane = self._rescuer = Lane(self._channel)
            self.lanes.add(lane)
        self._start(self._rescue, lane, name="rescuer")

    def _rescue(self, lane: Lane) -> None:
        """Serve requests that had to wait until there are none, or another one is the rescuer."""
        try:
            while (message := self._take_request(lane)) is not None:
                self._clock.after(_RESCUE_SECONDS, self._look_after, lane, self.rescued)
                self._restore(lane, message)
        finally:
            with self._guard:
                if self._rescuer is lane:
                    self._rescuer = None
                lane.left = True
                self._forgive(lane)
            self._forget(lane)
            # Between the last look and this one requests may have come.
            self._find_rescuer()

    def _take_request(self, lane: Lane) -> bytes | None:
        """Take a request out of the backlog for the rescuer, if it still is that and there is one."""
        with self._guard:
            if self._rescuer is not lane:
                return None
            message = self.backlog.take(self._may_be_rescued, self._shunned)
            if message is not None:
                self.rescued += 1
                # An INTERRUPT finds a request in the backlog, or here.
                fields = lane.fields
                _, _, fields.unique, _, _, _, fields.tid, _ = uapi.fuse_in_header.unpack_from(message)
            return message

    def _look_after(self, lane: Lane, rescued: int) -> None:
        """Replace the rescuer if it is still at the same request."""
        with self._guard:
            if self._rescuer is not lane or self.rescued != rescued:
                return
            self._rescuer = None
            shunned = self._mark_stuck(lane)
        self._warn(shunned)
        self._find_rescuer()


class Timer:
    """A job whose time has not come yet; `cancel` drops it, and what it holds."""

    __slots__ = ("_clock", "arguments", "job")

    def __init__(self, clock: Clock, job: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._clock = clock
        self.job: Callable[..., object] | None = job
        self.arguments = arguments

    def cancel(self) -> None:
        """Do not do it. Nothing if its time has come."""
        self._clock.cancel(self)


class Clock:
    """Hands jobs over when their time has come; has a thread only while there are any."""

    def __init__(self, post: Callable[..., None]) -> None:
        self._post = post
        self._changed = threading.Condition()
        self._entries: list[tuple[float, int, Timer]] = []
        self._cancelled = 0
        self._ids = itertools.count()
        self._running = False

    def after(self, seconds: float, job: Callable[..., object], *arguments: Any) -> Timer:
        """Post `job` in a while."""
        timer = Timer(self, job, arguments)
        with self._changed:
            heapq.heappush(self._entries, (time.monotonic() + seconds, next(self._ids), timer))
            self._changed.notify()
            if self._running:
                return timer
            self._running = True
        threading.Thread(target=self._run, name="binder-clock", daemon=True).start()
        return timer

    def cancel(self, timer: Timer) -> None:
        """Drop a job. Its entry goes when its time comes, or when most entries are such."""
        with self._changed:
            if timer.job is None:
                return
            timer.job = None
            timer.arguments = ()
            self._cancelled += 1
            if 2 * self._cancelled > len(self._entries):
                self._entries = [entry for entry in self._entries if entry[2].job is not None]
                heapq.heapify(self._entries)
                self._cancelled = 0
                self._changed.notify()

    def stop(self) -> None:
        """Forget all jobs."""
        with self._changed:
            self._entries.clear()
            self._cancelled = 0
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while self._entries:
                due = self._entries[0][0] - time.monotonic()
                if due > 0:
                    self._changed.wait(due)
                    continue
                _, _, timer = heapq.heappop(self._entries)
                job = timer.job
                if job is None:
                    self._cancelled -= 1
                    continue
                timer.job = None
                self._post(job, *timer.arguments)
            self._running = False
