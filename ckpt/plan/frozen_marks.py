"""What a save is told not to change (`frozen=`), and whether it is known to be as it was at an earlier save.

Nothing of it is read for that. Memory is the same if it is the same storage, alive ever since, at the same address and of the
same size; and nobody has written to it by an operation of torch if the same tensor was declared, and its version counter stands
as it stood. Who writes otherwise (through `.data`, numpy, a kernel of his own) is found by what the core looks at: see
csrc/jobs/frozen.h.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ckpt import devices as torch_devices
from ckpt import torch_private
from ckpt._native import SavedStorage
from ckpt.fence import stepped_optimizers
from ckpt.state_dicts import SupposedlyFrozen


class Given(NamedTuple):
    """A tensor that is said not to change, and the part of it that lies here: mostly itself."""

    whole: torch.Tensor
    here: torch.Tensor

    def name(self) -> int | weakref.ref[torch.Tensor]:
        """One and the same for the same tensor. Of a parameter no weak reference is kept, since torch swaps none that has
        one; and it is no `.data`, which could get the place in memory of another one.
        """
        return id(self.whole) if isinstance(self.whole, torch.nn.Parameter) else weakref.ref(self.whole)


class FrozenMark:
    """Of the memory of one tensor at one save. Keeps its storage's name, not its bytes.

    Attributes:
        key: of the storage, see torch_private.key_of().
        supposed: nobody has said that it does not change.
    """

    __slots__ = ("_given", "_seen", "_weak", "key", "supposed")

    def __init__(self, given: Given, weak: Any, versions: tuple[int | None, ...], supposed: bool) -> None:
        storage = given.here.untyped_storage()
        self.key, self.supposed = torch_private.key_of(storage), supposed
        self._given = given.name()
        self._weak = weak
        self._seen = storage.data_ptr(), storage.nbytes(), versions

    def is_same(self, later: FrozenMark) -> bool:
        """Whether it is the same memory at a later save, whoever has written to that."""
        return self.key == later.key and not self._weak.expired()

    def holds(self, later: FrozenMark) -> bool:
        """The same, and that nobody is known to have written to it in between.

        The tensor must be the same object: another one of that storage may have a version counter of its own, as `.data` has.
        """
        by_number = isinstance(self._given, int) and isinstance(later._given, int)
        same = self._given == later._given if by_number else self._given is later._given  # references compare values
        return same and self.is_same(later) and self._seen == later._seen


class FrozenHint:
    """What one save was told not to change.

    Args:
        declared: a tensor; a module, of which the parameters are meant; or an iterable of these. Of a mapping its values. What
            requires a gradient is never meant, nor what other processes can write to. Or what is supposedly frozen: that is
            believed less, and read inside save() if it is read.

    Raises:
        TypeError: it is something else.
    """

    def __init__(self, declared: Any) -> None:
        supposed: list[SupposedlyFrozen] = []
        self._declared = _by_storage(_tensors_in(declared, supposed))
        self._supposed = _by_storage(tensor for each in supposed for tensor in each.tensors)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those that are declared, and of which something can be known."""
        return [given.here for given in self._declared.values()]

    def mark_of(self, record: SavedStorage) -> FrozenMark | None:
        """None: nothing is said of all of it, or nothing could be told of it later."""
        storage = record.storage
        key = torch_private.key_of(storage)
        given = self._declared.get(key, self._supposed.get(key))
        if given is None:
            return None
        tensor = given.here
        if storage.device.type != "cpu" or torch_devices.in_use.in_host_memory:
            return None  # no bytes of it can be looked at without waiting for the device
        if record.low != 0 or not record.nbytes == storage.nbytes() == tensor.nbytes:
            return None  # others may write to the rest of it
        if not _is_dense(tensor):
            return None
        seen = torch_private.look_at(tensor)
        if seen is None:
            return None
        # Of all that is known of this memory: an operation on a DTensor moves its own counter, and not that of its part.
        saved = [*((record.tensor,) if record.tensor is not None else ()), *(record.others or ())]
        versions = seen[1], *(version_of(each) for each in (given.whole, *saved))
        return FrozenMark(given, seen[0], versions, key not in self._declared)


def version_of(tensor: torch.Tensor) -> int | None:
    """Its version counter, where there is one that tells of writes."""
    seen = None if tensor.is_inference() else torch_private.look_at(tensor)
    return None if seen is None else seen[1]


def hint_of(declared: Any) -> FrozenHint | None:
    """
    Raises:
        TypeError: see FrozenHint.
    """
    return None if declared is None else FrozenHint(declared)


def _by_storage(tensors: Iterable[torch.Tensor]) -> dict[int, Given]:
    """Those of which something can be known. What an optimizer has ever stepped is none: fused ones move no counter."""
    found: dict[int, Given] = {}
    stepped = {id(each) for optimizer in stepped_optimizers() for group in optimizer.param_groups for each in group["params"]}
    for whole in tensors:
        here = _local_part(whole)
        if id(whole) in stepped or here.layout is not torch.strided or here.is_inference() or whole.is_inference():
            continue
        if _has_memory_of_its_own(here):
            found.setdefault(torch_private.key_of(here.untyped_storage()), Given(whole, here))
    return found


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


def _has_memory_of_its_own(tensor: torch.Tensor) -> bool:
    """Not so other wrappers, whose parts lie elsewhere, and what is shared with other processes."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr() != 0 and not (storage.device.type == "cpu" and storage.is_shared())
    except (RuntimeError, NotImplementedError):
        return False


def _tensors_in(declared: Any, supposed: list[SupposedlyFrozen]) -> Iterable[torch.Tensor]:
    """What is declared; what is supposed goes to the list."""
    if isinstance(declared, torch.Tensor):
        if not declared.requires_grad:
            yield declared
    elif isinstance(declared, SupposedlyFrozen):
        supposed.append(declared)
    elif isinstance(declared, torch.nn.Module):
        yield from _tensors_in(declared.parameters(), supposed)  # not the buffers, which a forward may write to
    elif isinstance(declared, Iterable) and not isinstance(declared, (str, bytes)):
        for item in declared.values() if isinstance(declared, Mapping) else declared:
            yield from _tensors_in(item, supposed)
    else:
        raise TypeError(f"frozen= takes tensors, modules or an iterable of these, not {type(declared).__name__}")
