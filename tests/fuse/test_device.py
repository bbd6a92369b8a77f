import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from binderfs_fuse import uapi
from binderfs_fuse._system import lib
from binderfs_fuse.engine.context import Task
from binderfs_fuse.engine.effects import CopyIn, Outcome, Turn
from binderfs_fuse.fuse.channel import plain
from binderfs_fuse.fuse.lane import Lane
from binderfs_fuse.host.region import Kind
from binderfs_fuse.limits import Limits
from tests.conftest import LogWatch
from tests.fuse.conftest import Client, Served, descriptors, until

Serve = Callable[..., Served]
CALLS = 2000
ANOTHER_USER = 1000


def letters(size: int) -> str:
    """Return what a server prints of a call of that size."""
    return "abcdefghijklmnopqrstuvwxyzabcdef"[:size] if size <= 32 else f"{size} of {size} letters"


def mapped_regions() -> int:
    """Return how many regions are mapped in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:binder")


@contextmanager
def running() -> Iterator[int]:
    """Keep a process running, never asleep; give its id."""
    program = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def goes_on(served: Served) -> None:
    """Assert that other clients are served: what they open and ask, and what they say to each other."""
    server = served.start("serve", "1")
    assert server.line() == "manager 0"
    assert server.line() == "going"
    assert served.run("call", "3") == ["done"]
    assert server.rest() == ["abc"]
    assert served.run("version", str(CALLS)) == ["version 0", "8"]


def stuck(served: Served, part: str, threads: int = 1, action: str = "stuck") -> Client:
    """Start a client whose ioctls get stuck, and wait until so many threads of the server are."""
    client = served.start(action, part, str(threads))
    assert client.line() == "going"
    (handle,) = (handle for handle, opened in served.plane.opens.items() if opened.identity.pid == client.pid)
    # On a busy machine a thread that is merely slow counts as stuck for a while.
    until(lambda: [lane.fields.fh for lane in list(served.channel.crew.stuck)].count(handle) == threads)
    return client


# What any client does.


def test_an_ioctl_is_answered(served: Served) -> None:
    """BINDER_VERSION gives the protocol version, however often."""
    assert served.run("version", str(CALLS)) == ["version 0", "8"]


@pytest.mark.parametrize("size", ["1", "4096", "16383"])
def test_an_unknown_ioctl_is_refused(served: Served, size: str) -> None:
    """An ioctl that the driver does not have is EINVAL, however much it carries."""
    assert served.run("unknown", size) == ["unknown EINVAL"]


def test_a_device_is_not_a_file(serve: Serve) -> None:
    """There is nothing to read or write, and no size to change."""
    expected = ["read EINVAL", "write EINVAL", "ftruncate EINVAL", "fallocate EOPNOTSUPP"]

    assert expected == [line.replace("ENOSYS", "EINVAL") for line in serve(region="passthrough").run("plain")]


@pytest.mark.parametrize("size", [1, 4, 4095, 4097, 70000, 400000])
def test_a_call_arrives_whole(served: Served, size: int) -> None:
    """The data of a call is in the receiver's memory, of whatever size, and the reply in the caller's."""
    server = served.start("serve", "1")
    assert [server.line(), server.line()] == ["manager 0", "going"]

    assert served.run("call", str(size)) == ["done"]
    assert [letters(size)] == server.rest()


def test_many_calls_use_the_region_anew(served: Served) -> None:
    """Buffers that are freed and filled again show their new contents."""
    server = served.start("serve", "20")
    assert [server.line(), server.line()] == ["manager 0", "going"]
    sizes = [3, 9000, 26, 5000, 8, 12000, 1, 4096, 30, 7] * 2
    for size in sizes:
        assert served.run("call", str(size)) == ["done"]

    assert [letters(size) for size in sizes] == server.rest()


# Waiting.


def test_a_signal_ends_a_wait(served: Served) -> None:
    """A thread that waits in its ioctl gets EINTR for a signal that it handles."""
    assert served.run("signalled") == ["first 0", "second EINTR"]
    assert not served.plane._parked


def test_a_client_that_waits_can_be_killed(served: Served) -> None:
    """SIGKILL ends a client that waits, and nothing of it is left."""
    client = served.start("wait")
    assert [client.line(), client.line()] == ["first 0", "going"]
    until(lambda: served.plane._parked)
    client.kill()

    until(lambda: not served.plane.opens and not served.plane._parked and not served.engine.processes)
    assert not served.plane._by_process


def test_a_nonblocking_open_does_not_wait(served: Served) -> None:
    """O_NONBLOCK given to open makes a read with nothing to read EAGAIN."""
    assert served.run("wait-nonblocking") == ["first 0", "second EAGAIN"]


def test_a_descriptor_made_nonblocking_is_noticed(served: Served) -> None:
    """O_NONBLOCK set by fcntl on an open device ends its wait with EAGAIN; cleared again, a read waits."""
    expected = ["first 0", "second EAGAIN", "third EAGAIN", "fourth EAGAIN", "fifth EINTR"]

    assert expected == served.run("wait-fcntl")


def test_a_descriptor_made_nonblocking_late_is_noticed(served: Served) -> None:
    """O_NONBLOCK set by fcntl on an open that has long been waiting, now and then, is noticed in the next wait."""
    expected = ["first 0", *["again EINTR"] * 6, "late EAGAIN"]

    assert expected == served.run("wait-fcntl-late")


def test_a_caller_that_does_not_sleep_yet_is_looked_at_again(served: Served) -> None:
    """Whether O_NONBLOCK is set cannot be told of a task that still runs, as on a busy machine: it is asked later."""
    client = served.start("wait")
    assert [client.line(), client.line()] == ["first 0", "going"]
    until(lambda: any(call.looked == 2 for call in served.plane._parked.values()))
    (call,) = served.plane._parked.values()
    to_be_done = served.channel.crew._clock._entries
    until(lambda: not to_be_done)
    with running() as call.task.tid:
        served.plane._look_at([call])
        until(lambda: to_be_done)
    call.task.tid = client.pid

    until(lambda: not to_be_done)


def test_a_blocking_wait_is_left_alone(served: Served) -> None:
    """A call that has been looked at and found blocking waits on."""
    client = served.start("wait")
    assert [client.line(), client.line()] == ["first 0", "going"]
    until(lambda: any(call.looked == 2 for call in served.plane._parked.values()))

    assert all(call.wait is not None for call in served.plane._parked.values())


def test_a_poller_is_woken(served: Served) -> None:
    """A poll waits for a call, says POLLIN for each, and nothing when there is none left."""
    poller = served.start("poll", "3")
    assert [poller.line(), poller.line()] == ["manager 0", "going"]
    for _ in range(3):
        until(lambda: any(opened.kh for opened in served.plane.opens.values()))
        assert served.run("send", "1") == ["send 0"]
        assert [poller.line(), poller.line()] == ["poll 0", "data"]

    assert poller.rest() == ["idle 0"]


def test_what_is_parked_is_not_held(served: Served) -> None:
    """Waiting clients cost no threads."""
    clients = [served.start("wait") for _ in range(8)]
    for client in clients:
        assert [client.line(), client.line()] == ["first 0", "going"]
    until(lambda: len(served.plane._parked) == 8)

    assert len(served.channel.crew.lanes) == 2


# Memory that is not there.


def test_a_read_that_cannot_be_stored_is_a_fault(served: Served) -> None:
    """A read buffer that is not mapped is EFAULT."""
    assert served.run("blind") == ["first 0", "blind EFAULT"]


def test_commands_in_a_page_of_the_device(served: Served) -> None:
    """A command stream in the device's own memory, which the server may have to serve, is read: zeros, EINVAL."""
    assert served.run("own-page") == ["own-page EINVAL"]
    goes_on(served)


