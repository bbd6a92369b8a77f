"""Counters behind `binder_logs/stats`: commands, returns and objects (binder.c `struct binder_stats`)."""

from __future__ import annotations

from typing import Final

RETURNS: Final = (
    "BR_ERROR",
    "BR_OK",
    "BR_TRANSACTION",
    "BR_REPLY",
    "BR_ACQUIRE_RESULT",
    "BR_DEAD_REPLY",
    "BR_TRANSACTION_COMPLETE",
    "BR_INCREFS",
    "BR_ACQUIRE",
    "BR_RELEASE",
    "BR_DECREFS",
    "BR_ATTEMPT_ACQUIRE",
    "BR_NOOP",
    "BR_SPAWN_LOOPER",
    "BR_FINISHED",
    "BR_DEAD_BINDER",
    "BR_CLEAR_DEATH_NOTIFICATION_DONE",
    "BR_FAILED_REPLY",
    "BR_FROZEN_REPLY",
    "BR_ONEWAY_SPAM_SUSPECT",
    "BR_TRANSACTION_PENDING_FROZEN",
    "BR_FROZEN_BINDER",
    "BR_CLEAR_FREEZE_NOTIFICATION_DONE",
)
COMMANDS: Final = (
    "BC_TRANSACTION",
    "BC_REPLY",
    "BC_ACQUIRE_RESULT",
    "BC_FREE_BUFFER",
    "BC_INCREFS",
    "BC_ACQUIRE",
    "BC_RELEASE",
    "BC_DECREFS",
    "BC_INCREFS_DONE",
    "BC_ACQUIRE_DONE",
    "BC_ATTEMPT_ACQUIRE",
    "BC_REGISTER_LOOPER",
    "BC_ENTER_LOOPER",
    "BC_EXIT_LOOPER",
    "BC_REQUEST_DEATH_NOTIFICATION",
    "BC_CLEAR_DEATH_NOTIFICATION",
    "BC_DEAD_BINDER_DONE",
    "BC_TRANSACTION_SG",
    "BC_REPLY_SG",
    "BC_REQUEST_FREEZE_NOTIFICATION",
    "BC_CLEAR_FREEZE_NOTIFICATION",
    "BC_FREEZE_NOTIFICATION_DONE",
)
OBJECTS: Final = ("proc", "thread", "node", "ref", "death", "transaction", "transaction_complete", "freeze")

# One by one, each Final: as one assignment they would be attributes to look up, not numbers, to compiled code.
PROC: Final = 0
THREAD: Final = 1
NODE: Final = 2
REF: Final = 3
DEATH: Final = 4
TRANSACTION: Final = 5
TRANSACTION_COMPLETE: Final = 6
FREEZE: Final = 7


class Stats:
    """Counts by _IOC_NR of the command (`bc`) and return (`br`), and by kind of object (`created`, `deleted`)."""

    __slots__ = ("bc", "br", "created", "deleted")

    def __init__(self) -> None:
        self.bc = [0] * len(COMMANDS)
        self.br = [0] * len(RETURNS)
        self.created = [0] * len(OBJECTS)
        self.deleted = [0] * len(OBJECTS)
