"""The engine alone: no mount, no system call, one thread.

A shell of a few lines drives two processes through the very ioctls that `client.c` makes, and answers every effect at
once. So what is measured is the engine's own share of a call, and the least that driving it costs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from binderfs_fuse import uapi
from binderfs_fuse.engine import (
    CopyIn,
    CopyOut,
    CopyToBuffer,
    Engine,
    FindMapping,
    GetSecurityContext,
    Outcome,
    Populate,
    SetNice,
    Task,
    Turn,
    Wait,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from binderfs_fuse.engine.effects import Step

REGION: Final = (0x7F00_0000_0000, 1 << 20)
PAYLOAD: Final = 0x1000
OFFSETS: Final = 0x2000
READ_BUFFER: Final = 0x3000
# A reply and a free, as the services of client.c send them; a call and a free, as its clients do.
_TRANSACTION: Final = uapi.framed(uapi.binder_transaction_data)
_RECEIVED: Final = uapi.framed(uapi.binder_transaction_data_received)
_HANDLE: Final = 0


class _Region:
    def store(self, offset: int, data: bytes | bytearray) -> None:
        """Have no bytes: what the engine stores goes nowhere."""


class _Client:
    """One single-threaded process: what it has in memory, and its ioctl under way."""

    def __init__(self, shell: Shell, pid: int) -> None:
        self.shell = shell
        self.process = shell.context.open(pid, 0, _Region())
        self.task = Task(pid, pid)
        self.memory: dict[int, bytes] = {}
        self.step: Step | None = None
        self.outcome: Outcome | None = None
        self.free = b""

    def write_read(self, commands: bytes, *, read: bool = True) -> None:
        """Begin an ioctl; it is over when `outcome` is there."""
        argument = uapi.binder_write_read.pack(len(commands), 0, 0x4000, 256 if read else 0, 0, READ_BUFFER)
        self.outcome = None
        self.step = self.process.ioctl(self.task, uapi.BINDER_WRITE_READ, argument, commands)
        self.shell.advance(self, None)

    def received(self, command: int) -> tuple[int, ...]:
        """Return the fields of the transaction or reply that the last ioctl brought; its buffer is to be freed."""
        assert self.outcome is not None  # the other side has done its part
        data = self.outcome.data
        fields = _RECEIVED.unpack_from(data, len(data) - _RECEIVED.size)
        assert fields[0] == command  # nothing went wrong
        self.free = uapi.BC_FREE_BUFFER.to_bytes(4, "little") + fields[9].to_bytes(8, "little")
        return fields


class Shell:
    """Two processes on one engine: `service`, the context manager, and `client`."""

    def __init__(self) -> None:
        self.engine = Engine(time.monotonic_ns)
        self.context = self.engine.add_context("binder")
        self.steps = 0
        self.service = _Client(self, 1)
        self.client = _Client(self, 2)
        step = self.service.process.ioctl(self.service.task, uapi.BINDER_SET_CONTEXT_MGR, bytes(4))
        next(step)
        # The first ioctl of a thread never waits: have it behind us.
        for one in (self.service, self.client):
            one.write_read(uapi.BC_ENTER_LOOPER.to_bytes(4, "little"), read=False)
        self.service.write_read(b"")

    def advance(self, client: _Client, answer: Any) -> None:
        """Run a client's step until it parks or ends, and then those that it woke."""
        step = client.step
        assert step is not None  # it has an ioctl under way
        self.steps += answer is None
        ready = self.engine.ready
        while True:
            effect = step.send(answer)
            if isinstance(effect, Outcome):
                client.outcome = effect
                break
            if isinstance(effect, Wait):
                effect.owner = client
                break
            answer = _ANSWERS[type(effect)](client, effect)
        while ready:
            self.advance(ready.pop().owner, 0)


_ANSWERS: Final[dict[type, Callable[[_Client, Any], Any]]] = {
    CopyIn: lambda client, effect: client.memory[effect.address][: effect.size],
    CopyOut: lambda _, effect: len(effect.data),
    CopyToBuffer: lambda _, effect: effect.size,
    FindMapping: lambda _client, _effect: REGION,
    Populate: lambda _client, _effect: 0,
    GetSecurityContext: lambda _client, _effect: b"",
    SetNice: lambda _, effect: effect.nice,
    Turn: lambda _client, _effect: None,
}