@pytest.mark.parametrize("part", ["COMMANDS", "READ"])
def test_a_client_that_is_stuck_does_not_stop_others(served: Served, part: str) -> None:
    """While a thread of the server waits for a client's memory, no lock is held, and others are served."""
    stuck(served, part)

    assert served.engine.lock.acquire(timeout=1)
    served.engine.lock.release()
    assert served.channel.crew._guard.acquire(timeout=1)
    served.channel.crew._guard.release()
    goes_on(served)


def test_a_sender_that_is_stuck_does_not_stop_the_receiver(served: Served) -> None:
    """A transaction whose data cannot be copied holds up its sender alone."""
    server = served.start("serve", "1")
    assert [server.line(), server.line()] == ["manager 0", "going"]
    stuck(served, "DATA")

    assert served.run("call", "5") == ["done"]
    assert server.rest() == ["abcde"]


@pytest.mark.parametrize("part", ["COMMANDS", "READ"])
@pytest.mark.parametrize("action", ["stuck", "stuck-shared"])
def test_a_client_that_is_stuck_can_be_killed(served: Served, part: str, action: str) -> None:
    """A client that is killed is let go though a thread of the server waits for its memory."""
    client = stuck(served, part, action=action)
    client.kill(children=False)
    goes_on(served)

    # In the second case a child has the memory, and what is mapped there, to the end.
    client.kill()
    until(lambda: not served.plane.opens and not served.channel.crew.stuck)


