"""Which saves to a directory are under way. Ours are put in order by what makes them; those of torch are by nobody."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from typing import Any

import ckpt

_lock = threading.Lock()
_under_way: dict[tuple[int, str], dict[Any, bool]] = {}  # by process and directory: their futures, and whether torch makes each


def await_earlier(path: Any, by_torch: bool, timeout_s: float) -> None:
    """Waits for the saves to the directory that torch makes, or for all if torch makes the next; whatever comes of them.

    Else an older one might be the last to get its name, or might remove files of the other.

    Raises:
        CheckpointError: one does not end.
    """
    with _lock:
        earlier = [future for future, is_of_torch in _under_way.get(_key(path), {}).items() if by_torch or is_of_torch]
    if concurrent.futures.wait(earlier, timeout_s).not_done:
        raise ckpt.CheckpointError(f"the save to '{path}' that is under way has not ended within {timeout_s:g} s")


def note(path: Any, by_torch: bool, future: Any) -> None:
    """One that has begun."""
    key = _key(path)
    with _lock:
        _under_way.setdefault(key, {})[future] = by_torch

    def end(_: Any) -> None:
        with _lock:
            left = _under_way.get(key, {})
            left.pop(future, None)
            if not left:
                _under_way.pop(key, None)

    future.add_done_callback(end)


def _key(path: Any) -> tuple[int, str]:
    return os.getpid(), os.path.realpath(os.fspath(path))


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
