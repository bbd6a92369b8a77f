"""A simulated machine to drive the engine on: clients with memory, regions, descriptors and threads.

Theory of operation
-------------------
A `Machine` is the shell: it makes an engine's steps, performs their effects, and drives on what becomes ready. A client
is one open of a device by one process; its `Caller`s are its threads, and what they do is a `Call`, an ioctl on its
way:

    client.write(command(BC_ENTER_LOOPER))      one that is done when it returns
    call = client.read()                        one that may park: call.parked; it goes on when something wakes it
    call.names, call.received, call.error       what it came to

Everything happens in one thread in one order, unless a test wants otherwise: `begin` makes a call without driving it,
and `advance` performs one effect. `machine.answer` gives one effect another answer than the machine's own, and
`machine.before_effect` is called between an effect and its answer, for whatever should happen just then.

After every `send` into the engine its invariants are checked. At the end everybody closes everything, and nothing may
be left over: no object by the engine's own counters, no file that was taken and never closed.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse import uapi
from binderfs_fuse.engine import (
    Context,
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
    stats,
)
from binderfs_fuse.engine.invariants import check
from tests.engine.wire import Parcel, Received, Return, command, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from binderfs_fuse.engine.effects import Effect, Step
    from binderfs_fuse.engine.priority import Scheduling

PAGE: Final = 4096
MIB: Final = 1 << 20
# Something to find where nothing has been written yet.
_UNTOUCHED: Final = 0xEE


class MachineRegion:
    """A receive region, with the pages that were made present."""

    def __init__(self, size: int) -> None:
        self.data = bytearray([_UNTOUCHED]) * size
        self.present: set[int] = set()
        self.freed = False

    def store(self, offset: int, data: bytes | bytearray) -> None:
        """Put `data` at `offset`, which must be present."""
        assert not self.freed
        assert self.present.issuperset(range(offset // PAGE, (offset + len(data) - 1) // PAGE + 1))
        self.data[offset : offset + len(data)] = data


class MachineFile:
    """A file, and how many hold it: descriptors, and the engine."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.holders = 0


class FileReference:
    """The engine's hold on a file."""

    def __init__(self, file: MachineFile) -> None:
        self.file = file
        self.held = True
        file.holders += 1

    def close(self) -> None:
        """Let go of it, once."""
        assert self.held
        self.held = False
        self.file.holders -= 1


class Memory:
    """A process's memory: areas with nothing in between."""

    def __init__(self) -> None:
        self._areas: list[tuple[int, bytearray, int]] = []
        self._next = 0x10_0000

    def place(self, content: bytes, *, accessible: int | None = None) -> int:
        """Put bytes somewhere; the address. Only so many of them are `accessible`, if given."""
        address = self._next
        self._next += (len(content) + 2 * PAGE) & ~(PAGE - 1)
        self._areas.append((address, bytearray(content), len(content) if accessible is None else accessible))
        return address

    def room(self, size: int, *, accessible: int | None = None) -> int:
        """Find room for `size` bytes."""
        return self.place(bytes([_UNTOUCHED]) * size, accessible=accessible)

    def read(self, address: int, size: int) -> bytes:
        """Read up to the first fault."""
        for start, content, accessible in self._areas:
            if start <= address < start + accessible:
                return bytes(content[address - start : min(accessible, address - start + size)])
        return b""

    def write(self, address: int, data: bytes | bytearray) -> int:
        """Write up to the first fault; the bytes written."""
        for start, content, accessible in self._areas:
            if start <= address < start + accessible:
                offset = address - start
                size = min(len(data), accessible - offset)
                content[offset : offset + size] = data[:size]
                return size
        return 0

    def protect(self, address: int) -> None:
        """Let an area not be accessible any more."""
        self._areas = [area for area in self._areas if area[0] != address]


@dataclass
class Poll:
    """What the shell knows of pollers: processes that were to look again, in order."""

    woken: list[Process] = field(default_factory=list)


