"""What a session has of the disks of its nodes: who shares one, where this rank saves, and what carries it home.

enter     once, at the first save, all ranks: each looks at its node's disk and tells rank 0, which says who is on which
          node, from which number commits and file names go on, and which steps are there already
route     each save: by way of the node, or straight home (commit/bypass.py)
carry     each save that the nodes have: the drain is woken, and watched until home has it
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ckpt.commit.bypass import BypassVote
from ckpt.directory import manifest as manifests
from ckpt.directory.keeping import Keeping
from ckpt.directory.listing import find_steps
from ckpt.directory.manifest import FileEntry
from ckpt.directory.node_place import NodePlace
from ckpt.directory.run_file import find_run
from ckpt.directory.step_names import step_name
from ckpt.directory.steps import StepDirectories
from ckpt.drain import backlog
from ckpt.drain.runs import describe_lost_home
from ckpt.errors import CheckpointError, DeadlineError, InUseError, PeerError, SkippedError
from ckpt.fence import follow, unfollow
from ckpt.metrics.noting import HOME, note_commit, note_free
from ckpt.metrics.registry import PROCESS, Reading
from ckpt.options import Options
from ckpt.saving.task import SaveTask
from ckpt.storage import free_space
from ckpt.tiers.drain_process import DrainProcess
from ckpt.tiers.home_watch import HomeWatch
from ckpt.tiers.node_storage import NodeStorage, identity, this_process
from ckpt.tiers.pace import TrainingPace
from ckpt.tiers.run_id import choose_run, highest_on_its_way, make_run
from ckpt.tiers.tier import NODE, Tier, warnings_about

logger = logging.getLogger("ckpt")

_LOOK_S = 0.05


class NodeFinder:
    """Where a restore looks; see OwnNode."""

    def __init__(self, tier: Tier, home: Path) -> None:
        self.home = home
        self._tier = tier

    def root(self) -> Path | None:
        """
        Raises:
            NotACheckpointError, StorageError: home does not say which run it is of.
        """
        run = find_run(self.home)
        return None if run is None else self._tier.path / run

    def lost_home(self) -> str:
        """
        Raises:
            CheckpointError: that cannot be found out.
        """
        return describe_lost_home(self._tier.path, self.home)

    def serve(self, root: Path) -> None:
        """Other nodes fetch from its drain what they lack."""
        DrainProcess(root).ensure()


def name_run(tier: Tier, home: StepDirectories) -> str:
    """On rank 0, at the first save: see choose_run().

    Raises:
        CheckpointError: home has no checkpoints and names no run, and its node has some: nobody is to begin anew unawares.
    """
    lost = "" if home.committed().checkpoints else describe_lost_home(tier.path, home.path)
    if lost:
        raise CheckpointError(f"nothing was saved: {lost}")
    return choose_run(home.path)


@dataclasses.dataclass(frozen=True)
class _Said:
    """What one rank finds on its node.

    Attributes:
        node: the same on all ranks that share the disk.
        locked: whether this rank is the one of them that has locked it.
        step, sequence: the highest that lie there.
        refusal: why this rank cannot save there; empty if it can.
        lost: what lies there of a home that is not what it was; empty if all is well.
    """

    node: str = ""
    locked: bool = False
    step: str = ""
    sequence: int = 0
    refusal: str = ""
    lost: str = ""


@dataclasses.dataclass(frozen=True)
class Route:
    """Where the files of a save go first.

    Attributes:
        directory: of the step there.
        number: that the names of its files get, see numbered_name(); None: the first that is free.
        place: of this rank, if it is by way of its node; None: straight home.
    """

    directories: StepDirectories
    directory: Path
    number: int | None = None
    place: NodePlace | None = None


class TierHome(Protocol):
    """What numbers of home a NodeLevel asks for."""

    @property
    def path(self) -> Path: ...

    def refuse_unseen(self, step: int, highest: str, sequence: int) -> None:
        """See StepDirectories."""

    def highest(self) -> tuple[str, int]:
        """See StepDirectories."""

    def reserve_numbers(self, above: int) -> int:
        """See Root."""


class NodeLevel:
    """
    Args:
        home: to which they are carried.
        keeping: which stay there.
        home_every: see NodeStorage.describe_node().
    """

    def __init__(
        self,
        tier: Tier,
        home: TierHome,
        rank: int,
        world_size: int,
        keeping: Keeping,
        options: Options,
        home_every: Mapping[str, int | float] | None = None,
    ) -> None:
        self.tier = tier
        self.entered = False
        self._vote = BypassVote(options.max_in_flight, self._say)
        self._home = home
        self._rank = rank
        self._world_size = world_size
        self._keeping = keeping
        self._home_every = home_every
        self._options = options
        self._locked = False  # whether this rank has locked the disk
        self._bytes = 0  # of the last save, on this node
        self._highest = ""  # step that was saved, or lay somewhere when this was entered
        self._base = 0  # names of files that lie beside others have numbers above it
        self._off = ""  # why this tier is not used at all
        self._broken = ""  # why nothing may land on this node
        self._storage: NodeStorage | None = None
        self._directories: StepDirectories | None = None
        self._place: NodePlace | None = None
        self._watch: HomeWatch | None = None
        self._pace = TrainingPace(self._is_draining)

    # ---- at the first save -----------------------------------------------------------------------------------------

    def look(self, run: str, token: str) -> bytes:
        """What this rank tells rank 0. The rank that locks the disk removes what a crash left there, before any rank writes.

        Args:
            run: names the job, see publish_lock.py.
            token: of rank 0, see StepDirectories.
        """
        try:
            said = self._look(run, token)
        except (CheckpointError, OSError) as error:
            said = _Said(refusal=str(error))
        return json.dumps(dataclasses.asdict(said)).encode()

    def refuse(self, text: str) -> bytes:
        """What this rank tells instead if it cannot save by way of its node."""
        return json.dumps(dataclasses.asdict(_Said(refusal=text))).encode()

    def _look(self, run: str, token: str) -> _Said:
        lost = describe_lost_home(self.tier.path, self._home.path)
        if lost and not find_steps(self._home.path).checkpoints:
            return _Said(lost=lost)  # before anything is made there
        if self._storage is None or self._directories is None:
            storage = NodeStorage(self.tier, self._home.path, run)
            options = self._options
            directories = StepDirectories(
                storage.root, Keeping(), shared=self._world_size > 1, max_in_flight=options.max_in_flight
            )
            storage.make()
            for warning in warnings_about(self.tier.path, self._home.path) if self._rank == 0 else ():
                logger.warning("%s", warning)
            self._storage, self._directories = storage, directories
        self._directories.token = token
        self._directories.look_for_restore()  # what lies there may be of a line that was given up
        if not self._locked:
            with contextlib.suppress(InUseError):  # of another rank, or of a job that should be gone: rank 0 finds out
                self._directories.claim(0, 0.0)
                self._locked = True
        found = self._storage.survey()
        return _Said(identity(self.tier.path), self._locked, found.highest_step_name, found.highest_sequence)

    def arrange(self, answers: Sequence[bytes], run: str, step: int) -> dict[str, Any]:
        """On rank 0: who is on which node, and where numbers go on.

        Args:
            answers: of look(), in the order of ranks.
            run: as there.
            step: to be saved first.

        Raises:
            CheckpointError: nobody has looked at what lies there; numbers cannot be reserved at home; or a node has checkpoints
                of a home that names no run: nobody is to begin anew unawares.
        """
        found = [_Said(**json.loads(answer)) for answer in answers]
        for rank, said in enumerate(found):
            if said.lost:
                raise CheckpointError(f"nothing was saved: rank {rank} found that {said.lost}")
        if (there := make_run(self._home.path, run)) != run:
            raise CheckpointError(
                f"nothing was saved: '{self._home.path}' is the home of the run {there} by now, and was none when this job "
                "began; start it again"
            )
        step_there, sequence = max(said.step for said in found), max(said.sequence for said in found)
        self._home.refuse_unseen(step, step_there, sequence)
        highest, newest = self._home.highest()
        # What is on its way is of a node whose disk is another one now.
        base = self._home.reserve_numbers(max(newest, sequence, highest_on_its_way(self._home.path, run)))
        said_to_all: dict[str, Any] = {"step": max(highest, step_there), "sequence": base}
        nodes: dict[str, list[int]] = {}
        for rank, said in enumerate(found):
            if said.refusal:
                return said_to_all | {"off": f"rank {rank}: {said.refusal}"}
            nodes.setdefault(said.node, []).append(rank)
        for ranks in nodes.values():
            if not any(found[rank].locked for rank in ranks):
                return said_to_all | {"off": f"another job is saving to the disk of rank {ranks[0]}: end that one first"}
        return said_to_all | {"nodes": list(nodes.values())}

    def enter(self, said: dict[str, Any]) -> None:
        """Safe to call again.

        Args:
            said: by rank 0, from arrange().

        Raises:
            PeerError: a node's disk cannot be used, and the tier is required.
        """
        if self.entered:
            return
        self._highest, self._base = said["step"], said["sequence"]
        if "off" in said:
            if self.tier.required:
                raise PeerError(f"the disks of the nodes, which are required, cannot be used: {said['off']}", ())
            self._off = said["off"]
            logger.warning("saves go straight home: the disks of the nodes cannot be used: %s", self._off)
            self.entered = True
            return
        nodes = [tuple(ranks) for ranks in said["nodes"]]
        number = next(number for number, ranks in enumerate(nodes) if self._rank in ranks)
        self._place = NodePlace(number, len(nodes), nodes[number])
        assert self._storage is not None
        drain = self._begin_drain(self._storage, self._place) if self.leads else None
        self._watch = HomeWatch(self._storage, drain)
        self.entered = True

    def _begin_drain(self, storage: NodeStorage, place: NodePlace) -> DrainProcess | None:
        """None: there can be none, and then nothing is to land."""
        try:
            self._describe(storage, place)
        except CheckpointError as error:
            self._broken = str(error)
            return None
        drain = DrainProcess(storage.root)
        drain.ensure()
        self._pace.begin(storage.pace)
        follow(self._pace)
        PROCESS.watch(self._gauges)
        return drain

    def _describe(self, storage: NodeStorage, place: NodePlace) -> None:
        storage.describe_node(
            place.number,
            place.count,
            self._world_size,
            place.ranks,
            home_keeping=self._keeping,
            home_every=self._home_every,
            direct_io=self._options.direct_io,
            pids=this_process(),
        )

    def _gauges(self) -> Iterator[Reading]:
        return iter(()) if self._storage is None else backlog.gauges(self._storage.root, HOME)

    # ---- each save -------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this rank writes for its node what is the same on all ranks."""
        assert self._place is not None
        return self._place.ranks[0] == self._rank

    def route(self, task: SaveTask, number: int, home: StepDirectories) -> Route:
        """Of save `number`; to be called once for each, on all ranks, which take the same.

        A step that may lie somewhere already, here or at home, gets names that none of its files has.

        Raises:
            SkippedError, DeadlineError: the disk is full, and the tier says that nothing else is to be done then.
        """
        name = task.path.name
        is_new = name > self._highest
        self._highest = max(name, self._highest)
        files = 1 if is_new else self._base + number + 2
        return self._by_node(task, number, name, files) or Route(home, task.path, files)

    def route_bundle(self, task: SaveTask, number: int) -> Route | None:
        """The same; None: straight home. On a node, a bundle gets a directory that no save has had, named by its number."""
        return self._by_node(task, number, step_name(self._base + 1 + number))

    def _by_node(self, task: SaveTask, number: int, name: str, files: int | None = None) -> Route | None:
        if not self._takes(task, number):
            return None
        task.counts = self.bypass is None
        self._wait_for_room(task.path.name)
        assert self._directories is not None and self._storage is not None
        return Route(self._directories, self._storage.root / name, files, self._place)

    def _takes(self, task: SaveTask, number: int) -> bool:
        """Whether it goes by way of the nodes."""
        assert task.step is not None
        bypass = self.bypass
        return not self._off and not (bypass is not None and bypass.reason(number)) and self.tier.wants(task.step)

    @property
    def bypass(self) -> BypassVote | None:
        """None: all saves take the same way."""
        return None if self._off or self.tier.required else self._vote

    def _wait_for_room(self, name: str) -> None:
        """As the tier says what is to be done if its disk is full.

        Raises:
            SkippedError, DeadlineError: there is none.
        """
        if self.tier.when_full == "through" or not self._why_full():
            return
        if self.tier.when_full == "skip":
            raise SkippedError(f"'{name}' was not saved: {self._why_full()}")
        end = time.monotonic() + self._options.timeout_s
        while why := self._why_full():
            if time.monotonic() > end:
                raise DeadlineError(f"'{name}' was not saved: {why}, after {self._options.timeout_s} s")
            time.sleep(_LOOK_S)

    def _say(self) -> str:
        """Why saves are to go past the nodes, as this rank sees it. Raises nothing: the others wait for its answer."""
        try:
            return self._broken or (self._why_full() if self.tier.when_full == "through" else "")
        except (CheckpointError, OSError) as error:
            return str(error)

    def _why_full(self) -> str:
        """Why the disk takes no more saves. One rank of each node looks."""
        if self._storage is None or self._place is None or not self.leads:
            return ""
        if self._storage.has_room((self._options.max_in_flight + 1) * self._bytes):
            return ""
        return f"'{self._storage.root}' has no room for more: home takes checkpoints more slowly than they are saved"

    def carry(self, task: SaveTask, sequence: int, directory: Path) -> None:
        """The nodes have a save.

        Args:
            sequence: of the commit.
            directory: of the step, on the node.
        """
        assert self._watch is not None and self._storage is not None and task.step is not None
        if self.leads:
            manifest = manifests.read_if_any(directory)
            self._bytes = 0 if manifest is None else sum(file.bytes for file in filter(self._holds, manifest.files))
            self._storage.wake()
            note_free(NODE, free_space.free_bytes(directory))
        task.reach(NODE, directory)
        note_commit(NODE, task.step)
        task.note("commit", tier=NODE, step=task.step, sequence=sequence)
        self._watch.watch(sequence, task.step, directory.name, task.succeed, task.fail, task.path.name, task.note)

    def _is_draining(self) -> bool:
        return self._watch is not None and self._watch.awaits_any

    def _holds(self, file: FileEntry) -> bool:
        return self._place is not None and self._place.holds(file)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """What is not home yet is brought by the drain, all the same."""
        unfollow(self._pace)
        self._pace.close()
        if self._watch is not None:
            self._watch.close(0.0)
        if self._directories is not None:
            self._directories.release()
