"""The Trainers that bench/frameworks/lightning_fit.py measures, with clocks in them."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.nn import functional as F

import ckpt
from bench.measure.sampling import clock
from bench.workloads.training import CONTEXT, Net
from ckpt.integrations.lightning import LazyCheckpointIO

KEEP = 2


class TimedAdamW(torch.optim.AdamW):
    """Tells when its pre-step hooks have run. A hook of its own would do that too, but with one the fence comes before forward
    and backward, since hooks may write to weights there."""

    def __init__(self, parameters: Any, note: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(parameters, **kwargs)
        self._note = note

    def step(self, closure: Any = None) -> Any:
        self._note()
        return super().step(closure)


class Job(LightningModule):
    """One row for each save: the save itself, the forward and backward behind it, and the fence before the step.

    Attributes:
        rows: save_s, forward_backward_s, fence_s, and started_s; NaN of what did not come.
    """

    def __init__(self, net: Net, sequences: int) -> None:
        super().__init__()
        self.net, self._sequences = net, sequences
        self.rows: list[dict[str, float]] = []
        self._began_at = self._about_at = math.nan

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._began_at = clock()
        tokens = torch.randint(self.net.vocabulary, (self._sequences, CONTEXT + 1))
        logits = self.net(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def on_after_backward(self) -> None:
        """Ours calls the step now; the others have begun it before the forward."""
        self._about_at = clock()
        if self.rows:
            self.rows[-1]["forward_backward_s"] = self._about_at - self._began_at

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._about_at = clock()
        super().optimizer_step(*args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return TimedAdamW(self.parameters(), self._note_step, lr=1e-4, fused=True)

    def _note_step(self) -> None:
        if self.rows:
            self.rows[-1]["fence_s"] = clock() - self._about_at

    def watch(self, trainer: Trainer) -> None:
        save: Any = trainer.save_checkpoint

        def timed(*args: Any, **kwargs: Any) -> None:
            started = clock()
            save(*args, **kwargs)
            row = {"save_s": clock() - started, "forward_backward_s": math.nan, "fence_s": math.nan, "started_s": started}
            self.rows.append(row)

        trainer.save_checkpoint = timed  # type: ignore[method-assign]


class Watched(LazyCheckpointIO):
    """Notes how long each save took until it was durable."""

    def __init__(self, seconds: list[float]) -> None:
        super().__init__(closure_first=[TimedAdamW])
        self._seconds = seconds

    def begin(self, path: Path, make: Any) -> None:
        def made() -> ckpt.PendingSave:
            pending: ckpt.PendingSave = make()
            pending.add_done_callback(self._note_flush)
            return pending

        super().begin(path, made)

    def _note_flush(self, pending: ckpt.PendingSave) -> None:
        stats = pending.stats
        if stats.durable_at is not None and stats.started_at is not None:
            self._seconds.append(stats.durable_at - stats.started_at)


def fit(net: Net, directory: Path, side: str, sequences: int, steps: int, flushes_s: list[float]) -> list[dict[str, float]]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    plugins: dict[str, Any] = {"ckpt": Watched, "AsyncCheckpointIO": lambda _: AsyncCheckpointIO()}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        default_root_dir=directory,
        # Named: else Lightning asks MPI, which begins to run for that.
        plugins=[LightningEnvironment(), *([plugins[side](flushes_s)] if side in plugins else [])],
        callbacks=[ModelCheckpoint(directory, save_top_k=KEEP, monitor="step", mode="max", every_n_train_steps=1)],
    )
    job = Job(net, sequences)
    job.watch(trainer)
    trainer.fit(job, torch.utils.data.DataLoader(range(steps), batch_size=None))  # type: ignore[arg-type]
    return job.rows