class Call:
    """An ioctl on its way, or done."""

    def __init__(self, caller: Caller, step: Generator[Effect | Outcome, Any, None]) -> None:
        self.caller = caller
        self.machine = caller.client.machine
        self.effects: list[Effect] = []
        self.effect: Effect | None = None
        self.outcome: Outcome | None = None
        self.argument = b""
        self.data = b""
        self.installed: list[int] = []
        self._step = step
        self._begun = False

    # -- driving

    def advance(self, answer: Any = None) -> bool:
        """Perform the present effect (or give it another `answer`) and go on to the next; false when done."""
        if self._begun and answer is None:
            assert self.effect is not None
            answer = self.machine.perform(self, self.effect)
        assert self.outcome is None
        self.machine.waiting.pop(self, None)
        effect = self._step.send(answer)
        if isinstance(effect, Outcome):
            self.effect = None
            self.machine.under_way.pop(self, None)
            self.machine.look()
            self.outcome = effect
            self._settle(effect)
            return False
        self.effect = effect
        self._begun = True
        self.effects.append(self.effect)
        if isinstance(self.effect, Wait):
            assert self.effect.parked
            self.effect.owner = self
            self.machine.under_way.pop(self, None)
            self.machine.waiting[self] = None
        else:
            self.machine.under_way[self] = None
        self.machine.look()
        return True

    def drive(self) -> Call:
        """Go on until it is done or parked."""
        while self.advance() and not self.parked:
            pass
        self.machine.resume()
        return self

    def wake(self, answer: int) -> Call:
        """Answer a parked call, and drive it on."""
        assert isinstance(self.effect, Wait)
        assert self.effect.parked
        if self.advance(answer):
            return self if self.parked else self.drive()
        self.machine.resume()
        return self

    def _settle(self, outcome: Outcome) -> None:
        """Do what the outcome says."""
        client = self.caller.client
        task = self.caller.task()
        if outcome.data:
            copied = client.memory.write(outcome.address, outcome.data)
            if copied < len(outcome.data):
                outcome = self.machine.conclude(client.process.undeliver(task, outcome, copied))
                assert not outcome.data
        if outcome.files:
            numbers = client.install(outcome)
            if numbers is None:
                for reference, _, _ in outcome.files:
                    reference.close()
                outcome = self.machine.conclude(client.process.install_failed(task, outcome))
                assert not outcome.files
                assert len(outcome.data) == client.memory.write(outcome.address, outcome.data)
            else:
                self.installed = numbers
                client.process.installed(task, numbers, outcome)
            self.machine.look()
        for fd in outcome.closes:
            client.close_fd(fd)
        self.outcome = outcome
        self.argument = outcome.argument
        if outcome.data or (outcome.stored and not outcome.error):
            # It stands in memory right before the end of what was read, and behind what was stored before.
            *_, consumed, buffer = uapi.binder_write_read.unpack(outcome.argument)
            assert outcome.address + len(outcome.data) == buffer + consumed
            self.data = client.memory.read(outcome.address - outcome.stored, outcome.stored + len(outcome.data))

    # -- results

    @property
    def parked(self) -> bool:
        """Whether it waits to be woken."""
        return self.outcome is None and isinstance(self.effect, Wait)

    @property
    def done(self) -> bool:
        """Whether it has returned."""
        return self.outcome is not None

    @property
    def error(self) -> int:
        """The ioctl's result."""
        assert self.outcome is not None
        return self.outcome.error

    @property
    def write_consumed(self) -> int:
        """How much of the commands was used."""
        return int(uapi.binder_write_read.unpack(self.argument)[1])

    @property
    def read_consumed(self) -> int:
        """How much was read, by the driver's word."""
        return int(uapi.binder_write_read.unpack(self.argument)[4])

    @property
    def returns(self) -> list[Return]:
        """What a read brought."""
        assert not self.parked
        return parse(self.data)

    @property
    def names(self) -> list[str]:
        """The names of what a read brought; without those of a parked one."""
        return [item.name for item in self.returns]

    @property
    def received(self) -> Received:
        """The transaction or reply that a read brought."""
        return self.returns[-1].received

    @property
    def body(self) -> bytes:
        """The data of the transaction or reply, as the client sees it."""
        return self.caller.client.see(self.received.buffer, self.received.data_size)


