"""The Trainers that bench/frameworks/trainer.py measures, with clocks in them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench.measure.sampling import clock
from bench.workloads.training import CONTEXT
from ckpt.integrations.transformers import LazyTrainer

KEEP = 2


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """New ones each time, as a training has them: what is learned by heart leaves gradients that are slow to compute with."""

    def __init__(self, words: int, samples: int) -> None:
        self._words, self._samples = words, samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(self._words, (CONTEXT,))
        return {"input_ids": tokens, "labels": tokens}


class Clocks(TrainerCallback):
    """One row for each save: the save itself, the forward and backward behind it, and the fence at the end of those.

    Attributes:
        rows: save_s, forward_backward_s, fence_s, and started_s; NaN of what did not come.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._began_at = self._about_at = math.nan

    def watch(self, trainer: Any) -> None:
        save = trainer._save_checkpoint

        def timed(*args: Any, **kwargs: Any) -> None:
            started = clock()
            save(*args, **kwargs)
            row = {"save_s": clock() - started, "forward_backward_s": math.nan, "fence_s": math.nan, "started_s": started}
            self.rows.append(row)

        trainer._save_checkpoint = timed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)
        optimizer.register_step_pre_hook(self._note_hook)  # runs after the global hooks, ckpt's among them

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began_at = clock()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._about_at = clock()

    def _note_hook(self, *_: Any) -> None:
        if self.rows:
            self.rows[-1] |= {"fence_s": clock() - self._about_at, "forward_backward_s": self._about_at - self._began_at}


class Flushes:
    """Notes how long each save of ours took until it was durable."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds

    def saved(self, record: Any) -> None:
        if record.outcome == "committed":
            self._seconds.append(record.stats.durable_at - record.stats.started_at)

    def close(self) -> None:
        pass


def make_trainer(
    model: Any, directory: Path, lazy: bool, words: int, sequences: int, steps: int, flushes_s: list[float]
) -> tuple[Clocks, Any]:
    clocks = Clocks()
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        save_steps=1,
        save_total_limit=KEEP,
        per_device_train_batch_size=sequences,
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        optim="adamw_torch_fused",
    )
    kind, more = (LazyTrainer, {"checkpoint_metrics": [Flushes(flushes_s)]}) if lazy else (Trainer, {})
    data = Tokens(words, sequences * steps)
    trainer: Any = kind(model=model, args=arguments, train_dataset=data, callbacks=[clocks], **more)
    clocks.watch(trainer)
    return clocks, trainer
