"""What of the checkpoints lies on the disks of the nodes: complete there, and maybe not at home yet.

Each rank looks at its own node's disk and tells rank 0 which files lie there. A checkpoint is a candidate if the nodes have all
of it together, or home has: what a rank lacks on its own node it fetches from another one, see fetching.py, or reads from home.
So one rank of each node has its drain serve what lies there, as long as the restore goes on. It holds a lock meanwhile: the
drain removes nothing then, and does not end.

A job may have ended when one node had the manifest already, and another only the receipts of its ranks: in a step directory
without a manifest, or, if the step was just being saved again, with the old one. What such receipts name counts, if rank 0
knows the manifest and it names the same. If that checkpoint is named, the manifest is put there: finalise().

Of a job with another number of ranks, nobody knows what lies where: then home alone counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ckpt.coordinator import Coordinator
from ckpt.directory import manifest as manifests
from ckpt.directory.going_back import GoingBack
from ckpt.directory.listing import Found, find_steps
from ckpt.directory.manifest import REPLICATED, Manifest
from ckpt.directory.receipts import place_in, read_receipts
from ckpt.directory.root import has_size
from ckpt.directory.step_names import names_in
from ckpt.drain import node as nodes
from ckpt.errors import CheckpointError, InUseError, PeerError, StorageError
from ckpt.restore.candidates import Candidate
from ckpt.restore.fetching import Commit, NodeFetch, remove_fetched
from ckpt.storage import durable
from ckpt.storage.directory_lock import DirectoryLock

logger = logging.getLogger("ckpt")


@dataclasses.dataclass(frozen=True)
class NearCopy:
    """A committed step on nodes.

    Attributes:
        identity: see manifests.identity().
        collective: whether something in it is the same on all ranks.
        missing: how many files none of the nodes has.
        holders: numbers of the nodes that have something of it, and serve it.
    """

    name: str
    step: int
    sequence: int
    identity: str
    collective: bool
    missing: int = 0
    holders: tuple[int, ...] = ()


class OwnNode(Protocol):
    """The disk of the node of this rank.

    Attributes:
        home: where the addresses of drains lie.
    """

    home: Path

    def root(self) -> Path | None:
        """The directory of steps, which need not be there; None if this home has no run."""

    def lost_home(self) -> str:
        """What is to be said if that home names no run, but checkpoints of it lie here; else an empty text."""

    def serve(self, root: Path) -> None:
        """Has the drain run. Called on one rank of each node."""


class Nearby:
    """Of one Checkpointer.

    Args:
        stream: of the keys; no other conversation of this job uses it.
        back: sees to it that a step that is gone back to stays at home: rank 0 until the job ends, others until it is chosen.
    """

    def __init__(self, coordinator: Coordinator, stream: str, own: OwnNode, timeout_s: float, back: GoingBack) -> None:
        self._back = back
        self._coordinator = coordinator
        self._stream = stream
        self._own = own
        self._timeout_s = timeout_s
        self._calls = 0
        self._root: Path | None = None
        self._node: int | None = None  # the number of this one, if it has any
        self._began = 0.0
        self._lock: DirectoryLock | None = None
        self._fetches: dict[Candidate, NodeFetch] = {}
        self._here: dict[tuple[int, str], tuple[Path, Manifest]] = {}  # by sequence and identity, what lies on this node
        self._unfinished: dict[str, Path] = {}  # by name, step directories on this node that have no manifest
        self.copies: list[NearCopy] = []  # on rank 0: what lies on nodes
        self.lost = ""  # on rank 0: what is to be said if home has been lost, and nodes have what was there
        self.newest = -1  # on rank 0: the highest sequence that lies on any, whether it can be read or not

    def look(self, step: int | None) -> None:
        """All ranks call it; end() must follow.

        Args:
            step: that is to be gone back to; None: the newest is wanted.

        Raises:
            PeerError: a rank does not answer.
        """
        self._calls += 1
        self._begin(step)
        found, self._here, newest = [], {}, -1
        steps = self._steps()
        for path, manifest in steps.checkpoints:
            newest = max(newest, manifest.sequence)
            if manifest.world_size == self._coordinator.world_size:
                self._here[manifest.sequence, manifests.identity(manifest)] = path, manifest
                found.append(_describe(path, manifest))
        self._unfinished = {path.name: path for path in steps.bare}
        loose = {path.name: _received(path) for path in steps.bare}
        for path, manifest in steps.checkpoints:
            if received := _received(path, manifest):
                self._unfinished[path.name], loose[path.name] = path, received
        said = {"newest": newest, "node": self._node, "copies": found, "loose": loose, "lost": self._lost_home()}
        try:
            answers = self._coordinator.gather(f"{self._stream}/{self._calls}", json.dumps(said).encode(), self._timeout_s)
        except PeerError as error:
            if self._coordinator.rank != 0:
                raise
            logger.warning("what lies on the disks of nodes is left out of this restore, home alone counts: %s", error)
            answers = []  # who is silent is asked again when a candidate is named; until then home alone counts
        known = {key: manifest for key, (_, manifest) in self._here.items()}
        said_by_all = [json.loads(answer) for answer in answers or []]
        self.copies, self.newest = _join(said_by_all, known)
        self.lost = next((each["lost"] for each in [said, *said_by_all] if each["lost"]), "")

    def end(self) -> None:
        """Of a restore: nothing is read any more."""
        for fetch in self._fetches.values():
            fetch.close()
        self._fetches.clear()
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _begin(self, step: int | None) -> None:
        self.end()
        self._root, self._node, self._began = None, None, time.monotonic()
        try:
            self._root = root = self._own.root()
            if root is None:
                return
            if step is not None and self._coordinator.rank == 0:
                self._back.try_step(step)
            if not root.is_dir():
                logger.warning("nothing of this run lies on this node, in '%s': the node is new, or its path is another", root)
                return
            lock = DirectoryLock(root, name=nodes.RESTORING, owner="another rank")
            with contextlib.suppress(InUseError):  # then that rank does it
                lock.acquire()
                self._lock = lock
                remove_fetched(root)
                if step is not None:  # before its drain goes on: rank 0 may not have come so far
                    self._back.try_step(step)
            if (root / nodes.NAME).exists():
                self._node = nodes.read(root).place.number
                if self._lock is not None:
                    self._own.serve(root)
        except (CheckpointError, OSError) as error:  # home may have all the same
            logger.warning("what lies on this node cannot be served to others: %s", error)

    def _lost_home(self) -> str:
        try:
            return "" if self._root is not None else self._own.lost_home()
        except (CheckpointError, OSError) as error:
            logger.warning("whether something of a lost home lies on this node cannot be told: %s", error)
            return ""

    def _steps(self) -> Found:
        nothing = Found([], [], [])
        try:
            return nothing if self._root is None else find_steps(self._root)
        except Exception as error:
            logger.warning("what lies on this node cannot be read: %s", error)
            return nothing

    def directory_of(self, candidate: Candidate) -> Path | None:
        """The step directory on this rank's node, which may lack files; None: it has none."""
        found = self._here.get((candidate.sequence, candidate.identity))
        return None if found is None else found[0]

    def unfinished_of(self, candidate: Candidate) -> Path | None:
        """The same, of a directory that has another manifest, or none."""
        return self._unfinished.get(candidate.name)

    def finalise(self, candidate: Candidate) -> None:
        """Of one that rank 0 has named: makes it complete on this node, if its manifest alone is missing. One rank does it."""
        directory, fetch = self.unfinished_of(candidate), self.fetch_of(candidate)
        mine_to_do = self._lock is not None and self._node is not None and self.directory_of(candidate) is None
        if not mine_to_do or directory is None or fetch is None or self._root is None:
            return
        try:
            manifest, before = fetch.manifest(), manifests.read_if_any(directory)
            if manifest is None or (before is not None and before.sequence >= manifest.sequence):
                return
            place = place_in(directory, manifest) or nodes.read(self._root).place
            received = set(_received(directory))
            mine = [file for file in manifest.files if place.holds(file)]
            if all((file.name, file.bytes, file.crc32) in received for file in mine):
                durable.replace_durably(directory / manifests.NAME, fetch.manifest_content, "finalise")
                if before is not None:
                    self._here.pop((before.sequence, manifests.identity(before)), None)
                self._here[candidate.sequence, candidate.identity] = directory, manifest
                logger.info("'%s' was made complete: a crash had left it without its manifest", directory)
        except (CheckpointError, OSError) as error:
            logger.warning("'%s' cannot be made complete, its files can be read all the same: %s", directory, error)

    def fetch_of(self, candidate: Candidate) -> NodeFetch | None:
        """What other nodes have of it; None if there are none."""
        if self._root is None or not set(candidate.holders) - {self._node}:
            return None
        if candidate not in self._fetches:
            commit = Commit(candidate.sequence, candidate.identity, candidate.holders)
            self._fetches[candidate] = NodeFetch(
                self._own.home, self._root, commit, self._coordinator.rank, self._node, self._began, self._timeout_s
            )
        return self._fetches[candidate]


