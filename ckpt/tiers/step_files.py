"""The files of a step: which of them a rank writes, wherever the save goes first, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ckpt.commit.apart import set_apart
from ckpt.commit.target import SaveCall, SavedFile
from ckpt.directory import sharded_files, step_names
from ckpt.directory.manifest import FROZEN, RANK, REPLICATED, SHARDED, SHARDED_METADATA
from ckpt.formats.dcp_file import DcpFile
from ckpt.plan.frozen_marks import FrozenHint
from ckpt.saving.file_in_flight import FileInFlight, WriteShare
from ckpt.saving.frozen_files import FrozenFiles
from ckpt.tiers.node_level import Route

_SHARDED_FROZEN = "sharded-frozen"  # in a manifest they are as all others of a sharded state
_APART = {RANK: FROZEN, SHARDED: _SHARDED_FROZEN}  # whose frozen tensors may go to a file of their own


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

    def written(self, kinds: list[str], route: Route, apart: bool) -> list[str]:
        """Of these kinds, and of what goes with them, those of which this rank writes a file, or its share of one.

        Args:
            apart: whether frozen tensors may go to files of their own.
        """
        found = [kind for kind in kinds if self._writes(kind, route)]
        more = [SHARDED_METADATA] * (SHARDED in found and self._rank == 0)
        return found + more + [_APART[kind] for kind in found if apart and kind in _APART]

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
        if kind == FROZEN:
            return f"{self.stem(RANK)}.frozen"
        if kind == _SHARDED_FROZEN:
            return f"{self.stem(SHARDED)}_frozen"
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

    def set_apart(self, saved: Sequence[SavedFile], names: Mapping[str, Path], files: FrozenFiles, route: Route) -> None:
        """Lets what a save was told not to change go to files of its own.

        Args:
            names: of the files, by their kinds; without those for this: it goes to the files of all else.
            files: what saves before have left.
        """
        for each in saved:
            target = names.get(_APART.get(each.kind, ""))
            if target is not None:
                like = route.directories.replaced_by(target, self.stem(_APART[each.kind]))
                key = f"{route.directory.parent}/{each.kind}"
                set_apart(each.file, target, files, key, like, self._sharded_format if each.kind == SHARDED else None)


class Given(NamedTuple):
    """What a save was called with.

    Attributes:
        contents: the kinds of files, and what goes into each.
        lazy: as it was given.
        hint: what it was told not to change.
    """

    contents: list[tuple[str, Any]]
    lazy: Any
    hint: FrozenHint | None


def contents_of(state: Any, replicated: Any, sharded: Any) -> list[tuple[str, Any]]:
    offered = [(RANK, state), (REPLICATED, replicated), (SHARDED, sharded)]
    given = [(kind, each) for kind, each in offered if each is not None]
    if not given:
        raise TypeError(
            "save() was given nothing to save: give state= (what this rank has for itself; {} if only others have "
            "something), replicated= (what is the same on all ranks) or sharded= (of which each rank has a part)"
        )
    return given
