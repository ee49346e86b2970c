"""What a job has of a directory that it saves into: its lock, the number of the next commit, and `latest`.

    .lock                     held by the one job that writes here
    latest                    the name of the newest checkpoint; written last

What lies below, and when it is a checkpoint: see steps.py and bundles.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ckpt.directory import numbering
from ckpt.directory.listing import LATEST
from ckpt.directory.manifest import Manifest
from ckpt.directory.step_names import names_in
from ckpt.storage import durable, temporary_names
from ckpt.storage.directory_lock import DirectoryLock


class Root:
    """One directory, of one process. It need not be there before make().

    Args:
        give_way: see DirectoryLock.
        follows: whether what is done here follows the directory when somebody renames it.

    Attributes:
        lock: for whoever looks at it, or asks whether it is still held. Taken by claim().
    """

    def __init__(self, path: Path, *, give_way: Callable[[float, bool], bool] | None = None, follows: bool = False) -> None:
        self.path = path
        self.lock = DirectoryLock(path, give_way)
        self._follows = follows
        self._held: durable.Directory | None = None  # until make()
        self._numbering = threading.Lock()
        self._next_sequence: int | None = None  # guarded by _numbering
        self._reserved: tuple[int, int] | None = None  # numbers above the first, up to the second; guarded by _numbering

    def make(self, *, synced: bool) -> None:
        """Makes it, if it is not there. From now on this is the one that is meant, whatever becomes of its name.

        Args:
            synced: with an fsync of where it is made.

        Raises:
            StorageError: it cannot be made, or not be entered.
        """
        if self._held is None:
            durable.make_directory(self.path, synced)
            self._held = durable.Directory(self.path)

    @property
    def reach(self) -> Path:
        """What leads to it."""
        return self._held.reach if self._held is not None and self._follows else self.path

    @property
    def identity(self) -> tuple[int, int, int]:
        """The same for all of its names. Between make() and release()."""
        assert self._held is not None
        found = os.fstat(self._held.descriptor)
        return os.getpid(), found.st_dev, found.st_ino

    def is_at(self, path: Path) -> bool:
        """Whether the path still leads here."""
        return self._held is not None and self._held.is_at(path)

    def is_elsewhere(self) -> bool:
        """Whether its path does not lead here any more."""
        return self._held is not None and self._held.descriptor >= 0 and not self._held.is_at(self.path)

    def now(self) -> Path:
        """What it is called now; its old name if it was removed."""
        return self.path if self._held is None else self._held.now()

    # ---- whose it is -----------------------------------------------------------------------------------------------

    def claim(self, timeout_s: float = 0.0) -> None:
        """
        Args:
            timeout_s: how long to wait for another owner in this process to give way, seconds.

        Raises:
            InUseError: another job is writing to it.
            StorageError: the lock file cannot be made.
        """
        self.lock.acquire(timeout_s)

    def release(self) -> None:
        """Safe to call again. From now on the directory may belong to another job."""
        self.lock.release()
        if self._held is not None:
            self._held.close()

    # ---- publishing ------------------------------------------------------------------------------------------------

    def take_sequence(self, find_committed: Callable[[], Iterable[tuple[Path, Manifest]]]) -> int:
        """The number of the next commit.

        Args:
            find_committed: the checkpoints that are here; called for the first number.
        """
        with self._numbering:
            if self._next_sequence is None:
                self._next_sequence = max((manifest.sequence for _, manifest in find_committed()), default=0) + 1
            if self._reserved is not None:
                base, last = self._reserved
                self._next_sequence = max(self._next_sequence, base + 1)
                if self._next_sequence > last:
                    self._reserve(last)
            self._next_sequence += 1
            return self._next_sequence - 1

    def reserve_numbers(self, above: int) -> int:
        """From now on commits get numbers that no other job has: see numbering.py. Returns the one below the first.

        Args:
            above: the highest number that was come across, here or elsewhere.

        Raises:
            CorruptError, StorageError: as of numbering.reserve().
        """
        with self._numbering:
            if self._reserved is not None and self._reserved[0] >= above:
                return self._reserved[0]
            return self._reserve(above)

    def _reserve(self, above: int) -> int:
        base = numbering.reserve(self.path, above)
        self._reserved = base, base + numbering.RESERVED
        return base

    def sync(self) -> None:
        """Makes the directories in it durable."""
        durable.sync_directory(self.reach)

    def point_latest(self, content: str) -> None:
        """Durably. Raises StorageError."""
        durable.replace_durably(self.reach / LATEST, content.encode(), "latest")

    @contextlib.contextmanager
    def latest_aside(self) -> Iterator[Path]:
        """Where to write what `latest` is going to be; removed if it does not become that."""
        aside = temporary_names.temporary_path(self.reach / LATEST)
        try:
            yield aside
        except BaseException:
            durable.remove_quietly(aside)
            raise

    def move_latest(self, aside: Path) -> None:
        """Durably, as point_latest() does. Raises StorageError."""
        durable.crash_point("latest-written")
        durable.rename_durably(aside, self.reach / LATEST)
        durable.crash_point("latest-renamed")


def temporaries_in(directory: Path) -> list[tuple[Path, str]]:
    """What lies there under a temporary name of ours, and the name that it was made for.

    Raises:
        OSError: the directory cannot be read.
    """
    found = ((path, temporary_names.name_behind(path.name)) for path in directory.iterdir())
    return [(path, behind) for path, behind in found if behind is not None]


def has_size(path: str | os.PathLike[str], size: int) -> bool:
    """False, too, if it is not there, or cannot be looked at."""
    try:
        return os.stat(path).st_size == size
    except OSError:
        return False


def missing_files(directory: Path, manifest: Manifest) -> list[str]:
    """Names of files that do not lie there with the size that the manifest gives, neither under their own name nor under the
    one that they had before.
    """
    names = names_in(directory)
    missing = []
    for file in manifest.files:
        under = [name for name in (file.name, file.temporary) if name and name in names]
        if not any(has_size(directory / name, file.bytes) for name in under):
            missing.append(file.name)
    return missing
