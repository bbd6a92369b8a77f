"""The text of the logs, line by line as the driver prints it."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

import pytest

from binderfs_fuse import uapi
from binderfs_fuse.engine import logs
from binderfs_fuse.engine.effects import Pace
from binderfs_fuse.engine.work import TransactionComplete
from tests.engine.machine import MIB
from tests.engine.wire import parcel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from binderfs_fuse.engine import Process
    from tests.engine.machine import Client, Machine

HASH = re.compile(r"\b0{8}(?!0{8})[0-9a-f]{8}\b")


def lines(pieces: Iterator[str]) -> list[str]:
    """The lines of a log, with every pointer that is hashed as HASH."""
    return [
        line if line.startswith("  node") or "node work" in line else HASH.sub("HASH", line)
        for line in "".join(pieces).splitlines()
    ]


def state(machine: Machine) -> list[str]:
    """The lines of `state`."""
    return lines(machine.engine.logs.state())


def one(pieces: Iterator[str], start: str) -> str:
    """The one line that begins so."""
    (line,) = [line for line in lines(pieces) if line.startswith(start)]
    return line


# -- state


def test_an_empty_mount(machine: Machine) -> None:
    """Titles alone."""
    engine_logs = machine.engine.logs

    assert ["binder state:"] == lines(engine_logs.state())
    assert ["binder transactions:"] == lines(engine_logs.transactions())
    assert ["binder stats:"] == lines(engine_logs.stats())
    assert [] == lines(engine_logs.transaction_log())
    assert [] == lines(engine_logs.transaction_log(failed=True))
    assert [] == lines(engine_logs.proc(1))


def test_processes_are_listed_newest_first(machine: Machine) -> None:
    """With their context and their threads by number."""
    machine.client(pid=10)
    client = machine.client(pid=20)
    client.thread(19)
    client.thread(21)

    assert [
        "binder state:",
        "proc 20",
        "context binder",
        "  thread 19: l 00 need_return 0 tr 0",
        "  thread 20: l 00 need_return 0 tr 0",
        "  thread 21: l 00 need_return 0 tr 0",
        "proc 10",
        "context binder",
        "  thread 10: l 00 need_return 0 tr 0",
    ] == state(machine)


def test_a_thread_shows_its_looper(machine: Machine) -> None:
    """State bits as two hexadecimal digits, and whether it is to return."""
    client = machine.client(pid=10, fresh=True)
    client.poll()
    assert "  thread 10: l 20 need_return 1 tr 0" in state(machine)
    client.do(uapi.BC_ENTER_LOOPER)
    client.read()

    assert "  thread 10: l 32 need_return 0 tr 0" in state(machine)


def test_a_call_is_shown_on_both_sides(machine: Machine) -> None:
    """Outgoing and incoming, with buffer, node and sizes where they are known."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    client.nice = 5
    machine.now = 7_000_000_000
    client.send(0, parcel().binder(0x30, 0x40), code=0x1F, flags=uapi.TF_ACCEPT_FDS)
    machine.now += 12_999_999
    transaction = " transaction 2: HASH from 20:20 to 10:0 code 1f flags 10 pri 5 a0 r0 elapsed 12ms"
    assert [
        "binder state:",
        "proc 20",
        "context binder",
        "  thread 20: l 00 need_return 0 tr 0",
        "    outgoing" + transaction,
        "    node work 3: u0000000000000030 c0000000000000040",
        "    transaction complete",
        "  node 3: u0000000000000030 c0000000000000040 hs 0 hw 0 ls 0 lw 0 is 1 iw 1 tr 1 proc 10",
        "proc 10",
        "context binder",
        "  thread 10: l 02 need_return 0 tr 0",
        "  node 1: u0000000000000000 c0000000000000000 hs 1 hw 1 ls 2 lw 1 is 0 iw 0 tr 1",
        "  ref 4: desc 1 node 3 s 1 w 0 d 0000000000000000",
        "  buffer 2: 0 size 24:8:0 active",
        "  pending" + transaction + " node 1 size 24:8 offset 0",
    ] == state(machine)
    manager.read()

    assert (
        "    incoming transaction 2: HASH from 20:20 to 10:10 code 1f flags 10 pri 5 a0 r0 elapsed 12ms"
        " node 1 size 24:8 offset 0"
    ) in state(machine)
    manager.do(uapi.BC_FREE_BUFFER, manager.process.address)
    assert (
        "    incoming transaction 2: HASH from 20:20 to 10:10 code 1f flags 10 pri 5 a0 r0 elapsed 12ms buffer free"
    ) in state(machine)


