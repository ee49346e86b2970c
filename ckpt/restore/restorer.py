"""Finding the newest checkpoint that every rank can read, and reading it.

The ranks choose it together, see candidates.py. What a rank is going to load is read, and checked on the way, while the ranks
choose: so its bytes are read once, and nothing is read after the choice, when the checkpoint may have been removed. It is
unpickled when the choice has been made. If there is a target, its tensors are filled while the ranks choose, and all else is
put there afterwards: see file_readers.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import RANK, REPLICATED, FileEntry, Manifest
from ckpt.directory.steps import StepDirectories
from ckpt.errors import (
    CheckpointError,
    CorruptError,
    DeadlineError,
    InUseError,
    NotACheckpointError,
    PeerError,
    StorageError,
)
from ckpt.loading.archive import TIMEOUT_S
from ckpt.restore import file_readers
from ckpt.restore.candidates import GONE, LOST, Candidate, CandidateVote, Objection, Refusal, Seen
from ckpt.restore.file_readers import InPlaceReader, LentMemoryReader, NewMemoryReader
from ckpt.restore.readiness import StartVote

logger = logging.getLogger("ckpt")


class _Pair(NamedTuple):
    step: int
    state: Any


class Restored(_Pair):
    """What restore() found: a pair of the step and the state as it was given to save(), this rank's own.

    Attributes:
        replicated: what was given as such; None if nothing was. Then `state` may be the one that is None.
    """

    replicated: Any

    def __new__(cls, step: int, state: Any, replicated: Any = None) -> Restored:
        self = super().__new__(cls, step, state)
        self.replicated = replicated
        return self


class RestoreRequest(NamedTuple):
    """How to load, as given to restore().

    `timeout_s`: longest that reading a file may take, seconds.
    """

    map_location: Any = None
    weights_only: bool = True
    merge: Callable[[list[Any]], Any] | None = None
    into: Any = None
    replicated_into: Any = None
    strict: bool = True
    timeout_s: float = TIMEOUT_S

    def target_of(self, file: FileEntry) -> Any:
        return self.replicated_into if file.kind == REPLICATED else self.into

    def place(self, path: Path, file: FileEntry, touched: bool, collective: bool) -> NewMemoryReader:
        """Beside its target.

        Args:
            touched: that holds parts of another checkpoint already.
            collective: all ranks read it together, so that reading it is a collective.
        """
        target = self.target_of(file)
        if target is None:
            return NewMemoryReader(path, file, self.map_location, self.weights_only, collective, self.timeout_s)
        if _lends(target):
            return LentMemoryReader(path, file, target, self.map_location, self.weights_only, collective, self.timeout_s)
        strict = self.strict or touched  # else what it lacks would keep the parts of the other
        return InPlaceReader(path, file, target, strict, self.weights_only, touched, collective, self.timeout_s)


def _lends(target: Any) -> bool:
    return callable(target) and not isinstance(target, torch.nn.Module)


class Restorer:
    """See the module."""

    def __init__(self, directories: StepDirectories, rank: int, world_size: int, vote: CandidateVote, collective: bool) -> None:
        self._directories = directories
        self._rank = rank
        self._world_size = world_size
        self._vote = vote
        self._collective = collective and world_size > 1
        # Of the candidate: what has been read, and found good; and why it cannot be loaded as asked, although it may be good.
        self._manifest: Manifest | None = None
        self._held: dict[Path, Callable[[], Any]] = {}
        self._refusal: Exception | None = None
        self._touched = False  # whether a target holds parts of a checkpoint
        self._owed: set[int] = set()  # addresses of lent tensors that hold parts of one
        self._lost: CheckpointError | None = None  # why targets must not be used any more, whatever is chosen

    def begin(self) -> None:
        """To be called first, on all ranks."""
        self._vote.begin()

    def restore(self, root: Path, request: RestoreRequest, *, fresh: bool = False, exclusive: bool = False) -> Restored | None:
        """See Checkpointer.restore()."""

        def verify(candidate: Candidate) -> Objection | None:
            return self._verify(root / candidate.name, candidate, request)

        self._touched, self._owed, self._lost = False, set(), None
        try:
            if self._rank == 0:
                if exclusive:
                    self._refuse_a_second_job(request.timeout_s)
                found, refusal = self._vote.lead(lambda: self._look(fresh), verify)
            else:
                found, refusal = self._vote.follow(verify)
            if found is not None:
                return self._load(root / found.name, request)
            if refusal.causes:
                raise self._nothing_good(root, refusal)
            return None
        finally:
            self._held, self._refusal, self._manifest = {}, None, None

    def _refuse_a_second_job(self, timeout_s: float) -> None:
        try:
            self._directories.expect_no_other(timeout_s)
        except InUseError as error:
            self._vote.refuse(str(error))
            raise

    def _look(self, fresh: bool) -> Seen:
        found = self._directories.look()
        for error in found.damaged:
            self._directories.warn_once(str(error), "a damaged checkpoint is passed over: %s", error)
        lost = self._directories.lost(found)
        candidates = [self._candidate(directory, manifest) for directory, manifest in found.checkpoints]
        return Seen(candidates, [str(error) for error in found.damaged], "" if fresh else lost)

    def _nothing_good(self, root: Path, refusal: Refusal) -> CheckpointError:
        text = "; ".join(refusal.causes)
        after = ". What was to be loaded into holds parts of them now" if self._touched else ""
        after += f". {self._lost}" if self._lost else ""
        if refusal.kind == LOST:
            return NotACheckpointError(text)
        if refusal.kind == GONE:
            return CheckpointError(text + after)
        return CorruptError(f"no checkpoint in '{root}' is good: {text}{after}")

    def _candidate(self, directory: Path, manifest: Manifest) -> Candidate:
        collective = self._collective and any(file.kind == REPLICATED for file in manifest.files)
        return Candidate(directory.name, manifest.sequence, collective)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _verify(self, directory: Path, candidate: Candidate, request: RestoreRequest) -> Objection | None:
        """Checks the files that this rank is to load, and its share of those that nobody loads; says what is wrong.

        Nothing is written to a target before all targets have been found to fit.
        """
        self._held, self._refusal = {}, None  # before there is memory for the next
        beside: dict[Path, NewMemoryReader] = {}
        start_vote = StartVote(self._rank, self._world_size if candidate.collective else 1)

        def check(directory: Path, manifest: Manifest, file: FileEntry) -> None:
            path = directory / file.name
            if self._will_load(manifest, file, request):
                beside[path] = request.place(path, file, self._touched, candidate.collective and file.kind == REPLICATED)
                if not self._is_mine(file):  # of a merge, which may have more files than can be open at a time
                    self._fill({path: beside[path]})
            elif self._is_mine(file):
                file_readers.verify(path, file, request.timeout_s)

        def finish(manifest: Manifest) -> None:
            refusal: Exception | None = self._lost or self._why_not_filled(directory, beside)
            refusal = refusal or next((each.refusal for each in beside.values() if each.refusal), None)
            refusal = refusal or self._why_not(directory, manifest, request)
            others = start_vote.cast(refusal)
            self._manifest, self._refusal = manifest, refusal or others
            self._fill({path: each for path, each in beside.items() if path not in self._held})

        try:
            cause = verify_files(directory, candidate.sequence, check, finish)
        except Exception as error:
            start_vote.cast(error)
            raise
        start_vote.cast(cause)
        return None if cause is None else Objection(cause, not manifests.is_at(directory, candidate.sequence))

    def _fill(self, beside: dict[Path, NewMemoryReader]) -> None:
        # What all read together comes first: nothing may fail on this rank alone before that.
        for path, each in sorted(beside.items(), key=lambda item: not item[1].collective):
            if self._refusal:
                each.check()
                continue
            self._touched |= each.has_target
            self._owed |= each.lent()
            try:
                each.fill()
            except DeadlineError as error:
                if not each.has_target:
                    raise
                self._lost = self._refusal = CheckpointError(
                    f"{error}. A read that hangs may still write to what was to be loaded into, at any time: make that anew"
                )
                continue
            self._refusal = each.refusal
            self._held[path] = each.take

    def _why_not_filled(self, directory: Path, beside: dict[Path, NewMemoryReader]) -> CheckpointError | None:
        """Whether memory that was lent to a checkpoint that was passed over is not filled by this one."""
        left = self._owed.difference(*(each.lent() for each in beside.values()))
        if not left:
            return None
        return CheckpointError(
            f"'{directory}' has nothing for {len(left)} tensors that hold parts of a damaged checkpoint now, which was passed "
            "over: make what is to be loaded into anew"
        )

    def _why_not(self, directory: Path, manifest: Manifest, request: RestoreRequest) -> CheckpointError | None:
        """What the checkpoint has not that is asked for."""
        own = [file.rank for file in manifest.files if file.kind == RANK]
        common = any(file.kind == REPLICATED for file in manifest.files)
        if own and manifest.world_size != self._world_size and request.merge is None:
            return CheckpointError(
                f"'{directory}' was saved by {manifest.world_size} ranks, which gave states of their own, and this job has "
                f"{self._world_size} of them: pass restore(merge=...) to make one state of all, or resume with as "
                "many ranks"
            )
        has = ["a replicated state"] * common + [f"a state of rank {rank} for itself" for rank in sorted(own)[:1]]
        has += [f"those of {len(own) - 1} more ranks"] * (len(own) > 1)
        for name, target, found in (
            ("into", request.into, self._rank in own),
            ("replicated_into", request.replicated_into, common),
        ):
            if target is not None and not found and not _lends(target):
                what = " and ".join(has) or "no state at all"
                return CheckpointError(f"'{directory}' has nothing for {name}= on rank {self._rank}; it has {what}")
        return None

    def _will_load(self, manifest: Manifest, file: FileEntry, request: RestoreRequest) -> bool:
        if file.kind == REPLICATED:
            return True
        if manifest.world_size == self._world_size:
            return file.rank == self._rank
        return request.merge is not None

    def _is_mine(self, file: FileEntry) -> bool:
        if file.kind == REPLICATED:
            return True  # as every rank loads it
        return file.rank % self._world_size == self._rank

    def _load(self, directory: Path, request: RestoreRequest) -> Restored:
        if self._refusal is not None:
            raise self._refusal
        manifest = self._manifest
        assert manifest is not None

        def load(file: FileEntry) -> Any:
            return self._held.pop(directory / file.name)()

        own = sorted((file for file in manifest.files if file.kind == RANK), key=lambda file: file.rank)
        replicated = [load(file) for file in manifest.files if file.kind == REPLICATED]
        state = None
        if own and manifest.world_size == self._world_size:
            state = next((load(file) for file in own if file.rank == self._rank), None)
        elif own and request.merge is not None:
            state = request.merge([load(file) for file in own])
        return Restored(manifest.step, state, replicated[0] if replicated else None)


def verify_files(
    directory: Path,
    sequence: int,
    check: Callable[[Path, Manifest, FileEntry], None],
    finish: Callable[[Manifest], None] | None = None,
) -> str | None:
    """Compares files with their manifest; says what is wrong.

    Args:
        check: called for each file; looks at it, if that is this rank's business.
        finish: called after that.
    """
    try:
        manifest = manifests.read(directory)
        if manifest.sequence != sequence:
            return f"'{directory}' is another checkpoint than on rank 0: all ranks must see the same directory"
        for file in manifest.files:
            check(directory, manifest, file)
        if finish is not None:
            finish(manifest)
    except (NotACheckpointError, CorruptError, StorageError, DeadlineError) as error:
        return str(error)
    except PeerError as error:
        if not error.ranks:  # the ranks have lost each other
            raise
        return str(error)
    return None
