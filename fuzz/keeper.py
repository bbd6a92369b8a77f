"""Requests to a keeper that are whatever a fuzzer decides, from a server and from clients that nobody should have.

The keeper is the genuine program. Over its channels and its control socket come requests with any fields, and messages
of any length; at the same time the sockets that it takes are connected, listened on, sent into and closed. What is held
against it:

- it lives on, and answers each request once, but for a message of the wrong length, which ends that channel;
- nothing ever arrives in a socket that leads to somebody else;
- when all numbers are given up and all channels closed it has the descriptors that it began with;
- and a file still goes through it.
"""

from __future__ import annotations

import array
import contextlib
import errno
import functools
import os
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse._host import ffi, lib
from binderfs_fuse.host.files import keeper_limits
from fuzz.choices import EXTREMES, Choices

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_STEPS: Final = 64
_REQUEST: Final = struct.Struct(f"=iiiIiii{lib.KEEPER_BATCH}i")
_RESULT: Final = struct.Struct("=i")
_PROGRAM: Final = Path(__file__).parent.parent / "binderfs_fuse/host/keeper"
_TAKE, _TAKE_SOCKET, _SEND = range(3)
_CLIENTS: Final = b"y"
_KINDS: Final = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)


class Broken(Exception):  # noqa: N818 - it is no error of this program
    """The keeper did what it must never do."""


def _require(holds: object, what: str) -> None:
    if not holds:
        raise Broken(what)


def _signed(number: int) -> int:
    number &= 0xFFFF_FFFF
    return number - (1 << 32) if number >= 1 << 31 else number


