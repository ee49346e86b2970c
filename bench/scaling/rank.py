"""What one rank of the scaling benchmark does: the sides that are compared, each with all ranks at once."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import ckpt
from bench.measure.sampling import Sample, Settings, Side, Values, clock, interleave
from bench.rivals.torch_save import torch_save_durable
from bench.workloads.training import BYTES_PER_PARAMETER, bytes_of, state_of
from examples.launch import Place

State = dict[str, Any]

WEAK, STRONG = "weak", "strong"
OWN_FILES, STRIPED, RANK_0 = "own files", "striped", "rank 0 alone"
TORCH, TORCH_RANK_0, DCP = "torch.save + fsync, own files", "torch.save + fsync, rank 0 alone", "DCP save"


class Shape(NamedTuple):
    """What is measured.

    Attributes:
        weak_bytes: of the state of each rank, in weak scaling.
        model_bytes: of the one model, in strong scaling.
        compute_s: between the end of save() and the fence the rank sleeps so long: the forward and backward of a device.
    """

    kinds: tuple[str, ...]
    weak_bytes: int
    model_bytes: int
    compute_s: float
    arena: str
    coordinator: str


class Ranks:
    """All ranks of the job, as one of them sees them."""

    def __init__(self, place: Place) -> None:
        self.rank, self.count = place.rank, place.ranks
        self.nodes = len(set(self.gather(socket.gethostname())))

    def gather(self, mine: Any) -> list[Any]:
        if self.count == 1:
            return [mine]
        answers: list[Any] = [None] * self.count
        dist.all_gather_object(answers, mine)
        return answers

    def meet(self) -> None:
        if self.count > 1:
            dist.barrier()


class Way(NamedTuple):
    """A way of saving, on this rank.

    Attributes:
        save: saves once; returns seconds: blocked_s, durable_s, and what else it knows.
        nbytes: what all ranks together make durable.
        clean: removes what the rank has written; no clock runs.
    """

    name: str
    save: Callable[[], Values]
    nbytes: int
    clean: Callable[[], None] = lambda: None


# ---- ours ------------------------------------------------------------------------------------------------------------


class Lazy:
    """Saves with a Checkpointer.

    Args:
        state, replicated: as in `Checkpointer.save`.
    """

    def __init__(
        self, directory: Path, shape: Shape, *, state: Any = None, replicated: Any = None, writers: str = "all"
    ) -> None:
        options = ckpt.Options(arena_bytes=shape.arena, replicated_writers=writers)
        self.checkpointer = ckpt.Checkpointer(directory, keep=1, options=options, coordinator=shape.coordinator)
        self._state, self._replicated, self._compute_s = state, replicated, shape.compute_s
        self._step = 0

    def save(self) -> Values:
        started = clock()
        pending = self.checkpointer.save(self._step, self._state, replicated=self._replicated, lazy=True)
        save_s = clock() - started
        self._step += 1
        time.sleep(self._compute_s)
        reached = clock()
        ckpt.fence()
        fence_s = clock() - reached
        pending.result()
        stats = pending.stats
        assert stats.durable_at is not None
        flushed_at = stats.flushed_at or started  # of a rank that writes nothing
        values = {"blocked_s": save_s + fence_s, "durable_s": stats.durable_at - started, "flush_s": flushed_at - started}
        return values | {"save_s": save_s, "fence_s": fence_s}


# ---- rivals ----------------------------------------------------------------------------------------------------------


def save_by_torch(state: State, path: Path, ranks: Ranks, writes: bool) -> Values:
    """A checkpoint is complete when all ranks are; the one that writes nothing trains on, and is not blocked."""
    started = clock()
    if writes:
        torch_save_durable(state, path)
    flush_s = clock() - started
    ranks.meet()
    return {"blocked_s": flush_s, "durable_s": clock() - started, "flush_s": flush_s}


def save_by_dcp(state: State, path: Path) -> Values:
    import torch.distributed.checkpoint as dcp

    started = clock()
    dcp.save(state, checkpoint_id=path)  # FileSystemWriter fsyncs its files; it returns when all ranks have written
    seconds = clock() - started
    return {"blocked_s": seconds, "durable_s": seconds}


# ---- sides -----------------------------------------------------------------------------------------------------------


class Sides:
    """The sides of one kind of scaling. A context manager, because the Checkpointers must be closed."""

    def __init__(self, kind: str, shape: Shape, ranks: Ranks, directory: Path) -> None:
        self._kind, self._shape, self._ranks, self._directory = kind, shape, ranks, directory
        self._open: list[ckpt.Checkpointer] = []

    def make(self) -> list[Way]:
        ranks = self._ranks
        nbytes = self._shape.weak_bytes if self._kind == WEAK else self._shape.model_bytes
        torch.manual_seed(ranks.rank if self._kind == WEAK else 0)
        whole = state_of(nbytes // BYTES_PER_PARAMETER)
        own = whole if self._kind == WEAK else shard(whole, ranks)
        total = sum(ranks.gather(bytes_of(own)))
        sides = [
            self._lazily(f"ckpt, {OWN_FILES}", total, state=own),
            self._by_torch(TORCH, own, total, True),
        ]
        if self._kind == WEAK:
            keyed = {f"rank {ranks.rank}": own}  # under names of its own nothing is taken for replicated
            return [*sides, self._by_dcp(keyed, total)]
        total = bytes_of(whole)
        return [
            *sides,
            self._lazily(f"ckpt, {STRIPED}", total, replicated=whole),
            self._lazily(f"ckpt, {RANK_0}", total, replicated=whole, writers="rank0"),
            self._by_torch(TORCH_RANK_0, whole, total, ranks.rank == 0),
            self._by_dcp(whole, total),
        ]

    def _lazily(self, name: str, nbytes: int, **what: Any) -> Way:
        lazy = Lazy(self._directory / f"{self._kind}-{len(self._open)}", self._shape, **what)
        self._open.append(lazy.checkpointer)
        return Way(name, lazy.save, nbytes)

    def _by_torch(self, name: str, state: State, nbytes: int, writes: bool) -> Way:
        path = self._directory / f"{self._kind}-rank-{self._ranks.rank}.pt"
        return Way(name, lambda: save_by_torch(state, path, self._ranks, writes), nbytes, lambda: path.unlink(missing_ok=True))

    def _by_dcp(self, state: State, nbytes: int) -> Way:
        path = self._directory / f"{self._kind}-dcp"

        def clean() -> None:
            if self._ranks.rank == 0:
                shutil.rmtree(path)

        return Way(DCP, lambda: save_by_dcp(state, path), nbytes, clean)

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *_: Any) -> None:
        for checkpointer in self._open:
            checkpointer.close()


def shard(state: State, ranks: Ranks) -> State:
    """This rank's part of each tensor, in memory of its own: torch.save would write the whole storage of a view."""
    parts = {
        part: {name: tensor.flatten().tensor_split(ranks.count)[ranks.rank].clone() for name, tensor in tensors.items()}
        for part, tensors in state.items()
    }
    return {part: {name: tensor for name, tensor in tensors.items() if tensor.numel()} for part, tensors in parts.items()}


# ---- measuring -------------------------------------------------------------------------------------------------------


def together(side: Way, ranks: Ranks) -> Callable[[], Values]:
    """Measures once on all ranks; returns what is true of all of them, on each."""

    def measure() -> Values:
        ranks.meet()
        mine = side.save()
        values = joined(ranks.gather(mine), side.nbytes)
        side.clean()
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
            to_measure = [Side(side.name, together(side, ranks)) for side in made]
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