def _calls(shell: Shell, objects: int, payload: bytes) -> Callable[[], None]:
    """Return what makes one synchronous call with this payload, which begins with so many objects of 24 bytes."""
    client, service = shell.client, shell.service
    client.memory[PAYLOAD] = payload
    client.memory[OFFSETS] = b"".join((24 * i).to_bytes(8, "little") for i in range(objects))
    service.memory[PAYLOAD] = bytes(4)
    transact = _TRANSACTION.pack(
        uapi.BC_TRANSACTION, _HANDLE, 0, 1, uapi.TF_ACCEPT_FDS, 0, 0, len(payload), 8 * objects, PAYLOAD, OFFSETS
    )
    reply = _TRANSACTION.pack(uapi.BC_REPLY, 0, 0, 0, 0, 0, 0, 4, 0, PAYLOAD, OFFSETS)

    def call() -> None:
        client.write_read(client.free + transact)
        service.received(uapi.BR_TRANSACTION)
        service.write_read(service.free + reply)
        service.write_read(b"")
        client.received(uapi.BR_REPLY)

    return call


def _oneway(shell: Shell) -> Callable[[], None]:
    """Return what makes one one-way call."""
    client, service = shell.client, shell.service
    client.memory[PAYLOAD] = bytes(4)
    transact = _TRANSACTION.pack(uapi.BC_TRANSACTION, _HANDLE, 0, 1, uapi.TF_ONE_WAY, 0, 0, 4, 0, PAYLOAD, OFFSETS)

    def call() -> None:
        client.write_read(transact)
        service.received(uapi.BR_TRANSACTION)
        service.write_read(service.free)

    return call


def _object(pointer: int) -> bytes:
    return uapi.flat_binder_object.pack(uapi.BINDER_TYPE_BINDER, 0x100, pointer, pointer)


def _with_objects(shell: Shell) -> Callable[[], None]:
    """Return what makes one call that carries an object to which the service holds a reference."""
    first = _calls(shell, 1, _object(0x10000))
    client, service = shell.client, shell.service
    # The first call makes the node; the service takes a reference, the client says that it took its own.
    client.write_read(_TRANSACTION.pack(uapi.BC_TRANSACTION, 0, 0, 1, 0, 0, 0, 24, 8, PAYLOAD, OFFSETS))
    service.received(uapi.BR_TRANSACTION)
    acquire = uapi.BC_ACQUIRE.to_bytes(4, "little") + (1).to_bytes(4, "little")
    reply = _TRANSACTION.pack(uapi.BC_REPLY, 0, 0, 0, 0, 0, 0, 4, 0, PAYLOAD, OFFSETS)
    service.write_read(acquire + service.free + reply)
    service.write_read(b"")
    client.received(uapi.BR_REPLY)
    done = uapi.binder_ptr_cookie.pack(0x10000, 0x10000)
    client.free += uapi.BC_INCREFS_DONE.to_bytes(4, "little") + done + uapi.BC_ACQUIRE_DONE.to_bytes(4, "little") + done
    client.write_read(client.free, read=False)
    client.free = b""
    return first


MEASUREMENTS: Final[dict[str, Callable[[Shell], Callable[[], None]]]] = {
    "call of 4 bytes": lambda shell: _calls(shell, 0, bytes(4)),
    "call of 4 KiB": lambda shell: _calls(shell, 0, bytes(4096)),
    "call with an object": _with_objects,
    "one-way call": _oneway,
}


def measure(seconds: float = 0.5) -> dict[str, dict[str, float]]:
    """Return for each kind of call: calls and steps (ioctls) per second, and microseconds a call; best of five."""
    figures: dict[str, dict[str, float]] = {}
    for name, prepare in MEASUREMENTS.items():
        shell = Shell()
        call = prepare(shell)
        best = float("inf")
        count = 1000
        steps = 0
        for _ in range(5):
            shell.steps = 0
            begin = time.perf_counter()
            done = 0
            while time.perf_counter() < begin + seconds / 5:
                for _ in range(count):
                    call()
                done += count
            best = min(best, (time.perf_counter() - begin) / done)
            steps = shell.steps // done
        figures[name] = {"calls_per_second": 1 / best, "steps_per_second": steps / best, "us_per_call": best * 1e6}
    return figures
