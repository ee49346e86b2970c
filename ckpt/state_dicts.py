"""What may be assumed of the state dict of a module or an optimizer."""

from __future__ import annotations

from typing import Any

import torch

from ckpt import torch_private

__all__ = ["is_plain"]


def is_plain(part: Any) -> bool:
    """Whether torch alone decides what the state dict of `part` is, and what becomes of one that it loads.

    Then `load_state_dict()` copies each tensor to the one of the same name, and does nothing else. So a checkpoint may be read
    straight into these (`replicated_into` of `Checkpointer.restore`), and `load_state_dict()` called afterwards.

    Args:
        part: a torch.nn.Module, which is plain if all modules in it are, or a torch.optim.Optimizer. Anything else is not.

    Returns:
        False also if it cannot be told with this version of torch.
    """
    if isinstance(part, torch.nn.Module):
        return all(map(torch_private.module_is_plain, part.modules()))
    return isinstance(part, torch.optim.Optimizer) and torch_private.optimizer_is_plain(part)
