"""Scheduling of threads that serve a call: as in the mainline kernel, or as in Android's.

The mainline driver carries a nice value: a synchronous call is served with its caller's, or with the node's minimum if
that is better. Android's common kernel carries a policy too: a caller that is real-time lends that to the server of a
node that says so (INHERIT_RT), a node's minimum can be real-time itself, and one-way calls are served with the
process's default.

Here a **scheduling** is a pair (policy, priority): policy is SCHED_NORMAL 0, SCHED_FIFO 1, SCHED_RR 2 or SCHED_BATCH
3; priority is on the kernel's scale, where smaller is better: 120 + nice for normal and batch, 99 - rt_priority for
real-time.

Sources: Linux 7.3 binder.c `binder_set_nice`; Android common kernel, drivers/android/binder.c
`binder_transaction_priority`, `to_kernel_prio`, `is_rt_policy`.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from binderfs_fuse import uapi

Scheduling: TypeAlias = tuple[int, int]

NORMAL: Final = 0
FIFO: Final = 1
RR: Final = 2
BATCH: Final = 3

_NICE_0: Final = 120
_SUPPORTED: Final = (NORMAL, FIFO, RR, BATCH)


def _is_realtime(policy: int) -> bool:
    return policy in (FIFO, RR)


def scheduling_of_node(flags: int) -> Scheduling:
    """The minimum that a node's flags ask for: an 8-bit signed nice value, or a real-time priority."""
    priority = flags & uapi.FLAT_BINDER_FLAG_PRIORITY_MASK
    if priority > 127:
        priority -= 256
    policy = (flags & uapi.FLAT_BINDER_FLAG_SCHED_POLICY_MASK) >> uapi.FLAT_BINDER_FLAG_SCHED_POLICY_SHIFT
    return policy, 99 - priority if _is_realtime(policy) else _NICE_0 + priority


def scheduling_of_call(caller: Scheduling, default: Scheduling, *, one_way: bool) -> Scheduling:
    """What a call carries: its caller's scheduling, or the target process's `default` for a one-way call."""
    if one_way or caller[0] not in _SUPPORTED:
        return default
    return caller


def scheduling_to_serve(call: Scheduling, node: Scheduling, *, inherit_rt: bool) -> Scheduling:
    """How a thread is to serve a call to a node."""
    desired = call
    if not inherit_rt and _is_realtime(call[0]):
        desired = NORMAL, _NICE_0
    if node[1] < call[1] or (node[1] == call[1] and node[0] == FIFO):
        desired = node
    return desired
