"""What a step asks of the machine, and what it leaves behind.

The engine does no I/O. Where the kernel's driver would copy from user memory, sleep, or look at a task, a step yields
one of these effects; the shell performs it *without* the engine's lock and sends the answer back into the step. When it
is done, the last thing that it yields is its `Outcome`, and the shell lets go of it. (Were that its return value, each
step would end in a StopIteration, for which compiled code makes a traceback: 7 % of the server's work for a call.)

Invariants:
- Every effect is answered exactly once, and concerns the task whose request the step serves (`FindMapping` alone
  names another process, and touches none of its memory).
- Between a yield and its answer any other step may run: what a step knows about shared state must be looked up again.
- Between two yields a step touches a bounded number of elements: a walk of any length gives a `Turn` after each
  `Engine.chunk` of them. So the lock is never held for longer than a chunk takes, however much a client piles up.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, final

if TYPE_CHECKING:
    from collections.abc import Callable

    from binderfs_fuse.engine.priority import Scheduling
    from binderfs_fuse.engine.process import Process
    from binderfs_fuse.engine.work import Work, WorkList


class Region(Protocol):
    """A receive region: the pages that one open's `mmap` shows to its client.

    Offsets and sizes are in bytes; the engine never reads a region, since its client may have written to it.
    """

    def store(self, offset: int, data: bytes | bytearray) -> None:
        """Put `data` at `offset`; the pages are present (`Populate` came first)."""


class File(Protocol):
    """A reference to somebody's open file, owned by the engine until it hands it over in an `Outcome`."""

    def close(self) -> None:
        """Drop the reference; called exactly once."""


