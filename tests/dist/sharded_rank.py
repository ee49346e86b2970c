"""One of two ranks that give sharded models and optimizers to what saves replicas; prints what each is told, a line each."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support import options, standard_output_for_answers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt
from ckpt.integrations.torch import CheckpointCallback

directory = Path(sys.argv[1])
answers = standard_output_for_answers()
numbers = itertools.count()


def told(name: str, call: Any) -> None:
    try:
        call()
        line = "accepted"
    except TypeError as error:
        line = f"TypeError: {error}"
    except Exception as error:
        line = f"{type(error).__name__}: {error}"
    if dist.get_rank() == 0:
        print(f"{name}: {line}", file=answers)
    dist.barrier()


def callback(**arguments: Any) -> None:
    with CheckpointCallback(directory / f"steps-{next(numbers)}", options=options(), **arguments) as made:
        made.save(1).result(60)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for original in (False, True):
    model = FullyShardedDataParallel(make(), use_orig_params=original, device_id=torch.device("cpu"))
    told(f"fsdp-{original}", lambda model=model: callback(model=model))
    inside = nn.ModuleDict({"trunk": model})
    told(f"fsdp-inside-{original}", lambda inside=inside: callback(model=inside))
    optimizer = torch.optim.Adam(model.parameters())
    told(f"fsdp-optimizer-{original}", lambda o=optimizer: callback(model=nn.Linear(2, 2), optimizer=o))
model = FullyShardedDataParallel(make(), device_mesh=mesh, device_id=torch.device("cpu"))
told("fsdp-mesh", lambda model=model: callback(model=model))
sharded = make()
fully_shard(sharded, mesh=mesh)
told("fully_shard", lambda: callback(model=sharded))
told("fully_shard-optimizer", lambda: callback(model=nn.Linear(2, 2), optimizer=torch.optim.Adam(sharded.parameters())))
plain = make()
zero = ZeroRedundancyOptimizer(plain.parameters(), optimizer_class=torch.optim.Adam)
told("zero", lambda: callback(model=plain, optimizer=zero))
told("ddp", lambda: callback(model=nn.parallel.DistributedDataParallel(plain), optimizer=torch.optim.Adam(plain.parameters())))
shard = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])
with ckpt.Checkpointer(directory / "by-hand", options=options()) as checkpointer:
    told("replicated-shard", lambda: checkpointer.save(1, replicated={"w": shard}).result(60))
    told("replicated-whole", lambda: checkpointer.save(2, replicated={"w": shard.full_tensor()}).result(60))
dist.destroy_process_group()
os._exit(0)  # gloo may hang in the end of an interpreter that has imported DTensors
