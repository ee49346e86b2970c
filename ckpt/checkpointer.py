"""Checkpoints of a training job, step by step: saved by all ranks together, kept, restored. Files: see directory/steps.py."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt.commit.apart import all_files
from ckpt.commit.conversation import RankConversation
from ckpt.commit.layout_exchange import LayoutExchange
from ckpt.commit.node_target import NodeStepTarget
from ckpt.commit.publication import Publication
from ckpt.commit.step_target import StepTarget
from ckpt.commit.target import SaveCall
from ckpt.coordinator import Coordinator, make_coordinator
from ckpt.directory.keeping import Keeping, checked_metrics
from ckpt.directory.manifest import RANK, SHARDED, SHARDED_METADATA
from ckpt.directory.publish_lock import is_home
from ckpt.directory.step_names import step_name
from ckpt.directory.steps import StepDirectories
from ckpt.errors import (
    CheckpointError,
    DeadlineError,
    PeerError,
    SkippedError,
    StorageError,
)
from ckpt.fence import fence
from ckpt.formats.dcp_file import DcpFile
from ckpt.loading.progress import Progress, Told
from ckpt.metrics.record import MetricsSink
from ckpt.options import Options
from ckpt.plan.frozen_marks import hint_of
from ckpt.restore.candidates import CandidateVote
from ckpt.restore.one_step import OneStep
from ckpt.restore.request import Restored, RestoreRequest
from ckpt.restore.restorer import Restorer
from ckpt.saving.frozen_file import settle
from ckpt.saving.notices import note_shards
from ckpt.saving.pending import PendingSave
from ckpt.saving.submit import start
from ckpt.saving.task import SaveTask, wait_landed
from ckpt.session import SaveSession
from ckpt.sharded.entries import EntryFinder
from ckpt.sharded.metadata import MetadataWriter
from ckpt.sharded.planning import ShardedPlanner
from ckpt.storage import durable, temporary_names
from ckpt.tiers.entering import NodeEntry
from ckpt.tiers.levels import make_levels
from ckpt.tiers.node_level import Route, name_run
from ckpt.tiers.step_files import Given, StepFiles, contents_of
from ckpt.tiers.tier import NODE, Tier, check_place, sort_tiers

_tokens = itertools.count()


class Checkpointer(SaveSession):
    """Saves a training job's state step by step, and finds the newest good one again.

    In a job of several ranks each makes one, on the same directory, and all make the same calls in the same order. A step is a
    checkpoint when the files of all ranks are durable; if one rank fails, dies or hangs, the save fails on all, with an error
    that names it, and the checkpoint before stands.

    Args:
        directory: where the step directories go; seen by all ranks. The first save makes it if it is missing. One job at a
            time may save into it.
        keep: how many committed steps to keep, newest first; None keeps all. The newest good one always stays.
        keep_every: steps that are multiples of it stay, too, for ever; default none.
        keep_best, best_by, best_mode: how many of the best stay, too, and by which of the `metrics` of save(): the lowest
            ("min") or the highest ("max"). Steps that were saved without metrics are not among them. Default none.
        options: see Options.
        coordinator: by what the ranks agree: "torch" (the store of torch.distributed), "mpi", "file" (messages in the
            directory), "local" (one process), or "auto", which takes the first of "torch", "mpi", "file" that fits how the job
            was launched, and "local" for a job of one.
        metrics: who is told of each save that has ended, see `ckpt.metrics.MetricsSink`.
        tiers: `[Tier.node(path), Tier.remote(url)]`, or one of them. With the former saves land on a disk of each node first,
            and a process of its own carries them to `directory`, which stays what result() speaks of; another one carries what
            is there to the latter, an object store. `on_tier("node")` and `on_tier("object")` of what save() returns tell of
            that. restore() reads each file from the nearest place where it is good: the own node, another one, `directory`,
            the object store. All ranks give the same.

    Raises:
        StorageError: the directory cannot be made or entered, as far as can be seen without making it; says what is in the
            way.
        ValueError: keep, keep_every or keep_best is less than 1, keep_best and best_by are not both given, there is no such
            coordinator, or tiers are none that a Checkpointer can have.
        CheckpointError: the coordinator cannot work here, or not all ranks came.

    A context manager: leaving the block drains what is in flight. Methods may be called from any one thread at a time.

    **Restoring into what is there** (`into=`, `replicated_into=` of restore()) makes no second copy of the state: files are
    read into the target while they are verified, as load_into() does it, and it stands in the result. Records that need a
    temporary there, as for tensors that are strided otherwise, are read a second time for it. All that is in flight is fenced
    before. If a checkpoint fails, the next older one fills the target again; so if none is good, or a rank does not answer,
    the target may hold parts of any of them. A target may also be a function that lends memory: it is called with what the
    file holds, whose tensors have no contents yet, and returns a dict of tensors by their paths in that, such as ("model",
    "weight"). Those that are laid out as in the file are filled and stand in the result; all else is loaded as without a
    target. It may be called for several checkpoints, one after the other.

    **Going back** (`step=` of restore()) takes that step, from the nearest place where it is good. Who saves on from there
    begins a new line: the next save is the newest checkpoint, whatever its step. Newer ones stay beside it until their steps
    are saved again or `keep` no longer wants them, since they were committed before; a warning names them. As long as nothing
    has been saved, restore() without `step` takes the newest of them. The step itself stays at home beside what `keep` wants,
    as long as this Checkpointer lives.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        keep_every: int | None = None,
        keep_best: int | None = None,
        best_by: str | None = None,
        best_mode: str = "min",
        options: Options | None = None,
        coordinator: str | Coordinator = "auto",
        metrics: Iterable[MetricsSink] = (),
        tiers: Sequence[Tier] = (),
    ) -> None:
        self._keeping = Keeping(keep, keep_every, keep_best, "" if best_by is None else best_by, best_mode)
        self.directory = Path(os.path.abspath(os.fspath(directory)))
        sorted_tiers = sort_tiers(tiers)
        if sorted_tiers.node is not None:
            check_place(sorted_tiers.node.path, self.directory)
        durable.expect_directory(self.directory)
        made = make_coordinator(coordinator, directory=self.directory)
        what = f"the Checkpointer of '{self.directory}'"
        details: dict[str, Any] = {"what": what, "stream": "ckpt", "lands_on_nodes": sorted_tiers.node is not None}
        super().__init__(options or Options(), made, owned=made is not coordinator, metrics=metrics, **details)
        self._note = self._events_in(self.directory, by_default=True)
        shared, places = self.world_size > 1, self.options.max_in_flight
        self._directories = StepDirectories(self.directory, self._keeping, shared=shared, max_in_flight=places, note=self._note)
        weakref.finalize(self, self._directories.release).atexit = False  # then the kernel does it, after the drain
        self._conversation = RankConversation(made, f"{self._stream}-save", self.options.commit_timeout_s)
        vote = CandidateVote(made, f"{self._stream}-restore", self.options.timeout_s)
        collective = self.options.replicated_readers == "all"
        self._levels = make_levels(sorted_tiers, self._directories, made, self._stream, self._keeping, self.options)
        self._nodes = self._levels.nodes
        weakref.finalize(self, self._levels.close).atexit = False
        both = self._levels.nearby, self._levels.copies
        self._restorer = Restorer(self._directories, self.rank, self.world_size, vote, collective, *both)
        self._entries = EntryFinder(self.rank, self.world_size)
        sharded_format = DcpFile(ShardedPlanner(self._entries, self.rank, self.world_size))
        one_writer = self.options.replicated_writers == "rank0"
        self._files = StepFiles(self.rank, self.world_size, one_writer, sharded_format)
        self._layouts = LayoutExchange(MetadataWriter(self.options.metadata_compat))
        self._claimed = False
        self._succeeded = False
        self._token = ""  # of rank 0: names what all ranks write together
        self._run = ""  # names the job on the disks of its nodes
        self._entry = NodeEntry(made, self.options.timeout_s)

    # ---- saving ----------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: Any = None,
        *,
        replicated: Any = None,
        sharded: Any = None,
        lazy: Any = None,
        metrics: Mapping[str, Any] | None = None,
        frozen: Any = None,
    ) -> PendingSave:
        """Saves checkpoint `step`, in the background. Saving a step again replaces it once the new one is durable.

        Args:
            step: not negative; need not grow. The newest checkpoint is the one committed last. The same on all ranks.
            state: what this rank has for itself: a file for each rank. Tensors of which each rank has a part go to `sharded`:
                here only as many ranks can restore them, which a warning says.
            replicated: what is the same on all ranks (under DistributedDataParallel: model and optimizer): one file for all.
                It must be equal to the byte on every rank, with the bytes between the elements of strided views. Structure,
                values and shapes are compared, and of the bytes of tensors samples: small ones (4 KiB) whole, of larger ones
                some 64 bytes here and there, at other places each time. If anything differs, the save fails on all ranks, and
                the error names it. A difference of a few elements may go unseen; then a tensor has the value of one rank. Of
                what lies on devices there are no samples with `Options.device_lazy`, nor with `replicated_writers="rank0"`.
            sharded: a state dict of which each rank holds a part: nested dicts and lists of DTensors, of any placements, on a
                mesh of all ranks or a part of one; tensors and values that are the same on all. The step is then a checkpoint
                of torch.distributed.checkpoint, which its `load(state, checkpoint_id=<directory of the step>)` reads on any
                number of ranks. No collective is called for it; one of those that hold a part writes it. Compared are keys,
                shapes, placements and values, and of tensors that are no DTensors samples.
            lazy: as in `ckpt.save`, for all of them.
            frozen: what does not change: tensors, modules (their parameters that require no gradient), iterables of these. It
                is read by each `refresh_every`-th save alone, and when torch has written to it; not for who does by `.data`.
            metrics: how good this step is, such as {"loss": 0.3}: numbers, or tensors of one element. The finite ones of rank 0
                go to the manifest: for keep_best here and in jobs that resume it, for `ckpt prune`.

        Raises:
            InUseError: another job is saving into the directory; or a newer Checkpointer of this process has taken it over.
            FailedSavesError: `Options.max_failed_saves` saves in a row have failed, this one was not begun. Or, on rank 0,
                because a Tier.remote() that is required has not got an earlier one.
            ClosedError: after close().
            CheckpointError: at the first save: there are checkpoints, none of which was looked at by restore(), and `step` is
                not above the newest; or the directory was lost, see there. Nothing was written or removed.
            PeerError: at the first save, or with a required Tier.remote(), rank 0 does not answer, or may not save.
            TypeError, ValueError: step is not a count; `metrics` are no numbers, or lack what best_by names; all of `state`,
                `replicated` and `sharded` are None; `replicated` holds tensors of which each rank has a part; `sharded` what
                cannot be saved so (a ShardedTensor, a DTensor that is Partial or on a mesh of other ranks, two values of one
                key); also what pickling a state raises.

        Failures of the storage and of other ranks are logged, counted, and raised by the result's `result()` and by wait().
        """
        self._check_usable()
        path = self.directory / step_name(step)
        call = SaveCall(self._saves, step, f"step {step}", where=path, directory=path)
        self._saves += 1  # whatever happens: all ranks count their calls
        task = SaveTask(path, step, on_done=functools.partial(self._note_done, call.number))
        task.note = self._note
        self._levels.expect(task)
        try:
            self._claim_directory(call)
            self._enter_nodes(call)
            call = dataclasses.replace(call, metrics=checked_metrics(metrics, self._keeping))  # an error reaches all by now
            self._check_failures()
            contents = contents_of(state, replicated, sharded)
            self._begin(task, call, self._route(task, call), Given(contents, lazy, hint_of(frozen)))
        except BaseException as error:
            self._attend(task, call, error)
            if not isinstance(error, (StorageError, DeadlineError, SkippedError)):
                raise
            task.fail(error.with_traceback(None))  # whose frames would keep the state alive
        self._remember(task)
        return PendingSave(task)

    def _claim_directory(self, call: SaveCall) -> None:
        """At the first save: rank 0 locks the directory and cleans it, before any rank writes.

        Rank 0 says so again at each save until one has succeeded: a rank may have missed it. And whenever a tier may refuse.
        """
        if self._claimed and (self.rank != 0 or self._succeeded) and not self._levels.may_refuse:
            return self._levels.begin_save() if self.rank == 0 else None
        key = f"{self._stream}-claim/{call.number}"
        if self.rank == 0:
            try:
                if not self._claimed:
                    self._check_failures()
                    self._directories.claim(call.step, self.options.timeout_s)
                    self._levels.note_claimed(self.directory)
                    if self._nodes is not None:
                        self._run = name_run(self._nodes.tier, self._directories)
                    self._claimed, self._token = True, temporary_names.shared_token(next(_tokens))
                self._levels.begin_save()
            except CheckpointError as error:
                self._coordinator.broadcast(key, json.dumps({"refusal": str(error)}).encode(), self.options.timeout_s)
                raise
        said = json.dumps({"token": self._token, "run": self._run}).encode()
        answer = json.loads(self._coordinator.broadcast(key, said, self.options.timeout_s))
        if "refusal" in answer:
            raise PeerError(f"rank 0 may not save: {answer['refusal']}", (0,))
        self._claimed, self._token, self._run = True, answer["token"], answer["run"]
        self._directories.token = self._files.token = self._token
        self._events_in(self.directory, by_default=True, begins=True)

    def _enter_nodes(self, call: SaveCall) -> None:
        """At the first save with tiers. Rank 0 says who is on which node again until a save has succeeded, as above."""
        nodes = self._nodes
        if nodes is None or (nodes.entered and (self.rank != 0 or self._succeeded)):
            return
        self._entry.enter(nodes, f"{self._stream}-nodes/{call.number}", self._run, self._token, call.step)

    def _route(self, task: SaveTask, call: SaveCall) -> Route:
        """Where the files of this save go first."""
        if self._nodes is None:
            return Route(self._directories, call.directory)
        return self._nodes.route(task, call.number, self._directories)

    def _begin(self, task: SaveTask, call: SaveCall, route: Route, given: Given) -> None:
        contents = given.contents
        call, directories = dataclasses.replace(call, directory=route.directory), route.directories
        written = self._files.written([kind for kind, _ in contents], route, self._frozen_files.is_for(given.hint))
        targets, limits = directories.begin(call.directory.name, [self._files.stem(kind) for kind in written], route.number)
        names = dict(zip(written, targets, strict=True))
        saved = tuple(self._files.make(kind, names.get(kind), call, route, limits) for kind, _ in contents)
        self._files.set_apart(saved, names, self._frozen_files, route)
        for each in saved:
            self._baselines.follow(each.file, route.directory.parent, each.kind, given.hint)

        def publish(error: BaseException | None) -> Path:
            failed = True
            try:
                error = settle((each.file for each in saved), error)
                whole = dataclasses.replace(call, files=all_files(saved))
                path = self._publish(task, whole, route, error, names.get(SHARDED_METADATA))
                if SHARDED in names:
                    self._layouts.note_published()
                failed = False
                return path
            except BaseException:
                task.discard()  # before forget_save() looks whether anything is left
                raise
            finally:
                directories.forget_save(call.directory, targets, failed=failed)
                task.afterwards = directories.sweep
                for each in saved:
                    directories.note_limits(each.file.found_limits())
                    each.file.forget_structure()

        def ready() -> None:
            for each in saved:
                if each.kind == RANK:
                    note_shards(each.file)

        files = [(each.file, obj, each.written) for each, (_, obj) in zip(saved, contents, strict=True)]
        try:
            start(self._runtime, self._finisher, task, files, publish, lazy=given.lazy, options=self.options, ready=ready)
        except BaseException:
            if not task.handed_over:
                directories.forget_save(call.directory, targets)
            raise
        if (skipped := task.skipped) is not None:
            directories.forget_save(call.directory, targets)
            self._attend(task, call, skipped)

    def _publish(
        self, task: SaveTask, call: SaveCall, route: Route, error: BaseException | None, metadata: Path | None = None
    ) -> Path:
        details = (call, route.directories, self.rank, self.world_size, self._layouts, metadata)
        target, bypass = StepTarget(*details), None
        if self._nodes is not None:
            bypass = self._nodes.bypass
            if route.place is not None:
                target = NodeStepTarget(*details, home=self._directories, place=route.place, path=task.path)
        publication = Publication(self._conversation, target, task, bypass)
        path = publication.run(error)
        if self._nodes is not None and route.place is not None:
            task.carry = functools.partial(self._nodes.carry, task, publication.sequence, call.directory)
        self._levels.follow(task, publication.sequence)
        return path

    def _attend(self, task: SaveTask, call: SaveCall, error: BaseException) -> None:
        """Lets the other ranks know of a save that could not even be begun here: they wait for word from this one."""
        if task.handed_over:
            self._pending.append(task)
        elif self.world_size > 1:
            # Words, not the error itself: its frames hold the state.
            said = (SkippedError if isinstance(error, SkippedError) else CheckpointError)(str(error) or type(error).__name__)

            def publish(_: BaseException | None) -> Path:
                try:
                    return self._publish(task, call, Route(self._directories, call.directory), said)
                finally:
                    task.discard()  # what the others have written of a file that all write together

            attended = SaveTask(call.directory, call.step)
            self._finisher.attend(attended, publish)
            self._pending.append(attended)

    def _note_done(self, number: int, task: SaveTask, error: BaseException | None) -> None:
        self._succeeded |= error is None or bool(task.tier_at)
        super()._note_done(number, task, error)

    def _release(self) -> None:
        self._levels.close()
        self._directories.release()

    # ---- looking ---------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The committed steps, ascending. What is in flight or was left by a crash is not among them."""
        return sorted(manifest.step for _, manifest in self._directories.committed().checkpoints)

    def restore(
        self,
        *,
        step: int | None = None,
        map_location: Any = None,
        weights_only: bool = True,
        merge: Callable[[list[Any]], Any] | None = None,
        into: Any = None,
        replicated_into: Any = None,
        sharded_into: Any = None,
        strict: bool = True,
        fresh: bool = False,
        exclusive: bool = False,
        progress: Told | bool | None = None,
    ) -> Restored | None:
        """Loads the newest checkpoint that is good on every rank; None if nothing was ever committed. Or that of `step`.

        Sizes and CRC-32s of all files are verified. A checkpoint that fails is passed over, with a warning, for the next older
        one; so is a step directory with files and without a manifest. Waits for own saves in flight. Another job may save here
        meanwhile: what it removes while it is being read is not damaged; the newest that is there then comes next.

        Args:
            step: that one and no other, see above. The same on all ranks.
            map_location, weights_only: as in `torch.load`. What has a target stays on the target's devices.
            merge: called if the checkpoint was saved by another number of ranks than there are now, with what each of those
                gave for itself, in the order of ranks; returns this rank's state. Not needed if all was replicated.
            into: what this rank's own state is to be loaded into, see above; a target as for load_into(): nested dicts, lists
                and tuples of tensors, modules and optimizers. Not with `merge`.
            replicated_into: the same for what was saved as replicated.
                Either may also be a function that lends memory, see above.
            sharded_into: the same for what was saved as sharded: a state dict of the same keys, of any number of ranks, mesh
                and placements; or a function that gives one, called for each checkpoint with shape and dtype of what was saved
                by its key (None for values). Each rank reads what it holds, in pieces of 256 KiB, which are verified. Values
                are put into dicts and lists; what has a load_state_dict() is given its part.
            strict: as for load_into(): False passes over keys that only one of a checkpoint and its target has; not so once a
                damaged checkpoint has been passed over, whose parts these tensors may hold.
            fresh: return None rather than raise NotACheckpointError if all there is are step directories whose manifests are
                lost. They stay as they are, also if their steps are saved again.
            exclusive: for a job that will save into the directory: raise InUseError now if another one does. Takes nothing.
            progress: as for load(), of all files that this rank reads but those of a sharded state.

        Raises:
            CorruptError: there are checkpoints, but none is good; the message names each with its cause. With `step`: that one
                is not.
            NotACheckpointError: there is none of `step`; says which there are. Or there is no checkpoint, but step directories
                with files, whose manifests are lost, or have not arrived yet. Nothing of them will be removed. Or the directory
                was lost, and nodes have what was in it.
            InUseError: exclusive, and another job is saving into the directory; on all ranks.
            MismatchError: the newest good one does not fit its target on this rank; nothing of it has been written here, unless
                a module has refused it in its load_state_dict(), which the message says. The others have restored
                it; or, with `Options.replicated_readers="all"`, they raise PeerError.
            CheckpointError: the newest good one holds objects that weights_only refuses, or needs `merge`, or has no state of
                the kind that there is a target for; the target must not be used any more (a read that hangs may still
                write to it, or it holds parts that the chosen one does not fill); with `replicated_readers="all"`:
                torch.distributed is not initialised, has other ranks, or the ranks want different parts. Or each checkpoint was
                removed before it could be read, time and again.
            PeerError: a rank does not answer, or cannot load what all read together.
            DeviceError: the current stream of a CUDA device is being captured into a graph.
            ValueError: into and merge are both given, or step and fresh.
        """
        self._check_usable()
        self._restorer.begin()  # first: all ranks count their calls
        one = self._choose_step(step, fresh)
        targets = {"into": into, "replicated_into": replicated_into, "sharded_into": sharded_into}
        with Progress(progress) as watch:
            request = self._request(targets, map_location, weights_only, merge, strict)._replace(one=one, progress=watch)
            found = self._restorer.restore(self.directory, request, fresh=fresh, exclusive=exclusive)
        return found

    def _choose_step(self, step: int | None, fresh: bool) -> OneStep | None:
        if step is not None and fresh:
            raise ValueError("restore() takes step= or fresh=, not both: the former asks for a step, the latter needs none")
        return None if step is None else OneStep(step, self.directory)

    def _tell_if_tiers_are_left_out(self) -> None:
        if self._nodes is None and self.rank == 0 and is_home(self.directory):
            text = (
                "'%s' has been saved to by way of disks of nodes, and this Checkpointer is given no tiers=: what has not come "
                "home from there is left out"
            )
            self._directories.warn_once("no tiers", text, self.directory)

    def _request(
        self, targets: dict[str, Any], map_location: Any, weights_only: bool, merge: Any, strict: bool
    ) -> RestoreRequest:
        """When nothing reads or writes the targets any more."""
        self._tell_if_tiers_are_left_out()
        if targets["into"] is not None and merge is not None:
            raise ValueError("restore() takes into= or merge=, not both: what merge() returns is loaded to new memory")
        if self._nodes is None:
            self._drain(self.options.drain_timeout_s)
        elif not wait_landed(self._pending, NODE, self.options.drain_timeout_s):
            raise DeadlineError(f"saves of {self._what} have not landed after {self.options.drain_timeout_s} s")
        if any(target is not None for target in targets.values()):
            fence()
        return RestoreRequest(
            map_location,
            weights_only,
            merge,
            strict=strict,
            timeout_s=self.options.timeout_s,
            finder=self._entries,
            **targets,
        )

    def agree(self, key: str, value: bytes) -> bytes:
        """Rank 0's value, on every rank. Waits for rank 0, a round trip; no collective of the training is used.

        Args:
            key: names the question; a new one each time, the same on all ranks.

        Raises:
            PeerError: rank 0 does not answer within `Options.timeout_s`.
        """
        self._check_usable()
        return self._coordinator.broadcast(f"{self._stream}-agree/{key}", value, self.options.timeout_s)
