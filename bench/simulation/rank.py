"""One rank of the simulated job: trainer, lane, writers, fence and committer. See model.py."""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Iterable

import simpy

from bench.simulation.drain import Drain, Home
from bench.simulation.model import (
    DEVICE,
    HOST,
    INFINITE,
    Cluster,
    Committee,
    FileSystem,
    Job,
    Meeting,
    Outcome,
    Save,
    Saving,
    Server,
    Steps,
)


class State(enum.Enum):
    """As in csrc/jobs/chunk.h."""

    ARRIVING = enum.auto()
    PENDING = enum.auto()
    STAGING = enum.auto()
    WRITING = enum.auto()
    DONE = enum.auto()


@dataclasses.dataclass(eq=False)
class Chunk:
    file: File
    nbytes: int
    stripe: int
    state: State
    staged: bool = False  # its bytes are in the arena
    captured: bool = False


@dataclasses.dataclass(eq=False)
class File:
    """A save of this rank, as the engine sees it."""

    save: Save
    number: int
    captured: simpy.Event
    durable: simpy.Event
    written: simpy.Event
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    uncaptured: int = 0
    unwritten: int = 0


@dataclasses.dataclass
class World:
    """What ranks share."""

    env: simpy.Environment
    cluster: Cluster
    job: Job
    saving: Saving
    file_system: FileSystem
    gradients: Meeting
    committee: Committee
    trained_at: float = 0.0
    bytes_in: int = 0


class Arena:
    """Room for so many bytes; who waits for room is served in turn."""

    def __init__(self, env: simpy.Environment, nbytes: int) -> None:
        self._room = simpy.Container(env, capacity=nbytes, init=nbytes)
        self._nbytes = nbytes
        self.peak = 0

    def take(self, nbytes: int) -> Steps:
        yield self._room.get(nbytes)
        self.peak = max(self.peak, self._nbytes - int(self._room.level))

    def try_take(self, nbytes: int) -> bool:
        """Only where nobody waits in take(): a fence on the host, which no lane competes with."""
        if self._room.level < nbytes:
            return False
        self._room.get(nbytes)
        self.peak = max(self.peak, self._nbytes - int(self._room.level))
        return True

    def give(self, nbytes: int) -> None:
        self._room.put(nbytes)


@dataclasses.dataclass
class Node:
    """What the ranks of a node share. Without a tier of nodes there is neither disk nor drain."""

    number: int
    link: Server
    disk: Server | None = None
    drain: Drain | None = None


