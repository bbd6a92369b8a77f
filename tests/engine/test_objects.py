"""Objects in transactions: how each kind is translated, what is refused, and what a freed buffer lets go of."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import CopyIn, CopyToBuffer, GetFile
from binderfs_fuse.engine.objects import _Refused
from tests.engine.wire import Parcel, command, fds, parcel

if TYPE_CHECKING:
    from binderfs_fuse.engine.effects import Effect
    from binderfs_fuse.engine.node import Ref
    from tests.engine.machine import Call, Client, Machine

U64 = (1 << 64) - 1
_BINDER = uapi.BINDER_TYPE_BINDER
_HANDLE = uapi.BINDER_TYPE_HANDLE


def carry(client: Client, manager: Client, content: Parcel, **options: int) -> Call:
    """Send a parcel one-way, and read it."""
    client.tell(0, content, **options)
    return manager.read(nonblock=True)


def refuse(machine: Machine, client: Client, content: Parcel, **options: int) -> tuple[int, int]:
    """Send a parcel that is refused: why, and at which line of the driver."""
    names = client.tell(0, content, **options).names
    assert ["BR_NOOP", "BR_FAILED_REPLY"] == names
    name, parameter, line = machine.failure()
    assert "BR_FAILED_REPLY" == name
    return parameter, line


def binder_at(data: bytes, offset: int = 0) -> tuple[int, int, int, int]:
    """Type, flags, ptr and cookie of a BINDER."""
    kind, flags, ptr, cookie = uapi.flat_binder_object.unpack_from(data, offset)
    return kind, flags, ptr, cookie


def handle_at(data: bytes, offset: int = 0) -> tuple[int, int, int, int]:
    """Type, flags, handle and cookie of a HANDLE, whose upper half is zero."""
    assert bytes(4) == data[offset + 12 : offset + 16]
    kind, flags, handle, cookie = uapi.flat_binder_object_handle.unpack_from(data, offset)
    return kind, flags, handle, cookie


def ref(client: Client, handle: int) -> Ref:
    """What a client holds under a handle."""
    return client.process.refs_by_desc[handle]


def test_a_refusal_says_why() -> None:
    """What is raised inside names the error."""
    assert (-errno.EBADF,) == _Refused(-errno.EBADF).args


# -- binders and handles


@pytest.mark.parametrize("weak", [False, True])
def test_a_binder_becomes_a_handle(manager: Client, client: Client, weak: bool) -> None:
    """The receiver gets a handle of the same strength, with the flags, and holds it with the buffer."""
    call = carry(client, manager, parcel().binder(0x10, 0x20, 0x17F, weak=weak))
    kind = uapi.BINDER_TYPE_WEAK_HANDLE if weak else _HANDLE

    assert (kind, 0x17F, 1, 0) == handle_at(call.body)
    assert (not weak, weak) == (ref(manager, 1).strong, ref(manager, 1).weak)
    manager.free(call.received)
    assert {} == manager.process.refs_by_desc


def test_a_binder_makes_its_node_with_its_flags(manager: Client, client: Client) -> None:
    """The first mention of a ptr makes the node; later ones with other flags do not change it."""
    told = client.tell(0, parcel().binder(0x10, 0x20, 0x1105).binder(0x10, 0x20, 0))
    node = client.process.nodes[0x10]

    assert (0x20, 5, True, True) == (node.cookie, node.min_priority, node.accept_fds, node.txn_security_ctx)
    assert 2 == ref(manager, 1).strong
    assert 1 == node.internal_strong_refs
    assert ["BR_NOOP", "BR_INCREFS", "BR_ACQUIRE", "BR_TRANSACTION_COMPLETE"] == told.names


def test_a_binder_must_keep_its_cookie(machine: Machine, manager: Client, client: Client) -> None:
    """The same ptr with another cookie: EINVAL; a node that was made for it alone is gone again."""
    machine.share(client, manager, 0x10, 0x20)

    assert (-errno.EINVAL, 3553) == refuse(machine, client, parcel().binder(0x30, 1).binder(0x10, 0x21))
    assert [0x10] == list(client.process.nodes)


@pytest.mark.parametrize("weak", [False, True])
def test_a_handle_comes_home_as_a_binder(machine: Machine, manager: Client, client: Client, weak: bool) -> None:
    """A handle to the receiver's own object arrives as its ptr and cookie, and holds the node with the buffer."""
    handle = machine.grant(manager, client, 0x10, 0x20)
    call = carry(client, manager, parcel().handle(handle, 0x105, weak=weak))
    node = manager.process.nodes[0x10]
    kind = uapi.BINDER_TYPE_WEAK_BINDER if weak else _BINDER

    assert (kind, 0x105, 0x10, 0x20) == binder_at(call.body)
    assert (not weak, weak) == (node.local_strong_refs, node.local_weak_refs)
    manager.free(call.received)
    assert (0, 0) == (node.local_strong_refs, node.local_weak_refs)


