"""Checkpoints whose directories and files a training framework names, as one save of all ranks. For adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ckpt.commit.agreement import Refusal, find_refusal
from ckpt.commit.bundle_target import BundleTarget
from ckpt.commit.conversation import RankConversation
from ckpt.commit.publication import Publication
from ckpt.commit.target import SaveCall, SavedFile
from ckpt.coordinator import Coordinator, make_coordinator
from ckpt.directory import bundles
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import BundleRoot
from ckpt.errors import (
    CheckpointError,
    ClosedError,
    CorruptError,
    DeadlineError,
    FailedSavesError,
    NotACheckpointError,
    PeerError,
    SkippedError,
    StorageError,
)
from ckpt.metrics.record import MetricsSink
from ckpt.options import Options
from ckpt.restore import file_readers
from ckpt.restore.candidates import GONE, Candidate, CandidateVote, Objection, Seen
from ckpt.restore.places import StepPlaces
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.pending import PendingSave
from ckpt.saving.submit import add_file
from ckpt.saving.task import SaveTask
from ckpt.session import SaveSession
from ckpt.storage import durable, temporary_names

logger = logging.getLogger("ckpt")

_UNVERIFIED = -1  # sequence of a directory that has no manifest
_REMOVAL_S = 1.0
_MOST_PUBLISHED = 16  # bundles that are looked for when a save has failed
_MOST_ROOTS = 4  # directories that stay locked; a framework may take a new one for each checkpoint


class Bundle:
    """One checkpoint that is being put together; made by BundleCheckpointer.begin()."""

    def __init__(self, owner: BundleCheckpointer, root: Path, target: BundleTarget, task: SaveTask) -> None:
        self._owner = owner
        self._root = root
        self._target = target
        self._error: BaseException | None = None
        self._admitted = False
        self._committed = False
        self._included: list[Path] = []
        self._held: dict[Path, durable.Directory] = {}  # where its files are made
        self._task = task
        self.pending = PendingSave(task)

    @property
    def directory(self) -> Path:
        return self._target.call.directory

    def save(self, obj: Any, path: str | os.PathLike[str], *, lazy: Any = None) -> None:
        """Adds a file; like `ckpt.save`, it returns when all but the lazy tensors is captured, and copies none of those.

        Never raises for what went wrong: the other ranks may be waiting in a barrier for this one. commit() says it to all.

        Args:
            path: where; a file that lies elsewhere than directly in the bundle's directory gets its name with the others, but
                is not part of the checkpoint. Several ranks may write one file: that of the lowest rank is taken, and theirs
                must have the same structure.
            lazy: as in `ckpt.save`.
        """
        if self._committed:
            raise ClosedError(f"the bundle '{self.directory}' was committed already")
        if self._error is not None:
            return
        try:
            target = Path(os.path.abspath(os.fspath(path)))
            durable.file_target(target)
            # Its directory is not made with it: a user may have removed the bundle meanwhile.
            limits = self._owner._limits.get(self._root) if target.parent == self.directory else None
            durable.make_directory(target.parent, durable=False)
            file = FileInFlight(target, limits=limits, directory=self._hold(target.parent))
            add_file(self._owner._runtime, self._task, file, obj, lazy=lazy, options=self._owner.options)
            if self._owner.world_size == 1:  # nobody to compare it with
                file.forget_structure()
        except Exception as error:
            self.fail(error)

    def _hold(self, directory: Path) -> durable.Directory:
        """From now on all goes there, whatever it is called by then."""
        if directory not in self._held:
            self._held[directory] = durable.Directory(directory)
        return self._held[directory]

    def include(self, path: str | os.PathLike[str]) -> None:
        """Makes what somebody else has written there, a file or a directory, durable before the bundle is published."""
        self._included.append(Path(path))

    def fail(self, error: BaseException) -> None:
        """The bundle will not be published: commit() tells all ranks why."""
        if self._error is None:
            if not isinstance(error, CheckpointError):
                error = CheckpointError(f"the bundle '{self.directory}' cannot be saved: {type(error).__name__}: {error}")
            self._error = error.with_traceback(None)  # whose frames would keep the state alive
            self._task.begin_error = self._error
            for file in self._task.files:
                file.job.fail("another file of the same bundle could not be begun")

    def commit(self) -> PendingSave:
        """Ends it: in the background it becomes a checkpoint when the files of all ranks are durable. Safe to call again."""
        if not self._committed:
            self._committed = True
            with contextlib.suppress(StorageError):  # no rank has written there; or it was removed: whoever publishes finds out
                self._hold(self.directory)
            self._owner._commit(self)
        return self.pending


class BundleCheckpointer(SaveSession):
    """Saves and finds bundles: checkpoints with directory and file names of somebody else's choosing.

    In a job of several ranks each makes one, and all make the same calls in the same order. `latest` beside the bundles is
    moved when the files of all ranks are durable and have their names; a bundle that is saved again is replaced as a whole.

    Args:
        options: see Options.
        coordinator: as of Checkpointer, but "file".
        node: None: all ranks see the same directories. Else: what names this rank's node, where nodes have directories of their
            own under the same path.
        leads_node: whether this rank is the one that writes manifest and `latest` on its node; used if `node` is given.
        varying: keys of integers that may differ where several ranks write one file.
        metrics: as of Checkpointer.

    Raises:
        ValueError, CheckpointError: as Checkpointer.
    """

    def __init__(
        self,
        *,
        options: Options | None = None,
        coordinator: str | Coordinator = "auto",
        node: str | None = None,
        leads_node: bool = False,
        varying: Iterable[str] = (),
        metrics: Iterable[MetricsSink] = (),
    ) -> None:
        made = make_coordinator(coordinator)
        what = "this BundleCheckpointer"
        super().__init__(
            options or Options(), made, owned=made is not coordinator, what=what, stream="bundles", metrics=metrics
        )
        self._claims = f"{self._stream}-claim"
        self._conversation = RankConversation(made, f"{self._stream}-save", self.options.commit_timeout_s)
        self._varying = tuple(varying)
        self._vote = CandidateVote(made, f"{self._stream}-find", self.options.timeout_s)
        self._node = node or ""
        self._leads = self.rank == 0 or (node is not None and leads_node)
        self._moved: list[BundleRoot] = []  # claimed by names that lead elsewhere by now
        self._roots: dict[Path, BundleRoot] = {}  # claimed, oldest first; only if we lead
        self._limits: dict[Path, tuple[int, int]] = {}  # what direct I/O was found to demand in these roots
        self._published: list[Path] = []  # oldest first
        weakref.finalize(self, _release_all, self._roots).atexit = False
        weakref.finalize(self, _release_moved, self._moved).atexit = False

    # ---- saving ----------------------------------------------------------------------------------------------------

    def begin(
        self,
        root: str | os.PathLike[str],
        name: str,
        *,
        step: int = 0,
        move_latest: bool = True,
        may_skip: bool = True,
        together: bool = True,
    ) -> Bundle:
        """Begins the bundle `name` in `root`, where `latest` lies too.

        Args:
            step: noted in the manifest.
            move_latest: whether `latest` is to name it.
            may_skip: whether `Options.when_busy` may skip it; else it waits.
            together: whether all ranks save into it; False: only rank 0 does, so the others may give another `root`.

        Raises:
            CheckpointError: ranks give different names, or different directories on one node; raised on all of them.
            FailedSavesError, ClosedError: as Checkpointer.save; the former on all ranks when rank 0 has seen so many failures.
            InUseError: another job is saving beside it; on the other ranks PeerError.
            PeerError: a rank has not begun it within `Options.timeout_s`.
        """
        self._check_usable()
        path = Path(os.path.abspath(os.fspath(root)))
        number = self._saves
        self._saves += 1  # whatever happens: all ranks count their calls
        task = SaveTask(path / name, step, on_done=functools.partial(self._note_done, number))
        own_root = self._claim(path, name, number, together)
        directory = path / name
        call = SaveCall(number, step, f"'{name}'", where=directory.parent, directory=directory)
        target = BundleTarget(call, name, own_root, self._node, move_latest, self.rank, self._varying)
        bundle = Bundle(self, path, target, task)
        try:
            options = self.options if may_skip else dataclasses.replace(self.options, when_busy="wait")
            self._finisher.admit(task, options)
            bundle._admitted = True
        except (SkippedError, StorageError, DeadlineError) as error:
            bundle.fail(error)
        return bundle

    def _claim(self, root: Path, name: str, number: int, together: bool) -> BundleRoot | None:
        """Before anybody writes below `root`: rank 0, and who leads a node, locks it. All ranks go on, or none."""
        own, error = None, None
        try:
            if self.rank == 0:
                self._check_failures()
                self._check_remaining()
            if self._leads:
                own = self._own_root(root)
        except CheckpointError as caught:
            error = caught
        except OSError as caught:
            error = StorageError(caught.errno or 0, f"cannot claim '{root}': {caught}", str(root))
        # Where only rank 0 writes, nobody cares for the directories of the others.
        roots = [str(root), os.path.realpath(root)] if together else []
        said = {"rank": self.rank, "node": self._node, "name": name, "roots": roots}
        said |= {"kind": type(error).__name__, "text": "" if error is None else str(error)}
        refusal = None
        if self.world_size > 1:
            key = f"{self._claims}/{number}"
            refusal = find_refusal(self._coordinator, key, said, _judge, self.options.timeout_s)
        if error is not None:
            raise error
        if refusal is not None:
            raise _REFUSALS[refusal["kind"]](refusal["text"])
        return own

    def _check_remaining(self) -> None:
        """Who removes old checkpoints himself may have removed the last one before it was known that the next one fails."""
        if self._last_failed is None or not self._published or any(manifests.read_if_any(path) for path in self._published):
            return
        cause, gone = self._last_failed, ", ".join(f"'{path}'" for path in self._published)
        self._published.clear()
        raise CheckpointError(
            f"the newest save failed with: {cause}; and what was published before is gone: {gone}. There is no checkpoint to "
            "go back to: remove an old one only when the next is durable"
        ) from cause

    def _own_root(self, root: Path) -> BundleRoot:
        own = self._roots.pop(root, None)
        if own is not None and not own.is_at(root):  # renamed, and another one made: what is in flight there still needs it
            self._moved.append(own)
            own = None
        own = own or BundleRoot.claim(root)
        self._roots[root] = own
        if self._moved and all(task.done() for task in self._pending):
            _release_moved(self._moved)
        busy = [task.path for task in self._pending if not task.done()]
        idle = [path for path in self._roots if path != root and not any(each.is_relative_to(path) for each in busy)]
        for path in idle[: max(0, len(self._roots) - _MOST_ROOTS)]:
            self._roots.pop(path).release()
        return own

    def _commit(self, bundle: Bundle) -> None:
        task = bundle._task
        target = bundle._target
        error = bundle._error
        held = bundle._held

        def publish(failed: BaseException | None) -> Path:
            files = task.files
            for file in files:
                self._note_limits(bundle, file)
            try:
                for path in bundle._included:
                    durable.sync_tree(path)
            except OSError as unsynced:
                failed = failed or unsynced
            call = dataclasses.replace(target.call, files=tuple(SavedFile(file) for file in files))
            there = held.get(call.directory)
            publication = Publication(self._conversation, dataclasses.replace(target, call=call, held=there))
            return publication.run(error or failed)

        (self._finisher.commit_later if bundle._admitted else self._finisher.attend)(task, publish)
        self._remember(task)

    def _note_limits(self, bundle: Bundle, file: FileInFlight) -> None:
        limits = file.found_limits()
        if limits is not None and file.target.parent == bundle.directory:
            if len(self._limits) >= _MOST_ROOTS and bundle._root not in self._limits:
                self._limits.clear()
            self._limits[bundle._root] = limits

    def _count(self, number: int, task: SaveTask, error: BaseException | None) -> None:
        if error is not None and _has_vanished(task, error):
            self._unreported = error
            logger.warning("'%s' was removed while it was being saved", task.path)
        else:
            super()._count(number, task, error)
        if error is None:
            before = [path for path in self._published if path != task.path]
            self._published = [*before[1 - _MOST_PUBLISHED :], task.path]

    def _release(self) -> None:
        _release_all(self._roots)
        _release_moved(self._moved)

    # ---- finding ---------------------------------------------------------------------------------------------------

    def find(
        self, root: str | os.PathLike[str], name: str | None = None, *, reads: Callable[[str], bool] | None = None
    ) -> str | None:
        """The name of a bundle in `root` that is complete and good on all ranks; what is in flight is waited for.

        Sizes and CRC-32s of all files are verified, each by the rank that wrote it. One that a living job replaces or removes
        meanwhile is not damaged: what is there then is looked at. A directory that has no manifest was not
        written by this library, and is taken as it is.

        Args:
            name: this one, and no other. None: the one that `latest` names, or, if that is not good, the newest that is.
            reads: told the name of a file, says whether it is going to be read; others may be damaged or missing.
                None: all are read.

        Returns:
            None if there is no bundle, or no directory `name`.

        Raises:
            CorruptError: `name`, or every one, is incomplete or damaged; the message says how, and names complete ones.
            CheckpointError: each was replaced or removed before it could be read, time and again.
        """
        self._check_usable()
        self._vote.begin()
        self._drain(self.options.drain_timeout_s)
        path = Path(os.path.abspath(os.fspath(root)))

        def verify(candidate: Candidate) -> Objection | None:
            return self._verify(path / candidate.name, candidate.sequence, reads)

        def complete() -> None:
            bundles.complete_all(path, name or bundles.read_latest(path))

        def look() -> Seen:
            complete()
            return Seen(self._candidates(path, name))

        if self._leads:
            complete()
        self._vote.meet()  # nobody looks at files that are just getting their names
        found, refusal = self._vote.lead(look, verify) if self.rank == 0 else self._vote.follow(verify)
        if found is not None:
            wanted = name or bundles.read_latest(path)
            if wanted is not None and found.name != wanted:
                logger.warning("'%s' is not a good checkpoint; '%s' is taken instead", path / wanted, found.name)
            return found.name
        if not refusal.causes:
            return None
        others = [directory.name for directory, _ in bundles.committed_in(path) if directory.name != name]
        published = f"; published there: {', '.join(others[:8])}" if name is not None and others else ""
        kind = CheckpointError if refusal.kind == GONE else CorruptError
        raise kind(f"no checkpoint to load from '{path}': {'; '.join(refusal.causes)}{published}")

    def _candidates(self, root: Path, name: str | None) -> list[Candidate]:
        published = {directory.name: manifest.sequence for directory, manifest in bundles.committed_in(root)}
        first = name or bundles.read_latest(root)
        candidates = []
        if first is not None and (root / first).is_dir():
            manifest = manifests.read_if_any(root / first)  # its name may have slashes
            candidates = [Candidate(first, _UNVERIFIED if manifest is None else manifest.sequence)]
            published.pop(first, None)
        if name is None:
            candidates += [Candidate(*item) for item in published.items()]
        return candidates

    def _verify(self, directory: Path, sequence: int, reads: Callable[[str], bool] | None) -> Objection | None:
        if sequence == _UNVERIFIED:
            cause = self._verify_foreign(directory)
            return None if cause is None else Objection(cause)
        unsettled = bundles.is_unsettled(directory)
        try:
            for file in StepPlaces.at(directory).read_manifest(sequence).files:
                if file.rank % self.world_size == self.rank and (reads is None or reads(file.name)):
                    file_readers.verify(directory / file.name, file, self.options.timeout_s)
        except file_readers.UNFIT as error:
            return Objection(str(error), unsettled or not manifests.is_at(directory, sequence))
        return None

    def _verify_foreign(self, directory: Path) -> str | None:
        try:
            manifests.read(directory)
        except NotACheckpointError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                return str(error)
        else:
            return f"'{directory}' has a manifest here, and none on rank 0: all ranks must see the same directory"
        files = [path.name for path in directory.iterdir() if path.is_file()] if directory.is_dir() else []
        if all(temporary_names.is_temporary(file) for file in files):
            return f"'{directory}' was never completed: it holds no finished file"
        return None

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def wait_quietly(self) -> None:
        """Like wait(), within `Options.drain_timeout_s`; but failures stay for wait() to raise."""
        self._check_usable()
        self._drain(self.options.drain_timeout_s)


_REFUSALS = {kind.__name__: kind for kind in (CheckpointError, FailedSavesError, PeerError)}


def _judge(answers: list[dict[str, Any]]) -> Refusal | None:
    """Why the ranks, which are given in their order, cannot make one bundle."""
    for own in answers:
        if own["text"]:
            kind = FailedSavesError if own["kind"] == FailedSavesError.__name__ else PeerError
            return {"kind": kind.__name__, "text": f"rank {own['rank']} may not save: {own['text']}"}
    leaders: dict[str, dict[str, Any]] = {}
    for own in answers:
        if own["name"] != answers[0]["name"]:
            text = f"rank {own['rank']} saves '{own['name']}' where rank 0 saves '{answers[0]['name']}'"
            return {"kind": CheckpointError.__name__, "text": f"{text}: all ranks must give a checkpoint the same name"}
        first = leaders.setdefault(own["node"], own)
        if own["roots"] != first["roots"] and not {*own["roots"]} & {*first["roots"]}:
            text = f"rank {own['rank']} saves to '{own['roots'][0]}' where rank {first['rank']} saves to '{first['roots'][0]}'"
            remedy = "Give all ranks the same directory; for one of each rank's own, use the framework's own checkpoint engine"
            return {"kind": CheckpointError.__name__, "text": f"{text}: a checkpoint of all ranks has one directory. {remedy}"}
    return None


def _has_vanished(task: SaveTask, error: BaseException) -> bool:
    """Whether the user has removed the bundle meanwhile: the storage is not to blame, and the next one may be good."""
    own = [file for file in task.planned if file.target.parent == task.path]
    if not own or any(file.directory is not None and file.directory.moved for file in own):
        return False
    gone = isinstance(error, (PeerError, CorruptError)) or (isinstance(error, StorageError) and error.errno == errno.ENOENT)
    return gone and _is_gone(task.path)


def _is_gone(path: Path) -> bool:
    """Or going: a removal that has taken the first file takes a moment for the last."""
    end = time.monotonic() + _REMOVAL_S
    while path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(_REMOVAL_S / 20)
    return True


def _release_all(roots: dict[Path, BundleRoot]) -> None:
    while roots:
        roots.popitem()[1].release()


def _release_moved(roots: list[BundleRoot]) -> None:
    while roots:
        roots.pop().release()
