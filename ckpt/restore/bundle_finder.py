"""How the ranks choose a bundle: the one that `latest` names, or the newest that is good on all of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ckpt.directory import bundles
from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import FileEntry
from ckpt.errors import CheckpointError, CorruptError, NotACheckpointError
from ckpt.restore import file_readers, rewritten
from ckpt.restore.candidates import GONE, Candidate, CandidateVote, Objection, Seen
from ckpt.restore.known_damage import KnownDamage, same_damage
from ckpt.restore.near_bundles import NearBundles
from ckpt.restore.places import StepPlaces
from ckpt.storage import temporary_names

logger = logging.getLogger("ckpt")

Result = TypeVar("Result")
_UNVERIFIED = -1  # sequence of a directory that has no manifest


class BundleFinder:
    """Of one rank.

    Args:
        leads: whether this rank completes what a crash has left in the directory that it sees.
        timeout_s: longest that one file may take, seconds.
    """

    def __init__(self, rank: int, world_size: int, vote: CandidateVote, leads: bool, timeout_s: float) -> None:
        self._rank = rank
        self._world_size = world_size
        self._vote = vote
        self._leads = leads
        self._timeout_s = timeout_s
        self._near = NearBundles()
        self._found: tuple[Path, StepPlaces] | None = None

    def begin(self) -> None:
        """All ranks call it before each find()."""
        self._found = None
        self._vote.begin()

    def forget(self) -> None:
        """What was found may be another one now."""
        self._found = None

    def find(self, root: Path, name: str | None, reads: Callable[[str], bool] | None, near: NearBundles) -> str | None:
        """See BundleCheckpointer.find(). Nothing of this job is in flight.

        Args:
            near: copies on this node, of which files are read first.
        """
        self._near = near
        damage = KnownDamage()

        def verify(candidate: Candidate) -> Objection | None:
            if candidate.known_only:
                return self._same_damage(root / candidate.name, candidate.sequence, damage)
            return self._verify(root / candidate.name, candidate.sequence, reads, damage)

        def complete() -> None:
            bundles.complete_all(root, name or bundles.read_latest(root))

        def look() -> Seen:
            complete()
            return Seen(_candidates(root, name))

        if self._leads:
            complete()
        self._vote.meet()  # nobody looks at files that are just getting their names
        found, refusal = self._vote.lead(look, verify) if self._rank == 0 else self._vote.follow(verify)
        if found is not None:
            self._note_found(root / found.name)
            wanted = name or bundles.read_latest(root)
            if wanted is not None and found.name != wanted:
                logger.warning("'%s' is not a good checkpoint; '%s' is taken instead", root / wanted, found.name)
            return found.name
        if not refusal.causes:
            return None
        others = [directory.name for directory, _ in bundles.committed_in(root) if directory.name != name]
        published = f"; published there: {', '.join(others[:8])}" if name is not None and others else ""
        kind = CheckpointError if refusal.kind == GONE else CorruptError
        raise kind(f"no checkpoint to load from '{root}': {'; '.join(refusal.causes)}{published}")

    def read(self, path: Path, attempt: Callable[[Path], Result]) -> Result:
        """What `attempt` makes of a file of the bundle that was found last, from the nearest place where that is good."""
        if self._found is None or path.parent != self._found[0]:
            return attempt(path)
        return self._found[1].read(path.name, attempt)

    def _note_found(self, directory: Path) -> None:
        manifest = manifests.read_if_any(directory)
        if manifest is not None:
            places = self._near.places_of(directory, manifest)
            try:
                places.read_manifest(manifest.sequence)
            except file_readers.UNFIT:  # a living job has replaced it just now: what is there is read as it is
                return
            self._found = directory, places

    # ---- one candidate ---------------------------------------------------------------------------------------------

    def _verify(
        self, directory: Path, sequence: int, reads: Callable[[str], bool] | None, damage: KnownDamage
    ) -> Objection | None:
        if sequence == _UNVERIFIED:
            cause = _verify_foreign(directory)
            return None if cause is None else Objection(cause)
        unsettled = bundles.is_unsettled(directory)
        places = StepPlaces.at(directory)
        try:
            manifest = places.read_manifest(sequence)
            if self._near.one_node:  # else ranks of other nodes may read from home what lies on this one
                places = self._near.places_of(directory, manifest)
                places.read_manifest(sequence)
            for file in manifest.files:
                if file.rank % self._world_size == self._rank and (reads is None or reads(file.name)):
                    places.read(file.name, functools.partial(self._verify_file, file))
        except file_readers.UNFIT as error:
            damage.note(places.files, places.damage)
            gone = unsettled or not manifests.is_at(directory, sequence)
            return Objection(str(error) if gone else str(error) + rewritten.remedy_for(directory), gone)
        return None

    def _same_damage(self, directory: Path, sequence: int, damage: KnownDamage) -> Objection | None:
        manifest = manifests.read_if_any(directory)
        if manifest is None:
            return None
        return same_damage(damage, self._near.places_of(directory, manifest), sequence, self._timeout_s)

    def _verify_file(self, file: FileEntry, path: Path) -> None:
        file_readers.verify(path, file, self._timeout_s)


def _candidates(root: Path, name: str | None) -> list[Candidate]:
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


def _verify_foreign(directory: Path) -> str | None:
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
