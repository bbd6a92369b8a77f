"""Clients of an engine that do whatever a fuzzer decides, and a shell that fails as often as a real one can.

Theory of operation
-------------------
A `World` has one engine with two contexts and some clients, whose memory is made up as commands are composed: an
address leads to a block of bytes, which the engine may find changed or cut off when it looks (`CopyIn`). Each decision
comes from the fuzzer's bytes: what a client calls, what its commands say, whether the machine fails, and, at every
effect and between a step's end and the storing of its outcome, whether others go first. So one thread plays what many
threads could.

What is held against the engine:

- it raises nothing;
- it stores only into pages that are present and buffers that are allocated;
- each `File` is closed or handed over exactly once;
- its invariants hold whenever no step is being resumed (`engine.invariants`);
- when all clients are gone, so is everything else.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse import uapi
from binderfs_fuse.engine import (
    CopyIn,
    CopyOut,
    CopyToBuffer,
    Engine,
    FindMapping,
    FindRoom,
    GetFile,
    GetSecurityContext,
    Outcome,
    Populate,
    Process,
    SetNice,
    SetScheduling,
    Task,
    Turn,
    Wait,
    conclude,
    invariants,
)
from binderfs_fuse.engine.stats import OBJECTS
from fuzz.choices import Choices
from fuzz.compose import Composer

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    Step = Generator[Any, Any, None]

PAGE: Final = 4096
MAX_STEPS: Final = 400
MAX_CLIENTS: Final = 5


class Broken(Exception):  # noqa: N818 - the engine is
    """The engine did what it must never do."""


def _require(holds: object, what: str) -> None:
    if not holds:
        raise Broken(what)


class Region:
    """A receive region that knows which of its pages are present, and whose buffers may be written to."""

    def __init__(self) -> None:
        self.process: Process | None = None
        self.present: set[int] = set()

    def store(self, offset: int, data: bytes | bytearray) -> None:
        """Check that this would have been right."""
        self.check(offset, len(data))

    def check(self, offset: int, size: int) -> None:
        """Check that these bytes lie in present pages of one allocated buffer."""
        _require(self.process is not None and self.process.allocation is not None, "store into an unknown region")
        assert self.process is not None
        assert self.process.allocation is not None
        if not size:
            return
        pages = range(offset // PAGE, (offset + size - 1) // PAGE + 1)
        _require(self.present.issuperset(pages), f"store of {size} at {offset} into pages that are not there")
        _require(
            any(
                buffer.offset <= offset and offset + size <= buffer.offset + ((buffer.size + 7) & ~7)
                for buffer in self.process.allocation.allocated.values()
            ),
            f"store of {size} at {offset} outside of buffers",
        )


class File:
    """Somebody's open file."""

    def __init__(self, world: World) -> None:
        self.open = True
        world.files.append(self)

    def close(self) -> None:
        """Let go of it, once."""
        _require(self.open, "a file closed twice")
        self.open = False


class Client:
    """A process of the fuzzer's: threads by number, memory in blocks, opens of devices."""

    targets: Sequence[int] = (0x2000, 0x3000)

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.blocks: list[tuple[int, bytes]] = []
        self.opens: list[Process] = []
        self.next_address = 0x10000

    def place(self, data: bytes) -> int:
        """Put bytes into memory."""
        address = self.next_address
        self.next_address += len(data) + 24 & ~7
        self.blocks.append((address, data))
        if len(self.blocks) > 32:
            del self.blocks[0]
        return address

    def read(self, address: int, size: int) -> bytes:
        """Return the bytes at an address, as far as they go."""
        for start, data in self.blocks:
            if start <= address <= start + len(data):
                return data[address - start : address - start + size]
        return b""


class Pending:
    """A step that is not over: it waits for an effect's answer, or is parked, or its outcome is not stored yet."""

    __slots__ = ("effect", "outcome", "process", "step", "storing", "task")

    def __init__(self, step: Step, process: Process, task: Task) -> None:
        self.step = step
        self.process = process
        self.task = task
        self.effect: Any = None
        self.outcome: Outcome | None = None
        # Its outcome is being taken back, in turns: it is nobody else's business.
        self.storing = False


