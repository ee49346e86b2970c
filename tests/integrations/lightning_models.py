"""Small modules for tests of ckpt.integrations.lightning, and trainers that say little. Batches follow from the step."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

warnings.filterwarnings("ignore", module="lightning|pytorch_lightning|torch.jit|litlogger")

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins.environments import LightningEnvironment  # noqa: E402

for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)

WIDTH = 192  # a matrix of 144 KiB, which leaves lazily with the small options of the tests


class Model(pl.LightningModule):
    """Linear layers and batch statistics.

    Args:
        make: gives the optimizer.
        seen: is called with (what, step) where a test may look.
    """

    def __init__(
        self,
        make: Callable[[Any], torch.optim.Optimizer] | None = None,
        seen: Callable[[str, int], None] = lambda what, step: None,
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.make = make or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        self.seen = seen

    def loss(self, step: int) -> torch.Tensor:
        rank = self.trainer.global_rank
        batch = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1000 * rank + step))
        return (self.layer(batch) - batch).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen("forward", self.global_step)
        loss = self.loss(int(self.global_step))
        self.log("loss", loss.detach())
        return loss

    def on_after_backward(self) -> None:
        self.seen("backward", self.global_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.layer.eval()
        self.log("validation", self.loss(0).detach(), batch_size=8)
        self.layer.train()

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class TwoOptimizers(Model):
    """Manual optimization: each half has an optimizer, and they step in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.loss(int(self.global_step)))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        halves = (self.layer[:2], self.layer[2:])
        return [torch.optim.Adam(half.parameters(), lr=1e-2) for half in halves]


class SavesOlderWeights(Model):
    """What Lightning has a module do whose checkpoint is to hold the weights before the step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.saved_models: dict[int, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        self.saved_models = {batch_idx: {name: value.detach().clone() for name, value in self.layer.state_dict().items()}}
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(self.loss(int(self.global_step)))
        optimizer.step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class ScalesRows(Model):
    """Its forward writes to the weight of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(100, WIDTH, max_norm=0.1)

    def loss(self, step: int) -> torch.Tensor:
        return super().loss(step) + self.rows(torch.arange(100)).square().mean()


class Sharpness(torch.optim.SGD):
    """Writes to the weights before it calls its closure, and again behind it, as sharpness-aware minimization does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.add_(0.01)
        with torch.enable_grad():
            loss = closure()
        for parameter in parameters:
            parameter.sub_(0.01)
        super().step()
        return loss


def batches(count: int) -> Any:
    return torch.utils.data.DataLoader(range(count), batch_size=None)  # type: ignore[arg-type]


def trainer(
    directory: Path,
    plugin: Any = None,
    *,
    steps: int = 5,
    callbacks: Any = None,
    checkpoint: dict[str, Any] | None = None,
    **more: Any,
) -> pl.Trainer:
    """By default it saves each step, and keeps all."""
    kept = {"save_top_k": -1, "every_n_train_steps": 1, "filename": "{step}", "auto_insert_metric_name": False}
    saves = ModelCheckpoint(directory, **(checkpoint or kept))
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "max_steps": steps,
        "default_root_dir": directory,
        "log_every_n_steps": 1,
    }
    # Named, where torchrun has started nothing: else Lightning asks MPI, which begins to run for that.
    plugins = [each for each in (plugin, None if "WORLD_SIZE" in os.environ else LightningEnvironment()) if each is not None]
    return pl.Trainer(plugins=plugins, callbacks=[*(callbacks or []), saves], **(quiet | more))
