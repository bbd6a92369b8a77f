"""What can be chosen about a mount."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_DEVICES: Final = 1 << 20
"""As many as there are minor numbers: the most that ``max=`` may say."""
LEAST_MEMORY: Final = 1 << 20
"""The least that ``memory=`` may say, in bytes."""
DEVICES: Final = (b"binder", b"hwbinder", b"vndbinder")
"""The devices that Android's build of the driver begins with."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a mount behaves; `maximum` and `stats` are the kernel's options, the rest is for FUSE.

    `maximum`    the most devices that there can be at a time
    `stats`      whether there is a directory binder_logs
    `devices`    the first devices' names; every device made has `mode`, `uid` and `gid` (None: who mounted)
    `region`     how receive regions are made: ``passthrough`` (Linux 6.9 and real root), ``pagecache``, or ``auto``
    `secctx`     the label of a sender that no security module gives one
    `priority`   what a call carries to its server: ``kernel`` nice values, or ``android`` scheduling policies too
    `seccomp`    whether the server has its system calls filtered; None: where that can be
    `memory`     the most bytes that the server may hold for all clients, None: as the machine allows
    `limits`     what clients may hold, by the names of `binderfs_fuse.limits.Limits`, where that is not the default
    `chosen`     what can be asked for of how it was mounted, in the command's words
    """

    maximum: int = MAX_DEVICES
    stats: bool = True
    devices: tuple[bytes, ...] = DEVICES
    mode: int = 0o600
    uid: int | None = None
    gid: int | None = None
    read_only: bool = False
    region: str = "auto"
    secctx: bytes = b"u:r:unlabeled:s0"
    priority: str = "kernel"
    seccomp: bool | None = None
    memory: int | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    chosen: Mapping[str, str] = field(default_factory=dict)
