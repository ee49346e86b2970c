"""Room on a file system: whether there is enough, and files that keep theirs for a while, because freeing takes long."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

_kept: set[int] = set()  # descriptors, by keep_space()


def keep_space(path: Path) -> Callable[[], None]:
    """Lets a file that is about to be replaced keep its space until the returned function is called: freeing takes long."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # it may be a FIFO
    except OSError:
        return lambda: None
    _kept.add(descriptor)

    def free() -> None:
        if descriptor in _kept:
            os.close(descriptor)  # first: a child that is forked just now must not keep it
            _kept.discard(descriptor)

    return free


def free_bytes(directory: Path) -> int | None:
    """What its file system has to give; None if that cannot be told."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def has_room(directory: Path, size: int) -> bool:
    """Whether its file system has this many bytes to give. No, if that cannot be told."""
    free = free_bytes(directory)
    return free is not None and free >= size


def _free_in_child() -> None:
    """Else a process that lives on would keep the space."""
    while _kept:
        with contextlib.suppress(OSError):
            os.close(_kept.pop())


os.register_at_fork(after_in_child=_free_in_child)
