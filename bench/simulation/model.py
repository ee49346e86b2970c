"""A model of saving on many GPUs, event by event (SimPy): the engine's own rules, with hardware as queues in front of servers.

What is in it, of one rank:

    trainer     [save]  forward  backward  (all ranks meet: gradients)  fence  update
    lane        takes room in the arena for each chunk, in file order, and copies it from the device: one link for each GPU
    writers     claim chunks in file order; each goes through the link of its node, then to one server of the file system
    fence       device: until the last chunk has been copied. Host: copies what no writer has claimed, last chunk first
    committer   when all is written: fsync, an answer to rank 0, its publication, its verdict; saves in their order. By node
                the ranks of one meet first, and make one message of their answers
    drain       with a tier of nodes: writers write to the disk of the node, and this carries home what is committed: drain.py

and all ranks share the servers of the file system, and rank 0's coordinator, which serves one request after the other. A
chunk holds its room in the arena from before it is copied until it is written. Nothing else is assumed: how long anything waits
follows from the events.

Many alike: where `Cluster.nodes` is more than are simulated, these stand for all. They have their share of the file
system, and each answer of theirs to rank 0 counts for as many as it stands for. What is lost is the chance that some one
node among thousands is slower than any that was simulated.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Generator
from typing import Any

import simpy

from ckpt.options import Options

Steps = Generator[simpy.Event, Any, None]

DEVICE, HOST = "device", "host"
INFINITE = math.inf


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The hardware. Rates are bytes per second; infinite: it costs no time.

    Attributes:
        nodes, gpus_per_node: there is a rank for each GPU.
        d2h: from the memory of one GPU to pinned host memory.
        copy: of one rank from host memory to host memory, in a fence.
        node_link: of one node towards the file system.
        file_system: of all its servers together.
        servers: of the file system; chunks go to one after the other, as stripes do.
        jitter: standard deviation of the time that a server takes for a chunk, over its mean (gamma distribution).
        node_disk: of the disk of one node, for what is written and read together; None: no tier of nodes.
        simulated_nodes: that are simulated; None: all.
    """

    nodes: int = 1
    gpus_per_node: int = 1
    d2h: float = 25e9
    copy: float = 10e9
    node_link: float = INFINITE
    file_system: float = INFINITE
    servers: int = 1
    jitter: float = 0.0
    node_disk: float | None = None
    simulated_nodes: int | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def shown_nodes(self) -> int:
        return self.nodes if self.simulated_nodes is None else min(self.nodes, self.simulated_nodes)

    @property
    def shown_ranks(self) -> int:
        return self.shown_nodes * self.gpus_per_node


@dataclasses.dataclass(frozen=True)
class Job:
    """The training. Times in seconds; `every` and `iterations` count iterations; bytes are those of one rank.

    Attributes:
        lazy: False: save() returns only when all is captured, as it does for tensors on a device by default.
    """

    bytes_per_rank: int
    forward_s: float
    backward_s: float
    update_s: float = 0.0
    iterations: int = 5
    every: int = 1
    source: str = DEVICE
    lazy: bool = True


@dataclasses.dataclass(frozen=True)
class Saving:
    """The library, and what it costs besides moving bytes. Times in seconds.

    Attributes:
        arena_bytes, chunk_bytes, writers, max_in_flight: as in `ckpt.Options`, for one rank.
        most_chunks: larger chunks are simulated where a rank would have more; None: the real ones.
        plan_s: in save(), before it returns.
        fsync_s: to make a rank's file durable once all is written.
        by_node: whether the ranks of a node make one message together; else each makes its own.
        gather_s, verdict_s: for each message, at rank 0's coordinator.
        node_s: by node, what the ranks of one take among themselves, for both ways together.
        decide_s: for each rank, what rank 0 takes to look at its answer and to write it down.
        publish_s: manifest, renames and fsyncs of rank 0.
        drain_rate: bytes a second that the drain of a node copies, if nothing else holds it up.
        receipt_s: to read what one node has said of its delivery at home.
    """

    arena_bytes: int = Options().size("arena_bytes")
    chunk_bytes: int = Options().size("chunk_bytes")
    writers: int = Options().writers
    max_in_flight: int = Options().max_in_flight
    most_chunks: int | None = None
    plan_s: float = 0.0
    fsync_s: float = 0.0
    by_node: bool = False
    gather_s: float = 0.0
    verdict_s: float = 0.0
    node_s: float = 0.0
    decide_s: float = 0.0
    publish_s: float = 0.0
    drain_rate: float = INFINITE
    receipt_s: float = 0.0

    def chunks(self, nbytes: int) -> list[int]:
        """The sizes of the chunks of a file, in order.

        As csrc/engine/engine.cc has it: cut at multiples of the chunk size, a power of two, at most a quarter of the arena.
        """
        size = self.chunk_bytes
        while size * 4 > self.arena_bytes:
            size //= 2
        if self.most_chunks is not None:
            while nbytes > size * self.most_chunks and size * 8 <= self.arena_bytes:
                size *= 2
        return [min(size, nbytes - begin) for begin in range(0, nbytes, size)]


