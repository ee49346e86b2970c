"""One rank of a job that saves what has changed in part; tests/saving/test_reuse_processes.py starts it, and kills it."""

from __future__ import annotations

import os
from typing import Any

import torch

import ckpt
from ckpt import _native

MIB = 1 << 20


def options(**changes: Any) -> ckpt.Options:
    small: dict[str, Any] = {"arena_bytes": "4MiB", "chunk_bytes": "64KiB", "writers": 2, "eager_bytes": "4KiB"}
    return ckpt.Options(**(small | {"timeout_s": 60.0, "drain_timeout_s": 60.0} | changes))


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def frozen(number: int) -> torch.Tensor:
    return torch.randn(2 * MIB // 4, generator=torch.Generator().manual_seed(number))


def state_at(number: int, step: int) -> dict[str, Any]:
    """What is saved as that step: some of it the same each time, and some of it not."""
    learning = torch.full((MIB // 4 + 1000,), number + 0.25 * step)
    half = frozen(number + 100)
    half[half.numel() // 2 + step] = step
    return {"frozen": frozen(number), "half": half, "learning": learning, "step": step}


def run(request: dict[str, Any]) -> None:
    """
    Args:
        request: directory, rank, world, first, steps, crash_point, crash_skip; own: each rank has a file of its own, too.
    """
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(request["rank"]), str(request["world"])
    kind = "file" if request["world"] > 1 else "local"
    with ckpt.Checkpointer(request["directory"], keep=None, options=options(), coordinator=kind) as checkpointer:
        found = checkpointer.restore()
        first = 0 if found is None else found.step + 1
        _native.set_crash_point(request["crash_point"], request["crash_skip"])
        for step in range(first, first + request["steps"]):
            own = state_at(request["rank"] + 1, step)
            common = state_at(0, step) if request["world"] > 1 else None
            pending = checkpointer.save(step, own, replicated=common)
            pending.result(60)
            say(f"durable {step} {pending.stats.reused_bytes} {pending.stats.bytes_total}")


def leave() -> None:
    """All is durable: no need to take the interpreter down in good order."""
    os._exit(0)
