"""Notices tensors that were changed before their bytes were captured, where version counters tell.

Torch's counters see ordinary in-place operations, but not fused, FSDP2 or DeepSpeed updates, nor writes through `.data` or
numpy: a tripwire, not a proof. `Options.verify_capture` compares checksums instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch


class Tripwire:
    def __init__(self, root: Any, tensors: Sequence[torch.Tensor]) -> None:
        self._root = root
        self._watched = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def changed(self) -> str | None:
        """The name of the first watched tensor whose version has moved; None if all stand."""
        for tensor, version in self._watched:
            if tensor._version != version:
                return describe(self._root, tensor)
        return None

    def describe(self, tensor: torch.Tensor | None) -> str:
        return describe(self._root, tensor)


def describe(root: Any, tensor: torch.Tensor | None) -> str:
    """How a reader of the training script would call the tensor: its path in the saved object, and its shape."""
    if tensor is None:
        return "a bare storage"
    shape = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    for path, value in _walk(root, "", 0):
        same_place = isinstance(value, torch.Tensor) and value.layout is torch.strided and _same(value, tensor)
        if value is tensor or same_place:
            return f"tensor {path.removeprefix('.') or 'saved'} ({shape})"
    return f"a tensor ({shape})"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype


_DEEPEST = 12


def _walk(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    yield path, value
    if depth > _DEEPEST or isinstance(value, (torch.Tensor, str, bytes)):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            step = f".{key}" if isinstance(key, str) else f"[{key!r}]"
            yield from _walk(item, path + step, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, torch.nn.Module):
        for name, item in value.state_dict(keep_vars=True).items():
            yield f"{path}.{name}", item
    elif hasattr(value, "__dict__"):
        for name, item in vars(value).items():
            yield from _walk(item, f"{path}.{name}", depth + 1)
