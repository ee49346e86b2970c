"""Finding the newest checkpoint that every rank can read, and reading it.

Rank 0 goes through the checkpoints, newest commit first, and names each to the others; every rank verifies the files that it is
to load, and its share of those that nobody loads. The first that is good on all ranks is taken.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ckpt import _manifest
from ckpt._directory import StepDirectories, step_name
from ckpt._load import checksum_threads, torch_load
from ckpt._manifest import RANK, REPLICATED, FileEntry, Manifest
from ckpt._native import digest_file
from ckpt.coordinator import Coordinator
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
    """
    Args:
        stream: of the keys; no other conversation of this job uses it.
        timeout_s: how long to wait for the slowest rank, seconds; verifying a checkpoint must fit into it.
    """

    def __init__(self, directories: StepDirectories, coordinator: Coordinator, stream: str, timeout_s: float) -> None:
        self._directories = directories
        self._coordinator = coordinator
        self._stream = stream
        self._timeout_s = timeout_s
        self._calls = 0
        self._asked = 0

    def begin(self) -> None:
        """To be called first, on all ranks: however the last one ended, they ask the same questions again."""
        self._calls += 1
        self._asked = 0

    def restore(self, root: Path, loading: Loading) -> Restored | None:
        """See Checkpointer.restore()."""
        if self._coordinator.rank == 0:
            found, rejected = self._lead()
        else:
            found, rejected = self._follow(root)
        if found is not None:
            return self._load(*found, loading)
        if rejected:
            raise CorruptError(f"no checkpoint in '{root}' is good: " + "; ".join(rejected))
        return None

    # ---- agreeing --------------------------------------------------------------------------------------------------

    def _lead(self) -> tuple[tuple[Path, Manifest] | None, list[str]]:
        committed, damaged = self._directories.look()
        for error in damaged:
            logger.warning("a damaged checkpoint is passed over: %s", error)
        rejected = [str(error) for error in damaged]
        for directory, manifest in committed:
            self._tell({"step": manifest.step, "sequence": manifest.sequence})
            causes = self._collect(self._verify(directory, manifest))
            self._tell({"good": not causes})
            if not causes:
                return (directory, manifest), []
            rejected.append("; ".join(causes))
            logger.warning("checkpoint '%s' is passed over: %s", directory, rejected[-1])
        self._tell({"rejected": rejected})
        return None, rejected

    def _follow(self, root: Path) -> tuple[tuple[Path, Manifest] | None, list[str]]:
        while True:
            said = self._hear()
            if "rejected" in said:
                return None, list(said["rejected"])
            directory = root / step_name(said["step"])
            manifest, cause = self._read(directory, said["sequence"])
            if manifest is not None:
                cause = self._verify(directory, manifest)
            self._collect(cause)
            if self._hear()["good"] and manifest is not None:
                return (directory, manifest), []

    def _read(self, directory: Path, sequence: int) -> tuple[Manifest | None, str | None]:
        try:
            manifest = _manifest.read(directory)
        except NotACheckpointError as error:
            return None, str(error)
        if manifest.sequence != sequence:
            return None, f"'{directory}' is another checkpoint than on rank 0: all ranks must see the same directory"
        return manifest, None

    def _tell(self, message: dict[str, Any]) -> None:
        self._coordinator.broadcast(self._next_key(), json.dumps(message).encode(), self._timeout_s)

    def _hear(self) -> dict[str, Any]:
        return dict(json.loads(self._coordinator.broadcast(self._next_key(), None, self._timeout_s + 10)))

    def _collect(self, cause: str | None) -> list[str]:
        """Rank 0 gets what is wrong on any rank."""
        answers = self._coordinator.gather(self._next_key(), (cause or "").encode(), self._timeout_s) or []
        several = self._coordinator.world_size > 1
        return [f"rank {rank}: {a.decode()}" if several else a.decode() for rank, a in enumerate(answers) if a]

    def _next_key(self) -> str:
        self._asked += 1
        return f"{self._stream}/{self._calls}-{self._asked}"

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _verify(self, directory: Path, manifest: Manifest) -> str | None:
        """Checks this rank's files against the manifest; says what is wrong."""
        try:
            for file in manifest.files:
                if self._is_mine(file):
                    _verify_file(directory, file)
        except (CorruptError, StorageError) as error:
            return str(error)
        return None

    def _is_mine(self, file: FileEntry) -> bool:
        if file.kind == REPLICATED:
            return True  # as every rank loads it
        return file.rank % self._coordinator.world_size == self._coordinator.rank

    def _load(self, directory: Path, manifest: Manifest, loading: Loading) -> Restored:
        def load(file: FileEntry) -> Any:
            return torch_load(directory / file.name, loading.map_location, loading.weights_only)

        own = sorted((file for file in manifest.files if file.kind == RANK), key=lambda file: file.rank)
        replicated = [load(file) for file in manifest.files if file.kind == REPLICATED]
        state = None
        if own and manifest.world_size == self._coordinator.world_size:
            state = next((load(file) for file in own if file.rank == self._coordinator.rank), None)
        elif own and loading.merge is not None:
            state = loading.merge([load(file) for file in own])
        elif own:
            raise CheckpointError(
                f"'{directory}' was saved by {manifest.world_size} ranks, which gave states of their own, and this job has "
                f"{self._coordinator.world_size} of them: pass restore(merge=...) to make one state of all, or resume with as "
                "many ranks"
            )
        return Restored(manifest.step, state, replicated[0] if replicated else None)


def _verify_file(directory: Path, file: FileEntry) -> None:
    path = directory / file.name
    size, crc = digest_file(os.fsencode(path), checksum_threads())
    if size != file.bytes:
        raise CorruptError(f"'{path}' has {size} bytes; its manifest says {file.bytes}")
    if crc != file.crc32:
        raise CorruptError(f"'{path}' fails the CRC-32 of its manifest: its bytes have changed")
