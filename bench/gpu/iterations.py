"""What a save every iteration costs a GPU's training end to end, beside not saving."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ckpt
from bench.gpu.setup import OURS, Bench, medians_of
from bench.measure.report import Bar, Report
from bench.measure.sampling import Sample, Samples, clock, column, in_order, note

COPIES_PER_ITERATION = 2.0  # forward + backward takes at least so many times what the copies take,
FLUSHES_PER_ITERATION = 1.25  # so many times what a flush takes,
ITERATION_S = 1.0  # and so long
LENGTH = 3  # iterations of a block
ALONE = "no saving"
BAR = Bar("<=", 1.02)
HOW = (
    "clock around the whole iteration: state dict, save(), forward, backward, fence, step, until the device has done all of "
    "it; blocks of iterations in turn, one uncounted iteration without a save before each"
)
HOW_COMPUTING = "time between two events of the device around forward + backward; the first comes after save()"

HOW_FENCE = "clock from where the step begins to the end of its global pre-step hooks; the device is still computing"


class Loop:
    """The training loop; with options, a save in each iteration.

    Each block has a Checkpointer and a directory of its own, so that the disk never holds more than two checkpoints.
    """

    def __init__(self, bench: Bench, name: str, options: ckpt.Options | None, directory: Path) -> None:
        self.name = name
        self._bench, self._options, self._directory = bench, options, directory
        self._checkpointer: ckpt.Checkpointer | None = None
        self._saves: list[ckpt.PendingSave] = []
        self.stats: list[ckpt.SaveStats] = []
        if options is not None:  # saves of single files keep the engine, and the Checkpointers find its arena warm
            ckpt.save({}, bench.path(directory), options=options).result()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """On leaving, all saves are durable, and gone."""
        directory = self._bench.path(self._directory)
        with ckpt.Checkpointer(directory, keep=1, options=self._options, coordinator="local") as self._checkpointer:
            yield
            self._checkpointer.wait()
        self._checkpointer = None
        self.stats += [save.stats for save in self._saves]
        self._saves.clear()
        shutil.rmtree(directory)

    def flush_s(self) -> float:
        """How long a save takes with nothing beside it."""
        self._bench.settings.settle()
        with self._saving():
            self._save()
        return flush_of(self.stats.pop())

    def _save(self) -> float:
        if self._checkpointer is None:
            return 0.0
        state = self._bench.trainer.state()
        started = clock()
        self._saves.append(self._checkpointer.save(len(self._saves), state, lazy=self._bench.trainer.model))
        return clock() - started

    def _iterate(self) -> Sample:
        trainer, device = self._bench.trainer, self._bench.device
        started = clock()
        save_s = self._save()
        begin = device.mark()
        trainer.forward_backward()
        end = device.mark()
        held = trainer.step()
        device.synchronize()
        values = {"iteration_s": clock() - started, "save_s": save_s, "fence_s": held.host_s}
        return Sample(started, values | {"forward_backward_s": device.seconds_between(begin, end)})

    def block(self) -> list[Sample]:
        """Each iteration carries the flush that it has begun; that of the last is waited for afterwards."""
        self._iterate()
        with self._saving() if self._options is not None else contextlib.nullcontext():
            return [self._iterate() for _ in range(LENGTH)]

    def account(self, samples: list[Sample]) -> dict[str, Any]:
        """What the library says of the same saves."""
        flush_s = [flush_of(stats) for stats in self.stats]
        longer = sum(sample.values["forward_backward_s"] > s for sample, s in zip(samples, flush_s, strict=True))
        condition = f"in {longer} of {len(samples)} iterations"
        return {"flush_s": flush_s, "forward_backward_longer_than_flush": condition, "stats_medians": medians_of(self.stats)}


def flush_of(stats: ckpt.SaveStats) -> float:
    return (stats.durable_at or math.nan) - (stats.started_at or math.nan)


def measure_iterations(bench: Bench, directory: Path, report: Report) -> None:
    """Blocks of iterations, in turn, with forward + backward longer than the copy and the flush."""
    settings = bench.settings
    alone = Loop(bench, ALONE, None, directory)
    saving = [Loop(bench, name, options, directory) for name, options in bench.variants().items()]
    flushes_s = [[loop.flush_s() for _ in range(2)][-1] for loop in saving]  # the first warms up
    shortest_s = max(ITERATION_S, FLUSHES_PER_ITERATION * max(flushes_s), COPIES_PER_ITERATION * bench.copy_s)
    bench.trainer.lengthen(shortest_s if settings.iteration_s is None else settings.iteration_s)
    samples: Samples = {loop.name: [] for loop in (alone, *saving)}
    rounds = settings.rounds_or(2)
    for number in range(rounds):
        for loop in in_order([alone, *saving], number):
            note(f"block {number + 1}/{rounds}: {loop.name}")
            settings.settle()
            samples[loop.name] += loop.block()
    add_iterations(bench, report, saving, samples)


def add_iterations(bench: Bench, report: Report, saving: list[Loop], samples: Samples) -> None:
    add, add_ratio = bench.adder(report), bench.ratio_adder(report)
    shape = {"block_length": LENGTH, "micro_steps": bench.trainer.micro_steps}
    details = {ALONE: shape} | {loop.name: shape | loop.account(samples[loop.name]) for loop in saving}
    for name, detail in details.items():
        case = name if name == ALONE else f"{name} every iteration"
        add(case, "s", samples[name], how=HOW, **detail)
        add(case, "s", column(samples[name], "forward_backward_s"), how=HOW_COMPUTING)
        if name != ALONE:
            add(case, "s", column(samples[name], "save_s"), how="clock around save(); the device may still be busy")
            add(case, "s", column(samples[name], "fence_s"), how=HOW_FENCE)
    for loop in saving:
        bar = BAR if loop.name == OURS else None
        case = f"{loop.name} every iteration / {ALONE}"
        add_ratio(case, samples[loop.name], samples[ALONE], how="iteration_s of both", bar=bar)
