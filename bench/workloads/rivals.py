"""Every way of saving a state that runs here, beside ours: one job, the same state and disk, in turn."""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure.disk_pages import forget_pages
from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, Sample, Samples, Settings, Side, Values, clock, column, interleave, note
from bench.rivals import base, registry
from bench.rivals.base import Rival
from bench.rivals.memory_need import HOW as HOW_MEMORY
from bench.rivals.memory_need import extra_memory
from bench.rivals.ours import Ckpt
from bench.rivals.registry import OURS, TORCH, Field
from bench.workloads.durable import FINALISTS, disk_limits, how_measured, limit_rate, screen
from bench.workloads.training import Trainer, bytes_of

ITERATION_S = 2.5  # forward + backward takes at least so long,
FLUSHES_PER_ITERATION = 2.0  # and at least so many times what our flush takes
ROUNDS = 5
MEMORY_ROUNDS = 2
SMALL = 0.1  # below this scale only the memory of the first two is looked at
NO_SAVING, MEMCPY = "no saving", "memcpy"

BLOCKED, DURABLE, RATE = Bar("<=", 1 / 48), Bar("<=", 1.0), Bar(">=", 0.95)

AFTER = "forward + backward is the same for all, twice as long as our flush; the engine has finished before the next sample"
HOW = {
    "blocked_s": "clock around the save call, plus clock around what it needs before the optimizer may write, plus clock from "
    f"the call of optimizer.step() to the end of its global pre-step hooks; {AFTER}",
    "bytes_per_blocked_GBps": "bytes of the state / blocked_s: what the field calls the throughput of a checkpoint",
    "iteration_s": "clock around save, forward, backward and step; the state dict is built before. What a save costs the "
    "training while it works behind it is in here, and in no figure of blocked time",
    "durable_s": "clock from the save call, with nothing but waiting behind it, until all is on the disk: what an engine does "
    "not fsync, files and directories, is fsynced by this program inside the clock; a new file or directory each time",
    "rate_GBps": "bytes of the state / durable_s",
    "restore_s": "clock around reading the newest checkpoint into the tensors of a state, in place where the engine can, "
    "copied where it cannot; the page cache is told to let go of the files before",
}
UNITS = {"bytes_per_blocked_GBps": "GB/s", "rate_GBps": "GB/s"}


class Bench:
    """The job, the state that restores go into, and the rivals."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self.settings = settings
        self.trainer = Trainer(settings.sized(GIB))
        self.nbytes = bytes_of(self.trainer.state())
        self.landing: dict[str, Any] = copy.deepcopy(self.trainer.state())
        self.field: Field = registry.start(registry.chosen(settings.rivals), directory)
        registry.try_out(self.field, self.trainer.state(), self.landing)
        flush_s = max(self.alone(OURS)["durable_s"] for _ in range(2))
        longest_s = max(ITERATION_S, FLUSHES_PER_ITERATION * flush_s)
        self.flush_s = flush_s
        self.forward_backward_s = self.trainer.lengthen(settings.iteration_s or longest_s)

    def alone(self, name: str) -> Values:
        """A save with nothing but waiting behind it, and a restore."""
        rival, state = self.field.rivals[name], self.trainer.state()
        rival.prune()
        self.settings.settle()
        started = clock()
        rival.save(state)
        rival.before_step()
        rival.finish()
        rival.synchronise()
        durable_s = clock() - started
        return {"durable_s": durable_s, "rate_GBps": self.nbytes / durable_s / 1e9, "restore_s": self._restore(rival)}

    def _restore(self, rival: Rival) -> float:
        forget_pages(rival.directory)
        started = clock()
        rival.load(self.landing)
        return clock() - started

    def training(self, name: str) -> Values:
        """An iteration that begins with a save."""
        rival, state = self.field.rivals[name], self.trainer.state()
        rival.prune()
        started = clock()
        rival.save(state)
        save_s = clock() - started
        self.trainer.forward_backward()
        before = clock()
        rival.before_step()
        waited_s = clock() - before
        fence_s = self.trainer.step()
        iteration_s = clock() - started
        rival.finish()
        rival.synchronise()
        blocked_s = save_s + waited_s + fence_s
        values = {"blocked_s": blocked_s, "bytes_per_blocked_GBps": self.nbytes / blocked_s / 1e9, "iteration_s": iteration_s}
        values |= {"save_s": save_s, "before_step_s": waited_s, "fence_s": fence_s}
        if isinstance(rival, Ckpt):
            stats = rival.stats
            assert stats.durable_at and stats.started_at
            values["flush_s"] = stats.durable_at - stats.started_at
        return values

    def no_saving(self) -> Values:
        started = clock()
        self.trainer.forward_backward()
        self.trainer.step()
        return {"iteration_s": clock() - started}

    def memcpy(self) -> Values:
        """All of the state copied once, tensor by tensor, by torch's threads."""
        state = self.trainer.state()
        started = clock()
        base.copy(state, self.landing)
        return {"rate_GBps": self.nbytes / (clock() - started) / 1e9}


