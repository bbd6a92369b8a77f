"""Two processes in the middle of a call: what `status` and `graph` have something to show of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPT = '''
import ctypes, fcntl, mmap, os, struct, sys
from binderfs_fuse import uapi

def exchange(commands, size=0):
    """BINDER_WRITE_READ."""
    given, taken = ctypes.create_string_buffer(bytes(commands)), ctypes.create_string_buffer(max(size, 1))
    argument = bytearray(uapi.binder_write_read.pack(
        len(commands), 0, ctypes.addressof(given), size, 0, ctypes.addressof(taken)))
    fcntl.ioctl(device, uapi.BINDER_WRITE_READ, argument)
    return taken.raw[:uapi.binder_write_read.unpack(argument)[4]]

def command(number, payload=b""):
    return struct.pack("=I", number) + payload

device = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(device, 1 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ)
'''
_MANAGER = (
    _SCRIPT
    + """
fcntl.ioctl(device, uapi.BINDER_SET_CONTEXT_MGR_EXT, uapi.flat_binder_object.pack(uapi.BINDER_TYPE_BINDER, 0, 0, 0))
exchange(command(uapi.BC_ENTER_LOOPER))
print("ready", flush=True)
while struct.pack("=I", uapi.BR_TRANSACTION) not in exchange(b"", 256):
    pass
print("called", flush=True)
sys.stdin.read()
"""
)
_CLIENT = (
    _SCRIPT
    + """
object = uapi.flat_binder_object.pack(uapi.BINDER_TYPE_BINDER, 0, 0x1000, 0x2000)
data = ctypes.create_string_buffer(object)
offsets = ctypes.create_string_buffer(struct.pack("=Q", 0))
call = uapi.binder_transaction_data.pack(
    0, 0, 7, 0, 0, 0, len(object), 8, ctypes.addressof(data), ctypes.addressof(offsets))
exchange(command(uapi.BC_TRANSACTION, call))
while True:
    exchange(b"", 256)
"""
)


class Talk:
    """A manager and a client that has called it, with one object, and waits for the answer, which does not come."""

    def __init__(self, device: Path) -> None:
        """Start them on a device, and return when the manager has the call."""
        self._processes: list[subprocess.Popen[str]] = []
        self.manager = self._start(_MANAGER, device)
        assert self.manager.stdout is not None
        assert "ready\n" == self.manager.stdout.readline()

        self.client = self._start(_CLIENT, device)

        assert "called\n" == self.manager.stdout.readline()

    def _start(self, script: str, device: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent.parent,
        )
        self._processes.append(process)
        return process

    def end(self) -> None:
        """Kill both."""
        for process in self._processes:
            process.kill()
            process.communicate()
