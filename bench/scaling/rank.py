"""What one rank of the scaling benchmark does: the sides that are compared, each with all ranks at once."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ckpt
from bench.measure.ranks import Ranks
from bench.measure.sampling import Sample, Settings, Side, Values, clock, interleave
from bench.rivals.base import Rival
from bench.rivals.dcp import DcpSaveInGroup
from bench.rivals.ours import Ckpt
from bench.rivals.torch_save import TorchSave
from bench.workloads.training import BYTES_PER_PARAMETER, bytes_of, state_of

State = dict[str, Any]

WEAK, STRONG = "weak", "strong"
OWN_FILES, STRIPED, RANK_0, BY_NODE = "own files", "striped", "rank 0 alone", "own files, by way of the nodes"
TORCH, TORCH_RANK_0, DCP = f"{TorchSave.name}, {OWN_FILES}", f"{TorchSave.name}, {RANK_0}", DcpSaveInGroup.name


class Shape(NamedTuple):
    """What is measured.

    Attributes:
        weak_bytes: of the state of each rank, in weak scaling.
        model_bytes: of the one model, in strong scaling.
        node: a directory on the disk of each node, by way of which one side saves; None: there is no such side.
        compute_s: between the end of save() and the fence the rank sleeps so long: the forward and backward of a device.
    """

    kinds: tuple[str, ...]
    weak_bytes: int
    model_bytes: int
    compute_s: float
    arena: str
    coordinator: str
    node: Path | None = None


# ---- rivals ----------------------------------------------------------------------------------------------------------


class TorchSaveOfRanks(TorchSave):
    """A checkpoint is complete when all ranks are; the one that writes nothing trains on, and is not blocked."""

    def __init__(self, directory: Path, ranks: Ranks, writes: bool = True) -> None:
        super().__init__(directory, keep=0)
        self._ranks, self._writes = ranks, writes
        self._met = True

    def _begin(self, state: State, path: Path) -> None:
        self._met = False
        if self._writes:
            super()._begin(state, path)
        self.flushed_at = clock()

    def finish(self) -> None:
        if not self._met:
            self._met = True
            self._ranks.meet()
            self.durable_at = clock()

    def close(self) -> None:
        """Nothing: a rank that has failed would be waited for in vain."""


class DcpSaveOfRanks(DcpSaveInGroup):
    """All ranks write into one directory; it returns when all have written."""

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        super().__init__(directory, keep=0)
        self._ranks = ranks

    def prune(self) -> None:
        if self._ranks.rank == 0:
            super().prune()


# ---- sides -----------------------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """A rival on this rank, and what it saves.

    Attributes:
        nbytes: what all ranks together make durable.
    """

    name: str
    rival: Rival
    state: State
    nbytes: int


class Sides:
    """The sides of one kind of scaling. A context manager, because rivals must be closed."""

    def __init__(self, kind: str, shape: Shape, ranks: Ranks, directory: Path) -> None:
        self._kind, self._shape, self._ranks, self._directory = kind, shape, ranks, directory
        self._open: list[Rival] = []

    def make(self) -> list[Contender]:
        ranks = self._ranks
        nbytes = self._shape.weak_bytes if self._kind == WEAK else self._shape.model_bytes
        torch.manual_seed(ranks.rank if self._kind == WEAK else 0)
        whole = state_of(nbytes // BYTES_PER_PARAMETER)
        own = whole if self._kind == WEAK else shard(whole, ranks)
        total = sum(ranks.gather(bytes_of(own)))
        sides = [
            Contender(f"ckpt, {OWN_FILES}", self._ours("own"), own, total),
            Contender(TORCH, self._torch("torch", True), own, total),
        ]
        if self._shape.node is not None:
            by_node = self._ours("by-node", node=self._shape.node / self._directory.name / self._kind)
            sides.append(Contender(f"ckpt, {BY_NODE}", by_node, own, total))
        if self._kind == WEAK:
            keyed = {f"rank {ranks.rank}": own}  # under names of its own nothing is taken for replicated
            return [*sides, Contender(DCP, self._dcp(), keyed, total)]
        total = bytes_of(whole)
        return [
            *sides,
            Contender(f"ckpt, {STRIPED}", self._ours("striped", replicated=True), whole, total),
            Contender(f"ckpt, {RANK_0}", self._ours("rank-0", replicated=True, writers="rank0"), whole, total),
            Contender(TORCH_RANK_0, self._torch("torch-rank-0", ranks.rank == 0), whole, total),
            Contender(DCP, self._dcp(), whole, total),
        ]

    def _ours(self, place: str, *, replicated: bool = False, writers: str = "all", node: Path | None = None) -> Rival:
        shape, directory = self._shape, self._directory / f"{self._kind}-{place}"
        options = ckpt.Options(arena_bytes=shape.arena, replicated_writers=writers)
        more: dict[str, Any] = {"options": options, "coordinator": shape.coordinator, "replicated": replicated, "node": node}
        return self._opened(Ckpt(directory, keep=1, lazy=True, **more))

    def _torch(self, place: str, writes: bool) -> Rival:
        directory = self._directory / f"{self._kind}-{place}-{self._ranks.rank}"
        return self._opened(TorchSaveOfRanks(directory, self._ranks, writes))

    def _dcp(self) -> Rival:
        return self._opened(DcpSaveOfRanks(self._directory / f"{self._kind}-dcp", self._ranks))

    def _opened(self, rival: Rival) -> Rival:
        rival.open()
        self._open.append(rival)
        return rival

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *_: Any) -> None:
        for rival in self._open:
            rival.close()


def shard(state: State, ranks: Ranks) -> State:
    """This rank's part of each tensor, in memory of its own: torch.save would write the whole storage of a view."""
    parts = {
        part: {name: tensor.flatten().tensor_split(ranks.count)[ranks.rank].clone() for name, tensor in tensors.items()}
        for part, tensors in state.items()
    }
    return {part: {name: tensor for name, tensor in tensors.items() if tensor.numel()} for part, tensors in parts.items()}


