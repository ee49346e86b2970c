"""What may be assumed of the state dict of a module or an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ckpt import torch_private

__all__ = ["SupposedlyFrozen", "is_plain", "supposedly_frozen"]

_LEAST_BYTES = 1 << 20  # of one: smaller ones are read in any case


class SupposedlyFrozen(NamedTuple):
    """Tensors of which nobody has said that they do not change, though nothing is known to change them: `frozen=` of save()
    takes them for that, and believes it less.
    """

    tensors: tuple[torch.Tensor, ...]


def supposedly_frozen(modules: Iterable[torch.nn.Module], learning: Iterable[torch.Tensor]) -> SupposedlyFrozen:
    """The parameters that stay as they are while these modules learn, as the base of a LoRA, for `frozen=` of save().

    Left out is what somebody may write to in ways that torch does not tell of: modules of which nothing learns (the teacher of
    another one), and parameters of the shape of one that learns (a copy in the same module, of earlier weights or of their
    average). What lies on a device is left out, too.

    Args:
        modules: that are trained together.
        learning: what their optimizers own.
    """
    owned = {id(tensor) for tensor in learning}
    named = [[*module.parameters()] for module in modules]
    learns = {id(each) for parameters in named for each in parameters if each.requires_grad or id(each) in owned}
    shapes = {each.shape for parameters in named for each in parameters if id(each) in learns}
    found: dict[int, torch.Tensor] = {}
    for parameters in named:
        if any(id(each) in owned for each in parameters):
            for each in parameters:
                if id(each) not in learns and each.shape not in shapes and _is_large_on_host(each):
                    found[id(each)] = each
    return SupposedlyFrozen(tuple(found.values()))


def _is_large_on_host(tensor: torch.Tensor) -> bool:
    is_lazy = torch.nn.parameter.is_lazy(tensor)  # such a one has no shape yet
    return not is_lazy and tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() >= _LEAST_BYTES


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
