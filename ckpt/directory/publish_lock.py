"""Who else publishes in a directory of checkpoints beside the job that saves there: the drains of its nodes.

    .run                  names the run whose home this is: there is one once a job has saved here by way of its nodes
    .drain/publish.lock   held, for milliseconds, by whoever publishes or removes something

The job that saves holds `.lock` for as long as it lives; a drain never takes that, since it outlives the job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ckpt.storage.directory_lock import DirectoryLock

RUN = ".run"
FOLDER = ".drain"
PUBLISH_LOCK = "publish.lock"
_LONGEST_WAIT_S = 60.0  # a commit takes milliseconds, and its removals seconds
_LOOK_S = 0.05
_LOCKED = "'{directory}' is locked by {holder}, which commits a checkpoint; this is tried again"


def is_home(directory: Path) -> bool:
    """Whether drains may publish there."""
    return os.path.lexists(directory / RUN)


@contextlib.contextmanager
def publishing(directory: Path, who: str) -> Iterator[bool]:
    """Meanwhile nobody else publishes or removes there; FOLDER is there. False: the file system has no locks.

    Args:
        who: asks, in words for another one of this process.

    Raises:
        InUseError: somebody else does, for too long.
        StorageError: the lock cannot be made.
    """
    lock = DirectoryLock(directory / FOLDER, name=PUBLISH_LOCK, refusal=_LOCKED, owner=f"another {who}")
    with lock.waited_for(_LONGEST_WAIT_S, _LOOK_S):
        yield lock.held
