"""What the adapters use of torch that torch does not promise to keep, and what they do without it.

Nothing else here names any of it; the core has a module of the same name, which adapters do not reach into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_METADATA = "_metadata"


def metadata_of(state: Any) -> Mapping[str, Any]:
    """The versions of modules that a state dict carries, by their prefixes; without them modules take it to be of today."""
    found = getattr(state, _METADATA, {})
    return found if isinstance(found, Mapping) else {}


def set_metadata(state: Any, metadata: Mapping[str, Any]) -> None:
    setattr(state, _METADATA, metadata)


def module_loads_plainly(module: torch.nn.Module) -> bool:
    """Whether nothing but torch decides what becomes of the state of a module; False too if that cannot be told."""
    hooks = getattr(module, "_load_state_dict_pre_hooks", None)
    load = getattr(type(module), "_load_from_state_dict", None)
    return hooks is not None and not hooks and getattr(load, "__module__", "").partition(".")[0] == "torch"


def optimizer_loads_plainly(optimizer: torch.optim.Optimizer) -> bool:
    """As of a module."""
    hooks = getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None)
    return hooks is not None and not hooks
