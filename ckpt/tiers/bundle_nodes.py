"""The disks of its nodes, as a BundleCheckpointer saves by way of them. What is on them: see commit/node_bundle_target.py.

A framework may name another directory for each checkpoint, rename it, or remove the one before. What comes home later would
come to the wrong place then. So these disks belong to one directory: the first to which a job saves a second time, or in which
it has looked for checkpoints before, or that was a home of nodes already. All else goes straight home.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckpt.commit.bypass import BypassVote
from ckpt.commit.node_bundle_target import NodeBundleTarget
from ckpt.commit.publication import Publication
from ckpt.commit.target import SaveCall, SavedFile
from ckpt.coordinator import Coordinator
from ckpt.directory import manifest as manifests
from ckpt.directory.bundles import BundleRoot
from ckpt.directory.keeping import Keeping
from ckpt.directory.listing import LATEST
from ckpt.directory.node_place import NodePlace
from ckpt.directory.publish_lock import is_home
from ckpt.directory.steps import StepDirectories
from ckpt.drain.runs import describe_lost_home
from ckpt.errors import CheckpointError, PeerError
from ckpt.options import Options
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.task import SaveTask
from ckpt.storage import durable, temporary_names
from ckpt.tiers.entering import NodeEntry
from ckpt.tiers.node_level import NodeLevel, Route
from ckpt.tiers.run_id import choose_run
from ckpt.tiers.tier import Tier, check_place

logger = logging.getLogger("ckpt")

_EACH = {"steps": 1}  # a framework that names a checkpoint finds it at home
_tokens = itertools.count()
_guard = threading.Lock()
_used: set[Path] = set()  # directories on the disk of this node that a BundleCheckpointer of this process saves to; see _guard


class _Home:
    """What a NodeLevel asks of home: a TierHome."""

    def __init__(self, path: Path, root: BundleRoot | None) -> None:
        self.path = path
        self._root = root

    def refuse_unseen(self, step: int, highest: str, sequence: int) -> None:
        """Nothing is replaced or removed, whatever was looked at before."""

    def highest(self) -> tuple[str, int]:
        return "", 0

    def reserve_numbers(self, above: int) -> int:
        assert self._root is not None
        return self._root.reserve_numbers(above)


class Landing:
    """Where the files of one bundle land on the node of this rank.

    Args:
        name: of the bundle.
        root: of the bundle at home; None on ranks that have none.
    """

    def __init__(
        self, level: NodeLevel, route: Route, task: SaveTask, name: str, rank: int, world_size: int, root: BundleRoot | None
    ) -> None:
        assert route.place is not None
        self._level = level
        self._task = task
        self._name = name
        self._rank = rank
        self._world_size = world_size
        self._root: Any = root
        self._place: NodePlace = route.place
        self._directories: StepDirectories = route.directories
        self.directory = route.directory
        self._targets: list[Path] = []
        self._called: dict[str, str] = {}

    def make_file(self, called: str) -> FileInFlight:
        """
        Args:
            called: its name at home.

        Raises:
            CheckpointError: it cannot be begun.
        """
        if not manifests.is_plain_name(called):
            raise CheckpointError(f"a file cannot be called '{called}' in a checkpoint that goes by way of the disks of nodes")
        stem = "state" if self._world_size == 1 else f"rank-{self._rank:05d}"
        (target,), limits = self._directories.begin(self.directory.name, [stem], len(self._targets) + 1)
        self._targets.append(target)
        self._called[target.name] = called
        return FileInFlight(target, limits=limits, with_directory=True)

    def target(self, call: SaveCall, moves_latest: bool, varying: Sequence[str]) -> NodeBundleTarget:
        """Of its publication."""
        there = SaveCall(call.number, call.step, call.what, call.where, self.directory, call.files, self._name, moves_latest)
        return NodeBundleTarget(
            *(there, self._directories, self._rank, self._world_size),
            home=self._root,
            place=self._place,
            path=self._task.path,
            called=self._called,
            varying=varying,
        )

    def end(self, files: Sequence[SavedFile], published: Publication | None) -> None:
        """
        Args:
            published: None: it has failed.
        """
        if published is None:
            self._task.discard()  # before forget_save() looks whether anything is left
        else:
            for target in self._targets:
                if target.name in published.dropped:
                    durable.remove_quietly(target)
            self._task.carry = functools.partial(self._level.carry, self._task, published.sequence, self.directory)
        self._directories.forget_save(self.directory, self._targets, failed=published is None)
        self._task.afterwards = self._directories.sweep
        for each in files:
            self._directories.note_limits(each.file.found_limits())


class BundleNodes:
    """Of one BundleCheckpointer.

    Args:
        stream: of the keys; no other conversation of this job uses it.
    """

    def __init__(self, tier: Tier, coordinator: Coordinator, stream: str, options: Options) -> None:
        self._tier = tier
        self._coordinator = coordinator
        self._stream = stream
        self._options = options
        self._entry = NodeEntry(coordinator, options.timeout_s)
        self._level: NodeLevel | None = None
        self._root: Path | None = None  # whose these disks are, as this rank calls it
        self._own: BundleRoot | None = None
        self._before: tuple[Path, BundleRoot | None] | None = None  # on rank 0: where the last save went
        self._looked: Path | None = None  # where checkpoints were looked for last
        self._said: dict[str, str] = {}  # by rank 0
        self._claimed: Path | None = None  # in _used
        self._checked: Path | None = None
        self.succeeded = False  # whether a save has: then all ranks know who is on which node

    def check(self, root: Path) -> None:
        """
        Raises:
            CheckpointError: the tier cannot be one of this directory.
        """
        if root != self._checked:
            try:
                check_place(self._tier.path, root)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
            self._checked = root

    def note_look(self, root: Path) -> None:
        """Checkpoints were looked for there."""
        self._looked = root

    # ---- each save -------------------------------------------------------------------------------------------------

    def serves(self, root: Path) -> bool:
        """Whether saves to this directory go by way of the nodes."""
        if self._root is None or self._level is None or not self._level.entered:
            return False
        return root == self._root or os.path.realpath(root) == os.path.realpath(self._root)

    def enter(self, root: Path, own: BundleRoot | None, number: int, step: int) -> None:
        """All ranks call it, for each save, until one has succeeded by way of the nodes.

        Args:
            own: on rank 0, the directory.

        Raises:
            CheckpointError, PeerError: as of NodeEntry.enter().
        """
        rank = self._coordinator.rank
        if self._level is not None and self._level.entered and (rank != 0 or self.succeeded):
            return
        key = f"{self._stream}/{number}"
        said = json.dumps(self._propose(root, own)).encode() if rank == 0 else None
        heard = json.loads(self._coordinator.broadcast(key, said, self._options.timeout_s))
        if "refusal" in heard:
            text = f"nothing was saved: {heard['refusal']}"
            raise CheckpointError(text) if rank == 0 else PeerError(text, (0,))
        if not heard:
            return
        if self._level is None:
            home = _Home(root, own)
            world_size = self._coordinator.world_size
            self._level = NodeLevel(self._tier, home, rank, world_size, Keeping(), self._options, _EACH)
            self._root, self._own = root, own
        refusal = "" if self._level.entered else self._claim(self._tier.path / heard["run"])
        self._entry.enter(self._level, f"{key}-nodes", heard["run"], heard["token"], step, refusal)

    def _propose(self, root: Path, own: BundleRoot | None) -> dict[str, str]:
        """On rank 0; empty: this save goes straight home. Nobody is to begin anew unawares where home was lost."""
        if self._root is not None:
            return self._said if root == self._root else {}
        before, self._before = self._before, (root, own)
        if before != (root, own) and root != self._looked and not is_home(root):
            return {}
        try:
            if lost := describe_lost_home(self._tier.path, root):
                return {"refusal": lost}
            self._said = {"run": choose_run(root), "token": temporary_names.shared_token(next(_tokens))}
        except CheckpointError as error:
            logger.warning("this save goes straight home, past the disks of the nodes: %s", error)
        return self._said

    def _claim(self, root: Path) -> str:
        """Why not; empty if this one may save there."""
        with _guard:
            if root in _used and root != self._claimed:
                return f"another BundleCheckpointer of this process saves to '{root}'"
            _used.add(root)
            self._claimed = root
            return ""

    def land(self, task: SaveTask, root: Path, own: BundleRoot | None, number: int) -> Landing | None:
        """Of save `number`; None: straight home. After enter().

        Raises:
            CheckpointError: it cannot be made, and goes nowhere.
        """
        name = task.path.name
        if self._level is None or not self.serves(root) or task.path.parent != root or not _is_plain(name):
            return None
        if own is not self._own and self._coordinator.rank == 0:
            raise CheckpointError(
                f"'{root}' was renamed or replaced while its checkpoints come by way of the disks of nodes; give it its name "
                "back, or make another checkpoint engine"
            )
        route = self._level.route_bundle(task, number)
        if route is None:
            return None
        return Landing(self._level, route, task, name, self._coordinator.rank, self._coordinator.world_size, self._own)

    @property
    def bypass(self) -> BypassVote | None:
        return None if self._level is None or not self._level.entered else self._level.bypass

    @property
    def keeps(self) -> Path | None:
        """The directory to which drains carry what is saved."""
        return self._root

    def close(self) -> None:
        """What is not home yet is brought by the drains, all the same."""
        if self._level is not None:
            self._level.close()
        with _guard:
            if self._claimed is not None:
                _used.discard(self._claimed)


def _is_plain(name: str) -> bool:
    """Whether a bundle of this name may come home later: none that lies deeper, nor where other files of home lie."""
    return manifests.is_plain_name(name) and not name.startswith(".") and name != LATEST