@pytest.mark.parametrize("weak", [False, True])
def test_a_handle_to_a_third_process_is_renumbered(
    machine: Machine, manager: Client, client: Client, weak: bool
) -> None:
    """The receiver gets its own number for the same node."""
    third = machine.client()
    machine.share(third, manager, 0x10, 0x20)
    machine.share(third, manager, 0x30, 0x40)
    call = client.call()
    request = manager.read()
    manager.reply(parcel().handle(2, 0x101, weak=weak))
    manager.free(request.received)
    kind = uapi.BINDER_TYPE_WEAK_HANDLE if weak else _HANDLE

    assert (kind, 0x101, 1, 0) == handle_at(call.body)
    assert third.process.nodes[0x30] is ref(client, 1).node
    assert (not weak, weak) == (ref(client, 1).strong, ref(client, 1).weak)


def test_a_handle_to_a_dead_object_can_be_passed_on(machine: Machine, manager: Client, client: Client) -> None:
    """It stays a handle, to the dead node."""
    third = machine.client()
    handle = machine.share(third, manager)
    third.die()
    assert 1 == machine.pass_on(manager, client, parcel().handle(handle))

    assert ref(client, 1).node.process is None
    assert "BR_DEAD_REPLY" in client.call(1).names


def test_an_unknown_handle_is_refused(machine: Machine, manager: Client, client: Client) -> None:
    """EINVAL; and a weak one does not do for a strong one."""
    assert (-errno.EINVAL, 3572) == refuse(machine, client, parcel().handle(1))
    assert (-errno.EINVAL, 3572) == refuse(machine, client, parcel().handle(1, weak=True))
    handle = machine.grant(manager, client)
    client.do(uapi.BC_INCREFS, handle)
    client.do(uapi.BC_RELEASE, handle)

    assert (-errno.EINVAL, 3572) == refuse(machine, client, parcel().handle(handle))
    assert "BR_TRANSACTION" in carry(client, manager, parcel().handle(handle, weak=True)).names


def test_what_came_before_a_refused_object_is_let_go(machine: Machine, manager: Client, client: Client) -> None:
    """A binder, a handle and a descriptor ahead of a bad object leave no trace."""
    handle = machine.grant(manager, client)
    fd = client.open_fd("a file")
    content = parcel().binder(0x10).handle(handle).fd(fd).handle(99)
    node = manager.process.nodes[0x10]

    assert (-errno.EINVAL, 3572) == refuse(machine, client, content)
    assert 1 == client.fds[fd].holders
    assert {} == manager.process.refs_by_desc
    assert (0, 1) == (node.local_strong_refs, node.internal_strong_refs)


def test_a_reference_given_up_by_hand_is_not_given_up_again(machine: Machine, manager: Client, client: Client) -> None:
    """A receiver that releases more than it holds loses the handle; freeing the buffer then does nothing."""
    call = carry(client, manager, parcel().binder(0x10))
    manager.do(uapi.BC_RELEASE, 1)
    assert {} == manager.process.refs_by_desc
    manager.free(call.received)

    assert {} == manager.process.refs_by_desc
    assert machine.engine.stats.created[3] == machine.engine.stats.deleted[3]


def test_a_dead_receiver_lets_its_own_object_go(machine: Machine, manager: Client, client: Client) -> None:
    """A call with the receiver's own object to a receiver that dies meanwhile leaves nothing of that object."""
    handle = machine.grant(manager, client)

    def hook(call: Call, effect: Effect) -> None:
        del call
        if isinstance(effect, GetFile):
            manager.die()

    machine.before_effect = hook
    content = parcel().handle(handle).handle(handle, weak=True).fd(client.open_fd("a file"))

    assert ["BR_NOOP", "BR_DEAD_REPLY"] == client.tell(0, content).names
    assert [0] == [node.local_strong_refs for node in machine.engine.dead_nodes]


# -- descriptors


