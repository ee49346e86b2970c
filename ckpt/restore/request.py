"""What restore() is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ckpt.directory.manifest import REPLICATED, FileEntry, Manifest
from ckpt.loading.archive import Beside
from ckpt.loading.progress import Progress
from ckpt.restore.file_readers import InPlaceReader, LentMemoryReader, NewMemoryReader
from ckpt.restore.one_step import OneStep
from ckpt.restore.places import StepPlaces
from ckpt.restore.sharded_reader import ShardedReader
from ckpt.sharded.entries import EntryFinder


class _Pair(NamedTuple):
    step: int
    state: Any


class Restored(_Pair):
    """What restore() found: a pair of the step and the state as it was given to save(), this rank's own.

    Attributes:
        replicated: what was given as such; None if nothing was. Then `state` may be the one that is None.
        sharded: what was given as `sharded_into`, filled. Without it a sharded state is left out, and a warning says so.
        sources: from where this rank has read each file: "node" (its own), "node 3", "home".
    """

    replicated: Any
    sharded: Any
    sources: Mapping[str, str]

    def __new__(
        cls, step: int, state: Any, replicated: Any = None, sharded: Any = None, sources: Mapping[str, str] | None = None
    ) -> Restored:
        self = super().__new__(cls, step, state)
        self.replicated, self.sharded = replicated, sharded
        self.sources = {} if sources is None else dict(sources)
        return self


class RestoreRequest(NamedTuple):
    """How to load, as given to restore().

    `timeout_s`: longest that reading a file may take, seconds.
    `one`: the step that is wanted; None: the newest that is good. `progress`: is told of files that this rank reads.
    """

    map_location: Any
    weights_only: bool
    merge: Callable[[list[Any]], Any] | None
    into: Any
    replicated_into: Any
    strict: bool
    timeout_s: float
    sharded_into: Any = None
    finder: EntryFinder | None = None
    one: OneStep | None = None
    progress: Progress = Progress(None)

    def sharded_reader(self, places: StepPlaces, manifest: Manifest, touched: bool) -> ShardedReader | None:
        """Of the sharded state; None if there is no target for it.

        Args:
            touched: the target holds parts of another checkpoint already.
        """
        if self.sharded_into is None:
            return None
        assert self.finder is not None
        strict = self.strict or touched
        return ShardedReader(
            places,
            manifest,
            self.sharded_into,
            self.finder,
            strict=strict,
            weights_only=self.weights_only,
            timeout_s=self.timeout_s,
        )

    def target_of(self, file: FileEntry) -> Any:
        return self.replicated_into if file.kind == REPLICATED else self.into

    def reader_of(
        self, path: Path, file: FileEntry, touched: bool, collective: bool, beside: Beside | None = None
    ) -> NewMemoryReader:
        """Opens a file, and lays it beside its target.

        Args:
            touched: the target holds parts of another checkpoint already.
            collective: all ranks read it together, so that reading it is a collective.
            beside: as of Archive.
        """
        how = self.weights_only, collective, self.timeout_s, beside
        target = self.target_of(file)
        if target is None:
            return NewMemoryReader(path, file, self.map_location, *how)
        if lends(target):
            return LentMemoryReader(path, file, target, self.map_location, *how)
        strict = self.strict or touched  # else what it lacks would keep the parts of the other
        return InPlaceReader(path, file, target, strict, self.weights_only, touched, collective, self.timeout_s, beside)


def lends(target: Any) -> bool:
    return callable(target) and not isinstance(target, torch.nn.Module)
