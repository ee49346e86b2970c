"""Of the ranks of a node one fetches a file, and the others wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ckpt.storage import durable
from ckpt.storage.directory_lock import DirectoryLock

_LOOK_S = 0.1


@contextlib.contextmanager
def lone_writer(path: Path, timeout_s: float) -> Iterator[None]:
    """Meanwhile nobody else of this node fetches to `path`. Its directory is made.

    Raises:
        InUseError: somebody else does, for too long.
        StorageError: the directory, or the lock in it, cannot be made.
    """
    durable.make_directory(path.parent, durable=False)
    lock = DirectoryLock(path.parent, name=f".{path.name}.lock", owner="another rank")
    with lock.waited_for(timeout_s, _LOOK_S):
        yield
