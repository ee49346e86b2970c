"""A bundle on the disks of nodes as a PublicationTarget: as a step of its own, with names that no other save has.

So nothing is replaced there. The manifest says what directory and files are called at home, where a drain carries them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt.commit.bundle_target import one_of_each, structure_digest
from ckpt.commit.conversation import Failure
from ckpt.commit.node_target import NodeStepTarget
from ckpt.commit.rounds import Ask
from ckpt.commit.target import Choice, Prepared, SavedFile
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.storage import durable


class NodeBundleTarget(NodeStepTarget):
    """See the module.

    Args:
        called: what files are called at home, by their names here.
        varying: keys of integers in which files of the same name may differ.
        more: as of NodeStepTarget.
    """

    def __init__(self, *details: Any, called: Mapping[str, str], varying: Sequence[str], **more: Any) -> None:
        super().__init__(*details, **more)
        self._called = called
        self._varying = varying

    def _give_name(self, file: SavedFile, *more: Any) -> FileEntry:
        entry = super()._give_name(file, *more)
        return dataclasses.replace(entry, called=self._called[entry.name])

    def describe(self, files: tuple[FileEntry, ...]) -> Prepared:
        digests = tuple(structure_digest(file.file, self._varying) for file in self.call.files)
        return dataclasses.replace(super().describe(files), digests=digests)

    def choose(self, answers: Sequence[Prepared], ask: Ask) -> Choice | Failure:
        """Rank 0 need not have written anything itself."""
        if straight := [rank for rank, answer in enumerate(answers) if not answer.node]:
            return Failure(f"rank {straight[0]} saves straight home, and rank 0 by way of its node", tuple(straight))
        files, dropped = one_of_each(answers)
        return Choice(tuple(files), dropped=[file.name for file in dropped])

    def decide(self, manifest: Manifest) -> None:
        durable.make_directory(self.call.directory, durable=True)  # its ranks may have nothing of this one
        super().decide(manifest)
