"""A step as a PublicationTarget: its files get names that no checkpoint uses, before the manifest lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt import _native
from ckpt.commit.conversation import Failure
from ckpt.commit.layout_exchange import LayoutExchange, by_file, layout_of
from ckpt.commit.replica_check import Replica, compare_shares, digest_of_replica, explain, replica_of, reply
from ckpt.commit.rounds import Ask
from ckpt.commit.shared_file import join_shares, share_of
from ckpt.commit.target import Choice, Prepared, SaveCall, SavedFile
from ckpt.directory import manifest as manifests
from ckpt.directory import sharded_files
from ckpt.directory.manifest import REPLICATED, SHARDED, SHARDED_CHECKSUMS, SHARDED_METADATA, FileEntry, Manifest
from ckpt.directory.step_names import names_in
from ckpt.directory.steps import StepDirectories
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.piece_sums import checksums_of
from ckpt.storage import durable


class StepTarget:
    """See the module. Rank 0 ends files that all ranks have written together, and gives them their names."""

    names_late = False
    spread = False
    node = ""

    def __init__(
        self,
        call: SaveCall,
        directories: StepDirectories,
        rank: int,
        world_size: int,
        layouts: LayoutExchange | None = None,
        metadata: Path | None = None,
    ) -> None:
        """
        Args:
            layouts: of a save with a sharded state.
            metadata: on rank 0, its file then.
        """
        self.call = call
        self.leads = rank == 0
        self._directories = directories
        self._rank = rank
        self._world_size = world_size
        self._layouts = layouts
        self._metadata = metadata
        self._before: Manifest | None = None  # what the step was until now

    # ---- every rank ------------------------------------------------------------------------------------------------

    def name_now(self, file: SavedFile) -> Sequence[FileEntry]:
        if not file.written or file.is_shared:
            return ()
        crc32 = file.file.job.crc32
        if file.kind != SHARDED:
            return (self._give_name(file, crc32, self._rank),)
        path, content = sharded_files.checksums_path(file.file.target), checksums_of(file.file)
        data = self._give_name(file, crc32, self._rank, {path: content})
        return data, _entry(path, content, SHARDED_CHECKSUMS, self._rank)

    def _give_name(
        self,
        file: SavedFile,
        crc32: int,
        rank: int = 0,
        beside: Mapping[Path, bytes] | None = None,
        shared: Mapping[str, Any] | None = None,
    ) -> FileEntry:
        self._directories.give_final_name(file.file.temporary, file.file.target, beside)
        shared = file.file.shared() if shared is None else shared
        return FileEntry(file.file.target.name, file.file.job.size, crc32, file.kind, rank, **shared)

    def describe(self, files: tuple[FileEntry, ...]) -> Prepared:
        layout = None
        if self._layouts is not None and (sharded := self._sharded()) is not None:
            layout = self._layouts.say(layout_of(sharded))
        if self._world_size == 1:
            return Prepared(files, layout=layout)
        shares = tuple(share_of(file.file) for file in self._shared())
        return Prepared(files, tuple(digest_of_replica(file.file) for file in self._replicated()), shares, layout)

    def reply(self, question: Mapping[str, Any]) -> str:
        if "layouts" in question:
            return "" if self._layouts is None else self._layouts.reply(question, self._rank)
        return reply(question, self._replica(question["number"]), self._rank)

    def undo(self, file: SavedFile, by_all: bool) -> None:
        if by_all:
            file.file.given_up = file.is_shared
        if file.written and (self._rank == 0 or not file.is_shared):
            self._directories.remove_unpublished(file.file.target)
        if file.kind == SHARDED:
            self._directories.remove_unpublished(sharded_files.checksums_path(file.file.target))
            if self._metadata is not None:
                self._directories.remove_unpublished(self._metadata)

    def path(self) -> Path:
        return self.call.directory

    # ---- rank 0 ----------------------------------------------------------------------------------------------------

    def choose(self, answers: Sequence[Prepared], ask: Ask) -> Choice | Failure:
        """All files; but only if what is replicated is the same on all ranks."""
        failure = self._find_differing(answers, ask)
        failure = failure or compare_shares([file.file for file in self._shared()], [answer.shares for answer in answers])
        if failure is not None:
            return failure
        self._before = manifests.read_if_any(self.call.directory)
        written = self._gather(answers)
        if isinstance(written, Failure):
            return written
        metadata = self._write_metadata(answers, ask)
        if isinstance(metadata, Failure):
            return metadata
        files = written + metadata + self._join_shares(answers)
        return Choice(files, self._directories.others_in(self.call.directory, files, self._before))

    def _gather(self, answers: Sequence[Prepared]) -> tuple[FileEntry, ...] | Failure:
        """What the ranks have written, each by itself."""
        astray = tuple(rank for rank, answer in enumerate(answers) if answer.node)
        if astray:
            return Failure(f"rank {astray[0]} saves by way of its node, and rank 0 straight to '{self.path().parent}'", astray)
        return tuple(file for answer in answers for file in answer.files)

    def _find_differing(self, answers: Sequence[Prepared], ask: Ask) -> Failure | None:
        """What must be the same on all ranks, and is not."""
        for number in range(max(len(answer.digests) for answer in answers)):
            digests = [answer.digests[number : number + 1] for answer in answers]
            differing = tuple(rank for rank, digest in enumerate(digests) if digest != digests[0])
            if differing:
                files = self._replicated()
                sharded = number < len(files) and files[number].kind == SHARDED
                return explain(self._replica(number), number, differing, ask, sharded)
        return None

    def _write_metadata(self, answers: Sequence[Prepared], ask: Ask) -> tuple[FileEntry, ...] | Failure:
        """Of the sharded state, if there is one: by what all ranks have written."""
        sharded, words = self._sharded(), [answer.layout for answer in answers]
        if self._layouts is None or self._metadata is None or sharded is None:
            return ()
        found = [word for word in words if word is not None]
        if len(found) != len(words):
            lacking = tuple(rank for rank, word in enumerate(words) if word is None)
            return Failure("not all ranks have given a sharded state", lacking)
        if sharded_files.foreign_metadata(names_in(self.call.directory), self._before):
            return Failure(f"'{self.call.directory}' holds a {sharded_files.METADATA} that is not of this checkpoint", (0,))
        layouts = self._layouts.complete(found, ask)
        if isinstance(layouts, Failure):
            return layouts
        files = by_file([answer.files for answer in answers], layouts)
        content = self._layouts.metadata.make(sharded.contents.description, *files, self.call.directory)
        self._directories.write_unpublished(self._metadata, content, "metadata")
        return (_entry(self._metadata, content, SHARDED_METADATA, 0),)

    def _join_shares(self, answers: Sequence[Prepared]) -> tuple[FileEntry, ...]:
        joined = []
        for number, file in enumerate(self._shared()):
            durable.crash_point("shares-written")
            said = [answer.shares[number] for answer in answers]
            crc32 = join_shares(file.file, said)
            shared = {"shared_bytes": sum(each.reused for each in said), "shared_step": max(each.step for each in said)}
            joined.append(self._give_name(file, crc32, shared=shared))
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

    def _sharded(self) -> FileInFlight | None:
        return next((file.file for file in self.call.files if file.kind == SHARDED and not file.apart), None)

    def _replicated(self) -> list[SavedFile]:
        """Files of which something must be the same on all ranks."""
        return [file for file in self.call.files if file.kind in (REPLICATED, SHARDED) and not file.apart]

    def _replica(self, number: int) -> Replica | None:
        """What explain() and reply() compare."""
        files = self._replicated()
        return replica_of(files[number].file) if number < len(files) else None


def _entry(path: Path, content: bytes, kind: str, rank: int) -> FileEntry:
    return FileEntry(path.name, len(content), _native.crc32(content), kind, rank)