def test_a_nested_call_is_shown_from_the_top(machine: Machine) -> None:
    """A thread's stack begins with its last call."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    handle = machine.share(client, manager)
    client.send()
    manager.read()
    manager.send(handle)
    shown = [line.split(":")[0] for line in state(machine) if "going transaction" in line or "coming" in line]

    assert [
        "    outgoing transaction 5",
        "    outgoing transaction 6",
        "    incoming transaction 5",
    ] == shown


def test_calls_can_be_told_apart(machine: Machine) -> None:
    """Each has a hash of its own, which is the same on both sides."""
    machine.manager(pid=10)
    for pid in (20, 30):
        machine.client(pid=pid).send()
    hashes = re.findall(r" transaction (\d): (0{8}[0-9a-f]{8}) ", "".join(machine.engine.logs.state()))

    assert 4 == len(hashes)
    assert 2 == len(set(hashes))
    assert 2 == len({pointer for _, pointer in hashes})


def test_a_call_whose_server_has_gone_goes_nowhere(machine: Machine) -> None:
    """The server's thread ended while its own call was served: its caller does not know yet."""
    manager, client, third = machine.manager(pid=10), machine.client(pid=20), machine.client(pid=30)
    handle = machine.share(third, manager)
    client.send()
    manager.read()
    manager.send(handle)
    manager.exit()

    assert ("    outgoing transaction 5: HASH from 20:20 to 0:0 code 0 flags 0 pri 0 a0 r0 elapsed 0ms") in state(
        machine
    )


def test_a_stack_is_shown_to_its_end(machine: Machine) -> None:
    """A thread that waits for a reply and serves a call back has both, the last first."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    handle = machine.share(client, manager)
    client.send()
    manager.read()
    manager.send(handle)
    client.read()
    shown = [line.split(":")[0] for line in lines(machine.engine.logs.proc(20)) if " transaction " in line]

    assert ["    incoming transaction 6", "    outgoing transaction 5"] == shown


def test_work_of_an_object_is_shown(machine: Machine) -> None:
    """In the process's list as in a thread's."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    manager.do(uapi.BC_RELEASE, machine.share(client, manager, 0x30, 0x40))

    assert "  node work 3: u0000000000000030 c0000000000000040" == lines(machine.engine.logs.proc(20))[-1]


def test_notifications_can_be_told_apart(machine: Machine) -> None:
    """By their hashes."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    for handle in [machine.share(client, manager, ptr) for ptr in (0x100, 0x200)]:
        manager.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, handle, 1)
    hashes = re.findall(r" d (0{8}[0-9a-f]{8})\n", "".join(machine.engine.logs.proc(10)))

    assert 2 == len(set(hashes))


def test_a_reply_is_shown_as_one(machine: Machine) -> None:
    """r1, and no node."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    client.send()
    manager.serve(flags=uapi.TF_ONE_WAY)

    assert (
        "    pending transaction 3: HASH from 10:10 to 20:20 code 0 flags 1 pri 0 a0 r1 elapsed 0ms size 0:0 offset 0"
    ) in state(machine)


def test_one_way_calls_are_shown_with_their_node(machine: Machine) -> None:
    """The first one as the process's work, those behind it as the node's."""
    machine.manager(pid=10)
    client = machine.client(pid=20)
    client.tell()
    client.tell(0, b"x")
    client.tell(0, b"xy")
    shown = state(machine)
    pending = [line for line in shown if line.startswith("    pending async")]

    assert [
        f"    pending async transaction {number}: HASH from 20:20 to 10:0 code 0 flags 1 pri 0 a1 r0 elapsed 0ms"
        f" node 1 size {size}:0 offset {8 * size:x}"
        for number, size in ((3, 1), (4, 2))
    ] == pending
    assert shown.index("  buffer 2: 0 size 0:0:0 active") < shown.index("  buffer 3: 8 size 1:0:0 active")


