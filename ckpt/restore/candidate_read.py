"""A candidate on one rank. All ranks go through these phases in step, for one candidate after the other:

    open    local       opens the files that this rank loads, and checks those that nobody loads; touches no target
    agree   collective  of all ranks, where they read a file together: each says whether it can begin, see readiness.py
    read    collective  first, for the file that all read together, see shared_read.py
            local       then, for what else this rank loads

A rank that fails in the first phase takes part in the second all the same, because the others wait for it there; then nobody
reads together. Where there is no such file, none of this is a collective.

These collectives are of torch.distributed. What the ranks say of the candidate afterwards goes through the coordinator: see
candidates.py.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckpt.directory.frozen_files import companion_of
from ckpt.directory.manifest import FROZEN, RANK, REPLICATED, SHARDED_METADATA, FileEntry, Manifest
from ckpt.errors import CheckpointError, CorruptError, DeadlineError, MismatchError, PeerError, StorageError
from ckpt.loading.archive import Archive
from ckpt.restore import file_readers
from ckpt.restore.candidates import Candidate, Objection
from ckpt.restore.file_readers import UNFIT, NewMemoryReader
from ckpt.restore.places import StepPlaces
from ckpt.restore.process_group import RankGroup
from ckpt.restore.readiness import StartVote
from ckpt.restore.request import Restored, RestoreRequest, lends
from ckpt.restore.sharded_reader import ShardedReader

logger = logging.getLogger("ckpt")


@dataclasses.dataclass
class TargetState:
    """What the targets of a restore hold, of any candidate up to now.

    Attributes:
        touched: whether one holds parts of a checkpoint.
        owed: addresses of lent tensors that hold parts of one.
        lost: why targets must not be used any more, whatever is chosen.
    """

    touched: bool = False
    owed: set[int] = dataclasses.field(default_factory=set)
    lost: CheckpointError | None = None


class CandidateRead:
    """See the module.

    Args:
        places: of the candidate.
        targets: of this restore; what reading does to them is noted there.
    """

    def __init__(
        self,
        places: StepPlaces,
        candidate: Candidate,
        request: RestoreRequest,
        targets: TargetState,
        rank: int,
        world_size: int,
    ) -> None:
        self._places = places
        self._candidate = candidate
        self._request = request
        self._targets = targets
        self._touched = targets.touched  # by another candidate
        self._rank = rank
        self._world_size = world_size
        self._manifest: Manifest | None = None
        self._readers: dict[str, NewMemoryReader] = {}
        self._held: dict[str, Callable[[], Any]] = {}  # what has been read, and found good
        self._sharded: ShardedReader | None = None
        self._refusal: Exception | None = None  # why it cannot be loaded as asked, although it may be good

    def examine(self) -> Objection | None:
        """Goes through the phases; says what is wrong. All ranks call it for the same candidate."""
        failure = _failure_of(self._open)
        try:
            self._agree(failure)
            if failure is None:
                failure = _failure_of(self._read)
            if failure is None:
                return None
            if not _speaks_against_candidate(failure):
                raise failure
            return Objection(str(failure), not self._places.hold(self._candidate.sequence))
        finally:
            del failure  # its frames would keep memory alive, and themselves
            self._readers = {}

    def take(self) -> Restored:
        """What has been read, once all ranks have found the candidate good. Local."""
        if self._refusal is not None:
            raise self._refusal
        manifest = self._manifest
        assert manifest is not None

        def load(file: FileEntry) -> Any:
            return self._held.pop(file.name)()

        own = sorted((file for file in manifest.files if file.kind == RANK), key=lambda file: file.rank)
        replicated = [load(file) for file in manifest.files if file.kind == REPLICATED]
        state = None
        if own and manifest.world_size == self._world_size:
            state = next((load(file) for file in own if file.rank == self._rank), None)
        elif own and self._request.merge is not None:
            state = self._request.merge([load(file) for file in own])
        sharded = None if self._sharded is None else self._sharded.take()
        if self._sharded is None and self._rank == 0 and _is_sharded(manifest):
            logger.warning(
                "'%s' has a sharded state, which is left out: restore(sharded_into=state) fills one of the same keys, such as "
                "torch.distributed.checkpoint.state_dict.get_state_dict() gives",
                self._places,
            )
        return Restored(manifest.step, state, replicated[0] if replicated else None, sharded, self._places.sources)

    # ---- the phases ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Local. Finds out what keeps this rank from loading the candidate, before it writes to any of its targets."""
        self._manifest = manifest = self._places.read_manifest(self._candidate.sequence, self._candidate.identity)
        self._sharded = self._request.sharded_reader(self._places, manifest, self._targets.touched)
        self._request.progress.begin(sum(file.bytes for file in manifest.files if self._is_read(manifest, file)))
        for file in manifest.files:
            if self._sharded is not None and file.kind not in (RANK, REPLICATED, FROZEN):
                continue  # what is needed of it is read, and verified then
            if self._will_load(manifest, file):
                reader = self._readers[file.name] = self._open_file(file, self._targets.touched)
                if not self._is_mine(file):  # of a merge, which may have more files than can be open at a time
                    self._read_file(file, reader)
            elif self._is_mine(file) and not self._comes_along(manifest, file):
                self._places.read(file.name, functools.partial(self._verify, file))
        refusal: Exception | None = self._targets.lost or self._why_not_filled(self._targets.owed - self._lent())
        refusal = refusal or next((each.refusal for each in self._readers.values() if each.refusal), None)
        refusal = refusal or (None if self._sharded is None else self._sharded.refusal)
        self._refusal = self._with_hint(refusal, manifest) or self._why_not_there(manifest)

    def _agree(self, failure: Exception | None) -> None:
        """A collective, where ranks read a file together: they all begin to, or none does.

        Args:
            failure: of the phase before, on this rank.
        """
        if not self._candidate.collective:
            return
        others = StartVote(self._rank, self._world_size).cast(failure or self._refusal)
        self._refusal = self._refusal or others

    def _read(self) -> None:
        """A collective first, where ranks read a file together and nobody has refused; the rest is local.

        That comes first because nothing may fail on this rank alone before it.
        """
        assert self._manifest is not None
        left = [file for file in self._manifest.files if file.name in self._readers and file.name not in self._held]
        for file in sorted(left, key=lambda file: not self._readers[file.name].collective):
            self._read_file(file, self._readers[file.name])
        if self._sharded is not None and not self._refusal:
            self._targets.touched = True
            try:
                self._sharded.fill()
            except DeadlineError as error:
                self._give_target_up(error)

    # ---- files -----------------------------------------------------------------------------------------------------

    def _open_file(self, file: FileEntry, touched: bool) -> NewMemoryReader:
        collective = self._candidate.collective and file.kind == REPLICATED

        def open_at(path: Path) -> NewMemoryReader:
            return self._request.reader_of(path, file, touched, collective, self._beside)

        if (frozen := self._frozen_of(file)) is not None:  # from the nearest place where it can be opened
            self._places.read(frozen.name, lambda path: Archive(path, self._request.timeout_s).close())
        return self._places.read(file.name, open_at)

    def _frozen_of(self, file: FileEntry) -> FileEntry | None:
        return None if self._manifest is None else companion_of(self._manifest, file)

    def _beside(self, name: str) -> tuple[Path, FileEntry | None]:
        """See Archive."""
        files = () if self._manifest is None else self._manifest.files
        entry = next((file for file in files if file.kind == FROZEN and file.name == name), None)
        return self._places.path_of(name), entry

    def _verify(self, file: FileEntry, path: Path) -> None:
        with self._request.progress.reading(file.bytes):
            file_readers.verify(path, file, self._request.timeout_s)

    def _read_file(self, file: FileEntry, reader: NewMemoryReader) -> None:
        """For its checksums alone, and then never a collective, if there has been a refusal.

        From the next place if it is damaged in one. A target that it has touched is then filled again.
        """
        try:
            with self._request.progress.reading(reader.archive.all_bytes, reader.archive.counter()):
                together = reader.collective and not self._refusal
                reader = self._read_together(file, reader) if together else self._read_alone(file, reader)
        except DeadlineError as error:
            if not self._readers[file.name].has_target or self._refusal:
                raise
            self._give_target_up(error)
            return
        if not self._refusal:
            self._refusal = reader.refusal
            self._held[file.name] = reader.take

    def _read_alone(self, file: FileEntry, reader: NewMemoryReader) -> NewMemoryReader:
        while True:
            try:
                if self._refusal:
                    reader.check()
                else:
                    self._fill(reader)
                return reader
            except (CorruptError, StorageError) as error:
                if not self._places.pass_over(self._damaged(file, reader), error):
                    raise
            reader = self._open_again(file, reader)

    def _damaged(self, file: FileEntry, reader: NewMemoryReader) -> str:
        """Which file it was that could not be read."""
        frozen = self._frozen_of(file)
        failed = frozen is not None and reader.archive.frozen is not None and reader.archive.frozen.failed
        return frozen.name if frozen is not None and failed else file.name

    def _fill(self, reader: NewMemoryReader) -> None:
        self._targets.touched |= reader.has_target
        self._targets.owed |= reader.lent()
        reader.fill()

    def _open_again(self, file: FileEntry, before: NewMemoryReader) -> NewMemoryReader:
        """From another place. What the one before has filled is filled again, if both have the same parts."""
        found = self._open_file(file, self._touched)
        if found.directory_crc32 != before.directory_crc32:
            found = self._open_file(file, self._targets.touched)
        self._readers[file.name] = found
        self._refusal = self._refusal or found.refusal or self._why_not_filled(before.lent() - found.lent())
        return found

    def _read_together(self, file: FileEntry, reader: NewMemoryReader) -> NewMemoryReader:
        """A collective. If it fails, whose copy is damaged reads its share from another place, and all begin again."""
        while True:
            failure = _failure_of(functools.partial(self._fill, reader))
            if failure is not None:
                self._places.damage.append((file.name, failure))
            if not self._candidate.nearest or (isinstance(failure, PeerError) and not failure.ranks):
                if failure is not None:
                    raise failure
                return reader
            group, fatal = RankGroup(), failure is not None and not _speaks_against_candidate(failure)
            answers = group.gather({"failed": failure is not None, "fatal": fatal})
            if not any(said["failed"] for said in answers):
                return reader
            if any(said["fatal"] for said in answers):
                ranks = [rank for rank, said in enumerate(answers) if said["fatal"]]
                raise failure or PeerError(f"rank {ranks[0]} cannot load what all ranks read together", ranks)
            moved, obstacle = False, None
            try:
                moved = self._moves(file)
                reader = self._open_again(file, reader)
                obstacle = self._refusal
            except (CorruptError, StorageError, DeadlineError) as error:
                obstacle = error
            answers = group.gather({"moved": moved, "obstacle": obstacle is not None})
            if not any(said["moved"] for said in answers) or any(said["obstacle"] for said in answers):
                ranks = [rank for rank, said in enumerate(answers) if said["obstacle"]]
                text = f"'{self._places}' has a damaged '{file.name}', and there is no other one"
                raise failure or obstacle or PeerError(text, ranks or [0])

    def _moves(self, file: FileEntry) -> bool:
        """To another place, if this rank's copy is damaged."""
        try:
            file_readers.verify(self._places.path_of(file.name), file, self._request.timeout_s)
            return False
        except (CorruptError, StorageError) as error:
            return self._places.pass_over(file.name, error)

    def _give_target_up(self, error: DeadlineError) -> None:
        self._targets.lost = self._refusal = CheckpointError(
            f"{error}. A read that hangs may still write to what was to be loaded into, at any time: make that anew"
        )

    def _will_load(self, manifest: Manifest, file: FileEntry) -> bool:
        if file.kind == REPLICATED:
            return True
        if file.kind != RANK:
            return False  # of a sharded state; what is frozen comes along with a file
        if manifest.world_size == self._world_size:
            return file.rank == self._rank
        return self._request.merge is not None

    def _is_read(self, manifest: Manifest, file: FileEntry) -> bool:
        """From its beginning to its end."""
        is_sharded = self._sharded is not None and file.kind not in (RANK, REPLICATED, FROZEN)
        return not is_sharded and (self._comes_along(manifest, file) or self._will_load(manifest, file) or self._is_mine(file))

    def _comes_along(self, manifest: Manifest, file: FileEntry) -> bool:
        """Whether it is read together with another one that this rank loads."""
        return any(companion_of(manifest, other) == file for other in manifest.files if self._will_load(manifest, other))

    def _is_mine(self, file: FileEntry) -> bool:
        if file.kind == REPLICATED:
            return True  # as every rank loads it
        return file.rank % self._world_size == self._rank

    def _with_hint(self, refusal: Exception | None, manifest: Manifest) -> Exception | None:
        """The same; if a target does not fit, with the other state that the checkpoint has, and that has no target."""
        common, own = _has_common(manifest), any(file.rank == self._rank for file in manifest.files if file.kind == RANK)
        hint = ""
        if common and self._request.replicated_into is None:
            hint = "has a replicated state, too, which replicated_into= takes: it is what save(replicated=) was given; of a "
            hint += "CheckpointCallback that is model, optimizer, scheduler, scaler and extra"
        elif own and self._request.into is None:
            hint = f"has a state of rank {self._rank} for itself, too, which into= takes: it is what save(state) was given"
        if not isinstance(refusal, MismatchError) or not hint:
            return refusal
        return MismatchError(f"{refusal}. '{self._places}' {hint}", refusal.problems)

    def _lent(self) -> set[int]:
        return set().union(*(each.lent() for each in self._readers.values()))

    def _why_not_filled(self, left: set[int]) -> CheckpointError | None:
        """Whether memory that was lent to a checkpoint that was passed over is not filled by this one."""
        if not left:
            return None
        return CheckpointError(
            f"'{self._places}' has nothing for {len(left)} tensors that hold parts of a damaged checkpoint now, which was "
            "passed over: make what is to be loaded into anew"
        )

    def _why_not_there(self, manifest: Manifest) -> CheckpointError | None:
        """Whether the checkpoint lacks what is asked for."""
        own = [file.rank for file in manifest.files if file.kind == RANK]
        common = _has_common(manifest)
        if own and manifest.world_size != self._world_size and self._request.merge is None:
            return CheckpointError(
                f"'{self._places}' was saved by {manifest.world_size} ranks, which gave states of their own, and this job "
                f"has {self._world_size} of them: pass restore(merge=...) to make one state of all, or resume with as "
                "many ranks. What is given to save(sharded=...), as DTensors are, needs neither"
            )
        has = ["a replicated state, which replicated_into= takes"] * common
        has += [f"a state of rank {rank} for itself, which into= takes" for rank in sorted(own)[:1]]
        has += [f"those of {len(own) - 1} more ranks"] * (len(own) > 1)
        has += ["a sharded state, which sharded_into= takes"] * _is_sharded(manifest)
        for name, target, found in (
            ("into", self._request.into, self._rank in own),
            ("replicated_into", self._request.replicated_into, common),
        ):
            if target is not None and not found and not lends(target):
                what = " and ".join(has) or "no state at all"
                return CheckpointError(f"'{self._places}' has nothing for {name}= on rank {self._rank}; it has {what}")
        return None


def _has_common(manifest: Manifest) -> bool:
    return any(file.kind == REPLICATED for file in manifest.files)


def _is_sharded(manifest: Manifest) -> bool:
    return any(file.kind == SHARDED_METADATA for file in manifest.files)


def _failure_of(phase: Callable[[], None]) -> Exception | None:
    try:
        phase()
    except Exception as error:
        return error.with_traceback(None) if _speaks_against_candidate(error) else error
    return None


def _speaks_against_candidate(error: Exception) -> bool:
    """Else it ends the restore. A PeerError that names no ranks says that the ranks have lost each other."""
    return isinstance(error, UNFIT) or (isinstance(error, PeerError) and bool(error.ranks))
