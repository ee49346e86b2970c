"""Copies checkpoints into another directory: every byte is verified on the way, and a copy has its name when it is durable.

1. make a directory under a temporary name    a crash leaves that, which the next job or repair removes
2. copy the files, fsync each                 compared with the CRC-32s of the manifest; then what others have put there
3. write the manifest, fsync
4. rename the directory, fsync                a checkpoint
5. `latest`, behind all copies
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from ckpt.directory import late_names, sharded_files
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import committed_deeper_in, read_latest
from ckpt.directory.listing import LATEST
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.directory.step_names import is_step_name, names_in, step_name
from ckpt.errors import CheckpointError, CorruptError, NotACheckpointError
from ckpt.remote.download import Expected, download
from ckpt.remote.layout import Catalogue
from ckpt.storage import durable, free_space, temporary_names
from ckpt.storage.directory_lock import NAME as LOCK
from ckpt.storage.exchange import replace_link
from ckpt.storage.object_store import ObjectStore
from ckpt.storage.streamed_file import StreamedFile
from ckpt.upkeep.census import look, none_at
from ckpt.upkeep.prepared import missing_files
from ckpt.upkeep.rows import DAMAGED, size_below
from ckpt.upkeep.showing import place_of
from ckpt.upkeep.verifying import GOOD, judge

logger = logging.getLogger("ckpt")

_CHUNK_BYTES = 4 << 20
_NAMED = 3  # of files that are missing

Told = Callable[[int], object]  # called with the bytes that have been copied since it was called last

COPIED, THERE = "copied", "already there"


class Origin(Protocol):
    """A checkpoint that is to be copied. `name`: of its directory; `content`: of its manifest, to the byte; `bytes`: of all."""

    name: str
    manifest: Manifest
    content: bytes
    bytes: int

    def fetch(self, file: FileEntry, target: Path, told: Told) -> None:
        """Makes `target` that file, durably but for its name.

        Raises:
            CorruptError: it is not what the manifest says.
            StorageError: it cannot be read, or not be written.
        """

    def fetch_rest(self, directory: Path) -> None:
        """Gives the directory what belongs to the checkpoint, and no manifest names: durably, but for the directory itself.

        Raises:
            CorruptError, StorageError: as of fetch().
        """


class InDirectory:
    """On a file system.

    Args:
        above: the directory from which it is named.
    """

    def __init__(self, path: Path, above: Path) -> None:
        self.path = path
        self.name = late_names.name_behind(path.name) or str(path.relative_to(above))
        self.manifest, self.content = manifests.read_with_content(path)
        self.bytes = size_below(path)[0]

    def fetch(self, file: FileEntry, target: Path, told: Told) -> None:
        _copy_file(place_of(self.path, file), target, file, told)

    def fetch_rest(self, directory: Path) -> None:
        """Of a bundle: all that a framework has written beside our files. Of a step: what its manifest calls others'."""
        ours = {manifests.NAME, *sharded_files.names_of(self.manifest), *(file.temporary for file in self.manifest.files)}
        only = {*self.manifest.others} if is_step_name(self.name) else None
        _copy_rest(self.path, directory, ours, only)


class InStore:
    """In an object store."""

    def __init__(self, store: ObjectStore, folder: str, manifest: Manifest) -> None:
        self._store, self._folder = store, folder
        self.name = step_name(manifest.step)
        self.manifest = manifest
        found = store.read_small(f"{folder}/{manifests.NAME}")
        if found is None:
            raise NotACheckpointError(f"'{store.url}/{folder}' was removed just now")
        self.content = bytes(found.content)
        self.bytes = manifests.bytes_of(manifest)

    def fetch(self, file: FileEntry, target: Path, told: Told) -> None:
        def take(_: int, chunk: memoryview) -> None:
            written.write(chunk)
            told(chunk.nbytes)

        with StreamedFile(target) as written:
            download(self._store, Expected(f"{self._folder}/{file.name}", file.bytes, file.crc32), take)

    def fetch_rest(self, directory: Path) -> None:
        """Nothing else is carried there."""


def _copy_file(source: Path, target: Path, expected: FileEntry | None, told: Told = lambda _: None) -> None:
    found = durable.copy_file(source, target, _CHUNK_BYTES, told)
    if expected is not None and (target.stat().st_size, found) != (expected.bytes, expected.crc32):
        text = f"'{source}' has the CRC-32 {found:08x} where its manifest says {expected.crc32:08x}"
        raise CorruptError(f"{text}: it is damaged, and was not copied")


def _copy_rest(source: Path, target: Path, without: set[str], only: set[str] | None = None) -> None:
    """All that lies there, and below. What a manifest names, as that of sharded states in a bundle, is compared with it."""
    manifest = None if without else manifests.read_if_any(source)
    named = {} if manifest is None else {file.name: file for file in manifest.files}
    for name in sorted(names_in(source)):
        path = source / name
        if name in without or name == LOCK or temporary_names.is_temporary(name) or (only is not None and name not in only):
            continue
        if path.is_symlink():
            replace_link(target / name, target / path.readlink())
        elif path.is_dir():
            durable.make_directory(target / name, durable=False)
            _copy_rest(path, target / name, set())
            durable.sync_directory(target / name)
        elif path.is_file():
            _copy_file(path, target / name, named.get(name))