def measure_rivals(settings: Settings, report: Report) -> None:
    first = len(report.lines)
    with settings.workspace() as directory:
        bench = Bench(settings, directory)
        names = list(bench.field.rivals)
        limits = disk_limits(settings, directory / "limit", bench.nbytes)
        screened, failed = screen(limits, settings)
        best = sorted(screened, key=lambda name: -screened[name])[:FINALISTS]
        sides = [Side(name, partial(bench.alone, name)) for name in names]
        sides += [Side(name, partial(limit_rate, limits[name])) for name in best] + [Side(MEMCPY, bench.memcpy)]
        alone = interleave(sides, settings.rounds_or(ROUNDS), settings.settle)
        sides = [Side(NO_SAVING, bench.no_saving), *(Side(name, partial(bench.training, name)) for name in names)]
        training = interleave(sides, settings.rounds_or(ROUNDS), settings.settle)
        bench.field.close()
        memory = measure_memory(settings, bench, directory)
    add_errors(report, "rivals", bench.field, bench.nbytes)
    add_training(report, bench, training)
    add_alone(report, bench, alone, best, {"screened_GBps": screened, "failed": failed})
    for name, samples in memory.items():
        report.add("rivals", name, "MiB", samples, nbytes=bench.nbytes, how=HOW_MEMORY, configuration=configured(name))
    add_versions(report.lines[first:])


def measure_memory(settings: Settings, bench: Bench, directory: Path) -> Samples:
    """Each rival in processes of its own."""
    names = list(bench.field.rivals)
    if settings.scale < SMALL:
        names = [name for name in names if name in (OURS, TORCH)]
    found: Samples = {name: [] for name in names}
    for _ in range(min(MEMORY_ROUNDS, settings.rounds_or(MEMORY_ROUNDS))):
        for name in names:
            note(f"memory: {name}")
            started = clock()
            try:
                found[name].append(Sample(started, {"extra_MiB": extra_memory(name, bench.nbytes, directory)}))
            except RuntimeError as error:  # all else that has been measured is worth keeping
                print(f"\nthe memory of {name} could not be measured: {error}", file=sys.stderr)
    return {name: samples for name, samples in found.items() if samples}


# ---- lines -----------------------------------------------------------------------------------------------------------


def configured(name: str) -> str:
    return registry.all_rivals()[name].configuration


def add_errors(report: Report, workload: str, field: Field, nbytes: int) -> None:
    for name, error in field.errors.items():
        print(f"\n{name} cannot run here: {error}", file=sys.stderr)
        sample = Sample(clock(), {"runs_here": 0.0})
        detail = {"error": error, "configuration": configured(name)}
        report.add(workload, name, "1", [sample], nbytes=nbytes, how=f"not measured: {error}", **detail)


def add_versions(lines: Sequence[dict[str, Any]]) -> None:
    for line in lines:
        line["versions"] = line["versions"] | registry.versions()


def add_training(report: Report, bench: Bench, training: Samples) -> None:
    add = partial(report.add, "rivals", nbytes=bench.nbytes)
    condition = {"our_flush_alone_s": bench.flush_s, "forward_backward_s": bench.forward_backward_s}
    for name, samples in training.items():
        if name == NO_SAVING:
            add(name, "s", samples, how="clock around forward, backward and step", **condition)
            continue
        parts = {value: [s.values[value] for s in samples] for value in samples[0].values}
        medians = {value: statistics.median(part) for value, part in parts.items()}
        detail = {"configuration": configured(name), "medians": medians, "parts": parts}
        for quantity in ("blocked_s", "bytes_per_blocked_GBps", "iteration_s"):
            add(name, UNITS.get(quantity, "s"), column(samples, quantity), how=HOW[quantity], **detail)
    ours = training[OURS]
    ratio = partial(report.add_ratio, "rivals", nbytes=bench.nbytes)
    for name in (name for name in training if name not in (OURS, NO_SAVING)):
        pair = column(ours, "blocked_s"), column(training[name], "blocked_s")
        ratio(f"ckpt / {name}, blocked", *pair, how="blocked_s of both", bar=BLOCKED)
    for name in (name for name in training if name != NO_SAVING):
        pair = column(training[name], "iteration_s"), column(training[NO_SAVING], "iteration_s")
        ratio(f"{name} / {NO_SAVING}", *pair, how="iteration_s of both")


def add_alone(report: Report, bench: Bench, alone: Samples, limits: list[str], detail: dict[str, Any]) -> None:
    add = partial(report.add, "rivals", nbytes=bench.nbytes)
    for name in bench.field.rivals:
        for quantity in ("durable_s", "rate_GBps", "restore_s"):
            samples = column(alone[name], quantity)
            add(name, UNITS.get(quantity, "s"), samples, how=HOW[quantity], configuration=configured(name))
    for name in limits:
        add(name, "GB/s", alone[name], how=how_measured(name), role="limit", **detail)
    add(MEMCPY, "GB/s", alone[MEMCPY], how="clock around copying all tensors, from memory to memory", role="limit")
    ratio = partial(report.add_ratio, "rivals", nbytes=bench.nbytes)
    ours = alone[OURS]
    rivals = [name for name in bench.field.rivals if name != OURS]
    if rivals:
        best = min(rivals, key=lambda name: statistics.median(s.values["durable_s"] for s in alone[name]))
        pair = column(ours, "durable_s"), column(alone[best], "durable_s")
        ratio("ckpt / fastest rival, durable", *pair, how=f"durable_s of ckpt and of {best}", bar=DURABLE, rival=best)
    disk = max(limits, key=lambda name: statistics.median(s.main for s in alone[name]))
    judge = f"best of {'fio' if bench.settings.fio_grid else 'own loop'}"
    ratio(f"ckpt / {judge}", column(ours, "rate_GBps"), alone[disk], how=f"{disk} had the best median", bar=RATE)
