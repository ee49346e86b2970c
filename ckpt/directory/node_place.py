"""Which of the nodes of a job holds what of a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from ckpt.directory.manifest import REPLICATED, FileEntry


@dataclasses.dataclass(frozen=True)
class NodePlace:
    """Of one node, in one save: another job may number its nodes and ranks otherwise.

    Attributes:
        number, count: of this node, and how many there are.
        ranks: of this node, ascending; the first one leads.
    """

    number: int
    count: int
    ranks: tuple[int, ...]

    def holds(self, file: FileEntry) -> bool:
        return file.kind == REPLICATED or file.rank in self.ranks

    @staticmethod
    def parse(said: Any) -> NodePlace:
        """From what `dataclasses.asdict` made of one.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        place = NodePlace(int(said["number"]), int(said["count"]), tuple(sorted(int(rank) for rank in said["ranks"])))
        if not 0 <= place.number < place.count or not place.ranks or place.ranks[0] < 0:
            raise ValueError(f"{said!r} is no place of a node")
        return place