def test_a_descriptor_is_installed_and_numbered(manager: Client, client: Client) -> None:
    """The receiver's number stands where the sender's was; flags and cookie stay, the rest of the field is zero."""
    manager.open_fd("in the way")
    call = carry(client, manager, parcel().fd(client.open_fd("a file"), 0x1234_5678_9ABC, 0x77))

    assert (uapi.BINDER_TYPE_FD, 0x77, 4, 0x1234_5678_9ABC) == uapi.binder_fd_object.unpack(call.body)
    assert bytes(4) == call.body[12:16]
    assert "a file" == manager.fds[4].name


def test_descriptors_are_installed_in_their_order(manager: Client, client: Client) -> None:
    """The first one gets the lowest number."""
    numbers = [client.open_fd(name) for name in ("a", "b", "c")]
    content = parcel()
    for number in (numbers[1], numbers[2], numbers[0]):
        content.fd(number)
    carry(client, manager, content)

    assert {3: "b", 4: "c", 5: "a"} == {fd: file.name for fd, file in manager.fds.items()}


def test_a_bad_descriptor_is_refused(machine: Machine, client: Client) -> None:
    """EBADF for one that is not open, or whatever the machine says."""
    assert (-errno.EBADF, 3594) == refuse(machine, client, parcel().fd(9))
    machine.answer(GetFile, -errno.EPERM)
    assert (-errno.EPERM, 3594) == refuse(machine, client, parcel().fd(client.open_fd("a file")))


def test_a_node_that_does_not_want_descriptors_gets_none(machine: Machine) -> None:
    """EPERM, before the descriptor is looked at."""
    machine.manager(flags=0)
    client = machine.client()

    assert (-errno.EPERM, 3594) == refuse(machine, client, parcel().fd(9))


@pytest.mark.parametrize("flags", [0, uapi.TF_ACCEPT_FDS])
def test_a_reply_may_carry_descriptors_if_its_call_says_so(
    machine: Machine, manager: Client, client: Client, flags: int
) -> None:
    """TF_ACCEPT_FDS of the call decides; without it the reply fails with EPERM."""
    call = client.call(flags=flags)
    manager.read()
    manager.reply(parcel().fd(manager.open_fd("a file")))

    if flags:
        assert ["a file"] == [client.fds[fd].name for fd in call.installed]
    else:
        assert ["BR_NOOP", "BR_TRANSACTION_COMPLETE", "BR_FAILED_REPLY"] == call.names
        assert ("BR_FAILED_REPLY", -errno.EPERM, 3594) == machine.failure()


def test_a_descriptor_that_nobody_reads_is_dropped(manager: Client, client: Client) -> None:
    """A transaction that dies unread gives its files back."""
    fd = client.open_fd("a file")
    client.tell(0, parcel().fd(fd))
    assert 2 == client.fds[fd].holders
    manager.die()

    assert 1 == client.fds[fd].holders


# -- buffers


def test_a_buffer_is_copied_and_its_address_replaced(manager: Client, client: Client) -> None:
    """The bytes stand behind the offsets, and the object names their new address."""
    call = carry(client, manager, parcel().raw(b"12345678").ptr(b"hello").ptr(b"there!!!!"))
    _, flags, first, length, _, _ = uapi.binder_buffer_object.unpack_from(call.body, 8)
    _, _, second, _, _, _ = uapi.binder_buffer_object.unpack_from(call.body, 48)

    assert (0, 5) == (flags, length)
    assert call.received.buffer + 88 + 16 == first
    assert first + 8 == second
    assert b"hello" == manager.see(first, 5)
    assert b"there!!!!" == manager.see(second, 9)


def test_a_buffer_in_a_buffer_is_found_by_its_new_address(manager: Client, client: Client) -> None:
    """The parent's bytes are copied around the pointer, which is the child's new address."""
    content = parcel().raw(bytes(8)).ptr(b"abcdefgh" + bytes(8) + b"ijklmnop").ptr(b"child", parent=0, at=8)
    call = carry(client, manager, content)
    _, _, parent, _, _, _ = uapi.binder_buffer_object.unpack_from(call.body, 8)
    kind, flags, child, length, index, at = uapi.binder_buffer_object.unpack_from(call.body, 48)

    assert (uapi.BINDER_TYPE_PTR, uapi.BINDER_BUFFER_FLAG_HAS_PARENT, 5, 0, 8) == (kind, flags, length, index, at)
    assert b"abcdefgh" + child.to_bytes(8, "little") + b"ijklmnop" == manager.see(parent, 24)