def test_nothing_is_left_of_clients_that_were_stuck(served: Served) -> None:
    """Threads that were stuck end, opens go, and what the engine knew of them goes too."""
    before = descriptors()
    for part in ("COMMANDS", "READ"):
        stuck(served, part, threads=2).kill()
        until(lambda: not served.channel.crew.stuck and not served.plane.opens and not served.engine.processes)
    until(lambda: len(served.channel.crew.lanes) == 2)

    until(lambda: descriptors() == before)


def test_a_thread_that_is_back_when_its_place_is_taken_is_not_stuck(served: Served) -> None:
    """A leader that was only slow, and has left before the new one takes note, is not counted as stuck for ever."""
    crew = served.channel.crew
    client = stuck(served, "COMMANDS")
    until(lambda: len(crew.stuck) == 1)
    (late,) = crew.stuck
    client.kill()
    until(lambda: late not in crew.lanes)
    with crew._guard:
        crew._mark_stuck(late)

    assert not crew.stuck


def test_who_waits_for_a_lock_is_not_replaced(served: Served) -> None:
    """A leader that waits for the engine keeps leading: another thread could only wait for the same lock."""
    crew = served.channel.crew

    def looked_in_time() -> bool:
        """Look whether the leader is replaced; tell whether that was before the watcher had to lose patience."""
        assert ["version 0", "8"] == served.run("version", "1")
        until(lambda: not served.engine.processes)
        leader = crew.leader
        assert leader is not None
        with served.engine.lock:
            client = served.start("version", "1")
            until(lambda: leader.fields.opcode == uapi.FUSE_OPEN)
            first = _naps()
            until(lambda: _naps() >= first + 20)
            is_leader = crew.leader is leader
            in_time = _naps() < first + 80
        assert ["version 0", "8"] == client.rest()
        assert is_leader or not in_time
        return in_time

    until(looked_in_time)


def test_who_waits_for_a_turn_is_replaced(served: Served) -> None:
    """A leader that waits for a slice of a long step is no obstacle: another thread soon leads."""
    crew = served.channel.crew

    def step() -> Iterator[Turn | Outcome]:
        yield Turn()
        yield Outcome()

    def serve_statfs(lane: Lane) -> Any:
        with served.engine.lock:
            served.plane._conclude(step(), 0)  # type: ignore[arg-type]
        return plain(lane.fields.unique, -errno.ENOSYS)

    served.channel._handlers[uapi.FUSE_STATFS] = serve_statfs

    def is_soon_replaced() -> bool:
        begun, end = threading.Event(), threading.Event()

        def hold(_: object) -> None:
            begun.set()
            end.wait()

        served.plane.turns.put(0, hold, None)
        assert begun.wait(20)
        leader = crew.leader
        with subprocess.Popen(["stat", "-f", served.mountpoint], stderr=subprocess.DEVNULL) as asker:
            first = _naps()
            until(lambda: crew.leader is not leader)
            soon = _naps() < first + 80
            assert ["version 0", "8"] == served.run("version", "1")
            assert asker.poll() is None
            end.set()
        return soon

    until(is_soon_replaced)


def _naps() -> int:
    """Return how often threads of readers have slept so far."""
    return sum(
        int(line.split()[1])
        for thread in threading.enumerate()
        if thread.name == "binder-reader"
        for line in Path(f"/proc/self/task/{thread.native_id}/status").read_text().splitlines()
        if line.startswith("voluntary_ctxt_switches")
    )


def test_an_open_that_is_stuck_too_often_is_shunned(serve: Serve) -> None:
    """Further requests of an open with several threads stuck wait until one of them comes back."""
    served = serve()
    client = served.start("stuck", "COMMANDS", str(Limits.lanes_per_handle + 2))
    assert client.line() == "going"
    crew = served.channel.crew
    until(lambda: len(crew.stuck) == Limits.lanes_per_handle and len(crew.backlog) == 2)
    goes_on(served)
    client.kill()

    until(lambda: not crew.stuck and not crew.backlog and not crew._shunned)
    until(lambda: not served.plane.opens)


def test_ends_of_opens_hold_up_nobody_else(served: Served) -> None:
    """While a user's ends of opens take long, its next ones wait, and nobody else's do, nor any other job."""
    crew = served.channel.crew
    go_on, done = threading.Event(), threading.Semaphore(0)
    try:
        for _ in range(Limits.workers):
            crew.post_end(os.geteuid(), go_on.wait)
        client = served.start("wait")
        assert ["first 0", "going"] == [client.line(), client.line()]
        client.kill()
        until(lambda: not served.plane.opens)
        crew.post(done.release)
        crew.post_end(ANOTHER_USER, done.release)

        assert done.acquire(timeout=20)
        assert done.acquire(timeout=20)
        assert served.plane._by_process
    finally:
        go_on.set()
    until(lambda: not served.plane._by_process)


