"""Whether a bundle that could not be saved was just removed by its user; or is lost, which its error does not say."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ckpt.errors import CheckpointError, CorruptError, PeerError, StorageError, SupersededError
from ckpt.saving.task import SaveTask

_REMOVAL_S = 1.0


def has_vanished(task: SaveTask, error: BaseException) -> bool:
    """Whether the user has removed the bundle meanwhile: the storage is not to blame, and the next one may be good."""
    own = [file for file in task.planned if file.target.parent == task.path]
    if not own or any(file.directory is not None and file.directory.moved for file in own):
        return False
    gone = isinstance(error, (PeerError, CorruptError)) or (isinstance(error, StorageError) and error.errno == errno.ENOENT)
    return gone and _is_gone(task.path)


def as_failure(
    task: SaveTask, error: BaseException | None, pending: Iterable[SaveTask], read: Callable[[Path], object]
) -> BaseException | None:
    """Of a bundle that is said to be superseded, although nothing of its name stands, nor is on its way: then it is lost.

    Args:
        read: what is in a directory; None: nothing.
    """
    if not isinstance(error, SupersededError) or read(task.path) is not None:
        return error
    if any(each.path == task.path and each.started_at > task.started_at for each in pending):
        return error
    return CheckpointError(f"{error}; but nothing is in '{task.path}'")


def _is_gone(path: Path) -> bool:
    """Or going: a removal that has taken the first file takes a moment for the last."""
    end = time.monotonic() + _REMOVAL_S
    while path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(_REMOVAL_S / 20)
    return True
