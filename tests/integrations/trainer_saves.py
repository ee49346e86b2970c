"""What tests of the Trainer's checkpoints have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

FEW = {"max_steps": 3, "gradient_accumulation_steps": 1}


class At(TrainerCallback):
    """Calls something at the beginning of a step: behind the save of the one before, ahead of the optimizer."""

    def __init__(self, step: int, call: Any) -> None:
        self._step, self._call = step, call

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            self._call(kwargs["model"])


def names_in(directory: Path) -> set[str]:
    """What somebody who lists it takes notice of."""
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def saves(*steps: int) -> set[str]:
    return {f"checkpoint-{step}" for step in steps}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
