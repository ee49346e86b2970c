"""ckpt.state_dicts: when load_state_dict() is known to copy each tensor to the one of its name, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckpt import state_dicts


class Quantized(nn.Linear):
    def _load_from_state_dict(self, *args: Any, **named: Any) -> None:
        super()._load_from_state_dict(*args, **named)


class OneWay(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}


class Renaming(nn.Linear):
    def state_dict(self, *args: Any, **named: Any) -> Any:
        return {f"renamed.{key}": value for key, value in super().state_dict(*args, **named).items()}


class Accumulating(torch.optim.SGD):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)


def make_optimizer(kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    return kind(nn.Linear(2, 3).parameters(), lr=0.1)  # type: ignore[call-arg]


PLAIN: dict[str, Callable[[], Any]] = {
    "model": lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.TransformerEncoderLayer(8, 2)),
    "optimizer": make_optimizer,
    "optimizer-of-a-class-of-ones-own": lambda: make_optimizer(type("Mine", (torch.optim.SGD,), {})),
}


def hooked(register: str, part: Any) -> Any:
    getattr(part, register)(lambda *_: None)
    return part


def patched(part: Any) -> Any:
    part.load_state_dict = lambda state, strict=True: None
    return part


OTHERS: dict[str, Callable[[], Any]] = {
    **{
        f"module-{hook}": lambda hook=hook: nn.Sequential(hooked(hook, nn.Linear(2, 3)))
        for hook in (
            *("register_state_dict_pre_hook", "register_state_dict_post_hook"),
            *("register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"),
        )
    },
    **{
        f"optimizer-{hook}": lambda hook=hook: hooked(hook, make_optimizer())
        for hook in (
            *("register_state_dict_pre_hook", "register_state_dict_post_hook"),
            *("register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"),
        )
    },
    "module-loads-otherwise": lambda: nn.Sequential(Quantized(2, 3)),
    "module-gives-what-it-does-not-take": lambda: OneWay(2, 3),
    "module-names-otherwise": lambda: Renaming(2, 3),
    "optimizer-loads-otherwise": lambda: make_optimizer(Accumulating),
    "module-patched": lambda: patched(nn.Linear(2, 3)),
    "optimizer-patched": lambda: patched(make_optimizer()),
    "neither": lambda: {"weight": torch.zeros(3)},
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_what_is_plain(make: Callable[[], Any]) -> None:
    assert state_dicts.is_plain(make())


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_is_not(make: Callable[[], Any]) -> None:
    assert not state_dicts.is_plain(make())