def test_a_client_that_is_stuck_is_looked_at_ever_more_seldom(served: Served) -> None:
    """Whether a client is being killed is asked after twice as long each time, up to two seconds."""
    client = stuck(served, "COMMANDS")
    crew = served.channel.crew
    until(lambda: len(crew.stuck) == 1)
    (lane,) = crew.stuck
    clock = crew._clock
    look: tuple[int, ...] = (lane.fields.unique,)
    for seconds in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0):
        # So that nothing comes to its time meanwhile.
        with clock._changed:
            before = time.monotonic()
            served.plane._let_go(*look)
            after = time.monotonic()
            ((due, timer),) = [(due, timer) for due, _, timer in clock._entries if timer.arguments[:1] == look[:1]]
            look = timer.arguments
            timer.cancel()

        assert before + seconds <= due <= after + seconds
    client.kill()


def test_callers_that_are_remembered_are_bounded(served: Served) -> None:
    """Of a client that calls from ever new threads a few are remembered."""
    client = served.start("strangers", str(10 * Limits.tasks))
    assert "strangers 0" == client.line()
    (opened,) = served.plane.opens.values()
    threads = len(opened.process.threads)

    assert len(opened.tasks) <= Limits.tasks + 2 * threads + 1 < 2 * Limits.tasks
    assert "" == client.ask()


def test_the_mount_outlives_as_many_stuck_clients_as_it_has_threads(serve: Serve, logs: LogWatch) -> None:
    """With all threads stuck, what needs no client's memory is still done, and the rest when a thread is back."""
    logs.expect("wait for memory of clients")
    served = serve()
    served.channel.crew.max_lanes, served.channel.crew._reserve = 4, 0
    waiting = served.start("wait")
    assert [waiting.line(), waiting.line()] == ["first 0", "going"]
    crew = served.channel.crew
    clients = [served.start("stuck", "COMMANDS", "1") for _ in range(3)]
    until(lambda: crew.austere)

    assert served.run("version", str(CALLS)) == ["version 0", "8"]
    waiting.kill()
    late = served.start("wait-nonblocking")
    until(lambda: crew.backlog)
    for client in clients:
        client.kill()
    assert late.rest() == ["first 0", "second EAGAIN"]
    until(lambda: not crew.austere and not crew.stuck and not served.plane.opens)
    goes_on(served)


def test_a_request_that_waits_for_a_thread_can_be_interrupted(serve: Serve, logs: LogWatch) -> None:
    """A client whose request waits for a thread of the server is let go by a signal, EINTR, and nothing was done."""
    logs.expect("wait for memory of clients")
    served = serve()
    served.channel.crew.max_lanes, served.channel.crew._reserve = 2, 0
    client = served.start("stuck", "COMMANDS", "1")
    until(lambda: served.channel.crew.austere)
    late = served.start("wait")
    until(lambda: served.channel.crew.backlog)
    late.process.kill()
    late.process.wait(20)

    assert not served.channel.crew.backlog
    client.kill()


# Faults of ours and of the machine.


def test_an_engine_that_fails_answers_with_an_error(served: Served, logs: LogWatch) -> None:
    """Should a step raise, its client gets EIO, and the server goes on."""
    logs.expect("a step failed")
    perform = served.plane._perform[CopyIn]
    served.plane._perform[CopyIn] = lambda *_: None
    assert served.run("long-commands") == ["long-commands EIO"]

    served.plane._perform[CopyIn] = perform
    assert served.run("long-commands") == ["long-commands 0"]
    goes_on(served)


def test_a_device_plane_that_fails_answers_with_an_error(served: Served, logs: LogWatch) -> None:
    """Should anything else raise, it is the same."""
    logs.expect("FUSE_IOCTL failed")
    perform = served.plane._perform.pop(CopyIn)
    assert served.run("long-commands") == ["long-commands EIO"]

    served.plane._perform[CopyIn] = perform
    goes_on(served)


def test_an_interrupted_freeze_is_as_the_signals_action_says(served: Served) -> None:
    """A signal ends the wait with EINTR, or, with SA_RESTART, lets it go on until the time is up: EAGAIN."""
    manager = served.start("manage")
    assert ["manager 0", "going"] == [manager.line(), manager.line()]

    assert ["call 0", "ended EINTR", "gone on EAGAIN"] == served.run("freeze", str(manager.pid))


