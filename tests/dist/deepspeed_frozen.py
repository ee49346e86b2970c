"""A mode more of deepspeed_training.py: how much of a checkpoint is not read where a part of the model does not learn.

torchrun --nproc-per-node 1 deepspeed_frozen.py plan.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import deepspeed
import torch
from dist import deepspeed_training
from dist.deepspeed_models import Case
from dist.deepspeed_training import DEADLINE_S
from support import options
from torch import nn

import ckpt.integrations.deepspeed as lazy
from ckpt.integrations.deepspeed.engine import collecting

WIDE, SAVES = 512, 6


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDE, 2 * WIDE, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDE, 4, bias=False), nn.Linear(4, 2 * WIDE, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def unread(case: Case, directory: Path) -> dict[str, Any]:
    """Bytes of each save; and whether every file has what the model had."""
    torch.manual_seed(1)
    engine, *_ = deepspeed.initialize(
        model=Adapted(),
        config={
            "train_micro_batch_size_per_gpu": 3,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": case.stage},
        },
    )
    lazy.attach(engine, options=options())
    found, is_right = [], True
    for step in range(SAVES):
        engine.backward(engine(torch.randn(3, WIDE)).square().mean())
        engine.step()
        if step == SAVES - 1:
            engine.module.base.weight.data.mul_(0.5)
        with collecting() as begun:
            engine.save_checkpoint(str(directory), tag=f"step{step}")
        begun[0].result(DEADLINE_S)
        found.append(begun[0].stats.unread_bytes)
        saved = torch.load(directory / f"step{step}" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        is_right &= all(torch.equal(value, saved[key]) for key, value in engine.module.state_dict().items())
    engine.destroy()
    return {"unread": found, "right": is_right}


deepspeed_training.MODES["unread"] = unread

if __name__ == "__main__":
    deepspeed_training.main(json.loads(Path(sys.argv[1]).read_text()))
