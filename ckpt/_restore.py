"""Finding the newest checkpoint that every rank can read, and reading it.

The ranks choose it together, see _choice.py. What a rank is going to load is read, and checked on the way, while the ranks
choose: so its bytes are read once. It is unpickled when the choice has been made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ckpt import _manifest
from ckpt._archive import Archive, reader_threads
from ckpt._choice import Candidate, Chooser
from ckpt._directory import StepDirectories
from ckpt._manifest import RANK, REPLICATED, FileEntry, Manifest
from ckpt._native import digest_file
from ckpt._unpickle import Contents, read_whole
from ckpt.errors import CheckpointError, CorruptError, DeadlineError, NotACheckpointError, StorageError

logger = logging.getLogger("ckpt")


class _Pair(NamedTuple):
    step: int
    state: Any


class Restored(_Pair):
    """What restore() found: a pair of the step and the state as it was given to save(), this rank's own.

    Attributes:
        replicated: what was given as such; None if nothing was. Then `state` may be the one that is None.
    """

    replicated: Any

    def __new__(cls, step: int, state: Any, replicated: Any = None) -> Restored:
        self = super().__new__(cls, step, state)
        self.replicated = replicated
        return self


class Loading(NamedTuple):
    """How to load, as given to restore()."""

    map_location: Any
    weights_only: bool
    merge: Callable[[list[Any]], Any] | None


class Restorer:
    """See the module."""

    def __init__(self, directories: StepDirectories, rank: int, world_size: int, chooser: Chooser) -> None:
        self._directories = directories
        self._rank = rank
        self._world_size = world_size
        self._chooser = chooser
        self._held: dict[Path, Contents] = {}  # of the candidate: what has been read, and found good

    def begin(self) -> None:
        """To be called first, on all ranks."""
        self._chooser.begin()

    def restore(self, root: Path, loading: Loading) -> Restored | None:
        """See Checkpointer.restore()."""

        def verify(candidate: Candidate) -> str | None:
            return self._verify(root / candidate.name, candidate.sequence, loading)

        try:
            return self._choose_and_load(root, loading, verify)
        finally:
            self._held = {}

    def _choose_and_load(self, root: Path, loading: Loading, verify: Callable[[Candidate], str | None]) -> Restored | None:
        if self._rank == 0:
            committed, damaged = self._directories.look()
            for error in damaged:
                logger.warning("a damaged checkpoint is passed over: %s", error)
            candidates = [Candidate(directory.name, manifest.sequence) for directory, manifest in committed]
            found, rejected = self._chooser.lead(candidates, [str(error) for error in damaged], verify)
        else:
            found, rejected = self._chooser.follow(verify)
        if found is not None:
            return self._load(root / found.name, _manifest.read(root / found.name), loading)
        if rejected:
            raise CorruptError(f"no checkpoint in '{root}' is good: " + "; ".join(rejected))
        return None

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _verify(self, directory: Path, sequence: int, loading: Loading) -> str | None:
        """Checks the files that this rank is to load, and its share of those that nobody loads; says what is wrong."""
        self._held = {}  # before there is memory for the next

        def check(directory: Path, manifest: Manifest, file: FileEntry) -> None:
            if self._will_load(manifest, file, loading):
                self._held[directory / file.name] = _read_file(directory, file, loading.map_location)
            else:
                _verify_file(directory, manifest, file)

        return verify_files(directory, sequence, self._is_mine, check)

    def _will_load(self, manifest: Manifest, file: FileEntry, loading: Loading) -> bool:
        if file.kind == REPLICATED:
            return True
        if manifest.world_size == self._world_size:
            return file.rank == self._rank
        return loading.merge is not None

    def _is_mine(self, file: FileEntry) -> bool:
        if file.kind == REPLICATED:
            return True  # as every rank loads it
        return file.rank % self._world_size == self._rank

    def _load(self, directory: Path, manifest: Manifest, loading: Loading) -> Restored:
        def load(file: FileEntry) -> Any:
            contents = self._held.pop(directory / file.name, None)  # another rank has checked the others of a merge
            contents = contents or _read_file(directory, file, loading.map_location)
            return contents.unpickle(loading.map_location, loading.weights_only)

        own = sorted((file for file in manifest.files if file.kind == RANK), key=lambda file: file.rank)
        replicated = [load(file) for file in manifest.files if file.kind == REPLICATED]
        state = None
        if own and manifest.world_size == self._world_size:
            state = next((load(file) for file in own if file.rank == self._rank), None)
        elif own and loading.merge is not None:
            state = loading.merge([load(file) for file in own])
        elif own:
            raise CheckpointError(
                f"'{directory}' was saved by {manifest.world_size} ranks, which gave states of their own, and this job has "
                f"{self._world_size} of them: pass restore(merge=...) to make one state of all, or resume with as "
                "many ranks"
            )
        return Restored(manifest.step, state, replicated[0] if replicated else None)


def verify_files(
    directory: Path,
    sequence: int,
    is_mine: Callable[[FileEntry], bool],
    check: Callable[[Path, Manifest, FileEntry], None] | None = None,
) -> str | None:
    """Compares files with their manifest; says what is wrong."""
    try:
        manifest = _manifest.read(directory)
        if manifest.sequence != sequence:
            return f"'{directory}' is another checkpoint than on rank 0: all ranks must see the same directory"
        for file in manifest.files:
            if is_mine(file):
                (check or _verify_file)(directory, manifest, file)
    except (NotACheckpointError, CorruptError, StorageError, DeadlineError) as error:
        return str(error)
    return None


def _verify_file(directory: Path, manifest: Manifest, file: FileEntry) -> None:
    path = directory / file.name
    size, crc = digest_file(os.fsencode(path), reader_threads())
    _compare(path, file, size, crc)


def _read_file(directory: Path, file: FileEntry, map_location: Any) -> Contents:
    """The file in memory, every byte of it compared with the manifest."""
    path = directory / file.name
    archive = Archive(path)
    _compare(path, file, archive.size, file.crc32)
    contents, crc = read_whole(archive, map_location)
    _compare(path, file, archive.size, crc)
    return contents


def _compare(path: Path, file: FileEntry, size: int, crc: int) -> None:
    if size != file.bytes:
        raise CorruptError(f"'{path}' has {size} bytes; its manifest says {file.bytes}")
    if crc != file.crc32:
        raise CorruptError(f"'{path}' fails the CRC-32 of its manifest: its bytes have changed")
