"""Trains a small module with Lightning and LazyCheckpointIO, on one process or under torchrun, to be killed and resumed.

Every rank writes a JSON line per event into a file of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_models import WIDTH, Model, batches, trainer
from support import options

import ckpt
from ckpt.integrations.lightning import LazyCheckpointIO

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Counting(LazyCheckpointIO):
    """Notes how many bytes each save has copied before it returned."""

    def __init__(self, given: ckpt.Options, copied: list[int]) -> None:
        super().__init__(given)
        self._copied = copied

    def begin(self, path: Path, make: Any, *failures: Any) -> None:
        def made() -> Any:
            pending = make()
            pending.add_done_callback(lambda done: self._copied.append(done.stats.bytes_copied_in_save))
            return pending

        super().begin(path, made, *failures)


class Log:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w")

    def __call__(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, **fields}) + "\n")
        self._file.flush()


class Shards(Model):
    """Its layers are sharded when they are set up."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.layer = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, WIDTH))

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for part in (self.layer[0], self.layer[2]):
            if not isinstance(part, FSDPModule):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def digest(module: Model) -> str:
    found = hashlib.blake2b(digest_size=16)
    optimizer: Any = module.optimizers()
    tensors = [*module.state_dict().values(), *(t for s in optimizer.state.values() for t in s.values())]
    for tensor in tensors:
        found.update(whole(tensor.detach()).contiguous().numpy().tobytes())
    return found.hexdigest()


def fit(args: argparse.Namespace, directory: Path, name: str, pause_s: float, resume: bool) -> None:
    log = Log(args.events / f"{name}.{RANK}")
    log("start", pid=os.getpid())

    def seen(what: str, step: int) -> None:
        if what == "forward":
            log("step", step=int(step))
            time.sleep(pause_s)

    module = Shards(seen=seen) if args.sharded else Model(seen=seen)
    strategy: Any = "ddp" if WORLD_SIZE > 1 else "auto"
    if args.sharded:
        strategy = ModelParallelStrategy(data_parallel_size=WORLD_SIZE, tensor_parallel_size=1)
    # A sharded `last` is a directory, and saved to again and again.
    keep = {"save_top_k": 2, "monitor": "step", "mode": "max", "save_last": True if args.sharded else "link"}
    copied: list[int] = []
    plugin = None if args.stock else Counting(options(), copied)
    made = trainer(
        directory,
        plugin,
        steps=args.steps,
        checkpoint={"every_n_train_steps": 1, **keep},
        strategy=strategy,
        devices=WORLD_SIZE,
    )
    made.fit(module, batches(args.steps), ckpt_path="last" if resume else None, weights_only=False)
    log("end", digest=digest(module), step=int(made.global_step), copied=copied)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True, help="a directory; in it a file for each run and rank")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--stock", action="store_true", help="Lightning's own checkpoints")
    parser.add_argument("--resume", action="store_true", help="from `last`; else it trains to the end, and then once more, slowly")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.resume:
        fit(args, args.directory / "saved", "resumed", 0.0, True)
    else:
        fit(args, args.directory / "whole", "whole", 0.0, False)
        fit(args, args.directory / "saved", "killed", 0.1, False)


if __name__ == "__main__":
    main()
