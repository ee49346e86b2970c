"""One rank of a job that trains a sharded model by CheckpointCallback; it may kill itself. It prints a line of JSON at the end.

All ranks have the same batches, and gradients are averaged: so each number of ranks computes the same, to the bit.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from dist.sharded_trainer import digest
from support import options
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ckpt
from ckpt import _native
from ckpt.integrations.torch import CheckpointCallback


class Net(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, hidden), nn.Linear(hidden, 16)
        self.norm = nn.BatchNorm1d(16)
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.relu(self.up(x)))) * self.frozen.sum()


def wrap(model: nn.Module, how: str, world: int) -> nn.Module:
    if how.startswith("fsdp1"):
        return wrap_in_fsdp1(model, how, world)
    if how == "recomputed":
        model.up, model.down = checkpoint_wrapper(model.up), checkpoint_wrapper(model.down)
    if how in ("fsdp", "recomputed"):
        mesh = init_device_mesh("cpu", (world,))
        for layer in (model.up, model.down):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how in ("tensor parallel", "sharded buffer"):
        if how == "sharded buffer":
            table = distribute_tensor(torch.randn(6, 2), init_device_mesh("cpu", (world,)), [Shard(0)])
            model.register_buffer("table", table)
        parallelize_module(model, init_device_mesh("cpu", (world,)), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    elif how == "hybrid":
        fully_shard(model, mesh=init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicas", "shards")))
    return model


def wrap_in_fsdp1(model: nn.Module, how: str, world: int) -> nn.Module:
    mesh, strategy = init_device_mesh("cpu", (world,)), ShardingStrategy.FULL_SHARD
    if how == "fsdp1 hybrid":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicas", "shards"))
        strategy = ShardingStrategy.HYBRID_SHARD
    flat: Any = FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        sharding_strategy=strategy,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
    )
    return nn.Sequential(flat) if how == "fsdp1 inside" else flat


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


class Training:
    """
    Args:
        request: directory, meeting, rank, world, how, steps; `kill_at`: the step behind which it kills itself.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        rank, world = request["rank"], request["world"]
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world)
        td.init_process_group("gloo", init_method=f"file://{request['meeting']}", rank=rank, world_size=world)
        self.request = request
        torch.manual_seed(7 + request.get("seed", 0))
        self.model: Any = Net(request["hidden"])
        for name in request["more"]:
            self.model.register_parameter(name, nn.Parameter(torch.zeros(4), requires_grad=False))
        self.model = wrap(self.model, request["how"], world)
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW([{"params": learning[:2], "weight_decay": 0.1}, {"params": learning[2:]}], lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        self.callback = CheckpointCallback(
            request["directory"], model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, options=options(),
            coordinator="torch", keep=None, tiers=[ckpt.Tier.node(path) for path in request.get("nodes", ())],
        )  # fmt: skip

    def state(self) -> Any:
        """All of it, on each rank."""
        rates = torch.tensor([group["lr"] for group in self.optimizer.param_groups])
        if self.request["how"].startswith("fsdp1"):
            return [*self.gathered(), rates]
        averages = [[whole(its[key]) for key in sorted(its)] for its in self.optimizer.state.values()]
        weights = [whole(value).detach() for value in self.model.state_dict().values()]
        return [*weights, *averages, rates]

    def gathered(self) -> Any:
        """As torch does it."""
        full = StateDictOptions(full_state_dict=True)
        weights = list(get_model_state_dict(self.model, options=full).values())
        if not self.optimizer.state:
            return weights
        found: Any = get_optimizer_state_dict(self.model, self.optimizer, options=full)
        learnt = [found["state"].get(name) for group in found["param_groups"] for name in group["params"]]
        return [*weights, *([its[key] for key in sorted(its)] for its in learnt if its is not None)]

    def spoil(self) -> None:
        """What a save that was captured must not notice."""
        ckpt.fence()
        for tensor in (*self.model.parameters(), *(each for its in self.optimizer.state.values() for each in its.values())):
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data.fill_(3)

    def run(self) -> dict[str, Any]:
        found = begin = self.callback.resume(strict=self.request["strict"])
        resumed = digest(self.state())
        if self.request["save_first"]:
            self.callback.save(0)
        digests = {}
        for step in range(begin + 1, self.request["steps"] + 1):
            torch.manual_seed(step)
            self.model(torch.randn(8, 16)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            digests[step] = digest(self.state())
            if self.request["spoilt"]:
                _native.set_fault(call="pwritev", path_part="distcp", delay_s=0.05)
            pending = self.callback.step(step)
            assert pending is not None
            if self.request["spoilt"]:
                self.spoil()
                break
            if step == self.request["kill_at"] - 2:
                pending.result(60)
            if step == self.request["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)
        self.callback.close()
        _native.clear_faults()
        return {"found": found, "resumed": resumed, "digests": digests}


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    heard = io.StringIO()
    logging.getLogger("ckpt").addHandler(logging.StreamHandler(heard))
    try:
        made = Training({"kill_at": -1, "hidden": 36, "save_first": False, "more": [], "strict": True, "spoilt": False} | request)
        said: dict[str, Any] = made.run()
    except (ckpt.CheckpointError, TypeError) as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    os.write(1, (json.dumps(said | {"log": heard.getvalue()}) + "\n").encode())
    os._exit(0)