def test_an_empty_buffer_has_an_address(manager: Client, client: Client) -> None:
    """No bytes are copied, and it shares its address with what follows."""
    call = carry(client, manager, parcel().ptr(b"").ptr(b"x"))
    _, _, first, length, _, _ = uapi.binder_buffer_object.unpack_from(call.body, 0)
    _, _, second, _, _, _ = uapi.binder_buffer_object.unpack_from(call.body, 40)

    assert (second, 0) == (first, length)


def test_buffers_need_the_room_that_was_asked_for(machine: Machine, client: Client) -> None:
    """More bytes than buffers_size has left: EINVAL; just as many are fine."""
    content = parcel().ptr(bytes(8)).ptr(bytes(9))
    assert (-errno.EINVAL, 3683) == refuse(machine, client, content, buffers_size=16)

    assert ["BR_TRANSACTION_COMPLETE"] == client.tell(0, content, buffers_size=24).names[1:]


def test_unreadable_buffers_fail_the_call(machine: Machine, manager: Client, client: Client) -> None:
    """EINVAL at the copying, for the first as for a later one, before or behind a fix-up."""
    for content in (
        parcel().ptr(bytes(8), readable=4),
        parcel().ptr(bytes(8)).ptr(bytes(8), readable=0).ptr(bytes(8)),
        parcel().raw(bytes(8)).ptr(bytes(24), readable=4).ptr(b"x", parent=0, at=8),
        parcel().raw(bytes(8)).ptr(bytes(24), readable=20).ptr(b"x", parent=0, at=8),
    ):
        assert (-errno.EINVAL, 3754) == refuse(machine, client, content)
    assert {} == manager.process.allocation.allocated  # type: ignore[union-attr]


@pytest.mark.parametrize("at", [1, 2, 6])
def test_a_pointer_must_be_aligned_to_four(machine: Machine, client: Client, at: int) -> None:
    """A fix-up at another place fails at the copying."""
    content = parcel().raw(bytes(8)).ptr(bytes(24)).ptr(b"x", parent=0, at=at)

    assert (-errno.EINVAL, 3754) == refuse(machine, client, content)


def test_a_pointer_at_a_multiple_of_four_is_fine(manager: Client, client: Client) -> None:
    """Also where that is none of eight."""
    call = carry(client, manager, parcel().raw(bytes(8)).ptr(b"1234" + bytes(8)).ptr(b"x", parent=0, at=4))
    _, _, parent, _, _, _ = uapi.binder_buffer_object.unpack_from(call.body, 8)
    _, _, child, _, _, _ = uapi.binder_buffer_object.unpack_from(call.body, 48)

    assert b"1234" + child.to_bytes(8, "little") == manager.see(parent, 12)


def nested(*children: tuple[int, int], size: int = 32) -> Parcel:
    """Compose buffers of one size, the first without a parent, the others each with (parent, at)."""
    content = parcel().raw(bytes(8)).ptr(bytes(size))
    for parent, at in children:
        content.ptr(bytes(size), parent=parent, at=at)
    return content


@pytest.mark.parametrize(
    ("children", "fine"),
    [
        ([(0, 0), (0, 8), (0, 24)], True),
        ([(0, 8), (0, 8)], False),
        ([(0, 8), (0, 15)], False),
        ([(0, 8), (0, 0)], False),
        ([(0, 0), (1, 0), (2, 0), (0, 8)], True),
        ([(0, 0), (1, 0), (0, 8), (1, 8)], False),
        ([(0, 0), (1, 8), (1, 16), (0, 16)], True),
        ([(0, 0), (1, 8), (1, 8)], False),
        ([(0, 24)], True),
        ([(0, 25)], False),
        ([(1, 0)], False),
        ([(9, 0)], False),
        ([(U64, 0)], False),
        ([(0, U64)], False),
    ],
)
def test_pointers_are_fixed_up_in_order(
    machine: Machine, client: Client, children: list[tuple[int, int]], fine: bool
) -> None:
    """Within one parent at growing places, and only in the last one or one of its parents; else EINVAL."""
    content = nested(*children)
    if fine:
        assert ["BR_TRANSACTION_COMPLETE"] == client.tell(0, content).names[1:]
    else:
        assert (-errno.EINVAL, 3718) == refuse(machine, client, content)


