"""Trains a small model with CheckpointCallback, on one process or under torchrun, to be killed and resumed.

All that has to be resumed is in it: dropout, batch statistics that differ between ranks, random numbers of three kinds,
gradient accumulation, a schedule, a gradient scaler, an EMA copy, and a sampler that shuffles. Every rank writes one JSON line
per event into a file of its own; what is in it has happened.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ckpt
from ckpt.integrations.torch import CheckpointCallback, Preempted

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
OPTIONS = ckpt.Options(arena_bytes="2MiB", chunk_bytes="64KiB", writers=2, eager_bytes="4KiB", timeout_s=60, drain_timeout_s=60)
WIDTH, SAMPLES, BATCH, ACCUMULATE = 64, 120, 4, 2


class ShuffledBatches:
    """Batches of indices for this rank, shuffled anew in each epoch, without end. Knows where it is."""

    def __init__(self) -> None:
        self.epoch = self.batch = 0

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist()
            batches = [order[i : i + BATCH] for i in range(RANK * BATCH, SAMPLES, WORLD_SIZE * BATCH)]
            while self.batch < len(batches):
                self.batch += 1
                yield batches[self.batch - 1]
            self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


class Training:
    def __init__(self, compiled: bool) -> None:
        torch.manual_seed(1)
        layers = [nn.Linear(WIDTH, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, WIDTH)]
        self.bare = nn.Sequential(*layers)
        self.model: nn.Module = torch.compile(self.bare, backend="eager") if compiled else self.bare  # type: ignore[assignment]
        if WORLD_SIZE > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        self.ema = AveragedModel(self.bare, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, T_0=7)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        self.sampler = ShuffledBatches()
        data = torch.randn(SAMPLES, WIDTH)
        own = torch.Generator()  # the loader draws from it whenever it begins
        self.loader = torch.utils.data.DataLoader(data, batch_sampler=self.sampler, generator=own)  # type: ignore[arg-type]
        random.seed(RANK)
        np.random.seed(RANK)
        torch.manual_seed(100 + RANK)

    def advance(self, batches: Iterator[torch.Tensor]) -> float:
        total = 0.0
        for part in range(ACCUMULATE):
            batch = next(batches) + random.gauss(0, 0.1) + float(np.random.normal(0, 0.1))
            last = part == ACCUMULATE - 1
            with contextlib.nullcontext() if last or WORLD_SIZE == 1 else self.model.no_sync():  # type: ignore[operator]
                loss = (self.model(batch) - batch).square().mean()
                self.scaler.scale(loss / ACCUMULATE).backward()
            total += loss.item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.ema.update_parameters(self.bare)
        return total

    def digests(self) -> dict[str, str]:
        """Of what is the same on all ranks, and of what each has of its own."""
        same = [*self.bare.parameters(), *self.ema.parameters(), *moments(self.optimizer)]
        plain = repr((self.scheduler.state_dict(), self.scaler.state_dict()))
        return {"same": digest(same, plain), "buffers": digest([*self.bare.buffers(), *self.ema.buffers()])}


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [tensor for state in optimizer.state_dict()["state"].values() for tensor in state.values()]


def digest(tensors: list[Any], plain: str = "") -> str:
    whole = hashlib.blake2b(plain.encode(), digest_size=16)
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()


class Log(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self._file = path.open("w")

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, **fields}) + "\n")
        self._file.flush()

    def emit(self, record: logging.LogRecord) -> None:
        self.write("logged", text=record.getMessage())


def parse_every(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True, help="the rank's number is added to the name")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=parse_every, default=1)
    parser.add_argument("--preemption", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after each step, for who wants to interrupt it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if WORLD_SIZE > 1:
        torch.distributed.init_process_group("gloo")
    log = Log(args.events.with_name(f"{args.events.name}.{RANK}"))
    logging.getLogger("ckpt").addHandler(log)
    try:
        train(args, Training(args.compiled), log)
    except Preempted as preempted:
        log.write("preempted", step=preempted.step)
        raise
    log.write("end")
    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()


def train(args: argparse.Namespace, training: Training, log: Log) -> None:
    with CheckpointCallback(
        args.directory,
        model=training.model,
        optimizer=training.optimizer,
        scheduler=training.scheduler,
        scaler=training.scaler,
        data=training.sampler,
        extra={"ema": training.ema},
        every=args.every,
        options=OPTIONS,
        preemption=args.preemption,
    ) as callback:
        start = callback.resume()
        log.write("start", pid=os.getpid(), step=start, **training.digests())
        batches = iter(training.loader)
        for step in range(start + 1, args.steps + 1):
            loss = training.advance(batches)
            pending = callback.step(step)
            log.write("step", step=step, loss=loss.hex(), saved=pending is not None, **training.digests())
            time.sleep(args.pause)


if __name__ == "__main__":
    main()
