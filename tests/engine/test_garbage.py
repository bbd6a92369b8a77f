"""Whatever bytes clients send, the engine answers with an error or does something sensible; it never raises."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from binderfs_fuse import uapi
from tests.engine.machine import Client, Machine
from tests.engine.wire import Parcel, fds

if TYPE_CHECKING:
    from tests.engine.machine import Caller

U32 = (1 << 32) - 1
U64 = (1 << 64) - 1

# Numbers that mean something here now and then.
small = st.integers(0, 9)
words = small | st.sampled_from([0x10, 0x20, 16384, 1 << 31, U32]) | st.integers(0, U32)
longs = words | st.sampled_from([U64, U64 - 7, 1 << 63, 1 << 62, 4 << 20]) | st.integers(0, U64)
commands = st.sampled_from(sorted(uapi.BC_NAMES))
transactions = (uapi.BC_TRANSACTION, uapi.BC_REPLY, uapi.BC_TRANSACTION_SG, uapi.BC_REPLY_SG)
flags = st.sampled_from([0, uapi.TF_ONE_WAY, uapi.TF_ACCEPT_FDS, uapi.TF_ONE_WAY | uapi.TF_UPDATE_TXN]) | words
sizes = st.none() | longs


@st.composite
def objects(draw: st.DrawFn) -> Parcel:
    """Make a parcel of objects with any fields, some of them sensible, at places that are right now and then."""
    content = Parcel(bytearray(draw(st.sampled_from([0, 8, 8, 12, 17000]))))
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["binder", "handle", "fd", "ptr", "fda", "other", "raw"]))
        if kind == "binder":
            content.binder(draw(longs), draw(small), draw(words), weak=draw(st.booleans()))
        elif kind == "handle":
            content.handle(draw(words), draw(words), weak=draw(st.booleans()))
        elif kind == "fd":
            content.fd(draw(words), draw(longs))
        elif kind == "ptr":
            parent = draw(st.none() | longs)
            content.ptr(
                fds(3, 3, 99) + draw(st.binary(max_size=40)),
                parent=parent,
                at=draw(longs),
                length=draw(sizes) if draw(st.integers(0, 9)) == 0 else None,
                readable=draw(st.none() | st.integers(0, 30)),
            )
            content.buffers_size &= U64
        elif kind == "fda":
            content.fda(draw(longs), parent=draw(longs), at=draw(longs))
        elif kind == "other":
            content.object(draw(words).to_bytes(4, "little") + draw(st.binary(max_size=40)))
        else:
            content.raw(draw(st.binary(max_size=24)))
    if draw(st.integers(0, 4)) == 0:
        content.offsets = draw(st.lists(longs, max_size=4))
    return content


@st.composite
def streams(draw: st.DrawFn, caller: Caller) -> bytes:
    """Make a write buffer of some commands, most of them whole."""
    stream = b""
    for _ in range(draw(st.integers(1, 6))):
        number = draw(commands)
        if number in transactions:
            stream += caller.transaction(
                draw(small | words),
                draw(objects()),
                number=number,
                code=draw(words),
                flags=draw(flags),
                data_size=draw(sizes) if draw(st.integers(0, 9)) == 0 else None,
                offsets_size=draw(sizes) if draw(st.integers(0, 9)) == 0 else None,
                buffers_size=draw(sizes),
            )
        else:
            stream += number.to_bytes(4, "little")
            stream += b"".join(draw(longs).to_bytes(8, "little") for _ in range((uapi.ioctl_size(number) + 7) // 8))[
                : uapi.ioctl_size(number)
            ]
    if draw(st.integers(0, 9)) == 0:
        stream = stream[: draw(st.integers(0, len(stream)))] + draw(st.binary(max_size=12))
    return stream


def callers(machine: Machine) -> list[Caller]:
    """Make a manager and a client with two threads each, who know each other's objects and a file."""
    machine.careful = False
    manager, client = machine.pair()
    machine.share(client, manager, 0x10, 0)
    machine.grant(manager, client, 0x20, 0, uapi.FLAT_BINDER_FLAG_ACCEPTS_FDS)
    machine.careful = True
    made: list[Caller] = []
    for process in (manager, client):
        process.open_fd("a file")
        made += [process, process.thread()]
    return made


