"""Trains a small model with torchtitan's containers and LazyCheckpointManager, as its trainer does, to be killed and resumed."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ckpt.integrations.torchtitan import LazyCheckpointManager

WIDTH = 192


class Container:
    """An optimizer whose state goes by the names of its parameters, as that of torchtitan's OptimizersContainer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=True)
        return get_optimizer_state_dict(self.model, self.optimizer, options=options)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizer, state, options=options)


class Loader:
    """Says of each rank alone where it is, pickled, as torchtitan's does."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.taken = rank, ranks, 0

    def next(self) -> torch.Tensor:
        self.taken += 1
        return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1000 * self.rank + self.taken))

    def state_dict(self) -> dict[str, Any]:
        return {f"dp_rank_{self.rank}": pickle.dumps(self.taken), "world_size": self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = pickle.loads(state[f"dp_rank_{self.rank}"])


class Training:
    """What torchtitan's Trainer saves of itself, and the order in which it calls its checkpointer."""

    def __init__(self, folder: Path, **config: Any) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        if ranks > 1:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.init_device_mesh("cpu", (ranks,))
            for part in (self.model[0], self.model[2], self.model):
                fully_shard(part, mesh=mesh)
        self.optimizers, self.loader, self.step = Container(self.model), Loader(rank, ranks), 0
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizers.optimizer, 2, 0.5)
        chosen = {"enable": True, "interval": 1, "keep_latest_k": 2, "last_save_model_only": False, "arena_bytes": "8MiB"}
        kind = config.pop("kind", LazyCheckpointManager)
        chosen = {**chosen, **config} if kind is LazyCheckpointManager else {**chosen, **config, "arena_bytes": None}
        self.checkpointer = kind.Config(**{name: value for name, value in chosen.items() if value is not None}).build(
            dataloader=self.loader,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedule,
            states={"train_state": self},
            sd_adapter=None,
            base_folder=str(folder),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def train(self, steps: int, seen: Any = lambda step: None) -> None:
        self.checkpointer.load(step=-1)
        while self.step < steps:
            self.step += 1
            seen(self.step)
            batch = self.loader.next()
            (self.model(batch) - batch).square().mean().backward()
            self.checkpointer.maybe_wait_for_staging()
            self.optimizers.optimizer.step()
            self.optimizers.optimizer.zero_grad()
            self.schedule.step()
            self.checkpointer.save(self.step, last_step=self.step == steps)
        self.checkpointer.close()

    def digest(self) -> str:
        found = hashlib.blake2b(digest_size=16)
        for state in (self.model.state_dict(), self.optimizers.state_dict()):
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value = value.full_tensor() if hasattr(value, "full_tensor") else value
                    found.update(value.detach().contiguous().numpy().tobytes())
        return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    events = (args.directory / f"{'resumed' if args.resume else 'first'}.{os.environ['RANK']}").open("w")

    def write(event: str, **fields: Any) -> None:
        events.write(json.dumps({"event": event, "pid": os.getpid(), **fields}) + "\n")
        events.flush()

    if not args.resume:
        whole = Training(args.directory / "whole")
        whole.train(args.steps)
        write("end", digest=whole.digest())
    training = Training(args.directory / "saved")

    def seen(step: int) -> None:
        write("step", step=step)
        time.sleep(0.0 if args.resume else 0.1)

    training.train(args.steps, seen)
    write("end of saved", digest=training.digest())
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