class Caller:
    """A thread of a client."""

    def __init__(self, client: Client, tid: int, euid: int = 0, nice: int = 0) -> None:
        self.client = client
        self.tid = tid
        self.euid = euid
        self.nice = nice
        self.nice_floor = -20
        self.scheduling: Scheduling = (0, 120)
        # Of a process that was handed the client's descriptor.
        self.pid_of_child: int | None = None

    def task(self) -> Task:
        """The thread as the engine is told of it."""
        return Task(self.tid, self.pid_of_child or self.client.pid, self.euid, self.nice, self.scheduling)

    # -- ioctls

    def begin(
        self,
        *commands: bytes,
        read: int = 0,
        into: int | None = None,
        nonblock: bool = False,
        fetched: bool = True,
        write_address: int | None = None,
        write_size: int | None = None,
        write_consumed: int = 0,
        read_consumed: int = 0,
    ) -> Call:
        """Make a BINDER_WRITE_READ, without driving it."""
        memory = self.client.memory
        stream = b"".join(commands)
        if write_address is None:
            write_address = memory.place(stream) if stream else 0
        if into is None:
            into = memory.room(read) if read else 0
        argument = uapi.binder_write_read.pack(
            len(stream) if write_size is None else write_size, write_consumed, write_address, read, read_consumed, into
        )
        return self.begin_ioctl(
            uapi.BINDER_WRITE_READ, argument, commands=stream if fetched else None, nonblock=nonblock
        )

    def begin_ioctl(
        self, number: int, argument: bytes = b"", *, commands: bytes | None = None, nonblock: bool = False
    ) -> Call:
        """Make any ioctl, without driving it."""
        argument += bytes(uapi.ioctl_size(number) - len(argument))
        step = self.client.process.ioctl(self.task(), number, argument, commands, nonblock=nonblock)
        return Call(self, step)

    def ioctl(self, number: int, argument: bytes = b"") -> Call:
        """Do any ioctl."""
        return self.begin_ioctl(number, argument).drive()

    def exchange(self, *commands: bytes, read: int = 256, **options: Any) -> Call:
        """Write commands and read."""
        return self.begin(*commands, read=read, **options).drive()

    def write(self, *commands: bytes, **options: Any) -> Call:
        """Write commands."""
        return self.begin(*commands, **options).drive()

    def do(self, number: int, *values: int) -> None:
        """Write one command, which succeeds."""
        call = self.write(command(number, *values))
        assert call.error == 0

    def read(self, size: int = 256, **options: Any) -> Call:
        """Read."""
        return self.begin(read=size, **options).drive()

    def news(self) -> list[str]:
        """Read without blocking: the names of what is there, BR_NOOP left out."""
        call = self.read(nonblock=True)
        if call.error == -errno.EAGAIN:
            return []
        assert call.error == 0
        return [name for name in call.names if name != "BR_NOOP"]

    def poll(self) -> int:
        """Poll."""
        events = self.client.process.poll(self.task())
        self.client.machine.look()
        return events

    # -- commands with data

    def transaction(
        self,
        handle: int = 0,
        content: Parcel | bytes = b"",
        *,
        code: int = 0,
        flags: int = 0,
        number: int | None = None,
        data_size: int | None = None,
        offsets_size: int | None = None,
        buffers_size: int | None = None,
        data_address: int | None = None,
        offsets_address: int | None = None,
        reply: bool = False,
    ) -> bytes:
        """Compose a BC_TRANSACTION, or BC_TRANSACTION_SG where there are buffers, with its data in memory."""
        memory = self.client.memory
        if isinstance(content, bytes):
            content = Parcel(bytearray(content))
        data = bytearray(content.data)
        for place, pointed, readable in content.pointed:
            data[place : place + 8] = memory.place(pointed, accessible=readable).to_bytes(8, "little")
        offsets = b"".join(offset.to_bytes(8, "little") for offset in content.offsets)
        if data_address is None:
            data_address = memory.place(bytes(data)) if data else 0
        if offsets_address is None:
            offsets_address = memory.place(offsets) if offsets else 0
        size = content.buffers_size if buffers_size is None else buffers_size
        if number is None:
            plain = uapi.BC_REPLY if reply else uapi.BC_TRANSACTION
            scattered = uapi.BC_REPLY_SG if reply else uapi.BC_TRANSACTION_SG
            number = scattered if size else plain
        payload = uapi.binder_transaction_data.pack(
            handle,
            0,
            code,
            flags,
            0,
            0,
            len(data) if data_size is None else data_size,
            len(offsets) if offsets_size is None else offsets_size,
            data_address,
            offsets_address,
        )
        if number in (uapi.BC_TRANSACTION_SG, uapi.BC_REPLY_SG):
            payload += size.to_bytes(8, "little")
        return number.to_bytes(4, "little") + payload

    def send(self, handle: int = 0, content: Parcel | bytes = b"", **options: Any) -> Call:
        """Send a transaction, without reading."""
        call = self.write(self.transaction(handle, content, **options))
        assert call.error == 0
        return call

    def call(self, handle: int = 0, content: Parcel | bytes = b"", **options: Any) -> Call:
        """Send a transaction and wait for the reply."""
        return self.exchange(self.transaction(handle, content, **options))

    def tell(self, handle: int = 0, content: Parcel | bytes = b"", *, flags: int = 0, **options: Any) -> Call:
        """Send a one-way transaction, and read what becomes of it."""
        return self.exchange(self.transaction(handle, content, flags=flags | uapi.TF_ONE_WAY, **options), nonblock=True)

    def reply(self, content: Parcel | bytes = b"", **options: Any) -> Call:
        """Reply, and read what becomes of it."""
        return self.exchange(self.transaction(0, content, reply=True, **options), nonblock=True)

    def exit(self) -> None:
        """End the thread, in the driver's eyes."""
        assert self.ioctl(uapi.BINDER_THREAD_EXIT).error == 0

    def extended_error(self) -> tuple[str, int]:
        """Read the name and the parameter of BINDER_GET_EXTENDED_ERROR."""
        _, number, parameter = uapi.binder_extended_error.unpack(self.ioctl(uapi.BINDER_GET_EXTENDED_ERROR).argument)
        return uapi.BR_NAMES[number], parameter

    def freeze(self, pid: int, *, enable: bool = True, timeout_ms: int = 0) -> Call:
        """Freeze or thaw a process."""
        return self.ioctl(uapi.BINDER_FREEZE, uapi.binder_freeze_info.pack(pid, enable, timeout_ms))


