"""save_state() of accelerate: its own, and ours, in turn."""

from __future__ import annotations

import importlib.util
import shutil
from functools import partial
from pathlib import Path

from bench.frameworks.blocked import FLUSHES_PER_ITERATION, ITERATION_S, add_blocked
from bench.measure.report import Report
from bench.measure.sampling import GIB, Settings, Side, Values, clock, interleave
from bench.workloads.training import Trainer, bytes_of

WORKLOAD, OURS, THEIRS = "accelerate", "ckpt", "accelerate's own"


class Job:
    """A training that accelerate has prepared, with forward + backward made longer than a flush."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        from accelerate import Accelerator

        import ckpt.integrations.accelerate as lazy

        self._lazy = lazy
        self._directory = directory
        self.trainer = Trainer(settings.sized(GIB))
        lazy.enable()
        self._own_save = Accelerator.save_state.__wrapped__  # of accelerate; both in turn, without beginning anew each time
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.nbytes = bytes_of(self.trainer.state())
        self.flushes_s: list[float] = []
        self._flush(settings)  # a warm-up: it touches the arena
        self.flushes_s += [self._flush(settings) for _ in range(2)]
        longest_s = max(ITERATION_S, FLUSHES_PER_ITERATION * max(self.flushes_s))
        self.trainer.lengthen(settings.iteration_s or longest_s)

    def _flush(self, settings: Settings) -> float:
        settings.settle()
        started = clock()
        self._save(OURS)
        self._lazy.wait()
        return clock() - started

    def _save(self, side: str) -> float:
        started = clock()
        if side == OURS:
            self.accelerator.save_state(str(self._directory / side))
        else:
            self._own_save(self.accelerator, str(self._directory / side))
        return clock() - started

    def measure(self, side: str) -> Values:
        """One iteration that saves at its beginning, so that it carries the whole cost of its own save."""
        save_s = self._save(side)
        forward_backward_s = self.trainer.forward_backward()
        fence_s = self.trainer.step()
        if side == OURS:
            self._lazy.wait()
        shutil.rmtree(self._directory / side)
        return {
            "blocked_s": save_s + fence_s,
            "save_s": save_s,
            "fence_s": fence_s,
            "forward_backward_s": forward_backward_s,
        }


def measure_accelerate(settings: Settings, report: Report) -> None:
    """
    Raises:
        RuntimeError: accelerate is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise RuntimeError("accelerate is not installed (pip install accelerate)")
    with settings.workspace() as directory:
        job = Job(settings, directory)
        sides = [Side(name, partial(job.measure, name)) for name in (OURS, THEIRS)]
        samples = interleave(sides, settings.rounds_or(6), settings.settle)
        job.accelerator.end_training()
    add_blocked(report, WORKLOAD, THEIRS, samples[OURS], samples[THEIRS], nbytes=job.nbytes, flushes_s=job.flushes_s)
