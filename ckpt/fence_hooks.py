"""Whoever has imported ckpt and torch, in whatever order, has the hooks of the fence.

`import ckpt` alone imports no torch. But an optimizer that steps, or is captured into a graph, before the hooks are there would
not be known as what it is: see fence.py. So they must come with torch, not with the first save.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NEEDED = ("ckpt.torch_private", "ckpt.devices")  # by fence.py, and who imports them first may thereby import torch
_loaded: set[str] = set()


def install_beside_torch() -> None:
    """Now, if torch is there; else as soon as it has been imported.

    Raises:
        ImportError: the torch that is there is none that we work with.
    """
    if "torch" in sys.modules:
        _install()
    else:
        sys.meta_path.insert(0, _TorchFinder())


def loaded(module: str) -> None:
    """The last line of one that is needed: it may have brought torch, half-way through its own import."""
    _loaded.add(module)
    _install()


def _install() -> None:
    if all(name in _loaded for name in _NEEDED if name in sys.modules):
        importlib.import_module("ckpt.fence")


class _TorchFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _TorchLoader(spec.loader, self)
                return spec
        return None


class _TorchLoader(importlib.abc.Loader):
    """The loader of torch, until torch has been loaded."""

    def __init__(self, real: Any, finder: _TorchFinder) -> None:
        self._real, self._finder = real, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        module.__loader__ = self._real
        self._real.exec_module(module)
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self._finder)
        with contextlib.suppress(ImportError):  # whoever uses ckpt hears of it; torch itself is good
            _install()

    def __getattr__(self, name: str) -> Any:  # for those who only look whether torch could be imported
        return getattr(self._real, name)
