"""The Trainer of transformers: a GPT-2 that saves each step, with LazyTrainer and with the Trainer itself."""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path

from bench.frameworks.blocked import FLUSHES_PER_ITERATION, ITERATION_S, add_blocked, sequences_for
from bench.measure.report import Report
from bench.measure.sampling import GIB, Sample, Settings, in_order, note
from bench.workloads.training import BYTES_PER_PARAMETER, CONTEXT, shape_for

WORKLOAD, OURS, THEIRS = "transformers", "ckpt", "Trainer's own"
STEPS = 4  # of a call of train(); the first does not count: before it no optimizer has stepped


def measure_transformers(settings: Settings, report: Report) -> None:
    """
    Raises:
        RuntimeError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError("transformers is not installed (pip install transformers[torch])")
    with settings.workspace() as directory:
        job = Job(settings, directory)
        samples: dict[str, list[Sample]] = {OURS: [], THEIRS: []}
        rounds = settings.rounds_or(3)
        for number in range(-1, rounds):
            for side in in_order([OURS, THEIRS], number):
                settings.settle()
                note(f"{'warm-up' if number < 0 else f'round {number + 1}/{rounds}'}: {side}")
                found = job.train(side)
                samples[side] += found if number >= 0 else []
    flushes_s = job.flushes_s[-len(samples[OURS]) :]
    add_blocked(report, WORKLOAD, THEIRS, samples[OURS], samples[THEIRS], nbytes=job.nbytes, flushes_s=flushes_s)


class Job:
    """One model, which both train."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        width, layers, words = shape_for(settings.sized(GIB) // BYTES_PER_PARAMETER)
        shape = GPT2Config(
            vocab_size=words, n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=width // 64, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        self.model = GPT2LMHeadModel(shape)
        self.nbytes = sum(parameter.numel() for parameter in self.model.parameters()) * BYTES_PER_PARAMETER
        self.flushes_s: list[float] = []
        self._words, self._directory, self._sequences = words, directory, 1
        self.train(OURS)  # a warm-up: it touches the arena
        longest_s = settings.iteration_s or max(ITERATION_S, FLUSHES_PER_ITERATION * max(self.flushes_s))
        self._sequences = sequences_for(longest_s, self._forward_backward)
        self.flushes_s.clear()

    def _forward_backward(self, sequences: int) -> None:
        import torch

        tokens = torch.randint(self._words, (sequences, CONTEXT))
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.model.zero_grad()

    def train(self, side: str) -> list[Sample]:
        """A call of train() that saves at each step; what each save has cost, but the first."""
        from bench.frameworks.trainer_job import make_trainer

        where = self._directory / "run"
        clocks, trainer = make_trainer(self.model, where, side == OURS, self._words, self._sequences, STEPS, self.flushes_s)
        trainer.train()
        shutil.rmtree(where)
        return [Sample(each["started_s"], without_start(each)) for each in clocks.rows[1:] if not math.isnan(each["fence_s"])]


def without_start(row: dict[str, float]) -> dict[str, float]:
    return {"blocked_s": row["save_s"] + row["fence_s"], **{name: row[name] for name in row if name != "started_s"}}
