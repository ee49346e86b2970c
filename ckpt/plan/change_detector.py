"""Notices tensors that were changed before their bytes were captured, where version counters tell.

Torch's counters see ordinary in-place operations, but not fused, FSDP2 or DeepSpeed updates, nor writes through `.data` or
numpy. Those are found by the witnesses of the core (csrc/jobs/witness.h), most of them: both are tripwires, not a proof.
`Options.verify_capture` compares checksums instead.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import torch

from ckpt import _native
from ckpt._native import SavedStorage


class ChangeDetector:
    """Looks at lazy tensors once when they are planned, and once when they are captured."""

    def __init__(self, root: Any, records: list[SavedStorage]) -> None:
        self._root = root
        self._records = records  # each with the counter that it had when it was placed

    def changed(self) -> str | None:
        """The name of what has changed since, for an error's text; None if nothing has."""
        tensor, taken = _native.find_changed(self._records)
        if taken:
            return "a tensor, whose memory was taken away (share_memory_, resize_),"
        return self.describe(tensor) if tensor is not None else None

    def describe(self, tensor: torch.Tensor | None) -> str:
        try:
            return describe(self._root, tensor)
        except Exception:  # whatever is in the caller's objects, the report comes first
            return "a tensor"


def describe(root: Any, tensor: torch.Tensor | None) -> str:
    """How a reader of the training script would call the tensor: its path in the saved object, and its shape."""
    if tensor is None:
        return "a bare storage"
    shape = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    for path, value in _walk(root):
        if value is tensor or (isinstance(value, torch.Tensor) and _same_place(value, tensor)):
            return f"tensor {path.removeprefix('.') or 'saved'} ({shape})"
    return f"a tensor ({shape})"


def _same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = a.layout is torch.strided and a.shape == b.shape and a.dtype == b.dtype
    return same_kind and a.data_ptr() == b.data_ptr()


_MOST_OBJECTS = 50_000  # looked at before the search is given up: training may be waiting


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Everything reachable, nearest first, each object once, with its path. Runs no code of the objects' own classes."""
    waiting, seen = collections.deque([("", root)]), {id(root)}
    while waiting and len(seen) <= _MOST_OBJECTS:
        path, value = waiting.popleft()
        yield path, value
        for step, item in _parts(value):
            if id(item) not in seen and not isinstance(item, _LEAVES):
                seen.add(id(item))
                waiting.append((path + step, item))


_LEAVES = (str, bytes, int, float, complex, type(None))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        return
    if isinstance(value, dict):
        for key, item in dict.items(value):
            yield (f".{key}" if isinstance(key, str) else f"[{key!r}]" if isinstance(key, int) else "[...]"), item
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield f"[{index}]", item
    elif isinstance(attributes := getattr(value, "__dict__", None), dict):
        for name, item in attributes.items():
            if isinstance(value, torch.nn.Module) and name in ("_parameters", "_buffers", "_modules"):
                yield from _parts(item)
            else:
                yield f".{name}", item
