"""How many lines clients can put into the log, by a clock that tests set."""

import re
from pathlib import Path

import pytest

from binderfs_fuse.complaints import Complaints

PACKAGE = Path(__file__).parent.parent / "binderfs_fuse"


class Scene:
    """Complaints, and what came of them."""

    def __init__(self) -> None:
        """Begin with an empty log, at second 1000."""
        self.now = 1000.0
        self.lines: list[str] = []
        self.complaints = Complaints(lambda _level, line, **_: self.lines.append(line), lambda: self.now)

    def flood(self, uid: int, count: int) -> int:
        """Have a client of this user cause so many lines; return how many were logged."""
        before = len(self.lines)
        for number in range(count):
            self.complaints.say(uid, f"{uid}: {number} of {self.now}")
        return len(self.lines) - before


@pytest.fixture(name="scene")
def _scene() -> Scene:
    return Scene()


def test_a_user_has_a_few_lines_at_once_and_few_later(scene: Scene) -> None:
    """Ten, and one more in each ten seconds; others have theirs meanwhile."""
    counts = [scene.flood(1000, 2000), scene.flood(2000, 3)]
    scene.now += 9
    counts.append(scene.flood(1000, 2000))
    scene.now += 1
    counts.append(scene.flood(1000, 2000))

    # The last one comes with the sum.
    assert [10, 3, 0, 2] == counts


def test_the_sum_of_what_was_left_out_is_said(scene: Scene) -> None:
    """When a line of that user's is logged again, or in the end, and then no more."""
    scene.flood(1000, 2010)
    scene.flood(2000, 13)
    scene.now += 10
    scene.complaints.say(1000, "again")
    scene.complaints.end()
    scene.complaints.end()

    assert ["2000 lines about clients of user 1000 were left out", "again"] == scene.lines[-3:-1]
    assert "3 lines about clients of 1 users were left out" == scene.lines[-1]


def test_all_users_together(scene: Scene) -> None:
    """Many users have no more than a hundred lines at once; the last of these are for who has said nothing yet."""
    counts = [scene.flood(uid, 100) for uid in range(9)]
    last = [scene.flood(uid, 100) for uid in range(9, 40)]
    scene.now += 1000
    later = scene.flood(50, 100)

    assert [10] * 8 == counts[:8]
    assert 100 == sum(counts) + sum(last)
    assert {0, 1} == {*counts[8:], *last}
    assert 10 == later


def test_the_same_line_over_and_over(scene: Scene) -> None:
    """A line that a user's last one repeats is counted, and logged again after ten minutes."""
    for _ in range(5):
        scene.complaints.say(1000, "the same")
    once = list(scene.lines)
    scene.now += 601
    scene.complaints.say(1000, "the same")

    assert ["the same"] == once
    assert ["the same", "4 lines about clients of user 1000 were left out", "the same"] == scene.lines


def test_users_beyond_counting(scene: Scene) -> None:
    """Of many users the one that was heard of last is forgotten first, and not what was left out of it."""
    for uid in range(5000):
        scene.flood(uid, 1)
    remembered = len(scene.complaints._users)
    scene.complaints.end()

    assert 1024 == remembered
    assert 5000 == sum(int(line.split()[0]) if "left out" in line else 1 for line in scene.lines)


def test_a_clock_that_stands_or_goes_back(scene: Scene) -> None:
    """It gives nobody a line more."""
    scene.flood(1000, 20)
    scene.now -= 500

    assert 0 == scene.flood(1000, 20)


def test_clients_lines_go_nowhere_else() -> None:
    """What the serving parts log by themselves is what no client can bring about as often as it likes."""
    own = {
        ("channel.py", "reading from /dev/fuse"),
        ("files.py", "process %d, which %s for this one, is gone"),
        ("mounting.py", "stays mounted"),
        ("server.py", "there is no filter of system calls"),
        ("server.py", "serving %s"),
        ("server.py", "unmounting"),
    }
    found = set()
    for path in (*PACKAGE.glob("fuse/*.py"), *PACKAGE.glob("host/*.py")):
        for call in re.findall(
            r"\b_?log(?:ger)?\.(?:debug|info|warning|error|exception|critical|log)\((.*)", path.read_text()
        ):
            known = {(name, text) for name, text in own if name == path.name and text in call}
            assert known, f"{path}: {call}"
            found |= known

    assert own == found
