"""How long a save holds training up, and what saving every iteration costs end to end."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import ckpt
from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, Sample, Settings, Side, Values, clock, column, interleave, note
from bench.rivals.torch_save import torch_save_durable
from bench.workloads.training import Trainer, bytes_of

ITERATION_S = 2.5  # forward + backward takes at least so long,
FLUSHES_PER_ITERATION = 2.0  # and at least so many times what a flush takes
KEEP = 2

HOW_BLOCKED = (
    "clock around save(), plus clock from the call of optimizer.step() to the end of its global pre-step hooks (the automatic "
    "fence); the state dict is built before, outside of both clocks, for either side"
)


class Job:
    """A trainer and a checkpointer, with forward + backward made longer than a flush."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self.trainer = Trainer(settings.sized(GIB))
        self.checkpointer = ckpt.Checkpointer(directory / "ckpt", keep=KEEP)
        self.nbytes = bytes_of(self.trainer.state())
        self._steps = 0
        self._settle = settings.settle
        self._torch_path = directory / "torch.pt"
        self._flush()  # a warm-up: it touches the arena
        longest_s = max(ITERATION_S, FLUSHES_PER_ITERATION * max(self._flush() for _ in range(2)))
        self.forward_backward_s = self.trainer.lengthen(settings.iteration_s or longest_s)

    def _flush(self) -> float:
        self._settle()
        self.save()
        self.checkpointer.wait()
        stats = self._last.stats
        return (stats.durable_at or 0.0) - (stats.started_at or 0.0)

    def save(self) -> tuple[float, float]:
        """Starts a save; returns (seconds in save(), seconds to build the state dict)."""
        before = clock()
        state = self.trainer.state()
        started = clock()
        self._last = self.checkpointer.save(self._steps, state)
        ended = clock()
        self._steps += 1
        return ended - started, started - before

    def iterate(self) -> Values:
        """One iteration that saves at its beginning, so that it carries the whole cost of its own save."""
        started = clock()
        save_s, state_s = self.save()
        forward_backward_s = self.trainer.forward_backward()
        fence_s = self.trainer.step()
        values = {"blocked_s": save_s + fence_s, "save_s": save_s, "fence_s": fence_s, "state_dict_s": state_s}
        return values | {"iteration_s": clock() - started, "forward_backward_s": forward_backward_s}

    def iterate_alone(self) -> Values:
        started = clock()
        forward_backward_s = self.trainer.forward_backward()
        self.trainer.step()
        return {"iteration_s": clock() - started, "forward_backward_s": forward_backward_s}

    def measure_ckpt(self) -> Values:
        values = self.iterate()
        self.checkpointer.wait()
        stats = self._last.stats
        assert stats.durable_at and stats.started_at
        values |= {"stats_blocked_s": stats.save_s + stats.fence_s, "flush_s": stats.durable_at - stats.started_at}
        values |= {"witness_s": stats.witness_s}
        return values | {"copied_bytes": float(stats.bytes_copied_in_save + stats.bytes_copied_at_fence)}

    def measure_torch(self) -> Values:
        state = self.trainer.state()
        started = clock()
        torch_save_durable(state, self._torch_path)
        save_s = clock() - started
        forward_backward_s = self.trainer.forward_backward()
        fence_s = self.trainer.step()
        iteration_s = clock() - started
        self._torch_path.unlink()
        values = {"blocked_s": save_s + fence_s, "save_s": save_s, "fence_s": fence_s}
        return values | {"iteration_s": iteration_s, "forward_backward_s": forward_backward_s}


def measure_stall(settings: Settings, report: Report) -> None:
    with settings.workspace() as directory:
        job = Job(settings, directory)
        sides = [Side("ckpt", job.measure_ckpt), Side("torch.save + fsync", job.measure_torch)]
        samples = interleave(sides, settings.rounds_or(8), settings.settle)
        job.checkpointer.close()
    ours, theirs = samples.values()
    add = partial(report.add, "stall", nbytes=job.nbytes)
    medians = {name: statistics.median(s.values[name] for s in ours) for name in ours[0].values}
    longer = sum(s.values["forward_backward_s"] > s.values["flush_s"] for s in ours)
    condition = f"in {longer} of {len(ours)} rounds"
    add("ckpt", "s", column(ours, "blocked_s"), how=HOW_BLOCKED, forward_backward_longer_than_flush=condition, medians=medians)
    add("ckpt", "s", column(ours, "save_s"), how="clock around save()")
    add(
        "ckpt",
        "s",
        column(ours, "witness_s"),
        how="PendingSave.stats.witness_s, part of save(): bytes noted to find writes to lazy tensors",
    )
    add("ckpt", "s", column(ours, "fence_s"), how="clock from optimizer.step() to the end of its global pre-step hooks")
    add("ckpt", "s", column(ours, "stats_blocked_s"), how="PendingSave.stats.save_s + fence_s: the library's own account")
    add("ckpt", "s", column(ours, "flush_s"), how="PendingSave.stats: from the call of save() to durable")
    add("torch.save + fsync", "s", column(theirs, "blocked_s"), how=HOW_BLOCKED)
    add_ratio = partial(report.add_ratio, "stall", "ckpt / torch.save + fsync", nbytes=job.nbytes, bar=Bar("<=", 1 / 100))
    add_ratio(column(ours, "blocked_s"), column(theirs, "blocked_s"), how="blocked_s of both")


def measure_overhead(settings: Settings, report: Report) -> None:
    """Blocks of iterations without and with saves: A B B A, again and again."""
    blocks, length = 4 * settings.rounds_or(4), 4
    alone: list[Sample] = []
    saving: list[Sample] = []
    drains_s: list[float] = []
    with settings.workspace() as directory:
        job = Job(settings, directory)
        for number in range(blocks):
            saves = number % 4 in (1, 2)
            note(f"block {number + 1}/{blocks}: {'saving' if saves else 'not saving'}")
            settings.settle()
            job.iterate_alone()  # warm-up of the block, not counted
            for _ in range(length):
                started = clock()
                (saving if saves else alone).append(Sample(started, job.iterate() if saves else job.iterate_alone()))
            ended = clock()
            job.checkpointer.wait()
            if saves:
                drains_s.append(clock() - ended)
        job.checkpointer.close()
    add_overhead(report, job, alone, saving, {"block_length": length, "drain_after_block_s": drains_s})


def add_overhead(report: Report, job: Job, alone: list[Sample], saving: list[Sample], detail: dict[str, Any]) -> None:
    how = "clock around the whole iteration: state dict, save(), forward, backward, fence, step; blocks of iterations ABBA"
    add = partial(report.add, "overhead", nbytes=job.nbytes)
    without, with_saves = column(alone, "iteration_s"), column(saving, "iteration_s")
    add("no saving", "s", without, how=how)
    add("ckpt every iteration", "s", with_saves, how=how, **detail)
    add("ckpt every iteration", "s", column(saving, "blocked_s"), how=HOW_BLOCKED)
    add("ckpt every iteration", "s", column(saving, "forward_backward_s"), how="clock around forward + backward")
    add("no saving", "s", column(alone, "forward_backward_s"), how="clock around forward + backward")
    bar = Bar("<=", 1.03)
    add_ratio = partial(report.add_ratio, "overhead", "saving / no saving", nbytes=job.nbytes)
    add_ratio(with_saves, without, how="iteration_s of both", bar=bar)