class Client(Caller):
    """A process that has opened a device, and its first thread."""

    def __init__(self, machine: Machine, context: Context, pid: int, euid: int, size: int, **options: Any) -> None:
        super().__init__(self, pid, euid)
        self.machine = machine
        self.pid = pid
        self.memory = Memory()
        self.region = MachineRegion(min(size, 4 * MIB))
        self.process = context.open(pid, euid, self.region, **options)
        self.mapping: tuple[int, int] | None = (0x7000_0000 + pid * 0x100_0000, size) if size else None
        self.fds: dict[int, MachineFile] = {}
        self.fd_limit = 1000
        self.open = True

    def thread(self, tid: int | None = None, *, fresh: bool = False, is_child: bool = False) -> Caller:
        """Make another thread, unless it is to be `fresh` one that has done its first ioctl already.

        One that `is_child` is that of a process forked off, and has the descriptor and the memory from there.
        """
        caller = Caller(self, self.machine.next_pid() if tid is None else tid, self.euid)
        if is_child:
            caller.pid_of_child = caller.tid
        if not fresh:
            caller.ioctl(uapi.BINDER_VERSION)
        return caller

    # -- descriptors

    def open_fd(self, name: str) -> int:
        """Open a file; its number."""
        return self._add(MachineFile(name))

    def _add(self, file: MachineFile) -> int:
        fd = next(number for number in range(3, 3 + len(self.fds) + 1) if number not in self.fds)
        self.fds[fd] = file
        file.holders += 1
        return fd

    def close_fd(self, fd: int) -> None:
        """Close a descriptor, if it is open."""
        file = self.fds.pop(fd, None)
        if file is not None:
            file.holders -= 1

    def install(self, outcome: Outcome) -> list[int] | None:
        """Install the descriptors of an outcome; their numbers, or None where there are too many."""
        if len(self.fds) + len(outcome.files) > self.fd_limit:
            return None
        numbers = []
        for reference, region, offset in outcome.files:
            assert isinstance(reference, FileReference)
            numbers.append(self._add(reference.file))
            region.store(offset, numbers[-1].to_bytes(4, "little"))
            reference.close()
        return numbers

    # -- the region

    def see(self, address: int, size: int) -> bytes:
        """Look at the region's bytes."""
        assert self.mapping is not None
        offset = address - self.mapping[0]
        assert 0 <= offset <= offset + size <= len(self.region.data)
        return bytes(self.region.data[offset : offset + size])

    def free(self, received: Received) -> None:
        """Free the buffer of a transaction or reply."""
        self.do(uapi.BC_FREE_BUFFER, received.buffer)

    def serve(self, **options: Any) -> Call:
        """Read a call and reply to it with nothing; the call as read."""
        call = self.read()
        self.free(call.received)
        self.reply(**options)
        return call

    # -- the end

    def flush(self) -> None:
        """Close one of several descriptors of the device."""
        self.machine.conclude(self.process.flush())
        self.machine.resume()

    def die(self) -> None:
        """End: what waits is interrupted, then the device is released."""
        if not self.open:
            return
        # Who has been woken already is not interrupted.
        self.machine.resume()
        for call in list(self.machine.waiting):
            if call.caller.client is self:
                call.wake(-errno.EINTR)
        assert not any(call.caller.client is self for call in self.machine.under_way)
        self.open = False
        self.machine.conclude(self.process.flush())
        self.machine.conclude(self.process.release())
        self.machine.resume()


