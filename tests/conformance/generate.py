"""Random but meaningful scenarios: a hypothesis state machine writes them while it plays them on the engine.

The machine looks into the engine it drives to choose what makes sense there - handles that exist, buffers that were
received, references that are owed - and now and then what does not. It checks the engine's invariants after every step.
What it has written is kept by `scenarios()`, to be played on the real driver as well.

Values stand in the text as numbers, not as labels, so that steps can be left out when a difference is shrunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from binderfs_fuse.engine.invariants import check
from tests.conformance.engine_player import Actor, OpenFile, World
from tests.conformance.scenario import parse

if TYPE_CHECKING:
    from binderfs_fuse.engine import Process
    from binderfs_fuse.engine.thread import Thread

PROCESSES: Final = ("mgr", "a", "b", "c")
THREADS: Final = ("", ".2")
_STEPS: Final = 40

_PTRS: Final = st.sampled_from([0x1000, 0x2000, 0x3000, 0x1000, 0])
_ODD: Final = st.sampled_from([0, 1, 2, 3, 7, 0x7FFFFFFF, 0xFFFFFFFF])
_COOKIES: Final = st.integers(1, 4)
_CODES: Final = st.integers(0, 3)
_SIZES: Final = st.sampled_from([0, 1, 7, 8, 24, 100, 1000, 4096, 5000])
_READS: Final = st.sampled_from([256, 256, 256, 256, 1000, 4, 0, 80, 84, 124])
_FLAGS: Final = st.sampled_from(
    ["0", "0", "TF_ACCEPT_FDS", "TF_CLEAR_BUF", "TF_UPDATE_TXN", "TF_ACCEPT_FDS|TF_CLEAR_BUF", "0x80"]
)
_OBJECT_FLAGS: Final = st.sampled_from([0, 0, 0x7F, 0x100, 0x17F])


class ScenarioMachine(RuleBasedStateMachine):
    """Writes one scenario."""

    collected: Final[list[str]] = []

    def __init__(self) -> None:
        """Begin with processes that have done nothing."""
        super().__init__()
        self.lines: list[str] = ["processes " + " ".join(PROCESSES)]
        threads = [f"{process}{thread} poll" for process in PROCESSES for thread in THREADS]
        self.world = World("\n".join([*self.lines, *threads]) + "\n")

    def do(self, text: str) -> None:
        """Write a step, and play it."""
        self.lines.append(text)
        header = "\n".join([self.lines[0], text]) + "\n"
        for step in parse(header).steps:
            self.world.play_step(step)

    # -- what there is

    def idle(self, name: str) -> list[Actor]:
        """Return the threads of a process that can do a step: none while one of them polls.

        What wakes a poll may be read by another thread in the same ioctl; who is first is a matter of time.
        """
        process = self.world.processes[name]
        if not process.present or not process.named:
            return []
        actors = [actor for actor in self.world.actors.values() if actor.owner is process]
        if any(actor.polling for actor in actors):
            return []
        return [actor for actor in actors if actor.parked is None]

    def is_contended(self, actor: Actor) -> bool:
        """Return whether a thread has to leave what its own commands make to another that is blocked.

        A read in the same ioctl may come before or after the other one wakes up; that, too, is a matter of time.
        """
        return any(other.owner is actor.owner and other.parked for other in self.world.actors.values())

    def all_idle(self) -> list[Actor]:
        """Return the threads of all processes that can do a step."""
        return [actor for name in PROCESSES for actor in self.idle(name)]

    def opened(self, actor: Actor) -> Process:
        """Return the open device of a thread's process."""
        process = self.device(actor).process
        assert process is not None
        return process

    def device(self, actor: Actor) -> OpenFile:
        """Return the open file of a thread's device."""
        return actor.owner.fds[actor.owner.named["binder"]][0]

    def thread(self, actor: Actor) -> Thread | None:
        """Return what the driver knows of a thread."""
        return self.opened(actor).threads.get(actor.tid)

    def pick(self, data: st.DataObject, values: Any, label: str = "") -> Any:
        """Draw one of some values."""
        return data.draw(st.sampled_from(list(values)), label=label)

    def actor(self, data: st.DataObject) -> Actor:
        """Draw a thread that can do a step."""
        actor: Actor = self.pick(data, self.all_idle())
        return actor

    def handle(self, data: st.DataObject, actor: Actor) -> int:
        """Draw a handle, mostly one that exists."""
        known = list(self.opened(actor).refs_by_desc)
        choice = data.draw(st.integers(0, 9))
        if known and choice < 8:
            return int(self.pick(data, known))
        return 0 if choice < 9 else data.draw(_ODD)

    def target(self, data: st.DataObject, actor: Actor) -> int:
        """Draw a handle to call."""
        return 0 if data.draw(st.integers(0, 2)) == 0 else self.handle(data, actor)

    # -- payloads

    def payload(self, data: st.DataObject, actor: Actor) -> list[str]:
        """Draw the lines of a payload without pointers."""
        lines = [f"fill {data.draw(_SIZES)}"] if data.draw(st.booleans()) else []
        return lines + [self.object(data, actor) for _ in range(data.draw(st.integers(0, 3)))]

    def object(self, data: st.DataObject, actor: Actor) -> str:
        """Draw an object."""
        kind = data.draw(st.sampled_from(["binder", "binder", "weak-binder", "handle", "handle", "weak-handle", "fd"]))
        if kind in ("binder", "weak-binder"):
            ptr = data.draw(_PTRS)
            wrong = data.draw(st.integers(0, 29)) == 0
            return f"{kind} {ptr:#x} {ptr + 1 + wrong:#x} flags={data.draw(_OBJECT_FLAGS):#x}"
        if kind == "fd":
            number = "fd.file" if data.draw(st.integers(0, 9)) else "999"
            return f"fd {number} cookie=0x5"
        return f"{kind} {self.handle(data, actor)} flags={data.draw(_OBJECT_FLAGS):#x}"

    def scattered(self, data: st.DataObject, actor: Actor) -> list[str]:
        """Draw the lines of a payload with pointers and arrays of descriptors."""
        lines = ['"12345678"'] if data.draw(st.integers(0, 9)) else []
        for index in range(data.draw(st.integers(1, 4))):
            kind = data.draw(st.integers(0, 5))
            if kind == 0:
                lines.append(self.object(data, actor))
                continue
            if kind == 1 and index:
                count = data.draw(st.integers(0, 3))
                lines.append(f"fda {count} parent={self._parent(data, index)} at={data.draw(_ALIGNED)}")
                continue
            line = "ptr"
            if index and data.draw(st.booleans()):
                line += f" parent={self._parent(data, index)} at={data.draw(_ALIGNED)}"
            if data.draw(st.integers(0, 19)) == 0:
                line += data.draw(
                    st.sampled_from([" address=bad", " length=4", " length=0", " reach=4", " misalign=1"])
                )
            lines.append(line)
            content = data.draw(
                st.sampled_from(["zero 8", "fill 24", "u32 fd.file fd.file 0 fd.file", '"odd"', "fill 5"])
            )
            lines.append("    " + content)
        return lines

    def _parent(self, data: st.DataObject, index: int) -> int:
        return data.draw(st.integers(0, index - 1)) if data.draw(st.integers(0, 9)) else index

    def transaction(self, data: st.DataObject, actor: Actor, command: str, words: str) -> list[str]:
        """Draw a transaction's lines."""
        scatter = data.draw(st.integers(0, 3)) == 0
        line = command + ("_SG" if scatter else "") + words
        payload = self.scattered(data, actor) if scatter else self.payload(data, actor)
        mistake = data.draw(st.integers(0, 29))
        if mistake == 0:
            line += data.draw(
                st.sampled_from(
                    [
                        " offsets=0",
                        " offsets=8,0",
                        " offsets=4",
                        " offsets=2",
                        " offsets-size=4",
                        " size=0xffffffffffffffff",
                        " address=bad size=8",
                        " reach=4",
                        " offsets-reach=0",
                        " buffers=4" if scatter else " size=0",
                        " buffers=4096" if scatter else " reach=0",
                    ]
                )
            )
        return [line, *("    " + item for item in payload)]

    def send(self, data: st.DataObject, actor: Actor, commands: list[str]) -> None:
        """Write commands, with a read in the same ioctl or without."""
        how = data.draw(st.sampled_from(["write", "write", "exchange 256", "exchange 256", "exchange 80"]))
        if self.is_contended(actor):
            how = "write"
        options = ""
        if data.draw(st.integers(0, 59)) == 0:
            options = data.draw(st.sampled_from([" reach=6", " wrote=4", " size=5", " address=bad"]))
        self.do("\n".join([f"{actor.name} {how}{options}", *("    " + line for line in commands)]))

    # -- rules

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """Open the device everywhere; the first one is context manager."""
        for name in PROCESSES:
            nonblock = " nonblock=1" if data.draw(st.integers(0, 2)) else ""
            size = data.draw(st.sampled_from(["8K", "16K", "1M"]))
            self.do(f"{name} join map={size}{nonblock}")
            self.do(f'{name} memfd file "of {name}"')
        flags = data.draw(st.sampled_from([0, 0x100, 0x100, 0x105]))
        self.do(f"mgr ioctl BINDER_SET_CONTEXT_MGR_EXT 0 {flags:#x} 0 1")
        if data.draw(st.booleans()):
            self.do(f"mgr ioctl BINDER_SET_MAX_THREADS {data.draw(st.integers(1, 3))}")
        for name in PROCESSES:
            if data.draw(st.booleans()):
                self.do(f"{name} write BC_ENTER_LOOPER")
        for name in PROCESSES[1:]:
            if data.draw(st.integers(0, 2)):
                self.introduce(data, name)

    def introduce(self, data: st.DataObject, name: str) -> None:
        """Have a process give the manager a node, and perhaps get a handle to another's."""
        actor, manager = self.world.actors[name], self.world.actors["mgr"]
        ptr = data.draw(_PTRS)
        flags = data.draw(_OBJECT_FLAGS)
        self.do(f"{name} write BC_TRANSACTION handle=0\n    binder {ptr:#x} {ptr + 1:#x} flags={flags:#x}")
        self.do("mgr read")
        known = list(self.opened(manager).refs_by_desc)
        commands = [f"BC_ACQUIRE {known[-1]}", *self._free(data, manager), "BC_REPLY"]
        if data.draw(st.booleans()):
            commands.append(f"    handle {self.pick(data, known)}")
        self.do("\n".join(["mgr exchange", *("    " + line for line in commands)]))
        self.do(f"{name} read")
        handles = list(self.opened(actor).refs_by_desc)
        if handles:
            self.do(f"{name} write BC_ACQUIRE {handles[-1]}")

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """Do one thing.

        One rule for all: hypothesis leaves some rules out of each run, and without some of these little happens.
        """
        actions = [self.show, self.become_manager] + 2 * [self.interrupt]
        if self.all_idle():
            actions += [self.be_a_looper, self.poll, self.wait_in_poll, self.garbage, self.leave, self.be_nice]
            actions += [self.flush, self.use_another_device, self.use_another_device]
            actions += 2 * [self.ask, self.read, self.freeze, self.update]
            actions += 3 * [self.acknowledge_notices, self.watch, self.count, self.acknowledge]
            actions += 5 * [self.free, self.call_one_way, self.call]
            if self._readable():
                actions += 10 * [self.read_where_there_is_work]
        if self._servers():
            actions += 4 * [self.reply, self.reply_plainly]
        self.pick(data, actions)(data)

    def call(self, data: st.DataObject) -> None:
        """Call a node, and wait for the reply or not."""
        actor = self.actor(data)
        words = f" handle={self.target(data, actor)} code={data.draw(_CODES)} flags={data.draw(_FLAGS)}"
        self.send(data, actor, self.transaction(data, actor, "BC_TRANSACTION", words))

    def call_one_way(self, data: st.DataObject) -> None:
        """Make one or two one-way calls."""
        actor = self.actor(data)
        commands = []
        for _ in range(data.draw(st.integers(1, 2))):
            words = f" handle={self.target(data, actor)} code={data.draw(_CODES)} flags=TF_ONE_WAY|{data.draw(_FLAGS)}"
            commands += self.transaction(data, actor, "BC_TRANSACTION", words)
        self.send(data, actor, commands)

    def _servers(self) -> list[Actor]:
        servers = []
        for actor in self.all_idle():
            thread = self.thread(actor)
            stack = thread.transaction_stack if thread is not None else None
            if stack is not None and stack.to_thread is thread:
                servers.append(actor)
        return servers

    def reply(self, data: st.DataObject) -> None:
        """Reply to a call."""
        actor = self.pick(data, self._servers() or self.all_idle())
        commands = []
        if data.draw(st.booleans()):
            commands += self._free(data, actor)
        words = f" code={data.draw(_CODES)} flags={data.draw(_FLAGS)}"
        self.send(data, actor, commands + self.transaction(data, actor, "BC_REPLY", words))

    def reply_plainly(self, data: st.DataObject) -> None:
        """Reply to a call and read on."""
        actor = self.pick(data, self._servers())
        how = "write" if self.is_contended(actor) else "exchange"
        self.do("\n".join([f"{actor.name} {how}", *("    " + line for line in [*self._free(data, actor), "BC_REPLY"])]))

    def _readable(self) -> list[Actor]:
        """Return threads that may read: one that would block only where no other of its process is blocked."""
        readers = []
        for actor in self.all_idle():
            blocked = self.is_contended(actor) and len(self.lines) % 4 != 0
            if self.device(actor).nonblock or not blocked:
                readers.append(actor)
        return readers

    def read(self, data: st.DataObject) -> None:
        """Read."""
        readers = self._readable()
        if not readers:
            return
        actor = self.pick(data, readers)
        size = data.draw(_READS)
        options = data.draw(st.sampled_from(["", "", "", " read=4", " read=8", " into=bad"]))
        if data.draw(st.booleans()):
            options = f" room={data.draw(st.integers(0, 30)) * 4}"
        elif options == " read=8" and size == 4:
            options += " room=4"  # else the reader's own memory is written to, behind the buffer
        self.do(f"{actor.name} read {size}{options}")

    def read_where_there_is_work(self, data: st.DataObject) -> None:
        """Read where something is to be read."""
        readers = self._readable()
        busy = []
        for actor in readers:
            thread = self.thread(actor)
            if (thread is not None and thread.process_todo) or self.opened(actor).todo:
                busy.append(actor)
        actor = self.pick(data, busy or readers)
        self.do(f"{actor.name} read")

    def _free(self, data: st.DataObject, actor: Actor) -> list[str]:
        """Draw a command that frees a buffer, mostly one that may be freed."""
        allocation = self.opened(actor).allocation
        buffers = list(allocation.allocated.values()) if allocation is not None else []
        delivered = [buffer for buffer in buffers if buffer.allow_user_free]
        if data.draw(st.integers(0, 19)) == 0:
            delivered = buffers
        if not delivered:
            return []
        return [f"BC_FREE_BUFFER map+{self.pick(data, delivered).offset:#x}"]

    def free(self, data: st.DataObject) -> None:
        """Free a buffer."""
        actor = self.actor(data)
        commands = self._free(data, actor)
        if commands:
            self.send(data, actor, commands)

    def count(self, data: st.DataObject) -> None:
        """Take and drop references."""
        actor = self.actor(data)
        fresh = [ref.desc for ref in self.opened(actor).refs_by_desc.values() if ref.strong == 1 and ref.desc]
        commands = [f"BC_ACQUIRE {handle}" for handle in fresh] if data.draw(st.booleans()) else []
        for _ in range(data.draw(st.integers(1, 3))):
            command = data.draw(st.sampled_from(["BC_ACQUIRE", "BC_ACQUIRE", "BC_INCREFS", "BC_RELEASE", "BC_DECREFS"]))
            commands.append(f"{command} {self.handle(data, actor)}")
        self.send(data, actor, commands)

    def acknowledge(self, data: st.DataObject) -> None:
        """Confirm references that the driver asked for, or that it did not."""
        actor = self.actor(data)
        owed = []
        for node in self.opened(actor).nodes.values():
            if node.pending_weak_ref:
                owed.append(f"BC_INCREFS_DONE {node.ptr:#x} {node.cookie:#x}")
            if node.pending_strong_ref:
                owed.append(f"BC_ACQUIRE_DONE {node.ptr:#x} {node.cookie:#x}")
        if not owed or data.draw(st.integers(0, 19)) == 0:
            ptr = data.draw(_PTRS)
            owed = [f"BC_ACQUIRE_DONE {ptr:#x} {ptr + 1:#x}", f"BC_INCREFS_DONE {ptr:#x} {ptr + 1:#x}"]
        elif data.draw(st.booleans()):
            owed = [self.pick(data, owed)]
        self.send(data, actor, owed)

    def watch(self, data: st.DataObject) -> None:
        """Ask for, or end, notifications of death or freezing."""
        knowing = [actor for actor in self.all_idle() if self.opened(actor).refs_by_desc]
        actor = self.pick(data, knowing or self.all_idle())
        handle = self.handle(data, actor)
        what = data.draw(st.sampled_from(["DEATH", "DEATH", "FREEZE"]))
        ref = self.opened(actor).refs_by_desc.get(handle)
        present = None
        if ref is not None:
            present = ref.death if what == "DEATH" else ref.freeze
        commands = []
        if present is None or data.draw(st.integers(0, 9)) == 0:
            commands.append(f"BC_REQUEST_{what}_NOTIFICATION {handle} {data.draw(_COOKIES):#x}")
        if present is not None or data.draw(st.integers(0, 9)) == 0:
            cookie = present.cookie if present is not None else data.draw(_COOKIES)
            commands.append(f"BC_CLEAR_{what}_NOTIFICATION {handle} {cookie:#x}")
        self.send(data, actor, commands)

    def acknowledge_notices(self, data: st.DataObject) -> None:
        """Confirm notices that were read, or that were not."""
        actor = self.actor(data)
        process = self.opened(actor)
        commands = [f"BC_DEAD_BINDER_DONE {death.key():#x}" for death in process.delivered_death]
        commands += [f"BC_FREEZE_NOTIFICATION_DONE {freeze.key():#x}" for freeze in process.delivered_freeze]
        if not commands:
            commands = [data.draw(st.sampled_from(["BC_DEAD_BINDER_DONE 0x1", "BC_FREEZE_NOTIFICATION_DONE 0x1"]))]
        self.send(data, actor, commands)

    def freeze(self, data: st.DataObject) -> None:
        """Freeze or thaw a process."""
        actor = self.actor(data)
        name = data.draw(st.sampled_from(PROCESSES))
        enable = data.draw(st.integers(0, 1))
        self.do(f"{actor.name} ioctl BINDER_FREEZE pid.{name} {enable} {data.draw(st.sampled_from([0, 0, 10]))}")

    def update(self, data: st.DataObject) -> None:
        """Make equal one-way calls that may take each other's place."""
        actor = self.actor(data)
        words = f" handle={self.target(data, actor)} code={data.draw(_CODES)} flags=TF_ONE_WAY|TF_UPDATE_TXN"
        commands = []
        for _ in range(data.draw(st.integers(1, 3))):
            commands += self.transaction(data, actor, "BC_TRANSACTION", words)
        self.send(data, actor, commands)

    def flush(self, data: st.DataObject) -> None:
        """Close a copy of a device's descriptor."""
        actor = self.actor(data)
        self.do(f"{actor.name} dup copy")
        self.do(f"{actor.name} close copy")

    def use_another_device(self, data: st.DataObject) -> None:
        """Do something on another device, which is a context of its own."""
        actor = self.actor(data)
        if "hwbinder" not in actor.owner.named:
            self.do(f"{actor.name} join hwbinder map=8K nonblock=1")
            self.do(f"{actor.name} ioctl on=hwbinder BINDER_SET_CONTEXT_MGR 0")
            return
        flags = data.draw(st.sampled_from(["0", "TF_ONE_WAY", "TF_ACCEPT_FDS"]))
        step = data.draw(
            st.sampled_from(
                [
                    f"write on=hwbinder BC_TRANSACTION handle=0 flags={flags}\n    {self.object(data, actor)}",
                    "read on=hwbinder",
                    "read on=hwbinder",
                    "read on=hwbinder",
                    f"write on=hwbinder BC_REPLY\n    {self.object(data, actor)}",
                    "write on=hwbinder BC_FREE_BUFFER map:hwbinder",
                    "write on=hwbinder BC_ACQUIRE 0",
                    "ioctl on=hwbinder BINDER_GET_EXTENDED_ERROR",
                    "poll on=hwbinder",
                ]
            )
        )
        self.do(f"{actor.name} {step}")

    def wait_in_poll(self, data: st.DataObject) -> None:
        """Wait for something to read."""
        actor = self.actor(data)
        if not any(other.polling for other in self.world.actors.values()):
            self.do(f"{actor.name} poll forever")

    def be_nice(self, data: st.DataObject) -> None:
        """Change a thread's priority, or look at it."""
        actor = self.actor(data)
        self.do(f"{actor.name} " + data.draw(st.sampled_from(["nice", "nice", "setnice 5", "setnice -3", "setnice 0"])))

    def reopen(self, data: st.DataObject) -> None:
        """Close a device for good, and open it anew."""
        names = [name for name in PROCESSES if len(self.idle(name)) == len(THREADS)]
        if names:
            name = self.pick(data, names)
            self.do(f"{name} munmap")
            self.do(f"{name} close binder")
            self.do(f"{name} join map=16K nonblock=1")

    def be_a_looper(self, data: st.DataObject) -> None:
        """Say something about being a looper."""
        actor = self.actor(data)
        self.send(
            data, actor, [data.draw(st.sampled_from(["BC_ENTER_LOOPER", "BC_REGISTER_LOOPER", "BC_EXIT_LOOPER"]))]
        )

    def ask(self, data: st.DataObject) -> None:
        """Use one of the ioctls that only ask."""
        actor = self.actor(data)
        question = data.draw(
            st.sampled_from(
                [
                    "BINDER_GET_EXTENDED_ERROR",
                    "BINDER_GET_EXTENDED_ERROR",
                    "BINDER_GET_NODE_DEBUG_INFO 0",
                    "BINDER_GET_NODE_DEBUG_INFO 0x1000",
                    f"BINDER_GET_NODE_INFO_FOR_REF {self.handle(data, actor)}",
                    f"BINDER_GET_FROZEN_INFO pid.{data.draw(st.sampled_from(PROCESSES))}",
                    "BINDER_ENABLE_ONEWAY_SPAM_DETECTION 1",
                    "BINDER_VERSION",
                ]
            )
        )
        self.do(f"{actor.name} ioctl {question}")

    def poll(self, data: st.DataObject) -> None:
        """Look whether there is something to read."""
        self.do(f"{self.actor(data).name} poll")

    def interrupt(self, data: st.DataObject) -> None:
        """Send a signal to a thread, mostly one that is blocked."""
        actors = self.world.actors.values()
        parked = [actor.name for actor in actors if (actor.parked or actor.polling) and actor.owner.present]
        if parked:
            self.do(f"signal {self.pick(data, parked)}")

    def garbage(self, data: st.DataObject) -> None:
        """Write what is no command."""
        actor = self.actor(data)
        if data.draw(st.booleans()):
            self.reply(data)
            return
        word = data.draw(st.sampled_from(["u32 0", "u32 0x40046399", "BC_ATTEMPT_ACQUIRE 1 2", "BC_ACQUIRE_RESULT 1"]))
        self.send(data, actor, ["BC_ENTER_LOOPER", word] if data.draw(st.booleans()) else [word])

    def leave(self, data: st.DataObject) -> None:
        """End a thread, a process, or its use of the device."""
        chance = data.draw(st.integers(0, 3))
        if chance == 2:
            self.reopen(data)
        if chance == 0:
            self.do(f"{self.actor(data).name} ioctl BINDER_THREAD_EXIT")
        elif chance == 1:
            alive = [name for name in PROCESSES if self.world.processes[name].present]
            if len(alive) > 2:
                self.do(f"kill {self.pick(data, alive)}")

    def become_manager(self, data: st.DataObject) -> None:
        """Take the place of a context manager that is gone, or fail to."""
        idle = self.all_idle()
        if idle and data.draw(st.integers(0, 3)) == 0:
            self.do(f"{self.pick(data, idle).name} ioctl BINDER_SET_CONTEXT_MGR_EXT 0 0x100 0x1000 0x1001")

    def show(self, data: st.DataObject) -> None:
        """Look at a log."""
        self.do("show " + data.draw(st.sampled_from(["state", "transactions", "stats"])))

    @invariant()
    def engine_is_sound(self) -> None:
        """Nothing in the engine contradicts anything else."""
        check(self.world.engine, quiet=True)

    def teardown(self) -> None:
        """Keep the scenario, with everything shown at its end."""
        for log in ("state", "stats", "transaction_log", "failed_transaction_log"):
            self.lines.append(f"show {log}")
        self.collected.append("\n".join(self.lines) + "\n")


_ALIGNED: Final = st.sampled_from([0, 0, 8, 4, 16, 2])


def scenarios(count: int, number: int) -> list[str]:
    """Write `count` scenarios; the same ones for the same number."""
    ScenarioMachine.collected.clear()
    run_state_machine_as_test(
        seed(number)(ScenarioMachine),
        settings=settings(
            max_examples=count,
            stateful_step_count=_STEPS,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    return ScenarioMachine.collected[:count]
