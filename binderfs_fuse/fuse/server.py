"""The server of one mount: engine, device plane, channel and tree put together, from /dev/fuse to the end of the mount.

It ends when the mount does (umount, or the last user of a lazily unmounted one goes), or on SIGTERM, SIGINT and
SIGHUP, when it unmounts lazily itself; clients that still have a device open then get ENOTCONN, and those that wait in
an ioctl of it ECONNABORTED.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import signal
import time
from typing import TYPE_CHECKING

import pyfuse3
import trio

from binderfs_fuse import __version__, complaints
from binderfs_fuse.engine.context import Engine, Task
from binderfs_fuse.fuse import garbage, mounting
from binderfs_fuse.fuse.channel import Channel
from binderfs_fuse.fuse.control import Control, start_time
from binderfs_fuse.fuse.device import DevicePlane
from binderfs_fuse.fuse.inodes import Device
from binderfs_fuse.fuse.mounting import MountError
from binderfs_fuse.fuse.supervised import ANSWER, REQUEST, Kind
from binderfs_fuse.fuse.tree import Tree
from binderfs_fuse.host import files, headroom, privileges, region
from binderfs_fuse.limits import Limits

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from binderfs_fuse.fuse.mounting import Connection
    from binderfs_fuse.fuse.settings import Settings

_log = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve(
    connection: Connection,
    settings: Settings,
    ready: Callable[[], object],
    supervisor: socket.socket | None = None,
) -> None:
    """Answer until the mount ends; call `ready` when what is asked will be answered.

    `supervisor` is for what reaches the server by another way than FUSE (`command.supervisor`). Raises `MountError`
    where the settings do not allow a mount; it is unmounted then.
    """
    try:
        engine = _engine(settings)
        plane = DevicePlane(engine, settings, connection.device)
        try:
            tree = Tree(engine, plane, settings, (connection.uid, connection.gid))
        except OSError as error:
            text = f"max={settings.maximum} leaves no room for {len(settings.devices)} devices"
            raise MountError(text, errno.ENOSPC) from error
        facts: dict[str, object] = {}
        Control(tree.inodes, engine, _texts(engine, plane, tree, settings, connection, facts))
        channel = Channel(connection.descriptor, plane, tree.inodes)
        pyfuse3.init(tree, f"/dev/fd/{channel.tree_fd}", set())
        # Threads and processes have what their maker has: so before the first one.
        headroom.survive()
        privileges.settle()
        # With all rights, so that it can become another user.
        _start_programs(filters=1 if supervisor is not None else 0)
        privileges.drop()
        unconfined = "noseccomp was said" if settings.seccomp is False else privileges.confine()
        facts["filter"] = unconfined is None
        if unconfined is not None and settings.seccomp:
            _log.warning("there is no filter of system calls: %s", unconfined)
        garbage.take_over()
        try:
            obey = functools.partial(_obey, supervisor, plane, tree) if supervisor is not None else trio.sleep_forever
            trio.run(_run, channel, connection, ready, obey)
        finally:
            pyfuse3.close(unmount=False)
            complaints.end()
    finally:
        mounting.disconnect(connection)


def _engine(settings: Settings) -> Engine:
    """Make an engine whose clients can hold no more than this process may."""
    limits = Limits(**settings.limits)

    def resize(memory: int) -> None:
        with engine.lock:
            engine.quota.resize(limits.within(memory))

    room = headroom.Headroom(settings.memory, resize)
    engine = Engine(
        time.monotonic_ns, android_priority=settings.priority == "android", limits=limits.within(room.budget)
    )
    region.allow_pages(room.allows)
    return engine


def _start_programs(filters: int) -> None:
    """Start the programs that hold and install clients' files: before there is a filter that forbids it."""
    try:
        files.start_programs(filters)
    except OSError as error:
        raise MountError(f"cannot start {error.filename}: {error.strerror}", error.errno or errno.EAGAIN) from error


def _texts(
    engine: Engine,
    plane: DevicePlane,
    tree: Tree,
    settings: Settings,
    connection: Connection,
    facts: dict[str, object],
) -> dict[str, Callable[[], bytes]]:
    """Make what a server can be asked for.

    ``info`` of itself, as JSON, with the `facts` that are known by then; two logs, which the mount may not show; and
    ``check``, what is wrong with the engine, which is nothing.
    """
    began = time.time()

    def info() -> bytes:
        with tree.inodes.guard:
            devices = [os.fsdecode(name) for name, node in tree.inodes.root.names.items() if isinstance(node, Device)]
        with engine.lock:
            managers = [context.manager for context in engine.contexts.values()]
        return json.dumps(
            {
                "pid": os.getpid(),
                "start": start_time(os.getpid()),
                "version": __version__,
                "mountpoint": os.fspath(connection.mountpoint),
                "uptime": time.time() - began,
                "max": tree.inodes.maximum,
                "stats": settings.stats,
                "read_only": tree.inodes.read_only,
                "chosen": settings.chosen,
                "managers": [node.debug_id for node in managers if node is not None],
                "region": plane.kind.value,
                "devices": devices,
                **facts,
            }
        ).encode()

    def check() -> bytes:
        from binderfs_fuse.engine import invariants  # noqa: PLC0415 - hardly ever needed

        with engine.lock:
            try:
                invariants.check(engine)
            except AssertionError as error:
                return str(error).encode()
        return b""

    return {
        "info": info,
        "check": check,
        "state": lambda: tree.take(functools.partial(engine.logs.state, unnoticed=True)),
        "stats": lambda: tree.take(engine.logs.stats),
    }


async def _run(
    channel: Channel, connection: Connection, ready: Callable[[], object], obey: Callable[[], Awaitable[None]]
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, connection)
        nursery.start_soon(obey)
        token = trio.lowlevel.current_trio_token()
        # To shut the socket would do too, but not without a complaint of libfuse's on standard error.
        channel.hang_up = functools.partial(_end, token)
        channel.start()
        _log.info("serving %s", connection.mountpoint)
        ready()
        await pyfuse3.main()
        channel.stop()
        nursery.cancel_scope.cancel()


async def _obey(supervisor: socket.socket, plane: DevicePlane, tree: Tree) -> None:
    """Answer a supervisor until it hangs up."""
    connection = trio.socket.from_stdlib_socket(supervisor)
    while request := await connection.recv(REQUEST.size):
        kind, first, second, third, euid, nice, inode = REQUEST.unpack(request)
        if kind == Kind.IOCTL:
            caller = Task(second, third, euid, nice)
            error = await trio.to_thread.run_sync(plane.ioctl_without_argument, inode, caller, first)
        else:
            error = tree.inodes.reconfigure(first, stats=bool(second), read_only=bool(third))
        await connection.send(ANSWER.pack(error))


def _end(token: trio.lowlevel.TrioToken) -> None:
    """End pyfuse3's main loop, from a thread of the channel's."""
    with contextlib.suppress(trio.RunFinishedError):
        trio.from_thread.run_sync(pyfuse3.terminate, trio_token=token)


async def _stop_on_signal(connection: Connection) -> None:
    with trio.open_signal_receiver(*_STOP_SIGNALS) as received:
        async for number in received:
            _log.info("%s: unmounting", signal.Signals(number).name)
            await trio.to_thread.run_sync(mounting.disconnect, connection)
            pyfuse3.terminate()
