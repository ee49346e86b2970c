"""Which files of a checkpoint are a source of tensors, and what a manifest says of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ckpt.conversion.sources import Entry, Piece, SafetensorsSource, ShardedSource, Source, ZipSource
from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import RANK, REPLICATED, FileEntry, Manifest
from ckpt.directory.sharded_files import METADATA, metadata_name
from ckpt.errors import CheckpointError, NotACheckpointError
from ckpt.loading.tensor_files import is_tensor_file
from ckpt.storage import durable
from ckpt.upkeep.census import none_at
from ckpt.upkeep.showing import place_of


class _Joined:
    """Several that have no name in common."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.entries: dict[str, Entry] = {}
        self._owners: dict[str, Source] = {}
        for label, source in sources.items():
            for name, entry in source.entries.items():
                if name in self.entries:
                    raise CheckpointError(f"'{name}' is in '{label}' and in another file of the checkpoint: name one file")
                self.entries[name], self._owners[name] = entry, source

    def tensor(self, name: str) -> torch.Tensor:
        return self._owners[name].tensor(name)

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for owner, some in itertools.groupby(names, self._owners.__getitem__):
            found |= owner.tensors([*some])
        return found

    def pieces(self, name: str) -> list[Piece]:
        return self._owners[name].pieces(name)

    def value(self, name: str) -> Any:
        return self._owners[name].value(name)


def open_source(path: Path, file: str = "", rank: int | None = None) -> Source:
    """
    Args:
        path: a checkpoint, a file, or a directory of torch.distributed.checkpoint.
        file: one of the checkpoint alone.
        rank: whose own file is taken, beside what is the same on all ranks, and what is sharded.

    Raises:
        NotACheckpointError: there is nothing of the kind.
        CheckpointError: it cannot be read in this way; says why.
    """
    if not path.is_dir():
        return _of_file(path)
    if not os.path.lexists(path / manifests.NAME):
        if file:
            if not os.path.lexists(path / file):
                raise NotACheckpointError(f"'{path}' holds no file '{file}'")
            return _of_file(path / file)
        if not os.path.lexists(path / METADATA):
            raise none_at(path, "no checkpoint")
        return ShardedSource(path)
    manifest = manifests.read(path)
    if file:
        entry = next((each for each in manifest.files if each.name == file), None)
        if entry is None:
            raise NotACheckpointError(f"'{path}' holds no file '{file}'")
        return _of_file(place_of(path, entry), entry)
    own = [each for each in manifest.files if each.kind == RANK]
    common = [each for each in manifest.files if each.kind == REPLICATED]
    metadata = metadata_name(manifest)
    if rank is not None:
        own = [each for each in own if each.rank == rank]
        if not own:
            raise NotACheckpointError(f"'{path}' holds no file of rank {rank}")
    elif _is_beside_others(manifest, own):
        own = []
    if len(own) > 1:
        names = ", ".join(each.name for each in own[:4]) + (", ..." if len(own) > 4 else "")
        how = f"name one, as in '{path}:{own[0].name}'"
        how += ", or a rank by --rank" * (len({each.rank for each in own}) == len(own))
        raise CheckpointError(f"'{path}' holds {len(own)} files of ranks, which are not put together ({names}): {how}")
    sources: dict[str, Source] = {each.name: _of_file(place_of(path, each), each) for each in [*common, *own]}
    if metadata is not None:
        sources[METADATA] = ShardedSource(path, metadata, manifest)
    return next(iter(sources.values())) if len(sources) == 1 else _Joined(sources)


def left_out(path: Path, file: str = "", rank: int | None = None) -> list[str]:
    """Names of files that ranks have saved for themselves, and open_source() does not read."""
    if file or not os.path.lexists(path / manifests.NAME):
        return []
    manifest = manifests.read(path)
    own = [each for each in manifest.files if each.kind == RANK]
    if rank is None:
        return [each.name for each in own] if _is_beside_others(manifest, own) else []
    return [each.name for each in own if each.rank != rank]


def _is_beside_others(manifest: Manifest, own: Sequence[FileEntry]) -> bool:
    """Whether what ranks have for themselves may be left out: there is something that is of all of them."""
    is_common = any(each.kind == REPLICATED for each in manifest.files)
    return len(own) > 1 and (is_common or metadata_name(manifest) is not None)


def _of_file(path: Path, expected: FileEntry | None = None) -> Source:
    """
    Args:
        expected: what a manifest says of it; a safetensors file looks for that itself.
    """
    durable.refuse_irregular(path, "read")
    return SafetensorsSource(path) if is_tensor_file(path) else ZipSource(path, expected)
