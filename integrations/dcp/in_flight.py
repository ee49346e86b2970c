"""Which saves to a directory are under way. Ours are put in order by what makes them; those of torch are by nobody."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from typing import Any

import ckpt

_lock = threading.Lock()
_under_way: dict[
    tuple[int, str], tuple[bool, Any]
] = {}  # by process and directory: whether torch makes the newest, and its future


def await_earlier(path: Any, by_torch: bool, timeout_s: float) -> None:
    """Waits for the newest save to the directory, if torch makes that, or what comes next; whatever comes of it.

    Else the older one might be the last to get its name, or might remove files of the other.

    Raises:
        CheckpointError: it does not end.
    """
    with _lock:
        earlier_by_torch, future = _under_way.get(_key(path), (False, None))
    if future is None or not (by_torch or earlier_by_torch):
        return
    if concurrent.futures.wait([future], timeout_s).not_done:
        raise ckpt.CheckpointError(f"the save to '{path}' that is under way has not ended within {timeout_s:g} s")


def note(path: Any, by_torch: bool, future: Any) -> None:
    """The newest."""
    key = _key(path)
    with _lock:
        _under_way[key] = by_torch, future

    def end(_: Any) -> None:
        with _lock:
            if _under_way.get(key, (False, None))[1] is future:
                del _under_way[key]

    future.add_done_callback(end)


def _key(path: Any) -> tuple[int, str]:
    return os.getpid(), os.path.realpath(os.fspath(path))


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
