"""A step as a PublicationTarget: its files get names that no checkpoint uses, before the manifest lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt.commit.conversation import Failure
from ckpt.commit.replica_check import Replica, compare_shares, digest_of_replica, explain, replica_of, reply
from ckpt.commit.rounds import Ask
from ckpt.commit.shared_file import join_shares, share_of
from ckpt.commit.target import Choice, Prepared, SaveCall, SavedFile
from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import REPLICATED, FileEntry, Manifest
from ckpt.directory.steps import StepDirectories
from ckpt.storage import durable


class StepTarget:
    """See the module. Rank 0 ends files that all ranks have written together, and gives them their names."""

    names_late = False
    node = ""

    def __init__(self, call: SaveCall, directories: StepDirectories, rank: int, world_size: int) -> None:
        self.call = call
        self.leads = rank == 0
        self._directories = directories
        self._rank = rank
        self._world_size = world_size
        self._before: Manifest | None = None  # what the step was until now

    # ---- every rank ------------------------------------------------------------------------------------------------

    def name_now(self, file: SavedFile) -> FileEntry | None:
        if not file.written or file.is_shared:
            return None
        return self._give_name(file, file.file.job.crc32, self._rank)

    def _give_name(self, file: SavedFile, crc32: int, rank: int = 0) -> FileEntry:
        self._directories.give_final_name(file.file.temporary, file.file.target)
        return FileEntry(file.file.target.name, file.file.job.size, crc32, file.kind, rank)

    def describe(self, files: tuple[FileEntry, ...]) -> Prepared:
        if self._world_size == 1:
            return Prepared(files)
        shares = tuple(share_of(file.file) for file in self._shared())
        return Prepared(files, tuple(digest_of_replica(file.file) for file in self._replicated()), shares)

    def reply(self, question: Mapping[str, Any]) -> str:
        return reply(question, self._replica(), self._rank)

    def undo(self, file: SavedFile, by_all: bool) -> None:
        if by_all:
            file.file.given_up = file.is_shared
        if file.written and (self._rank == 0 or not file.is_shared):
            self._directories.remove_unpublished(file.file.target)

    def path(self) -> Path:
        return self.call.directory

    # ---- rank 0 ----------------------------------------------------------------------------------------------------

    def choose(self, answers: Sequence[Prepared], ask: Ask) -> Choice | Failure:
        """All files; but only if what is replicated is the same on all ranks."""
        differing = tuple(rank for rank, answer in enumerate(answers) if answer.digests != answers[0].digests)
        if differing:
            return explain(self._replica(), differing, ask)
        failure = compare_shares([file.file for file in self._shared()], [answer.shares for answer in answers])
        if failure is not None:
            return failure
        self._before = manifests.read_if_any(self.call.directory)
        files = tuple(file for answer in answers for file in answer.files) + self._join_shares(answers)
        return Choice(files, self._directories.others_in(self.call.directory, files, self._before))

    def _join_shares(self, answers: Sequence[Prepared]) -> tuple[FileEntry, ...]:
        joined = []
        for number, file in enumerate(self._shared()):
            durable.crash_point("shares-written")
            crc32 = join_shares(file.file, [answer.shares[number] for answer in answers])
            joined.append(self._give_name(file, crc32))
        return tuple(joined)

    def take_sequence(self) -> int:
        return self._directories.take_sequence()

    def decide(self, manifest: Manifest) -> None:
        """Moves `latest`, too."""
        self._directories.publish(manifest, self.call.directory)

    def stands(self, manifest: Manifest, error: Exception) -> bool:
        return manifests.stands(manifest, self.call.directory)

    def tidy(self, manifest: Manifest) -> None:
        self._directories.tidy(self.call.directory, manifest, self._before)
        durable.crash_point("tidied")

    def point_latest(self) -> None:
        """It was moved with the manifest."""

    def name_after(self, files: Sequence[FileEntry]) -> None:
        """They have their names."""

    # ---- its files -------------------------------------------------------------------------------------------------

    def _shared(self) -> list[SavedFile]:
        return [file for file in self.call.files if file.is_shared]

    def _replicated(self) -> list[SavedFile]:
        return [file for file in self.call.files if file.kind == REPLICATED]

    def _replica(self) -> Replica | None:
        """What explain() and reply() compare."""
        return next((replica_of(file.file) for file in self._replicated()), None)