def _describe(path: Path, manifest: Manifest) -> dict[str, Any]:
    there = names_in(path)
    return {
        "name": path.name,
        "step": manifest.step,
        "sequence": manifest.sequence,
        "identity": manifests.identity(manifest),
        "collective": any(file.kind == REPLICATED for file in manifest.files),
        "files": len(manifest.files),
        "held": [file.name for file in manifest.files if file.name in there and has_size(path / file.name, file.bytes)],
    }


def _received(directory: Path, manifest: Manifest | None = None) -> list[tuple[str, int, int]]:
    """Names, sizes and CRC-32s of what receipts name there, and is there.

    Args:
        manifest: that stands there: its own receipts are left out.
    """
    try:
        receipts = [receipt for receipt in read_receipts(directory) if manifest is None or not receipt.is_of(manifest)]
    except StorageError as error:
        logger.warning("what lies on this node cannot be read: %s", error)
        return []
    files = [file for receipt in receipts for file in receipt.files]
    return [(file.name, file.bytes, file.crc32) for file in files if has_size(directory / file.name, file.bytes)]


def _join(answers: list[dict[str, Any]], known: Mapping[tuple[int, str], Manifest]) -> tuple[list[NearCopy], int]:
    """What the nodes have together, newest first.

    Args:
        known: the manifests that lie on the node of this rank.
    """
    found: dict[tuple[int, str], NearCopy] = {}
    held: dict[tuple[int, str], set[str]] = {}
    holders: dict[tuple[int, str], set[int]] = {}
    missing: dict[tuple[int, str], int] = {}
    for answer in answers:
        for said in answer["copies"]:
            key = said["sequence"], said["identity"]
            found[key] = NearCopy(said["name"], said["step"], *key, said["collective"])
            held.setdefault(key, set()).update(said["held"])
            missing[key] = said["files"]
            holders.setdefault(key, set()).update([] if answer["node"] is None else [answer["node"]])
    for key, manifest in known.items():
        for answer in answers:
            loose = {tuple(each) for each in answer["loose"].get(found[key].name, ())} if key in found else set()
            there = {file.name for file in manifest.files if (file.name, file.bytes, file.crc32) in loose}
            if there and answer["node"] is not None:
                holders[key].add(answer["node"])
            held.get(key, set()).update(there)
    joined = [
        dataclasses.replace(copy, missing=missing[key] - len(held[key]), holders=tuple(sorted(holders.get(key, ()))))
        for key, copy in sorted(found.items(), reverse=True)
    ]
    return joined, max((answer["newest"] for answer in answers), default=-1)
