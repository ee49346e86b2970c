"""Finding the newest checkpoint that every rank can read, and reading it.

The ranks choose it together, see _choice.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ckpt import _manifest
from ckpt._choice import Candidate, Chooser
from ckpt._directory import StepDirectories
from ckpt._load import checksum_threads, torch_load
from ckpt._manifest import RANK, REPLICATED, FileEntry, Manifest
from ckpt._native import digest_file
from ckpt.errors import CheckpointError, CorruptError, NotACheckpointError, StorageError

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

    def begin(self) -> None:
        """To be called first, on all ranks."""
        self._chooser.begin()

    def restore(self, root: Path, loading: Loading) -> Restored | None:
        """See Checkpointer.restore()."""

        def verify(candidate: Candidate) -> str | None:
            return self._verify(root / candidate.name, candidate.sequence)

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

    def _verify(self, directory: Path, sequence: int) -> str | None:
        """Checks the files that this rank is to load, and its share of those that nobody loads; says what is wrong."""
        return verify_files(directory, sequence, self._is_mine)

    def _is_mine(self, file: FileEntry) -> bool:
        if file.kind == REPLICATED:
            return True  # as every rank loads it
        return file.rank % self._world_size == self._rank

    def _load(self, directory: Path, manifest: Manifest, loading: Loading) -> Restored:
        def load(file: FileEntry) -> Any:
            return torch_load(directory / file.name, loading.map_location, loading.weights_only)

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


def verify_files(directory: Path, sequence: int, is_mine: Callable[[FileEntry], bool]) -> str | None:
    """Compares files with their manifest; says what is wrong."""
    try:
        manifest = _manifest.read(directory)
        if manifest.sequence != sequence:
            return f"'{directory}' is another checkpoint than on rank 0: all ranks must see the same directory"
        for file in manifest.files:
            if is_mine(file):
                _verify_file(directory, file)
    except (NotACheckpointError, CorruptError, StorageError) as error:
        return str(error)
    return None


def _verify_file(directory: Path, file: FileEntry) -> None:
    path = directory / file.name
    size, crc = digest_file(os.fsencode(path), checksum_threads())
    if size != file.bytes:
        raise CorruptError(f"'{path}' has {size} bytes; its manifest says {file.bytes}")
    if crc != file.crc32:
        raise CorruptError(f"'{path}' fails the CRC-32 of its manifest: its bytes have changed")
