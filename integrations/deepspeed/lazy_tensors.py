"""Which tensors of DeepSpeed's state dicts change only in an optimizer's update.

Two kinds are known to: the parameters that learn (for ZeRO, the flat buffers that they are views of), and all that stands in
an optimizer's state dict. Anything else may be written by a forward, or by the user, at any time: buffers, frozen parameters
(the teacher of a student), what a module saves by get_extra_state(), the client's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")
_RENORMALISING = (torch.nn.Embedding, torch.nn.EmbeddingBag)  # with max_norm, their forward writes to the weight


def lazy_tensors(state: Any, module: torch.nn.Module | None, client_keys: Iterable[str]) -> list[torch.Tensor]:
    """What may leave lazily.

    Args:
        module: that is trained.
        client_keys: the keys of `client_state`, which DeepSpeed mixes into the file of model states.
    """
    found: list[torch.Tensor] = []
    if isinstance(state, Mapping):
        given = set(client_keys) if "ds_version" in state else set()
        for key in _OPTIMIZER_KEYS:
            if key in state and key not in given:
                found += _tensors_in(state[key], set())
    return found + list(_learning(module) if module is not None else ())


def _learning(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    changing = list(module.buffers())
    changing += [layer.weight for layer in module.modules() if isinstance(layer, _RENORMALISING) and layer.max_norm is not None]
    # By storages: ZeRO makes views of one flat buffer of all parameters.
    storages = {_storage_of(tensor) for tensor in changing}
    for parameter in module.parameters():
        if parameter.requires_grad and _storage_of(parameter) not in storages:
            yield parameter


def _tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item, seen)


def _storage_of(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse and the like have none of their own
        return None