class CopyIn:
    """Read `size` bytes at `address` of the caller; answered with the bytes up to the first fault."""

    __slots__ = ("address", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size


class CopyOut:
    """Write `data` at `address` of the caller; answered with the number of bytes written."""

    __slots__ = ("address", "data")

    def __init__(self, address: int, data: bytes) -> None:
        self.address = address
        self.data = data


class CopyToBuffer:
    """Copy `size` bytes at `address` of the caller to `offset` of a region, once; answered with the bytes copied."""

    __slots__ = ("address", "offset", "region", "size")

    def __init__(self, address: int, size: int, region: Region, offset: int) -> None:
        self.address = address
        self.size = size
        self.region = region
        self.offset = offset


class FindMapping:
    """Ask where `process` has mapped its device; answered with (address, size in bytes) or None."""

    __slots__ = ("process",)

    def __init__(self, process: Process) -> None:
        self.process = process


class Populate:
    """Make `size` bytes at `offset` of a region present (whole pages); answered with 0 or a negative errno."""

    __slots__ = ("offset", "region", "size")

    def __init__(self, region: Region, offset: int, size: int) -> None:
        self.region = region
        self.offset = offset
        self.size = size


class GetFile:
    """Take a reference to descriptor `fd` of the caller; answered with a `File` or a negative errno."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd


class FindRoom:
    """Ask whether the caller has numbers free for `count` more descriptors; answered with 0 or -EMFILE."""

    __slots__ = ("count",)

    def __init__(self, count: int) -> None:
        self.count = count


class GetSecurityContext:
    """Ask for the caller's security label; answered with its bytes, no NUL, or a negative errno."""

    __slots__ = ()


class SetNice:
    """Give the caller's thread a nice value in -20..19, as far as its rights go; answered with the one it then has."""

    __slots__ = ("nice",)

    def __init__(self, nice: int) -> None:
        self.nice = nice


class SetScheduling:
    """Give the caller's thread a scheduler policy and priority (see priority.py); answered with what it then has.

    `verify`: as far as its rights go. Otherwise it had them before.
    """

    __slots__ = ("scheduling", "verify")

    def __init__(self, scheduling: Scheduling, *, verify: bool) -> None:
        self.scheduling = scheduling
        self.verify = verify


@final
class Turn:
    """Let other steps go first: this one has touched a chunk of elements, and has more to touch.

    Answered with None, or with True where the caller is being killed: a write then ends behind the last command.
    """

    __slots__ = ()


TURN: Final = Turn()
# Elements that a step touches, at most, before it gives a turn: some 50 us of compiled code.
CHUNK: Final = 64


@final
class Pace:
    """Counts the elements that a step has touched since its last turn; one turn is due after each `chunk` of them."""

    __slots__ = ("chunk", "left")

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.left = chunk

    def spend(self, count: int = 1) -> bool:
        """Count elements; true where a turn is due, which the caller yields."""
        self.left -= count
        if self.left > 0:
            return False
        self.left = self.chunk
        return True


class Wait:
    """Park the step until `Engine.ready` names this very object.

    Answered with 0 when woken; -EINTR for a signal; -EAGAIN where the descriptor turns out to be non-blocking;
    -ETIMEDOUT after `timeout_ms` milliseconds, where that is not None. `parked` is the engine's: true from the yield
    until the wake-up. `owner` is the shell's, to find the parked request again.
    """

    __slots__ = ("owner", "parked", "timeout_ms")

    def __init__(self, timeout_ms: int | None = None) -> None:
        self.timeout_ms = timeout_ms
        self.parked = False
        self.owner: Any = None


# What an outcome has that is not of a read. Nothing is added to it.
_NOTHING: Final[list[tuple[int, Work, WorkList]]] = []


@final
class Outcome:
    """What a finished step tells the shell to do.

    `error`      0 or a negative errno: the ioctl's result.
    `argument`   bytes to lay over the ioctl's argument (also with an error), or b"".
    `data`       bytes to store at `address` in the caller's memory. If they cannot be stored whole, the shell runs
                 `Process.undeliver` and takes that step's outcome instead.
    `files`      [(File, Region, offset)]: descriptors to install in the caller, close-on-exec; each number goes into
                 the region as an unsigned 32-bit integer. Then `Process.installed`, or on failure
                 `Process.install_failed`.
    `closes`     descriptor numbers to close in the caller.
    `buffers`    [(Region, offset, size)]: what clients are to see anew: cleared, and last what this delivers.

    The others are the engine's, to take back what cannot be stored: `delivered` are the items of work in `data`, each
    as (where it ends there, item, the list it came from); `stored` is how many bytes of the read were stored before
    these.
    """

    __slots__ = (
        "address",
        "argument",
        "buffers",
        "closes",
        "data",
        "delivered",
        "error",
        "files",
        "stored",
    )

    files: Sequence[tuple[File, Region, int]]
    closes: Sequence[int]
    buffers: Sequence[tuple[Region, int, int]]
    delivered: list[tuple[int, Work, WorkList]]

    def __init__(self, error: int = 0, argument: bytes = b"", address: int = 0, data: bytes | bytearray = b"") -> None:
        self.error = error
        self.argument = argument
        self.address = address
        self.data = data
        self.files = ()
        self.closes = ()
        self.buffers = ()
        self.delivered = _NOTHING
        self.stored = 0


Effect: TypeAlias = (
    CopyIn
    | CopyOut
    | CopyToBuffer
    | FindMapping
    | Populate
    | GetFile
    | FindRoom
    | GetSecurityContext
    | SetNice
    | SetScheduling
    | Turn
    | Wait
)
Step: TypeAlias = Generator[Effect | Outcome, Any, None]
# A part of a step that asks for nothing else.
Turns: TypeAlias = Generator[Turn, Any, None]


def conclude(step: Step, turn: Callable[[], object]) -> Outcome:
    """Drive a step that asks for nothing but turns to its outcome; `turn` is called for each, with the lock held.

    `turn` releases the lock, lets others have it, and takes it again.
    """
    while True:
        effect = step.send(None)
        if isinstance(effect, Outcome):
            return effect
        assert isinstance(effect, Turn)  # such steps ask for nothing else
        turn()


def drain(items: list[Any], pace: Pace) -> Turns:
    """Empty a list that may be long from its end: to free it whole takes as long as it has items."""
    while items:
        count = min(len(items), pace.chunk)
        del items[-count:]
        if pace.spend(count):
            yield TURN