class _Keeper:
    def __init__(self) -> None:
        pid = ffi.new("int *")
        self.control = socket.socket(fileno=lib.keeper_start(os.fsencode(_PROGRAM), keeper_limits(), pid))
        self.pid: int = pid[0]
        self.at_first = self.descriptors()
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        self.tids = (os.getpid(), os.getpid(), os.getpid(), child, 0, -1, 2**31 - 1)

    def open(self) -> socket.socket:
        return socket.socket(fileno=lib.keeper_open(self.control.fileno()))

    def descriptors(self) -> set[str]:
        return set(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208 - a set of names

    def await_quiet(self) -> None:
        """Wait until it has given up everything."""
        for _ in range(100_000):
            if self.descriptors() == self.at_first:
                return
            time.sleep(0.0001)
        raise Broken(f"descriptors left: {sorted(self.descriptors() - self.at_first)}")


class _Run:
    def __init__(self, data: bytes, keeper: _Keeper, stack: contextlib.ExitStack) -> None:
        self._choices = Choices(data)
        self._keeper = keeper
        self._stack = stack
        self._channels = [self._open(), self._open()]
        self._numbers = [-1, 0, 3, 4, 5, 6, 7, 8]
        self._fresh: list[socket.socket] = []
        self._witnesses = []
        self._things = [0, -1, 10_000]
        for kind in _KINDS:
            offered, watched = (self._own(end) for end in socket.socketpair(socket.AF_UNIX, kind))
            self._things.append(offered.fileno())
            self._witnesses.append(watched)
        self._listener = self._own(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self._listener.bind(f"\0binder-fuzz-{os.getpid()}")
        self._listener.listen(100)
        self._things.append(self._listener.fileno())

    def _own(self, end: socket.socket) -> socket.socket:
        end.setblocking(False)
        return self._stack.enter_context(end)

    def _open(self) -> socket.socket:
        return self._stack.enter_context(self._keeper.open())

    def run(self) -> None:
        for _ in range(MAX_STEPS):
            if not self._choices:
                break
            kind = self._choices.below(12)
            if kind < 5:
                self._request()
            elif kind < 7:
                self._transfer()
            elif kind == 7:
                self._raw()
            elif kind == 8:
                self._control()
            elif kind == 9:
                self._channels_come()
            else:
                self._meddle()
        self._end()

    def _number(self) -> int:
        if self._choices.rarely(16):
            return _signed(self._choices.pick(EXTREMES))
        return self._choices.pick(self._numbers[-200:])

    def _thing(self) -> int:
        if self._choices.rarely(3):
            self._fresh.append(self._own(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)))
            return self._fresh[-1].fileno()
        things = self._things + [end.fileno() for end in self._fresh[-8:]]
        return self._choices.pick(things)

    def _ask(self, index: int, *fields: int) -> int:
        """Make a request, whose answer has to come."""
        channel = self._channels[index]
        channel.send(_REQUEST.pack(*fields))
        answer = channel.recv(100)
        _require(len(answer) == _RESULT.size, f"an answer of {len(answer)} bytes")
        (result,) = _RESULT.unpack(answer)
        if result >= 0 and fields[0] in (_TAKE, _TAKE_SOCKET):
            self._numbers.append(result)
        return int(result)

    def _fields(self, operation: int, number: int, more: int, files: Sequence[int], count: int) -> tuple[int, ...]:
        tid = self._choices.pick(self._keeper.tids)
        padded = (*files, *[0] * lib.KEEPER_BATCH)[: lib.KEEPER_BATCH]
        return operation, tid, self._thing(), self._choices.below(3), number, more, count, *padded

    def _request(self) -> None:
        index = self._choices.below(len(self._channels))
        operation = self._choices.pick((_TAKE, _TAKE_SOCKET, _SEND, _SEND, _TAKE, _TAKE_SOCKET, 3, -1))
        files = [self._number() for _ in range(self._choices.below(4))]
        count = len(files)
        if self._choices.rarely(8):
            count = self._choices.pick((-1, 32, 33, 1 << 30, _signed(1 << 31)))
        self._ask(index, *self._fields(operation, self._number(), self._choices.below(2), files, count))

    def _transfer(self) -> None:
        """Do what a server does, with something in between."""
        index = self._choices.below(len(self._channels))
        pid = os.getpid()
        end = self._own(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self._fresh.append(end)
        nothing = [0] * lib.KEEPER_BATCH
        files = [self._ask(index, _TAKE, pid, 0, 0, 0, 0, 0, *nothing) for _ in range(self._choices.below(3))]
        number = self._ask(index, _TAKE_SOCKET, pid, end.fileno(), 0, 0, 0, 0, *nothing)
        if self._choices.rarely(3):
            self._meddle()
        sent = [file for file in files if file >= 0]
        padded = (*sent, *nothing)[: lib.KEEPER_BATCH]
        self._ask(index, _SEND, 0, 0, 0, number, self._choices.below(2), len(sent), *padded)
        if self._choices.rarely(2):
            self._receive(end)

    def _raw(self) -> None:
        """Send a message of another length than a request's: that channel ends."""
        index = self._choices.below(len(self._channels))
        size = self._choices.pick((0, 1, 4, _REQUEST.size - 1, _REQUEST.size + 1, 1000))
        # Only what does not fit is cut off.
        if size > _REQUEST.size:
            return
        self._channels[index].send(self._choices.bytes(size))
        _require(self._channels[index].recv(100) == b"", "an answer to nothing")
        self._channels[index] = self._open()

    def _control(self) -> None:
        numbers = [self._number() for _ in range(1 + self._choices.below(8))]
        text = b"".join(map(_RESULT.pack, numbers))
        # An empty message would be its end.
        self._keeper.control.send(text[: len(text) - self._choices.below(4)])

    def _channels_come(self) -> None:
        if self._choices.rarely(2):
            self._channels.pop(self._choices.below(len(self._channels))).close()
            if not self._channels or len(self._channels) < 2:
                self._channels.append(self._open())
        elif len(self._channels) < 6:
            self._channels.append(self._open())
        # More than one at a time, or one of another kind; one of datagrams would not end with its other end.
        ends = socket.socketpair(socket.AF_UNIX, self._choices.pick((socket.SOCK_SEQPACKET, socket.SOCK_STREAM)))
        count = 1 + self._choices.below(3)
        rights = array.array("i", [ends[1].fileno()] * count)
        self._keeper.control.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        for end in ends:
            end.close()

    def _meddle(self) -> None:
        """Do to a socket that is on its way what other threads of a client can do."""
        if not self._fresh:
            return
        end = self._choices.pick(self._fresh[-8:])
        kind = self._choices.below(8)
        with contextlib.suppress(OSError):
            if kind == 0:
                end.connect(self._listener.getsockname())
            elif kind == 1:
                end.listen()
            elif kind == 2:
                end.bind("")
            elif kind == 3:
                rights = array.array("i", [self._listener.fileno(), end.fileno()])
                end.sendmsg([_CLIENTS], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_NOSIGNAL)
            elif kind == 4:
                end.shutdown(self._choices.pick((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)))
            elif kind == 5:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            elif kind == 6:
                self._receive(end)
            else:
                end.close()
                self._fresh.remove(end)

    def _receive(self, end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            _, messages, _, _ = end.recvmsg(1, 1024)
            for _, kind, data in messages:
                if kind == socket.SCM_RIGHTS:
                    fds = array.array("i")
                    fds.frombytes(data)
                    for fd in fds:
                        os.close(fd)

    def _end(self) -> None:
        for channel in self._channels:
            channel.close()
        self._keeper.control.send(b"".join(map(_RESULT.pack, range(256))))
        with contextlib.suppress(BlockingIOError):
            while True:
                self._witnesses.append(self._own(self._listener.accept()[0]))
        for witness in self._witnesses:
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                # A client's own message is another byte.
                while byte := witness.recv(1):
                    _require(byte == _CLIENTS, "somebody else was sent something")
        self._keeper.await_quiet()
        self._works()
        self._keeper.await_quiet()

    def _works(self) -> None:
        """Pass a file on."""
        read, write = os.pipe()
        end = self._own(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        channel = self._keeper.open()
        number = lib.keeper_take_socket(channel.fileno(), os.getpid(), end.fileno(), 0)
        file = lib.keeper_take(channel.fileno(), os.getpid(), write, 0)
        error = lib.keeper_send(channel.fileno(), number, 0, [file], 1, 1)
        os.close(write)
        # Without root's rights a keeper may not be allowed to take anything.
        _require(error == 0 or file == -errno.EPERM, f"nothing goes through it any more: {error}")
        self._receive(end)
        lib.keeper_send(channel.fileno(), number, 0, ffi.NULL, 0, 0)
        channel.close()
        _require(os.read(read, 1) == b"", "a file is held")
        os.close(read)


@functools.cache
def _keeper() -> _Keeper:
    return _Keeper()


def run(data: bytes) -> None:
    """Play what `data` decides. Raises `Broken`, or what comes of it that the keeper is gone."""
    with contextlib.ExitStack() as stack:
        _Run(data, _keeper(), stack).run()
