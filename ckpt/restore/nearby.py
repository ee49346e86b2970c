"""What of the checkpoints lies on the disks of the nodes: complete there, and maybe not at home yet.

Each rank looks at its own node's disk and tells rank 0 what it could read there. A checkpoint is a candidate if each rank has
what it needs of it on its node, or home has all of it. So one whose node has lost its disk reads from home what the others read
from their nodes.

Of a job with another number of ranks, nobody knows what lies where: then home alone counts.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ckpt.coordinator import Coordinator
from ckpt.directory.listing import find_steps
from ckpt.directory.manifest import REPLICATED, FileEntry, Manifest
from ckpt.directory.root import has_size
from ckpt.errors import PeerError

logger = logging.getLogger("ckpt")


@dataclasses.dataclass(frozen=True)
class NearCopy:
    """A committed step on nodes.

    Attributes:
        collective: whether something in it is the same on all ranks.
        everywhere: whether all ranks can read what they need on their nodes.
    """

    name: str
    step: int
    sequence: int
    collective: bool
    everywhere: bool = False


class Nearby:
    """Of one Checkpointer.

    Args:
        root: gives the directory of steps on this node's disk; None if there is none.
        stream: of the keys; no other conversation of this job uses it.
    """

    def __init__(self, coordinator: Coordinator, stream: str, root: Callable[[], Path | None], timeout_s: float) -> None:
        self._coordinator = coordinator
        self._stream = stream
        self._root = root
        self._timeout_s = timeout_s
        self._calls = 0
        self._here: dict[int, Path] = {}  # by sequence, what this rank can read
        self.copies: list[NearCopy] = []  # on rank 0: what lies on nodes
        self.newest = -1  # on rank 0: the highest sequence that lies on any, whether it can be read or not

    def look(self) -> None:
        """All ranks call it.

        Raises:
            PeerError: a rank does not answer.
        """
        self._calls += 1
        found, self._here, newest = [], {}, -1
        for path, manifest in self._steps():
            newest = max(newest, manifest.sequence)
            if manifest.world_size == self._coordinator.world_size and self._holds_mine(path, manifest):
                self._here[manifest.sequence] = path
                kinds = {file.kind for file in manifest.files}
                found.append(NearCopy(path.name, manifest.step, manifest.sequence, REPLICATED in kinds))
        said = {"newest": newest, "copies": [dataclasses.asdict(copy) for copy in found]}
        try:
            answers = self._coordinator.gather(f"{self._stream}/{self._calls}", json.dumps(said).encode(), self._timeout_s)
        except PeerError:
            if self._coordinator.rank != 0:
                raise
            answers = []  # who is silent is asked again when a candidate is named; until then home alone counts
        self.copies, self.newest = _join([json.loads(answer) for answer in answers or []])

    def _steps(self) -> Iterable[tuple[Path, Manifest]]:
        try:
            root = self._root()
            return () if root is None else find_steps(root).checkpoints
        except Exception as error:  # home may have all the same
            logger.warning("what lies on this node cannot be read: %s", error)
            return ()

    def _holds_mine(self, directory: Path, manifest: Manifest) -> bool:
        return all(has_size(directory / file.name, file.bytes) for file in manifest.files if self._needs(file))

    def _needs(self, file: FileEntry) -> bool:
        return file.rank == self._coordinator.rank or file.kind == REPLICATED

    def directory_of(self, sequence: int) -> Path | None:
        """Where this rank has what it needs of that commit; None: not on its node."""
        return self._here.get(sequence)


def _join(answers: list[dict[str, Any]]) -> tuple[list[NearCopy], int]:
    """What any rank has, newest first."""
    found: dict[int, NearCopy] = {}
    counts: dict[int, int] = {}
    for answer in answers:
        for copy in (NearCopy(**said) for said in answer["copies"]):
            found.setdefault(copy.sequence, copy)
            counts[copy.sequence] = counts.get(copy.sequence, 0) + 1
    joined = [
        dataclasses.replace(found[sequence], everywhere=counts[sequence] == len(answers))
        for sequence in sorted(found, reverse=True)
    ]
    return joined, max((answer["newest"] for answer in answers), default=-1)
