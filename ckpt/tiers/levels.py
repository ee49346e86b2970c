"""All that a Checkpointer has of its tiers."""

from __future__ import annotations

import concurrent.futures
import functools
from pathlib import Path
from typing import NamedTuple

from ckpt.coordinator import Coordinator
from ckpt.directory.keeping import Keeping
from ckpt.directory.steps import StepDirectories
from ckpt.drain.remote_place import place_of, release_unused
from ckpt.options import Options
from ckpt.restore.nearby import Nearby
from ckpt.restore.remote_copies import RemoteCopies
from ckpt.saving.task import SaveTask
from ckpt.storage.object_store import ObjectStore
from ckpt.tiers.node_level import NodeFinder, NodeLevel
from ckpt.tiers.store_level import StoreLevel
from ckpt.tiers.tier import NODE, OBJECT, Tier, Tiers


class Levels(NamedTuple):
    """
    Attributes:
        nodes, nearby: of a tier of nodes: what saves need of it, and what restores do.
        store, copies: the same of an object store.
    """

    nodes: NodeLevel | None = None
    nearby: Nearby | None = None
    store: StoreLevel | None = None
    copies: RemoteCopies | None = None

    def expect(self, task: SaveTask) -> None:
        """Of a save that is to come to all of them."""
        if self.nodes is not None:
            task.tiers[NODE] = concurrent.futures.Future()
        if self.store is not None:
            task.later[OBJECT] = concurrent.futures.Future()

    def note_claimed(self, home: Path) -> None:
        """On rank 0, once: home is ours."""
        release_unused(home, None if self.store is None else self.store.place)

    @property
    def may_refuse(self) -> bool:
        """Whether any save may be refused, not the first alone."""
        return self.store is not None and self.store.tier.required

    def begin_save(self) -> None:
        """On rank 0, when home is ours, before anything is written.

        Raises:
            CheckpointError: as of StoreLevel.begin().
        """
        if self.store is not None:
            self.store.begin()

    def follow(self, task: SaveTask, sequence: int) -> None:
        """It has been published; what lies behind home sees to it when it is there."""
        if self.store is not None:
            task.then = functools.partial(self.store.carry, task, sequence)

    def close(self) -> None:
        """What has not come to all tiers yet is carried there, all the same."""
        for level in (self.nodes, self.store):
            if level is not None:
                level.close()


def _wanted_behind(remote: Tier | None) -> dict[str, int | float] | None:
    """What is to come home, although newer ones are there, because it goes on from there: see NodeStorage.describe_node()."""
    if remote is not None and remote.every_steps is not None:
        return {"steps": remote.every_steps}
    return None if remote is None or remote.every_s is None else {"seconds": remote.every_s}


def make_levels(
    tiers: Tiers, directories: StepDirectories, coordinator: Coordinator, stream: str, keeping: Keeping, options: Options
) -> Levels:
    """
    Args:
        directories: at home.
        stream: of the keys of conversations.
        keeping: which checkpoints stay at home.

    Raises:
        ValueError, StorageError: as of StoreLevel.
    """
    nodes = nearby = store = copies = None
    directories.back.has_drains = tiers.node is not None or tiers.remote is not None
    home, rank, world_size = directories.path, coordinator.rank, coordinator.world_size
    finder = None if tiers.node is None else NodeFinder(tiers.node, home)
    if tiers.node is not None and finder is not None:
        nearby = Nearby(coordinator, f"{stream}-nearby", finder, options.timeout_s, directories.back)
        nodes = NodeLevel(tiers.node, directories, rank, world_size, keeping, options, _wanted_behind(tiers.remote))
    if tiers.remote is not None:
        bucket = ObjectStore(tiers.remote.url, tiers.remote.options)
        scratch = None if tiers.remote.scratch is None else Path(tiers.remote.scratch)
        place = place_of(home, tiers.remote.url)
        find_root = (lambda: None) if finder is None else finder.root
        copies = RemoteCopies(bucket, place, rank, find_root, scratch, options.timeout_s)
        store = StoreLevel(tiers.remote, directories, rank, world_size, options, copies)
    return Levels(nodes, nearby, store, copies)
