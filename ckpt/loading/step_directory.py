"""load() of the directory of a step, or of a directory of steps: which files are read, and what they make together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ckpt.directory import manifest as manifests
from ckpt.directory import unpublished
from ckpt.directory.frozen_files import companion_of
from ckpt.directory.listing import Found, find_steps
from ckpt.directory.manifest import FROZEN, RANK, REPLICATED, FileEntry, Manifest
from ckpt.directory.step_names import is_step_name, names_in, stem_of
from ckpt.errors import CheckpointError, CorruptError, NotACheckpointError, StorageError
from ckpt.loading.selection import SharedSelection

logger = logging.getLogger("ckpt")

LoadFile = Callable[[Path, FileEntry], Any]

_MOST_LOOKS = 10  # at a directory where a living job removes what is being read


def holds_steps(path: Path) -> bool:
    """Whether it is the directory of a step, or of steps.

    Not of a bundle, whose files have names of their own, nor if all that is there is sharded, which no file has as a whole.
    """
    if not path.is_dir():
        return False
    manifest = manifests.read_if_any(path)
    if manifest is not None:
        return all(stem_of(file.name) is not None for file in manifest.files) and _has_whole_files(manifest)
    if is_step_name(path.name):
        return True
    if not any(map(is_step_name, names_in(path))):
        return False
    steps = find_steps(path).checkpoints
    return not steps or any(_has_whole_files(manifest) for _, manifest in steps)


def compare(path: Path, file: FileEntry, size: int, crc: int | None) -> None:
    """
    Raises:
        CorruptError: the manifest says otherwise.
    """
    if size != file.bytes:
        raise CorruptError(f"'{path}' has {size} bytes; its manifest says {file.bytes}")
    if crc is not None and crc != file.crc32:
        raise CorruptError(f"'{path}' fails the CRC-32 of its manifest: its bytes have changed")


def load_directory(
    path: Path, rank: int | None, load_file: LoadFile, selection: SharedSelection | None, begin: Callable[[int], None]
) -> Any:
    """
    Args:
        rank: as for load().
        load_file: of a file, and what the manifest says of it.
        selection: that it goes by.
        begin: called with the bytes of all files that are read now.

    Raises:
        CheckpointError: see load().
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"rank must be the number of a rank, 0 or more, not {rank!r}")

    def load_step(directory: Path, manifest: Manifest) -> Any:
        files = _choose(directory, manifest, rank)
        if selection is not None:
            selection.begin()
        begin(sum(file.bytes for each in files for file in (each, companion_of(manifest, each)) if file is not None))
        parts = {file.name: load_file(directory / file.name, file) for file in files}
        if selection is not None:
            selection.expect_all(directory)
        return _join(directory, parts)

    if is_step_name(path.name) or manifests.read_if_any(path) is not None:
        return load_step(path, manifests.read(path))
    return _load_newest(path, load_step)


def _load_newest(root: Path, load_step: Callable[[Path, Manifest], Any]) -> Any:
    told: set[str] = set()
    for _ in range(_MOST_LOOKS):
        found = find_steps(root)
        if not found.checkpoints and not found.damaged:
            raise NotACheckpointError(f"'{root}' holds no checkpoint: `ckpt list '{root}'` says what lies there")
        _tell_of_manifests(found, told)
        problems = [str(error) for error in found.damaged]
        for directory, manifest in found.checkpoints:
            try:
                loaded = load_step(directory, manifest)
            except (CorruptError, StorageError) as error:
                if not manifests.is_at(directory, manifest.sequence):
                    break  # a living job has removed it, or saved it again
                problems.append(str(error))
                if directory.name not in told:
                    told.add(directory.name)
                    logger.warning("checkpoint '%s' is passed over: %s", directory.name, error)
            else:
                logger.info("'%s' is loaded, the newest checkpoint of '%s' that is good", directory.name, root)
                return loaded
        else:
            raise CorruptError(
                f"no checkpoint in '{root}' is good: {'; '.join(problems)}. `ckpt list '{root}'` says what lies there, and "
                "`ckpt verify` of a step what is damaged in it"
            )
    raise CheckpointError(
        f"the checkpoints in '{root}' were removed or replaced while they were being read, {_MOST_LOOKS} times: let the job "
        "that saves there keep more (keep=), or save less often"
    )


def _tell_of_manifests(found: Found, told: set[str]) -> None:
    """Of steps that are passed over because of these: one may be the newest.

    Args:
        told: what was said already.
    """
    said = [f"a checkpoint is passed over: {error}" for error in found.damaged]
    text = "'{}' holds files, but no manifest.json: it is passed over. Its manifest is lost, or has not arrived yet"
    said += [text.format(path) for path in found.bare if unpublished.is_lost(path)]
    for each in said:
        if each not in told:
            told.add(each)
            logger.warning("%s", each)


def _has_whole_files(manifest: Manifest) -> bool:
    return bool(_own(manifest) or _common(manifest))


def _own(manifest: Manifest) -> list[FileEntry]:
    return sorted((file for file in manifest.files if file.kind == RANK), key=lambda file: file.rank)


def _common(manifest: Manifest) -> list[FileEntry]:
    return [file for file in manifest.files if file.kind == REPLICATED]


def _choose(directory: Path, manifest: Manifest, rank: int | None) -> list[FileEntry]:
    """The files that make what is wanted."""
    own, common = _own(manifest), _common(manifest)
    if any(file.kind not in (RANK, REPLICATED, FROZEN) for file in manifest.files):
        what = "restore(sharded_into=) of a Checkpointer reads that, and `ckpt export` writes it as a file"
        if not own and not common:
            raise CheckpointError(f"'{directory}' has nothing but a sharded state: {what}")
        logger.warning("'%s' is loaded without its sharded state: %s", directory, what)
    if rank is not None:
        if not 0 <= rank < manifest.world_size:
            raise CheckpointError(f"'{directory}' has no state of rank {rank}: it was saved by {manifest.world_size} ranks")
        mine = [file for file in own if file.rank == rank]
        if own and not mine:
            raise CheckpointError(f"'{directory}' has no state of rank {rank}, which had none for itself")
        return common + mine
    if len(own) <= 1:
        return common + own
    several = f"'{directory}' holds states that {len(own)} ranks had for themselves"
    if not common:
        raise CheckpointError(f"{several}, and nothing else: say whose is wanted, as in load(path, rank={own[0].rank})")
    logger.warning("%s, which are left out: load(path, rank=%d) loads one of them, too", several, own[0].rank)
    return common


def _join(directory: Path, parts: Mapping[str, Any]) -> Any:
    if len(parts) == 1:
        return next(iter(parts.values()))
    if not all(isinstance(part, Mapping) for part in parts.values()):
        raise CheckpointError(f"'{directory}' holds parts that are no dicts: load {_named(parts)} by itself")
    joined: dict[Any, Any] = {}
    for part in parts.values():
        if twice := sorted(map(str, joined.keys() & part.keys())):
            raise CheckpointError(
                f"files of '{directory}' have keys in common ({', '.join(twice[:5])}): load {_named(parts)} by itself"
            )
        joined |= part
    return joined


def _named(parts: Mapping[str, Any]) -> str:
    return " or ".join(f"'{name}'" for name in parts)
