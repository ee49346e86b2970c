"""Before a bundle is looked for at home: what is complete on the nodes of the job has to come there first.

Where frameworks read directories and `latest` themselves, home alone says what there is. So all ranks wait until the drains of
their nodes have brought what the nodes hold; then nothing newer can be on a node, and no reader needs to know of nodes.

What can never come is left out, with a warning: a part of it lies on a disk that is not here, or is damaged. What a person can
help is an error, since an older checkpoint would be read otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt.coordinator import Coordinator
from ckpt.directory import manifest as manifests
from ckpt.directory.listing import find_steps
from ckpt.directory.receipts import place_in, read_receipts
from ckpt.directory.root import has_size
from ckpt.directory.run_file import find_run
from ckpt.drain import journal as journals
from ckpt.drain import node as nodes
from ckpt.drain.backoff import is_permanent
from ckpt.drain.home import Home
from ckpt.drain.journal import COPIED, FAILED
from ckpt.drain.node import Generation, Generations
from ckpt.drain.runs import describe_lost_home
from ckpt.errors import CheckpointError, InUseError, PeerError
from ckpt.restore.near_bundles import NearBundles
from ckpt.storage import durable
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.storage.log_file import stamp_of
from ckpt.tiers.drain_process import DrainProcess
from ckpt.tiers.node_level import NodeFinder
from ckpt.tiers.node_storage import boot
from ckpt.tiers.tier import Tier

logger = logging.getLogger("ckpt")

MOVING, DELIVERED, BLOCKED, DAMAGED = "moving", "delivered", "blocked", "damaged"
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_WORD_S = 10.0  # a wait that takes longer is told of
_CLOCK_NS = 20_000_000  # times of files are taken from a clock that only ticks


@dataclasses.dataclass(frozen=True)
class OnItsWay:
    """A generation on one node that is not home yet.

    Attributes:
        name, called: of its directory there, and at home.
        moves_latest: as its manifest says.
        node: the number of that node.
        state: MOVING: the drain is at it; DELIVERED: this node's part is home; BLOCKED: a person must do something; DAMAGED:
            it cannot come.
        text: why.
        lacks: of one that is delivered: numbers of the nodes that have not done so.
    """

    name: str
    called: str
    sequence: int
    moves_latest: bool
    node: int
    state: str
    text: str = ""
    lacks: tuple[int, ...] = ()


class Homecoming:
    """Of one session.

    Args:
        stream: of the keys; no other conversation of this job uses it.
        timeout_s: longest that ranks wait for each other, seconds.
        patience_s: longest that they wait for the drains.
    """

    def __init__(self, tier: Tier, coordinator: Coordinator, stream: str, timeout_s: float, patience_s: float) -> None:
        self._tier = tier
        self._coordinator = coordinator
        self._stream = stream
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._calls = 0

    def wait(self, home: Path, name: str | None) -> NearBundles:
        """All ranks call it. Returns what lies on this rank's node.

        Args:
            name: of the only bundle that is wanted; None: all that move `latest`.

        Raises:
            CheckpointError: something that is wanted is complete on the nodes, and does not come home; on all ranks.
            PeerError: a rank does not answer.
        """
        self._calls += 1
        own = _OwnNode(self._tier, home)
        try:
            return self._wait(own, name)
        finally:
            own.close()

    def _wait(self, own: _OwnNode, name: str | None) -> NearBundles:
        judge = _Judge(name, self._patience_s)
        pause_s, turn = _SHORTEST_PAUSE_S, 0
        wanted: list[str] = []
        while True:
            said = self._exchange(f"{self._stream}/{self._calls}-{turn}", own.report(wanted), judge)
            if said["error"]:
                raise CheckpointError(said["error"])
            if not said["wait"]:
                return own.copies(said["one_node"])
            own.finalise(said["manifests"])
            wanted, turn = said["wanted"], turn + 1
            time.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 1.5)

    def _exchange(self, key: str, report: dict[str, Any], judge: _Judge) -> dict[str, Any]:
        """What rank 0 makes of the reports, on all ranks."""
        verdict = None
        try:
            answers = self._coordinator.gather(key, json.dumps(report).encode(), self._timeout_s)
            if answers is not None:
                verdict = judge.decide([json.loads(answer) for answer in answers])
        except PeerError as missing:
            if self._coordinator.rank != 0:
                raise
            verdict = _verdict(error=f"what lies on the nodes cannot be told: {missing}")
        said = None if verdict is None else json.dumps(verdict).encode()
        heard: dict[str, Any] = json.loads(self._coordinator.broadcast(f"{key}-verdict", said, 2 * self._timeout_s))
        return heard


def _verdict(**said: Any) -> dict[str, Any]:
    nothing: dict[str, Any] = {"wait": False, "error": "", "wanted": [], "manifests": {}, "one_node": False}
    return nothing | said


# ---- on each node ----------------------------------------------------------------------------------------------------


class _OwnNode:
    """What one rank finds on its node, and does there. One rank of each node holds a lock meanwhile, and has the drain run.

    It raises nothing: the others wait for its word.
    """

    def __init__(self, tier: Tier, home: Path) -> None:
        self._tier = tier
        self._root: Path | None = None
        self._lock: DirectoryLock | None = None
        self._drain: DrainProcess | None = None
        self._began_ns = time.time_ns()
        self._in_vain: set[str] = set()  # step directories that receipts do not make complete
        self._trouble = self._fatal = ""
        self._astray = ""  # why what lies here does not come to this home
        try:
            self._root = NodeFinder(tier, home).root()
            if self._root is None:
                self._fatal = describe_lost_home(tier.path, home)
        except CheckpointError as error:
            self._fatal = str(error)
        try:
            if self._root is not None and _is_there(self._root / nodes.NAME):
                self._enter(self._root, home)
        except (CheckpointError, OSError) as error:
            self._trouble = str(error)

    def _enter(self, root: Path, home: Path) -> None:
        self._generations = Generations(root)
        self._drain = DrainProcess(root)
        lock = DirectoryLock(root, name=nodes.RESTORING, owner="another rank")
        with contextlib.suppress(InUseError):  # then that rank does it
            lock.acquire()
            self._lock = lock
            self._astray = _lead_to(root, home)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def copies(self, one_node: bool) -> NearBundles:
        with contextlib.suppress(CheckpointError):
            if self._drain is not None:
                return NearBundles(self._generations.find(), one_node)
        return NearBundles()

    def report(self, wanted: Sequence[str]) -> dict[str, Any]:
        """
        Args:
            wanted: names of step directories whose manifests other nodes need.
        """
        said: dict[str, Any] = {"place": _place_of(self._tier.path), "leads": self._lock is not None}
        said |= {"fatal": self._fatal, "trouble": self._trouble}
        found: list[OnItsWay] = []
        if self._root is not None and self._drain is not None:
            try:
                stands = self._astray or (self._drain.ensure() if self._lock is not None else "")
                found = [_stopped(each, stands) if stands else each for each in self._look(self._root)]
                said["bare"] = [path.name for path in find_steps(self._root).bare if path.name not in self._in_vain]
                said["manifests"] = {name: self._content(self._root / name) for name in wanted}
            except (CheckpointError, OSError) as error:
                said["trouble"] = str(error)
        return said | {"generations": [dataclasses.asdict(each) for each in found]}

    def _content(self, directory: Path) -> str:
        try:
            return (directory / manifests.NAME).read_text(encoding="utf-8")
        except OSError:
            return ""

    def _look(self, root: Path) -> list[OnItsWay]:
        node = nodes.read(root)
        found = [self._state_of(each, root, node) for each in self._generations.find() if each.manifest.bundle]
        return [each for each in found if each is not None]

    def _state_of(self, generation: Generation, root: Path, node: nodes.Node) -> OnItsWay | None:
        """None: it is over."""
        manifest = generation.manifest
        path = journals.path_of(root, generation.sequence)
        journal = journals.read(path)
        place = place_in(generation.directory, manifest) or node.place
        name, sequence = generation.directory.name, generation.sequence
        way = OnItsWay(name, manifest.bundle, sequence, manifest.moves_latest, place.number, MOVING)
        if journal is None or journal.identity != generation.identity:
            return way
        if journal.state == FAILED and not journal.blocked:
            return dataclasses.replace(way, state=self._kind_of_failure(journal, path), text=journal.text)
        if journal.is_over and not journal.blocked:
            return None
        if journal.state != COPIED and not journal.blocked:
            return way  # what another node has not delivered, that one says: it may be back, and mended
        try:
            return dataclasses.replace(way, state=DELIVERED, lacks=tuple(Home(node).missing(sequence, place)))
        except CheckpointError as error:
            return dataclasses.replace(way, text=str(error))

    def _kind_of_failure(self, journal: journals.Journal, path: Path) -> str:
        if journal.next is not None:
            return MOVING
        stamp = stamp_of(path)
        # The drain tries once more when a restore begins, if it was an error of a system call.
        if journal.errno and (stamp is None or stamp[1] < self._began_ns - _CLOCK_NS):
            return MOVING
        return BLOCKED if is_permanent(journal.errno) else DAMAGED  # a file on this node that cannot be read

    def finalise(self, contents: Mapping[str, str]) -> None:
        """Gives step directories, of which receipts say that they are complete here, the manifest that another node has."""
        if self._root is None or self._lock is None:
            return
        for name, content in contents.items():
            directory = self._root / name
            if not directory.is_dir() or (directory / manifests.NAME).exists():
                continue
            self._in_vain.add(name)
            try:
                if _is_received(directory, content, nodes.read(self._root)):
                    durable.replace_durably(directory / manifests.NAME, content.encode(), "finalise")
                    logger.info("'%s' was made complete: a crash had left it without its manifest", directory)
            except (CheckpointError, OSError, KeyError, TypeError, ValueError) as error:
                logger.warning("'%s' cannot be made complete: %s", directory, error)


def _is_there(path: Path) -> bool:
    """Unlike exists(), which may take a disk that fails for an empty one."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _stopped(way: OnItsWay, why: str) -> OnItsWay:
    return dataclasses.replace(way, state=BLOCKED, text=why) if way.state in (MOVING, DELIVERED) else way