class Machine:
    """One mount with its clients."""

    def __init__(self, **options: Any) -> None:
        self.now = 0
        self.engine = Engine(clock=lambda: self.now, **options)
        self.binder = self.engine.add_context("binder")
        self.clients: list[Client] = []
        self.label: bytes | int = -errno.EOPNOTSUPP
        self.poll = Poll()
        self.freed: list[Process] = []
        # Calls that are between two effects, and those that are parked.
        self.under_way: dict[Call, None] = {}
        self.waiting: dict[Call, None] = {}
        # Called with each effect before it is performed.
        self.before_effect: Callable[[Call, Effect], None] | None = None
        # Called at each turn of a step that asks for nothing else; how many such steps are at one.
        self.before_turn: Callable[[], None] | None = None
        self.turning = 0
        # Whether to check all invariants after every send.
        self.careful = True
        self._answers: list[tuple[type, Any, int]] = []
        self._last_pid = 99
        self._files: list[FileReference] = []

    def next_pid(self) -> int:
        """Return a number for a new process or thread."""
        self._last_pid += 1
        return self._last_pid

    def client(
        self,
        *,
        context: Context | None = None,
        pid: int | None = None,
        euid: int = 0,
        size: int = MIB,
        fresh: bool = False,
        **options: Any,
    ) -> Client:
        """Make a process that opens and maps the device; `size` 0 for one that does not map it.

        Unless `fresh`, its thread has done an ioctl: the first one of a thread never waits.
        """
        client = Client(self, context or self.binder, pid or self.next_pid(), euid, size, **options)
        self.clients.append(client)
        self.look()
        if not fresh:
            client.ioctl(uapi.BINDER_VERSION)
        return client

    def manager(self, *, flags: int = uapi.FLAT_BINDER_FLAG_ACCEPTS_FDS, **options: Any) -> Client:
        """Make a process that is context manager and loops."""
        manager = self.client(**options)
        object_ = uapi.flat_binder_object.pack(uapi.BINDER_TYPE_BINDER, flags, 0, 0)
        assert manager.ioctl(uapi.BINDER_SET_CONTEXT_MGR_EXT, object_).error == 0
        manager.do(uapi.BC_ENTER_LOOPER)
        return manager

    def pair(self) -> tuple[Client, Client]:
        """Make a context manager and a client."""
        return self.manager(), self.client()

    def share(self, owner: Client, manager: Client, ptr: int = 0x1000, cookie: int = 0x2000, flags: int = 0) -> int:
        """Let the manager hold a strong reference to an object of the owner; its handle there."""
        owner.tell(0, Parcel().binder(ptr, cookie, flags))
        call = manager.read(nonblock=True)
        _, _, handle, _ = uapi.flat_binder_object_handle.unpack(call.body)
        manager.do(uapi.BC_ACQUIRE, handle)
        manager.free(call.received)
        owner.do(uapi.BC_INCREFS_DONE, ptr, cookie)
        owner.do(uapi.BC_ACQUIRE_DONE, ptr, cookie)
        return int(handle)

    def grant(self, manager: Client, client: Client, ptr: int = 0x10, cookie: int = 0x20, flags: int = 0) -> int:
        """Let a client hold a strong reference to an object of the manager; its handle there."""
        handle = self.pass_on(manager, client, Parcel().binder(ptr, cookie, flags))
        manager.do(uapi.BC_INCREFS_DONE, ptr, cookie)
        manager.do(uapi.BC_ACQUIRE_DONE, ptr, cookie)
        return handle

    def pass_on(self, manager: Client, client: Client, content: Parcel) -> int:
        """Let a client take the object that the manager replies with, and hold it; its handle there."""
        call = client.call()
        request = manager.read(nonblock=True)
        manager.reply(content)
        manager.free(request.received)
        _, _, handle, _ = uapi.flat_binder_object_handle.unpack(call.body)
        client.do(uapi.BC_ACQUIRE, handle)
        client.free(call.received)
        return int(handle)

    def failure(self) -> tuple[str, int, int]:
        """Return what, why and at which of the driver's lines the last transaction failed that did."""
        entry = self.engine.failed_transaction_log[-1]
        return uapi.BR_NAMES[entry.return_error], entry.return_error_parameter, entry.return_error_line

    # -- effects

    def answer(self, effect: type, value: Any, *, skip: int = 0) -> None:
        """Give the next effect of a type (after `skip` of them) this answer, in place of performing it."""
        self._answers.append((effect, value, skip))

    def perform(self, call: Call, effect: Effect) -> Any:
        """Carry out an effect for the calling thread."""
        hook, self.before_effect = self.before_effect, None
        if hook is not None:
            hook(call, effect)
            self.before_effect = hook
        for index, (kind, value, skip) in enumerate(self._answers):
            if isinstance(effect, kind):
                if skip:
                    self._answers[index] = (kind, value, skip - 1)
                    break
                del self._answers[index]
                return value
        return self._perform(call.caller, effect)

    def _perform(self, caller: Caller, effect: Effect) -> Any:
        client = caller.client
        match effect:
            case CopyIn():
                return client.memory.read(effect.address, effect.size)
            case CopyOut():
                return client.memory.write(effect.address, effect.data)
            case CopyToBuffer():
                data = client.memory.read(effect.address, effect.size)
                effect.region.store(effect.offset, data)
                return len(data)
            case FindMapping():
                return next(other.mapping for other in self.clients if other.process is effect.process)
            case Populate():
                assert isinstance(effect.region, MachineRegion)
                assert effect.offset % PAGE == effect.size % PAGE == 0
                first = effect.offset // PAGE
                effect.region.present.update(range(first, first + effect.size // PAGE))
                return 0
            case GetFile():
                file = client.fds.get(effect.fd)
                if file is None:
                    return -errno.EBADF
                self._files.append(FileReference(file))
                return self._files[-1]
            case FindRoom():
                return 0 if len(client.fds) + effect.count <= client.fd_limit else -errno.EMFILE
            case GetSecurityContext():
                return self.label
            case SetNice():
                assert -20 <= effect.nice <= 19
                caller.nice = max(caller.nice_floor, effect.nice)
                return caller.nice
            case Turn():
                return None
        assert isinstance(effect, SetScheduling)
        caller.scheduling = effect.scheduling
        return caller.scheduling

    # -- what goes on by itself

    def conclude(self, step: Step) -> Outcome:
        """Drive a step that asks for nothing but turns, and let happen at each what is to happen then."""
        outcome = conclude(step, self._turn)
        self.look()
        return outcome

    def _turn(self) -> None:
        self.turning += 1
        self.look()
        hook, self.before_turn = self.before_turn, None
        if hook is not None:
            hook()
            self.before_turn = hook
        self.turning -= 1

    def look(self) -> None:
        """Check the engine's invariants, and take what it has for the shell except for waits."""
        engine = self.engine
        if self.careful:
            check(engine, quiet=not (self.under_way or self.turning or engine.ready))
        self.poll.woken += engine.poll_ready
        engine.poll_ready.clear()
        for process in engine.freed:
            assert process not in self.freed
            self.freed.append(process)
            assert isinstance(process.region, MachineRegion)
            process.region.freed = True
        engine.freed.clear()

    def resume(self) -> None:
        """Drive on what has become ready."""
        while self.engine.ready:
            wait = self.engine.ready.pop(0)
            call = wait.owner
            assert isinstance(call, Call)
            assert call.effect is wait
            going = call.advance(0)
            while going and not call.parked:
                going = call.advance()

    def shut_down(self) -> None:
        """Let everybody close everything; nothing may be left."""
        for client in self.clients:
            client.die()
        counters = self.engine.stats

        assert {} == self.engine.processes
        assert {} == self.engine.dead_nodes
        assert dict(zip(stats.OBJECTS, counters.created, strict=True)) == dict(
            zip(stats.OBJECTS, counters.deleted, strict=True)
        )
        assert {client.process for client in self.clients} == set(self.freed)
        assert [] == [reference.file.name for reference in self._files if reference.held]
