"""Removes what is no longer wanted: steps beyond those to be kept, files that saves have replaced, and what a crash left."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory import sharded_files, unpublished
from ckpt.directory.going_back import GoingBack
from ckpt.directory.holds import held_at
from ckpt.directory.in_flight import FilesInFlight
from ckpt.directory.keeping import Keeping
from ckpt.directory.listing import LATEST, find_steps
from ckpt.directory.manifest import Manifest
from ckpt.directory.receipts import names_of_receipts
from ckpt.directory.root import missing_files, temporaries_in
from ckpt.directory.step_names import is_step_name, names_in, written_for
from ckpt.errors import CheckpointError, NotACheckpointError
from ckpt.metrics.events import Note, ignore
from ckpt.storage import durable, free_space, temporary_names

logger = logging.getLogger("ckpt")


class Retention:
    """Of one process. Who calls it sees to it that the directory is ours, and that one thread does so at a time.

    Args:
        keeping: which committed steps stay.
        shared: ranks of one job write here together, and we do not know what the others are writing just now.
        max_in_flight: how many steps may be on their way at once.
        note_lost: called for each step directory that holds files, but has lost its manifest.
        warn_once: logs a warning, given a key, a text and what goes into that, unless it has logged one of this key.
        note: gets the events of what is removed.

    Attributes:
        back: what stays because a job has gone back to it.
    """

    def __init__(
        self,
        directory: Path,
        in_flight: FilesInFlight,
        keeping: Keeping,
        shared: bool,
        max_in_flight: int,
        note_lost: Callable[[Path], None],
        warn_once: Callable[..., None],
        note: Note = ignore,
    ) -> None:
        self._note = note
        self._directory = directory
        self._in_flight = in_flight
        self._keeping = keeping
        self.back = GoingBack(directory)
        self._shared = shared
        self._max_in_flight = max_in_flight
        self._note_lost = note_lost
        self._warn_once = warn_once
        self._replaced: dict[str, set[str]] = {}  # step directory -> names of files that its manifest named before
        self.retired: list[Path] = []  # no steps any more, but still there
        self._unsynced = False  # their old names may come back after a crash
        self.damaged: set[int] = set()  # sequences of those that a restore has found not to be what was saved

    def note_replaced(self, directory: Path, files: Iterable[str]) -> None:
        """What the manifest of a step names until now."""
        self._replaced.setdefault(directory.name, set()).update(files)

    def tidy(self, directory: Path, manifest: Manifest, before: Manifest | None) -> None:
        """Behind the publication of a step. What it retires, its owner is to remove.

        Args:
            before: what the step was until now.
        """
        self._remove_retired()
        if not self._shared:
            self._remove_temporaries(directory)
        # Also what a save has replaced that failed behind that.
        replaced = self._replaced.pop(directory.name, set()) | (set() if before is None else sharded_files.names_of(before))
        for name in replaced - sharded_files.names_of(manifest) - {*manifest.others}:
            durable.remove_file(directory / name)
        if self._keeping.newest is None:
            return
        largest = manifests.bytes_of(manifest)
        beyond = self._beyond()
        held = held_at(self._directory, [old for _, old in beyond]) | self.back.sequences() if beyond else set()
        for path, old in [each for each in beyond if each[1].sequence not in held]:
            with self.going_on(path):
                if old.others and not path.is_symlink():
                    self._withdraw(path, old)
                else:
                    self._remove_step(path)
                self._note("delete", step=old.step, sequence=old.sequence, bytes=manifests.bytes_of(old))
            largest = max(largest, manifests.bytes_of(old))
        while self.retired and not free_space.has_room(self._directory, self._max_in_flight * largest):
            self.sweep_one()  # before the outcome: the next save of any rank needs the space

    def _beyond(self) -> list[tuple[Path, Manifest]]:
        """What no rule keeps."""
        found = find_steps(self._directory).checkpoints
        paths = {manifest.sequence: path for path, manifest in found}

        def is_whole(each: Manifest) -> bool:
            return each.sequence not in self.damaged and _is_whole(paths[each.sequence], each)

        reasons = self._keeping.reasons([manifest for _, manifest in found], is_whole, self.damaged)
        return [each for each, reason in zip(found, reasons, strict=True) if not reason]

    def sweep_one(self, meanwhile: contextlib.AbstractContextManager[None] | None = None) -> None:
        """Gives the space of one retired step back, once its name is gone for good: half a step must not come back under it.

        Args:
            meanwhile: held while that is done.
        """
        path = self.retired.pop()
        with self.going_on(path), meanwhile or contextlib.nullcontext():
            if self._unsynced:
                durable.sync_directory(self._directory)
                self._unsynced = False
            durable.remove_tree(path)

    @contextlib.contextmanager
    def going_on(self, path: Path) -> Iterator[None]:
        """What cannot be removed must not keep the rest from it. It is tried again at each save, and said once."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            self._warn_once(f"removing {path}", "removing '%s' failed, the checkpoint is good: %s", path, error)

    def remove_leftovers(self) -> None:
        """What a crash left behind."""
        try:
            self._remove_retired()
            for path, behind in temporaries_in(self._directory):
                if behind == LATEST:
                    with self.going_on(path):
                        durable.remove_file(path)
            for path in self._step_directories():
                with self.going_on(path):
                    self._clean(path)
            while self.retired:
                self.sweep_one()
        except (CheckpointError, OSError) as error:
            logger.warning("removing what a crash left in '%s' failed: %s", self._directory, error)

    def _clean(self, path: Path) -> None:
        """A step directory. What is behind a link is left alone: others may be writing there."""
        try:
            manifest = manifests.read(path)
        except NotACheckpointError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # a damaged manifest is evidence: leave it to a person
                self._remove_if_leftover(path)
            return
        if not path.is_symlink():
            self._remove_unnamed(path, manifest)

    def _step_directories(self) -> list[Path]:
        return [path for path in self._directory.iterdir() if is_step_name(path.name) and path.is_dir()]

    def _remove_retired(self) -> None:
        """Steps whose removal failed half-way."""
        for path, behind in temporaries_in(self._directory):
            if is_step_name(behind) and (path.is_dir() or path.is_symlink()):
                self._unsynced = True  # who has renamed it may have been killed behind that
                self.retired.append(path)
                self.sweep_one()

    def _remove_if_leftover(self, path: Path) -> None:
        if unpublished.is_leftover(names_in(path)):
            if not path.is_symlink():
                self._remove_step(path)
        elif unpublished.is_lost(path):
            self._note_lost(path)

    def _remove_unnamed(self, directory: Path, manifest: Manifest) -> None:
        sharded_files.mend(directory, manifest)
        for path in unnamed_in(directory, manifest):
            durable.remove_file(path)

    def _remove_temporaries(self, directory: Path) -> None:
        """Of saves that are over."""
        found = temporaries_in(directory)  # first: whatever a save that begins now will write is not among them
        wanted = self._in_flight.files_of(directory.name)
        for path, behind in found:
            if behind not in wanted:
                durable.remove_file(path)

    def _withdraw(self, directory: Path, manifest: Manifest) -> None:
        """Takes a step away that has files of others in its directory: those stay."""
        with self._in_flight.taking_away(directory.name) as nobody_writes:
            if not nobody_writes:
                return
            durable.remove_file(directory / manifests.NAME)
            durable.sync_directory(directory)
            for name in sharded_files.names_of(manifest):
                durable.remove_file(directory / name)

    def _remove_step(self, directory: Path) -> None:
        with self._in_flight.taking_away(directory.name) as nobody_writes:
            if not nobody_writes:
                return
            if directory.is_symlink():
                text = "'%s' is a link and no longer wanted: it is removed, and '%s', where it leads, is left alone"
                self._warn_once(f"link {directory}", text, directory, os.path.realpath(directory))
            retired = durable.retire_directory(directory)
        self.retired.append(retired)
        self._unsynced = True
        durable.crash_point("removal-begun")


def _is_whole(path: Path, manifest: Manifest) -> bool:
    """As far as names and sizes tell. One that cannot be looked at is not: it must stand in for no other."""
    try:
        return not missing_files(path, manifest)
    except (CheckpointError, OSError):
        return False


def unnamed_in(directory: Path, manifest: Manifest) -> list[Path]:
    """What a crash left beside a checkpoint, finished or not: that of a save that replaced it, or was to.

    Raises:
        OSError: the directory cannot be read.
    """
    wanted = sharded_files.names_of(manifest) | {*manifest.others, manifests.NAME}
    wanted |= names_of_receipts(directory, manifest)
    found = [(path, written_for(path.name)) for path in directory.iterdir()]
    return [
        path for path, owner in found if owner is not None and (owner not in wanted or temporary_names.is_temporary(path.name))
    ]
