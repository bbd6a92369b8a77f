"""The binder driver's logic, without I/O: see `docs/architecture.md` for how a shell drives it."""

from binderfs_fuse.engine.context import Context, Engine, Task
from binderfs_fuse.engine.effects import (
    CopyIn,
    CopyOut,
    CopyToBuffer,
    FindMapping,
    FindRoom,
    GetFile,
    GetSecurityContext,
    Outcome,
    Populate,
    SetNice,
    SetScheduling,
    Turn,
    Wait,
    conclude,
)
from binderfs_fuse.engine.process import Process

__all__ = [
    "Context",
    "CopyIn",
    "CopyOut",
    "CopyToBuffer",
    "Engine",
    "FindMapping",
    "FindRoom",
    "GetFile",
    "GetSecurityContext",
    "Outcome",
    "Populate",
    "Process",
    "SetNice",
    "SetScheduling",
    "Task",
    "Turn",
    "Wait",
    "conclude",
]