def test_a_buffer_is_delivered_once_its_transaction_is_gone(machine: Machine) -> None:
    """After a one-way call is read, or a call replied to."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    client.send(0, parcel().raw(b"12345678").ptr(b"abc"), flags=uapi.TF_ONE_WAY)
    manager.read()

    assert "  buffer 2: 0 size 48:8:8 delivered" in state(machine)


def test_dead_nodes_are_shown_first(machine: Machine) -> None:
    """The newest first, with who holds them; and their refs say that they are dead."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    for ptr in (0x100, 0x200):
        machine.share(client, manager, ptr, 0)
    client.die()
    shown = state(machine)

    assert [
        "binder state:",
        "dead nodes:",
        "  node 6: u0000000000000200 c0000000000000000 hs 1 hw 1 ls 0 lw 0 is 1 iw 1 tr 1 proc 10",
        "  node 3: u0000000000000100 c0000000000000000 hs 1 hw 1 ls 0 lw 0 is 1 iw 1 tr 1 proc 10",
        "proc 10",
    ] == shown[:5]
    assert "  ref 4: desc 1 dead node 3 s 1 w 0 d 0000000000000000" in shown


def test_a_node_shows_who_holds_it_newest_first(machine: Machine) -> None:
    """Processes by pid."""
    manager, client, other = machine.manager(pid=10), machine.client(pid=20), machine.client(pid=30)
    machine.pass_on(manager, other, parcel().handle(machine.share(client, manager)))

    assert one(machine.engine.logs.proc(20), "  node").endswith(" is 2 iw 2 tr 1 proc 30 10")


def test_refs_are_shown_by_number(machine: Machine) -> None:
    """With their counts, and a hash where a death notification is asked for."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    first = machine.share(client, manager, 0x100)
    machine.share(client, manager, 0x200)
    manager.do(uapi.BC_RELEASE, first)
    machine.share(client, manager, 0x300)
    manager.do(uapi.BC_INCREFS, 2)
    manager.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, 2, 1)
    text = "".join(machine.engine.logs.proc(10))
    shown = [line for line in text.splitlines() if line.startswith("  ref")]

    assert re.fullmatch(r"  ref \d+: desc 1 node \d+ s 1 w 0 d 0{16}", shown[0])
    assert re.fullmatch(r"  ref \d+: desc 2 node \d+ s 1 w 1 d 0{8}[0-9a-f]{8}", shown[1])
    assert not shown[1].endswith("0" * 16)


def test_every_kind_of_work_has_its_line(machine: Machine) -> None:
    """Errors by their number, notifications by their state."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    handles = [machine.share(client, manager, 0x100 * number) for number in range(1, 6)]
    for handle in handles[:3]:
        manager.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, handle, handle)
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handles[3], 4)
    manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handles[4], 5)
    manager.do(uapi.BC_CLEAR_FREEZE_NOTIFICATION, handles[4], 5)
    other = manager.thread(11)
    other.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handles[0], handles[0])
    client.die()
    other.do(uapi.BC_CLEAR_DEATH_NOTIFICATION, handles[1], handles[1])
    other.write(other.transaction(99))
    shown = lines(machine.engine.logs.proc(10))

    assert f"    transaction error: {uapi.BR_FAILED_REPLY}" in shown
    assert [
        "  has frozen binder",
        "  has cleared freeze notification",
        "  has cleared death notification",
        "  has cleared dead binder",
        "  has dead binder",
    ] == shown[-5:]


