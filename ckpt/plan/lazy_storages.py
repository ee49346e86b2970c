"""Which storages change only behind a fence.

A storage may leave lazily if it belongs to an optimizer whose step we fence: from its first step on the parameters that it
steps and its state are known. But not if one of its steps was captured into a CUDA graph: replays pass no fence. What the
caller declares counts too. All is looked up anew at each save: optimizers replace state tensors (LBFGS, load_state_dict), and
an address may be used again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from ckpt import _native, torch_private
from ckpt._native import StorageIndex
from ckpt.fence import replayed_optimizers, step_is_running, stepped_optimizers
from ckpt.plan.views import ByteInterval, byte_interval

# Gives those storages by their `_cdata`, each with the tensors in it that a step writes, or that were declared: then the first
# in the list is None, and all of the storage is lazy. With the key ALL, or True instead, every storage is; with False none.
# It is told what is saved, which helps to find them; and what a step writes of that it may note there instead.
LazyStorages = Callable[[StorageIndex | None], Mapping[Any, list[Any]] | bool]
ALL = None


def lazy_storages(declared: Any = None, frozen: Iterable[torch.Tensor] = ()) -> LazyStorages:
    """What gives them. It looks through the optimizers when it is first asked: for a state of small tensors it never is.

    While a step of an optimizer runs, nothing is lazy, whatever is declared.

    Args:
        declared: True (all), False (none, whatever optimizers own), or a tensor, module, optimizer, or an iterable of these. Of
            an optimizer that a graph steps its name says nothing; its tensors must be declared themselves, or by a module.
        frozen: tensors that are declared not to change at all.

    Raises:
        TypeError: `declared` is something else.
    """
    found: dict[Any, list[Any]] = {ALL: []} if declared is True else {}
    if declared is not None and not isinstance(declared, bool):
        _add_declared(found, declared)
    for tensor in frozen:
        _add_tensors(found, tensor)
    if declared is False or step_is_running():
        return lambda _: False
    return _Found(found)


class _Found:
    def __init__(self, declared: dict[Any, list[Any]]) -> None:
        self._declared = declared
        self._found: dict[Any, list[Any]] | None = None  # with what optimizers own; made once, if no index takes that

    def __call__(self, index: StorageIndex | None) -> dict[Any, list[Any]]:
        replayed = replayed_optimizers()
        if index is not None and index.takes_owners and not replayed:
            for optimizer in stepped_optimizers():
                _add_optimizer(self._declared, optimizer, index, in_index=True)
            return self._declared
        if self._found is None:
            self._found = {key: list(tensors) for key, tensors in self._declared.items()}
            for optimizer in stepped_optimizers():
                _add_optimizer(self._found, optimizer, index)
            for optimizer in replayed:
                _leave_out(self._found, optimizer)
        return self._found


def find_writers(
    tensors: list[Any], low: int, high: int, views: list[ByteInterval] | None, declared: bool
) -> list[torch.Tensor] | None:
    """Which of a storage's tensors reach into bytes [low, high) of it: their version counters tell of writes there.

    None: the bytes are not lazy, because a step that writes these tensors does not write all of them, or somebody else some.

    Args:
        tensors: as LazyStorages gives them.
        views: of the saved tensors, those that are less than the storage. One that a step does not write may be the statistics
            that a module keeps in the storage of its weights.
        declared: they are lazy all the same.
    """
    known = [tensor for tensor in tensors if tensor is not None]
    intervals = [byte_interval(int(t.storage_offset()), t.size(), t.stride(), t.itemsize) for t in known]
    if not declared:
        written = {(i.low, i.high) for i, t in zip(intervals, known, strict=True) if i.high - i.low == t.nbytes}
        if not _are_all_written(written, low, high, views):
            return None
    return [tensor for i, tensor in zip(intervals, known, strict=True) if i.low < high and i.high > low]


def _are_all_written(written: set[tuple[int, int]], low: int, high: int, views: list[ByteInterval] | None) -> bool:
    if any(view.low < view.high and (view.low, view.high) not in written for view in views or ()):
        return False
    edge = low
    for begin, end in sorted(written):
        if begin <= edge:
            edge = max(edge, end)
    return edge >= high


def _add_declared(found: dict[Any, list[Any]], declared: Any) -> None:
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


def _add_optimizer(
    found: dict[Any, list[Any]], optimizer: Optimizer, index: StorageIndex | None = None, in_index: bool = False
) -> None:
    groups = [list(group["params"]) for group in optimizer.param_groups]
    state = optimizer.state if isinstance(optimizer.state, dict) else dict(optimizer.state)
    with torch.no_grad():  # see torch_private.wrappers()
        _native.add_owned(found, groups, state, index, in_index, torch.Tensor, _values, torch_private.wrappers())


def _leave_out(found: dict[Any, list[Any]], optimizer: Optimizer) -> None:
    """What it owns, whoever else does, unless it is declared."""
    owned: dict[Any, list[Any]] = {}
    _add_optimizer(owned, optimizer)
    for key in owned:
        if key in found and found[key][:1] != [None]:
            del found[key]


def _add_tensors(found: dict[Any, list[Any]], value: Any) -> None:
    """However deep they lie; those without a storage of their own (sparse and the like) are captured inside save()."""
    with torch.no_grad():
        _native.add_declared(found, value, torch.Tensor, _values, torch_private.wrappers())


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else []
