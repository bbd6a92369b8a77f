"""A file system of one file, whose ioctls wait for as long as a test likes: where a client of a binder device waits."""

import ctypes
import errno
import os
import stat
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from binderfs_fuse import uapi

_FILE = 2
_FOREVER = 1 << 30
_LIBC = ctypes.CDLL(None, use_errno=True)
_MNT_FORCE = 1
_MNT_DETACH = 2


@dataclass(frozen=True)
class Parked:
    """A task that waits in its ioctl."""

    device: "ParkingDevice"
    unique: int
    tid: int
    command: int
    argument: bytes

    def reply(self, value: int = 0, error: int = 0) -> bool:
        """Answer: the ioctl's result, and a 64-bit number for its argument; return whether anybody waited."""
        out = uapi.fuse_ioctl_out.pack(error, 0, 0, 0)
        return self.device.send(self.unique, 0, out + struct.pack("=Q", value))


class ParkingDevice:
    """The mounted file system; its file is `path`, its waiting tasks come by `parked`."""

    def __init__(self, folder: Path) -> None:
        """Mount it on a folder; needs root."""
        self.path = folder / "device"
        self.parked: SimpleQueue[Parked] = SimpleQueue()
        self.interrupted: SimpleQueue[int] = SimpleQueue()
        self._folder = folder
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other"
        if _LIBC.mount(b"parking", os.fsencode(folder), b"fuse", 0, options.encode()) != 0:
            os.close(self._fd)
            raise OSError(ctypes.get_errno(), "mount")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def abort(self) -> None:
        """Unmount; whoever still waits has ECONNABORTED."""
        _LIBC.umount2(os.fsencode(self._folder), _MNT_FORCE | _MNT_DETACH)
        self._thread.join()

    def close(self) -> None:
        """Unmount, and let nobody reply any more. Nothing the second time."""
        if self._fd >= 0:
            self.abort()
            os.close(self._fd)
            self._fd = -1

    def send(self, unique: int, error: int, data: bytes = b"") -> bool:
        """Answer a request; return whether anybody waited."""
        header = uapi.fuse_out_header.pack(uapi.fuse_out_header.size + len(data), error, unique)
        try:
            os.write(self._fd, header + data)
        except FileNotFoundError:
            return False
        return True

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fd, 1 << 18)
            except OSError as failure:
                if failure.errno == errno.ENODEV:
                    return
                if failure.errno != errno.ENOENT:
                    raise
                continue
            _, opcode, unique, node, _, _, pid, _ = uapi.fuse_in_header.unpack_from(request)
            payload = request[uapi.fuse_in_header.size :]
            if opcode == uapi.FUSE_IOCTL:
                _, _, command, _, size, _ = uapi.fuse_ioctl_in.unpack_from(payload)
                argument = payload[uapi.fuse_ioctl_in.size :][:size]
                self.parked.put(Parked(self, unique, pid, command, argument))
            elif opcode == uapi.FUSE_INTERRUPT:
                self.interrupted.put(uapi.fuse_interrupt_in.unpack_from(payload)[0])
            elif opcode not in (uapi.FUSE_FORGET, uapi.FUSE_BATCH_FORGET):
                self.send(unique, *self._answer(opcode, node, payload))

    def _answer(self, opcode: int, node: int, payload: bytes) -> tuple[int, bytes]:
        if opcode == uapi.FUSE_INIT:
            return 0, uapi.fuse_init_out.pack(7, 31, 0, 0, 0, 0, 4096, 0, 0, 0, 0, 0, 0)
        if opcode == uapi.FUSE_LOOKUP:
            if payload != b"device\0":
                return -errno.ENOENT, b""
            return 0, struct.pack("=QQQQII", _FILE, 0, _FOREVER, _FOREVER, 0, 0) + self._attributes(_FILE)
        if opcode == uapi.FUSE_GETATTR:
            return 0, struct.pack("=QII", _FOREVER, 0, 0) + self._attributes(node)
        if opcode == uapi.FUSE_OPEN:
            return 0, uapi.fuse_open_out.pack(0, 0, 0)
        if opcode in (uapi.FUSE_FLUSH, uapi.FUSE_RELEASE):
            return 0, b""
        return -errno.ENOSYS, b""

    @staticmethod
    def _attributes(node: int) -> bytes:
        mode = stat.S_IFREG | 0o666 if node == _FILE else stat.S_IFDIR | 0o755
        return uapi.fuse_attr.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
