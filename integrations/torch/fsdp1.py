"""Modules wrapped in FullyShardedDataParallel (FSDP1), and the optimizers that step these, by names of parameters.

A rank holds a piece of a flat parameter, which begins and ends anywhere. Torch alone says what that is of each parameter: it
gathers all of them, and cuts copies into DTensors. So each of these functions but is_wrapped() is a collective, and what is
taken is copied once more than anything else: fully_shard needs neither.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ckpt import optimizers

State = dict[str, Any]


def wrapper() -> type | None:
    """FullyShardedDataParallel; None where nobody has imported it, so that nothing is wrapped in it."""
    found = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    return found if isinstance(found, type) else None


def is_wrapped(module: nn.Module) -> bool:
    """Or something in it."""
    kind = wrapper()
    return kind is not None and any(isinstance(each, kind) for each in module.modules())


def take_module(module: nn.Module) -> State:
    """DTensors, and what is not sharded as it is."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    with _quietly():
        return dict(get_model_state_dict(module))


def load_module(module: nn.Module, state: Mapping[str, Any]) -> None:
    """
    Args:
        state: all of it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with _quietly():
        set_model_state_dict(module, dict(state), options=StateDictOptions(strict=True))


def take_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> State:
    """Not by get_optimizer_state_dict(), which lets an optimizer that has no state make a step."""
    with _sharded(module) as kind:
        found: State = kind.optim_state_dict(module, optimizer, optimizer.state_dict(), group=_group(module))
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, state: State) -> None:
    with _sharded(module) as kind:
        own = kind.optim_state_dict_to_load(module, optimizer, state, group=_group(module))
    optimizers.load_state(optimizer, own)


@contextlib.contextmanager
def _sharded(module: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
        StateDictType,
    )

    with _quietly(), FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(offload_to_cpu=False),
        ShardedOptimStateDictConfig(offload_to_cpu=False),
    ):  # fmt: skip
        yield FullyShardedDataParallel


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Torch says time and again that FSDP1, or what it calls itself, is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _group(module: nn.Module) -> Any:
    """Of the ranks that hold a parameter together; None: all ranks, as torch wants it where others hold replicas."""
    kind = wrapper()
    assert kind is not None
    first: Any = next(each for each in module.modules() if isinstance(each, kind))
    return None if "HYBRID" in first.sharding_strategy.name else first.process_group
