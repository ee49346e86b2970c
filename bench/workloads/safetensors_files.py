"""Safetensors files: how long a save holds training up, how fast it becomes durable, and how fast it comes back."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import ckpt
from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, Samples, Settings, Side, Values, clock, column, interleave
from bench.workloads.restore import HOW as HOW_LOAD
from bench.workloads.restore import OURS_TENSORS, OURS_TENSORS_INTO, SAFETENSORS, run_child, write_files
from bench.workloads.stall import FLUSHES_PER_ITERATION, HOW_BLOCKED, ITERATION_S
from bench.workloads.training import Trainer, bytes_of

OURS, BUFFERED, COPIED = "ckpt", "ckpt, buffered", "ckpt, copied in save()"
THEIRS, UNSYNCED = "save_file + fsync", "save_file, not durable"

HOW_RATE = (
    "clock from the call to where the file is durable (the last of them: to the return of save_file); a new file each time"
)


def save_durable(state: dict[str, torch.Tensor], path: Path) -> None:
    """save_file and fsync: the least that survives a power cut. No rename and no directory fsync, in its favour."""
    safetensors.torch.save_file(state, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


class Job:
    """A trainer whose parameters and moments are saved as one flat dict."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self.path = directory / "state.safetensors"
        self.trainer = Trainer(settings.sized(GIB))
        self.nbytes = bytes_of(self.state())
        self._settle = settings.settle
        self._flush()  # a warm-up: it touches the arena
        longest_s = max(ITERATION_S, FLUSHES_PER_ITERATION * max(self._flush() for _ in range(2)))
        self.forward_backward_s = self.trainer.lengthen(settings.iteration_s or longest_s)

    def state(self) -> dict[str, torch.Tensor]:
        """All that has bytes worth speaking of: not the optimizer's groups, for which the format has no place."""
        moments = self.trainer.optimizer.state_dict()["state"]
        names = ("exp_avg", "exp_avg_sq")
        flat = {f"{number}.{name}": moments[number][name] for number in moments for name in names}
        return {**self.trainer.model.state_dict(), **flat}

    def _flush(self) -> float:
        self._settle()
        return 1 / self.ckpt_rate()["rate_GBps"] * self.nbytes / 1e9

    # ---- how long it holds training up -------------------------------------------------------------------------------

    def measure_ckpt(self) -> Values:
        state = self.state()
        started = clock()
        pending = ckpt.save(state, self.path)
        save_s = clock() - started
        self.trainer.forward_backward()
        fence_s = self.trainer.step()
        pending.result()
        return {"blocked_s": save_s + fence_s, "save_s": save_s, "fence_s": fence_s}

    def measure_theirs(self) -> Values:
        state = self.state()
        started = clock()
        save_durable(state, self.path)
        save_s = clock() - started
        self.trainer.forward_backward()
        fence_s = self.trainer.step()
        self.path.unlink()
        return {"blocked_s": save_s + fence_s, "save_s": save_s, "fence_s": fence_s}

    # ---- how fast it becomes durable ---------------------------------------------------------------------------------

    def ckpt_rate(self, lazy: bool = True, **options: Any) -> Values:
        state = self.state()
        started = clock()
        ckpt.save(state, self.path, lazy=lazy, options=ckpt.Options(**options)).result()
        return self._rate(started)

    def theirs_rate(self, durable: bool) -> Values:
        state = self.state()
        started = clock()
        (save_durable if durable else safetensors.torch.save_file)(state, self.path)
        return self._rate(started)

    def _rate(self, started: float) -> Values:
        elapsed = clock() - started
        self.path.unlink()
        return {"rate_GBps": self.nbytes / elapsed / 1e9}


def measure_safetensors(settings: Settings, report: Report) -> None:
    with settings.workspace() as directory:
        job = Job(settings, directory)
        blocked = interleave(
            [Side(OURS, job.measure_ckpt), Side(THEIRS, job.measure_theirs)], settings.rounds_or(5), settings.settle
        )
        rates = interleave(
            [
                Side(OURS, job.ckpt_rate),
                Side(BUFFERED, partial(job.ckpt_rate, direct_io=False)),
                Side(COPIED, partial(job.ckpt_rate, lazy=False)),
                Side(THEIRS, partial(job.theirs_rate, True)),
                Side(UNSYNCED, partial(job.theirs_rate, False)),
            ],
            settings.rounds_or(5),
            settings.settle,
        )
        add_saves(report, job.nbytes, blocked, rates)
    measure_loads(settings, report)


def add_saves(report: Report, nbytes: int, blocked: Samples, rates: Samples) -> None:
    add = partial(report.add, "safetensors", nbytes=nbytes)
    add_ratio = partial(report.add_ratio, "safetensors", nbytes=nbytes)
    for name, samples in blocked.items():
        for quantity in ("blocked_s", "save_s", "fence_s"):
            add(name, "s", column(samples, quantity), how=HOW_BLOCKED)
    bar = Bar("<=", 1 / 30)
    add_ratio(f"{OURS} / {THEIRS}", blocked[OURS], blocked[THEIRS], how="blocked_s of both", bar=bar)
    for name, samples in rates.items():
        add(name, "GB/s", samples, how=HOW_RATE)
    add_ratio(f"{OURS} / {THEIRS}", rates[OURS], rates[THEIRS], how="rates of both", bar=Bar(">=", 1.0))


def measure_loads(settings: Settings, report: Report) -> None:
    nbytes = settings.sized(GIB)
    cases = (OURS_TENSORS, OURS_TENSORS_INTO, SAFETENSORS)
    with settings.workspace() as directory:
        digests = {"full": write_files(directory / "full", nbytes), "small": write_files(directory / "small", 1 << 20)}
        sides = [Side(case, partial(run_child, "load", case, directory, digests)) for case in cases]
        samples = interleave(sides, settings.rounds_or(5), settings.settle, warmup=0)
    for case in cases:
        report.add("safetensors", case, "s", samples[case], nbytes=nbytes, how=HOW_LOAD)
    for case in (OURS_TENSORS, OURS_TENSORS_INTO):
        title, bar = f"{case} / {SAFETENSORS}", Bar("<=", 0.7)
        report.add_ratio("safetensors", title, samples[case], samples[SAFETENSORS], nbytes=nbytes, how="time of both", bar=bar)
