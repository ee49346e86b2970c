"""save_state() of accelerate: its own, and ours, in turn."""

from __future__ import annotations

import importlib.util
import shutil
import statistics
from functools import partial
from pathlib import Path

from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, Settings, Side, Values, clock, column, interleave
from bench.workloads.training import Trainer, bytes_of

ITERATION_S = 2.5  # forward + backward takes at least so long,
FLUSHES_PER_ITERATION = 2.0  # and at least so many times what a flush takes
OURS, STOCK = "ckpt", "accelerate"
BAR = Bar("<=", 1 / 30)

HOW = (
    "clock around save_state(), plus clock from the call of optimizer.step() to the end of its global pre-step hooks (the "
    "automatic fence); each in a directory of its own, which the next save replaces; accelerate's files are not fsynced"
)


class Job:
    """A training that accelerate has prepared, with forward + backward made longer than a flush."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        from accelerate import Accelerator

        import ckpt.integrations.accelerate as lazy

        self._lazy = lazy
        self._directory = directory
        self.trainer = Trainer(settings.sized(GIB))
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.nbytes = bytes_of(self.trainer.state())
        lazy.enable()
        self._flush(settings)  # a warm-up: it touches the arena
        longest_s = max(ITERATION_S, FLUSHES_PER_ITERATION * max(self._flush(settings) for _ in range(2)))
        self.trainer.lengthen(settings.iteration_s or longest_s)

    def _flush(self, settings: Settings) -> float:
        settings.settle()
        started = clock()
        self._save(OURS)
        self._lazy.wait()
        return clock() - started

    def _save(self, side: str) -> float:
        started = clock()
        self.accelerator.save_state(str(self._directory / side))
        return clock() - started

    def measure(self, side: str) -> Values:
        """One iteration that saves at its beginning, so that it carries the whole cost of its own save."""
        (self._lazy.enable if side == OURS else self._lazy.disable)()
        started = clock()
        save_s = self._save(side)
        forward_backward_s = self.trainer.forward_backward()
        fence_s = self.trainer.step()
        values = {"blocked_s": save_s + fence_s, "save_s": save_s, "fence_s": fence_s}
        values |= {"forward_backward_s": forward_backward_s}
        if side == OURS:
            self._lazy.wait()
        values["durable_s"] = clock() - started
        if side == STOCK:
            shutil.rmtree(self._directory / side)
        return values


def measure_accelerate(settings: Settings, report: Report) -> None:
    """
    Raises:
        RuntimeError: accelerate is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise RuntimeError("accelerate is not installed (pip install accelerate)")
    with settings.workspace() as directory:
        job = Job(settings, directory)
        sides = [Side(name, partial(job.measure, name)) for name in (OURS, STOCK)]
        samples = interleave(sides, settings.rounds_or(6), settings.settle)
        job.accelerator.end_training()
    for name, found in samples.items():
        medians = {key: statistics.median(s.values[key] for s in found) for key in found[0].values}
        report.add("accelerate", name, "s", column(found, "blocked_s"), nbytes=job.nbytes, how=HOW, medians=medians)
    ours, theirs = (column(samples[name], "blocked_s") for name in (OURS, STOCK))
    report.add_ratio("accelerate", f"{OURS} / {STOCK}", ours, theirs, nbytes=job.nbytes, how="blocked_s of both", bar=BAR)
