"""What it costs a job to save every 10th, 5th, 4th, 3rd, 2nd, and every iteration."""

from __future__ import annotations

import copy
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure.report import Report
from bench.measure.sampling import GIB, Sample, Settings, Side, clock, in_order, note
from bench.rivals import registry
from bench.rivals.base import Rival
from bench.rivals.registry import FEW, OURS, Field
from bench.workloads.rivals import add_errors, add_versions, configured
from bench.workloads.training import Trainer, bytes_of

STATE_BYTES = GIB // 4
ITERATIONS = 50  # of a block
EVERY = (10, 5, 4, 3, 2, 1)
FLUSHES_PER_ITERATION = 1.5  # of forward + backward in the longer setting
SHORT_TOKENS = 8  # of the one sequence of the shorter setting
LIMIT_S = 600.0  # no block of a setting begins later than this
NO_SAVING = "no saving"
LONGER, SHORTER = "longer", "shorter"  # than a flush

HOW_TOTAL = (
    "clock around a block of iterations, each with forward, backward and step, some beginning with a save, until the last "
    "checkpoint is durable: what an engine does not fsync, this program fsyncs, but for the last checkpoint only. A save waits "
    "for the one before where the engine asks that of its user. Removing old checkpoints is off the clock, except ckpt's own"
)
HOW_ITERATION = "clock around each iteration of the block, with or without a save, removing old checkpoints excepted"

Cell = tuple[str, int, str]  # setting, every so many iterations, rival


class Block(NamedTuple):
    started_s: float
    total_s: float
    iterations: list[Sample]
    saves: int


class Bench:
    def __init__(self, settings: Settings, directory: Path) -> None:
        self.settings = settings
        self.trainer = Trainer(settings.sized(STATE_BYTES))
        self.nbytes = bytes_of(self.trainer.state())
        self.iterations = max(EVERY[0], settings.sized(ITERATIONS) if settings.scale < 1 else ITERATIONS)
        self.field: Field = registry.start(registry.chosen(settings.rivals, FEW), directory)
        registry.try_out(self.field, self.trainer.state(), copy.deepcopy(self.trainer.state()))
        self.flush_s = statistics.median(self._flush(self.field.rivals[OURS]) for _ in range(5))

    def _flush(self, rival: Rival) -> float:
        self.settings.settle()
        started = clock()
        rival.save(self.trainer.state())
        rival.finish()
        return clock() - started

    def shape(self, setting: str) -> float:
        """Makes forward + backward longer, or shorter, than a flush; returns the seconds that it takes."""
        if setting == LONGER:
            return self.trainer.lengthen(self.settings.iteration_s or FLUSHES_PER_ITERATION * self.flush_s)
        self.trainer.tokens = self.trainer.tokens[:1, : SHORT_TOKENS + 1]
        return min(self.trainer.forward_backward() for _ in range(3))

    def block(self, every: int, name: str) -> Block:
        """Iterations until the last save is durable. Before them one that saves nothing."""
        rival = self.field.rivals.get(name)
        if rival is not None:
            rival.prune()
        self.settings.settle()
        self.trainer.forward_backward()
        self.trainer.step()
        iterations: list[Sample] = []
        saves, aside_s, begun = 0, 0.0, clock()
        for number in range(self.iterations):
            due = rival if rival is not None and number % every == 0 else None
            if due is not None:
                before = clock()
                due.prune()
                aside_s += clock() - before
                saves += 1
            iterations.append(self._iterate(due))
        if rival is not None:
            rival.finish()
            rival.synchronise()
        return Block(begun, clock() - begun - aside_s, iterations, saves)

    def _iterate(self, rival: Rival | None) -> Sample:
        started = clock()
        if rival is not None:
            rival.save(self.trainer.state())
        self.trainer.forward_backward()
        if rival is not None:
            rival.before_step()
        self.trainer.step()
        return Sample(started, {"iteration_s": clock() - started})


def measure_frequency(settings: Settings, report: Report) -> None:
    first = len(report.lines)
    blocks: dict[Cell, list[Block]] = {}
    taken_s: dict[str, float] = {}
    with settings.workspace() as directory:
        bench = Bench(settings, directory)
        for setting in (LONGER, SHORTER):
            taken_s[setting] = bench.shape(setting)
            measure_setting(settings, bench, setting, blocks)
        bench.field.close()
    add_errors(report, "frequency", bench.field, bench.nbytes)
    for cell, found in blocks.items():
        add_cell(report, bench, cell, found, taken_s[cell[0]])
    add_versions(report.lines[first:])


def measure_setting(settings: Settings, bench: Bench, setting: str, blocks: dict[Cell, list[Block]]) -> None:
    """Rivals in turn at each frequency, and the job without saves once a round."""
    begun = clock()
    names = [Side(name, dict) for name in bench.field.rivals]
    for number in range(settings.rounds_or(1)):
        order = [(0, NO_SAVING)] + [(every, side.name) for i, every in enumerate(EVERY) for side in in_order(names, number + i)]
        for every, name in order:
            if clock() - begun > LIMIT_S:
                print(f"\nfrequency, {setting}: no time left for {name}, every {every}", file=sys.stderr)
                continue
            note(f"frequency: compute {setting} than a flush, every {every}: {name}")
            blocks.setdefault((setting, every, name), []).append(bench.block(every, name))


def add_cell(report: Report, bench: Bench, cell: Cell, blocks: list[Block], forward_backward_s: float) -> None:
    setting, every, name = cell
    case = f"compute {setting} than a flush, {f'every {every}: ' if every else ''}{name}"
    detail: dict[str, Any] = {"setting": setting, "every": every, "engine": name, "saves_of_a_block": blocks[0].saves}
    detail |= {"iterations": bench.iterations, "forward_backward_s": forward_backward_s, "our_flush_alone_s": bench.flush_s}
    if every:
        detail["configuration"] = configured(name)
    add = partial(report.add, "frequency", case, "s", nbytes=bench.nbytes)
    add([Sample(block.started_s, {"total_s": block.total_s}) for block in blocks], how=HOW_TOTAL, **detail)
    add([sample for block in blocks for sample in block.iterations], how=HOW_ITERATION, **detail)
