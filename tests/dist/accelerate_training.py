"""Trains with accelerate and saves its states, as one of the ranks of a job that is killed and resumed.

All that has to be resumed is in it: dropout, batch statistics, random numbers of three kinds, gradient accumulation, a schedule, a
registered average of the weights, and a loader in the middle of an epoch. What a rank has come to it prints: "found" with the
step that it began with, "durable" with those that are; and it leaves a digest for each step.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import accelerate.accelerator
import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration, FullyShardedDataParallelPlugin, skip_first_batches
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ckpt
import ckpt.integrations.accelerate as lazy
from ckpt import _native

WIDTH, SAMPLES, BATCH, ACCUMULATE = 192, 48, 4, 2
SMALL: dict[str, Any] = {"arena_bytes": "4MiB", "chunk_bytes": "64KiB", "writers": 2, "eager_bytes": "4KiB"}
PATIENCE = {"timeout_s": 60.0, "drain_timeout_s": 60.0, "commit_timeout_s": 60.0}


class Progress:
    """Where the training is: registered, as accelerate has it."""

    def __init__(self) -> None:
        self.step = self.epoch = self.batch = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


class Average:
    """Of the weights, as it stands after each step: nobody steps it but the training itself."""

    def __init__(self, model: nn.Module) -> None:
        self.model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)


def make_model(with_statistics: bool) -> nn.Module:
    middle = [nn.BatchNorm1d(WIDTH)] if with_statistics else []
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *middle, nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH))


# accelerate shards on devices alone; on the host it asks for no more than what is set here.


def shard_by_fsdp(states: str) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True, state_dict_type=states)
    set_kind(DistributedType.FSDP, fsdp_plugin=plugin)


def write_a_file_by_each_rank() -> None:
    """As functions of accelerate can, though nothing that save_state() is given asks them to."""
    for what in ("save_fsdp_model", "save_fsdp_optimizer", "load_fsdp_model", "load_fsdp_optimizer"):
        setattr(accelerate.accelerator, what, functools.partial(getattr(accelerate.accelerator, what), use_dcp=False))


def shard_by_deepspeed(accelerator: Accelerator) -> None:
    from accelerate.utils import DeepSpeedPlugin

    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    plugin.set_mixed_precision("no")
    plugin.select(_from_accelerator_state=True)
    set_kind(DistributedType.DEEPSPEED, deepspeed_plugins=plugin)
    accelerator.deepspeed_engine_wrapped = None


def set_kind(kind: DistributedType, **plugins: Any) -> None:
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = kind
    AcceleratorState._shared_state.update(plugins)


class Training:
    """
    Args:
        kind: "plain" (DDP, if there are several ranks), "fsdp2", "fsdp2-by-rank" (each rank writes files of its own),
            "fsdp2-full" (rank 0 writes what it has gathered) or "deepspeed".
    """

    def __init__(self, kind: str, directory: Path, numbered: bool, limit: int | None) -> None:
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=ACCUMULATE,
            step_scheduler_with_optimizer=False,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5),
            project_config=ProjectConfiguration(str(directory), automatic_checkpoint_naming=numbered, total_limit=limit),
        )
        if kind.startswith("fsdp2"):
            shard_by_fsdp("FULL_STATE_DICT" if kind == "fsdp2-full" else "SHARDED_STATE_DICT")
        if kind == "fsdp2-by-rank":
            write_a_file_by_each_rank()
        elif kind == "deepspeed":
            shard_by_deepspeed(self.accelerator)
        torch.manual_seed(1)
        model = make_model(kind == "plain")
        self.average = Average(model) if kind == "plain" else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7)
        loader = torch.utils.data.DataLoader(
            torch.randn(SAMPLES, WIDTH), batch_size=BATCH, shuffle=True, generator=torch.Generator()
        )
        self.bare = model
        self.model, self.optimizer, self.schedule, self.loader = self.accelerator.prepare(model, optimizer, schedule, loader)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress, *([self.average] if self.average else []))
        rank = self.accelerator.process_index
        random.seed(rank)
        np.random.seed(rank)
        torch.manual_seed(100 + rank)
        if kind == "plain" and self.accelerator.num_processes > 1:
            self._warm_up()

    def _warm_up(self) -> None:
        """DDP sums the gradients of its first iteration in another order than later ones."""
        before = {name: buffer.clone() for name, buffer in self.bare.named_buffers()}
        state = torch.get_rng_state()
        self.accelerator.backward(self.model(torch.zeros(BATCH, WIDTH)).sum())
        self.optimizer.zero_grad()
        torch.set_rng_state(state)
        for name, buffer in self.bare.named_buffers():
            buffer.copy_(before[name])

    def batches(self) -> Any:
        while True:
            self.loader.set_epoch(self.progress.epoch)
            loader = skip_first_batches(self.loader, self.progress.batch) if self.progress.batch else self.loader
            for batch in loader:
                self.progress.batch += 1
                yield batch
            self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0

    def advance(self, batches: Any) -> float:
        total = 0.0
        for _ in range(ACCUMULATE):
            batch = next(batches) + random.gauss(0, 0.1) + float(np.random.normal(0, 0.1))
            with self.accelerator.accumulate(self.model):
                loss = (self.model(batch) - batch).square().mean()
                self.accelerator.backward(loss)
                self.optimizer.step()
                if self.accelerator.sync_gradients:
                    self.schedule.step()
                self.optimizer.zero_grad()
            total += loss.item()
        if self.average is not None:
            self.average.model.update_parameters(self.bare)
        self.progress.step += 1
        return total

    def digest(self) -> str:
        """Of all that a resumed run must have in common with the undisturbed one, on this rank."""
        whole = hashlib.blake2b(digest_size=16)
        feed(whole, dict(self.bare.named_parameters()))
        if self.accelerator.is_main_process:  # whose buffers the others are given in each forward
            feed(whole, dict(self.bare.named_buffers()))
        if self.average is not None:
            feed(whole, dict(self.average.model.named_parameters()))
        feed(whole, self.optimizer.state_dict())
        feed(whole, self.schedule.state_dict())
        feed(whole, [random.getstate(), torch.get_rng_state(), vars(self.progress)])
        whole.update(repr(np.random.get_state()).encode())
        return whole.hexdigest()


def feed(whole: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        whole.update(local.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key, item in value.items():
            whole.update(repr(key).encode())
            feed(whole, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            feed(whole, item)
    elif not callable(value) and not hasattr(value, "__dict__"):
        whole.update(repr(value).encode())


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # at once, and whole


def main(plan: dict[str, Any]) -> None:
    """
    Args:
        plan: "directory", "steps", "outcomes"; and what is not as the defaults below.
    """
    plan = {"kind": "plain", "numbered": True, "limit": 2, "wait": False, "ranks": "all", "stock": False, **plan}
    torch.set_num_threads(1)
    if not plan["stock"]:
        lazy.enable(ckpt.Options(**SMALL, **PATIENCE), ranks=plan["ranks"])
    directory = Path(plan["directory"])
    training = Training(plan["kind"], directory, plan["numbered"], plan["limit"])
    accelerator, progress = training.accelerator, training.progress
    resume(training, directory, plan)
    rank = accelerator.process_index
    digests = {progress.step: training.digest()}
    say(f"found {progress.step} {digests[progress.step]}")
    if plan.get("crash_point") and rank == plan["crash_rank"]:
        _native.set_crash_point(plan["crash_point"], plan["crash_skip"])
    losses, batches = {}, training.batches()
    while progress.step < plan["steps"]:
        losses[progress.step] = training.advance(batches).hex()
        digests[progress.step] = training.digest()
        if plan["ranks"] == "all" or accelerator.is_main_process:
            accelerator.save_state(None if plan["numbered"] else str(directory / f"step_{progress.step}"))
        if plan["wait"]:
            lazy.wait()
            say(f"durable {progress.step}")
    accelerator.end_training()
    outcome = {"digests": digests, "losses": losses}
    Path(plan["outcomes"], f"outcome.{rank}.json").write_text(json.dumps(outcome))


def resume(training: Training, directory: Path, plan: dict[str, Any]) -> None:
    accelerator = training.accelerator
    if plan["numbered"]:
        if (directory / "checkpoints").exists() or list(directory.glob(".lazyckpt-*")):
            try:
                accelerator.load_state()
            except (FileNotFoundError, IndexError):  # as accelerate has it, where none is complete
                return
            accelerator.project_configuration.iteration = training.progress.step
    elif "load" in plan:
        accelerator.load_state(plan["load"])
