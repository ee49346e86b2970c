"""Finding the newest checkpoint that every rank can read, and reading it. All ranks do this in step:

    name                  rank 0 names a candidate to the others, see candidates.py
    open, agree, read     each rank, see candidate_read.py: which of this is a collective is said there
    vote                  each tells rank 0 what is wrong with the candidate: if nothing is, it is chosen, else the next comes
    take                  each rank by itself, after the choice

What a rank is going to load is read, and checked on the way, while the ranks choose: so its bytes are read once, and nothing is
read after the choice, when the checkpoint may have been removed. It is unpickled when the choice has been made. If there is a
target, its tensors are filled while the ranks choose, and all else is put there afterwards: see file_readers.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import REPLICATED, Manifest
from ckpt.directory.steps import StepDirectories
from ckpt.errors import CheckpointError, CorruptError, InUseError, NotACheckpointError
from ckpt.metrics.events import restore_fields
from ckpt.metrics.noting import RestoreFigures, note_restore, tier_of
from ckpt.restore.candidate_read import CandidateRead, TargetState
from ckpt.restore.candidates import GONE, LOST, Candidate, CandidateVote, Objection, Refusal, Seen
from ckpt.restore.known_damage import KnownDamage, same_damage
from ckpt.restore.nearby import Nearby, NearCopy
from ckpt.restore.one_step import OneStep
from ckpt.restore.places import HOME, NODE, DirectoryPlace, FetchedPlace, Place, StepPlaces
from ckpt.restore.remote_copies import RemoteCopies, with_remote
from ckpt.restore.request import Restored, RestoreRequest

logger = logging.getLogger("ckpt")


class Restorer:
    """See the module."""

    def __init__(
        self,
        directories: StepDirectories,
        rank: int,
        world_size: int,
        vote: CandidateVote,
        collective: bool,
        nearby: Nearby | None = None,
        remote: RemoteCopies | None = None,
    ) -> None:
        """
        Args:
            nearby: what lies on the nodes; None: nothing.
            remote: what lies in an object store; None: nothing.
        """
        self._nearby = nearby
        self._remote = remote
        self._directories = directories
        self._rank = rank
        self._world_size = world_size
        self._vote = vote
        self._collective = collective and world_size > 1
        self._targets = TargetState()
        self._read: CandidateRead | None = None  # of the candidate that was named last

    def begin(self) -> None:
        """To be called first, on all ranks."""
        self._vote.begin()

    def restore(self, root: Path, request: RestoreRequest, *, fresh: bool = False, exclusive: bool = False) -> Restored | None:
        """See Checkpointer.restore()."""
        figures, began = RestoreFigures(), time.monotonic()
        error: BaseException | None = None
        try:
            return self._restore(root, request, figures, fresh, exclusive)
        except BaseException as caught:
            error = caught
            raise
        finally:
            figures.total_s = time.monotonic() - began
            self._tell(figures, error)
            del error  # whose frames hold the targets

    def _tell(self, figures: RestoreFigures, error: BaseException | None) -> None:
        note_restore(figures, error is not None)
        note = self._directories.note
        for tier, name, cause in figures.failures:
            note("verify", tier=tier, file=name, outcome="damaged", problem=cause)
        note("restore", **restore_fields(figures, error))

    def _restore(
        self, root: Path, request: RestoreRequest, figures: RestoreFigures, fresh: bool, exclusive: bool
    ) -> Restored | None:
        damage = KnownDamage()

        def verify(candidate: Candidate) -> Objection | None:
            if candidate.known_only:
                objection = same_damage(damage, self._places_of(root, candidate), candidate.sequence, request.timeout_s)
                if objection is not None and not objection.gone:
                    figures.tried.add((candidate.name, candidate.sequence))
                    figures.failures.append((HOME, candidate.name, objection.cause))
                return objection
            self._read = None  # before there is memory for the next
            if one is not None:
                one.expect(candidate)
                if self._rank == 0:  # before any drain may find that nobody wants it
                    self._directories.back.try_commit(candidate.sequence)
            if candidate.nearest and self._nearby is not None:
                self._nearby.finalise(candidate)
            places = self._places_of(root, candidate)
            self._read = CandidateRead(places, candidate, request, self._targets, self._rank, self._world_size)
            try:
                return self._examine(self._read, candidate, places, figures)
            finally:
                damage.note(places.files, places.damage)

        one = request.one
        gone_back_to: int | None = None
        self._targets = TargetState()
        try:
            if self._nearby is not None:
                self._nearby.look(None if one is None else one.step)
            if self._rank == 0:
                if exclusive:
                    self._refuse_a_second_job(request.timeout_s)
                found, refusal = self._vote.lead(lambda: self._look(fresh, one), verify)
            else:
                found, refusal = self._vote.follow(verify)
            if found is not None:
                assert self._read is not None
                self._tell_of_newer(found, one)
                began = time.monotonic()
                restored = self._read.take()
                figures.load_s = time.monotonic() - began
                figures.note_found(found.name, restored.step, found.sequence)
                logger.info("'%s' is restored: %s", found.name, _told(restored.sources))
                gone_back_to = None if one is None or self._rank != 0 else found.sequence
                return restored
            if refusal.causes:
                raise self._nothing_good(root, refusal, one)
            if one is not None:
                raise CheckpointError(f"rank 0 was not asked for step {one.step}: give restore() the same step= on all ranks")
            return None
        finally:
            self._read = None
            self._directories.damaged.update(self._vote.rejected)
            self._directories.back.settle(gone_back_to)
            if self._nearby is not None:
                self._nearby.end()
            if self._remote is not None:
                self._remote.end()

    def _examine(
        self, read: CandidateRead, candidate: Candidate, places: StepPlaces, figures: RestoreFigures
    ) -> Objection | None:
        began, objection = time.monotonic(), None
        known = (candidate.name, candidate.sequence) in figures.tried  # to be damaged
        try:
            objection = read.examine()
        finally:
            figures.read_s += time.monotonic() - began
            figures.read_bytes = places.read_bytes()
            figures.failures += [] if known else places.failures
        if objection is None or not objection.gone:
            figures.tried.add((candidate.name, candidate.sequence))
            if objection is not None and not places.failures and not known:
                figures.failures.append((tier_of(next(iter(places.sources.values()), HOME)), candidate.name, objection.cause))
        return objection

    def _tell_of_newer(self, found: Candidate, one: OneStep | None) -> None:
        """On rank 0: what other ranks have saved, or what is not whole; or what is not wanted."""
        if one is not None:
            if text := one.say_newer(found):
                logger.warning("%s", text)
        elif self._rank == 0 and self._nearby is not None and self._nearby.newest > found.sequence:
            logger.warning(
                "'%s' was restored, but disks of nodes hold a newer checkpoint, which this job cannot read there: it was "
                "saved by another number of ranks, or lies on other nodes, too. To resume from it, end this job before it "
                "saves, bring it home with `python -m ckpt drain --once` on each node that has a part, and start again",
                found.name,
            )

    def _places_of(self, root: Path, candidate: Candidate) -> StepPlaces:
        """Where this rank reads it."""
        home = root / candidate.name
        if not candidate.nearest:
            return StepPlaces.at(home)
        places = [] if self._nearby is None else self._near_places(self._nearby, candidate)
        there = manifests.read_if_any(home)
        if there is not None and manifests.identity(there) == candidate.identity:
            places.append(DirectoryPlace(home, HOME))
        if candidate.remote and self._remote is not None:
            places.append(self._remote.place_of(candidate))
        near = None if self._nearby is None else self._nearby.directory_of(candidate)
        return StepPlaces(places, near or home)

    def _near_places(self, nearby: Nearby, candidate: Candidate) -> list[Place]:
        places: list[Place] = []
        near, fetch = nearby.directory_of(candidate), nearby.fetch_of(candidate)
        if near is not None:
            places.append(DirectoryPlace(near, NODE))
        elif (unfinished := nearby.unfinished_of(candidate)) is not None:
            places.append(DirectoryPlace(unfinished, NODE, finished=False))
        if fetch is not None:
            places.append(FetchedPlace(fetch))
        return places

    def _refuse_a_second_job(self, timeout_s: float) -> None:
        try:
            self._directories.expect_no_other(timeout_s)
        except InUseError as error:
            self._vote.refuse(str(error))
            raise

    def _look(self, fresh: bool, one: OneStep | None) -> Seen:
        seen = self._look_at_all(fresh)
        return seen if one is None else one.among(seen)

    def _look_at_all(self, fresh: bool) -> Seen:
        found = self._directories.look_for_restore()
        for error in found.damaged:
            self._directories.warn_once(str(error), "a damaged checkpoint is passed over: %s", error)
        rejected = [str(error) for error in found.damaged]
        lost = self._directories.lost(found)
        lost = "" if fresh else lost
        candidates = [self._candidate(directory, manifest) for directory, manifest in found.checkpoints]
        at_home = {manifest.sequence: manifests.identity(manifest) for _, manifest in found.checkpoints}
        if self._nearby is not None:
            self._directories.note_seen(self._nearby.newest)
            candidates = self._with_nearby(candidates, at_home, self._nearby.copies)
        if self._nearby is not None and self._nearby.lost:
            lost = self._nearby.lost
            if not candidates:  # what the store has may be older than what the nodes have
                return Seen([], rejected, lost if self._remote is None else lost + self._remote.mention())
            self._directories.warn_once("lost home", "what the nodes have is left out: %s", lost)
        if self._remote is not None:
            copies, damaged = self._remote.look(candidates[0].name if candidates else "")
            rejected += damaged
            self._directories.note_seen(max((copy.sequence for copy in copies), default=-1))
            candidates = with_remote(candidates, at_home, copies, self._collective)
        return Seen(candidates, rejected, lost)

    def _with_nearby(
        self, candidates: Sequence[Candidate], at_home: Mapping[int, str], copies: Sequence[NearCopy]
    ) -> list[Candidate]:
        """Newest commit first; what lies on nodes before the same at home. Of two commits with one number home's counts.

        Args:
            at_home: sequences, and their identities.
        """
        near = [
            Candidate(copy.name, copy.sequence, self._collective and copy.collective, True, copy.identity, copy.holders)
            for copy in copies
            if at_home.get(copy.sequence, "" if copy.missing else copy.identity) == copy.identity
        ]
        for copy in copies:
            if copy.missing and copy.sequence not in at_home:
                text = "checkpoint '%s' as it lies on the nodes is passed over: %d files of it are on none of them"
                self._directories.warn_once(f"{copy.name}/{copy.identity}", text, copy.name, copy.missing)
        return sorted([*near, *candidates], key=lambda candidate: candidate.sequence, reverse=True)

    def _nothing_good(self, root: Path, refusal: Refusal, one: OneStep | None) -> CheckpointError:
        text = "; ".join(refusal.causes)
        after = ". What was to be loaded into holds parts of them now" if self._targets.touched else ""
        after += f". {self._targets.lost}" if self._targets.lost else ""
        if refusal.kind == LOST:
            return NotACheckpointError(text)
        if refusal.kind == GONE:
            return CheckpointError(text + after)
        if one is not None:
            return CorruptError(
                f"the checkpoint of step {one.step} in '{root}' is not good: {text}{after}. `ckpt list '{root}'` says which "
                "others there are, and restore() without step= takes the newest that is good"
            )
        return CorruptError(
            f"no checkpoint in '{root}' is good: {text}{after}. `ckpt list '{root}'` says what lies there, and `ckpt verify` "
            "of a step what is damaged in it; a copy elsewhere, on nodes or in an object store, is read by a Checkpointer "
            "that is given their tiers="
        )

    def _candidate(self, directory: Path, manifest: Manifest) -> Candidate:
        collective = self._collective and any(file.kind == REPLICATED for file in manifest.files)
        return Candidate(directory.name, manifest.sequence, collective)


def _told(sources: Mapping[str, str]) -> str:
    """What was read from where."""
    places: dict[str, list[str]] = {}
    for name, source in sources.items():
        places.setdefault(source, []).append(name)
    return "; ".join(f"{', '.join(names)} from {source}" for source, names in places.items())