def test_pointers_are_written_wherever_they_come(manager: Client, client: Client) -> None:
    """A buffer gets its second pointer after those of its first child: each stands where it belongs, once."""
    content = parcel().raw(bytes(8)).ptr(b"A" * 32).ptr(b"B" * 24, parent=0, at=0)
    content.ptr(b"C" * 16, parent=1, at=8).ptr(b"D" * 8, parent=2, at=0).ptr(b"E" * 8, parent=0, at=16)
    call = carry(client, manager, content)
    a, b, c, d, e = (uapi.binder_buffer_object.unpack_from(call.body, 8 + 40 * index)[2] for index in range(5))

    def pointer(address: int) -> bytes:
        return address.to_bytes(8, "little")

    assert pointer(b) + b"A" * 8 + pointer(e) + b"A" * 8 == manager.see(a, 32)
    assert b"B" * 8 + pointer(c) + b"B" * 8 == manager.see(b, 24)
    assert pointer(d) + b"C" * 8 == manager.see(c, 16)
    assert b"D" * 8 + b"E" * 8 == manager.see(d, 16)
    assert e == d + 8


def test_a_parent_must_hold_a_pointer(machine: Machine, client: Client) -> None:
    """A parent of seven bytes is too small, one of eight is not."""
    assert (-errno.EINVAL, 3718) == refuse(machine, client, nested((0, 0), size=7))
    assert ["BR_TRANSACTION_COMPLETE"] == client.tell(0, nested((0, 0), size=8)).names[1:]


def test_the_first_object_of_the_data_is_no_parent(machine: Machine, client: Client) -> None:
    """The driver takes offset 0 for "no object": a buffer there cannot have children."""
    assert (-errno.EINVAL, 3718) == refuse(machine, client, parcel().ptr(bytes(8)).ptr(b"x", parent=0))


def test_a_binder_is_no_parent(machine: Machine, client: Client) -> None:
    """The parent's index must be that of a buffer."""
    content = parcel().raw(bytes(8)).ptr(bytes(8)).binder(0x10).ptr(b"x", parent=1)

    assert (-errno.EINVAL, 3718) == refuse(machine, client, content)


def test_a_buffer_without_a_parent_ends_the_line(machine: Machine, client: Client) -> None:
    """A sibling of the root's in between: the root's children cannot come after it."""
    content = parcel().raw(bytes(8)).ptr(bytes(8)).ptr(bytes(8)).ptr(b"x", parent=0)

    assert (-errno.EINVAL, 3718) == refuse(machine, client, content)


# -- arrays of descriptors


def array(client: Client, *names: str, at: int = 0, size: int | None = None) -> Parcel:
    """Compose a buffer with an array of new files at an offset, and the array's object."""
    numbers = fds(*(client.open_fd(name) for name in names))
    content = bytes(at) + numbers
    return parcel().raw(bytes(8)).ptr(content.ljust(size or len(content), b"!")).fda(len(names), parent=0, at=at)


def test_an_array_is_not_copied(client: Client) -> None:
    """Only the bytes before and behind it are."""
    call = client.begin(client.transaction(0, array(client, "a", "b", at=12, size=32), flags=uapi.TF_ONE_WAY)).drive()

    assert [12, 12] == [effect.size for effect in call.effects if isinstance(effect, CopyToBuffer)]


def test_an_array_may_be_long(manager: Client, client: Client) -> None:
    """Each descriptor is taken from its place."""
    carry(client, manager, array(client, "a", "b", "c", "d"))

    assert ["a", "b", "c", "d"] == [file.name for file in manager.fds.values()]


def test_a_reply_may_carry_an_array(manager: Client, client: Client) -> None:
    """If its call accepts descriptors."""
    call = client.call(flags=uapi.TF_ACCEPT_FDS)
    manager.read()
    manager.reply(array(manager, "a", "b"))

    assert ["a", "b"] == [client.fds[fd].name for fd in call.installed]


def test_an_array_in_any_buffer_is_closed_with_it(manager: Client, client: Client) -> None:
    """Also where the buffer is not the first of its region."""
    client.send(0, b"in the way")
    first = manager.read()
    other = manager.thread()
    client.thread().send(0, array(client, "a", "b"))
    call = other.read()
    assert 2 == len(manager.fds)
    manager.free(first.received)
    manager.free(call.received)

    assert {} == manager.fds


def test_an_array_of_descriptors_is_installed_in_its_buffer(manager: Client, client: Client) -> None:
    """The numbers in the copied buffer are the receiver's; the bytes around them are copied."""
    manager.open_fd("in the way")
    call = carry(client, manager, array(client, "a", "b", at=4, size=16))
    _, _, address, _, _, _ = uapi.binder_buffer_object.unpack_from(call.body, 8)

    assert bytes(4) + fds(4, 5) + b"!!!!" == manager.see(address, 16)
    assert ["in the way", "a", "b"] == [manager.fds[fd].name for fd in (3, 4, 5)]
    assert (uapi.BINDER_TYPE_FDA, 0, 2, 0, 4) == uapi.binder_fd_array_object.unpack_from(call.body, 48)


