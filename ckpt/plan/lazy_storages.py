"""Which storages change only behind a fence.

A storage may leave lazily if it belongs to an optimizer whose step we fence: from its first step on the parameters that it
steps and its state are known. What the caller declares counts too. All is looked up anew at each save: optimizers replace state
tensors (LBFGS, load_state_dict), and an address may be used again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from ckpt import _native
from ckpt._native import StorageIndex
from ckpt.fence import step_is_running, stepped_optimizers
from ckpt.plan.views import ByteInterval, byte_interval

# Gives those storages by their `_cdata`, each with the tensors in it that a step writes, or with True: all of it is lazy. Or it
# gives True: all storages, False: none. It is told what is saved, which helps to find them.
LazyStorages = Callable[[StorageIndex | None], Mapping[int, Any] | bool]


def lazy_storages(declared: Any = None) -> LazyStorages:
    """What gives them. It looks through the optimizers when it is first asked: for a state of small tensors it never is.

    While a step of an optimizer runs, nothing is lazy, whatever is declared.

    Args:
        declared: True (all), False (none, whatever optimizers own), or a tensor, module, optimizer, or an iterable of these.

    Raises:
        TypeError: `declared` is something else.
    """
    found: dict[int, Any] = {}
    if declared is not None and not isinstance(declared, bool):
        _add_declared(found, declared)
    if declared is False or step_is_running():
        return lambda _: False
    return (lambda _: True) if declared is True else _Found(found)


class _Found:
    def __init__(self, found: dict[int, Any]) -> None:
        self._found = found
        self._complete = False

    def __call__(self, index: StorageIndex | None) -> dict[int, Any]:
        if not self._complete:
            self._complete = True
            for optimizer in stepped_optimizers():
                _add_optimizer(self._found, optimizer, index)
        return self._found


def are_all_written(owners: list[torch.Tensor], low: int, high: int, views: list[ByteInterval] | None) -> bool:
    """Whether a step that writes the `owners` writes all of bytes [low, high) of their storage, and nobody else any of them.

    Args:
        views: of the saved tensors, those that are less than the storage. One that is none of the owners may be the statistics
            that a module keeps in the storage of its weights.
    """
    intervals = [byte_interval(int(o.storage_offset()), o.size(), o.stride(), o.itemsize) for o in owners]
    written = {(i.low, i.high) for i, o in zip(intervals, owners, strict=True) if i.high - i.low == o.nbytes}
    if any(view.low < view.high and (view.low, view.high) not in written for view in views or ()):
        return False
    edge = low
    for begin, end in sorted(written):
        if begin <= edge:
            edge = max(edge, end)
    return edge >= high


def _add_declared(found: dict[int, Any], declared: Any) -> None:
    if isinstance(declared, torch.Tensor):
        _add_tensors(found, declared)
    elif isinstance(declared, torch.nn.Module):
        # Not the buffers, which a forward may write before the fence, nor what no optimizer writes.
        _add_tensors(found, [parameter for parameter in declared.parameters() if parameter.requires_grad])
    elif isinstance(declared, Optimizer):
        _add_optimizer(found, declared)
    elif isinstance(declared, Iterable) and not isinstance(declared, (str, bytes)):
        for item in declared.values() if isinstance(declared, Mapping) else declared:
            _add_declared(found, item)
    else:
        raise TypeError(
            f"lazy= takes True, False, tensors, modules, optimizers or an iterable of these, not {type(declared).__name__}"
        )


def _add_optimizer(found: dict[int, Any], optimizer: Optimizer, index: StorageIndex | None = None) -> None:
    groups = [list(group["params"]) for group in optimizer.param_groups]
    state = optimizer.state if isinstance(optimizer.state, dict) else dict(optimizer.state)
    _native.add_owned(found, groups, state, index, torch.Tensor, _values)


def _add_tensors(found: dict[int, Any], value: Any) -> None:
    """However deep they lie; those without a storage of their own (sparse and the like) are captured inside save()."""
    _native.add_declared(found, value, torch.Tensor, _values)


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else []
