"""Which checkpoints lie in a directory, and what else lies there that might be one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from ckpt.directory import late_names, receipts, sharded_files, unpublished
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import read_latest
from ckpt.directory.manifest import Manifest
from ckpt.directory.root import has_size, missing_files
from ckpt.directory.step_names import is_step_name, names_in
from ckpt.drain import node as nodes
from ckpt.drain.runs import find_runs
from ckpt.errors import NotACheckpointError
from ckpt.remote.layout import Catalogue
from ckpt.storage import temporary_names
from ckpt.storage.object_store import ObjectStore
from ckpt.storage.stores import StoredObject
from ckpt.upkeep.prepared import find_prepared
from ckpt.upkeep.rows import (
    BUNDLE,
    COMMITTED,
    DAMAGED,
    FOREIGN,
    INCOMPLETE,
    OBJECTS,
    PREPARED,
    SHARDED_DIRECTORY,
    STEP,
    Row,
    is_hidden,
    row_of,
    size_below,
)

WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".distcp")
_NAMED = 3  # of files that are missing


def look(directory: Path) -> list[Row]:
    """Newest commit first, then what is no checkpoint, by name. A directory that is a checkpoint itself is the only row.

    Files are looked for, with their sizes; none is read but manifests.

    Raises:
        NotACheckpointError: there is no such directory; or it holds runs of a node, each of which can be looked at.
        StorageError: it cannot be read.
    """
    if not directory.is_dir():
        what = "is a file: give the directory in which it lies, or show it" if os.path.lexists(directory) else "does not exist"
        raise NotACheckpointError(f"'{directory}' {what}")
    if is_checkpoint(directory):
        return [row for row in [_look_at(directory, _is_node(directory.parent))] if row is not None]
    rows = list(_look_below(directory))
    if not rows and (runs := find_runs(directory)):
        listed = "".join(f"\n  {run}" for run in runs)
        raise NotACheckpointError(f"'{directory}' holds runs of a node: give the directory of one of them.{listed}")
    latest = read_latest(directory)
    rows = [dataclasses.replace(row, latest=row.name == latest and row.state == COMMITTED) for row in rows]
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple[int, int, str]:
    return (0, -row.sequence, row.name) if row.state == COMMITTED and row.sequence is not None else (1, 0, row.name)


def is_checkpoint(directory: Path) -> bool:
    """Whether it is meant to be one, and not a directory of some: it holds a commit record, or that of torch."""
    return any(os.path.lexists(directory / name) for name in (manifests.NAME, sharded_files.METADATA))


def none_at(directory: Path, what: str) -> NotACheckpointError:
    """The error for who looks for a checkpoint where there is none, with what there is.

    Args:
        what: there is not, as "no checkpoint".
    """
    row = _look_at(directory, _is_node(directory.parent)) if directory.is_dir() else None
    there = f": {row.problem}" if row is not None and row.state != COMMITTED and row.problem else ""
    return NotACheckpointError(
        f"'{directory}' holds {what}{there}" if os.path.lexists(directory) else f"'{directory}' does not exist"
    )


def _is_node(directory: Path) -> bool:
    return os.path.lexists(directory / nodes.NAME)


def _look_below(directory: Path) -> Iterator[Row]:
    """Also one level deeper, where names of bundles have a slash."""
    is_node = _is_node(directory)
    for name in sorted(names_in(directory)):
        path = directory / name
        if not path.is_dir() or (is_hidden(name) and late_names.name_behind(name) is None):
            continue
        row = _look_at(path, is_node)
        if row is not None:
            yield row
        elif not (is_step_name(name) or path.is_symlink() or _is_node(path)):
            for below in sorted(names_in(path)):
                if not is_hidden(below) and is_checkpoint(path / below) and (row := _look_at(path / below, False)) is not None:
                    yield dataclasses.replace(row, name=f"{name}/{below}")


def _look_at(path: Path, is_node: bool) -> Row | None:
    """None if it has nothing to do with checkpoints."""
    manifest = manifests.read_if_any(path)
    kind = _kind_of(path, manifest)
    partial = late_names.name_behind(path.name)
    name = path.name if partial is None else partial
    if manifest is not None:
        return _with_manifest(path, name, kind, manifest, is_node)
    if os.path.lexists(path / manifests.NAME):
        return _without(path, name, kind, DAMAGED, _why_damaged(path))
    if (found := find_prepared(path)) is not None:
        return row_of(name, kind, found.manifest, PREPARED, "complete, but its manifest has not got its name: repair")
    names = names_in(path)
    if kind == SHARDED_DIRECTORY:
        return _without(path, name, kind, FOREIGN, "written by torch.distributed.checkpoint")
    if is_step_name(path.name):
        if unpublished.is_leftover(names):
            return _without(path, name, kind, INCOMPLETE, "not committed: being saved, or left by a crash")
        return _without(path, name, kind, FOREIGN, f"holds files, but no {manifests.NAME}")
    if any(temporary_names.name_behind(each) is not None for each in names) or partial is not None:
        return _without(path, name, BUNDLE, INCOMPLETE, "not committed: being saved, or left by a crash")
    if any(each.endswith(WEIGHTS) for each in names):
        return _without(path, name, kind, FOREIGN, f"holds files, but no {manifests.NAME}")
    return None


def _kind_of(path: Path, manifest: Manifest | None) -> str:
    if is_step_name(path.name):
        return STEP
    if manifest is not None and any(file.temporary for file in manifest.files):
        return BUNDLE
    return SHARDED_DIRECTORY if os.path.lexists(path / sharded_files.METADATA) else BUNDLE


def _with_manifest(path: Path, name: str, kind: str, manifest: Manifest, is_node: bool) -> Row:
    expected = manifest
    if is_node and (place := receipts.place_in(path, manifest)) is not None:
        expected = dataclasses.replace(manifest, files=tuple(file for file in manifest.files if place.holds(file)))
    if missing := missing_files(path, expected):
        shown = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        return row_of(
            name, kind, manifest, DAMAGED, f"{len(missing)} of {len(expected.files)} files missing or cut off: {shown}"
        )
    waiting = sum(bool(file.temporary) and not has_size(path / file.name, file.bytes) for file in manifest.files)
    waiting += late_names.name_behind(path.name) is not None
    return row_of(name, kind, manifest, problem="some of its files have not got their names: repair" if waiting else "")


def _without(path: Path, name: str, kind: str, state: str, problem: str) -> Row:
    size, files = size_below(path)
    return Row(name, kind, state, bytes=size, files=files, problem=problem)


def _why_damaged(path: Path) -> str:
    try:
        manifests.read(path)
    except NotACheckpointError as error:
        return str(error)
    return ""


def look_into_store(url: str) -> list[Row]:
    """The same of what lies below a URL. Credentials come from the environment.

    Raises:
        StorageError: the store cannot be read.
        ValueError: it is no URL.
    """
    listing = Catalogue(ObjectStore(url)).find()
    rows = [_row_in_store(copy.folder, copy.manifest, listing.objects[copy.folder]) for copy in listing.copies]
    known = {row.name for row in rows}
    for folder, objects in sorted(listing.objects.items()):
        if folder not in known:
            size = sum(each.bytes for each in objects)
            whole = any(each.key.endswith(f"/{manifests.NAME}") for each in objects)
            problem = next((text for text in listing.damaged if folder in text), "its manifest cannot be understood")
            text = problem if whole else "no manifest: being carried there, or left over"
            rows.append(Row(folder, OBJECTS, DAMAGED if whole else INCOMPLETE, bytes=size, files=len(objects), problem=text))
    return rows


def _row_in_store(folder: str, manifest: Manifest, objects: list[StoredObject]) -> Row:
    missing = missing_objects(manifest, objects)
    problem = f"{len(missing)} of {len(manifest.files)} files missing or cut off: {missing[0]}" if missing else ""
    return row_of(folder, OBJECTS, manifest, DAMAGED if missing else COMMITTED, problem)


def missing_objects(manifest: Manifest, objects: list[StoredObject]) -> list[str]:
    """Names of files that are not among the objects of their folder with the size that the manifest gives."""
    there = {each.key.rpartition("/")[2]: each.bytes for each in objects}
    return [file.name for file in manifest.files if there.get(file.name) != file.bytes]
