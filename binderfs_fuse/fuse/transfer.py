"""An answer that takes the client's own hands: files to install in it, descriptors to close.

A tracer thread (`host/files.py`) calls back at each stage. Until the reply, a failure is the engine's to word, and the
reply says so. After it, the client is stopped on its way out of its ioctl: what the reply stored is stored over, and it
gets another result, so that it cannot tell. That is done to the stopped client, and not by its thread id, which may be
another program's by then.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from binderfs_fuse.engine.effects import Outcome
from binderfs_fuse.host.files import File, Instead

if TYPE_CHECKING:
    from binderfs_fuse.fuse.channel import Channel
    from binderfs_fuse.fuse.device import Call, DevicePlane
    from binderfs_fuse.host.files import FileInstaller


class Transfer:
    """The answer of one call, with `outcome.files` and `outcome.closes`."""

    def __init__(self, plane: DevicePlane, channel: Channel, call: Call, outcome: Outcome) -> None:
        self._plane = plane
        self._channel = channel
        self._call = call
        self._outcome = outcome
        self._replied = False
        # The client's memory did not take the data: the engine knows already.
        self._undelivered = False

    def begin(self, installer: FileInstaller) -> None:
        """Hand it to a tracer thread."""
        handed = []
        for file, _, _ in self._outcome.files:
            assert isinstance(file, File)  # all of this mount's are
            handed.append(file)
        installer.install(
            self._call.task.tid,
            handed,
            reply=self._reply,
            patch=self._patch,
            failed=self._failed,
            closes=self._outcome.closes,
            handle=self._call.open.handle,
            user=self._call.task.euid,
        )

    def _reply(self) -> bool:
        call = self._call
        answer = call.answer(self._outcome)
        self._replied = True
        stored = self._channel.answer(answer)
        if stored != answer[-1]:
            self._undelivered = True
            instead = self._plane.undelivered(call, self._outcome, max(stored, 0), -min(stored, 0))
            self._channel.answer(call.answer(instead))
        self._plane.transfers.pop(call.unique, None)
        return not self._undelivered

    def _patch(self, numbers: list[int]) -> None:
        if numbers:
            self._plane.installed(self._call, self._outcome, numbers)

    def _failed(self, error: int) -> Instead | None:
        call = self._call
        self._plane.transfers.pop(call.unique, None)
        if self._undelivered:
            return None
        if error == -errno.ESRCH:
            # It is being killed. To the driver its transaction is handed over by then, and ends with it.
            if not self._replied:
                self._channel.answer(call.answer(Outcome(-errno.EINTR)))
            return None
        instead = self._plane.install_failed(call, self._outcome) if self._outcome.files else self._outcome
        if not self._replied:
            if instead is not None:
                self._channel.answer(call.answer(instead))
            return None
        if instead is None or instead is self._outcome:
            return None
        return Instead(
            instead.error,
            [(instead.address, bytes(instead.data)), (call.argument, bytes(instead.argument[: call.out_size]))],
        )
