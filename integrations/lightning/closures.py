"""Which optimizers may be given a closure that was called before.

With automatic optimization Lightning hands forward and backward to `optimizer.step(closure)`. The fence comes when a step
begins: all that a save has left to write would be copied before forward and backward, instead of leaving while they run. So
they are run first, and the step gets their result. That is the same for a step that calls its closure once, before anything
else, as those of torch.optim do, but for LBFGS. And as long as forward and backward only read: a module that writes to its
weights in its forward needs the fence before it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .lightning_private import has_step_pre_hooks


def calls_closure_first(optimizer: torch.optim.Optimizer, declared: Sequence[type[torch.optim.Optimizer]] = ()) -> bool:
    """Whether its step() calls a closure once, and before it writes. Hooks before the step may write before the closure.

    Args:
        declared: classes of which the user says so.
    """
    if has_step_pre_hooks(optimizer):
        return False
    if isinstance(optimizer, tuple(declared)):
        return True
    step: Any = optimizer.step  # perhaps inside of what schedulers and profilers wrap around it
    function = inspect.unwrap(getattr(step, "__func__", step))
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    return module.startswith("torch.optim.") and name != "LBFGS.step"


_writers: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def writes_in_forward(model: nn.Module) -> bool:
    """Whether an embedding in it scales rows of its weight as it looks them up (`max_norm=`). Looked for once in each model."""
    known = _writers.get(model)
    if known is None:
        embeddings = (each for each in model.modules() if isinstance(each, (nn.Embedding, nn.EmbeddingBag)))
        known = _writers[model] = any(each.max_norm is not None for each in embeddings)
    return known