def test_freeing_an_array_closes_its_descriptors(manager: Client, client: Client) -> None:
    """BC_FREE_BUFFER closes those of arrays, not single ones, and the ioctl returns rather than waits."""
    call = carry(client, manager, array(client, "a", "b").fd(client.open_fd("single")))
    freeing = manager.exchange(command(uapi.BC_FREE_BUFFER, call.received.buffer))

    assert ["single"] == [file.name for file in manager.fds.values()]
    assert ["BR_NOOP"] == freeing.names
    assert manager.read().parked


def test_freeing_several_arrays_closes_all(manager: Client, client: Client) -> None:
    """Also in one write."""
    calls = []
    for name in ("a", "b"):
        client.thread().send(0, array(client, name))
        calls.append(manager.thread().read(nonblock=True))
    manager.write(*(command(uapi.BC_FREE_BUFFER, call.received.buffer) for call in calls))

    assert {} == manager.fds


def test_freeing_an_empty_array_waits_as_ever(manager: Client, client: Client) -> None:
    """Without descriptors there is nothing to return for."""
    call = carry(client, manager, array(client))

    assert manager.exchange(command(uapi.BC_FREE_BUFFER, call.received.buffer)).parked


def test_an_array_that_is_never_read_is_dropped(manager: Client, client: Client) -> None:
    """The files are given back, and nobody's descriptors are closed."""
    client.tell(0, array(client, "a"))
    manager.open_fd("its own")
    manager.die()

    assert [1] == [file.holders for file in client.fds.values()]
    assert [1] == [file.holders for file in manager.fds.values()]


@pytest.mark.parametrize("kind", ["beyond", "itself", "not a buffer", "at 0"])
def test_an_array_needs_a_buffer_for_a_parent(machine: Machine, client: Client, kind: str) -> None:
    """Its parent must be a buffer before it, and not the first thing in the data (which is out of order)."""
    content, line = {
        "beyond": (parcel().raw(bytes(8)).ptr(bytes(8)).fda(0, parent=5), 3618),
        "itself": (parcel().raw(bytes(8)).ptr(bytes(8)).fda(0, parent=1), 3618),
        "not a buffer": (parcel().raw(bytes(8)).binder(0x10).fda(0, parent=0), 3618),
        "at 0": (parcel().ptr(bytes(8)).fda(0, parent=0), 3631),
    }[kind]

    assert (-errno.EINVAL, line) == refuse(machine, client, content)


def test_arrays_come_in_order(machine: Machine, client: Client) -> None:
    """Two arrays, or an array and a pointer, in one buffer follow each other."""
    for first, second, fine in ((0, 4, True), (0, 0, False), (4, 4, False), (4, 8, True), (4, 0, False)):
        numbers = fds(*(client.open_fd("x") for _ in range(3)))
        content = parcel().raw(bytes(8)).ptr(numbers).fda(1, parent=0, at=first).fda(1, parent=0, at=second)
        if fine:
            assert ["BR_TRANSACTION_COMPLETE"] == client.tell(0, content).names[1:]
        else:
            assert (-errno.EINVAL, 3631) == refuse(machine, client, content)
    content = parcel().raw(bytes(8)).ptr(fds(client.open_fd("x")) + bytes(12))
    assert (-errno.EINVAL, 3718) == refuse(machine, client, content.fda(1, parent=0).ptr(b"y", parent=0, at=3))


def test_an_array_and_a_pointer_share_a_buffer(manager: Client, client: Client) -> None:
    """The pointer behind the array is written, and so is what lies between."""
    content = parcel().raw(bytes(8)).ptr(fds(client.open_fd("a")) + b"gap!" + bytes(8) + b"end")
    call = carry(client, manager, content.fda(1, parent=0).ptr(b"child", parent=0, at=8))
    _, _, address, _, _, _ = uapi.binder_buffer_object.unpack_from(call.body, 8)
    _, _, child, _, _, _ = uapi.binder_buffer_object.unpack_from(call.body, 80)

    assert fds(3) + b"gap!" + child.to_bytes(8, "little") + b"end" == manager.see(address, 19)
    assert b"child" == manager.see(child, 5)


