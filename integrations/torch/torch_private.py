"""The names of torch that adapters use although torch does not promise to keep them, and what adapters do without them.

No other module of an adapter names any of them. The core has such a module of its own, which adapters do not reach into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils.data

_METADATA = "_metadata"


def metadata_of(state: Any) -> Mapping[str, Any]:
    """The versions of modules that a state dict carries, by their prefixes; without them modules take it to be of today."""
    found = getattr(state, _METADATA, {})
    return found if isinstance(found, Mapping) else {}


def set_metadata(state: Any, metadata: Mapping[str, Any]) -> None:
    setattr(state, _METADATA, metadata)


# Without it positions in the data are known as long as there are no workers: their batches are those that are asked for ahead.
_LoaderIterator: type[Any] | None = getattr(torch.utils.data.dataloader, "_BaseDataLoaderIter", None)


def is_loader_iterator(item: Any) -> bool:
    return _LoaderIterator is not None and isinstance(item, _LoaderIterator)


def batches_given_away(iterator: Any) -> int | None:
    """By the iterator of a DataLoader; None if it does not say."""
    return getattr(iterator, "_num_yielded", None)


def has_workers(iterator: Any) -> bool:
    """True also if it cannot be told."""
    return bool(getattr(iterator, "_num_workers", 1))


def index_sampler(iterator: Any) -> Any:
    """What it asks for indices, or lists of them; None if it does not say."""
    return getattr(iterator, "_index_sampler", None)


# What wrappers call what they wrap, in names of parameters. State dicts have the first of these names alone.
WRAPPED = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def has_device_mesh(module: Any) -> bool:
    """Whether a FullyShardedDataParallel was given one; False, too, if it does not say."""
    return getattr(module, "_device_mesh", None) is not None


def uses_original_parameters(module: Any) -> bool:
    """The same of use_orig_params=True."""
    return bool(getattr(module, "_use_orig_params", False))


def is_flattened(parameter: torch.Tensor) -> bool:
    """Whether a FullyShardedDataParallel keeps it in a flat one; False, too, if that cannot be told."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def is_flat_parameter(tensor: torch.Tensor) -> bool:
    """Whether FullyShardedDataParallel has made it, which marks what are plain parameters; its modules are found without."""
    return bool(getattr(tensor, "_is_flat_param", False))