def free_all(caller: Caller) -> list[bytes]:
    """Compose commands that free all buffers of a process, received or not."""
    process = caller.client.process
    if process.allocation is None:
        return []
    return [
        uapi.BC_FREE_BUFFER.to_bytes(4, "little") + (process.address + offset).to_bytes(8, "little")
        for offset in process.allocation.allocated
    ]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_any_commands(data: st.DataObject) -> None:
    """Four threads write whatever they like, read a little, and free what they can: all is gone in the end."""
    machine = Machine()
    all_callers = callers(machine)
    for _ in range(data.draw(st.integers(1, 8))):
        caller = data.draw(st.sampled_from(all_callers))
        if any(call.caller is caller for call in machine.waiting):
            continue
        stream = data.draw(streams(caller))
        if data.draw(st.integers(0, 3)) == 0:
            stream = b"".join(free_all(caller)) + stream
        read = data.draw(st.sampled_from([0, 256, 256, 80, 3]))
        call = caller.begin(
            stream, read=read, nonblock=data.draw(st.booleans()), fetched=data.draw(st.booleans())
        ).drive()
        if call.done:
            assert call.error in (0, -errno.EFAULT, -errno.EINVAL, -errno.EAGAIN)
            assert call.write_consumed <= len(stream) + 76
    machine.shut_down()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 250), longs, longs)
def test_any_bytes_as_commands(stream: bytes, write_size: int, write_consumed: int, read_consumed: int) -> None:
    """A write buffer of noise, of any size and consumed to any place, is an error sooner or later."""
    machine = Machine()
    _, client = machine.pair()
    call = client.exchange(
        stream,
        write_address=client.memory.place(stream),
        write_size=write_size,
        write_consumed=write_consumed,
        read_consumed=read_consumed,
        fetched=False,
        nonblock=True,
    )

    assert call.error in (0, -errno.EFAULT, -errno.EINVAL, -errno.EAGAIN)
    machine.shut_down()


@settings(max_examples=200, deadline=None)
@given(longs, longs, longs, longs, longs, longs)
def test_any_addresses_and_sizes(a: int, b: int, c: int, d: int, e: int, f: int) -> None:
    """A `struct binder_write_read` of any numbers is a fault or has nothing to do."""
    machine = Machine()
    _, client = machine.pair()
    call = client.begin_ioctl(uapi.BINDER_WRITE_READ, uapi.binder_write_read.pack(a, b, c, d, e, f), nonblock=True)
    call.drive()

    assert call.error in (0, -errno.EFAULT, -errno.EAGAIN)
    machine.shut_down()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(uapi.IOCTL_NAMES)) | words, st.data())
def test_any_ioctl(number: int, data: st.DataObject) -> None:
    """Any other ioctl with any argument says 0 or an errno, and gives back as many bytes as its number says."""
    machine = Machine()
    manager, client = machine.pair()
    machine.share(client, manager)
    caller = data.draw(st.sampled_from([manager, client]))
    size = uapi.ioctl_size(number)
    argument = b"".join(data.draw(words).to_bytes(4, "little") for _ in range((size + 3) // 4))[:size]
    if number == uapi.BINDER_WRITE_READ or size > 64:
        return
    call = caller.ioctl(number, argument)

    assert call.parked or call.error in (0, -errno.EINVAL, -errno.EBUSY, -errno.EPERM, -errno.EAGAIN)
    assert call.parked or len(call.argument) in (0, size)
    machine.shut_down()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_objects(data: st.DataObject) -> None:
    """Parcels of any objects arrive whole or not at all; freeing them lets everything go."""
    machine = Machine()
    manager, _, client, _ = callers(machine)
    assert isinstance(manager, Client)
    for _ in range(data.draw(st.integers(1, 4))):
        content: Parcel = data.draw(objects())
        number = uapi.BC_TRANSACTION_SG if content.buffers_size else uapi.BC_TRANSACTION
        sent = client.tell(data.draw(st.sampled_from([0, 1])), content, number=number, flags=data.draw(flags))
        if "BR_FAILED_REPLY" in sent.names:
            assert [] == manager.news()
            continue
        received = manager.read().received
        assert len(content.data) == received.data_size
        assert 8 * len(content.offsets) == received.offsets_size
        manager.free(received)
    assert manager.process.allocation is None or {} == manager.process.allocation.allocated
    machine.shut_down()
