"""Plays scenarios on the engine alone: client memory simulated, the same transcript as the player in C.

Theory of operation
-------------------
A `World` has one engine and the scenario's processes, each with memory, descriptors and threads that are mere
names. A step becomes an engine step (a generator), driven until it returns or parks; a parked one stays with its
thread until the engine names its `Wait` as ready, and is then driven on after the step that caused it. So
everything happens in one thread, in one order.

What the kernel or the mount does and the engine never sees is imitated as far as scenarios look at it: the rules of
mmap, descriptor numbers, `poll`'s waiting, copying an ioctl's argument in and out.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
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
    Task,
    Turn,
    Wait,
    conclude,
)
from binderfs_fuse.engine.freeze import ERESTARTSYS
from tests.conformance.compose import Composer, text_bytes
from tests.conformance.logs import normalised
from tests.conformance.report import Label, Reporter, error_name, quoted, return_name
from tests.conformance.scenario import Scenario, Step, number, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from tests.conformance.scenario import Line

    # What a finished step says.
    Finish = Callable[[Outcome], list[str]]

PAGE: Final = 4096
_FIONBIO: Final = 0x5421
_UNTOUCHED: Final = 0xEE
_MAX_READ: Final = 1 << 20
_MAX_REGION: Final = 4 << 20
# A freeze with a shorter time limit is waited for: it ends by itself.
_SHORT_MS: Final = 1000

# ioctl: sizes of the values that a step gives.
_SHAPES: Final = {
    "BINDER_SET_IDLE_TIMEOUT": "8",
    "BINDER_SET_MAX_THREADS": "4",
    "BINDER_SET_IDLE_PRIORITY": "4",
    "BINDER_SET_CONTEXT_MGR": "4",
    "BINDER_THREAD_EXIT": "4",
    "BINDER_GET_NODE_DEBUG_INFO": "8",
    "BINDER_GET_NODE_INFO_FOR_REF": "44444",
    "BINDER_SET_CONTEXT_MGR_EXT": "4488",
    "BINDER_FREEZE": "444",
    "BINDER_GET_FROZEN_INFO": "4",
    "BINDER_ENABLE_ONEWAY_SPAM_DETECTION": "4",
}


class RegionMemory:
    """A receive region of bytes, with the pages that were made present."""

    def __init__(self) -> None:
        # As large as it is mapped.
        self.data = bytearray()
        self.present: set[int] = set()

    def store(self, offset: int, data: bytes | bytearray) -> None:
        """Put `data` at `offset`."""
        assert offset + len(data) <= len(self.data)
        self.data[offset : offset + len(data)] = data


@dataclass
class OpenFile:
    """What descriptors refer to: a device that is open, or a file with content."""

    holders: int = 0
    content: bytes = b""
    process: Process | None = None
    region: RegionMemory | None = None
    nonblock: bool = False
    mapped_once: bool = False


class FileReference:
    """The engine's hold on an open file."""

    def __init__(self, world: World, file: OpenFile) -> None:
        self._world = world
        self.file = file
        file.holders += 1

    def close(self) -> None:
        """Let go of it."""
        self._world.drop(self.file)


@dataclass
class Parked:
    """A step that is blocked: what to resume, and what to say when it is done."""

    step: Generator[Any, Any, None] | None
    wait: Wait | None
    finish: Callable[[Outcome], list[str]]


@dataclass
class Actor:
    """A thread."""

    name: str
    owner: SimulatedProcess
    tid: int
    euid: int = 0
    nice: int = 0
    last: Label = field(default_factory=Label)
    parked: Parked | None = None
    # A poll without end, by the device it waits for, and what it says when that is ready.
    polling: tuple[OpenFile, str] | None = None