@pytest.mark.parametrize(
    ("count", "at"), [(3, 0), (2, 1), (2, 4), (1, 8), (1, U64), (1 << 62, 0), ((1 << 62) - 1, 0), (U64, 0)]
)
def test_an_array_must_fit_its_buffer(machine: Machine, client: Client, count: int, at: int) -> None:
    """More descriptors than the parent has bytes for, wherever they begin: EINVAL."""
    content = parcel().raw(bytes(8)).ptr(fds(client.open_fd("a"), client.open_fd("b")))

    assert (-errno.EINVAL, 3665) == refuse(machine, client, content.fda(count, parent=0, at=at))


def test_an_array_must_not_go_beyond_what_its_buffer_says(machine: Machine, client: Client) -> None:
    """Though the sender's memory goes on with good descriptors."""
    numbers = fds(*(client.open_fd(name) for name in "abcd"))
    content = parcel().raw(bytes(8)).ptr(numbers, length=8).fda(1, parent=0, at=8)

    assert (-errno.EINVAL, 3665) == refuse(machine, client, content)
    assert [1, 1, 1, 1] == [file.holders for file in client.fds.values()]


def test_an_array_must_be_aligned(machine: Machine, client: Client) -> None:
    """Its place in the copy and in the sender's memory is a multiple of four."""
    numbers = fds(client.open_fd("a"))
    content = parcel().raw(bytes(8)).ptr(bytes(2) + numbers + bytes(2)).fda(1, parent=0, at=2)
    assert (-errno.EINVAL, 3665) == refuse(machine, client, content)
    content = parcel().raw(bytes(8)).ptr(bytes(8)).fda(1, parent=0)
    content.pointed = []
    content.data[16:24] = (client.memory.place(bytes(2) + numbers + bytes(2)) + 2).to_bytes(8, "little")

    assert (-errno.EINVAL, 3665) == refuse(machine, client, content)


def test_an_array_must_be_readable(machine: Machine, client: Client) -> None:
    """Descriptors up to the fault are taken, and given back: EINVAL."""
    numbers = [client.open_fd(name) for name in "ab"]
    content = parcel().raw(bytes(8)).ptr(fds(*numbers), readable=6).fda(2, parent=0)

    assert (-errno.EINVAL, 3665) == refuse(machine, client, content)
    assert [1, 1] == [client.fds[fd].holders for fd in numbers]


def test_an_array_with_a_bad_descriptor_is_refused(machine: Machine, client: Client) -> None:
    """The error of the descriptor, and those before it are given back."""
    fd = client.open_fd("a")
    content = parcel().raw(bytes(8)).ptr(fds(fd, 99)).fda(2, parent=0)

    assert (-errno.EBADF, 3665) == refuse(machine, client, content)
    assert 1 == client.fds[fd].holders


def test_an_array_is_refused_where_descriptors_are(machine: Machine) -> None:
    """A node that accepts no descriptors gets none in arrays either; an empty array is no matter."""
    manager = machine.manager(flags=0)
    client = machine.client()

    assert (-errno.EPERM, 3665) == refuse(machine, client, array(client, "a"))
    assert "BR_TRANSACTION" in carry(client, manager, array(client)).names


# -- offsets, and the data in between


def test_data_between_objects_is_copied(manager: Client, client: Client) -> None:
    """Around two objects all bytes are the sender's."""
    content = parcel().raw(b"before--").binder(0x10).raw(b"in between--").binder(0x20).raw(b"behind")
    body = carry(client, manager, content).body

    assert (b"before--", b"in between--", b"behind") == (body[:8], body[32:44], body[68:])
    assert (1, 2) == (handle_at(body, 8)[2], handle_at(body, 44)[2])


def test_the_offsets_arrive(manager: Client, client: Client) -> None:
    """The receiver finds the offsets behind the data."""
    received = carry(client, manager, parcel().raw(b"1234").binder(0x10).binder(0x20)).received

    assert received.buffer + 56 == received.offsets
    assert (4).to_bytes(8, "little") + (28).to_bytes(8, "little") == manager.see(received.offsets, 16)


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([8, 8], (-errno.EFAULT, 3512)),
        ([8, 0], (-errno.EFAULT, 3512)),
        ([8, 24], (-errno.EFAULT, 3512)),
        ([64], (-errno.EINVAL, 3525)),
        ([65], (-errno.EFAULT, 3512)),
        ([U64], (-errno.EFAULT, 3512)),
        ([44], (-errno.EINVAL, 3525)),
        ([61], (-errno.EINVAL, 3525)),
        ([10], (-errno.EINVAL, 3525)),
        ([40], (-errno.EINVAL, 3525)),
    ],
)
def test_bad_offsets_are_refused(
    machine: Machine, client: Client, offsets: list[int], expected: tuple[int, int]
) -> None:
    """Offsets grow by whole objects (EFAULT if not), and name aligned objects of a known type that are all there."""
    content = parcel().raw(bytes(8)).binder(0x10).raw(bytes(32))
    content.offsets = offsets

    assert expected == refuse(machine, client, content)


