"""Who waits for the text of a log, for how many texts, and whose turn it is."""

import errno
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from binderfs_fuse.engine.limits import Quota
from binderfs_fuse.fuse.texts import Source, Texts, Unwanted
from binderfs_fuse.limits import Limits


class File:
    """A log; its text says how often it was taken before."""

    def __init__(self, name: str) -> None:
        """Name it; a text has 10 bytes."""
        self.name = name
        count = itertools.count()
        self.text: Callable[[], Iterator[str]] = lambda: iter([f"{name:>8}{next(count):2}"])


class Scene:
    """Texts whose making is put off until the test wants it: the jobs, by file, in the order of their beginning."""

    def __init__(self, **limits: int) -> None:
        """Begin with nothing open."""
        self.quota = Quota(Limits(**limits))
        self.texts = Texts(self.quota, self._take)
        self.texts.attach(self._post, self._answer)
        self.jobs: list[tuple[str, Callable[[], None]]] = []
        self.answers: dict[int, tuple[int, bytes]] = {}
        self.during: Callable[[], object] = int
        self.waiting: list[int] = []
        self._numbers = itertools.count(1)

    def _take(self, source: Source, check: Callable[[int], None]) -> bytes:
        check(0)
        data = "".join(source.text()).encode()
        self.during()
        check(len(data))
        return data

    def _post(self, job: Callable[..., None], *arguments: Any) -> None:
        self.jobs.append((arguments[1].source.name, lambda: job(*arguments)))

    def _answer(self, unique: int, error: int, data: bytes) -> None:
        assert unique not in self.answers
        self.answers[unique] = error, data
        self.waiting.append(self.texts.waits_of.total())
        assert self.texts._guard.acquire(blocking=False)
        self.texts._guard.release()

    def open(self, file: File, uid: int = 0) -> int:
        """Open a file as this user."""
        handle = next(self._numbers)
        self.texts.open(handle, file, uid)
        return handle

    def read(self, file: File, uid: int = 0) -> int:
        """Open a file as this user, and read all of it; return the read's number, which is not answered yet."""
        handle = self.open(file, uid)
        unique = next(self._numbers)
        assert self.texts.read(unique, handle, 0, 100) is None
        return unique

    def make(self) -> str:
        """Make the text that was begun first, and say of which file."""
        name, job = self.jobs.pop(0)
        job()
        return name


def test_reads_are_answered_one_by_one() -> None:
    """Thousands of reads do not have their parts of a text at once, nor does anybody wait for all of them."""
    scene, state = Scene(), File("state")
    scene.read(state)
    for _ in range(5):
        scene.read(state)
    scene.make()
    scene.make()

    assert [5, 4, 3, 2, 1, 0] == scene.waiting


def test_readers_that_wait_share_a_text() -> None:
    """Reads that come while a text is being made get the next one, all of them together."""
    scene, state = Scene(), File("state")
    first = scene.read(state)
    rest = [scene.read(state, uid) for uid in (0, 1000, 2000) for _ in range(40)]
    made = [scene.make(), scene.make()]

    assert ["state", "state"] == made
    assert [] == scene.jobs
    assert (0, b"   state 0") == scene.answers.pop(first)
    assert dict.fromkeys(rest, (0, b"   state 1")) == scene.answers
    assert 0 == scene.quota.readers.held == scene.quota.log_bytes.held


def test_users_take_turns() -> None:
    """A user with many files has one text made at a time, and others' first ones are not behind all of them."""
    scene = Scene()
    flood = [scene.read(File(f"a{number}"), 1000) for number in range(5)]
    others = [scene.read(File(name), uid) for name, uid in (("b", 2000), ("c", 3000))]
    order = [scene.make() for _ in range(7)]

    assert ["a0", "b", "a1", "c", "a2", "a3", "a4"] == order
    assert {*flood, *others} == scene.answers.keys()


