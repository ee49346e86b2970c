"""A Trainer of Lightning that saves each step: with LazyCheckpointIO, with Lightning's own, and with its AsyncCheckpointIO."""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path

from bench.frameworks.blocked import FLUSHES_PER_ITERATION, ITERATION_S, add_blocked, sequences_for
from bench.measure.report import Report
from bench.measure.sampling import GIB, Sample, Settings, in_order, note
from bench.workloads.training import BYTES_PER_PARAMETER, CONTEXT, Net

WORKLOAD, OURS, THEIRS, ASYNC = "lightning", "ckpt", "Lightning's own", "AsyncCheckpointIO"
SIDES = (OURS, THEIRS, ASYNC)
STEPS = 4  # of a call of fit(); the first does not count: its save finds new memory


def measure_lightning(settings: Settings, report: Report) -> None:
    """
    Raises:
        RuntimeError: Lightning is not installed.
    """
    if importlib.util.find_spec("lightning") is None:
        raise RuntimeError("Lightning is not installed (pip install lightning)")
    with settings.workspace() as directory:
        job = Job(settings, directory)
        samples: dict[str, list[Sample]] = {side: [] for side in SIDES}
        rounds = settings.rounds_or(3)
        for number in range(-1, rounds):
            for side in in_order(SIDES, number):
                settings.settle()
                note(f"{'warm-up' if number < 0 else f'round {number + 1}/{rounds}'}: {side}")
                found = job.fit(side)
                samples[side] += found if number >= 0 else []
    ours = samples[OURS]
    for rival in (THEIRS, ASYNC):
        add_blocked(report, WORKLOAD, rival, ours, samples[rival], nbytes=job.nbytes, flushes_s=job.flushes_s[-len(ours) :])


class Job:
    """One model, which all train."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        import torch

        torch.manual_seed(0)
        self.model = Net(settings.sized(GIB) // BYTES_PER_PARAMETER)
        self.nbytes = sum(parameter.numel() for parameter in self.model.parameters()) * BYTES_PER_PARAMETER
        self.flushes_s: list[float] = []
        self._directory, self._sequences = directory, 1
        self.fit(OURS)  # a warm-up: it touches the arena
        longest_s = settings.iteration_s or max(ITERATION_S, FLUSHES_PER_ITERATION * max(self.flushes_s))
        self._sequences = sequences_for(longest_s, self._forward_backward)
        self.flushes_s.clear()

    def _forward_backward(self, sequences: int) -> None:
        import torch

        tokens = torch.randint(self.model.vocabulary, (sequences, CONTEXT + 1))
        logits = self.model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        self.model.zero_grad()

    def fit(self, side: str) -> list[Sample]:
        """A call of fit() that saves at each step; what each save has cost, but the first."""
        from bench.frameworks.lightning_job import fit

        where = self._directory / "run"
        rows = fit(self.model, where, side, self._sequences, STEPS, self.flushes_s)
        shutil.rmtree(where)
        return [Sample(each["started_s"], _values(each)) for each in rows[1:] if not math.isnan(each["fence_s"])]


def _values(row: dict[str, float]) -> dict[str, float]:
    return {"blocked_s": row["save_s"] + row["fence_s"], **{name: row[name] for name in row if name != "started_s"}}
