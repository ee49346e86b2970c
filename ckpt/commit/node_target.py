"""A step on the disks of nodes as a PublicationTarget: each holds the files of its ranks, and what is replicated whole.

    prepare    every rank: its files have their names, and a receipt says so
    decide     rank 0: the manifest, of the files of all nodes, on its own
    spread     the first rank of each other node: the same manifest there

A drain carries it home from there. So its files have names that are free at home, too, and its number is of home's commits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckpt.commit.conversation import Failure
from ckpt.commit.step_target import StepTarget
from ckpt.commit.target import Prepared, SavedFile
from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import REPLICATED, FileEntry, Manifest
from ckpt.directory.node_place import NodePlace
from ckpt.directory.receipts import names_of_receipts, write_receipt
from ckpt.directory.steps import StepDirectories
from ckpt.errors import CheckpointError
from ckpt.storage import durable


class NodeStepTarget(StepTarget):
    """See the module.

    Args:
        home: its directory of steps, which numbers the commits.
        place: of this rank.
        path: of the step at home.
        more: as of StepTarget.
    """

    def __init__(
        self,
        *more: Any,
        home: StepDirectories,
        place: NodePlace,
        path: Path,
    ) -> None:
        super().__init__(*more)
        self.node = str(place.number)
        self.spread = place.count > 1
        self.leads = self._rank == place.ranks[0]
        self._home = home
        self._place = place
        self._path = path
        self._receipt: Path | None = None

    # ---- every rank ------------------------------------------------------------------------------------------------

    def _give_name(self, file: SavedFile, *more: Any) -> FileEntry:
        entry = super()._give_name(file, *more)
        return dataclasses.replace(entry, rank=0) if file.kind == REPLICATED else entry

    def describe(self, files: tuple[FileEntry, ...]) -> Prepared:
        prepared = dataclasses.replace(super().describe(files), node=self.node)
        if files:
            self._receipt = write_receipt(self.call.directory, self._rank, files, self._directories.token, self._place)
        return prepared

    def undo(self, file: SavedFile, by_all: bool) -> None:
        if self._receipt is not None:
            durable.remove_quietly(self._receipt)
        super().undo(file, by_all)

    def path(self) -> Path:
        return self._path

    # ---- who leads -------------------------------------------------------------------------------------------------

    def _gather(self, answers: Sequence[Prepared]) -> tuple[FileEntry, ...] | Failure:
        """What is replicated has been written once on each node."""
        found: dict[str, tuple[int, FileEntry]] = {}
        for rank, answer in enumerate(answers):
            if not answer.node:
                return Failure(f"rank {rank} saves straight to '{self._path.parent}', and rank 0 by way of its node", (rank,))
            for file in answer.files:
                first, expected = found.setdefault(file.name, (rank, file))
                if file != expected:
                    return Failure(
                        f"'{file.name}' of rank {rank} and that of rank {first} are not the same: replicated= must be "
                        "equal to the byte on all ranks",
                        (first, rank),
                    )
        replicated = {file.name for _, file in found.values() if file.kind == REPLICATED}
        if len(replicated) > 1:
            return Failure(f"nodes have written what is replicated under several names: {', '.join(sorted(replicated))}", ())
        return tuple(file for _, file in found.values())

    def take_sequence(self) -> int:
        return self._home.take_sequence()

    def decide(self, manifest: Manifest) -> None:
        """On the node of this rank."""
        self._before = manifests.read_if_any(self.call.directory)
        self._directories.publish(manifest, self.call.directory, self._place.holds)

    def tidy(self, manifest: Manifest) -> None:
        if self._before is not None and self._before.sequence != manifest.sequence:
            with contextlib.suppress(CheckpointError):
                for name in names_of_receipts(self.call.directory, self._before):
                    durable.remove_quietly(self.call.directory / name)
        super().tidy(manifest)