def _lead_to(root: Path, home: Path) -> str:
    """Has the drain carry to this home, which somebody may have renamed. Returns why it cannot; else an empty text.

    Raises:
        CheckpointError, OSError: a file cannot be read or written.
    """
    path, before = root / nodes.NAME, nodes.read(root).home
    if before == home or os.path.realpath(before) == os.path.realpath(home):
        return ""
    if find_run(before) == root.name:
        return f"it goes to '{before}', of which '{home}' is a copy: load from there, or remove that one"
    document = manifests.parse_checked(path.read_bytes()) | {"home": str(home)}
    durable.replace_durably(path, manifests.with_checksum(document), "node")
    logger.info("what lies in '%s' goes to '%s' now, which was '%s'", root, home, before)
    return ""


def _is_received(directory: Path, content: str, node: nodes.Node) -> bool:
    manifest = manifests.parse(content.encode())
    place = place_in(directory, manifest) or node.place
    received = {(file.name, file.bytes, file.crc32) for receipt in read_receipts(directory) for file in receipt.files}
    mine = [file for file in manifest.files if place.holds(file)]
    return all((file.name, file.bytes, file.crc32) in received and has_size(directory / file.name, file.bytes) for file in mine)


def _place_of(path: Path) -> str:
    """The same on all ranks that see the same disk; empty if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{boot()}:{found.st_dev:x}:{found.st_ino:x}"


# ---- on rank 0 -------------------------------------------------------------------------------------------------------


class _Judge:
    """Whether to wait, what to say, or what is left out."""

    def __init__(self, name: str | None, patience_s: float) -> None:
        self._name = name
        self._patience_s = patience_s
        self._began = time.monotonic()
        self._told: set[str] = set()
        self._first: set[int] | None = None  # what lay there when this began: another job may save there on and on

    def decide(self, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What all ranks are told."""
        for rank, said in enumerate(reports):
            if said["fatal"]:
                return _verdict(error=f"rank {rank}: {said['fatal']}")
            if said["trouble"]:
                self._tell(f"what lies on the node of rank {rank} is left out as long as this lasts: {said['trouble']}")
        places = {said["place"] for said in reports}
        by_sequence: dict[int, dict[str, OnItsWay]] = {}
        for said in sorted(reports, key=lambda said: bool(said["leads"])):  # of each node, who leads has the last word
            for each in said["generations"]:
                way = OnItsWay(**each)
                if way.called == self._name or (self._name is None and way.moves_latest):
                    by_sequence.setdefault(way.sequence, {})[said["place"]] = way
        if self._first is None or any(said["trouble"] for said in reports):
            self._first = (self._first or set()) | by_sequence.keys()
        bare = {name for said in reports for name in said.get("bare", ())}
        contents = {name: text for said in reports for name, text in said.get("manifests", {}).items() if text}
        waits, wanted = [], []
        for sequence, ways in sorted(by_sequence.items(), reverse=True):
            if sequence not in self._first:
                continue
            outcome, text = self._outcome(ways, bare)
            if outcome == BLOCKED:
                return _verdict(error=text)
            first = next(iter(ways.values()))
            if outcome == MOVING:
                waits.append(text)
                wanted += [first.name] if first.name in bare else []
        if waits and time.monotonic() - self._began > self._patience_s:
            return _verdict(error=f"{waits[0]}; waited for {self._patience_s:g} s")
        if waits and time.monotonic() - self._began > _WORD_S:
            self._tell(waits[0])
        return _verdict(wait=bool(waits), wanted=wanted, manifests=contents, one_node=len(places) == 1 and "" not in places)

    def _outcome(self, ways: Mapping[str, OnItsWay], bare: set[str]) -> tuple[str, str]:
        """Of one generation, by the disks on which it is: MOVING or BLOCKED, and what to say; DAMAGED: it is left out."""
        first = next(iter(ways.values()))
        what = f"'{first.called}' (commit {first.sequence})"
        if (bad := next((each for each in ways.values() if each.state == DAMAGED), None)) is not None:
            self._tell(f"{what} on the nodes is left out: {bad.text}")
            return DAMAGED, ""
        if (blocked := next((each for each in ways.values() if each.state == BLOCKED), None)) is not None:
            return BLOCKED, (
                f"{what} is complete on the nodes, and cannot come home: {blocked.text}. Something older would be read: remove "
                "the cause, or name the checkpoint to load"
            )
        waits = f"{what}, complete on the nodes, is waited for until it has come home"
        moving = next((each for each in ways.values() if each.state == MOVING), None)
        if moving is not None:
            return MOVING, f"{waits}{f': {moving.text}' if moving.text else ''}"
        absent = {node for each in ways.values() for node in each.lacks} - {each.node for each in ways.values()}
        if absent and first.name not in bare:
            named = ", ".join(map(str, sorted(absent)))
            self._tell(
                f"{what} lies on the nodes only in part, and is left out: nothing of it comes from the disk of node {named}"
            )
            return DAMAGED, ""
        return MOVING, waits

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)