@dataclasses.dataclass(frozen=True)
class Copied:
    """`target`: a path, or a URL. `state`: "copied", or "already there"."""

    name: str
    target: str
    bytes: int
    state: str


def find_origins(source: Path) -> list[Origin]:
    """A checkpoint, or all that are committed in a directory, in the order of their commits.

    Raises:
        NotACheckpointError: there is none.
    """
    if os.path.lexists(source / manifests.NAME):
        return [InDirectory(source, source.parent)]
    found = [path for path, _ in committed_deeper_in(source)] if source.is_dir() else []
    if not found:
        raise none_at(source, "no checkpoint of this library")
    for row in look(source):
        if row.state == DAMAGED and row.sequence is None:
            logger.warning("'%s' is left out: %s", source / row.name, row.problem)
    return [InDirectory(path, source) for path in reversed(found)]


def find_in_store(url: str) -> list[Origin]:
    """The same of what lies below a URL. Credentials come from the environment.

    Raises:
        NotACheckpointError: there is none.
        StorageError: the store cannot be read.
    """
    store = ObjectStore(url)
    copies, damaged, _ = Catalogue(store).find()
    for problem in damaged:
        logger.warning("a checkpoint is left out: %s", problem)
    if not copies:
        raise NotACheckpointError(f"'{url}' holds no checkpoint of this library")
    return [InStore(store, copy.folder, copy.manifest) for copy in reversed(copies)]


def copy(origins: list[Origin], directory: Path, told: Told = lambda _: None) -> Iterator[Copied]:
    """One after the other. The caller sees to it that nobody else saves there.

    Raises:
        CheckpointError: another checkpoint has the name or the number there, one that is there has lost files or is damaged, or
            there is no room; nothing was copied.
        CorruptError, StorageError: of one of them; those before it are copied.
    """
    there = {manifest.sequence: (path, manifest) for path, manifest in committed_deeper_in(directory)}
    wanted = [origin for origin in origins if not _is_there(origin, directory, there, told)]
    size = sum(origin.bytes for origin in wanted)
    if wanted and not free_space.has_room(directory, size):
        raise CheckpointError(f"the file system of '{directory}' has no room for {size} bytes: make some, or copy fewer")
    for origin in origins:
        target = directory / origin.name
        total = manifests.bytes_of(origin.manifest)
        if origin in wanted:
            _copy_one(origin, directory, target, told)
        yield Copied(origin.name, str(target), total, COPIED if origin in wanted else THERE)


def _is_there(origin: Origin, directory: Path, there: dict[int, tuple[Path, Manifest]], told: Told) -> bool:
    """Whether the very same is: then all of it is read, and compared with the manifest."""
    target = directory / origin.name
    found = manifests.read_if_any(target)
    if found is not None and manifests.identity(found) == manifests.identity(origin.manifest):
        if missing := missing_files(target, found):
            raise CheckpointError(
                f"'{target}' is there, but {len(missing)} of its {len(found.files)} files are missing or cut off "
                f"({', '.join(missing[:_NAMED])}): move it away, and copy again"
            )
        for file in found.files:
            state, problem = judge(target, file, found, fast=False)
            if state != GOOD:
                raise CheckpointError(f"'{target}' is there, but '{file.name}' {problem}: move it away, and copy again")
            told(file.bytes)
        return True
    if os.path.lexists(target):
        raise CheckpointError(f"'{target}' is there, and is something else: move it away, or copy to another directory")
    if origin.manifest.sequence in there:
        raise CheckpointError(
            f"'{there[origin.manifest.sequence][0]}' has the same number of commit as '{origin.name}', and is another "
            "checkpoint: which is newer could not be told there; copy to another directory"
        )
    return False


def _copy_one(origin: Origin, directory: Path, target: Path, told: Told) -> None:
    aside = _aside(directory, origin.name)
    if os.path.lexists(aside):
        durable.remove_tree(aside)
    durable.make_directory(aside, durable=True)
    try:
        for file in origin.manifest.files:
            origin.fetch(file, aside / file.name, told)
        origin.fetch_rest(aside)
        sharded_files.mend(aside, origin.manifest)
        durable.crash_point("copied")
        durable.write_small_file(aside / manifests.NAME, origin.content)
        durable.sync_directory(aside)
    except BaseException:
        durable.remove_tree(aside)
        raise
    durable.crash_point("copy-complete")
    durable.make_directory(target.parent, durable=True)
    durable.rename_durably(aside, target)


def _aside(directory: Path, name: str) -> Path:
    """What a crash leaves of it, whoever cleans up there knows."""
    return temporary_names.temporary_path(directory / name) if is_step_name(name) else late_names.partial_of(directory, name)


def move_latest(directory: Path, named_at_source: str | None) -> None:
    """Of steps it names the newest. Of bundles what it names at the source, if it names nothing here.

    Raises:
        StorageError: it cannot be written.
    """
    committed = committed_deeper_in(directory)
    steps = [path.name for path, _ in committed if is_step_name(path.name) and path.parent == directory]
    now = read_latest(directory)
    if steps and now != steps[0]:
        durable.replace_durably(directory / LATEST, f"{steps[0]}\n".encode(), "latest")
    elif not steps and now is None and named_at_source in {str(path.relative_to(directory)) for path, _ in committed}:
        durable.replace_durably(directory / LATEST, str(named_at_source).encode(), "latest")
