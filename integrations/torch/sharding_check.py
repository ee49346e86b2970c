"""Refuses objects of which each rank holds a part without a word of which: they must not be saved as if they were whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .torch_private import is_flat_parameter

# (module, class, what to use instead). Looked up where the module has been imported: else no object can be one of them.
_WRAPPERS = (
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "torch.distributed.fsdp.fully_shard"),
    ("torch.distributed.optim", "ZeroRedundancyOptimizer", "an optimizer on each rank"),
    ("deepspeed", "DeepSpeedEngine", "ckpt.integrations.deepspeed"),
    ("deepspeed.runtime.base_optimizer", "DeepSpeedOptimizer", "ckpt.integrations.deepspeed"),
)
_TENSORS = (("torch.distributed._shard.sharded_tensor", "ShardedTensor"),)  # DTensors are saved as such: see sharded_parts.py


def refuse_shards(name: str, part: Any) -> None:
    """
    Raises:
        TypeError: this rank holds only a part of it.
    """
    for path, each in _objects(part):
        for module, kind, instead in _WRAPPERS:
            if _is_a(each, module, kind):
                where = f", in '{path}'" if path else ""
                raise TypeError(
                    f"{name} is sharded (a {kind}{where}): each rank holds a part of it, and this callback cannot tell which. "
                    f"Use {instead}"
                )
    for path, parameter in _parameters(part):
        if (shard := _kind_of_shard(parameter)) is not None:
            raise TypeError(f"{name} is sharded ('{path}' is a {shard}); of what is sharded this callback saves DTensors alone")


def _objects(part: Any) -> Iterator[tuple[str, Any]]:
    return iter(part.named_modules()) if isinstance(part, nn.Module) else iter([("", part)])


def _parameters(part: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(part, nn.Module):
        yield from part.named_parameters()
        yield from part.named_buffers()
    elif isinstance(part, torch.optim.Optimizer):
        for number, group in enumerate(part.param_groups):
            for index, parameter in enumerate(group["params"]):
                yield f"parameter {index} of group {number}", parameter


def _kind_of_shard(tensor: torch.Tensor) -> str | None:
    if is_flat_parameter(tensor):
        return "FlatParameter"
    return next((kind for module, kind in _TENSORS if _is_a(tensor, module, kind)), None)


def _is_a(item: Any, module: str, kind: str) -> bool:
    wanted = getattr(sys.modules.get(module), kind, None)
    return isinstance(wanted, type) and isinstance(item, wanted)
