"""Under ``mount.py run``: kills processes inside mount(2), at any moment of it, and says "done"."""

import ctypes
import os
import random
import signal
import sys

_SEED = 7


def main(count: int) -> None:
    """Kill so many."""
    libc = ctypes.CDLL(None, use_errno=True)
    chance = random.Random(_SEED)
    kind = ctypes.create_string_buffer(b"x" * 4000)
    for _ in range(count):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, b"ready")
            while True:
                libc.mount(b"none", b"/", kind, 0, None)
        os.read(reading, 5)
        os.close(reading)
        os.close(writing)
        for _ in range(chance.randrange(20000)):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