class SimulatedProcess:
    """A process: memory, descriptors by number, and names for those of devices."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.present = True
        # The second is whether it is closed on exec. The first three descriptors are nobody's business.
        self.fds: dict[int, tuple[OpenFile, bool]] = {number: (OpenFile(holders=1), False) for number in range(3)}
        self.named: dict[str, int] = {}
        self.maps: dict[str, tuple[OpenFile, int, int]] = {}
        self.received = 0
        self.blocks: list[tuple[int, bytearray, int]] = []
        self.next_address = 0x7000_0000_0000
        self.room_for_fds = 1 << 20
        self.epoll: dict[int, bool] = {}  # descriptor: may be ready
        self.forbidden = self.reserve(PAGE)

    def reserve(self, size: int) -> int:
        """Take addresses with a hole behind them."""
        address = self.next_address
        self.next_address += (size + 2 * PAGE) & ~(PAGE - 1)
        return address

    def _find(self, address: int) -> tuple[bytearray, int, int] | None:
        """Return the block around an address: its bytes, the offset in it, and how far it goes."""
        for start, data, reach in self.blocks:
            if start <= address < start + reach:
                return data, address - start, reach
        for file, start, size in self.maps.values():
            if start <= address < start + size and file.region is not None:
                offset = address - start
                end = offset
                while end < min(size, len(file.region.data)) and end // PAGE in file.region.present:
                    end = (end // PAGE + 1) * PAGE
                return file.region.data, offset, end
        return None

    def read(self, address: int, size: int) -> bytes:
        """Read memory up to the first fault."""
        found = self._find(address)
        if found is None:
            return b""
        data, offset, end = found
        return bytes(data[offset : min(end, offset + size)])

    def write(self, address: int, content: bytes | bytearray) -> int:
        """Write memory up to the first fault; the bytes written."""
        for start, data, reach in self.blocks:
            if start <= address < start + reach:
                size = min(len(content), start + reach - address)
                data[address - start : address - start + size] = content[:size]
                return size
        return 0

    def lowest_fd(self) -> int:
        """Return the descriptor number that the kernel would give."""
        fd = 3
        while fd in self.fds:
            fd += 1
        return fd


class World:
    """Everything that one scenario plays with."""

    def __init__(self, text: str) -> None:
        self.scenario: Scenario = parse(text)
        self.engine = Engine(clock=self._clock)
        self._now = 0
        self.label: bytes | None = b"kernel" if "lsm=selinux" in text else None
        self.labels: dict[str, Label] = {}
        self.processes: dict[str, SimulatedProcess] = {}
        self.actors: dict[str, Actor] = {}
        self._calling: dict[str, Process] = {}
        self._next_pid = 100
        for name in ("binder", "hwbinder", "vndbinder"):
            self.engine.add_context(name)
        forked = {
            step.line.words[2]
            for step in self.scenario.steps
            if step.actor is not None and step.line.words[1] == "fork"
        }
        for name in self.scenario.processes:
            if name not in forked:
                self.start(name)

    def _clock(self) -> int:
        self._now += 1
        return self._now

    def start(self, name: str) -> SimulatedProcess:
        """Make a process with its threads."""
        process = self.processes[name] = SimulatedProcess(name, self._next_pid)
        self._next_pid += 1
        for actor, owner in self.scenario.actors.items():
            if owner == name:
                tid = process.pid if actor == name else self._next_pid
                if actor != name:
                    self._next_pid += 1
                self.actors[actor] = Actor(actor, process, tid)
        return process

    def process_name(self, pid: int) -> str:
        """Return the name of a process, "?" for none of the scenario's."""
        if not pid:
            return "0"
        return next((process.name for process in self.processes.values() if process.pid == pid), "?")

    def thread_name(self, tid: int) -> str:
        """Return the name of a thread."""
        if not tid:
            return "0"
        return next((actor.name for actor in self.actors.values() if actor.tid == tid), "?")

    # -- files

    def drop(self, file: OpenFile) -> None:
        """Let one holder of an open file go; the last one releases the device."""
        file.holders -= 1
        if not file.holders and file.process is not None:
            process, file.process = file.process, None
            conclude(process.release(), _turn)

    def close(self, process: SimulatedProcess, fd: int) -> None:
        """Close a descriptor."""
        file, _ = process.fds.pop(fd)
        process.epoll.pop(fd, None)
        if file.process is not None:
            conclude(file.process.flush(), _turn)
        self.drop(file)

    # -- the shell's part

    def drive(self, actor: Actor, step: Generator[Any, Any, None], answer: Any, finish: Finish) -> list[str] | None:
        """Run a step until it is done (what it says), or parks (None)."""
        while True:
            effect = step.send(answer)
            if isinstance(effect, Outcome):
                actor.parked = None
                if effect.error == -ERESTARTSYS:
                    # What the kernel makes of it where the signal's action does not say to try again.
                    effect.error = -errno.EINTR
                return finish(self.settle(actor, effect))
            if isinstance(effect, Wait):
                effect.owner = actor
                actor.parked = Parked(step, effect, finish)
                return None
            answer = self.perform(actor, effect)

    def perform(self, actor: Actor, effect: object) -> Any:
        """Carry out an effect for the calling thread."""
        owner = actor.owner
        if isinstance(effect, CopyIn):
            return owner.read(effect.address, effect.size)
        if isinstance(effect, CopyOut):
            return owner.write(effect.address, effect.data)
        if isinstance(effect, CopyToBuffer):
            data = owner.read(effect.address, effect.size)
            effect.region.store(effect.offset, data)
            return len(data)
        if isinstance(effect, FindMapping):
            return self.mapping(effect.process)
        if isinstance(effect, Populate):
            assert isinstance(effect.region, RegionMemory)
            first = effect.offset // PAGE
            effect.region.present.update(range(first, first + (effect.size + PAGE - 1) // PAGE))
            return 0
        if isinstance(effect, GetFile):
            held = owner.fds.get(effect.fd)
            return FileReference(self, held[0]) if held is not None else -errno.EBADF
        if isinstance(effect, FindRoom):
            return 0 if effect.count <= owner.room_for_fds else -errno.EMFILE
        if isinstance(effect, GetSecurityContext):
            return self.label if self.label is not None else -errno.EOPNOTSUPP
        if isinstance(effect, Turn):
            return None
        assert isinstance(effect, SetNice)
        actor.nice = effect.nice
        return effect.nice

    def mapping(self, process: Process) -> tuple[int, int] | None:
        """Find where the process has mapped its device."""
        for simulated in self.processes.values():
            for file, start, size in simulated.maps.values():
                if file.process is process:
                    return start, size
        return None

    def settle(self, actor: Actor, outcome: Outcome) -> Outcome:
        """Do what an outcome tells the shell to do; the outcome that holds in the end."""
        owner = actor.owner
        device = self._calling[actor.name]
        task = self.task(actor)
        if outcome.data:
            copied = owner.write(outcome.address, outcome.data)
            if copied < len(outcome.data):
                outcome = conclude(device.undeliver(task, outcome, copied), _turn)
                assert not outcome.data
        numbers = []
        for reference, region, offset in outcome.files:
            assert isinstance(reference, FileReference)
            fd = owner.lowest_fd()
            owner.fds[fd] = (reference.file, True)
            region.store(offset, fd.to_bytes(4, "little"))
            numbers.append(fd)
            owner.room_for_fds -= 1
        if numbers:
            device.installed(task, numbers, outcome)
        for fd in outcome.closes:
            if fd in owner.fds:
                self.close(owner, fd)
        return outcome

    def task(self, actor: Actor) -> Task:
        """Return the calling thread as the engine knows it."""
        return Task(actor.tid, actor.owner.pid, actor.euid, actor.nice)

    def call(self, actor: Actor, file: OpenFile, command: int, argument: bytes, finish: Finish) -> list[str] | None:
        """Do an ioctl."""
        process = file.process
        assert process is not None
        self._calling[actor.name] = process
        step = process.ioctl(self.task(actor), command, argument, nonblock=file.nonblock)
        return self.drive(actor, step, None, finish)

    # -- the coordinator

    def resume(self) -> dict[str, list[str]]:
        """Drive on what the last step has made ready; what each actor then says, in the scenario's order."""
        said: dict[str, list[str]] = {}
        while self.engine.ready or self.engine.poll_ready:
            for wait in self.engine.ready[:]:
                self.engine.ready.remove(wait)
                actor = wait.owner
                parked = actor.parked
                if parked is None or parked.wait is not wait:
                    continue
                lines = self.drive(actor, parked.step, 0, parked.finish)
                if lines is not None:
                    said[actor.name] = lines
            for process in list(self.engine.poll_ready):
                del self.engine.poll_ready[process]
                self._wake_pollers(process, said)
        # As the other player has them; `actors` is by process.
        return {name: said[name] for name in self.scenario.actors if name in said}

    def _wake_pollers(self, process: Process, said: dict[str, list[str]]) -> None:
        for simulated in self.processes.values():
            for fd in simulated.epoll:
                if fd in simulated.fds and simulated.fds[fd][0].process is process:
                    simulated.epoll[fd] = True
        for actor in self.actors.values():
            if actor.polling is None or actor.polling[0].process is not process:
                continue
            if process.poll(self.task(actor)):
                said[actor.name] = [actor.polling[1]]
                actor.polling = None

    def end(self, process: SimulatedProcess) -> None:
        """Let a process end: its waits are interrupted, its descriptors closed."""
        process.present = False
        for actor in self.actors.values():
            if actor.owner is not process:
                continue
            actor.polling = None
            if actor.parked is not None:
                parked, actor.parked = actor.parked, None
                assert parked.step is not None
                assert parked.wait is not None
                parked.wait.parked = False
                self.drive(actor, parked.step, -errno.EINTR, lambda _: [])
        while process.maps:
            self.drop(process.maps.popitem()[1][0])
        for fd in sorted(process.fds):
            self.close(process, fd)

    def show(self, words: list[str]) -> list[str]:
        """Return a log's lines."""
        logs = self.engine.logs
        for process in self.engine.processes:
            mapping = self.mapping(process)
            if mapping is not None:
                process.map(*mapping)
        if words[0] == "proc":
            shown = self.processes.get(words[1])
            text = "".join(logs.proc(shown.pid)) if shown is not None and shown.present else ""
            if not text:
                return ["not there"]
        else:
            text = {
                "state": lambda: "".join(logs.state()),
                "stats": lambda: "".join(logs.stats()),
                "transactions": lambda: "".join(logs.transactions()),
                "transaction_log": lambda: "".join(logs.transaction_log()),
                "failed_transaction_log": lambda: "".join(logs.transaction_log(failed=True)),
            }[words[0]]()
        return [normalised(line, self.process_name, self.thread_name) for line in text.splitlines()]

    def coordinate(self, line: Line) -> list[str]:
        """Do a step of the coordinator's own."""
        verb, name = line.words[:2]
        if verb == "show":
            return self.show(line.words[1:])
        if verb == "kill":
            process = self.processes.get(name)
            if process is None or not process.present:
                return ["not there"]
            self.end(process)
            return ["0"]
        actor = self.actors.get(name)
        if actor is None or not actor.owner.present:
            return ["not there"]
        if actor.polling is not None:
            # The kernel looks once more before it gives up.
            (file, ready), actor.polling = actor.polling, None
            assert file.process is not None
            there = file.process.poll(self.task(actor))
            return ["0", f"{name} goes on:", "    " + (ready if there else "EINTR")]
        if actor.parked is not None:
            parked = actor.parked
            assert parked.wait is not None
            if parked.wait.parked:
                parked.wait.parked = False
                lines = self.drive(actor, parked.step, -errno.EINTR, parked.finish)  # type: ignore[arg-type]
                if lines is not None:
                    return ["0", f"{name} goes on:", *("    " + line for line in lines)]
        return ["0"]

    def play_step(self, step: Step) -> list[str]:
        """Do one step; the lines of its result."""
        if step.actor is None:
            lines = self.coordinate(step.line)
        elif (actor := self.actors.get(step.actor)) is None or not actor.owner.present:
            return ["not there"]
        elif actor.parked is not None or actor.polling is not None:
            return ["busy"]
        else:
            done = Performer(self, actor, step.line).perform()
            said = self.resume()
            # Whom it has woken may have woken it in turn, before anybody could say that it blocks.
            lines = said.pop(step.actor, ["blocks"]) if done is None else done
            return lines + _going_on(said)
        return lines + _going_on(self.resume())


def _turn() -> None:
    """Nobody else is there to have the lock."""


def _going_on(said: dict[str, list[str]]) -> list[str]:
    return [line for name, lines in said.items() for line in (f"{name} goes on:", *("    " + line for line in lines))]


class Performer:
    """Does one step of one thread."""

    def __init__(self, world: World, actor: Actor, line: Line) -> None:
        self.world = world
        self.actor = actor
        self.owner = actor.owner
        self.line = line
        self.words = line.positional(2)

    # -- values, as composing and reporting want them

    def _term(self, word: str) -> int:
        value = number(word)
        if value is not None:
            return value
        if word in self.world.scenario.lets:
            return self.world.scenario.lets[word]
        if word == "bad":
            return self.owner.forbidden
        if word == "map" or word.startswith("map:"):
            maps = self.owner.maps
            name = word[4:] or ("binder" if "binder" in maps else next(iter(maps), ""))
            return maps[name][1] if name in maps else 0
        if word == "buffer":
            return self.actor.last.buffer
        known = getattr(uapi, word, None)
        if isinstance(known, int):
            return known
        first, _, part = word.partition(".")
        if first == "pid":
            process = self.world.processes.get(part)
            return process.pid if process is not None else 0
        if first == "fd":
            return self.owner.named.get(part, 0xFFFF_FFFF)
        label = self.actor.last if first == "last" else self.world.labels.get(first)
        if not part:
            raise ValueError(f"{word}: what is that?")
        if label is None:
            return 0
        if part in ("buffer", "ptr", "cookie"):
            return int(getattr(label, part))
        for name, values, missing in (("handle", label.handles, 0), ("fd", label.fds, 0xFFFF_FFFF)):
            if part.startswith(name):
                index = int(part[len(name) :] or "1") - 1
                return values[index] if 0 <= index < len(values) else missing
        return 0

    def evaluate(self, expression: str) -> int:
        """Return the value of TERM, TERM+TERM, TERM-TERM or TERM|TERM."""
        value = number(expression)
        if value is not None:
            return value & 0xFFFF_FFFF_FFFF_FFFF
        value = 0
        operation = "+"
        start = 0
        for end in range(1, len(expression) + 1):
            at_end = end == len(expression)
            if not at_end:
                character = expression[end]
                minus = character == "-" and expression[end + 1 : end + 2].isdigit()
                if character not in "+|" and not minus:
                    continue
            term = self._term(expression[start:end])
            value = {"+": value + term, "-": value - term, "|": value | term}[operation]
            if not at_end:
                operation = expression[end]
                start = end + 1
        return value & 0xFFFF_FFFF_FFFF_FFFF

    def place(self, data: bytes, reach: int) -> int:
        """Put bytes into the process's memory."""
        address = self.owner.reserve(len(data) + 8)
        limited = 0 <= reach <= len(data)
        self.owner.blocks.append((address, bytearray(data) + bytes(8), reach if limited else len(data) + 8))
        return address

    def fetch(self, address: int, size: int) -> bytes | None:
        """Read own memory."""
        data = self.owner.read(address, size) if size else b""
        return data if len(data) == size else None

    def address_name(self, address: int) -> str:
        """Return map+N for an address in a mapping of the device."""
        for name, (_, start, size) in self.owner.maps.items():
            if start <= address < start + size:
                return f"map{'' if name == 'binder' else ':' + name}+0x{address - start:x}"
        return "nowhere" if address else "0"

    def process_name(self, pid: int) -> str:
        """Return the name of a process."""
        return self.world.process_name(pid)

    def received_fd(self, fd: int) -> int:
        """Count a received descriptor."""
        del fd
        self.owner.received += 1
        return self.owner.received

    def _option(self, key: str, otherwise: int) -> int:
        value = self.line.option(key)
        return otherwise if value is None else self.evaluate(value)

    def _operand(self, index: int, otherwise: int = 0) -> int:
        return self.evaluate(self.words[index]) if index < len(self.words) else otherwise

    # -- descriptors

    def _device(self, name: str | None) -> tuple[int, OpenFile] | None:
        """Find a descriptor by name; without, the one called binder, or else the first device."""
        named = self.owner.named
        if name is None and "binder" not in named:
            devices = [fd for fd in named.values() if self.owner.fds[fd][0].region is not None]
            fd = devices[0] if devices else None
        else:
            fd = named.get(name or "binder")
        return None if fd is None else (fd, self.owner.fds[fd][0])

    def perform(self) -> list[str] | None:
        """Do the step: what it says, or None when it blocks."""
        verb = self.line.words[1]
        free = getattr(self, "_do_" + verb, None)
        if free is not None:
            done: list[str] | None = free()
            return done
        device = self._device(self.line.option("on"))
        if device is None:
            return ["no descriptor"]
        result: list[str] | None = getattr(self, "_on_" + verb)(*device)
        return result

    def _open(self, device: str) -> tuple[int, OpenFile]:
        file = OpenFile(holders=1, nonblock=self.line.option("nonblock") is not None)
        file.region = RegionMemory()
        context = self.world.engine.contexts[device]
        file.process = context.open(self.owner.pid, self.actor.euid, file.region, nice=self.actor.nice)
        fd = self.owner.lowest_fd()
        self.owner.fds[fd] = (file, True)
        self.owner.named[self.line.option("as") or device] = fd
        return fd, file

    def _do_open(self) -> list[str]:
        self._open(self.words[0] if self.words else "binder")
        return ["0"]

    def _map(self, name: str, file: OpenFile, size: int) -> str:
        """The rules of binder's mmap, which on a mount are the kernel's and the region's."""
        if self.line.option("prot") == "rw":
            return "EPERM"
        assert file.process is not None
        if self.owner.pid != file.process.pid:
            return "EINVAL"
        if file.mapped_once:
            return "EBUSY"
        file.mapped_once = True
        file.holders += 1
        size = (size + PAGE - 1) & ~(PAGE - 1)
        assert file.region is not None
        file.region.data = bytearray(min(size, _MAX_REGION))
        self.owner.maps[name] = (file, self.owner.reserve(size), size)
        return "0"

    def _name_of(self, fd: int) -> str:
        return next(name for name, known in self.owner.named.items() if known == fd)

    def _on_mmap(self, fd: int, file: OpenFile) -> list[str]:
        return [self._map(self._name_of(fd), file, self._operand(0))]

    def _do_join(self, *, serve: bool = False) -> list[str] | None:
        fd, file = self._open(self.words[0] if self.words else "binder")
        result = self._map(self._name_of(fd), file, self._option("map", 1 << 20))
        if result != "0" or not serve:
            return [result]

        def entered(outcome: Outcome) -> list[str]:
            return [error_name(-outcome.error)]

        def became(outcome: Outcome) -> list[str]:
            if outcome.error:
                return [error_name(-outcome.error)]
            commands = self.place(uapi.BC_ENTER_LOOPER.to_bytes(4, "little"), -1)
            argument = uapi.binder_write_read.pack(4, 0, commands, 0, 0, 0)
            done = self.world.call(self.actor, file, uapi.BINDER_WRITE_READ, argument, entered)
            assert done is not None
            return done

        return self.world.call(self.actor, file, uapi.BINDER_SET_CONTEXT_MGR, bytes(4), became)

    def _do_serve(self) -> list[str] | None:
        return self._do_join(serve=True)

    def _do_munmap(self) -> list[str]:
        maps = self.owner.maps
        name = self.line.option("on") or ("binder" if "binder" in maps else next(iter(maps), ""))
        if name not in maps:
            return ["no mapping"]
        self.world.drop(self.owner.maps.pop(name)[0])
        return ["0"]

    def _on_close(self, fd: int, file: OpenFile) -> list[str]:
        del file
        if self.words:
            if self.words[0] not in self.owner.named:
                return ["no descriptor"]
            fd = self.owner.named[self.words[0]]
        name = self._name_of(fd)
        self.world.close(self.owner, fd)
        del self.owner.named[name]
        return ["0"]

    def _on_dup(self, fd: int, file: OpenFile) -> list[str]:
        del fd
        copy = self.owner.lowest_fd()
        file.holders += 1
        self.owner.fds[copy] = (file, True)
        self.owner.named[self.words[0]] = copy
        return ["0"]

    def _do_memfd(self) -> list[str]:
        fd = self.owner.lowest_fd()
        self.owner.fds[fd] = (OpenFile(holders=1, content=text_bytes(self.words[1])), True)
        self.owner.named[self.words[0]] = fd
        return ["0"]

    def _do_content(self) -> list[str]:
        held = self.owner.fds.get(self._operand(0))
        return [quoted(held[0].content) if held is not None else "EBADF"]

    def _do_isopen(self) -> list[str]:
        held = self.owner.fds.get(self._operand(0))
        if held is None:
            return ["closed"]
        return ["open, close-on-exec" if held[1] else "open"]

    def _do_closefd(self) -> list[str]:
        fd = self._operand(0)
        if fd not in self.owner.fds:
            return ["EBADF"]
        self.world.close(self.owner, fd)
        self.owner.room_for_fds += 1
        return ["0"]

    def _do_nofile(self) -> list[str]:
        self.owner.room_for_fds = self._operand(0)
        return ["0"]

    def _do_peek(self) -> list[str]:
        data = self.owner.read(self._operand(0), self._operand(1))
        return [quoted(data) if data else "EFAULT"]

    def _on_nonblock(self, fd: int, file: OpenFile) -> list[str]:
        del fd
        file.nonblock = self.words[0] == "on"
        return ["0"]

    # -- the thread and the process

    def _do_seteuid(self) -> list[str]:
        self.actor.euid = self._operand(0)
        return ["0"]

    def _do_setnice(self) -> list[str]:
        value = self._operand(0)
        self.actor.nice = value - (1 << 64) if value >> 63 else value
        return ["0"]

    def _do_nice(self) -> list[str]:
        return [str(self.actor.nice)]

    def _do_exit(self) -> list[str]:
        self.world.end(self.owner)
        return ["0"]

    def _do_fork(self) -> list[str]:
        child = self.world.start(self.words[0])
        child.fds = dict(self.owner.fds)
        child.named = dict(self.owner.named)
        child.blocks = list(self.owner.blocks)
        child.next_address = self.owner.next_address
        for file, _ in child.fds.values():
            file.holders += 1
        return ["0"]

    # -- poll

    def _on_poll(self, fd: int, file: OpenFile) -> list[str] | None:
        del fd
        assert file.process is not None
        if file.process.poll(self.world.task(self.actor)):
            return ["POLLIN"]
        if self.words == ["forever"]:
            self.actor.polling = (file, "POLLIN")
            return None
        return ["nothing"]

    def _on_epoll(self, fd: int, file: OpenFile) -> list[str] | None:
        assert file.process is not None
        task = self.world.task(self.actor)
        if self.words[0] == "add":
            self.owner.epoll[fd] = bool(file.process.poll(task))
            return ["0"]
        for candidate, ready in self.owner.epoll.items():
            polled = self.owner.fds[candidate][0].process
            if ready and polled is not None and polled.poll(task):
                return ["EPOLLIN"]
            self.owner.epoll[candidate] = False
        if len(self.words) > 1:
            self.actor.polling = (file, "EPOLLIN")
            return None
        return ["nothing"]

    # -- ioctls

    def _write_read(self, file: OpenFile, commands: list[Line], read_size: int | None) -> list[str] | None:
        writes = self.line.words[1] != "read"
        write = (0, 0, 0)
        if writes:
            out = Composer(self).commands(commands)
            address = self.place(out, self._option("reach", -1))
            write = (self._option("size", len(out)), self._option("wrote", 0), self._option("address", address))
        read = (0, 0, 0)
        room = 0
        if read_size is not None:
            room = min(read_size, _MAX_READ)
            address = self.place(bytes([_UNTOUCHED]) * room, self._option("room", -1))
            read = (read_size, self._option("read", 0), self._option("into", address))

        def finish(outcome: Outcome) -> list[str]:
            write_consumed, read_consumed = write[1], read[1]
            if outcome.argument:
                _, write_consumed, _, _, read_consumed, _ = uapi.binder_write_read.unpack(outcome.argument)
            text = error_name(-outcome.error)
            if writes:
                text += f" wrote {write_consumed}"
                if write_consumed != write[0]:
                    text += f" of {write[0]}"
            if read_size is None:
                return [text]
            text += f" read {read_consumed}"
            lines = [text]
            if self.line.option("into") is None and read_consumed <= room:
                lines += self._returns(read[2], read[1], read_consumed)
            return lines

        return self.world.call(
            self.actor, file, uapi.BINDER_WRITE_READ, uapi.binder_write_read.pack(*write, *read), finish
        )

    def _returns(self, address: int, start: int, end: int) -> list[str]:
        name = self.line.option("as")
        label = Label()
        reporter = Reporter(self, label)
        lines: list[str] = []
        if start >= 4 and end >= 4:
            first = self.owner.read(address, 4)
            if first != bytes([_UNTOUCHED]) * 4:
                lines += reporter.returns(first)
        if end > start:
            lines += reporter.returns(self.owner.read(address + start, end - start))
        if reporter.got_transaction:
            self.actor.last = label
            if name is not None:
                self.world.labels[name] = label
        return lines

    def _on_write(self, fd: int, file: OpenFile) -> list[str] | None:
        del fd
        skip = 2
        while skip < len(self.line.words) and "=" in self.line.words[skip]:
            skip += 1
        commands = self.line.children
        if skip < len(self.line.words):
            commands = [type(self.line)(0, self.line.words[skip:], self.line.children)]
        return self._write_read(file, commands, None)

    def _on_read(self, fd: int, file: OpenFile) -> list[str] | None:
        del fd
        return self._write_read(file, [], self._operand(0, 256))

    def _on_exchange(self, fd: int, file: OpenFile) -> list[str] | None:
        del fd
        return self._write_read(file, self.line.children, self._operand(0, 256))

    def _on_ioctl(self, fd: int, file: OpenFile) -> list[str] | None:
        del fd
        name = self.words[0]
        command = self.evaluate(name)
        size = command >> 16 & 0x3FFF
        argument = bytearray()
        for index, width in enumerate(_SHAPES.get(name, ""), 1):
            value = self._operand(index) & (1 << 8 * int(width)) - 1
            argument += value.to_bytes(int(width), "little")
        argument += Composer(self).items(self.line.children)
        argument += bytes(max(0, size - len(argument)))
        if command == _FIONBIO:
            return ["0"]
        direction = command >> 30
        if self.line.option("argument") is not None and direction:
            return ["EFAULT"]  # as FUSE copies before the driver looks
        address = self.place(bytes(argument), self._option("reach", -1))
        if direction & 1 and len(self.owner.read(address, size)) < size:
            return ["EFAULT"]
        given = bytes(argument[:size]) if direction & 1 else bytes(size)
        if self._ends_by_itself():
            done = self.world.call(self.actor, file, command, given, self._ioctl_finish(command, address, direction))
            while done is None:
                parked = self.actor.parked
                assert parked is not None
                assert parked.step is not None
                assert parked.wait is not None
                parked.wait.parked = False
                done = self.world.drive(self.actor, parked.step, -errno.ETIMEDOUT, parked.finish)
            return done
        return self.world.call(self.actor, file, command, given, self._ioctl_finish(command, address, direction))

    def _ends_by_itself(self) -> bool:
        limit = number(self.words[3]) if len(self.words) > 3 else None
        return self.words[0] == "BINDER_FREEZE" and limit is not None and limit < _SHORT_MS

    def _ioctl_finish(self, command: int, address: int, direction: int) -> Finish:
        def finish(outcome: Outcome) -> list[str]:
            if (
                direction & 2
                and outcome.argument
                and self.owner.write(address, outcome.argument) < len(outcome.argument)
            ):
                return ["EFAULT"]
            text = error_name(-outcome.error)
            if not outcome.error:
                text += self._ioctl_result(command, outcome.argument)
            return [text]

        return finish

    def _ioctl_result(self, command: int, argument: bytes) -> str:
        if command == uapi.BINDER_VERSION:
            return f" protocol_version={uapi.binder_version.unpack(argument)[0]}"
        if command == uapi.BINDER_GET_NODE_DEBUG_INFO:
            ptr, cookie, strong, weak = uapi.binder_node_debug_info.unpack(argument)
            return f" ptr=0x{ptr:x} cookie=0x{cookie:x} has_strong_ref={strong} has_weak_ref={weak}"
        if command == uapi.BINDER_GET_NODE_INFO_FOR_REF:
            handle, strong, weak, _, _, _ = uapi.binder_node_info_for_ref.unpack(argument)
            return f" handle={handle} strong_count={strong} weak_count={weak}"
        if command == uapi.BINDER_GET_FROZEN_INFO:
            pid, sync, asynchronous = uapi.binder_frozen_status_info.unpack(argument)
            return f" pid={self.process_name(pid)} sync_recv={sync} async_recv={asynchronous}"
        if command == uapi.BINDER_GET_EXTENDED_ERROR:
            identifier, error, parameter = uapi.binder_extended_error.unpack(argument)
            return f" id={identifier} command={return_name(error)} param={error_name(-parameter)}"
        return ""


def play(text: str) -> str:
    """Play a scenario on a new engine; its text with the results."""
    world = World(text)
    out: list[str] = []
    shown = 0
    for step in world.scenario.steps:
        out += world.scenario.lines[shown : step.last]
        shown = step.last
        out += ["    | " + line for line in world.play_step(step)]
    out += world.scenario.lines[shown:]
    for process in world.processes.values():
        if process.present:
            world.end(process)
    return "\n".join(out) + "\n"
