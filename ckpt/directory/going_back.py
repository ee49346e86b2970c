"""The commits that jobs have gone back to, by restore(step=): they stay at home as long as those jobs live, whatever comes.

Who removes checkpoints asks here: the job that saves, drains that tidy home, `ckpt prune`. Drains also bring them home. Where
no drain works nobody removes but the job that saves, which has in mind what it went back to. Else it is written at home, before
a restore lets drains go on:

    .remote/back-<token>/holds.json     what one process has gone back to; see holds.py
                         .drain.lock    which it holds as long as it lives

Each process has its own, so none takes away what another needs. One that nobody holds any more is of a process that was killed.
It counts as long as no job saves at home, since a second attempt may come, and the next job that claims home removes it; beside
a job that saves it was of another, as an evaluation, and counts for nothing. A file system without locks has no .drain.lock
there: then it counts until a job claims home.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
from pathlib import Path

from ckpt.directory import holds, publish_lock
from ckpt.directory import manifest as manifests
from ckpt.directory.holds import BACK, FOLDER, Holds
from ckpt.directory.step_names import names_in, step_name
from ckpt.errors import CheckpointError, StorageError
from ckpt.storage import durable
from ckpt.storage.directory_lock import DirectoryLock

logger = logging.getLogger("ckpt")

# As in the place of a drain (ckpt/drain/node.py): a job that knows nothing of this leaves alone what is locked so.
LOCK = ".drain.lock"


def sequences_at(home: Path, *, living: bool = False) -> set[int]:
    """What must stay at home, as far as it is written there.

    Args:
        living: only what living processes have gone back to.

    Raises:
        StorageError: home cannot be read.
    """
    places = [home / FOLDER / name for name in names_in(home / FOLDER) if name.startswith(BACK)]
    if places and (living or DirectoryLock(home).holder() is not None):
        places = [place for place in places if not os.path.lexists(place / LOCK) or _is_locked(place)]
    return {sequence for place in places for sequence in holds.read(place).held}


def _is_locked(place: Path) -> bool:
    return DirectoryLock(place, name=LOCK).holder() is not None


def _remove(place: Path) -> None:
    for name in (holds.NAME, LOCK):  # in this order: without the lock alone it would count
        durable.remove_quietly(place / name)
    durable.remove_if_empty(place)


class GoingBack:
    """Of one process, and one home. Called by one thread; sequences() by all.

    Attributes:
        has_drains: whether drains are going to work at home, though none may have so far.
    """

    def __init__(self, home: Path) -> None:
        self.has_drains = False
        self._home = home
        self._place = home / FOLDER / f"{BACK}{secrets.token_hex(8)}"
        self._owner = os.getpid()
        self._lock: DirectoryLock | None = None
        self._taken: tuple[int, ...] = ()  # the last one first, here and below
        self._tried: tuple[int, ...] = ()  # of a restore that is going on
        self._written: tuple[int, ...] = ()

    def sequences(self) -> set[int]:
        """What must stay for this process, or for another.

        Raises:
            StorageError: home cannot be read.
        """
        return {*self._taken, *self._tried} | sequences_at(self._home)

    def try_step(self, step: int) -> None:
        """What home has of it now. To be called before a drain may bring something newer."""
        try:
            found = manifests.read_if_any(self._home / step_name(step))
        except (CheckpointError, OSError):
            return  # it is not good: nobody goes back to that
        if found is not None:
            self.try_commit(found.sequence)

    def try_commit(self, sequence: int) -> None:
        """It may be gone back to. It need not be at home yet."""
        self._tried = _first(sequence, self._tried)
        self._write()

    def settle(self, sequence: int | None = None) -> None:
        """The restore has ended.

        Args:
            sequence: that was gone back to; None: none was, or another rank sees to it.
        """
        self._taken = self._taken if sequence is None else _first(sequence, self._taken)
        self._tried = ()
        self._write()

    def begin(self) -> None:
        """Home is this job's: what those have left that were killed goes."""
        try:
            for name in names_in(self._home / FOLDER):
                place = self._home / FOLDER / name
                is_another = name.startswith(BACK) and place != self._place
                if is_another and (place / holds.NAME).exists() and not _is_locked(place):
                    _remove(place)
                elif is_another:
                    durable.remove_if_empty(place)
        except (CheckpointError, OSError) as error:
            logger.warning("what jobs had gone back to that are gone stays in '%s': %s", self._home, error)
        self._write()

    def release(self) -> None:
        """Nothing has to stay for this process any more."""
        self._taken = self._tried = ()
        if os.getpid() == self._owner:
            self._take_back()

    def _write(self) -> None:
        """If anybody but this process removes at home. A failure is only logged."""
        wanted = (*self._tried, *(sequence for sequence in self._taken if sequence not in self._tried))
        if wanted == self._written or os.getpid() != self._owner:
            return
        try:
            if not wanted:
                self._take_back()
            elif (self.has_drains or publish_lock.is_home(self._home)) and self._home.is_dir():
                self._tell(wanted)
        except (CheckpointError, OSError) as error:
            logger.warning("home may remove the checkpoint that was gone back to, as keep= says: %s", error)

    def _tell(self, wanted: tuple[int, ...]) -> None:
        if self._lock is None:
            self._lock = self._make_place()
        durable.make_directory(self._home / publish_lock.FOLDER, durable=True)
        with publish_lock.publishing(self._home, "Checkpointer"):  # a drain that removes just now has not seen it
            durable.make_directory(self._place, durable=False)  # without locks it may have been taken for one that was left
            if holds.write(self._place, Holds(wanted, wanted)):  # else it is tried again, whenever anything is told
                self._written = wanted

    def _make_place(self) -> DirectoryLock:
        lock = DirectoryLock(self._place, name=LOCK)
        try:
            durable.make_directory(self._place, durable=False)
            lock.acquire()
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            # A job that began just then has taken it for one that was left.
            durable.make_directory(self._place, durable=False)
            lock.acquire()
        if not lock.held:
            durable.remove_quietly(self._place / LOCK)
        return lock

    def _take_back(self) -> None:
        lock, self._lock, self._written = self._lock, None, ()
        if lock is not None:
            durable.remove_quietly(self._place / holds.NAME)
            lock.release()  # before its file goes: NFS keeps what is open in the directory, under another name
            _remove(self._place)


def _first(sequence: int, others: tuple[int, ...]) -> tuple[int, ...]:
    return (sequence, *(each for each in others if each != sequence))