def test_an_object_cut_off_by_the_end_of_the_data_is_refused(machine: Machine, client: Client) -> None:
    """Each kind needs all of its bytes, and is fine with just these."""
    kinds = (
        parcel().binder(0x10),
        parcel().fd(client.open_fd("a file")),
        parcel().ptr(b"x"),
        parcel().raw(bytes(8)).ptr(b"x").fda(0, parent=0),
    )
    for whole in kinds:
        assert "BR_TRANSACTION_COMPLETE" == client.tell(0, whole).names[-1]
        del whole.data[-4:]

        assert (-errno.EINVAL, 3525) == refuse(machine, client, whole, buffers_size=whole.buffers_size)


def test_an_object_cut_off_by_a_fault_is_refused(machine: Machine, client: Client) -> None:
    """As much as the largest object is read, where the data goes on so far: a fault there counts."""
    content = parcel().binder(0x10).raw(bytes(40))
    readable = client.memory.place(bytes(content.data), accessible=39)
    assert (-errno.EINVAL, 3525) == refuse(machine, client, content, data_address=readable)
    readable = client.memory.place(bytes(content.data), accessible=40)

    assert (-errno.EFAULT, 3743) == refuse(machine, client, content, data_address=readable)


def test_unreadable_data_before_an_object_is_a_fault(machine: Machine, client: Client) -> None:
    """What comes before the object is copied first."""
    content = parcel().raw(bytes(64)).binder(0x10)
    readable = client.memory.place(bytes(content.data), accessible=8)

    assert (-errno.EFAULT, 3512) == refuse(machine, client, content, data_address=readable)


LARGE = 20000


def test_large_data_goes_straight_into_the_region(manager: Client, client: Client) -> None:
    """More than 16 KiB are copied in fragments around the objects, and each object is read by itself."""
    content = parcel().raw(b"a" * LARGE).binder(0x10).raw(b"b" * LARGE)
    call = client.begin(client.transaction(0, content, flags=uapi.TF_ONE_WAY)).drive()
    copies = [(e.size, e.offset) for e in call.effects if isinstance(e, CopyToBuffer)]
    reads = [e.size for e in call.effects if isinstance(e, CopyIn)]
    body = manager.read().body

    assert [(LARGE, 0), (LARGE, LARGE + 24)] == copies
    assert [8, 40] == reads
    assert b"a" * LARGE + body[LARGE : LARGE + 24] + b"b" * LARGE == body
    assert 1 == handle_at(body, LARGE)[2]


def test_small_data_is_read_at_once(client: Client) -> None:
    """Up to 16 KiB with objects are read whole, and cut up in the engine."""
    for size, reads in ((16384, [8, 16384]), (16392, [8, 32, 8])):
        content = parcel().raw(bytes(size - 32)).binder(0x10).raw(bytes(8))
        call = client.begin(client.transaction(0, content, flags=uapi.TF_ONE_WAY)).drive()

        assert reads[:2] == [e.size for e in call.effects if isinstance(e, CopyIn)]


@pytest.mark.parametrize(
    ("accessible", "expected"),
    [
        (100, (-errno.EFAULT, 3512)),
        (LARGE + 10, (-errno.EINVAL, 3525)),
        (LARGE + 40, (-errno.EFAULT, 3743)),
        (2 * LARGE + 23, (-errno.EFAULT, 3743)),
    ],
)
def test_faults_in_large_data(machine: Machine, client: Client, accessible: int, expected: tuple[int, int]) -> None:
    """They are told apart as in small data."""
    content = parcel().raw(b"a" * LARGE).binder(0x10).raw(b"b" * LARGE)
    readable = client.memory.place(bytes(content.data), accessible=accessible)

    assert expected == refuse(machine, client, content, data_address=readable)


def test_large_data_without_objects_is_one_copy(client: Client) -> None:
    """With room for buffers, and none used, the data is copied whole."""
    call = client.begin(
        client.transaction(0, b"x" * 100, flags=uapi.TF_ONE_WAY, buffers_size=8, number=uapi.BC_TRANSACTION_SG)
    ).drive()

    assert [100] == [e.size for e in call.effects if isinstance(e, CopyToBuffer)]
    assert ["BR_TRANSACTION_COMPLETE"] == client.news()
