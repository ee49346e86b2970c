"""What a checkpoint, or a file, consists of."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.directory.root import has_size
from ckpt.directory.sharded_files import METADATA, metadata_name
from ckpt.directory.step_names import names_in
from ckpt.errors import CorruptError, NotACheckpointError, StorageError
from ckpt.upkeep.contents import Contents, read_contents

_WITH_TENSORS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pkl")


@dataclasses.dataclass(frozen=True)
class FileRow:
    """`problem`: "missing", or that its size is another one than the manifest's; else empty. `shared_bytes`: see FileEntry."""

    name: str
    bytes: int
    kind: str = ""
    rank: int | None = None
    crc32: str = ""
    problem: str = ""
    shared_bytes: int = 0
    shared_step: int | None = None


@dataclasses.dataclass
class Checkpoint:
    """`manifest`: None if it has none, as one that torch has written."""

    path: Path
    manifest: Manifest | None
    files: list[FileRow]


def look_at(directory: Path) -> Checkpoint:
    """
    Raises:
        NotACheckpointError: its manifest cannot be understood, or there is no file in it.
        StorageError: it cannot be read.
    """
    if os.path.lexists(directory / manifests.NAME):
        manifest = manifests.read(directory)
        return Checkpoint(directory, manifest, [_named(directory, file) for file in manifest.files])
    files = [FileRow(name, _size(directory / name)) for name in sorted(names_in(directory)) if (directory / name).is_file()]
    if not files:
        raise NotACheckpointError(f"'{directory}' holds no files, and no checkpoint")
    return Checkpoint(directory, None, files)


def _named(directory: Path, file: FileEntry) -> FileRow:
    path = place_of(directory, file)
    there = "" if has_size(path, file.bytes) else "has another size" if path.exists() else "missing"
    shared = (file.shared_bytes, file.shared_step if file.shared_bytes else None)
    return FileRow(file.name, file.bytes, file.kind, file.rank, f"{file.crc32:08x}", there, *shared)


def place_of(directory: Path, file: FileEntry) -> Path:
    """Under its own name, or, if it has not got that yet, the one before."""
    own = directory / file.name
    waits = file.temporary and os.path.lexists(directory / file.temporary)
    return directory / file.temporary if waits else own


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def tensors_in(checkpoint: Checkpoint) -> dict[str, Contents | CorruptError | StorageError]:
    """By file: what is in each that holds tensors, or what is wrong with it. Of sharded states `.metadata` tells it."""
    directory, manifest = checkpoint.path, checkpoint.manifest
    if manifest is not None:
        metadata = metadata_name(manifest)
        paths = {file.name: place_of(directory, file) for file in manifest.files if file.name.endswith(_WITH_TENSORS)}
        if metadata is not None:
            paths[METADATA] = directory / metadata
    else:
        paths = {row.name: directory / row.name for row in checkpoint.files if row.name.endswith((*_WITH_TENSORS, METADATA))}
    found: dict[str, Contents | CorruptError | StorageError] = {}
    for name, path in paths.items():
        try:
            found[name] = read_contents(path)
        except (CorruptError, StorageError) as error:
            found[name] = error
    return found
