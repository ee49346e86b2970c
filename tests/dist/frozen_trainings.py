"""One of two ranks that train a model that is frozen in part, save each step, and go on from one in the middle as from a crash.

Each reports on its standard output, a line each:

    saved <step> <bytes that this rank has not written> <digest of what it has then>
    resumed <step> <the same digest>
    ended <digest of the last step>
"""

from __future__ import annotations

import datetime
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from dist.deepspeed_training import digest
from support import DEADLINE_S, options
from torch import nn

WIDTH = 1024
STEPS, MIDDLE = 6, 4


def say(*words: Any) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def network() -> nn.Module:
    """Two frozen matrices of 4 MiB, and little that learns."""
    torch.manual_seed(3)
    frozen = [nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(2)]
    return nn.Sequential(frozen[0], nn.Tanh(), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), frozen[1])


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * step + td.get_rank()))


# ---- FSDP2, with the callback ----------------------------------------------------------------------------------------


class Sharded:
    def __init__(self) -> None:
        from torch.distributed.fsdp import fully_shard

        self.model = network()
        for layer in self.model:
            if [*layer.parameters()]:
                fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW([each for each in self.model.parameters() if each.requires_grad], lr=1e-2)

    def advance(self, step: int) -> None:
        self.model(batch(step)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def digest(self) -> str:
        states = [*self.model.state_dict().values()]
        states += [value for state in self.optimizer.state_dict()["state"].values() for value in state.values()]
        return digest([each.to_local() if hasattr(each, "to_local") else each for each in states])


def fsdp(directory: str) -> None:
    from ckpt.integrations.torch import CheckpointCallback

    how: dict[str, Any] = {"keep": None, "options": options()}
    job = Sharded()
    with CheckpointCallback(directory, model=job.model, optimizer=job.optimizer, **how) as callback:
        for step in range(1, STEPS + 1):
            job.advance(step)
            pending = callback.save(step)
            saved = job.digest()
            pending.result(DEADLINE_S)
            say("saved", step, pending.stats.reused_bytes, saved)
    job = Sharded()
    with CheckpointCallback(directory, model=job.model, optimizer=job.optimizer, **how) as callback:
        say("resumed", callback.resume(step=MIDDLE), job.digest())
        for step in range(MIDDLE + 1, STEPS + 1):
            job.advance(step)
    say("ended", job.digest())


# ---- DeepSpeed -------------------------------------------------------------------------------------------------------


class Engine:
    def __init__(self, stage: int) -> None:
        import deepspeed

        from dist.deepspeed_training import SMALL

        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero |= {"stage3_param_persistence_threshold": 1000}
        model = network()
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "steps_per_print": 1 << 30,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "datastates_ckpt": {"host_cache_size": 8 / 1024, **SMALL},
        }
        learning = [each for each in model.parameters() if each.requires_grad]
        self.engine = deepspeed.initialize(model=model, model_parameters=learning, config=config)[0]

    def advance(self, step: int) -> None:
        self.engine.backward(self.engine(batch(step)).float().square().mean())
        self.engine.step()

    def digest(self) -> str:
        parameters = [getattr(each, "ds_tensor", each) for each in self.engine.module.parameters()]
        return digest([parameters, self.engine.optimizer.state_dict()])


def deepspeed_stage(directory: str, stage: int) -> None:
    import deepspeed

    import ckpt.integrations.deepspeed as lazy

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for minutes, and used instead of gloo
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=DEADLINE_S), verbose=False)
    lazy.enable()
    job = Engine(stage)
    for step in range(1, STEPS + 1):
        job.advance(step)
        job.engine.save_checkpoint(directory, tag=f"step{step}")
        saved = job.digest()
        lazy.wait(job.engine, timeout=DEADLINE_S)
        td.barrier()
        files = json.loads((Path(directory) / f"step{step}" / "manifest.json").read_text())["files"]
        shared = sum(file.get("shared_bytes", 0) for file in files if file["rank"] == td.get_rank())
        say("saved", step, shared, saved)
    job = Engine(stage)
    job.engine.load_checkpoint(directory, tag=f"step{MIDDLE}")
    say("resumed", job.engine.global_steps, job.digest())
    for step in range(MIDDLE + 1, STEPS + 1):
        job.advance(step)
    say("ended", job.digest())


def main(request: dict[str, Any]) -> None:
    """
    Args:
        request: environment; directory, and meeting or stage.
    """
    os.environ.update(request["environment"])
    torch.set_num_threads(1)
    if "stage" in request:
        deepspeed_stage(request["directory"], request["stage"])
    else:
        td.init_process_group("gloo", init_method=f"file://{request['meeting']}", rank=int(os.environ["RANK"]), world_size=2)
        fsdp(request["directory"])
    os._exit(0)  # all is durable
