"""Whatever others do between any two effects of a step, the engine stays whole, and all is gone in the end.

Each case makes a step that has effects of every kind, and lets one thing happen before each of its effects in turn. The
machine checks all invariants after every send, and at the end that nothing is left over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import FindRoom, Outcome, Turn
from binderfs_fuse.engine.effects import CHUNK
from tests.engine.machine import Client, Machine
from tests.engine.wire import command, fds, parcel

if TYPE_CHECKING:
    from collections.abc import Callable

    from binderfs_fuse.engine.effects import Effect
    from tests.engine.machine import Call, Caller
    from tests.engine.wire import Parcel

FLAGS = uapi.FLAT_BINDER_FLAG_ACCEPTS_FDS | uapi.FLAT_BINDER_FLAG_TXN_SECURITY_CTX | 10


class Scene:
    """A manager, a client, and a third process whose object both know."""

    def __init__(self, chunk: int = CHUNK) -> None:
        """Let them meet; from then on a step gives a turn after so many elements."""
        self.machine = Machine()
        self.machine.careful = False
        self.machine.label = b"label"
        self.manager = self.machine.manager(flags=FLAGS)
        self.client, self.third = self.machine.client(), self.machine.client()
        self.client.nice = 5
        self.to_third = self.machine.share(self.third, self.manager, 0x300)
        self.third_of_client = self.machine.pass_on(self.manager, self.client, parcel().handle(self.to_third))
        self.to_client = self.machine.share(self.client, self.manager, 0x400)
        self.of_manager = self.machine.grant(self.manager, self.client, 0x500, flags=FLAGS)
        self.others = {client: client.thread() for client in (self.manager, self.client, self.third)}
        self.handle = self.of_manager
        self.victim: Client = self.manager
        self.caller: Caller = self.client
        self.machine.engine.chunk = chunk

    def contents(self, sender: Client, handle: int, large: int = 0) -> Parcel:
        """Everything that a transaction can hold."""
        numbers = fds(*(sender.open_fd(name) for name in "ab"))
        content = parcel().raw(bytes(8 + large)).ptr(numbers + bytes(8)).fda(2, parent=0)
        content.ptr(b"child", parent=0, at=8)
        content.binder(0x700, 0x70).binder(0x800, 0x80, weak=True).handle(handle).handle(handle, weak=True)
        return content.fd(sender.open_fd("c")).raw(b"the end")


def call(scene: Scene) -> Call:
    """Call the manager's object with everything, and wait for the reply."""
    content = scene.contents(scene.client, scene.third_of_client)
    content.handle(scene.of_manager)
    return scene.client.begin(scene.client.transaction(scene.handle, content), read=256, fetched=False)


def tell(scene: Scene) -> Call:
    """Call it one-way, with much data."""
    content = scene.contents(scene.client, scene.third_of_client, large=20000)
    stream = scene.client.transaction(scene.handle, content, flags=uapi.TF_ONE_WAY | uapi.TF_CLEAR_BUF)
    return scene.client.begin(stream, read=256)


def reply(scene: Scene) -> Call:
    """Serve a call of the client's, and reply with everything."""
    scene.client.call(flags=uapi.TF_ACCEPT_FDS)
    scene.manager.read()
    scene.victim = scene.client
    scene.caller = scene.manager
    content = scene.contents(scene.manager, scene.to_third).handle(scene.to_client)
    return scene.manager.begin(scene.manager.transaction(0, content, reply=True), read=256)


def call_back(scene: Scene) -> Call:
    """Serve a call of the client's, and call it back."""
    scene.client.call(flags=uapi.TF_ACCEPT_FDS)
    scene.manager.read()
    scene.victim = scene.client
    scene.caller = scene.manager
    content = parcel().handle(scene.to_third).handle(scene.to_client).binder(0x900)
    return scene.manager.begin(scene.manager.transaction(scene.to_client, content), read=256)


def receive(scene: Scene) -> Call:
    """Read a call with everything in it."""
    scene.victim = scene.client
    scene.caller = scene.manager
    content = scene.contents(scene.client, scene.third_of_client)
    scene.client.send(scene.handle, content)
    scene.manager.nice = 7
    return scene.manager.begin(read=512)


def freeze(scene: Scene) -> Call:
    """Wait to freeze the manager, which has something to do."""
    scene.client.call(scene.handle)
    scene.caller = scene.third
    return scene.third.begin_ioctl(uapi.BINDER_FREEZE, uapi.binder_freeze_info.pack(scene.manager.pid, 1, 50))


STEPS = [call, tell, reply, call_back, receive, freeze]


def other_party_dies(scene: Scene) -> None:
    """The process at the other end closes its device."""
    scene.victim.die()


def third_party_dies(scene: Scene) -> None:
    """The process whose object is passed on does."""
    if scene.caller.client is not scene.third:
        scene.third.die()