def test_a_client_of_another_pid_namespace_is_refused(serve: Serve, logs: LogWatch) -> None:
    """A caller whom this process's pid namespace does not see cannot open: EPERM, and one line in the log."""
    logs.expect("pid namespace")
    served = serve()
    with pytest.raises(PermissionError):
        served.plane.open(1, 2, served.context, 0, 1000, os.O_RDWR)
    with pytest.raises(PermissionError):
        served.plane.open(1, 2, served.context, 0, 1000, os.O_RDWR)

    assert not served.plane.opens


def test_a_kind_of_region_that_cannot_be_had_is_refused(serve: Serve, logs: LogWatch) -> None:
    """Where the kernel does not pass through and the user insists, an open fails, and the log says what to do."""
    logs.expect("region=pagecache")
    served = serve(region="passthrough")
    served.size()
    served.plane.kind = Kind.PAGE_CACHE

    assert served.run("version", "1") == ["open EOPNOTSUPP"]


def test_an_ioctl_without_argument_is_carried_out(served: Served) -> None:
    """What comes by another way than FUSE reaches the open with that inode."""
    client = served.start("wait")
    assert [client.line(), client.line()] == ["first 0", "going"]
    (opened,) = served.plane.opens.values()
    manage = lib.BINDER_SET_CONTEXT_MGR
    caller = Task(client.pid, client.pid)

    assert served.plane.ioctl_without_argument(opened.inode, caller, manage) == 0
    assert -errno.EBUSY == served.plane.ioctl_without_argument(opened.inode, caller, manage)
    assert -errno.EFAULT == served.plane.ioctl_without_argument(opened.inode, caller, lib.BINDER_VERSION)
    assert -errno.EBADF == served.plane.ioctl_without_argument(1, caller, manage)


def test_regions_go_with_their_opens(served: Served) -> None:
    """Regions of clients that have ended are unmapped without waiting for a garbage collection."""
    gc.collect()
    gc.disable()
    before = mapped_regions()
    try:
        for _ in range(10):
            server = served.start("serve", "1")
            assert [server.line(), server.line()] == ["manager 0", "going"]
            assert served.run("call", "9000") == ["done"]
            assert [letters(9000)] == server.rest()
        until(lambda: not served.plane.opens and not served.engine.processes)

        # Of the twenty, a lane may remember those of the last calls that it served and answered.
        until(lambda: mapped_regions() <= before + 5)
    finally:
        gc.enable()


def test_who_is_killed_while_it_gets_files_is_dead_to_its_caller(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller reads BR_DEAD_REPLY, as of the driver, whose receiver cannot die before it has installed them."""
    server = served.start("serve", "1")
    assert [server.line(), server.line()] == ["manager 0", "going"]
    install = served.plane._installer.install

    def kill_and_install(tid: int, *arguments: Any, **keywords: Any) -> None:
        os.kill(server.pid, signal.SIGKILL)
        install(tid, *arguments, **keywords)

    monkeypatch.setattr(served.plane._installer, "install", kill_and_install)

    assert ["BR_DEAD_REPLY"] == served.start("pass").rest()


def test_killed_clients_leave_nothing(served: Served) -> None:
    """After clients were killed at any point, the server has no more descriptors, opens or parked calls than before."""
    before = descriptors()
    for action in (["wait"], ["serve", "1"], ["region"], ["version", "1000000"]) * 5:
        client = served.start(*action)
        if action[0] != "version":
            client.line()
        client.kill()

    until(lambda: not served.plane.opens and not served.engine.processes)
    assert not served.plane._parked
    until(lambda: descriptors() == before)


def test_a_server_that_dies_is_an_error_for_its_clients(tmp_path: Path, client_program: Path) -> None:
    """Killed at any point, the server leaves clients with an error, those that wait and those that come."""
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    mount_py = Path(__file__).parents[2] / "mount.py"
    server = subprocess.Popen([sys.executable, mount_py, mountpoint, "-f"], stdin=subprocess.DEVNULL)
    try:
        until(lambda: os.path.ismount(mountpoint) and (mountpoint / "binder").exists())
        client = Client(client_program, mountpoint / "binder", "wait")
        assert [client.line(), client.line()] == ["first 0", "going"]
        server.kill()
        server.wait(20)

        assert client.line() in ("second ECONNABORTED", "second ENOTCONN", "second EIO")
        assert client.rest() == []
        late = Client(client_program, mountpoint / "binder", "version", "1")
        assert late.rest() == ["open ENOTCONN"]
    finally:
        server.kill()
        server.wait(20)
        subprocess.run(["umount", "--lazy", mountpoint], check=False)
