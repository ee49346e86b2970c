"""The files of a step: which of them a rank writes, wherever the save goes first, and what they are called."""

from __future__ import annotations

from pathlib import Path

from ckpt.commit.target import SaveCall, SavedFile
from ckpt.directory import sharded_files, step_names
from ckpt.directory.manifest import RANK, REPLICATED, SHARDED, SHARDED_METADATA
from ckpt.formats.dcp_file import DcpFile
from ckpt.saving.file_in_flight import FileInFlight, WriteShare
from ckpt.tiers.node_level import Route


class StepFiles:
    """Of one rank.

    Args:
        one_writer: rank 0 writes all of what is replicated.
        sharded_format: of what is sharded.

    Attributes:
        token: of rank 0, once the directory is claimed: names what all ranks write together.
    """

    def __init__(self, rank: int, world_size: int, one_writer: bool, sharded_format: DcpFile) -> None:
        self.token = ""
        self._rank = rank
        self._world_size = world_size
        self._one_writer = one_writer
        self._sharded_format = sharded_format

    def written(self, kinds: list[str], route: Route) -> list[str]:
        """Of these kinds, and of what goes with them, those of which this rank writes a file, or its share of one."""
        found = [kind for kind in kinds if self._writes(kind, route)]
        return found + [SHARDED_METADATA] * (SHARDED in found and self._rank == 0)

    def _writes(self, kind: str, route: Route) -> bool:
        if route.place is not None:
            return kind != REPLICATED or route.place.ranks[0] == self._rank
        return kind != REPLICATED or self._rank == 0 or not self._one_writer

    def stem(self, kind: str) -> str:
        if kind == REPLICATED:
            return "replicated"
        if kind == SHARDED_METADATA:
            return sharded_files.METADATA
        if kind == SHARDED:
            return f"__{self._rank}"
        return "state" if self._world_size == 1 else f"rank-{self._rank:05d}"

    def make(self, kind: str, target: Path | None, call: SaveCall, route: Route, limits: tuple[int, int] | None) -> SavedFile:
        """
        Args:
            target: None if it is only compared.
            limits: of direct I/O, see StepDirectories.begin().
        """
        write_share = token = None
        several = kind != RANK and self._world_size > 1
        if several and kind == REPLICATED:
            same = f"{self.token}{call.number:08x}"
            if route.place is not None:
                token = same if route.place.count > 1 else None
            elif not self._one_writer:
                write_share = WriteShare(self._rank, self._world_size, same)
        named = target or call.directory / step_names.free_name(self.stem(kind), set())
        file = FileInFlight(
            named,
            write_share,
            limits=limits,
            with_directory=True,
            replicated=several,
            number=call.number,
            like=route.directories.replaced_by(named, self.stem(kind)),
            made=self._sharded_format if kind == SHARDED else None,
            token=token,
        )
        return SavedFile(file, kind, written=target is not None)
