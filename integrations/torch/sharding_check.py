"""Refuses objects of which each rank holds a part without a word of which: they must not be saved as if they were whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ckpt.dcp import is_named_part

from . import fsdp1
from .torch_private import has_device_mesh, is_flat_parameter, uses_original_parameters

# (module, class, what to use instead). Looked up where the module has been imported: else no object can be one of them.
_WRAPPERS = (
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
        _refuse_unnamed(name, path, each)
        for module, kind, instead in _WRAPPERS:
            if _is_a(each, module, kind):
                raise TypeError(
                    f"{name} is sharded (a {kind}{_where(path)}): each rank holds a part of it, and this callback cannot tell "
                    f"which. Use {instead}"
                )
    for path, parameter in _parameters(part):
        if (shard := _kind_of_shard(parameter)) is not None:
            raise TypeError(f"{name} is sharded ('{path}' is a {shard}); of what is sharded this callback saves DTensors alone")


def _refuse_unnamed(name: str, path: str, module: Any) -> None:
    """FSDP1 of which torch does not give the state as DTensors."""
    kind = fsdp1.wrapper()
    if kind is None or not isinstance(module, kind):
        return
    missing = [] if has_device_mesh(module) else ["device_mesh=init_device_mesh(...)"]
    missing += [] if uses_original_parameters(module) else ["use_orig_params=True"]
    if missing:
        raise TypeError(
            f"{name} is sharded (a FullyShardedDataParallel{_where(path)}) without {' and '.join(missing)}: wrap it with both, "
            "so that torch gives its state as DTensors, or use torch.distributed.fsdp.fully_shard"
        )


def _where(path: str) -> str:
    return f", in '{path}'" if path else ""


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
    if is_named_part(tensor):
        return "CheckpointableTensor"
    return next((kind for module, kind in _TENSORS if _is_a(tensor, module, kind)), None)


def _is_a(item: Any, module: str, kind: str) -> bool:
    wanted = getattr(sys.modules.get(module), kind, None)
    return isinstance(wanted, type) and isinstance(item, wanted)
