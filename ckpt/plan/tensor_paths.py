"""How tensors are reached in a state of dicts, lists and tuples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch

from ckpt import torch_private

Path_ = tuple[Any, ...]


def find_paths(obj: Any, keys: Collection[int], known: Iterable[Path_]) -> dict[int, Path_]:
    """Of tensors with these storages: the first path that leads to each, if one does.

    Args:
        keys: of the storages, see torch_private.key_of().
        known: what may still lead there: if it does, nothing else is looked through.
    """
    found = {key: path for path in known if (key := _key_at(obj, path)) in keys}
    return found if len(found) == len(keys) else {key: path for key, path in _all_paths(obj) if key in keys}


def _key_at(obj: Any, path: Path_) -> int:
    for step in path:
        try:
            if isinstance(obj, dict):
                obj = dict.__getitem__(obj, step)
            elif isinstance(obj, (list, tuple)):
                obj = obj[step]
            else:
                return -1
        except (LookupError, TypeError):
            return -1
    return _key_of(obj)


def _key_of(part: Any) -> int:
    """-1: it is no tensor with a storage."""
    is_plain = type(part) in (torch.Tensor, torch.nn.Parameter) and part.layout is torch.strided
    return torch_private.key_of(part.untyped_storage()) if is_plain else -1


def _all_paths(obj: Any) -> Iterator[tuple[int, Path_]]:
    """Last ones first, so that of those that lead to one storage the first remains in a dict."""
    waiting: list[tuple[Path_, Any]] = [((), obj)]
    seen = set()
    while waiting:
        path, part = waiting.pop()
        if (key := _key_of(part)) >= 0:
            yield key, path
        elif isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            parts = dict.items(part) if isinstance(part, dict) else enumerate(part)
            waiting += [((*path, step), below) for step, below in parts]
