"""Which tensors of DeepSpeed's state dicts change only in an optimizer's update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

# Of a file of model states. All else in it is small, or the user's own, which may change at any time.
_LAZY_KEYS = ("module", "optimizer", "frozen_param_fragments")


def lazy_tensors(state: Any, buffers: Iterable[torch.Tensor], client_keys: Iterable[str]) -> list[torch.Tensor]:
    """What may leave lazily: all tensors but buffers, which the forward changes, and what the user has given.

    Args:
        buffers: of the module.
        client_keys: the keys of `client_state`, which DeepSpeed mixes into the file of model states.
    """
    if isinstance(state, Mapping) and "module" in state and "ds_version" in state:
        given = set(client_keys)
        state = [state[key] for key in _LAZY_KEYS if key in state and key not in given]
    changing = {storage for buffer in buffers if (storage := _storage_of(buffer)) is not None}
    return [tensor for tensor in _tensors_in(state, set()) if _storage_of(tensor) not in changing]


def _tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item, seen)


def _storage_of(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and the like have none of their own
        return None
