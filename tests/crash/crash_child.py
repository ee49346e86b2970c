"""Trains a toy model and saves every step, to be killed. Its test imports it, too, for what the right states are.

It reports on its standard output what has become durable, one line each, each in one write.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

import ckpt
from ckpt import _native

WIDTH = 192
OPTIONS = ckpt.Options(  # an arena smaller than the state, so that back-pressure is part of it
    arena_bytes="1MiB", chunk_bytes="64KiB", writers=2, eager_bytes="4KiB", timeout_s=60, drain_timeout_s=60
)


class Trainer:
    """Deterministic: the state after a step depends on nothing but the step's number."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 512), torch.nn.LayerNorm(512), torch.nn.Linear(512, WIDTH), torch.nn.BatchNorm1d(WIDTH)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.step = -1

    def advance(self) -> None:
        self.step += 1
        batch = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(self.step))
        loss = (self.model(batch) - batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}

    def resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def digest(value: Any) -> str:
    """Of all that a state holds, bit for bit."""
    whole = hashlib.blake2b(digest_size=16)
    _feed(whole, value)
    return whole.hexdigest()


def _feed(whole: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        whole.update(f"{value.dtype} {list(value.shape)}".encode())
        whole.update(value.detach().contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            whole.update(repr(key).encode())
            _feed(whole, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(whole, item)
    else:
        whole.update(repr(value).encode())


def file_state(step: int) -> dict[str, Any]:
    """What the single-file child saves."""
    return {"step": step, "weights": torch.randn(300, 1000, generator=torch.Generator().manual_seed(step))}


# ---- the child -------------------------------------------------------------------------------------------------------


def train(request: dict[str, Any]) -> None:
    checkpointer = ckpt.Checkpointer(request["directory"], keep=request["keep"], options=OPTIONS)
    found = checkpointer.restore()
    trainer = Trainer()
    if found is not None:
        trainer.resume(found.state)
    os.write(1, f"begun {trainer.step}\n".encode())

    def save() -> None:
        step = trainer.step
        pending = checkpointer.save(step, trainer.state())
        pending.add_done_callback(lambda _: pending.exception() or os.write(1, f"durable {step}\n".encode()))

    if request["again"] and found is not None:
        save()
    _native.set_crash_point(request["crash_point"], request["crash_skip"])
    for _ in range(request["steps"]):
        trainer.advance()
        save()
        if request["again"]:
            checkpointer.save(trainer.step, trainer.state())
    checkpointer.close()


def save_one_file(request: dict[str, Any]) -> None:
    path = Path(request["directory"]) / "model.pt"
    first = ckpt.load(path)["step"] + 1 if path.exists() else 0
    os.write(1, f"begun {first - 1}\n".encode())
    _native.set_crash_point(request["crash_point"], request["crash_skip"])
    for step in range(first, first + request["steps"]):
        ckpt.save(file_state(step), path, lazy=True, options=OPTIONS).result()
        os.write(1, f"durable {step}\n".encode())


def leave() -> None:
    """All is durable: no need to take the interpreter down in good order."""
    os._exit(0)
