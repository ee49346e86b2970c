"""A training with accelerate, of one process, whose states tests save and load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import ProjectConfiguration
from support import clear_faults, options
from torch import nn

import ckpt
import ckpt.integrations.accelerate as lazy

WIDTH = 128  # weights of 64 KiB


@pytest.fixture(autouse=True)
def enabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    lazy.enable(options(max_failed_saves=2))
    try:
        yield
    finally:
        clear_faults()
        with contextlib.suppress(ckpt.CheckpointError):
            lazy.disable()
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()


class Registered:
    """An average of the weights, as training scripts have it."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = [parameter.detach().clone() for parameter in model.parameters()]

    def update(self, model: nn.Module) -> None:
        for shadow, parameter in zip(self.shadow, model.parameters(), strict=True):
            shadow.lerp_(parameter.detach(), 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state["shadow"]


class Training:
    def __init__(self, directory: Path, scaler: torch.amp.GradScaler | None = None, **configuration: Any) -> None:
        torch.manual_seed(0)
        project = ProjectConfiguration(str(directory), **configuration)
        self.accelerator = Accelerator(project_config=project, gradient_accumulation_steps=2)
        self.accelerator.scaler = scaler  # as accelerate itself makes one for fp16, which the host does not have
        layers = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH)]
        self.bare = nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(self.bare.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(self.bare, optimizer, schedule)
        self.average = Registered(self.bare)
        self.accelerator.register_for_checkpointing(self.average)
        self.advance()

    def backward(self) -> None:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(torch.randn(8, WIDTH)).square().mean())
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def advance(self) -> None:
        for _ in range(2):
            self.backward()
        self.average.update(self.bare)

    def save(self, path: Path | None = None, **more: Any) -> Path:
        return Path(self.accelerator.save_state(None if path is None else str(path), **more))

    def save_as_accelerate(self, path: Path, **more: Any) -> None:
        lazy.disable()
        try:
            self.save(path, **more)
        finally:
            lazy.enable(options(max_failed_saves=2))

    def everything(self) -> dict[str, Any]:
        """A copy of all that a state holds."""
        state = {
            "model": self.bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict(),
            "random": torch.get_rng_state(),
        }
        return copied(state)


def copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return type(value)(copied(item) for item in value) if isinstance(value, (list, tuple)) else value


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
