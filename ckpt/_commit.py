"""Committing a step, and what happens to the steps that are no longer wanted.

Publishing (publish() below; a crash between any two lines leaves the state named on the right):

    1. rename state to its final name        not a checkpoint: no manifest
    2. fsync the step directory, and its parent
    3. write manifest aside, fsync           not a checkpoint
    4. rename to manifest.json               a checkpoint, if the rename survives
    5. fsync the step directory              a checkpoint
    6. `latest`: aside, fsync, rename, fsync the newest checkpoint by name, too
    7. remove the file that a saved-again step no longer names; retention: rename away, fsync, remove

Saving a step again writes a file of another name beside the old one, so that step 4 exchanges the two at once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

from ckpt import _manifest, _storage
from ckpt._manifest import FileEntry, Manifest
from ckpt.errors import NotACheckpointError, StorageError

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


class StepCommitter:
    """Publishes steps into one directory. begin() runs on the caller's thread, publish() on the committer's."""

    def __init__(self, directory: Path, keep: int | None) -> None:
        self._directory = directory
        self._keep = keep
        self._lock = threading.Lock()  # guards what follows
        self._in_flight: dict[str, set[str]] = {}  # step directory -> names of state files being written
        self._next_sequence: int | None = None
        self._cleaned = False

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

    def begin(self, name: str) -> Path:
        """Makes the step's directory and chooses a name for its state that no committed or pending one uses.

        Raises:
            StorageError: the directory cannot be made.
        """
        directory = self._directory / name
        if not self._cleaned:
            self._cleaned = True
            self._remove_leftovers()  # before a byte is written: a full disk may be full of them
        with self._lock:
            _storage.make_directory(directory, durable=False)  # no fsync on the training's time: publish() does it
            taken = set(self._in_flight.get(name, ()))
            with contextlib.suppress(NotACheckpointError):
                taken |= _manifest.names(_manifest.read(directory).files)
            number = 1
            while (file := _state_name(number)) in taken:
                number += 1
            self._in_flight.setdefault(name, set()).add(file)
        return directory / file

    def abandon(self, target: Path) -> None:
        """The save that begin() returned `target` for is over: published, failed, or never begun."""
        with self._lock:
            names = self._in_flight.get(target.parent.name, set())
            names.discard(target.name)
            if names:
                return
            self._in_flight.pop(target.parent.name, None)
            _storage.remove_if_empty(target.parent)  # it is when the first save to this step has failed

    # ---- the committer's side --------------------------------------------------------------------------------------

    def publish(self, step: int, temporary: Path, target: Path, job: Any) -> Path:
        """Makes the written file `temporary` the committed checkpoint of `step`; returns its directory. See the module.

        Raises:
            StorageError: a system call failed; what was committed before still stands.
        """
        directory = target.parent
        _storage.crash_point("before-rename")
        manifest = Manifest(step, self._take_sequence(), 1, (FileEntry(target.name, job.size, job.crc32),))
        try:
            _storage.rename_durably(temporary, target)  # 1, 2
            _storage.sync_directory(self._directory)
            _storage.crash_point("renamed")
            _storage.replace_durably(directory / _manifest.NAME, manifest.to_json(), "manifest")  # 3, 4, 5
        except BaseException:
            self._take_back(target)
            raise
        _storage.replace_durably(self._directory / LATEST, f"{directory.name}\n".encode(), "latest")  # 6
        self._tidy(directory, manifest)  # 7
        _storage.crash_point("tidied")
        return directory

    def _take_sequence(self) -> int:
        with self._lock:
            if self._next_sequence is None:
                self._next_sequence = max((manifest.sequence for _, manifest in self.look()[0]), default=0) + 1
            self._next_sequence += 1
            return self._next_sequence - 1

    def _tidy(self, directory: Path, manifest: Manifest) -> None:
        """Removes what is no longer wanted. The checkpoint is durable already: a failure here is only logged."""
        try:
            self._remove_retired()
            self._remove_unnamed(directory, manifest)
            if self._keep is not None:
                for path, _ in self.look()[0][self._keep :]:
                    self._remove_step(path)
        except (StorageError, OSError) as error:
            logger.warning("tidying '%s' failed, the checkpoint is good: %s", self._directory, error)

    def _take_back(self, target: Path) -> None:
        """A file that was renamed but not committed: a full disk must not get fuller with every try."""
        with contextlib.suppress(NotACheckpointError):
            if target.name in _manifest.names(_manifest.read(target.parent).files):
                return  # committed after all: only the last fsync has failed
        _storage.remove_quietly(target)

    def _remove_leftovers(self) -> None:
        """Once for each Checkpointer, before its first save: what a crash left behind."""
        try:
            self._remove_retired()
            for path in self._directory.iterdir():
                if _storage.is_temporary(path.name):
                    _storage.remove_file(path)
            for path in self._step_directories():
                try:
                    self._remove_unnamed(path, _manifest.read(path))
                except NotACheckpointError:
                    if not (path / _manifest.NAME).exists():  # a damaged manifest is evidence: leave it to a person
                        self._remove_step(path)
        except OSError as error:
            logger.warning("removing what a crash left in '%s' failed: %s", self._directory, error)

    def _remove_retired(self) -> None:
        """Steps whose removal failed half-way."""
        for path in self._directory.iterdir():
            if _storage.is_temporary(path.name) and path.is_dir():
                _storage.remove_tree(path)

    def _remove_unnamed(self, directory: Path, manifest: Manifest) -> None:
        """State files, finished or not, that neither the manifest names nor a save is writing."""
        with self._lock:
            wanted = _manifest.names(manifest.files) | self._in_flight.get(directory.name, set())
            for path in directory.iterdir():
                owner = _written_for(path.name)
                if owner is not None and owner not in wanted:
                    _storage.remove_file(path)

    def _remove_step(self, directory: Path) -> None:
        with self._lock:  # no save may begin in it meanwhile
            if directory.name in self._in_flight:
                return
            retired = _storage.retire_directory(directory)
        _storage.sync_directory(self._directory)
        _storage.crash_point("removal-begun")
        _storage.remove_tree(retired)


def _state_name(number: int) -> str:
    return "state.pt" if number == 1 else f"state-{number}.pt"


def _written_for(name: str) -> str | None:
    """The final name of a state file or of a temporary on its way to one; None for files that are not ours."""
    if _storage.is_temporary(name):
        return _storage.name_behind(name)
    is_state = name == "state.pt" or (name.startswith("state-") and name.endswith(".pt"))
    return name if is_state else None