def other_threads_end(scene: Scene) -> None:
    """All threads at the other end say that they exit, and those of the caller's process but its own."""
    for process in (scene.victim.process, scene.caller.client.process):
        for tid in list(process.threads) if not process.is_dead else []:
            if tid != scene.caller.tid and not process.threads[tid].wait.parked:
                client = scene.victim if process is scene.victim.process else scene.caller.client
                client.thread(tid).exit()


def references_go(scene: Scene) -> None:
    """The caller's process gives up all its handles."""
    client = scene.caller.client
    for desc, ref in list(client.process.refs_by_desc.items()):
        for _ in range(ref.strong):
            scene.others[client].do(uapi.BC_RELEASE, desc)


def victims_references_go(scene: Scene) -> None:
    """The process at the other end gives up all its handles."""
    for desc, ref in list(scene.victim.process.refs_by_desc.items()) if scene.victim.open else []:
        for number, count in ((uapi.BC_RELEASE, ref.strong), (uapi.BC_DECREFS, ref.weak)):
            for _ in range(count):
                scene.others[scene.victim].do(number, desc)


def buffers_are_freed(scene: Scene) -> None:
    """Everybody frees whatever buffers it can guess."""
    for client, other in scene.others.items():
        allocation = client.process.allocation
        if client.open and allocation is not None:
            other.write(
                *(command(uapi.BC_FREE_BUFFER, client.process.address + offset) for offset in allocation.allocated)
            )


def nodes_are_answered(scene: Scene) -> None:
    """Everybody answers for objects that it may not have been asked about."""
    for client, other in scene.others.items():
        for ptr, node in list(client.process.nodes.items()) if client.open else []:
            other.do(uapi.BC_INCREFS_DONE, ptr, node.cookie)
            other.do(uapi.BC_ACQUIRE_DONE, ptr, node.cookie)


def all_is_frozen(scene: Scene) -> None:
    """The process at the other end is frozen if it can be, and thawed."""
    for enable in (True, False):
        scene.others[scene.third].freeze(scene.victim.pid, enable=enable)


def it_stays_frozen(scene: Scene) -> None:
    """The process at the other end is frozen, whatever it has to do."""
    scene.victim.process.is_frozen = True


def it_is_told_meanwhile(scene: Scene) -> None:
    """Others send to the same process, and their buffers lie where nobody thought."""
    if scene.victim.open and scene.victim is scene.manager:
        for size in (1, 5000, 100):
            scene.others[scene.third].tell(0, bytes(size))


def it_reads_meanwhile(scene: Scene) -> None:
    """A thread at the other end reads what there is."""
    if scene.victim.open:
        scene.others[scene.victim].read(nonblock=True)


def all_flush(scene: Scene) -> None:
    """Every process closes a copy of its descriptor."""
    for client in scene.others:
        if client.open:
            client.flush()


def the_device_is_removed(scene: Scene) -> None:
    """The context is not listed any more."""
    scene.machine.engine.contexts.pop("binder", None)


HAPPENINGS: list[Callable[[Scene], None]] = [
    other_party_dies,
    third_party_dies,
    other_threads_end,
    references_go,
    victims_references_go,
    buffers_are_freed,
    nodes_are_answered,
    all_is_frozen,
    it_stays_frozen,
    it_is_told_meanwhile,
    it_reads_meanwhile,
    all_flush,
    the_device_is_removed,
]


def play(
    step: Callable[[Scene], Call], happening: Callable[[Scene], None] | None, place: int, chunk: int = CHUNK
) -> tuple[Scene, list[Effect]]:
    """Drive a step, and let something happen before one of its effects."""
    scene = Scene(chunk)
    made = step(scene)
    scene.machine.careful = happening is not None
    seen: list[Effect] = []

    def hook(driven: Call, effect: Effect) -> None:
        if driven is made:
            if len(seen) == place and happening is not None:
                happening(scene)
            seen.append(effect)

    scene.machine.before_effect = hook
    made.drive()
    scene.machine.before_effect = None
    return scene, seen


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("happening", HAPPENINGS, ids=lambda happening: happening.__name__)
def test_something_happens_between_two_effects(
    step: Callable[[Scene], Call], happening: Callable[[Scene], None]
) -> None:
    """Before each effect of the step in turn; then all goes on to its end, and nothing is left."""
    scene, seen = play(step, None, 0)
    scene.machine.shut_down()
    for place in range(len(seen)):
        scene, _ = play(step, happening, place)
        scene.machine.shut_down()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("happening", HAPPENINGS, ids=lambda happening: happening.__name__)
def test_something_happens_at_a_turn(step: Callable[[Scene], Call], happening: Callable[[Scene], None]) -> None:
    """The same at turns, with one for each element that is touched; each is some happenings' place."""
    scene, seen = play(step, None, 0, chunk=1)
    scene.machine.shut_down()
    turns = [place for place, effect in enumerate(seen) if isinstance(effect, Turn)]
    # A transaction is read in one piece.
    assert bool(turns) == (step is not receive)
    for place in turns[HAPPENINGS.index(happening) % 6 :: 6]:
        scene, _ = play(step, happening, place, chunk=1)
        scene.machine.shut_down()


