"""Putting back the state of an optimizer exactly as it was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["load_state"]


def load_state(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict(state_dict)`, but that the state keeps the dtypes it was saved with.

    torch gives the state of a parameter the parameter's dtype when it is loaded: an average in float32 beside weights in
    bfloat16 would be rounded, and the training that goes on would be another one. All else is as torch does it: state goes to
    the device of its parameter, hooks run, groups and state follow what is loaded. The `step` is left as torch makes it.

    Args:
        optimizer: of any class. One that overrides load_state_dict() without calling that of torch loads in its own way.
        state_dict: what its state_dict() gave, with tensors of any dtype. They become those of the optimizer.

    Raises:
        what load_state_dict() raises, which is ValueError if the groups have other numbers of parameters.
    """
    given: dict[str, Any] = {}

    def note(_: Optimizer, final: dict[str, Any]) -> None:
        given.update(final)

    def undo_casts(_: Optimizer) -> None:
        _undo_casts(optimizer, given)

    # The last of the hooks before and the first of those behind: what hooks of the user's change is what counts.
    hooks = [
        optimizer.register_load_state_dict_pre_hook(note),
        optimizer.register_load_state_dict_post_hook(undo_casts, prepend=True),
    ]
    try:
        optimizer.load_state_dict(dict(state_dict))
    finally:
        for hook in hooks:
            hook.remove()


def _undo_casts(optimizer: Optimizer, given: Mapping[str, Any]) -> None:
    saved = given.get("state", {})
    theirs = [index for group in given.get("param_groups", ()) for index in group["params"]]
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(theirs, ours, strict=False):
        before, now = saved.get(index), optimizer.state.get(parameter)
        if isinstance(before, Mapping) and isinstance(now, dict):
            for name in before.keys() & now.keys() - {"step"}:
                now[name] = _with_dtypes_of(before[name], now[name])


def _with_dtypes_of(before: Any, now: Any) -> Any:
    """`now`, but for tensors that were cast: these are taken from `before`, and moved to where they are now.

    And but for texts, of which torch makes a text that names a generator, because it takes them for containers.
    """
    if isinstance(before, str):
        return before
    if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
        return now if before.dtype == now.dtype else before.to(now.device)
    if type(now) is dict and isinstance(before, Mapping):
        return {key: _with_dtypes_of(before.get(key), value) for key, value in now.items()}
    if type(now) in (list, tuple) and isinstance(before, (list, tuple)) and len(before) == len(now):
        return type(now)(map(_with_dtypes_of, before, now))
    if type(now) in (set, frozenset) and isinstance(before, (set, frozenset)) and any(isinstance(part, str) for part in before):
        return type(now)(before)
    return now