def test_a_text_for_two_users_comes_with_the_next_turn_of_either() -> None:
    """Whoever shares a text need not wait until it would be the other one's turn."""
    scene, state = Scene(), File("state")
    for number in range(3):
        scene.read(File(f"a{number}"), 1000)
    scene.read(File("c"), 3000)
    shared = [scene.read(state, uid) for uid in (1000, 2000)]
    order = [scene.make() for _ in range(5)]

    assert ["a0", "c", "a1", "state", "a2"] == order
    assert {(0, b"   state 0")} == {scene.answers[unique] for unique in shared}


def test_a_read_that_waits_can_be_withdrawn() -> None:
    """It is not answered any more, others are, and a text that nobody waits for is not begun."""
    scene, state, stats = Scene(), File("state"), File("stats")
    first = scene.read(File("a"), 1000)
    waiting = [scene.read(state, 1000), scene.read(state, 1000), scene.read(stats, 1000)]
    withdrawn = [scene.texts.withdraw(unique) for unique in (waiting[0], waiting[2], waiting[2], 12345)]
    order = [scene.make(), scene.make()]

    assert [True, True, False, False] == withdrawn
    assert ["a", "state"] == order
    assert [] == scene.jobs
    assert {first, waiting[1]} == scene.answers.keys()
    assert 0 == scene.quota.readers.held


def test_a_text_that_nobody_waits_for_is_not_made_to_its_end() -> None:
    """Its last reader may be killed at any moment; the next text of that file is another one."""
    scene, state = Scene(), File("state")
    reads = [scene.read(state)]

    def kill_it() -> None:
        scene.during = int
        assert scene.texts.withdraw(reads[0])
        reads.append(scene.read(state))

    scene.during = kill_it
    scene.make()

    assert {} == scene.answers

    scene.make()

    assert {reads[1]: (0, b"   state 1")} == scene.answers


def test_a_text_that_is_too_long_is_given_up() -> None:
    """No text is longer than a quarter of what all users may keep: ENOMEM."""
    scene = Scene(log_bytes=39)
    unique = scene.read(File("state"))
    scene.make()

    assert {unique: (-errno.ENOMEM, b"")} == scene.answers


def test_a_text_that_cannot_be_made_costs_one_read(logs: Any) -> None:
    """Whoever waits for it gets EIO, and the next one is made."""
    logs.expect("a log could not be made")
    scene, state = Scene(), File("state")
    first = scene.read(state)
    second = scene.read(File("stats"))

    def fail() -> None:
        scene.during = int
        raise ValueError

    scene.during = fail
    scene.make()
    scene.make()

    assert {first: (-errno.EIO, b""), second: (0, b"   stats 0")} == scene.answers


def test_reads_that_wait_have_a_limit() -> None:
    """A user with too many gets ENOMEM; another user's waits."""
    scene, state = Scene(user_readers=3), File("state")
    for _ in range(3):
        scene.read(state, 1000)
    refused = scene.texts.read(99, scene.open(state, 1000), 0, 100)
    scene.read(state, 2000)

    assert (-errno.ENOMEM, b"") == refused


def test_a_shared_text_is_charged_once_to_each_user() -> None:
    """However many readers keep it; it is nobody's when the last of them has closed."""
    scene, state = Scene(), File("state")
    handles = [scene.open(state, uid) for uid in (1000, 1000, 2000)]
    for unique, handle in enumerate(handles):
        assert scene.texts.read(unique, handle, 0, 4) is None
    scene.make()
    scene.make()
    held = dict(scene.texts.bytes_of), scene.quota.log_bytes.held
    for handle in handles:
        scene.texts.close(handle)

    # The first reader's own text was begun before the others came.
    assert ({1000: 20, 2000: 10}, 20) == held
    assert ({}, 0) == (scene.texts.bytes_of, scene.quota.log_bytes.held)


def test_unwanted_says_why() -> None:
    """The error is for whoever still waits."""
    assert errno.ENOMEM == Unwanted(errno.ENOMEM).error