class World:
    """One run over the decisions in `data`."""

    def __init__(self, data: bytes) -> None:
        self.choices = Choices(data)
        self._composer = Composer(self.choices)
        self._now = 0
        self.engine = Engine(self._clock, android_priority=self.choices.rarely(4))
        # Most often far too few for anybody's good: so others go first within each walk.
        self.engine.chunk = self.choices.pick((1, 1, 2, 64))
        self.contexts = [self.engine.add_context("binder"), self.engine.add_context("hwbinder")]
        self.clients: list[Client] = []
        self.pending: dict[int, Pending] = {}
        self.files: list[File] = []
        self._next_pid = 1000
        # Within a turn nothing turns to others in turn.
        self._turning = False

    def _clock(self) -> int:
        self._now += 1_000_000
        return self._now

    # The run.

    def run(self) -> None:
        """Do what the data says, then end all clients and see what is left."""
        for _ in range(2 + self.choices.below(2)):
            self._open(self._new_client(), self.contexts[0])
        self._begin()
        for _ in range(MAX_STEPS):
            if not self.choices:
                break
            self._do_something()
            self.check()
        self._end()

    def check(self) -> None:
        """Check what must hold between any two resumptions."""
        # Who waits to freeze a process holds it beyond its end.
        quiet = all(
            isinstance(pending.effect, Wait) and pending.effect.timeout_ms is None for pending in self.pending.values()
        )
        invariants.check(self.engine, quiet=quiet)

    def _begin(self) -> None:
        """Have a manager, and an object of each other client known to it."""
        manager = self.clients[0]
        accepts = uapi.flat_binder_object.pack(uapi.BINDER_TYPE_BINDER, 0x17F, 0, 0)
        self._call(manager, manager.opens[0], manager.pid, uapi.BINDER_SET_CONTEXT_MGR_EXT, accepts, None)
        for client in self.clients[1:]:
            # At a turn of the one before it, it may have come to its end.
            if client in self.clients:
                argument, stream = self._composer.introduce(client)
                self._call(client, client.opens[0], client.pid, uapi.BINDER_WRITE_READ, argument, stream)

    def _new_client(self) -> Client:
        client = Client(self._next_pid)
        self._next_pid += 10
        self.clients.append(client)
        return client

    def _open(self, client: Client, context: Any) -> None:
        region = Region()
        namespace = {"pid_namespace": 7, "pids": {7: 1}} if self.choices.rarely(8) else {}
        process = context.open(client.pid, self.choices.below(2) * 1000, region, **namespace)
        region.process = process
        client.opens.append(process)

    def _do_something(self) -> None:
        kind = self.choices.below(16)
        if kind < 9:
            self._ioctl()
        elif kind < 12:
            self._advance()
        elif kind == 12:
            self._interrupt()
        elif kind == 13:
            self._poll_or_flush()
        elif kind == 14:
            self._come_or_go()
        else:
            self._look()

    def _come_or_go(self) -> None:
        if self.choices.rarely(3) and len(self.clients) > 1:
            client = self.choices.pick(self.clients)
            # It cannot end before its calls are answered.
            if not any(pending.storing for pending in self.pending.values() if pending.task.pid == client.pid):
                self._kill(client)
        elif len(self.clients) < MAX_CLIENTS and self.choices.rarely(2):
            self._open(self._new_client(), self.choices.pick(self.contexts))
        elif len(self.choices.pick(self.clients).opens) < 3:
            self._open(self.choices.pick(self.clients), self.choices.pick(self.contexts))

    def _look(self) -> None:
        logs = self.engine.logs
        hashed = self.choices.rarely(2)
        for text in (
            logs.state(hashed=hashed),
            logs.stats(),
            logs.transactions(hashed=hashed),
            logs.transaction_log(failed=self.choices.rarely(2)),
            logs.proc(self.choices.pick(self.clients).pid),
        ):
            for _ in text:
                # To look makes work, and others go on between two pieces.
                self._turn()

    def _poll_or_flush(self) -> None:
        client = self.choices.pick(self.clients)
        if not client.opens:
            return
        process = self.choices.pick(client.opens)
        if self.choices.rarely(2):
            self._conclude(process.flush())
        else:
            tid = client.pid + self.choices.below(4)
            process.poll(Task(tid, process.pid, process.euid))
        self._settle_ready()

    def _kill(self, client: Client) -> None:
        """End a client as the kernel does: its calls come to an end first, then its descriptors go."""
        self.clients.remove(client)
        for tid in range(client.pid, client.pid + 4):
            self._finish(tid)
        for process in client.opens:
            self._conclude(process.flush())
            self._settle_ready()
            self._conclude(process.release())
            self._settle_ready()

    def _end(self) -> None:
        while self.clients:
            self._kill(self.clients[0])
            self.check()
        engine = self.engine
        _require(not self.pending, "steps left")
        _require(not engine.processes, "processes left")
        _require(not engine.dead_nodes, "dead nodes left")
        _require(all(not file.open for file in self.files), "files left")
        for name, created, deleted in zip(OBJECTS, engine.stats.created, engine.stats.deleted, strict=True):
            _require(created == deleted, f"{name}: {created} created, {deleted} deleted")

    # Steps.

    def _conclude(self, step: Step) -> Outcome:
        """Drive a step that asks for nothing but turns; at each of them another step may go on, or begin."""
        return conclude(step, self._turn)

    def _turn(self) -> None:
        self._settle_ready()
        if self._turning:
            return
        self._turning = True
        invariants.check(self.engine)
        if self.clients and self.choices.rarely(4):
            self._do_something()
        self._turning = False

    def _call(
        self, client: Client, process: Process, tid: int, command: int, argument: bytes, commands: bytes | None
    ) -> None:
        if tid in self.pending:
            return
        nice = (0, 0, 5, -5)[tid % 4]
        task = Task(tid, client.pid, (0, 1000)[tid & 1], nice)
        step = process.ioctl(task, command, argument, commands, nonblock=self.choices.rarely(4))
        pending = self.pending[tid] = Pending(step, process, task)
        self._send(pending, None)
        self._settle_ready()
        self._go_on(tid, pending)

    def _go_on(self, tid: int, pending: Pending) -> None:
        """Take a step as far as it goes at once: to its end, to a wait, or until others shall go first."""
        while not isinstance(pending.effect, Wait):
            if self.choices.rarely(12):
                return
            self._move(tid, pending)
            if self.pending.get(tid) is not pending:
                return

    def _move(self, tid: int, pending: Pending) -> None:
        """Answer a step's effect, or store its outcome."""
        if pending.outcome is not None:
            self._store(tid, pending)
        else:
            self._send(pending, self._answer(pending, pending.effect))
        self._settle_ready()

    def _send(self, pending: Pending, value: Any) -> None:
        effect = pending.step.send(value)
        if isinstance(effect, Outcome):
            pending.effect = None
            pending.outcome = effect
        else:
            pending.effect = effect
            if isinstance(effect, Wait):
                effect.owner = pending

    def _settle_ready(self) -> None:
        """Resume what has been woken, as a shell does after each send."""
        engine = self.engine
        while engine.ready:
            woken, engine.ready[:] = engine.ready[:], []
            for wait in woken:
                pending = wait.owner
                _require(pending.effect is wait, "woken, but not waiting")
                _require(not wait.parked, "woken, but parked")
                self._send(pending, 0)
        engine.poll_ready.clear()
        engine.freed.clear()

    def _advance(self) -> None:
        if self.pending:
            tid = self.choices.pick(sorted(self.pending))
            pending = self.pending[tid]
            if not isinstance(pending.effect, Wait) and not pending.storing:
                self._move(tid, pending)
                if self.pending.get(tid) is pending:
                    self._go_on(tid, pending)

    def _interrupt(self) -> None:
        if self.pending:
            tid = self.choices.pick(sorted(self.pending))
            pending = self.pending[tid]
            wait = pending.effect
            if isinstance(wait, Wait) and wait.parked:
                errors = (errno.EINTR, errno.EAGAIN) if wait.timeout_ms is None else (errno.ETIMEDOUT, errno.EINTR)
                self._send(pending, -self.choices.pick(errors))
                self._settle_ready()
                self._go_on(tid, pending)

    def _finish(self, tid: int) -> None:
        """Bring a thread's call to its end."""
        while (pending := self.pending.get(tid)) is not None:
            wait = pending.effect
            if isinstance(wait, Wait):
                _require(wait.parked, "not parked, and not woken")
                self._send(pending, -errno.EINTR)
                self._settle_ready()
            else:
                self._move(tid, pending)

    def _store(self, tid: int, pending: Pending) -> None:
        """Do what an outcome says, as far as the machine lets us."""
        outcome = pending.outcome
        assert outcome is not None
        pending.storing = True
        process = pending.process
        choices = self.choices
        if outcome.data and choices.rarely(10):
            copied = choices.below(len(outcome.data)) if len(outcome.data) < 256 else 0
            for file, _, _ in outcome.files:
                file.close()
            outcome = self._conclude(process.undeliver(pending.task, outcome, copied))
            _require(not outcome.files, "files with a fault")
        if outcome.files:
            if choices.rarely(3):
                for file, _, _ in outcome.files:
                    file.close()
                outcome = self._conclude(process.install_failed(pending.task, outcome))
            else:
                for file, region, offset in outcome.files:
                    region.store(offset, bytes(4))
                    file.close()
                process.installed(pending.task, list(range(3, 3 + len(outcome.files))), outcome)
        del self.pending[tid]

    def _answer(self, pending: Pending, effect: Any) -> Any:
        choices = self.choices
        fails = choices.rarely(16)
        client = next((client for client in self.clients if client.pid == pending.task.pid), None)
        if isinstance(effect, (CopyIn, CopyToBuffer)):
            _require(0 <= effect.address < 1 << 64, "an address of more than 64 bits")
            _require(0 <= effect.size <= 4 << 20, f"{effect.size} bytes to copy")
        if isinstance(effect, CopyIn):
            data = client.read(effect.address, effect.size) if client else b""
            if fails:
                data = data[: choices.below(256)]
            elif choices.rarely(16) and data:
                place = choices.below(min(len(data), 256))
                data = data[:place] + choices.bytes(1) + data[place + 1 :]
            return data
        if isinstance(effect, CopyToBuffer):
            assert isinstance(effect.region, Region)
            effect.region.check(effect.offset, effect.size)
            return choices.below(256) % (effect.size + 1) if fails else effect.size
        if isinstance(effect, CopyOut):
            return 0 if fails else len(effect.data)
        if isinstance(effect, FindMapping):
            if fails:
                return None
            return choices.pick((0x7F00_0000_0000, 1 << 40, PAGE, (1 << 64) - (8 << 20))), choices.pick(
                (1 << 20, PAGE, 2 * PAGE, 8 << 20, 16 * PAGE)
            )
        return self._answer_other(effect, fails=fails)

    def _answer_other(self, effect: Any, *, fails: bool) -> Any:
        choices = self.choices
        if isinstance(effect, Turn):
            return None
        if isinstance(effect, Populate):
            assert isinstance(effect.region, Region)
            _require(not effect.offset % PAGE and not effect.size % PAGE and effect.size > 0, "not whole pages")
            if fails:
                return -errno.ENOMEM
            first = effect.offset // PAGE
            effect.region.present.update(range(first, first + effect.size // PAGE))
            return 0
        if isinstance(effect, GetFile):
            return choices.pick((-errno.EBADF, -errno.EMFILE, -errno.ESRCH)) if fails else File(self)
        if isinstance(effect, FindRoom):
            return -errno.EMFILE if fails else 0
        if isinstance(effect, GetSecurityContext):
            return -errno.EOPNOTSUPP if fails else bytes(choices.below(32))
        if isinstance(effect, SetNice):
            return 0 if fails else effect.nice
        assert isinstance(effect, SetScheduling)
        return (0, 120) if fails else effect.scheduling

    def _ioctl(self) -> None:
        choices = self.choices
        client = choices.pick(self.clients)
        if not client.opens:
            return
        process = choices.pick(client.opens)
        tid = client.pid + choices.below(4)
        pids = [client.pid for client in self.clients]
        command, argument, commands = self._composer.ioctl(client, process, tid, pids)
        self._call(client, process, tid, command, argument, commands)


def run(data: bytes) -> None:
    """Play what `data` decides. Raises what the engine raises, and `Broken`."""
    World(data).run()
