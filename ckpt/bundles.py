"""Checkpoints whose directories and files a training framework names, as one save of all ranks. For adapters."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ckpt.commit.agreement import find_refusal
from ckpt.commit.bundle_agreement import REFUSALS, judge
from ckpt.commit.bundle_target import BundleTarget
from ckpt.commit.conversation import RankConversation
from ckpt.commit.publication import Publication
from ckpt.commit.target import PublicationTarget, SaveCall, SavedFile
from ckpt.coordinator import Coordinator, make_coordinator
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import BundleRoot
from ckpt.directory.late_names import partial_of
from ckpt.directory.owned_roots import OwnedRoots
from ckpt.directory.publish_lock import is_home
from ckpt.directory.published import PublishedBundles
from ckpt.errors import CheckpointError, ClosedError, DeadlineError, SkippedError, StorageError, SupersededError
from ckpt.formats.by_suffix import format_of
from ckpt.metrics.record import MetricsSink
from ckpt.options import Options
from ckpt.plan.frozen_marks import hint_of
from ckpt.restore.bundle_finder import BundleFinder
from ckpt.restore.candidates import CandidateVote
from ckpt.restore.near_bundles import NearBundles
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.pending import PendingSave
from ckpt.saving.submit import add_file
from ckpt.saving.task import SaveTask, wait_all, wait_landed
from ckpt.saving.vanished import as_failure, has_vanished
from ckpt.saving.written_by_others import WrittenByOthers
from ckpt.session import SaveSession
from ckpt.storage import durable
from ckpt.tiers.bundle_nodes import BundleNodes, Landing
from ckpt.tiers.homecoming import Homecoming
from ckpt.tiers.node_level import NODE
from ckpt.tiers.tier import Tier, node_tier

logger = logging.getLogger("ckpt")

Result = TypeVar("Result")
_MOST_LIMITS = 4  # roots of which it is remembered what direct I/O demands there


class Bundle:
    """One checkpoint that is being put together; made by BundleCheckpointer.begin()."""

    def __init__(
        self, owner: BundleCheckpointer, root: Path, target: BundleTarget, task: SaveTask, landing: Landing | None
    ) -> None:
        self._owner = owner
        self._root = root
        self._target = target
        self._error: BaseException | None = None
        self._admitted = False
        self._committed = False
        self._others = WrittenByOthers()
        self._held: dict[Path, durable.Directory] = {}  # where its files are made
        self._landing = landing  # on a node; None: it goes straight home
        self._task = task
        self.pending = PendingSave(task)

    @property
    def directory(self) -> Path:
        return self._target.call.directory

    @property
    def lands_on_node(self) -> bool:
        """Whether its directory is made later, when what is saved to the node comes home."""
        return self._landing is not None

    def save(
        self,
        obj: Any,
        path: str | os.PathLike[str],
        *,
        lazy: Any = None,
        metadata: Mapping[str, str] | None = None,
        frozen: Any = None,
    ) -> None:
        """Adds a file; like `ckpt.save`, it returns when all but the lazy tensors is captured, and copies none of those.

        Never raises for what went wrong: the other ranks may be waiting in a barrier for this one. commit() says it to all.

        Args:
            path: where; a file that lies elsewhere than directly in the bundle's directory gets its name with the others, but
                is not part of the checkpoint. Several ranks may write one file: that of the lowest rank is taken, and theirs
                must have the same structure. By way of nodes, all of them lie directly in the directory.
            lazy, metadata: as in `ckpt.save`; frozen: as in `Checkpointer.save()`.
        """
        if self._committed:
            raise ClosedError(f"the bundle '{self.directory}' was committed already")
        if self._error is not None:
            return
        try:
            target = Path(os.path.abspath(os.fspath(path)))
            made = format_of(target, metadata)
            file = self._file_at(target) if self._landing is None else self._file_on_node(target, self._landing)
            file.made = made
            # Names may say the step: of one bundle after the other, files come in the same order.
            self._owner._baselines.follow(file, self._root, str(len(self._task.planned)), hint_of(frozen))
            add_file(self._owner._runtime, self._task, file, obj, lazy=lazy, options=self._owner.options)
            if self._owner.world_size == 1:  # nobody to compare it with
                file.forget_structure()
        except Exception as error:
            self.fail(error)

    def _file_at(self, target: Path) -> FileInFlight:
        durable.file_target(target)
        # Its directory is not made with it: a user may have removed the bundle meanwhile.
        limits = self._owner._limits.get(self._root) if target.parent == self.directory else None
        durable.make_directory(target.parent, durable=False)
        return FileInFlight(target, limits=limits, directory=self._hold(target.parent))

    def _file_on_node(self, target: Path, landing: Landing) -> FileInFlight:
        if target.parent != self.directory:
            raise CheckpointError(
                f"'{target}' is not of the bundle '{self.directory}', which goes by way of the disks of nodes: begin() one "
                "with such files with by_nodes=False"
            )
        return landing.make_file(target.name)

    def _hold_new(self) -> None:
        """Makes a directory that is to get its name last."""
        durable.make_directory(self.directory, durable=False)
        self._hold(self.directory)

    def _hold(self, directory: Path) -> durable.Directory:
        """From now on all goes there, whatever it is called by then."""
        if directory not in self._held:
            self._held[directory] = durable.Directory(directory)
        return self._held[directory]

    def include(self, path: str | os.PathLike[str]) -> None:
        """Makes what somebody else has written there, a file or a directory, durable before the bundle is published.

        Of a bundle that was begun with by_nodes=False, or has no tier: else commit() says that it cannot be saved.
        """
        if self._landing is not None:
            self.fail(CheckpointError(f"'{path}' lies at home already, and the bundle goes by way of the disks of nodes"))
        self._others.include(Path(path))

    def follow(self, pending: PendingSave) -> None:
        """It is published only when that save, which writes below its directory, is durable, and fails with it.

        Args:
            pending: of another session; on all ranks.
        """
        self._others.follow(pending)

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
                if self._landing is None:
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
        tiers: `[Tier.node(path)]`: saves to one directory land on a disk of each node first, and come home later:
            `on_tier("node")` of a save tells of the first, result() of the other. It is the first directory that is saved to a
            second time, or that find() has looked into before; what is saved to others goes straight home. find() waits until
            all has come home. Not with `node`.

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
        tiers: Sequence[Tier] = (),
    ) -> None:
        tier = node_tier(tiers)
        if tier is not None and node is not None:
            raise ValueError("tiers= has no use where each node has directories of its own (node=): leave one of them out")
        made = make_coordinator(coordinator)
        details: dict[str, Any] = {"what": "this BundleCheckpointer", "stream": "bundles", "lands_on_nodes": tier is not None}
        super().__init__(options or Options(), made, owned=made is not coordinator, metrics=metrics, **details)
        self._claims = f"{self._stream}-claim"
        self._conversation = RankConversation(made, f"{self._stream}-save", self.options.commit_timeout_s)
        self._varying = tuple(varying)
        self._node = node or ""
        self._leads = self.rank == 0 or (node is not None and leads_node)
        vote = CandidateVote(made, f"{self._stream}-find", self.options.timeout_s)
        self._finder = BundleFinder(self.rank, self.world_size, vote, self._leads, self.options.timeout_s)
        self._nodes: BundleNodes | None = None
        self._homecoming: Homecoming | None = None
        self._unlanded: BaseException | None = None  # of the newest save since the last wait() that came nowhere
        if tier is not None:
            self._nodes = BundleNodes(tier, made, f"{self._stream}-tier", self.options)
            weakref.finalize(self, self._nodes.close).atexit = False
            times = self.options.timeout_s, self.options.drain_timeout_s
            self._homecoming = Homecoming(tier, made, f"{self._stream}-home", *times)
        self._roots = OwnedRoots()  # none unless we lead
        self._limits: dict[Path, tuple[int, int]] = {}  # what direct I/O was found to demand in these roots
        self._published = PublishedBundles()
        weakref.finalize(self, self._roots.release).atexit = False

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
        by_nodes: bool = True,
        named_last: bool = False,
    ) -> Bundle:
        """Begins the bundle `name` in `root`, where `latest` lies too.

        Args:
            step: noted in the manifest.
            move_latest: whether `latest` is to name it.
            may_skip: whether `Options.when_busy` may skip it; else it waits.
            together: whether all ranks save into it; False: only rank 0 does, so the others may give another `root`.
            by_nodes: whether it may land on the nodes first, with `tiers`; False, on all ranks: straight home.
            named_last: whether its directory gets its name when all of it is durable on all ranks. Until then it is
                `Bundle.directory`, which is hidden, and is there when this returns; what has the name stays as it is. Then that
                goes, with all that is in it. Such a bundle goes straight home. If one of this name is in flight, that is
                waited for.

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
        if named_last:
            wait_all([each for each in self._pending if each.path == task.path], self.options.commit_timeout_s)
        own_root = self._claim(path, name, number, together, named_last)
        task.note = self._events_in(path, by_default=False, begins=True)
        self._finder.forget()
        directory, final = (partial_of(path, name), task.path) if named_last else (task.path, None)
        call = SaveCall(number, step, f"'{name}'", where=task.path.parent, directory=directory)
        target = BundleTarget(call, name, own_root, self._node, move_latest, self.rank, self._varying, None, final)
        landing, refusal = self._land(task, path, own_root, number, together and by_nodes and not named_last)
        bundle = Bundle(self, path, target, task, landing)
        if refusal is not None:
            bundle.fail(refusal)
            return bundle
        try:
            if named_last:
                bundle._hold_new()
            options = self.options if may_skip else dataclasses.replace(self.options, when_busy="wait")
            self._finisher.admit(task, options)
            bundle._admitted = True
        except BaseException as error:
            bundle.fail(error)
            if not isinstance(error, (SkippedError, StorageError, DeadlineError)):  # as Ctrl-C; the other ranks wait
                bundle.commit()
                raise
        return bundle

    def _land(
        self, task: SaveTask, root: Path, own: BundleRoot | None, number: int, by_nodes: bool
    ) -> tuple[Landing | None, CheckpointError | None]:
        """Where it goes first, if that is not home; and why it goes nowhere."""
        if self._nodes is None:
            return None, None
        task.tiers[NODE] = concurrent.futures.Future()
        if not by_nodes:
            return None, None
        assert task.step is not None
        self._nodes.enter(root, own, number, task.step)
        try:
            return self._nodes.land(task, root, own, number), None
        except CheckpointError as error:
            return None, error

    def _claim(self, root: Path, name: str, number: int, together: bool, named_last: bool) -> BundleRoot | None:
        """Before anybody writes below `root`: rank 0, and who leads a node, locks it. All ranks go on, or none."""
        with contextlib.ExitStack() as undo:
            own, error = None, None
            try:
                if self.rank == 0:
                    self._check_failures()
                    self._published.check_remaining(self._last_failed)
                if self._nodes is not None:
                    self._nodes.check(root)
                if self._leads:
                    busy = [task.path for task in self._pending if not task.done()]
                    kept = self._nodes.keeps if self._nodes is not None else None
                    own = self._roots.claim(root, busy, kept, below=not named_last)
                    if named_last:
                        own.begin_partial(name)
                        undo.callback(own.end_partial, name, drop=False)
            except CheckpointError as caught:
                error = caught
            except OSError as caught:
                error = StorageError(caught.errno or 0, f"cannot claim '{root}': {caught}", str(root))
            # Where only rank 0 writes, nobody cares for the directories of the others.
            roots = [str(root), os.path.realpath(root)] if together else []
            said = {"rank": self.rank, "node": self._node, "name": name, "roots": roots, "tiers": self._nodes is not None}
            said |= {"kind": type(error).__name__, "text": "" if error is None else str(error)}
            refusal = None
            if self.world_size > 1:
                refusal = find_refusal(self._coordinator, f"{self._claims}/{number}", said, judge, self.options.timeout_s)
            if error is not None:
                raise error
            if refusal is not None:
                raise REFUSALS[refusal["kind"]](refusal["text"])
            undo.pop_all()
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
            failed = bundle._others.make_durable(self.options.drain_timeout_s) or failed
            call = dataclasses.replace(target.call, files=tuple(SavedFile(file) for file in files))
            there = held.get(call.directory)
            straight = dataclasses.replace(target, call=call, held=there)
            try:
                return self._publish(task, straight, bundle._landing, error or failed)
            finally:
                straight.end()

        (self._finisher.commit_later if bundle._admitted else self._finisher.attend)(task, publish)
        self._remember(task)

    def _publish(self, task: SaveTask, straight: BundleTarget, landing: Landing | None, error: BaseException | None) -> Path:
        target: PublicationTarget = straight
        if landing is not None:
            target = landing.target(straight.call, straight.move_latest, self._varying)
        publication = Publication(self._conversation, target, task, None if self._nodes is None else self._nodes.bypass)
        if landing is None:
            return publication.run(error)
        published = None
        try:
            path = publication.run(error)
            published = publication
        finally:
            landing.end(straight.call.files, published)
        return path

    def _note_limits(self, bundle: Bundle, file: FileInFlight) -> None:
        limits = file.found_limits()
        if limits is not None and file.target.parent == bundle.directory:
            if len(self._limits) >= _MOST_LIMITS and bundle._root not in self._limits:
                self._limits.clear()
            self._limits[bundle._root] = limits

    def _count(self, number: int, task: SaveTask, error: BaseException | None) -> None:
        if isinstance(error := as_failure(task, error, self._pending, manifests.read_if_any), SupersededError):
            logger.info("%s", error)
        elif error is not None and has_vanished(task, error):
            self._unreported = error
            logger.warning("'%s' was removed while it was being saved", task.path)
        else:
            super()._count(number, task, error)
            if error is not None and not task.tier_at and not isinstance(error, SkippedError):
                self._unlanded = error
        if self._nodes is not None:
            self._nodes.succeeded |= error is None or bool(task.tier_at)
        if error is None:
            self._published.note(task.path)

    def _release(self) -> None:
        if self._nodes is not None:
            self._nodes.close()
        self._roots.release()

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Removes a bundle, with all that is in its directory; for frameworks that keep only some. On one rank.

        Raises:
            CheckpointError: it is the newest that this has published, or something of it is left.
        """
        self._check_usable()
        self._published.remove(Path(os.path.abspath(os.fspath(path))))

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

        With `tiers` all that is complete on the nodes has come home then, or `name` has: that is waited for, at most
        `Options.drain_timeout_s`.

        Returns:
            None if there is no bundle, or no directory `name`.

        Raises:
            CorruptError: `name`, or every one, is incomplete or damaged; the message says how, and names complete ones.
            CheckpointError: each was replaced or removed before it could be read, time and again. Or something newer is
                complete on the nodes, and does not come home.
        """
        self._check_usable()
        self._finder.begin()
        self._drain(self.options.drain_timeout_s)
        path = Path(os.path.abspath(os.fspath(root)))
        return self._finder.find(path, name, reads, self._bring_home(path, name))

    def _bring_home(self, root: Path, name: str | None) -> NearBundles:
        if self._nodes is not None and self._homecoming is not None:
            self._nodes.note_look(root)
            return self._homecoming.wait(root, name)
        if self.rank == 0 and is_home(root):
            logger.warning("'%s' has been saved to by way of nodes, and no tiers= are given: what lies there is left out", root)
        return NearBundles()

    def read(self, path: str | os.PathLike[str], attempt: Callable[[Path], Result]) -> Result:
        """What `attempt` makes of a file; of a bundle that find() has just found, of the nearest copy that is good.

        Args:
            attempt: called with a path, or, if it raises CorruptError or StorageError there, with that of another copy.

        Raises:
            whatever `attempt` raises at the last of them.
        """
        return self._finder.read(Path(os.path.abspath(os.fspath(path))), attempt)

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def wait_on_node(self, timeout: float | None = None) -> None:
        """Like wait(), but until every save is committed on the nodes, or where it went instead.

        Raises:
            DeadlineError: not within `timeout`.
            ValueError: there are no tiers.
            CheckpointError: a save since the last call was committed nowhere; the newest such error.
        """
        self._check_usable()
        if self._nodes is None:
            raise ValueError(f"{self._what} has no tiers: give it tiers=[Tier.node(path)]")
        if not wait_landed(self._pending, NODE, timeout):
            raise DeadlineError(f"saves of {self._what} have not landed after {timeout} s")
        error, self._unlanded = self._unlanded, None
        if error is not None:
            if self._unreported is error:
                self._unreported = None
            raise error

    def wait_quietly(self) -> None:
        """Like wait(), within `Options.drain_timeout_s`; but failures stay for wait() to raise."""
        self._check_usable()
        self._drain(self.options.drain_timeout_s)
