"""Waiting for many peers at once: each of them may be gone, or ready with nothing to say."""

import os
import select
import socket
from collections.abc import Callable

import pytest

from binderfs_fuse.command import seccomp
from binderfs_fuse.command.loop import PATIENCE, Loop


def _pipe() -> tuple[int, Callable[[], None]]:
    reading, writing = os.pipe()
    os.close(writing)
    return reading, lambda: os.close(reading)


def _socket() -> tuple[int, Callable[[], None]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    return ours.fileno(), ours.close


def _process() -> tuple[int, Callable[[], None]]:
    child = os.fork()
    if not child:
        os._exit(0)
    descriptor = os.pidfd_open(child)
    os.waitpid(child, 0)
    return descriptor, lambda: os.close(descriptor)


def _closed() -> tuple[int, Callable[[], None]]:
    reading, writing = os.pipe()
    os.close(writing)
    os.close(reading)
    return reading, lambda: None


def _listener() -> tuple[int, Callable[[], None]]:
    """Make a listener under whose filter nobody is left."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if not child:
        try:
            socket.send_fds(theirs, [b"x"], [seccomp.install()])
        except (OSError, NotImplementedError):
            theirs.send(b"no")
        finally:
            os._exit(0)
    said, descriptors, _, _ = socket.recv_fds(ours, 2, 1)
    ours.close()
    theirs.close()
    os.waitpid(child, 0)
    if said == b"no":
        pytest.skip("there can be no filter here")
    return descriptors[0], lambda: os.close(descriptors[0])


@pytest.mark.parametrize("peer", [_pipe, _socket, _process, _closed, _listener])
def test_a_dead_peer_is_dropped(peer: Callable[[], tuple[int, Callable[[], None]]]) -> None:
    """Whatever it was, and though its handler takes nothing, its owner is told once and it wakes nobody any more."""
    descriptor, close = peer()
    loop, gone = Loop(), []
    loop.add(descriptor, lambda: False, lambda: gone.append(descriptor))
    try:
        for _ in range(10 * PATIENCE):
            loop.turn(0)
    finally:
        close()

    assert [descriptor] == gone
    assert loop.idle <= PATIENCE


def test_who_says_something_is_heard() -> None:
    """A descriptor is dropped only after wake-ups in a row from which nothing could be taken."""
    reading, writing = os.pipe()
    loop = Loop()
    taken: list[int] = []
    gone: list[int] = []

    def take() -> bool:
        # Every other time it overlooks what is there.
        if len(taken) % 2:
            os.read(reading, 1)
        taken.append(len(taken))
        return bool(len(taken) % 2)

    loop.add(reading, take, lambda: gone.append(reading))
    os.write(writing, b"x" * 10 * PATIENCE)
    for _ in range(20 * PATIENCE):
        loop.turn(0)

    assert (20 * PATIENCE, []) == (len(taken), gone)

    loop.drop(reading)
    loop.drop(reading)
    loop.turn(0)

    assert 20 * PATIENCE == len(taken)

    os.close(reading)
    os.close(writing)


def test_a_number_that_is_used_again_is_another_peer() -> None:
    """A handler that closes one that is ready too, and opens another of that number, has that not mistaken for it."""
    loop = Loop()
    said: list[str] = []
    first, second = os.pipe(), os.pipe()
    other: list[int] = []

    def gone() -> None:
        said.append("gone")

    def overlook() -> bool:
        said.append("taken")
        return False

    def take() -> bool:
        os.read(first[0], 1)
        loop.drop(second[0])
        os.close(second[0])
        other.extend(os.pipe())
        loop.add(other[0], overlook, gone)
        return True

    loop.add(first[0], take, gone)
    loop.add(second[0], overlook, gone)
    for pipe in (first, second):
        os.write(pipe[1], b"x")
    ready = select.poll()
    for pipe in (first, second):
        ready.register(pipe[0], select.POLLIN)

    assert 2 == len(ready.poll(0))

    loop.turn(0)

    assert second[0] == other[0]
    assert [] == said

    for descriptor in (*first, second[1], *other):
        os.close(descriptor)