def test_told_notifications_have_one_line_each(machine: Machine) -> None:
    """However many wait for their acknowledgement."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    handles = [machine.share(client, manager, ptr) for ptr in (0x100, 0x200)]
    for handle in handles:
        manager.do(uapi.BC_REQUEST_FREEZE_NOTIFICATION, handle, handle)
        manager.do(uapi.BC_REQUEST_DEATH_NOTIFICATION, handle, handle)
    client.die()
    while manager.news():
        pass

    assert ["  has delivered dead binder", "  has delivered freeze binder"] == lines(machine.engine.logs.proc(10))[-2:]


def test_completions_that_the_driver_has_no_words_for(machine: Machine) -> None:
    """Pending ones are type 3 and suspected ones type 4, by its enumeration."""
    manager = machine.manager(pid=10)
    client = machine.client(pid=20)
    client.send(0, bytes(MIB // 2 - MIB // 10 - 8), flags=uapi.TF_ONE_WAY)
    client.send(0, b"x", flags=uapi.TF_ONE_WAY)
    client.freeze(manager.pid)
    client.send(0, b"x", flags=uapi.TF_ONE_WAY)
    manager.freeze(manager.pid)
    manager.process.is_frozen = True
    client.send(0, b"x", flags=uapi.TF_ONE_WAY)
    manager.process.is_frozen = False
    shown = [line for line in lines(machine.engine.logs.proc(20)) if "complete" in line or "unknown" in line]

    assert [
        "    transaction complete",
        "    unknown work: type 4",
        "    transaction complete",
        "    unknown work: type 3",
    ] == shown


def test_pointers_can_be_hashed(machine: Machine) -> None:
    """The same pointer has the same hash in one mount, another in the next; null is null."""
    seen = set()
    for again in (machine, type(machine)()):
        manager, client = again.manager(pid=10), again.client(pid=20)
        again.share(client, manager, 0x1234, 0)
        node = one(again.engine.logs.state(hashed=True), "  node 3")
        found = re.fullmatch(r"  node 3: u(0{8}[0-9a-f]{8}) c0{16} hs .*", node)
        assert found
        assert node == one(again.engine.logs.state(hashed=True), "  node 3")
        seen.add(found[1])
    again.shut_down()

    assert 2 == len(seen)
    assert f"{0x1234:016x}" not in seen


# -- transactions


def test_transactions_leave_out_what_is_idle(machine: Machine) -> None:
    """Processes and threads with nothing under way are not mentioned, nor nodes without one-way calls, nor refs."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    machine.share(client, manager)
    manager.thread(11)
    assert ["binder transactions:"] == lines(machine.engine.logs.transactions())
    client.thread(21).send()
    transaction = " transaction 5: HASH from 20:21 to 10:0 code 0 flags 0 pri 0 a0 r0 elapsed 0ms"

    assert [
        "binder transactions:",
        "proc 20",
        "context binder",
        "  thread 21: l 00 need_return 0 tr 0",
        "    outgoing" + transaction,
        "    transaction complete",
        "proc 10",
        "context binder",
        "  buffer 5: 0 size 0:0:0 active",
        "  pending" + transaction + " node 1 size 0:0 offset 0",
    ] == lines(machine.engine.logs.transactions())


def test_transactions_show_nodes_with_one_way_calls(machine: Machine) -> None:
    """As long as there is one that has not been freed."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    client.tell()
    manager.read()

    assert [
        "binder transactions:",
        "proc 10",
        "context binder",
        "  node 1: u0000000000000000 c0000000000000000 hs 1 hw 1 ls 2 lw 1 is 0 iw 0 tr 1",
        "  buffer 2: 0 size 0:0:0 delivered",
    ] == lines(machine.engine.logs.transactions())


def test_transactions_show_buffers_that_are_not_freed(machine: Machine) -> None:
    """A process with nothing else to show."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    client.send()
    manager.free(manager.read().received)
    manager.reply(b"x")
    client.news()

    assert [
        "binder transactions:",
        "proc 20",
        "context binder",
        "  buffer 3: 0 size 1:0:0 delivered",
    ] == lines(machine.engine.logs.transactions())


def test_transactions_can_hide_pointers(machine: Machine) -> None:
    """As the state does; by themselves they do not."""
    machine.manager(pid=10)
    client = machine.client(pid=20)
    client.send(0, parcel().binder(0x1234), flags=uapi.TF_ONE_WAY)
    assert f"    node work 3: u{0x1234:016x} c{0:016x}" in lines(machine.engine.logs.transactions())
    text = "".join(machine.engine.logs.transactions(hashed=True))

    assert re.search(r"node work 3: u0{8}[0-9a-f]{8} c0{16}\n", text)
    assert f"{0x1234:016x}" not in text


def test_a_process_log_shows_all_its_opens(machine: Machine) -> None:
    """Each with its title; other processes are not in it."""
    machine.client(pid=10)
    machine.client(pid=20)
    machine.client(pid=10, context=machine.engine.add_context("hwbinder"))

    assert [
        "binder proc state:",
        "proc 10",
        "context hwbinder",
        "  thread 10: l 00 need_return 0 tr 0",
        "binder proc state:",
        "proc 10",
        "context binder",
        "  thread 10: l 00 need_return 0 tr 0",
    ] == lines(machine.engine.logs.proc(10))


