"""What a fuzzer once found worth keeping breaks nothing now."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.__main__ import TARGETS, corpus

CHECKOUT = Path(__file__).parent.parent.parent
PLAY = """
import sys
from fuzz.__main__ import corpus, player
run = player(sys.argv[1])
for file in sorted(corpus(sys.argv[1]).iterdir()):
    print(file.name, flush=True)
    run(file.read_bytes())
"""


@pytest.mark.parametrize("target", TARGETS)
def test_kept_inputs(target: str) -> None:
    """Every kept input of a fuzzer plays without an exception, an error logged or an invariant violated."""
    done = subprocess.run(
        [sys.executable, "-c", PLAY, target],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ("", 0) == (done.stderr, done.returncode), done.stdout[-100:]
    assert sorted(file.name for file in corpus(target).iterdir()) == done.stdout.splitlines()
    assert len(done.stdout.splitlines()) > 50
