"""One rank of a job with frozen tensors in files of their own; tests/saving/test_frozen_processes.py starts it, and kills it."""

from __future__ import annotations

import os
from typing import Any

import torch
from dist.reuse_rank import leave, options, say

import ckpt
from ckpt import _native
from ckpt.saving import frozen_file

__all__ = ["leave", "run", "state_at"]
MIB = 1 << 20


def state_at(number: int, step: int) -> dict[str, Any]:
    """What is saved as that step."""
    generator = torch.Generator().manual_seed(number)
    frozen = {name: torch.randn(MIB // 4, generator=generator) for name in ("a", "b")}
    return {"frozen": frozen, "learning": torch.full((5000,), number + 0.25 * step), "step": step}


def run(request: dict[str, Any]) -> None:
    """
    Args:
        request: directory, rank, world, steps, crash_point, crash_skip; sharded: whether there is a sharded state, too.
    """
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(request["rank"]), str(request["world"])
    frozen_file.LEAST_BYTES = MIB
    kind = "file" if request["world"] > 1 else "local"
    setting = options(frozen="separate")
    with ckpt.Checkpointer(request["directory"], keep=2, options=setting, coordinator=kind) as checkpointer:
        found = checkpointer.restore()
        first = 0 if found is None else found.step + 1
        _native.set_crash_point(request["crash_point"], request["crash_skip"])
        state = state_at(request["rank"] + 1, first)
        common = {"common": state_at(0, first)["frozen"]} if request["world"] > 1 else None
        frozen = [*state["frozen"].values(), *([] if common is None else common["common"].values())]
        for step in range(first, first + request["steps"]):
            state |= {key: value for key, value in state_at(request["rank"] + 1, step).items() if key != "frozen"}
            pending = checkpointer.save(step, state, replicated=common, frozen=frozen)
            pending.result(60)
            say(f"durable {step} {pending.stats.reused_bytes} {pending.stats.bytes_total}")