# -- stats


def test_stats_count_for_the_mount_and_for_each_process(machine: Machine) -> None:
    """Commands, returns and objects; zeros are left out, and processes come newest first."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    client.send(0, parcel().binder(0x10))
    manager.thread(11).read(nonblock=True)
    waiting = manager.thread(12).read()
    assert waiting.parked

    assert [
        "binder stats:",
        "BC_TRANSACTION: 1",
        "BC_ENTER_LOOPER: 1",
        "BR_TRANSACTION: 1",
        "proc: active 2 total 2",
        "thread: active 4 total 4",
        "node: active 2 total 2",
        "ref: active 1 total 1",
        "transaction: active 1 total 1",
        "transaction_complete: active 1 total 1",
        "proc 20",
        "context binder",
        "  threads: 1",
        "  requested threads: 0+0/0",
        "  ready threads 0",
        "  free async space 0",
        "  nodes: 1",
        "  refs: 0 s 0 w 0",
        "  buffers: 0",
        "  pages: 0:0:0",
        "  pages high watermark: 0",
        "  pending transactions: 0",
        "  BC_TRANSACTION: 1",
        "proc 10",
        "context binder",
        "  threads: 3",
        "  requested threads: 0+0/0",
        "  ready threads 1",
        f"  free async space {MIB // 2}",
        "  nodes: 1",
        "  refs: 1 s 1 w 0",
        "  buffers: 1",
        "  pages: 1:0:255",
        "  pages high watermark: 1",
        "  pending transactions: 0",
        "  BC_ENTER_LOOPER: 1",
        "  BR_TRANSACTION: 1",
    ] == lines(machine.engine.logs.stats())


def test_stats_of_loopers_and_space(machine: Machine) -> None:
    """Requested, started and allowed threads; what is left for one-way calls; what waits."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    manager.ioctl(uapi.BINDER_SET_MAX_THREADS, (0xFFFF_FFFE).to_bytes(4, "little"))
    client.tell(0, bytes(5000))
    manager.free(manager.read().received)
    manager.thread(11).do(uapi.BC_REGISTER_LOOPER)
    client.tell(0, bytes(800))
    manager.read()
    client.thread(21).send()
    client.thread(22).send()
    client.tell()
    client.thread(23).do(uapi.BC_ACQUIRE, 0)
    client.thread(23).do(uapi.BC_INCREFS, 0)
    shown = lines(machine.engine.logs.stats())
    at = shown.index("proc 10")

    assert [
        "  threads: 2",
        "  requested threads: 1+1/-2",
        "  ready threads 0",
        f"  free async space {MIB // 2 - 808}",
        "  nodes: 1",
        "  refs: 0 s 0 w 0",
        "  buffers: 4",
        "  pages: 1:1:254",
        "  pages high watermark: 2",
        "  pending transactions: 2",
    ] == shown[at + 2 : at + 12]
    assert "  refs: 1 s 1 w 1" in shown


def test_counters_are_signed_32_bits(machine: Machine) -> None:
    """As C's %d shows them."""
    client = machine.client()
    client.process.stats.bc[0] = 0x8000_0000
    client.process.stats.br[0] = 0xFFFF_FFFF
    shown = lines(machine.engine.logs.stats())

    assert ["  BC_TRANSACTION: -2147483648", "  BR_ERROR: -1"] == shown[-2:]


def test_objects_that_are_gone_are_still_counted(machine: Machine) -> None:
    """Active 0, and how many there have been."""
    machine.client().die()

    assert ["binder stats:", "proc: active 0 total 1", "thread: active 0 total 1"] == lines(machine.engine.logs.stats())


# -- transaction logs