def share_of(body_bytes: int, chunk_bytes: int, index: int, count: int) -> int:
    """Bytes that one of `count` ranks writes of a file of all: whole chunks, as equal as can be (csrc/jobs/chunk.cc)."""
    chunks = -(-body_bytes // chunk_bytes)
    begin, end = (min(chunks * i // count * chunk_bytes, body_bytes) for i in (index, index + 1))
    return end - begin


# ---- what comes out --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Save:
    """One save of one rank. Instants are seconds of the simulation; 0 until reached.

    Attributes:
        durable_at: all ranks have committed it: on the nodes, if there is a tier of them.
    """

    begun_at: float
    save_s: float = 0.0
    fence_s: float = 0.0
    captured_at: float = 0.0
    flushed_at: float = 0.0
    durable_at: float = 0.0

    @property
    def blocked_s(self) -> float:
        return self.save_s + self.fence_s


@dataclasses.dataclass
class Outcome:
    """What a run has shown.

    Attributes:
        saves: of each simulated rank, in order.
        trained_s: until the last update; what is still being flushed then does not count.
        plain_s: the same training without a save.
        ended_s: until the last save is durable.
        bytes_in, bytes_out: handed to save(), written by file-system servers; of the simulated ranks.
        arena_peak: the most bytes that any rank's arena held.
        busy_s: for each level, how long its busiest part worked.
        home_at: with a tier of nodes, when each save has come home, by its number; the others were superseded.
    """

    saves: list[list[Save]]
    trained_s: float
    plain_s: float
    ended_s: float
    bytes_in: int
    bytes_out: int
    arena_peak: int
    busy_s: dict[str, float]
    home_at: dict[int, float] = dataclasses.field(default_factory=dict)

    def blocked(self) -> list[float]:
        """Seconds by which each save has held the slowest rank up."""
        return [max(save.blocked_s for save in ranks) for ranks in zip(*self.saves, strict=True)]

    @property
    def overhead(self) -> float:
        """Of the training's time without saving."""
        return self.trained_s / self.plain_s - 1.0

    def ages_at_home(self) -> list[float]:
        """With a tier of nodes: how old the newest state at home is, each time just before a newer one arrives, seconds."""
        arrived = sorted(self.home_at.items())
        return [later_at - self.saves[0][number].begun_at for (number, _), (_, later_at) in itertools.pairwise(arrived)]


# ---- the parts -------------------------------------------------------------------------------------------------------


class Server:
    """Serves one request after the other, at a rate of bytes or of requests per second."""

    def __init__(self, env: simpy.Environment, rate: float, jitter: float = 0.0, dice: random.Random | None = None) -> None:
        self._env, self._rate, self._jitter, self._dice = env, rate, jitter, dice
        self._queue = simpy.Resource(env, capacity=1)
        self.busy_s = 0.0

    def serve(self, amount: float) -> Steps:
        if self._rate == INFINITE:
            return
        with self._queue.request() as turn:
            yield turn
            seconds = amount / self._rate
            if self._jitter and self._dice:
                shape = self._jitter**-2
                seconds *= self._dice.gammavariate(shape, 1.0 / shape)
            self.busy_s += seconds
            yield self._env.timeout(seconds)


class FileSystem:
    def __init__(self, env: simpy.Environment, cluster: Cluster, dice: random.Random) -> None:
        part = cluster.shown_nodes / cluster.nodes
        count = max(1, round(cluster.servers * part))
        rate = cluster.file_system * part / count
        self.servers = [Server(env, rate, cluster.jitter, dice) for _ in range(count)]
        self._dice = dice
        self.bytes_out = 0

    def first_stripe(self) -> int:
        return self._dice.randrange(len(self.servers))

    def write(self, stripe: int, nbytes: int) -> Steps:
        yield from self.servers[stripe % len(self.servers)].serve(nbytes)
        self.bytes_out += nbytes


class Meeting:
    """All ranks come, then all go on: the exchange of gradients."""

    def __init__(self, env: simpy.Environment, count: int) -> None:
        self._env, self._count, self._here, self._all = env, count, 0, env.event()

    def come(self) -> simpy.Event:
        self._here += 1
        everybody = self._all
        if self._here == self._count:
            self._here, self._all = 0, self._env.event()
            everybody.succeed()
        return everybody


class Committee:
    """Rank 0: hears all ranks, publishes, tells all; one save after the other."""

    def __init__(self, env: simpy.Environment, saving: Saving, cluster: Cluster) -> None:
        self._env, self._saving = env, saving
        self._speakers = cluster.shown_nodes if saving.by_node else cluster.shown_ranks
        self._per_speaker = cluster.gpus_per_node if saving.by_node else 1
        self._here: dict[tuple[int, int], int] = {}  # number of the save and of the node: ranks that have come
        self._told: dict[tuple[int, int], simpy.Event] = {}
        self._stands_for = cluster.ranks / cluster.shown_ranks
        self._alone_s = saving.decide_s * cluster.ranks + saving.publish_s
        self.coordinator = Server(env, 1.0)  # requests are given in seconds
        self._answers: dict[int, int] = {}
        self._published: dict[int, simpy.Event] = {}

    def agree(self, number: int, node: int) -> Steps:
        """Of one rank on a node, for its save of that number. By node, who comes last speaks for all of them."""
        if self._per_speaker == 1:
            yield from self._speak(number)
            return
        group = number, node
        told = self._told.setdefault(group, self._env.event())
        self._here[group] = self._here.get(group, 0) + 1
        if self._here[group] < self._per_speaker:
            yield told
            return
        yield self._env.timeout(self._saving.node_s / 2)
        yield from self._speak(number)
        yield self._env.timeout(self._saving.node_s / 2)
        told.succeed()

    def _speak(self, number: int) -> Steps:
        published = self._published.setdefault(number, self._env.event())
        yield from self.coordinator.serve(self._saving.gather_s * self._stands_for)
        self._answers[number] = self._answers.get(number, 0) + 1
        if self._answers[number] == self._speakers:
            yield self._env.timeout(self._alone_s)
            published.succeed()
        yield published
        yield from self.coordinator.serve(self._saving.verdict_s * self._stands_for)