@pytest.mark.parametrize("happening", HAPPENINGS, ids=lambda happening: happening.__name__)
def test_something_happens_while_a_process_is_released(happening: Callable[[Scene], None]) -> None:
    """At each turn of the end of a process that has some of everything; then all go, and nothing is left."""

    def play_end(place: int | None) -> int:
        scene = Scene(chunk=1)
        scene.victim, scene.caller = scene.client, scene.third
        waiting = scene.others[scene.manager].begin(
            scene.manager.transaction(scene.to_client, scene.contents(scene.manager, scene.to_third)), read=256
        )
        waiting.drive()
        scene.client.call(scene.of_manager, scene.contents(scene.client, scene.third_of_client))
        scene.manager.tell(scene.to_client)
        scene.manager.tell(scene.to_client)
        scene.manager.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, scene.to_client, 1)
        scene.client.write(command(uapi.BC_REQUEST_DEATH_NOTIFICATION, scene.third_of_client, 2))
        scene.others[scene.client].poll()
        turns = 0

        def hook() -> None:
            nonlocal turns
            if turns == place:
                happening(scene)
            turns += 1

        scene.machine.before_turn = hook
        scene.client.die()
        scene.machine.before_turn = None
        scene.machine.shut_down()
        return turns

    for place in range(play_end(None)):
        play_end(place)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_something_happens_while_it_is_parked(step: Callable[[Scene], Call]) -> None:
    """Whatever happens to a step that waits."""
    for happening in HAPPENINGS:
        scene, _ = play(step, None, 0)
        happening(scene)
        scene.machine.resume()
        scene.machine.shut_down()


def test_the_steps_have_all_kinds_of_effects() -> None:
    """What happens between effects is only as good as the effects that there are."""
    kinds = set()
    for step in STEPS:
        scene, seen = play(step, None, 0)
        kinds |= {type(effect).__name__ for effect in seen}
        kinds |= {"Wait"} if scene.machine.waiting else set()
        scene.machine.shut_down()

    assert {
        "CopyIn",
        "CopyOut",
        "CopyToBuffer",
        "FindRoom",
        "GetFile",
        "GetSecurityContext",
        "Populate",
        "SetNice",
        "Wait",
    } == kinds


@pytest.mark.parametrize("step", STEPS[:4], ids=lambda step: step.__name__)
def test_each_effect_may_fail(step: Callable[[Scene], Call]) -> None:
    """Every copy comes up short, every request is refused, one at a time: the step ends, and nothing is left."""
    scene, seen = play(step, None, 0)
    scene.machine.shut_down()
    failures = {"CopyIn": b"", "CopyToBuffer": 0, "CopyOut": 0, "SetNice": 0}
    for place, effect in enumerate(seen):
        kind = type(effect)
        scene = Scene()
        made = step(scene)
        scene.machine.careful = True
        skip = sum(type(before) is kind for before in seen[:place])
        scene.machine.answer(kind, failures.get(kind.__name__, -12), skip=skip)
        made.drive()
        scene.machine.shut_down()


@pytest.mark.parametrize("happening", HAPPENINGS, ids=lambda happening: happening.__name__)
@pytest.mark.parametrize("copied", [0, 4, 30, 60])
def test_something_happens_before_a_read_is_stored(happening: Callable[[Scene], None], copied: int) -> None:
    """Node work and a call with everything are read; others go on; then the data turns out not to be storable."""
    scene = Scene()
    made = receive(scene)
    scene.machine.careful = True
    scene.client.do(uapi.BC_RELEASE, scene.of_manager)
    answer = None
    while True:
        effect = made._step.send(answer)
        if isinstance(effect, Outcome):
            outcome = effect
            break
        answer = scene.machine.perform(made, effect)
    happening(scene)
    for file, _, _ in outcome.files:
        file.close()
    scene.machine.conclude(scene.manager.process.undeliver(scene.manager.task(), outcome, copied))
    scene.machine.resume()
    scene.machine.shut_down()


@pytest.mark.parametrize("happening", HAPPENINGS, ids=lambda happening: happening.__name__)
@pytest.mark.parametrize("room", [0, 100])
def test_something_happens_before_descriptors_are_installed(happening: Callable[[Scene], None], room: int) -> None:
    """The same between a read and the installing of its descriptors, whether there is still room for them or not."""
    scene = Scene()
    made = receive(scene)
    scene.machine.careful = True
    scene.machine.answer(FindRoom, 0)
    scene.manager.fd_limit = room
    install = scene.manager.install

    def hook(outcome: object) -> list[int] | None:
        happening(scene)
        return install(outcome)  # type: ignore[arg-type]

    scene.manager.install = hook  # type: ignore[method-assign]
    made.drive()
    assert made.done
    scene.machine.shut_down()