def test_the_transaction_log(machine: Machine) -> None:
    """Calls, one-way calls and replies with their ends; numbers are signed; those on their way are incomplete."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    client.send(0, b"12345")
    manager.serve()
    client.news()
    client.write(
        client.transaction(0xFFFF_FFFE, data_size=0xFFFF_FFFF, offsets_size=0x1_0000_0005, flags=uapi.TF_ONE_WAY)
    )
    client.news()
    call = client.begin(client.transaction(0, b"x"))
    call.advance()

    assert [
        "2: call  from 20:20 to 10:0 context binder node 1 handle 0 size 5:0 ret 0/0 l=0",
        "3: reply from 10:10 to 20:20 context binder node 0 handle 0 size 0:0 ret 0/0 l=0",
        f"4: async from 20:20 to 0:0 context binder node 0 handle -2 size -1:5 ret {uapi.BR_FAILED_REPLY}/-22 l=3253",
        "5: call  from 20:20 to 10:0 context binder node 1 handle 0 size 1:0 ret 0/0 l=0 (incomplete)",
    ] == lines(machine.engine.logs.transaction_log())
    assert [
        f"4: async from 20:20 to 0:0 context binder node 0 handle -2 size -1:5 ret {uapi.BR_FAILED_REPLY}/-22 l=3253",
    ] == lines(machine.engine.logs.transaction_log(failed=True))
    call.drive()


# -- pieces


@pytest.mark.parametrize("kind", ["objects", "calls"])
def test_long_logs_come_in_pieces(machine: Machine, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Each is short, so that the lock need not be held for long; together they are the same text."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    for ptr in range(5):
        if kind == "objects":
            machine.share(client, manager, 0x10 * (ptr * 3 % 5) + 0x10)
        else:
            client.tell()
    names = ["state", "transactions", "stats"]
    texts = [functools.partial(getattr(machine.engine.logs, name)) for name in names]
    texts += [functools.partial(machine.engine.logs.proc, pid) for pid in (10, 20)]
    whole = ["".join(text()) for text in texts]
    monkeypatch.setattr(logs, "_PIECE", 2)
    monkeypatch.setattr(logs, "_SHARE", 2)
    pieces = [list(text()) for text in texts]

    assert whole == ["".join(text) for text in pieces]
    # A process begins with two lines of its own; its statistics are some more.
    del pieces[names.index("stats")]
    assert all(piece.count("\n") <= 4 for text in pieces for piece in text)


def test_a_process_that_goes_while_it_is_shown(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its nodes, those are shown that were there when their turn came."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    for ptr in range(5):
        machine.share(client, manager, 0x10 * ptr + 0x10)
    monkeypatch.setattr(logs, "_PIECE", 2)
    pieces = machine.engine.logs.state()
    text = ""
    while "  node" not in text:
        text += next(pieces)
    before = text.count("  node")
    client.die()
    text += "".join(pieces)

    assert 1 <= before <= 2
    assert before == sum(line.startswith("  node") and " proc 10" in line for line in text.splitlines())


def test_a_thread_that_goes_while_others_are_shown(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not shown, if its turn had not come."""
    client = machine.client(pid=10)
    client.thread(11)
    client.thread(12)
    monkeypatch.setattr(logs, "_PIECE", 1)
    pieces = machine.engine.logs.proc(10)
    text = next(pieces) + next(pieces)
    assert [] == list(client.process.threads[11].release(Pace(64)))
    text += "".join(pieces)

    assert ["10", "12"] == re.findall(r"^  thread (\d+)", text, re.MULTILINE)


