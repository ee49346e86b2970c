"""A tier of nodes in the simulation: saves land on the disk of their node, and a drain of each node carries them home.

The rules are those of ckpt/drain/choice.py: one generation at a time; what other nodes have begun goes first, then the newest;
nothing older than what was delivered; at most two wait beside the one on its way. A generation is at home when all nodes have
delivered it and the last one has read their receipts and published it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import simpy

from bench.simulation.model import Cluster, FileSystem, Saving, Server, Steps

if TYPE_CHECKING:
    from bench.simulation.rank import File

MOST_WAITING = 2  # as ckpt/drain/choice.py has it


@dataclasses.dataclass(eq=False)
class Generation:
    """What this node has of one save.

    Attributes:
        files: of its ranks that are complete here.
    """

    number: int
    files: list[File] = dataclasses.field(default_factory=list)


class Home:
    """Which generations have been delivered, by how many nodes, and when each became a checkpoint."""

    def __init__(self, env: simpy.Environment, cluster: Cluster, saving: Saving) -> None:
        self._env, self._saving, self._cluster = env, saving, cluster
        self._delivered: dict[int, int] = {}
        self.begun: set[int] = set()  # numbers that some node is delivering, or has delivered
        self.arrived: dict[int, float] = {}  # number: when
        self._waiting: dict[int, simpy.Event] = {}

    def deliver(self, number: int) -> Steps:
        """Of one node; the last one publishes, and the others need not wait for it."""
        self._delivered[number] = self._delivered.get(number, 0) + 1
        if self._delivered[number] == self._cluster.shown_nodes:
            yield self._env.timeout(self._saving.publish_s + self._saving.receipt_s * self._cluster.nodes)
            self.arrived[number] = self._env.now
            self.begun.discard(number)
            if number in self._waiting:
                self._waiting.pop(number).succeed()

    def comes(self, number: int) -> simpy.Event:
        """When this generation is at home."""
        return self._waiting.setdefault(number, self._env.event())


class Drain:
    """Of one node. What it reads from the disk competes with what is being saved there."""

    def __init__(
        self,
        env: simpy.Environment,
        saving: Saving,
        disk: Server,
        link: Server,
        file_system: FileSystem,
        home: Home,
        ranks: int,
    ) -> None:
        self._env, self._disk, self._link, self._file_system = env, disk, link, file_system
        self._home, self._ranks = home, ranks
        self._copying = Server(env, saving.drain_rate)  # what one process copies by itself
        self._found: dict[int, Generation] = {}
        self._delivered = -1
        self._changed = env.event()
        env.process(self._run())

    def note(self, file: File) -> None:
        """This file is part of what all ranks have committed on the nodes."""
        generation = self._found.setdefault(file.number, Generation(file.number))
        generation.files.append(file)
        if len(generation.files) == self._ranks:
            changed, self._changed = self._changed, self._env.event()
            changed.succeed()

    def _run(self) -> Steps:
        while True:
            chosen = self._choose()
            if chosen is None:
                yield self._changed
                continue
            del self._found[chosen.number]
            self._home.begun.add(chosen.number)
            for file in chosen.files:
                for chunk in file.chunks:
                    yield from self._disk.serve(chunk.nbytes)
                    yield from self._copying.serve(chunk.nbytes)
                    yield from self._link.serve(chunk.nbytes)
                    yield from self._file_system.write(chunk.stripe, chunk.nbytes)
            self._delivered = max(self._delivered, chosen.number)
            self._env.process(self._home.deliver(chosen.number))

    def _choose(self) -> Generation | None:
        complete = sorted(number for number, each in self._found.items() if len(each.files) == self._ranks)
        common = [number for number in complete if number in self._home.begun]
        newer = [number for number in complete if number > self._delivered]
        for number in complete:
            if number not in self._home.begun and number not in newer[-MOST_WAITING:]:
                del self._found[number]  # superseded
        wanted = max(common, default=max(newer, default=-1))
        return self._found.get(wanted)