# ---- measuring -------------------------------------------------------------------------------------------------------


def save_once(side: Contender, compute_s: float) -> Values:
    """Seconds on this rank: blocked_s, durable_s, and what else is known. Only ours writes while the rank sleeps."""
    rival, waited_s, started = side.rival, 0.0, clock()
    rival.save(side.state)
    save_s = clock() - started
    if rival.ours:
        time.sleep(compute_s)
        reached = clock()
        ckpt.fence()
        waited_s = clock() - reached
    rival.finish()
    values = {"blocked_s": save_s + waited_s, "durable_s": rival.durable_at - started}
    if not math.isnan(rival.flushed_at):
        values["flush_s"] = rival.flushed_at - started
    if isinstance(rival, Ckpt) and not math.isnan(rival.home_at):
        values["home_s"] = rival.home_at - started
    return values | {"save_s": save_s, "fence_s": waited_s} if rival.ours else values


def together(side: Contender, ranks: Ranks, compute_s: float) -> Callable[[], Values]:
    """Measures once on all ranks; returns what is true of all of them, on each."""

    def measure() -> Values:
        ranks.meet()
        mine = save_once(side, compute_s)
        values = joined(ranks.gather(mine), side.nbytes)
        side.rival.prune()
        return values

    return measure


def joined(each: list[Values], nbytes: int) -> Values:
    """All times are differences of one rank's clock, from when the ranks had met: no two clocks are compared."""
    durable_s = max(values["durable_s"] for values in each)
    found = {"rate_GBps": nbytes / durable_s / 1e9, "durable_s": durable_s}
    found["blocked_s"] = max(values["blocked_s"] for values in each)
    if "flush_s" in each[0]:
        flushes = [values["flush_s"] for values in each]
        found |= {"slowest_flush_s": max(flushes), "fastest_flush_s": min(flushes)}
    if "home_s" in each[0]:
        found["home_s"] = max(values["home_s"] for values in each)
    if "save_s" in each[0]:
        found["commit_s"] = max(0.0, each[0]["durable_s"] - found["slowest_flush_s"])
    return found


class Measured(NamedTuple):
    kind: str
    side: str
    nbytes: int
    samples: list[Sample]


def measure(ranks: Ranks, shape: Shape, settings: Settings, directory: Path) -> Iterator[Measured]:
    def settle() -> None:
        settings.settle()
        ranks.meet()

    for kind in shape.kinds:
        with Sides(kind, shape, ranks, directory) as sides:
            made = sides.make()
            to_measure = [Side(side.name, together(side, ranks, shape.compute_s)) for side in made]
            samples = interleave(to_measure, settings.rounds_or(3), settle)
        for side in made:
            yield Measured(kind, side.name, side.nbytes, samples[side.name])


@contextlib.contextmanager
def shared_workspace(ranks: Ranks, settings: Settings) -> Iterator[Path]:
    """A directory that all ranks see, removed at the end by rank 0, once all are done."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        mine = str(stack.enter_context(settings.workspace())) if ranks.rank == 0 else ""
        directory = Path(ranks.gather(mine)[0])
        yield directory
        ranks.meet()  # only if all is well: others would wait in vain for a rank that has failed