def test_what_is_shown_in_pieces_is_the_same(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line by line there is all the text that there is at once, and no piece has more than a line."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    for ptr in (0x100, 0x200):
        machine.share(client, manager, ptr)
    other = machine.client(pid=30)
    for _ in range(3):
        other.send(flags=uapi.TF_ONE_WAY)
        client.send(flags=uapi.TF_ONE_WAY)
    whole = "".join(machine.engine.logs.state()), "".join(machine.engine.logs.stats())
    monkeypatch.setattr(logs, "_PIECE", 1)
    monkeypatch.setattr(logs, "_SHARE", 1)
    pieces = list(machine.engine.logs.state())

    assert whole == ("".join(pieces), "".join(machine.engine.logs.stats()))
    assert all(piece.count("\n") <= 3 for piece in pieces)


def shown_works(client: Client, happening: Callable[[Process], object]) -> list[int]:
    """Show four items of a process's work, and let something happen to them after the second."""
    works = [TransactionComplete(uapi.BR_TRANSACTION_COMPLETE) for _ in range(4)]
    for work in works:
        client.process.enqueue(work)
    shown = logs._works(client.process.todo)
    seen = [next(shown), next(shown)]
    happening(client.process)
    seen += shown
    while client.process.todo.count:
        client.process.todo.popleft()
    return [works.index(work) for work in seen if isinstance(work, TransactionComplete) and work in works]


@pytest.mark.parametrize(
    ("happening", "expected"),
    [
        (lambda _: None, [0, 1, 2, 3]),
        (lambda process: process.todo.popleft(), [0, 1, 2, 3]),
        (lambda process: (process.todo.popleft(), process.todo.popleft()), [0, 1, 2, 3]),
        (lambda process: process.todo.remove(process.todo.first.next), [0, 1, 2, 3]),
        (lambda process: process.todo.remove(process.todo.last), [0, 1, 2]),
        (lambda process: [process.todo.popleft() for _ in range(4)], [0, 1]),
        (lambda process: process.todo.append(process.todo.popleft()), [0, 1, 2, 3, 0]),
    ],
    ids=["nothing", "first goes", "two go", "present goes", "last goes", "all go", "first comes again"],
)
def test_work_that_goes_while_it_is_shown(
    client: Client, happening: Callable[[Process], object], expected: list[int]
) -> None:
    """Whatever stays is shown, once; nothing is lost because the item before it has gone."""
    assert expected == shown_works(client, happening)


def test_a_buffer_that_is_freed_while_others_are_shown(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest are shown, also where the one that is shown just now has become part of a free one before it."""
    manager, client = machine.manager(pid=10), machine.client()
    for _ in range(4):
        client.send(flags=uapi.TF_ONE_WAY)
    allocation = manager.process.allocation
    assert allocation is not None
    numbers = [buffer.debug_id for buffer in allocation.allocated.values()]
    monkeypatch.setattr(logs, "_PIECE", 1)
    pieces = machine.engine.logs.proc(10)
    text = ""
    while text.count("  buffer") < 3:
        text += next(pieces)
    for _ in range(3):
        manager.free(manager.read(nonblock=True).received)
    text += "".join(pieces)

    assert [str(number) for number in numbers] == re.findall(r"^  buffer (\d+):", text, re.MULTILINE)


def test_a_dead_node_that_goes_while_others_are_shown(machine: Machine) -> None:
    """It is not shown any more."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    handles = [machine.share(client, manager, ptr) for ptr in (0x100, 0x200)]
    client.die()
    pieces = machine.engine.logs.state()
    text = next(pieces) + next(pieces)
    manager.do(uapi.BC_RELEASE, handles[0])
    text += "".join(pieces)

    assert ["200"] == re.findall(r"u0+([12]00) ", text)


def owing(machine: Machine) -> Client:
    """A client that has been told all about a node that nobody refers to any more, but for the answer that it owes."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    client.tell(0, parcel().binder(0x30, 0x40))
    client.do(uapi.BC_INCREFS_DONE, 0x30, 0x40)
    manager.free(manager.read().received)
    client.read(nonblock=True)
    client.poll()
    machine.poll.woken.clear()
    return client


@pytest.mark.parametrize("log", ["state", "proc"])
def test_looking_makes_work(machine: Machine, log: str) -> None:
    """A node that its owner owes an answer for is shown as its work once more, and wakes it."""
    client = owing(machine)
    engine_logs = machine.engine.logs
    shown = lines(engine_logs.state() if log == "state" else engine_logs.proc(20))
    machine.look()

    assert "  node work 3: u0000000000000030 c0000000000000040" in shown
    assert [client.process] == machine.poll.woken


def test_looking_at_a_node_that_is_in_use_changes_nothing(machine: Machine) -> None:
    """As long as somebody refers to it there is nothing to say."""
    manager, client = machine.manager(pid=10), machine.client(pid=20)
    machine.share(client, manager)
    first, second = state(machine), state(machine)

    assert first == second
    assert not any("node work" in line for line in second)


def test_looking_can_go_unnoticed(machine: Machine) -> None:
    """Then the text is the same, and the owner has nothing to read."""
    owing(machine)
    before = lines(machine.engine.logs.state(unnoticed=True))
    again = lines(machine.engine.logs.state(unnoticed=True))
    machine.look()

    assert before == again
    assert "  node 3: u0000000000000030 c0000000000000040 hs 1 hw 1 ls 1 lw 0 is 0 iw 0 tr 1" in again
    assert not any("node work" in line for line in again)
    assert [] == machine.poll.woken
