"""A directory of checkpoints: its names, what is in it, and what happens to steps that are no longer wanted.

    .lock                     held by the one job that writes here
    latest                    the name of the newest committed step directory; written last
    step-000000000042/
        manifest.json         the commit record; without one the directory is no checkpoint
        state.pt              what a job of one process gave; or, of several:
        rank-00000.pt  ...    what each rank gave for itself
        replicated.pt         what was the same on all ranks

A file of a step that is saved again gets another name (state-2.pt) beside the old one: the rename of the manifest exchanges the
two at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckpt import _manifest, _storage
from ckpt._lock import DirectoryLock
from ckpt._manifest import Manifest
from ckpt.errors import CheckpointError, ClosedError, CorruptError, NotACheckpointError, StorageError

logger = logging.getLogger("ckpt")

LATEST = "latest"
_PREFIX = "step-"
_DIGITS = 12  # so that names sort like numbers


def step_name(step: int) -> str:
    """The directory name of a step.

    Raises:
        TypeError, ValueError: it is not a count of at most 12 digits.
    """
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an int, not {type(step).__name__}")
    if not 0 <= step < 10**_DIGITS:
        raise ValueError(f"step must lie between 0 and {10**_DIGITS - 1}, but is {step}")
    return f"{_PREFIX}{step:0{_DIGITS}d}"


def is_step_name(name: str) -> bool:
    digits = name.removeprefix(_PREFIX)
    return name.startswith(_PREFIX) and len(digits) == _DIGITS and digits.isdecimal() and digits.isascii()


class StepDirectories:
    """What one process does in the directory. begin() runs on the caller's thread, publish() and tidy() on the committer's.

    Args:
        keep: how many committed steps stay; None: all.
        shared: ranks of one job write here together. Rank 0 alone publishes and removes; it cannot know what the others are
            writing just now, so it removes less.
        max_in_flight: how many steps may be on their way at once.
    """

    def __init__(self, directory: Path, keep: int | None, shared: bool, max_in_flight: int) -> None:
        self._directory = directory
        self._keep = keep
        self._max_in_flight = max_in_flight
        self._shared = shared
        self._held = _storage.Directory(directory)
        self._file_lock = DirectoryLock(directory)
        self._changing = threading.RLock()  # held while something is published or removed; a finalizer may take it
        self._released = False  # guarded by _changing
        # Guards what follows. The caller's thread waits for it: the committer's does not hold it while the file system works.
        self._lock = threading.Condition()
        self._in_flight: dict[str, set[str]] = {}  # step directory -> names of files being written
        self._removing: set[str] = set()  # step directories that are just being taken away
        self._limits: tuple[int, int] | None = None  # what direct I/O demands here, once a file has been written
        self._begun_again = ""  # the step that was begun last, if it may be there already
        self._highest: str | None = None  # no step above has been begun, or lay here when the first one was
        # Of the committer's thread, once there is a save:
        self._next_sequence: int | None = None
        self._retired: list[Path] = []  # no steps any more, but still there

    # ---- looking ---------------------------------------------------------------------------------------------------

    def look(self) -> tuple[list[tuple[Path, Manifest]], list[NotACheckpointError]]:
        """The checkpoints, newest commit first, and what is wrong with manifests that cannot be understood.

        A directory without a manifest was never committed, and is neither.
        """
        found, damaged = [], []
        for path in self._step_directories():
            try:
                found.append((path, _manifest.read(path)))
            except NotACheckpointError as error:
                if (path / _manifest.NAME).exists():
                    damaged.append(error)
        found.sort(key=lambda item: item[1].sequence, reverse=True)
        return found, damaged

    def _step_directories(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        return [path for path in self._directory.iterdir() if is_step_name(path.name) and path.is_dir()]

    # ---- the caller's side -----------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Once, before the first save of the job: makes the directory ours, and removes what a crash left.

        Raises:
            InUseError: another job is writing to it.
            StorageError: the lock cannot be made.
        """
        self._file_lock.acquire()
        self._remove_leftovers()  # before a byte is written: a full disk may be full of them

    def release(self) -> None:
        """From now on nothing is published or removed: the directory may belong to another job."""
        with self._changing:
            self._released = True
            self._file_lock.release()
            self._held.close()

    @contextlib.contextmanager
    def _still_ours(self) -> Iterator[None]:
        with self._changing:
            if self._released:
                raise ClosedError(f"the Checkpointer of '{self._directory}' was closed before this save was published")
            self._file_lock.assert_held()
            yield

    def begin(self, name: str, stems: Sequence[str]) -> tuple[list[Path], tuple[int, int] | None]:
        """Chooses names for the files of a step that no committed or pending one uses.

        The step's directory is made with its files, if it is not there. For a step above all others nothing is looked up.

        Args:
            stems: of the names: "state", "replicated", "rank-00003".

        Returns:
            The files, and what direct I/O demands of them, for FileSave; None as long as that is not known.

        Raises:
            StorageError: a directory cannot be read.
        """
        directory = self._directory / name
        with self._lock:
            self._lock.wait_for(lambda: name not in self._removing)
            taken = set(self._in_flight.get(name, ()))
            new = self._is_new(name)
            self._begun_again = "" if new else name
            if not new:
                taken |= _names_in_use(directory)
            files = [_free_name(stem, taken) for stem in stems]
            self._in_flight.setdefault(name, set()).update(files)
            return [directory / file for file in files], self._limits

    def _is_new(self, name: str) -> bool:
        if self._highest is None:
            self._highest = max(filter(is_step_name, _names_in(self._directory)), default="")
        new = name > self._highest
        self._highest = max(name, self._highest)
        return new

    def replaced_by(self, target: Path, stem: str) -> Path | None:
        """The file of the committed step that `target`, from begin(), will take the place of."""
        if target.parent.name != self._begun_again:
            return None
        manifest = _manifest.read_if_any(target.parent)
        names = () if manifest is None else sorted(_manifest.names(manifest.files))
        return next((target.parent / name for name in names if _stem_of(name) == stem), None)

    def note_limits(self, limits: tuple[int, int] | None) -> None:
        """Of a file that was written here."""
        if limits is not None:
            with self._lock:
                self._limits = limits

    def abandon(self, directory: Path, targets: Sequence[Path], *, failed: bool = False) -> None:
        """The save that begin() returned `targets` for is over: published, failed on the way, or never begun."""
        with self._lock:
            names = self._in_flight.get(directory.name, set())
            names.difference_update(target.name for target in targets)
            if not names:
                self._in_flight.pop(directory.name, None)
        if failed and not self._shared:
            with self._taking_away(directory.name) as nobody_writes:
                if nobody_writes:
                    _storage.remove_if_empty(directory)  # it is when the first save to this step has failed

    @contextlib.contextmanager
    def _taking_away(self, name: str) -> Iterator[bool]:
        """Meanwhile no save begins in this step directory. False if one is under way there: then it must stay."""
        with self._lock:
            free = name not in self._in_flight
            if free:
                self._removing.add(name)
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._removing.discard(name)
                    self._lock.notify_all()

    # ---- the committer's side --------------------------------------------------------------------------------------

    def place(self, temporary: Path, target: Path) -> None:
        """Gives a written file its name, durably. No manifest names it yet: it belongs to no checkpoint.

        Raises:
            StorageError: a system call failed; the file is removed.
            CheckpointError: somebody else has put a checkpoint there meanwhile; it is left alone.
        """
        self._refuse_another_directory()
        there = _manifest.read_if_any(target.parent)
        if there is not None and target.name in _manifest.names(there.files):
            raise CheckpointError(
                f"'{target}' belongs to a checkpoint that was put there from elsewhere; it was not replaced: "
                "save this step again, or under another number"
            )
        _storage.crash_point("before-rename")
        try:
            _storage.rename_durably(temporary, target)
        except BaseException:
            self.take_back(target)
            raise
        _storage.crash_point("renamed")

    def publish(self, manifest: Manifest, directory: Path) -> None:
        """Makes the step a checkpoint; a crash between any two lines leaves the state named on the right.

            1. fsync the parent of the step directory      not a checkpoint: no manifest
            2. write the manifest aside, fsync             not a checkpoint
            3. rename to manifest.json                     a checkpoint, if the rename survives
            4. fsync the step directory                    a checkpoint
            5. `latest`: aside, fsync, rename, fsync       the newest checkpoint by name, too

        Raises:
            StorageError: a system call failed; what was committed before still stands, and the step too, if only 4 or 5 failed.
            InUseError, ClosedError: the directory is not ours any more.
        """
        self._refuse_another_directory()
        with self._still_ours():
            for file in manifest.files:  # whatever may have gone wrong between the ranks: no manifest names what is not there
                if (directory / file.name).stat().st_size != file.bytes:
                    raise CorruptError(
                        f"'{directory / file.name}' does not have the {file.bytes} bytes that its rank has written"
                    )
            _storage.sync_directory(self._directory)
            _storage.replace_durably(directory / _manifest.NAME, manifest.to_json(), "manifest")
            _storage.replace_durably(self._directory / LATEST, f"{directory.name}\n".encode(), "latest")

    def _refuse_another_directory(self) -> None:
        """Else a step would go to a directory that nobody has locked, beside the checkpoints so far.

        Raises:
            StorageError: the directory was renamed or removed since the Checkpointer was made.
        """
        if self._held.descriptor < 0 or self._held.is_at(self._directory):
            return
        now = self._held.now()
        became = "removed or replaced" if now == self._directory else f"renamed to '{now}'"
        raise StorageError(
            errno.ENOENT,
            f"the directory '{self._directory}' was {became} while its Checkpointer saves into it; give it its name back, or "
            "make another Checkpointer",
            str(self._directory),
        )

    def take_back(self, target: Path) -> None:
        """Removes a file that has its name but is not committed: a full disk must not get fuller with every try."""
        with contextlib.suppress(NotACheckpointError):
            if target.name in _manifest.names(_manifest.read(target.parent).files):
                return  # committed after all: only the last fsync has failed
        _storage.remove_quietly(target)

    def take_sequence(self) -> int:
        """The number of the next commit."""
        if self._next_sequence is None:
            self._next_sequence = max((manifest.sequence for _, manifest in self.look()[0]), default=0) + 1
        self._next_sequence += 1
        return self._next_sequence - 1

    def tidy(self, directory: Path, manifest: Manifest, before: Manifest | None) -> None:
        """Removes what is no longer wanted. The checkpoint is durable already: a failure here is only logged.

        Args:
            before: what the step was until now.
        """
        try:
            with self._still_ours():
                self._tidy(directory, manifest, before)
        except (CheckpointError, OSError) as error:
            logger.warning("tidying '%s' failed, the checkpoint is good: %s", self._directory, error)

    def sweep(self) -> None:
        """Gives the space of steps back that tidy() has taken away. A file system needs long for that: nobody is to wait."""
        while self._retired:
            self._sweep_one()

    def _sweep_one(self) -> None:
        path = self._retired.pop()
        try:
            with self._still_ours():
                _storage.remove_tree(path)
        except (CheckpointError, OSError) as error:  # the next tidy() tries again
            logger.warning("removing '%s' failed, the checkpoint is good: %s", path, error)

    def _tidy(self, directory: Path, manifest: Manifest, before: Manifest | None) -> None:
        self._remove_retired()
        if not self._shared:
            self._remove_unnamed(directory, manifest)
        elif before is not None:
            for name in _manifest.names(before.files) - _manifest.names(manifest.files):
                _storage.remove_file(directory / name)
        if self._keep is None:
            return
        largest = _manifest.bytes_of(manifest)
        for path, old in self.look()[0][self._keep :]:
            self._remove_step(path)
            largest = max(largest, _manifest.bytes_of(old))
        while self._retired and not _storage.has_room(self._directory, self._max_in_flight * largest):
            self._sweep_one()  # before the outcome: the next save of any rank needs the space

    def _remove_leftovers(self) -> None:
        """What a crash left behind."""
        try:
            self._remove_retired()
            for path in self._directory.iterdir():
                if _storage.name_behind(path.name) == LATEST:
                    _storage.remove_file(path)
            for path in self._step_directories():
                try:
                    self._remove_unnamed(path, _manifest.read(path))
                except NotACheckpointError as error:
                    if isinstance(error.__cause__, FileNotFoundError):  # a damaged manifest is evidence: leave it to a person
                        self._remove_step(path)
            while self._retired:
                _storage.remove_tree(self._retired.pop())
        except OSError as error:
            logger.warning("removing what a crash left in '%s' failed: %s", self._directory, error)

    def _remove_retired(self) -> None:
        """Steps whose removal failed half-way."""
        for path in self._directory.iterdir():
            if is_step_name(_storage.name_behind(path.name) or "") and path.is_dir():
                _storage.remove_tree(path)

    def _remove_unnamed(self, directory: Path, manifest: Manifest) -> None:
        """State files, finished or not, that neither the manifest names nor a save is writing."""
        found = list(directory.iterdir())  # first: whatever a save that begins now will write is not among them
        with self._lock:
            wanted = _manifest.names(manifest.files) | self._in_flight.get(directory.name, set())
        for path in found:
            owner = _written_for(path.name)
            if owner is not None and owner not in wanted:
                _storage.remove_file(path)

    def _remove_step(self, directory: Path) -> None:
        with self._taking_away(directory.name) as nobody_writes:
            if not nobody_writes:
                return
            retired = _storage.retire_directory(directory)
        self._retired.append(retired)
        _storage.sync_directory(self._directory)
        _storage.crash_point("removal-begun")


def _names_in(directory: Path) -> set[str]:
    """None if it is not there.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot read '{directory}': {error.strerror}", str(directory)) from error


def _names_in_use(directory: Path) -> set[str]:
    """Also of a file whose save ended without word from rank 0, which may publish it yet."""
    manifest = _manifest.read_if_any(directory)
    return _names_in(directory) | (set() if manifest is None else _manifest.names(manifest.files))


_FILE = re.compile(r"(state|replicated|rank-\d{5,})(-\d+)?\.pt")


def _free_name(stem: str, taken: set[str]) -> str:
    name, number = f"{stem}.pt", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.pt"
    return name


def _stem_of(name: str) -> str | None:
    match = _FILE.fullmatch(name)
    return None if match is None else match[1]


def _written_for(name: str) -> str | None:
    """The final name of a file of a step or of a temporary on its way to one; None for files that are not ours."""
    if _storage.is_temporary(name):
        return _storage.name_behind(name)
    return name if _FILE.fullmatch(name) else None
