"""Which storages change only behind a fence, and the hooks that make the fence automatic.

A storage may leave lazily if it belongs to an optimizer whose step we fence: torch's global step pre-hook hands us each
optimizer, and from then on the parameters that it steps and its state are known. What the caller declares counts too. All is
looked up anew at each save: optimizers replace state tensors (LBFGS, load_state_dict), and an address may be used again.

Between the two hooks of a step nothing is lazy: the fence has passed, and the step is writing. A save may begin there all the
same, in a signal handler or on another thread.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ckpt import _native, torch_private
from ckpt._native import StorageIndex
from ckpt.plan.views import ByteInterval, byte_interval

_stepped: dict[int, weakref.ref[Optimizer]] = {}

# (thread, optimizer) -> the frame that called the pre-hook, by its id and its code: it lasts as long as the step. The frame
# itself would keep what the step has in its variables. A step that raises leaves its entry behind.
_running: dict[tuple[int, int], tuple[int, CodeType]] = {}


def install_hooks(before_step: Callable[[], None]) -> None:
    """Registers the global hooks; `before_step` runs before every optimizer step, and an error in it stops the step."""

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        key = id(optimizer)
        known = _stepped.get(key)
        if known is None or known() is not optimizer:
            _stepped[key] = weakref.ref(optimizer, lambda _: _stepped.pop(key, None))
        caller = sys._getframe(1)
        # Before the fence: a save that does not see it is one that the fence sees.
        _running[threading.get_ident(), key] = id(caller), caller.f_code
        before_step()

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _running.pop((threading.get_ident(), id(optimizer)), None)

    for hook in (before, after):
        torch_private.hide_from_compiler(hook)
    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def step_is_running() -> bool:
    """Whether any thread is inside a step of any optimizer. Steps that have raised are forgotten here."""
    for key, frame in list(_running.items()):
        if _is_on_stack(key[0], *frame):
            return True
        if _running.get(key) == frame:  # else it has begun anew meanwhile
            del _running[key]
    return False


def _is_on_stack(thread: int, frame_id: int, code: CodeType) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None and not (id(frame) == frame_id and frame.f_code is code):
        frame = frame.f_back
    return frame is not None


def forget_threads() -> None:
    """In a forked child, where only this thread is left."""
    for key in [key for key in _running if key[0] != threading.get_ident()]:
        del _running[key]


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
            for reference in list(_stepped.values()):
                optimizer = reference()
                if optimizer is not None:
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
