"""Which storages change only behind a fence, and the hook that makes the fence automatic.

A storage may leave lazily if it belongs to an optimizer whose step we fence: torch's global step pre-hook hands us each
optimizer, and from then on its parameters and its state are known. What the caller declares counts too. Everything is looked
up anew at each save: optimizers replace state tensors (LBFGS, load_state_dict), and an address may be used again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ckpt import _native
from ckpt._native import StorageIndex

_stepped: dict[int, weakref.ref[Optimizer]] = {}


def install_hook(before_step: Callable[[], None]) -> None:
    """Registers the one global hook; `before_step` runs before every optimizer step, and an error in it stops the step."""

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        key = id(optimizer)
        known = _stepped.get(key)
        if known is None or known() is not optimizer:
            _stepped[key] = weakref.ref(optimizer, lambda _: _stepped.pop(key, None))
        before_step()

    register_optimizer_step_pre_hook(hook)


# Gives the `_cdata` of those storages; or True: all of them, False: none. It is told what is saved, which helps to find them.
LazyStorages = Callable[[StorageIndex | None], set[int] | bool]


def lazy_storages(declared: Any = None) -> LazyStorages:
    """What gives them. It looks through the optimizers when it is first asked: for a state of small tensors it never is.

    Args:
        declared: True (all), False (none, whatever optimizers own), or a tensor, module, optimizer, or an iterable of these.

    Raises:
        TypeError: `declared` is something else.
    """
    if isinstance(declared, bool):
        return lambda _: declared
    found: set[int] = set()
    if declared is not None:
        _add_declared(found, declared)
    return _Found(found)


class _Found:
    def __init__(self, found: set[int]) -> None:
        self._found = found
        self._complete = False

    def __call__(self, index: StorageIndex | None) -> set[int]:
        if not self._complete:
            self._complete = True
            for reference in list(_stepped.values()):
                optimizer = reference()
                if optimizer is not None:
                    _add_optimizer(self._found, optimizer, index)
        return self._found


def _add_declared(found: set[int], declared: Any) -> None:
    if isinstance(declared, torch.Tensor):
        _add_tensors(found, declared)
    elif isinstance(declared, torch.nn.Module):
        for parameter in declared.parameters():  # not the buffers: a forward may write them before the fence
            _add_tensors(found, parameter)
    elif isinstance(declared, Optimizer):
        _add_optimizer(found, declared)
    elif isinstance(declared, Iterable) and not isinstance(declared, (str, bytes)):
        for item in declared.values() if isinstance(declared, Mapping) else declared:
            _add_declared(found, item)
    else:
        raise TypeError(
            f"lazy= takes True, False, tensors, modules, optimizers or an iterable of these, not {type(declared).__name__}"
        )


def _add_optimizer(found: set[int], optimizer: Optimizer, index: StorageIndex | None = None) -> None:
    _add_tensors(found, [list(group["params"]) for group in optimizer.param_groups], index)
    _add_tensors(found, list(optimizer.state.values()), index)


def _add_tensors(found: set[int], value: Any, index: StorageIndex | None = None) -> None:
    """However deep they lie; those without a storage of their own (sparse and the like) are captured inside save()."""
    _native.add_storages(found, value, index, torch.Tensor, _values)


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else []
