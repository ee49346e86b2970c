"""A directory of checkpoints: its names, what is in it, and how steps come into it. How they leave it: see retention.py.

    .lock                     held by the one job that writes here
    latest                    the name of the newest committed step directory; written last
    events.jsonl              what has happened here, for people: see ckpt/metrics/events.py
    step-000000000042/
        manifest.json         the commit record; without one the directory is no checkpoint, see unpublished.py
        state.pt              what a job of one process gave; or, of several:
        rank-00000.pt  ...    what each rank gave for itself
        replicated.pt         what was the same on all ranks
        .metadata ...         and other files of a sharded state, see sharded_files.py

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory import publish_lock, sharded_files, step_names, unpublished
from ckpt.directory.in_flight import FilesInFlight
from ckpt.directory.keeping import Keeping
from ckpt.directory.listing import LATEST, Found, find_steps, newest_after
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.directory.publishing import publish
from ckpt.directory.retention import Retention
from ckpt.directory.root import Root
from ckpt.directory.step_names import free_name, is_step_name, names_in, names_in_manifest, numbered_name, step_name
from ckpt.errors import CheckpointError, ClosedError, InUseError, NotACheckpointError, StorageError
from ckpt.metrics.events import Note, ignore
from ckpt.storage import durable

logger = logging.getLogger("ckpt")


class StepDirectories:
    """What one process does in the directory. begin() runs on the caller's thread, publish() and tidy() on the finisher's.

    Args:
        keeping: which committed steps stay.
        shared: ranks of one job write here together. Rank 0 alone publishes and removes; it cannot know what the others are
            writing just now, so it removes less.
        max_in_flight: how many steps may be on their way at once.
        note: gets events: what is removed, and what is said once.

    Attributes:
        back: what this job has gone back to, which stays.
    """

    def __init__(self, directory: Path, keeping: Keeping, shared: bool, max_in_flight: int, note: Note = ignore) -> None:
        self.path = self._directory = directory
        self.note = note
        self._shared = shared
        self._root = Root(directory, give_way=self.give_way)
        if directory.is_dir():
            self._root.make(synced=True)
        self._changing = threading.RLock()  # held while something is published or removed; a finalizer may take it
        self._released = False  # guarded by _changing
        # Guards what follows. The caller's thread waits for it: the finisher's does not hold it while the file system works.
        self._in_flight = FilesInFlight()
        self._lock = self._in_flight.changed
        self._others: set[str] = set()  # step directories that held finished files when a save to them began
        self._is_claiming = False
        self._taken_over = False  # another Checkpointer of this process writes here now
        self._limits: tuple[int, int] | None = None  # what direct I/O demands here, once a file has been written
        self._begun_again = ""  # the step that was begun last, if it may be there already
        self._highest: str | None = None  # no step above has been begun, or lay here when the first one was
        self._warned: set[str] = set()
        self._seen = -1  # the highest sequence number that a restore has come across
        self.token = ""  # of rank 0, once the directory is claimed: names what all ranks write together
        # Files that give_final_name() has named: names of others are not ours to remove. Of the finisher's thread.
        self._placed: set[Path] = set()
        says = self._note_lost, self.warn_once, note
        self._retention = Retention(directory, self._in_flight, keeping, shared, max_in_flight, *says)
        self.damaged = self._retention.damaged  # for who finds some
        self.back = self._retention.back

    # ---- looking ---------------------------------------------------------------------------------------------------

    def committed(self) -> Found:
        """See listing.py."""
        return find_steps(self._directory)

    def look_for_restore(self) -> Found:
        """The same, for who wants to know what there is before it saves."""
        found = self.committed()
        self.note_seen(max((manifest.sequence for _, manifest in found.checkpoints), default=-1))
        return found

    def note_seen(self, sequence: int) -> None:
        """A restore has come across commits up to this number, here or on their way here."""
        self._seen = max(self._seen, sequence)

    def highest(self) -> tuple[str, int]:
        """The name of the highest step, and the number of the last commit that are here; "" and 0 if there is none."""
        sequences = (manifest.sequence for _, manifest in self.committed().checkpoints)
        return max(filter(is_step_name, names_in(self._directory)), default=""), max(sequences, default=0)

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
        """Unless something was said under this key."""
        with self._lock:
            if key in self._warned:
                return
            self._warned.add(key)
        logger.warning(text, *details)
        self.note("warning", message=text % details)

    def expect_no_other(self, timeout_s: float) -> None:
        """Takes nothing. Waits for what another Checkpointer of this process has in flight.

        Raises:
            InUseError: another job is writing to the directory.
        """
        self._root.lock.expect_free(timeout_s)

    # ---- the caller's side -----------------------------------------------------------------------------------------

    def claim(self, step: int, timeout_s: float) -> None:
        """Once, before the first save of the job: makes the directory ours, and removes what a crash left.

        The directory itself is made now: who only restores may have mistyped its name.

        Args:
            step: to be saved first.
            timeout_s: how long to wait for what another Checkpointer of this process has in flight.

        Raises:
            CheckpointError: the step is not above the newest checkpoint, and nobody has looked at that.
            InUseError: another job is writing to it.
            StorageError: the directory or the lock cannot be made.
        """
        with self._claiming():
            self._refuse_to_begin_again(step)  # before anything is taken from another Checkpointer of this process
            self._root.make(synced=True)
            self._root.claim(timeout_s)
            try:
                self._refuse_to_begin_again(step)  # which may have had saves in flight
                self._clean()
                if publish_lock.is_home(self._directory):
                    self._root.reserve_numbers(self.highest()[1])
                self.back.begin()
            except BaseException:
                self._root.lock.release()
                raise

    def _clean(self) -> None:
        """Before a byte is written: a full disk may be full of what a crash has left."""
        try:
            with self._publishing():
                self._retention.remove_leftovers()
        except InUseError as error:
            logger.warning("what a crash has left in '%s' is not removed now: %s", self._directory, error)

    def _refuse_to_begin_again(self, step: int) -> None:
        """A job that forgets to resume would begin at its first step, and retention would remove what was saved before."""
        newest = newest_after(self._directory, self._seen)
        if newest is not None and step <= newest.step:
            raise self._unseen(step, f"'{self._directory}' holds checkpoints", f"step {newest.step}")

    def refuse_unseen(self, step: int, highest: str, sequence: int) -> None:
        """The same, of what lies on nodes.

        Args:
            highest: the name of the highest step there.
            sequence: of the last commit there.

        Raises:
            CheckpointError: nobody has looked at that.
        """
        if sequence > self._seen and step_name(step) <= highest:
            raise self._unseen(step, "disks of nodes hold checkpoints", highest)

    def _unseen(self, step: int, what: str, newest: str) -> CheckpointError:
        return CheckpointError(
            f"step {step} was not saved: {what} that this job has not looked at, the newest of {newest}, and saving lower "
            "steps beside them would replace or remove them. Call restore(), or resume() of a callback, before the first save; "
            "or save into another directory; or move the old ones away"
        )

    @contextlib.contextmanager
    def _claiming(self) -> Iterator[None]:
        """Meanwhile this one gives way to nobody, who would save into what is removed here."""
        with self._lock:
            self._is_claiming = True
        try:
            yield
        finally:
            with self._lock:
                self._is_claiming = False
                self._lock.notify_all()

    def release(self) -> None:
        """From now on nothing is published or removed: the directory may belong to another job."""
        with self._changing:
            self._released = True
            self.back.release()
            self._root.release()

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
        return not (self._is_claiming or self._in_flight or self._retention.retired)

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
            self._root.lock.assert_held()
            with self._publishing():
                yield

    @contextlib.contextmanager
    def _publishing(self) -> Iterator[None]:
        """Meanwhile no drain commits or removes here."""
        if not publish_lock.is_home(self._directory):
            yield
            return
        durable.make_directory(self._directory / publish_lock.FOLDER, durable=True)
        with publish_lock.publishing(self._directory, "Checkpointer"):
            yield

    def begin(self, name: str, stems: Sequence[str], number: int | None = None) -> tuple[list[Path], tuple[int, int] | None]:
        """Chooses names for the files of a step that no committed or pending one uses.

        The step's directory is made with its files, if it is not there. For a step above all others nothing is looked up. The
        directory of all steps is there on rank 0, and looked for on the others.

        Args:
            stems: of the names: "state", "replicated", "rank-00003".
            number: that the names are to have, see numbered_name(); None: the first that is free.

        Returns:
            The files, and what direct I/O demands of them, for FileInFlight; None as long as that is not known.

        Raises:
            StorageError: a directory cannot be made, or not be read.
            InUseError: another Checkpointer of this process writes here now.
        """
        directory = self._directory / name
        self._root.make(synced=True)
        with self._lock:
            self._in_flight.wait_until_it_stays(name)
            if self._taken_over:
                raise self._refusal()
            taken = self._in_flight.files_of(name)
            new = self._is_new(name)
            self._begun_again = "" if new else name
            if not new:
                names = names_in(directory)
                taken |= names | names_in_manifest(directory)
                if unpublished.may_hold_others(names):
                    self._others.add(name)
            files = [free_name(stem, taken) if number is None else numbered_name(stem, number) for stem in stems]
            self._in_flight.add(name, files)
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

    def forget_save(self, directory: Path, targets: Sequence[Path], *, failed: bool = False) -> None:
        """The save that begin() returned `targets` for is over: published, failed on the way, or never begun."""
        with contextlib.ExitStack() as cleaning:
            with self._lock:
                self._placed.difference_update(targets)
                self._placed.difference_update(map(sharded_files.checksums_path, targets))
                last = self._in_flight.discard(directory.name, (target.name for target in targets))
                if last:
                    self._others.discard(directory.name)
                if last and failed and not self._shared:  # under the same lock: nothing may begin in between
                    cleaning.enter_context(self._in_flight.taking_away(directory.name))
            if failed and self._shared:
                self._unmark(directory)  # the last rank to take its files back finds none
            elif last and failed:
                self._unmark(directory)
                durable.remove_if_empty(directory)  # it is when the first save to this step has failed

    def _unmark(self, directory: Path) -> None:
        """As long as files of the save that failed are there, their mark stays."""
        with contextlib.suppress(OSError):
            names = names_in(directory)
            if manifests.NAME in names or not unpublished.finished(names):
                durable.remove_quietly(unpublished.mark_of(directory, self.token))

    # ---- the finisher's side --------------------------------------------------------------------------------------

    def give_final_name(self, temporary: Path, target: Path, beside: Mapping[Path, bytes] | None = None) -> None:
        """Gives a written file its name. No manifest names it yet: it belongs to no checkpoint.

        Where ranks write together it is durable then; else once publish() has made it so, with all else that a manifest needs.

        Args:
            beside: small files that belong to it, and what is to be in them.

        Raises:
            StorageError: a system call failed; the file is removed.
            CheckpointError: somebody else has put a checkpoint there meanwhile; it is left alone.
        """
        there = self._refuse_to_replace(target)
        if there is None and target.parent.name not in self._others:
            durable.make_empty_file(unpublished.mark_of(target.parent, self.token))
        self._placed.add(target)
        durable.crash_point("before-rename")
        try:
            for path, content in (beside or {}).items():
                self._placed.add(path)
                durable.write_small_file(path, content)
            (durable.rename_durably if self._shared else durable.give_name)(temporary, target)
        except BaseException:
            for path in (target, *(beside or {})):
                self.remove_unpublished(path)
            raise
        durable.crash_point("renamed")

    def write_unpublished(self, target: Path, content: bytes, crash_name: str) -> None:
        """A small file of a step that rank 0 writes before its manifest, durably.

        Raises:
            StorageError, CheckpointError: as of give_final_name().
        """
        self._refuse_to_replace(target)
        self._placed.add(target)
        durable.replace_durably(target, content, crash_name)

    def _refuse_to_replace(self, target: Path) -> Manifest | None:
        """Returns the manifest of the step, if it has one."""
        self._refuse_another_directory()
        there = manifests.read_if_any(target.parent)
        if os.path.lexists(target) or (there is not None and target.name in manifests.names(there.files)):
            raise CheckpointError(
                f"'{target}' was put there from elsewhere; it was not replaced: save this step again, or under another number"
            )
        return there

    def publish(self, manifest: Manifest, directory: Path, local: Callable[[FileEntry], bool] = lambda _: True) -> None:
        """Makes the step a checkpoint: see publishing.py.

        Args:
            local: whether a file of the manifest is to be here; others lie on other nodes.

        Raises:
            StorageError: a system call failed; what was committed before still stands, and the step may, too.
            InUseError, ClosedError: the directory is not ours any more.
            CorruptError: see publishing.py.
        """
        self._refuse_another_directory()
        details = self._root, directory, manifest, self.token, self._retention.note_replaced
        with self._still_ours():
            publish(*details, local=local, unsynced=not self._shared)

    def _refuse_another_directory(self) -> None:
        """Else a step would go to a directory that nobody has locked, beside the checkpoints so far.

        Raises:
            StorageError: the directory was renamed or removed since the Checkpointer was made.
        """
        if not self._root.is_elsewhere():
            return
        now = self._root.now()
        became = "removed or replaced" if now == self._directory else f"renamed to '{now}'"
        raise StorageError(
            errno.ENOENT,
            f"the directory '{self._directory}' was {became} while its Checkpointer saves into it; give it its name back, or "
            "make another Checkpointer",
            str(self._directory),
        )

    def remove_unpublished(self, target: Path) -> None:
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
            ours = manifests.names(files) | self._in_flight.files_of(directory.name) | {manifests.NAME}
        return tuple(sorted(unpublished.finished(names_in(directory)) - ours))

    def take_sequence(self) -> int:
        """The number of the next commit."""
        return self._root.take_sequence(lambda: self.committed().checkpoints)

    def reserve_numbers(self, above: int) -> int:
        """See Root. Of a directory that was claimed."""
        return self._root.reserve_numbers(above)

    def reserve_above_seen(self) -> int:
        """Above all that is here, and that a restore has come across."""
        return self.reserve_numbers(max(self.highest()[1], self._seen))

    def tidy(self, directory: Path, manifest: Manifest, before: Manifest | None) -> None:
        """Removes what is no longer wanted. The checkpoint is durable already: a failure here is only logged.

        Args:
            before: what the step was until now.
        """
        try:
            with self._still_ours():
                sharded_files.mend(directory, manifest)
                self._retention.tidy(directory, manifest, before)
        except (CheckpointError, OSError) as error:
            logger.warning("tidying '%s' failed, the checkpoint is good: %s", self._directory, error)

    def sweep(self) -> None:
        """Gives the space of steps back that tidy() has taken away. A file system needs long for that: nobody is to wait."""
        while self._retention.retired:
            self._retention.sweep_one(self._still_ours())
        with self._lock:
            self._lock.notify_all()
