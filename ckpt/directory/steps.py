"""A directory of checkpoints: its names, what is in it, and what happens to steps that are no longer wanted.

    .lock                     held by the one job that writes here
    latest                    the name of the newest committed step directory; written last
    step-000000000042/
        manifest.json         the commit record; without one the directory is no checkpoint, see unpublished.py
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
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory import step_names, unpublished
from ckpt.directory.listing import LATEST, Found, look
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.directory.step_names import free_name, is_step_name, names_in, names_in_manifest, written_for
from ckpt.errors import CheckpointError, ClosedError, CorruptError, InUseError, NotACheckpointError, StorageError
from ckpt.storage import durable, free_space, temporary_names
from ckpt.storage.directory_lock import DirectoryLock

logger = logging.getLogger("ckpt")


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
        self._held = durable.Directory(directory)
        self._file_lock = DirectoryLock(directory, self.give_way)
        self._changing = threading.RLock()  # held while something is published or removed; a finalizer may take it
        self._released = False  # guarded by _changing
        # Guards what follows. The caller's thread waits for it: the committer's does not hold it while the file system works.
        self._lock = threading.Condition()
        self._in_flight: dict[str, set[str]] = {}  # step directory -> names of files being written
        self._removing: set[str] = set()  # step directories that are just being taken away
        self._others: set[str] = set()  # step directories that held finished files when a save to them began
        self._taken_over = False  # another Checkpointer of this process writes here now
        self._limits: tuple[int, int] | None = None  # what direct I/O demands here, once a file has been written
        self._begun_again = ""  # the step that was begun last, if it may be there already
        self._highest: str | None = None  # no step above has been begun, or lay here when the first one was
        self._warned: set[str] = set()
        self.token = ""  # of rank 0, once the directory is claimed: names what all ranks write together
        # Of the committer's thread, once there is a save:
        self._next_sequence: int | None = None
        self._replaced: dict[str, set[str]] = {}  # step directory -> names of files that its manifest named before
        self._placed: set[Path] = set()  # files that place() has given their names; the names of others are not ours to remove
        self._retired: list[Path] = []  # no steps any more, but still there

    # ---- looking ---------------------------------------------------------------------------------------------------

    def look(self) -> Found:
        """See listing.py."""
        return look(self._directory)

    def lost(self, found: Found) -> str:
        """What to say if there are no checkpoints, but files of some; empty if there are none. Logs each such directory."""
        lost = [path for path in found.bare if unpublished.is_lost(path)]
        for path in lost:
            self._note_lost(path)
        if not found.checkpoints and not found.damaged and not lost and os.path.lexists(self._directory / LATEST):
            text = "'%s' says that there were checkpoints, but there is none: they have been removed"
            self.warn_once(LATEST, text, self._directory / LATEST)
        return unpublished.describe(self._directory, lost) if lost else ""

    def _note_lost(self, path: Path) -> None:
        text = (
            "'%s' holds files, but no manifest.json: it is passed over, and left alone. Its manifest is lost, or has "
            "not arrived yet"
        )
        self.warn_once(path.name, text, path)

    def warn_once(self, key: str, text: str, *details: object) -> None:
        """To be called by one thread at a time, as all that looks or claims is."""
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(text, *details)

    def expect_no_other(self, timeout_s: float) -> None:
        """Takes nothing. Waits for what another Checkpointer of this process has in flight.

        Raises:
            InUseError: another job is writing to the directory.
        """
        self._file_lock.expect_free(timeout_s)

    def _step_directories(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        return [path for path in self._directory.iterdir() if is_step_name(path.name) and path.is_dir()]

    # ---- the caller's side -----------------------------------------------------------------------------------------

    def claim(self, timeout_s: float) -> None:
        """Once, before the first save of the job: makes the directory ours, and removes what a crash left.

        Args:
            timeout_s: how long to wait for what another Checkpointer of this process has in flight.

        Raises:
            InUseError: another job is writing to it.
            StorageError: the lock cannot be made.
        """
        self._file_lock.acquire(timeout_s)
        self._remove_leftovers()  # before a byte is written: a full disk may be full of them

    def release(self) -> None:
        """From now on nothing is published or removed: the directory may belong to another job."""
        with self._changing:
            self._released = True
            self._file_lock.release()
            self._held.close()

    def give_way(self, timeout_s: float, for_good: bool) -> bool:
        """To another Checkpointer of this process, when nothing is in flight here. False: it did not come to that in time.

        An error can leave a Checkpointer behind that nobody can reach any more, and that a traceback keeps alive.

        Args:
            for_good: the other takes the directory over, and this one can save no more. Else it only waits.
        """
        end = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if not self._lock.wait_for(self._is_idle, max(0.0, end - time.monotonic())):
                    return False
            if not for_good:
                return True
            if not self._changing.acquire(timeout=max(0.0, end - time.monotonic())):
                return False
            try:
                with self._lock:
                    self._taken_over = self._is_idle()
                if self._taken_over:
                    self.release()
                    return True
            finally:
                self._changing.release()

    def _is_idle(self) -> bool:
        return not self._in_flight and not self._retired

    def _refusal(self) -> InUseError:
        return InUseError(
            f"another Checkpointer of this process has taken '{self._directory}' over, while this one had nothing in flight: "
            "save with that one, or make a new one"
        )

    @contextlib.contextmanager
    def _still_ours(self) -> Iterator[None]:
        with self._changing:
            if self._taken_over:
                raise self._refusal()
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
            InUseError: another Checkpointer of this process writes here now.
        """
        directory = self._directory / name
        with self._lock:
            self._lock.wait_for(lambda: name not in self._removing)
            if self._taken_over:
                raise self._refusal()
            taken = set(self._in_flight.get(name, ()))
            new = self._is_new(name)
            self._begun_again = "" if new else name
            if not new:
                names = names_in(directory)
                taken |= names | names_in_manifest(directory)
                if unpublished.may_hold_others(names):
                    self._others.add(name)
            files = [free_name(stem, taken) for stem in stems]
            self._in_flight.setdefault(name, set()).update(files)
            return [directory / file for file in files], self._limits

    def _is_new(self, name: str) -> bool:
        if self._highest is None:
            self._highest = max(filter(is_step_name, names_in(self._directory)), default="")
        new = name > self._highest
        self._highest = max(name, self._highest)
        return new

    def replaced_by(self, target: Path, stem: str) -> Path | None:
        """The file of the committed step that `target`, from begin(), will take the place of."""
        if target.parent.name != self._begun_again:
            return None
        manifest = manifests.read_if_any(target.parent)
        names = () if manifest is None else sorted(manifests.names(manifest.files))
        return next((target.parent / name for name in names if step_names.stem_of(name) == stem), None)

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
            self._placed.difference_update(targets)
            if not names:
                self._in_flight.pop(directory.name, None)
                self._others.discard(directory.name)
                self._lock.notify_all()
        if failed and self._shared:
            self._unmark(directory)  # the last rank to take its files back finds none
        if failed and not self._shared:
            with self._taking_away(directory.name) as nobody_writes:
                if nobody_writes:
                    self._unmark(directory)
                    durable.remove_if_empty(directory)  # it is when the first save to this step has failed

    def _unmark(self, directory: Path) -> None:
        """As long as files of the save that failed are there, their mark stays."""
        with contextlib.suppress(OSError):
            names = names_in(directory)
            if manifests.NAME in names or not unpublished.finished(names):
                durable.remove_quietly(unpublished.mark_of(directory, self.token))

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
        there = manifests.read_if_any(target.parent)
        if os.path.lexists(target) or (there is not None and target.name in manifests.names(there.files)):
            raise CheckpointError(
                f"'{target}' was put there from elsewhere; it was not replaced: save this step again, or under another number"
            )
        if there is None and target.parent.name not in self._others:
            durable.make_empty_file(unpublished.mark_of(target.parent, self.token))
        self._placed.add(target)
        durable.crash_point("before-rename")
        try:
            durable.rename_durably(temporary, target)
        except BaseException:
            self.take_back(target)
            raise
        durable.crash_point("renamed")

    def publish(self, manifest: Manifest, directory: Path) -> None:
        """Makes the step a checkpoint; a crash between any two lines leaves the state named on the right.

            1. fsync the parent of the step directory      not a checkpoint: no manifest
            2. write the manifest aside, fsync             not a checkpoint; the mark is this file
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
            durable.sync_directory(self._directory)
            if (before := manifests.read_if_any(directory)) is not None:
                self._replaced.setdefault(directory.name, set()).update(manifests.names(before.files))
            with unpublished.aside(directory, self.token) as aside:
                durable.replace_durably(directory / manifests.NAME, manifest.to_json(), "manifest", aside)
            durable.replace_durably(self._directory / LATEST, f"{directory.name}\n".encode(), "latest")

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
        if target not in self._placed:
            return
        with contextlib.suppress(NotACheckpointError):
            if target.name in manifests.names(manifests.read(target.parent).files):
                return  # committed after all: only the last fsync has failed
        durable.remove_quietly(target)

    def others_in(self, directory: Path, files: Sequence[FileEntry], before: Manifest | None) -> tuple[str, ...]:
        """Names for Manifest.others: what lies in the step's directory and is not ours.

        Args:
            files: that are going to be published there.
            before: what the step was until now.
        """
        if before is not None:
            return before.others
        with self._lock:
            if directory.name not in self._others:
                return ()
            ours = manifests.names(files) | self._in_flight.get(directory.name, set()) | {manifests.NAME}
        return tuple(sorted(unpublished.finished(names_in(directory)) - ours))

    def take_sequence(self) -> int:
        """The number of the next commit."""
        if self._next_sequence is None:
            self._next_sequence = max((manifest.sequence for _, manifest in self.look().checkpoints), default=0) + 1
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
        with self._lock:
            self._lock.notify_all()

    def _sweep_one(self) -> None:
        path = self._retired.pop()
        try:
            with self._still_ours():
                durable.remove_tree(path)
        except (CheckpointError, OSError) as error:  # the next tidy() tries again
            logger.warning("removing '%s' failed, the checkpoint is good: %s", path, error)

    def _tidy(self, directory: Path, manifest: Manifest, before: Manifest | None) -> None:
        self._remove_retired()
        if not self._shared:
            self._remove_temporaries(directory)
        # Also what a save has replaced that failed behind that.
        replaced = self._replaced.pop(directory.name, set()) | (set() if before is None else manifests.names(before.files))
        for name in replaced - manifests.names(manifest.files) - {*manifest.others}:
            durable.remove_file(directory / name)
        if self._keep is None:
            return
        largest = manifests.bytes_of(manifest)
        for path, old in self.look().checkpoints[self._keep :]:
            if old.others:
                self._withdraw(path, old)
            else:
                self._remove_step(path)
            largest = max(largest, manifests.bytes_of(old))
        while self._retired and not free_space.has_room(self._directory, self._max_in_flight * largest):
            self._sweep_one()  # before the outcome: the next save of any rank needs the space

    def _remove_leftovers(self) -> None:
        """What a crash left behind."""
        try:
            self._remove_retired()
            for path in self._directory.iterdir():
                if temporary_names.name_behind(path.name) == LATEST:
                    durable.remove_file(path)
            for path in self._step_directories():
                try:
                    self._remove_unnamed(path, manifests.read(path))
                except NotACheckpointError as error:
                    if isinstance(error.__cause__, FileNotFoundError):  # a damaged manifest is evidence: leave it to a person
                        self._remove_if_leftover(path)
            while self._retired:
                durable.remove_tree(self._retired.pop())
        except OSError as error:
            logger.warning("removing what a crash left in '%s' failed: %s", self._directory, error)

    def _remove_retired(self) -> None:
        """Steps whose removal failed half-way."""
        for path in self._directory.iterdir():
            if is_step_name(temporary_names.name_behind(path.name) or "") and path.is_dir():
                durable.remove_tree(path)

    def _remove_if_leftover(self, path: Path) -> None:
        if unpublished.is_leftover(names_in(path)):
            self._remove_step(path)
        elif unpublished.is_lost(path):
            self._note_lost(path)

    def _remove_unnamed(self, directory: Path, manifest: Manifest) -> None:
        """What a crash left beside a checkpoint, finished or not: that of a save that replaced it, or was to."""
        wanted = manifests.names(manifest.files) | {*manifest.others, manifests.NAME}
        for path in directory.iterdir():
            owner = written_for(path.name)
            if owner is not None and (owner not in wanted or temporary_names.is_temporary(path.name)):
                durable.remove_file(path)

    def _remove_temporaries(self, directory: Path) -> None:
        """Of saves that are over."""
        found = list(directory.iterdir())  # first: whatever a save that begins now will write is not among them
        with self._lock:
            wanted = self._in_flight.get(directory.name, set())
        for path in found:
            if temporary_names.name_behind(path.name) not in {None, *wanted}:
                durable.remove_file(path)

    def _withdraw(self, directory: Path, manifest: Manifest) -> None:
        """Takes a step away that has files of others in its directory: those stay."""
        with self._taking_away(directory.name) as nobody_writes:
            if not nobody_writes:
                return
            durable.remove_file(directory / manifests.NAME)
            durable.sync_directory(directory)
            for file in manifest.files:
                durable.remove_file(directory / file.name)

    def _remove_step(self, directory: Path) -> None:
        with self._taking_away(directory.name) as nobody_writes:
            if not nobody_writes:
                return
            retired = durable.retire_directory(directory)
        self._retired.append(retired)
        durable.sync_directory(self._directory)
        durable.crash_point("removal-begun")
