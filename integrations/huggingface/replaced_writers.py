"""The writers that modules of a framework call, replaced as these modules see them; nobody else notices.

Where no bundle is being put together by the thread that calls, or the path is not of it, they are the stock ones.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from .open_bundle import bundle_of


class _TorchThatSaves(types.ModuleType):
    """`torch` for one module: all of it, but save()."""

    def __init__(self, save: Callable[..., Any]) -> None:
        super().__init__("torch")
        self.save = save

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def replace_torch_save(module: Any, writes: Callable[[Any], bool] = lambda path: True) -> None:
    """What the module calls as `torch.save(obj, path)`. Safe to call again.

    Args:
        writes: whether this rank is the one to write the file, of those that write a file of this name.
    """
    if isinstance(module.torch, _TorchThatSaves):
        return
    stock = torch.save

    @functools.wraps(stock)
    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        bundle = None if args or kwargs else bundle_of(f)
        if bundle is None:
            torch.save(obj, f, *args, **kwargs)
        elif writes(f):
            bundle.save(obj, f)

    module.torch = _TorchThatSaves(save)


def replace_save_file(module: Any, name: str) -> None:
    """What the module calls, by this name, as `save_file(tensors, path, metadata)` of safetensors. Safe to call again."""
    stock = getattr(module, name)
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        bundle = bundle_of(filename)
        if bundle is None:
            stock(tensors, filename, metadata)
        else:
            bundle.save(tensors, filename, metadata=metadata)

    setattr(module, name, save_file)
