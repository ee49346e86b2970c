"""What a save is told not to change (`frozen=`), and whether it is known to be as it was at an earlier save.

Nothing of it is read for that. Memory is the same if it is the same storage, alive ever since, at the same address and of the
same size; and nobody has written to it by an operation of torch if the version counter of the tensor that was declared stands
as it stood. Who writes otherwise (through `.data`, numpy, a kernel of his own) is found by what the core looks at: see
csrc/jobs/frozen.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ckpt import torch_private
from ckpt._native import SavedStorage


class FrozenMark:
    """Of the memory of one tensor at one save. Keeps its storage's name, not its bytes.

    Attributes:
        key: of the storage, see torch_private.key_of().
    """

    __slots__ = ("_seen", "_weak", "key")

    def __init__(self, tensor: torch.Tensor, weak: Any) -> None:
        storage = tensor.untyped_storage()
        self.key = torch_private.key_of(storage)
        self._weak = weak
        self._seen = storage.data_ptr(), storage.nbytes(), tensor._version

    def is_same(self, later: FrozenMark) -> bool:
        """Whether it is the same memory at a later save, whoever has written to that."""
        return self.key == later.key and not self._weak.expired()

    def holds(self, later: FrozenMark) -> bool:
        """The same, and that nobody is known to have written to it in between."""
        return self.is_same(later) and self._seen == later._seen


class FrozenHint:
    """What one save was told not to change.

    Args:
        declared: a tensor; a module, of which the parameters are meant that require no gradient; or an iterable of these. Of a
            mapping its values.

    Raises:
        TypeError: it is something else.
    """

    def __init__(self, declared: Any) -> None:
        self._tensors: dict[int, torch.Tensor] = {}
        for tensor in map(_local_part, _tensors_in(declared)):
            if tensor.layout is torch.strided and not tensor.is_inference() and _owns_memory(tensor):
                self._tensors.setdefault(torch_private.key_of(tensor.untyped_storage()), tensor)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those of which something can be known."""
        return [*self._tensors.values()]

    def mark_of(self, record: SavedStorage) -> FrozenMark | None:
        """None: nothing is said of all of it, or nothing could be told of it later."""
        storage = record.storage
        tensor = self._tensors.get(torch_private.key_of(storage))
        if tensor is None or record.low != 0 or not record.nbytes == storage.nbytes() == tensor.nbytes:
            return None  # others may write to the rest of it
        if not _is_dense(tensor):
            return None
        weak = torch_private.weak_storage(storage)
        return None if weak is None else FrozenMark(tensor, weak)


def hint_of(declared: Any) -> FrozenHint | None:
    """
    Raises:
        TypeError: see FrozenHint.
    """
    return None if declared is None else FrozenHint(declared)


def _local_part(tensor: torch.Tensor) -> torch.Tensor:
    kinds = torch_private.wrappers()
    if kinds is None or not isinstance(tensor, kinds[0]):
        return tensor
    with torch.no_grad():
        return kinds[1](tensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether it has each element of its memory once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _owns_memory(tensor: torch.Tensor) -> bool:
    """Not so other wrappers, whose parts lie elsewhere."""
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False


def _tensors_in(declared: Any) -> Iterable[torch.Tensor]:
    if isinstance(declared, torch.Tensor):
        yield declared
    elif isinstance(declared, torch.nn.Module):
        yield from (parameter for parameter in declared.parameters() if not parameter.requires_grad)
    elif isinstance(declared, Iterable) and not isinstance(declared, (str, bytes)):
        for item in declared.values() if isinstance(declared, Mapping) else declared:
            yield from _tensors_in(item)
    else:
        raise TypeError(f"frozen= takes tensors, modules or an iterable of these, not {type(declared).__name__}")
