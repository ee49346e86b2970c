"""What saves: one for each process group, kept from call to call, because the ranks make it together."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import torch.distributed as dist

import ckpt
from ckpt.dcp import DcpCheckpointer

_lock = threading.RLock()
_options: ckpt.Options | None = None
# By process, group and whether it is alone; with the group, whose number may be used again. What belongs to a parent process is
# left alone: its threads are not here.
_sessions: dict[tuple[int, int, bool], tuple[Any, DcpCheckpointer]] = {}
_own_groups: dict[int, tuple[Any, Any]] = {}  # by the group whose ranks they have, with that


def configure(options: ckpt.Options) -> None:
    """For all saves of this process; before the first one, or behind close(). The same on all ranks.

    Raises:
        CheckpointError: saves have been made.
    """
    global _options
    with _lock:
        if any(key[0] == os.getpid() for key in _sessions):
            raise ckpt.CheckpointError("options are given before the first save, or behind close()")
        _options = options


def options() -> ckpt.Options:
    return _options or ckpt.Options()


def close() -> None:
    """Waits for all saves in flight, and ends what has made them; on all ranks, before the process group is destroyed.

    Without it they are waited for when the process ends, as long as the store of torch.distributed is there.

    Raises:
        CheckpointError: the newest save did not become durable.
    """
    with _lock:
        own = [key for key in _sessions if key[0] == os.getpid()]
        with contextlib.ExitStack() as ending:
            for key in own:
                ending.callback(_sessions.pop(key)[1].close)


def session_of(process_group: Any, no_dist: bool) -> DcpCheckpointer:
    """
    Raises:
        CheckpointError: the ranks of the group cannot agree.
    """
    alone = no_dist or not is_initialized()
    group = None if alone else process_group or dist.group.WORLD
    with _lock:
        _drop_outlived()
        key = (os.getpid(), id(group), alone)
        found = _sessions.get(key)
        if found is None:
            found = _sessions[key] = group, DcpCheckpointer(options=options(), group=group, alone=alone)
        return found[1]


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _drop_outlived() -> None:
    """Those of a torch.distributed that was destroyed."""
    world = dist.group.WORLD if is_initialized() else None
    for key, (group, session) in list(_sessions.items()):
        if key[0] == os.getpid() and not key[2] and not _lives(group, world):
            del _sessions[key]
            with contextlib.suppress(ckpt.CheckpointError):  # it was logged
                session.close()


def _lives(group: Any, world: Any) -> bool:
    if world is None:
        return False
    try:
        return group is world or bool(dist.get_process_group_ranks(group))
    except (KeyError, RuntimeError, ValueError):
        return False


def background_group(process_group: Any, no_dist: bool) -> Any:
    """For collectives of another thread: those of the training must not meet them. A collective, the first time.

    Of the same ranks: whoever names a group may train on that.
    """
    if no_dist or not is_initialized():
        return process_group
    group: Any = process_group or dist.group.WORLD
    if dist.get_rank(group) < 0:
        return group  # torch refuses it
    known = _own_groups.get(id(group))
    if known is None or known[0] is not group:
        among: dict[str, Any] = {}
        if group is not dist.group.WORLD:
            among = {"ranks": dist.get_process_group_ranks(group), "use_local_synchronization": True}
        known = _own_groups[id(group)] = group, dist.new_group(backend="gloo", **among)
    return known[1]


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
