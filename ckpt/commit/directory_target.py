"""A directory of a user's naming as a PublicationTarget: the rename of `.metadata` lets readers of torch find the checkpoint.

Data files have their own names by then, which no file there has had. So the checkpoint before is whole until that rename, and
its files go behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt import _native
from ckpt.commit.conversation import Failure
from ckpt.commit.layout_exchange import LayoutExchange, by_file, layout_of
from ckpt.commit.rounds import Ask
from ckpt.commit.target import Choice, Prepared, SaveCall, SavedFile
from ckpt.directory import dcp_directory
from ckpt.directory import manifest as manifests
from ckpt.directory.dcp_directory import DcpDirectory
from ckpt.directory.manifest import SHARDED, SHARDED_CHECKSUMS, SHARDED_METADATA, FileEntry, Manifest
from ckpt.directory.sharded_files import METADATA, checksums_path
from ckpt.saving.piece_sums import checksums_of
from ckpt.storage import durable


class DirectoryTarget:
    """See the module, and directory/dcp_directory.py."""

    names_late = False
    spread = False
    node = ""

    def __init__(self, call: SaveCall, directory: DcpDirectory, rank: int, layouts: LayoutExchange) -> None:
        self.call = call
        self.leads = rank == 0
        self._directory = directory
        self._rank = rank
        self._layouts = layouts
        self._placed: set[Path] = set()
        self._metadata = b""  # on rank 0, once it has chosen

    # ---- every rank ------------------------------------------------------------------------------------------------

    def name_now(self, file: SavedFile) -> Sequence[FileEntry]:
        own, content = file.file, checksums_of(file.file)
        dcp_directory.place(own.temporary, own.target, content)
        self._placed.add(own.target)
        beside = checksums_path(own.target).name
        return (
            FileEntry(own.target.name, own.job.size, own.job.crc32, SHARDED, self._rank, **own.shared()),
            FileEntry(beside, len(content), _native.crc32(content), SHARDED_CHECKSUMS, self._rank),
        )

    def describe(self, files: tuple[FileEntry, ...]) -> Prepared:
        return Prepared(files, layout=self._layouts.say(layout_of(self.call.files[0].file)))

    def reply(self, question: Mapping[str, Any]) -> str:
        return self._layouts.reply(question, self._rank)

    def undo(self, file: SavedFile, by_all: bool) -> None:
        if file.file.target in self._placed:
            dcp_directory.remove(file.file.target)

    def path(self) -> Path:
        return self.call.directory

    # ---- rank 0 ----------------------------------------------------------------------------------------------------

    def choose(self, answers: Sequence[Prepared], ask: Ask) -> Choice | Failure:
        layouts = self._layouts.complete([answer.layout for answer in answers if answer.layout is not None], ask)
        if isinstance(layouts, Failure):
            return layouts
        description = self.call.files[0].file.contents.description
        files = by_file([answer.files for answer in answers], layouts)
        made = self._layouts.metadata.make(description, *files, self.call.directory)
        self._metadata = dcp_directory.seal(made)
        entry = FileEntry(METADATA, len(self._metadata), _native.crc32(self._metadata), SHARDED_METADATA, 0)
        return Choice((*(each for answer in answers for each in answer.files), entry))

    def take_sequence(self) -> int:
        before = manifests.read_if_any(self.call.directory)
        return 1 if before is None else before.sequence + 1

    def decide(self, manifest: Manifest) -> None:
        self._directory.publish(self._metadata, manifest, {})

    def stands(self, manifest: Manifest, error: Exception) -> bool:
        return self._directory.holds(self._metadata)

    def tidy(self, manifest: Manifest) -> None:
        self._directory.tidy(self._metadata, {file.name for file in manifest.files if file.kind == SHARDED})
        durable.crash_point("tidied")

    def point_latest(self) -> None:
        """There is none."""

    def name_after(self, files: Sequence[FileEntry]) -> None:
        """They have their names."""
