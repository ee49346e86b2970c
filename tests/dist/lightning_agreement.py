"""Two ranks under torchrun whose checkpoints are late, or fail, on rank 0 alone.

What each has seen goes into a JSON file of its own.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_models import Model, batches, trainer
from lightning_training import Shards
from support import options

from ckpt import _native as native
from ckpt.errors import CheckpointError
from ckpt.integrations.lightning import LazyCheckpointIO

RANK = int(os.environ["RANK"])
LATE: dict[str, Any] = {"delay_s": 0.7}
FAILS: dict[str, Any] = {"error": errno.EIO}
Act = Callable[[pl.Trainer, LazyCheckpointIO, int], None]


class Acts(pl.Callback):
    def __init__(self, plugin: LazyCheckpointIO, act: Act) -> None:
        self._plugin, self._act = plugin, act

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._act(trainer, self._plugin, int(trainer.global_step))


def fault(part: str = "", **what: Any) -> None:
    if RANK == 0:
        native.set_fault("fdatasync", path_part=part, **what)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except CheckpointError as error:
        return type(error).__name__
    finally:
        native.clear_faults()
    return ""


def fit(directory: Path, strategy: Any, act: Act, steps: int, **limits: Any) -> str:
    """What fit() raises."""
    plugin = LazyCheckpointIO(options(**limits))
    quiet: Any = {"steps": steps, "checkpoint": {"save_top_k": 0}, "callbacks": [Acts(plugin, act)]}
    module = Model() if strategy == "ddp" else Shards()
    return error_of(lambda: trainer(directory, plugin, strategy=strategy, devices=2, **quiet).fit(module, batches(steps)))


def late(directory: Path, seen: dict[str, Any]) -> None:
    path = directory / "late.ckpt"

    def act(made: pl.Trainer, plugin: LazyCheckpointIO, step: int) -> None:
        if step > 1:
            fault(**LATE)
        made.save_checkpoint(path)
        if step == 1:
            plugin.wait()
            made.strategy.barrier()
        if step == 2:
            seen["loads"] = made.strategy.load_checkpoint(path, weights_only=False)["global_step"]

    fit(directory, "ddp", act, 3)
    seen["reads"] = torch.load(path, weights_only=False)["global_step"]


def fails(directory: Path, kind: str, part: str, seen: dict[str, Any]) -> None:
    """The newest save fails on rank 0, in the middle, at the end, and once too often."""
    path = directory / f"{kind}.ckpt"

    def strategy() -> Any:
        return "ddp" if kind == "ddp" else by_parts()

    def once(made: pl.Trainer, plugin: LazyCheckpointIO, step: int) -> None:
        if step == 2:
            fault(part, **FAILS)
        made.save_checkpoint(path)
        if step == 2:
            seen[f"{kind} load"] = error_of(lambda: made.strategy.load_checkpoint(path, weights_only=False))
            fault(part, **FAILS)

    def always(made: pl.Trainer, plugin: LazyCheckpointIO, step: int) -> None:
        fault(part, **FAILS)
        made.save_checkpoint(path)
        plugin._paths.wait()

    seen[f"{kind} end"] = fit(directory, strategy(), once, 2)
    seen[f"{kind} too many"] = fit(directory, strategy(), always, 4, max_failed_saves=2)


def refused(directory: Path, seen: dict[str, Any]) -> None:
    """Rank 0 cannot even begin the first save: all of them go on to the next."""

    def act(made: pl.Trainer, plugin: LazyCheckpointIO, step: int) -> None:
        if RANK == 0 and step == 1:
            native.set_fault("mkdir", path_part="refused.ckpt", error=errno.ENOSPC)
        made.save_checkpoint(directory / "refused.ckpt")
        native.clear_faults()

    seen["refused end"] = fit(directory, by_parts(), act, 2)
    seen["refused step"] = torch.load(directory / "refused.ckpt" / "meta.pt", weights_only=False)["global_step"]


def by_parts() -> Any:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def main() -> None:
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    seen: dict[str, Any] = {}
    late(directory, seen)
    fails(directory, "ddp", "", seen)
    fails(directory, "sharded", "meta.pt", seen)
    refused(directory, seen)
    (directory / f"seen.{RANK}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
