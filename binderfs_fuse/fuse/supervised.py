"""How a server hears from the supervisor that started it of what FUSE does not bring: by a socket of only these two.

The server sends nothing of itself. Each request is one message, `REQUEST`, and its answer another, `ANSWER`, with 0 or
a negative errno. `command.supervisor` is the one end, `server` the other.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

REQUEST: Final = struct.Struct("=IIIIIiQ")
"""Kind, and six numbers that depend on it."""
ANSWER: Final = struct.Struct("=i")


class Kind(enum.IntEnum):
    """What is asked for.

    `IOCTL`        an ioctl with a NULL argument: command, thread id, process id, effective user and nice value of the
                   caller, as they were while it still waited, and the inode number of the device's open
    `RECONFIGURE`  a remount: the most devices, whether there are to be logs, whether it is to be read-only, 0, 0, 0
    """

    IOCTL = 1
    RECONFIGURE = 2