class Rank:
    def __init__(self, world: World, node: Node) -> None:
        self._world, self._env, self._node = world, world.env, node
        self.arena = Arena(self._env, world.saving.arena_bytes)
        self.d2h = Server(self._env, world.cluster.d2h)
        self.saves: list[Save] = []
        self._files: list[File] = []
        self._queue: list[Chunk] = []  # in the order in which writers claim them
        self._claimed = 0
        self._to_fetch = simpy.Store(self._env)
        self._to_commit = simpy.Store(self._env)
        self._changed = self._env.event()
        self.processes: list[simpy.Process] = [self._env.process(self._train())]
        self._env.process(self._fetch())
        self._env.process(self._commit())
        for _ in range(world.saving.writers):
            self._env.process(self._write())

    # ---- training ----------------------------------------------------------------------------------------------------

    def _train(self) -> Steps:
        job, env = self._world.job, self._env
        for iteration in range(job.iterations):
            file = None
            if iteration % job.every == 0:
                file = yield from self._save()
            yield env.timeout(job.forward_s + job.backward_s)
            yield self._world.gradients.come()
            if file is not None:
                reached = env.now
                yield from self._fence(file)
                file.save.fence_s = env.now - reached
            yield env.timeout(job.update_s)
        self._world.trained_at = max(self._world.trained_at, env.now)
        for file in self._files:
            yield file.durable

    def _save(self) -> Steps:
        save = Save(self._env.now)
        in_flight = [file for file in self._files if not file.durable.triggered]
        if len(in_flight) >= self._world.saving.max_in_flight:
            yield in_flight[0].durable
        yield self._env.timeout(self._world.saving.plan_s)
        file = File(save, len(self._files), self._env.event(), self._env.event(), self._env.event())
        stripe = self._world.file_system.first_stripe()
        begins = State.ARRIVING if self._world.job.source == DEVICE else State.PENDING
        sizes = self._world.saving.chunks(self._world.job.bytes_per_rank)
        file.chunks = [Chunk(file, nbytes, stripe + at, begins) for at, nbytes in enumerate(sizes)]
        file.uncaptured = file.unwritten = len(sizes)
        self._world.bytes_in += sum(sizes)
        self.saves.append(save)
        self._files.append(file)
        self._queue += file.chunks
        if begins is State.ARRIVING:
            for chunk in file.chunks:
                self._to_fetch.put(chunk)
        self._to_commit.put(file)
        self._note_change()
        if not self._world.job.lazy:
            yield from self._fence(file)
        save.save_s = self._env.now - save.begun_at
        return file

    def _fence(self, file: File) -> Steps:
        """On a device the update waits for the last copy. On the host this thread copies what no writer has claimed."""
        if self._world.job.source == HOST:
            for chunk in reversed(file.chunks):
                while chunk.state is State.PENDING and not self.arena.try_take(chunk.nbytes):
                    yield self._changed
                if chunk.state is State.PENDING:
                    yield from self._stage(chunk)
        if not file.captured.triggered:
            yield file.captured

    # ---- chunks ------------------------------------------------------------------------------------------------------

    def _stage(self, chunk: Chunk) -> Steps:
        chunk.state = State.STAGING
        if self._world.cluster.copy != INFINITE:
            yield self._env.timeout(chunk.nbytes / self._world.cluster.copy)
        chunk.state, chunk.staged = State.PENDING, True
        self._capture(chunk)

    def _fetch(self) -> Steps:
        """The lane: one copy after the other, in file order."""
        while True:
            chunk = yield self._to_fetch.get()
            yield from self.arena.take(chunk.nbytes)
            yield from self.d2h.serve(chunk.nbytes)
            chunk.state, chunk.staged = State.PENDING, True
            self._capture(chunk)

    def _capture(self, chunk: Chunk) -> None:
        if not chunk.captured:
            chunk.captured = True
            chunk.file.uncaptured -= 1
            if chunk.file.uncaptured == 0:
                chunk.file.save.captured_at = self._env.now
                chunk.file.captured.succeed()
        self._note_change()

    def _write(self) -> Steps:
        """A writer: claims strictly in order, so it waits for a chunk that is not there yet."""
        while True:
            while self._claimed == len(self._queue) or self._queue[self._claimed].state is not State.PENDING:
                yield self._changed
            chunk = self._queue[self._claimed]
            self._claimed += 1
            chunk.state = State.WRITING
            self._note_change()
            if self._node.disk is not None:
                yield from self._node.disk.serve(chunk.nbytes)
            else:
                yield from self._node.link.serve(chunk.nbytes)
                yield from self._world.file_system.write(chunk.stripe, chunk.nbytes)
            chunk.state = State.DONE
            if chunk.staged:
                self.arena.give(chunk.nbytes)
            self._capture(chunk)
            chunk.file.unwritten -= 1
            if chunk.file.unwritten == 0:
                chunk.file.written.succeed()

    def _commit(self) -> Steps:
        while True:
            file = yield self._to_commit.get()
            yield file.written
            yield self._env.timeout(self._world.saving.fsync_s)
            file.save.flushed_at = self._env.now
            yield from self._world.committee.agree(file.number, self._node.number)
            file.save.durable_at = self._env.now
            file.durable.succeed()
            if self._node.drain is not None:
                self._node.drain.note(file)

    def _note_change(self) -> None:
        changed, self._changed = self._changed, self._env.event()
        changed.succeed()


# ---- a run -----------------------------------------------------------------------------------------------------------


def simulate(cluster: Cluster, job: Job, saving: Saving, seed: int = 0) -> Outcome:
    """Runs the training until its last save is durable.

    Raises:
        ValueError: a rank has nothing to save.
    """
    if job.bytes_per_rank < 1 or job.iterations < 1 or job.every < 1:
        raise ValueError(f"there is nothing to simulate in {job}")
    env = simpy.Environment()
    file_system = FileSystem(env, cluster, random.Random(seed))
    committee = Committee(env, saving, cluster)
    world = World(env, cluster, job, saving, file_system, Meeting(env, cluster.shown_ranks), committee)
    home = Home(env, cluster, saving)
    nodes = [make_node(world, home, number) for number in range(cluster.shown_nodes)]
    ranks = [Rank(world, node) for node in nodes for _ in range(cluster.gpus_per_node)]
    env.run(simpy.AllOf(env, [process for rank in ranks for process in rank.processes]))
    if cluster.node_disk is not None and len(ranks[0].saves) - 1 not in home.arrived:
        env.run(home.comes(len(ranks[0].saves) - 1))
    return Outcome(
        saves=[rank.saves for rank in ranks],
        trained_s=world.trained_at,
        plain_s=job.iterations * (job.forward_s + job.backward_s + job.update_s),
        ended_s=env.now,
        bytes_in=world.bytes_in,
        bytes_out=file_system.bytes_out,
        arena_peak=max(rank.arena.peak for rank in ranks),
        busy_s={
            "D2H link": busiest(rank.d2h for rank in ranks),
            "node disk": busiest(node.disk for node in nodes if node.disk is not None),
            "node link": busiest(node.link for node in nodes),
            "file system": busiest(file_system.servers),
            "commit": committee.coordinator.busy_s,
        },
        home_at=home.arrived,
    )


def make_node(world: World, home: Home, number: int) -> Node:
    env, cluster = world.env, world.cluster
    node = Node(number, Server(env, cluster.node_link))
    if cluster.node_disk is not None:
        node.disk = Server(env, cluster.node_disk)
        node.drain = Drain(env, world.saving, node.disk, node.link, world.file_system, home, cluster.gpus_per_node)
    return node


def busiest(servers: Iterable[Server]) -> float:
    return max((server.busy_s for server in servers), default=0.0)
